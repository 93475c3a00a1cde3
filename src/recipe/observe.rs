//! What a run records of itself, and when it takes itself to hang. Cadence and mechanics: nothing here changes a number of the
//! training.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Recording and watching.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Observe {
    /// Seconds that a rank may be blocked in one communication before the job is ended with a report; 0: for ever.
    pub hang_after_s: f64,
    /// The same while others start, load or save.
    pub hang_in_files_after_s: f64,
    /// Records (of 128 bytes) in the flight ledger of each rank.
    pub flight_records: u64,
    /// Steps between comparisons of what the replicas hold; 0: never.
    pub compare_every_steps: u64,
    /// A file `NAME.prom` with the newest numbers for the textfile collector of Prometheus' node_exporter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<PathBuf>,
}

impl Default for Observe {
    fn default() -> Self {
        Observe { hang_after_s: 600.0, hang_in_files_after_s: 3600.0, flight_records: 8192, compare_every_steps: 100, prometheus: None }
    }
}

impl Observe {
    /// Errors: a number that cannot be.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [("hang_after_s", self.hang_after_s), ("hang_in_files_after_s", self.hang_in_files_after_s)] {
            if !(0.0..=1e9).contains(&value) {
                return Err(Error::recipe(format!("observe.{key} = {value}")).remedy("give seconds, or 0 for never"));
            }
        }
        if let Some(path) = &self.prometheus
            && path.extension().is_none_or(|extension| extension != "prom")
        {
            let wrong = format!("observe.prometheus = \"{}\": the collector reads files named *.prom", path.display());
            return Err(Error::recipe(wrong).remedy("name it so, in the collector's directory"));
        }
        // A step of the largest runs has some thousands.
        if !(64..=1 << 24).contains(&self.flight_records) {
            let wrong = format!("observe.flight_records = {}", self.flight_records);
            return Err(Error::recipe(wrong).remedy(format!("give a number from 64 to {}", 1 << 24)));
        }
        Ok(())
    }
}
