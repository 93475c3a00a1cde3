//! Which algorithm a product gets: proposals of the library, their times, and the choices of earlier starts, a sealed file each beside
//! the compiled kernels. A file says of which GPU, library and product it is, so that one of another kind under the same name, or a
//! torn one, is as good as none.

use super::{Plan, Product, WORKSPACE_BYTES};
use crate::device::cuda::backend::Algorithms;
use crate::device::cuda::compile::{cache_folder, read_sealed, write_sealed};
use cudarc::cublaslt::{result, sys};
use cudarc::driver;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_64;

/// Most proposals that are timed.
const MOST_PROPOSALS: usize = 8;
/// Calls that are timed together, after one that is not.
const TIMED_CALLS: usize = 4;

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

/// The proposal with which `run` takes the least time on the stream; those that do not run are passed over.
///
/// # Safety
/// `run` asks for work on the stream, which is of the calling thread's context and not being captured.
pub(super) unsafe fn fastest(
    proposals: &[Algorithm],
    run: impl Fn(&Algorithm) -> std::result::Result<(), result::CublasError>,
    stream: sys::cudaStream_t,
) -> Option<Algorithm> {
    let event = || driver::result::event::create(driver::sys::CUevent_flags::CU_EVENT_DEFAULT).expect("an event");
    let (start, end) = (event(), event());
    let time = |algorithm: &Algorithm| -> Option<f32> {
        run(algorithm).ok()?;
        // SAFETY: live events; the stream as promised.
        unsafe {
            driver::result::event::record(start, stream.cast()).ok()?;
            (0..TIMED_CALLS).try_for_each(|_| run(algorithm)).ok()?;
            driver::result::event::record(end, stream.cast()).ok()?;
            driver::result::event::synchronize(end).ok()?;
            driver::result::event::elapsed(start, end).ok()
        }
    };
    let times: Vec<(f32, &Algorithm)> = proposals.iter().filter_map(|algorithm| Some((time(algorithm)?, algorithm))).collect();
    for event in [start, end] {
        // SAFETY: made above, destroyed once; a failure costs an event.
        let _ = unsafe { driver::result::event::destroy(event) };
    }
    times.into_iter().min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, algorithm)| *algorithm)
}

/// What a choice is of, and where it is kept.
fn key_and_path(machine: &str, of: &Product) -> (Vec<u8>, Option<PathBuf>) {
    let key = format!("{machine}, {of:?}\0").into_bytes();
    let path = cache_folder().map(|folder| folder.join(format!("product-{:016x}.algorithm", xxh3_64(&key))));
    (key, path)
}

/// The choice of an earlier start for this product on such a machine.
pub(super) fn kept(machine: &str, of: &Product) -> Option<Algorithm> {
    let (key, path) = key_and_path(machine, of);
    let bytes = read_sealed(&path?)?;
    let words = bytes.strip_prefix(&*key)?;
    let mut data = [0u64; 8];
    if words.len() != size_of_val(&data) {
        return None;
    }
    data.iter_mut().zip(words.chunks_exact(8)).for_each(|(to, from)| *to = u64::from_le_bytes(from.try_into().expect("8 bytes")));
    Some(Algorithm { data })
}

/// Keeps a choice for later starts. Without a place every start measures for itself.
pub(super) fn keep(machine: &str, of: &Product, algorithm: &Algorithm) {
    let (mut bytes, path) = key_and_path(machine, of);
    bytes.extend(algorithm.data.iter().flat_map(|word| word.to_le_bytes()));
    if let Some(path) = path
        && let Err(error) = write_sealed(&path, &bytes)
    {
        log::debug!("{}: not kept for the next start: {error}", path.display());
    }
}
