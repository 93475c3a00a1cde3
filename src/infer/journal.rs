//! Finished responses on disk while a job still makes others: what a job that was killed made is not made again, whatever number of
//! ranks, layout or batch the next one has.
//!
//! Records (see `artifact`) of kind `part`, one a replica:
//!
//! ```text
//! 12 0 34 {"id":"a","index":0,..}
//! |  | |  the line of the response file
//! |  | tokens of the response
//! |  which sample
//! which request of the file, from 0
//! ```
//!
//! A damaged line's response is made again. At the end the first rank puts the lines in order, with the places of all of them in memory
//! and the text of one.

use super::generate::Generator;
use super::request::{Request, RequestFile, Response};
use super::samples::{Done, Sample};
use super::schedule::Counts;
use crate::artifact::{HashingFile, RecordWriter, record_parts, scan_records};
use crate::comm::{Communicator, agree};
use crate::error::{Error, IoContext, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const KIND: &str = "part";

/// One replica's part of a journal, open to append.
pub struct Journal(RecordWriter);

impl Journal {
    /// Opens part `replica` of the journal in `dir`, or begins it.
    pub fn open(dir: &Path, replica: usize) -> Result<Journal> {
        RecordWriter::open(dir, KIND, replica).map(Journal)
    }

    /// Appends a finished response.
    pub fn append(&mut self, sample: Sample, response: &Response) -> Result<()> {
        let json = serde_json::to_string(response).expect("a response is plain data");
        self.0.append(&format!("{} {} {} {json}", sample.request_idx, sample.index, response.tokens.len()))
    }

    /// Everything is on the disk.
    pub fn close(self) -> Result<()> {
        self.0.close()
    }
}

/// A finished response.
struct Record<'r> {
    sample: Sample,
    n_tokens: u64,
    json: &'r str,
}

impl Record<'_> {
    fn parse(record: &str) -> Option<Record<'_>> {
        let mut words = record.splitn(4, ' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        let (request_idx, index, n_tokens) = (number()? as usize, number()? as usize, number()?);
        Some(Record { sample: Sample { request_idx, index }, n_tokens, json: words.next()? })
    }
}

/// Calls `found` for each whole line of a part with the place of its response in the file; how many lines were damaged.
fn scan(part: &Path, mut found: impl FnMut(Record, u64)) -> Result<usize> {
    scan_records(part, |text, at| {
        let Some(record) = Record::parse(text) else { return false };
        let place = at + (text.len() - record.json.len()) as u64;
        found(record, place);
        true
    })
}

/// Notes in `done`, which is empty on all ranks, the samples that the journal in `dir` has. The first rank reads it. Collective.
pub fn resume(world: &dyn Communicator, dir: &Path, done: &mut Done) -> Result<()> {
    let read = if world.rank() == 0 { read_done(dir, done) } else { Ok(()) };
    agree(world, read)?;
    if done.n_samples() > 0 {
        world.broadcast_bytes(done.bits_mut(), 0);
    }
    if world.rank() == 0 && done.n_made() > 0 {
        log::info!("{}: {} of {} responses are made already", dir.display(), done.n_made(), done.n_samples());
    }
    Ok(())
}

fn read_done(dir: &Path, done: &mut Done) -> Result<()> {
    for part in record_parts(dir, KIND)? {
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

/// Makes the responses that are missing in `done` and keeps each in this replica's part of the journal in `dir`; what was made before an
/// error is kept too. -> what the replica did. All ranks leave with the same result. Collective.
pub fn keep(generator: &Generator, requests: &[Request], done: &Done, dir: &Path) -> Result<Counts> {
    let groups = generator.groups;
    let speaks = groups.at.tp == 0 && groups.at.pp == 0;
    let mut journal = agree(&*groups.world, speaks.then(|| Journal::open(dir, groups.at.dp)).transpose())?;
    let made =
        generator.run(requests, done, &mut |sample, response| journal.as_mut().expect("who speaks has one").append(sample, &response));
    agree(&*groups.world, journal.map_or(Ok(()), Journal::close).and(made))
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
    let (parts, mut merged) = (record_parts(dir, KIND)?, Merged::default());
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
        return Err(incomplete(dir, places.len() - merged.n_responses, places.len(), "responses"));
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

/// The responses that the journal in `dir` has for all samples of `requests`, in their order. Err when one is missing.
pub fn responses(dir: &Path, requests: &[Request]) -> Result<Vec<Response>> {
    let all = Done::nothing(requests);
    let mut found: Vec<Option<Response>> = vec![None; all.n_samples()];
    for part in record_parts(dir, KIND)? {
        scan(&part, |record, _| {
            if let (Some(number), Ok(response)) = (all.number(record.sample), serde_json::from_str(record.json)) {
                found[number].get_or_insert(response);
            }
        })?;
    }
    let n_missing = found.iter().filter(|response| response.is_none()).count();
    if n_missing > 0 {
        return Err(incomplete(dir, n_missing, found.len(), "responses"));
    }
    Ok(found.into_iter().flatten().collect())
}

/// A journal that should have everything has not.
pub(super) fn incomplete(dir: &Path, n_missing: usize, n: usize, what: &str) -> Error {
    Error::file(dir, format!("{n_missing} of {n} {what} are not in it")).remedy("run the same command again")
}
