//! In which order sums are added, and in which numbers linear layers multiply: `[numerics]`. Absent, it is fast, in those that are
//! stored. What the orders are stands in `model::numerics`, what is rounded in `model::fp8`.

use super::{Pretrain, ScheduleKind};
use crate::error::{Error, Result};
use crate::parallel::pieces::TP_PIECES;
use serde::{Deserialize, Serialize};

/// The order of sums, and the numbers of products.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Numerics {
    /// Whether results depend on the layout.
    pub mode: Mode,
    /// With mode = "reproducible": the samples of a step are summed in this many blocks, or in the largest smaller power of two
    /// that divides them. dp divides it. Results depend on it; a rank keeps log2(batch_blocks / dp) more gradients.
    pub batch_blocks: usize,
    /// What the linear layers of the blocks multiply.
    #[serde(skip_serializing_if = "Linear::is_stored")]
    pub linear: Linear,
}

impl Default for Numerics {
    fn default() -> Self {
        Numerics { mode: Mode::Fast, batch_blocks: 8, linear: Linear::Stored }
    }
}

/// What the four linear layers of each block multiply, forward and backward.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Linear {
    /// Numbers of train.precision.
    Stored,
    /// E4M3, with a scale for each token and each channel, for outputs and for the gradients of inputs; gradients of weights are made as
    /// with `Stored`. Sizes on a rank are multiples of 16.
    Fp8,
    /// The same with one scale for each tensor: a weight, the inputs or gradients of a micro-batch; in reproducible numerics those of a
    /// sample.
    #[serde(rename = "fp8-tensor")]
    Fp8Tensor,
}

impl Linear {
    /// Absent in a recipe it is this.
    fn is_stored(&self) -> bool {
        *self == Linear::Stored
    }
}

/// Whether results depend on the layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The shortest path; loss, gradients and weights change in their last bits with tp, dp and micro. From equal weights, the loss,
    /// the gradient norm and each gradient of a step agree between layouts within `prove::tolerance::Tolerance::gradient` (relative;
    /// 1.9e-4 for the quick start's model in f32), which trireme-prove holds a layout to.
    Fast,
    /// Canonical sums: loss, gradients and weights are the same bits under every layout.
    Reproducible,
}

impl Numerics {
    /// Blocks of a step of so many samples: the largest power of two that divides them and is at most `batch_blocks`.
    pub fn blocks(&self, samples: usize) -> usize {
        let most = 1 << self.batch_blocks.max(1).ilog2();
        most.min(1 << samples.trailing_zeros().min(usize::BITS - 2))
    }
}

impl Pretrain {
    /// Whether canonical sums can be had under this layout, for steps of so many samples.
    pub(super) fn check_numerics(&self, dp: usize, samples: usize) -> Result<()> {
        let (numerics, tp) = (&self.numerics, self.parallel.tp);
        if !numerics.batch_blocks.is_power_of_two() {
            let wrong = format!("numerics.batch_blocks = {} is not a power of two", numerics.batch_blocks);
            let remedy = format!("set numerics.batch_blocks = {}", numerics.batch_blocks.next_power_of_two());
            return Err(Error::recipe(wrong).remedy(remedy));
        }
        if numerics.mode == Mode::Fast {
            return Ok(());
        }
        let fail = |wrong: String, remedy: String| {
            Err(Error::recipe(format!("numerics.mode = \"reproducible\": {wrong}"))
                .remedy(format!("{remedy}, or numerics.mode = \"fast\"")))
        };
        if TP_PIECES % tp != 0 {
            let wrong = format!("parallel.tp = {tp} does not divide the {TP_PIECES} pieces of each sum");
            return fail(wrong, "set parallel.tp to 1, 2, 4 or 8".into());
        }
        if self.parallel.schedule == ScheduleKind::GPipe {
            let wrong = "parallel.schedule = \"gpipe\" runs the backwards from the last micro-batch to the first".into();
            return fail(wrong, "set parallel.schedule = \"1f1b\"".into());
        }
        let blocks = numerics.blocks(samples);
        if blocks % dp != 0 {
            let wrong = format!("{dp} replicas do not divide the {blocks} blocks of {samples} samples");
            let remedy = if dp.is_power_of_two() && samples % dp == 0 {
                format!("set numerics.batch_blocks = {dp} (and keep it: results depend on it)")
            } else if dp.is_power_of_two() {
                format!("set batch.global to a multiple of {dp}")
            } else {
                format!("take {} or {} replicas", 1 << dp.ilog2(), dp.next_power_of_two())
            };
            return fail(wrong, remedy);
        }
        Ok(())
    }
}
