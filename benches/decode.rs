//! Generation over what the machine allows, measured in the same run: decode steps over the memory's read bandwidth, prompts over the
//! rate of a large matrix product. A step must read every weight once (of an embedding that is only looked up, the rows of its tokens)
//! and the keys and values of every token before; a prompt of T tokens multiplies T rows with every weight of the blocks.
//! Steps have three shares of reading. "of reading": the best run of steps over the best reading for as long, in turn with it. "of its best
//! pass": the same run over the best single pass of reading, which takes a few milliseconds, where a run takes some twenty times as long:
//! the strictest. "for as long": over that pass the best steps that together take as long as it, so either in its best moment.
//!
//!     cargo bench --bench decode [-- 30m|120m f32|bf16|int8 1|8|16|32|prompts]    Llama-shaped models on the CPU
//!     cargo bench --bench decode -- 360m|1b ..     the shapes of SmolLM2-360M and Llama 3.2 1B, which take gigabytes, so by name alone
//!     cargo bench --bench decode -- 30m bf16 parts       where the time of its prompts goes, by operation
//!     cargo bench --bench decode -- profile 30m int8 1     steps alone, some seconds of them, in their two halves; for a profiler too
//!     cargo bench --bench decode -- cuda     models of 1 B (head dims 128 and 192) on a GPU, sampled on it too
//!     cargo bench --bench decode -- cuda kernels     and where the time of steps of one sequence goes, call by call, without graphs
//!     TRIREME_DEPENDENT_LAUNCH=0 cargo bench --bench decode -- cuda     recorded kernels begin one after another
//!     cargo bench --bench decode -- fast ..  the same in the shortest order of sums (trireme-generate --numerics fast)
//!
//! Weights are packed and tokens chosen as trireme-generate does it: on the CPU the most likely ones.

mod parts;

use std::time::Instant;
use trireme::comm::solo::Solo;
use trireme::device::ceiling::{self, Reading};
use trireme::device::cpu::Cpu;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::profile::Profile;
use trireme::device::{Activation, CacheSpan, Device, KvCache, NormKind, PAGE_TOKENS, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::infer::sampler::{Drawing, Sampling};
use trireme::infer::sampling;
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, Purpose};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::model::param::Param;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Steps that are measured together, after as many that are not.
const STEPS: usize = 48;
/// Repetitions of them, in turn with reading for as long, of which the best counts.
const STEPS_REPETITIONS: usize = 12;
/// Repetitions of prompts, of which the best counts.
const REPETITIONS: usize = 3;
/// Time of the steps of a profile.
const PROFILE_S: f64 = 2.0;
/// Tokens of the prompts that are measured.
const PROMPTS: [usize; 2] = [128, 512];

/// A model under test.
struct Size {
    name: &'static str,
    /// Hidden, layers, query heads, kv heads, head dim, feed-forward, vocabulary.
    dims: [usize; 7],
    norm: NormKind,
    activation: Activation,
    rotary_fraction: f64,
    /// Tokens before the first measured step.
    past: usize,
    /// Whether the embedding is the output layer too.
    is_tied: bool,
}

impl Size {
    const fn nemotron(name: &'static str, dims: [usize; 7]) -> Size {
        Size {
            name,
            dims,
            norm: NormKind::LayerNorm1P,
            activation: Activation::SquaredRelu,
            rotary_fraction: 0.5,
            past: 2048,
            is_tied: false,
        }
    }

    const fn llama(name: &'static str, dims: [usize; 7]) -> Size {
        Size { name, dims, norm: NormKind::RmsNorm, activation: Activation::Swiglu, rotary_fraction: 1.0, past: 64, is_tied: false }
    }

    fn config(&self) -> ModelConfig {
        let [hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn_hidden, vocab_size] = self.dims;
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
            norm: self.norm,
            norm_eps: 1e-5,
            activation: self.activation,
            rotary_fraction: self.rotary_fraction,
            rope_base: 10000.0,
            rope_scaling: None,
            tied_embeddings: self.is_tied,
            head: HeadKind::Vocabulary,
            init_std: 0.02,
        }
    }
}

/// As many parameters as the models of benches/train_step.rs: three matrices of 2/3 the width in the place of two.
const CPU_SIZES: [Size; 2] = [Size::llama("30m", [384, 10, 6, 2, 64, 1024, 16384]), Size::llama("120m", [768, 12, 12, 4, 64, 2048, 32000])];
/// Those of published models, run by name alone.
const LARGER_SIZES: [Size; 2] = [
    Size { is_tied: true, ..Size::llama("360m", [960, 32, 15, 5, 64, 2560, 49152]) },
    Size { is_tied: true, ..Size::llama("1b", [2048, 16, 32, 8, 64, 8192, 128256]) },
];
const CUDA_SIZES: [Size; 2] =
    [Size::nemotron("1b", [2048, 20, 16, 8, 128, 8192, 32000]), Size::nemotron("1b-d192", [2304, 18, 12, 4, 192, 9216, 32000])];

/// Name, storage of activations, format of weights.
type Weights = (&'static str, DType, WeightFormat);
const CPU_WEIGHTS: [Weights; 3] =
    [("f32", DType::F32, WeightFormat::Stored), ("bf16", DType::BF16, WeightFormat::Stored), ("int8", DType::BF16, WeightFormat::Int8)];
const CUDA_WEIGHTS: [Weights; 1] = [("bf16", DType::BF16, WeightFormat::Stored)];

/// Fills a tensor of floats with small random numbers, one block again and again.
fn fill(device: &dyn Device, tensor: &mut Tensor, block: &[f32]) {
    let half: Vec<half::bf16>;
    let block: &[u8] = match tensor.dtype() {
        DType::BF16 => {
            half = block.iter().map(|x| half::bf16::from_f32(*x)).collect();
            bytemuck::cast_slice(&half)
        }
        _ => bytemuck::cast_slice(block),
    };
    let mut bytes = block.repeat(tensor.n_bytes().div_ceil(block.len()));
    bytes.truncate(tensor.n_bytes());
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
    order: Mode,
    /// Greedy where the host chooses, as the peers do.
    sampling: Sampling,
}

impl<'a> Subject<'a> {
    fn new(
        device: &'a dyn Device,
        config: &ModelConfig,
        (dtype, format): (DType, WeightFormat),
        order: Mode,
        n_sequences: usize,
    ) -> Subject<'a> {
        let at = Coords { tp: 0, pp: 0, dp: 0 };
        let made = Chunk::new(device, config, &ParallelLayout::SINGLE, at, 0, dtype, Purpose::Inference);
        let mut chunk = made.unwrap_or_else(|error| panic!("{error}"));
        let noise = Random::new(1, "decode");
        let block: Vec<f32> = (0..(1 << 20) - 3).map(|i| 0.02 * noise.normal(i) as f32).collect();
        chunk.params_mut().into_iter().for_each(|param| fill(device, &mut param.value, &block));
        chunk.pack(device, &Solo::new(), format).unwrap_or_else(|error| panic!("{error}"));
        let mut caches = chunk.new_caches(device, n_sequences * pages_of(config.max_tokens)).unwrap_or_else(|error| panic!("{error}"));
        caches.iter_mut().flat_map(|cache| [&mut cache.keys, &mut cache.values]).for_each(|tensor| fill(device, tensor, &block));
        let sampling = match device.packed() {
            Some(_) => Sampling::GREEDY,
            None => Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::PLAIN },
        };
        Subject { device, chunk, caches, decoder: Decoder::default(), order, sampling }
    }

    fn numerics(&self) -> Numerics<'a> {
        match self.order {
            Mode::Fast => Numerics::Fast,
            Mode::Reproducible => Numerics::of_inference(self.device),
        }
    }

    /// The pages of sequence i.
    fn pages(&self, i: usize) -> Vec<u32> {
        let most = pages_of(self.chunk.config().max_tokens);
        (i * most..(i + 1) * most).map(|page| page as u32).collect()
    }

    /// Seconds of the steps that give token `first`.. of each of n sequences, each drawn from the logits of the one before.
    fn steps_s(&mut self, n: usize, first: usize) -> f64 {
        self.steps_with(n, first, |_, _| ())
    }

    /// The same; `each` hears of every step how many seconds the logits and the choice took.
    fn steps_with(&mut self, n: usize, first: usize, mut each: impl FnMut(f64, f64)) -> f64 {
        let (solo, scratch, numerics) = (Solo::new(), Scratch::new(), self.numerics());
        let ctx = Ctx { device: self.device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
        let vocab_size = self.chunk.config().vocab_size;
        let mut tokens: Vec<u32> = (0..n as u32).collect();
        let started = Instant::now();
        for past in first..first + STEPS {
            let spans: Vec<CacheSpan> = (0..n).map(|i| CacheSpan { rows: i..i + 1, past, pages: self.pages(i) }).collect();
            let positions = vec![past as u32; n];
            let new = NewTokens { tokens: &tokens, positions: &positions, spans: &spans };
            let drawings = vec![Drawing { sampling: self.sampling, uniform: 0.37, prompt: &[], response: &[], n_top: 0 }; n];
            let (device, chunk, decoder, caches) = (self.device, &self.chunk, &mut self.decoder, &mut self.caches);
            let (begun, mut logits_s, mut choices) = (Instant::now(), 0.0, Vec::new());
            device.run_together(&mut || {
                let logits = decoder.logits(&ctx, chunk, &new, caches);
                logits_s = begun.elapsed().as_secs_f64();
                choices = sampling::choose_rows(device, &solo, logits, vocab_size, &drawings);
            });
            tokens.iter_mut().zip(choices).for_each(|(token, choice)| *token = choice.token);
            each(logits_s, begun.elapsed().as_secs_f64() - logits_s);
        }
        started.elapsed().as_secs_f64() / STEPS as f64
    }

    /// Seconds until the logits of the last token of a prompt of so many.
    fn prompt_s(&mut self, n_tokens: usize) -> f64 {
        let (solo, scratch, numerics) = (Solo::new(), Scratch::new(), self.numerics());
        let ctx = Ctx { device: self.device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
        let upload = |values: Vec<u32>| {
            let mut tensor = scratch.take(self.device, &[n_tokens], DType::U32);
            self.device.upload(bytemuck::cast_slice(&values), &mut tensor);
            tensor
        };
        let (tokens, positions) = (upload((0..n_tokens as u32).collect()), upload((0..n_tokens as u32).collect()));
        let spans = [CacheSpan { rows: 0..n_tokens, past: 0, pages: self.pages(0) }];
        let (chunk, caches) = (&self.chunk, &mut self.caches);
        let started = Instant::now();
        // As a pass does it.
        self.device.run_together(&mut || {
            let input = CachedInput::Tokens(&tokens);
            let CachedOutput::Logits(_) = chunk.forward_cached(&ctx, input, &positions, &spans, caches, &[n_tokens - 1]) else {
                unreachable!("the whole model ends in logits");
            };
        });
        self.device.finish();
        started.elapsed().as_secs_f64()
    }

    /// Bytes that a step of n sequences of so many tokens reads.
    fn bytes(&self, n: usize, tokens: usize) -> f64 {
        let weight = |param: &&Param| match &param.packed {
            Some(packed) => packed.n_bytes(),
            None if param.spec.name == "embedding.weight" => n * param.value.row_len() * param.value.dtype().bytes(),
            None => param.value.n_bytes(),
        };
        let weights: usize = self.chunk.params().iter().map(weight).sum();
        let of_cache = |tensor: &Tensor| n * tokens * tensor.dims()[2] * tensor.dtype().bytes();
        let caches: usize = self.caches.iter().map(|cache| of_cache(&cache.keys) + of_cache(&cache.values)).sum();
        (weights + caches) as f64
    }

    /// Multiplications and additions of a pass over n tokens of which `n_last` end in logits: products with weights, and the scores and
    /// sums of n queries over `keys` keys each.
    fn flops(&self, n: usize, n_last: usize, keys: f64) -> f64 {
        let config = self.chunk.config();
        let of_params = |part: &str| -> usize {
            let mut params = self.chunk.params();
            params.retain(|param| param.spec.name.starts_with(part) && param.spec.shape.len() == 2);
            params.iter().map(|param| param.spec.shape.iter().product::<usize>()).sum()
        };
        let attention = 2.0 * keys * (config.n_layers * config.n_heads * config.head_dim) as f64;
        2.0 * (n as f64 * (of_params("layers.") as f64 + attention) + (n_last * of_params("head.")) as f64)
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let on_gpu = wanted.iter().any(|word| word == "cuda");
    let (device, profiler): (Box<dyn Device>, _) = match on_gpu.then(|| Cuda::open_profiled(0)) {
        None => (Box::new(Cpu::new()), None),
        Some(Ok((cuda, profile))) => (Box::new(cuda), Some(profile)),
        Some(Err(error)) => {
            println!("not run: {error}");
            std::process::exit(if std::env::var_os("TRIREME_NEEDS_GPU").is_some() { 2 } else { 0 });
        }
    };
    let (sizes, weights, batches) =
        if on_gpu { (&CUDA_SIZES, &CUDA_WEIGHTS[..], &[1, 8, 32][..]) } else { (&CPU_SIZES, &CPU_WEIGHTS[..], &[1, 8, 16, 32][..]) };
    let numbers: Vec<String> = batches.iter().map(|n| n.to_string()).chain(["prompts".into(), "parts".into()]).collect();
    let is_wanted = |word: &str, all: &[&str]| !wanted.iter().any(|w| all.contains(&w.as_str())) || wanted.iter().any(|w| w == word);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let order = if wanted.iter().any(|word| word == "fast") { Mode::Fast } else { Mode::Reproducible };
    let is_profile = wanted.iter().any(|word| word == "profile");
    let is_one_by_one = on_gpu && std::env::var_os("TRIREME_DEPENDENT_LAUNCH").is_some_and(|value| value == "0");
    let kernels_are = if is_one_by_one { ", kernels one after another" } else { "" };
    println!("{}, {order:?} order of sums{kernels_are}\n", device.name());
    if is_profile {
        println!("| model | weights | sequences | steps | ms of logits: least, median, mean | ms of choices: the same |");
        println!("|---|---|---:|---:|---:|---:|");
    } else {
        println!(
            "| model | weights | sequences | ms a step | tokens/s | GB/s | of reading | of its best pass | for as long | of the GEMM ceiling |"
        );
        println!("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    }
    let all_sizes: Vec<&str> = sizes.iter().chain(&LARGER_SIZES).map(|size| size.name).collect();
    let larger = LARGER_SIZES.iter().filter(|size| !on_gpu && wanted.iter().any(|word| word == size.name));
    let most = *batches.iter().filter(|n| is_wanted(&n.to_string(), &numbers)).max().unwrap_or(&1);
    for size in sizes.iter().chain(larger) {
        for (name, dtype, format) in weights {
            let all_weights: Vec<&str> = weights.iter().map(|(name, ..)| *name).collect();
            if !is_wanted(size.name, &all_sizes) || !is_wanted(name, &all_weights) {
                continue;
            }
            let mut subject = Subject::new(&*device, &size.config(), (*dtype, *format), order, most);
            for &n in batches.iter().filter(|n| is_wanted(&n.to_string(), &numbers)) {
                if is_profile { profile(&mut subject, (size, name), n) } else { steps(&mut subject, (size, name, *dtype), n) }
            }
            for n_tokens in PROMPTS.into_iter().filter(|_| !is_profile && is_wanted("prompts", &numbers)) {
                prompt(&mut subject, (size, name, *dtype), n_tokens);
            }
            if let Some(profiler) = profiler.as_ref().filter(|_| wanted.iter().any(|word| word == "kernels")) {
                kernels(&mut subject, size, profiler);
            }
            for n_tokens in PROMPTS.into_iter().filter(|_| wanted.iter().any(|word| word == "parts")) {
                let (pass_s, gemm) = prompt_s(&mut subject, *dtype, n_tokens);
                let (pages, Subject { chunk, caches, .. }) = (subject.pages(0), &mut subject);
                parts::Prompt { device: &*device, chunk, caches, pages, n_tokens }.table(pass_s, gemm);
            }
        }
    }
}

/// One line of the other table: the halves of a step.
fn profile(subject: &mut Subject, (size, weights): (&Size, &str), n: usize) {
    let (begun, mut logits, mut choices) = (Instant::now(), Vec::new(), Vec::new());
    while begun.elapsed().as_secs_f64() < PROFILE_S {
        let each = |logits_s, choices_s| {
            logits.push(1e3 * logits_s);
            choices.push(1e3 * choices_s);
        };
        subject.steps_with(n, size.past, each);
    }
    let n_steps = logits.len();
    let [logits, choices] = [&mut logits, &mut choices].map(|ms| {
        ms.sort_by(f64::total_cmp);
        format!("{:.3}, {:.3}, {:.3}", ms[0], ms[n_steps / 2], ms.iter().sum::<f64>() / n_steps as f64)
    });
    println!("| {} | {weights} | {n} | {n_steps} | {logits} | {choices} |", size.name);
}

/// Steps of one sequence, call by call: not recorded, so that each is seen.
fn kernels(subject: &mut Subject, size: &Size, profiler: &Profile) {
    subject.decoder = Decoder::default();
    profiler.begin();
    subject.steps_s(1, size.past);
    println!("\n{STEPS} steps of {}, one sequence:\n{}", size.name, profiler.end());
    subject.decoder = Decoder::default();
}

/// One line of the table: decode steps.
fn steps(subject: &mut Subject, (size, weights, dtype): (&Size, &str, DType), n: usize) {
    let mut reading = Reading::new(subject.device);
    let mut seconds = subject.steps_s(n, size.past);
    let (mut best_s, mut read, mut runs) = (f64::INFINITY, 0.0f64, Vec::new());
    for _ in 0..STEPS_REPETITIONS {
        read = read.max(reading.bytes_per_s(seconds * STEPS as f64));
        let mut ends = vec![Instant::now()];
        seconds = subject.steps_with(n, size.past, |_, _| ends.push(Instant::now()));
        best_s = best_s.min(seconds);
        runs.push(ends);
    }
    let (best_read, pass_s) = reading.best_pass();
    let moment_s = runs.iter().flat_map(|ends| step_s_of_parts(ends, pass_s)).fold(best_s, f64::min);
    let gemm = ceiling::measure(subject.device, dtype).gemm_flops_per_s;
    let n_bytes = subject.bytes(n, size.past + STEPS);
    let (rate, of_moment) = (n_bytes / best_s, n_bytes / moment_s / best_read);
    let share = subject.flops(n, n, (size.past + STEPS) as f64) / best_s / gemm;
    let (name, ms, tokens_per_s) = (size.name, 1e3 * best_s, n as f64 / best_s);
    let of_reading = format!("{:.2} | {:.2} | {of_moment:.2}", rate / read, rate / best_read);
    println!("| {name} | {weights} | {n} | {ms:.3} | {tokens_per_s:.0} | {:.1} | {of_reading} | {share:.2} |", rate / 1e9);
}

/// Of steps that ended one after the other, the first having begun at the first of these: seconds a step from each step on, over as many as
/// take so long together.
fn step_s_of_parts(ends: &[Instant], least_s: f64) -> impl Iterator<Item = f64> {
    let takes = move |first: usize, n: usize| (ends[first + n] - ends[first]).as_secs_f64();
    (0..ends.len())
        .filter_map(move |first| (1..ends.len() - first).find(|n| takes(first, *n) >= least_s).map(|n| takes(first, n) / n as f64))
}

/// One line of the table: a prompt.
fn prompt(subject: &mut Subject, (size, weights, dtype): (&Size, &str, DType), n_tokens: usize) {
    let (best_s, gemm) = prompt_s(subject, dtype, n_tokens);
    let share = subject.flops(n_tokens, 1, (n_tokens + 1) as f64 / 2.0) / best_s / gemm;
    let (name, ms, tokens_per_s) = (size.name, 1e3 * best_s, n_tokens as f64 / best_s);
    println!("| {name} | {weights} | prompt of {n_tokens} | {ms:.2} | {tokens_per_s:.0} | - | - | - | - | {share:.2} |");
}

/// Least seconds of a prompt, and the rate of a large product.
fn prompt_s(subject: &mut Subject, dtype: DType, n_tokens: usize) -> (f64, f64) {
    subject.prompt_s(n_tokens);
    let (mut best_s, mut gemm) = (f64::INFINITY, 0.0f64);
    for _ in 0..REPETITIONS {
        gemm = gemm.max(ceiling::measure(subject.device, dtype).gemm_flops_per_s);
        best_s = (0..3).map(|_| subject.prompt_s(n_tokens)).fold(best_s, f64::min);
    }
    (best_s, gemm)
}
