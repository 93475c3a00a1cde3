//! Where the time of a step went, as it stands in a row of metrics.

use serde::{Deserialize, Serialize};

/// Seconds, mean over ranks. The first seven and `exposed` add up to the mean duration of the step; what lies around it is
/// not part of `step_s`. On a GPU these are the host's: work that the device still does counts where the host waits for it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct TimeUse {
    /// Reading the samples.
    pub data: f64,
    /// Forward through the chunks, without communication.
    pub forward: f64,
    /// Backward through the chunks, without communication.
    pub backward: f64,
    /// Reducing gradients, without communication: adding what arrived.
    pub reduce: f64,
    /// Gradient norm and update, without communication.
    pub optimizer: f64,
    /// The update waiting for the save under way, whose disk is slower.
    #[serde(default)]
    pub wait_save: f64,
    /// Anything else within the step.
    pub other: f64,
    /// Blocked in communication.
    pub exposed: Exposed,
    /// Held-out loss after this step.
    pub held_out: f64,
    /// The save before this step, as far as training waited for it.
    pub save: f64,
    /// Comparing replicas before this step.
    pub compare: f64,
    /// 1 - (forward + backward + reduce, with their own communication) / the longest pass over the pipeline: the share of the
    /// pass that a stage waits for other stages. None with one stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bubble_share: Option<f64>,
}

/// Seconds blocked in communication, by the ranks it goes over.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Exposed {
    /// All ranks.
    pub world: f64,
    /// Tensor-parallel groups.
    pub tp: f64,
    /// Data-parallel groups.
    pub dp: f64,
    /// Pipelines: messages and the bubble.
    pub pp: f64,
}

impl TimeUse {
    /// The parts of a step as people read them: (name, seconds).
    pub fn of_step(&self) -> [(&'static str, f64); 11] {
        [
            ("data", self.data),
            ("forward", self.forward),
            ("backward", self.backward),
            ("reduce", self.reduce),
            ("optimizer", self.optimizer),
            ("wait save", self.wait_save),
            ("wait tp", self.exposed.tp),
            ("wait pp", self.exposed.pp),
            ("wait dp", self.exposed.dp),
            ("wait world", self.exposed.world),
            ("other", self.other),
        ]
    }

    /// Everything as TensorBoard calls it.
    pub(super) fn tagged(&self) -> [(&'static str, f64); 13] {
        [
            ("time/data_s", self.data),
            ("time/forward_s", self.forward),
            ("time/backward_s", self.backward),
            ("time/reduce_s", self.reduce),
            ("time/optimizer_s", self.optimizer),
            ("time/other_s", self.other),
            ("time/exposed_world_s", self.exposed.world),
            ("time/exposed_tp_s", self.exposed.tp),
            ("time/exposed_dp_s", self.exposed.dp),
            ("time/exposed_pp_s", self.exposed.pp),
            ("time/held_out_s", self.held_out),
            ("time/save_s", self.save),
            ("time/compare_s", self.compare),
        ]
    }

    /// What lies between steps: (name, seconds).
    pub fn around_step(&self) -> [(&'static str, f64); 3] {
        [("held-out", self.held_out), ("save", self.save), ("compare", self.compare)]
    }
}
