//! The real machine: one GPU by the CUDA driver (cudarc): memory, kernels, copies, streams. Knows nothing of operations.
//!
//! A call that fails cannot be repaired by its caller, so it panics with what was asked; only opening returns an error.

mod copies;
mod graphs;
mod launch;
mod modules;
mod queues;

use super::arena::Arena;
use super::backend::{Algorithms, Arg, Backend, Event, Graph, Grid, Kernel, Matrix, ScalesAt, Stream, Timed};
use super::blas::{self, Asked, Blas, On};
use super::compile;
use super::fastest::{fastest, times};
use super::tensor_map::TensorMaps;
use crate::device::Gemm;
use crate::error::{Error, Kind, Result};
use crate::machine;
use copies::Copies;
use cudarc::driver::{CudaContext, DriverError, result, sys};
use graphs::Capture;
use queues::Queues;
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Arc, Mutex};

/// The CUDA version whose calls are used, as the driver counts: 13.0.
const CUDA_VERSION: c_int = 13_000;
/// Dynamic shared memory that a kernel has without asking for more.
const SHARED_BYTES_UNASKED: u32 = 48 * 1024;
/// Set to 0, recorded kernels begin when the one before them has ended: to compare with.
const DEPENDENT_LAUNCH: &str = "TRIREME_DEPENDENT_LAUNCH";
/// Set to 0, a Hopper GPU runs the kernels that run on every GPU: to compare with.
const HOPPER_KERNELS: &str = "TRIREME_HOPPER_KERNELS";
const WITHOUT_GPU: &str = "run with --device cpu, or on a node with GPUs";

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory it may be launched with.
    shared_bytes: u32,
}

/// The backend.
pub struct Driver {
    context: Arc<CudaContext>,
    queues: Queues,
    copies: Copies,
    capture: Capture,
    arena: Mutex<Arena>,
    blas: Blas,
    /// For cuBLASLt.
    workspace: u64,
    name: String,
    identity: [u8; 16],
    capability: (i32, i32),
    processors: usize,
    /// Of its L2.
    cache_bytes: usize,
    architecture: String,
    /// Kernels over hopper.cuh run.
    is_hopper: bool,
    /// Recorded kernels may come onto the device before the one before them has ended.
    overlaps_kernels: bool,
    modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
    functions: Mutex<HashMap<Kernel, Function>>,
    maps: TensorMaps,
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
    let n = CudaContext::device_count().map_err(|error| {
        let wrong = format!("the NVIDIA driver finds no GPU: {}", described(error));
        if is_of_the_machine(error) { machine::failed(wrong) } else { Error::recipe(wrong).remedy(WITHOUT_GPU) }
    })?;
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

/// Whether it tells of a broken machine and not of what was asked of it: memory or links that have lost bits, a fabric that is not up. What
/// a job may bring about on every machine it comes to counts as the job's: more ranks than an exclusive GPU takes, a container without
/// the driver's devices, faults of kernels (addresses, instructions).
fn is_of_the_machine(error: DriverError) -> bool {
    use sys::CUresult::*;
    matches!(error.0, CUDA_ERROR_ECC_UNCORRECTABLE | CUDA_ERROR_NVLINK_UNCORRECTABLE | CUDA_ERROR_CONTAINED | CUDA_ERROR_SYSTEM_NOT_READY)
}

/// The same of a GPU that has worked: then what the driver does not know is one that has gone from the bus.
fn has_broken(error: DriverError) -> bool {
    is_of_the_machine(error) || error.0 == sys::CUresult::CUDA_ERROR_UNKNOWN
}

/// As nvidia-smi prints it.
fn uuid(identity: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!(
        "GPU-{}-{}-{}-{}-{}",
        hex(&identity[..4]),
        hex(&identity[4..6]),
        hex(&identity[6..8]),
        hex(&identity[8..10]),
        hex(&identity[10..])
    )
}

/// For `--gpu-architecture`: with the instructions of Hopper alone where it is one.
fn architecture((major, minor): (i32, i32)) -> String {
    if (major, minor) == (9, 0) { "sm_90a".into() } else { format!("sm_{major}{minor}") }
}

/// Whether the environment leaves it on.
fn is_allowed(name: &str) -> bool {
    std::env::var_os(name).is_none_or(|value| value != "0")
}

impl Driver {
    /// GPU `ordinal`, below [`count`].
    pub fn open(ordinal: usize, algorithms: Algorithms) -> Result<Driver> {
        let failed = |error: DriverError| {
            let wrong = format!("GPU {ordinal} cannot be used: {}", described(error));
            if is_of_the_machine(error) {
                return machine::failed(wrong);
            }
            Error::new(Kind::Other, wrong).remedy("look at it with nvidia-smi, or run with --device cpu")
        };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        // cuBLASLt keeps state of its own in the GPU's context, which would end with the last of its owners: it lives as long as the
        // process.
        std::mem::forget(Arc::clone(&context));
        let capability = context.compute_capability().map_err(failed)?;
        let multiprocessors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(multiprocessors).map_err(failed)? as usize;
        let cache_bytes = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map_err(failed)? as usize;
        let gpu = context.name().map_err(failed)?;
        let name = format!("{gpu}, {processors} processors");
        let identity = result::device::get_uuid(context.cu_device()).map_err(failed)?.bytes.map(|byte| byte as u8);
        let queues = Queues::open().map_err(failed)?;
        let copies = Copies::new().map_err(failed)?;
        // SAFETY: the context is current; freed when the driver is dropped.
        let workspace = unsafe { result::malloc_sync(blas::WORKSPACE_BYTES) }.map_err(|error| {
            failed(error).doing(format!("asking for {} bytes of device memory for matrix products", blas::WORKSPACE_BYTES))
        })?;
        let blas = Blas::new(algorithms, &gpu)?;
        let architecture = architecture(capability);
        Ok(Driver {
            context,
            queues,
            copies,
            capture: Capture::default(),
            arena: Mutex::default(),
            blas,
            workspace,
            name,
            identity,
            capability,
            processors,
            cache_bytes,
            is_hopper: capability == (9, 0) && is_allowed(HOPPER_KERNELS),
            architecture,
            // From Hopper on it can.
            overlaps_kernels: capability.0 >= 9 && is_allowed(DEPENDENT_LAUNCH),
            modules: Mutex::default(),
            functions: Mutex::default(),
            maps: TensorMaps::default(),
        })
    }

    /// Makes the context current on this thread and panics with `what` when the driver refused something; with an [`Error`] of the
    /// machine where that has failed, which ends the job with its exit code.
    fn call<T>(&self, what: &dyn Fn() -> String, call: impl FnOnce() -> std::result::Result<T, DriverError>) -> T {
        let done = self.context.bind_to_thread().and_then(|()| call());
        done.unwrap_or_else(|error| {
            if has_broken(error) {
                let wrong = format!("{}: {} ({}) has failed: {}", what(), uuid(&self.identity), self.name, described(error));
                std::panic::panic_any(machine::failed(wrong));
            }
            panic!("{} on {}: {}", what(), self.name, described(error))
        })
    }

    /// Memory of the driver; `None` when it has none left.
    fn ask(&self, bytes: usize) -> Option<u64> {
        self.call(&|| format!("allocating {bytes} bytes"), || {
            // SAFETY: only asks for memory.
            match unsafe { result::malloc_sync(bytes) } {
                Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
                answer => answer.map(Some),
            }
        })
    }

    /// A product on the compute stream, its algorithm measured first where that is wanted and can be.
    fn multiply(&self, asked: &Asked) {
        self.capture.other_work();
        self.call(&|| "a matrix product".into(), || Ok(()));
        let on = On { stream: self.queues.of(Stream::Compute).cast(), workspace: self.workspace };
        if !self.capture.is_on() && self.blas.is_unmeasured(asked) {
            // Written over before each time; the output is the first of it, which is no matter, for its old contents are not read.
            let evicted = 2 * self.cache_bytes;
            let bytes = evicted.max(asked.out.rows * asked.out.columns * asked.out.dtype.bytes());
            match self.alloc(bytes) {
                Some(spare) => {
                    let evict = || self.zero(spare, evicted);
                    // SAFETY: the caller's memory and memory of that size, this context made current, its stream and that one's workspace.
                    unsafe { self.blas.measure(asked, spare, on, |n, run| fastest(&times(self, n, run, &evict))) };
                    self.free(spare, bytes);
                }
                // To ask for it again each time would wait for the device each time.
                None => self.blas.take_first(asked),
            }
        }
        // SAFETY: the caller's memory on the device, this context made current, this stream and its workspace.
        let done = unsafe { self.blas.gemm(asked, on) };
        done.unwrap_or_else(|error| {
            // The library does not say what has become of the GPU; the driver does.
            self.call(&|| format!("{asked:?}"), || self.queues.synchronize());
            panic!("{asked:?} on {}: {error}", self.name)
        });
    }

    /// Gives memory that is not in use back to the driver. Returns how much there was.
    fn give_back_unused(&self, arena: &mut Arena) -> usize {
        let unused = arena.drain();
        self.call(&|| format!("giving back {} pieces of memory", unused.len()), || {
            // Work asked for before may still use it.
            self.queues.synchronize()?;
            // SAFETY: memory of the driver that nobody has any more.
            unused.iter().try_for_each(|address| unsafe { result::free_sync(*address) })
        });
        unused.len()
    }

    /// The module of a file of kernels, compiled at first use.
    fn module(&self, file: &'static str) -> sys::CUmodule {
        let mut modules = self.modules.lock().expect("no panic while holding the modules");
        *modules.entry(file).or_insert_with(|| {
            let code = compile::machine_code(file, &self.architecture).unwrap_or_else(|error| panic!("{error}"));
            let mut module = std::ptr::null_mut();
            self.call(&|| format!("loading kernels/{file}.cu"), || {
                // SAFETY: machine code of NVRTC, whole (its seal was right), alive during the call.
                module = unsafe { modules::load(&code) }?;
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
        let _ = self.queues.synchronize();
        let unused = self.arena.get_mut().map(Arena::drain).unwrap_or_default();
        // SAFETY: the last user of these handles; nothing is under way after the wait, and all tensors are gone, for they hold the driver.
        unsafe {
            unused.into_iter().chain([self.workspace]).for_each(|address| {
                let _ = result::free_sync(address);
            });
            for module in self.modules.get_mut().map(std::mem::take).unwrap_or_default().into_values() {
                let _ = result::module::unload(module);
            }
        }
        self.copies.destroy();
        self.queues.destroy();
    }
}

/// The bits of an argument, its value in the low bytes: what a pointer to it shows to the driver. A matrix has its own (0 here).
fn bits(arg: &Arg) -> u64 {
    match *arg {
        Arg::Address(address) => address,
        Arg::Int(value) => u64::from(value as u32),
        Arg::Long(value) => value as u64,
        Arg::Float(value) => u64::from(value.to_bits()),
        Arg::Double(value) => value.to_bits(),
        Arg::Map(_) => 0,
    }
}

impl Backend for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn capability(&self) -> (i32, i32) {
        self.capability
    }

    fn gemm_fp8(&self, out: Matrix, a: Matrix, b: Matrix, scales: ScalesAt) {
        self.multiply(&Asked { out, a, b, how: Gemm::NT, scales: Some(scales) });
    }

    fn is_hopper(&self) -> bool {
        self.is_hopper
    }

    fn timed(&self) -> Option<Timed> {
        let (library, kernels) = (self.blas.machine()?, compile::hash_of_all());
        let name = format!("{library}, {} processors, kernels {kernels:016x}", self.processors);
        Some(Timed { name, cache_bytes: self.cache_bytes })
    }

    fn alloc(&self, bytes: usize) -> Option<u64> {
        let mut arena = self.arena.lock().expect("no panic while holding the arena");
        // Lent again in the order of the compute stream, which is the order of these calls.
        arena.take(bytes, |bytes| self.ask(bytes)).or_else(|| {
            // Free pieces of other sizes go back first.
            if self.give_back_unused(&mut arena) == 0 { None } else { arena.take(bytes, |bytes| self.ask(bytes)) }
        })
    }

    fn free(&self, address: u64, _bytes: usize) {
        if !std::thread::panicking() {
            // Else the job ends; a second panic would hide why.
            self.arena.lock().expect("no panic while holding the arena").give(address);
        }
    }

    fn upload(&self, host: &[u8], to: u64) {
        self.capture.refuse("an upload");
        // SAFETY: the caller's memory on the device.
        self.call(&|| format!("copying {} bytes to the device", host.len()), || unsafe { self.copies.upload(&self.queues, host, to) });
    }

    fn download(&self, from: u64, host: &mut [u8]) {
        self.capture.refuse("a download");
        let n = host.len();
        // SAFETY: the caller's memory on the device.
        self.call(&|| format!("copying {n} bytes from the device"), || unsafe { self.copies.download(&self.queues, from, host) });
    }

    fn zero(&self, at: u64, bytes: usize) {
        self.capture.other_work();
        // SAFETY: the caller's memory on the device.
        self.call(&|| format!("zeroing {bytes} bytes"), || unsafe {
            result::memset_d8_async(at, 0, bytes, self.queues.of(Stream::Compute))
        });
    }

    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        let function = self.function(kernel, grid.shared_bytes);
        let is_dependent = self.capture.kernel() && self.overlaps_kernels;
        let mut values: Vec<u64> = args.iter().map(bits).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let is_map = |arg: &Arg| if let Arg::Map(map) = arg { Some(*map) } else { None };
        let mut maps: Vec<sys::CUtensorMap> = args.iter().filter_map(is_map).map(|map| self.maps.encoded(map)).collect();
        let mut encoded = maps.iter_mut().map(|map| std::ptr::from_mut(map).cast());
        let of_maps = args.iter().zip(&mut pointers).filter(|(arg, _)| is_map(arg).is_some());
        of_maps.for_each(|(_, pointer)| *pointer = encoded.next().expect("one a matrix"));
        self.call(&|| format!("launching {} of kernels/{}.cu, {grid:?}", kernel.name, kernel.file), || {
            // SAFETY: a loaded kernel; the arguments are read during the call; that they are the kernel's, in number and type, the
            // tests see to by running every launcher over an emulator that knows the kernels' types. It waits for the work before it
            // by itself, as every kernel does (tests/kernels/dependent.rs).
            unsafe { launch::kernel(function, grid, self.queues.of(Stream::Compute), &mut pointers, is_dependent) }
        });
    }

    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm) {
        self.multiply(&Asked { out, a, b, how, scales: None });
    }

    fn finish(&self) {
        self.capture.refuse("waiting");
        self.call(&|| "finishing".into(), || self.queues.synchronize());
    }

    fn record(&self, stream: Stream) -> Event {
        self.capture.other_work();
        Event(self.call(&|| format!("an event on {stream:?}"), || self.queues.record(stream)) as u64)
    }

    fn wait(&self, stream: Stream, event: Event) {
        self.capture.other_work();
        self.call(&|| format!("{stream:?} waiting for an event"), || self.queues.wait(stream, event.0 as sys::CUevent));
    }

    fn is_complete(&self, event: Event) -> bool {
        self.call(&|| "looking at an event".into(), || {
            // SAFETY: an event of `record` that was not released.
            match unsafe { result::event::query(event.0 as sys::CUevent) } {
                Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
                answer => answer.map(|()| true),
            }
        })
    }

    fn release(&self, event: Event) {
        self.queues.release(event.0 as sys::CUevent);
    }

    fn mark(&self) -> Event {
        self.capture.other_work();
        Event(self.call(&|| "reading the clock".into(), || self.queues.mark()) as u64)
    }

    fn seconds_between(&self, from: Event, to: Event) -> f64 {
        self.call(&|| "comparing clocks".into(), || queues::seconds_between(from.0 as sys::CUevent, to.0 as sys::CUevent))
    }

    fn forget_mark(&self, mark: Event) {
        // SAFETY: an event of `mark`, which ends here.
        self.call(&|| "ending an event".into(), || unsafe { result::event::destroy(mark.0 as sys::CUevent) });
    }

    fn handle(&self, stream: Stream) -> Option<u64> {
        // Whoever has it asks for what this does not see.
        self.capture.other_work();
        self.call(&|| "making the device current".into(), || Ok(()));
        Some(self.queues.of(stream) as u64)
    }

    fn begin_recording(&self) -> bool {
        let compute = self.queues.of(Stream::Compute);
        self.call(&|| "recording".into(), || {
            let begun = self.capture.begin(compute);
            Ok(begun.inspect_err(not_recorded).is_ok())
        })
    }

    fn end_recording(&self) -> Option<Graph> {
        let compute = self.queues.of(Stream::Compute);
        self.call(&|| "ending a recording".into(), || {
            let ended = self.capture.end(compute);
            Ok(ended.inspect_err(not_recorded).ok())
        })
        .map(|executable| Graph(executable as u64))
    }

    fn replay(&self, graph: Graph) {
        self.capture.refuse("a recording");
        let compute = self.queues.of(Stream::Compute);
        self.call(&|| "launching recorded work".into(), || graphs::launch(graph.0 as sys::CUgraphExec, compute));
    }

    fn forget(&self, graph: Graph) {
        self.call(&|| "ending recorded work".into(), || graphs::forget(graph.0 as sys::CUgraphExec));
    }

    fn identity(&self) -> [u8; 16] {
        self.identity
    }
}

fn not_recorded(error: &DriverError) {
    log::warn!("work could not be recorded, so each of its calls is asked for anew, which is slower: {}", described(*error));
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
