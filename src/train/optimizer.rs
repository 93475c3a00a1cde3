//! AdamW with its state sharded over the data-parallel replicas (ZeRO-1; Rajbhandari et al. 2020), by rectangles: a rank owns a
//! row block of each tensor's tensor-parallel part, so a shard is a `Slice` of a global tensor and a checkpoint is a set of
//! slices. A step: reduce-scatter the gradients, clip by the global norm, AdamW on the owned rows of the f32 master weights,
//! all-gather the weights; `exchanges` says when the exchanges start and are waited for.

use super::exchanges::Exchanges;
use crate::checkpoint::snapshot::Gate;
use crate::comm::{Communicator, Groups, Pending, Recv, Send};
use crate::device::{Adamw, AdamwShard, Device, Scratch, ScratchTensor};
use crate::error::Result;
use crate::exact::ExactSum;
use crate::fault;
use crate::flight::{Phase, Recorder};
use crate::model::chunk::Chunk;
use crate::model::config::Split;
use crate::model::param::Param;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::parallel::pieces::TP_PIECES;
use crate::parallel::slice::Slice;
use crate::recipe::Optimizer as Settings;
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// The owned rows of one parameter. All tensors are [block, ..] f32 where block = ceil(rows / dp); rows past the end of the
/// tensor are zero and stay so.
pub struct Shard {
    /// What it covers of the global tensor; short or empty on the last replicas of an uneven division.
    pub slice: Slice,
    /// Master weights.
    pub master: Tensor,
    /// First moment.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
    /// Reduced gradient; None when dp = 1, where the parameter's own gradient is the sum already.
    grad: Option<Tensor>,
}

impl Shard {
    /// Memory for the reduced gradient, to receive it.
    pub(super) fn take_gradient(&mut self) -> Option<Tensor> {
        self.grad.take()
    }

    /// Gives it back.
    pub(super) fn set_gradient(&mut self, sum: Tensor) {
        self.grad = Some(sum);
    }
}

/// Optimizer state of one rank: shards of each parameter of each chunk, in the chunks' order.
pub struct ShardedAdamW {
    /// [chunk][parameter]
    pub shards: Vec<Vec<Shard>>,
    pub(super) order: Order,
    /// Asked before a parameter is changed while a save is under way.
    pub gate: Option<(Arc<Gate>, Recorder)>,
}

/// Step number, learning rate and clipping of one update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Number of the update, from 1.
    pub step: u64,
    /// Learning rate.
    pub lr: f64,
    /// Multiplies every gradient.
    pub grad_scale: f64,
}

impl ShardedAdamW {
    /// Zeroed state for the parameters of `chunks`.
    pub fn new(device: &dyn Device, chunks: &[Chunk], layout: &ParallelLayout, at: Coords) -> Result<ShardedAdamW> {
        let shard = |param: &Param| -> Result<Shard> {
            let mut shape = param.value.dims().to_vec();
            shape[0] /= layout.dp;
            let alloc = || device.alloc(&shape, DType::F32);
            let grad = if layout.dp > 1 { Some(alloc()?) } else { None };
            Ok(Shard { slice: param.spec.dp_slice(layout, at), master: alloc()?, m: alloc()?, v: alloc()?, grad })
        };
        let of_chunk = |chunk: &Chunk| chunk.params().into_iter().map(shard).collect::<Result<Vec<Shard>>>();
        let shards = chunks.iter().map(of_chunk).collect::<Result<_>>()?;
        Ok(ShardedAdamW { shards, order: Order::ByRank, gate: None })
    }

    /// Takes the memory of canonical sums in `chunks`, for at most this many blocks of samples a replica, and adds in their order
    /// from now on. Err: out of memory.
    pub fn use_canonical_sums(&mut self, device: &dyn Device, chunks: &mut [Chunk], most_blocks: usize) -> Result<()> {
        self.order = Order::Canonical;
        chunks.iter_mut().try_for_each(|chunk| chunk.reserve_sums(device, most_blocks))
    }

    /// Adds the gradients of the two uses of a tied embedding (input and output), each summed over the replicas already:
    /// the owned rows only. Both copies end with the same sum.
    pub fn reduce_tied(&mut self, device: &dyn Device, scratch: &Scratch, chunks: &mut [Chunk], groups: &Groups) {
        let holders: Vec<(usize, usize)> =
            (0..chunks.len()).filter_map(|chunk| chunks[chunk].tied_param().map(|idx| (chunk, idx))).collect();
        let mut owned = Vec::new();
        for &(chunk, idx) in &holders {
            let shard = &self.shards[chunk][idx];
            owned.push(scratch.take(device, shard.master.dims(), DType::F32));
        }
        match holders[..] {
            [] => {}
            [(first, first_idx), (last, last_idx)] => {
                // Both copies on one stage (pp = 1 with several chunks).
                device.copy(&mut owned[0], reduced(chunks, &self.shards, (first, first_idx)));
                device.copy(&mut owned[1], reduced(chunks, &self.shards, (last, last_idx)));
                device.add(reduced_mut(chunks, &mut self.shards, (first, first_idx)), &owned[1]);
                device.add(reduced_mut(chunks, &mut self.shards, (last, last_idx)), &owned[0]);
            }
            [(chunk, idx)] if groups.layout.n_chunks() > 1 => {
                let last_stage = groups.layout.pp - 1;
                let peer = if groups.at.pp == 0 { last_stage } else { 0 };
                let mine = reduced_mut(chunks, &mut self.shards, (chunk, idx));
                let (tag, theirs) = (TIED_TAG, &mut owned[0]);
                groups.pp.start_group(vec![Send { peer, tag, tensor: mine }], vec![Recv { peer, tag, tensor: theirs }]).wait();
                // f32 addition commutes, so both sides get the same bits.
                device.add(mine, theirs);
            }
            [(chunk, idx)] => {
                // Both uses in one chunk: one gradient, or two where each has a canonical sum.
                let Some((grad, second)) = chunks[chunk].params_mut().swap_remove(idx).both_gradients_mut() else { return };
                match &mut self.shards[chunk][idx].grad {
                    None => device.add(grad, second),
                    Some(grad) => {
                        self.order.start_reduce_scatter(&*groups.dp, second, &mut owned[0]).wait();
                        device.add(grad, &owned[0]);
                    }
                }
                device.fill_zero(second);
            }
            _ => unreachable!("an embedding has at most two copies on a stage"),
        }
    }

    /// The global gradient norm: squares of every element of the global gradient, each counted once. Tensors that all
    /// tensor-parallel ranks hold are counted by the first; the second copy of a tied embedding is not counted. Collective.
    pub fn grad_norm(&self, device: &dyn Device, chunks: &[Chunk], groups: &Groups) -> f64 {
        let mut counted = Vec::new();
        for (chunk, shards) in chunks.iter().zip(&self.shards) {
            for (idx, (param, shard)) in chunk.params().into_iter().zip(shards).enumerate() {
                let replica = param.is_replicated_over_tp() && groups.at.tp > 0;
                if !replica && !chunk.is_tied_copy(idx) {
                    counted.push((param, shard.grad.as_ref().unwrap_or(param.grad())));
                }
            }
        }
        if self.order == Order::ByRank {
            let grads: Vec<&Tensor> = counted.into_iter().map(|(_, grad)| grad).collect();
            return groups.world.sum_f64(device.sum_squares_of(&grads)).sqrt();
        }
        let sums = device.canonical().expect("canonical sums were asked of a device that has them");
        // A row that tp divides in the pieces of the whole row.
        let n_pieces = |param: &Param| if param.spec.split == Split::Columns { TP_PIECES / groups.layout.tp } else { 1 };
        let grads: Vec<(&Tensor, usize)> = counted.into_iter().map(|(param, grad)| (grad, n_pieces(param))).collect();
        sum_exactly(&*groups.world, &sums.sum_squares_of(&grads)).sqrt()
    }

    /// The owned rows of a parameter's gradient, summed over the replicas; until [`ShardedAdamW::update`].
    pub fn reduced_gradient<'a>(&'a self, chunks: &'a [Chunk], chunk: usize, param_idx: usize) -> &'a Tensor {
        reduced(chunks, &self.shards, (chunk, param_idx))
    }

    /// AdamW on the owned rows, then all rows of the new weights are on their way to all replicas. Gradients are ended, so
    /// that the next step begins its own.
    pub fn update(
        &mut self,
        device: &dyn Device,
        scratch: &Scratch,
        chunks: &mut [Chunk],
        exchanges: &mut Exchanges,
        how: (&Settings, Update),
    ) {
        let (settings, update) = how;
        for (chunk_idx, (chunk, shards)) in chunks.iter_mut().zip(&mut self.shards).enumerate() {
            for (idx, (param, shard)) in chunk.params_mut().into_iter().zip(shards).enumerate() {
                let adamw = Adamw {
                    lr: update.lr as f32,
                    beta1: settings.beta1 as f32,
                    beta2: settings.beta2 as f32,
                    eps: settings.eps as f32,
                    weight_decay: if param.spec.decay { settings.weight_decay as f32 } else { 0.0 },
                    step: update.step,
                    grad_scale: update.grad_scale as f32,
                };
                fault::at("update");
                if let Some((gate, flight)) = &self.gate {
                    let _waiting = flight.span(Phase::Save);
                    gate.release(&param.spec.name);
                }
                if let Some(rows) = update_one(device, scratch, (&mut *param, shard), adamw) {
                    exchanges.gather((chunk_idx, idx), rows, param);
                }
            }
        }
    }

    /// Ends the gradients of a step whose update is not made. Weights and moments stay as they are.
    pub fn discard_gradients(&self, device: &dyn Device, chunks: &mut [Chunk]) {
        for param in chunks.iter_mut().flat_map(Chunk::params_mut) {
            param.end_gradient(device);
        }
    }

    /// Sets the compute weights from the master weights: after loading or initialising.
    pub fn publish_weights(&self, device: &dyn Device, scratch: &Scratch, chunks: &mut [Chunk], groups: &Groups) {
        for (chunk, shards) in chunks.iter_mut().zip(&self.shards) {
            for (param, shard) in chunk.params_mut().into_iter().zip(shards) {
                let mut weight = scratch.take(device, shard.master.dims(), param.value.dtype());
                device.copy(&mut weight, &shard.master);
                groups.flight.name(&param.spec.name);
                groups.dp.all_gather(&weight, &mut param.value);
            }
        }
    }
}

/// Above the tags of schedules, below those that MPI reserves for itself.
const TIED_TAG: u32 = i32::MAX as u32 - 2;

/// The order in which replicas and squares are added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    ByRank,
    Canonical,
}

impl Order {
    /// shard = this replica's rows of the sum over the replicas.
    pub(super) fn start_reduce_scatter<'a>(self, dp: &'a dyn Communicator, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        match self {
            Order::ByRank => dp.start_reduce_scatter(full, shard),
            Order::Canonical => dp.start_reduce_scatter_in_pairs(full, shard),
        }
    }
}

/// The sum of all ranks' sums, rounded once: the same bits on every rank, whoever summed what. Collective.
pub fn sum_exactly(world: &dyn Communicator, mine: &ExactSum) -> f64 {
    let mut sum = ExactSum::default();
    world.gather_variable(&mine.to_bytes()).iter().for_each(|bytes| sum.merge(&ExactSum::from_bytes(bytes)));
    sum.value()
}

/// The gradient of parameter `at` = (chunk, index) as it is after the sum over replicas.
fn reduced<'a>(chunks: &'a [Chunk], shards: &'a [Vec<Shard>], at: (usize, usize)) -> &'a Tensor {
    shards[at.0][at.1].grad.as_ref().unwrap_or_else(|| chunks[at.0].params()[at.1].grad())
}

fn reduced_mut<'a>(chunks: &'a mut [Chunk], shards: &'a mut [Vec<Shard>], at: (usize, usize)) -> &'a mut Tensor {
    match &mut shards[at.0][at.1].grad {
        Some(grad) => grad,
        None => chunks[at.0].params_mut().swap_remove(at.1).grad_mut(),
    }
}

/// The owned rows of the new weight, when they are not all of it.
fn update_one(device: &dyn Device, scratch: &Scratch, of: (&mut Param, &mut Shard), how: Adamw) -> Option<ScratchTensor> {
    let (param, shard) = of;
    let (value, full_grad) = param.value_and_grad_mut();
    let rows = match &shard.grad {
        None => {
            let to = AdamwShard { master: &mut shard.master, m: &mut shard.m, v: &mut shard.v, grad: full_grad, weight: value };
            device.adamw(to, how);
            None
        }
        Some(grad) => {
            let mut weight = scratch.take(device, shard.master.dims(), value.dtype());
            let to = AdamwShard { master: &mut shard.master, m: &mut shard.m, v: &mut shard.v, grad, weight: &mut weight };
            device.adamw(to, how);
            Some(weight)
        }
    };
    param.end_gradient(device);
    rows
}
