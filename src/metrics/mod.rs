//! The measurements of a run: one JSON line a step in an append-only file, read back whatever happened to the writer, and
//! drawn as a curve in the terminal (`terminal`) or as SVG (`svg`). This module knows nothing of what is measured.
//!
//! A line is a [`Row`] or `{"resumed_from": step}`: a run that was resumed from an older checkpoint says so, and the rows
//! after that step are superseded by what follows. The file survives a kill at any byte (`artifact::LineWriter`).

mod plot;
mod svg;
mod terminal;

pub use plot::{Curve, Plot};

use crate::artifact::{LineWriter, whole_lines};
use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// One optimizer step. A number that is not finite is written as null and read as NaN.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens seen since the run began.
    pub consumed_tokens: u64,
    /// Training loss of this step, nats a token.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    #[serde(deserialize_with = "number")]
    pub lr: f64,
    /// Duration of the step on the slowest rank.
    #[serde(deserialize_with = "number")]
    pub step_s: f64,
    /// Tokens a second, all ranks together.
    #[serde(deserialize_with = "number")]
    pub tokens_per_s: f64,
    /// Achieved floating-point operations of the model, 10^12 a second, all ranks together.
    #[serde(deserialize_with = "number")]
    pub tflops: f64,
    /// The same over the measured rate of plain matrix products on the same cores.
    #[serde(deserialize_with = "number")]
    pub share_of_gemm_ceiling: f64,
    /// Largest memory of a rank so far.
    pub memory_peak_bytes: u64,
    /// Held-out loss after this step, when it was measured, nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// The same in bits a byte of the held-out text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_bits_per_byte: Option<f64>,
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Option::<f64>::deserialize(deserializer).map(|value| value.unwrap_or(f64::NAN))
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resumed {
    resumed_from: u64,
}

/// Appends to the metrics of a run; one process of a job has it.
pub struct MetricsWriter {
    lines: LineWriter,
}

impl MetricsWriter {
    /// Opens or creates the file. A line that was cut off by a kill is removed.
    pub fn open(path: &Path) -> Result<MetricsWriter> {
        Ok(MetricsWriter { lines: LineWriter::open(path)? })
    }

    /// Appends a row with one write.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.write_line(&serde_json::to_string(row).expect("plain data"))
    }

    /// Says that the run goes on from `step`: rows after it are superseded by what follows.
    pub fn resumed_from(&mut self, step: u64) -> Result<()> {
        self.write_line(&serde_json::to_string(&Resumed { resumed_from: step }).expect("plain data"))
    }

    fn write_line(&mut self, line: &str) -> Result<()> {
        self.lines.append(line).map_err(|error| error.doing("writing the metrics"))
    }
}

/// The rows that count, by ascending step: of each step the last, without those that a resumption superseded. A cut-off last
/// line is left out. Errors: the file cannot be read, or a line is neither a row nor a resumption (with its number).
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).at(path)?;
    let mut rows: BTreeMap<u64, Row> = BTreeMap::new();
    for (number, line) in whole_lines(&bytes) {
        if let Ok(resumed) = serde_json::from_slice::<Resumed>(line) {
            rows.split_off(&(resumed.resumed_from + 1));
            continue;
        }
        let row: Row = serde_json::from_slice(line).map_err(|error| {
            let remedy = "the file was damaged: correct or remove that line";
            Error::file(path, format!("line {number} is not a row of metrics: {error}")).remedy(remedy)
        })?;
        rows.insert(row.step, row);
    }
    Ok(rows.into_values().collect())
}

/// The loss curves of a run: training and, where measured, held-out.
pub fn loss_plot(title: &str, rows: &[Row]) -> Plot {
    let training = rows.iter().map(|row| (row.step as f64, row.loss)).collect();
    let held_out: Vec<(f64, f64)> = rows.iter().filter_map(|row| Some((row.step as f64, row.validation_loss?))).collect();
    let mut curves = vec![Curve { name: "training".into(), points: training }];
    if !held_out.is_empty() {
        curves.push(Curve { name: "held-out".into(), points: held_out });
    }
    Plot { title: title.into(), x_label: "step".into(), y_label: "loss, nats a token".into(), curves }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    fn row(step: u64, loss: f64) -> Row {
        let validation_loss = (step % 5 == 0).then_some(loss + 0.1);
        Row {
            step,
            consumed_tokens: step * 1000,
            loss,
            grad_norm: 1.5,
            lr: 1e-3,
            step_s: 0.1,
            tokens_per_s: 1e4,
            tflops: 0.05,
            share_of_gemm_ceiling: 0.5,
            memory_peak_bytes: 1 << 20,
            validation_loss,
            validation_bits_per_byte: validation_loss.map(|loss| loss / 3.0),
        }
    }

    /// What was written is read, to the last bit of each number; rows after a resumption's step are replaced by the later ones.
    #[test]
    fn rows_survive_and_resumptions_supersede() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).expect("new");
        (1..=10).for_each(|step| writer.append(&row(step, 1.0 / 3.0 + step as f64)).expect("writable"));
        drop(writer);
        let mut writer = MetricsWriter::open(&path).expect("old");
        writer.resumed_from(7).expect("writable");
        writer.append(&row(8, 0.1)).expect("writable");
        let expected: Vec<Row> = (1..=7).map(|step| row(step, 1.0 / 3.0 + step as f64)).chain([row(8, 0.1)]).collect();
        assert_eq!(read(&path).expect("readable"), expected);
        assert_eq!(std::fs::read_to_string(&path).expect("text").lines().count(), 12, "append-only");
    }

    /// Cut off at every byte, the file reads as the whole lines before the cut, and the next writer goes on cleanly.
    #[test]
    fn a_kill_at_any_byte_costs_at_most_the_last_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).expect("new");
        (1..=3).for_each(|step| writer.append(&row(step, step as f64)).expect("writable"));
        let whole = std::fs::read(&path).expect("readable");
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).expect("writable");
            let n = whole[..cut].iter().filter(|&&byte| byte == b'\n').count() as u64;
            let expected: Vec<Row> = (1..=n).map(|step| row(step, step as f64)).collect();
            assert_eq!(read(&path).expect("readable"), expected, "cut at {cut}");
            MetricsWriter::open(&path).expect("old").append(&row(9, 9.0)).expect("writable");
            let rows = read(&path).expect("readable");
            assert_eq!(rows.len() as u64, n + 1, "cut at {cut}");
            assert_eq!(rows.last(), Some(&row(9, 9.0)));
        }
    }

    /// A last line longer than the block that is read backwards is found too.
    #[test]
    fn long_cut_off_lines_are_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        MetricsWriter::open(&path).expect("new").append(&row(1, 1.0)).expect("writable");
        File::options().append(true).open(&path).expect("old").write_all(&vec![b'x'; 10_000]).expect("writable");
        drop(MetricsWriter::open(&path).expect("old"));
        assert_eq!(read(&path).expect("readable"), [row(1, 1.0)]);
        assert_eq!(std::fs::read(&path).expect("readable").last(), Some(&b'\n'));
    }

    /// A diverged step is kept as null and read as NaN; a line that is something else is an error with its number.
    #[test]
    fn odd_lines() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).expect("new");
        writer.append(&row(1, f64::NAN)).expect("writable");
        assert!(read(&path).expect("readable")[0].loss.is_nan());
        std::fs::write(&path, "\n{\"step\": 3}\n").expect("writable");
        let error = read(&path).expect_err("no row");
        assert!(error.to_string().contains("line 2 is not a row of metrics: missing field"), "{error}");
        assert_eq!(error.exit_code(), 3);
    }
}
