//! Products with packed weights, the form in which generation multiplies on the CPU: right, and the same bits for a row whatever stands
//! beside it and however many ranks share the work.

mod common;
#[path = "packed/int8.rs"]
mod int8;

use trireme::checkpoint;
use trireme::comm::solo::Solo;
use trireme::comm::threads;
use trireme::comm::{Communicator, Groups};
use trireme::device::canonical::CanonicalSums;
use trireme::device::cpu::{Cpu, Isa};
use trireme::device::packed::{PackedProducts, PackedWeight};
use trireme::device::{CacheSpan, Device, Fp8Scales, Gemm, NormKind, Scratch};
use trireme::infer::load::{load_chunk, load_packed};
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::parallel::pieces::{TP_PIECES, pieces};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

const ISAS: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];
/// (rows, output channels, terms): around the sizes of tiles, panels, pieces and slabs, and of a real layer.
const SHAPES: [(usize, usize, usize); 9] =
    [(1, 1, 1), (1, 75, 3), (2, 33, 40), (5, 32, 104), (7, 64, 17), (15, 96, 768), (29, 31, 1537), (3, 40, 5000), (2, 3, 24_600)];

fn values(name: &str, n: usize) -> Vec<f32> {
    let noise = Random::new(1, name);
    (0..n as u64).map(|i| noise.normal(i) as f32 * 2f32.powi((noise.bits(i) % 9) as i32 - 4)).collect()
}

fn tensor(dtype: DType, dims: &[usize], values: &[f32]) -> Tensor {
    if dtype == DType::F32 { Tensor::from_f32(dims, values) } else { Tensor::from_bf16(dims, values) }
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_f32_vec().iter().map(|x| x.to_bits()).collect()
}

/// An output full of NaN, so that an element that is not written shows.
fn poisoned(dims: &[usize], dtype: DType) -> Tensor {
    tensor(dtype, dims, &vec![f32::NAN; dims.iter().product()])
}

fn packing(device: &dyn Device) -> &dyn PackedProducts {
    device.packed().expect("the CPU packs")
}

fn multiply(device: &dyn Device, x: &Tensor, weight: &PackedWeight, out_dtype: DType) -> Tensor {
    let mut out = poisoned(&[x.n_rows(), weight.n_rows], out_dtype);
    packing(device).multiply(&mut out, x, weight);
    out
}

/// Each element is within the rounding of its own sum of the f64 product. A term is rounded when it is added to a chain (a pair of bf16
/// terms twice), a piece has at most ceil(k / pieces) terms and as many sums of slabs, pieces add log2 8 = 3 more; u = 2^-24 each, and
/// vdpbf16ps loses less than 2^-126 a term.
#[test]
fn packed_products_are_those_of_f64() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        for ((m, n, k), n_pieces) in SHAPES.into_iter().flat_map(|shape| [1, 2, 8].map(|n_pieces| (shape, n_pieces))) {
            let (x, w) = (tensor(dtype, &[m, k], &values("x", m * k)), tensor(dtype, &[n, k], &values("w", n * k)));
            let found = multiply(&device, &x, &packing(&device).pack(&w, n_pieces).unwrap(), DType::F32);
            let (x, w) = (x.to_f32_vec(), w.to_f32_vec());
            let longest = pieces(k, n_pieces).iter().map(|piece| piece.len()).max().unwrap();
            let roundings = (longest + longest.div_ceil(1536) + 3) as f64;
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let terms = || (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l]));
                let (exact, sizes): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                let bound = roundings * 2f64.powi(-24) * sizes + k as f64 * 2f64.powi(-126);
                let found = f64::from(found.f32()[i * n + j]);
                assert!((found - exact).abs() <= bound, "{isa:?} {dtype:?} {m} x {n} x {k}, {n_pieces}: {found} for {exact} +- {bound}");
            }
        }
    }
}

/// Bit by bit the products of reproducible training, in f32 and rounded: so generation has the logits of a reproducible forward pass.
#[test]
fn packed_products_are_the_canonical_ones() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        for ((m, n, k), n_pieces) in SHAPES.into_iter().flat_map(|shape| [1, 2, 4, 8].map(|n_pieces| (shape, n_pieces))) {
            let (x, w) = (tensor(dtype, &[m, k], &values("x", m * k)), tensor(dtype, &[n, k], &values("w", n * k)));
            let packed = packing(&device).pack(&w, n_pieces).unwrap();
            for out_dtype in [DType::F32, dtype] {
                let mut expected = poisoned(&[m, n], out_dtype);
                device.gemm_in_pairs(&mut expected, &x, &w, Gemm::NT, n_pieces);
                let found = multiply(&device, &x, &packed, out_dtype);
                assert_eq!(bits(&found), bits(&expected), "{isa:?} {dtype:?} to {out_dtype:?} {m} x {n} x {k}, {n_pieces} pieces");
            }
        }
    }
}

/// A row has the same bits alone and among 1 to 40 others at any place, on any number of threads: tiles are cut by the number of rows,
/// and a sum that went by its tile would change with the batch.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        let (most, n, k) = (41, 75, 333);
        let (x, w) = (values("x", most * k), tensor(dtype, &[n, k], &values("w", n * k)));
        let packed = packing(&device).pack(&w, TP_PIECES).unwrap();
        let product = |rows: std::ops::Range<usize>| {
            let x = tensor(dtype, &[rows.len(), k], &x[rows.start * k..rows.end * k]);
            bits(&multiply(&device, &x, &packed, DType::F32))
        };
        let alone: Vec<Vec<u32>> = (0..most).map(|row| product(row..row + 1)).collect();
        for m in 1..=most {
            let first = (most - m) / 2;
            assert_eq!(product(first..first + m), alone[first..first + m].concat(), "{isa:?} {dtype:?}: {m} rows");
        }
        assert_eq!(one.install(|| product(0..most)), alone.concat(), "{isa:?} {dtype:?}: one thread");
        assert_eq!(three.install(|| product(0..most)), alone.concat(), "{isa:?} {dtype:?}: three threads");
        for m in [1, 2, 16, 31, most] {
            let mut found = Vec::new();
            three.install(|| device.run_together(&mut || found = product(0..m)));
            assert_eq!(found, alone[..m].concat(), "{isa:?} {dtype:?}: {m} rows in small tasks");
        }
    }
}

/// The rows of a packed table are those of the table, to the bit, and -0 where another rank has the row.
#[test]
fn rows_are_looked_up_in_packed_tables() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        for (n, k) in [(70, 33), (33, 1540), (1, 8)] {
            let table = tensor(dtype, &[n, k], &values("table", n * k));
            let packed = packing(&device).pack(&table, 1).unwrap();
            let tokens: Vec<u32> = (0..n as u32 + 12).chain([5, 6, 5]).collect();
            let tokens = Tensor::from_u32(&[tokens.len()], &tokens);
            let [mut found, mut expected] = [(); 2].map(|()| poisoned(&[tokens.n_rows(), k], dtype));
            packing(&device).look_up(&mut found, &tokens, &packed, 6);
            device.embed(&mut expected, &tokens, &table, 6);
            assert_eq!(bits(&found), bits(&expected), "{isa:?} {dtype:?} {n} x {k}");
        }
    }
}

/// A Llama-shaped model that shares its embedding with the output layer, or the tiny one.
fn model(tied: bool) -> ModelConfig {
    let tiny = common::tiny_model();
    if !tied {
        return tiny;
    }
    let activation = trireme::device::Activation::Swiglu;
    ModelConfig { norm: NormKind::RmsNorm, activation, rotary_fraction: 1.0, tied_embeddings: true, ..tiny }
}

/// What passes of a rank gave: the logits of the last token of two prompts, then of steps of one token each, [rows, V].
fn logits_of(config: &ModelConfig, dtype: DType, tp: usize, format: Option<WeightFormat>) -> Vec<u32> {
    let layout = ParallelLayout { tp, pp: 1, dp: 1, vp: 1 };
    let all = threads::run(tp, |world: Box<dyn Communicator>| {
        let groups = Groups::new(world, layout);
        let device = Cpu::new();
        let at = Coords { tp: groups.at.tp, pp: 0, dp: 0 };
        let mut chunk = Chunk::new(&device, config, &layout, at, 0, dtype, Purpose::Inference).unwrap();
        chunk.initialise(&device, 3);
        format.into_iter().for_each(|format| chunk.pack(&device, &*groups.tp, format).unwrap());
        passes(&device, &groups, &chunk)
    });
    // [tp][rows, V/tp] -> [rows, V]
    let n_rows = 6;
    let columns = all[0].len() / n_rows;
    (0..n_rows).flat_map(|row| all.iter().flat_map(move |part| part[row * columns..][..columns].to_vec())).collect()
}

fn passes(device: &Cpu, groups: &Groups, chunk: &Chunk) -> Vec<u32> {
    let (scratch, numerics) = (Scratch::new(), Numerics::of_inference(device));
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
    let mut caches = chunk.new_caches(device, 2).unwrap();
    let mut logits = Vec::new();
    let mut pass = |tokens: &[u32], positions: &[u32], spans: &[CacheSpan], wanted: &[usize]| {
        let (tokens, positions) = (Tensor::from_u32(&[tokens.len()], tokens), Tensor::from_u32(&[positions.len()], positions));
        let CachedOutput::Logits(found) = chunk.forward_cached(&ctx, CachedInput::Tokens(&tokens), &positions, spans, &mut caches, wanted)
        else {
            panic!("the whole model ends in logits");
        };
        logits.extend(bits(&found));
    };
    let prompts = [CacheSpan { rows: 0..5, past: 0, pages: vec![0] }, CacheSpan { rows: 5..8, past: 0, pages: vec![1] }];
    pass(&[3, 1, 60, 59, 8, 22, 5, 17], &[0, 1, 2, 3, 4, 0, 1, 2], &prompts, &[4, 7]);
    for step in 0..2 {
        let spans = [CacheSpan { rows: 0..1, past: 5 + step, pages: vec![0] }, CacheSpan { rows: 1..2, past: 3 + step, pages: vec![1] }];
        pass(&[9 + step as u32, 33], &[5 + step as u32, 3 + step as u32], &spans, &[0, 1]);
    }
    logits
}

/// Column- and row-parallel layers, vocabulary-parallel embedding and output layer, tied and not: the logits of prompts and steps have
/// the same bits on one rank, two and four, and those of weights that are not packed. A partial sum that is rounded before it is added
/// to those of the other ranks fails here in bf16, a sum in rank order in both, a scale of a rank's part of a row in int8.
#[test]
fn logits_do_not_depend_on_the_ranks() {
    for (tied, dtype) in [false, true].into_iter().flat_map(|tied| [(tied, DType::F32), (tied, DType::BF16)]) {
        let config = model(tied);
        let expected = logits_of(&config, dtype, 1, None);
        assert!(expected.iter().all(|x| f32::from_bits(*x).is_finite()) && expected.iter().any(|x| *x != expected[0]));
        for tp in [1, 2, 4] {
            let found = logits_of(&config, dtype, tp, Some(WeightFormat::Stored));
            assert!(found == expected, "tied {tied} {dtype:?}: tp {tp}, packed");
        }
        assert!(logits_of(&config, dtype, 2, None) == expected, "tied {tied} {dtype:?}: tp 2, not packed");
        let of_int8 = logits_of(&config, dtype, 1, Some(WeightFormat::Int8));
        assert!(of_int8 != expected && of_int8.iter().all(|x| f32::from_bits(*x).is_finite()));
        for tp in [2, 4] {
            assert!(logits_of(&config, dtype, tp, Some(WeightFormat::Int8)) == of_int8, "tied {tied} {dtype:?}: tp {tp}, int8");
        }
    }
}

/// Packing takes no more than the largest weight beside what is held, and afterwards what is held has grown by padding alone: a second
/// copy of the model would be seen at once.
#[test]
fn packing_holds_one_copy_and_a_weight() {
    let config = ModelConfig { hidden: 96, ffn_hidden: 400, vocab_size: 1000, vocab_divisor: 128, ..common::tiny_model() };
    for dtype in [DType::F32, DType::BF16] {
        let device = Cpu::new();
        let layout = ParallelLayout::SINGLE;
        let mut chunk = Chunk::new(&device, &config, &layout, Coords { tp: 0, pp: 0, dp: 0 }, 0, dtype, Purpose::Inference).unwrap();
        let before = device.memory();
        assert_eq!(before.live_bytes, before.peak_bytes);
        chunk.pack(&device, &trireme::comm::solo::Solo::new(), WeightFormat::Stored).unwrap();
        let after = device.memory();
        let packed: Vec<&PackedWeight> = chunk.params().into_iter().filter_map(|param| param.packed.as_ref()).collect();
        assert_eq!(packed.len(), 4 * config.n_layers + 1);
        let largest = packed.iter().map(|weight| weight.n_bytes()).max().unwrap();
        // A panel of padding and the least allocation each.
        let padding: usize = packed.iter().map(|weight| 32 * (weight.row_len + TP_PIECES) * dtype.bytes() + 64).sum();
        assert!(after.live_bytes <= before.live_bytes + padding, "{after:?}, {before:?}");
        assert!(after.peak_bytes <= before.live_bytes + largest + padding, "{after:?}, {before:?}");
    }
}

/// Weights in a format are packed one by one as they are read: memory never holds more than the packed model and the largest weight as it
/// is stored, which is less than the stored model alone. What comes out is what packing the whole model gives.
#[test]
fn loading_holds_what_is_packed_and_a_weight() {
    let dir = tempfile::tempdir().unwrap();
    common::write_megatron(&dir.path().join("shards"), "train", &common::counting_documents(60, 61, 1));
    let mut recipe = common::tiny_recipe(&dir.path().join("shards"));
    recipe.model = ModelConfig { hidden: 96, ffn_hidden: 400, ..recipe.model };
    recipe.train.samples = 8;
    let run = dir.path().join("run");
    common::train(&recipe, &run, None).unwrap();
    let stored = checkpoint::open(&run).unwrap();
    let groups = Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
    let largest = 400 * 96;
    for dtype in [DType::F32, DType::BF16] {
        for format in [WeightFormat::Int8, WeightFormat::Fp8(Fp8Scales::Rows), WeightFormat::Fp8(Fp8Scales::Tensor)] {
            let device = Cpu::new();
            let chunk = load_packed(&device, &stored, &groups, dtype, format).unwrap();
            let memory = device.memory();
            // Scales and sizes of a weight's rows besides.
            let allowed = memory.live_bytes + largest * dtype.bytes() + 400 * 4 + 64;
            assert!(memory.peak_bytes <= allowed, "{format:?} {dtype:?}: {memory:?}, {allowed} bytes are allowed");
            let other = Cpu::new();
            let mut whole = load_chunk(&other, &stored, &groups, dtype).unwrap();
            whole.pack(&other, &*groups.tp, format).unwrap();
            assert!(other.memory().peak_bytes > allowed, "{format:?} {dtype:?}: the whole model fits as well, so nothing is seen");
            assert_eq!(passes(&device, &groups, &chunk), passes(&other, &groups, &whole), "{format:?} {dtype:?}");
        }
    }
}
