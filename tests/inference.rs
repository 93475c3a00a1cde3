//! Generation and scoring through the code the binaries run: cache against full forward, every layout against one rank.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::Path;
use trireme::checkpoint;
use trireme::comm::{Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::load::{layout_for, load_chunk};
use trireme::infer::request::{FinishReason, Request, Response};
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::score::{self, Scored, Sequence};
use trireme::infer::scorer::Scorer;
use trireme::model::numerics::Numerics;
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::DType;

/// A run of a few steps whose model has an opinion.
fn trained(dir: &Path) -> std::path::PathBuf {
    let shards = dir.join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    recipe.train.samples = 20 * 8;
    let run = dir.join("run");
    train(&recipe, &run, None).unwrap();
    run
}

fn random_tokens(n: usize, seed: u64) -> Vec<u32> {
    let noise = Random::new(seed, "prompt");
    (0..n as u64).map(|i| (noise.bits(i) % 61) as u32).collect()
}

fn generate_on(run: &Path, requests: &[Request], shape: (usize, usize, usize), n_sequences: usize) -> Vec<Response> {
    let (tp, pp, dp) = shape;
    let all = threads::run(tp * pp * dp, |world| {
        let groups = Groups::new(world, layout_for(tp * pp * dp, tp, pp).unwrap());
        let (device, stored) = (Cpu::new(), checkpoint::open(run).unwrap());
        let chunk = load_chunk(&device, &stored, &groups, DType::F32).unwrap();
        let batching = Batching { n_sequences, ..Batching::default() };
        let (device, groups, chunk) = (&device, &groups, &chunk);
        let generator =
            Generator { device, groups, chunk, eos_ids: vec![7], tokenizer: None, batching, order: Mode::Reproducible, stop: &|| false };
        generator.responses(requests).unwrap()
    });
    assert!(all.iter().all(|responses| *responses == all[0]), "ranks disagree");
    all.into_iter().next().unwrap()
}

fn score_on(run: &Path, sequences: &[Sequence], shape: (usize, usize, usize), batch_tokens: usize) -> Vec<Scored> {
    let (tp, pp, dp) = shape;
    let all = threads::run(tp * pp * dp, |world| {
        let groups = Groups::new(world, layout_for(tp * pp * dp, tp, pp).unwrap());
        let (device, stored) = (Cpu::new(), checkpoint::open(run).unwrap());
        let mut chunks = [load_chunk(&device, &stored, &groups, DType::F32).unwrap()];
        let scorer = Scorer { device: &device, groups: &groups, batch_tokens, numerics: Numerics::Fast, stop: &|| false };
        score::logprobs(&scorer, &mut chunks, sequences).unwrap()
    });
    all.into_iter().next().unwrap()
}

fn requests() -> Vec<Request> {
    let sampling = |temperature, top_p, top_k| Sampling { temperature, top_p, top_k, ..Sampling::PLAIN };
    let request = |id: &str, n: usize, max_new_tokens, sampling| {
        let plain = Request::new(id, random_tokens(n, n as u64), max_new_tokens);
        Request { sampling, seed: 11, ..plain }
    };
    vec![
        request("greedy", 5, 12, sampling(0.0, 1.0, 0)),
        request("warm", 1, 12, sampling(1.0, 1.0, 0)),
        request("nothing", 3, 0, sampling(1.0, 1.0, 0)),
        request("nucleus", 9, 7, sampling(0.8, 0.9, 0)),
        request("top-k", 2, 20, sampling(1.3, 1.0, 5)),
        request("to the end", 20, 100, sampling(1.0, 1.0, 0)),
        request("greedy again", 5, 12, sampling(0.0, 1.0, 0)),
    ]
}

/// Log-probabilities of generation with the cache, one token at a time, equal those of the full forward pass over prompt and
/// response: a wrong position, mask or cache row shifts them at once. Sums of at most 32 terms, each a log-softmax of f32
/// logits of magnitude <= 16 whose products have at most 48 terms: 32 * 16 * 8 * eps * sqrt(48) = 3.4e-3 at worst.
#[test]
fn decoding_with_the_cache_equals_the_full_forward() {
    let dir = tempfile::tempdir().unwrap();
    let run = trained(dir.path());
    let requests = requests();
    let responses = generate_on(&run, &requests, (1, 1, 1), 3);
    assert_eq!(responses.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), requests.iter().map(|r| r.id.as_str()).collect::<Vec<_>>());
    let whole = |(request, response): (&Request, &Response)| {
        let stop = (response.finish_reason == FinishReason::Stop).then_some(7);
        let tokens = request.tokens.iter().chain(&response.tokens).copied().chain(stop).collect();
        Sequence { id: request.id.clone(), tokens }
    };
    let sequences: Vec<Sequence> = requests.iter().zip(&responses).map(whole).collect();
    let scored = score_on(&run, &sequences, (1, 1, 1), 40);
    for ((request, response), scored) in requests.iter().zip(&responses).zip(&scored) {
        let sum: f64 = scored.logprobs[request.tokens.len()..].iter().map(|x| f64::from(x.unwrap())).sum();
        assert!((sum - response.logprob).abs() <= 3.4e-3, "{}: {} with the cache, {sum} without", request.id, response.logprob);
        match response.finish_reason {
            FinishReason::Length => assert_eq!(response.tokens.len(), request.max_new_tokens),
            FinishReason::Context => assert_eq!(request.tokens.len() + response.tokens.len(), 32),
            FinishReason::Stop => assert!(response.tokens.len() < request.max_new_tokens),
            FinishReason::Error => panic!("{}: no request is wrong", request.id),
        }
    }
    assert_eq!(responses[0].tokens, responses[6].tokens, "greedy decoding does not depend on the id");
}

/// Responses do not depend on the number of slots, replicas, stages or tensor-parallel ranks. Rounding differs between those, but
/// a choice flips only when a draw falls within 1e-5 of a boundary: at some 60 draws of fixed seeds it does not.
#[test]
fn responses_do_not_depend_on_the_layout() {
    let dir = tempfile::tempdir().unwrap();
    let run = trained(dir.path());
    let requests = requests();
    let expected = generate_on(&run, &requests, (1, 1, 1), 16);
    for (shape, n_sequences) in
        [((1, 1, 1), 1), ((2, 1, 1), 2), ((1, 2, 1), 16), ((1, 1, 3), 2), ((2, 2, 2), 3), ((4, 1, 1), 16), ((1, 4, 1), 5)]
    {
        let responses = generate_on(&run, &requests, shape, n_sequences);
        for (a, b) in expected.iter().zip(&responses) {
            assert_eq!((&a.id, &a.tokens, a.finish_reason), (&b.id, &b.tokens, b.finish_reason), "{shape:?} with {n_sequences} sequences");
            assert!((a.logprob - b.logprob).abs() < 3.4e-3);
        }
    }
}

/// Scores do not depend on layout or packing; a sequence of one token has no log-probability and the sum 0.
#[test]
fn scores_do_not_depend_on_the_layout() {
    let dir = tempfile::tempdir().unwrap();
    let run = trained(dir.path());
    let sequences: Vec<Sequence> =
        [5, 1, 33, 2, 17, 30].iter().map(|&n| Sequence { id: format!("s{n}"), tokens: random_tokens(n, 100 + n as u64) }).collect();
    let expected = score_on(&run, &sequences, (1, 1, 1), 1);
    assert_eq!((expected[1].sum, expected[1].logprobs.clone()), (0.0, vec![None]));
    for (shape, batch_tokens) in [((1, 1, 1), 1000), ((2, 1, 1), 20), ((1, 2, 1), 40), ((1, 1, 2), 1), ((2, 2, 2), 64)] {
        for (a, b) in expected.iter().zip(score_on(&run, &sequences, shape, batch_tokens)) {
            assert_eq!((&a.id, &a.tokens), (&b.id, &b.tokens));
            for (x, y) in a.logprobs.iter().zip(&b.logprobs).skip(1) {
                // One log-softmax: the bound of the first test without its factor of 32.
                assert!((x.unwrap() - y.unwrap()).abs() < 1.1e-4, "{} at {shape:?}: {x:?} {y:?}", a.id);
            }
        }
    }
}

/// A signal reaches one rank of a replica some iterations before the others: all leave together, asked to be started again. A rank that
/// left alone would be waited for in the next exchange for ever; each layout must end within the test.
#[test]
fn a_replica_stops_together() {
    let dir = tempfile::tempdir().unwrap();
    let run = trained(dir.path());
    for (tp, pp, asked) in [(1, 1, 0), (2, 1, 0), (2, 1, 1), (1, 2, 0), (1, 2, 1), (2, 2, 3)] {
        let codes = threads::run(tp * pp, |world| {
            let rank = world.rank();
            let groups = Groups::new(world, layout_for(tp * pp, tp, pp).unwrap());
            let (device, stored) = (Cpu::new(), checkpoint::open(&run).unwrap());
            let chunk = load_chunk(&device, &stored, &groups, DType::F32).unwrap();
            let polls = std::sync::atomic::AtomicUsize::new(0);
            let stop = || rank == asked && polls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= 2;
            let (device, groups, chunk) = (&device, &groups, &chunk);
            let batching = Batching { n_sequences: 2, ..Batching::default() };
            let generator =
                Generator { device, groups, chunk, eos_ids: vec![], tokenizer: None, batching, order: Mode::Reproducible, stop: &stop };
            generator.run(&requests(), &Done::nothing(&requests()), &mut |_, _| Ok(())).unwrap_err().exit_code()
        });
        assert!(codes.iter().all(|&code| code == 75), "tp {tp} pp {pp}, rank {asked} asked: {codes:?}");
    }
}
