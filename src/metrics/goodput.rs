//! Goodput: the share of a run's wall time that went into steps that count, over all its jobs, and where the rest went.

use super::{Job, Line, Row};
use std::collections::BTreeMap;

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

impl Goodput {
    /// From the lines of a run, in their order. None before the first row of a job that says when it began.
    pub(super) fn of(lines: &[Line]) -> Option<Goodput> {
        let mut sum = Goodput::default();
        let mut counted: BTreeMap<u64, f64> = BTreeMap::new();
        let (mut begun, mut job, mut last): (Option<f64>, Option<&Job>, Option<&Row>) = (None, None, None);
        for line in lines {
            match line {
                Line::Job(new) => {
                    let before = last.map(|row| row.unix_s).or(job.map(|job| job.unix_s));
                    sum.between_jobs_s += before.map_or(0.0, |before| (new.unix_s - before).max(0.0));
                    sum.repeated_s += counted.split_off(&(new.from_step + 1)).values().sum::<f64>();
                    sum.n_jobs += 1;
                    let first = *begun.get_or_insert(new.unix_s);
                    sum.wall_s = new.unix_s - first;
                    (job, last) = (Some(new), None);
                }
                Line::Row(row) => {
                    let Some(job) = job else { continue };
                    let gap_s = (row.unix_s - last.map_or(job.unix_s, |row| row.unix_s) - row.step_s).max(0.0);
                    let held_out_s = row.time.map_or(0.0, |time| time.held_out).min(gap_s);
                    match last {
                        Some(_) => sum.between_steps_s += gap_s,
                        None => {
                            sum.between_steps_s += held_out_s;
                            sum.starting_s += gap_s - held_out_s;
                        }
                    }
                    counted.insert(row.step, row.step_s);
                    sum.wall_s = row.unix_s - begun.unwrap_or(job.unix_s);
                    last = Some(row);
                }
            }
        }
        sum.steps_s = counted.values().sum();
        (sum.wall_s > 0.0).then_some(sum)
    }

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
