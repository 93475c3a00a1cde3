//! The table's entries for E4M3: rounding with a scale, and products of what is rounded.

use super::{Case, Init, Kind, Role, arg, assigned, exact, input};
use crate::oracle::{self, Near, U, near};
use trireme::device::Fp8Scales;

fn n_scales(scales: Fp8Scales, rows: usize) -> usize {
    if scales == Fp8Scales::Rows { rows } else { 1 }
}

/// Each element as the nearest E4M3 of the quotient that f32 division gives, exactly; each scale as f32 division gives it.
pub fn quantise((rows, columns): (usize, usize), scales: Fp8Scales) -> Case {
    let n = n_scales(scales, rows);
    Case {
        operation: "quantise",
        shape: format!("[{rows}, {columns}] {scales:?}"),
        args: vec![assigned(&[rows, columns], Kind::E4M3), assigned(&[n], Kind::F32), input(&[rows, columns], 3.0)],
        run: Box::new(|device, tensors| {
            let [out, scale, x] = tensors else { unreachable!() };
            device.quantise(out, scale, x);
        }),
        oracle: Box::new(move |v, _| {
            let n_each = rows * columns / n.max(1);
            let part = |i: usize| &v[2][i * n_each..(i + 1) * n_each];
            let most = |i: usize| part(i).iter().fold(0f64, |most, x| most.max(x.abs()));
            let scale: Vec<f64> = (0..n).map(|i| if most(i) > 0.0 { f64::from((most(i) / 448.0) as f32) } else { 1.0 }).collect();
            let rounded = |(at, x): (usize, &f64)| oracle::e4m3(oracle::nearest_e4m3(f64::from((x / scale[at / n_each]) as f32)));
            vec![exact(&v[2].iter().enumerate().map(rounded).collect::<Vec<f64>>()), exact(&scale)]
        }),
        flops: 0.0,
    }
}

/// out[m, n] = a[m, k] b[n, k]^T times their scales: the sum within the bound of every product, two more roundings for the scales.
pub fn gemm((m, n, k): (usize, usize, usize), scales: Fp8Scales, out: Kind) -> Case {
    let scale_arg = |n: usize| arg(&[n], Kind::F32, Role::Input, Init::Random(0.01));
    let codes = |rows: usize| arg(&[rows, k], Kind::E4M3, Role::Input, Init::Random(40.0));
    let (of_a, of_b) = (n_scales(scales, m), n_scales(scales, n));
    Case {
        operation: "gemm_fp8",
        shape: format!("[{m}, {n}, {k}] {scales:?} out {out:?}"),
        args: vec![assigned(&[m, n], out), codes(m), scale_arg(of_a), codes(n), scale_arg(of_b)],
        run: Box::new(|device, tensors| {
            let [out, a, a_scale, b, b_scale] = tensors else { unreachable!() };
            device.gemm_fp8(out, (a, a_scale), (b, b_scale));
        }),
        oracle: Box::new(move |v, _| {
            let sums = oracle::gemm(&v[1], &v[3], None, (m, n, k), (false, true));
            let at = |scales: &[f64], i: usize| if scales.len() == 1 { scales[0] } else { scales[i] };
            let scaled = |(i, sum): (usize, &Near)| {
                let by = at(&v[2], i / n) * at(&v[4], i % n);
                near(sum.value * by, (sum.bound + 2.0 * U * sum.value.abs()) * by.abs())
            };
            vec![sums.iter().enumerate().map(scaled).collect()]
        }),
        flops: 2.0 * m as f64 * n as f64 * k as f64,
    }
}
