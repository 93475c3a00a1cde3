//! Attention over the paged cache on the CPU: a row's bits are its own.

use crate::cases::{heads_of, widened};
use crate::check::U_BF16;
use crate::oracle::{self, HeadCounts, U};
use crate::{devices, normals};
use trireme::device::cpu::Cpu;
use trireme::device::{CacheSpan, Device, Heads, KvCache, PAGE_TOKENS};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Tokens under way.
struct Sequence {
    /// [T, (A + 2G) D]
    qkv: Tensor,
    /// [T, A D], of the tokens that were fed.
    out: Tensor,
    past: usize,
    pages: Vec<u32>,
}

/// Where sequences are fed: a pool of pages that hold NaN until somebody writes to them, given out in random order.
struct Feeder<'a> {
    cpu: &'a Cpu,
    heads: Heads,
    dtype: DType,
    cache: KvCache,
    free: Vec<u32>,
    noise: Random,
    drawn: u64,
}

fn tensor(dims: &[usize], values: &[f32], dtype: DType) -> Tensor {
    if dtype == DType::BF16 { Tensor::from_bf16(dims, values) } else { Tensor::from_f32(dims, values) }
}

impl<'a> Feeder<'a> {
    fn new(cpu: &'a Cpu, heads: Heads, dtype: DType, seed: u64) -> Feeder<'a> {
        const N_PAGES: usize = 64;
        let dims = [N_PAGES, PAGE_TOKENS, heads.kv * heads.dim];
        let nothing = vec![f32::NAN; dims.iter().product()];
        let cache = KvCache { keys: tensor(&dims, &nothing, dtype), values: tensor(&dims, &nothing, dtype) };
        let mut feeder = Feeder { cpu, heads, dtype, cache, free: Vec::new(), noise: Random::new(seed, "feeder"), drawn: 0 };
        for page in 0..N_PAGES as u32 {
            let at = feeder.below(feeder.free.len() + 1);
            feeder.free.insert(at, page);
        }
        feeder
    }

    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        (self.noise.bits(self.drawn) % n as u64) as usize
    }

    fn sequence(&self, qkv: &[f32]) -> Sequence {
        let t = qkv.len() / self.heads.qkv_columns();
        let out = vec![f32::NAN; t * self.heads.query * self.heads.dim];
        let rows = |values: &[f32]| tensor(&[t, values.len() / t], values, self.dtype);
        Sequence { qkv: rows(qkv), out: rows(&out), past: 0, pages: Vec::new() }
    }

    /// One call, over the next tokens of each sequence.
    fn feed(&mut self, sequences: &mut [(&mut Sequence, usize)]) {
        let (mut spans, mut rows) = (Vec::new(), Vec::new());
        for (sequence, n_new) in sequences.iter_mut() {
            let new = sequence.past..sequence.past + *n_new;
            while sequence.pages.len() * PAGE_TOKENS < new.end {
                sequence.pages.push(self.free.pop().expect("a page is left"));
            }
            let first = spans.last().map_or(0, |span: &CacheSpan| span.rows.end);
            spans.push(CacheSpan { rows: first..first + *n_new, past: sequence.past, pages: sequence.pages.clone() });
            rows.extend_from_slice(&sequence.qkv.to_f32_vec()[new.start * self.heads.qkv_columns()..new.end * self.heads.qkv_columns()]);
            sequence.past = new.end;
        }
        let n_rows = spans.last().map_or(0, |span| span.rows.end);
        let width = self.heads.query * self.heads.dim;
        let qkv = tensor(&[n_rows, self.heads.qkv_columns()], &rows, self.dtype);
        let mut out = tensor(&[n_rows, width], &vec![f32::NAN; n_rows * width], self.dtype);
        self.cpu.attention_cached(&mut out, &qkv, &mut self.cache, &spans, self.heads);
        for ((sequence, _), span) in sequences.iter_mut().zip(&spans) {
            let from = out.rows(span.rows.clone());
            sequence.out.rows_mut(span.past..span.n_tokens()).bytes_mut().copy_from_slice(from.bytes());
        }
    }
}

/// How a sequence of T tokens reaches the cache.
#[derive(Clone, Copy, Debug)]
enum Chunks {
    Whole,
    Each(usize),
    Random,
    /// Random, in calls with other sequences that do the same.
    Beside,
}

/// Rows of out of the sequence, as bytes.
fn fed(cpu: &Cpu, (heads, dtype): (Heads, DType), qkv: &[f32], chunks: Chunks, n_threads: usize) -> Vec<u8> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool");
    pool.install(|| {
        let mut feeder = Feeder::new(cpu, heads, dtype, 7 * n_threads as u64);
        let mut sequence = feeder.sequence(qkv);
        let t = sequence.qkv.n_rows();
        let mut others: Vec<Sequence> = (0..3).map(|i| feeder.sequence(&qkv[i * heads.qkv_columns()..])).collect();
        while sequence.past < t {
            let left = t - sequence.past;
            let n_new = match chunks {
                Chunks::Whole => t,
                Chunks::Each(n) => n,
                Chunks::Random | Chunks::Beside => 1 + feeder.below(130) * feeder.below(2),
            };
            let mut call = vec![(&mut sequence, n_new.min(left))];
            if let Chunks::Beside = chunks {
                for other in &mut others {
                    let n_new = feeder.below(100).min(other.qkv.n_rows() - other.past);
                    let at = feeder.below(call.len() + 1);
                    call.insert(at, (other, n_new));
                }
            }
            // In small tasks, or in large ones.
            if feeder.below(2) == 0 {
                feeder.feed(&mut call);
            } else {
                cpu.run_together(&mut || feeder.feed(&mut call));
            }
        }
        sequence.out.bytes().to_vec()
    })
}

fn random_qkv(t: usize, heads: Heads) -> Vec<f32> {
    normals("paged", t * heads.qkv_columns()).iter().map(|v| *v as f32).collect()
}

/// Query heads, kv heads and head dim, and tokens: up to three blocks of keys, head dims with and without pairs of bf16.
const SHAPES: [(HeadCounts, usize); 6] =
    [((6, 2, 64), 530), ((4, 2, 96), 90), ((4, 1, 128), 300), ((2, 2, 80), 270), ((12, 1, 34), 140), ((2, 1, 33), 90)];

/// A row gets the same bits fed with the whole sequence, alone, with some rows before and behind it or with other sequences, from any
/// pages, by any number of threads; pages are NaN where nobody wrote, so what is read past a sequence's end shows. And the bits are
/// right: those of the f64 formula within the bound of operations/oracle.rs. A sum that is cut where a share, a chunk or a tile of rows
/// ends breaks the first, a wrong mask, page or block the second.
#[test]
fn rows_do_not_depend_on_what_is_beside_them() {
    for (counts, t) in SHAPES {
        let heads = heads_of(counts);
        let qkv = random_qkv(t, heads);
        for cpu in devices().iter().rev().take(if t == 90 { 4 } else { 2 }) {
            for dtype in [DType::F32, DType::BF16] {
                let whole = fed(cpu, (heads, dtype), &qkv, Chunks::Whole, 1);
                for (chunks, n_threads) in [
                    (Chunks::Whole, 2),
                    (Chunks::Each(1), 1),
                    (Chunks::Each(5), 2),
                    (Chunks::Random, 1),
                    (Chunks::Random, 2),
                    (Chunks::Beside, 1),
                    (Chunks::Beside, 2),
                ] {
                    let found = fed(cpu, (heads, dtype), &qkv, chunks, n_threads);
                    assert!(found == whole, "{counts:?} {dtype:?} on {}: {chunks:?}, {n_threads} threads", cpu.name());
                }
                let mut out = tensor(&[t, heads.query * heads.dim], &vec![0.0; t * heads.query * heads.dim], dtype);
                out.bytes_mut().copy_from_slice(&whole);
                let unit = if dtype == DType::BF16 { U_BF16 } else { U };
                let stored = widened(&tensor(&[t, heads.qkv_columns()], &qkv, dtype));
                let expected = oracle::attention(&stored, &[0, t], counts, if dtype == DType::BF16 { unit } else { 0.0 }).0;
                for (i, (found, near)) in widened(&out).iter().zip(expected).enumerate() {
                    let allowed = near.bound + unit * (near.value.abs() + near.bound);
                    let error = (found - near.value).abs();
                    assert!(error <= allowed, "{counts:?} {dtype:?} on {}, element {i}: off by {error:e} of {allowed:e}", cpu.name());
                }
            }
        }
    }
}

/// Tokens whose keys and values are NaN or infinite change no bit of the rows before them, in the same call: keys that a row does not
/// see are left out, not multiplied by 0.
#[test]
fn unseen_keys_contribute_nothing() {
    for (counts, t) in SHAPES {
        let heads = heads_of(counts);
        let qkv = random_qkv(t, heads);
        for cpu in devices().iter().rev().take(2) {
            for dtype in [DType::F32, DType::BF16] {
                let expected = fed(cpu, (heads, dtype), &qkv, Chunks::Whole, 1);
                for (first, value) in [(t - 1, f32::NAN), (t - 2, f32::INFINITY), (67, f32::NEG_INFINITY), (0, f32::NAN)] {
                    let mut broken = qkv.clone();
                    broken[first * heads.qkv_columns()..].fill(value);
                    let found = fed(cpu, (heads, dtype), &broken, Chunks::Whole, 2);
                    let n = found.len() / t * first;
                    assert!(found[..n] == expected[..n], "{counts:?} {dtype:?} on {}: {value} from {first}", cpu.name());
                    let rest = tensor(&[1, (found.len() - n) / dtype.bytes()], &vec![0.0; (found.len() - n) / dtype.bytes()], dtype);
                    let mut rest = rest;
                    rest.bytes_mut().copy_from_slice(&found[n..]);
                    assert!(rest.to_f32_vec().iter().all(|x| x.is_nan()), "broken rows must show");
                }
            }
        }
    }
}

/// Sequences that list the same pages for what they have in common get the bits they get alone, and leave those pages as they were: a
/// write to a shared page, or a row of the wrong page, shows.
#[test]
fn prefixes_are_shared() {
    let cpu = Cpu::new();
    let heads = heads_of((6, 2, 64));
    let (n_common, t) = (3 * PAGE_TOKENS, 3 * PAGE_TOKENS + 90);
    for dtype in [DType::F32, DType::BF16] {
        let one = random_qkv(t, heads);
        let mut other = one.clone();
        other[n_common * heads.qkv_columns()..].reverse();
        let alone = [&one, &other].map(|qkv| fed(&cpu, (heads, dtype), qkv, Chunks::Whole, 1));
        let mut feeder = Feeder::new(&cpu, heads, dtype, 3);
        let mut sequences = [feeder.sequence(&one), feeder.sequence(&other)];
        let [first, second] = &mut sequences;
        feeder.feed(&mut [(&mut *first, n_common)]);
        (second.past, second.pages) = (n_common, first.pages.clone());
        second.out.rows_mut(0..n_common).bytes_mut().copy_from_slice(first.out.rows(0..n_common).bytes());
        for n_new in [1, 40, 0, 49] {
            feeder.feed(&mut [(&mut *first, n_new), (&mut *second, n_new)]);
        }
        for (sequence, alone) in sequences.iter().zip(&alone) {
            assert!(sequence.past == t && sequence.out.bytes() == alone, "{dtype:?}");
        }
    }
}
