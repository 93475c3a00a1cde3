//! Which algorithms a product may get, by the library, and which it got in an earlier start.

use super::{Plan, Product, WORKSPACE_BYTES};
use crate::device::cuda::backend::Algorithms;
use crate::device::cuda::fastest::Kept;
use cudarc::cublaslt::{result, sys};
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

/// Most proposals that are timed.
const MOST_PROPOSALS: usize = 8;

type Algorithm = sys::cublasLtMatmulAlgo_t;

impl Plan {
    /// What the library proposes, the likely fastest first: several to be timed, or the one that is fixed.
    pub(super) fn proposals(&self, handle: sys::cublasLtHandle_t, of: &Product, algorithms: Algorithms) -> Vec<Algorithm> {
        self.ask(handle, of, algorithms).unwrap_or_default()
    }

    fn ask(
        &self,
        handle: sys::cublasLtHandle_t,
        of: &Product,
        algorithms: Algorithms,
    ) -> std::result::Result<Vec<Algorithm>, result::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let preference = result::create_matmul_pref()?;
        let set = |name, value: *const c_void, bytes| {
            // SAFETY: a live preference; the value has the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference, name, value, bytes) }
        };
        let workspace_bytes = WORKSPACE_BYTES;
        set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace_bytes).cast(), size_of::<usize>())?;
        // Views of rows begin anywhere; the library would count on 256 bytes.
        for (name, alignment) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of.first.alignment),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of.second.alignment),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of.out.alignment),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of.out.alignment),
        ] {
            set(name, std::ptr::from_ref(alignment).cast(), size_of::<u32>())?;
        }
        let wanted = match algorithms {
            Algorithms::Measured => MOST_PROPOSALS,
            Algorithms::Fixed => {
                // Parts of a sum that were made side by side are added in an order of their own, whichever scheme adds them.
                let whole_sums = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
                set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const whole_sums).cast(), size_of::<u32>())?;
                1
            }
        };
        let mut found = [const { MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed() }; MOST_PROPOSALS];
        let mut n: c_int = 0;
        // SAFETY: live descriptors of one product; room for as many results as are wanted.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.product,
                self.first,
                self.second,
                self.out,
                self.out,
                preference,
                wanted as c_int,
                found[0].as_mut_ptr(),
                &mut n,
            )
        };
        // SAFETY: made above, destroyed once.
        unsafe { result::destroy_matmul_pref(preference)? };
        asked.result()?;
        // SAFETY: the library filled the first n.
        let found = found[..n as usize].iter().map(|one| unsafe { one.assume_init_ref() });
        Ok(found.filter(|one| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS).map(|one| one.algo).collect())
    }

    /// Whether the library takes this algorithm for this product, within the workspace.
    pub(super) fn accepts(&self, handle: sys::cublasLtHandle_t, algorithm: &Algorithm) -> bool {
        let mut answer = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: live descriptors of one product; the library reads the algorithm and fills the answer.
        unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.product,
                self.first,
                self.second,
                self.out,
                self.out,
                algorithm,
                answer.as_mut_ptr(),
            );
            status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && answer.assume_init().workspaceSize <= WORKSPACE_BYTES
        }
    }
}

fn place(machine: &str, of: &Product) -> Kept {
    Kept::of("algorithm", machine, of)
}

/// The choice of an earlier start for this product on such a machine.
pub(super) fn kept(machine: &str, of: &Product) -> Option<Algorithm> {
    let words = place(machine, of).read()?;
    let mut data = [0u64; 8];
    if words.len() != size_of_val(&data) {
        return None;
    }
    data.iter_mut().zip(words.chunks_exact(8)).for_each(|(to, from)| *to = u64::from_le_bytes(from.try_into().expect("8 bytes")));
    Some(Algorithm { data })
}

/// Keeps a choice for later starts.
pub(super) fn keep(machine: &str, of: &Product, algorithm: &Algorithm) {
    place(machine, of).write(&algorithm.data.map(u64::to_le_bytes).concat());
}
