//! Cross entropy over a vocabulary shard, row by row. Mathematics in the trait's docs.

use super::lanes::{each, kernel, load, store};

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
pub fn target_of<E: super::lanes::Element>(row: &[E], target: u32, first_row: usize, n_valid: usize) -> (Option<usize>, f32) {
    let column = column(target, first_row, n_valid);
    (column, column.map_or(0.0, |column| row[column].get()))
}
