//! How the operands of attention's products lie: words of one f32 term, or of two bf16 terms where the processor has their dot
//! products. The pairs run along the dim that a product sums over, so a matrix is packed once for each dim it is summed over.

use super::elementwise;
use super::lanes::{Element, Isa, Vector, each, kernel, load, store};
use crate::tensor::DType;
use std::ops::Range;

/// What a 32-bit word holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Terms {
    /// One f32.
    Single,
    /// Two bf16, the earlier in the low half.
    Pairs,
}

impl Terms {
    /// What suits elements of this type; head dims that are odd have no pairs.
    pub fn of<E: Element>(isa: Isa, dim: usize) -> Terms {
        if E::DTYPE == DType::BF16 && isa == Isa::Avx512Bf16 && dim % 2 == 0 { Terms::Pairs } else { Terms::Single }
    }

    /// Words that n terms take.
    pub fn words(self, n: usize) -> usize {
        match self {
            Terms::Single => n,
            Terms::Pairs => n.div_ceil(2),
        }
    }
}

/// Vectors that lie in the rows of a matrix: `data[first + i * stride..][..dim]`.
#[derive(Clone, Copy)]
pub struct Strided<'a, E> {
    /// The whole.
    pub data: &'a [E],
    /// Start of vector 0.
    pub first: usize,
    /// Elements from one to the next.
    pub stride: usize,
}

impl<'a, E> Strided<'a, E> {
    /// Vector i.
    pub fn row(&self, i: usize, dim: usize) -> &'a [E] {
        &self.data[self.first + i * self.stride..][..dim]
    }
}

/// One vector for sums over its dims: to[words(dim)].
pub fn along_dims<E: Element>(isa: Isa, terms: Terms, to: &mut [f32], from: &[E]) {
    match terms {
        Terms::Single => elementwise::convert(isa, &mut to[..from.len()], from),
        Terms::Pairs => bytemuck::cast_slice_mut::<f32, E>(&mut to[..from.len() / 2]).copy_from_slice(from),
    }
}

/// Vectors for sums over the vectors: to[words(n), padded], padding unspecified; the last of an odd number is paired with zeros.
pub fn along_rows<E: Element>(isa: Isa, terms: Terms, to: &mut [f32], from: Strided<E>, rows: Range<usize>, (dim, padded): (usize, usize)) {
    match terms {
        Terms::Single => {
            for (to, i) in to.chunks_exact_mut(padded).zip(rows) {
                elementwise::convert(isa, &mut to[..dim], from.row(i, dim));
            }
        }
        Terms::Pairs => {
            for (to, i) in to.chunks_exact_mut(padded).zip(rows.clone().step_by(2)) {
                let next = if i + 1 < rows.end { from.row(i + 1, dim) } else { &[] };
                interleave(isa, &mut to[..dim], from.row(i, dim), next);
            }
        }
    }
}

kernel! {
    /// to[i] = the pair (low[i], high[i]); `high` may be empty for zeros.
    fn interleave over V [E] (to: &mut [f32], low: &[E], high: &[E]) {
        each!(V, to.len(), |i, n| {
            let high = if high.is_empty() { V::zero() } else { load::<V, E>(high, i, n) };
            store(to, i, n, load::<V, E>(low, i, n).pack_pairs(high));
        });
    }
}

kernel! {
    /// to[j, i] = from[i, j] for whole tiles: rows and columns are multiples of 16.
    pub fn transpose over V [] (to: &mut [f32], to_stride: usize, from: &[f32], from_stride: usize, size: (usize, usize)) {
        let (rows, columns) = size;
        assert!(rows % 16 == 0 && columns % 16 == 0, "{rows} x {columns}");
        for i in (0..rows).step_by(V::N) {
            for j in (0..columns).step_by(V::N) {
                let mut tile = [V::zero(); 16];
                for (r, row) in tile.iter_mut().enumerate().take(V::N) {
                    *row = load::<V, f32>(from, (i + r) * from_stride + j, V::N);
                }
                V::transpose(&mut tile);
                for (c, column) in tile.iter().enumerate().take(V::N) {
                    store(to, (j + c) * to_stride + i, V::N, *column);
                }
            }
        }
    }
}

/// The first N rows of N lanes.
#[inline(always)]
pub fn transpose_tile<V: Vector>(tile: &mut [V; 16]) {
    V::transpose(tile);
}

kernel! {
    /// to = factor * from
    pub fn convert_scaled over V [E] (to: &mut [E], from: &[f32], factor: f32) {
        let factor = V::splat(factor);
        each!(V, to.len(), |i, n| { store(to, i, n, load::<V, f32>(from, i, n).mul(factor)) });
    }
}
