//! Recipes: one complete TOML file a run, `--set a.b=value` on top, unknown keys refused with the nearest known one.
//! Scientific numbers have no defaults; paths and cadence may. Relative paths are relative to the current directory.
//!
//! [`Pretrain::load`] reads and overrides (`load`, over the strict reader in `strict`); [`Pretrain::check`] compares the
//! numbers with each other and with the number of ranks (`check`). This file knows nothing of what the numbers are used for.

mod check;
mod load;
mod recompute;
mod strict;

use crate::model::config::ModelConfig;
pub use recompute::Recompute;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The recipe of `trireme-pretrain`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pretrain {
    /// The function.
    pub model: ModelConfig,
    /// How it is divided over ranks.
    pub parallel: Parallel,
    /// Samples a step.
    pub batch: Batch,
    /// Steps, precision, seed.
    pub train: Train,
    /// AdamW and its learning-rate schedule.
    pub optimizer: Optimizer,
    /// Token shards and their weights.
    pub data: Data,
    /// When to measure held-out loss.
    pub validation: Option<Validation>,
    /// When to save.
    #[serde(default)]
    pub checkpoint: Checkpoint,
}

/// Layout and schedule.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Data-parallel replicas; absent: world / (tp * pp).
    pub dp: Option<usize>,
    /// Chunks a stage.
    pub vp: usize,
    /// Order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// Whether activations between tensor-parallel regions are divided over tp.
    pub sequence_parallel: bool,
}

/// Pipeline schedules.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// All forwards, then all backwards (Huang et al. 2019).
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward (Narayanan et al. 2019).
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B over virtual stages (Narayanan et al. 2021).
    #[serde(rename = "interleaved")]
    Interleaved,
}

/// Samples a step. A sample is `seq_len` tokens (and one more for the last target).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Tokens a sample.
    pub seq_len: usize,
    /// Samples a micro-batch.
    pub micro: usize,
    /// Samples a step, over all replicas.
    pub global: usize,
}

/// The loop.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps.
    pub steps: u64,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Storage of weights and activations.
    pub precision: Precision,
    /// Largest global gradient norm.
    pub clip_grad_norm: f64,
}

/// Storage of weights and activations; accumulation and master weights are always f32.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
}

/// AdamW.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end.
    pub min_lr: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Shape of the decay after warm-up.
    pub decay: LrDecay,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
}

impl Optimizer {
    /// Learning rate of the update that takes the model from `step` to `step + 1` (the first is step 0) of `total_steps`.
    ///
    /// With n = step + 1, w = warmup_steps, r = (n - w) / (total_steps - w):
    /// n <= w: lr n / w; then constant: lr; linear: min_lr + (lr - min_lr) (1 - r);
    /// cosine: min_lr + (lr - min_lr) (1 + cos(pi r)) / 2; past the end: min_lr (constant: lr).
    ///
    /// These are Megatron-LM's formulas (OptimizerParamScheduler.get_lr with init_lr = 0) one update earlier: Megatron makes
    /// its first update with n = 0, so with a rate of 0; here the first update already moves and the last one, n =
    /// total_steps, is made with min_lr.
    pub fn lr_at(&self, step: u64, total_steps: u64) -> f64 {
        let n = step + 1;
        if n <= self.warmup_steps {
            return self.lr * n as f64 / self.warmup_steps as f64;
        }
        let past = (n - self.warmup_steps) as f64;
        let ratio = if n >= total_steps { 1.0 } else { past / (total_steps - self.warmup_steps) as f64 };
        let share = match self.decay {
            LrDecay::Constant => 1.0,
            LrDecay::Linear => 1.0 - ratio,
            LrDecay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * ratio).cos()),
        };
        self.min_lr + (self.lr - self.min_lr) * share
    }
}

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrDecay {
    /// Stays at the peak.
    Constant,
    /// Straight line to min_lr at the last step.
    Linear,
    /// Half a cosine to min_lr at the last step.
    Cosine,
}

/// Where the samples come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Token shard sets and their shares.
    pub train: Vec<Source>,
    /// Seed of the sample order.
    pub seed: u64,
}

/// One set of token shards in a blend.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Directory written by trireme-tokenize.
    pub shards: PathBuf,
    /// Share of samples, relative to the other sources.
    pub weight: f64,
}

/// Held-out loss.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Held-out token shards.
    pub shards: PathBuf,
    /// Steps between measurements.
    pub every_steps: u64,
    /// Samples of one measurement, taken from the front.
    pub samples: usize,
}

/// Saving.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between checkpoints (and one at the end).
    pub every_steps: u64,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every_steps: 1000 }
    }
}
