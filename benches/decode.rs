//! Decode steps: tokens a second over what the memory's bandwidth allows, which is a copy measured in the same run. A step must read
//! every weight once (of the embedding the rows of its tokens only) and the keys and values of every token before.
//!
//!     cargo bench --bench decode            a model of 30 M parameters on the CPU
//!     cargo bench --bench decode -- cuda    models of 1 B (head dims 128 and 192) on a GPU, sampled on it too

use std::time::Instant;
use trireme::comm::solo::Solo;
use trireme::device::cpu::Cpu;
use trireme::device::cuda::Cuda;
use trireme::device::{Activation, CacheSpan, Device, Draw, KvCache, NormKind, PAGE_TOKENS, Scratch, ceiling};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Tokens before the first measured step.
const PAST: usize = 2048;
/// Steps that are measured together, after as many that are not.
const STEPS: usize = 48;
/// Repetitions, of which the best counts.
const REPETITIONS: usize = 3;

/// Name, then hidden, layers, query heads, kv heads, head dim, feed-forward, vocabulary.
type Size = (&'static str, [usize; 7]);
const CPU_SIZES: [Size; 1] = [("30m", [384, 10, 6, 2, 64, 1536, 16384])];
const CUDA_SIZES: [Size; 2] = [("1b", [2048, 20, 16, 8, 128, 8192, 32000]), ("1b-d192", [2304, 18, 12, 4, 192, 9216, 32000])];

fn model([hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn_hidden, vocab_size]: [usize; 7]) -> ModelConfig {
    ModelConfig {
        n_layers,
        hidden,
        n_heads,
        n_kv_heads,
        head_dim,
        ffn_hidden,
        vocab_size,
        vocab_divisor: 128,
        max_tokens: 4096,
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

/// Fills a bf16 tensor with small random numbers, one block again and again.
fn fill(device: &dyn Device, tensor: &mut Tensor, block: &[half::bf16]) {
    let bytes: Vec<u8> = bytemuck::cast_slice(block).iter().copied().cycle().take(tensor.n_bytes()).collect();
    device.upload(&bytes, tensor);
}

/// Pages for so many tokens.
fn pages_of(n_tokens: usize) -> usize {
    n_tokens.div_ceil(PAGE_TOKENS)
}

/// A model under test, with room for so many sequences.
struct Subject<'a> {
    device: &'a dyn Device,
    chunk: Chunk,
    caches: Vec<KvCache>,
    decoder: Decoder,
}

impl<'a> Subject<'a> {
    fn new(device: &'a dyn Device, config: &ModelConfig, n_sequences: usize) -> Subject<'a> {
        let at = Coords { tp: 0, pp: 0, dp: 0 };
        let made = Chunk::new(device, config, &ParallelLayout::SINGLE, at, 0, DType::BF16, Purpose::Inference);
        let mut chunk = made.unwrap_or_else(|error| panic!("{error}"));
        let noise = Random::new(1, "decode");
        let block: Vec<half::bf16> = (0..(1 << 20) - 3).map(|i| half::bf16::from_f64(0.02 * noise.normal(i))).collect();
        chunk.params_mut().into_iter().for_each(|param| fill(device, &mut param.value, &block));
        let mut caches = chunk.new_caches(device, n_sequences * pages_of(config.max_tokens)).unwrap_or_else(|error| panic!("{error}"));
        caches.iter_mut().flat_map(|cache| [&mut cache.keys, &mut cache.values]).for_each(|tensor| fill(device, tensor, &block));
        Subject { device, chunk, caches, decoder: Decoder::default() }
    }

    /// Seconds of the steps that give token `first`.. of each of n sequences, each drawn from the logits of the one before.
    fn steps_s(&mut self, n: usize, first: usize) -> f64 {
        let (solo, scratch) = (Solo::new(), Scratch::new());
        let ctx = Ctx { device: self.device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
        let vocab_size = self.chunk.config().vocab_size;
        let most = pages_of(self.chunk.config().max_tokens);
        let pages = |i: usize| (i * most..(i + 1) * most).map(|page| page as u32).collect();
        let mut tokens: Vec<u32> = (0..n as u32).collect();
        let started = Instant::now();
        for past in first..first + STEPS {
            let spans: Vec<CacheSpan> = (0..n).map(|i| CacheSpan { rows: i..i + 1, past, pages: pages(i) }).collect();
            let positions = vec![past as u32; n];
            let new = NewTokens { tokens: &tokens, positions: &positions, spans: &spans };
            let logits = self.decoder.logits(&ctx, &self.chunk, &new, &mut self.caches);
            let draws = vec![Draw { temperature: 0.8, top_p: 0.95, top_k: 0, min_p: 0.0, uniform: 0.37 }; n];
            match self.device.sample(logits, vocab_size, &draws) {
                Some(drawn) => tokens.iter_mut().zip(drawn).for_each(|(token, drawn)| *token = drawn.token),
                None => self.device.finish(),
            }
        }
        started.elapsed().as_secs_f64() / STEPS as f64
    }

    /// Bytes that a step of n sequences of so many tokens reads.
    fn bytes(&self, n: usize, tokens: usize) -> f64 {
        let rows = |tensor: &Tensor, n: usize| n * tensor.row_len() * tensor.dtype().bytes();
        let weight = |param: &&trireme::model::param::Param| {
            if param.spec.name == "embedding.weight" { rows(&param.value, n) } else { param.value.n_bytes() }
        };
        let weights: usize = self.chunk.params().iter().map(weight).sum();
        let of_cache = |tensor: &Tensor| n * tokens * tensor.dims()[2] * tensor.dtype().bytes();
        let caches: usize = self.caches.iter().map(|cache| of_cache(&cache.keys) + of_cache(&cache.values)).sum();
        (weights + caches) as f64
    }
}

fn main() {
    let on_gpu = std::env::args().skip(1).any(|word| word == "cuda");
    let device: Box<dyn Device> = match on_gpu.then(|| Cuda::open(0)) {
        None => Box::new(Cpu::new()),
        Some(Ok(cuda)) => Box::new(cuda),
        Some(Err(error)) => {
            println!("not run: {error}");
            std::process::exit(if std::env::var_os("TRIREME_NEEDS_GPU").is_some() { 2 } else { 0 });
        }
    };
    println!("{}, bf16, {PAST} tokens before the first step\n", device.name());
    println!("| model | sequences | ms a step | tokens/s | GB/s | of the copy's |\n|---|---:|---:|---:|---:|---:|");
    for (name, size) in if on_gpu { &CUDA_SIZES[..] } else { &CPU_SIZES } {
        let batches: &[usize] = if on_gpu { &[1, 8, 32] } else { &[1] };
        let most = *batches.last().expect("not empty");
        let mut subject = Subject::new(&*device, &model(*size), most);
        for &n in batches {
            subject.steps_s(n, PAST);
            let (mut best_s, mut copy) = (f64::INFINITY, 0.0f64);
            for repetition in 0..REPETITIONS {
                copy = copy.max(ceiling::measure(&*device, DType::BF16).copy_bytes_per_s);
                best_s = best_s.min(subject.steps_s(n, PAST + repetition * STEPS));
            }
            let rate = subject.bytes(n, PAST + STEPS) / best_s;
            let (ms, tokens_per_s, share) = (1e3 * best_s, n as f64 / best_s, rate / copy);
            println!("| {name} | {n} | {ms:.3} | {tokens_per_s:.0} | {:.1} | {share:.2} |", rate / 1e9);
        }
    }
}
