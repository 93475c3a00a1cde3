//! Generation as a whole: tokens of responses a second over requests of mixed lengths, 16 under way, with shared beginnings and guesses
//! and without, beside decode steps alone: as many sequences of the same lengths in every pass, no prompts, no choices.
//!
//!     cargo bench --bench generate
//!
//! Three sorts of text, because guesses live on repetition: `varied` never repeats itself (drawn from 16,384 tokens), `adverse` looks as
//! if it did (drawn from 64 tokens: what stood there before is nearly always found and nearly always wrong), `repeated` does (the most
//! likely token of a model with random weights soon comes in a circle). All repetitions of a row are taken in turn with those of others.

use std::time::Instant;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::cpu::Cpu;
use trireme::device::{Activation, CacheSpan, Device, NormKind, PAGE_TOKENS, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::request::Request;
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::schedule::{Counts, Sharing};
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::DType;

const N_REQUESTS: usize = 24;
const REPETITIONS: usize = 2;

/// The 30 M model of the other benches, with another vocabulary.
fn model(vocab_size: usize) -> ModelConfig {
    ModelConfig {
        n_layers: 10,
        hidden: 384,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 64,
        ffn_hidden: 1536,
        vocab_size,
        vocab_divisor: 64,
        max_tokens: 2048,
        norm: NormKind::LayerNorm1P,
        norm_eps: 1e-5,
        activation: Activation::SquaredRelu,
        rotary_fraction: 0.5,
        rope_base: 10000.0,
        tied_embeddings: false,
        head: HeadKind::Vocabulary,
        init_std: 0.02,
    }
}

/// Prompts of 24 to 247 tokens, of which half begin with the same 160; responses of 16 to 79.
fn requests(vocab_size: usize, sampling: Sampling) -> Vec<Request> {
    let noise = Random::new(2, "requests");
    let tokens = |n: usize, at: u64| (0..n as u64).map(|i| (noise.bits(1000 * at + i) % vocab_size as u64) as u32).collect::<Vec<u32>>();
    let beginning = tokens(160, 0);
    let request = |i: usize| {
        let own = tokens(16 + 37 * i % 72, 1 + i as u64);
        let prompt = if i.is_multiple_of(2) { [&beginning[..], &own].concat() } else { [&own[..], &own[..8]].concat() };
        Request { sampling, seed: 1, ..Request::new(i.to_string(), prompt, 16 + 41 * i % 64) }
    };
    (0..N_REQUESTS).map(request).collect()
}

struct Subject {
    cpu: Cpu,
    groups: Groups,
    chunk: Chunk,
}

impl Subject {
    fn new(config: &ModelConfig) -> Subject {
        let (cpu, groups) = (Cpu::new(), Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE));
        let at = Coords { tp: 0, pp: 0, dp: 0 };
        let mut chunk = Chunk::new(&cpu, config, &ParallelLayout::SINGLE, at, 0, DType::BF16, Purpose::Inference).unwrap();
        chunk.initialise(&cpu, 1);
        chunk.pack(&cpu, &*groups.tp, WeightFormat::Stored).unwrap();
        Subject { cpu, groups, chunk }
    }

    /// Tokens of responses a second.
    fn rate(&self, requests: &[Request], batching: Batching) -> (f64, Counts) {
        let (device, groups, chunk) = (&self.cpu, &self.groups, &self.chunk);
        let generator = Generator { device, groups, chunk, eos_ids: vec![], tokenizer: None, batching, stop: &|| false };
        let (mut n_tokens, started) = (0, Instant::now());
        let counts = generator.run(requests, &Done::nothing(requests), &mut |_, response| {
            n_tokens += response.tokens.len();
            Ok(())
        });
        (n_tokens as f64 / started.elapsed().as_secs_f64(), counts.unwrap())
    }

    /// Decode steps of n sequences with so many tokens before them: tokens a second.
    fn decode_rate(&self, n: usize, past: usize) -> f64 {
        let most = (past + 1).div_ceil(PAGE_TOKENS);
        let mut caches = self.chunk.new_caches(&self.cpu, n * most).unwrap();
        let (mut decoder, scratch, solo) = (Decoder::default(), Scratch::new(), Solo::new());
        let numerics = Numerics::of_inference(&self.cpu, 1);
        let ctx = Ctx { device: &self.cpu, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
        let span = |i: usize| CacheSpan { rows: i..i + 1, past, pages: (i * most..(i + 1) * most).map(|page| page as u32).collect() };
        let spans: Vec<CacheSpan> = (0..n).map(span).collect();
        let (tokens, positions) = (vec![1; n], vec![past as u32; n]);
        let mut step = || {
            decoder.logits(&ctx, &self.chunk, &NewTokens { tokens: &tokens, positions: &positions, spans: &spans }, &mut caches);
        };
        step();
        let started = Instant::now();
        (0..40).for_each(|_| step());
        self.cpu.finish();
        40.0 * n as f64 / started.elapsed().as_secs_f64()
    }
}

fn main() {
    let drawn = Sampling { temperature: 1.0, ..Sampling::PLAIN };
    let texts = [("varied", 16384, drawn), ("adverse", 64, drawn), ("repeated", 16384, Sampling::GREEDY)];
    println!("{}, bf16, 30 M parameters, {N_REQUESTS} requests\n", Cpu::new().name());
    println!("| text | under way | shared | guesses | tokens/s | of decode steps' | prompt tokens computed | guesses right |");
    println!("|---|---:|---|---:|---:|---:|---:|---:|");
    for (text, vocab_size, sampling) in texts {
        let (subject, requests) = (Subject::new(&model(vocab_size)), requests(vocab_size, sampling));
        for n_sequences in [1, 16] {
            let some = if n_sequences == 1 { &requests[..3] } else { &requests[..] };
            let of = |sharing, draft_tokens| Batching { n_sequences, sharing, draft_tokens, ..Batching::default() };
            let ways = [of(Sharing::Separate, 0), of(Sharing::Shared, 0), of(Sharing::Shared, 4), of(Sharing::Shared, 8)];
            let (mut best, mut decode) = ([(0.0f64, Counts::default()); 4], 0.0f64);
            for _ in 0..REPETITIONS {
                decode = decode.max(subject.decode_rate(n_sequences, 160));
                for (best, way) in best.iter_mut().zip(ways) {
                    let (rate, counts) = subject.rate(some, way);
                    *best = (best.0.max(rate), counts);
                }
            }
            for ((rate, counts), way) in best.into_iter().zip(ways) {
                let shared = if way.sharing == Sharing::Shared { "yes" } else { "no" };
                let (share, guesses) = (rate / decode, way.draft_tokens);
                let Counts { prompt_computed, guessed, guessed_right, .. } = counts;
                println!(
                    "| {text} | {n_sequences} | {shared} | {guesses} | {rate:.0} | {share:.2} | {prompt_computed} | {guessed_right} of {guessed} |"
                );
            }
        }
    }
}
