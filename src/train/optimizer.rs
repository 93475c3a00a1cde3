//! AdamW with its state sharded over the data-parallel replicas (ZeRO-1; Rajbhandari et al. 2020), by rectangles: a rank owns a
//! row block of each tensor's tensor-parallel part, so a shard is a `Slice` of a global tensor and a checkpoint is a set of
//! slices. A step: reduce-scatter the gradients, clip by the global norm, AdamW on the owned rows of the f32 master weights,
//! all-gather the weights; `exchanges` says when the exchanges start and are waited for.

use super::exchanges::Exchanges;
use crate::comm::{Groups, Recv, Send};
use crate::device::{Adamw, AdamwShard, Device, Scratch, ScratchTensor};
use crate::error::Result;
use crate::model::chunk::Chunk;
use crate::model::param::Param;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::parallel::slice::Slice;
use crate::recipe::Optimizer as Settings;
use crate::tensor::{DType, Tensor};

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
        Ok(ShardedAdamW { shards: chunks.iter().map(of_chunk).collect::<Result<_>>()? })
    }

    /// Sums the gradients of the two copies of a tied embedding (first chunk and last chunk), then over the replicas.
    /// Both copies end with the same sum, added in the same order.
    pub fn reduce_tied(&mut self, device: &dyn Device, scratch: &Scratch, chunks: &mut [Chunk], groups: &Groups) {
        let holders: Vec<(usize, usize)> =
            (0..chunks.len()).filter_map(|chunk| tied_across_stages(&chunks[chunk], groups).map(|idx| (chunk, idx))).collect();
        match holders[..] {
            [] => return,
            [(first, first_idx), (last, last_idx)] => {
                // Both copies on one stage (pp = 1 with several chunks).
                let (head, tail) = chunks.split_at_mut(last);
                let (mut a, mut b) = (head[first].params_mut(), tail[0].params_mut());
                let (a, b) = (a[first_idx].grad_mut(), b[last_idx].grad_mut());
                device.add(a, b);
                device.copy(b, a);
            }
            [(chunk, idx)] => {
                let last_stage = groups.layout.pp - 1;
                let peer = if groups.at.pp == 0 { last_stage } else { 0 };
                let mut params = chunks[chunk].params_mut();
                let mine = params[idx].grad_mut();
                let mut theirs = scratch.take(device, mine.dims(), DType::F32);
                let tag = TIED_TAG;
                groups.pp.start_group(vec![Send { peer, tag, tensor: mine }], vec![Recv { peer, tag, tensor: &mut theirs }]).wait();
                // f32 addition commutes, so both sides get the same bits.
                device.add(mine, &theirs);
            }
            _ => unreachable!("an embedding has at most two copies on a stage"),
        }
        for (chunk, idx) in holders {
            let params = chunks[chunk].params();
            reduce(params[idx], &mut self.shards[chunk][idx], groups);
        }
    }

    /// The global gradient norm: squares of every element of the global gradient, each counted once. Tensors that all
    /// tensor-parallel ranks hold are counted by the first; the second copy of a tied embedding is not counted. Collective.
    pub fn grad_norm(&self, device: &dyn Device, chunks: &[Chunk], groups: &Groups) -> f64 {
        let mut sum = 0.0;
        for (chunk, shards) in chunks.iter().zip(&self.shards) {
            for (idx, (param, shard)) in chunk.params().into_iter().zip(shards).enumerate() {
                let replica = param.is_replicated_over_tp() && groups.at.tp > 0;
                if !replica && !chunk.is_tied_copy(idx) {
                    sum += device.sum_squares(shard.grad.as_ref().unwrap_or(param.grad()));
                }
            }
        }
        groups.world.sum_f64(sum).sqrt()
    }

    /// AdamW on the owned rows, then all rows of the new weights are on their way to all replicas. Gradients are zeroed for the
    /// next step.
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
                if let Some(rows) = update_one(device, scratch, (&mut *param, shard), adamw) {
                    exchanges.gather((chunk_idx, idx), rows, param);
                }
            }
        }
    }

    /// Zeroes the gradients of a step whose update is not made. Weights and moments stay as they are.
    pub fn discard_gradients(&self, device: &dyn Device, chunks: &mut [Chunk]) {
        for param in chunks.iter_mut().flat_map(Chunk::params_mut) {
            device.fill_zero(param.grad_mut());
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

/// The index of the tied embedding in a chunk whose other copy lives in another chunk.
pub(super) fn tied_across_stages(chunk: &Chunk, groups: &Groups) -> Option<usize> {
    if groups.layout.n_chunks() > 1 { chunk.tied_param() } else { None }
}

fn reduce(param: &Param, shard: &mut Shard, groups: &Groups) {
    if let Some(grad) = &mut shard.grad {
        groups.flight.name(&param.spec.name);
        groups.dp.reduce_scatter(param.grad(), grad);
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
    device.fill_zero(full_grad);
    rows
}
