//! The table of operations (tests/operations) on the CUDA device over the emulator: launch code and kernels together.

use crate::cases::{self, Case, Kind, Vocabulary};
use crate::check::{self, check};
use crate::decode_cases::fused;
use crate::emulator::{emulator, hopper};
use crate::oracle::{HeadCounts, Scaled};
use trireme::device::cuda::Cuda;
use trireme::device::{Activation, Device, Direction, Gemm};
use trireme::rng::Random;
use trireme::tensor::DType;

fn check_all(cases: Vec<Case>) {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    for case in cases {
        check(&cuda, &case, DType::F32);
        check(&cuda, &case, DType::BF16);
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// Head counts of every form: tensor cores (64, 128, 192), and FMA with dims that fill no warp.
const HEADS: [HeadCounts; 6] = [(1, 1, 8), (4, 2, 64), (6, 2, 128), (2, 1, 192), (3, 3, 40), (5, 1, 34)];

/// Every output of attention is within the bound of the f64 formula: a table that misses a row, a tile or a share, an argument in
/// the wrong place, or too little shared memory shows.
#[test]
fn attention_matches_the_oracle() {
    let mut list = Vec::new();
    for heads in HEADS {
        for starts in [vec![0, 0], vec![0, 1], vec![0, 3, 3, 10, 11, 45], vec![0, 17, 83]] {
            list.push(cases::attention(starts.clone(), heads));
            list.push(cases::attention_backward(starts, heads));
        }
        list.push(cases::attention_cached(&[(0, 0, 1)], heads));
        // Long pasts, so that keys are shared out between blocks.
        list.push(cases::attention_cached(&[(0, 280, 20), (0, 5, 1), (0, 0, 9), (2, 130, 2)], heads));
        list.push(cases::attention_cached(&[(0, 699, 1)], heads));
        list.push(cases::attention_cached(&[(0, 450, 1)], heads)); // as few blocks as processors
    }
    // More shares of keys than a warp has lanes.
    list.push(cases::attention_cached(&[(0, 16_900, 1)], (1, 1, 8)));
    check_all(list);
}

/// The same on a Hopper GPU, for the forms that have kernels there: tables, matrices of the copy engine and shared memory are right.
#[test]
fn attention_of_hopper_matches_the_oracle() {
    let Some(hopper) = hopper() else { return };
    let cuda = Cuda::with_backend(hopper);
    for heads in [(4, 2, 64), (6, 2, 128), (2, 1, 192)] {
        for starts in [vec![0, 0], vec![0, 1], vec![0, 3, 3, 10, 11, 45], vec![0, 17, 83, 400]] {
            check(&cuda, &cases::attention(starts.clone(), heads), DType::BF16);
            check(&cuda, &cases::attention_backward(starts, heads), DType::BF16);
        }
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// What a layer's backward asks of a Hopper GPU, with all dims rotated, half of them, none, and a share that the kernels do not know.
#[test]
fn attention_of_hopper_rotates_its_gradients() {
    let Some(hopper) = hopper() else { return };
    let cuda = Cuda::with_backend(hopper);
    for heads in [(4, 2, 64), (6, 2, 128), (2, 1, 192)] {
        for rotary_dims in [heads.2, heads.2 / 2, heads.2 / 4, 0] {
            fused::check_attention_rope_backward(&cuda, heads, rotary_dims, DType::BF16);
        }
    }
}

/// Row operations: sizes around vectors of 16 bytes, warps, blocks and the tiles of a reduction, and rows that end off a vector's
/// boundary; tokens and targets outside the shard; nothing at all.
#[test]
fn row_operations_match_the_oracle() {
    let mut list = Vec::new();
    for n in [0, 1, 5, 63, 4096, 20_001] {
        for kinds in [(Kind::Float, Kind::Float), (Kind::F32, Kind::Float), (Kind::Float, Kind::F32)] {
            list.push(cases::elementwise("copy", n, kinds));
            list.push(cases::elementwise("add", n, kinds));
        }
        list.push(cases::elementwise("scale", n, (Kind::Float, Kind::Float)));
        list.push(cases::elementwise("fill_zero", n, (Kind::Float, Kind::Float)));
        list.push(cases::adamw(n, 1, 0.1));
        list.push(cases::adamw(n, 1000, 0.0));
    }
    for shape in [(0, 8), (1, 1), (1, 768), (3, 17), (67, 100), (130, 385), (5, 5000)] {
        for layer in [true, false] {
            list.push(cases::norm(layer, shape));
            list.push(cases::add_norm(layer, shape));
            list.push(cases::norm_backward(layer, shape));
        }
        for kind in [Activation::SquaredRelu, Activation::Swiglu] {
            list.push(cases::activation(kind, shape));
            list.push(cases::activation_backward(kind, shape));
        }
    }
    // Rows of every form of the norms' kernels.
    for columns in [8, 4096, 8192 + 24, 12_289, 18_432] {
        list.push(cases::norm(true, (2, columns)));
        list.push(cases::add_norm(false, (2, columns)));
        list.push(cases::norm_backward(true, (19, columns)));
    }
    for (t, columns) in [(0, 64), (1, 1), (7, 33), (65, 1000), (4, 10_003)] {
        for (n_valid, first_row) in [(columns, 0), (columns - columns / 5, 7), (0, 3)] {
            let shape = Vocabulary { t, columns, n_valid, first_row };
            list.push(cases::cross_entropy_max(shape));
            list.push(cases::cross_entropy_sum(shape));
            list.push(cases::cross_entropy_forward(shape));
            list.push(cases::cross_entropy_gradient(shape));
        }
    }
    for (t, rows, h, first_row) in [(0, 9, 4, 0), (1, 1, 3, 0), (50, 9, 33, 4), (400, 30, 136, 0)] {
        let tokens: Vec<usize> = (0..t).map(|i| (i * i + 3 * i) % (rows + first_row + 2)).collect();
        list.push(cases::embed(tokens.clone(), (rows, h), first_row));
        list.push(cases::embed_backward(tokens, (rows, h), first_row));
    }
    // Runs of one token of every length around those that are read together, and one that is nearly all.
    for run in [3, 4, 5, 8, 9, 290] {
        let tokens: Vec<usize> = (0..300).map(|i| if i < run { 2 } else { [0, 1, 3, 4][i % 4] }).rev().collect();
        list.push(cases::embed_backward(tokens, (5, 40), 1));
    }
    for (t, columns, width) in [(0, 8, 8), (1, 1, 1), (5, 24, 8), (3, 576, 192), (7, 50, 16), (33, 1000, 400), (2, 40, 16)] {
        list.push(cases::join_columns(t, columns, width));
    }
    for heads in HEADS {
        for (t, rotary_dims) in [(0, heads.2), (1, heads.2), (70, heads.2), (33, heads.2 / 2 / 2 * 2), (3, 0)] {
            for scaled in [Scaled::Plain, Scaled::Linear, Scaled::Llama3, Scaled::Yarn] {
                list.push(cases::rope(t, heads, (rotary_dims, scaled), Direction::Forward));
                list.push(cases::rope(t, heads, (rotary_dims, scaled), Direction::Backward));
            }
        }
    }
    check_all(list);
}

/// NaN goes through squared ReLU, forward and backward: a maximum that prefers numbers would hide a diverged run.
#[test]
fn squared_relu_keeps_nan() {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    let tensor = |values: &[f32]| {
        let mut x = cuda.alloc(&[values.len()], DType::F32).unwrap();
        cuda.upload(bytemuck::cast_slice(values), &mut x);
        x
    };
    let (x, dout) = (tensor(&[f32::NAN, -1.0, 3.0]), tensor(&[1.0, 1.0, 2.0]));
    let (mut out, mut dx) = (tensor(&[0.0; 3]), tensor(&[0.0; 3]));
    cuda.activation(&mut out, &x, Activation::SquaredRelu);
    cuda.activation_backward(&mut dx, &dout, &x, Activation::SquaredRelu);
    for (result, rest) in [(&out, [0.0, 9.0]), (&dx, [0.0, 12.0])] {
        let bytes = result.host_bytes();
        let values = bytemuck::cast_slice::<u8, f32>(&bytes);
        assert!(values[0].is_nan() && values[1..] == rest, "{values:?}");
    }
}

/// Products reach the backend with the right rows, columns and storage, and sizes of 0 are answered without it.
#[test]
fn matrix_products_match_the_oracle() {
    let tt = Gemm { trans_a: true, ..Gemm::NT };
    let mut list = check::few_row_gemm_cases();
    for shape in [(1, 1, 1), (3, 5, 7), (1, 37, 129), (61, 47, 101), (0, 4, 3), (4, 0, 3), (4, 3, 0)] {
        for how in [Gemm::NN, Gemm::NT, Gemm::TN, tt] {
            for how in [how, how.accumulate()] {
                list.push(cases::gemm(how, shape, Kind::Float));
                list.push(cases::gemm(how, shape, Kind::F32));
            }
        }
    }
    check_all(list);
}

/// Norms within products of few rows, which there are in bf16.
#[test]
fn norms_within_products_match_the_oracle() {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    check::normed_gemm_cases().iter().for_each(|case| check(&cuda, case, DType::BF16));
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// E4M3 on a Hopper GPU: kernels, scales at their operands, and sizes of 0.
#[test]
fn fp8_matches_the_oracle() {
    let Some(hopper) = hopper() else { return };
    let cuda = Cuda::with_backend(hopper);
    for case in check::fp8_cases() {
        check(&cuda, &case, DType::F32);
        check(&cuda, &case, DType::BF16);
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// The sum of squares is the f64 one within the rounding of its additions (see tests/operations.rs), and no sum depends on how the
/// blocks of a launch happen to run: the same bits come twice.
#[test]
fn sums_are_exact_enough_and_fixed() {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    let stream = Random::new(3, "sum of squares");
    for n in [0, 1, 4095, 4097, 30_007] {
        let values: Vec<f32> = (0..n).map(|i| stream.normal(i as u64) as f32).collect();
        let mut x = cuda.alloc(&[n], DType::F32).unwrap();
        cuda.upload(bytemuck::cast_slice(&values), &mut x);
        let exact: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let (sum, again) = (cuda.sum_squares(&x), cuda.sum_squares(&x));
        assert!((sum - exact).abs() <= 2.0 * n as f64 * f64::EPSILON / 2.0 * exact, "{n}: {sum} is not {exact}");
        assert_eq!(sum.to_bits(), again.to_bits());
    }
}

/// Memory is zeroed and counted while tensors and their views live, and its end is an error that names both sizes.
#[test]
fn memory_is_zeroed_and_counted() {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    let x = cuda.alloc(&[100, 10], DType::F32).unwrap();
    let y = cuda.alloc(&[100, 10], DType::BF16).unwrap();
    assert!(x.host_bytes().iter().all(|byte| *byte == 0));
    assert_eq!((cuda.memory().live_bytes, cuda.memory().n_allocations), (6000, 2));
    drop(x);
    assert_eq!((cuda.memory().live_bytes, cuda.memory().peak_bytes), (2000, 6000));
    let error = cuda.alloc(&[1 << 30, 1 << 28], DType::F32).expect_err("an exabyte").to_string();
    assert!(error.contains(&(1u64 << 60).to_string()) && error.contains("2000"), "{error}");
    drop(y);
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// A view of rows is read and written where it lies, from the host as by kernels: an offset that is forgotten would show.
#[test]
fn views_of_rows_are_offsets() {
    let Some(emulator) = emulator() else { return };
    let cuda = Cuda::with_backend(emulator);
    let mut x = cuda.alloc(&[4, 3], DType::F32).unwrap();
    cuda.upload(bytemuck::cast_slice(&[1.0f32; 3]), &mut x.rows_mut(2..3));
    x.rows_mut(1..4).write_bytes(24, bytemuck::cast_slice(&[2.0f32]));
    let mut out = cuda.alloc(&[2, 3], DType::F32).unwrap();
    cuda.copy(&mut out, &x.rows(2..4));
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&out.host_bytes()), [1.0, 1.0, 1.0, 2.0, 0.0, 0.0]);
    cuda.fill_zero(&mut x.rows_mut(3..4));
    assert_eq!(bytemuck::cast_slice::<u8, f32>(&x.host_bytes())[6..], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
}
