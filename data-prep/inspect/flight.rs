//! What the ranks of a job recorded of themselves: the merged report, and the trace.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use trireme::error::{Error, Result};
use trireme::flight::rings::Rings;
use trireme::flight::{self, report, trace};

/// Optimizer steps, both ends included.
pub type Steps = RangeInclusive<u64>;

/// `12`, or `10..12` with both ends.
pub fn parse_steps(text: &str) -> std::result::Result<Steps, String> {
    let number = |text: &str| text.trim().parse::<u64>().map_err(|_| format!("{text:?} is not a step; write 12 or 10..12"));
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last.trim_start_matches('='))?);
    if first > last { Err(format!("step {first} is after step {last}")) } else { Ok(first..=last) }
}

/// Prints the report.
pub fn report(run: &Path) -> Result<()> {
    crate::print(&report::of(&Rings::read(&folder(run))?))
}

/// Writes the trace of these ranks, or of all.
pub fn trace(run: &Path, ranks: &[usize], steps: Option<Steps>, out: &Path) -> Result<()> {
    let rings = Rings::read(&folder(run))?;
    let all: Vec<usize> = rings.all().map(|ring| ring.rank).collect();
    if let Some(rank) = ranks.iter().find(|rank| !all.contains(rank)) {
        let wrong = format!("no ring of rank {rank}; there are {}", flight::report::ranks_text(&all));
        return Err(Error::file(&rings.folder, wrong).remedy("name one of these, or leave --rank out"));
    }
    let value = trace::to_json(&rings, if ranks.is_empty() { &all } else { ranks }, steps);
    let n_events = value["traceEvents"].as_array().map_or(0, Vec::len);
    crate::write_whole(out, value.to_string().as_bytes())?;
    crate::print(&format!("{}: {n_events} events; open it in chrome://tracing or ui.perfetto.dev\n", out.display()))
}

/// The folder of rings that a path means.
fn folder(run: &Path) -> PathBuf {
    let inside = flight::folder(run);
    if inside.is_dir() { inside } else { run.into() }
}
