//! Generation on the CUDA device over the emulator: a row of every operation has the same bits alone and among others, so that a response
//! file is the same bytes under every batch, piece of a prompt, guess and layout.

use crate::canonical_cases;
use crate::common::models;
use crate::emulator::{Emulator, emulator, hopper};
use std::sync::Arc;
use trireme::comm::{Groups, threads};
use trireme::device::cuda::Cuda;
use trireme::device::{Device, Scratch};
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::kv_memory::Room;
use trireme::infer::load::layout_for;
use trireme::infer::request::{Request, Response};
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::schedule::Sharing;
use trireme::model::chunk::{Chunk, MicroBatch, Output, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::DType;

/// Query heads, kv heads, head dim.
type Sizes = [usize; 3];

fn model([n_heads, n_kv_heads, head_dim]: Sizes) -> ModelConfig {
    let rope_scaling = Some(models::yarn(16));
    let sizes = models::nemotron([2, 32, n_heads, n_kv_heads, head_dim, 48, 40], 200);
    ModelConfig { vocab_divisor: 96, rotary_fraction: 0.5, rope_scaling, init_std: 0.3, ..sizes }
}

/// Beginnings of a page and more that requests share, greedy and drawn, of lengths around a page.
fn requests() -> Vec<Request> {
    let tokens = |n: usize, seed: u64| (0..n as u64).map(|i| 2 + (Random::new(seed, "prompt").bits(i) % 38) as u32).collect::<Vec<u32>>();
    let prompt = |n: usize, tail: usize| [&tokens(70, 1)[..n], &tokens(tail, 100 + tail as u64)].concat();
    let request = |id: &str, prompt: Vec<u32>, n_new: usize, temperature| {
        let plain = Request::new(id, prompt, n_new);
        Request { sampling: Sampling { temperature, ..Sampling::PLAIN }, seed: 11, ..plain }
    };
    vec![
        request("greedy", prompt(70, 3), 6, 0.0),
        Request { n: 2, ..request("samples", prompt(66, 1), 4, 1.0) },
        Request { logprobs: Some(3), ..request("logprobs", prompt(0, 1), 7, 1.0) },
        request("whole page", prompt(64, 0), 5, 0.0),
    ]
}

type Machine = fn() -> Option<Arc<Emulator>>;

fn generate(machine: Machine, shape: (usize, usize, usize), batching: Batching, dtype: DType, sizes: Sizes) -> Vec<String> {
    let responses = generate_in(machine, Mode::Reproducible, shape, batching, dtype, sizes);
    responses.iter().map(|response| serde_json::to_string(response).unwrap()).collect()
}

fn generate_in(
    machine: Machine,
    order: Mode,
    shape: (usize, usize, usize),
    batching: Batching,
    dtype: DType,
    sizes: Sizes,
) -> Vec<Response> {
    let (tp, pp, dp) = shape;
    let requests = requests();
    let all = threads::run(tp * pp * dp, |world| {
        let groups = Groups::new(world, layout_for(tp * pp * dp, tp, pp).unwrap());
        let device = Cuda::with_backend(machine().expect("asked for before"));
        let mut chunk = Chunk::new(&device, &model(sizes), &groups.layout, groups.at, 0, dtype, Purpose::Inference).unwrap();
        chunk.initialise(&device, 5);
        chunk.pack(&device, &*groups.tp, WeightFormat::Stored).unwrap();
        let (device, groups, chunk) = (&device, &groups, &chunk);
        let generator = Generator { device, groups, chunk, eos_ids: vec![1], tokenizer: None, batching, order, stop: &|| false };
        let (done, mut mine) = (Done::nothing(&requests), Vec::<(usize, Response)>::new());
        let ran = generator.run(&requests, &done, &mut |sample, response| {
            mine.push((done.number(sample).unwrap(), response));
            Ok(())
        });
        ran.unwrap();
        mine
    });
    let mut responses: Vec<(usize, Response)> = all.into_iter().flatten().collect();
    responses.sort_by_key(|(number, _)| *number);
    assert_eq!(responses.len(), 5, "each sample once");
    responses.into_iter().map(|(_, response)| response).collect()
}

/// Batch sizes, pieces of prompts, guesses, shared pages, tensor-parallel ranks, stages and replicas change no byte of a response, its
/// log-probabilities included: in f32, and in bf16 on tensor cores, whose heads are 64 wide, on every GPU
/// and on Hopper.
#[test]
fn batching_and_layouts_change_no_byte() {
    if emulator().is_none() {
        return;
    }
    let alone = Batching { n_sequences: 1, pass_tokens: 200, sharing: Sharing::Separate, draft_tokens: 0, kv_memory: Room::Unknown };
    for (machine, dtype, head_dim) in [(emulator as Machine, DType::F32, 16), (emulator, DType::BF16, 64), (hopper, DType::BF16, 64)] {
        let sizes = [4, 2, head_dim];
        let expected = generate(machine, (1, 1, 1), alone, dtype, sizes);
        for (shape, n_sequences, pass_tokens, draft_tokens, sharing) in [
            ((1, 1, 1), 4, 64, 0, Sharing::Shared),
            ((1, 1, 1), 3, 37, 4, Sharing::Separate),
            ((1, 1, 1), 2, 100, 4, Sharing::Shared),
            ((2, 1, 1), 4, 50, 0, Sharing::Shared),
            ((2, 1, 2), 1, 64, 4, Sharing::Separate),
            ((1, 2, 1), 2, 33, 0, Sharing::Shared),
        ] {
            let batching = Batching { n_sequences, pass_tokens, sharing, draft_tokens, ..alone };
            assert_eq!(generate(machine, shape, batching, dtype, sizes), expected, "{shape:?} {batching:?} {dtype:?}");
        }
    }
}

/// Nor do three ranks, which have no whole pieces of a sum that is cut in 8 and divide outputs instead.
#[test]
fn three_ranks_change_no_byte() {
    if emulator().is_none() {
        return;
    }
    for (machine, dtype) in [(emulator as Machine, DType::F32), (hopper, DType::BF16)] {
        let (alone, together) = (Batching { n_sequences: 1, draft_tokens: 0, ..Batching::default() }, Batching::default());
        let expected = generate(machine, (1, 1, 1), alone, dtype, [3, 3, 64]);
        assert_eq!(generate(machine, (3, 1, 1), together, dtype, [3, 3, 64]), expected, "{dtype:?}");
    }
}

/// The loss of each of `n_tokens` tokens on so many tensor-parallel ranks, which agree, as bits.
fn losses(machine: Machine, dtype: DType, tp: usize, n_tokens: usize) -> Vec<u32> {
    let tokens: Vec<u32> = (0..=n_tokens as u32).map(|i| 7 * i % 40).collect();
    let all = threads::run(tp, |world| {
        let groups = Groups::new(world, layout_for(tp, tp, 1).unwrap());
        let device = Cuda::with_backend(machine().expect("asked for before"));
        let mut chunk = Chunk::new(&device, &model([3, 3, 64]), &groups.layout, groups.at, 0, dtype, Purpose::Inference).unwrap();
        chunk.initialise(&device, 5);
        let positions: Vec<u32> = (0..n_tokens as u32).collect();
        let columns = [&tokens[..n_tokens], &tokens[1..], &positions];
        let batch = MicroBatch::new(&device, columns, &vec![0.0; n_tokens], vec![0, n_tokens]).unwrap();
        let (scratch, numerics) = (Scratch::new(), Numerics::of_inference(&device));
        let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
        let Output::TokenLosses(found) = chunk.forward(&ctx, None, &batch, None) else { panic!("a language model") };
        found.losses.iter().map(|loss| loss.to_bits()).collect::<Vec<u32>>()
    });
    assert!(all.iter().all(|losses| *losses == all[0]), "ranks disagree");
    all.into_iter().next().expect("at least one rank")
}

/// Nor does a loss change, whose exponentials one of the three ranks sums: of 7 tokens, and of 2, of which one rank has none.
#[test]
fn three_ranks_change_no_loss() {
    if emulator().is_none() {
        return;
    }
    for (machine, dtype) in [(emulator as Machine, DType::F32), (hopper, DType::BF16)] {
        for n_tokens in [7, 2] {
            assert_eq!(losses(machine, dtype, 3, n_tokens), losses(machine, dtype, 1, n_tokens), "{dtype:?}, {n_tokens} tokens");
        }
    }
}

/// The order of sums is the one asked for: fast takes the library's products, which say the same in f32 within its rounding (logits below
/// 10 that are sums of 40 terms, over two layers), and not in the same bits.
#[test]
fn fast_numerics_take_the_shortest_sums() {
    if emulator().is_none() {
        return;
    }
    let alone = Batching { n_sequences: 1, pass_tokens: 200, sharing: Sharing::Separate, draft_tokens: 0, kv_memory: Room::Unknown };
    let [fast, reproducible] =
        [Mode::Fast, Mode::Reproducible].map(|order| generate_in(emulator, order, (1, 1, 1), alone, DType::F32, [4, 2, 16]));
    let logprobs = |responses: &[Response]| responses.iter().map(|response| response.logprob).collect::<Vec<f64>>();
    for (fast, reproducible) in fast.iter().zip(&reproducible) {
        assert_eq!(fast.tokens, reproducible.tokens);
        assert!((fast.logprob - reproducible.logprob).abs() < 1e-4, "{} {}", fast.logprob, reproducible.logprob);
    }
    assert_ne!(logprobs(&fast), logprobs(&reproducible));
}

#[test]
fn a_row_of_attention_does_not_see_its_neighbours() {
    let Some(emulator) = emulator() else { return };
    let device = Cuda::with_backend(emulator);
    canonical_cases::a_row_of_attention_does_not_see_its_neighbours(&device);
    assert_eq!(device.memory().live_bytes, 0);
}
