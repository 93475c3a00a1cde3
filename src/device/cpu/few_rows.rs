//! Products of a few rows with a weight stored [out, in] (decode): dot products that read the weight once, at memory bandwidth.

use super::lanes::{Element, Isa, Vector, kernel, load};
use super::matmul::Sizes;
use super::parallel::{GRAIN, Shared, for_ranges};
use crate::device::Store;

/// Most rows that go this way.
pub const MOST_ROWS: usize = 8;

/// out[m,n] = or += a[m,k] b[n,k]^T with m <= 8.
pub fn product<E: Element, O: Element>(isa: Isa, out: &mut [O], a: &[E], b: &[E], sizes: Sizes, how: Store) {
    let Sizes { m, n, k } = sizes;
    assert!(m <= MOST_ROWS && out.len() == m * n && a.len() == m * k && b.len() == n * k);
    let out = Shared::new(out);
    for_ranges(n, (GRAIN / k.max(1)).max(1), |columns| {
        let b = &b[columns.start * k..columns.end * k];
        for first in (0..m).step_by(4) {
            let rows = &a[first * k..(first + 4).min(m) * k];
            let mut parts: [&mut [O]; 4] = Default::default();
            for (i, part) in parts.iter_mut().enumerate().take((m - first).min(4)) {
                // SAFETY: these columns of this row are this task's.
                *part = unsafe { out.part((first + i) * n + columns.start..(first + i) * n + columns.end) };
            }
            match m - first {
                1 => dots1(isa, &mut parts, rows, b, k, how),
                2 => dots2(isa, &mut parts, rows, b, k, how),
                3 => dots3(isa, &mut parts, rows, b, k, how),
                _ => dots4(isa, &mut parts, rows, b, k, how),
            }
        }
    });
}

/// R rows of a with every row of b.
#[inline(always)]
fn dots<V: Vector, E: Element, O: Element, const R: usize>(out: &mut [&mut [O]; 4], a: &[E], b: &[E], k: usize, how: Store) {
    for j in 0..b.len() / k.max(1) {
        let row = &b[j * k..][..k];
        let mut sums = [[V::zero(); 2]; R];
        let mut i = 0;
        while i + 2 * V::N <= k {
            let (low, high) = (load::<V, E>(row, i, V::N), load::<V, E>(row, i + V::N, V::N));
            for (r, sum) in sums.iter_mut().enumerate() {
                sum[0] = load::<V, E>(a, r * k + i, V::N).fma(low, sum[0]);
                sum[1] = load::<V, E>(a, r * k + i + V::N, V::N).fma(high, sum[1]);
            }
            i += 2 * V::N;
        }
        while i < k {
            let n = (k - i).min(V::N);
            let low = load::<V, E>(row, i, n);
            for (r, sum) in sums.iter_mut().enumerate() {
                sum[0] = load::<V, E>(a, r * k + i, n).fma(low, sum[0]);
            }
            i += n;
        }
        for (r, sum) in sums.iter().enumerate() {
            let value = sum[0].add(sum[1]).sum();
            let old = if how == Store::Accumulate { out[r][j].get() } else { 0.0 };
            out[r][j] = O::from_f32(old + value);
        }
    }
}

kernel! {
    fn dots1 over V [E, O] (out: &mut [&mut [O]; 4], a: &[E], b: &[E], k: usize, how: Store) { dots::<V, E, O, 1>(out, a, b, k, how) }
}
kernel! {
    fn dots2 over V [E, O] (out: &mut [&mut [O]; 4], a: &[E], b: &[E], k: usize, how: Store) { dots::<V, E, O, 2>(out, a, b, k, how) }
}
kernel! {
    fn dots3 over V [E, O] (out: &mut [&mut [O]; 4], a: &[E], b: &[E], k: usize, how: Store) { dots::<V, E, O, 3>(out, a, b, k, how) }
}
kernel! {
    fn dots4 over V [E, O] (out: &mut [&mut [O]; 4], a: &[E], b: &[E], k: usize, how: Store) { dots::<V, E, O, 4>(out, a, b, k, how) }
}
