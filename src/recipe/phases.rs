//! What a run is made of, one phase after the other: the main phase ([train], [optimizer], [data]) and those that `[[phase]]`
//! adds, each with data and a learning rate of its own; and the step plan, which says for every sample which step of which phase
//! consumes it. All of it is a pure function of the recipe, so a run goes on exactly from the number of samples consumed.
//!
//! Continued training in phases: Nemotron-4 340B report, section 2.3 (a majority distribution, then a small final one).

use super::{Batch, Data, LrDecay, LrSchedule, Pretrain};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A phase after the main one.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// What logs and ledgers call it.
    pub name: String,
    /// Its samples. It ends with the step that reaches them.
    pub samples: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at its end.
    pub min_lr: f64,
    /// Samples of linear warm-up; 0 begins at the peak.
    pub warmup_samples: u64,
    /// Shape of the decay after warm-up.
    pub decay: LrDecay,
    /// Its blend, in an order of its own.
    pub data: Data,
}

/// Where the weights of a run come from, instead of from a seed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// A checkpoint, or a run (its newest checkpoint).
    pub checkpoint: PathBuf,
    /// What becomes of Adam's moments.
    pub moments: Moments,
}

/// What a run that starts from a checkpoint does with Adam's moments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Goes on with them, and with the count of updates that corrects their bias.
    Keep,
    /// Begins with none, as at step 0.
    Reset,
}

/// A batch size of the ramp.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RampStage {
    /// Steps that begin before this sample of the run have this batch.
    pub until_sample: u64,
    /// Samples a step, over all replicas.
    pub global: usize,
}

/// One phase as the trainer sees it.
#[derive(Clone, Copy, Debug)]
pub struct PhaseView<'a> {
    /// "main", or the name of a `[[phase]]`.
    pub name: &'a str,
    /// Its learning rate, and its samples.
    pub lr: LrSchedule,
    /// Its blend.
    pub data: &'a Data,
}

/// The name of the first phase.
const MAIN_PHASE: &str = "main";

impl Pretrain {
    /// All phases in order, the main one first.
    pub fn phases(&self) -> Vec<PhaseView<'_>> {
        let main = PhaseView { name: MAIN_PHASE, lr: self.optimizer.schedule(self.train.samples), data: &self.data };
        let added = self.phase.iter().map(|phase| {
            let &Phase { samples, lr, min_lr, warmup_samples, decay, .. } = phase;
            PhaseView { name: &phase.name, lr: LrSchedule { lr, min_lr, warmup_samples, decay, samples }, data: &phase.data }
        });
        std::iter::once(main).chain(added).collect()
    }

    /// Which samples each step takes.
    pub fn plan(&self) -> StepPlan {
        let samples: Vec<u64> = self.phases().iter().map(|phase| phase.lr.samples).collect();
        StepPlan::new(&self.batch, &samples)
    }
}

/// Consecutive steps of one phase with one batch size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// Index of the phase.
    pub phase: usize,
    /// Steps before it.
    pub first_step: u64,
    /// Samples before it, of the whole run.
    pub first_sample: u64,
    /// Its steps, at least one.
    pub n_steps: u64,
    /// Samples a step.
    pub global: usize,
}

impl Stretch {
    fn end_sample(&self) -> u64 {
        self.first_sample + self.n_steps * self.global as u64
    }
}

/// What one step consumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedStep {
    /// Index of the phase.
    pub phase: usize,
    /// Samples consumed before it, of the whole run.
    pub first_sample: u64,
    /// The same of its phase: where it reads in the phase's order.
    pub first_in_phase: u64,
    /// Samples it takes.
    pub global: usize,
}

/// The steps of a run. A step takes the batch size of the sample it begins at and lies in one phase; a phase ends with the step
/// that reaches its last sample. So both the step and its batch are functions of the samples consumed, at any layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepPlan {
    stretches: Vec<Stretch>,
    /// Where each phase begins, in samples of the run.
    phase_starts: Vec<u64>,
}

impl StepPlan {
    /// The plan of phases of so many samples. Ramp stages ascend, as `Pretrain::check` requires.
    pub fn new(batch: &Batch, phase_samples: &[u64]) -> StepPlan {
        let (mut stretches, mut phase_starts) = (Vec::new(), Vec::new());
        let (mut step, mut sample) = (0u64, 0u64);
        for (phase, &n_samples) in phase_samples.iter().enumerate() {
            phase_starts.push(sample);
            let phase_end = sample.saturating_add(n_samples);
            while sample < phase_end {
                let stage = batch.ramp.iter().find(|stage| sample < stage.until_sample);
                let (end, global) = stage.map_or((phase_end, batch.global), |stage| (stage.until_sample.min(phase_end), stage.global));
                let stretch =
                    Stretch { phase, first_step: step, first_sample: sample, n_steps: (end - sample).div_ceil(global as u64), global };
                (step, sample) = (step + stretch.n_steps, stretch.end_sample());
                stretches.push(stretch);
            }
        }
        StepPlan { stretches, phase_starts }
    }

    /// Steps of the run.
    pub fn n_steps(&self) -> u64 {
        self.stretches.last().map_or(0, |last| last.first_step + last.n_steps)
    }

    /// Samples of the run: those asked for, up to the end of each phase's last step.
    pub fn n_samples(&self) -> u64 {
        self.stretches.last().map_or(0, Stretch::end_sample)
    }

    /// Consecutive steps of equal batch and phase, in order.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// What the step after `step` steps consumes.
    ///
    /// # Panics
    /// When the run has no step after those.
    pub fn step(&self, step: u64) -> PlannedStep {
        let after = self.stretches.partition_point(|stretch| stretch.first_step <= step);
        let stretch = &self.stretches[after - 1];
        assert!(step < stretch.first_step + stretch.n_steps, "step {step} of {}", self.n_steps());
        let first_sample = stretch.first_sample + (step - stretch.first_step) * stretch.global as u64;
        let first_in_phase = first_sample - self.phase_starts[stretch.phase];
        PlannedStep { phase: stretch.phase, first_sample, first_in_phase, global: stretch.global }
    }

    /// How many steps consume exactly `sample` samples; None when no step ends there.
    pub fn steps_before(&self, sample: u64) -> Option<u64> {
        let after = self.stretches.partition_point(|stretch| stretch.first_sample <= sample);
        let stretch = &self.stretches[after.checked_sub(1)?];
        let within = sample - stretch.first_sample;
        let (steps, rest) = (within / stretch.global as u64, within % stretch.global as u64);
        (rest == 0 && steps <= stretch.n_steps).then_some(stretch.first_step + steps)
    }
}
