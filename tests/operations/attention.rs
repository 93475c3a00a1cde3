//! The table's entries for attention: whole sequences, backward, and over the cache.

use super::{Case, Init, Kind, Role, arg, assigned, exact, heads_of, ids, input, updated};
use crate::oracle::{self, AttentionGradient, HeadCounts, Near, near};
use trireme::device::{CacheSpan, Device, Direction, KvCache, PAGE_TOKENS, Rope};
use trireme::tensor::{DType, Tensor};

/// How much weights may be rounded before the second product of attention: to bf16 where that is the dtype under test.
fn weight_rounding(round: &dyn Fn(f64) -> f64) -> f64 {
    if round(1.0 + 1e-4) == 1.0 { 1.0 / 256.0 } else { 0.0 }
}

/// Multiplications and additions of causal attention, scores and weighted values.
fn attention_flops(starts: &[usize], (query, _, d): HeadCounts) -> f64 {
    let pairs: usize = starts.windows(2).map(|e| (e[1] - e[0]) * (e[1] - e[0] + 1) / 2).sum();
    4.0 * (pairs * query * d) as f64
}

pub fn attention(starts: Vec<usize>, heads: HeadCounts) -> Case {
    let t = *starts.last().expect("a sequence end");
    let h = heads_of(heads);
    let shape = if starts.len() < 8 { format!("{starts:?}") } else { format!("{} sequences", starts.len() - 1) };
    let flops = attention_flops(&starts, heads);
    let oracle_starts = starts.clone();
    Case {
        operation: "attention",
        shape: format!("{shape} heads {heads:?}"),
        args: vec![assigned(&[t, h.query * h.dim], Kind::Float), assigned(&[h.query, t], Kind::F32), input(&[t, h.qkv_columns()], 1.0)],
        run: Box::new(move |device, tensors| {
            let [out, lse, qkv] = tensors else { unreachable!() };
            device.attention(out, lse, qkv, &starts, h);
        }),
        oracle: Box::new(move |v, round| {
            let (out, lse) = oracle::attention(&v[2], &oracle_starts, heads, weight_rounding(round));
            vec![out, lse]
        }),
        flops,
    }
}

pub fn attention_backward(starts: Vec<usize>, heads: HeadCounts) -> Case {
    let t = *starts.last().expect("a sequence end");
    let h = heads_of(heads);
    let shape = if starts.len() < 8 { format!("{starts:?}") } else { format!("{} sequences", starts.len() - 1) };
    let flops = 2.5 * attention_flops(&starts, heads);
    let (s1, s2, s3) = (starts.clone(), starts.clone(), starts.clone());
    let out = move |v: &[Vec<f64>]| oracle::attention(&v[1], &s1, heads, 0.0).0.iter().map(|o| o.value).collect();
    let lse = move |v: &[Vec<f64>]| oracle::attention(&v[1], &s2, heads, 0.0).1.iter().map(|o| o.value).collect();
    Case {
        operation: "attention_backward",
        shape: format!("{shape} heads {heads:?}"),
        args: vec![
            assigned(&[t, h.qkv_columns()], Kind::Float),
            input(&[t, h.qkv_columns()], 1.0),
            input(&[t, h.query * h.dim], 1.0),
            arg(&[t, h.query * h.dim], Kind::Float, Role::Input, Init::From(Box::new(out))),
            arg(&[h.query, t], Kind::F32, Role::Input, Init::From(Box::new(lse))),
        ],
        run: Box::new(move |device, tensors| {
            let [dqkv, qkv, dout, out, lse] = tensors else { unreachable!() };
            device.attention_backward(dqkv, dout, out, lse, qkv, &starts, h);
        }),
        oracle: Box::new(move |v, round| {
            let inputs = AttentionGradient { dout: &v[2], out: &v[3], lse: &v[4], qkv: &v[1] };
            vec![oracle::attention_backward(&inputs, &s3, heads, weight_rounding(round))]
        }),
        flops,
    }
}

/// The same with the rotation of the gradients of queries and keys behind it, half of their dims. Its bits are those of the two calls
/// (decode_cases/fused.rs), each of which has an oracle.
pub fn attention_rope_backward(starts: Vec<usize>, heads: HeadCounts) -> Case {
    let h = heads_of(heads);
    let positions = starts.windows(2).flat_map(|ends| 0..ends[1] - ends[0]).collect();
    let mut case = attention_backward(starts.clone(), heads);
    let how = Rope { rotary_dims: h.dim / 2, base: 10000.0, scaling: None, direction: Direction::Backward };
    case.args.push(ids(positions));
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [dqkv, qkv, dout, out, lse, positions] = tensors else { unreachable!() };
        device.attention_rope_backward(dqkv, dout, out, lse, qkv, positions, &starts, h, how);
    };
    let oracle = |_: &[Vec<f64>], _: &dyn Fn(f64) -> f64| unreachable!("it is for benches");
    Case { operation: "attention_rope_backward", run: Box::new(run), oracle: Box::new(oracle), ..case }
}

/// Spans as (pages in common with the first, past, new tokens); their rows follow one another. The cache has the pages that they need, in
/// no order.
pub fn attention_cached(spans: &[(usize, usize, usize)], heads: HeadCounts) -> Case {
    let (h, (list, n_pages)) = (heads_of(heads), in_pages(spans));
    let pairs: usize = spans.iter().map(|(_, past, new)| past * new + new * (new + 1) / 2).sum();
    let cache_dims = [n_pages, PAGE_TOKENS, h.kv * h.dim];
    let (t, oracle_list) = (spans.iter().map(|(_, _, new)| new).sum(), list.clone());
    Case {
        operation: "attention_cached",
        shape: format!("{} spans, {} pairs in {n_pages} pages, heads {heads:?}", spans.len(), pairs),
        args: vec![
            assigned(&[t, h.query * h.dim], Kind::Float),
            updated(&cache_dims, Kind::Float),
            updated(&cache_dims, Kind::Float),
            input(&[t, h.qkv_columns()], 1.0),
        ],
        run: Box::new(move |device, tensors| {
            let [out, keys, values, qkv] = tensors else { unreachable!() };
            let none = || Tensor::nothing(&[1], DType::F32);
            let mut cache = KvCache { keys: std::mem::replace(keys, none()), values: std::mem::replace(values, none()) };
            device.attention_cached(out, qkv, &mut cache, &list, h);
            (*keys, *values) = (cache.keys, cache.values);
        }),
        oracle: Box::new(move |v, round| cached_oracle(v, &oracle_list, heads, weight_rounding(round))),
        flops: 4.0 * (pairs * h.query * h.dim) as f64,
    }
}

/// The same with the rotation of half of the dims before it. Its bits are those of the two calls (decode_cases/fused.rs), each of which
/// has an oracle.
pub fn rope_attention_cached(spans: &[(usize, usize, usize)], heads: HeadCounts) -> Case {
    let (h, (list, _)) = (heads_of(heads), in_pages(spans));
    let mut case = attention_cached(spans, heads);
    let how = Rope { rotary_dims: h.dim / 2, base: 10000.0, scaling: None, direction: Direction::Forward };
    case.args[3].role = Role::Updated;
    case.args.push(ids(spans.iter().flat_map(|(_, past, new)| *past..past + new).collect()));
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [out, keys, values, qkv, positions] = tensors else { unreachable!() };
        let none = || Tensor::nothing(&[1], DType::F32);
        let mut cache = KvCache { keys: std::mem::replace(keys, none()), values: std::mem::replace(values, none()) };
        device.rope_attention_cached(out, qkv, positions, &mut cache, &list, h, how);
        (*keys, *values) = (cache.keys, cache.values);
    };
    let oracle = |_: &[Vec<f64>], _: &dyn Fn(f64) -> f64| unreachable!("it is for benches");
    Case { operation: "rope_attention_cached", run: Box::new(run), oracle: Box::new(oracle), ..case }
}

/// Spans as above with their pages, and how many pages there are.
fn in_pages(spans: &[(usize, usize, usize)]) -> (Vec<CacheSpan>, usize) {
    let own = |&(common, past, new): &(usize, usize, usize)| (past + new).div_ceil(PAGE_TOKENS) - common;
    let n_pages = spans.iter().map(own).sum::<usize>().max(1);
    let stride = (0..).map(|i| 2 * n_pages / 3 + i).find(|stride| *stride > 0 && gcd(*stride, n_pages) == 1).expect("a prime");
    let mut taken = (0..n_pages).map(|i| ((i + 1) * stride % n_pages) as u32);
    let mut first = 0;
    let mut list: Vec<CacheSpan> = Vec::new();
    for span in spans {
        let &(common, past, new) = span;
        assert!(common * PAGE_TOKENS <= past, "a page is written by two spans");
        let shared = list.first().map_or(&[][..], |first| &first.pages[..common]);
        let pages = shared.iter().copied().chain(taken.by_ref().take(own(span))).collect();
        list.push(CacheSpan { rows: first..first + new, past, pages });
        first += new;
    }
    (list, n_pages)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn cached_oracle(v: &[Vec<f64>], spans: &[CacheSpan], heads: HeadCounts, p_rounding: f64) -> Vec<Vec<Near>> {
    let (query, kv, d) = heads;
    let (columns, width) = ((query + 2 * kv) * d, kv * d);
    let (mut keys, mut values, qkv) = (v[1].clone(), v[2].clone(), &v[3]);
    let mut out = vec![near(f64::NAN, 0.0); v[0].len()];
    for span in spans {
        let row = |s: usize| (span.pages[s / PAGE_TOKENS] as usize * PAGE_TOKENS + s % PAGE_TOKENS) * width;
        for (i, t) in span.rows.clone().enumerate() {
            for g in 0..kv {
                let (to, from) = (row(span.past + i) + g * d, t * columns + oracle::key_at(heads, g));
                keys[to..to + d].copy_from_slice(&qkv[from..][..d]);
                values[to..to + d].copy_from_slice(&qkv[from + d..][..d]);
            }
        }
        for (i, t) in span.rows.clone().enumerate() {
            for a in 0..query {
                let g = a / (query / kv) * d;
                let k: Vec<&[f64]> = (0..=span.past + i).map(|s| &keys[row(s) + g..][..d]).collect();
                let x: Vec<&[f64]> = (0..=span.past + i).map(|s| &values[row(s) + g..][..d]).collect();
                let (o, _) = oracle::attention_row(&qkv[t * columns + oracle::query_at(heads, a)..][..d], &k, &x, p_rounding);
                out[(t * query + a) * d..][..d].copy_from_slice(&o);
            }
        }
    }
    vec![out, exact(&keys), exact(&values)]
}
