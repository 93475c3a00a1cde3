//! The CUDA device: every operation is a launch of kernels from `kernels/` or a product of cuBLASLt.
//!
//! One file a noun, named as the file of kernels it launches: `norm.rs` launches `kernels/norm.cu`. The mathematics stands
//! in `device`, the reading copy of it in `device::cpu`. This folder knows nothing of models, ranks or files.

mod activation;
mod adamw;
pub mod arena;
mod attention;
mod attention_cached;
pub mod backend;
mod blas;
mod canonical;
mod compile;
mod contest;
mod cross_entropy;
mod driver;
mod elementwise;
mod embedding;
mod fastest;
mod fp8;
mod grid;
mod matmul;
mod norm;
mod operations;
mod ordered;
pub mod profile;
mod recording;
mod rope;
mod sample;
pub mod streams;
mod tensor_map;

use crate::device::Rope;
use crate::error::Result;
use crate::tensor::{ForeignMemory, Tensor};
use attention_cached::Tables;
use backend::{Algorithms, Arg, Backend};
use contest::{Contest, Outcome};
pub(crate) use ordered::{MOST_PAIRED, Pieces};
use profile::Profile;
pub(crate) use recording::OnReplay;
use recording::Tape;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// The device.
pub struct Cuda {
    backend: Arc<dyn Backend>,
    /// Kernels on Hopper's own instructions where there are such.
    hopper: bool,
    use_of_memory: Arc<Use>,
    /// Of the last call of attention over a cache.
    last_tables: Mutex<Option<Arc<Tables>>>,
}

/// Live and peak memory, and what else of a machine is counted once.
#[derive(Default)]
struct Use {
    /// Communication streams that were handed out.
    n_streams: AtomicUsize,
    live_bytes: AtomicUsize,
    peak_bytes: AtomicUsize,
    n_tensors: AtomicUsize,
    /// While work is recorded, by whichever of those that share the machine.
    tape: Mutex<Option<Tape>>,
    /// Frequencies of every way to turn that was asked for.
    rope_tables: Mutex<Vec<(Rope, Workspace)>>,
    /// Of the products that two could make so far; None where that was not measured.
    contests: Mutex<HashMap<Contest, Option<Outcome>>>,
}

/// Memory of a tensor; goes back to the backend with the tensor's last view.
struct Memory {
    address: u64,
    bytes: usize,
    backend: Arc<dyn Backend>,
    /// None for what the device keeps for itself.
    counted_in: Option<Arc<Use>>,
}

impl Memory {
    fn new(cuda: &Cuda, bytes: usize) -> Option<Memory> {
        let address = cuda.backend.alloc(bytes)?;
        let live = cuda.use_of_memory.live_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        cuda.use_of_memory.peak_bytes.fetch_max(live, Ordering::Relaxed);
        Some(Memory { address, bytes, backend: Arc::clone(&cuda.backend), counted_in: Some(Arc::clone(&cuda.use_of_memory)) })
    }
}

impl ForeignMemory for Memory {
    fn read(&self, at: usize, host: &mut [u8]) {
        assert!(at + host.len() <= self.bytes, "{} bytes from {at} of {}", host.len(), self.bytes);
        self.backend.download(self.address + at as u64, host);
    }

    fn write(&self, at: usize, host: &[u8]) {
        assert!(at + host.len() <= self.bytes, "{} bytes from {at} of {}", host.len(), self.bytes);
        self.backend.upload(host, self.address + at as u64);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(counted) = &self.counted_in {
            counted.live_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
        self.backend.free(self.address, self.bytes);
    }
}

/// Device memory of one call, free again after the work that uses it.
#[derive(Clone)]
pub(crate) struct Workspace(Arc<Memory>);

impl Workspace {
    /// Whether nobody but one keeper has it.
    fn is_free(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    fn n_bytes(&self) -> usize {
        self.0.bytes
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        self.0.address
    }

    /// Its address as an argument.
    pub(crate) fn arg(&self) -> Arg {
        self.arg_at(0)
    }

    /// The address of a byte of it as an argument.
    pub(crate) fn arg_at(&self, byte: usize) -> Arg {
        Arg::Address(self.0.address + byte as u64)
    }
}

/// Each tensor as `n_rows` rows of `row_len` elements.
fn assert_rows(what: &str, tensors: &[&Tensor], n_rows: usize, row_len: usize) {
    for tensor in tensors {
        assert!(tensor.n_rows() == n_rows && tensor.row_len() == row_len, "{what}: {tensor:?} is not [{n_rows}, {row_len}]");
    }
}

/// Starts of sequences and their end as the trait says.
fn assert_sequences(what: &str, starts: &[usize], n_tokens: usize) {
    let ends = (starts.first(), starts.last());
    assert!(ends == (Some(&0), Some(&n_tokens)) && starts.is_sorted(), "{what}: sequence starts {starts:?} of {n_tokens} tokens");
}

impl Cuda {
    /// Err, in one line with what to do, when CUDA cannot be used on this machine.
    pub fn check_machine() -> Result<()> {
        driver::count().map(|_| ())
    }

    /// The GPU of this rank: those of the machine in turn. Err when CUDA cannot be used here.
    pub fn open(local_rank: usize) -> Result<Cuda> {
        Cuda::open_with(local_rank, Algorithms::Measured)
    }

    /// The same, with a choice of how products are added.
    pub fn open_with(local_rank: usize, algorithms: Algorithms) -> Result<Cuda> {
        let n_devices = driver::count()?;
        Ok(Cuda::with_backend(Arc::new(driver::Driver::open(local_rank % n_devices, algorithms)?)))
    }

    /// The same as `open`, and what tells where its time goes.
    pub fn open_profiled(local_rank: usize) -> Result<(Cuda, Arc<Profile>)> {
        let n_devices = driver::count()?;
        let profile = Profile::over(Arc::new(driver::Driver::open(local_rank % n_devices, Algorithms::Measured)?));
        Ok((Cuda::with_backend(Arc::clone(&profile) as Arc<dyn Backend>), profile))
    }

    /// The device over a machine.
    pub fn with_backend(backend: Arc<dyn Backend>) -> Cuda {
        Cuda::over(backend, Arc::default())
    }

    /// Whether attention and products in canonical order run on Hopper's own instructions.
    pub fn has_hopper_kernels(&self) -> bool {
        self.hopper
    }

    /// The same device with the kernels that run on every GPU only, to compare with.
    pub fn without_hopper(self) -> Cuda {
        Cuda { hopper: false, ..self }
    }

    /// The first element of a tensor that this device made.
    fn address(tensor: &Tensor) -> u64 {
        let memory = tensor.foreign_handle().and_then(|handle| handle.downcast_ref::<Memory>());
        memory.expect("a tensor of this device").address + tensor.offset_bytes() as u64
    }

    /// Where the first element of a tensor lies in device memory, for those who hand it to CUDA's libraries. `None` for a tensor that
    /// this device has not made.
    pub fn address_of(&self, tensor: &Tensor) -> Option<u64> {
        let memory = tensor.foreign_handle().and_then(|handle| handle.downcast_ref::<Memory>())?;
        Arc::ptr_eq(&memory.backend, &self.backend).then(|| memory.address + tensor.offset_bytes() as u64)
    }

    /// What tells this GPU from every other one: its UUID.
    pub fn identity(&self) -> [u8; 16] {
        self.backend.identity()
    }

    /// A tensor to read, as an argument.
    pub(crate) fn arg(tensor: &Tensor) -> Arg {
        Arg::Address(Cuda::address(tensor))
    }

    /// A tensor to write, as an argument.
    pub(crate) fn arg_mut(tensor: &mut Tensor) -> Arg {
        tensor.assert_not_lent();
        Arg::Address(Cuda::address(tensor))
    }

    /// Memory for one call. Panics when there is none left.
    pub(crate) fn workspace(&self, bytes: usize) -> Workspace {
        let ask = || {
            let memory = Memory::new(self, bytes).unwrap_or_else(|| panic!("no {bytes} bytes of device memory for a workspace"));
            Workspace(Arc::new(memory))
        };
        match &mut *self.tape() {
            Some(tape) => tape.workspace(bytes, ask),
            None => ask(),
        }
    }

    fn tape(&self) -> MutexGuard<'_, Option<Tape>> {
        // A panic in work that is recorded leaves it as it was.
        self.use_of_memory.tape.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Memory that the device keeps from one call to the next, which is not counted as in use. Panics when there is none left.
    fn own_memory(&self, bytes: usize) -> Workspace {
        let address = self.backend.alloc(bytes).unwrap_or_else(|| panic!("no {bytes} bytes of device memory for tables"));
        Workspace(Arc::new(Memory { address, bytes, backend: Arc::clone(&self.backend), counted_in: None }))
    }

    /// A table for one call, in device memory.
    pub(crate) fn table<T: bytemuck::NoUninit>(&self, rows: &[T]) -> Workspace {
        assert!(!self.is_recording(), "a table of one call would be recorded with what it holds now");
        let bytes: &[u8] = bytemuck::cast_slice(rows);
        let table = self.workspace(bytes.len());
        self.backend.upload(bytes, table.0.address);
        table
    }
}
