//! Tiles of products with packed weights: all rows of a panel of x with all lanes of a panel of W, in registers for all of k.

use super::{LANES, Order, Word};
use crate::device::cpu::lanes::{Isa, Vector, kernel, load, prefetch, prefetch_line, prefetch_once, store};
use crate::device::cpu::parallel::Shared;
use half::bf16;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Most rows of a tile that is two vectors wide, with 32 and with 16 registers.
const MOST_ROWS_WIDE: usize = 14;
const MOST_ROWS: usize = 6;
/// Least rows for which the words of W are fetched ahead: with fewer the processor's own fetching keeps up, but for one row of bytes, where
/// a line of W takes least work.
const LEAST_ROWS_AHEAD: usize = 4;
/// Bytes from a word of W that is multiplied to the one that is fetched, while W streams by.
const AHEAD: usize = 16 * 1024;
/// Sums of 1, 2 and 4 pieces that wait for as many more.
const N_WAITING: usize = 3;

/// Rows of x that a tile takes, of m > 0: as equal shares as the registers allow.
pub fn rows_of_tile(isa: Isa, m: usize) -> usize {
    let most = if isa >= Isa::Avx512 { MOST_ROWS_WIDE } else { MOST_ROWS };
    m.div_ceil(m.div_ceil(most))
}

/// Panels of W that a tile of the only row of x takes side by side. A chain of sums waits for its own last addition: a second panel hides
/// that for floats. Integers wait for less, and memory brings one panel after another faster than two at a time.
pub fn panels_of_tile(word: Word, m: usize) -> usize {
    if m == 1 && word != Word::Bytes { 2 } else { 1 }
}

/// Where sums go.
pub enum Out<'a> {
    /// As they are.
    Single(Shared<'a, f32>),
    /// Rounded.
    Half(Shared<'a, bf16>),
}

/// What integer sums are turned into numbers by.
#[derive(Clone, Copy)]
pub struct Scales<'a> {
    /// Of each output channel: [n].
    pub weight: &'a [f32],
    /// Of panels of rows, [panels][pieces][rows]: the scale.
    pub rows: &'a [f32],
    /// The same: what the sum of the piece begins with, a 32-bit integer.
    pub begin: &'a [f32],
}

/// A product.
pub struct Job<'a> {
    /// What a word is.
    pub word: Word,
    /// Panels of x, [words][rows], of so many rows each.
    pub x: &'a [f32],
    /// Rows of a panel of x.
    pub rows: usize,
    /// Panels of W, [words][LANES].
    pub weight: &'a [f32],
    /// How the words of a panel are summed.
    pub order: &'a Order,
    /// With bytes.
    pub scales: Option<Scales<'a>>,
    /// Rows and columns of out.
    pub size: (usize, usize),
    /// [m, n]
    pub out: Out<'a>,
}

/// Elements of a cache line.
const LINE: usize = 16;

/// R rows of x by P panels of W, two vectors of each.
type Sums<V, const R: usize, const P: usize> = [[[V; 2]; P]; R];

/// What a word is to a kernel: an f32, a pair of bf16 for dot products or to be taken apart, or four bytes.
const SINGLE: u8 = 0;
const PAIR: u8 = 1;
const APART: u8 = 2;
const BYTES: u8 = 3;

/// `sums` and the next `words` words of a panel of x with those of P panels of W; the pointers move on. With more than a few rows, or one
/// of bytes, the words `ahead` bytes further are fetched, unless that is 0.
/// SAFETY: behind `x` are words * R elements, behind each of `w` words * LANES less the lanes before it.
#[inline(always)]
unsafe fn chain<V: Vector, const WORD: u8, const R: usize, const P: usize>(
    mut sums: Sums<V, R, P>,
    x: &mut *const f32,
    w: &mut [*const f32; P],
    words: usize,
    ahead: usize,
) -> Sums<V, R, P> {
    let (mut row, mut panel) = (*x, *w);
    for _ in 0..words {
        // SAFETY: the caller's promise.
        unsafe {
            // All of W's vectors first: each term of x then needs a register for as long as it meets them.
            let (mut low, mut high) = ([[V::zero(); 2]; P], [[V::zero(); 2]; P]);
            for (p, w) in panel.iter_mut().enumerate() {
                if (R >= LEAST_ROWS_AHEAD || (R == 1 && WORD == BYTES)) && ahead > 0 {
                    for line in (0..2 * V::N).step_by(LINE) {
                        let at = w.wrapping_byte_add(ahead).wrapping_add(line);
                        if R == 1 { prefetch_once(at) } else { prefetch_line(at) }
                    }
                }
                for half in 0..2 {
                    let at = w.add(half * V::N);
                    (low[p][half], high[p][half]) = if WORD == APART { V::load_pairs_bf16(at.cast()) } else { (V::load(at), V::zero()) };
                }
                *w = w.add(LANES);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *row.add(r);
                let (first, second) = match WORD {
                    APART => (V::splat(f32::from_bits(x.to_bits() << 16)), V::splat(f32::from_bits(x.to_bits() & 0xffff_0000))),
                    _ => (V::splat(x), V::zero()),
                };
                for (p, sums) in sums.iter_mut().enumerate() {
                    for (half, sum) in sums.iter_mut().enumerate() {
                        *sum = match WORD {
                            SINGLE => first.fma(low[p][half], *sum),
                            PAIR => first.dot_pairs(low[p][half], *sum),
                            BYTES => low[p][half].dot_bytes(first, *sum),
                            _ => second.fma(high[p][half], first.fma(low[p][half], *sum)),
                        };
                    }
                }
            }
            row = row.add(R);
        }
    }
    (*x, *w) = (row, panel);
    sums
}

/// The sums to where they wait, a register at a time: as one move they would go through memory twice.
#[inline(always)]
fn keep<V: Vector, const R: usize, const P: usize>(place: &mut MaybeUninit<Sums<V, R, P>>, sums: &Sums<V, R, P>) {
    let to = place.as_mut_ptr().cast::<f32>();
    for (i, sum) in sums.as_flattened().as_flattened().iter().enumerate() {
        // SAFETY: a place has the size of all sums, V::N floats each.
        unsafe { sum.store(to.add(i * V::N)) };
    }
}

/// sums += those that wait. SAFETY: they were kept.
#[inline(always)]
unsafe fn add<V: Vector, const R: usize, const P: usize>(sums: &mut Sums<V, R, P>, kept: &MaybeUninit<Sums<V, R, P>>) {
    let from = kept.as_ptr().cast::<f32>();
    for (i, sum) in sums.as_flattened_mut().as_flattened_mut().iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *sum = sum.add(unsafe { V::load(from.add(i * V::N)) });
    }
}

/// What the sum of a piece begins with.
#[inline(always)]
fn begin<V: Vector, const WORD: u8, const R: usize, const P: usize>(job: &Job, (row_panel, piece): (usize, usize)) -> Sums<V, R, P> {
    let mut sums = [[[V::zero(); 2]; P]; R];
    if let (BYTES, Some(scales)) = (WORD, &job.scales) {
        let begin = &scales.begin[(row_panel * job.order.n_runs.len() + piece) * R..][..R];
        for (sums, begin) in sums.iter_mut().zip(begin) {
            *sums = [[V::splat(*begin); 2]; P];
        }
    }
    sums
}

/// The integer sums of a piece become numbers: times the scale of the channel, then that of the row.
#[inline(always)]
fn scale<V: Vector, const R: usize, const P: usize>(
    sums: &mut Sums<V, R, P>,
    (job, scales): (&Job, &Scales),
    (row_panel, piece): (usize, usize),
    first_lane: usize,
) {
    let rows = &scales.rows[(row_panel * job.order.n_runs.len() + piece) * R..][..R];
    for p in 0..P {
        for half in 0..2 {
            let first = first_lane + p * LANES + half * V::N;
            let there = job.size.1.saturating_sub(first).min(V::N);
            let of_lanes = if there == 0 { V::zero() } else { load::<V, f32>(scales.weight, first, there) };
            for (sums, of_row) in sums.iter_mut().zip(rows) {
                sums[p][half] = sums[p][half].integers_to_float().mul(of_lanes).mul(V::splat(*of_row));
            }
        }
    }
}

/// One tile: panel `row_panel` of x with P panels of W from `panel`, two vectors of lanes from `lane`; what is `ahead` is fetched.
#[inline(always)]
fn tile<V: Vector, const WORD: u8, const R: usize, const P: usize>(
    job: &Job,
    (row_panel, ahead): (usize, usize),
    (panel, lane): (usize, usize),
) {
    let (words, n_pieces) = (job.order.words(), job.order.n_runs.len());
    let mut x = job.x[row_panel * words * R..][..words * R].as_ptr();
    let mut w = [x; P];
    for (p, w) in w.iter_mut().enumerate() {
        *w = job.weight[(panel + p) * words * LANES..][..words * LANES].as_ptr().wrapping_add(lane);
    }
    // Which sums wait is the binary number of the pieces done.
    let mut waiting = [const { MaybeUninit::<Sums<V, R, P>>::uninit() }; N_WAITING];
    let mut runs = job.order.runs.iter();
    for (done, n_runs) in job.order.n_runs.iter().enumerate() {
        let words = runs.next().map_or(0, |run| run.words.len());
        // SAFETY: the runs of an order are its words, and that many are in each panel, lanes before `lane` left out.
        let mut sums = unsafe { chain::<V, WORD, R, P>(begin::<V, WORD, R, P>(job, (row_panel, done)), &mut x, &mut w, words, ahead) };
        for run in runs.by_ref().take(n_runs - 1) {
            let mut total = MaybeUninit::uninit();
            keep(&mut total, &sums);
            // SAFETY: as above; the total was just kept.
            unsafe {
                sums = chain::<V, WORD, R, P>([[[V::zero(); 2]; P]; R], &mut x, &mut w, run.words.len(), ahead);
                add(&mut sums, &total);
            }
        }
        if let (BYTES, Some(scales)) = (WORD, &job.scales) {
            scale(&mut sums, (job, scales), (row_panel, done), panel * LANES + lane);
        }
        let n_full = done.trailing_ones() as usize;
        for earlier in &waiting[..n_full] {
            // SAFETY: it was written when as many pieces were done as make it wait.
            unsafe { add(&mut sums, earlier) };
        }
        match waiting.get_mut(n_full).filter(|_| done + 1 < n_pieces) {
            Some(place) => keep(place, &sums),
            None => store_sums(job, (row_panel * R, panel * LANES + lane), &sums),
        }
    }
}

/// The sums of a tile to their places in out, from (row, column) on, as far as there are rows and columns.
#[inline(always)]
fn store_sums<V: Vector, const R: usize, const P: usize>(job: &Job, (row, column): (usize, usize), sums: &Sums<V, R, P>) {
    let (m, n) = job.size;
    for (i, sums) in sums.iter().enumerate().take(m - row) {
        for (p, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                let first = column + p * LANES + half * V::N;
                let there = n.saturating_sub(first).min(V::N);
                if there == 0 {
                    break;
                }
                let at = (row + i) * n + first;
                // SAFETY: each tile is written by one task.
                match &job.out {
                    Out::Single(out) => store(unsafe { out.part(at..at + there) }, 0, there, *sum),
                    Out::Half(out) => store(unsafe { out.part(at..at + there) }, 0, there, *sum),
                }
            }
        }
    }
}

/// Tiles of so many row panels leave the memory time to bring what comes after them.
const LEAST_ROW_PANELS: usize = 4;

/// All tiles of these panels of W.
///
/// Few panels of x pass by each panel of W in turn. The first of them fetches W a little ahead of itself; while the second meets W in
/// the cache, the next panel of W comes, so that memory does not wait for the products.
#[inline(always)]
fn rows_by_panels<V: Vector, const WORD: u8, const R: usize>(job: &Job, panels: Range<usize>) {
    let (size, n_row_panels) = (job.order.words() * LANES, job.size.0.div_ceil(R));
    if (2..LEAST_ROW_PANELS).contains(&n_row_panels) {
        for panel in panels {
            for row_panel in 0..n_row_panels {
                let ahead = [AHEAD, size * size_of::<f32>()].get(row_panel).copied().unwrap_or(0);
                for lane in (0..LANES).step_by(2 * V::N) {
                    tile::<V, WORD, R, 1>(job, (row_panel, ahead), (panel, lane));
                }
            }
        }
        return;
    }
    let ahead = if n_row_panels == 1 { AHEAD } else { 0 };
    // While the rows pass by, as many panels that come next are fetched, a share at each tile.
    let next = &job.weight[(panels.end * size).min(job.weight.len())..];
    let next = if n_row_panels < LEAST_ROW_PANELS { &[] } else { &next[..next.len().min(panels.len() * size)] };
    let (mut n_tiles, share) = (0, next.len().div_ceil(n_row_panels * panels.len().max(1)).next_multiple_of(16));
    for row_panel in 0..n_row_panels {
        let mut panel = panels.start;
        while panel < panels.end {
            let pair = R == 1 && WORD != BYTES && panel + 2 <= panels.end;
            prefetch(&next[(n_tiles * share).min(next.len())..((n_tiles + 1) * share).min(next.len())]);
            n_tiles += 1;
            for lane in (0..LANES).step_by(2 * V::N) {
                if pair {
                    tile::<V, WORD, R, 2>(job, (row_panel, ahead), (panel, lane));
                } else {
                    tile::<V, WORD, R, 1>(job, (row_panel, ahead), (panel, lane));
                }
            }
            panel += if pair { 2 } else { 1 };
        }
    }
}

/// The same for the number of rows that a panel of x has.
#[inline(always)]
fn any_rows<V: Vector, const WORD: u8>(job: &Job, panels: Range<usize>) {
    match job.rows {
        1 => rows_by_panels::<V, WORD, 1>(job, panels),
        2 => rows_by_panels::<V, WORD, 2>(job, panels),
        3 => rows_by_panels::<V, WORD, 3>(job, panels),
        4 => rows_by_panels::<V, WORD, 4>(job, panels),
        5 => rows_by_panels::<V, WORD, 5>(job, panels),
        6 => rows_by_panels::<V, WORD, 6>(job, panels),
        _ if V::REGISTERS < 32 => unreachable!("{} rows in a tile", job.rows),
        7 => rows_by_panels::<V, WORD, 7>(job, panels),
        8 => rows_by_panels::<V, WORD, 8>(job, panels),
        9 => rows_by_panels::<V, WORD, 9>(job, panels),
        10 => rows_by_panels::<V, WORD, 10>(job, panels),
        11 => rows_by_panels::<V, WORD, 11>(job, panels),
        12 => rows_by_panels::<V, WORD, 12>(job, panels),
        13 => rows_by_panels::<V, WORD, 13>(job, panels),
        14 => rows_by_panels::<V, WORD, 14>(job, panels),
        rows => unreachable!("{rows} rows in a tile"),
    }
}

kernel! {
    /// The columns of out of these panels of W.
    pub fn tiles over V [] (job: &Job, panels: Range<usize>) {
        match job.word {
            Word::Single => any_rows::<V, SINGLE>(job, panels),
            Word::Pair if V::DOTS_PAIRS => any_rows::<V, PAIR>(job, panels),
            Word::Pair => any_rows::<V, APART>(job, panels),
            Word::Bytes => any_rows::<V, BYTES>(job, panels),
        }
    }
}
