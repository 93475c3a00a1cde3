//! Communicators between GPUs: tensors of the CUDA device travel by NCCL, everything else (bytes, numbers, tensors of the host)
//! by the communicator below, MPI.
//!
//! Each group has a stream of its own beside the device's operations. A collective is put there behind the operations asked for
//! before it, runs while later ones run, and `wait` makes what is asked for afterwards follow it; the host does not wait. A thread
//! of its own (`watch`) looks after what is under way: an error of the library, or an operation that takes longer than the
//! timeout, ends the job with a line that names it.
//!
//! Sums: bf16 is exchanged (grouped sends and receives, as many bytes as a ring moves) and added in rank order in f32 by a kernel, as
//! the head of `comm` promises, because NCCL's rings round bf16 at every hop; maxima likewise, so that a NaN stays one. f32 is
//! added by NCCL under [`Sums::Library`], in an order that depends on the library, the topology and the size (the same bits on
//! all ranks, and in every run on the same machines), or in rank order too under [`Sums::Ordered`].
//!
//! Collectives can be recorded with the kernels around them (CUDA graphs, `device::cuda::recording`): the group's stream is drawn into the
//! capture by the event it waits for, and the compute stream's wait for its end joins it again. What NCCL asks for then (its user guide,
//! "Using NCCL with CUDA Graphs"): that a launch is captured is a property of all its ranks; each of them launches the graph of that
//! capture, as a collective; and a communicator outlives its graphs (`ncclCommDestroy` would wait for them), which here borrows see to.
//! Graphs and collectives that are not recorded may take turns on one communicator (NCCL_GRAPH_MIXING_SUPPORT, on by default). The
//! event at the end of a captured operation cannot be asked whether it is done, so it is the launches of its graph that are watched.
//!
//! Messages between two ranks are matched by order: within a group of messages by tag, between groups by the order of the calls,
//! which must be the same on both sides. Schedules are proven to keep to it (`Schedule::check`).

mod library;
mod watch;

use super::{Communicator, Pending, Recv, ReduceOp, Send, Staging, UsePieces};
use crate::device::cuda::streams::{CommunicationStream, UnderWay};
use crate::device::cuda::{Cuda, MOST_PAIRED, OnReplay, Pieces, Workspace};
use crate::error::{Error, Result};
use crate::recipe::Mode;
use crate::tensor::{DType, Tensor};
use library::{IN_PROGRESS, Library, SUCCESS, cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;
use watch::{Flight, Group, Operation, Watch};

/// An all-reduce in rank order that moves no more than this in all goes in one message round instead of two.
const SMALL_BYTES: usize = 64 * 1024;
/// Elements of 16 bytes of bf16: pieces that begin at multiples of it are read by whole vectors.
const VECTOR: usize = 8;

/// How sums of f32 over ranks are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sums {
    /// By NCCL, in its own order.
    Library,
    /// In rank order.
    Ordered,
}

impl Sums {
    /// Those of an order of sums: where results are to have the same bits in every run, nothing is left to a library.
    pub fn of(mode: Mode) -> Sums {
        match mode {
            Mode::Fast => Sums::Library,
            Mode::Reproducible => Sums::Ordered,
        }
    }
}

/// How NCCL is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Sums of f32.
    pub sums: Sums,
    /// An operation that has not ended by then ends the job.
    pub timeout: Duration,
}

/// One rank's end of a group.
pub struct Nccl {
    group: Arc<Group>,
    stream: CommunicationStream,
    cuda: Cuda,
    watch: Arc<Watch>,
    host: Box<dyn Communicator>,
    options: Options,
}

/// Whether all ranks of `world` can use NCCL with their devices; the same answer everywhere. Err, in one line: a rank has no NCCL, or
/// one that is too old; they have different ones; two ranks use one GPU, which NCCL refuses. Collective.
pub fn check(world: &dyn Communicator, cuda: &Cuda) -> Result<()> {
    let opened = Library::open();
    super::agree(world, opened.as_ref().map(|_| ()).map_err(Error::clone))?;
    let library = opened?;
    let mut mine = library.version.to_le_bytes().to_vec();
    mine.extend_from_slice(&cuda.identity());
    let all = world.gather_variable(&mine);
    let (versions, devices): (Vec<&[u8]>, Vec<&[u8]>) = all.iter().map(|of_rank| of_rank.split_at(4)).unzip();
    if let Some(other) = versions.iter().position(|version| *version != versions[0]) {
        let text = |rank: usize| Library::version_text(c_int::from_le_bytes(versions[rank].try_into().expect("4 bytes")));
        let wrong = format!("NCCL is {} on rank 0 and {} on rank {other}", text(0), text(other));
        return Err(Error::recipe(wrong).remedy("install one version everywhere, or use --comm mpi"));
    }
    let first_with = |device: &[u8]| devices.iter().position(|other| *other == device).expect("it is in the list");
    if let Some(second) = (0..devices.len()).find(|&rank| first_with(devices[rank]) < rank) {
        let wrong = format!("ranks {} and {second} share one GPU, which NCCL refuses", first_with(devices[second]));
        return Err(Error::recipe(wrong).remedy("start one rank a GPU, or use --comm mpi"));
    }
    if world.rank() == 0 {
        log::info!("collectives between GPUs by NCCL {}", Library::version_text(library.version));
    }
    Ok(())
}

/// NCCL's type for an element, and its bytes.
fn type_of(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::BF16 => ncclDataType_t::ncclBfloat16,
        DType::U32 => ncclDataType_t::ncclUint32,
        DType::F8E4M3 => ncclDataType_t::ncclUint8,
    }
}

fn at(address: u64) -> *mut c_void {
    address as *mut c_void
}

/// The first of two results that is an error; else the first that is not success.
fn first_bad(a: c_int, b: c_int) -> c_int {
    let is_error = |result: c_int| result != SUCCESS && result != IN_PROGRESS;
    if is_error(a) || !is_error(b) && a != SUCCESS { a } else { b }
}

/// A call into NCCL: its library, the communicator, the stream.
type Call<'a> = &'a dyn Fn(&Library, ncclComm_t, cudaStream_t) -> c_int;

impl Nccl {
    /// The ranks of `host`, for which [`check`] found nothing wrong, with a stream and a communicator of NCCL's. Groups must be made in
    /// the same order everywhere. Panics when NCCL cannot connect them. Collective.
    pub fn new(host: Box<dyn Communicator>, cuda: Cuda, options: Options) -> Nccl {
        let watch = Watch::start(options.timeout);
        Nccl::create(host, cuda, options, watch)
    }

    fn create(host: Box<dyn Communicator>, cuda: Cuda, options: Options, watch: Arc<Watch>) -> Nccl {
        let library = Library::open().expect("it was opened when its use was decided");
        let operation = Operation { name: "connecting", bytes: 0, rank: host.rank(), size: host.size() };
        let mut id = ncclUniqueId { internal: [0; 128] };
        if host.rank() == 0 {
            // SAFETY: writes the id.
            let made = unsafe { (library.get_unique_id)(&mut id) };
            assert!(made == SUCCESS, "NCCL makes no id for a group: {}", library.text_of(made, std::ptr::null_mut()));
        }
        let mut bytes = id.internal.map(|byte| byte as u8);
        host.broadcast_bytes(&mut bytes, 0);
        id.internal = bytes.map(|byte| byte as _);
        let stream = CommunicationStream::of(&cuda).expect("a device whose use was decided has streams");
        stream.handle(); // makes this rank's device the current one
        let mut config = library::without_blocking();
        let mut comm: ncclComm_t = std::ptr::null_mut();
        // SAFETY: writes the communicator; the options live during the call.
        let begun = unsafe { (library.init)(&mut comm, host.size() as c_int, id, host.rank() as c_int, &mut config) };
        assert!(!comm.is_null(), "{operation}: {}", library.text_of(begun, comm));
        let group = Arc::new(Group::new(library, comm, stream.clone()));
        let nccl = Nccl { group, stream, cuda, watch, host, options };
        nccl.settle(&operation, begun);
        nccl
    }

    fn operation(&self, name: &'static str, bytes: usize) -> Operation {
        Operation { name, bytes, rank: self.rank(), size: self.size() }
    }

    /// Until NCCL has put what was asked for into the stream: calls do not block, and a communicator takes one at a time.
    fn settle(&self, operation: &Operation, result: c_int) {
        self.group.settle(operation, result, self.options.timeout);
    }

    /// Puts an operation into the stream and under watch. What it reads and writes must stay until it was joined.
    fn start(&self, operation: Operation, call: Call) -> Arc<UnderWay> {
        let under_way = Arc::new(self.stream.start(|handle| {
            let result = call(self.group.library, self.group.comm(), handle as cudaStream_t);
            self.settle(&operation, result);
        }));
        if self.cuda.is_recording() {
            self.cuda.when_replayed(Arc::as_ptr(&self.group) as usize, operation.bytes, || self.watch_replays());
        } else {
            self.watch.add(Flight::new(operation, Arc::clone(&under_way), Arc::clone(&self.group)));
        }
        under_way
    }

    /// Puts what a recording does in this group under watch each time it is asked for.
    fn watch_replays(&self) -> OnReplay {
        let (watch, group) = (Arc::clone(&self.watch), Arc::clone(&self.group));
        let operation = self.operation("recorded step", 0);
        Box::new(move |bytes, under_way| {
            watch.add(Flight::new(Operation { bytes, ..operation }, Arc::clone(under_way), Arc::clone(&group)))
        })
    }

    /// Addresses of two tensors when this rank's GPU holds both.
    fn both(&self, a: &Tensor, b: &Tensor) -> Option<(u64, u64)> {
        self.cuda.address_of(a).zip(self.cuda.address_of(b))
    }

    /// shard of `n` elements at an address -> all shards at another.
    fn gather(&self, (shard, full): (u64, u64), n: usize, dtype: DType) -> Arc<UnderWay> {
        // SAFETY: memory of this device, of the sizes that NCCL is told; it stays until it was joined.
        let call = |nccl: &Library, comm, stream| unsafe { (nccl.all_gather)(at(shard), at(full), n, type_of(dtype), comm, stream) };
        self.start(self.operation("all-gather", n * dtype.bytes()), &call)
    }

    /// Piece r of `n` elements from `full` goes to rank r; the pieces of the others arrive in new memory, `stride` apart.
    fn exchange(&self, name: &'static str, full: u64, (n, stride): (usize, usize), dtype: DType) -> (Arc<UnderWay>, Workspace) {
        let (rank, size) = (self.rank(), self.size());
        let arrived = self.cuda.workspace(stride * size * dtype.bytes());
        let others = arrived.address();
        let place = |start: u64, elements: usize| at(start + (elements * dtype.bytes()) as u64);
        let call = |nccl: &Library, comm, stream| {
            // SAFETY: as in `gather`.
            unsafe {
                let mut result = (nccl.group_start)();
                for peer in (1..size).map(|step| (rank + step) % size) {
                    let (from, to) = (place(full, peer * n), place(others, peer * stride));
                    result = first_bad(result, (nccl.send)(from, n, type_of(dtype), peer as c_int, comm, stream));
                    result = first_bad(result, (nccl.recv)(to, n, type_of(dtype), peer as c_int, comm, stream));
                }
                first_bad(result, (nccl.group_end)())
            }
        };
        (self.start(self.operation(name, n * size * dtype.bytes()), &call), arrived)
    }

    /// x of `n` elements = combined in rank order, in one round of messages or two.
    fn all_reduce_ordered(&self, x: u64, n: usize, dtype: DType, op: ReduceOp) {
        let (rank, size) = (self.rank(), self.size());
        let bytes = dtype.bytes();
        let piece = if n * bytes * size <= SMALL_BYTES { 0 } else { n / size / VECTOR * VECTOR };
        let at_element = |i: usize| x + (i * bytes) as u64;
        if piece > 0 {
            let (under_way, arrived) = self.exchange("all-reduce", x, (piece, piece), dtype);
            under_way.join();
            let own = at_element(rank * piece);
            self.cuda.combine(own, &Pieces { own, others: &arrived, rank, n_ranks: size, n: piece, stride: piece, dtype }, op);
            self.gather((own, x), piece, dtype).join();
        }
        let (rest, n) = (at_element(piece * size), n - piece * size);
        if n > 0 {
            let all = self.cuda.workspace(n * size * bytes);
            self.gather((rest, all.address()), n, dtype).join();
            self.cuda.combine(rest, &Pieces { own: rest, others: &all, rank, n_ranks: size, n, stride: n, dtype }, op);
        }
    }

    /// Messages of this device's tensors, in the order of their tags.
    fn start_messages<'a>(&'a self, mut sends: Vec<Send<'a>>, mut recvs: Vec<Recv<'a>>) -> Pending<'a> {
        sends.sort_by_key(|send| send.tag);
        recvs.sort_by_key(|recv| recv.tag);
        let bytes = sends.iter().map(|send| send.tensor.n_bytes()).chain(recvs.iter().map(|recv| recv.tensor.n_bytes())).sum();
        let place = |tensor: &Tensor| at(self.cuda.address_of(tensor).expect("a tensor of this device"));
        let call = |nccl: &Library, comm, stream| {
            // SAFETY: as in `gather`.
            unsafe {
                let mut result = (nccl.group_start)();
                for Send { peer, tensor, .. } in &sends {
                    let (n, of_type) = (tensor.n_elements(), type_of(tensor.dtype()));
                    result = first_bad(result, (nccl.send)(place(tensor), n, of_type, *peer as c_int, comm, stream));
                }
                for Recv { peer, tensor, .. } in &recvs {
                    let (n, of_type) = (tensor.n_elements(), type_of(tensor.dtype()));
                    result = first_bad(result, (nccl.recv)(place(tensor), n, of_type, *peer as c_int, comm, stream));
                }
                first_bad(result, (nccl.group_end)())
            }
        };
        let under_way = self.start(self.operation("messages", bytes), &call);
        Pending::until(move || under_way.join())
    }
}

impl Nccl {
    /// shard = this rank's piece of the sum of all `full`, which are tensors of the device at these addresses.
    fn scatter_sum<'a>(&'a self, (from, to): (u64, u64), (full, shard): (&'a Tensor, &'a mut Tensor), op: ReduceOp) -> Pending<'a> {
        super::ordered::check_division("reduce-scatter", self.size(), full, shard);
        super::ordered::check_summable("reduce-scatter", (full, op), self.size());
        let (n, dtype) = (shard.n_elements(), shard.dtype());
        if dtype == DType::F32 && op == ReduceOp::Sum && self.options.sums == Sums::Library {
            let call = |nccl: &Library, comm, stream| {
                // SAFETY: as in `gather`.
                unsafe { (nccl.reduce_scatter)(at(from), at(to), n, type_of(dtype), ncclRedOp_t::ncclSum, comm, stream) }
            };
            let under_way = self.start(self.operation("reduce-scatter", full.n_bytes()), &call);
            return Pending::until(move || under_way.join());
        }
        let stride = n.next_multiple_of(VECTOR);
        let (under_way, arrived) = self.exchange("reduce-scatter", from, (n, stride), dtype);
        Pending::until(move || {
            under_way.join();
            let own = from + (self.rank() * n * dtype.bytes()) as u64;
            let pieces = Pieces { own, others: &arrived, rank: self.rank(), n_ranks: self.size(), n, stride, dtype };
            self.cuda.combine(to, &pieces, op);
        })
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.watch.forget(&self.group);
            self.group.close();
        }
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn barrier(&self) {
        self.host.barrier();
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        let host = self.host.split(colour);
        if host.size() == 1 {
            return host;
        }
        Box::new(Nccl::create(host, self.cuda.sharing_memory(), self.options, Arc::clone(&self.watch)))
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        self.host.start_all_gather_bytes(shard, full)
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        self.host.start_all_to_all_bytes(send, finish)
    }

    fn staging(&self) -> &Staging {
        self.host.staging()
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        self.host.broadcast_bytes(data, root);
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        let is_here = |tensor: &Tensor| self.cuda.address_of(tensor).is_some();
        let (sends, host_sends): (Vec<_>, Vec<_>) = sends.into_iter().partition(|send| is_here(send.tensor));
        let (recvs, host_recvs): (Vec<_>, Vec<_>) = recvs.into_iter().partition(|recv| is_here(recv.tensor));
        if sends.is_empty() && recvs.is_empty() {
            return self.host.start_group(host_sends, host_recvs);
        }
        let here = self.start_messages(sends, recvs);
        if host_sends.is_empty() && host_recvs.is_empty() {
            return here;
        }
        let there = self.host.start_group(host_sends, host_recvs);
        Pending::until(move || {
            here.wait();
            there.wait();
        })
    }

    // One stream carries them all out.
    fn groups_are_in_order(&self) -> bool {
        true
    }

    fn is_recordable(&self) -> bool {
        true
    }

    fn start_all_gather<'a>(&'a self, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
        super::ordered::check_division("all-gather", self.size(), full, shard);
        let Some(addresses) = self.both(shard, full) else { return self.host.start_all_gather(shard, full) };
        let under_way = self.gather(addresses, shard.n_elements(), shard.dtype());
        Pending::until(move || under_way.join())
    }

    fn start_reduce_scatter<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        let Some(addresses) = self.both(full, shard) else { return self.host.start_reduce_scatter(full, shard) };
        self.scatter_sum(addresses, (full, shard), ReduceOp::Sum)
    }

    fn start_reduce_scatter_in_pairs<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        let on_device = self.both(full, shard).filter(|_| self.size() <= MOST_PAIRED);
        let Some(addresses) = on_device else { return self.host.start_reduce_scatter_in_pairs(full, shard) };
        self.scatter_sum(addresses, (full, shard), ReduceOp::SumInPairs)
    }

    fn all_reduce(&self, x: &mut Tensor, op: ReduceOp) {
        super::ordered::check_summable("all-reduce", (x, op), self.size());
        let on_device = self.cuda.address_of(x).filter(|_| op != ReduceOp::SumInPairs || self.size() <= MOST_PAIRED);
        let Some(address) = on_device else { return self.host.all_reduce(x, op) };
        let (n, dtype) = (x.n_elements(), x.dtype());
        if dtype != DType::F32 || op != ReduceOp::Sum || self.options.sums == Sums::Ordered {
            return self.all_reduce_ordered(address, n, dtype, op);
        }
        let call = |nccl: &Library, comm, stream| {
            // SAFETY: as in `gather`; in place.
            unsafe { (nccl.all_reduce)(at(address), at(address), n, type_of(dtype), ncclRedOp_t::ncclSum, comm, stream) }
        };
        self.start(self.operation("all-reduce", x.n_bytes()), &call).join();
    }

    fn broadcast(&self, x: &mut Tensor, root: usize) {
        let Some(address) = self.cuda.address_of(x) else { return self.host.broadcast(x, root) };
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        let (n, of_type) = (x.n_elements(), type_of(x.dtype()));
        let call = |nccl: &Library, comm, stream| {
            // SAFETY: as in `gather`; in place.
            unsafe { (nccl.broadcast)(at(address), at(address), n, of_type, root as c_int, comm, stream) }
        };
        self.start(self.operation("broadcast", x.n_bytes()), &call).join();
    }
}
