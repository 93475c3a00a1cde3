//! The cases that every device is held to, and how: each output against the oracle, each input against itself.

use crate::cases::{self, Case, Kind, Role, Vocabulary, widened};
use crate::oracle::{HeadCounts, Near, Scaled, U};
use trireme::device::{Activation, Device, Direction, Fp8Axis, Fp8Scales, Gemm};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Unit roundoff of bf16 (8 significant bits).
pub const U_BF16: f64 = 1.0 / 256.0;

/// Products of few rows in whole vectors, which have a kernel of their own on GPUs: less than it takes at a time, just as much, and more.
pub fn few_row_gemm_cases() -> Vec<Case> {
    let shapes = [(1, 37, 128), (2, 300, 1032), (3, 9, 8), (1, 5, 2048), (4, 21, 2056), (1, 64, 4104), (2, 11, 8200), (1, 3, 18_432)];
    let kinds = [Activation::SquaredRelu, Activation::Swiglu];
    let activated = shapes
        .into_iter()
        .chain([(0, 4, 8), (5, 6, 8), (2, 3, 17)])
        .flat_map(|shape| kinds.map(|kind| cases::gemm_activation(kind, shape)));
    shapes.into_iter().flat_map(|shape| [Kind::Float, Kind::F32].map(|out| cases::gemm(Gemm::NT, shape, out))).chain(activated).collect()
}

/// Norms within such products, which GPUs have in bf16: one block; rows of one warp of a norm, of less than a block, of all it has, and
/// of two and three turns of them.
pub fn normed_gemm_cases() -> Vec<Case> {
    let shapes = [(2, 2, 64), (1, 37, 32), (2, 20, 1032), (1, 11, 2048), (3, 6, 4096), (4, 9, 4104), (1, 6, 8200)];
    let kinds = [None, Some(Activation::SquaredRelu), Some(Activation::Swiglu)];
    let of = |shape| kinds.into_iter().flat_map(move |kind| [true, false].map(|layer| cases::add_norm_gemm(layer, kind, shape)));
    shapes.into_iter().flat_map(of).collect()
}

pub fn gemm_cases() -> Vec<Case> {
    let tt = Gemm { trans_a: true, ..Gemm::NT };
    let shapes = [
        (1, 1, 1),
        (1, 37, 129),
        (1, 300, 1030),
        (3, 5, 7),
        (5, 129, 64),
        (8, 65, 250),
        (9, 33, 31),
        (17, 33, 65),
        (64, 96, 128),
        (61, 47, 1001),
        (97, 131, 259),
        (130, 260, 389),
        (257, 70, 513),
        (33, 40, 3300),
        (70, 600, 40),
        (0, 4, 3),
        (4, 0, 3),
        (4, 3, 0),
    ];
    let mut cases = few_row_gemm_cases();
    for kind in [Activation::SquaredRelu, Activation::Swiglu] {
        for shape in [(0, 4, 3), (1, 8, 16), (5, 7, 3), (33, 40, 264), (130, 256, 72)] {
            cases.push(cases::activated::gemm_and_activation(kind, shape));
            cases.push(cases::activated::gemm_activation_backward(kind, shape));
        }
    }
    for shape in shapes {
        for how in [Gemm::NN, Gemm::NT, Gemm::TN, tt] {
            for how in [how, how.accumulate()] {
                cases.push(cases::gemm(how, shape, Kind::Float));
                cases.push(cases::gemm(how, shape, Kind::F32));
            }
        }
    }
    cases
}

/// Products in canonical order, of sizes for every form of the kernels: out is few rows, few tiles, many tiles; pieces that vectors cut.
pub fn canonical_gemm_cases() -> Vec<Case> {
    let shapes = [(1, 1, 1), (5, 7, 3), (16, 66, 264), (2, 300, 129), (61, 47, 101), (40, 72, 136), (130, 260, 72), (129, 250, 45)];
    let mut cases = Vec::new();
    for shape in shapes.into_iter().chain([(0, 4, 3), (4, 0, 3), (4, 3, 0)]) {
        for (how, n_pieces) in [(Gemm::NT, 1), (Gemm::NN, 1), (Gemm::NT, 8), (Gemm::NN, 4), (Gemm::TN, 2)] {
            cases.push(cases::gemm_in_pairs(how, shape, Kind::Float, n_pieces));
            cases.push(cases::gemm_in_pairs(how, shape, Kind::F32, n_pieces));
        }
        cases.push(cases::gemm_in_turn(Gemm::TN, shape, 3));
        cases.push(cases::gemm_in_turn(Gemm::TN.accumulate(), shape, 4));
        cases.push(cases::gemm_in_turn(Gemm::TN.accumulate(), shape, 1));
    }
    cases
}

/// (query heads, kv heads, head dim).
pub const HEADS: [HeadCounts; 6] = [(1, 1, 8), (4, 2, 64), (6, 2, 128), (2, 1, 192), (3, 3, 40), (5, 1, 34)];

pub fn row_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in [0, 1, 5, 63, 4096, 70_001] {
        for kinds in [(Kind::Float, Kind::Float), (Kind::F32, Kind::Float), (Kind::Float, Kind::F32)] {
            cases.push(cases::elementwise("copy", n, kinds));
            cases.push(cases::elementwise("add", n, kinds));
        }
        cases.push(cases::elementwise("scale", n, (Kind::Float, Kind::Float)));
        cases.push(cases::elementwise("fill_zero", n, (Kind::Float, Kind::Float)));
        cases.push(cases::adamw(n, 1, 0.1));
        cases.push(cases::adamw(n, 1000, 0.0));
    }
    for shape in [(0, 8), (1, 1), (1, 768), (3, 17), (67, 100), (130, 385), (5, 5000)] {
        for layer in [true, false] {
            cases.push(cases::norm(layer, shape));
            cases.push(cases::add_norm(layer, shape));
            cases.push(cases::norm_backward(layer, shape));
        }
        for kind in [Activation::SquaredRelu, Activation::Swiglu] {
            cases.push(cases::activation(kind, shape));
            cases.push(cases::activation_backward(kind, shape));
        }
    }
    for (t, columns) in [(0, 64), (1, 1), (7, 33), (65, 1000), (4, 40_003)] {
        for (n_valid, first_row) in [(columns, 0), (columns - columns / 5, 7), (0, 3)] {
            let shape = Vocabulary { t, columns, n_valid, first_row };
            cases.push(cases::cross_entropy_max(shape));
            cases.push(cases::cross_entropy_sum(shape));
            cases.push(cases::cross_entropy_forward(shape));
            cases.push(cases::cross_entropy_gradient(shape));
        }
    }
    for (t, rows, h, first_row) in [(0, 9, 4, 0), (1, 1, 3, 0), (50, 9, 33, 4), (400, 30, 129, 0)] {
        let tokens: Vec<usize> = (0..t).map(|i| (i * i + 3 * i) % (rows + first_row + 2)).collect();
        cases.push(cases::embed(tokens.clone(), (rows, h), first_row));
        cases.push(cases::embed_backward(tokens, (rows, h), first_row));
    }
    for (t, columns, width) in [(0, 8, 8), (1, 1, 1), (5, 24, 8), (3, 576, 192), (7, 50, 16), (33, 1000, 400), (2, 40, 16)] {
        cases.push(cases::join_columns(t, columns, width));
    }
    for heads in HEADS {
        for (t, rotary_dims) in [(0, heads.2), (1, heads.2), (70, heads.2), (33, heads.2 / 2 / 2 * 2), (3, 0)] {
            for scaled in [Scaled::Plain, Scaled::Linear, Scaled::Llama3, Scaled::Yarn] {
                cases.push(cases::rope(t, heads, (rotary_dims, scaled), Direction::Forward));
                cases.push(cases::rope(t, heads, (rotary_dims, scaled), Direction::Backward));
            }
        }
    }
    cases
}

/// Rows around vectors of 16 bytes and more than a block; sizes of nothing; products of one step of tensor cores and of several.
pub fn fp8_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for axis in [Fp8Axis::All, Fp8Axis::Rows, Fp8Axis::Columns, Fp8Axis::Transposed] {
        for shape in [(0, 16), (3, 0), (1, 1), (3, 17), (67, 100), (64, 128), (2, 5000), (600, 3), (1000, 72)] {
            cases.push(cases::fp8::quantise(shape, axis, 3.0));
        }
        // The smallest scale there is, and large ones.
        cases.push(cases::fp8::quantise((5, 24), axis, 1e-35));
        cases.push(cases::fp8::quantise((5, 24), axis, 1e30));
    }
    for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
        for shape in [(0, 16), (3, 0), (1, 1), (3, 17), (67, 104)] {
            cases.push(cases::fp8::widen(shape, scales));
        }
        for shape in [(0, 16, 16), (1, 16, 16), (5, 48, 32), (33, 64, 160), (17, 16, 1040)] {
            cases.push(cases::fp8::gemm(shape, scales, Kind::Float));
            cases.push(cases::fp8::gemm(shape, scales, Kind::F32));
        }
    }
    cases
}

pub fn attention_cases() -> Vec<Case> {
    HEADS.into_iter().flat_map(attention_cases_of).collect()
}

pub fn attention_cases_of(heads: HeadCounts) -> Vec<Case> {
    let mut cases = Vec::new();
    for starts in [vec![0, 1], vec![0, 3, 3, 10, 11, 45], vec![0, 131], vec![0, 64, 128, 193], vec![0, 17, 290]] {
        cases.push(cases::attention(starts.clone(), heads));
        cases.push(cases::attention_backward(starts, heads));
    }
    cases.push(cases::attention(vec![0, 0], heads));
    cases.push(cases::attention_backward(vec![0, 0], heads));
    cases.push(cases::attention_cached(&[(0, 0, 1)], heads));
    cases.push(cases::attention_cached(&[(0, 299, 1), (0, 5, 1), (0, 0, 9), (3, 200, 70), (0, 7, 0), (4, 256, 5)], heads));
    // One long sequence, and more of them than a GPU has processors.
    cases.push(cases::attention_cached(&[(0, 450, 1)], heads));
    let decode: Vec<_> = (0..140).map(|i| (0, i, 1)).collect();
    cases.push(cases::attention_cached(&decode, heads));
    cases
}

pub fn fresh(case: &Case, dtype: DType) -> Vec<Tensor> {
    let stream = Random::new(20, &format!("{} {}", case.operation, case.shape));
    case.tensors(dtype, &|which, index| stream.normal(which << 40 | index))
}

/// Runs a case on a device and compares each output with the oracle and each input with itself. Panics with what is off.
pub fn check(device: &dyn Device, case: &Case, dtype: DType) {
    worst(device, case, dtype).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// The same; the largest difference as a share of what is allowed, or in one line what is off: how many elements, the worst and the first.
pub fn worst(device: &dyn Device, case: &Case, dtype: DType) -> Result<f64, String> {
    let round = move |v: f64| match dtype {
        DType::BF16 => f64::from(half::bf16::from_f32(v as f32).to_f32()),
        _ => f64::from(v as f32),
    };
    let start = fresh(case, dtype);
    let before: Vec<Vec<f64>> = start.iter().map(widened).collect();
    let expected = (case.oracle)(&before, &round);
    let mut tensors: Vec<Tensor> = start.iter().map(|x| on_device(device, x)).collect();
    (case.run)(device, &mut tensors);
    let tensors: Vec<Tensor> = tensors.iter().map(|x| on_host(device, x)).collect();
    let mut expected = expected.iter();
    let mut largest = 0.0f64;
    for (at, arg) in case.args.iter().enumerate() {
        let label = format!("{} {} {dtype:?} on {}, argument {at}", case.operation, case.shape, device.name());
        let now = widened(&tensors[at]);
        if arg.role == Role::Room {
            continue;
        }
        if arg.role == Role::Input {
            if now != before[at] {
                return Err(format!("{label}: an input was changed"));
            }
            continue;
        }
        let want = expected.next().expect("one expectation for each output");
        assert_eq!(want.len(), now.len(), "{label}");
        let unit = if tensors[at].dtype() == DType::BF16 { U_BF16 } else { U };
        let mut off: Vec<(usize, f64)> = Vec::new();
        for (i, (now, want)) in now.iter().zip(want).enumerate() {
            let allowed = allowed(want, unit, &round);
            let equal = *now == want.value || (now - want.value).abs() <= allowed;
            let share = if *now == want.value { 0.0 } else { (now - want.value).abs() / allowed };
            if equal {
                largest = largest.max(share);
            } else {
                off.push((i, if share.is_nan() { f64::INFINITY } else { share }));
            }
        }
        let Some(first) = off.first() else { continue };
        let most = off.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("one at least");
        let told =
            |i: usize| format!("element {i} is {} and not within {:e} of {}", now[i], allowed(&want[i], unit, &round), want[i].value);
        return Err(format!("{label}: {} of {} are off; worst {}; first {}", off.len(), now.len(), told(most.0), told(first.0)));
    }
    assert!(expected.next().is_none());
    Ok(largest)
}

/// Exact outputs (a copy, a maximum, a gathered row) get no allowance but the rounding of a narrower store.
fn allowed(want: &Near, unit: f64, round: &dyn Fn(f64) -> f64) -> f64 {
    let exact = want.bound == 0.0 && want.value == round(want.value);
    if exact { 0.0 } else { want.bound + unit * (want.value.abs() + want.bound) }
}

/// The same elements in memory of the device.
fn on_device(device: &dyn Device, x: &Tensor) -> Tensor {
    let mut copy = device.alloc(x.dims(), x.dtype()).expect("memory");
    device.upload(x.bytes(), &mut copy);
    copy
}

/// The same elements in host memory.
fn on_host(device: &dyn Device, x: &Tensor) -> Tensor {
    let mut copy = Tensor::host(x.dims(), x.dtype(), None).expect("memory");
    device.download(x, copy.bytes_mut());
    copy
}
