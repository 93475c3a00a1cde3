//! Causal attention, forward: tiles of up to 96 queries by 64 keys with an online softmax (Milakov and Gimelshein 2018;
//! FlashAttention, Dao et al. 2022).
//!
//! A task is one kv head and up to 96 rows, a row being a (token, query head of the group) in token order. Everything is kept
//! transposed, rows in the vector lanes: scores^T[key, row] = K Q^T and out^T[dim, row] += V^T P^T need keys and values only one
//! element at a time, as they lie, and the softmax runs down the keys without crossing lanes. Over a cache: `attention_cached`.

use super::lanes::{Element, Isa, kernel, load, store};
use super::parallel::{Pool, Shared, for_tasks};
use super::product::{Product, To, product};
use super::terms::{Strided, Terms, along_dims, along_rows, convert_scaled, transpose};
use crate::device::Heads;
use std::ops::Range;

/// Most rows of a task.
pub const ROWS: usize = 96;
/// Keys of a tile.
pub const KEYS: usize = 64;

/// One kv head's keys and values and the rows that attend to them. Row r of the group is query head r % per_kv of token r / per_kv,
/// which sees the keys up to its own.
struct Group<'a, E> {
    keys: Strided<'a, E>,
    values: Strided<'a, E>,
    /// The packed rows.
    qkv: &'a [E],
    first_token: usize,
    group: usize,
    heads: Heads,
}

impl<E: Element> Group<'_, E> {
    fn per_kv(&self) -> usize {
        self.heads.queries_per_kv()
    }

    /// Keys that a row sees.
    fn visible(&self, row: usize) -> usize {
        row / self.per_kv() + 1
    }

    fn token(&self, row: usize) -> usize {
        self.first_token + row / self.per_kv()
    }

    fn head(&self, row: usize) -> usize {
        self.group * self.per_kv() + row % self.per_kv()
    }

    fn query(&self, row: usize) -> &[E] {
        &self.qkv[self.token(row) * self.heads.qkv_columns() + self.heads.query_column(self.head(row))..][..self.heads.dim]
    }

    /// Where a row's result starts in out[T, A*D].
    fn out_at(&self, row: usize) -> usize {
        (self.token(row) * self.heads.query + self.head(row)) * self.heads.dim
    }
}

/// out and, when kept, lse[A, T].
struct Outputs<'a, E> {
    out: Shared<'a, E>,
    lse: Option<(Shared<'a, f32>, usize)>,
}

/// See `Device::attention_from`; `sequences` are its starts, the first rows that are wanted of each, and the heads. Blocks without a wanted
/// row are left out, the others are those of `attention`.
pub fn attention<E: Element>(isa: Isa, pool: &Pool, out: &mut [E], lse: &mut [f32], qkv: &[E], sequences: (&[usize], &[usize], Heads)) {
    let (starts, wanted, heads) = sequences;
    let (columns, per_kv) = (heads.qkv_columns(), heads.queries_per_kv());
    let n_tokens = qkv.len() / columns;
    let outputs = Outputs { out: Shared::new(out), lse: Some((Shared::new(lse), n_tokens)) };
    let mut tasks: Vec<(Range<usize>, usize, Range<usize>)> = Vec::new();
    for (ends, first) in starts.windows(2).zip(wanted) {
        let rows = (ends[1] - ends[0]) * per_kv;
        // The longest first, so that the threads end together.
        for block in (first * per_kv / ROWS..rows.div_ceil(ROWS)).rev() {
            tasks.extend((0..heads.kv).map(|group| (ends[0]..ends[1], group, block * ROWS..((block + 1) * ROWS).min(rows))));
        }
    }
    let cost = qkv.len() * 8;
    for_tasks(tasks.len(), cost, |task| {
        let (tokens, group, rows) = tasks[task].clone();
        let at = |column: usize| Strided { data: qkv, first: tokens.start * columns + column, stride: columns };
        let (keys, values) = (at(heads.key_column(group)), at(heads.value_column(group)));
        let group = Group { keys, values, qkv, first_token: tokens.start, group, heads };
        block(isa, pool, &outputs, &group, rows);
    });
}

/// Up to 96 rows against all the keys they see.
fn block<E: Element>(isa: Isa, pool: &Pool, outputs: &Outputs<E>, group: &Group<E>, rows: Range<usize>) {
    let (d, padded) = (group.heads.dim, group.heads.dim.next_multiple_of(16));
    let terms = Terms::of::<E>(isa, d);
    let words = terms.words(d).next_multiple_of(16);
    let mut buffer = pool.take((words + padded) * ROWS + ROWS * padded + KEYS * (ROWS + padded) + 3 * ROWS);
    let (queries, rest) = buffer.split_at_mut(words * ROWS); // [d words, row]
    let (sums, rest) = rest.split_at_mut(padded * ROWS); // [d, row]
    let (by_row, rest) = rest.split_at_mut(ROWS * padded); // [row, d]
    let (scores, rest) = rest.split_at_mut(KEYS * ROWS); // [key, row], then weights [key words, row]
    let (tile, rest) = rest.split_at_mut(KEYS * padded); // [key, d words] or [key words, d]
    let mut softmax = Softmax::over(rest, 1.0 / (d as f32).sqrt());
    let lanes = rows.len().next_multiple_of(16);
    by_row[..lanes * words].fill(0.0);
    for lane in 0..lanes {
        // Lanes past the end see what the last row sees, with zeros for a query.
        let row = (rows.start + lane).min(rows.end - 1);
        if lane < rows.len() {
            along_dims(isa, terms, &mut by_row[lane * words..], group.query(row));
        }
        softmax.visible[lane] = group.visible(row) as f32;
    }
    transpose(isa, queries, ROWS, by_row, words, (lanes, words));
    sums.fill(0.0);
    softmax.max.fill(f32::NEG_INFINITY);
    softmax.sum.fill(0.0);
    let n_keys = group.visible(rows.end - 1);
    for first in (0..n_keys).step_by(KEYS) {
        let n = KEYS.min(n_keys - first);
        // Rows that see none of this tile come first; whole vectors of them are left out.
        let skipped = softmax.visible[..lanes].iter().take_while(|seen| **seen <= first as f32).count() / 16 * 16;
        for (key, to) in (first..first + n).zip(tile.chunks_exact_mut(words)) {
            along_dims(isa, terms, to, group.keys.row(key, d));
        }
        let scored = Product {
            terms,
            m: n,
            n: lanes - skipped,
            k: terms.words(d),
            a: tile.as_ptr(),
            a_row: words,
            a_column: 1,
            b: queries[skipped..].as_ptr(),
            b_row: ROWS,
            c: scores[skipped..].as_mut_ptr(),
            c_row: ROWS,
            how: To::Assign,
        };
        // SAFETY: n <= KEYS keys of d in the tile, lanes from `skipped` in rows of ROWS.
        unsafe { product(isa, &scored) };
        online_softmax(isa, terms, scores, sums, &mut softmax, (first, n), skipped..lanes);
        along_rows(isa, terms, tile, group.values, first..first + n, (d, padded));
        let weighted = Product {
            m: d,
            k: terms.words(n),
            a_row: 1,
            a_column: padded,
            b: scores[skipped..].as_ptr(),
            c: sums[skipped..].as_mut_ptr(),
            how: To::Accumulate,
            ..scored
        };
        // SAFETY: as above, with sums [d, ROWS].
        unsafe { product(isa, &weighted) };
    }
    transpose(isa, by_row, padded, sums, ROWS, (padded, lanes));
    for (lane, row) in rows.enumerate() {
        // SAFETY: each row belongs to one task.
        let out = unsafe { outputs.out.part(group.out_at(row)..group.out_at(row) + d) };
        convert_scaled(isa, out, &by_row[lane * padded..][..d], 1.0 / softmax.sum[lane]);
        if let Some((lse, n_tokens)) = &outputs.lse {
            let at = group.head(row) * n_tokens + group.token(row);
            // SAFETY: as above.
            let to = unsafe { lse.part(at..at + 1) };
            to[0] = softmax.max[lane] + softmax.sum[lane].ln();
        }
    }
}

/// Running values of the online softmax, one a row.
struct Softmax<'a> {
    /// Keys seen, as f32.
    visible: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Scores are multiplied by this.
    scale: f32,
}

impl<'a> Softmax<'a> {
    fn over(buffer: &'a mut [f32], scale: f32) -> Self {
        let (visible, rest) = buffer.split_at_mut(ROWS);
        let (max, rest) = rest.split_at_mut(ROWS);
        Softmax { visible, max, sum: &mut rest[..ROWS], scale }
    }
}

kernel! {
    /// scores[key, row] of n keys from `first` become weights exp(scale score - max), masked, [key words, row]; max and sum move
    /// on; earlier sums[d, row] are scaled.
    fn online_softmax over V [] (
        terms: Terms, scores: &mut [f32], sums: &mut [f32], softmax: &mut Softmax, keys: (usize, usize), lanes: Range<usize>
    ) {
        let (first, n) = keys;
        let scale = V::splat(softmax.scale);
        for at in lanes.step_by(V::N) {
            let visible = load::<V, f32>(softmax.visible, at, V::N);
            // Rows are in token order: if the first sees the whole tile, all do.
            if softmax.visible[at] < (first + n) as f32 {
                for key in 0..n {
                    let score = load::<V, f32>(scores, key * ROWS + at, V::N);
                    let seen = V::splat((first + key) as f32).where_below(visible, score, V::splat(f32::NEG_INFINITY));
                    store(scores, key * ROWS + at, V::N, seen);
                }
            }
            let old = load::<V, f32>(softmax.max, at, V::N);
            let mut max = V::splat(f32::NEG_INFINITY);
            for key in 0..n {
                max = load::<V, f32>(scores, key * ROWS + at, V::N).max(max);
            }
            let max = max.mul(scale).max(old);
            let minus_max = V::zero().sub(max);
            let keep = old.sub(max).exp();
            let mut sum = load::<V, f32>(softmax.sum, at, V::N).mul(keep);
            match terms {
                Terms::Single => {
                    for key in 0..n {
                        let p = load::<V, f32>(scores, key * ROWS + at, V::N).fma(scale, minus_max).exp();
                        sum = sum.add(p);
                        store(scores, key * ROWS + at, V::N, p);
                    }
                }
                Terms::Pairs => {
                    for pair in 0..n / 2 {
                        let low = load::<V, f32>(scores, 2 * pair * ROWS + at, V::N).fma(scale, minus_max).exp();
                        let high = load::<V, f32>(scores, (2 * pair + 1) * ROWS + at, V::N).fma(scale, minus_max).exp();
                        sum = sum.add(low.add(high));
                        store(scores, pair * ROWS + at, V::N, low.pack_pairs(high));
                    }
                    if n % 2 == 1 {
                        let p = load::<V, f32>(scores, (n - 1) * ROWS + at, V::N).fma(scale, minus_max).exp();
                        sum = sum.add(p);
                        store(scores, n / 2 * ROWS + at, V::N, p.pack_pairs(V::zero()));
                    }
                }
            }
            store(softmax.max, at, V::N, max);
            store(softmax.sum, at, V::N, sum);
            if keep.lanes()[..V::N].iter().any(|keep| *keep != 1.0) {
                for sums in sums.chunks_exact_mut(ROWS) {
                    let scaled = load::<V, f32>(sums, at, V::N).mul(keep);
                    store(sums, at, V::N, scaled);
                }
            }
        }
    }
}
