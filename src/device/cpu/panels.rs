//! Matrix products for processors with AVX-512: f32 by fused multiply-adds, bf16 by dot products of pairs (vdpbf16ps), both
//! accumulated in f32.
//!
//! a and b are packed into panels of words (an f32, or a pair of bf16 along k): a panel is [k words][width], width 14 rows of a or 32
//! columns of b. The smaller side is packed whole, first; the larger one by the task that multiplies it, a block of panels that
//! stays in the second-level cache while the smaller side streams by (after Goto and van de Geijn 2008). A 14 x 32 tile of
//! out stays in 28 registers for all of k (up to 1536 words at a time) and is rounded as it is stored. Each sum runs over k in
//! order, so it depends on neither threads nor the other sizes. k may also be cut in pieces that are summed by themselves and added
//! in turn or in pairs: the tiles of finished pieces wait in the first-level cache. vdpbf16ps takes subnormal inputs as zero, flushes
//! subnormal results (below 1.2e-38), and rounds each of its two additions to nearest even.

use super::lanes::{Element, Isa, Vector, kernel, load, prefetch, store};
use super::matmul::Sizes;
use super::parallel::{Pool, Shared, for_tasks};
use super::terms::{Terms, transpose_tile};
use crate::device::{Gemm, Store};
use std::mem::MaybeUninit;
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
pub struct Side<'a, E> {
    /// The matrix.
    pub data: &'a [E],
    /// Rows or columns of out.
    pub len: usize,
    /// Terms.
    pub k: usize,
    /// Whether k is the contiguous dim.
    pub k_contiguous: bool,
    /// Rows of a panel.
    pub width: usize,
}

impl<E> Side<'_, E> {
    /// Panels that hold them all.
    pub fn n_panels(&self) -> usize {
        self.len.div_ceil(self.width)
    }
}

/// How the sums of several pieces of k are added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Together {
    /// out + first + second + .., rounded to out's type each time.
    InTurn,
    /// ((first + second) + (third + fourth)) + ..; the number of pieces is a power of two.
    InPairs,
}

/// Most pieces that a tile adds in pairs: 2 to the number of tiles that wait.
pub const MOST_IN_PAIRS: usize = 8;
const N_WAITING: usize = 3;

/// A piece of k in a packed panel.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Which terms.
    pub terms: Range<usize>,
    /// Its first word in the panel, and its words.
    pub words: Range<usize>,
}

/// The pieces, one behind the other in a panel.
fn laid_out(terms: Terms, pieces: &[Range<usize>]) -> Vec<Piece> {
    let mut at = 0;
    let piece = |piece: &Range<usize>| {
        let first = at;
        at += terms.words(piece.len());
        Piece { terms: piece.clone(), words: first..at }
    };
    pieces.iter().map(piece).collect()
}

/// A piece of k cut as it is packed, in slabs of equal words. More than one slab is added up in out, so out is f32 then.
pub fn slabs_of(terms: Terms, piece: Range<usize>) -> Vec<Range<usize>> {
    if piece.is_empty() {
        return vec![piece];
    }
    let words = terms.words(piece.len());
    let per_word = if terms == Terms::Pairs { 2 } else { 1 };
    let slab = words.div_ceil(words.div_ceil(SLAB)) * per_word;
    piece.clone().step_by(slab).map(|first| first..(first + slab).min(piece.end)).collect()
}

/// See `Device::gemm`; k > 0. `isa` is at least Avx512, and has bf16 dot products for bf16.
pub fn product<E: Element, O: Element>((isa, pool): (Isa, &Pool), out: &mut [O], (a, b): (&[E], &[E]), sizes: Sizes, how: Gemm) {
    let Sizes { m, n, k } = sizes;
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n && isa >= Isa::Avx512);
    let terms = if E::DTYPE.bytes() == 2 { Terms::Pairs } else { Terms::Single };
    let a = Side { data: a, len: m, k, k_contiguous: !how.trans_a, width: MR };
    let b = Side { data: b, len: n, k, k_contiguous: how.trans_b, width: NR };
    let pieces = slabs_of(terms, 0..k);
    if O::DTYPE.bytes() == 4 || pieces.len() == 1 {
        return in_turn((isa, pool, terms), out, (a, b), &pieces, how.out);
    }
    let mut sum = pool.take(m * n);
    in_turn::<E, f32>((isa, pool, terms), &mut sum, (a, b), &pieces, Store::Assign);
    super::matmul::round_sum(isa, &Shared::new(out), &sum, how.out);
}

/// As `product`, with k cut in `pieces`: each is summed over its terms in order (in slabs of its own where it is long), and the
/// sums are added as `together` says.
pub fn product_of_pieces<E: Element, O: Element>(
    (isa, pool): (Isa, &Pool),
    out: &mut [O],
    (a, b): (&[E], &[E]),
    (sizes, pieces): (Sizes, &[Range<usize>]),
    (how, together): (Gemm, Together),
) {
    let Sizes { m, n, k } = sizes;
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n && isa >= Isa::Avx512);
    let terms = if E::DTYPE.bytes() == 2 { Terms::Pairs } else { Terms::Single };
    let a = Side { data: a, len: m, k, k_contiguous: !how.trans_a, width: MR };
    let b = Side { data: b, len: n, k, k_contiguous: how.trans_b, width: NR };
    let words: usize = pieces.iter().map(|piece| terms.words(piece.len())).sum();
    if together == Together::InTurn {
        let pieces: Vec<Range<usize>> = pieces.iter().flat_map(|piece| slabs_of(terms, piece.clone())).collect();
        return in_turn((isa, pool, terms), out, (a, b), &pieces, how.out);
    }
    assert!(how.out == Store::Assign && pieces.len().is_power_of_two() && pieces.len() <= MOST_IN_PAIRS, "{pieces:?} in pairs");
    if pieces.len() == 1 {
        return product((isa, pool), out, (a.data, b.data), sizes, how);
    }
    if words <= SLAB {
        return one_slab((isa, pool), out, (a, b), &laid_out(terms, pieces), (Store::Assign, Together::InPairs));
    }
    if O::DTYPE.bytes() == 4 {
        return in_pairs((isa, pool, terms), bytemuck::cast_slice_mut(out), (a, b), pieces, Store::Assign);
    }
    let mut sum = pool.take(m * n);
    in_pairs((isa, pool, terms), &mut sum, (a, b), pieces, Store::Assign);
    super::matmul::round_sum(isa, &Shared::new(out), &sum, Store::Assign);
}

/// out = or += the pieces in pairs: the halves apart while they are longer than a slab. What one slab holds is added to out as it is
/// stored; a longer sum is made by itself first.
fn in_pairs<E: Element>(at: (Isa, &Pool, Terms), out: &mut [f32], sides: (Side<E>, Side<E>), pieces: &[Range<usize>], how: Store) {
    let (isa, pool, terms) = at;
    let words: usize = pieces.iter().map(|piece| terms.words(piece.len())).sum();
    if words <= SLAB {
        return one_slab((isa, pool), out, sides, &laid_out(terms, pieces), (how, Together::InPairs));
    }
    if how == Store::Accumulate {
        let mut sum = pool.take(out.len());
        in_pairs(at, &mut sum, sides, pieces, Store::Assign);
        return super::matmul::round_sum(isa, &Shared::new(out), &sum, Store::Accumulate);
    }
    if let [piece] = pieces {
        return in_turn(at, out, sides, &slabs_of(terms, piece.clone()), Store::Assign);
    }
    let (first, second) = pieces.split_at(pieces.len() / 2);
    in_pairs(at, out, sides, first, Store::Assign);
    in_pairs(at, out, sides, second, Store::Accumulate);
}

/// out = or += the pieces in turn, as many at a time as a slab holds.
fn in_turn<E: Element, O: Element>(
    (isa, pool, terms): (Isa, &Pool, Terms),
    out: &mut [O],
    sides: (Side<E>, Side<E>),
    pieces: &[Range<usize>],
    how: Store,
) {
    let (mut left, mut how) = (pieces, how);
    while !left.is_empty() {
        let mut words = 0;
        let more = left.iter().take_while(|piece| {
            words += terms.words(piece.len());
            words <= SLAB
        });
        let (now, later) = left.split_at(more.count().max(1));
        one_slab((isa, pool), out, sides, &laid_out(terms, now), (how, Together::InTurn));
        (left, how) = (later, Store::Accumulate);
    }
}

/// out = or += a b^T over pieces that are packed all at once.
fn one_slab<E: Element, O: Element>(
    (isa, pool): (Isa, &Pool),
    out: &mut [O],
    (a, b): (Side<E>, Side<E>),
    pieces: &[Piece],
    (how, together): (Store, Together),
) {
    let words = pieces.last().map_or(0, |piece| piece.words.end);
    if words == 0 {
        if how == Store::Assign {
            out.fill(O::from_f32(0.0));
        }
        return;
    }
    let lengths: Vec<usize> = pieces.iter().map(|piece| piece.words.len()).collect();
    let n_terms: usize = pieces.iter().map(|piece| piece.terms.len()).sum();
    let (a_is_larger, a_len, n, cost) = (a.len >= b.len, a.len, b.len, a.len * b.len * n_terms / 64);
    let (large, small) = if a_is_larger { (a, b) } else { (b, a) };
    let mut packed = pool.take(small.n_panels() * small.width * words);
    let out = Shared::new(out);
    let (large_size, small_size) = (large.width * words, small.width * words);
    let to = Shared::new(&mut packed);
    let each = 4;
    for_tasks(small.n_panels().div_ceil(each), cost, |task| {
        let panels = task * each..((task + 1) * each).min(small.n_panels());
        // SAFETY: each panel is packed by one task.
        let to = unsafe { to.part(panels.start * small_size..panels.end * small_size) };
        pack(isa, to, small, panels, pieces);
    });
    let small_packed = &packed[..];
    // As many panels as the cache holds, but enough blocks that the threads end together.
    let fair = large.n_panels().div_ceil(4 * rayon::current_num_threads());
    let in_block = (BLOCK_WORDS / large_size).clamp(1, fair.max(1));
    for_tasks(large.n_panels().div_ceil(in_block), cost, |task| {
        let panels = task * in_block..((task + 1) * in_block).min(large.n_panels());
        let mut large_packed = pool.take(panels.len() * large_size);
        pack(isa, &mut large_packed, large, panels.clone(), pieces);
        for (j, streamed) in small_packed.chunks_exact(small_size).take(small.n_panels()).enumerate() {
            for (i, kept) in panels.clone().zip(large_packed.chunks_exact(large_size)) {
                let (row, column) = if a_is_larger { (i * MR, j * NR) } else { (j * MR, i * NR) };
                let (a, b) = if a_is_larger { (kept, streamed) } else { (streamed, kept) };
                let cut = ((a_len - row).min(MR), (n - column).min(NR));
                let (place, panels) = ((row * n + column, n), Panels { a, b, lengths: &lengths });
                match together {
                    Together::InTurn => tile_in_turn::<E, O>(isa, &out, place, cut, panels, how),
                    Together::InPairs => tile_in_pairs::<E, O>(isa, &out, place, cut, panels, how),
                }
            }
        }
    });
}

/// A tile of sums in registers or, while it waits, in the first-level cache.
type Sums<V> = [[V; 2]; MR];

/// The product of one piece of two panels.
#[inline(always)]
fn sum_of_piece<V: Vector, E: Element>(a: &[f32], b: &[f32]) -> Sums<V> {
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
    sums
}

#[inline(always)]
fn add_sums<V: Vector>(to: &mut Sums<V>, more: &Sums<V>) {
    for (to, more) in to.iter_mut().zip(more) {
        for (to, more) in to.iter_mut().zip(more) {
            *to = more.add(*to);
        }
    }
}

/// The sums to where they wait, a register at a time: as one move they would go through memory twice.
#[inline(always)]
fn keep_sums<V: Vector>(place: &mut MaybeUninit<Sums<V>>, sums: &Sums<V>) {
    let to = place.as_mut_ptr().cast::<f32>();
    for (i, sum) in sums.as_flattened().iter().enumerate() {
        // SAFETY: a place has the size of all sums, V::N floats each.
        unsafe { sum.store(to.add(i * V::N)) };
    }
}

/// The sums to their tile of out. The tile begins at `place.0` of out, whose rows have `place.1` elements; `cut` are the rows and
/// columns there are. No other task writes it.
#[inline(always)]
fn store_sums<V: Vector, O: Element>(out: &Shared<O>, place: (usize, usize), cut: (usize, usize), sums: &Sums<V>, how: Store) {
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

/// A tile of out, zeros past its cut. See `store_sums`.
#[inline(always)]
fn load_sums<V: Vector, O: Element>(out: &Shared<O>, place: (usize, usize), cut: (usize, usize)) -> Sums<V> {
    let mut sums = [[V::zero(); 2]; MR];
    for (i, sum) in sums.iter_mut().enumerate().take(cut.0) {
        let at = place.0 + i * place.1;
        // SAFETY: each tile is written by one task.
        let row = unsafe { out.part(at..at + cut.1) };
        for (half, sum) in sum.iter_mut().enumerate() {
            let n = cut.1.saturating_sub(V::N * half).min(V::N);
            if n > 0 {
                *sum = load::<V, O>(row, V::N * half, n);
            }
        }
    }
    sums
}

/// Two panels and the words of their pieces.
#[derive(Clone, Copy)]
struct Panels<'a> {
    a: &'a [f32],
    b: &'a [f32],
    lengths: &'a [usize],
}

impl<'a> Panels<'a> {
    /// Takes the next piece off: (of a, of b).
    #[inline(always)]
    fn next(&mut self, length: usize) -> (&'a [f32], &'a [f32]) {
        let ((a, rest_a), (b, rest_b)) = (self.a.split_at(length * MR), self.b.split_at(length * NR));
        (self.a, self.b) = (rest_a, rest_b);
        (a, b)
    }
}

kernel! {
    /// A tile of out = or += the pieces of two panels in turn. See `store_sums` for place and cut.
    fn tile_in_turn over V [E, O] (out: &Shared<O>, place: (usize, usize), cut: (usize, usize), panels: Panels, how: Store) {
        assert!(V::N == 16 && panels.a.len() / MR == panels.b.len() / NR);
        let mut left = panels;
        let (last, earlier) = panels.lengths.split_last().expect("a piece");
        if earlier.is_empty() || O::DTYPE.bytes() == 2 {
            let mut how = how;
            for length in panels.lengths {
                let (a, b) = left.next(*length);
                store_sums::<V, O>(out, place, cut, &sum_of_piece::<V, E>(a, b), how);
                how = Store::Accumulate;
            }
            return;
        }
        // The total is kept here: rows of out often lie a multiple of a page apart, where the first-level cache keeps few of them.
        let mut total = match how {
            Store::Assign => {
                let (a, b) = left.next(earlier[0]);
                sum_of_piece::<V, E>(a, b)
            }
            Store::Accumulate => load_sums::<V, O>(out, place, cut),
        };
        let first = usize::from(how == Store::Assign);
        for length in &earlier[first..] {
            let (a, b) = left.next(*length);
            add_sums(&mut total, &sum_of_piece::<V, E>(a, b));
        }
        let (a, b) = left.next(*last);
        add_sums(&mut total, &sum_of_piece::<V, E>(a, b));
        store_sums::<V, O>(out, place, cut, &total, Store::Assign);
    }
}

kernel! {
    /// A tile of out = or += the pieces of two panels in pairs.
    fn tile_in_pairs over V [E, O] (out: &Shared<O>, place: (usize, usize), cut: (usize, usize), panels: Panels, how: Store) {
        assert!(V::N == 16 && panels.a.len() / MR == panels.b.len() / NR && panels.lengths.len() <= MOST_IN_PAIRS);
        let mut left = panels;
        // Sums of 1, 2 and 4 pieces that wait for as many more: which ones wait is the binary number of the pieces done. They are
        // written before they are read, so clearing them for each tile would be for nothing.
        let mut waiting = [const { MaybeUninit::<Sums<V>>::uninit() }; N_WAITING];
        for (done, length) in panels.lengths.iter().enumerate() {
            let (a, b) = left.next(*length);
            let mut sums = sum_of_piece::<V, E>(a, b);
            let n_full = done.trailing_ones() as usize;
            for earlier in &waiting[..n_full] {
                // SAFETY: bit i of `done` is set, so place i was written when it became so, and read by nobody since.
                add_sums(&mut sums, unsafe { earlier.assume_init_ref() });
            }
            match waiting.get_mut(n_full).filter(|_| done + 1 < panels.lengths.len()) {
                Some(place) => keep_sums(place, &sums),
                None => store_sums::<V, O>(out, place, cut, &sums, how),
            }
        }
    }
}

/// Panels one after another: `to[panel][word][lane]` is word `word` of row `panel * width + lane`, zeros past the ends.
pub fn pack<E: Element>(isa: Isa, to: &mut [f32], side: Side<E>, panels: Range<usize>, pieces: &[Piece]) {
    let size = to.len() / panels.len();
    for piece in pieces.iter().filter(|piece| !piece.terms.is_empty()) {
        if !side.k_contiguous {
            pack_columns(isa, to, side, (panels.clone(), size), piece);
            continue;
        }
        for (panel, to) in panels.clone().zip(to.chunks_exact_mut(size)) {
            let to = &mut to[piece.words.start * side.width..piece.words.end * side.width];
            pack_rows(isa, to, side, panel * side.width, piece.terms.clone());
        }
    }
}

kernel! {
    /// Panels in which k is not contiguous. A row of the matrix at a time through all panels: it is read in the order it lies in.
    fn pack_columns over V [E] (to: &mut [f32], side: Side<E>, panels: (Range<usize>, usize), piece: &Piece) {
        let ((panels, size), width, is_pair) = (panels, side.width, E::DTYPE.bytes() == 2);
        let columns = panels.start * width..(panels.end * width).min(side.len);
        let terms = if is_pair { 2 } else { 1 };
        for (word, at) in piece.words.clone().enumerate() {
            let row = |k: usize| &side.data[k * side.len..][columns.clone()];
            let first = piece.terms.start + terms * word;
            let (low, high) = match is_pair {
                // Behind an odd number of terms stands a zero.
                true if first + 1 == piece.terms.end => (row(first), None),
                true => (row(first), Some(row(first + 1))),
                false => (row(first), None),
            };
            // Rows lie too far apart for the processor to see them coming.
            for k in (first + terms * AHEAD..first + terms * (AHEAD + 1)).filter(|k| *k < side.k) {
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
    fn pack_rows over V [E] (to: &mut [f32], side: Side<E>, first: usize, terms: Range<usize>) {
        let per_word = 4 / E::DTYPE.bytes();
        let n_rows = side.width.min(side.len - first);
        let words = terms.len().div_ceil(per_word);
        for lanes in (0..side.width).step_by(V::N) {
            let stored = (side.width - lanes).min(V::N);
            for at in (0..words).step_by(V::N) {
                let n_words = (words - at).min(V::N);
                let begin = terms.start + per_word * at;
                let n = (terms.end - begin).min(per_word * n_words);
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
