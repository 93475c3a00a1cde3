//! Products of E4M3 by cuBLASLt: in its column-major terms the first operand transposed and the second not, which is the one form that
//! Hopper's tensor cores have for 8 bits, and that of x W^T for row-major x and W. Sums in f32 without the shortened "fast" ones.

use super::{Blas, On, WORKSPACE_BYTES};
use crate::device::Fp8Scales;
use crate::device::cuda::backend::{Matrix, ScalesAt};
use crate::tensor::DType;
use cudarc::cublaslt::{result, sys};
use std::ffi::c_void;

/// Descriptors of a product; they live as long as the process.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// What decides a plan: m, n, k, the output's type, the scales.
pub(super) type Key = (usize, usize, usize, DType, bool);

type Attribute = sys::cublasLtMatmulDescAttributes_t;

/// Sets an attribute of a descriptor.
fn set<T>(product: sys::cublasLtMatmulDesc_t, name: Attribute, value: T) -> std::result::Result<(), result::CublasError> {
    // SAFETY: a live descriptor; the value has the attribute's type.
    unsafe { result::set_matmul_desc_attribute(product, name, (&raw const value).cast(), size_of::<T>()) }
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        (m, n, k, dtype, by_rows): Key,
        scales: &ScalesAt,
    ) -> std::result::Result<Plan, result::CublasError> {
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        // cublasOperation_t: 1 transposed, 0 as it is.
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, 1i32)?;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, 0i32)?;
        if by_rows {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode)?;
        }
        let of_out = if dtype == DType::BF16 { sys::cudaDataType_t::CUDA_R_16BF } else { sys::cudaDataType_t::CUDA_R_32F };
        let fp8 = sys::cudaDataType_t::CUDA_R_8F_E4M3;
        let layout = |of, rows: usize, columns: usize| result::create_matrix_layout(of, rows as u64, columns as u64, rows as i64);
        let layouts = [layout(fp8, k, n)?, layout(fp8, k, m)?, layout(of_out, n, m)?];
        let mut plan = Plan { product, layouts, algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] } };
        plan.point_at(scales)?;
        let preference = result::create_matmul_pref()?;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let workspace = WORKSPACE_BYTES;
        let [first, second, out] = layouts;
        // SAFETY: live descriptors of one product; the value has the attribute's size.
        let chosen = unsafe {
            result::set_matmul_pref_attribute(preference, most, (&raw const workspace).cast(), size_of::<usize>())?;
            let chosen = result::get_matmul_algo_heuristic(handle, product, first, second, out, out, preference);
            result::destroy_matmul_pref(preference)?;
            chosen
        };
        plan.algorithm = chosen?.algo;
        Ok(plan)
    }

    /// The first operand is b.
    fn point_at(&self, scales: &ScalesAt) -> std::result::Result<(), result::CublasError> {
        set(self.product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scales.b)?;
        set(self.product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scales.a)
    }
}

impl Blas {
    /// out = a b^T times the scales, on a stream; shapes agree, k and n are multiples of 16.
    ///
    /// # Safety
    /// As of [`Blas::gemm`], the scales too.
    pub unsafe fn gemm_fp8(&self, out: Matrix, (a, b): (Matrix, Matrix), scales: ScalesAt, on: On) {
        let key = (a.rows, b.rows, a.columns, out.dtype, scales.of == Fp8Scales::Rows);
        let (alpha, beta) = (1.0f32, 0.0f32);
        // Held during the call: the descriptor says where the scales are.
        let mut plans = self.fp8_plans.lock().expect("no panic while holding the plans");
        let known =
            plans.get(&key).copied().map_or_else(|| Plan::new(self.handle, key, &scales), |plan| plan.point_at(&scales).map(|()| plan));
        let done = known.and_then(|plan| {
            plans.insert(key, plan);
            let [first, second, to] = plan.layouts;
            let at = |address: u64| address as *const c_void;
            // SAFETY: descriptors and algorithm were made for these sizes; scalars are read during the call; memory as promised.
            unsafe {
                result::matmul(
                    self.handle,
                    plan.product,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    at(b.address),
                    first,
                    at(a.address),
                    second,
                    at(out.address),
                    to,
                    out.address as *mut c_void,
                    to,
                    &plan.algorithm,
                    on.workspace as *mut c_void,
                    WORKSPACE_BYTES,
                    on.stream,
                )
            }
        });
        done.unwrap_or_else(|error| panic!("gemm_fp8 {out:?} = {a:?} x {b:?}, {scales:?}: {error}"));
    }
}
