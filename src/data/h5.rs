//! Small named tables in HDF5: what stages hand on that is not text. h5py reads them without us.

use crate::artifact::{self, FileEntry};
use crate::error::{Error, IoContext, Result};
use hdf5::types::VarLenUnicode;
use std::path::Path;

/// Log-probabilities of sequences, flat: sequence i is starts[i]..starts[i+1] of `tokens` and `logprobs`.
pub struct LogprobTable {
    /// One a sequence.
    pub ids: Vec<String>,
    /// n + 1 ascending offsets.
    pub starts: Vec<u64>,
    /// All tokens.
    pub tokens: Vec<u32>,
    /// ln p of each token; NaN for the first of a sequence.
    pub logprobs: Vec<f32>,
    /// One a sequence.
    pub sums: Vec<f64>,
}

/// Likelihoods of the choices of questions, flat: question q has the choices starts[q]..starts[q+1], choice c the tokens
/// token_starts[c]..token_starts[c+1].
pub struct ChoiceTable {
    /// One a question.
    pub ids: Vec<String>,
    /// Questions + 1 ascending offsets.
    pub starts: Vec<u64>,
    /// Of each question, the choice of the largest sum, counted from its first.
    pub argmax: Vec<u64>,
    /// One a choice.
    pub sums: Vec<f64>,
    /// One a choice; 0 where the choice was given as tokens.
    pub chars: Vec<u64>,
    /// One a choice; 0 where the choice was given as tokens.
    pub bytes: Vec<u64>,
    /// One a choice: 1 or 0.
    pub is_greedy: Vec<u8>,
    /// One a choice: tokens that its context lost on the left.
    pub n_cut: Vec<u64>,
    /// Choices + 1 ascending offsets.
    pub token_starts: Vec<u64>,
    /// Of all choices.
    pub tokens: Vec<u32>,
    /// ln p of each token.
    pub logprobs: Vec<f32>,
}

/// Attributes of sequences.
pub struct RewardTable {
    /// One a sequence.
    pub ids: Vec<String>,
    /// [n, R], row by row.
    pub attributes: Vec<f32>,
}

/// Writes `dir/name` with datasets ids, starts, tokens, logprobs, sums; synced to the disk.
pub fn write_logprobs(dir: &Path, name: &str, table: &LogprobTable) -> Result<FileEntry> {
    write(dir, name, &table.ids, |file| {
        file.new_dataset_builder().with_data(&table.starts).create("starts")?;
        file.new_dataset_builder().with_data(&table.tokens).create("tokens")?;
        file.new_dataset_builder().with_data(&table.logprobs).create("logprobs")?;
        file.new_dataset_builder().with_data(&table.sums).create("sums")?;
        Ok(())
    })
}

/// Writes `dir/name` with the fields of the table as datasets of their names; synced to the disk.
pub fn write_choices(dir: &Path, name: &str, table: &ChoiceTable) -> Result<FileEntry> {
    write(dir, name, &table.ids, |file| {
        let offsets_and_counts = [
            ("starts", &table.starts),
            ("argmax", &table.argmax),
            ("chars", &table.chars),
            ("bytes", &table.bytes),
            ("n_cut", &table.n_cut),
            ("token_starts", &table.token_starts),
        ];
        for (name, values) in offsets_and_counts {
            file.new_dataset_builder().with_data(values).create(name)?;
        }
        file.new_dataset_builder().with_data(&table.sums).create("sums")?;
        file.new_dataset_builder().with_data(&table.is_greedy).create("is_greedy")?;
        file.new_dataset_builder().with_data(&table.tokens).create("tokens")?;
        file.new_dataset_builder().with_data(&table.logprobs).create("logprobs")?;
        Ok(())
    })
}

/// Writes `dir/name` with datasets ids [n] and attributes [n, R]; synced to the disk.
pub fn write_rewards(dir: &Path, name: &str, table: &RewardTable) -> Result<FileEntry> {
    let n_attributes = table.attributes.len() / table.ids.len().max(1);
    write(dir, name, &table.ids, |file| {
        let attributes = file.new_dataset::<f32>().shape((table.ids.len(), n_attributes)).create("attributes")?;
        attributes.write_raw(&table.attributes)
    })
}

/// A file with the dataset ids and what `more` puts beside it.
fn write(dir: &Path, name: &str, ids: &[String], more: impl FnOnce(&hdf5::File) -> hdf5::Result<()>) -> Result<FileEntry> {
    let path = dir.join(name);
    let write = || -> hdf5::Result<()> {
        let file = hdf5::File::create(&path)?;
        // HDF5 strings end at a NUL, so one inside an id becomes U+FFFD.
        let text = |id: &String| id.replace('\0', "\u{fffd}").parse::<VarLenUnicode>().expect("no NUL is left");
        let ids: Vec<VarLenUnicode> = ids.iter().map(text).collect();
        file.new_dataset_builder().with_data(&ids).create("ids")?;
        more(&file)?;
        file.close()
    };
    write().map_err(|error| Error::hdf5(&path, &error.to_string()))?;
    std::fs::File::open(&path).and_then(|file| file.sync_all()).at(&path)?;
    let entry = artifact::checksum(&path)?;
    Ok(FileEntry { name: name.into(), ..entry })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A full disk is told as of every other file: one line with the operating system's words and what to do. /dev/full takes no byte.
    #[test]
    fn a_full_disk_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rewards.h5");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let table = RewardTable { ids: vec!["a".into()], attributes: vec![1.0] };
        let error = write_rewards(dir.path(), "rewards.h5", &table).unwrap_err();
        assert_eq!(error, Error::io(&path, &std::io::Error::from_raw_os_error(libc::ENOSPC)));
        let elsewhere = dir.path().join("nowhere");
        let error = write_rewards(&elsewhere, "rewards.h5", &table).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.contains("No such file or directory"), "{error}");
    }
}
