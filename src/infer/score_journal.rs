//! Scores on disk while a job still makes others, as `journal` has responses. Records (see `artifact`) whose kind is the order of sums, so
//! that a job does not go on in another one with what the first has made, one part a replica:
//!
//! ```text
//! 12 {"logprobs":[-1.25],"is_greedy":[true]}
//! |  the scores of the sequence
//! which sequence of the input, from 0
//! ```

use super::journal::incomplete;
use super::scorer::Sink;
use crate::artifact::{RecordWriter, record_parts, scan_records};
use crate::comm::{Communicator, Groups, agree};
use crate::error::{Error, IoContext, Result};
use crate::model::numerics::Numerics;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// The kinds of records.
const KINDS: [&str; 2] = ["fast", "reproducible"];

fn kind(numerics: Numerics) -> &'static str {
    KINDS[usize::from(matches!(numerics, Numerics::Reproducible(_)))]
}

/// Which of `n` sequences the journal in `dir` has scores of, on every rank; the first one reads it. Err: it has scores in another order
/// of sums, or of more sequences. Collective.
pub fn resume(world: &dyn Communicator, dir: &Path, numerics: Numerics, n: usize) -> Result<Vec<bool>> {
    let mut made = vec![0u8; n];
    let read = if world.rank() == 0 { read_made(dir, kind(numerics), &mut made) } else { Ok(()) };
    agree(world, read)?;
    if n > 0 {
        world.broadcast_bytes(&mut made, 0);
    }
    let made: Vec<bool> = made.into_iter().map(|made| made != 0).collect();
    let n_made = made.iter().filter(|made| **made).count();
    if world.rank() == 0 && n_made > 0 {
        log::info!("{}: {n_made} of {n} sequences are scored already", dir.display());
    }
    Ok(made)
}

fn read_made(dir: &Path, kind: &str, made: &mut [u8]) -> Result<()> {
    for other in KINDS.iter().filter(|other| **other != kind) {
        for part in record_parts(dir, other)? {
            if std::fs::metadata(&part).at(&part)?.len() == 0 {
                continue;
            }
            let wrong = format!("has scores in {other} numerics, this job makes them in {kind} numerics");
            let remedy = "go on with a layout and device that can, or remove the unfinished directory to begin anew";
            return Err(Error::file(&part, wrong).remedy(remedy));
        }
    }
    for part in record_parts(dir, kind)? {
        let mut foreign = None;
        let n_damaged = scan_records(&part, |text, _| {
            let Some((number, _)) = parse(text) else { return false };
            match made.get_mut(number) {
                Some(made) => *made = 1,
                None => foreign = Some(number),
            }
            true
        })?;
        if let Some(number) = foreign {
            let wrong = format!("has scores of sequence {number} of {}", made.len());
            return Err(Error::file(&part, wrong).remedy("remove the unfinished directory and begin anew"));
        }
        if n_damaged > 0 {
            log::warn!("{}: {n_damaged} damaged lines, their sequences are scored again", part.display());
        }
    }
    Ok(())
}

fn parse(text: &str) -> Option<(usize, &str)> {
    let (number, scores) = text.split_once(' ')?;
    Some((number.parse().ok()?, scores))
}

/// Calls `make` with a sink that keeps scores in this replica's part of the journal in `dir`. What was made before an error is kept too.
/// All ranks leave with the same result. Collective.
pub fn keep<T: Serialize>(groups: &Groups, dir: &Path, numerics: Numerics, make: impl FnOnce(&mut Sink<T>) -> Result<()>) -> Result<()> {
    let speaks = groups.at.tp == 0 && groups.at.pp + 1 == groups.layout.pp;
    let open = || RecordWriter::open(dir, kind(numerics), groups.at.dp);
    let mut records = agree(&*groups.world, speaks.then(open).transpose())?;
    let made = make(&mut |number, scores| {
        let json = serde_json::to_string(&scores).expect("scores are plain data");
        records.as_mut().expect("the last stage has one").append(&format!("{number} {json}"))
    });
    agree(&*groups.world, records.map_or(Ok(()), RecordWriter::close).and(made))
}

/// The scores that the journal in `dir` has of `n` sequences, in their order; of those that `scored` leaves out, nothing. Err when one
/// is missing.
pub fn read<T: DeserializeOwned + Default + Clone>(dir: &Path, n: usize, scored: impl Fn(usize) -> bool) -> Result<Vec<T>> {
    let mut found: Vec<Option<T>> = vec![None; n];
    for part in KINDS.iter().map(|kind| record_parts(dir, kind)).collect::<Result<Vec<_>>>()?.concat() {
        scan_records(&part, |text, _| {
            let whole = parse(text).and_then(|(number, json)| Some((number, serde_json::from_str(json).ok()?)));
            let Some((number, scores)) = whole else { return false };
            if let Some(place) = found.get_mut(number) {
                place.get_or_insert(scores);
            }
            true
        })?;
    }
    let n_missing = (0..n).filter(|&number| found[number].is_none() && scored(number)).count();
    if n_missing > 0 {
        return Err(incomplete(dir, n_missing, n, "scores"));
    }
    Ok(found.into_iter().map(Option::unwrap_or_default).collect())
}
