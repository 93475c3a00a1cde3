//! The input files of trireme-score: one JSON object a line, read one after the other.

use crate::artifact::open_plain;
use crate::error::{Error, Result, without_mark, wrong_json};
use serde::de::DeserializeOwned;
use std::io::BufRead;
use std::path::Path;

/// What is wrong with a line, and what to do.
pub(super) struct Wrong {
    pub what: String,
    pub remedy: &'static str,
}

/// Every line of a file, parsed and then made into something by `make`; blank lines are skipped. `shape` says what a line should be.
/// Err: the first line for which that fails, by its number; or no line at all.
pub(super) fn read<L: DeserializeOwned, T>(path: &Path, shape: &str, make: impl Fn(L) -> std::result::Result<T, Wrong>) -> Result<Vec<T>> {
    let file = open_plain(path)?;
    let mut made = Vec::new();
    for (i, line) in std::io::BufReader::new(file).lines().enumerate() {
        let wrong = |what: String, remedy: &str| Error::file(path, format!("line {}: {what}", i + 1)).remedy(remedy);
        let line = line.map_err(|error| wrong(error.to_string(), "write UTF-8, one JSON object a line"))?;
        if line.trim().is_empty() {
            continue;
        }
        let line = if i == 0 { without_mark(line.as_bytes()) } else { line.as_bytes() };
        let line = serde_json::from_slice(line).map_err(|error| wrong(wrong_json(&error), shape))?;
        made.push(make(line).map_err(|Wrong { what, remedy }| wrong(what, remedy))?);
    }
    if made.is_empty() {
        return Err(Error::file(path, "nothing to score in it").remedy("write one JSON object a line"));
    }
    Ok(made)
}
