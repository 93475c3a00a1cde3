//! Everything that changes while training: weights, optimizer state, step and samples consumed; made new, saved, loaded.

use super::optimizer::ShardedAdamW;
use crate::checkpoint::snapshot::{self, Options, Started};
use crate::checkpoint::{Meta, Piece, Stored, Wanted};
use crate::comm::Groups;
use crate::device::{Device, Scratch};
use crate::error::{Context, Result};
use crate::model::chunk::{Chunk, Purpose};
use crate::model::config::ModelConfig;
use crate::model::numerics;
use crate::model::param::{self, Param};
use crate::parallel::slice::Slice;
use crate::parallel::stages::Stages;
use crate::recipe::Moments;
use crate::recipe::{Mode, Numerics};
use crate::tensor::DType;
use std::collections::BTreeMap;
use std::path::Path;

/// The state of one rank.
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Updates made: steps without those that were skipped.
    pub updates: u64,
    /// Samples consumed by them.
    pub consumed_samples: u64,
    /// This stage's chunks.
    pub chunks: Vec<Chunk>,
    /// This rank's share of the optimizer state.
    pub optimizer: ShardedAdamW,
}

/// What a checkpoint says besides the tensors; the part that is the same on every rank.
pub struct SavedAs<'a> {
    /// The resolved recipe.
    pub recipe: serde_json::Value,
    /// Fingerprint of the data order.
    pub data_fingerprint: String,
    /// The tokenizer's model file.
    pub tokenizer: Option<Vec<u8>>,
    /// What the weights that the run started from came with, where it fits that tokenizer.
    pub companions: BTreeMap<String, Vec<u8>>,
    /// The function.
    pub model: &'a ModelConfig,
    /// What the trainer keeps besides.
    pub trainer: serde_json::Value,
}

impl TrainState {
    /// Memory for weights, gradients and optimizer state; contents are zero until `initialise` or `load`.
    pub fn new(device: &dyn Device, model: &ModelConfig, groups: &Groups, dtype: DType) -> Result<TrainState> {
        TrainState::with_stages(device, model, groups, dtype, &Stages::even(&groups.layout, model.n_layers))
    }

    /// The same with layers divided in another way.
    pub fn with_stages(device: &dyn Device, model: &ModelConfig, groups: &Groups, dtype: DType, stages: &Stages) -> Result<TrainState> {
        let (layout, at) = (groups.layout, groups.at);
        let chunk = |chunk| {
            let layers = stages.layers(&layout, at.pp, chunk);
            Chunk::of_layers(device, model, (&layout, at), (chunk, layers), dtype, Purpose::Training)
        };
        let chunks = (0..layout.vp).map(chunk).collect::<Result<Vec<Chunk>>>()?;
        let optimizer = ShardedAdamW::new(device, &chunks, &layout, at)?;
        Ok(TrainState { step: 0, updates: 0, consumed_samples: 0, chunks, optimizer })
    }

    /// Takes the memory of the sums that the recipe asks for, at most `most_blocks` blocks of samples a replica, before the first
    /// step. Err: the device has no canonical sums, or no memory.
    pub fn prepare_sums(&mut self, device: &dyn Device, asked: &Numerics, most_blocks: usize) -> Result<()> {
        match asked.mode {
            Mode::Fast => Ok(()),
            Mode::Reproducible => {
                numerics::canonical(device)?;
                self.optimizer.use_canonical_sums(device, &mut self.chunks, most_blocks)
            }
        }
    }

    /// Step 0: master weights by seed, name and global index, whatever the layout.
    pub fn initialise(&mut self, device: &dyn Device, scratch: &Scratch, groups: &Groups, seed: u64) {
        for (chunk, shards) in self.chunks.iter().zip(&mut self.optimizer.shards) {
            for (param, shard) in chunk.params().into_iter().zip(shards) {
                let values = param::init_values(&param.spec, &shard.slice, seed);
                if !values.is_empty() {
                    let rows = 0..shard.slice.shape[0];
                    device.upload(bytemuck::cast_slice(&values), &mut shard.master.rows_mut(rows));
                }
            }
        }
        self.optimizer.publish_weights(device, scratch, &mut self.chunks, groups);
    }

    /// Reads master weights, and unless the moments are to be reset optimizer state, saved under any layout. Counters are the caller's.
    /// On an error the tensors are in any state. [`TrainState::publish`] comes next, when all ranks have read theirs.
    pub fn read(&mut self, from: &Stored, moments: Moments) -> Result<()> {
        let mut wanted = Vec::new();
        for (chunk, shards) in self.chunks.iter().zip(&mut self.optimizer.shards) {
            for (param, shard) in chunk.params().into_iter().zip(shards) {
                if shard.slice.n_elements() == 0 {
                    continue;
                }
                let (name, rows) = (&param.spec.name, 0..shard.slice.shape[0]);
                let master = if from.tensors().contains_key(&format!("master/{name}")) { "master" } else { "weights" };
                for (kind, tensor) in [(master, &mut shard.master), ("adam_m", &mut shard.m), ("adam_v", &mut shard.v)] {
                    if kind != master && moments == Moments::Reset {
                        continue;
                    }
                    wanted.push((format!("{kind}/{name}"), shard.slice.clone(), tensor.rows_mut(rows.clone())));
                }
            }
        }
        let mut requests: Vec<Wanted> =
            wanted.iter_mut().map(|(name, slice, tensor)| Wanted { name: name.clone(), slice: slice.clone(), tensor }).collect();
        from.read(&mut requests).doing(|| format!("resuming from {}", from.dir().display()))
    }

    /// Sets the compute weights from what was read. Collective over the data-parallel group.
    pub fn publish(&mut self, device: &dyn Device, scratch: &Scratch, groups: &Groups) {
        self.optimizer.publish_weights(device, scratch, &mut self.chunks, groups);
    }

    /// Begins to write a checkpoint: every rank the rows it owns. Nothing is copied; see [`snapshot::start`] for what may change
    /// when. Collective over the world.
    pub fn snapshot(&self, out: &Path, groups: &Groups, what: SavedAs, options: Options) -> Result<Started> {
        let meta = Meta {
            step: self.step,
            consumed_samples: self.consumed_samples,
            model: what.model.clone(),
            layout: groups.layout,
            recipe: what.recipe,
            data_fingerprint: what.data_fingerprint,
            tokenizer: what.tokenizer,
            companions: what.companions,
            trainer: what.trainer,
        };
        // Views of the owned rows live here while the pieces borrow them.
        let mut views = Vec::new();
        for (chunk, shards) in self.chunks.iter().zip(&self.optimizer.shards) {
            for (idx, (param, shard)) in chunk.params().into_iter().zip(shards).enumerate() {
                let replica = param.is_replicated_over_tp() && groups.at.tp > 0;
                if replica || chunk.is_tied_copy(idx) || shard.slice.n_elements() == 0 {
                    continue;
                }
                let (name, rows) = (&param.spec.name, 0..shard.slice.shape[0]);
                let mut add =
                    |kind: &str, tensor| views.push((format!("{kind}/{name}"), param.spec.shape.clone(), shard.slice.clone(), tensor));
                add("weights", owned_rows(param, &shard.slice, groups));
                if param.value.dtype() != DType::F32 {
                    add("master", shard.master.rows(rows.clone()));
                }
                add("adam_m", shard.m.rows(rows.clone()));
                add("adam_v", shard.v.rows(rows));
            }
        }
        let pieces: Vec<Piece> = views
            .iter()
            .map(|(name, shape, slice, tensor)| Piece { name: name.clone(), global_shape: shape.clone(), slice: slice.clone(), tensor })
            .collect();
        snapshot::start(out, &meta, &pieces, options, &*groups.world)
    }
}

/// The rows of the compute weight whose state this rank owns.
fn owned_rows<'a>(param: &'a Param, slice: &Slice, groups: &Groups) -> crate::tensor::TensorView<'a> {
    let block = param.value.n_rows() / groups.layout.dp;
    let first = groups.at.dp * block;
    param.value.rows(first..first + slice.shape[0])
}
