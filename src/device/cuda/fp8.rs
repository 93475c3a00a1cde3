//! E4M3 with scales, and products of it.

use super::Cuda;
use super::backend::{Arg, Grid, Kernel, ScalesAt};
use super::grid::{int, row_threads, rows};
use super::matmul::matrix;
use crate::device::Fp8Scales;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

fn kernel(operation: &str, dtype: DType) -> Kernel {
    Kernel::of("fp8", &format!("fp8_{operation}"), dtype)
}

impl Cuda {
    /// See `Device::check_fp8`.
    pub(super) fn check_fp8(&self, scales: Fp8Scales) -> Result<()> {
        let (found, needed) = (self.backend.capability(), if scales == Fp8Scales::Rows { (9, 0) } else { (8, 9) });
        if found >= needed {
            return Ok(());
        }
        let text = |(major, minor): (i32, i32)| format!("{major}.{minor}");
        let wrong = format!("{} has compute capability {}, products of fp8 need {}", self.backend.name(), text(found), text(needed));
        Err(Error::recipe(wrong).remedy("leave --weights out, or use --weights fp8-tensor where 8.9 is enough"))
    }

    /// See `Device::quantise`.
    pub(super) fn quantise(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor) {
        let (n_rows, columns, n_scales) = (x.n_rows(), x.row_len(), scale.n_elements());
        let fits = out.dims() == x.dims() && out.dtype() == DType::F8E4M3 && [1, n_rows].contains(&n_scales);
        assert!(fits, "quantise {x:?} to {out:?}, {scale:?}");
        if n_scales == 0 {
            return;
        }
        let most = self.workspace(n_rows * size_of::<f32>());
        if n_rows > 0 {
            self.backend.launch(&kernel("row_most", x.dtype()), rows(n_rows, columns), &[most.arg(), Cuda::arg(x), int(columns)]);
        }
        let n_each = n_rows / n_scales;
        let grid = Grid::line(n_scales, row_threads(n_each));
        self.backend.launch(&kernel("scale", DType::F32), grid, &[Cuda::arg_mut(scale), most.arg(), int(n_each)]);
        if n_rows * columns == 0 {
            return;
        }
        let step = Arg::Int(i32::from(n_scales > 1));
        let args = [Cuda::arg_mut(out), Cuda::arg(scale), Cuda::arg(x), int(columns), step];
        self.backend.launch(&kernel("quantise", x.dtype()), rows(n_rows, columns), &args);
    }

    /// See `Device::gemm_fp8`.
    pub(super) fn gemm_fp8(&self, out: &mut Tensor, (a, a_scale): (&Tensor, &Tensor), (b, b_scale): (&Tensor, &Tensor)) {
        let (c, a, b) = (matrix(out), matrix(a), matrix(b));
        assert!(c.rows == a.rows && c.columns == b.rows && a.columns == b.columns, "gemm_fp8: {out:?} from {a:?} and {b:?}");
        assert!(a.columns % 16 == 0 && b.rows % 16 == 0, "gemm_fp8: {} x {} are no multiples of 16", b.rows, a.columns);
        let whole = a_scale.n_elements() == 1 && b_scale.n_elements() == 1;
        let by_rows = a_scale.n_elements() == a.rows && b_scale.n_elements() == b.rows;
        assert!(whole || by_rows, "gemm_fp8: scales {a_scale:?} and {b_scale:?}");
        if c.rows * c.columns == 0 {
            return;
        }
        // One token has one scale, which is a row's where the weight has those of rows.
        let of = if b_scale.n_elements() == 1 { Fp8Scales::Tensor } else { Fp8Scales::Rows };
        let scales = ScalesAt { a: Cuda::address(a_scale), b: Cuda::address(b_scale), of };
        self.backend.gemm_fp8(c, a, b, scales);
    }
}
