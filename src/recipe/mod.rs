//! Recipes: one complete TOML file a run, `--set a.b=value` on top, unknown keys refused with the nearest known one.
//! Scientific numbers have no defaults; paths and cadence may. Relative paths are relative to the current directory.
//!
//! [`Pretrain::load`] reads and overrides (`load`, over the strict reader in `strict`); [`Pretrain::check`] compares the
//! numbers with each other and with the number of ranks (`check`). Lengths are in samples: `schedule` has the learning rate as
//! their function, `phases` the steps. This file knows nothing of what the numbers are used for.

mod check;
mod health;
mod load;
mod numerics;
mod observe;
mod phases;
mod recompute;
mod schedule;
mod stages;
mod strict;

pub use health::Health;
pub use numerics::{Linear, Mode, Numerics};
pub use observe::Observe;
pub use phases::{Moments, Phase, PhaseView, PlannedStep, RampStage, Start, StepPlan, Stretch};
pub use recompute::{Recompute, RecomputePlan, RecomputeRange};
pub use schedule::{DecayShape, LrDecay, LrSchedule, Wsd};
pub use stages::{EndWeights, Layers};
pub(crate) use strict::nearest as nearest_key;

use crate::model::config::ModelConfig;
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
    /// Length, precision, seed.
    pub train: Train,
    /// In which order sums are added.
    #[serde(default)]
    pub numerics: Numerics,
    /// AdamW and its learning-rate schedule.
    pub optimizer: Optimizer,
    /// Token shards and their weights.
    pub data: Data,
    /// When to measure held-out loss.
    pub validation: Option<Validation>,
    /// When to save.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Which steps to skip, and when to give up.
    #[serde(default)]
    pub health: Health,
    /// What to record, when to take the job to hang.
    #[serde(default)]
    pub observe: Observe,
    /// The checkpoint to begin with, instead of new weights.
    pub start: Option<Start>,
    /// What follows the main phase.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phase: Vec<Phase>,
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
    /// Whether stages and replicas exchange while they compute; false waits for each exchange at once, with the same bits.
    #[serde(default = "yes")]
    pub overlap: bool,
    /// Layers of each chunk; absent: the same number.
    pub layers: Option<Layers>,
}

fn yes() -> bool {
    true
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
    /// 1F1B with backwards in halves, weight gradients where stages would wait (Qi et al. 2023: ZB-H1).
    #[serde(rename = "zb-h1")]
    ZeroBubbleH1,
}

impl ScheduleKind {
    /// As recipes write it.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::GPipe => "gpipe",
            ScheduleKind::OneFOneB => "1f1b",
            ScheduleKind::Interleaved => "interleaved",
            ScheduleKind::ZeroBubbleH1 => "zb-h1",
        }
    }
}

/// Samples a step. A sample is `seq_len` tokens (and one more for the last target).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Tokens a sample.
    pub seq_len: usize,
    /// Samples a micro-batch.
    pub micro: usize,
    /// Samples a step, over all replicas; with a ramp, after its last stage.
    pub global: usize,
    /// Batch sizes before that, by ascending sample.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ramp: Vec<RampStage>,
}

/// The loop.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Samples of the main phase. It ends with the step that reaches them.
    pub samples: u64,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Storage of weights and activations.
    pub precision: Precision,
    /// Largest global gradient norm.
    pub clip_grad_norm: f64,
    /// What the backward makes again instead of keeping it; the same bits, less memory, more work.
    #[serde(default)]
    pub recompute: RecomputePlan,
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
    /// Samples of linear warm-up.
    pub warmup_samples: u64,
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
    /// So many of the newest stay; absent: all.
    pub keep_last: Option<usize>,
    /// With keep_last: of the older ones those whose step is a multiple of this stay too.
    pub keep_every: Option<u64>,
    /// MiB of a rank for copies of what the optimizer changes before it is on the disk; at least its largest piece of a tensor.
    pub copy_mib: u64,
    /// Seconds that are left of the job's time when a run has saved and leaves.
    pub margin_s: f64,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every_steps: 1000, keep_last: None, keep_every: None, copy_mib: 0, margin_s: 30.0 }
    }
}
