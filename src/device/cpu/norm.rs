//! LayerNorm1P and RMSNorm, forward and backward, over rows. Mathematics in the trait's docs; two passes for the variance.

use super::lanes::{Element, Vector, each, kernel, load, store};
use crate::device::{Norm, NormKind};

/// Rows whose gain and bias gradients are summed together: fixed, so that the sums do not depend on the threads.
pub const BACKWARD_ROWS: usize = 32;

/// (mean, 1 / sqrt(var + eps)) of a row.
#[inline(always)]
fn statistics<V: Vector, E: Element>(x: &[E], how: Norm) -> (f32, f32) {
    let mut mean = 0.0;
    if how.kind == NormKind::LayerNorm1P {
        let (sum, rest) = sum_over::<V, E>(x, |x, sum| sum.add(x));
        mean = (sum + rest.iter().map(|x| x.get()).sum::<f32>()) / x.len() as f32;
    }
    let center = V::splat(mean);
    let (squares, rest) = sum_over::<V, E>(x, |x, sum| {
        let d = x.sub(center);
        d.fma(d, sum)
    });
    // Apart from the vectors: lanes past the end would count mean^2.
    let rest: f32 = rest.iter().map(|x| (x.get() - mean) * (x.get() - mean)).sum();
    let var = (squares + rest) / x.len() as f32;
    (mean, 1.0 / (var + how.eps).sqrt())
}

/// A sum over the whole vectors of a row, and the elements behind them. Four sums side by side, because one alone waits for
/// its own last addition.
#[inline(always)]
fn sum_over<V: Vector, E: Element>(x: &[E], add: impl Fn(V, V) -> V) -> (f32, &[E]) {
    let mut sums = [V::zero(); 4];
    let mut i = 0;
    while i + 4 * V::N <= x.len() {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum = add(load(x, i + lane * V::N, V::N), *sum);
        }
        i += 4 * V::N;
    }
    while i + V::N <= x.len() {
        sums[0] = add(load(x, i, V::N), sums[0]);
        i += V::N;
    }
    (sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum(), &x[i..])
}

#[inline(always)]
fn widen<V: Vector, E: Element>(out: &mut [f32], x: &[E]) {
    each!(V, x.len(), |i, n| { store(out, i, n, load::<V, E>(x, i, n)) })
}

#[inline(always)]
fn normalise<V: Vector, O: Element, E: Element>(
    out: &mut [O],
    x: &[E],
    (mean, rstd): (f32, f32),
    gain: &[E],
    bias: Option<&[E]>,
    plus: f32,
) {
    let (mean, rstd, plus) = (V::splat(mean), V::splat(rstd), V::splat(plus));
    match bias {
        Some(bias) => each!(V, x.len(), |i, n| {
            let hat = load::<V, E>(x, i, n).sub(mean).mul(rstd);
            store(out, i, n, hat.fma(load::<V, E>(gain, i, n).add(plus), load::<V, E>(bias, i, n)))
        }),
        None => each!(V, x.len(), |i, n| {
            let hat = load::<V, E>(x, i, n).sub(mean).mul(rstd);
            store(out, i, n, hat.mul(load::<V, E>(gain, i, n).add(plus)))
        }),
    }
}

/// What is added to the gain.
fn gain_offset(how: Norm) -> f32 {
    if how.kind == NormKind::LayerNorm1P { 1.0 } else { 0.0 }
}

kernel! {
    /// Rows of `norm`.
    pub fn forward over V [E] (out: &mut [E], stats: &mut [f32], x: &[E], gain: &[E], bias: Option<&[E]>, how: Norm) {
        let h = gain.len();
        // Widened once: each row is read three times, gain and bias with every row.
        let mut wide = vec![0.0f32; 3 * h];
        let (row, rest) = wide.split_at_mut(h);
        let (wide_gain, wide_bias) = rest.split_at_mut(h);
        widen::<V, E>(wide_gain, gain);
        bias.inspect(|bias| widen::<V, E>(wide_bias, bias));
        let bias = bias.map(|_| &*wide_bias);
        for ((out, x), stats) in out.chunks_exact_mut(h).zip(x.chunks_exact(h)).zip(stats.chunks_exact_mut(2)) {
            widen::<V, E>(row, x);
            let (mean, rstd) = statistics::<V, f32>(row, how);
            (stats[0], stats[1]) = (mean, rstd);
            normalise::<V, E, f32>(out, row, (mean, rstd), wide_gain, bias, gain_offset(how));
        }
    }
}

kernel! {
    /// Rows of `add_norm`.
    pub fn add_forward over V [E] (
        x: &mut [E], delta: &[E], out: &mut [E], stats: &mut [f32], gain: &[E], bias: Option<&[E]>, how: Norm
    ) {
        let h = gain.len();
        let rows = x.chunks_exact_mut(h).zip(delta.chunks_exact(h)).zip(out.chunks_exact_mut(h)).zip(stats.chunks_exact_mut(2));
        for (((x, delta), out), stats) in rows {
            each!(V, h, |i, n| { let sum = load::<V, E>(x, i, n).add(load(delta, i, n)); store(x, i, n, sum) });
            let (mean, rstd) = statistics::<V, E>(x, how);
            (stats[0], stats[1]) = (mean, rstd);
            normalise::<V, E, E>(out, x, (mean, rstd), gain, bias, gain_offset(how));
        }
    }
}

kernel! {
    /// Rows of `norm_backward`; dgain and dbias are sums over these rows, assigned.
    pub fn backward over V [E] (
        dx: &mut [E], dgain: &mut [f32], dbias: &mut [f32], dy: &[E], x: &[E], gain: &[E], stats: &[f32], how: Norm
    ) {
        let h = gain.len();
        let (plus, layer) = (V::splat(gain_offset(how)), how.kind == NormKind::LayerNorm1P);
        dgain.fill(0.0);
        dbias.fill(0.0);
        let rows = dx.chunks_exact_mut(h).zip(dy.chunks_exact(h)).zip(x.chunks_exact(h)).zip(stats.chunks_exact(2));
        for (((dx, dy), x), stats) in rows {
            let (mean, rstd) = (V::splat(stats[0]), V::splat(stats[1]));
            let (mut along, mut offset) = (V::zero(), V::zero());
            each!(V, h, |i, n| {
                // Lanes past the end have dy = 0, so they add nothing.
                let g = load::<V, E>(dy, i, n).mul(load::<V, E>(gain, i, n).add(plus));
                let hat = load::<V, E>(x, i, n).sub(mean).mul(rstd);
                along = g.fma(hat, along);
                offset = offset.add(g);
            });
            let along = V::splat(along.sum() / h as f32);
            let offset = V::splat(if layer { offset.sum() / h as f32 } else { 0.0 });
            each!(V, h, |i, n| {
                let d = load::<V, E>(dy, i, n);
                let hat = load::<V, E>(x, i, n).sub(mean).mul(rstd);
                let g = d.mul(load::<V, E>(gain, i, n).add(plus));
                let inner = g.sub(offset).sub(hat.mul(along));
                let new = rstd.fma(inner, load(dx, i, n));
                store(dx, i, n, new);
                let new = d.fma(hat, load(dgain, i, n));
                store(dgain, i, n, new);
                if layer {
                    let new = d.add(load(dbias, i, n));
                    store(dbias, i, n, new);
                }
            });
        }
    }
}
