//! bf16 matrix products by AVX512-BF16 dot products (vdpbf16ps), accumulated in f32.
//!
//! a and b are packed into panels of pairs: a panel is [k/2][width][2], width 14 rows of a or 32 columns of b. The smaller side is
//! packed whole, first; the larger one by the task that multiplies it, a block of panels that stays in the second-level cache
//! while the smaller side streams by (after Goto and van de Geijn 2008). A 14 x 32 tile of out stays in 28 registers for all of k
//! (up to 3072 terms at a time) and is rounded as it is stored. Each sum runs over k in order, so it depends on neither
//! threads nor the other sizes. vdpbf16ps takes subnormal inputs as zero and flushes subnormal results (below 1.2e-38), and
//! rounds each of its two additions to nearest even.

use super::lanes::{Element, elements_mut};
use super::matmul::Sizes;
use super::parallel::{Pool, Shared, for_tasks};
use crate::device::{Gemm, Store};
use crate::tensor::{DType, Tensor};
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of a tile.
const MR: usize = 14;
/// Columns of a tile.
const NR: usize = 32;
/// Pairs of k packed at a time.
const SLAB: usize = 1536;
/// Words of the block that a task packs: 384 KiB of the second-level cache, which most have 1 MiB of.
const BLOCK_WORDS: usize = 96 * 1024;

/// A matrix of bf16 seen as rows (of out, for a; columns of out, for b) by k.
#[derive(Clone, Copy)]
struct Side<'a> {
    data: &'a [bf16],
    /// Rows or columns of out.
    len: usize,
    /// Terms.
    k: usize,
    /// Whether k is the contiguous dim.
    k_contiguous: bool,
}

/// See `Device::gemm`. The caller has found avx512bf16.
pub fn product(pool: &Pool, out: &mut Tensor, a: &[bf16], b: &[bf16], sizes: Sizes, how: Gemm) {
    let Sizes { m, n, k } = sizes;
    assert!(a.len() == m * k && b.len() == k * n && out.n_elements() == m * n);
    let a = Side { data: a, len: m, k, k_contiguous: !how.trans_a };
    let b = Side { data: b, len: n, k, k_contiguous: how.trans_b };
    if out.dtype() == DType::F32 {
        return slabs(pool, out.f32_mut(), a, b, how.out);
    }
    if k <= 2 * SLAB {
        return slabs(pool, elements_mut::<bf16>(out), a, b, how.out);
    }
    let mut sum = pool.take(m * n);
    slabs::<f32>(pool, &mut sum, a, b, Store::Assign);
    let to = Shared::new(elements_mut::<bf16>(out));
    super::matmul::round_sum(super::lanes::Isa::Avx512Bf16, &to, &sum, how.out);
}

/// out = or += a b^T, a slab of k after another.
fn slabs<O: Element>(pool: &Pool, out: &mut [O], a: Side, b: Side, how: Store) {
    let pairs = a.k.div_ceil(2);
    let (a_is_larger, n) = (a.len >= b.len, b.len);
    let (large, small) = if a_is_larger { (a, b) } else { (b, a) };
    let (large_width, small_width) = if a_is_larger { (MR, NR) } else { (NR, MR) };
    let (large_panels, small_panels) = (large.len.div_ceil(large_width), small.len.div_ceil(small_width));
    let cost = a.len * b.len * a.k / 64;
    let mut packed = pool.take(small_panels * small_width * pairs.min(SLAB));
    let out = Shared::new(out);
    for first in (0..pairs).step_by(SLAB) {
        let slab = first..(first + SLAB).min(pairs);
        let size = slab.len();
        let how = if first == 0 { how } else { Store::Accumulate };
        let to = Shared::new(&mut packed);
        let each = 4;
        for_tasks(small_panels.div_ceil(each), cost, |task| {
            let panels = task * each..((task + 1) * each).min(small_panels);
            // SAFETY: each panel is packed by one task.
            let to = unsafe { to.part(panels.start * small_width * size..panels.end * small_width * size) };
            // SAFETY: the processor has these features (`product`).
            unsafe { pack(to, small, panels, slab.clone(), small_width) };
        });
        let small_packed = &packed[..];
        // As many panels as the cache holds, but enough blocks that the threads end together.
        let fair = large_panels.div_ceil(4 * rayon::current_num_threads());
        let in_block = (BLOCK_WORDS / (large_width * size)).clamp(1, fair.max(1));
        for_tasks(large_panels.div_ceil(in_block), cost, |task| {
            let panels = task * in_block..((task + 1) * in_block).min(large_panels);
            let mut large_packed = pool.take(panels.len() * large_width * size);
            // SAFETY: the processor has these features (`product`).
            unsafe { pack(&mut large_packed, large, panels.clone(), slab.clone(), large_width) };
            for j in 0..small_panels {
                let streamed = &small_packed[j * small_width * size..][..small_width * size];
                for (i, kept) in panels.clone().zip(large_packed.chunks_exact(large_width * size)) {
                    let (row, column) = if a_is_larger { (i, j) } else { (j, i) };
                    let (a_panel, b_panel) = if a_is_larger { (kept, streamed) } else { (streamed, kept) };
                    let cut = ((a.len - row * MR).min(MR), (n - column * NR).min(NR));
                    // SAFETY: the tile lies in out, cut at its ends, and is this task's; the processor has these features.
                    unsafe { tile(out.start().add(row * MR * n + column * NR), n, cut, a_panel.as_ptr(), b_panel.as_ptr(), size, how) };
                }
            }
        });
    }
}

/// out[rows, columns] = or += the product of two panels.
/// SAFETY: features as above; `a` has depth x 14 pairs, `b` depth x 32; the tile is in bounds of `out` with `stride` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn tile<O: Element>(
    out: *mut O,
    stride: usize,
    (rows, columns): (usize, usize),
    a: *const f32,
    b: *const f32,
    depth: usize,
    how: Store,
) {
    // SAFETY: all pointers stay in the ranges that the caller vouches for.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        let (mut a, mut b) = (a, b);
        for _ in 0..depth {
            let b0: __m512bh = std::mem::transmute(_mm512_loadu_ps(b));
            let b1: __m512bh = std::mem::transmute(_mm512_loadu_ps(b.add(16)));
            for (i, sum) in sums.iter_mut().enumerate() {
                let x: __m512bh = std::mem::transmute(_mm512_set1_ps(*a.add(i)));
                sum[0] = _mm512_dpbf16_ps(sum[0], x, b0);
                sum[1] = _mm512_dpbf16_ps(sum[1], x, b1);
            }
            a = a.add(MR);
            b = b.add(NR);
        }
        let mask = |from: usize| if columns >= from + 16 { 0xffff } else { (1u32 << columns.saturating_sub(from)) as u16 - 1 };
        let masks = [mask(0), mask(16)];
        for (i, sum) in sums.iter().enumerate().take(rows) {
            for half in 0..2 {
                let to = out.wrapping_add(i * stride + 16 * half);
                let value = match how {
                    Store::Assign => sum[half],
                    Store::Accumulate => _mm512_add_ps(load_masked(masks[half], to), sum[half]),
                };
                store_masked(to, masks[half], value);
            }
        }
    }
}

/// Up to 16 elements, widened. SAFETY: features as above; the masked elements are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn load_masked<O: Element>(mask: u16, from: *const O) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match O::DTYPE {
            DType::F32 => _mm512_maskz_loadu_ps(mask, from.cast()),
            _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast())))),
        }
    }
}

/// Up to 16 elements, rounded to nearest even. SAFETY: features as above; the masked elements are writable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn store_masked<O: Element>(to: *mut O, mask: u16, value: __m512) {
    // SAFETY: the caller's promise; both types of the transmutation are 256 plain bits.
    unsafe {
        match O::DTYPE {
            DType::F32 => _mm512_mask_storeu_ps(to.cast(), mask, value),
            _ => _mm256_mask_storeu_epi16(to.cast(), mask, std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value))),
        }
    }
}

/// Panels one after another: `to[panel][pair][lane]` is the pair (k = 2 pair, 2 pair + 1) of row `panel * width + lane`, zeros past
/// the ends. SAFETY: needs avx512f, bw, vl.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack(to: &mut [f32], side: Side, panels: Range<usize>, pairs: Range<usize>, width: usize) {
    let size = width * pairs.len();
    if side.k_contiguous {
        for (panel, to) in panels.zip(to.chunks_exact_mut(size)) {
            pack_rows(to, side, panel * width, pairs.clone(), width, width.min(side.len - panel * width));
        }
        return;
    }
    // A row of the matrix at a time through all panels: it is read in the order it lies in.
    for (at, pair) in pairs.enumerate() {
        let row = |k: usize| if k < side.k { &side.data[k * side.len..][..side.len] } else { &[] };
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        for (panel, to) in panels.clone().zip(to.chunks_exact_mut(size)) {
            let lanes = panel * width..((panel + 1) * width).min(side.len);
            let odd = if odd.is_empty() { odd } else { &odd[lanes.clone()] };
            interleave(&mut to[at * width..(at + 1) * width], &even[lanes], odd);
        }
    }
}

/// to[lane] = (even[lane], odd[lane]), zeros past their ends. At most 32 lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleave(to: &mut [f32], even: &[bf16], odd: &[bf16]) {
    let mask = |n: usize| if n >= 32 { u32::MAX } else { (1u32 << n) - 1 };
    let wide = |n: usize, from: usize| mask(n.saturating_sub(from).min(16)) as u16;
    // SAFETY: masked lanes are not touched, the others are in the slices.
    unsafe {
        let even = _mm512_maskz_loadu_epi16(mask(even.len()), even.as_ptr().cast());
        let odd = _mm512_maskz_loadu_epi16(mask(odd.len()), odd.as_ptr().cast());
        for half in 0..2 {
            let part = |x| if half == 0 { _mm512_castsi512_si256(x) } else { _mm512_extracti64x4_epi64::<1>(x) };
            let low = _mm512_cvtepu16_epi32(part(even));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(part(odd)));
            let pairs = _mm512_castsi512_ps(_mm512_or_si512(low, high));
            _mm512_mask_storeu_ps(to.as_mut_ptr().wrapping_add(16 * half), wide(to.len(), 16 * half), pairs);
        }
    }
}

/// The panel of rows in which k is contiguous: a transposition of pairs, 16 x 16 at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pack_rows(to: &mut [f32], side: Side, first: usize, pairs: Range<usize>, width: usize, n_lanes: usize) {
    let n_pairs = pairs.len();
    for lanes in (0..width).step_by(16) {
        let stored = (width - lanes).min(16);
        for at in (0..n_pairs).step_by(16) {
            let mut block = [_mm512_setzero_ps(); 16];
            let begin = 2 * (pairs.start + at);
            let here = (side.k - begin).min(32).min(2 * (n_pairs - at));
            let mask = if here >= 32 { u32::MAX } else { (1u32 << here) - 1 };
            for (lane, row) in block.iter_mut().enumerate().take(n_lanes.saturating_sub(lanes).min(stored)) {
                let from = &side.data[(first + lanes + lane) * side.k + begin..][..here];
                // SAFETY: the mask covers the slice.
                *row = _mm512_castsi512_ps(unsafe { _mm512_maskz_loadu_epi16(mask, from.as_ptr().cast()) });
            }
            transpose(&mut block);
            let mask = ((1u32 << stored) - 1) as u16;
            for (pair, column) in block.iter().enumerate().take((n_pairs - at).min(16)) {
                let to = &mut to[(at + pair) * width + lanes..][..stored];
                // SAFETY: the mask covers the slice.
                unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, *column) };
            }
        }
    }
}

/// A 16 x 16 matrix of 32-bit elements, transposed in registers.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(x: &mut [__m512; 16]) {
    let mut y = [_mm512_setzero_ps(); 16];
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            let (a, b) = (_mm512_castps_pd(y[4 * i + j]), _mm512_castps_pd(y[4 * i + j + 2]));
            x[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // x[4 i + c], 128-bit lane l: rows 4 i .. 4 i + 3 of column 4 l + c.
    for c in 0..4 {
        let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(x[c], x[c + 4]);
        let high = _mm512_shuffle_f32x4::<0b10_00_10_00>(x[c + 8], x[c + 12]);
        let low_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(x[c], x[c + 4]);
        let high_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(x[c + 8], x[c + 12]);
        y[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low, high);
        y[c + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low, high);
        y[c + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low_odd, high_odd);
        y[c + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low_odd, high_odd);
    }
    *x = y;
}
