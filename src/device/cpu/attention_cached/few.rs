//! Scores and sums of values for rows so few that packing a page takes longer than the products with it: keys are transposed in registers
//! and values paired there, and meet all rows at once. Each sum is the chain of additions that `product` makes of a packed page, with the
//! same bits. Some keys at a time pass by all kv heads, so that a page is read in the order in which it lies.

use super::SCORES;
use crate::device::cpu::lanes::{Element, Vector, kernel, load, prefetch_line, store};
use crate::device::cpu::terms::Terms;

/// Most rows that go this way.
pub const MOST_ROWS: usize = 8;
/// What head dims that go this way are a multiple of.
pub const DIMS: usize = 32;

/// Keys that pass by all kv heads at a time.
const KEYS: usize = 16;

/// A page of keys or values for some kv heads, one behind the other.
#[derive(Clone, Copy)]
pub struct Page<'a, E> {
    /// Rows of `width`.
    pub rows: &'a [E],
    /// Pages that are read next, or nothing.
    pub ahead: [&'a [E]; 2],
    /// Of all kv heads.
    pub width: usize,
    /// Where the first head's d elements of a row begin.
    pub column: usize,
    /// Head dim.
    pub d: usize,
    /// Keys that count, from the first.
    pub n: usize,
    /// kv heads.
    pub n_groups: usize,
    /// From the first row of queries, scores or sums of a kv head to that of the next, in rows.
    pub of_group: usize,
}

impl<'a, E: Element> Page<'a, E> {
    #[inline(always)]
    fn row(&self, group: usize, key: usize) -> &'a [E] {
        &self.rows[key * self.width + self.column + group * self.d..][..self.d]
    }

    /// Has the cache line from element i of this head's part of a row of the next pages fetched.
    #[inline(always)]
    fn fetch_at(&self, group: usize, key: usize, i: usize) {
        let at = key * self.width + self.column + group * self.d + i;
        for ahead in self.ahead {
            if at < ahead.len() {
                prefetch_line(ahead.as_ptr().wrapping_add(at));
            }
        }
    }

    /// Has this head's part of n rows of the next pages fetched.
    #[inline(always)]
    fn fetch(&self, group: usize, first: usize, n: usize) {
        for key in first..first + n {
            let mut line = 0;
            while line < self.d {
                self.fetch_at(group, key, line);
                line += 64 / size_of::<E>();
            }
        }
    }
}

/// N words of a row from `word` on, or as many as there are: each an element, or a pair of them.
#[inline(always)]
fn words_of<V: Vector, E: Element, const PAIRS: bool>(row: &[E], word: usize, n: usize) -> V {
    if PAIRS { load::<V, f32>(bytemuck::cast_slice(row), word, n) } else { load::<V, E>(row, word, n) }
}

#[inline(always)]
fn add_products<V: Vector, const PAIRS: bool>(x: V, y: V, sum: V) -> V {
    if PAIRS { x.dot_pairs(y, sum) } else { x.fma(y, sum) }
}

/// `scores` for up to M rows; those past the m-th are the m-th again, and go nowhere.
#[inline(always)]
fn scores_of<V: Vector, E: Element, const M: usize, const PAIRS: bool>(to: &mut [f32], queries: &[f32], page: Page<E>, m: usize) {
    let words = if PAIRS { page.d / 2 } else { page.d };
    assert!((1..=M).contains(&m) && queries.len() >= ((page.n_groups - 1) * page.of_group + m) * words && words % V::N == 0);
    for (first, group) in (0..page.n).step_by(V::N).flat_map(|first| (0..page.n_groups).map(move |group| (first, group))) {
        let mut sums = [V::zero(); M];
        for word in (0..words).step_by(V::N) {
            let mut tile = [V::zero(); 16];
            if first + V::N <= page.n {
                for (i, row) in tile.iter_mut().enumerate().take(V::N) {
                    // One line for each that is read: many at once would be in the way of what is read now.
                    page.fetch_at(group, first + i, if PAIRS { 2 * word } else { word });
                    *row = words_of::<V, E, PAIRS>(page.row(group, first + i), word, V::N);
                }
            } else {
                for (row, key) in tile.iter_mut().zip(first..page.n) {
                    page.fetch_at(group, key, if PAIRS { 2 * word } else { word });
                    *row = words_of::<V, E, PAIRS>(page.row(group, key), word, V::N);
                }
            }
            V::transpose(&mut tile);
            for (i, keys) in tile.iter().enumerate().take(V::N) {
                for (r, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: a group < n_groups, a row < m and a word < words, and so many there are (asserted).
                    let query = unsafe { *queries.get_unchecked((group * page.of_group + r.min(m - 1)) * words + word + i) };
                    *sum = add_products::<V, PAIRS>(V::splat(query), *keys, *sum);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate().take(m) {
            store(to, (group * page.of_group + r) * SCORES + first, V::N, *sum);
        }
    }
}

/// `values` for up to M rows, NV vectors of columns at a time.
#[inline(always)]
fn values_of<V: Vector, E: Element, const M: usize, const NV: usize, const PAIRS: bool>(
    to: &mut [f32],
    weights: &[f32],
    page: Page<E>,
    m: usize,
) {
    let (d, of_word) = (page.d, if PAIRS { 2 } else { 1 });
    let words = page.n.div_ceil(of_word);
    assert!((1..=M).contains(&m) && weights.len() >= ((page.n_groups - 1) * page.of_group + m - 1) * SCORES + words);
    for (first, group) in (0..page.n).step_by(KEYS).flat_map(|first| (0..page.n_groups).map(move |group| (first, group))) {
        let (first_word, end) = (first / of_word, (first + KEYS).min(page.n).div_ceil(of_word));
        let row_of = |r: usize| group * page.of_group + r.min(m - 1);
        for column in (0..d).step_by(NV * V::N) {
            let mut sums = [[V::zero(); NV]; M];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = load::<V, f32>(to, row_of(r) * d + column + v * V::N, V::N);
                }
            }
            for word in first_word..end {
                let mut values = [V::zero(); NV];
                if PAIRS {
                    let low = page.row(group, 2 * word);
                    let high = if 2 * word + 1 < page.n { page.row(group, 2 * word + 1) } else { &[] };
                    for v in (0..NV).step_by(2) {
                        let at = column / 2 + v / 2 * V::N;
                        let low = words_of::<V, E, PAIRS>(low, at, V::N);
                        let high = if high.is_empty() { V::zero() } else { words_of::<V, E, PAIRS>(high, at, V::N) };
                        (values[v], values[v + 1]) = low.zip_halves(high);
                    }
                } else {
                    for (v, values) in values.iter_mut().enumerate() {
                        *values = load::<V, E>(page.row(group, word), column + v * V::N, V::N);
                    }
                }
                if column == 0 {
                    page.fetch(group, of_word * word, of_word);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: a group < n_groups, a row < m and a word < words, and so many there are (asserted).
                    let weight = V::splat(unsafe { *weights.get_unchecked(row_of(r) * SCORES + word) });
                    for (sum, values) in sums.iter_mut().zip(&values) {
                        *sum = add_products::<V, PAIRS>(weight, *values, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate().take(m) {
                for (v, sum) in sums.iter().enumerate() {
                    store(to, row_of(r) * d + column + v * V::N, V::N, *sum);
                }
            }
        }
    }
}

/// As many columns at a time as the registers hold.
#[inline(always)]
fn values_by_columns<V: Vector, E: Element, const M: usize, const PAIRS: bool>(to: &mut [f32], weights: &[f32], page: Page<E>, m: usize) {
    if M <= 4 && V::REGISTERS == 32 && page.d % (4 * V::N) == 0 {
        values_of::<V, E, M, 4, PAIRS>(to, weights, page, m);
    } else {
        values_of::<V, E, M, 2, PAIRS>(to, weights, page, m);
    }
}

kernel! {
    /// to[row, SCORES] = queries[row, words of d] with each of the page's n keys, for the first m rows of each kv head.
    pub fn scores over V [E] (terms: Terms, to: &mut [f32], queries: &[f32], page: Page<E>, m: usize) {
        match (terms, m) {
            (Terms::Pairs, _) if !V::DOTS_PAIRS => unreachable!("pairs without their dot products"),
            (Terms::Pairs, 1) => scores_of::<V, E, 1, true>(to, queries, page, m),
            (Terms::Pairs, 2..=3) => scores_of::<V, E, 3, true>(to, queries, page, m),
            (Terms::Pairs, 4) => scores_of::<V, E, 4, true>(to, queries, page, m),
            (Terms::Pairs, _) => scores_of::<V, E, MOST_ROWS, true>(to, queries, page, m),
            (Terms::Single, 1) => scores_of::<V, E, 1, false>(to, queries, page, m),
            (Terms::Single, 2..=3) => scores_of::<V, E, 3, false>(to, queries, page, m),
            (Terms::Single, 4) => scores_of::<V, E, 4, false>(to, queries, page, m),
            (Terms::Single, _) => scores_of::<V, E, MOST_ROWS, false>(to, queries, page, m),
        }
    }
}

kernel! {
    /// to[row, d] += weights[row, SCORES], words of keys, with the page's n values, for the first m rows of each kv head.
    pub fn values over V [E] (terms: Terms, to: &mut [f32], weights: &[f32], page: Page<E>, m: usize) {
        match (terms, m) {
            (Terms::Pairs, _) if !V::DOTS_PAIRS => unreachable!("pairs without their dot products"),
            (Terms::Pairs, 1) => values_by_columns::<V, E, 1, true>(to, weights, page, m),
            (Terms::Pairs, 2..=3) => values_by_columns::<V, E, 3, true>(to, weights, page, m),
            (Terms::Pairs, 4) => values_by_columns::<V, E, 4, true>(to, weights, page, m),
            (Terms::Pairs, _) => values_by_columns::<V, E, MOST_ROWS, true>(to, weights, page, m),
            (Terms::Single, 1) => values_by_columns::<V, E, 1, false>(to, weights, page, m),
            (Terms::Single, 2..=3) => values_by_columns::<V, E, 3, false>(to, weights, page, m),
            (Terms::Single, 4) => values_by_columns::<V, E, 4, false>(to, weights, page, m),
            (Terms::Single, _) => values_by_columns::<V, E, MOST_ROWS, false>(to, weights, page, m),
        }
    }
}
