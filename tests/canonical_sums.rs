//! Sums in a canonical order: products against the sum written down term by term, and the same bits whatever surrounds them.

use trireme::device::cpu::{Cpu, Isa};
use trireme::device::{Device, Gemm};
use trireme::parallel::pieces::{TP_PIECES, pieces};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

const ISAS: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

fn values(name: &str, n: usize) -> Vec<f32> {
    let noise = Random::new(1, name);
    (0..n as u64).map(|i| noise.normal(i) as f32 * 2f32.powi((noise.bits(i) % 9) as i32 - 4)).collect()
}

fn tensor(dtype: DType, dims: &[usize], values: &[f32]) -> Tensor {
    if dtype == DType::F32 { Tensor::from_f32(dims, values) } else { Tensor::from_bf16(dims, values) }
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_f32_vec().iter().map(|x| x.to_bits()).collect()
}

/// Columns `range` of a matrix, as a matrix.
fn columns(x: &[f32], row_len: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    x.chunks_exact(row_len).flat_map(|row| row[range.clone()].to_vec()).collect()
}

/// In pairs, by halves.
fn in_pairs(sums: &[f32]) -> f32 {
    if sums.len() == 1 {
        return sums[0];
    }
    let (a, b) = sums.split_at(sums.len() / 2);
    in_pairs(a) + in_pairs(b)
}

/// f32 products are fused multiply-adds over the terms of a piece in order, from 0, and pieces in pairs: to the last bit, over
/// lengths around the slabs and tiles of the implementation and pieces of no terms.
#[test]
fn products_in_pairs_are_the_sum_written_down() {
    for isa in [Isa::Avx512, Isa::Avx2] {
        let device = Cpu::with_isa(isa);
        let sums = device.canonical().unwrap();
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (9, 33, 40), (20, 17, 1537), (2, 40, 5000), (15, 3, 24_600)] {
            let (a, b) = (values("a", m * k), values("b", n * k));
            for n_pieces in [1, 2, 8] {
                let mut out = Tensor::from_f32(&[m, n], &vec![f32::NAN; m * n]);
                sums.gemm_in_pairs(&mut out, &Tensor::from_f32(&[m, k], &a), &Tensor::from_f32(&[n, k], &b), Gemm::NT, n_pieces);
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let dot = |terms: std::ops::Range<usize>| terms.fold(0f32, |sum, l| a[i * k + l].mul_add(b[j * k + l], sum));
                    // A piece longer than a slab is a sum of slabs of equal length, in turn.
                    let piece = |piece: &std::ops::Range<usize>| {
                        let n_slabs = if isa == Isa::Avx512 { piece.len().div_ceil(1536).max(1) } else { 1 };
                        let slab = piece.len().div_ceil(n_slabs).max(1);
                        let slabs = piece.clone().step_by(slab).map(|at| dot(at..(at + slab).min(piece.end)));
                        slabs.reduce(|sum, slab| sum + slab).unwrap_or(0.0)
                    };
                    let expected = in_pairs(&pieces(k, n_pieces).iter().map(piece).collect::<Vec<f32>>());
                    let found = out.f32()[i * n + j];
                    assert_eq!(found.to_bits(), expected.to_bits(), "{isa:?} {m} x {n} x {k}, {n_pieces} pieces, [{i}, {j}]");
                }
            }
        }
    }
}

/// A row of out has the same bits alone and among others, at any place, in any layout of the operands, on any number of threads.
/// Library products fail here: they choose their blocks by m, n and threads.
#[test]
fn products_do_not_depend_on_their_surroundings() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        let sums = device.canonical().unwrap();
        let (m, n, k) = (70, 75, 4001);
        let (a, b) = (values("a", m * k), values("b", n * k));
        let whole = |how: Gemm, out_dtype: DType| {
            let (a, b) = (tensor(dtype, &[m, k], &a), tensor(dtype, &[n, k], &b));
            let mut out = Tensor::host(&[m, n], out_dtype, None).unwrap();
            sums.gemm_in_pairs(&mut out, &a, &b, how, 8);
            bits(&out)
        };
        let expected = whole(Gemm::NT, DType::F32);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(one.install(|| whole(Gemm::NT, DType::F32)), expected, "{isa:?} {dtype:?}: one thread");
        assert_eq!(three.install(|| whole(Gemm::NT, DType::F32)), expected, "{isa:?} {dtype:?}: three threads");
        if dtype == DType::BF16 {
            let rounded: Vec<u32> = expected.iter().map(|&x| half::bf16::from_f32(f32::from_bits(x)).to_f32().to_bits()).collect();
            assert_eq!(whole(Gemm::NT, DType::BF16), rounded, "{isa:?}: rounded once, at the end");
        }
        // Rows and columns by themselves.
        for (rows, some) in [(0..1, 3..4), (5..12, 0..75), (60..70, 40..75), (69..70, 0..75)] {
            let part_a = tensor(dtype, &[rows.len(), k], &a[rows.start * k..rows.end * k]);
            let part_b = tensor(dtype, &[some.len(), k], &b[some.start * k..some.end * k]);
            let mut out = Tensor::host(&[rows.len(), some.len()], DType::F32, None).unwrap();
            sums.gemm_in_pairs(&mut out, &part_a, &part_b, Gemm::NT, 8);
            let part: Vec<u32> = rows.clone().flat_map(|row| expected[row * n + some.start..row * n + some.end].to_vec()).collect();
            assert_eq!(bits(&out), part, "{isa:?} {dtype:?}: rows {rows:?}, columns {some:?}");
        }
        // Operands stored the other way round.
        let transposed = |x: &[f32], rows: usize| (0..k * rows).map(|i| x[i % rows * k + i / rows]).collect::<Vec<f32>>();
        let mut out = Tensor::host(&[m, n], DType::F32, None).unwrap();
        sums.gemm_in_pairs(&mut out, &tensor(dtype, &[m, k], &a), &tensor(dtype, &[k, n], &transposed(&b, n)), Gemm::NN, 8);
        assert_eq!(bits(&out), expected, "{isa:?} {dtype:?}: NN");
        sums.gemm_in_pairs(&mut out, &tensor(dtype, &[k, m], &transposed(&a, m)), &tensor(dtype, &[k, n], &transposed(&b, n)), Gemm::TN, 8);
        assert_eq!(bits(&out), expected, "{isa:?} {dtype:?}: TN");
    }
}

/// The parts of ranks, each a share of the pieces, added in pairs give the whole; with odd pieces, which bf16 dot products of pairs
/// would else cut in two.
#[test]
fn parts_of_ranks_add_up_to_the_whole() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        let sums = device.canonical().unwrap();
        let (m, n) = (5, 6);
        for k in [8, 40, 12, 104, 3416, 16_392] {
            let (a, b) = (values("a", m * k), values("b", n * k));
            let part = |terms: std::ops::Range<usize>, n_pieces: usize| {
                let (a, b) = (columns(&a, k, terms.clone()), columns(&b, k, terms.clone()));
                let mut out = Tensor::from_f32(&[m, n], &vec![f32::NAN; m * n]);
                let (a, b) = (tensor(dtype, &[m, terms.len()], &a), tensor(dtype, &[n, terms.len()], &b));
                sums.gemm_in_pairs(&mut out, &a, &b, Gemm::NT, n_pieces);
                out
            };
            let expected = bits(&part(0..k, TP_PIECES));
            for tp in [2, 4, 8].into_iter().filter(|tp| k % tp == 0) {
                let parts: Vec<Vec<f32>> =
                    (0..tp).map(|rank| part(rank * k / tp..(rank + 1) * k / tp, TP_PIECES / tp).f32().to_vec()).collect();
                let sum = |i: usize| in_pairs(&parts.iter().map(|part| part[i]).collect::<Vec<f32>>()).to_bits();
                assert_eq!((0..m * n).map(sum).collect::<Vec<u32>>(), expected, "{isa:?} {dtype:?} k {k} tp {tp}");
            }
        }
    }
}

/// Samples in turn are the samples one call each, whichever of them come together: a micro-batch must not show.
#[test]
fn products_in_turn_are_one_call_a_piece() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let device = Cpu::with_isa(isa);
        let sums = device.canonical().unwrap();
        let (m, n) = (21, 37);
        for starts in [vec![0, 5, 10, 15], vec![0, 700, 1400, 2101], vec![0, 3500, 7000], vec![0, 0, 3, 3]] {
            let k = starts[starts.len() - 1];
            let (a, b, old) = (values("a", k * m), values("b", k * n), values("old", m * n));
            let (a, b) = (tensor(dtype, &[k, m], &a), tensor(dtype, &[k, n], &b));
            let mut together = Tensor::from_f32(&[m, n], &old);
            sums.gemm_in_turn(&mut together, &a, &b, Gemm::TN.accumulate(), &starts);
            let mut apart = Tensor::from_f32(&[m, n], &old);
            for ends in starts.windows(2).filter(|ends| ends[0] < ends[1]) {
                let rows = ends[0]..ends[1];
                sums.gemm_in_turn(&mut apart, &a.rows(rows.clone()), &b.rows(rows.clone()), Gemm::TN.accumulate(), &[0, rows.len()]);
            }
            assert_eq!(bits(&together), bits(&apart), "{isa:?} {dtype:?} {starts:?}");
            let mut assigned = Tensor::from_f32(&[m, n], &vec![f32::NAN; m * n]);
            sums.gemm_in_turn(&mut assigned, &a, &b, Gemm::TN, &starts);
            let mut added = Tensor::from_f32(&[m, n], &vec![0.0; m * n]);
            sums.gemm_in_turn(&mut added, &a, &b, Gemm::TN.accumulate(), &starts);
            assert_eq!(assigned.f32(), added.f32(), "{isa:?} {dtype:?} {starts:?} assigned");
        }
    }
}

/// The sum of exponentials over the vocabulary from the parts of ranks, padding among them; and squares over rows cut anywhere
/// between pieces.
#[test]
fn vocabulary_and_squares_add_up() {
    let device = Cpu::new();
    let sums = device.canonical().unwrap();
    let (t, v, n_valid) = (3, 104, 77usize);
    let logits = values("logits", t * v);
    let max = Tensor::from_f32(&[t], &[9.0, 8.0, 7.0]);
    let targets = Tensor::from_u32(&[t], &[0, 40, 76]);
    let part = |columns_: std::ops::Range<usize>, n_pieces: usize| {
        let shard = Tensor::from_bf16(&[t, columns_.len()], &columns(&logits, v, columns_.clone()));
        let [mut sum, mut target] = [(); 2].map(|()| Tensor::from_f32(&[t], &[f32::NAN; 3]));
        let valid = n_valid.saturating_sub(columns_.start).min(columns_.len());
        sums.cross_entropy_sum_in_pairs(&mut sum, &mut target, &shard, &max, &targets, (columns_.start, valid), n_pieces);
        (sum.f32().to_vec(), target.f32().iter().sum::<f32>())
    };
    let (expected, target) = part(0..v, TP_PIECES);
    let exact: f64 = (0..n_valid).map(|c| (f64::from(half::bf16::from_f32(logits[c]).to_f32()) - 9.0).exp()).sum();
    assert!((f64::from(expected[0]) - exact).abs() < 1e-5 * exact, "{} is not {exact}", expected[0]);
    for tp in [2, 4, 8] {
        let parts: Vec<_> = (0..tp).map(|rank| part(rank * v / tp..(rank + 1) * v / tp, TP_PIECES / tp)).collect();
        for i in 0..t {
            let sum = in_pairs(&parts.iter().map(|(sum, _)| sum[i]).collect::<Vec<f32>>());
            assert_eq!(sum.to_bits(), expected[i].to_bits(), "tp {tp} token {i}");
        }
        assert_eq!(parts.iter().map(|(_, target)| target).sum::<f32>(), target);
    }
    let (rows, length) = (9, 52);
    let x = values("squares", rows * length);
    let whole = sums.sum_squares(&Tensor::from_f32(&[rows, length], &x), TP_PIECES).value();
    let exact: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((whole - exact).abs() < 1e-13 * exact);
    let mut merged = trireme::exact::ExactSum::default();
    for tp in 0..4 {
        let part = columns(&x, length, tp * 13..(tp + 1) * 13);
        for rows in part.chunks(2 * 13) {
            merged.merge(&sums.sum_squares(&Tensor::from_f32(&[rows.len() / 13, 13], rows), TP_PIECES / 4));
        }
    }
    assert_eq!(merged.value().to_bits(), whole.to_bits());
}
