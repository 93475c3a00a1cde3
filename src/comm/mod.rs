//! Communicators: the same calls over one rank (`solo`), threads of one process (`threads`), MPI (`mpi`), and between GPUs (`nccl`).
//!
//! The byte primitives are what an implementation brings; the tensor collectives stand here once. Sums are made by
//! exchanging the pieces and adding them **in rank order in f32** with one rounding at the end, so a sum has the same bits
//! over threads and MPI, on every rank, in every run. One exception, which is asked for: `nccl` with `Sums::Library` leaves sums of
//! f32 to the library, whose order is another. Calls do not return `Result`: a failed collective panics, and the hook in `runtime`
//! ends the job.

mod in_flight;
mod mailbox;
pub mod mpi;
pub mod nccl;
mod ordered;
mod recorded;
pub mod solo;
mod staging;
pub mod threads;

use crate::flight::{Group, Recorder};
use crate::parallel::layout::{Axis, Coords, ParallelLayout};
use crate::tensor::Tensor;
pub use in_flight::InFlight;
pub use recorded::recorded;
pub use staging::{Staging, StagingBuffer};

/// How values of several ranks become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReduceOp {
    /// Added in rank order.
    Sum,
    /// Added in pairs, ((x0 + x1) + (x2 + x3)) + ..: the tree that sums in a canonical order continue over ranks. The number of
    /// ranks must be a power of two.
    SumInPairs,
    /// The largest.
    Max,
}

/// A message to `peer`. Messages between two ranks arrive in the order they were sent for each tag.
pub struct Send<'a> {
    /// Receiving rank in this communicator.
    pub peer: usize,
    /// Matches the receiver's tag.
    pub tag: u32,
    /// What to send.
    pub tensor: &'a Tensor,
}

/// A message awaited from `peer`.
pub struct Recv<'a> {
    /// Sending rank in this communicator.
    pub peer: usize,
    /// Matches the sender's tag.
    pub tag: u32,
    /// Where it goes; its size must be that of the message.
    pub tensor: &'a mut Tensor,
}

impl Recv<'_> {
    /// Assigns the message; panics when it has another size than the tensor.
    fn fill(self, message: &[u8]) {
        let (peer, tag, expected) = (self.peer, self.tag, self.tensor.n_bytes());
        assert!(message.len() == expected, "message of rank {peer}, tag {tag}: {} bytes, expected {expected}", message.len());
        self.tensor.write_bytes(0, message);
    }
}

/// Communication under way. It borrows the tensors it reads and writes, so touching them before `wait` does not compile.
#[must_use = "communication is complete only after wait()"]
pub struct Pending<'a> {
    finish: Option<Box<dyn FnOnce() + 'a>>,
}

impl<'a> Pending<'a> {
    /// Complete already.
    pub fn done() -> Self {
        Pending { finish: None }
    }

    /// Complete after `finish` has run.
    pub fn until(finish: impl FnOnce() + 'a) -> Self {
        Pending { finish: Some(Box::new(finish)) }
    }

    /// Blocks until the communication is complete.
    pub fn wait(mut self) {
        if let Some(finish) = self.finish.take() {
            finish();
        }
    }
}

impl Drop for Pending<'_> {
    // A forgotten wait still completes, so no transfer outlives the borrow of its memory.
    fn drop(&mut self) {
        if let Some(finish) = self.finish.take()
            && !std::thread::panicking()
        {
            finish();
        }
    }
}

/// What is done with the pieces of all ranks, given in rank order, when they have arrived.
pub type UsePieces<'a> = Box<dyn FnOnce(&[&[u8]]) + 'a>;

/// A group of ranks that call the same collectives in the same order.
pub trait Communicator: std::marker::Send + Sync {
    /// Which of the ranks this is.
    fn rank(&self) -> usize;
    /// How many ranks.
    fn size(&self) -> usize;
    /// Returns when all ranks have called it.
    fn barrier(&self);
    /// The ranks with the same `colour`, in the order of their ranks here, as a communicator of their own. Collective.
    fn split(&self, colour: usize) -> Box<dyn Communicator>;

    /// full = the shards of all ranks in rank order; full.len() = size * shard.len().
    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a>;
    /// Piece r of `send`, of `size` equal pieces, goes to rank r; `wait` hands this rank's piece of every rank to `finish`,
    /// in rank order, from wherever the implementation holds it.
    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a>;
    /// The pool of temporaries of this rank, shared by a communicator and those split from it.
    fn staging(&self) -> &Staging;
    /// The root's bytes on all ranks.
    fn broadcast_bytes(&self, data: &mut [u8], root: usize);
    /// All sends and receives posted together: both directions at once cannot deadlock. Groups started one after another are
    /// independent: any of them may complete first, unless `groups_are_in_order`.
    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a>;
    /// Whether a group of messages begins only when the one before it is complete. Schedules then keep to groups that all ranks
    /// start in one order.
    fn groups_are_in_order(&self) -> bool {
        false
    }
    /// Whether collectives of a device's tensors may be among the work that `Device::record` records: nothing of them waits on the host.
    /// All ranks then record the same work, and ask for it again together.
    fn is_recordable(&self) -> bool {
        self.size() == 1
    }

    /// full[R*size, ..] = the shards [R, ..] in rank order.
    fn start_all_gather<'a>(&'a self, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
        ordered::start_all_gather(self, shard, full)
    }
    /// shard[R, ..] = rows rank*R.. of the sum over ranks of full[R*size, ..]; same dtype. The result is assigned at `wait`.
    fn start_reduce_scatter<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        ordered::start_reduce_scatter(self, full, shard, ReduceOp::Sum)
    }
    /// As `start_reduce_scatter`, added in pairs.
    fn start_reduce_scatter_in_pairs<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        ordered::start_reduce_scatter(self, full, shard, ReduceOp::SumInPairs)
    }
    /// x = the sum or the maximum over all ranks; any shape, f32 or bf16.
    fn all_reduce(&self, x: &mut Tensor, op: ReduceOp) {
        ordered::all_reduce(self, x, op)
    }
    /// Blocking form.
    fn all_gather(&self, shard: &Tensor, full: &mut Tensor) {
        self.start_all_gather(shard, full).wait()
    }
    /// Blocking form.
    fn reduce_scatter(&self, full: &Tensor, shard: &mut Tensor) {
        self.start_reduce_scatter(full, shard).wait()
    }
    /// The root's x on all ranks.
    fn broadcast(&self, x: &mut Tensor, root: usize) {
        ordered::broadcast(self, x, root)
    }
    /// Values added in rank order; the same bits on every rank.
    fn sum_f64(&self, x: f64) -> f64 {
        self.gather_f64(x).into_iter().sum()
    }
    /// One value of each rank, in rank order, on all ranks.
    fn gather_f64(&self, x: f64) -> Vec<f64> {
        let mut all = vec![0u8; 8 * self.size()];
        self.start_all_gather_bytes(&x.to_le_bytes(), &mut all).wait();
        all.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
    }
    /// Byte strings of different lengths of all ranks, in rank order, on all ranks. For manifests and reports.
    fn gather_variable(&self, mine: &[u8]) -> Vec<Vec<u8>> {
        ordered::gather_variable(self, mine)
    }
}

/// The communicators of one rank: all ranks, and its tensor-, data- and pipeline-parallel groups.
pub struct Groups {
    /// All ranks.
    pub world: Box<dyn Communicator>,
    /// Ranks that share a stage and a replica.
    pub tp: Box<dyn Communicator>,
    /// Ranks that hold the same shard of the model.
    pub dp: Box<dyn Communicator>,
    /// Ranks that together hold one replica's column of stages, in stage order.
    pub pp: Box<dyn Communicator>,
    /// The layout the groups were made for.
    pub layout: ParallelLayout,
    /// This rank's coordinates.
    pub at: Coords,
    /// What the communicators record to.
    pub flight: Recorder,
}

impl Groups {
    /// Splits the world by the layout; all four communicators record. Collective; `world.size()` must be the layout's.
    pub fn new(world: Box<dyn Communicator>, layout: ParallelLayout) -> Groups {
        assert_eq!(world.size(), layout.world(), "the world does not fit {layout:?}");
        let at = layout.coords(world.rank());
        let flight = Recorder::new();
        let part = |axis: Axis, group: Group| recorded(world.split(layout.colour(axis, at)), group, &flight);
        let (tp, dp, pp) = (part(Axis::Tp, Group::Tp), part(Axis::Dp, Group::Dp), part(Axis::Pp, Group::Pp));
        Groups { world: recorded(world, Group::World, &flight), tp, dp, pp, layout, at, flight }
    }
}

/// Agrees on success before going on: all ranks leave by the same door. The error is that of the lowest failing rank.
pub fn agree<T>(world: &dyn Communicator, mine: crate::error::Result<T>) -> crate::error::Result<T> {
    ordered::agree(world, mine)
}
