//! Decode steps that were recorded: asked for again, they are the steps that would have been asked for one by one. Over the emulator,
//! whose recordings run the kernels with the arguments of their time, and on the stand-ins of the driver.

use crate::driver::{inside, is_inside, stand_ins};
use crate::pooled::Pooled;
use std::sync::Arc;
use trireme::comm::solo::Solo;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Backend;
use trireme::device::{Activation, CacheSpan, Device, KvCache, NormKind, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, Purpose};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Caches so long that keys are shared out between blocks.
const MAX_TOKENS: usize = 600;
const SLOTS: usize = 4;

fn model() -> ModelConfig {
    ModelConfig {
        n_layers: 2,
        hidden: 32,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        ffn_hidden: 48,
        vocab_size: 61,
        vocab_divisor: 8,
        max_tokens: MAX_TOKENS,
        norm: NormKind::LayerNorm1P,
        norm_eps: 1e-5,
        activation: Activation::SquaredRelu,
        rotary_fraction: 0.5,
        rope_base: 10000.0,
        tied_embeddings: false,
        head: HeadKind::Vocabulary,
        init_std: 0.1,
    }
}

/// A model with caches whose every row holds something.
fn model_and_caches(device: &dyn Device) -> (Chunk, Vec<KvCache>) {
    let (layout, at) = (ParallelLayout::SINGLE, Coords { tp: 0, pp: 0, dp: 0 });
    let mut chunk = Chunk::new(device, &model(), &layout, at, 0, DType::F32, Purpose::Inference).unwrap();
    chunk.initialise(device, 3);
    let mut caches = chunk.new_caches(device, SLOTS, MAX_TOKENS).unwrap();
    let noise = Random::new(8, "caches");
    for (i, tensor) in caches.iter_mut().flat_map(|cache| [&mut cache.keys, &mut cache.values]).enumerate() {
        let n = tensor.n_elements() as u64;
        let values: Vec<f32> = (0..n).map(|j| noise.normal(i as u64 * n + j) as f32).collect();
        device.upload(bytemuck::cast_slice(&values), tensor);
    }
    (chunk, caches)
}

/// Slots and pasts of a step's sequences, each with one new token.
fn spans(places: &[(usize, usize)]) -> Vec<CacheSpan> {
    places.iter().enumerate().map(|(row, (slot, past))| CacheSpan { rows: row..row + 1, slot: *slot, past: *past }).collect()
}

/// Steps of two sizes in turn, of sequences that grow, leave their slots and come to others.
fn steps() -> Vec<Vec<CacheSpan>> {
    let grown = |by: usize| spans(&[(2, 5 + by), (0, 254 + by), (3, 509 + by)]);
    let mut steps: Vec<_> = (0..5).map(grown).collect();
    steps.insert(2, spans(&[(1, 40)]));
    steps.insert(4, spans(&[(1, 41)]));
    steps.extend([spans(&[(1, 42)]), spans(&[(3, 0)]), spans(&[(1, 0), (3, 599), (0, 17)]), spans(&[(0, 300)])]);
    steps
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    bytemuck::cast_slice(&tensor.host_bytes()).to_vec()
}

/// A step asked for in one call reads the tokens, positions, slots and lengths of its time, not those it was recorded with: its logits
/// and what it adds to the caches have the bits of the same step asked for operation by operation. It asks for no memory.
#[test]
fn recorded_steps_see_new_values() {
    let Some(backend) = Pooled::new() else { return };
    let device = Cuda::with_backend(Arc::clone(&backend) as Arc<dyn Backend>);
    let solo = Solo::new();
    let ((chunk, mut caches), (_, mut expected_caches)) = (model_and_caches(&device), model_and_caches(&device));
    let scratch = Scratch::new();
    let ctx = Ctx { device: &device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated };
    let (mut decoder, mut n_recorded) = (Decoder::default(), 0);
    for (i, spans) in steps().iter().enumerate() {
        let tokens: Vec<u32> = (0..spans.len()).map(|row| ((7 * i + 13 * row) % 61) as u32).collect();
        let positions: Vec<u32> = spans.iter().map(|span| span.past as u32).collect();
        let before = backend.n_asked();
        let found = bits(decoder.logits(&ctx, &chunk, &NewTokens { tokens: &tokens, positions: &positions, spans }, &mut caches));
        // Steps of a size are the first, the recorded one, and then those that are asked for in one call, without any memory.
        let n_before = steps()[..i].iter().filter(|other| other.len() == spans.len()).count();
        n_recorded += usize::from(n_before > 0);
        assert!(backend.n_replays() == n_recorded && (n_before < 2 || backend.n_asked() == before), "step {i}");
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

fn record_on_the_device() {
    let cuda = Cuda::open(0).unwrap();
    let mut x = cuda.alloc(&[3], DType::F32).unwrap();
    let mut y = cuda.alloc(&[3], DType::F32).unwrap();
    let recording = cuda.record(&mut || {
        Device::copy(&cuda, &mut y, &x);
        cuda.scale(&mut y, 2.0);
    });
    let recording = recording.unwrap();
    for values in [[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]] {
        cuda.upload(bytemuck::cast_slice(&values), &mut x);
        recording.replay(&[]);
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&y.host_bytes()), values.map(|value| 2.0 * value));
    }
    drop(recording);
    // An upload would be recorded with its bytes of today.
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let bytes = [0u8; 12];
        cuda.record(&mut || cuda.upload(&bytes, &mut x));
    }));
    let message = refused.expect_err("an upload was recorded");
    assert!(message.downcast_ref::<String>().unwrap().contains("an upload while work is recorded"));
}

/// The driver captures the compute stream, makes a graph of it that does nothing yet, and launches that each time.
#[test]
fn the_driver_records_graphs() {
    if is_inside() {
        return record_on_the_device();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let log = inside(folder.path(), "decode::the_driver_records_graphs", &[]);
    let graphs: Vec<&String> = log.iter().filter(|line| line.contains("graph")).collect();
    assert_eq!(graphs, ["graph of 2 calls", "graph launched", "graph launched", "graph ended"]);
}
