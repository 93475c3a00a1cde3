//! The flight ledger: what a rank does (collectives, messages, actions of the pipeline), in a ring of fixed-size records in a
//! file of the run directory that is mapped into memory, so that it survives the rank's end, however it ends.
//!
//! ```text
//! RUN/flight/rank-00017.ring     of the job that runs now, or ran last
//! RUN/flight.previous/           of the job before it
//! ```
//!
//! A [`Recorder`] writes (a record costs stores to memory and readings of the clock, no system call), [`rings::Rings`] reads
//! the rings of all ranks, [`report`] finds who diverged first, and [`trace`] writes them for chrome://tracing and Perfetto.
//! This module knows nothing of communicators: those that record call it (`comm::recorded`).

mod clocks;
mod record;
mod recorder;
pub mod report;
mod ring;
pub mod rings;
mod times;
pub mod trace;
mod words;

pub use clocks::Shift;
pub use record::{Event, GROUPS, Group, Name, Op, PHASES, Phase, Record};
pub use recorder::{Blocked, Open, Recorder, Span};
pub use times::Times;

use crate::error::{IoContext, Result};
use std::path::{Path, PathBuf};

/// Where the rings of a run lie.
pub fn folder(run: &Path) -> PathBuf {
    run.join("flight")
}

/// The ring of one rank.
pub fn ring_path(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank:05}.ring"))
}

/// Makes an empty folder for the rings of a new job; those of the job before it are kept as `flight.previous`, older ones
/// are removed. One process of a job calls this, before any rank opens its ring.
pub fn begin_folder(run: &Path) -> Result<()> {
    let (current, previous) = (folder(run), run.join("flight.previous"));
    if current.exists() {
        if previous.exists() {
            std::fs::remove_dir_all(&previous).at(&previous)?;
        }
        std::fs::rename(&current, &previous).at(&current)?;
    }
    std::fs::create_dir_all(&current).at(&current)
}
