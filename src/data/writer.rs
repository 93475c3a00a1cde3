//! Writes a `.bin`/`.idx` pair in Megatron's format (see `index`): int32 tokens, one sequence a document. Memory: 4 bytes a
//! document. It knows nothing of ranks, nor of what ends a document.

use super::index::{MAGIC, VERSION};
use crate::artifact::{FileEntry, HashingFile};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Code of int32 in the index.
const I32_CODE: u8 = 4;

/// A pair of files under construction.
pub struct ShardWriter {
    dir: PathBuf,
    name: String,
    bin: HashingFile,
    lengths: Vec<i32>,
    n_tokens: u64,
}

impl ShardWriter {
    /// Creates `dir/NAME.bin`; the index is written by [`ShardWriter::close`].
    pub fn create(dir: &Path, name: &str) -> Result<ShardWriter> {
        let bin = HashingFile::create(dir, &format!("{name}.bin"))?;
        Ok(ShardWriter { dir: dir.into(), name: name.into(), bin, lengths: Vec::new(), n_tokens: 0 })
    }

    /// Appends a document. Its ids are below 2^31.
    pub fn append(&mut self, ids: &[u32]) -> Result<()> {
        assert!(ids.iter().all(|&id| id <= i32::MAX as u32), "an id of 2^31 or more");
        let length = i32::try_from(ids.len()).map_err(|_| {
            let wrong = format!("a document of {} tokens, an index holds at most {}", ids.len(), i32::MAX);
            Error::file(self.dir.join(&self.name), wrong).remedy("split the document")
        })?;
        self.append_lengths(&[length]);
        if cfg!(target_endian = "little") {
            self.bin.append(bytemuck::cast_slice(ids))
        } else {
            self.bin.append(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
        }
    }

    /// Announces documents whose tokens come by [`ShardWriter::append_bytes`].
    pub fn append_lengths(&mut self, lengths: &[i32]) {
        self.lengths.extend_from_slice(lengths);
        self.n_tokens += lengths.iter().map(|&length| length as u64).sum::<u64>();
    }

    /// Appends tokens that are bytes already (a part written elsewhere).
    pub fn append_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.bin.append(bytes)
    }

    /// Documents so far.
    pub fn n_documents(&self) -> u64 {
        self.lengths.len() as u64
    }

    /// Tokens so far.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Writes the index and makes both files durable.
    pub fn close(self) -> Result<[FileEntry; 2]> {
        let bin = self.bin.close()?;
        assert_eq!(bin.bytes, 4 * self.n_tokens, "{}: tokens and lengths belong together", self.name);
        let mut index = HashingFile::create(&self.dir, &format!("{}.idx", self.name))?;
        let n = self.lengths.len() as u64;
        index.append(MAGIC)?;
        index.append(&VERSION.to_le_bytes())?;
        index.append(&[I32_CODE])?;
        index.append(&n.to_le_bytes())?;
        index.append(&(n + 1).to_le_bytes())?;
        for length in &self.lengths {
            index.append(&length.to_le_bytes())?;
        }
        let mut offset = 0i64;
        for &length in &self.lengths {
            index.append(&offset.to_le_bytes())?;
            offset += 4 * i64::from(length);
        }
        for document in 0..=n {
            index.append(&document.to_le_bytes())?;
        }
        Ok([bin, index.close()?])
    }

    /// The lengths, when the tokens go elsewhere (a part to be appended by another process).
    pub(super) fn close_part(self) -> Result<Vec<i32>> {
        self.bin.close()?;
        Ok(self.lengths)
    }
}
