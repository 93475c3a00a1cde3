//! Causal attention, backward (FlashAttention, Dao et al. 2022, algorithm 4): tiles of up to 96 queries by 64 keys, scores
//! recomputed from the kept log-sum-exp.
//!
//! A task is one query head of one sequence; it writes dq and its own dk and dv, which a second pass sums over the query heads
//! of each group in order, so nothing depends on the threads. As in the forward pass rows lie in the lanes of the scores.

use super::attention::{KEYS, ROWS, Strided, widen};
use super::elementwise;
use super::lanes::{Element, Isa, kernel, load, store};
use super::parallel::{Pool, Shared, for_rows, for_tasks};
use super::product::{Product, product};
use crate::device::{Heads, Store};
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
        let (d, padded, lanes) = (heads.dim, heads.dim.next_multiple_of(16), self.rows.len().next_multiple_of(16));
        let mut buffer = pool.take(3 * d * ROWS + 2 * ROWS * padded + 2 * KEYS * ROWS + 2 * KEYS * padded + 3 * ROWS);
        let (queries_t, rest) = buffer.split_at_mut(d * ROWS); // [d, row], scaled
        let (dout_t, rest) = rest.split_at_mut(d * ROWS); // [d, row]
        let (dqueries_t, rest) = rest.split_at_mut(d * ROWS); // [d, row]
        let (queries, rest) = rest.split_at_mut(ROWS * padded); // [row, d]
        let (dout, rest) = rest.split_at_mut(ROWS * padded); // [row, d]
        let (weights, rest) = rest.split_at_mut(KEYS * ROWS); // [key, row]
        let (dscores, rest) = rest.split_at_mut(KEYS * ROWS); // [key, row]
        let (keys, rest) = rest.split_at_mut(KEYS * padded); // [key, d]
        let (values, rest) = rest.split_at_mut(KEYS * padded); // [key, d]
        let mut rows = RowValues::over(rest);
        self.gather(queries, dout, &mut rows);
        transpose(queries_t, queries, (lanes, d, padded), 1.0 / (d as f32).sqrt());
        transpose(dout_t, dout, (lanes, d, padded), 1.0);
        dqueries_t.fill(0.0);
        let columns = heads.qkv_columns();
        let group = self.head / heads.queries_per_kv();
        let first = self.tokens.start * columns + heads.key_column(group);
        let from = Strided { data: self.inputs.qkv, first, stride: columns };
        for key in (0..self.rows.end).step_by(KEYS) {
            let n = KEYS.min(self.rows.end - key);
            let skipped = key.saturating_sub(self.rows.start) / 16 * 16;
            let used = lanes - skipped;
            widen(isa, keys, from, key..key + n, d);
            widen(isa, values, Strided { first: first + d, ..from }, key..key + n, d);
            // [key, row] = a[key, d] b[d, row], rows from `skipped`
            let scores = |a: &[f32], b: &[f32], c: &mut [f32]| {
                let (b, c) = (b[skipped..].as_ptr(), c[skipped..].as_mut_ptr());
                let how = Store::Assign;
                let p = Product { m: n, n: used, k: d, a: a.as_ptr(), a_row: padded, a_column: 1, b, b_row: ROWS, c, c_row: ROWS, how };
                // SAFETY: a has KEYS rows of `padded`, b d rows of ROWS, c KEYS rows of ROWS.
                unsafe { product(isa, &p) };
            };
            scores(keys, queries_t, weights);
            scores(values, dout_t, dscores);
            softmax_backward(isa, weights, dscores, &rows, n, key, skipped..lanes, 1.0 / (d as f32).sqrt());
            let (a, how) = (keys.as_ptr(), Store::Accumulate);
            let (b, c) = (dscores[skipped..].as_ptr(), dqueries_t[skipped..].as_mut_ptr());
            let p = Product { m: d, n: used, k: n, a, a_row: 1, a_column: padded, b, b_row: ROWS, c, c_row: ROWS, how };
            // SAFETY: dq^T [d, row] += k^T [d, key] ds^T [key, row].
            unsafe { product(isa, &p) };
            // [key, d] += a[key, row] b[row, d]
            let mut into = |a: &[f32], b: &[f32], which: usize| {
                let (a, b, c) = (a[skipped..].as_ptr(), b[skipped * padded..].as_ptr(), dkv[(2 * key + which) * padded..].as_mut_ptr());
                let c_row = 2 * padded;
                let p = Product { m: n, n: padded, k: used, a, a_row: ROWS, a_column: 1, b, b_row: padded, c, c_row, how };
                // SAFETY: a has KEYS rows of ROWS, b ROWS rows of `padded`, dkv n rows of [2, padded] from `key`.
                unsafe { product(isa, &p) };
            };
            into(dscores, queries, 0);
            into(weights, dout, 1);
        }
        for (lane, row) in self.rows.clone().enumerate() {
            let at = (self.tokens.start + row) * columns + heads.query_column(self.head);
            // SAFETY: these columns of this row are this task's.
            for (i, to) in unsafe { dqkv.part(at..at + d) }.iter_mut().enumerate() {
                *to = E::from_f32(dqueries_t[i * ROWS + lane]);
            }
        }
    }

    /// Queries and output gradients as f32 [row, padded d], zeros in the padding; lse, delta = dout . out, and keys seen.
    fn gather(&self, queries: &mut [f32], dout: &mut [f32], rows: &mut RowValues) {
        let (inputs, heads) = (self.inputs, self.inputs.heads);
        let (d, padded, columns) = (heads.dim, heads.dim.next_multiple_of(16), heads.qkv_columns());
        let n_tokens = inputs.qkv.len() / columns;
        queries.fill(0.0);
        dout.fill(0.0);
        rows.visible.fill(0.0);
        rows.lse.fill(0.0);
        rows.delta.fill(0.0);
        for (lane, row) in self.rows.clone().enumerate() {
            let token = self.tokens.start + row;
            let at = (token * heads.query + self.head) * d;
            let query = &inputs.qkv[token * columns + heads.query_column(self.head)..][..d];
            elementwise::convert(self.isa, &mut queries[lane * padded..][..d], query);
            elementwise::convert(self.isa, &mut dout[lane * padded..][..d], &inputs.dout[at..][..d]);
            rows.visible[lane] = (row + 1) as f32;
            rows.lse[lane] = inputs.lse[self.head * n_tokens + token];
            rows.delta[lane] = dout[lane * padded..][..d].iter().zip(&inputs.out[at..][..d]).map(|(g, o)| g * o.get()).sum();
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

/// to[i, row] = factor * from[row, i]
fn transpose(to: &mut [f32], from: &[f32], (lanes, d, padded): (usize, usize, usize), factor: f32) {
    for i in 0..d {
        for lane in 0..lanes {
            to[i * ROWS + lane] = factor * from[lane * padded + i];
        }
    }
}

kernel! {
    /// Scores become weights p = exp(score - lse), masked; gradients of weights become those of scores, p (dp - delta) scale.
    fn softmax_backward over V [] (
        weights: &mut [f32], dscores: &mut [f32], rows: &RowValues, n: usize, first: usize, lanes: Range<usize>, scale: f32
    ) {
        for at in lanes.step_by(V::N) {
            let visible = load::<V, f32>(rows.visible, at, V::N);
            let (lse, delta) = (load::<V, f32>(rows.lse, at, V::N), load::<V, f32>(rows.delta, at, V::N));
            for key in 0..n {
                let i = key * ROWS + at;
                let p = load::<V, f32>(weights, i, V::N).sub(lse).exp();
                let p = V::splat((first + key) as f32).where_below(visible, p, V::zero());
                let ds = p.mul(load::<V, f32>(dscores, i, V::N).sub(delta)).mul(V::splat(scale));
                store(weights, i, V::N, p);
                store(dscores, i, V::N, ds);
            }
        }
    }
}
