//! Goodput: the share of a run's wall time that went into steps that count, over all its jobs, and where the rest went.

use super::Row;

/// Wall time from the begin of the first job to the last row, and its parts, in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Goodput {
    /// Jobs so far.
    pub n_jobs: usize,
    /// All of it.
    pub wall_s: f64,
    /// Steps that count.
    pub steps_s: f64,
    /// Steps that a later job did again.
    pub repeated_s: f64,
    /// From the begin of a job to its first step.
    pub starting_s: f64,
    /// Between the steps of a job: saves, held-out loss, comparisons.
    pub between_steps_s: f64,
    /// From the last row of a job to the begin of the next: its last save or what it lost, and waiting in the queue.
    pub between_jobs_s: f64,
}

/// Adds up the lines of a file in their order.
#[derive(Default)]
pub(super) struct Account {
    sum: Goodput,
    first_job_s: Option<f64>,
    job_s: Option<f64>,
    /// When the last row of this job was written.
    last_row_s: Option<f64>,
}

impl Account {
    /// A job began at `unix_s`; it does steps again that took `superseded_s`.
    pub fn job(&mut self, unix_s: f64, superseded_s: f64) {
        let before = self.last_row_s.or(self.job_s);
        self.sum.between_jobs_s += before.map_or(0.0, |before| (unix_s - before).max(0.0));
        self.sum.repeated_s += superseded_s;
        self.sum.steps_s -= superseded_s;
        self.sum.n_jobs += 1;
        self.sum.wall_s = unix_s - *self.first_job_s.get_or_insert(unix_s);
        (self.job_s, self.last_row_s) = (Some(unix_s), None);
    }

    /// A step was done, instead of others that took `superseded_s`.
    pub fn row(&mut self, row: &Row, superseded_s: f64) {
        let (Some(first_job_s), Some(job_s)) = (self.first_job_s, self.job_s) else { return };
        let gap_s = (row.unix_s - self.last_row_s.unwrap_or(job_s) - row.step_s).max(0.0);
        let held_out_s = row.time.map_or(0.0, |time| time.held_out).min(gap_s);
        match self.last_row_s {
            Some(_) => self.sum.between_steps_s += gap_s,
            None => {
                self.sum.between_steps_s += held_out_s;
                self.sum.starting_s += gap_s - held_out_s;
            }
        }
        self.sum.repeated_s += superseded_s;
        self.sum.steps_s += row.step_s - superseded_s;
        self.sum.wall_s = row.unix_s - first_job_s;
        self.last_row_s = Some(row.unix_s);
    }

    /// None before the first row of a job that says when it began.
    pub fn goodput(&self) -> Option<Goodput> {
        (self.sum.wall_s > 0.0).then_some(self.sum)
    }
}

impl Goodput {
    /// Share of the wall time in steps that count.
    pub fn share(&self) -> f64 {
        self.steps_s / self.wall_s
    }

    /// The parts for people: (what, seconds).
    pub fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("steps that count", self.steps_s),
            ("steps done again", self.repeated_s),
            ("starting", self.starting_s),
            ("between steps", self.between_steps_s),
            ("between jobs", self.between_jobs_s),
        ]
    }
}
