//! Sums in canonical order on the CUDA device over the emulator: kernels/matmul.cu, kernels/matmul_hopper.cu and kernels/canonical.cu
//! below the code that launches them.

use crate::canonical_cases as cases;
use crate::canonical_cases::{product_nt, values, written_down};
use crate::check;
use crate::decode_cases::fused;
use crate::emulator::{emulator, hopper};
use trireme::device::canonical::CanonicalSums;
use trireme::device::cuda::Cuda;
use trireme::device::{Device, Gemm};
use trireme::tensor::DType;

/// On a GPU of any kind, and on a Hopper GPU.
fn with_each(work: impl Fn(&Cuda)) {
    for machine in [emulator(), hopper()] {
        let Some(machine) = machine else { return };
        let cuda = Cuda::with_backend(machine);
        work(&cuda);
        assert_eq!(cuda.memory().live_bytes, 0);
    }
}

/// Every element is the f64 formula's within the bound of a sum in any order, for every form of the kernels; outputs start as NaN and end
/// in guard bytes, inputs must come back unchanged.
#[test]
fn products_match_the_oracle() {
    with_each(|cuda| {
        for case in check::canonical_gemm_cases() {
            check::check(cuda, &case, DType::F32);
            check::check(cuda, &case, DType::BF16);
        }
    });
}

/// To the last bit: f32 by fused multiply-adds; bf16, whose products are exact in f32, by additions one after another, which is how the
/// emulated tensor core does it. A term in another piece, a piece in another place of the tree or a stage that is read too early shows.
/// The kernels of Hopper have the bits of the others here; whether they do on a GPU is its tensor cores' business.
#[test]
fn products_are_the_sum_written_down() {
    with_each(|cuda| {
        // Few rows, few tiles, many tiles: 16 x 64, 64 x 64, 128 x 64 and, with one piece, 128 x 128. On Hopper 64 x 64, 128 x 128 and,
        // with one piece, 128 x 256; pieces that end inside of a step and of an instruction, rounds of the ring, tile after tile. Then more
        // tiles than one band of eight has downwards, and many side by side.
        let shapes = [(1, 1, 1), (3, 70, 264), (16, 9, 1000), (33, 65, 250), (140, 130, 300), (8, 130, 2048), (130, 520, 640)];
        for (m, n, k) in shapes.into_iter().chain([(1100, 3, 24), (9, 700, 24)]) {
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
    with_each(|cuda| {
        for (shape, n_pieces) in
            [((140, 200, 136), 8), ((140, 260, 136), 1), ((70, 75, 201), 8), ((140, 520, 256), 1), ((140, 520, 256), 8)]
        {
            for dtype in [DType::F32, DType::BF16] {
                cases::products_do_not_depend_on_their_surroundings(cuda, dtype, shape, n_pieces);
            }
        }
    });
}

/// Ranks with their shares of the pieces add up to one rank's bits.
#[test]
fn parts_of_ranks_add_up_to_the_whole() {
    with_each(|cuda| {
        for dtype in [DType::F32, DType::BF16] {
            cases::parts_of_ranks_add_up_to_the_whole(cuda, dtype, &[8, 40, 12, 104, 1024]);
        }
    });
}

/// A micro-batch does not show in weight gradients, in the forms for few and for many tiles.
#[test]
fn products_in_turn_are_one_call_a_piece() {
    with_each(|cuda| {
        for dtype in [DType::F32, DType::BF16] {
            for starts in [&[0, 5, 10, 15][..], &[0, 64, 130, 200], &[0, 0, 3, 3]] {
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (21, 37), starts);
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (136, 264), starts);
                cases::products_in_turn_are_one_call_a_piece(cuda, dtype, (130, 520), starts);
            }
        }
    });
}

/// What ends a product has the bits of the pass that it stands for.
#[test]
fn products_that_end_in_an_activation_have_the_bits_of_both() {
    // Rows that do not fill the last tile, terms that do not fill the last step, several tiles a block; then columns that do not fill a
    // tile, and rows too few for it.
    let (whole, other) = ([(130, 512, 264), (700, 256, 64)], [(130, 264, 64), (3, 256, 64)]);
    with_each(|cuda| {
        let is_made = cuda.has_hopper_kernels();
        fused::check_canonical_activation(cuda, &whole.map(|shape| (shape, is_made)));
        fused::check_canonical_activation(cuda, &other.map(|shape| (shape, false)));
    });
}

/// Operands that Hopper's copy engine cannot take are copied in every replay of a product that was recorded, as they are then.
#[test]
fn copies_of_operands_are_recorded() {
    let Some(machine) = hopper() else { return };
    let cuda = Cuda::with_backend(machine);
    let (m, n, k) = (3, 5, 45);
    let (first, then, b) = (values("first", m * k), values("then", m * k), values("b", n * k));
    let mut x = cases::tensor(&cuda, DType::BF16, &[m, k], &first);
    let y = cases::tensor(&cuda, DType::BF16, &[n, k], &b);
    let mut out = cases::nan(&cuda, DType::F32, &[m, n]);
    let recording = cuda.record(&mut || cuda.gemm_in_pairs(&mut out, &x, &y, Gemm::NT, 8)).expect("kernels and no table");
    let bytes: Vec<half::bf16> = then.iter().map(|x| half::bf16::from_f32(*x)).collect();
    cuda.upload(bytemuck::cast_slice(&bytes), &mut x);
    assert!(recording.replay(&[]));
    assert_eq!(cases::bits(&cuda, &out), product_nt(&cuda, DType::BF16, (&then, &b), (m, n), 8));
}

#[test]
fn vocabulary_squares_and_groups_add_up() {
    with_each(|cuda| {
        cases::the_vocabulary_adds_up(cuda);
        cases::squares_add_up(cuda);
        cases::groups_are_added_in_pairs_and_in_turn(cuda);
    });
}
