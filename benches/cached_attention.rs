//! Attention over the paged KV cache on the CPU, a layer a call as a model asks for it: decode steps in bytes of the cache a second over
//! the rate at which all threads read memory (for as long as the calls, and in its best pass of a few milliseconds), prompts in chunks in
//! operations a second over a large matrix product's, each limit measured in turn with what it limits. Pages lie in random order, and the
//! layers together in no cache of the processor.
//!
//!     cargo bench --bench cached_attention [-- decode|prompts]

use std::time::Instant;
use trireme::device::ceiling::Reading;
use trireme::device::cpu::Cpu;
use trireme::device::{CacheSpan, Device, Gemm, Heads, KvCache, PAGE_TOKENS};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Bytes of all layers' caches, at least.
const BYTES: usize = 256 << 20;
/// Side of the matrix product.
const SIDE: usize = 1536;
/// Repetitions, of which the best counts.
const REPETITIONS: usize = 7;

/// A call: sequences, and each one's past and new tokens.
const CALLS: [(usize, usize, usize); 5] = [(1, 2048, 1), (8, 2048, 1), (1, 2048, 5), (1, 0, 512), (1, 1536, 512)];
/// Query heads, kv heads, head dim.
const HEADS: [(usize, usize, usize); 3] = [(6, 2, 64), (6, 2, 128), (32, 8, 128)];

fn random(device: &Cpu, dims: &[usize], dtype: DType) -> Tensor {
    let noise = Random::new(1, "cached attention");
    let block: Vec<f32> = (0..(1 << 16) - 3).map(|i| noise.normal(i) as f32).collect();
    let values: Vec<f32> = block.iter().copied().cycle().take(dims.iter().product()).collect();
    let mut tensor = device.alloc(dims, dtype).unwrap_or_else(|error| panic!("{error}"));
    device.copy(&mut tensor, &Tensor::from_f32(dims, &values));
    tensor
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| ["decode", "prompts"].contains(&word.as_str())).collect();
    let device = Cpu::new();
    println!("{}\n\n| heads | call | dtype | us a layer | rate | limit | share | of the best pass |", device.name());
    println!("|---|---|---|---:|---:|---:|---:|---:|");
    for (counts, dtype) in HEADS.iter().flat_map(|heads| [(heads, DType::BF16), (heads, DType::F32)]) {
        let heads = Heads { query: counts.0, kv: counts.1, dim: counts.2 };
        let side = [SIDE, SIDE];
        let (a, b, mut product) = (random(&device, &side, dtype), random(&device, &side, dtype), random(&device, &side, dtype));
        for (n, past, new) in CALLS {
            let of_each = (past + new).div_ceil(PAGE_TOKENS);
            let dims = [n * of_each, PAGE_TOKENS, heads.kv * heads.dim];
            let cache_bytes = 2 * n * (past + new) * dims[2] * dtype.bytes();
            let is_decode = new < 16;
            if wanted.iter().any(|word| (word == "decode") != is_decode) {
                continue;
            }
            let n_layers = if is_decode { BYTES.div_ceil(cache_bytes) } else { 2 };
            let layer = || KvCache { keys: random(&device, &dims, dtype), values: random(&device, &dims, dtype) };
            let mut layers: Vec<KvCache> = (0..n_layers).map(|_| layer()).collect();
            let mut pages: Vec<u32> = (0..dims[0] as u32).collect();
            let noise = Random::new(2, "pages");
            pages.sort_by_key(|page| noise.bits(u64::from(*page)));
            let span = |i: usize| CacheSpan { rows: i * new..(i + 1) * new, past, pages: pages[i * of_each..(i + 1) * of_each].to_vec() };
            let spans: Vec<CacheSpan> = (0..n).map(span).collect();
            let qkv = random(&device, &[n * new, heads.qkv_columns()], dtype);
            let mut out = random(&device, &[n * new, heads.query * heads.dim], dtype);
            let (mut best_s, mut limit, mut reading) = (f64::INFINITY, 0.0f64, Reading::new(&device));
            for _ in 0..REPETITIONS {
                let started = Instant::now();
                let mut all = || layers.iter_mut().for_each(|cache| device.attention_cached(&mut out, &qkv, cache, &spans, heads));
                device.run_together(&mut all);
                let seconds = started.elapsed().as_secs_f64();
                best_s = best_s.min(seconds / n_layers as f64);
                limit = limit.max(if is_decode {
                    reading.bytes_per_s(seconds)
                } else {
                    let started = Instant::now();
                    device.run_together(&mut || device.gemm(&mut product, &a, &b, Gemm::NT));
                    2.0 * (SIDE as f64).powi(3) / started.elapsed().as_secs_f64()
                });
            }
            let pairs = n * (past * new + new * (new + 1) / 2);
            let amount = if is_decode { cache_bytes } else { 4 * pairs * heads.query * heads.dim } as f64;
            let (rate, unit) = (amount / best_s, if is_decode { "GB/s" } else { "GFLOP/s" });
            let call = format!("{n} x {new} after {past}");
            let of_best = if is_decode { format!("{:.2}", rate / reading.best_pass().0) } else { "-".into() };
            let numbers = format!("{:.1} {unit} | {:.1} | {:.2} | {of_best}", rate / 1e9, limit / 1e9, rate / limit);
            println!("| {counts:?} | {call} | {} | {:.0} | {numbers} |", dtype.name(), 1e6 * best_s);
        }
    }
}
