//! What products of E4M3 have besides: in cuBLASLt's column-major terms the first operand is transposed and the second not, which is the
//! one form that Hopper's tensor cores have for 8 bits, and that of x W^T for row-major x and W; k and n are multiples of 16. Sums in
//! f32 without the shortened "fast" ones, which is the attribute's default.
//!
//! A scale for each row is `OUTER_VEC_32F`, which the library's documentation names for compute capability 9.0, and no other, from CUDA
//! 12.9 on. It has not been seen on a GPU here: where it is refused, the heuristic finds no algorithm and the first product says so.

use super::set;
use crate::device::Fp8Scales;
use crate::device::cuda::backend::ScalesAt;
use cudarc::cublaslt::{result, sys};

type Attribute = sys::cublasLtMatmulDescAttributes_t;

/// How many scales the operands have, and where.
pub(super) fn describe(product: sys::cublasLtMatmulDesc_t, scales: &ScalesAt) -> std::result::Result<(), result::CublasError> {
    if scales.of == Fp8Scales::Rows {
        let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode)?;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode)?;
    }
    point_at(product, scales)
}

/// Where the scales are; the library's first operand is b.
pub(super) fn point_at(product: sys::cublasLtMatmulDesc_t, scales: &ScalesAt) -> std::result::Result<(), result::CublasError> {
    set(product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scales.b)?;
    set(product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scales.a)
}
