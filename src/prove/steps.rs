//! A few training steps as the trainer makes them (`train::trainer`), on tokens that are a function of the seed, and what they leave
//! on this rank: numbers, and its parts of gradients and weights.

use super::joined::{Part, Parts};
use crate::comm::{Groups, agree};
use crate::device::{Device, Scratch};
use crate::error::{Error, Kind, Result};
use crate::model::chunk::{Chunk, MicroBatch};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::parallel::schedule::{self, Messages, PipelineShape};
use crate::recipe::Pretrain;
use crate::rng::Random;
use crate::train::batch::{BatchShape, Samples, micro_batch};
use crate::train::exchanges::{Exchanges, Overlap};
use crate::train::executor::{self, Keep};
use crate::train::optimizer::{ShardedAdamW, Update};
use crate::train::state::TrainState;
use crate::train::{mean_loss, new_state};

/// What the steps of a run leave on one rank.
pub struct Trace {
    /// Before each step; the same on every rank.
    pub losses: Vec<f64>,
    /// Of each step; the same on every rank.
    pub grad_norms: Vec<f64>,
    /// After the first step's sum over replicas, before the clip.
    pub gradients: Parts,
    /// What layers compute with, after the last step.
    pub weights: Parts,
}

/// Tokens as a function of seed, sample and position: low ones often, so that gradients of the embedding meet.
struct Synthetic {
    noise: Random,
    vocab_size: usize,
}

impl Samples for Synthetic {
    fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        let first = index * out.len() as u64;
        for (i, token) in out.iter_mut().enumerate() {
            let drawn = self.noise.uniform(first + i as u64).powi(3) * self.vocab_size as f64;
            *token = (drawn as u32).min(self.vocab_size as u32 - 1);
        }
        Ok(())
    }
}

/// Makes `n_steps` steps of a recipe that [`super::layouts::plan`] has made, under the layout of `groups`. Errors: no memory; a loss
/// or a norm that is not finite (exit code 4). Collective.
pub fn run(recipe: &Pretrain, device: &dyn Device, groups: &Groups, n_steps: u64) -> Result<Trace> {
    let (layout, world) = (groups.layout, &*groups.world);
    let batch = BatchShape { seq_len: recipe.batch.seq_len, micro: recipe.batch.micro, global: recipe.batch.global, dp: layout.dp };
    let scratch = Scratch::new();
    let mut state = agree(world, new_state(device, recipe, groups))?;
    let blocks = (recipe.numerics.blocks(batch.global) / layout.dp).max(1);
    agree(world, state.prepare_sums(device, &recipe.numerics, blocks))?;
    state.initialise(device, &scratch, groups, recipe.train.seed);
    let ahead = recipe.parallel.overlap && !groups.pp.groups_are_in_order();
    let messages = if ahead { Messages::Ahead } else { Messages::Together };
    let shape = PipelineShape { pp: layout.pp, vp: layout.vp, n_micro: batch.n_micro() };
    let schedule = schedule::training(recipe.parallel.schedule, shape, messages)?;
    schedule.check().unwrap_or_else(|problem| panic!("the generated schedule is wrong: {problem}"));
    let sequence = if recipe.parallel.sequence_parallel { SequenceMode::Sharded } else { SequenceMode::Replicated };
    let numerics = Numerics::of(&recipe.numerics, device, batch.global, layout.dp)?;
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence, numerics };
    let mut exchanges = Exchanges::new(groups, if recipe.parallel.overlap { Overlap::WithComputation } else { Overlap::Nothing });
    let tokens = Synthetic { noise: Random::new(recipe.train.seed, "tokens of a proof"), vocab_size: recipe.model.vocab_size };
    let mut trace = Trace { losses: Vec::new(), grad_norms: Vec::new(), gradients: Parts::new(), weights: Parts::new() };
    for step in 1..=n_steps {
        let first = (step - 1) * batch.global as u64;
        let read = |micro: usize| -> Result<MicroBatch> {
            let (samples, weight) = (batch.samples(first, groups.at.dp, micro), 1.0 / batch.global_tokens() as f32);
            let read = micro_batch(device, &tokens, samples, batch.seq_len, weight)?;
            Ok(MicroBatch { first_sample: micro * batch.micro, ..read })
        };
        let batches = agree(world, (0..batch.n_micro()).map(read).collect::<Result<Vec<MicroBatch>>>())?;
        let TrainState { chunks, optimizer, .. } = &mut state;
        let mut during = exchanges.during(ctx, optimizer);
        let passed = executor::run(&schedule, chunks, &ctx, groups, (&batches, Keep::Saved), &mut during);
        exchanges.finish_gradients(chunks, optimizer);
        optimizer.reduce_tied(device, &scratch, chunks, groups);
        let loss = mean_loss(&passed.token_losses, groups, batch.global_tokens());
        let grad_norm = optimizer.grad_norm(device, chunks, groups);
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                let wrong = format!("the {what} of step {step} is {value}");
                return Err(Error::new(Kind::Numeric, wrong).remedy("use a smaller optimizer.lr: there is nothing to compare"));
            }
        }
        trace.losses.push(loss);
        trace.grad_norms.push(grad_norm);
        if step == 1 {
            trace.gradients = gradients(chunks, optimizer);
        }
        let grad_scale = (recipe.train.clip_grad_norm / (grad_norm + 1e-6)).min(1.0);
        let update = Update { step, lr: recipe.optimizer.lr, grad_scale };
        optimizer.update(device, &scratch, chunks, &mut exchanges, (&recipe.optimizer, update));
    }
    exchanges.finish_weights(&mut state.chunks);
    device.finish();
    for param in state.chunks.iter().flat_map(Chunk::params) {
        trace.weights.entry(param.spec.name.clone()).or_default().push(Part::of(&param.value, &param.slice));
    }
    Ok(trace)
}

/// This rank's rows of all gradients, summed over the replicas.
pub fn gradients(chunks: &[Chunk], optimizer: &ShardedAdamW) -> Parts {
    let mut parts = Parts::new();
    for (c, chunk) in chunks.iter().enumerate() {
        for (i, param) in chunk.params().into_iter().enumerate() {
            let slice = &optimizer.shards[c][i].slice;
            if slice.n_elements() > 0 {
                let part = Part::of(optimizer.reduced_gradient(chunks, c, i), slice);
                parts.entry(param.spec.name.clone()).or_default().push(part);
            }
        }
    }
    parts
}
