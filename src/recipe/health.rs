//! When a step's numbers are not to be trusted: the settings. What is done with them stands in `train::health`.

use serde::{Deserialize, Serialize};

/// Which steps are skipped, and when the run gives up. A loss or gradient norm that is not finite is always skipped.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Steps that loss statistics and the limit on skips look back on.
    pub window: usize,
    /// A loss this many standard deviations above the mean of the window is a spike; 0: never. Judged once half of the window
    /// has been seen in the phase.
    pub loss_z: f64,
    /// A gradient norm above this is a spike; absent: never.
    pub max_grad_norm: Option<f64>,
    /// The run ends with exit code 4 when more steps in a row would be skipped.
    pub max_skips_in_a_row: usize,
    /// The same for steps of the window.
    pub max_skips_in_window: usize,
}

impl Default for Health {
    /// Window and z are those of OLMo's skip-step optimizers; the limits are ours.
    fn default() -> Self {
        Health { window: 128, loss_z: 6.0, max_grad_norm: None, max_skips_in_a_row: 4, max_skips_in_window: 16 }
    }
}
