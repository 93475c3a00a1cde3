//! What replicas exchange in a step, as it goes on: gradients of a part of the model are reduced from its last backward on and
//! waited for before the clip; new weights are gathered from the update on and waited for where the next forward reads them. A
//! tensor under way is not in its parameter, so nothing can touch it. Every sum is that of the communicator, in rank order or in
//! pairs: the same bits whether something else ran meanwhile or not.
//!
//! Memory: a communicator over host memory holds what is under way a second time, up to the gradients of one stage.

use super::executor::Between;
use super::optimizer::{Order, Shard, ShardedAdamW};
use crate::comm::{Groups, InFlight};
use crate::device::ScratchTensor;
use crate::flight::Phase;
use crate::model::chunk::{Chunk, Part, finish_gradient};
use crate::model::ctx::Ctx;
use crate::model::param::Param;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::mem::replace;

/// When exchanges are waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Overlap {
    /// Where their result is read.
    WithComputation,
    /// At once.
    Nothing,
}

/// A parameter of this rank: (chunk, index in `Chunk::params`).
type Place = (usize, usize);

/// The exchanges under way on one rank.
pub struct Exchanges<'c> {
    groups: &'c Groups,
    overlap: Overlap,
    /// Gradient and the sum's owned rows, in the order of their starts.
    reducing: Vec<(Place, InFlight<'c, (Tensor, Tensor)>)>,
    /// Owned rows and weights.
    gathering: BTreeMap<Place, InFlight<'c, (ScratchTensor, Tensor)>>,
}

impl<'c> Exchanges<'c> {
    /// Nothing under way.
    pub fn new(groups: &'c Groups, overlap: Overlap) -> Exchanges<'c> {
        Exchanges { groups, overlap, reducing: Vec::new(), gathering: BTreeMap::new() }
    }

    /// What the executor of a step tells. The two uses of a tied embedding are added afterwards, by [`ShardedAdamW::reduce_tied`].
    pub fn during<'s>(&'s mut self, ctx: Ctx<'s>, optimizer: &'s mut ShardedAdamW) -> During<'s, 'c> {
        During { exchanges: self, ctx, order: optimizer.order, shards: &mut optimizer.shards }
    }

    /// Waits for the gradients: each is complete in its shard.
    pub fn finish_gradients(&mut self, chunks: &mut [Chunk], optimizer: &mut ShardedAdamW) {
        for ((chunk, idx), reduce) in std::mem::take(&mut self.reducing) {
            let (full, sum) = reduce.wait();
            *chunks[chunk].params_mut()[idx].grad_mut() = full;
            optimizer.shards[chunk][idx].set_gradient(sum);
        }
    }

    /// Sends this rank's rows of a new weight to all replicas, and receives theirs.
    pub(super) fn gather(&mut self, at: Place, rows: ScratchTensor, param: &mut Param) {
        self.groups.flight.name(&param.spec.name);
        let weights = take(&mut param.value);
        let gather = InFlight::start(&*self.groups.dp, (rows, weights), |dp, (rows, weights)| dp.start_all_gather(rows, weights));
        match self.overlap {
            Overlap::WithComputation => drop(self.gathering.insert(at, gather)),
            Overlap::Nothing => param.value = gather.wait().1,
        }
    }

    /// Waits for all weights: before anything but a forward reads them.
    pub fn finish_weights(&mut self, chunks: &mut [Chunk]) {
        for (chunk_idx, chunk) in chunks.iter_mut().enumerate() {
            chunk.each_part(&mut |part| self.receive(chunk_idx, part));
        }
    }

    fn receive(&mut self, chunk: usize, part: Part) {
        for (idx, param) in (part.first_idx..).zip(part.params) {
            if let Some(gather) = self.gathering.remove(&(chunk, idx)) {
                param.value = gather.wait().1;
            }
        }
    }

    fn reduce(&mut self, at: Place, param: &mut Param, shard: &mut Shard, order: Order) {
        let Some(sum) = shard.take_gradient() else { return };
        self.groups.flight.name(&param.spec.name);
        let full = take(param.grad_mut());
        let reduce = InFlight::start(&*self.groups.dp, (full, sum), move |dp, (full, sum)| order.start_reduce_scatter(dp, full, sum));
        match self.overlap {
            Overlap::WithComputation => self.reducing.push((at, reduce)),
            Overlap::Nothing => {
                let (full, sum) = reduce.wait();
                *param.grad_mut() = full;
                shard.set_gradient(sum);
            }
        }
    }
}

/// The tensor out of its place, where one without memory is left.
fn take(tensor: &mut Tensor) -> Tensor {
    let nothing = Tensor::nothing(tensor.dims(), tensor.dtype());
    replace(tensor, nothing)
}

/// One step's part of `Exchanges`.
pub struct During<'s, 'c> {
    exchanges: &'s mut Exchanges<'c>,
    ctx: Ctx<'s>,
    order: Order,
    shards: &'s mut Vec<Vec<Shard>>,
}

impl Between for During<'_, '_> {
    fn before_forward(&mut self, chunk: usize, part: Part) {
        self.exchanges.receive(chunk, part);
    }

    fn gradients_done(&mut self, chunk: usize, part: Part) {
        let _reducing = self.exchanges.groups.flight.span_at(Phase::Reduce, chunk, None);
        for (idx, param) in (part.first_idx..).zip(part.params) {
            finish_gradient(&self.ctx, param);
            self.exchanges.reduce((chunk, idx), param, &mut self.shards[chunk][idx], self.order);
        }
    }
}
