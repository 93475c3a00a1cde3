//! Kernels element by element: conversion, sums, activations, AdamW. Mathematics in the trait's docs.

use super::lanes::{Vector, each, kernel, load, store};
use crate::device::Adamw;

kernel! {
    /// out = x
    pub fn convert over V [O, X] (out: &mut [O], x: &[X]) {
        each!(V, x.len(), |i, n| { store(out, i, n, load::<V, X>(x, i, n)) })
    }
}

kernel! {
    /// x += y
    pub fn add over V [X, Y] (x: &mut [X], y: &[Y]) {
        each!(V, y.len(), |i, n| { let sum = load::<V, X>(x, i, n).add(load(y, i, n)); store(x, i, n, sum) })
    }
}

kernel! {
    /// x *= factor
    pub fn scale over V [X] (x: &mut [X], factor: f32) {
        let factor = V::splat(factor);
        each!(V, x.len(), |i, n| { let y = load::<V, X>(x, i, n).mul(factor); store(x, i, n, y) })
    }
}

kernel! {
    /// Sum of squares of a block, in sixteen f64 sums whatever the instruction set.
    pub fn sum_squares over V [] (x: &[f32]) -> f64 {
        let _ = V::N;
        let mut sums = [0.0f64; 16];
        let whole = x.chunks_exact(16);
        let rest = whole.remainder();
        for chunk in whole {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}

kernel! {
    /// out = max(x, 0)^2
    pub fn squared_relu over V [E] (out: &mut [E], x: &[E]) {
        each!(V, x.len(), |i, n| {
            // Zero first: the second operand is what comes out for NaN.
            let y = V::zero().max(load::<V, E>(x, i, n));
            store(out, i, n, y.mul(y))
        })
    }
}

kernel! {
    /// dx = 2 max(x, 0) dout
    pub fn squared_relu_backward over V [E] (dx: &mut [E], dout: &[E], x: &[E]) {
        each!(V, x.len(), |i, n| {
            let y = V::zero().max(load::<V, E>(x, i, n));
            store(dx, i, n, y.add(y).mul(load(dout, i, n)))
        })
    }
}

/// `n` <= N pairs from pair `i` of interleaved columns: (first of each, second of each).
#[inline(always)]
fn load_pairs<V: Vector, E: super::lanes::Element>(x: &[E], i: usize, n: usize) -> (V, V) {
    let low = load::<V, E>(x, 2 * i, (2 * n).min(V::N));
    let high = if 2 * n > V::N { load::<V, E>(x, 2 * i + V::N, 2 * n - V::N) } else { V::zero() };
    low.unzip(high)
}

/// 1 / (1 + exp(-x)); 0 under -88.
#[inline(always)]
fn sigmoid<V: Vector>(x: V) -> V {
    // exp(88) is still finite, so the reciprocal is 0 and not NaN.
    let minus = V::splat(88.0).min(V::zero().sub(x));
    V::splat(1.0).add(minus.exp()).reciprocal()
}

kernel! {
    /// out_i = silu(x_2i) x_2i+1
    pub fn swiglu over V [E] (out: &mut [E], x: &[E]) {
        each!(V, out.len(), |i, n| {
            let (gate, up) = load_pairs::<V, E>(x, i, n);
            store(out, i, n, gate.mul(sigmoid(gate)).mul(up))
        })
    }
}

kernel! {
    /// dx_2i = dout_i x_2i+1 s (1 + x_2i (1 - s)), dx_2i+1 = dout_i x_2i s, with s = sigmoid(x_2i)
    pub fn swiglu_backward over V [E] (dx: &mut [E], dout: &[E], x: &[E]) {
        each!(V, dout.len(), |i, n| {
            let (gate, up) = load_pairs::<V, E>(x, i, n);
            let (d, one) = (load::<V, E>(dout, i, n), V::splat(1.0));
            let s = sigmoid(gate);
            let slope = s.mul(one.add(gate.mul(one.sub(s))));
            let (low, high) = d.mul(up).mul(slope).zip(d.mul(gate).mul(s));
            store(dx, 2 * i, (2 * n).min(V::N), low);
            if 2 * n > V::N {
                store(dx, 2 * i + V::N, 2 * n - V::N, high);
            }
        })
    }
}

kernel! {
    /// One AdamW step; `m_scale` and `v_scale` are 1 / (1 - beta^step).
    pub fn adamw over V [W] (
        master: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], weight: &mut [W], how: &Adamw, m_scale: f32, v_scale: f32
    ) {
        let (beta1, beta2) = (V::splat(how.beta1), V::splat(how.beta2));
        let (rest1, rest2) = (V::splat(1.0 - how.beta1), V::splat(1.0 - how.beta2));
        let (m_scale, v_scale, eps) = (V::splat(m_scale), V::splat(v_scale), V::splat(how.eps));
        let (lr, decay, grad_scale) = (V::splat(-how.lr), V::splat(how.weight_decay), V::splat(how.grad_scale));
        each!(V, grad.len(), |i, n| {
            let g = load::<V, f32>(grad, i, n).mul(grad_scale);
            let first = beta1.mul(load(m, i, n)).add(rest1.mul(g));
            let second = beta2.mul(load(v, i, n)).add(rest2.mul(g).mul(g));
            let update = first.mul(m_scale).div(second.mul(v_scale).sqrt().add(eps));
            let old = load::<V, f32>(master, i, n);
            let new = lr.fma(decay.fma(old, update), old);
            store(m, i, n, first);
            store(v, i, n, second);
            store(master, i, n, new);
            store(weight, i, n, new);
        })
    }
}
