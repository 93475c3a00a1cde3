//! Matrix products: shapes, and which path takes them. Processors with AVX-512 take `panels`, bf16 only with bf16 dot products;
//! others take the `gemm` crate, with bf16 widened first. A few rows (decode) go to `few_rows`, which reads b once.

use super::lanes::{Element, Isa, elements, elements_mut};
use super::parallel::{GRAIN, Pool, Shared, for_ranges};
use super::{elementwise, few_rows, float, panels};
use crate::device::{Gemm, Store};
use crate::tensor::{DType, Tensor};
use half::bf16;

/// Sizes of a product: out[m,n], k summed.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of out.
    pub m: usize,
    /// Columns of out.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
}

/// The sizes, after checking that shapes and types fit.
pub fn sizes_of(out: &Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Sizes {
    let (m, k) = if how.trans_a { (a.row_len(), a.n_rows()) } else { (a.n_rows(), a.row_len()) };
    let (k_b, n) = if how.trans_b { (b.row_len(), b.n_rows()) } else { (b.n_rows(), b.row_len()) };
    assert!(k == k_b && out.n_rows() == m && out.row_len() == n, "gemm {out:?} = {a:?} x {b:?}, {how:?}");
    assert!(a.dtype() == b.dtype() && (out.dtype() == DType::F32 || out.dtype() == a.dtype()), "gemm {out:?} = {a:?} x {b:?}");
    Sizes { m, n, k }
}

/// See `Device::gemm`.
pub fn gemm(isa: Isa, pool: &Pool, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
    let sizes = sizes_of(out, a, b, how);
    if sizes.m == 0 || sizes.n == 0 || sizes.k == 0 {
        if how.out == Store::Assign {
            out.bytes_mut().fill(0);
        }
        return;
    }
    if sizes.m <= few_rows::MOST_ROWS && how.trans_b && (!how.trans_a || sizes.m == 1) {
        return float!(out.dtype(), O => float!(a.dtype(), E => {
            few_rows::product::<E, O>((isa, pool), elements_mut(out), elements(a), elements(b), sizes, how.out)
        }));
    }
    match a.dtype() {
        DType::F32 if isa >= Isa::Avx512 => panels::product((isa, pool), out.f32_mut(), (a.f32(), b.f32()), sizes, how),
        DType::F32 => f32_product(out.f32_mut(), a.f32(), b.f32(), sizes, how),
        DType::BF16 if isa == Isa::Avx512Bf16 => float!(out.dtype(), O => {
            panels::product::<bf16, O>((isa, pool), elements_mut(out), (a.bf16(), b.bf16()), sizes, how)
        }),
        DType::BF16 => widened_product(isa, pool, out, a.bf16(), b.bf16(), sizes, how),
        DType::U32 | DType::F8E4M3 => panic!("gemm of {a:?}"),
    }
}

/// By the `gemm` crate.
fn f32_product(out: &mut [f32], a: &[f32], b: &[f32], Sizes { m, n, k }: Sizes, how: Gemm) {
    assert!(out.len() == m * n && a.len() == m * k && b.len() == k * n);
    let (a_cs, a_rs) = if how.trans_a { (m as isize, 1) } else { (1, k as isize) };
    let (b_cs, b_rs) = if how.trans_b { (k as isize, 1) } else { (1, n as isize) };
    let accumulate = how.out == Store::Accumulate;
    let small = m * n * k < 1 << 18 || rayon::current_num_threads() == 1;
    let parallel = if small { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    let (old, out) = (if accumulate { 1.0f32 } else { 0.0 }, out.as_mut_ptr());
    // SAFETY: sizes and strides describe the three slices exactly (asserted), and `out` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            n as isize,
            accumulate,
            a.as_ptr(),
            a_cs,
            a_rs,
            b.as_ptr(),
            b_cs,
            b_rs,
            old,
            1.0f32,
            false,
            false,
            false,
            parallel,
        );
    }
}

/// bf16 through f32: the same sums as the dot products, up to their order.
fn widened_product(isa: Isa, pool: &Pool, out: &mut Tensor, a: &[bf16], b: &[bf16], sizes: Sizes, how: Gemm) {
    let widen = |x: &[bf16]| {
        let mut wide = pool.take(x.len());
        let to = Shared::new(&mut wide);
        // SAFETY: the ranges are disjoint.
        for_ranges(x.len(), GRAIN, |range| elementwise::convert(isa, unsafe { to.part(range.clone()) }, &x[range]));
        wide
    };
    let (a, b) = (widen(a), widen(b));
    if out.dtype() == DType::F32 {
        return f32_product(out.f32_mut(), &a, &b, sizes, how);
    }
    let mut sum = pool.take(sizes.m * sizes.n);
    f32_product(&mut sum, &a, &b, sizes, Gemm { out: Store::Assign, ..how });
    round_sum(isa, &Shared::new(elements_mut::<bf16>(out)), &sum, how.out);
}

/// out = or += sum, rounded once.
pub fn round_sum<O: Element>(isa: Isa, out: &Shared<O>, sum: &[f32], how: Store) {
    for_ranges(sum.len(), GRAIN, |range| {
        // SAFETY: the ranges are disjoint.
        let to = unsafe { out.part(range.clone()) };
        match how {
            Store::Assign => elementwise::convert(isa, to, &sum[range]),
            Store::Accumulate => elementwise::add(isa, to, &sum[range]),
        }
    });
}
