//! The measurements of a run: one JSON line a step in an append-only file, read back whatever happened to the writer, and
//! drawn as a curve in the terminal (`terminal`) or as SVG (`svg`); beside it the same numbers as TensorBoard events (`events`).
//! This module knows nothing of what is measured.
//!
//! A line is a [`Row`] or `{"job": ..}`, a [`Job`]: a job says from which step it goes on, and the rows after that step are
//! superseded by what follows. Both files survive a kill at any byte.

mod events;
mod follow;
mod goodput;
mod plot;
mod prometheus;
mod svg;
mod terminal;
mod time;

pub use events::FILE_NAME as EVENTS_FILE;
pub use follow::{Follower, Metrics, read, read_all};
pub use goodput::Goodput;
pub use plot::{Curve, Plot};
pub use time::{Exposed, TimeUse};

use crate::artifact::LineWriter;
use crate::error::Result;
use events::EventWriter;
use prometheus::PrometheusFile;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

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
    /// The same over the measured rate of plain matrix products on the same cores (or GPUs).
    #[serde(deserialize_with = "number")]
    pub share_of_gemm_ceiling: f64,
    /// The same over the rate that the maker of the GPUs states: model flops utilization. None on CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Largest memory of a rank so far.
    pub memory_peak_bytes: u64,
    /// Held-out loss after this step, when it was measured, nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// The same in bits a byte of the held-out text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_bits_per_byte: Option<f64>,
    /// Where the time went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<TimeUse>,
    /// When the row was written, seconds since 1970.
    #[serde(default)]
    pub unix_s: f64,
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Option::<f64>::deserialize(deserializer).map(|value| value.unwrap_or(f64::NAN))
}

/// A job of the run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Steps done when it began: later rows that stand before it are superseded.
    pub from_step: u64,
    /// Its ranks.
    pub ranks: usize,
    /// When it began, seconds since 1970.
    pub unix_s: f64,
    /// When its time is up, seconds since 1970, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_unix_s: Option<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobLine {
    job: Job,
}

/// Seconds since 1970.
pub fn now_unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Appends to the metrics of a run and to its TensorBoard events; one process of a job has it.
pub struct MetricsWriter {
    lines: LineWriter,
    events: EventWriter,
    prometheus: Option<PrometheusFile>,
}

impl MetricsWriter {
    /// Opens or creates the file, and [`EVENTS_FILE`] beside it. What was cut off by a kill is removed.
    pub fn open(path: &Path) -> Result<MetricsWriter> {
        let events = EventWriter::open(&path.with_file_name(EVENTS_FILE), now_unix_s())?;
        Ok(MetricsWriter { lines: LineWriter::open(path)?, events, prometheus: None })
    }

    /// Writes the newest row to this file too, for Prometheus, labelled with the run.
    pub fn expose(&mut self, path: &Path, run: &Path) {
        self.prometheus = Some(PrometheusFile::new(path, run));
    }

    /// Appends a row, one write to each file.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.write_line(&serde_json::to_string(row).expect("plain data"))?;
        if let Some(file) = &mut self.prometheus {
            file.write(row);
        }
        self.events.append(row.step, row.unix_s, &scalars(row))
    }

    /// Says that a job begins.
    pub fn job(&mut self, job: Job) -> Result<()> {
        self.events.begins_at(job.from_step + 1, job.unix_s)?;
        self.write_line(&serde_json::to_string(&JobLine { job }).expect("plain data"))
    }

    fn write_line(&mut self, line: &str) -> Result<()> {
        self.lines.append_object(line).map_err(|error| error.doing("writing the metrics"))
    }
}

/// What TensorBoard and Prometheus show of a row: (tag, value).
fn scalars(row: &Row) -> Vec<(&'static str, f64)> {
    let mut all = vec![
        ("loss/training", row.loss),
        ("optimizer/gradient_norm", row.grad_norm),
        ("optimizer/learning_rate", row.lr),
        ("speed/step_s", row.step_s),
        ("speed/tokens_per_s", row.tokens_per_s),
        ("speed/tflops", row.tflops),
        ("speed/share_of_gemm_ceiling", row.share_of_gemm_ceiling),
        ("memory/peak_bytes", row.memory_peak_bytes as f64),
    ];
    let optional = [
        ("speed/mfu", row.mfu),
        ("loss/held_out", row.validation_loss),
        ("loss/held_out_bits_per_byte", row.validation_bits_per_byte),
        ("time/bubble_share", row.time.and_then(|time| time.bubble_share)),
    ];
    all.extend(optional.into_iter().filter_map(|(tag, value)| Some((tag, value?))));
    if let Some(time) = &row.time {
        all.extend(time.tagged());
    }
    all
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
    use crate::artifact::sealed_line;
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
            mfu: None,
            memory_peak_bytes: 1 << 20,
            validation_loss,
            validation_bits_per_byte: validation_loss.map(|loss| loss / 3.0),
            time: (step % 2 == 0).then(|| TimeUse { forward: 0.03, bubble_share: Some(0.2), ..TimeUse::default() }),
            unix_s: 1e9 + step as f64,
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
        writer.job(Job { from_step: 7, ranks: 2, unix_s: 1e9, deadline_unix_s: None }).expect("writable");
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

    /// Read as it grows, in steps that end anywhere in a line, the file gives what it gives read whole, goodput included.
    #[test]
    fn following_sees_what_reading_sees() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).expect("new");
        let job = |from_step: u64, unix_s: f64| Job { from_step, ranks: 2, unix_s, deadline_unix_s: Some(2e9) };
        writer.job(job(0, 1e9)).expect("writable");
        (1..=6).for_each(|step| writer.append(&row(step, step as f64)).expect("writable"));
        writer.job(job(4, 1e9 + 60.0)).expect("writable");
        (5..=8).for_each(|step| writer.append(&Row { unix_s: 1e9 + 60.0 + step as f64, ..row(step, 0.5) }).expect("writable"));
        let (whole, all) = (std::fs::read(&path).expect("readable"), read_all(&path).expect("readable"));
        assert_eq!((all.rows.len(), all.goodput.map(|goodput| goodput.n_jobs)), (8, Some(2)));
        let growing = dir.path().join("growing.jsonl");
        for stride in [11, 333, 5000] {
            let mut follower = Follower::new(&growing);
            for end in (0..whole.len()).step_by(stride).chain([whole.len()]) {
                std::fs::write(&growing, &whole[..end]).expect("writable");
                follower.update().expect("readable");
            }
            assert_eq!(follower.seen(), &all, "in steps of {stride} bytes");
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
        for (line, said) in
            [(sealed_line("{\"step\": 3}"), "line 2 is not a row of metrics: missing field"), ("{}".into(), "line 2 ends in")]
        {
            std::fs::write(&path, format!("\n{line}\n")).expect("writable");
            let error = read(&path).expect_err("no row");
            assert!(error.to_string().contains(said) && error.exit_code() == 3, "{error}");
        }
    }
}
