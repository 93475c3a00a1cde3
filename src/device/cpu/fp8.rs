//! E4M3 with scales, and products of it as they are made on tensor cores, simulated: elements widened again, which is exact, and
//! multiplied as bf16.

use super::lanes::{Element, elements, elements_mut};
use super::parallel::{GRAIN, Shared, for_ranges, for_rows};
use super::{Cpu, float};
use crate::device::{Device, Fp8Axis, Gemm};
use crate::tensor::{DType, Tensor};

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

/// Biased exponent of the smallest scale, 2^-117: times every code it is a normal number of bf16 and f32.
const LEAST_EXPONENT: u32 = 10;

/// The scale of elements whose largest has this size: see `Device::fp8_round`.
pub fn scale_of(size: f32) -> f32 {
    let bits = size.to_bits();
    match size {
        0.0 => 1.0,
        _ if !size.is_finite() => size,
        // 448 = 1.75 * 2^8: one exponent more for what is above 1.75.
        _ => f32::from_bits(((bits >> 23) + u32::from(bits & 0x7f_ffff > 0x60_0000)).saturating_sub(8).max(LEAST_EXPONENT) << 23),
    }
}

fn largest<E: Element>(x: &[E]) -> f32 {
    x.iter().fold(0f32, |most, x| most.max(x.get().abs()))
}

/// See `Device::fp8_sizes`.
pub fn sizes(sizes: &mut Tensor, x: &Tensor, of: Fp8Axis) {
    let (rows, columns) = (x.n_rows(), x.row_len());
    assert!(sizes.n_elements() == of.n_scales((rows, columns)), "fp8_sizes {sizes:?} of {x:?}, {of:?}");
    let sizes = sizes.f32_mut();
    float!(x.dtype(), E => {
        let x = elements::<E>(x);
        match of {
            Fp8Axis::All | Fp8Axis::Transposed => sizes[0] = largest(x),
            Fp8Axis::Rows => {
                let sizes = Shared::new(sizes);
                for_rows(rows, columns, |range| {
                    // SAFETY: the ranges are disjoint.
                    let sizes = unsafe { sizes.part(range.clone()) };
                    sizes.iter_mut().zip(range).for_each(|(size, row)| *size = largest(&x[row * columns..][..columns]));
                });
            }
            Fp8Axis::Columns => {
                let sizes = Shared::new(sizes);
                for_ranges(columns, (GRAIN / rows.max(1)).max(64), |range| {
                    // SAFETY: the ranges are disjoint.
                    let sizes = unsafe { sizes.part(range.clone()) };
                    sizes.fill(0.0);
                    for row in 0..rows {
                        let row = &x[row * columns..][range.clone()];
                        sizes.iter_mut().zip(row).for_each(|(size, x)| *size = size.max(x.get().abs()));
                    }
                });
            }
        }
    });
}

/// See `Device::fp8_round`.
pub fn round(out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
    let (rows, columns) = (x.n_rows(), x.row_len());
    let dims = if of.transposes() { (columns, rows) } else { (rows, columns) };
    let fits = (out.n_rows(), out.row_len()) == dims && out.dtype() == DType::F8E4M3;
    assert!(fits && scale.n_elements() == of.n_scales((rows, columns)), "fp8_round {x:?} to {out:?}, {scale:?}, {of:?}");
    scale.f32_mut().iter_mut().for_each(|scale| *scale = scale_of(*scale));
    let scales = scale.f32();
    let at = |i: usize| if scales.len() == 1 { 0 } else { i };
    let out = Shared::new(out.bytes_mut());
    float!(x.dtype(), E => {
        let x = elements::<E>(x);
        let (n, len) = dims;
        for_rows(n, len, |range| {
            // SAFETY: the ranges are disjoint.
            let out = unsafe { out.part(range.start * len..range.end * len) };
            for (i, row) in range.enumerate() {
                let (to, by) = (&mut out[i * len..][..len], 1.0 / scales[at(row)]);
                if of.transposes() {
                    to.iter_mut().enumerate().for_each(|(k, to)| *to = rounded(x[k * columns + row].get() * by));
                } else {
                    to.iter_mut().zip(&x[row * columns..]).for_each(|(to, x)| *to = rounded(x.get() * by));
                }
            }
        });
    });
}

/// See `Device::fp8_widen`.
pub fn widen(out: &mut Tensor, codes: &Tensor, scale: &Tensor) {
    let (rows, columns) = (codes.n_rows(), codes.row_len());
    let fits = out.n_rows() == rows && out.row_len() == columns && codes.dtype() == DType::F8E4M3;
    assert!(fits && [1, rows].contains(&scale.n_elements()), "fp8_widen {codes:?}, {scale:?} to {out:?}");
    let (codes, scales) = (codes.bytes(), scale.f32());
    let numbers: Vec<f32> = (0..=u8::MAX).map(widened).collect();
    float!(out.dtype(), E => {
        let out = Shared::new(elements_mut::<E>(out));
        for_rows(rows, columns, |range| {
            // SAFETY: the ranges are disjoint.
            let out = unsafe { out.part(range.start * columns..range.end * columns) };
            for (i, row) in range.enumerate() {
                let by = scales[if scales.len() == 1 { 0 } else { row }];
                let of = out[i * columns..][..columns].iter_mut().zip(&codes[row * columns..]);
                of.for_each(|(to, code)| *to = E::from_f32(numbers[usize::from(*code)] * by));
            }
        });
    });
}

/// See `Device::gemm_fp8`.
pub fn gemm(cpu: &Cpu, out: &mut Tensor, (a, a_scale): (&Tensor, &Tensor), (b, b_scale): (&Tensor, &Tensor)) {
    let (m, n) = (a.n_rows(), b.n_rows());
    assert!(out.n_rows() == m && out.row_len() == n && a.row_len() == b.row_len(), "gemm_fp8: {out:?} from {a:?} and {b:?}");
    assert!(n % 16 == 0 && a.row_len() % 16 == 0, "gemm_fp8: {n} x {} are no multiples of 16", a.row_len());
    let wide = |codes: &Tensor, scale: &Tensor| {
        let mut wide = cpu.alloc(codes.dims(), DType::BF16).unwrap_or_else(|error| panic!("{error}"));
        widen(&mut wide, codes, scale);
        wide
    };
    cpu.gemm(out, &wide(a, a_scale), &wide(b, b_scale), Gemm::NT);
}
