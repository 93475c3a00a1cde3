//! Matrices in float64, the naive formulas on them, and ranks as threads that hold their parts of them.

use trireme::comm::threads;
use trireme::device::cpu::Cpu;
use trireme::device::{NormKind, Scratch, ScratchTensor};
use trireme::model::config::{Init, ParamSpec, Place, Split};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::param::{Param, Purpose};
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Every division over tensor-parallel ranks: how many, and how token rows are held between the regions.
pub const DIVISIONS: [(usize, SequenceMode); 5] = [
    (1, SequenceMode::Replicated),
    (2, SequenceMode::Sharded),
    (2, SequenceMode::Replicated),
    (4, SequenceMode::Sharded),
    (4, SequenceMode::Replicated),
];

/// Row-major, the values of an f32 tensor widened or a result in f64.
#[derive(Clone, PartialEq, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Matrix {
    pub fn from_fn(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Matrix {
        Matrix { rows, columns, values: (0..rows * columns).map(|i| value(i / columns, i % columns)).collect() }
    }

    /// Normal values of this deviation, exact in f32.
    pub fn random(name: &str, rows: usize, columns: usize, std: f64) -> Matrix {
        let noise = Random::new(11, name);
        Matrix::from_fn(rows, columns, |row, column| f64::from((std * noise.normal((row * columns + column) as u64)) as f32))
    }

    pub fn of(tensor: &Tensor) -> Matrix {
        let values = tensor.to_f32_vec().into_iter().map(f64::from).collect();
        Matrix { rows: tensor.n_rows(), columns: tensor.row_len(), values }
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..][..self.columns]
    }

    pub fn transposed(&self) -> Matrix {
        Matrix::from_fn(self.columns, self.rows, |row, column| self.at(column, row))
    }

    pub fn times(&self, other: &Matrix) -> Matrix {
        assert_eq!(self.columns, other.rows);
        let dot = |row: usize, column: usize| (0..self.columns).map(|k| self.at(row, k) * other.at(k, column)).sum();
        Matrix::from_fn(self.rows, other.columns, dot)
    }

    pub fn zip(&self, other: &Matrix, combine: impl Fn(f64, f64) -> f64) -> Matrix {
        assert_eq!((self.rows, self.columns), (other.rows, other.columns));
        Matrix::from_fn(self.rows, self.columns, |row, column| combine(self.at(row, column), other.at(row, column)))
    }

    pub fn plus(&self, other: &Matrix) -> Matrix {
        self.zip(other, |a, b| a + b)
    }

    pub fn map(&self, change: impl Fn(f64) -> f64) -> Matrix {
        Matrix::from_fn(self.rows, self.columns, |row, column| change(self.at(row, column)))
    }

    /// Block `index` of `n` along the rows.
    pub fn row_block(&self, index: usize, n: usize) -> Matrix {
        assert_eq!(self.rows % n, 0);
        let rows = self.rows / n;
        Matrix::from_fn(rows, self.columns, |row, column| self.at(index * rows + row, column))
    }

    /// Block `index` of `n` along the columns.
    pub fn column_block(&self, index: usize, n: usize) -> Matrix {
        self.transposed().row_block(index, n).transposed()
    }

    pub fn stack(parts: &[Matrix]) -> Matrix {
        let values: Vec<f64> = parts.iter().flat_map(|part| part.values.iter().copied()).collect();
        Matrix { rows: values.len() / parts[0].columns, columns: parts[0].columns, values }
    }

    pub fn beside(parts: &[Matrix]) -> Matrix {
        Matrix::stack(&parts.iter().map(Matrix::transposed).collect::<Vec<_>>()).transposed()
    }

    pub fn norm(&self) -> f64 {
        self.values.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    /// |self - expected| / |expected|, as vectors; NaN counts as infinitely far.
    pub fn distance(&self, expected: &Matrix) -> f64 {
        let distance = self.zip(expected, |a, b| a - b).norm() / expected.norm().max(1e-30);
        if distance.is_nan() { f64::INFINITY } else { distance }
    }

    /// A sum of n products in f32 of random signs is off by about eps/2 * sqrt(n/2) of its size (n roundings of partial sums that
    /// grow like sqrt(i)); where results pass through `depth` such operations, errors of random signs add up to sqrt(depth)
    /// times that. Allowed: eps * sqrt(n * depth), nearly three times as much.
    pub fn assert_close(&self, expected: &Matrix, n_terms: usize, depth: usize, what: &str) {
        let allowed = f64::from(f32::EPSILON) * ((n_terms * depth) as f64).sqrt();
        let distance = self.distance(expected);
        assert!(distance <= allowed, "{what}: differs by {distance:.2e}, allowed {allowed:.2e}");
    }
}

/// LayerNorm1P or RMSNorm of each row, by its formula; `bias` is not used by RMSNorm.
pub fn norm_rows(x: &Matrix, gain: &Matrix, bias: &Matrix, kind: NormKind, eps: f64) -> Matrix {
    let h = x.columns as f64;
    Matrix::from_fn(x.rows, x.columns, |row, column| {
        let row = x.row(row);
        match kind {
            NormKind::LayerNorm1P => {
                let mean = row.iter().sum::<f64>() / h;
                let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / h;
                (row[column] - mean) / (variance + eps).sqrt() * (1.0 + gain.values[column]) + bias.values[column]
            }
            NormKind::RmsNorm => row[column] / (row.iter().map(|x| x * x).sum::<f64>() / h + eps).sqrt() * gain.values[column],
        }
    })
}

/// Gradient of `loss` by central differences in f64 of step 1e-5: off by about 1e-10 (truncation h^2, cancellation eps/h), far
/// below the roundings of f32.
pub fn central_differences(x: &Matrix, loss: impl Fn(&Matrix) -> f64) -> Matrix {
    let step = 1e-5;
    Matrix::from_fn(x.rows, x.columns, |row, column| {
        let moved = |by: f64| {
            let mut x = x.clone();
            x.values[row * x.columns + column] += by;
            loss(&x)
        };
        (moved(step) - moved(-step)) / (2.0 * step)
    })
}

/// One rank of a division.
pub struct Rank<'a> {
    pub ctx: Ctx<'a>,
    pub layout: ParallelLayout,
    pub at: Coords,
}

/// What the gradients of `Rank::param` hold before the backward, so that assigning shows.
pub const GRADIENT_BEFORE: f64 = 0.5;

/// Runs `work` on every rank of a division; results in rank order.
pub fn on_ranks<R: Send>((tp, sequence): (usize, SequenceMode), work: impl Fn(&Rank) -> R + Sync) -> Vec<R> {
    threads::run(tp, |world| {
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let ctx = Ctx { device: &device, tp: &*world, scratch: &scratch, sequence, numerics: Numerics::Fast };
        let at = Coords { tp: world.rank(), pp: 0, dp: 0 };
        work(&Rank { ctx, layout: ParallelLayout { tp, ..ParallelLayout::SINGLE }, at })
    })
}

impl Rank<'_> {
    pub fn tensor(&self, x: &Matrix) -> ScratchTensor {
        let mut tensor = self.ctx.take(&[x.rows, x.columns], DType::F32);
        tensor.f32_mut().iter_mut().zip(&x.values).for_each(|(to, &from)| *to = from as f32);
        tensor
    }

    /// The token rows this rank holds between regions.
    pub fn local(&self, x: &Matrix) -> ScratchTensor {
        if self.ctx.is_sharded() { self.tensor(&x.row_block(self.at.tp, self.layout.tp)) } else { self.tensor(x) }
    }

    /// The columns this rank holds inside a region.
    pub fn columns(&self, x: &Matrix) -> ScratchTensor {
        self.tensor(&x.column_block(self.at.tp, self.layout.tp))
    }

    /// This rank's part of a parameter with these values; a matrix of one row is a vector.
    pub fn param(&self, name: &str, global: &Matrix, split: Split) -> Param {
        let shape = if global.rows == 1 { vec![global.columns] } else { vec![global.rows, global.columns] };
        let spec = ParamSpec { name: name.into(), shape, split, decay: false, init: Init::Constant(0.0), place: Place::Head };
        let mut param = Param::new(self.ctx.device, spec, (&self.layout, self.at), DType::F32, Purpose::Training).unwrap();
        let mine = match split {
            Split::None => global.clone(),
            Split::Rows => global.row_block(self.at.tp, self.layout.tp),
            Split::Columns => global.column_block(self.at.tp, self.layout.tp),
            Split::Outputs => unreachable!("not in training"),
        };
        param.value.f32_mut().iter_mut().zip(&mine.values).for_each(|(to, &from)| *to = from as f32);
        param.grad_mut().f32_mut().fill(GRADIENT_BEFORE as f32);
        param
    }
}

/// The gradient of a parameter as a matrix; a vector becomes one row.
pub fn gradient(param: &Param) -> Matrix {
    let grad = Matrix::of(param.grad());
    if param.spec.shape.len() == 1 { grad.transposed() } else { grad }
}

fn assert_all_equal(parts: &[Matrix], what: &str) {
    assert!(parts.iter().all(|part| *part == parts[0]), "{what}: ranks that hold the same thing differ");
}

/// All token rows from what the ranks hold between regions.
pub fn join_tokens((tp, sequence): (usize, SequenceMode), parts: &[Matrix]) -> Matrix {
    if tp > 1 && sequence == SequenceMode::Sharded {
        return Matrix::stack(parts);
    }
    assert_all_equal(parts, "token rows");
    parts[0].clone()
}

/// A whole gradient from the ranks' parts, less what it held before the backward. Gradients of parameters that all ranks hold are
/// partial sums when the rows are divided.
pub fn join_gradients((tp, sequence): (usize, SequenceMode), split: Split, parts: &[Matrix]) -> Matrix {
    let parts: Vec<Matrix> = parts.iter().map(|part| part.map(|x| x - GRADIENT_BEFORE)).collect();
    match split {
        Split::Rows => Matrix::stack(&parts),
        Split::Columns => Matrix::beside(&parts),
        Split::Outputs => unreachable!("not in training"),
        Split::None if tp > 1 && sequence == SequenceMode::Sharded => parts[1..].iter().fold(parts[0].clone(), |sum, part| sum.plus(part)),
        Split::None => {
            assert_all_equal(&parts, "gradients of replicated parameters");
            parts[0].clone()
        }
    }
}
