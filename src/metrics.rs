//! Metrics of a run: one JSON line a step, appended by one write, so a killed job loses at most the line it was writing.

use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One optimizer step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Steps done, from 1.
    pub step: u64,
    /// Tokens consumed so far.
    pub consumed_tokens: u64,
    /// Mean loss of the step's tokens, nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Wall-clock seconds.
    pub step_s: f64,
    /// Tokens per second over all ranks.
    pub tokens_per_s: f64,
    /// Model TFLOP/s over all ranks (`ModelConfig::train_flops`).
    pub tflops: f64,
    /// The same over the GEMM rate measured at the start.
    pub share_of_gemm_ceiling: f64,
    /// Most device memory on any rank so far.
    pub memory_peak_bytes: u64,
    /// Mean held-out loss, nats, when it was measured after this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// The same in bits a byte of text, when the shards know their bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_bits_per_byte: Option<f64>,
}

/// Appends rows to a file.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens the file for appending; makes it when there is none.
    pub fn open(path: &Path) -> Result<MetricsWriter> {
        let file = File::options().create(true).append(true).open(path).at(path)?;
        Ok(MetricsWriter { path: path.into(), file })
    }

    /// Appends one row.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.line(&serde_json::to_value(row).expect("plain data"))
    }

    /// Notes that the run goes on from `step`: rows past it are superseded.
    pub fn resumed_from(&mut self, step: u64) -> Result<()> {
        self.line(&serde_json::json!({ "resumed_from": step }))
    }

    fn line(&mut self, value: &serde_json::Value) -> Result<()> {
        self.file.write_all(format!("{value}\n").as_bytes()).at(&self.path)
    }
}

/// All rows that count, by step. A last line that was cut off by a kill is ignored.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).at(path)?;
    let mut rows: BTreeMap<u64, Row> = BTreeMap::new();
    let n_lines = text.lines().count();
    for (number, line) in text.lines().enumerate() {
        let value: serde_json::Value = match serde_json::from_str(line) {
            Ok(value) => value,
            Err(_) if number + 1 == n_lines => break,
            Err(error) => return Err(Error::file(path, format!("line {}: {error}", number + 1)).remedy("remove the line")),
        };
        if let Some(step) = value.get("resumed_from").and_then(serde_json::Value::as_u64) {
            rows.retain(|&old, _| old <= step);
            continue;
        }
        let row: Row = serde_json::from_value(value)
            .map_err(|error| Error::file(path, format!("line {}: {error}", number + 1)).remedy("remove the line"))?;
        rows.insert(row.step, row);
    }
    Ok(rows.into_values().collect())
}
