//! Sums and maxima of several ranks' pieces, kernels/ordered.cu run on the CPU.

use crate::canonical_cases::in_pairs;
use crate::emulator::emulator;
use half::bf16;
use trireme::device::cuda::backend::{Arg, Backend, Grid, Kernel};
use trireme::rng::Random;
use trireme::tensor::DType;

/// Over 24 binary orders of magnitude, so that another order of additions has other bits.
fn piece(rank: usize, n: usize, dtype: DType) -> Vec<f32> {
    let random = Random::new(rank as u64, "pieces");
    let value = |i: usize| {
        let bits = random.bits(i as u64);
        let x = f32::from_bits(((bits >> 63) << 31 | (115 + bits % 24) << 23 | bits >> 8 & 0x7f_ffff) as u32);
        if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x }
    };
    (0..n).map(value).collect()
}

fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// Every element is that of a plain loop in rank order, or of the pairs written down, bit for bit: with one's own piece lying elsewhere, in
/// place, with gaps between pieces and without, for sizes that vectors do not divide; and nothing is written past the end (the emulator
/// looks).
#[test]
fn pieces_are_combined_in_rank_order() {
    let Some(emulator) = emulator() else { return };
    for dtype in [DType::F32, DType::BF16] {
        for (n_ranks, n, stride) in [(2, 1, 8), (3, 1021, 1024), (5, 6144, 6144), (4, 77, 77), (8, 33, 40), (64, 20, 24)] {
            for rank in [0, n_ranks - 1] {
                for operation in ["ordered_sum", "ordered_pairs", "ordered_max"] {
                    if operation == "ordered_pairs" && !usize::is_power_of_two(n_ranks) {
                        continue;
                    }
                    let pieces: Vec<Vec<f32>> = (0..n_ranks).map(|rank| piece(rank, n, dtype)).collect();
                    let own = emulator.alloc(n * dtype.bytes()).unwrap();
                    emulator.upload(&bytes_of(&pieces[rank], dtype), own);
                    // The place of one's own piece among the others stays NaN.
                    let others = emulator.alloc(n_ranks * stride * dtype.bytes()).unwrap();
                    for (r, piece) in pieces.iter().enumerate().filter(|(r, _)| *r != rank) {
                        emulator.upload(&bytes_of(piece, dtype), others + (r * stride * dtype.bytes()) as u64);
                    }
                    let args = [
                        Arg::Address(own),
                        Arg::Address(own),
                        Arg::Address(others),
                        Arg::Int(rank as i32),
                        Arg::Int(n_ranks as i32),
                        Arg::Long(stride as i64),
                        Arg::Long(n as i64),
                    ];
                    emulator.launch(&Kernel::of("ordered", operation, dtype), Grid::line(2, 256), &args);
                    let mut found = vec![0; n * dtype.bytes()];
                    emulator.download(own, &mut found);
                    let combine = |a: f32, b: f32| if operation == "ordered_max" { a.max(b) } else { a + b };
                    let expected: Vec<f32> = (0..n)
                        .map(|i| match operation {
                            "ordered_pairs" => in_pairs(&pieces.iter().map(|piece| piece[i]).collect::<Vec<f32>>()),
                            _ => pieces[1..].iter().fold(pieces[0][i], |sum, piece| combine(sum, piece[i])),
                        })
                        .collect();
                    assert!(found == bytes_of(&expected, dtype), "{operation} {dtype:?}, {n} of {n_ranks} ranks, own {rank}");
                    emulator.free(own, n * dtype.bytes());
                    emulator.free(others, n_ranks * stride * dtype.bytes());
                }
            }
        }
    }
}

/// A NaN of any rank stays one in the maximum: a bad value must be seen on every rank.
#[test]
fn a_nan_stays_one_in_the_maximum() {
    let Some(emulator) = emulator() else { return };
    for bad in 0..3 {
        let values: Vec<f32> = (0..3).map(|rank| if rank == bad { f32::NAN } else { rank as f32 }).collect();
        let [own, others] = [4, 12].map(|bytes| emulator.alloc(bytes).unwrap());
        emulator.upload(&values[0].to_le_bytes(), own);
        emulator.upload(&bytes_of(&values, DType::F32), others);
        let addresses = [own, own, others].map(Arg::Address);
        let args = [&addresses[..], &[Arg::Int(0), Arg::Int(3), Arg::Long(1), Arg::Long(1)]].concat();
        emulator.launch(&Kernel::of("ordered", "ordered_max", DType::F32), Grid::line(1, 256), &args);
        let mut found = [0; 4];
        emulator.download(own, &mut found);
        assert!(f32::from_le_bytes(found).is_nan(), "rank {bad}");
        emulator.free(own, 4);
        emulator.free(others, 12);
    }
}
