//! Matrix products: shapes are checked here, the backend multiplies.

use super::Cuda;
use super::backend::Matrix;
use crate::device::{Gemm, Store};
use crate::tensor::{DType, Tensor};

/// A tensor as a matrix: its rows by all of its other dims.
pub(super) fn matrix(x: &Tensor) -> Matrix {
    Matrix { address: Cuda::address(x), rows: x.n_rows(), columns: x.row_len(), dtype: x.dtype() }
}

impl Cuda {
    /// See `Device::gemm`.
    pub(super) fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        let (c, a, b) = (matrix(out), matrix(a), matrix(b));
        let (m, k) = if how.trans_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
        let (k_of_b, n) = if how.trans_b { (b.columns, b.rows) } else { (b.rows, b.columns) };
        assert!(c.rows == m && c.columns == n && k == k_of_b, "gemm {how:?}: {out:?} from {a:?} and {b:?}");
        let same = a.dtype == b.dtype && [DType::F32, DType::BF16].contains(&a.dtype);
        let stored = c.dtype == DType::F32 || c.dtype == DType::BF16 && a.dtype == DType::BF16;
        assert!(same && stored, "gemm: {:?} from {:?} and {:?}", c.dtype, a.dtype, b.dtype);
        if m == 0 || n == 0 {
            return;
        }
        if k > 0 {
            self.backend.gemm(c, a, b, how);
        } else if how.out == Store::Assign {
            self.backend.zero(c.address, out.n_bytes());
        }
    }
}
