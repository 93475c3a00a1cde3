//! bf16 matrix products by AVX512-BF16 dot products (vdpbf16ps), accumulated in f32.
//!
//! a and b are packed, a slab of k at a time, into panels of pairs: a panel is [k/2][width][2], width 14 rows of a or 32 columns
//! of b. The kernel keeps a 14 x 32 tile of out in 28 registers; a panel of b stays in the first-level cache, a block of a in
//! the second (Goto and van de Geijn 2008). Each sum runs over k in order, so it depends on neither threads nor the other
//! sizes. vdpbf16ps takes subnormal inputs as zero and flushes subnormal results (below 1.2e-38), and rounds each of its two
//! additions to nearest even.

use super::lanes::elements_mut;
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
/// Pairs of k that a panel holds while it stays in cache: 32 x 192 x 4 bytes = 24 KiB of b.
const KC: usize = 192;
/// Pairs of k packed at a time.
const SLAB: usize = 8 * KC;
/// Panels of a in a block: 10 x 14 x 192 x 4 bytes = 105 KiB.
const BLOCK_A: usize = 10;
/// Panels of b in a block.
const BLOCK_B: usize = 16;

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
    let mut sum = pool.take(m * n);
    slabs(pool, &mut sum, a, b, Store::Assign);
    let to = Shared::new(elements_mut::<bf16>(out));
    super::matmul::round_sum(super::lanes::Isa::Avx512Bf16, &to, &sum, how.out);
}

/// out = or += a b^T, a slab of k after another.
fn slabs(pool: &Pool, out: &mut [f32], a: Side, b: Side, how: Store) {
    let pairs = a.k.div_ceil(2);
    let widest = pairs.min(SLAB);
    let (panels_a, panels_b) = (a.len.div_ceil(MR), b.len.div_ceil(NR));
    let mut packed_a = pool.take(panels_a * MR * widest);
    let mut packed_b = pool.take(panels_b * NR * widest);
    let (n, cost) = (b.len, a.len * b.len * a.k / 64);
    let out = Shared::new(out);
    for first in (0..pairs).step_by(SLAB) {
        let slab = first..(first + SLAB).min(pairs);
        let size = slab.len();
        let (to_a, to_b) = (Shared::new(&mut packed_a), Shared::new(&mut packed_b));
        for_tasks(panels_a.div_ceil(4) + panels_b.div_ceil(2), cost, |task| {
            let packs_b = task < panels_b.div_ceil(2);
            let (side, to, width) = if packs_b { (b, &to_b, NR) } else { (a, &to_a, MR) };
            let (each, task) = if packs_b { (2, task) } else { (4, task - panels_b.div_ceil(2)) };
            for panel in task * each..((task + 1) * each).min(side.len.div_ceil(width)) {
                // SAFETY: each panel is packed by one task.
                let to = unsafe { to.part(panel * width * size..(panel + 1) * width * size) };
                // SAFETY: the processor has these features (`product`).
                unsafe { pack(to, side, panel * width, slab.clone(), width) };
            }
        });
        let how = if first == 0 { how } else { Store::Accumulate };
        let (blocks_a, blocks_b) = (panels_a.div_ceil(BLOCK_A), panels_b.div_ceil(BLOCK_B));
        let (packed_a, packed_b) = (&packed_a[..], &packed_b[..]);
        for_tasks(blocks_a * blocks_b, cost, |task| {
            let (at_a, at_b) = (task % blocks_a * BLOCK_A, task / blocks_a * BLOCK_B);
            let block =
                Block { panels_a: at_a..(at_a + BLOCK_A).min(panels_a), panels_b: at_b..(at_b + BLOCK_B).min(panels_b), size, m: a.len, n };
            // SAFETY: blocks are disjoint tiles of out; the processor has these features.
            unsafe { run_block(&out, packed_a, packed_b, &block, how) };
        });
    }
}

/// A rectangle of out, in panels.
struct Block {
    panels_a: Range<usize>,
    panels_b: Range<usize>,
    /// Pairs in the slab.
    size: usize,
    m: usize,
    n: usize,
}

/// SAFETY: needs avx512f and avx512bf16; no other task writes this block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn run_block(out: &Shared<f32>, a: &[f32], b: &[f32], block: &Block, how: Store) {
    let size = block.size;
    for first in (0..size).step_by(KC) {
        let depth = KC.min(size - first);
        let how = if first == 0 { how } else { Store::Accumulate };
        for panel_b in block.panels_b.clone() {
            let b = &b[panel_b * NR * size + first * NR..][..depth * NR];
            let columns = (block.n - panel_b * NR).min(NR);
            for panel_a in block.panels_a.clone() {
                let a = &a[panel_a * MR * size + first * MR..][..depth * MR];
                let rows = (block.m - panel_a * MR).min(MR);
                // SAFETY: the tile lies in out: rows and columns are cut at its ends.
                unsafe {
                    let to = out.start().add(panel_a * MR * block.n + panel_b * NR);
                    tile(to, block.n, (rows, columns), a.as_ptr(), b.as_ptr(), depth, how);
                }
            }
        }
    }
}

/// out[rows, columns] = or += the product of two panels.
/// SAFETY: features as above; `a` has depth x 14 pairs, `b` depth x 32; the tile is in bounds of `out` with `stride` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn tile(out: *mut f32, stride: usize, (rows, columns): (usize, usize), a: *const f32, b: *const f32, depth: usize, how: Store) {
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
                    Store::Accumulate => _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], to), sum[half]),
                };
                _mm512_mask_storeu_ps(to, masks[half], value);
            }
        }
    }
}

/// One panel: `to[pair][lane]` is the pair (k = 2 pair, 2 pair + 1) of row `first + lane`, zeros past the ends.
/// SAFETY: needs avx512f, bw, vl.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack(to: &mut [f32], side: Side, first: usize, pairs: Range<usize>, width: usize) {
    let n_lanes = width.min(side.len - first);
    if side.k_contiguous {
        return pack_rows(to, side, first, pairs, width, n_lanes);
    }
    let whole = (side.k / 2).clamp(pairs.start, pairs.end);
    for (pair, to) in pairs.zip(to.chunks_exact_mut(width)) {
        let even = &side.data[2 * pair * side.len + first..][..n_lanes];
        let odd = if pair < whole { &side.data[(2 * pair + 1) * side.len + first..][..n_lanes] } else { &[] };
        interleave(to, even, odd);
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
