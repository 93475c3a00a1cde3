//! What sums in a canonical order promise, on any device: the same bits whatever surrounds them, and parts that add up to the whole.
#![allow(dead_code)] // not every test program uses all

use std::ops::Range;
use trireme::device::{CacheSpan, Device, Gemm, Heads, KvCache, PAGE_TOKENS};
use trireme::parallel::pieces::{TP_PIECES, pieces};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Normal, over several orders of magnitude, so that another order of additions has other bits.
pub fn values(name: &str, n: usize) -> Vec<f32> {
    let noise = Random::new(1, name);
    (0..n as u64).map(|i| noise.normal(i) as f32 * 2f32.powi((noise.bits(i) % 9) as i32 - 4)).collect()
}

pub fn on_device(device: &dyn Device, host: &Tensor) -> Tensor {
    let mut copy = device.alloc(host.dims(), host.dtype()).unwrap();
    device.upload(host.bytes(), &mut copy);
    copy
}

pub fn tensor(device: &dyn Device, dtype: DType, dims: &[usize], values: &[f32]) -> Tensor {
    let host = if dtype == DType::F32 { Tensor::from_f32(dims, values) } else { Tensor::from_bf16(dims, values) };
    on_device(device, &host)
}

pub fn nan(device: &dyn Device, dtype: DType, dims: &[usize]) -> Tensor {
    tensor(device, dtype, dims, &vec![f32::NAN; dims.iter().product()])
}

pub fn floats(device: &dyn Device, x: &Tensor) -> Vec<f32> {
    let mut host = Tensor::host(x.dims(), x.dtype(), None).unwrap();
    device.download(x, host.bytes_mut());
    host.to_f32_vec()
}

pub fn bits(device: &dyn Device, x: &Tensor) -> Vec<u32> {
    floats(device, x).iter().map(|x| x.to_bits()).collect()
}

/// Columns `range` of a matrix, as a matrix.
pub fn columns(x: &[f32], row_len: usize, range: Range<usize>) -> Vec<f32> {
    x.chunks_exact(row_len).flat_map(|row| row[range.clone()].to_vec()).collect()
}

/// [k, rows] of [rows, k].
pub fn transposed(x: &[f32], rows: usize) -> Vec<f32> {
    let k = x.len() / rows;
    (0..k * rows).map(|i| x[i % rows * k + i / rows]).collect()
}

/// In pairs, by halves.
pub fn in_pairs(sums: &[f32]) -> f32 {
    if sums.len() == 1 {
        return sums[0];
    }
    let (a, b) = sums.split_at(sums.len() / 2);
    in_pairs(a) + in_pairs(b)
}

/// out[m, n] f32 of a[m, k] and b[n, k], both stored with the terms side by side.
pub fn product_nt(device: &dyn Device, dtype: DType, (a, b): (&[f32], &[f32]), (m, n): (usize, usize), n_pieces: usize) -> Vec<u32> {
    let k = a.len() / m;
    let mut out = nan(device, DType::F32, &[m, n]);
    let (a, b) = (tensor(device, dtype, &[m, k], a), tensor(device, dtype, &[n, k], b));
    device.canonical().unwrap().gemm_in_pairs(&mut out, &a, &b, Gemm::NT, n_pieces);
    bits(device, &out)
}

/// A row of out has the same bits alone and among others, at any place, in any layout of the operands; and is rounded once.
pub fn products_do_not_depend_on_their_surroundings(device: &dyn Device, dtype: DType, (m, n, k): (usize, usize, usize), n_pieces: usize) {
    let (sums, label) = (device.canonical().unwrap(), format!("{} {dtype:?} {m} x {n} x {k}, {n_pieces} pieces", device.name()));
    let (a, b) = (values("a", m * k), values("b", n * k));
    let expected = product_nt(device, dtype, (&a, &b), (m, n), n_pieces);
    let at = |x: &[f32], rows: Range<usize>| x[rows.start * k..rows.end * k].to_vec();
    for (rows, some) in [(0..1, 3..4), (m / 14..m / 6, 0..n), (m - m / 7..m, n / 2..n), (m - 1..m, 0..n), (1..m, 1..n)] {
        let found = product_nt(device, dtype, (&at(&a, rows.clone()), &at(&b, some.clone())), (rows.len(), some.len()), n_pieces);
        let part: Vec<u32> = rows.clone().flat_map(|row| expected[row * n + some.start..row * n + some.end].to_vec()).collect();
        assert!(found == part, "{label}: rows {rows:?}, columns {some:?}");
    }
    let (other_a, other_b) = (transposed(&a, m), transposed(&b, n));
    let other_b = tensor(device, dtype, &[k, n], &other_b);
    let mut out = nan(device, DType::F32, &[m, n]);
    sums.gemm_in_pairs(&mut out, &tensor(device, dtype, &[m, k], &a), &other_b, Gemm::NN, n_pieces);
    assert!(bits(device, &out) == expected, "{label}: NN");
    sums.gemm_in_pairs(&mut out, &tensor(device, dtype, &[k, m], &other_a), &other_b, Gemm::TN, n_pieces);
    assert!(bits(device, &out) == expected, "{label}: TN");
    if dtype == DType::BF16 {
        let rounded: Vec<u32> = expected.iter().map(|&x| half::bf16::from_f32(f32::from_bits(x)).to_f32().to_bits()).collect();
        let mut out = nan(device, DType::BF16, &[m, n]);
        sums.gemm_in_pairs(&mut out, &tensor(device, dtype, &[m, k], &a), &other_b, Gemm::NN, n_pieces);
        assert!(bits(device, &out) == rounded, "{label}: rounded once, at the end");
    }
}

/// The parts of ranks, each a share of the pieces, added in pairs give the whole; with odd pieces, which vectors would else cut in two.
pub fn parts_of_ranks_add_up_to_the_whole(device: &dyn Device, dtype: DType, ks: &[usize]) {
    let (m, n) = (5, 6);
    for &k in ks {
        let (a, b) = (values("a", m * k), values("b", n * k));
        let part = |terms: Range<usize>, n_pieces: usize| {
            product_nt(device, dtype, (&columns(&a, k, terms.clone()), &columns(&b, k, terms)), (m, n), n_pieces)
        };
        let expected = part(0..k, TP_PIECES);
        for tp in [2, 4, 8].into_iter().filter(|tp| k % tp == 0) {
            let parts: Vec<Vec<u32>> = (0..tp).map(|rank| part(rank * k / tp..(rank + 1) * k / tp, TP_PIECES / tp)).collect();
            let sum = |i: usize| in_pairs(&parts.iter().map(|part| f32::from_bits(part[i])).collect::<Vec<f32>>()).to_bits();
            assert_eq!((0..m * n).map(sum).collect::<Vec<u32>>(), expected, "{} {dtype:?} k {k} tp {tp}", device.name());
        }
    }
}

/// Samples in turn are the samples one call each, whichever of them come together: a micro-batch must not show.
pub fn products_in_turn_are_one_call_a_piece(device: &dyn Device, dtype: DType, (m, n): (usize, usize), starts: &[usize]) {
    let (sums, k) = (device.canonical().unwrap(), starts[starts.len() - 1]);
    let label = format!("{} {dtype:?} {m} x {n} {starts:?}", device.name());
    let (a, b, old) = (values("a", k * m), values("b", k * n), values("old", m * n));
    let (a, b) = (tensor(device, dtype, &[k, m], &a), tensor(device, dtype, &[k, n], &b));
    let mut together = tensor(device, DType::F32, &[m, n], &old);
    sums.gemm_in_turn(&mut together, &a, &b, Gemm::TN.accumulate(), starts);
    let mut apart = tensor(device, DType::F32, &[m, n], &old);
    for ends in starts.windows(2).filter(|ends| ends[0] < ends[1]) {
        let rows = ends[0]..ends[1];
        sums.gemm_in_turn(&mut apart, &a.rows(rows.clone()), &b.rows(rows.clone()), Gemm::TN.accumulate(), &[0, rows.len()]);
    }
    assert!(bits(device, &together) == bits(device, &apart), "{label}");
    let mut assigned = nan(device, DType::F32, &[m, n]);
    sums.gemm_in_turn(&mut assigned, &a, &b, Gemm::TN, starts);
    let mut added = tensor(device, DType::F32, &[m, n], &vec![0.0; m * n]);
    sums.gemm_in_turn(&mut added, &a, &b, Gemm::TN.accumulate(), starts);
    assert!(floats(device, &assigned) == floats(device, &added), "{label} assigned");
}

/// The sum of exponentials over the vocabulary from the parts of ranks, padding among them.
pub fn the_vocabulary_adds_up(device: &dyn Device) {
    let sums = device.canonical().unwrap();
    let (t, v, n_valid) = (3, 104, 77usize);
    let logits = values("logits", t * v);
    let max = tensor(device, DType::F32, &[t], &[9.0, 8.0, 7.0]);
    let targets = on_device(device, &Tensor::from_u32(&[t], &[0, 40, 76]));
    let part = |columns_: Range<usize>, n_pieces: usize| {
        let shard = tensor(device, DType::BF16, &[t, columns_.len()], &columns(&logits, v, columns_.clone()));
        let [mut sum, mut target] = [(); 2].map(|()| nan(device, DType::F32, &[t]));
        let valid = n_valid.saturating_sub(columns_.start).min(columns_.len());
        sums.cross_entropy_sum_in_pairs(&mut sum, &mut target, &shard, &max, &targets, (columns_.start, valid), n_pieces);
        (floats(device, &sum), floats(device, &target).iter().sum::<f32>())
    };
    let (expected, target) = part(0..v, TP_PIECES);
    let logit = |i: usize| f64::from(half::bf16::from_f32(logits[i]).to_f32());
    let exact: f64 = (0..n_valid).map(|c| (logit(c) - 9.0).exp()).sum();
    assert!((f64::from(expected[0]) - exact).abs() < 1e-5 * exact, "{} is not {exact}", expected[0]);
    assert_eq!(f64::from(target), logit(0) + logit(v + 40) + logit(2 * v + 76));
    for tp in [2, 4, 8] {
        let parts: Vec<_> = (0..tp).map(|rank| part(rank * v / tp..(rank + 1) * v / tp, TP_PIECES / tp)).collect();
        for i in 0..t {
            let sum = in_pairs(&parts.iter().map(|(sum, _)| sum[i]).collect::<Vec<f32>>());
            assert_eq!(sum.to_bits(), expected[i].to_bits(), "{} tp {tp} token {i}", device.name());
        }
        assert_eq!(parts.iter().map(|(_, target)| target).sum::<f32>(), target);
    }
}

/// Squares over rows cut anywhere between pieces: the same sum of f64, which is the exact one of the pieces' sums; one that is infinite or
/// no number stays so.
pub fn squares_add_up(device: &dyn Device) {
    let sums = device.canonical().unwrap();
    let (rows, length) = (9, 52);
    let x = values("squares", rows * length);
    let whole = sums.sum_squares(&tensor(device, DType::F32, &[rows, length], &x), TP_PIECES).value();
    let exact: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((whole - exact).abs() < 1e-13 * exact, "{whole} is not {exact}");
    let mut merged = trireme::exact::ExactSum::default();
    for tp in 0..4 {
        let part = columns(&x, length, tp * 13..(tp + 1) * 13);
        for rows in part.chunks(2 * 13) {
            merged.merge(&sums.sum_squares(&tensor(device, DType::F32, &[rows.len() / 13, 13], rows), TP_PIECES / 4));
        }
    }
    assert_eq!(merged.value().to_bits(), whole.to_bits());
    // Powers of two from the smallest squares to the largest: every limb, and carries between them, with a known sum.
    let powers: Vec<f32> = (-149..128).map(|e| 2f64.powi(e) as f32).collect();
    let known: trireme::exact::ExactSum = powers.iter().map(|x| f64::from(*x).powi(2)).collect();
    let found = sums.sum_squares(&tensor(device, DType::F32, &[powers.len(), 1], &powers), 1);
    assert_eq!(found.to_bytes(), known.to_bytes());
    for (bad, expected) in [(f32::INFINITY, f64::INFINITY), (f32::NAN, f64::NAN)] {
        let found = sums.sum_squares(&tensor(device, DType::F32, &[3, 1], &[1.0, bad, 2.0]), 1).value();
        assert!(found == expected || found.is_nan() && expected.is_nan(), "{found} for {bad}");
    }
}

/// Groups of rows: pieces in pairs, groups in turn, onto what is there, to the last bit.
pub fn groups_are_added_in_pairs_and_in_turn(device: &dyn Device) {
    for (n_groups, n_pieces, h) in [(1, 1, 1), (3, 8, 37), (2, 4, 1100), (5, 2, 8)] {
        let (old, rows) = (values("old", h), values("rows", n_groups * n_pieces * h));
        let mut out = tensor(device, DType::F32, &[h], &old);
        device.canonical().unwrap().add_groups(&mut out, &tensor(device, DType::F32, &[n_groups * n_pieces, h], &rows), n_pieces);
        let group =
            |group: usize, i: usize| in_pairs(&(0..n_pieces).map(|piece| rows[(group * n_pieces + piece) * h + i]).collect::<Vec<f32>>());
        let expected: Vec<u32> = (0..h).map(|i| (0..n_groups).fold(old[i], |sum, at| sum + group(at, i)).to_bits()).collect();
        assert_eq!(bits(device, &out), expected, "{} {n_groups} groups of {n_pieces}", device.name());
    }
}

/// Piece by piece: terms one after another from 0, by `add(sum, a, b)`; the pieces in pairs.
pub fn written_down((a, b): (&[f32], &[f32]), (m, n): (usize, usize), n_pieces: usize, add: impl Fn(f32, f32, f32) -> f32) -> Vec<u32> {
    let k = a.len() / m;
    let piece = |i: usize, j: usize, terms: &Range<usize>| terms.clone().fold(0f32, |sum, l| add(sum, a[i * k + l], b[j * k + l]));
    let element = |i: usize, j: usize| in_pairs(&pieces(k, n_pieces).iter().map(|terms| piece(i, j, terms)).collect::<Vec<f32>>());
    (0..m * n).map(|at| element(at / n, at % n).to_bits()).collect()
}

/// Rows of a sequence of several shares of keys, in pieces and one by one, beside other sequences and in other pages: the bits of all of
/// them at once. A share that ends elsewhere, or a tile that leaves a trace in a row that does not see it, shows.
pub fn a_row_of_attention_does_not_see_its_neighbours(device: &dyn Device) {
    for (dtype, heads) in [(DType::F32, Heads { query: 2, kv: 1, dim: 8 }), (DType::BF16, Heads { query: 3, kv: 1, dim: 64 })] {
        let (past, n) = (500, 40);
        let n_pages = 24;
        let tensor = |dims: &[usize], name: &str| {
            let noise = Random::new(9, name);
            let values: Vec<f32> = (0..dims.iter().product::<usize>() as u64).map(|i| 2.0 * noise.normal(i) as f32).collect();
            let host = if dtype == DType::F32 { Tensor::from_f32(dims, &values) } else { Tensor::from_bf16(dims, &values) };
            let mut copy = device.alloc(dims, dtype).unwrap();
            device.upload(host.bytes(), &mut copy);
            copy
        };
        let all = tensor(&[past + n, heads.qkv_columns()], "qkv");
        let other = tensor(&[20, heads.qkv_columns()], "another");
        let row_bytes = heads.query * heads.dim * dtype.bytes();
        // Rows of the sequence in calls that end at these; in every second call another sequence comes first.
        let rows_in_calls = |ends: &[usize], first_page: u32| -> Vec<u8> {
            let mut cache = KvCache {
                keys: device.alloc(&[n_pages, PAGE_TOKENS, heads.kv * heads.dim], dtype).unwrap(),
                values: device.alloc(&[n_pages, PAGE_TOKENS, heads.kv * heads.dim], dtype).unwrap(),
            };
            let pages: Vec<u32> = (0..9).map(|i| first_page + i).collect();
            let (mut begin, mut found) = (0, Vec::new());
            for (i, &end) in ends.iter().enumerate() {
                let n_others = if i % 2 == 1 { 20 } else { 0 };
                let mut qkv = device.alloc(&[n_others + end - begin, heads.qkv_columns()], dtype).unwrap();
                device.copy(&mut qkv.rows_mut(0..n_others), &other.rows(0..n_others));
                device.copy(&mut qkv.rows_mut(n_others..n_others + end - begin), &all.rows(begin..end));
                let mut spans = vec![CacheSpan { rows: n_others..n_others + end - begin, past: begin, pages: pages.clone() }];
                if n_others > 0 {
                    spans.insert(0, CacheSpan { rows: 0..n_others, past: 0, pages: vec![n_pages as u32 - 1] });
                }
                let mut out = device.alloc(&[qkv.n_rows(), heads.query * heads.dim], dtype).unwrap();
                device.attention_cached(&mut out, &qkv, &mut cache, &spans, heads);
                found.extend_from_slice(&out.host_bytes()[n_others * row_bytes..]);
                begin = end;
            }
            found
        };
        let expected = rows_in_calls(&[past + n], 0);
        let one_by_one: Vec<usize> = (past..=past + n).collect();
        for (ends, first_page) in [(&[37, 101, 320, 512, past + n][..], 3), (&[past, past + 11, past + 13, past + n], 7), (&one_by_one, 1)]
        {
            let found = rows_in_calls(ends, first_page);
            let differ = found.chunks(row_bytes).zip(expected.chunks(row_bytes)).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{dtype:?} in calls that end at {ends:?}");
        }
    }
}
