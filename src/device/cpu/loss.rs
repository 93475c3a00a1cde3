//! Cross entropy over a vocabulary shard, row by row. Mathematics in the trait's docs.

use super::float;
use super::lanes::{Element, Isa, each, elements, elements_mut, kernel, load, store};
use super::parallel::{Shared, for_rows};
use crate::tensor::{DType, Tensor};

/// Where a target lies in the shard, if it does.
fn column(target: u32, first_row: usize, n_valid: usize) -> Option<usize> {
    (target as usize).checked_sub(first_row).filter(|column| *column < n_valid)
}

kernel! {
    /// The largest of a row; -inf when it is empty.
    pub fn row_max over V [E] (row: &[E]) -> f32 {
        let mut max = [V::splat(f32::NEG_INFINITY); 4];
        let mut i = 0;
        while i + 4 * V::N <= row.len() {
            for (lane, max) in max.iter_mut().enumerate() {
                *max = load::<V, E>(row, i + lane * V::N, V::N).max(*max);
            }
            i += 4 * V::N;
        }
        let best = max[0].max(max[1]).max(max[2].max(max[3])).max_lane();
        row[i..].iter().map(|x| x.get()).fold(best, f32::max)
    }
}

kernel! {
    /// Sum of exp(x - max) over a row.
    pub fn row_sum over V [E] (row: &[E], max: f32) -> f32 {
        let mut sum = [V::zero(); 2];
        let shift = V::splat(max);
        let mut i = 0;
        while i + 2 * V::N <= row.len() {
            for (lane, sum) in sum.iter_mut().enumerate() {
                *sum = sum.add(load::<V, E>(row, i + lane * V::N, V::N).sub(shift).exp());
            }
            i += 2 * V::N;
        }
        let mut rest = 0.0;
        each!(V, row.len() - i, |j, n| {
            let terms = load::<V, E>(&row[i..], j, n).sub(shift).exp().lanes();
            rest += terms[..n].iter().sum::<f32>();
        });
        sum[0].add(sum[1]).sum() + rest
    }
}

kernel! {
    /// row = weight (exp(x - max) / sum - [target]) in the first n_valid columns, 0 behind them.
    pub fn row_gradient over V [E] (row: &mut [E], max: f32, sum: f32, weight: f32, target: Option<usize>, n_valid: usize) {
        let at_target = target.map(|column| row[column].get());
        let (valid, rest) = row.split_at_mut(n_valid);
        let (shift, factor) = (V::splat(max), V::splat(weight / sum));
        each!(V, n_valid, |i, n| {
            let p = load::<V, E>(valid, i, n).sub(shift).exp().mul(factor);
            store(valid, i, n, p)
        });
        rest.fill(E::from_f32(0.0));
        if let (Some(column), Some(logit)) = (target, at_target) {
            let p = V::splat(logit - max).exp().lanes()[0] / sum;
            valid[column] = E::from_f32(weight * (p - 1.0));
        }
    }
}

/// The target's column and logit: (column, logit or 0).
pub fn target_of<E: Element>(row: &[E], target: u32, first_row: usize, n_valid: usize) -> (Option<usize>, f32) {
    let column = column(target, first_row, n_valid);
    (column, column.map_or(0.0, |column| row[column].get()))
}

/// See `Device::cross_entropy_max`.
pub fn maxima(isa: Isa, max: &mut Tensor, logits: &Tensor, n_valid: usize) {
    let (t, columns) = (logits.n_rows(), logits.row_len());
    assert!(n_valid <= columns && max.n_elements() == t, "cross_entropy_max {max:?} of {logits:?}, {n_valid} valid");
    let max = Shared::new(max.f32_mut());
    float!(logits.dtype(), E => {
        let logits = elements::<E>(logits);
        for_rows(t, columns, |rows| {
            // SAFETY: the ranges are disjoint.
            for (max, t) in unsafe { max.part(rows.clone()) }.iter_mut().zip(rows) {
                *max = row_max(isa, &logits[t * columns..][..n_valid]);
            }
        });
    });
}

/// See `Device::cross_entropy_sum`; columns as (first_row, n_valid).
pub fn sums(
    isa: Isa,
    [sum, target_logit]: [&mut Tensor; 2],
    logits: &Tensor,
    max: &Tensor,
    targets: &Tensor,
    (first_row, n_valid): (usize, usize),
) {
    let (t, columns) = (logits.n_rows(), logits.row_len());
    assert!(n_valid <= columns && max.n_elements() == t && targets.n_elements() == t, "cross_entropy_sum of {logits:?}, {n_valid} valid");
    let (sum, target_logit) = (Shared::new(sum.f32_mut()), Shared::new(target_logit.f32_mut()));
    let (max, targets) = (max.f32(), targets.u32());
    float!(logits.dtype(), E => {
        let logits = elements::<E>(logits);
        for_rows(t, columns, |rows| {
            // SAFETY: the ranges are disjoint.
            let (sum, target_logit) = unsafe { (sum.part(rows.clone()), target_logit.part(rows.clone())) };
            for (i, t) in rows.enumerate() {
                let row = &logits[t * columns..][..n_valid];
                sum[i] = row_sum(isa, row, max[t]);
                target_logit[i] = target_of(row, targets[t], first_row, n_valid).1;
            }
        });
    });
}

/// See `Device::cross_entropy_forward`.
pub fn forward(
    isa: Isa,
    [max, sum, target_logit]: [&mut Tensor; 3],
    logits: &Tensor,
    targets: &Tensor,
    (first_row, n_valid): (usize, usize),
) {
    let (t, columns) = (logits.n_rows(), logits.row_len());
    let fits = n_valid <= columns && [&*max, &*sum, &*target_logit, targets].iter().all(|x| x.n_elements() == t);
    assert!(fits, "cross_entropy_forward of {logits:?}, {n_valid} valid, with {max:?}, {sum:?}, {target_logit:?}, {targets:?}");
    let [max, sum, target_logit] = [max, sum, target_logit].map(|x| Shared::new(x.f32_mut()));
    let targets = targets.u32();
    float!(logits.dtype(), E => {
        let logits = elements::<E>(logits);
        for_rows(t, columns, |rows| {
            // SAFETY: the ranges are disjoint.
            let [max, sum, target_logit] = [&max, &sum, &target_logit].map(|x| unsafe { x.part(rows.clone()) });
            for (i, t) in rows.enumerate() {
                // Its second reading is from the cache.
                let row = &logits[t * columns..][..n_valid];
                max[i] = row_max(isa, row);
                sum[i] = row_sum(isa, row, max[i]);
                target_logit[i] = target_of(row, targets[t], first_row, n_valid).1;
            }
        });
    });
}

/// See `Device::cross_entropy_gradient`.
pub fn gradient(isa: Isa, logits: &mut Tensor, [max, sum, targets, weights]: [&Tensor; 4], (first_row, n_valid): (usize, usize)) {
    let (t, columns) = (logits.n_rows(), logits.row_len());
    assert!(n_valid <= columns && weights.n_elements() == t, "cross_entropy_gradient of {logits:?}, {n_valid} valid, {weights:?}");
    let (max, sum, targets, weights) = (max.f32(), sum.f32(), targets.u32(), weights.f32());
    float!(logits.dtype(), E => {
        let logits = Shared::new(elements_mut::<E>(logits));
        for_rows(t, columns, |rows| {
            for t in rows {
                // SAFETY: each row is one task's.
                let row = unsafe { logits.part(t * columns..(t + 1) * columns) };
                if weights[t] == 0.0 {
                    row.fill(E::from_f32(0.0));
                    continue;
                }
                let target = target_of(row, targets[t], first_row, n_valid).0;
                row_gradient(isa, row, max[t], sum[t], weights[t], target, n_valid);
            }
        });
    });
}
