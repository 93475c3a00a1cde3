//! Reading the metrics of a run, whole or on and on while they are written: what was read once is not read again, so that a long
//! run is looked at as quickly as a short one.

use super::goodput::{Account, Goodput};
use super::{Job, JobLine, Row};
use crate::artifact::whole_lines;
use crate::error::{Error, IoContext, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What a file of metrics holds.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Metrics {
    /// The rows that count, by ascending step: of each step the last, without those that a later job superseded.
    pub rows: Vec<Row>,
    /// The job that began last.
    pub last_job: Option<Job>,
    /// Where the wall time of all jobs went.
    pub goodput: Option<Goodput>,
}

/// Reads a file that grows.
pub struct Follower {
    path: PathBuf,
    /// Bytes and lines that were read.
    at: u64,
    n_lines: usize,
    account: Account,
    metrics: Metrics,
}

impl Follower {
    /// Nothing has been read yet.
    pub fn new(path: &Path) -> Follower {
        Follower { path: path.into(), at: 0, n_lines: 0, account: Account::default(), metrics: Metrics::default() }
    }

    /// Reads what was added, but for a line that is not finished. Errors: the file cannot be read, or a line is damaged, or
    /// neither a row nor a job (with its number).
    pub fn update(&mut self) -> Result<&Metrics> {
        let mut file = File::open(&self.path).at(&self.path)?;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.at)).and_then(|_| file.read_to_end(&mut bytes)).at(&self.path)?;
        for (number, line) in whole_lines(&bytes) {
            let wrong = |what: String| {
                let wrong = format!("line {} {what}", self.n_lines + number);
                Error::file(&self.path, wrong).remedy("the file was damaged: remove that line")
            };
            let line = line.map_err(&wrong)?;
            if let Ok(JobLine { job }) = serde_json::from_slice(&line) {
                let superseded_s = self.supersede(job.from_step + 1);
                self.account.job(job.unix_s, superseded_s);
                self.metrics.last_job = Some(job);
                continue;
            }
            let row: Row = serde_json::from_slice(&line).map_err(|error| wrong(format!("is not a row of metrics: {error}")))?;
            let superseded_s = self.supersede(row.step);
            self.account.row(&row, superseded_s);
            self.metrics.rows.push(row);
        }
        let n_whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |i| i + 1);
        self.at += n_whole as u64;
        self.n_lines += bytes[..n_whole].iter().filter(|&&byte| byte == b'\n').count();
        self.metrics.goodput = self.account.goodput();
        Ok(&self.metrics)
    }

    /// What was read so far.
    pub fn seen(&self) -> &Metrics {
        &self.metrics
    }

    /// Removes the rows from `step` on; returns what their steps took, of those that say when they were.
    fn supersede(&mut self, step: u64) -> f64 {
        let rows = &mut self.metrics.rows;
        let superseded = rows.split_off(rows.partition_point(|row| row.step < step));
        superseded.iter().filter(|row| row.unix_s > 0.0).map(|row| row.step_s).sum()
    }
}

/// Everything in the file. A cut-off last line is left out. Errors as in [`Follower::update`].
pub fn read_all(path: &Path) -> Result<Metrics> {
    let mut follower = Follower::new(path);
    follower.update()?;
    Ok(follower.metrics)
}

/// The rows of [`read_all`].
pub fn read(path: &Path) -> Result<Vec<Row>> {
    Ok(read_all(path)?.rows)
}
