//! Matrix products for processors with AVX-512: f32 by fused multiply-adds, bf16 by dot products of pairs (vdpbf16ps), both
//! accumulated in f32.
//!
//! a and b are packed into panels of words (an f32, or a pair of bf16 along k): a panel is [k words][width], width 14 rows of a or 32
//! columns of b. The smaller side is packed whole, first; the larger one by the task that multiplies it, a block of panels that
//! stays in the second-level cache while the smaller side streams by (after Goto and van de Geijn 2008). A 14 x 32 tile of
//! out stays in 28 registers for all of k (up to 1536 words at a time) and is rounded as it is stored. Each sum runs over k in
//! order, so it depends on neither threads nor the other sizes. vdpbf16ps takes subnormal inputs as zero, flushes
//! subnormal results (below 1.2e-38), and rounds each of its two additions to nearest even.

use super::lanes::{Element, Isa, Vector, kernel, load, prefetch, store};
use super::matmul::Sizes;
use super::parallel::{Pool, Shared, for_tasks};
use super::terms::{Terms, transpose_tile};
use crate::device::{Gemm, Store};
use std::ops::Range;

/// Rows of a tile.
const MR: usize = 14;
/// Columns of a tile.
const NR: usize = 32;
/// Most words of k packed at a time.
const SLAB: usize = 1536;
/// Words of the block that a task packs: 384 KiB of the second-level cache, which most have 1 MiB of.
const BLOCK_WORDS: usize = 96 * 1024;

/// Words of k between a row that is packed and the one that is fetched.
const AHEAD: usize = 12;

/// A matrix seen as rows (of out, for a; columns of out, for b) by k.
#[derive(Clone, Copy)]
struct Side<'a, E> {
    data: &'a [E],
    /// Rows or columns of out.
    len: usize,
    /// Terms.
    k: usize,
    /// Whether k is the contiguous dim.
    k_contiguous: bool,
    /// Rows of a panel.
    width: usize,
}

impl<E> Side<'_, E> {
    fn n_panels(&self) -> usize {
        self.len.div_ceil(self.width)
    }
}

/// Words of k that are packed at a time, and how many in all. More than one slab is added up in out, so out is f32 then.
fn slabs_of(terms: Terms, k: usize) -> (usize, usize) {
    let words = terms.words(k);
    (words.div_ceil(words.div_ceil(SLAB)), words)
}

/// See `Device::gemm`; k > 0. `isa` is at least Avx512, and has bf16 dot products for bf16.
pub fn product<E: Element, O: Element>((isa, pool): (Isa, &Pool), out: &mut [O], (a, b): (&[E], &[E]), sizes: Sizes, how: Gemm) {
    let Sizes { m, n, k } = sizes;
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n && isa >= Isa::Avx512);
    let terms = if E::DTYPE.bytes() == 2 { Terms::Pairs } else { Terms::Single };
    let a = Side { data: a, len: m, k, k_contiguous: !how.trans_a, width: MR };
    let b = Side { data: b, len: n, k, k_contiguous: how.trans_b, width: NR };
    let (slab, words) = slabs_of(terms, k);
    if O::DTYPE.bytes() == 4 || slab == words {
        return slabs((isa, pool, terms), out, a, b, how.out);
    }
    let mut sum = pool.take(m * n);
    slabs::<E, f32>((isa, pool, terms), &mut sum, a, b, Store::Assign);
    super::matmul::round_sum(isa, &Shared::new(out), &sum, how.out);
}

/// out = or += a b^T, a slab of k after another.
fn slabs<E: Element, O: Element>((isa, pool, terms): (Isa, &Pool, Terms), out: &mut [O], a: Side<E>, b: Side<E>, how: Store) {
    let (slab, words) = slabs_of(terms, a.k);
    let (a_is_larger, n, cost) = (a.len >= b.len, b.len, a.len * b.len * a.k / 64);
    let (large, small) = if a_is_larger { (a, b) } else { (b, a) };
    let mut packed = pool.take(small.n_panels() * small.width * slab);
    let out = Shared::new(out);
    for first in (0..words).step_by(slab) {
        let slab = first..(first + slab).min(words);
        let how = if first == 0 { how } else { Store::Accumulate };
        let (large_size, small_size) = (large.width * slab.len(), small.width * slab.len());
        let to = Shared::new(&mut packed);
        let each = 4;
        for_tasks(small.n_panels().div_ceil(each), cost, |task| {
            let panels = task * each..((task + 1) * each).min(small.n_panels());
            // SAFETY: each panel is packed by one task.
            let to = unsafe { to.part(panels.start * small_size..panels.end * small_size) };
            pack(isa, to, small, panels, slab.clone());
        });
        let small_packed = &packed[..];
        // As many panels as the cache holds, but enough blocks that the threads end together.
        let fair = large.n_panels().div_ceil(4 * rayon::current_num_threads());
        let in_block = (BLOCK_WORDS / large_size).clamp(1, fair.max(1));
        for_tasks(large.n_panels().div_ceil(in_block), cost, |task| {
            let panels = task * in_block..((task + 1) * in_block).min(large.n_panels());
            let mut large_packed = pool.take(panels.len() * large_size);
            pack(isa, &mut large_packed, large, panels.clone(), slab.clone());
            for (j, streamed) in small_packed.chunks_exact(small_size).take(small.n_panels()).enumerate() {
                for (i, kept) in panels.clone().zip(large_packed.chunks_exact(large_size)) {
                    let (row, column) = if a_is_larger { (i * MR, j * NR) } else { (j * MR, i * NR) };
                    let (a_panel, b_panel) = if a_is_larger { (kept, streamed) } else { (streamed, kept) };
                    let cut = ((a.len - row).min(MR), (n - column).min(NR));
                    tile::<E, O>(isa, &out, (row * n + column, n), cut, a_panel, b_panel, how);
                }
            }
        });
    }
}

kernel! {
    /// out[rows, columns] = or += the product of two panels. The tile begins at `place.0` of out, whose rows have `place.1` elements;
    /// `cut` are the rows and columns there are. No other task writes it.
    fn tile over V [E, O] (out: &Shared<O>, place: (usize, usize), cut: (usize, usize), a: &[f32], b: &[f32], how: Store) {
        assert!(V::N == 16 && a.len() / MR == b.len() / NR);
        let mut sums = [[V::zero(); 2]; MR];
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
            let row = [load::<V, f32>(b, 0, V::N), load::<V, f32>(b, V::N, V::N)];
            for (sum, x) in sums.iter_mut().zip(a) {
                let x = V::splat(*x);
                for (sum, row) in sum.iter_mut().zip(row) {
                    *sum = if E::DTYPE.bytes() == 2 { x.dot_pairs(row, *sum) } else { x.fma(row, *sum) };
                }
            }
        }
        for (i, sum) in sums.iter().enumerate().take(cut.0) {
            let at = place.0 + i * place.1;
            // SAFETY: each tile is written by one task.
            let row = unsafe { out.part(at..at + cut.1) };
            for (half, sum) in sum.iter().enumerate() {
                let (at, n) = (V::N * half, cut.1.saturating_sub(V::N * half).min(V::N));
                if n == 0 {
                    break;
                }
                let value = if how == Store::Accumulate { load::<V, O>(row, at, n).add(*sum) } else { *sum };
                store(row, at, n, value);
            }
        }
    }
}

/// Panels one after another: `to[panel][word][lane]` is word `word` of row `panel * width + lane`, zeros past the ends.
fn pack<E: Element>(isa: Isa, to: &mut [f32], side: Side<E>, panels: Range<usize>, words: Range<usize>) {
    if !side.k_contiguous {
        return pack_columns(isa, to, side, panels, words);
    }
    for (panel, to) in panels.zip(to.chunks_exact_mut(side.width * words.len())) {
        pack_rows(isa, to, side, panel * side.width, words.clone());
    }
}

kernel! {
    /// Panels in which k is not contiguous. A row of the matrix at a time through all panels: it is read in the order it lies in.
    fn pack_columns over V [E] (to: &mut [f32], side: Side<E>, panels: Range<usize>, words: Range<usize>) {
        let (width, size, is_pair) = (side.width, side.width * words.len(), E::DTYPE.bytes() == 2);
        let columns = panels.start * width..(panels.end * width).min(side.len);
        for (at, word) in words.enumerate() {
            let row = |k: usize| &side.data[k * side.len..][columns.clone()];
            let (low, high) = match is_pair {
                // Behind an odd number of terms stands a zero.
                true if 2 * word + 1 == side.k => (row(2 * word), None),
                true => (row(2 * word), Some(row(2 * word + 1))),
                false => (row(word), None),
            };
            // Rows lie too far apart for the processor to see them coming.
            let terms = if is_pair { 2 } else { 1 };
            for k in (terms * (word + AHEAD)..terms * (word + AHEAD + 1)).filter(|k| *k < side.k) {
                prefetch(row(k));
            }
            for (panel, to) in to.chunks_exact_mut(size).enumerate() {
                let (to, first) = (&mut to[at * width..][..width], panel * width);
                for lane in (0..width).step_by(V::N) {
                    let there = low.len().saturating_sub(first + lane).min(width - lane).min(V::N);
                    let mut value = load::<V, E>(low, (first + lane).min(low.len()), there);
                    if is_pair {
                        value = value.pack_pairs(high.map_or(V::zero(), |high| load::<V, E>(high, (first + lane).min(high.len()), there)));
                    }
                    store(to, lane, (width - lane).min(V::N), value);
                }
            }
        }
    }
}

kernel! {
    /// One panel of rows, from row `first`, in which k is contiguous: a transposition of words, 16 x 16 at a time.
    fn pack_rows over V [E] (to: &mut [f32], side: Side<E>, first: usize, words: Range<usize>) {
        let per_word = 4 / E::DTYPE.bytes();
        let n_rows = side.width.min(side.len - first);
        for lanes in (0..side.width).step_by(V::N) {
            let stored = (side.width - lanes).min(V::N);
            for at in (0..words.len()).step_by(V::N) {
                let n_words = (words.len() - at).min(V::N);
                let begin = per_word * (words.start + at);
                let n = (side.k - begin).min(per_word * n_words);
                let mut block = [V::zero(); 16];
                for (lane, row) in block.iter_mut().enumerate().take(n_rows.saturating_sub(lanes).min(stored)) {
                    let from = &side.data[(first + lanes + lane) * side.k..][..side.k];
                    prefetch(&from[(begin + 3 * per_word * V::N).min(side.k - 1)..][..1]);
                    *row = load_words(&from[begin..][..n]);
                }
                transpose_tile(&mut block);
                for (word, column) in block.iter().enumerate().take(n_words) {
                    store(to, (at + word) * side.width + lanes, stored, *column);
                }
            }
        }
    }
}

/// Up to N words of elements as they lie, zeros behind them.
#[inline(always)]
fn load_words<V: Vector, E: Element>(from: &[E]) -> V {
    if size_of_val(from) == 4 * V::N {
        // SAFETY: that many bytes are there; the load asks for no alignment.
        return unsafe { V::load(from.as_ptr().cast()) };
    }
    let mut part = [0f32; 16];
    bytemuck::cast_slice_mut::<f32, E>(&mut part)[..from.len()].copy_from_slice(from);
    load(&part, 0, V::N)
}
