//! Products of few rows, whose time is that of reading the weights once (kernels/gemv.cu), with the norm before them and the activation
//! behind them within.

use super::super::backend::{Arg, Grid, Kernel, Matrix};
use super::super::grid::{CHUNK, int, optional, row_threads};
use super::super::{Cuda, activation, assert_rows};
use super::{VECTOR_BYTES, matrix, sizes_of};
use crate::device::{Activation, Gemm, NormKind, NormOf};
use crate::tensor::{DType, Tensor};

/// Most rows: with more the arithmetic takes longer than the reads.
const FEW_ROWS: usize = 4;
/// Warps of a block.
const WARPS: usize = 8;
/// Terms of a row that a warp has under way at one time.
const TERMS: usize = 2048;
/// Of normalised rows in shared memory: what a block has without asking, less its sums.
const NORMED_BYTES: usize = 47 << 10;

/// Warps among which the terms of a row are divided. Of k alone, so that an output has the same bits whatever else is computed.
fn parts(k: usize) -> usize {
    match k / TERMS {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => 4,
    }
}

/// Whether kernels/gemv.cu takes the product.
pub(super) fn is_of_few_rows((c, a, b): (&Matrix, &Matrix, &Matrix), how: Gemm) -> bool {
    how == Gemm::NT && c.rows <= FEW_ROWS && a.columns > 0 && a.dtype == DType::BF16 && is_in_vectors(a) && is_in_vectors(b)
}

fn is_in_vectors(x: &Matrix) -> bool {
    x.address % VECTOR_BYTES == 0 && x.columns % CHUNK == 0
}

impl Cuda {
    /// out[m, n] = a[m, k] b[n, k]^T of at most FEW_ROWS rows, by the kernel of this name.
    pub(super) fn multiply_few_rows(&self, name: &str, [out, a, b]: [Arg; 3], n: usize, k: usize) {
        let args = [out, a, b, int(n), int(k), int(parts(k))];
        self.backend.launch(&Kernel::of("gemv", name, DType::BF16), grid(n, k), &args);
    }

    /// See `Device::gemm_activation`: one launch for few rows.
    pub(in super::super) fn gemm_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        let (c, a, b) = (matrix(raised), matrix(x), matrix(w));
        let (m, n, k) = sizes_of((&c, &a, &b), Gemm::NT);
        let fits = out.n_rows() == m && out.row_len() * kind.inputs_per_output() == n && out.dtype() == c.dtype;
        assert!(fits, "gemm_activation to {out:?} over {raised:?}");
        if m > 0 && n > 0 && c.dtype == DType::BF16 && is_of_few_rows((&c, &a, &b), Gemm::NT) {
            let name = format!("gemv_{}_{m}", activation::name(kind));
            return self.multiply_few_rows(&name, [Cuda::arg_mut(out), Cuda::arg(x), Cuda::arg(w)], n, k);
        }
        self.gemm(raised, x, w, Gemm::NT);
        self.activation(out, raised, kind);
    }

    /// See `Device::takes_norms`.
    pub(in super::super) fn takes_norms(&self, x: &Tensor, w: &Tensor) -> bool {
        let (a, b) = (matrix(x), matrix(w));
        let fits = (1..=FEW_ROWS).contains(&a.rows) && b.rows > 0 && a.rows * a.columns * DType::BF16.bytes() <= NORMED_BYTES;
        fits && a.columns > 0 && [a.dtype, b.dtype] == [DType::BF16; 2] && is_in_vectors(&a) && is_in_vectors(&b)
    }

    /// See `Device::add_norm_gemm`.
    pub(in super::super) fn add_norm_gemm(
        &self,
        out: &mut Tensor,
        sum: &mut Tensor,
        [x, delta]: [&Tensor; 2],
        norm: NormOf,
        w: &Tensor,
        kind: Option<Activation>,
    ) {
        let (m, n, k) = (x.n_rows(), w.n_rows(), w.row_len());
        assert_rows("add_norm_gemm", &[x, delta, sum], m, k);
        assert_rows("add_norm_gemm", &[out], m, n / kind.map_or(1, Activation::inputs_per_output));
        let of_columns = |x: &Tensor| x.n_elements() == k && x.dtype() == DType::BF16;
        let whole = [delta, sum].iter().all(|x| is_in_vectors(&matrix(x)) && x.dtype() == DType::BF16) && out.dtype() == DType::BF16;
        let fits = self.takes_norms(x, w) && whole && of_columns(norm.gain) && norm.bias.is_none_or(of_columns);
        assert!(fits, "add_norm_gemm of {x:?} and {delta:?} by {w:?} to {out:?}");
        let name = kind.map_or(format!("gemv_norm_{m}"), |kind| format!("gemv_norm_{}_{m}", activation::name(kind)));
        let mut args = vec![Cuda::arg_mut(out), Cuda::arg_mut(sum), Cuda::arg(x), Cuda::arg(delta), Cuda::arg(norm.gain)];
        args.extend([optional(norm.bias), Cuda::arg(w)]);
        args.extend([n, k, parts(k), row_threads(k) as usize, usize::from(norm.how.kind == NormKind::LayerNorm1P)].map(int));
        args.push(Arg::Float(norm.how.eps));
        let grid = Grid { shared_bytes: (m * k * DType::BF16.bytes()) as u32, ..grid(n, k) };
        self.backend.launch(&Kernel::of("gemv", &name, DType::BF16), grid, &args);
    }
}

/// Blocks over the n rows of a matrix.
fn grid(n: usize, k: usize) -> Grid {
    Grid::line(n.div_ceil(WARPS / parts(k)), 32 * WARPS as u32)
}
