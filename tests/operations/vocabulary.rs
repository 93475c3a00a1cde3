//! Cross entropy over a share of the vocabulary, in three passes or two.

use super::{Arg, Case, Init, Kind, Role, arg, assigned, ids};
use crate::oracle::{U, near};

/// A vocabulary shard: rows, columns, of which valid, first row.
#[derive(Clone, Copy)]
pub struct Vocabulary {
    pub t: usize,
    pub columns: usize,
    pub n_valid: usize,
    pub first_row: usize,
}

impl Vocabulary {
    fn shape(&self) -> String {
        format!("[{}, {}] {} valid from {}", self.t, self.columns, self.n_valid, self.first_row)
    }

    /// Targets in and around the shard, its first, last valid and first invalid column among them.
    fn targets(&self) -> Arg {
        ids((0..self.t).map(|t| [self.first_row, self.first_row + self.n_valid.saturating_sub(1), 0, 5 * t + 3][t % 4]).collect())
    }

    fn logits(&self, role: Role) -> Arg {
        arg(&[self.t, self.columns], Kind::Float, role, Init::Random(4.0))
    }

    /// The largest valid logit plus a little, as if another shard held the maximum.
    fn max(&self, logits_at: usize) -> Arg {
        let shape = *self;
        let max = move |v: &[Vec<f64>]| {
            let row = |t: usize| v[logits_at][t * shape.columns..][..shape.n_valid].iter().copied().fold(-1.0, f64::max);
            (0..shape.t).map(|t| row(t) + 0.25 * (t % 3) as f64).collect()
        };
        arg(&[self.t], Kind::F32, Role::Input, Init::From(Box::new(max)))
    }
}

pub fn cross_entropy_max(shape: Vocabulary) -> Case {
    Case {
        operation: "cross_entropy_max",
        shape: shape.shape(),
        args: vec![assigned(&[shape.t], Kind::F32), shape.logits(Role::Input)],
        run: Box::new(move |device, tensors| {
            let [max, logits] = tensors else { unreachable!() };
            device.cross_entropy_max(max, logits, shape.n_valid);
        }),
        oracle: Box::new(move |v, _| {
            let row = |t: usize| v[1][t * shape.columns..][..shape.n_valid].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            vec![(0..shape.t).map(|t| near(row(t), 0.0)).collect()]
        }),
        flops: 0.0,
    }
}

pub fn cross_entropy_sum(shape: Vocabulary) -> Case {
    Case {
        operation: "cross_entropy_sum",
        shape: shape.shape(),
        args: vec![
            assigned(&[shape.t], Kind::F32),
            assigned(&[shape.t], Kind::F32),
            shape.logits(Role::Input),
            shape.max(2),
            shape.targets(),
        ],
        run: Box::new(move |device, tensors| {
            let [sum, target_logit, logits, max, targets] = tensors else { unreachable!() };
            device.cross_entropy_sum(sum, target_logit, logits, max, targets, shape.first_row, shape.n_valid);
        }),
        oracle: Box::new(move |v, _| {
            let (mut sums, mut targets) = (Vec::new(), Vec::new());
            for t in 0..shape.t {
                let row = &v[2][t * shape.columns..][..shape.n_valid];
                // exp(x - max): subtraction and exponential are off by (4 + 1.25 |x - max|) U (EXP in the oracle), the sum by n U.
                let term = |x: &f64| ((x - v[3][t]).exp(), 1.25 * (x - v[3][t]).abs() + shape.n_valid as f64 + 4.0);
                let bound = row.iter().map(term).map(|(e, c)| e * c * U).sum();
                sums.push(near(row.iter().map(|x| term(x).0).sum(), bound));
                let target = v[4][t] as usize;
                let here = target >= shape.first_row && target < shape.first_row + shape.n_valid;
                targets.push(near(if here { row[target - shape.first_row] } else { 0.0 }, 0.0));
            }
            vec![sums, targets]
        }),
        flops: 0.0,
    }
}

pub fn cross_entropy_forward(shape: Vocabulary) -> Case {
    Case {
        operation: "cross_entropy_forward",
        shape: shape.shape(),
        args: [(); 3].map(|()| assigned(&[shape.t], Kind::F32)).into_iter().chain([shape.logits(Role::Input), shape.targets()]).collect(),
        run: Box::new(move |device, tensors| {
            let [max, sum, target_logit, logits, targets] = tensors else { unreachable!() };
            device.cross_entropy_forward(max, sum, target_logit, logits, targets, shape.first_row, shape.n_valid);
        }),
        oracle: Box::new(move |v, _| {
            let [mut maxima, mut sums, mut targets] = [(); 3].map(|()| Vec::new());
            for t in 0..shape.t {
                let row = &v[3][t * shape.columns..][..shape.n_valid];
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // As of cross_entropy_sum; a sum that is scaled whenever a larger logit comes, by eights of them and at the end, is off
                // by 5 U more each time, and by what the differences of the maxima cost, which add up to |x - max|.
                let scaled = 5.0 * (shape.n_valid / 8 + 2) as f64;
                let term = |x: &f64| ((x - max).exp(), 2.5 * (x - max).abs() + shape.n_valid as f64 + 4.0 + scaled);
                let bound = row.iter().map(term).map(|(e, c)| e * c * U).sum();
                maxima.push(near(max, 0.0));
                sums.push(near(row.iter().map(|x| term(x).0).sum(), bound));
                let column = (v[4][t] as usize).checked_sub(shape.first_row).filter(|column| *column < shape.n_valid);
                targets.push(near(column.map_or(0.0, |column| row[column]), 0.0));
            }
            vec![maxima, sums, targets]
        }),
        flops: 0.0,
    }
}

pub fn cross_entropy_gradient(shape: Vocabulary) -> Case {
    let sum = move |v: &[Vec<f64>]| {
        let row = |t: usize| v[0][t * shape.columns..][..shape.n_valid].iter().map(|x| (x - v[1][t]).exp()).sum::<f64>();
        (0..shape.t).map(|t| row(t) + 0.5).collect()
    };
    let weights = (0..shape.t).map(|t| if t % 5 == 1 { 0.0 } else { 0.3 + t as f64 }).collect();
    Case {
        operation: "cross_entropy_gradient",
        shape: shape.shape(),
        args: vec![
            shape.logits(Role::Updated),
            shape.max(0),
            arg(&[shape.t], Kind::F32, Role::Input, Init::From(Box::new(sum))),
            shape.targets(),
            arg(&[shape.t], Kind::F32, Role::Input, Init::Given(weights)),
        ],
        run: Box::new(move |device, tensors| {
            let [logits, max, sum, targets, weights] = tensors else { unreachable!() };
            device.cross_entropy_gradient(logits, max, sum, targets, weights, shape.first_row, shape.n_valid);
        }),
        oracle: Box::new(move |v, _| {
            let element = |at: usize| {
                let (t, c) = (at / shape.columns, at % shape.columns);
                if c >= shape.n_valid || v[4][t] == 0.0 {
                    return near(0.0, 0.0);
                }
                let p = (v[0][at] - v[1][t]).exp() / v[2][t];
                let one = if v[3][t] == (shape.first_row + c) as f64 { 1.0 } else { 0.0 };
                let bound = U * (p * (1.25 * (v[0][at] - v[1][t]).abs() + 8.0) + 2.0 * one);
                near(v[4][t] * (p - one), v[4][t] * bound + 1e-37)
            };
            vec![(0..shape.t * shape.columns).map(element).collect()]
        }),
        flops: 0.0,
    }
}
