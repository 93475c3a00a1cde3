//! E4M3 with scales, and products of it.

use super::Cuda;
use super::backend::{Arg, Grid, Kernel, ScalesAt};
use super::grid::{int, row_threads, rows};
use super::matmul::matrix;
use crate::device::{Fp8Axis, Fp8Scales};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows and columns of a block that looks at columns.
const TILE: usize = 64;

/// Blocks of 256 threads, so many along columns and along rows.
fn tiles(across: usize, down: usize) -> Grid {
    let n = |n: usize| u32::try_from(n).expect("fewer than 2^32 blocks");
    Grid { blocks: (n(across), n(down), 1), threads: 256, shared_bytes: 0 }
}

/// A thread for each of `n`.
fn each(n: usize) -> Grid {
    Grid::line(n.div_ceil(256), 256)
}

fn kernel(operation: &str, dtype: DType) -> Kernel {
    Kernel::of("fp8", &format!("fp8_{operation}"), dtype)
}

/// What products of E4M3 need that this compute capability is not. Scales of rows are cuBLASLt's for Hopper alone: newer GPUs have
/// scales of short pieces of a row in their place, and refuse these.
fn missing(found: (i32, i32), scales: Fp8Scales) -> Option<&'static str> {
    match scales {
        Fp8Scales::Tensor => (found < (8, 9)).then_some("need 8.9 or newer"),
        Fp8Scales::Rows => (found != (9, 0)).then_some("with a scale for each row need 9.0"),
    }
}

impl Cuda {
    /// See `Device::check_fp8`.
    pub(super) fn check_fp8(&self, scales: Fp8Scales) -> Result<()> {
        let found @ (major, minor) = self.backend.capability();
        let Some(needed) = missing(found, scales) else { return Ok(()) };
        let wrong = format!("{} has compute capability {major}.{minor}, products of fp8 {needed}", self.backend.name());
        Err(Error::recipe(wrong).remedy("leave --weights out, or use --weights fp8-tensor where 8.9 or newer is enough"))
    }

    /// See `Device::fp8_sizes`.
    pub(super) fn fp8_sizes(&self, sizes: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        let (n_rows, columns) = (x.n_rows(), x.row_len());
        assert!(sizes.n_elements() == of.n_scales((n_rows, columns)), "fp8_sizes {sizes:?} of {x:?}, {of:?}");
        let of_rows = |to: Arg| {
            if n_rows > 0 {
                self.backend.launch(&kernel("row_most", x.dtype()), rows(n_rows, columns), &[to, Cuda::arg(x), int(columns)]);
            }
        };
        match of {
            Fp8Axis::Rows => of_rows(Cuda::arg_mut(sizes)),
            Fp8Axis::All | Fp8Axis::Transposed => {
                let most = self.workspace(n_rows * size_of::<f32>());
                of_rows(most.arg());
                let args = [Cuda::arg_mut(sizes), most.arg(), int(n_rows)];
                self.backend.launch(&kernel("most", DType::F32), Grid::line(1, row_threads(n_rows)), &args);
            }
            Fp8Axis::Columns if columns == 0 => {}
            Fp8Axis::Columns => {
                // Parts of the rows side by side, enough to fill the device some times.
                let across = columns.div_ceil(TILE);
                let n_parts = (4 * self.backend.processors()).div_ceil(across).clamp(1, n_rows.div_ceil(TILE).max(1));
                let part_rows = n_rows.div_ceil(n_parts);
                let most = self.workspace(n_parts * columns * size_of::<f32>());
                let args = [most.arg(), Cuda::arg(x), int(n_rows), int(columns), int(part_rows)];
                self.backend.launch(&kernel("column_most", x.dtype()), tiles(across, n_parts), &args);
                let args = [Cuda::arg_mut(sizes), most.arg(), int(n_parts), int(columns)];
                self.backend.launch(&kernel("most_of_parts", DType::F32), each(columns), &args);
            }
        }
    }

    /// See `Device::fp8_round`.
    pub(super) fn fp8_round(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        let n_scales = self.assert_rounds(out, scale, x, of);
        if n_scales > 0 {
            self.backend.launch(&kernel("scale", DType::F32), each(n_scales), &[Cuda::arg_mut(scale), int(n_scales)]);
        }
        let (n_rows, columns) = (x.n_rows(), x.row_len());
        if n_rows * columns == 0 {
            return;
        }
        if of.transposes() {
            let step = Arg::Int(i32::from(of == Fp8Axis::Columns));
            let args = [Cuda::arg_mut(out), Cuda::arg(scale), Cuda::arg(x), int(n_rows), int(columns), step];
            return self.backend.launch(&kernel("columns", x.dtype()), tiles(columns.div_ceil(TILE), n_rows.div_ceil(TILE)), &args);
        }
        let step = Arg::Int(i32::from(of == Fp8Axis::Rows));
        let args = [Cuda::arg_mut(out), Cuda::arg(scale), Cuda::arg(x), int(columns), step];
        self.backend.launch(&kernel("quantise", x.dtype()), rows(n_rows, columns), &args);
    }

    /// See `Device::quantise`: rows in one go.
    pub(super) fn quantise(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        if of != Fp8Axis::Rows {
            self.fp8_sizes(scale, x, of);
            return self.fp8_round(out, scale, x, of);
        }
        let (n_rows, columns) = (self.assert_rounds(out, scale, x, of), x.row_len());
        if n_rows > 0 {
            let args = [Cuda::arg_mut(out), Cuda::arg_mut(scale), Cuda::arg(x), int(columns)];
            self.backend.launch(&kernel("rows", x.dtype()), rows(n_rows, columns), &args);
        }
    }

    /// Panics unless the shapes are those of rounding; the number of scales.
    fn assert_rounds(&self, out: &Tensor, scale: &Tensor, x: &Tensor, of: Fp8Axis) -> usize {
        let shape = (x.n_rows(), x.row_len());
        let dims = if of.transposes() { (shape.1, shape.0) } else { shape };
        let fits = (out.n_rows(), out.row_len()) == dims && out.dtype() == DType::F8E4M3;
        assert!(fits && scale.n_elements() == of.n_scales(shape), "rounding {x:?} to {out:?}, {scale:?}, {of:?}");
        scale.n_elements()
    }

    /// See `Device::fp8_widen`.
    pub(super) fn fp8_widen(&self, out: &mut Tensor, codes: &Tensor, scale: &Tensor) {
        let (n_rows, columns, n_scales) = (codes.n_rows(), codes.row_len(), scale.n_elements());
        let fits = out.n_rows() == n_rows && out.row_len() == columns && codes.dtype() == DType::F8E4M3;
        assert!(fits && [1, n_rows].contains(&n_scales), "fp8_widen {codes:?}, {scale:?} to {out:?}");
        if n_rows * columns == 0 {
            return;
        }
        let step = Arg::Int(i32::from(n_scales > 1));
        let args = [Cuda::arg_mut(out), Cuda::arg(codes), Cuda::arg(scale), int(columns), step];
        self.backend.launch(&kernel("widen", out.dtype()), rows(n_rows, columns), &args);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// GPUs before and after Hopper have no scales of rows: said before the first product, which the library would refuse.
    #[test]
    fn scales_of_rows_are_for_hopper_alone() {
        let have = |scales| [(8, 6), (8, 9), (9, 0), (10, 0), (12, 0)].map(|found| missing(found, scales).is_none());
        assert_eq!(have(Fp8Scales::Rows), [false, false, true, false, false]);
        assert_eq!(have(Fp8Scales::Tensor), [false, true, true, true, true]);
    }
}
