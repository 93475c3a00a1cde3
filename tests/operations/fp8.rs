//! The table's entries for E4M3: rounding with a scale, and products of what is rounded.

use super::{Arg, Case, Init, Kind, Role, arg, assigned, exact, input};
use crate::oracle::{self, Near, U, near};
use trireme::device::{Fp8Axis, Fp8Scales};

/// The smallest power of two, from 2^-117 on, that makes the size at most 448; 1 for 0.
pub fn scale_of(size: f64) -> f64 {
    if size == 0.0 { 1.0 } else { (-117..=128).map(|k| 2f64.powi(k)).find(|scale| size / scale <= 448.0).expect("a size of f32") }
}

/// Each element as the nearest E4M3 of its quotient, which is exact; each scale by the definition; columns become rows.
pub fn quantise((rows, columns): (usize, usize), axis: Fp8Axis, deviation: f64) -> Case {
    let n = axis.n_scales((rows, columns));
    let is_turned = matches!(axis, Fp8Axis::Columns | Fp8Axis::Transposed);
    let dims = if is_turned { [columns, rows] } else { [rows, columns] };
    Case {
        operation: "quantise",
        shape: format!("[{rows}, {columns}] {axis:?} {deviation:e}"),
        args: vec![assigned(&dims, Kind::E4M3), assigned(&[n], Kind::F32), input(&[rows, columns], deviation)],
        run: Box::new(move |device, tensors| {
            let [out, scale, x] = tensors else { unreachable!() };
            device.quantise(out, scale, x, axis);
        }),
        oracle: Box::new(move |v, _| {
            let scale_at = |row: usize, column: usize| match axis {
                Fp8Axis::All | Fp8Axis::Transposed => 0,
                Fp8Axis::Rows => row,
                Fp8Axis::Columns => column,
            };
            let mut sizes = vec![0f64; n];
            (0..rows * columns).for_each(|at| {
                let size = &mut sizes[scale_at(at / columns, at % columns)];
                *size = size.max(v[2][at].abs());
            });
            let scale: Vec<f64> = sizes.iter().map(|size| scale_of(*size)).collect();
            let rounded = |at: usize| {
                let (i, j) = (at / dims[1], at % dims[1]);
                let (row, column) = if is_turned { (j, i) } else { (i, j) };
                oracle::e4m3(oracle::nearest_e4m3(v[2][row * columns + column] / scale[scale_at(row, column)]))
            };
            vec![exact(&(0..rows * columns).map(rounded).collect::<Vec<f64>>()), exact(&scale)]
        }),
        flops: 0.0,
    }
}

fn n_scales(scales: Fp8Scales, rows: usize) -> usize {
    if scales == Fp8Scales::Rows { rows } else { 1 }
}

/// Powers of two of many sizes.
fn scale_arg(n: usize) -> Arg {
    arg(&[n], Kind::F32, Role::Input, Init::Given((0..n).map(|i| 2f64.powi((7 * i % 23) as i32 - 16)).collect()))
}

/// The numbers behind codes, exactly: in bf16 too.
pub fn widen((rows, columns): (usize, usize), scales: Fp8Scales) -> Case {
    let codes = arg(&[rows, columns], Kind::E4M3, Role::Input, Init::Random(100.0));
    Case {
        operation: "fp8_widen",
        shape: format!("[{rows}, {columns}] {scales:?}"),
        args: vec![assigned(&[rows, columns], Kind::Float), codes, scale_arg(n_scales(scales, rows))],
        run: Box::new(|device, tensors| {
            let [out, codes, scale] = tensors else { unreachable!() };
            device.fp8_widen(out, codes, scale);
        }),
        oracle: Box::new(move |v, _| {
            let by = |at: usize| v[2][if scales == Fp8Scales::Rows { at / columns } else { 0 }];
            vec![exact(&v[1].iter().enumerate().map(|(at, x)| x * by(at)).collect::<Vec<f64>>())]
        }),
        flops: 0.0,
    }
}

/// out[m, n] = a[m, k] b[n, k]^T times their scales: the sum within the bound of every product, two more roundings for the scales.
pub fn gemm((m, n, k): (usize, usize, usize), scales: Fp8Scales, out: Kind) -> Case {
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
