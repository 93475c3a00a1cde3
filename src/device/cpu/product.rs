//! Small products on tiles in cache, for attention: c[m, n] = or += a[m, k] b[k, n], n a multiple of 16 with contiguous rows
//! of b and c, a read one word at a time under any strides. A word of a and b is an f32 or a pair of bf16 terms.

use super::lanes::{Vector, kernel};
use super::terms::Terms;

/// What becomes of the sums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum To {
    /// c = sum
    Assign,
    /// c += sum
    Accumulate,
    /// As Assign, the sum's chain of additions beginning with c in place of 0: that of a longer sum goes on.
    Continue,
}

/// Operands of a product. Strides in words; c is f32.
#[derive(Clone, Copy)]
pub struct Product {
    /// What a word of a and b is.
    pub terms: Terms,
    /// Rows, columns (a multiple of 16), words along the sum.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// a[i, l] is at i * a_row + l * a_column.
    pub a: *const f32,
    pub a_row: usize,
    pub a_column: usize,
    pub b: *const f32,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
    pub how: To,
}

/// SAFETY: the caller vouches that all of a, b and c as described is theirs to read and (c) write.
#[inline(always)]
unsafe fn tile<V: Vector, const MR: usize, const NV: usize, const PAIRS: bool>(p: &Product, i: usize, j: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::zero(); NV]; MR];
        if p.how == To::Continue {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(p.c.add((i + r) * p.c_row + j + v * V::N));
                }
            }
        }
        let (mut a, mut b) = (p.a.add(i * p.a_row), p.b.add(j));
        for _ in 0..p.k {
            let mut row = [V::zero(); NV];
            for (v, row) in row.iter_mut().enumerate() {
                *row = V::load(b.add(v * V::N));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = V::splat(*a.add(r * p.a_row));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = if PAIRS { x.dot_pairs(row, *sum) } else { x.fma(row, *sum) };
                }
            }
            a = a.wrapping_add(p.a_column);
            b = b.wrapping_add(p.b_row);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let to = p.c.add((i + r) * p.c_row + j + v * V::N);
                let value = if p.how == To::Accumulate { V::load(to).add(*sum) } else { *sum };
                value.store(to);
            }
        }
    }
}

/// All rows of NV vectors of columns. SAFETY: as `tile`.
#[inline(always)]
unsafe fn columns<V: Vector, const MR: usize, const NV: usize, const PAIRS: bool>(p: &Product, j: usize) {
    let mut i = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while i + MR <= p.m {
            tile::<V, MR, NV, PAIRS>(p, i, j);
            i += MR;
        }
        while i + 2 <= p.m {
            tile::<V, 2, NV, PAIRS>(p, i, j);
            i += 2;
        }
        if i < p.m {
            tile::<V, 1, NV, PAIRS>(p, i, j);
        }
    }
}

/// All of it. SAFETY: as `tile`.
#[inline(always)]
unsafe fn all<V: Vector, const PAIRS: bool>(p: &Product) {
    let mut j = 0;
    while j < p.n {
        let left = (p.n - j) / V::N;
        // SAFETY: the caller's promise. Tiles are as large as the registers hold.
        let taken = unsafe {
            match left {
                4.. if V::REGISTERS == 32 && left != 5 && left != 6 => {
                    columns::<V, 6, 4, PAIRS>(p, j);
                    4
                }
                3.. if V::REGISTERS == 32 => {
                    columns::<V, 8, 3, PAIRS>(p, j);
                    3
                }
                3.. => {
                    columns::<V, 4, 3, PAIRS>(p, j);
                    3
                }
                2 => {
                    columns::<V, 6, 2, PAIRS>(p, j);
                    2
                }
                _ => {
                    columns::<V, 8, 1, PAIRS>(p, j);
                    1
                }
            }
        };
        j += taken * V::N;
    }
}

kernel! {
    fn run over V [] (p: &Product) {
        // SAFETY: the promise of `product`'s caller.
        unsafe {
            match p.terms {
                Terms::Single => all::<V, false>(p),
                Terms::Pairs => all::<V, true>(p),
            }
        }
    }
}

/// SAFETY: all of a, b and c as described is the caller's to read and (c) write.
pub unsafe fn product(isa: super::Isa, p: &Product) {
    assert!(p.n % 16 == 0, "{} columns", p.n);
    run(isa, p);
}
