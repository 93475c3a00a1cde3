//! Causal attention, backward (FlashAttention, Dao et al. 2022, algorithm 4): tiles of up to 96 queries by 64 keys, scores
//! recomputed from the kept log-sum-exp.
//!
//! A task is one query head of one sequence; it writes dq and its own dk and dv, which a second pass sums over the query heads
//! of each group in order, so nothing depends on the threads. As in the forward pass rows lie in the lanes of the scores.

use super::attention::{KEYS, ROWS};
use super::elementwise;
use super::lanes::{Element, Isa, Vector, each, kernel, load, store};
use super::parallel::{Pool, Shared, for_rows, for_tasks};
use super::product::{Product, To, product};
use super::terms::{Strided, Terms, along_dims, along_rows, transpose};
use crate::device::Heads;
use half::bf16;
use std::ops::Range;

/// What the pass reads.
pub struct Inputs<'a, E> {
    /// [T, A*D]
    pub dout: &'a [E],
    /// [T, A*D]
    pub out: &'a [E],
    /// [A, T]
    pub lse: &'a [f32],
    /// [T, (A+2G)D]
    pub qkv: &'a [E],
    /// Starts of the sequences and the end.
    pub starts: &'a [usize],
    /// Heads.
    pub heads: Heads,
}

/// See `Device::attention_backward`.
pub fn attention_backward<E: Element>(isa: Isa, pool: &Pool, dqkv: &mut [E], inputs: &Inputs<E>) {
    let heads = inputs.heads;
    let (columns, padded, per_kv) = (heads.qkv_columns(), heads.dim.next_multiple_of(16), heads.queries_per_kv());
    let n_tokens = inputs.qkv.len() / columns;
    let n_sequences = inputs.starts.len() - 1;
    // dk and dv of every query head: [A, T, 2, padded].
    let mut partial = pool.take(heads.query * n_tokens * 2 * padded);
    let sums = Shared::new(&mut partial);
    let dqkv = Shared::new(dqkv);
    for_tasks(n_sequences * heads.query, inputs.qkv.len() * 8, |task| {
        let (sequence, head) = (task / heads.query, task % heads.query);
        let tokens = inputs.starts[sequence]..inputs.starts[sequence + 1];
        let at = head * n_tokens;
        // SAFETY: each (head, sequence) has its own rows.
        let dkv = unsafe { sums.part((at + tokens.start) * 2 * padded..(at + tokens.end) * 2 * padded) };
        dkv.fill(0.0);
        for rows in (0..tokens.len()).step_by(ROWS).map(|row| row..(row + ROWS).min(tokens.len())) {
            Block { isa, inputs, tokens: tokens.clone(), head, rows }.run(pool, &dqkv, dkv);
        }
    });
    for_rows(n_tokens, 2 * heads.kv * heads.dim * per_kv, |tokens| {
        let mut total = vec![0.0; heads.dim];
        for token in tokens {
            for group in 0..heads.kv {
                for which in 0..2 {
                    total.fill(0.0);
                    for head in group * per_kv..(group + 1) * per_kv {
                        let from = &partial[((head * n_tokens + token) * 2 + which) * padded..][..heads.dim];
                        elementwise::add(isa, &mut total, from);
                    }
                    let to = token * columns + heads.key_column(group) + which * heads.dim;
                    // SAFETY: these columns of this row are this task's.
                    elementwise::convert(isa, unsafe { dqkv.part(to..to + heads.dim) }, &total);
                }
            }
        }
    });
}

/// Up to 96 queries of one head of one sequence.
struct Block<'a, E> {
    isa: Isa,
    inputs: &'a Inputs<'a, E>,
    tokens: Range<usize>,
    head: usize,
    /// In the sequence.
    rows: Range<usize>,
}

impl<E: Element> Block<'_, E> {
    fn run(&self, pool: &Pool, dqkv: &Shared<E>, dkv: &mut [f32]) {
        let (isa, heads) = (self.isa, self.inputs.heads);
        let (d, lanes) = (heads.dim, self.rows.len().next_multiple_of(16));
        let (terms, padded) = (Terms::of::<E>(isa, d), d.next_multiple_of(16));
        let words = terms.words(d).next_multiple_of(16);
        let mut buffer = pool.take(5 * padded * ROWS + 4 * KEYS * ROWS + 3 * KEYS * padded + 3 * ROWS);
        let (queries_t, rest) = buffer.split_at_mut(padded * ROWS); // [d words, row]
        let (dout_t, rest) = rest.split_at_mut(padded * ROWS); // [d words, row]
        let (dqueries_t, rest) = rest.split_at_mut(padded * ROWS); // [d, row]
        let (queries, rest) = rest.split_at_mut(ROWS * padded); // [row words, d]
        let (dout, rest) = rest.split_at_mut(ROWS * padded); // [row words, d]
        let (scores, rest) = rest.split_at_mut(4 * KEYS * ROWS);
        let (keys, rest) = rest.split_at_mut(KEYS * padded); // [key, d words]
        let (values, rest) = rest.split_at_mut(KEYS * padded); // [key, d words]
        let (keys_by_row, rest) = rest.split_at_mut(KEYS * padded); // [key words, d]
        let mut rows = RowValues::over(rest);
        self.row_values(&mut rows);
        let inputs = (self.queries(), self.dout());
        for (from, by_dim, by_row) in [(inputs.0, &mut *queries_t, &mut *queries), (inputs.1, &mut *dout_t, &mut *dout)] {
            self.pack(terms, from, by_dim, by_row, dqueries_t);
        }
        dqueries_t.fill(0.0);
        let mut scores = Scores::over(scores, terms);
        let from = self.keys();
        for key in (0..self.rows.end).step_by(KEYS) {
            let n = KEYS.min(self.rows.end - key);
            let skipped = key.saturating_sub(self.rows.start) / 16 * 16;
            let used = lanes - skipped;
            for (i, (k, v)) in keys.chunks_exact_mut(words).zip(values.chunks_exact_mut(words)).enumerate().take(n) {
                along_dims(isa, terms, k, from.row(key + i, d));
                along_dims(isa, terms, v, &from.row(key + i, 2 * d)[d..]);
            }
            along_rows(isa, terms, keys_by_row, from, key..key + n, (d, padded));
            // [key, row] = a[key, d] b[d, row], rows from `skipped`
            let product_over_dims = |a: &[f32], b: &[f32], c: &mut [f32]| {
                let (a, b, c) = (a.as_ptr(), b[skipped..].as_ptr(), c[skipped..].as_mut_ptr());
                let (k, how) = (terms.words(d), To::Assign);
                let p = Product { terms, m: n, n: used, k, a, a_row: words, a_column: 1, b, b_row: ROWS, c, c_row: ROWS, how };
                // SAFETY: a has KEYS rows of `words`, b d words of ROWS, c KEYS rows of ROWS.
                unsafe { product(isa, &p) };
            };
            product_over_dims(keys, queries_t, scores.weights);
            product_over_dims(values, dout_t, scores.dscores);
            softmax_backward(isa, &mut scores, &rows, (key, n), skipped..lanes, 1.0 / (d as f32).sqrt());
            let (a, how) = (keys_by_row.as_ptr(), To::Accumulate);
            let (b, c) = (scores.dscores[skipped..].as_ptr(), dqueries_t[skipped..].as_mut_ptr());
            let k = terms.words(n);
            let p = Product { terms, m: d, n: used, k, a, a_row: 1, a_column: padded, b, b_row: ROWS, c, c_row: ROWS, how };
            // SAFETY: dq^T [d, row] += k^T [d, key] ds^T [key, row].
            unsafe { product(isa, &p) };
            // [key, d] += a[key, row] b[row, d]
            let skipped = terms.words(skipped);
            let mut product_over_rows = |a: &[f32], b: &[f32], which: usize| {
                let (a, b, c) = (a[skipped..].as_ptr(), b[skipped * padded..].as_ptr(), dkv[(2 * key + which) * padded..].as_mut_ptr());
                let (a_row, k, c_row) = (terms.words(ROWS), terms.words(used), 2 * padded);
                let p = Product { terms, m: n, n: padded, k, a, a_row, a_column: 1, b, b_row: padded, c, c_row, how };
                // SAFETY: a has KEYS rows of ROWS, b ROWS rows of `padded`, dkv n rows of [2, padded] from `key`.
                unsafe { product(isa, &p) };
            };
            product_over_rows(scores.dscores_by_key(), queries, 0);
            product_over_rows(scores.weights_by_key(), dout, 1);
        }
        let by_row = queries; // [row, d]
        transpose(isa, by_row, padded, dqueries_t, ROWS, (padded, lanes));
        for (row, dq) in self.rows.clone().zip(by_row.chunks_exact(padded)) {
            let at = (self.tokens.start + row) * heads.qkv_columns() + heads.query_column(self.head);
            // SAFETY: these columns of this row are this task's.
            elementwise::convert(isa, unsafe { dqkv.part(at..at + d) }, &dq[..d]);
        }
    }

    /// This head's queries, by rows of the sequence.
    fn queries(&self) -> Strided<'_, E> {
        let (columns, heads) = (self.inputs.heads.qkv_columns(), self.inputs.heads);
        Strided { data: self.inputs.qkv, first: self.tokens.start * columns + heads.query_column(self.head), stride: columns }
    }

    /// This head's gradients of the output.
    fn dout(&self) -> Strided<'_, E> {
        let heads = self.inputs.heads;
        let stride = heads.query * heads.dim;
        Strided { data: self.inputs.dout, first: self.tokens.start * stride + self.head * heads.dim, stride }
    }

    /// The keys of its group, each with its value behind it.
    fn keys(&self) -> Strided<'_, E> {
        let (columns, heads) = (self.inputs.heads.qkv_columns(), self.inputs.heads);
        let group = self.head / heads.queries_per_kv();
        Strided { data: self.inputs.qkv, first: self.tokens.start * columns + heads.key_column(group), stride: columns }
    }

    /// The block's rows of `from` for sums over dims, by_dim[d words, row], and over rows, by_row[row words, d]; zeros past
    /// the last row. `spare` has room for [row, d words].
    fn pack(&self, terms: Terms, from: Strided<E>, by_dim: &mut [f32], by_row: &mut [f32], spare: &mut [f32]) {
        let (d, lanes) = (self.inputs.heads.dim, self.rows.len().next_multiple_of(16));
        let (padded, words) = (d.next_multiple_of(16), terms.words(d).next_multiple_of(16));
        spare[..lanes * words].fill(0.0);
        for (row, to) in self.rows.clone().zip(spare.chunks_exact_mut(words)) {
            along_dims(self.isa, terms, to, from.row(row, d));
        }
        transpose(self.isa, by_dim, ROWS, spare, words, (lanes, words));
        by_row.fill(0.0);
        along_rows(self.isa, terms, by_row, from, self.rows.clone(), (d, padded));
    }

    /// lse, delta = dout . out, and keys seen; zeros past the last row.
    fn row_values(&self, rows: &mut RowValues) {
        let (inputs, heads) = (self.inputs, self.inputs.heads);
        let n_tokens = inputs.lse.len() / heads.query;
        rows.visible.fill(0.0);
        rows.lse.fill(0.0);
        rows.delta.fill(0.0);
        for (lane, row) in self.rows.clone().enumerate() {
            let token = self.tokens.start + row;
            let at = (token * heads.query + self.head) * heads.dim;
            rows.visible[lane] = (row + 1) as f32;
            rows.lse[lane] = inputs.lse[self.head * n_tokens + token];
            rows.delta[lane] = dot(self.isa, &inputs.dout[at..][..heads.dim], &inputs.out[at..][..heads.dim]);
        }
    }
}

kernel! {
    /// x . y
    fn dot over V [E] (x: &[E], y: &[E]) -> f32 {
        let mut sum = V::zero();
        each!(V, x.len(), |i, n| { sum = load::<V, E>(x, i, n).fma(load::<V, E>(y, i, n), sum) });
        sum.sum()
    }
}

/// Scores of a tile [key, row] and their gradients, as the products before the softmax leave them and those behind it need them.
struct Scores<'a> {
    terms: Terms,
    /// Scores.
    weights: &'a mut [f32],
    /// Gradients of weights; then of scores, [key words, row].
    dscores: &'a mut [f32],
    /// Weights, then gradients of scores, [key, row words], if those are pairs: else the above are that already.
    pairs: &'a mut [f32],
}

impl<'a> Scores<'a> {
    fn over(buffer: &'a mut [f32], terms: Terms) -> Self {
        let (weights, rest) = buffer.split_at_mut(KEYS * ROWS);
        let (dscores, pairs) = rest.split_at_mut(KEYS * ROWS);
        Scores { terms, weights, dscores, pairs }
    }

    /// Weights [key, row words].
    fn weights_by_key(&self) -> &[f32] {
        match self.terms {
            Terms::Single => self.weights,
            Terms::Pairs => &self.pairs[..KEYS * ROWS / 2],
        }
    }

    /// Gradients of scores [key, row words].
    fn dscores_by_key(&self) -> &[f32] {
        match self.terms {
            Terms::Single => self.dscores,
            Terms::Pairs => &self.pairs[KEYS * ROWS / 2..],
        }
    }
}

/// One value a row.
struct RowValues<'a> {
    visible: &'a mut [f32],
    lse: &'a mut [f32],
    delta: &'a mut [f32],
}

impl<'a> RowValues<'a> {
    fn over(buffer: &'a mut [f32]) -> Self {
        let (visible, rest) = buffer.split_at_mut(ROWS);
        let (lse, delta) = rest.split_at_mut(ROWS);
        RowValues { visible, lse, delta: &mut delta[..ROWS] }
    }
}

kernel! {
    /// Scores become weights p = exp(scale score - lse), masked; gradients of weights become those of scores, p (dp - delta) scale.
    fn softmax_backward over V [] (
        scores: &mut Scores, rows: &RowValues, keys: (usize, usize), lanes: Range<usize>, scale: f32
    ) {
        let (first, n) = keys;
        for at in lanes.step_by(V::N) {
            match scores.terms {
                Terms::Single => {
                    for key in 0..n {
                        let (p, ds) = weight_and_gradient::<V>(scores, rows, (first, key), at, scale);
                        store(scores.weights, key * ROWS + at, V::N, p);
                        store(scores.dscores, key * ROWS + at, V::N, ds);
                    }
                }
                Terms::Pairs => {
                    for key in (0..n).step_by(2) {
                        let low = weight_and_gradient::<V>(scores, rows, (first, key), at, scale);
                        let high = match key + 1 < n {
                            true => weight_and_gradient::<V>(scores, rows, (first, key + 1), at, scale),
                            false => (V::zero(), V::zero()),
                        };
                        store(scores.dscores, key / 2 * ROWS + at, V::N, low.1.pack_pairs(high.1));
                        let by_key = bytemuck::cast_slice_mut::<f32, bf16>(scores.pairs);
                        for (key, (p, ds)) in [(key, low), (key + 1, high)] {
                            store(by_key, key * ROWS + at, V::N, p);
                            store(by_key, (KEYS + key) * ROWS + at, V::N, ds);
                        }
                    }
                }
            }
        }
    }
}

/// p and ds of key `first + key` for the rows in lanes from `at`.
#[inline(always)]
fn weight_and_gradient<V: Vector>(scores: &Scores, rows: &RowValues, (first, key): (usize, usize), at: usize, scale: f32) -> (V, V) {
    let (visible, scale) = (load::<V, f32>(rows.visible, at, V::N), V::splat(scale));
    let minus_lse = V::zero().sub(load::<V, f32>(rows.lse, at, V::N));
    let p = load::<V, f32>(scores.weights, key * ROWS + at, V::N).fma(scale, minus_lse).exp();
    let p = V::splat((first + key) as f32).where_below(visible, p, V::zero());
    let dp = load::<V, f32>(scores.dscores, key * ROWS + at, V::N);
    (p, p.mul(dp.sub(load::<V, f32>(rows.delta, at, V::N))).mul(scale))
}
