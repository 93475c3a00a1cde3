//! Sums in a canonical order on the CPU. Products take `panels` where it runs; elsewhere a tile of `product` over packed columns,
//! which also adds one term after another. The paths for few rows and of the `gemm` crate are left out: their order of additions
//! depends on the other sizes.

use super::lanes::{Isa, elements, elements_mut};
use super::panels::{self, Together};
use super::parallel::{GRAIN, Pool, Shared, for_ranges, for_rows, for_tasks};
use super::product::{Product, To, product};
use super::terms::Terms;
use super::{Cpu, elementwise, float, loss, matmul};
use crate::device::canonical::CanonicalSums;
use crate::device::{Gemm, Store};
use crate::exact::ExactSum;
use crate::parallel::pieces::{add_in_pairs, pieces};
use crate::tensor::{DType, Tensor};
use std::ops::Range;
use std::sync::Mutex;

/// Columns of out that a task packs and multiplies where there is no AVX-512.
const COLUMNS: usize = 64;

impl CanonicalSums for Cpu {
    fn gemm_in_pairs(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, n_pieces: usize) {
        assert!(n_pieces.is_power_of_two() && n_pieces <= panels::MOST_IN_PAIRS, "{n_pieces} pieces in pairs");
        let sizes = matmul::sizes_of(out, a, b, how);
        of_pieces(self, out, (a, b), (sizes, &pieces(sizes.k, n_pieces)), (how, Together::InPairs));
    }

    fn gemm_in_turn(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, starts: &[usize]) {
        let sizes = matmul::sizes_of(out, a, b, how);
        let ends = (starts.first(), starts.last());
        assert!(ends == (Some(&0), Some(&sizes.k)) && starts.is_sorted() && out.dtype() == DType::F32, "{out:?}, pieces {starts:?}");
        let pieces: Vec<Range<usize>> = starts.windows(2).map(|ends| ends[0]..ends[1]).collect();
        of_pieces(self, out, (a, b), (sizes, &pieces), (how, Together::InTurn));
    }

    fn cross_entropy_sum_in_pairs(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        (first_row, n_valid): (usize, usize),
        n_pieces: usize,
    ) {
        let (t, columns) = (logits.n_rows(), logits.row_len());
        let fits = n_valid <= columns && [max, targets].iter().all(|x| x.n_elements() == t);
        assert!(fits && n_pieces.is_power_of_two(), "cross_entropy_sum of {logits:?}, {n_valid} valid, {n_pieces} pieces");
        let (sum, target_logit) = (Shared::new(sum.f32_mut()), Shared::new(target_logit.f32_mut()));
        let (max, targets, pieces) = (max.f32(), targets.u32(), pieces(columns, n_pieces));
        float!(logits.dtype(), E => {
            let logits = elements::<E>(logits);
            for_rows(t, columns, |rows| {
                // SAFETY: the ranges are disjoint.
                let (sum, target_logit) = unsafe { (sum.part(rows.clone()), target_logit.part(rows.clone())) };
                for (i, t) in rows.enumerate() {
                    let row = &logits[t * columns..][..n_valid];
                    let valid = |piece: &Range<usize>| &row[piece.start.min(n_valid)..piece.end.min(n_valid)];
                    let mut sums: Vec<f32> = pieces.iter().map(|piece| loss::row_sum(self.isa, valid(piece), max[t])).collect();
                    add_in_pairs(&mut sums, &|x, y| *x += y);
                    sum[i] = sums[0];
                    target_logit[i] = loss::target_of(row, targets[t], first_row, n_valid).1;
                }
            });
        });
    }

    fn add_groups(&self, out: &mut Tensor, rows: &Tensor, n_pieces: usize) {
        let (h, n_rows) = (out.n_elements(), rows.n_rows());
        assert!(rows.row_len() == h && n_rows % n_pieces == 0 && n_pieces.is_power_of_two(), "groups of {n_pieces} of {rows:?}");
        let (out, rows) = (Shared::new(out.f32_mut()), rows.f32());
        for_ranges(h, (GRAIN / n_rows.max(1)).max(64), |columns| {
            // SAFETY: the ranges are disjoint.
            let out = unsafe { out.part(columns.clone()) };
            for group in rows.chunks_exact(n_pieces * h) {
                let mut sums: Vec<Vec<f32>> = group.chunks_exact(h).map(|row| row[columns.clone()].to_vec()).collect();
                add_in_pairs(&mut sums, &|x, y| elementwise::add(self.isa, x, y));
                elementwise::add(self.isa, out, &sums[0]);
            }
        });
    }

    fn sum_squares(&self, x: &Tensor, n_pieces: usize) -> ExactSum {
        let (n_rows, columns, pieces) = (x.n_rows(), x.row_len(), pieces(x.row_len(), n_pieces));
        let (x, total) = (x.f32(), Mutex::new(ExactSum::default()));
        for_rows(n_rows, columns, |rows| {
            let mut sum = ExactSum::default();
            for row in rows {
                let row = &x[row * columns..][..columns];
                pieces
                    .iter()
                    .filter(|piece| !piece.is_empty())
                    .for_each(|piece| sum.add(elementwise::sum_squares(self.isa, &row[piece.clone()])));
            }
            total.lock().expect("nobody panics while holding the sum").merge(&sum);
        });
        total.into_inner().expect("nobody panicked while holding the sum")
    }
}

/// out = or += the pieces of a product.
fn of_pieces(
    cpu: &Cpu,
    out: &mut Tensor,
    (a, b): (&Tensor, &Tensor),
    (sizes, pieces): (matmul::Sizes, &[Range<usize>]),
    (how, together): (Gemm, Together),
) {
    if sizes.m == 0 || sizes.n == 0 {
        return;
    }
    let (isa, pool) = (cpu.isa, &cpu.pool);
    if isa >= Isa::Avx512 && (a.dtype() == DType::F32 || isa == Isa::Avx512Bf16) {
        return float!(out.dtype(), O => float!(a.dtype(), E => {
            let of = (elements::<E>(a), elements::<E>(b));
            panels::product_of_pieces::<E, O>((isa, pool), elements_mut::<O>(out), of, (sizes, pieces), (how, together))
        }));
    }
    let wide = [a, b].map(|x| {
        float!(x.dtype(), E => {
            let (from, mut wide) = (elements::<E>(x), pool.take(x.n_elements()));
            let to = Shared::new(&mut wide);
            // SAFETY: the ranges are disjoint.
            for_ranges(from.len(), GRAIN, |range| elementwise::convert(isa, unsafe { to.part(range.clone()) }, &from[range]));
            wide
        })
    });
    let plain = PlainProduct { isa, pool, a: &wide[0], b: &wide[1], sizes, how };
    if together == Together::InTurn {
        let how_of = |idx: usize| if idx == 0 { how.out } else { Store::Accumulate };
        return pieces.iter().enumerate().for_each(|(idx, piece)| plain.add_piece(out.f32_mut(), piece.clone(), how_of(idx)));
    }
    let mut sums: Vec<_> = pieces.iter().map(|_| pool.take(sizes.m * sizes.n)).collect();
    sums.iter_mut().zip(pieces).for_each(|(sum, piece)| plain.add_piece(sum, piece.clone(), Store::Assign));
    add_in_pairs(&mut sums, &|x, y| matmul::round_sum(isa, &Shared::new(&mut x[..]), y, Store::Accumulate));
    float!(out.dtype(), O => matmul::round_sum(isa, &Shared::new(elements_mut::<O>(out)), &sums[0], Store::Assign));
}

/// An f32 product where there is no AVX-512.
struct PlainProduct<'a> {
    isa: Isa,
    pool: &'a Pool,
    a: &'a [f32],
    b: &'a [f32],
    sizes: matmul::Sizes,
    how: Gemm,
}

impl PlainProduct<'_> {
    /// out[m,n] = or += the terms of one piece, in order.
    fn add_piece(&self, out: &mut [f32], terms: Range<usize>, how: Store) {
        let matmul::Sizes { m, n, k } = self.sizes;
        let out = Shared::new(out);
        for_tasks(n.div_ceil(COLUMNS), m * n * terms.len() / 8, |task| {
            let columns = task * COLUMNS..((task + 1) * COLUMNS).min(n);
            let padded = columns.len().next_multiple_of(16);
            let mut buffer = self.pool.take((terms.len() + m) * padded);
            buffer.fill(0.0);
            let (b, c) = buffer.split_at_mut(terms.len() * padded);
            for (to, l) in b.chunks_exact_mut(padded).zip(terms.clone()) {
                if self.how.trans_b {
                    to.iter_mut().zip(columns.clone()).for_each(|(to, j)| *to = self.b[j * k + l]);
                } else {
                    to[..columns.len()].copy_from_slice(&self.b[l * n..][columns.clone()]);
                }
            }
            let (a_row, a_column) = if self.how.trans_a { (1, m) } else { (k, 1) };
            let tile = Product {
                terms: Terms::Single,
                m,
                n: padded,
                k: terms.len(),
                a: self.a[(terms.start * a_column).min(self.a.len())..].as_ptr(),
                a_row,
                a_column,
                b: b.as_ptr(),
                b_row: padded,
                c: c.as_mut_ptr(),
                c_row: padded,
                how: To::Assign,
            };
            // SAFETY: a has m rows of k terms under these strides, b terms.len() and c m rows of `padded`.
            unsafe { product(self.isa, &tile) };
            for (i, sums) in c.chunks_exact(padded).enumerate() {
                // SAFETY: these columns are this task's.
                let to = unsafe { out.part(i * n + columns.start..i * n + columns.end) };
                match how {
                    Store::Assign => to.copy_from_slice(&sums[..columns.len()]),
                    Store::Accumulate => elementwise::add(self.isa, to, &sums[..columns.len()]),
                }
            }
        });
    }
}
