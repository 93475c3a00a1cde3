//! The token ledger: which samples each step consumed, and whether it trained on them, over restarts, changes of the number of
//! ranks, and skipped steps. An append-only file of JSON lines in the run directory, written by rank 0.
//!
//! ```text
//! {"job":{"from_step":0,"ranks":8,"phases":[{"name":"main","order":"1b2c.."}]}}       a job began or went on from that step
//! {"step":1,"phase":0,"first":0,"n":768}                                              samples first..first + n of the phase's order
//! {"step":2,"phase":0,"first":768,"n":768,"skipped":"loss NaN, gradient norm NaN"}    consumed, but weights left as they were
//! ```
//!
//! The order of samples is a pure function, so ranges and the order's fingerprint say which documents they were
//! (`data::order`). A job that goes on from a step supersedes what was written of later steps: those updates were lost with the
//! job that made them. Lines are on the disk before a checkpoint of their step is. This file knows nothing of tokens.

use crate::artifact::{LineWriter, whole_lines};
use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A job of the run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Steps done when it began.
    pub from_step: u64,
    /// Its ranks.
    pub ranks: usize,
    /// The phases of its recipe.
    pub phases: Vec<PhaseOrder>,
}

/// The data of a phase.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseOrder {
    /// Its name.
    pub name: String,
    /// Fingerprint of its order.
    pub order: String,
}

/// What one step consumed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Number of the step, from 1.
    pub step: u64,
    /// Index of its phase.
    pub phase: usize,
    /// First sample, in the phase's order.
    pub first: u64,
    /// Number of samples.
    pub n: u64,
    /// Why its update was not made; None: it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Job { job: Job },
    Step(Step),
}

/// Appends to the ledger; rank 0 has it.
pub struct LedgerWriter {
    lines: LineWriter,
}

impl LedgerWriter {
    /// Opens or creates the file. A line that was cut off by a kill is removed.
    pub fn open(path: &Path) -> Result<LedgerWriter> {
        Ok(LedgerWriter { lines: LineWriter::open(path)? })
    }

    /// Says that a job begins: steps after its first are superseded by what follows.
    pub fn job(&mut self, job: Job) -> Result<()> {
        self.append(&Line::Job { job })
    }

    /// Appends a step.
    pub fn step(&mut self, step: Step) -> Result<()> {
        self.append(&Line::Step(step))
    }

    /// Returns when all lines are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.lines.sync().map_err(|error| error.doing("writing the token ledger"))
    }

    fn append(&mut self, line: &Line) -> Result<()> {
        let text = serde_json::to_string(line).expect("plain data");
        self.lines.append_object(&text).map_err(|error| error.doing("writing the token ledger"))
    }
}

/// A step as a reader sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What was written.
    pub step: Step,
    /// Index of the job that did it.
    pub job: usize,
    /// A later job went on from before this step: its update is in no weights.
    pub superseded: bool,
}

/// A ledger, read.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Ledger {
    /// In the order of their beginning.
    pub jobs: Vec<Job>,
    /// In the order of their writing.
    pub entries: Vec<Entry>,
}

impl Ledger {
    /// Reads a ledger. A cut-off last line is left out. Errors: the file cannot be read, a line is damaged or something else (with its
    /// number), or a step stands before any job.
    pub fn read(path: &Path) -> Result<Ledger> {
        let bytes = std::fs::read(path).at(path)?;
        let mut ledger = Ledger::default();
        for (number, line) in whole_lines(&bytes) {
            let wrong = |what: String| Error::file(path, format!("line {number} {what}")).remedy("the file was damaged: put back a copy");
            let line = line.map_err(wrong)?;
            match serde_json::from_slice(&line).map_err(|error| wrong(format!("is not of a token ledger: {error}")))? {
                Line::Job { job } => ledger.begin(job),
                Line::Step(step) => {
                    let job = ledger.jobs.len().checked_sub(1).ok_or_else(|| wrong("is a step before any job".into()))?;
                    ledger.entries.push(Entry { step, job, superseded: false });
                }
            }
        }
        Ok(ledger)
    }

    fn begin(&mut self, job: Job) {
        // Steps of a job ascend and earlier jobs' later steps are superseded already, so those to come are at the end.
        for entry in self.entries.iter_mut().rev().take_while(|entry| entry.superseded || entry.step.step > job.from_step) {
            entry.superseded = true;
        }
        self.jobs.push(job);
    }

    /// The steps whose place in the run stands, ascending.
    pub fn standing(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| !entry.superseded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::sealed_line;

    fn job(from_step: u64) -> Job {
        Job { from_step, ranks: 2, phases: vec![PhaseOrder { name: "main".into(), order: "f".into() }] }
    }

    fn step(step: u64) -> Step {
        Step { step, phase: 0, first: 8 * (step - 1), n: 8, skipped: step.is_multiple_of(4).then(|| "loss NaN".into()) }
    }

    /// What was written is read; each job supersedes exactly the steps after the one it goes on from, also those of several
    /// jobs that died one after the other.
    #[test]
    fn jobs_supersede_what_was_lost() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ledger.jsonl");
        for (from, to) in [(0, 10), (6, 9), (6, 7), (3, 5), (5, 12)] {
            let mut writer = LedgerWriter::open(&path).expect("writable");
            writer.job(job(from)).expect("writable");
            (from + 1..=to).for_each(|n| writer.step(step(n)).expect("writable"));
            writer.sync().expect("durable");
        }
        let ledger = Ledger::read(&path).expect("readable");
        assert_eq!(ledger.jobs.len(), 5);
        let standing: Vec<(u64, usize)> = ledger.standing().map(|entry| (entry.step.step, entry.job)).collect();
        let expected: Vec<(u64, usize)> = (1..=12).map(|n| (n, [0, 3, 4][usize::from(n > 3) + usize::from(n > 5)])).collect();
        assert_eq!(standing, expected);
        assert!(ledger.entries.iter().all(|entry| entry.step == step(entry.step.step)));
        assert_eq!(ledger.entries.len(), 10 + 3 + 1 + 2 + 7, "append-only");
    }

    /// Cut at every byte, the ledger reads as its whole lines and goes on; other lines are errors with their number.
    #[test]
    fn a_kill_at_any_byte_costs_at_most_the_last_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ledger.jsonl");
        let mut writer = LedgerWriter::open(&path).expect("writable");
        writer.job(job(0)).expect("writable");
        (1..=4).for_each(|n| writer.step(step(n)).expect("writable"));
        let whole = std::fs::read(&path).expect("readable");
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).expect("writable");
            let n_lines = whole[..cut].iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(Ledger::read(&path).expect("readable").entries.len(), n_lines.saturating_sub(1), "cut at {cut}");
            LedgerWriter::open(&path).expect("writable").job(job(1)).expect("writable");
            assert_eq!(Ledger::read(&path).expect("readable").jobs.len(), usize::from(n_lines > 0) + 1, "cut at {cut}");
        }
        let step = sealed_line("{\"step\":1,\"phase\":0,\"first\":0,\"n\":8}");
        for (text, expected) in [
            (step.clone(), "line 1 is a step before"),
            (step.replace("\"n\":8", "\"n\":9"), "line 1 ends in"),
            (format!("\n{}", sealed_line("{}")), "line 2 is not"),
        ] {
            std::fs::write(&path, text + "\n").expect("writable");
            let error = Ledger::read(&path).expect_err("no ledger");
            assert!(error.to_string().contains(expected) && error.exit_code() == 3, "{error}");
        }
    }
}
