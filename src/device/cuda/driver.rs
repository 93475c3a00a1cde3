//! The real machine: one GPU, one stream, by the CUDA driver (cudarc). Knows nothing of operations.
//!
//! A call that fails cannot be repaired by its caller, so it panics with what was asked; only opening returns an error.

use super::backend::{Arg, Backend, Grid, Kernel, Matrix};
use super::blas::{self, Blas};
use super::compile;
use crate::device::Gemm;
use crate::error::{Error, Kind, Result};
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Arc, Mutex};

/// The CUDA version whose calls are used, as the driver counts: 13.0.
const CUDA_VERSION: c_int = 13_000;
/// Dynamic shared memory that a kernel has without asking for more.
const SHARED_BYTES_UNASKED: u32 = 48 * 1024;
const WITHOUT_GPU: &str = "run with --device cpu, or on a node with GPUs";

/// Page-locked host memory that small uploads leave from, so that nothing waits for them.
const RING_BYTES: usize = 8 << 20;
/// Larger uploads leave from where they are, and are waited for.
const SMALL_BYTES: usize = RING_BYTES / 8;

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory it may be launched with.
    shared_bytes: u32,
}

/// The page-locked memory and how much of it has left since the last wait.
struct Ring {
    start: *mut u8,
    used_bytes: usize,
}

/// The backend.
pub struct Driver {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    blas: Blas,
    /// For cuBLASLt.
    workspace: u64,
    name: String,
    processors: usize,
    architecture: String,
    ring: Mutex<Ring>,
    modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
    functions: Mutex<HashMap<Kernel, Function>>,
}

// SAFETY: handles of the driver may be used by any thread that has the context current, which every call sees to; what is looked
// up lies behind locks.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// GPUs of this machine. Err, in one line with what to do, when CUDA cannot be used here.
pub fn count() -> Result<usize> {
    // SAFETY: only opens a library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::recipe("no NVIDIA driver: libcuda.so.1 was not found on this machine").remedy(WITHOUT_GPU));
    }
    let found = CudaContext::device_count();
    let n = found.map_err(|error| Error::recipe(format!("the NVIDIA driver finds no GPU: {}", described(error))).remedy(WITHOUT_GPU))?;
    if n == 0 {
        return Err(Error::recipe("the NVIDIA driver finds no GPU").remedy(WITHOUT_GPU));
    }
    let mut version = 0;
    // SAFETY: writes one integer; 0 when it fails.
    unsafe { sys::cuDriverGetVersion(&mut version) };
    if version < CUDA_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        let wrong = format!("the NVIDIA driver knows CUDA {major}.{minor}, 13.0 is needed");
        return Err(Error::recipe(wrong).remedy("install driver 580 or newer, or run with --device cpu"));
    }
    compile::check_present()?;
    blas::check_present()?;
    Ok(n as usize)
}

/// Name and text of a driver's error, on one line.
fn described(error: DriverError) -> String {
    let texts = (error.error_name(), error.error_string());
    match texts {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("{:?}", error.0),
    }
}

/// For `--gpu-architecture`: with the instructions of Hopper alone where it is one.
fn architecture((major, minor): (i32, i32)) -> String {
    if (major, minor) == (9, 0) { "sm_90a".into() } else { format!("sm_{major}{minor}") }
}

impl Driver {
    /// GPU `ordinal`, below [`count`].
    pub fn open(ordinal: usize) -> Result<Driver> {
        let failed = |error: DriverError| {
            let wrong = format!("GPU {ordinal} cannot be used: {}", described(error));
            Error::new(Kind::Other, wrong).remedy("look at it with nvidia-smi, or run with --device cpu")
        };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let capability = context.compute_capability().map_err(failed)?;
        let multiprocessors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(multiprocessors).map_err(failed)? as usize;
        let name = format!("{}, {processors} processors", context.name().map_err(failed)?);
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        // SAFETY: the context's own device.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }.map_err(failed)?;
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is 64 bits. Freed memory stays with the process, so an allocation after the first steps is a list
        // operation.
        unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast()) }.map_err(failed)?;
        // SAFETY: a live stream.
        let workspace = unsafe { result::malloc_async(stream, blas::WORKSPACE_BYTES) }.map_err(failed)?;
        // SAFETY: the context is current; freed when the driver is dropped.
        let start = unsafe { result::malloc_host(RING_BYTES, 0) }.map_err(failed)?.cast::<u8>();
        let ring = Mutex::new(Ring { start, used_bytes: 0 });
        let blas = Blas::new()?;
        let architecture = architecture(capability);
        Ok(Driver {
            context,
            stream,
            pool,
            blas,
            workspace,
            name,
            processors,
            architecture,
            ring,
            modules: Mutex::default(),
            functions: Mutex::default(),
        })
    }

    /// Makes the context current on this thread and panics with `what` when the driver refused something.
    fn call(&self, what: &dyn Fn() -> String, call: impl FnOnce() -> std::result::Result<(), DriverError>) {
        if let Err(error) = self.context.bind_to_thread().and_then(|()| call()) {
            panic!("{} on {}: {}", what(), self.name, described(error));
        }
    }

    fn wait(&self, what: &str) {
        // SAFETY: a live stream.
        self.call(&|| what.to_string(), || unsafe { result::stream::synchronize(self.stream) });
    }

    /// The module of a file of kernels, compiled at first use.
    fn module(&self, file: &'static str) -> sys::CUmodule {
        let mut modules = self.modules.lock().expect("no panic while holding the modules");
        *modules.entry(file).or_insert_with(|| {
            let code = compile::machine_code(file, &self.architecture).unwrap_or_else(|error| panic!("{error}"));
            let mut module = std::ptr::null_mut();
            self.call(&|| format!("loading kernels/{file}.cu"), || {
                // SAFETY: machine code of NVRTC, whole (its seal was right), alive during the call.
                module = unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) }?;
                Ok(())
            });
            module
        })
    }

    /// The kernel, allowed as much dynamic shared memory as this launch wants.
    fn function(&self, kernel: &Kernel, shared_bytes: u32) -> sys::CUfunction {
        let mut functions = self.functions.lock().expect("no panic while holding the functions");
        if let Some(function) = functions.get(kernel).filter(|function| function.shared_bytes >= shared_bytes) {
            return function.handle;
        }
        let known = functions.get(kernel).copied();
        let mut function = known.unwrap_or_else(|| {
            let module = self.module(kernel.file);
            let name = CString::new(kernel.name.as_str()).expect("a name without NUL");
            let mut handle = std::ptr::null_mut();
            self.call(&|| format!("finding {} in kernels/{}.cu", kernel.name, kernel.file), || {
                // SAFETY: a module that stays loaded.
                handle = unsafe { result::module::get_function(module, name) }?;
                Ok(())
            });
            Function { handle, shared_bytes: SHARED_BYTES_UNASKED }
        });
        if shared_bytes > function.shared_bytes {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.call(&|| format!("{shared_bytes} bytes of shared memory for {}", kernel.name), || {
                // SAFETY: a function of a loaded module.
                unsafe { result::function::set_function_attribute(function.handle, most, shared_bytes as i32) }
            });
            function.shared_bytes = shared_bytes;
        }
        functions.insert(kernel.clone(), function);
        function.handle
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Errors at the end of a process have nobody to go to.
        let _ = self.context.bind_to_thread();
        // SAFETY: the last user of these handles; nothing of the stream is under way after the wait.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::free_async(self.workspace, self.stream);
            if let Ok(ring) = self.ring.get_mut() {
                let _ = result::free_host(ring.start.cast());
            }
            let _ = result::stream::destroy(self.stream);
            for module in self.modules.get_mut().map(std::mem::take).unwrap_or_default().into_values() {
                let _ = result::module::unload(module);
            }
        }
    }
}

/// The bits of an argument, its value in the low bytes: what a pointer to it shows to the driver.
fn bits(arg: &Arg) -> u64 {
    match *arg {
        Arg::Address(address) => address,
        Arg::Int(value) => u64::from(value as u32),
        Arg::Long(value) => value as u64,
        Arg::Float(value) => u64::from(value.to_bits()),
        Arg::Double(value) => value.to_bits(),
    }
}

impl Backend for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn alloc(&self, bytes: usize) -> Option<u64> {
        let bytes = bytes.max(1);
        self.call(&|| "allocating".into(), || Ok(()));
        // SAFETY: a live stream, which is the only one that uses the memory.
        let ask = || unsafe { result::malloc_async(self.stream, bytes) };
        let is_full = |error: &DriverError| error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let answer = ask().or_else(|error| {
            if !is_full(&error) {
                return Err(error);
            }
            // Freed pieces of other sizes go back first.
            self.wait("waiting for freed memory");
            // SAFETY: the device's own pool.
            unsafe { result::mem_pool::trim_to(self.pool, 0) }?;
            ask()
        });
        match answer {
            Ok(address) => Some(address),
            Err(error) if is_full(&error) => None,
            Err(error) => panic!("allocating {bytes} bytes on {}: {}", self.name, described(error)),
        }
    }

    fn free(&self, address: u64, bytes: usize) {
        if std::thread::panicking() {
            return; // the job ends; a second panic would hide why
        }
        // SAFETY: allocated on this stream, freed once, after the work that was asked for before.
        self.call(&|| format!("freeing {bytes} bytes"), || unsafe { result::free_async(address, self.stream) });
    }

    fn upload(&self, host: &[u8], to: u64) {
        let what = || format!("copying {} bytes to the device", host.len());
        if host.len() > SMALL_BYTES {
            // SAFETY: the caller's memory on the device; `host` is borrowed until the wait is over.
            return self.call(&what, || unsafe {
                result::memcpy_htod_async(to, host, self.stream)?;
                result::stream::synchronize(self.stream)
            });
        }
        let mut ring = self.ring.lock().expect("no panic while holding the ring");
        if ring.used_bytes + host.len() > RING_BYTES {
            self.wait("waiting for uploads");
            ring.used_bytes = 0;
        }
        // SAFETY: these bytes of the ring are in bounds, and no copy under way reads them: the last wait came after their last use.
        let place = unsafe { std::slice::from_raw_parts_mut(ring.start.add(ring.used_bytes), host.len()) };
        place.copy_from_slice(host);
        ring.used_bytes += host.len().next_multiple_of(64);
        // SAFETY: the caller's memory on the device; the bytes of the ring stay until the next wait.
        self.call(&what, || unsafe { result::memcpy_htod_async(to, place, self.stream) });
    }

    fn download(&self, from: u64, host: &mut [u8]) {
        let n = host.len();
        // SAFETY: the caller's memory on the device; `host` is borrowed until the wait is over.
        self.call(&|| format!("copying {n} bytes from the device"), || unsafe {
            result::memcpy_dtoh_async(host, from, self.stream)?;
            result::stream::synchronize(self.stream)
        });
    }

    fn zero(&self, at: u64, bytes: usize) {
        // SAFETY: the caller's memory on the device.
        self.call(&|| format!("zeroing {bytes} bytes"), || unsafe { result::memset_d8_async(at, 0, bytes, self.stream) });
    }

    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        let function = self.function(kernel, grid.shared_bytes);
        let mut values: Vec<u64> = args.iter().map(bits).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        self.call(&|| format!("launching {} of kernels/{}.cu, {grid:?}", kernel.name, kernel.file), || {
            let threads = (grid.threads, 1, 1);
            // SAFETY: a loaded kernel; the arguments are read during the call; that they are the kernel's, in number and type, the
            // tests see to by running every launcher over an emulator that knows the kernels' types.
            unsafe { result::launch_kernel(function, grid.blocks, threads, grid.shared_bytes, self.stream, &mut pointers) }
        });
    }

    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm) {
        self.call(&|| "gemm".into(), || Ok(()));
        // SAFETY: the caller's memory on the device, this context made current, this stream and its workspace.
        unsafe { self.blas.gemm(out, (a, b), how, self.workspace, self.stream.cast()) };
    }

    fn finish(&self) {
        self.wait("finishing");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arguments lie in the low bytes of their slots, where the driver looks; a negative int must not be cut.
    #[test]
    fn arguments_are_little_endian_words() {
        let shown = |arg: Arg| bits(&arg).to_le_bytes();
        assert_eq!(shown(Arg::Int(-2))[..4], (-2i32).to_le_bytes());
        assert_eq!(shown(Arg::Long(-3)), (-3i64).to_le_bytes());
        assert_eq!(shown(Arg::Float(0.1))[..4], 0.1f32.to_le_bytes());
        assert_eq!(shown(Arg::Double(0.1)), 0.1f64.to_le_bytes());
        assert_eq!(shown(Arg::Address(7 << 40)), (7u64 << 40).to_le_bytes());
        assert_eq!((architecture((9, 0)), architecture((8, 0))), ("sm_90a".into(), "sm_80".into()));
    }
}
