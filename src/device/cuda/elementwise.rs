//! Flat arrays: copies between types, sums, scaling, the sum of squares.

use super::Cuda;
use super::backend::{Grid, Kernel};
use super::grid::long;
use crate::tensor::{DType, Tensor};

/// Elements of which one block sums the squares.
const SQUARES: usize = 4096;

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

    /// See `Device::scale`.
    pub(super) fn scale(&self, x: &mut Tensor, factor: f32) {
        let n = x.n_elements();
        if n > 0 {
            let args = [Cuda::arg_mut(x), long(n), super::backend::Arg::Float(factor)];
            self.backend.launch(&Kernel::of("elementwise", "scale", x.dtype()), self.flat(n), &args);
        }
    }

    /// See `Device::sum_squares`.
    pub(super) fn sum_squares(&self, x: &Tensor) -> f64 {
        let n = x.n_elements();
        assert_eq!(x.dtype(), DType::F32, "sum_squares of {x:?}");
        if n == 0 {
            return 0.0;
        }
        let n_blocks = n.div_ceil(SQUARES);
        // The total, then one sum a block.
        let sums = self.workspace((1 + n_blocks) * size_of::<f64>());
        let partial = sums.arg_at(size_of::<f64>());
        self.backend.launch(
            &Kernel::of("elementwise", "sum_squares", DType::F32),
            Grid::line(n_blocks, 256),
            &[partial, Cuda::arg(x), long(n)],
        );
        let kernel = Kernel { file: "elementwise", name: "sum_partial_f64".into() };
        self.backend.launch(&kernel, Grid::line(1, 256), &[sums.arg(), partial, long(n_blocks)]);
        let mut total = [0u8; size_of::<f64>()];
        self.backend.download(sums.address(), &mut total);
        f64::from_ne_bytes(total)
    }
}
