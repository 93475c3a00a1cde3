//! The files of scores: JSON lines for people and scripts, HDF5 for what reads millions of them. Both hold the same.

use super::choices::{ScoredChoice, ScoredQuestion};
use super::score::{Rated, Scored};
use crate::artifact::{ArtifactWriter, HashingFile};
use crate::data::h5;
use crate::error::Result;

/// Which file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// One JSON object a line, in input order.
    Jsonl,
    /// Flat datasets with offsets.
    Hdf5,
}

impl Format {
    /// As users call it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Jsonl => "jsonl",
            Format::Hdf5 => "hdf5",
        }
    }
}

/// Writes `name` into the artifact, one JSON object a line.
pub fn write_lines<T: serde::Serialize>(writer: &mut ArtifactWriter, name: &str, values: &[T]) -> Result<()> {
    let mut file = HashingFile::create(writer.dir(), name)?;
    for value in values {
        let mut line = serde_json::to_vec(value).expect("plain data");
        line.push(b'\n');
        file.append(&line)?;
    }
    writer.add(file.close()?);
    Ok(())
}

/// Writes and commits rewards.jsonl and rewards.h5.
pub fn write_rewards(mut writer: ArtifactWriter, formats: &[Format], rated: &[Rated]) -> Result<()> {
    if formats.contains(&Format::Jsonl) {
        write_lines(&mut writer, "rewards.jsonl", rated)?;
    }
    if formats.contains(&Format::Hdf5) {
        let table = h5::RewardTable {
            ids: rated.iter().map(|one| one.id.clone()).collect(),
            attributes: rated.iter().flat_map(|one| one.attributes.iter().copied()).collect(),
        };
        writer.add(h5::write_rewards(writer.dir(), "rewards.h5", &table)?);
    }
    writer.count("sequences", rated.len());
    writer.commit().map(|_| ())
}

/// Writes and commits logprobs.jsonl and logprobs.h5.
pub fn write_logprobs(mut writer: ArtifactWriter, formats: &[Format], scored: &[Scored]) -> Result<()> {
    if formats.contains(&Format::Jsonl) {
        write_lines(&mut writer, "logprobs.jsonl", scored)?;
    }
    if formats.contains(&Format::Hdf5) {
        let table = h5::LogprobTable {
            ids: scored.iter().map(|one| one.id.clone()).collect(),
            starts: offsets(scored.iter().map(|one| one.tokens.len())),
            tokens: scored.iter().flat_map(|one| one.tokens.iter().copied()).collect(),
            logprobs: scored.iter().flat_map(|one| one.logprobs.iter().map(|x| x.unwrap_or(f32::NAN))).collect(),
            sums: scored.iter().map(|one| one.sum).collect(),
        };
        writer.add(h5::write_logprobs(writer.dir(), "logprobs.h5", &table)?);
    }
    writer.count("sequences", scored.len());
    writer.count("tokens", scored.iter().map(|one| one.tokens.len()).sum::<usize>());
    writer.commit().map(|_| ())
}

/// Writes and commits choices.jsonl and choices.h5.
pub fn write_choices(mut writer: ArtifactWriter, formats: &[Format], scored: &[ScoredQuestion]) -> Result<()> {
    if formats.contains(&Format::Jsonl) {
        write_lines(&mut writer, "choices.jsonl", scored)?;
    }
    let choices: Vec<&ScoredChoice> = scored.iter().flat_map(|one| &one.choices).collect();
    if formats.contains(&Format::Hdf5) {
        let count = |of: &dyn Fn(&ScoredChoice) -> usize| choices.iter().map(|one| of(one) as u64).collect();
        let table = h5::ChoiceTable {
            ids: scored.iter().map(|one| one.id.clone()).collect(),
            starts: offsets(scored.iter().map(|one| one.choices.len())),
            argmax: scored.iter().map(|one| one.argmax as u64).collect(),
            sums: choices.iter().map(|one| one.likelihood.sum).collect(),
            chars: count(&|one| one.chars.unwrap_or(0)),
            bytes: count(&|one| one.bytes.unwrap_or(0)),
            is_greedy: choices.iter().map(|one| u8::from(one.likelihood.is_greedy)).collect(),
            n_cut: count(&|one| one.n_cut),
            token_starts: offsets(choices.iter().map(|one| one.tokens.len())),
            tokens: choices.iter().flat_map(|one| one.tokens.iter().copied()).collect(),
            logprobs: choices.iter().flat_map(|one| one.likelihood.logprobs.iter().copied()).collect(),
        };
        writer.add(h5::write_choices(writer.dir(), "choices.h5", &table)?);
    }
    writer.count("questions", scored.len());
    writer.count("choices", choices.len());
    writer.commit().map(|_| ())
}

/// Where each of several lists begins when they stand one after another, and the end.
fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<u64> {
    let mut offsets = vec![0];
    offsets.extend(lengths.scan(0, |end, n| {
        *end += n as u64;
        Some(*end)
    }));
    offsets
}
