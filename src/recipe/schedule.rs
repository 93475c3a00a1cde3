//! The learning rate as a function of the samples consumed: warm-up, then one of five shapes. In samples, so that it does not
//! move when the batch size does (Nemotron-4 340B report, section 2.1: 768, 1536, 2304 sequences a step).
//!
//! The formulas are those of Megatron-LM's OptimizerParamScheduler.get_lr with init_lr = 0, one update earlier: Megatron makes
//! its first update with n = 0, so with a rate of 0; here n counts the samples of the update that is being made, so the first
//! update already moves and the last one is made with the rate of the end. This file knows nothing of batches.

use super::Optimizer;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrDecay {
    /// Stays at the peak.
    Constant,
    /// Straight line to min_lr at the last sample.
    Linear,
    /// Half a cosine to min_lr at the last sample.
    Cosine,
    /// lr sqrt(warmup_samples / n), never below min_lr (Vaswani et al. 2017).
    InverseSqrt,
    /// Warm-up, stable, decay (Hu et al. 2024): the peak until the last samples, which decay to min_lr.
    Wsd(Wsd),
}

/// The decay that ends a warm-up, stable, decay schedule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wsd {
    /// Samples of the decay, the last ones of the phase.
    pub samples: u64,
    /// How it falls.
    pub shape: DecayShape,
}

/// How the decay of a WSD schedule falls from 1 to 0 while r goes from 0 to 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// 1 - r
    Linear,
    /// (1 + cos(pi r)) / 2
    Cosine,
    /// 2 * 0.5^r - 1
    Exponential,
    /// 1 - sqrt(r) (Haegele et al. 2024)
    MinusSqrt,
}

impl DecayShape {
    fn share(self, r: f64) -> f64 {
        match self {
            DecayShape::Linear => 1.0 - r,
            DecayShape::Cosine => 0.5 * (1.0 + (PI * r).cos()),
            DecayShape::Exponential => 2.0 * 0.5f64.powf(r) - 1.0,
            DecayShape::MinusSqrt => 1.0 - r.sqrt(),
        }
    }
}

/// The learning rate over one phase of training.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LrSchedule {
    /// Peak.
    pub lr: f64,
    /// At the end.
    pub min_lr: f64,
    /// Samples of linear warm-up.
    pub warmup_samples: u64,
    /// Shape after warm-up.
    pub decay: LrDecay,
    /// Samples of the phase.
    pub samples: u64,
}

impl LrSchedule {
    /// The rate of the update after which the phase has consumed `n` samples (its own batch included).
    ///
    /// With w = warmup_samples, N = samples, r = (n - w) / (N - w):
    /// n <= w: lr n / w; then constant: lr; inverse square root: max(min_lr, lr sqrt(w / n)); the others
    /// min_lr + (lr - min_lr) s with s of linear: 1 - r; cosine: (1 + cos(pi r)) / 2; WSD: 1 until N - D samples, then
    /// shape((n - (N - D)) / D). Past the end as at the end, for a last batch that is only partly within.
    pub fn at(&self, n: u64) -> f64 {
        let (warmup, total) = (self.warmup_samples, self.samples);
        if n <= warmup {
            return self.lr * n as f64 / warmup as f64;
        }
        let n = n.min(total);
        let ratio = |from: u64, to: u64| if n >= to { 1.0 } else { (n - from) as f64 / (to - from) as f64 };
        let share = match self.decay {
            LrDecay::Constant => 1.0,
            LrDecay::InverseSqrt => return self.min_lr.max(self.lr * (warmup as f64 / n as f64).sqrt()),
            LrDecay::Linear => DecayShape::Linear.share(ratio(warmup, total)),
            LrDecay::Cosine => DecayShape::Cosine.share(ratio(warmup, total)),
            LrDecay::Wsd(wsd) => {
                let stable_end = total.saturating_sub(wsd.samples);
                if n <= stable_end { 1.0 } else { wsd.shape.share(ratio(stable_end, total)) }
            }
        };
        self.min_lr + (self.lr - self.min_lr) * share
    }
}

impl Optimizer {
    /// The learning rate over a main phase of `samples`.
    pub fn schedule(&self, samples: u64) -> LrSchedule {
        LrSchedule { lr: self.lr, min_lr: self.min_lr, warmup_samples: self.warmup_samples, decay: self.decay, samples }
    }
}
