//! Records that a job makes and keeps on disk while it still makes others, so that a job that goes on with it need not make them again.
//! Each rank that makes records has a part of its own; it knows nothing of what they say.
//!
//! ```text
//! KIND-00000.lines    records of the first writer, in the order in which they were made; KIND-00001.lines of the second, ..
//! 9f86d081884c7d65 12 {"any":"text"}
//! |                |
//! |                the record
//! xxh3-64 of it
//! ```
//!
//! A line that a kill cut off, or that a disk damaged, does not count.

use super::LineWriter;
use crate::error::{IoContext, Result};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// What a power cut can cost: records that were made in so long a time. A killed process loses none.
const SYNC_EVERY: Duration = Duration::from_secs(10);

/// Bytes of a checksum and the space behind it.
const SUM_BYTES: u64 = 17;

/// One writer's part, open to append.
pub struct RecordWriter {
    lines: LineWriter,
    synced: Instant,
}

impl RecordWriter {
    /// Opens part `writer` of the records of a kind in `dir`, or begins it.
    pub fn open(dir: &Path, kind: &str, writer: usize) -> Result<RecordWriter> {
        let lines = LineWriter::open(&dir.join(format!("{kind}-{writer:05}.lines")))?;
        Ok(RecordWriter { lines, synced: Instant::now() })
    }

    /// Appends a record, a text of one line.
    pub fn append(&mut self, record: &str) -> Result<()> {
        self.lines.append(&format!("{:016x} {record}", xxh3_64(record.as_bytes())))?;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.lines.sync()?;
            self.synced = Instant::now();
        }
        Ok(())
    }

    /// Everything is on the disk.
    pub fn close(self) -> Result<()> {
        self.lines.sync()
    }
}

/// The parts of a kind in `dir`, in order.
pub fn record_parts(dir: &Path, kind: &str) -> Result<Vec<PathBuf>> {
    let mut parts = Vec::new();
    for entry in std::fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_suffix(".lines").and_then(|name| name.strip_prefix(kind)).and_then(|rest| rest.strip_prefix('-'));
        if number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
            parts.push(path);
        }
    }
    parts.sort();
    Ok(parts)
}

/// Calls `found` for each whole record of a part with its place in the file; it says whether it can read it. -> how many lines were
/// damaged.
pub fn scan_records(part: &Path, mut found: impl FnMut(&str, u64) -> bool) -> Result<usize> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(part).at(part)?);
    let (mut line, mut at, mut n_damaged) = (Vec::new(), 0u64, 0);
    loop {
        line.clear();
        let n_bytes = file.read_until(b'\n', &mut line).at(part)?;
        if line.last() != Some(&b'\n') {
            return Ok(n_damaged); // the end, or a line that was cut off
        }
        if !checked(&line[..n_bytes - 1]).is_some_and(|record| found(record, at + SUM_BYTES)) {
            n_damaged += 1;
        }
        at += n_bytes as u64;
    }
}

/// The record of a line; None for one that is not as it was written.
fn checked(line: &[u8]) -> Option<&str> {
    let (sum, record) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    (sum == format!("{:016x}", xxh3_64(record.as_bytes()))).then_some(record)
}
