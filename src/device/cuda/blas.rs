//! Matrix products by cuBLASLt: row-major operands handed over in its column-major terms, the algorithm chosen once a shape.
//!
//! No epilogue of the library is used. Its ReLU is not squared, and the mask it keeps holds signs, while the backward of the squared ReLU
//! needs the values; SwiGLU multiplies neighbouring columns; linear layers have no bias; and residual sums are fused into the norm that
//! follows, which reads the sum anyway. What is left is the sum into f32 gradients, which is beta = 1.

mod choice;
mod fp8;

use super::backend::{Algorithms, Matrix, ScalesAt};
use crate::device::{Fp8Scales, Gemm, Store};
use crate::error::{Error, Kind, Result};
use crate::tensor::DType;
use cudarc::cublaslt::{result, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// What the library may use beside the operands: its recommendation for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// As `cublasLtGetVersion` counts: 13.0.0.
const OLDEST: usize = 130_000;
/// The largest alignment it asks about.
const MOST_ALIGNMENT: u32 = 256;

/// One operand as the library sees it: a row-major [rows, columns] is its column-major [columns, rows].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Operand {
    rows: usize,
    columns: usize,
    dtype: DType,
    transposed: bool,
    alignment: u32,
}

impl Operand {
    fn of(matrix: &Matrix, transposed: bool) -> Operand {
        let alignment = 1u32 << matrix.address.trailing_zeros().min(MOST_ALIGNMENT.trailing_zeros());
        Operand { rows: matrix.columns, columns: matrix.rows, dtype: matrix.dtype, transposed, alignment }
    }
}

/// A product as it is asked for: out = or += op(a) op(b), of E4M3 times the scales.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Assigned or added to.
    pub out: Matrix,
    /// The first operand as it is stored.
    pub a: Matrix,
    /// The second.
    pub b: Matrix,
    /// Transpositions, and whether `out` is added to.
    pub how: Gemm,
    /// Where the scales of E4M3 lie.
    pub scales: Option<ScalesAt>,
}

/// What decides the algorithm of a product: out^T = op(b)^T op(a)^T, all column-major: the first operand is b, the second a.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Product {
    first: Operand,
    second: Operand,
    out: Operand,
    scales: Option<Fp8Scales>,
}

impl Product {
    fn of(asked: &Asked) -> Product {
        let Asked { out, a, b, how, scales } = asked;
        let (first, second) = (Operand::of(b, how.trans_b), Operand::of(a, how.trans_a));
        Product { first, second, out: Operand::of(out, false), scales: scales.map(|scales| scales.of) }
    }
}

/// Descriptors of a product and the algorithm for it. Descriptors live as long as the process.
#[derive(Clone, Copy)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    first: sys::cublasLtMatrixLayout_t,
    second: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// Whether the algorithm is the one that stays.
    is_chosen: bool,
}

/// The library, with the plans made so far. Plans live as long as it.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    algorithms: Algorithms,
    /// GPU and library, of which a choice holds.
    machine: String,
    plans: Mutex<HashMap<Product, Plan>>,
    /// Held while a descriptor says where the scales of one call are.
    pointing: Mutex<()>,
}

// SAFETY: a handle of cuBLASLt may be used by several threads; descriptors are changed under a lock only.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Err when there is no cuBLASLt on this machine, or one that is older than the declarations that are used.
pub fn check_present() -> Result<()> {
    let refused =
        |wrong: String| Err(Error::recipe(wrong).remedy("install CUDA 13 or add its lib64 to LD_LIBRARY_PATH, or run with --device cpu"));
    // SAFETY: only opens a library.
    if !unsafe { sys::is_culib_present() } {
        return refused("no CUDA matrix library: libcublasLt.so.13 was not found on this machine".into());
    }
    // SAFETY: reads a constant of the library.
    let version = unsafe { sys::cublasLtGetVersion() };
    if version < OLDEST {
        return refused(format!("libcublasLt is {}.{} on this machine, 13.0 is needed", version / 10_000, version / 100 % 100));
    }
    Ok(())
}

impl Blas {
    /// Opens the library, which is present, in the context of the calling thread, on a GPU of this name.
    pub fn new(algorithms: Algorithms, gpu: &str) -> Result<Blas> {
        let handle = result::create_handle().map_err(|error| Error::new(Kind::Other, format!("cuBLASLt does not start: {error}")))?;
        // SAFETY: reads a constant of the library.
        let machine = format!("{gpu}, cuBLASLt {}", unsafe { sys::cublasLtGetVersion() });
        Ok(Blas { handle, algorithms, machine, plans: Mutex::default(), pointing: Mutex::default() })
    }

    /// Whether this product's algorithm is still to be measured, by [`Blas::measure`]. Until then the library's first proposal is used.
    pub fn is_unmeasured(&self, asked: &Asked) -> bool {
        self.algorithms == Algorithms::Measured && !self.plan(asked).is_chosen
    }

    /// Takes the fastest of the library's proposals for a product and keeps it: `fastest` is given how many there are and what runs one of
    /// them, false where it does not run, writing to `spare` (as large as `out`) in the place of `out`.
    ///
    /// # Safety
    /// As of [`Blas::gemm`]; the stream is not being captured.
    pub unsafe fn measure(
        &self,
        asked: &Asked,
        spare: u64,
        on: On,
        fastest: impl FnOnce(usize, &mut dyn FnMut(usize) -> bool) -> Option<usize>,
    ) {
        let (product, plan) = (Product::of(asked), self.plan(asked));
        let proposals = plan.proposals(self.handle, &product, Algorithms::Measured);
        let mut run = |which: usize| {
            // SAFETY: as promised by the caller.
            unsafe { self.multiply(&Plan { algorithm: proposals[which], ..plan }, asked, spare, on) }.is_ok()
        };
        let fastest = fastest(proposals.len(), &mut run).map(|which| proposals[which]);
        // Where none ran, as on a GPU that has failed, nothing was learnt.
        if let Some(algorithm) = &fastest {
            choice::keep(&self.machine, &product, algorithm);
        }
        self.choose(product, Plan { algorithm: fastest.unwrap_or(plan.algorithm), ..plan });
    }

    /// Stays with the library's first proposal for a product, until the next start.
    pub fn take_first(&self, asked: &Asked) {
        self.choose(Product::of(asked), self.plan(asked));
    }

    fn choose(&self, product: Product, plan: Plan) {
        self.plans.lock().expect("no panic while holding the plans").insert(product, Plan { is_chosen: true, ..plan });
    }

    /// GPU and library, of which a choice by time holds; None where algorithms are fixed.
    pub fn machine(&self) -> Option<&str> {
        (self.algorithms == Algorithms::Measured).then_some(&*self.machine)
    }

    fn plan(&self, asked: &Asked) -> Plan {
        let product = Product::of(asked);
        let mut plans = self.plans.lock().expect("no panic while holding the plans");
        *plans.entry(product).or_insert_with(|| {
            let plan = Plan::new(self, &product, asked.scales.as_ref());
            plan.unwrap_or_else(|error| panic!("cuBLASLt has no algorithm for {asked:?}: {error}"))
        })
    }

    /// The product on a stream. Shapes agree; those of E4M3 are as [`fp8`] says. Err when the library refuses it.
    ///
    /// # Safety
    /// Matrices, scales and the workspace are memory of the calling thread's context, which is the handle's; the stream is of it.
    pub unsafe fn gemm(&self, asked: &Asked, on: On) -> std::result::Result<(), result::CublasError> {
        let plan = self.plan(asked);
        // SAFETY: as promised by the caller.
        unsafe { self.multiply(&plan, asked, asked.out.address, on) }
    }

    /// `to` = product, or `out` + product.
    ///
    /// # Safety
    /// As of [`Blas::gemm`], for a product that the plan is of.
    unsafe fn multiply(&self, plan: &Plan, asked: &Asked, to: u64, on: On) -> std::result::Result<(), result::CublasError> {
        let alpha = 1.0f32;
        let beta = if asked.how.out == Store::Accumulate { 1.0f32 } else { 0.0 };
        let at = |address: u64| address as *const c_void;
        let _pointing = match &asked.scales {
            Some(scales) => {
                let pointing = self.pointing.lock().expect("no panic while pointing at scales");
                fp8::point_at(plan.product, scales)?;
                Some(pointing)
            }
            None => None,
        };
        // SAFETY: descriptors and algorithm were made for these sizes; scalars are read during the call; memory as promised.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(asked.b.address),
                plan.first,
                at(asked.a.address),
                plan.second,
                at(asked.out.address),
                plan.out,
                to as *mut c_void,
                plan.out,
                &plan.algorithm,
                on.workspace as *mut c_void,
                WORKSPACE_BYTES,
                on.stream,
            )
        }
    }
}

/// Where products run: a stream, and WORKSPACE_BYTES of memory that only this stream uses.
#[derive(Clone, Copy)]
pub struct On {
    /// Of the handle's context.
    pub stream: sys::cudaStream_t,
    /// Of the handle's context.
    pub workspace: u64,
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is destroyed once. The plans' descriptors are plain host memory that ends with the process.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn layout(operand: &Operand) -> std::result::Result<sys::cublasLtMatrixLayout_t, result::CublasError> {
    let of_type = match operand.dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F8E4M3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        DType::U32 => unreachable!("no product is of integers"),
    };
    result::create_matrix_layout(of_type, operand.rows as u64, operand.columns as u64, operand.rows as i64)
}

/// Sets an attribute of a descriptor.
fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    name: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> std::result::Result<(), result::CublasError> {
    // SAFETY: a live descriptor; the value has the attribute's type.
    unsafe { result::set_matmul_desc_attribute(product, name, (&raw const value).cast(), size_of::<T>()) }
}

impl Plan {
    /// With the algorithm kept from an earlier start, else the library's first proposal.
    fn new(blas: &Blas, of: &Product, scales: Option<&ScalesAt>) -> std::result::Result<Plan, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        for (name, operand) in [(CUBLASLT_MATMUL_DESC_TRANSA, &of.first), (CUBLASLT_MATMUL_DESC_TRANSB, &of.second)] {
            // cublasOperation_t: 0 as it is, 1 transposed.
            set(product, name, i32::from(operand.transposed))?;
        }
        if let Some(scales) = scales {
            fp8::describe(product, scales)?;
        }
        let (first, second, out) = (layout(&of.first)?, layout(&of.second)?, layout(&of.out)?);
        let plan = Plan { product, first, second, out, algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] }, is_chosen: false };
        if blas.algorithms == Algorithms::Measured
            && let Some(algorithm) = choice::kept(&blas.machine, of).filter(|algorithm| plan.accepts(blas.handle, algorithm))
        {
            return Ok(Plan { algorithm, is_chosen: true, ..plan });
        }
        let proposals = plan.proposals(blas.handle, of, blas.algorithms);
        let none = result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        Ok(Plan { algorithm: *proposals.first().ok_or(none)?, is_chosen: proposals.len() == 1, ..plan })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element (i, j) of op(operand) in column-major terms, as cuBLASLt reads memory.
    fn element(memory: &[f64], operand: &Operand, i: usize, j: usize) -> f64 {
        let (row, column) = if operand.transposed { (j, i) } else { (i, j) };
        memory[column * operand.rows + row]
    }

    /// The column-major product that is asked for is the row-major one that is wanted, for every transposition: a swapped operand
    /// or leading dimension would be seen only on a GPU.
    #[test]
    fn products_are_the_same_in_column_major_terms() {
        let (m, n, k) = (3, 5, 4);
        let tt = Gemm { trans_a: true, ..Gemm::NT };
        for how in [Gemm::NN, Gemm::NT, Gemm::TN, tt] {
            let matrix = |rows, columns| Matrix { address: 512, rows, columns, dtype: DType::F32 };
            let a = if how.trans_a { matrix(k, m) } else { matrix(m, k) };
            let b = if how.trans_b { matrix(n, k) } else { matrix(k, n) };
            let out = matrix(m, n);
            let values = |seed: usize, n: usize| (0..n).map(|i| ((i * i + seed * i) % 17) as f64).collect::<Vec<f64>>();
            let (x, y) = (values(3, m * k), values(5, k * n));
            let product = Product::of(&Asked { out, a, b, how, scales: None });
            let mut found = vec![0.0; m * n];
            assert_eq!((product.out.rows, product.out.columns), (n, m));
            for i in 0..n {
                for j in 0..m {
                    let terms = (0..k).map(|l| element(&y, &product.first, i, l) * element(&x, &product.second, l, j));
                    found[j * product.out.rows + i] = terms.sum::<f64>();
                }
            }
            for i in 0..m {
                for j in 0..n {
                    let at_a = |l: usize| if how.trans_a { x[l * m + i] } else { x[i * k + l] };
                    let at_b = |l: usize| if how.trans_b { y[j * k + l] } else { y[l * n + j] };
                    let wanted: f64 = (0..k).map(|l| at_a(l) * at_b(l)).sum();
                    assert_eq!(found[i * n + j], wanted, "{how:?} at {i}, {j}");
                }
            }
        }
    }

    /// The alignment told is never more than the address has: a kernel chosen for more would fault on views of rows.
    #[test]
    fn alignment_is_that_of_the_address() {
        for (address, alignment) in [(512, 256), (256, 256), (528, 16), (514, 2), (1 << 40, 256)] {
            let matrix = Matrix { address, rows: 1, columns: 1, dtype: DType::BF16 };
            assert_eq!(Operand::of(&matrix, false).alignment, alignment);
        }
    }
}
