//! Every device operation over the table of `operations/cases.rs`, against the naive f64 formulas of `operations/oracle.rs`.

#[allow(dead_code)] // the bench reads more of it
#[path = "operations/cases.rs"]
mod cases;
#[path = "operations/check.rs"]
mod check;
#[path = "operations/oracle.rs"]
mod oracle;
#[path = "operations/paged.rs"]
mod paged;

use cases::{Case, Kind, Vocabulary};
use check::{check, fresh};
use oracle::Scaled;
use trireme::device::cpu::{Cpu, Isa};
use trireme::device::{Activation, Device, Direction, Gemm};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// The device with every set of instructions that this processor has: the fallbacks are as right as the fast paths.
fn devices() -> Vec<Cpu> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
    all.into_iter().filter(|isa| *isa <= Isa::detect()).map(Cpu::with_isa).collect()
}

fn check_all(case: &Case) {
    for device in devices() {
        check(&device, case, DType::F32);
        check(&device, case, DType::BF16);
    }
}

/// The value of every element is the formula's, within the rounding it is entitled to; assigned outputs start as NaN, so an element
/// that is not written fails, and inputs must come back unchanged.
#[test]
fn matrix_products_match_the_oracle() {
    for case in check::gemm_cases().into_iter().chain(check::normed_gemm_cases()) {
        check_all(&case);
    }
}

/// As above, for products in canonical order.
#[test]
fn products_in_canonical_order_match_the_oracle() {
    for case in check::canonical_gemm_cases() {
        check_all(&case);
    }
}

/// As above, for everything that works on rows.
#[test]
fn row_operations_match_the_oracle() {
    for case in check::row_cases() {
        check_all(&case);
    }
}

/// As above, for E4M3: every element is the nearest number, every scale the smallest power of two that
/// it fits, every product that of the numbers.
#[test]
fn fp8_matches_the_oracle() {
    for case in check::fp8_cases() {
        check_all(&case);
    }
}

/// As above, for attention: tiles, diagonals and sequence ends are where it would break.
#[test]
fn attention_matches_the_oracle() {
    for case in check::attention_cases() {
        check_all(&case);
    }
}

/// Outputs as bytes after a run in a pool of so many threads.
fn outputs_with_threads(case: &Case, dtype: DType, n_threads: usize) -> Vec<Vec<u8>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool");
    let mut tensors = fresh(case, dtype);
    let cpu = Cpu::new();
    pool.install(|| cpu.run_together(&mut || (case.run)(&cpu, &mut tensors)));
    let mut alone = fresh(case, dtype);
    pool.install(|| (case.run)(&cpu, &mut alone));
    assert!(
        tensors.iter().zip(&alone).all(|(x, y)| x.bytes() == y.bytes()),
        "{} {}: another result in small tasks",
        case.operation,
        case.shape
    );
    tensors.iter().map(|tensor| tensor.bytes().to_vec()).collect()
}

/// Row operations, attention and, with AVX-512, products give the same bits on 1, 2, 3 and 7 threads: their sums are cut at fixed
/// places, never where a thread's share ends. (Other products are promised only for equal thread counts, and checked for that.)
#[test]
fn results_do_not_depend_on_threads() {
    let heads = (4, 2, 64);
    let wide = Vocabulary { t: 9, columns: 20_011, n_valid: 20_000, first_row: 0 };
    let tokens = || (0..3000).map(|i| i * i % 17).collect::<Vec<usize>>();
    let mut cases = vec![
        cases::norm(true, (301, 385)),
        cases::add_norm(false, (301, 385)),
        cases::norm_backward(true, (301, 385)),
        cases::norm_backward(false, (1000, 129)),
        cases::embed(tokens(), (13, 257), 2),
        cases::embed_backward(tokens(), (13, 257), 2),
        cases::rope(301, heads, (32, Scaled::Yarn), Direction::Forward),
        cases::attention(vec![0, 100, 401], heads),
        cases::attention_backward(vec![0, 100, 401], heads),
        cases::attention_cached(&[(0, 250, 90), (0, 17, 1), (3, 211, 33), (0, 0, 33)], heads),
        cases::activation(Activation::Swiglu, (301, 385)),
        cases::cross_entropy_sum(wide),
        cases::cross_entropy_forward(wide),
        cases::cross_entropy_gradient(wide),
        cases::adamw(300_001, 3, 0.1),
    ];
    for case in &cases {
        for dtype in [DType::F32, DType::BF16] {
            let one = outputs_with_threads(case, dtype, 1);
            for n in [2, 3, 7] {
                assert!(outputs_with_threads(case, dtype, n) == one, "{} {} {dtype:?}: {n} threads", case.operation, case.shape);
            }
        }
    }
    cases = [Gemm::NN, Gemm::NT, Gemm::TN.accumulate()].map(|how| cases::gemm(how, (301, 1100, 777), Kind::F32)).into();
    cases.push(cases::gemm(Gemm::NT, (61, 47, 3333), Kind::F32)); // more than one slab of k
    for case in &cases {
        for (dtype, least) in [(DType::F32, Isa::Avx512), (DType::BF16, Isa::Avx512Bf16)] {
            let (one, fixed) = (outputs_with_threads(case, dtype, 1), Isa::detect() >= least);
            for n in [2, 3, 7] {
                let some = outputs_with_threads(case, dtype, n);
                let expected = if fixed { &one } else { &outputs_with_threads(case, dtype, n) };
                assert!(some == *expected, "gemm {} {dtype:?}: {n} threads", case.shape);
            }
        }
    }
}

/// The sum of squares equals the f64 one within the rounding of n additions, and is the same bits on any number of threads.
#[test]
fn sum_of_squares_is_exact_enough_and_fixed() {
    let stream = Random::new(3, "sum of squares");
    for n in [0, 1, 4095, 4097, 300_007] {
        let values: Vec<f32> = (0..n).map(|i| stream.normal(i as u64) as f32).collect();
        let x = Tensor::from_f32(&[n], &values);
        let exact: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let sums: Vec<f64> = [1, 2, 3, 7]
            .map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(|| Cpu::new().sum_squares(&x)))
            .into();
        // Squares of f32 are exact in f64, so only the n additions round, each within 2^-53 of a partial sum; twice, for `exact`.
        assert!((sums[0] - exact).abs() <= 2.0 * n as f64 * f64::EPSILON / 2.0 * exact, "{n}: {} is not {exact}", sums[0]);
        assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()), "{n}: {sums:?}");
    }
}

/// The value of a case's scalar loss sum(weights * output) in f64.
fn loss(forward: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], weights: &[f64]) -> f64 {
    forward(x).iter().zip(weights).map(|(y, w)| y * w).sum()
}

/// Checks an analytic gradient against central differences of a forward function. The step h makes a truncation error of about h^2
/// times the third derivative and a rounding error of eps |loss| / h; with h = 1e-4, values of order 10 and third derivatives of
/// order 100, that is 1e-6 and 1e-11, so 1e-5 of the largest gradient is allowed.
fn check_gradient(what: &str, forward: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], dout: &[f64], gradient: &[f64]) {
    let largest = gradient.iter().fold(1.0f64, |a, g| a.max(g.abs()));
    let h = 1e-4;
    for i in 0..x.len() {
        let (mut up, mut down) = (x.to_vec(), x.to_vec());
        up[i] += h;
        down[i] -= h;
        let difference = (loss(forward, &up, dout) - loss(forward, &down, dout)) / (2.0 * h);
        assert!((difference - gradient[i]).abs() <= 1e-5 * largest, "{what}, element {i}: {} is not {difference}", gradient[i]);
    }
}

fn normals(purpose: &str, n: usize) -> Vec<f64> {
    let stream = Random::new(77, purpose);
    (0..n).map(|i| f64::from(stream.normal(i as u64) as f32)).collect()
}

fn values(near: &[oracle::Near]) -> Vec<f64> {
    near.iter().map(|near| near.value).collect()
}

/// The oracle's backward formulas, which the device is held to above, are the derivatives of its forward formulas: both being wrong
/// in the same way would show here.
#[test]
fn oracle_gradients_equal_central_differences() {
    let (t, n) = (3, 7);
    let (x, gain, bias, dy) = (normals("x", t * n), normals("gain", n), normals("bias", n), normals("dy", t * n));
    for layer in [true, false] {
        let forward = |x: &[f64], gain: &[f64], bias: &[f64]| values(&oracle::norm(x, gain, Some(bias), layer, 1e-5).0);
        let stats = values(&oracle::norm(&x, &gain, None, layer, 1e-5).1);
        let zeros = (vec![0.0; t * n], vec![0.0; n], vec![0.0; n]);
        let g = oracle::norm_backward((&zeros.0, &zeros.1, &zeros.2), &dy, &x, &gain, &stats, layer);
        check_gradient("norm dx", &|x| forward(x, &gain, &bias), &x, &dy, &values(&g.dx));
        check_gradient("norm dgain", &|gain| forward(&x, gain, &bias), &gain, &dy, &values(&g.dgain));
        check_gradient("norm dbias", &|bias| forward(&x, &gain, bias), &bias, &dy, &values(&g.dbias));
    }
    for gated in [true, false] {
        let n_out = if gated { 20 } else { 40 };
        // Away from the kink of the ReLU's second derivative by more than h.
        let x: Vec<f64> = normals("activation", 40).iter().map(|v| if v.abs() < 0.01 { 0.01 } else { *v }).collect();
        let dout = normals("dout", n_out);
        let gradient = values(&oracle::activation_backward(&dout, &x, gated));
        check_gradient("activation", &|x| values(&oracle::activation(x, gated)), &x, &dout, &gradient);
    }
    for heads in [(4, 2, 6), (2, 2, 4), (3, 1, 5)] {
        let columns = (heads.0 + 2 * heads.1) * heads.2;
        let starts = [0, 4, 4, 9];
        let (qkv, dout) = (normals("qkv", 9 * columns), normals("dout", 9 * heads.0 * heads.2));
        let (out, lse) = oracle::attention(&qkv, &starts, heads, 0.0);
        let inputs = oracle::AttentionGradient { dout: &dout, out: &values(&out), lse: &values(&lse), qkv: &qkv };
        let gradient = values(&oracle::attention_backward(&inputs, &starts, heads, 0.0));
        check_gradient("attention", &|qkv| values(&oracle::attention(qkv, &starts, heads, 0.0).0), &qkv, &dout, &gradient);
        let positions: Vec<f64> = (0..9).map(f64::from).collect();
        let drotated = normals("drotated", qkv.len());
        for scaled in [Scaled::Plain, Scaled::Yarn] {
            let rotary = ((heads.2 / 2 * 2, 10000.0), scaled);
            let gradient = values(&oracle::rope(&drotated, &positions, heads, rotary, -1.0));
            check_gradient("rope", &|qkv| values(&oracle::rope(qkv, &positions, heads, rotary, 1.0)), &qkv, &drotated, &gradient);
        }
    }
    let (logits, target, weight) = (normals("logits", 11), 4, 0.7);
    let forward = |x: &[f64]| vec![weight * (x.iter().map(|v| v.exp()).sum::<f64>().ln() - x[target])];
    let sum: f64 = logits.iter().map(|v| v.exp()).sum();
    let shape = Vocabulary { t: 1, columns: 11, n_valid: 11, first_row: 0 };
    let inputs = [logits.clone(), vec![0.0], vec![sum], vec![target as f64], vec![weight]];
    let gradient = values(&(cases::cross_entropy_gradient(shape).oracle)(&inputs, &|v| v)[0]);
    check_gradient("cross entropy", &forward, &logits, &[1.0], &gradient);
}

/// Bytes are counted while tensors live and not after, the peak stays, and more than there is is an error that names both sizes.
#[test]
fn memory_is_counted_and_its_end_is_an_error() {
    let cpu = Cpu::new();
    let x = cpu.alloc(&[100, 10], DType::F32).expect("memory");
    let y = cpu.alloc(&[100, 10], DType::BF16).expect("memory");
    assert_eq!((cpu.memory().live_bytes, cpu.memory().n_allocations), (6000, 2));
    drop(x);
    assert_eq!((cpu.memory().live_bytes, cpu.memory().peak_bytes), (2000, 6000));
    let error = cpu.alloc(&[1 << 30, 1 << 28], DType::F32).expect_err("an exabyte").to_string();
    assert!(error.contains(&(1u64 << 60).to_string()) && error.contains("2000"), "{error}");
    drop(y);
    assert_eq!(cpu.memory().live_bytes, 0);
}
