//! Sums in a canonical order: products against the sum written down term by term, and the same bits whatever surrounds them.

mod canonical_cases;

use canonical_cases as cases;
use canonical_cases::{in_pairs, values};
use trireme::device::cpu::{Cpu, Isa};
use trireme::device::{Device, Gemm};
use trireme::parallel::pieces::pieces;
use trireme::tensor::{DType, Tensor};

const ISAS: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

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

/// Library products fail here: they choose their blocks by m, n and threads.
#[test]
fn products_do_not_depend_on_their_surroundings() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        let (device, shape) = (Cpu::with_isa(isa), (70, 75, 4001));
        cases::products_do_not_depend_on_their_surroundings(&device, dtype, shape, 8);
        let (m, n, k) = shape;
        let (a, b) = (values("a", m * k), values("b", n * k));
        let whole = || cases::product_nt(&device, dtype, (&a, &b), (m, n), 8);
        let expected = whole();
        for n_threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            assert!(pool.install(whole) == expected, "{isa:?} {dtype:?}: {n_threads} threads");
        }
    }
}

#[test]
fn parts_of_ranks_add_up_to_the_whole() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        cases::parts_of_ranks_add_up_to_the_whole(&Cpu::with_isa(isa), dtype, &[8, 40, 12, 104, 3416, 16_392]);
    }
}

#[test]
fn products_in_turn_are_one_call_a_piece() {
    for (isa, dtype) in ISAS.into_iter().flat_map(|isa| [(isa, DType::F32), (isa, DType::BF16)]) {
        for starts in [vec![0, 5, 10, 15], vec![0, 700, 1400, 2101], vec![0, 3500, 7000], vec![0, 0, 3, 3]] {
            cases::products_in_turn_are_one_call_a_piece(&Cpu::with_isa(isa), dtype, (21, 37), &starts);
        }
    }
}

#[test]
fn vocabulary_squares_and_groups_add_up() {
    let device = Cpu::new();
    cases::the_vocabulary_adds_up(&device);
    cases::squares_add_up(&device);
    cases::groups_are_added_in_pairs_and_in_turn(&device);
}
