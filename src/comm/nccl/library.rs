//! libnccl.so.2, opened where it runs: cudarc's types, our own table of functions. cudarc's own loader looks for `libnccl.so`, which
//! only machines with the development package have, and ends the process when a function is missing.

use crate::error::{Error, Result};
use cudarc::nccl::sys;
pub use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

/// `ncclSuccess`. Results are kept as numbers: a newer library may return one that an enum would not have.
pub const SUCCESS: c_int = sys::ncclResult_t::ncclSuccess as c_int;
/// `ncclInProgress`: a communicator that does not block is still busy with the last call.
pub const IN_PROGRESS: c_int = sys::ncclResult_t::ncclInProgress as c_int;

/// The oldest version that is used, as `ncclGetVersion` counts: 2.18, the first whose communicators that do not block can be
/// aborted at any time.
const OLDEST: c_int = 21_800;
/// What the library is called, in the order of search: as it is installed, as the development package calls it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The version whose `ncclConfig_t` ends with `splitShare`, and its size: every later library fills in what follows.
const CONFIG_VERSION: u32 = 21_700;
const CONFIG_BYTES: usize = 48;
/// `NCCL_API_MAGIC` and `NCCL_CONFIG_UNDEF_INT` of nccl.h.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;

macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used, by their names in nccl.h.
        #[allow(non_snake_case)]
        pub struct Library {
            $(#[doc = $symbol] pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// As `ncclGetVersion` counts.
            pub version: c_int,
        }

        impl Library {
            /// Looks all functions up. Err names the first that is missing.
            ///
            /// # Safety
            /// `handle` is a library whose functions of these names have these types.
            unsafe fn of(handle: *mut c_void) -> std::result::Result<Library, &'static str> {
                Ok(Library {
                    $($name: {
                        let symbol = CString::new($symbol).expect("a name without NUL");
                        // SAFETY: an open library and a C string.
                        let address = unsafe { libc::dlsym(handle, symbol.as_ptr()) };
                        if address.is_null() {
                            return Err($symbol);
                        }
                        // SAFETY: as the caller promises.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(address) }
                    },)*
                    version: 0,
                })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion"(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId"(*mut ncclUniqueId) -> c_int;
    init = "ncclCommInitRankConfig"(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int;
    async_error = "ncclCommGetAsyncError"(ncclComm_t, *mut c_int) -> c_int;
    finalize = "ncclCommFinalize"(ncclComm_t) -> c_int;
    destroy = "ncclCommDestroy"(ncclComm_t) -> c_int;
    abort = "ncclCommAbort"(ncclComm_t) -> c_int;
    error_string = "ncclGetErrorString"(c_int) -> *const c_char;
    last_error = "ncclGetLastError"(ncclComm_t) -> *const c_char;
    group_start = "ncclGroupStart"() -> c_int;
    group_end = "ncclGroupEnd"() -> c_int;
    send = "ncclSend"(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> c_int;
    recv = "ncclRecv"(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> c_int;
    all_gather = "ncclAllGather"(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> c_int;
    reduce_scatter = "ncclReduceScatter"(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> c_int;
    all_reduce = "ncclAllReduce"(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) -> c_int;
    broadcast = "ncclBroadcast"(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> c_int;
}

impl Library {
    /// The library, opened once. Err, in one line with what to do, when there is none or it is too old.
    pub fn open() -> Result<&'static Library> {
        static OPENED: OnceLock<Result<Library>> = OnceLock::new();
        OPENED.get_or_init(find).as_ref().map_err(Error::clone)
    }

    /// "2.27.7"
    pub fn version_text(version: c_int) -> String {
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// What a result means, with what the library said last, on one line.
    pub fn text_of(&self, result: c_int, comm: ncclComm_t) -> String {
        // SAFETY: both give C strings of the library that live until its next error; null is allowed for.
        let (meaning, last) = unsafe { (text((self.error_string)(result)), text((self.last_error)(comm))) };
        let last = last.split_whitespace().collect::<Vec<_>>().join(" ");
        if last.is_empty() { meaning } else { format!("{meaning} ({last})") }
    }
}

/// A C string of the library, or nothing.
///
/// # Safety
/// Null, or a C string.
unsafe fn text(at: *const c_char) -> String {
    if at.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

fn find() -> Result<Library> {
    let refused = |wrong: String| Err(Error::recipe(wrong).remedy("install NCCL 2 or add its lib to LD_LIBRARY_PATH, or use --comm mpi"));
    let open = |name: &&str| {
        let name = CString::new(*name).expect("a name without NUL");
        // SAFETY: a C string; the library stays open.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        (!handle.is_null()).then_some(handle)
    };
    let Some(handle) = NAMES.iter().find_map(open) else {
        return refused(format!("no NCCL: {} was not found on this machine", NAMES[0]));
    };
    // SAFETY: NCCL's library; the types are those of nccl.h from 2.18 on.
    let mut library = match unsafe { Library::of(handle) } {
        Ok(library) => library,
        Err(name) => return refused(format!("NCCL on this machine has no {name}, 2.18 is needed")),
    };
    // SAFETY: writes one integer.
    unsafe { (library.get_version)(&mut library.version) };
    if library.version < OLDEST {
        return refused(format!("NCCL on this machine is {}, 2.18 is needed", Library::version_text(library.version)));
    }
    Ok(library)
}

/// The options of a communicator whose calls do not block, so that one that never ends can be given up.
pub fn without_blocking() -> ncclConfig_t {
    // SAFETY: integers and pointers, for which zero is a value.
    let mut config: ncclConfig_t = unsafe { std::mem::zeroed() };
    config.size = CONFIG_BYTES;
    config.magic = CONFIG_MAGIC;
    config.version = CONFIG_VERSION;
    config.blocking = 0;
    let ints = [&mut config.cgaClusterSize, &mut config.minCTAs, &mut config.maxCTAs, &mut config.splitShare, &mut config.trafficClass];
    for undefined in ints {
        *undefined = UNDEFINED;
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// The options are those of nccl.h's NCCL_CONFIG_INITIALIZER in the layout of 2.17 (size, magic, version, four ints, a pointer,
    /// an int): a library refuses others, or reads nonsense out of them.
    #[test]
    fn options_have_the_layout_of_the_header() {
        let config = without_blocking();
        assert_eq!((config.size, config.magic, config.version), (48, 0xcafe_beef, 21_700));
        let places = [offset_of!(ncclConfig_t, blocking), offset_of!(ncclConfig_t, netName), offset_of!(ncclConfig_t, splitShare)];
        assert_eq!(places, [16, 32, 40]);
        assert_eq!([config.blocking, config.minCTAs, config.splitShare], [0, i32::MIN, i32::MIN]);
        assert!(config.netName.is_null());
    }

    /// Versions read as people write them.
    #[test]
    fn versions_are_three_numbers() {
        assert_eq!([21_800, 22_707, 23_003].map(Library::version_text), ["2.18.0", "2.27.7", "2.30.3"]);
    }
}
