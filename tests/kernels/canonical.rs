//! Sums in canonical order on the CUDA device over the emulator: kernels/matmul.cu and kernels/canonical.cu below the code that launches
//! them.

use crate::canonical_cases as cases;
use crate::canonical_cases::{product_nt, values, written_down};
use crate::check;
use crate::emulator::emulator;
use trireme::device::Device;
use trireme::device::cuda::Cuda;
use trireme::tensor::DType;

fn with_cuda(work: impl Fn(&Cuda)) {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    work(&cuda);
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// Every element is the f64 formula's within the bound of a sum in any order, for every form of the kernels; outputs start as NaN and end
/// in guard bytes, inputs must come back unchanged.
#[test]
fn products_match_the_oracle() {
    with_cuda(|cuda| {
        for case in check::canonical_gemm_cases() {
            check::check(cuda, &case, DType::F32);
            check::check(cuda, &case, DType::BF16);
        }
    });
}

/// To the last bit: f32 by fused multiply-adds; bf16, whose products are exact in f32, by additions one after another, which is how the
/// emulated tensor core does it. A term in another piece, a piece in another place of the tree or a stage that is read too early shows.
#[test]
fn products_are_the_sum_written_down() {
    with_cuda(|cuda| {
        // Few rows, few tiles, many tiles: 16 x 64, 64 x 64, 128 x 64 and, with one piece, 128 x 128; more tiles than one band of eight has
        // downwards, and many side by side.
        for (m, n, k) in [(1, 1, 1), (3, 70, 264), (16, 9, 1000), (33, 65, 250), (140, 130, 300), (1100, 3, 24), (9, 700, 24)] {
            let (a, b) = (values("a", m * k), values("b", n * k));
            let narrow = |x: &[f32]| x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect::<Vec<f32>>();
            for n_pieces in [1, 2, 4, 8] {
                let found = product_nt(cuda, DType::F32, (&a, &b), (m, n), n_pieces);
                let expected = written_down((&a, &b), (m, n), n_pieces, |sum, a, b| a.mul_add(b, sum));
                assert!(found == expected, "f32 {m} x {n} x {k}, {n_pieces} pieces");
                let found = product_nt(cuda, DType::BF16, (&a, &b), (m, n), n_pieces);
                let expected = written_down((&narrow(&a), &narrow(&b)), (m, n), n_pieces, |sum, a, b| sum + a * b);
                assert!(found == expected, "bf16 {m} x {n} x {k}, {n_pieces} pieces");
            }
        }
    });
}

/// Alone, among others, in other tiles and forms, with the operands stored either way: the same bits.
#[test]
fn products_do_not_depend_on_their_surroundings() {
    with_cuda(|cuda| {
        for (shape, n_pieces) in [((140, 200, 136), 8), ((140, 260, 136), 1), ((70, 75, 201), 8)] {
            for dtype in [DType::F32, DType::BF16] {
                cases::products_do_not_depend_on_their_surroundings(cuda, dtype, shape, n_pieces);
            }
        }
    });
}

/// Ranks with their shares of the pieces add up to one rank's bits.
#[test]
fn parts_of_ranks_add_up_to_the_whole() {
    with_cuda(|cuda| {
        for dtype in [DType::F32, DType::BF16] {
            cases::parts_of_ranks_add_up_to_the_whole(cuda, dtype, &[8, 40, 12, 104, 1024]);
        }
    });
}

/// A micro-batch does not show in weight gradients, in the forms for few and for many tiles.
#[test]
fn products_in_turn_are_one_call_a_piece() {
    with_cuda(|cuda| {
        for dtype in [DType::F32, DType::BF16] {
            for starts in [&[0, 5, 10, 15][..], &[0, 64, 130, 200], &[0, 0, 3, 3]] {
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (21, 37), starts);
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (136, 264), starts);
            }
        }
    });
}

#[test]
fn vocabulary_squares_and_groups_add_up() {
    with_cuda(|cuda| {
        cases::the_vocabulary_adds_up(cuda);
        cases::squares_add_up(cuda);
        cases::groups_are_added_in_pairs_and_in_turn(cuda);
    });
}
