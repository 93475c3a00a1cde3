//! Generation as a whole: tokens of responses a second over requests of mixed lengths, 16 under way, with shared beginnings and guesses
//! and without. Beside it, measured in the same run:
//!
//! - decode steps alone: as many sequences of the same lengths in every pass, no prompts, no choices;
//! - the parts: the steps that the schedule of these requests has, with as many sequences as it has in each, and its tokens of prompts
//!   at the rate of a prompt of 512, one after the other; no choices, nothing between passes.
//!
//!     cargo bench --bench generate [-- 16]
//!
//! Three sorts of text, because guesses live on repetition: `varied` never repeats itself (drawn from 16,384 tokens), `adverse` looks as
//! if it did (drawn from 64 tokens: what stood there before is nearly always found and nearly always wrong), `repeated` does (the most
//! likely token of a model with random weights soon comes in a circle). All repetitions of a row are taken in turn with those of others.

#[path = "../tests/common/models.rs"]
mod models;

use std::time::Instant;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::cpu::Cpu;
use trireme::device::{CacheSpan, Device, PAGE_TOKENS, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::request::Request;
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::schedule::{Counts, Limits, Next, Scheduler, Sharing};
use trireme::model::chunk::{CachedInput, Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::DType;

const N_REQUESTS: usize = 24;
const REPETITIONS: usize = 2;
/// Numbers of sequences whose steps are measured; those between them are taken to lie on the line.
const STEPS_OF: [usize; 6] = [1, 2, 4, 8, 12, 16];
/// Tokens before those steps.
const PAST: usize = 160;
/// Tokens of the prompt whose rate is measured.
const PROMPT_TOKENS: usize = 512;

/// The 30 M model of the other benches, with another vocabulary.
fn model(vocab_size: usize) -> ModelConfig {
    ModelConfig { vocab_divisor: 64, ..models::nemotron([10, 384, 6, 2, 64, 1536, vocab_size], 2048) }
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
        let generator =
            Generator { device, groups, chunk, eos_ids: vec![], tokenizer: None, batching, order: Mode::Reproducible, stop: &|| false };
        let (mut n_tokens, started) = (0, Instant::now());
        let counts = generator.run(requests, &Done::nothing(requests), &mut |_, response| {
            n_tokens += response.tokens.len();
            Ok(())
        });
        (n_tokens as f64 / started.elapsed().as_secs_f64(), counts.unwrap())
    }

    /// Seconds of a pass over so many new tokens of each of n sequences with so many before them.
    fn pass_s(&self, n: usize, new: usize, past: usize) -> f64 {
        let most = (past + new).div_ceil(PAGE_TOKENS);
        let mut caches = self.chunk.new_caches(&self.cpu, n * most).unwrap();
        let (mut decoder, scratch, solo) = (Decoder::default(), Scratch::new(), Solo::new());
        let numerics = Numerics::of_inference(&self.cpu);
        let ctx = Ctx { device: &self.cpu, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
        let pages = |i: usize| (i * most..(i + 1) * most).map(|page| page as u32).collect();
        let spans: Vec<CacheSpan> = (0..n).map(|i| CacheSpan { rows: i * new..(i + 1) * new, past, pages: pages(i) }).collect();
        let (tokens, positions) = (vec![1; n * new], (0..n * new).map(|i| (past + i % new) as u32).collect::<Vec<u32>>());
        let upload = |values: &[u32]| {
            let mut tensor = ctx.take(&[values.len()], DType::U32);
            self.cpu.upload(bytemuck::cast_slice(values), &mut tensor);
            tensor
        };
        let (of_tokens, of_positions) = (upload(&tokens), upload(&positions));
        let mut pass = || {
            if new == 1 {
                decoder.logits(&ctx, &self.chunk, &NewTokens { tokens: &tokens, positions: &positions, spans: &spans }, &mut caches);
            } else {
                self.cpu.run_together(&mut || {
                    self.chunk.forward_cached(&ctx, CachedInput::Tokens(&of_tokens), &of_positions, &spans, &mut caches, &[n * new - 1]);
                });
            }
        };
        pass();
        let n_passes = if new == 1 { 40 } else { 4 };
        let started = Instant::now();
        (0..n_passes).for_each(|_| pass());
        self.cpu.finish();
        started.elapsed().as_secs_f64() / n_passes as f64
    }
}

/// What the parts of a job take, the best seen.
struct Parts {
    /// Seconds of a step of so many sequences each.
    steps_s: [f64; STEPS_OF.len()],
    /// Seconds of a token of a prompt.
    prompt_token_s: f64,
}

impl Parts {
    fn new() -> Parts {
        Parts { steps_s: [f64::INFINITY; STEPS_OF.len()], prompt_token_s: f64::INFINITY }
    }

    fn measure(&mut self, subject: &Subject) {
        for (step_s, n) in self.steps_s.iter_mut().zip(STEPS_OF) {
            *step_s = step_s.min(subject.pass_s(n, 1, PAST));
        }
        self.prompt_token_s = self.prompt_token_s.min(subject.pass_s(1, PROMPT_TOKENS, 0) / PROMPT_TOKENS as f64);
    }

    fn step_s(&self, n: usize) -> f64 {
        let above = STEPS_OF.iter().position(|&of| of >= n).expect("no more sequences are under way");
        if above == 0 {
            return self.steps_s[0];
        }
        let share = (n - STEPS_OF[above - 1]) as f64 / (STEPS_OF[above] - STEPS_OF[above - 1]) as f64;
        self.steps_s[above - 1] + share * (self.steps_s[above] - self.steps_s[above - 1])
    }

    /// Seconds of the passes of a job without guesses.
    fn job_s(&self, requests: &[Request], batching: Batching) -> f64 {
        let Batching { n_sequences, pass_tokens, sharing, .. } = batching;
        let pages: usize = requests.iter().map(|request| (request.tokens.len() + request.max_new_tokens).div_ceil(PAGE_TOKENS)).sum();
        let limits = Limits {
            page_tokens: PAGE_TOKENS,
            n_pages: pages,
            n_sequences,
            pass_tokens,
            n_groups: 1,
            sharing,
            draft_tokens: 0,
            draft_rows: 0,
        };
        let mut scheduler = Scheduler::new(limits);
        let mut left: Vec<usize> = requests.iter().map(|request| request.max_new_tokens).collect();
        for request in requests {
            scheduler.add(&request.tokens, request.tokens.len() + request.max_new_tokens);
        }
        let mut seconds = 0.0;
        while !scheduler.is_done() {
            let parts = scheduler.next_pass(0);
            let n_steps = parts.iter().filter(|part| part.past >= requests[part.sequence].tokens.len()).count();
            let n_tokens: usize = parts.iter().map(|part| part.tokens.len()).sum();
            seconds += if n_steps > 0 { self.step_s(n_steps) } else { 0.0 } + (n_tokens - n_steps) as f64 * self.prompt_token_s;
            for part in parts {
                left[part.sequence] -= part.n_wanted;
                let next = if left[part.sequence] == 0 { Next::Ended } else { Next::GoesOn };
                scheduler.accept(&part, &vec![0; part.n_wanted], next);
            }
        }
        seconds
    }
}

fn main() {
    let drawn = Sampling { temperature: 1.0, ..Sampling::PLAIN };
    let texts = [("varied", 16384, drawn), ("adverse", 64, drawn), ("repeated", 16384, Sampling::GREEDY)];
    println!("{}, bf16, 30 M parameters, {N_REQUESTS} requests\n", Cpu::new().name());
    let wanted: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    println!(
        "| text | under way | shared | guesses | tokens/s | of decode steps' | of its parts' | prompt tokens computed | guesses right |"
    );
    println!("|---|---:|---|---:|---:|---:|---:|---:|---:|");
    for (text, vocab_size, sampling) in texts {
        let (subject, requests) = (Subject::new(&model(vocab_size)), requests(vocab_size, sampling));
        for n_sequences in [1, 16].into_iter().filter(|n| wanted.is_empty() || wanted.contains(n)) {
            let some = if n_sequences == 1 { &requests[..3] } else { &requests[..] };
            let of = |sharing, draft_tokens| Batching { n_sequences, sharing, draft_tokens, ..Batching::default() };
            let ways = [of(Sharing::Separate, 0), of(Sharing::Shared, 0), of(Sharing::Shared, 4), of(Sharing::Shared, 8)];
            let (mut best, mut parts) = ([(0.0f64, Counts::default()); 4], Parts::new());
            for _ in 0..REPETITIONS {
                parts.measure(&subject);
                for (best, way) in best.iter_mut().zip(ways) {
                    let (rate, counts) = subject.rate(some, way);
                    *best = (best.0.max(rate), counts);
                }
            }
            let (decode, n_tokens) =
                (n_sequences as f64 / parts.step_s(n_sequences), some.iter().map(|one| one.max_new_tokens).sum::<usize>());
            for ((rate, counts), way) in best.into_iter().zip(ways) {
                let shared = if way.sharing == Sharing::Shared { "yes" } else { "no" };
                let (share, guesses, of_parts) = (rate / decode, way.draft_tokens, rate * parts.job_s(some, way) / n_tokens as f64);
                let Counts { prompt_computed, guessed, guessed_right, .. } = counts;
                print!("| {text} | {n_sequences} | {shared} | {guesses} | {rate:.0} | {share:.2} | {of_parts:.2} ");
                println!("| {prompt_computed} | {guessed_right} of {guessed} |");
            }
        }
    }
}
