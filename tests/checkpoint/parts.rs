//! A small model in pieces as the ranks of a training job hold them, with values by a formula of the global index of an element,
//! so that no slice arithmetic of the library takes part in what is true.

use crate::common::models;
use std::path::Path;
use trireme::artifact::Manifest;
use trireme::checkpoint::{self, Meta, Piece, Wanted};
use trireme::comm::{Communicator, threads};
use trireme::error::Result;
use trireme::model::config::ModelConfig;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

pub fn model(tied_embeddings: bool) -> ModelConfig {
    ModelConfig { vocab_divisor: 8, tied_embeddings, ..models::nemotron([4, 24, 8, 4, 6, 20, 99], 32) }
}

pub fn meta(model: ModelConfig, layout: ParallelLayout, step: u64) -> Meta {
    Meta {
        step,
        consumed_samples: 8 * step,
        model,
        layout,
        recipe: serde_json::json!({"train": {"seed": 7}}),
        data_fingerprint: "0123456789abcdef".into(),
        tokenizer: Some(b"not really a tokenizer".to_vec()),
        companions: Default::default(),
        trainer: serde_json::json!({"updates": step}),
    }
}

/// The bits of element `index` (row-major in the whole tensor) of the tensor `name`; bf16 bits stand in the upper half.
pub fn truth(seed: u64, name: &str, index: usize, dtype: DType) -> u32 {
    let value = (Random::new(seed, name).normal(index as u64) as f32).to_bits();
    match dtype {
        DType::BF16 => round_to_bf16(value),
        _ => value,
    }
}

/// To nearest even, by integers alone: no code shared with the library's conversion. Finite values.
pub fn round_to_bf16(bits: u32) -> u32 {
    let half_way = 0x7fff + ((bits >> 16) & 1);
    (bits + half_way) & 0xffff_0000
}

/// Row-major global indices of a slice, by counting.
pub fn global_indices(shape: &[usize], slice: &Slice) -> Vec<usize> {
    let n: usize = slice.shape.iter().product();
    let at = |flat: usize| {
        let (mut rest, mut stride, mut index) = (flat, 1, 0);
        for d in (0..shape.len()).rev() {
            index += (slice.offset[d] + rest % slice.shape[d]) * stride;
            rest /= slice.shape[d];
            stride *= shape[d];
        }
        index
    };
    (0..n).map(at).collect()
}

pub fn tensor_of(bits: &[u32], dtype: DType) -> Tensor {
    let mut tensor = Tensor::host(&[bits.len().max(1)], dtype, None).unwrap();
    for (i, &bits) in bits.iter().enumerate() {
        match dtype {
            DType::BF16 => tensor.bf16_mut()[i] = half::bf16::from_bits((bits >> 16) as u16),
            DType::F32 => tensor.f32_mut()[i] = f32::from_bits(bits),
            DType::U32 => tensor.u32_mut()[i] = bits,
            DType::F8E4M3 => unreachable!("not stored"),
        }
    }
    tensor
}

pub fn bits_of(tensor: &Tensor) -> Vec<u32> {
    match tensor.dtype() {
        DType::BF16 => tensor.bf16().iter().map(|x| u32::from(x.to_bits()) << 16).collect(),
        DType::F32 => tensor.f32().iter().map(|x| x.to_bits()).collect(),
        DType::U32 => tensor.u32().to_vec(),
        DType::F8E4M3 => unreachable!("not stored"),
    }
}

pub struct Part {
    pub name: String,
    pub shape: Vec<usize>,
    pub slice: Slice,
    pub dtype: DType,
}

/// What a rank of a training job holds: weights of its tp slice (replicated over dp, norms over tp too), and the rows of
/// the optimizer state that it owns.
pub fn held(model: &ModelConfig, layout: &ParallelLayout, rank: usize) -> Vec<Part> {
    let at = layout.coords(rank);
    let mut parts: Vec<Part> = Vec::new();
    for spec in (0..layout.vp).flat_map(|chunk| model.chunk_specs(layout, at.pp, chunk)) {
        let mut add = |group: &str, slice: Slice, dtype| {
            let name = format!("{group}/{}", spec.name);
            if !parts.iter().any(|part: &Part| part.name == name) {
                parts.push(Part { name, shape: spec.shape.clone(), slice, dtype });
            }
        };
        add("weights", spec.tp_slice(at.tp, layout.tp), DType::BF16);
        for group in ["master", "adam_m", "adam_v"] {
            add(group, spec.dp_slice(layout, at), DType::F32);
        }
    }
    parts
}

/// Saves values by their formula.
pub fn save_parts(out: &Path, meta: &Meta, parts: &[Part], seed: u64, world: &dyn Communicator) -> Result<Manifest> {
    let bits = |part: &Part| global_indices(&part.shape, &part.slice).into_iter().map(|i| truth(seed, &part.name, i, part.dtype)).collect();
    save_values(out, meta, parts, &parts.iter().map(bits).collect::<Vec<_>>(), world)
}

/// Saves these bits of each part.
pub fn save_values(out: &Path, meta: &Meta, parts: &[Part], values: &[Vec<u32>], world: &dyn Communicator) -> Result<Manifest> {
    let tensors: Vec<Tensor> = parts.iter().zip(values).map(|(part, bits)| tensor_of(bits, part.dtype)).collect();
    // An empty part still needs a tensor object, of which it takes no row.
    let views: Vec<_> = parts.iter().zip(&tensors).map(|(part, tensor)| tensor.rows(0..part.slice.n_elements())).collect();
    let pieces: Vec<Piece> = parts
        .iter()
        .zip(&views)
        .map(|(part, tensor)| Piece { name: part.name.clone(), global_shape: part.shape.clone(), slice: part.slice.clone(), tensor })
        .collect();
    checkpoint::save(out, meta, &pieces, world)
}

pub fn load_parts(from: &Path, parts: &[Part]) -> Result<Vec<Vec<u32>>> {
    let stored = checkpoint::open(from)?;
    let mut tensors: Vec<Tensor> = parts.iter().map(|part| tensor_of(&vec![0x7fc0_0000; part.slice.n_elements()], part.dtype)).collect();
    let mut views: Vec<_> = tensors.iter_mut().zip(parts).map(|(tensor, part)| tensor.rows_mut(0..part.slice.n_elements())).collect();
    let mut wanted: Vec<Wanted> =
        parts.iter().zip(&mut views).map(|(part, tensor)| Wanted { name: part.name.clone(), slice: part.slice.clone(), tensor }).collect();
    stored.read(&mut wanted)?;
    Ok(views.iter().map(|view| bits_of(view)).collect())
}

pub fn assert_true(parts: &[Part], values: &[Vec<u32>], seed: u64) {
    for (part, found) in parts.iter().zip(values) {
        let expected: Vec<u32> =
            global_indices(&part.shape, &part.slice).into_iter().map(|i| truth(seed, &part.name, i, part.dtype)).collect();
        assert!(*found == expected, "{} {:?}", part.name, part.slice);
    }
}

/// A checkpoint of `step` from two ranks, each with half of everything.
pub fn save_small(out: &Path, step: u64, seed: u64) {
    let layout = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    threads::run(2, |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(out, &meta(model(false), layout, step), &parts, seed, &*world).unwrap();
    });
}

pub fn all_parts() -> Vec<Part> {
    held(&model(false), &ParallelLayout::SINGLE, 0)
}

pub fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
