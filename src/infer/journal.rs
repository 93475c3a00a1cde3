//! Finished responses on disk while a job still makes others: what a job that was killed made is not made again, whatever number of
//! ranks, layout or batch the next one has.
//!
//! ```text
//! journal/part-00000.lines    of the first replica, in the order in which its responses ended; part-00001.lines of the second, ..
//! 9f86d081884c7d65 12 0 34 {"id":"a","index":0,..}
//! |                |  | |  the line of the response file
//! |                |  | tokens of the response
//! |                |  which sample
//! |                which request of the file, from 0
//! xxh3-64 of all that follows the space
//! ```
//!
//! A line that a kill cut off, or that a disk damaged, does not count: its response is made again. At the end the first rank puts the
//! lines in order, with the places of all of them in memory and the text of one.

use super::request::{RequestFile, Response};
use super::samples::{Done, Sample};
use crate::artifact::{HashingFile, LineWriter};
use crate::comm::{Communicator, agree};
use crate::error::{Error, IoContext, Result};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// What a power cut can cost: responses that ended in so long a time. A killed process loses none.
const SYNC_EVERY: Duration = Duration::from_secs(10);

/// One replica's part of a journal, open to append.
pub struct Journal {
    lines: LineWriter,
    synced: Instant,
}

impl Journal {
    /// Opens part `replica` of the journal in `dir`, or begins it.
    pub fn open(dir: &Path, replica: usize) -> Result<Journal> {
        let lines = LineWriter::open(&dir.join(format!("part-{replica:05}.lines")))?;
        Ok(Journal { lines, synced: Instant::now() })
    }

    /// Appends a finished response.
    pub fn append(&mut self, sample: Sample, response: &Response) -> Result<()> {
        let json = serde_json::to_string(response).expect("a response is plain data");
        let rest = format!("{} {} {} {json}", sample.request_idx, sample.index, response.tokens.len());
        self.lines.append(&format!("{:016x} {rest}", xxh3_64(rest.as_bytes())))?;
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

/// A whole line.
struct Record {
    sample: Sample,
    n_tokens: u64,
    /// Where its response begins in the line, and how long it is.
    json: std::ops::Range<usize>,
}

impl Record {
    /// None for a line that is not as it was written.
    fn parse(line: &[u8]) -> Option<Record> {
        let line = std::str::from_utf8(line).ok()?;
        let (sum, rest) = line.split_once(' ')?;
        if sum.len() != 16 || u64::from_str_radix(sum, 16).ok()? != xxh3_64(rest.as_bytes()) {
            return None;
        }
        let mut words = rest.splitn(4, ' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        let (request_idx, index, n_tokens) = (number()? as usize, number()? as usize, number()?);
        let start = line.len() - words.next()?.len();
        Some(Record { sample: Sample { request_idx, index }, n_tokens, json: start..line.len() })
    }
}

/// Calls `found` for each whole line of a part with the place of its response in the file; how many lines were damaged.
fn scan(part: &Path, mut found: impl FnMut(Record, u64)) -> Result<usize> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(part).at(part)?);
    let (mut line, mut at, mut n_damaged) = (Vec::new(), 0u64, 0);
    loop {
        line.clear();
        let n_bytes = file.read_until(b'\n', &mut line).at(part)?;
        if line.last() != Some(&b'\n') {
            return Ok(n_damaged); // the end, or a line that was cut off
        }
        match Record::parse(&line[..n_bytes - 1]) {
            Some(record) => {
                let place = at + record.json.start as u64;
                found(record, place);
            }
            None => n_damaged += 1,
        }
        at += n_bytes as u64;
    }
}

/// The parts of a journal, in order.
fn parts(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut parts = Vec::new();
    for entry in std::fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        if path.extension().is_some_and(|extension| extension == "lines") {
            parts.push(path);
        }
    }
    parts.sort();
    Ok(parts)
}

/// Notes in `done`, which is empty on all ranks, the samples that the journal in `dir` has. The first rank reads it. Collective.
pub fn resume(world: &dyn Communicator, dir: &Path, done: &mut Done) -> Result<()> {
    let read = if world.rank() == 0 { read_done(dir, done) } else { Ok(()) };
    agree(world, read)?;
    if done.n_samples() > 0 {
        world.broadcast_bytes(done.bits_mut(), 0);
    }
    Ok(())
}

fn read_done(dir: &Path, done: &mut Done) -> Result<()> {
    for part in parts(dir)? {
        let mut foreign = None;
        let n_damaged = scan(&part, |record, _| match done.number(record.sample) {
            Some(_) => done.set(record.sample),
            None => foreign = Some(record.sample),
        })?;
        if let Some(Sample { request_idx, index }) = foreign {
            let wrong = format!("has sample {index} of request {request_idx}, which the requests do not ask for");
            return Err(Error::file(&part, wrong).remedy("remove the unfinished directory and begin anew"));
        }
        if n_damaged > 0 {
            log::warn!("{}: {n_damaged} damaged lines, their responses are made again", part.display());
        }
    }
    Ok(())
}

/// What a response file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Merged {
    /// Lines with a response.
    pub n_responses: usize,
    /// Their tokens.
    pub n_tokens: u64,
    /// Lines of wrong requests.
    pub n_errors: usize,
}

/// Where a response lies; `bytes` is 0 where there is none.
#[derive(Clone, Copy, Default)]
struct Place {
    part: u32,
    bytes: u32,
    at: u64,
}

/// Writes the responses that the journal in `dir` has for all samples of `requests` to `out`, in their order. Err when one is missing.
pub fn merge(dir: &Path, requests: &RequestFile, out: &mut HashingFile) -> Result<Merged> {
    let all = Done::nothing(&requests.requests);
    let mut places = vec![Place::default(); all.n_samples()];
    let (parts, mut merged) = (parts(dir)?, Merged::default());
    let mut files = Vec::new();
    for (idx, part) in parts.iter().enumerate() {
        scan(part, |record, at| {
            if let Some(number) = all.number(record.sample)
                && places[number].bytes == 0
            {
                places[number] = Place { part: idx as u32, bytes: record.json.len() as u32, at };
                merged.n_responses += 1;
                merged.n_tokens += record.n_tokens;
            }
        })?;
        files.push(File::open(part).at(part)?);
    }
    if merged.n_responses < places.len() {
        let wrong = format!("{} of {} responses are not in it", places.len() - merged.n_responses, places.len());
        return Err(Error::file(dir, wrong).remedy("run the same command again"));
    }
    let mut refused = requests.refused.iter().peekable();
    let (mut line, mut next) = (Vec::new(), 0);
    for request_idx in 0..=requests.requests.len() {
        while let Some(wrong) = refused.next_if(|wrong| wrong.before == request_idx) {
            let mut line = serde_json::to_vec(&wrong.response).expect("a response is plain data");
            line.push(b'\n');
            out.append(&line)?;
            merged.n_errors += 1;
        }
        for place in &places[next..next + requests.requests.get(request_idx).map_or(0, |request| request.n)] {
            line.resize(place.bytes as usize, 0);
            let part = place.part as usize;
            files[part].read_exact_at(&mut line, place.at).at(&parts[part])?;
            line.push(b'\n');
            out.append(&line)?;
            next += 1;
        }
    }
    Ok(merged)
}
