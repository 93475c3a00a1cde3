//! Decode steps on the CUDA device, as `infer::decode` runs them, against the same steps asked for operation by operation: over the
//! emulator and on a GPU.
#![allow(dead_code)] // not every test program uses all

pub mod fused;
pub mod sample;

use crate::common::models;
use trireme::comm::solo::Solo;
use trireme::device::cuda::Cuda;
use trireme::device::{CacheSpan, Device, Fp8Scales, KvCache, PAGE_TOKENS, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Caches so long that keys are shared out between blocks: in shares of 512.
const MAX_TOKENS: usize = 600;
/// Of the caches: fewer than sequences in them could need.
const PAGES: usize = 30;

fn model(head_dim: usize) -> ModelConfig {
    let rope_scaling = Some(models::yarn(32));
    ModelConfig { vocab_divisor: 8, rope_scaling, init_std: 0.1, ..models::nemotron([2, 32, 4, 2, head_dim, 48, 61], MAX_TOKENS) }
}

/// What steps are made with.
#[derive(Clone, Copy)]
pub struct How {
    /// Storage.
    pub dtype: DType,
    /// Weights are E4M3.
    pub weights: Option<Fp8Scales>,
    /// Order of sums.
    pub order: Mode,
    /// With 64, 128 and 192 attention is on tensor cores in bf16.
    pub head_dim: usize,
}

impl How {
    pub const PLAIN: How = How { dtype: DType::F32, weights: None, order: Mode::Fast, head_dim: 16 };
}

/// A model with caches whose every row holds something.
fn model_and_caches(device: &dyn Device, how: How) -> (Chunk, Vec<KvCache>) {
    let (layout, at) = (ParallelLayout::SINGLE, Coords { tp: 0, pp: 0, dp: 0 });
    let mut chunk = Chunk::new(device, &model(how.head_dim), &layout, at, 0, how.dtype, Purpose::Inference).unwrap();
    chunk.initialise(device, 3);
    how.weights.iter().for_each(|scales| chunk.pack(device, &Solo::new(), WeightFormat::Fp8(*scales)).unwrap());
    let mut caches = chunk.new_caches(device, PAGES).unwrap();
    let noise = Random::new(8, "caches");
    for (i, tensor) in caches.iter_mut().flat_map(|cache| [&mut cache.keys, &mut cache.values]).enumerate() {
        let n = tensor.n_elements() as u64;
        let values: Vec<f32> = (0..n).map(|j| noise.normal(i as u64 * n + j) as f32).collect();
        device.upload(
            if how.dtype == DType::F32 { Tensor::from_f32(&[values.len()], &values) } else { Tensor::from_bf16(&[values.len()], &values) }
                .bytes(),
            tensor,
        );
    }
    (chunk, caches)
}

/// First pages and pasts of a step's sequences, each with one new token. A sequence's pages follow its first in strides of 7.
fn spans(places: &[(usize, usize)]) -> Vec<CacheSpan> {
    let span = |(row, (first, past)): (usize, &(usize, usize))| {
        let pages = (0..past / PAGE_TOKENS + 1).map(|i| ((first + 7 * i) % PAGES) as u32).collect();
        CacheSpan { rows: row..row + 1, past: *past, pages }
    };
    places.iter().enumerate().map(span).collect()
}

/// Steps of two sizes in turn, of sequences that grow, leave their pages and come to others.
fn steps() -> Vec<Vec<CacheSpan>> {
    let grown = |by: usize| spans(&[(2, 5 + by), (0, 254 + by), (3, 509 + by)]);
    let mut steps: Vec<_> = (0..5).map(grown).collect();
    steps.insert(2, spans(&[(1, 40)]));
    steps.insert(4, spans(&[(1, 41)]));
    steps.extend([spans(&[(1, 42)]), spans(&[(3, 0)]), spans(&[(2, 0), (3, 599), (0, 17)]), spans(&[(0, 300)])]);
    steps
}

/// The step in which the third sequence fills a second share of keys.
const OUTGROWN: usize = 5;

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor.host_bytes().to_vec()
}

/// A step asked for in one call has the bits, in its logits and in what it adds to the caches, of the same step asked for one by one.
/// `after_step` is told whether the step was one that is asked for in one call.
pub fn check(device: &Cuda, how: How, mut after_step: impl FnMut(bool)) {
    let solo = Solo::new();
    let ((chunk, mut caches), (_, mut expected_caches)) = (model_and_caches(device, how), model_and_caches(device, how));
    let scratch = Scratch::new();
    let numerics = if how.order == Mode::Fast { Numerics::Fast } else { Numerics::of_inference(device) };
    let ctx = Ctx { device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
    let mut decoder = Decoder::default();
    for (i, spans) in steps().iter().enumerate() {
        let tokens: Vec<u32> = (0..spans.len()).map(|row| ((7 * i + 13 * row) % 61) as u32).collect();
        let positions: Vec<u32> = spans.iter().map(|span| span.past as u32).collect();
        let found = bits(decoder.logits(&ctx, &chunk, &NewTokens { tokens: &tokens, positions: &positions, spans }, &mut caches));
        // Steps of a size are the first, and then those that are asked for in one call, until a sequence outgrows the recording.
        after_step(i != OUTGROWN && steps()[..i].iter().any(|other| other.len() == spans.len()));
        let tensor = |values: &[u32]| {
            let mut tensor = device.alloc(&[values.len()], DType::U32).unwrap();
            device.upload(bytemuck::cast_slice(values), &mut tensor);
            tensor
        };
        let (tokens, positions) = (tensor(&tokens), tensor(&positions));
        let rows: Vec<usize> = (0..spans.len()).collect();
        let once = Scratch::new();
        let ctx = Ctx { scratch: &once, ..ctx };
        let expected = chunk.forward_cached(&ctx, CachedInput::Tokens(&tokens), &positions, spans, &mut expected_caches, &rows);
        let CachedOutput::Logits(expected) = expected else { panic!("the whole model") };
        assert_eq!(found, bits(&expected), "step {i}: {spans:?}");
    }
    for (found, expected) in caches.iter().zip(&expected_caches) {
        assert!(bits(&found.keys) == bits(&expected.keys) && bits(&found.values) == bits(&expected.values));
    }
}
