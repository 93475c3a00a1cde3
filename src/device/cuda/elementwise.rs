//! Flat arrays: copies between types, sums, scaling, the sum of squares.

use super::Cuda;
use super::backend::{Grid, Kernel};
use super::grid::{int, long, rows};
use crate::device::assert_joins;
use crate::tensor::{DType, Tensor};

/// Elements of which one block sums the squares.
const SQUARES: usize = 4096;
/// Threads that add up the sums of the blocks.
const SUM_THREADS: u32 = 1024;

impl Cuda {
    /// See `Device::copy`.
    pub(super) fn copy(&self, out: &mut Tensor, x: &Tensor) {
        self.mixed("copy", out, x);
    }

    /// See `Device::add`.
    pub(super) fn add(&self, x: &mut Tensor, y: &Tensor) {
        self.mixed("add", x, y);
    }

    /// A kernel of two arrays whose dtypes may differ.
    fn mixed(&self, operation: &str, out: &mut Tensor, x: &Tensor) {
        let n = out.n_elements();
        assert_eq!(n, x.n_elements(), "{operation} of {x:?} to {out:?}");
        if n > 0 {
            let kernel = Kernel::of("elementwise", &format!("{operation}_{}", out.dtype().name()), x.dtype());
            self.backend.launch(&kernel, self.flat(n), &[Cuda::arg_mut(out), Cuda::arg(x), long(n)]);
        }
    }

    /// See `Device::join_columns`.
    pub(super) fn join_columns(&self, out: &mut Tensor, parts: &Tensor) {
        assert_joins(out, parts);
        if out.n_elements() > 0 {
            let sizes = [out.n_rows(), out.row_len(), parts.row_len()].map(int);
            let args = [&[Cuda::arg_mut(out), Cuda::arg(parts)], &sizes[..]].concat();
            self.backend.launch(&Kernel::of("elementwise", "join_columns", parts.dtype()), rows(out.n_rows(), out.row_len()), &args);
        }
    }

    /// See `Device::scale`.
    pub(super) fn scale(&self, x: &mut Tensor, factor: f32) {
        let n = x.n_elements();
        if n > 0 {
            let args = [Cuda::arg_mut(x), long(n), super::backend::Arg::Float(factor)];
            self.backend.launch(&Kernel::of("elementwise", "scale", x.dtype()), self.flat(n), &args);
        }
    }

    /// See `Device::sum_squares_of`.
    pub(super) fn sum_squares_of(&self, all: &[&Tensor]) -> f64 {
        let all: Vec<&&Tensor> = all.iter().filter(|x| x.n_elements() > 0).collect();
        let Some(most) = all.iter().map(|x| x.n_elements().div_ceil(SQUARES)).max() else { return 0.0 };
        // The total of each, then the sums of the blocks of the one at work.
        let sums = self.workspace((all.len() + most) * size_of::<f64>());
        let partial = sums.arg_at(all.len() * size_of::<f64>());
        for (i, x) in all.iter().enumerate() {
            let (n, n_blocks) = (x.n_elements(), x.n_elements().div_ceil(SQUARES));
            assert_eq!(x.dtype(), DType::F32, "sum_squares of {x:?}");
            let kernel = Kernel::of("elementwise", "sum_squares", DType::F32);
            self.backend.launch(&kernel, Grid::line(n_blocks, 256), &[partial, Cuda::arg(x), long(n)]);
            let kernel = Kernel { file: "elementwise", name: "sum_partial_f64".into() };
            self.backend.launch(&kernel, Grid::line(1, SUM_THREADS), &[sums.arg_at(i * size_of::<f64>()), partial, long(n_blocks)]);
        }
        let mut totals = vec![0f64; all.len()];
        self.backend.download(sums.address(), bytemuck::cast_slice_mut(&mut totals));
        totals.iter().sum()
    }
}
