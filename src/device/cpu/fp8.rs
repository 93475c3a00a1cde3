//! Products of E4M3 as they are made on tensor cores, simulated: elements rounded, widened again, multiplied in f32, scaled.

use super::Cpu;
use crate::device::{Device, Gemm};
use crate::tensor::{DType, Tensor};
use rayon::prelude::*;

/// The largest number.
pub const LARGEST: f32 = 448.0;
/// Below it numbers have no leading one; they are multiples of 2^-9.
const SMALLEST_NORMAL: f32 = 0.015625;

/// To nearest even, at most 448 in size; NaN stays NaN.
pub fn rounded(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let size = x.abs().min(LARGEST);
    if x.is_nan() {
        return sign | 0x7f;
    }
    if size < SMALLEST_NORMAL {
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    // The upper 12 bits of an f32 are sign, exponent and three of the mantissa; the exponent's bias is 127 there and 7 here.
    let bits = size.to_bits();
    sign | (((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)) as u8
}

/// The number behind the bits.
pub fn widened(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

/// See `Device::quantise`.
pub fn quantise(out: &mut Tensor, scale: &mut Tensor, x: &Tensor) {
    let (rows, columns, n_scales) = (x.n_rows(), x.row_len(), scale.n_elements());
    assert!(
        out.dims() == x.dims() && out.dtype() == DType::F8E4M3 && [1, rows].contains(&n_scales),
        "quantise {x:?} to {out:?}, {scale:?}"
    );
    let values = x.to_f32_vec();
    let n_each = if n_scales == 1 { rows * columns } else { columns };
    if n_each == 0 {
        return scale.f32_mut().fill(1.0);
    }
    let of = |part: &[f32]| {
        let most = part.iter().fold(0f32, |most, x| most.max(x.abs()));
        if most > 0.0 { most / LARGEST } else { 1.0 }
    };
    scale.f32_mut().iter_mut().zip(values.chunks(n_each)).for_each(|(scale, part)| *scale = of(part));
    let scales = scale.f32();
    let write =
        |(i, (out, part)): (usize, (&mut [u8], &[f32]))| out.iter_mut().zip(part).for_each(|(out, x)| *out = rounded(x / scales[i]));
    out.bytes_mut().par_chunks_mut(n_each).zip(values.par_chunks(n_each)).enumerate().for_each(write);
}

/// See `Device::gemm_fp8`.
pub fn gemm(cpu: &Cpu, out: &mut Tensor, (a, a_scale): (&Tensor, &Tensor), (b, b_scale): (&Tensor, &Tensor)) {
    let (m, n) = (a.n_rows(), b.n_rows());
    assert!(out.n_rows() == m && out.row_len() == n && a.row_len() == b.row_len(), "gemm_fp8: {out:?} from {a:?} and {b:?}");
    assert!(n % 16 == 0 && a.row_len() % 16 == 0, "gemm_fp8: {n} x {} are no multiples of 16", a.row_len());
    let wide = |x: &Tensor| Tensor::from_f32(x.dims(), &x.bytes().iter().map(|bits| widened(*bits)).collect::<Vec<f32>>());
    let mut product = Tensor::from_f32(&[m, n], &vec![0.0; m * n]);
    cpu.gemm(&mut product, &wide(a), &wide(b), Gemm::NT);
    let (of_a, of_b) = (a_scale.f32(), b_scale.f32());
    let at = |scales: &[f32], i: usize| if scales.len() == 1 { scales[0] } else { scales[i] };
    for (i, row) in product.f32_mut().chunks_mut(n.max(1)).enumerate() {
        row.iter_mut().enumerate().for_each(|(j, value)| *value = *value * at(of_a, i) * at(of_b, j));
    }
    cpu.copy(out, &product);
}
