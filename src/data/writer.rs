//! Writes token shards: documents appended one after another into `.bin`, the index at the end.

use super::index::{Index, TokenType};
use crate::artifact::{FileEntry, HashingFile};
use crate::error::Result;
use std::path::{Path, PathBuf};

/// A `.bin`/`.idx` pair under construction; int32 tokens, one sequence a document.
pub struct ShardWriter {
    dir: PathBuf,
    name: String,
    bin: HashingFile,
    lengths: Vec<i32>,
    n_tokens: u64,
}

impl ShardWriter {
    /// Creates `dir/name.bin`.
    pub fn create(dir: &Path, name: &str) -> Result<ShardWriter> {
        let bin = HashingFile::create(dir, &format!("{name}.bin"))?;
        Ok(ShardWriter { dir: dir.into(), name: name.into(), bin, lengths: Vec::new(), n_tokens: 0 })
    }

    /// Appends a document that is not empty. Panics for one of 2^31 tokens.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        assert!(!tokens.is_empty(), "a document ends with a token at least");
        self.bin.append(bytemuck::cast_slice(tokens))?;
        self.lengths.push(i32::try_from(tokens.len()).expect("documents have fewer than 2^31 tokens"));
        self.n_tokens += tokens.len() as u64;
        Ok(())
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
        let documents = (0..=self.lengths.len() as i64).collect();
        let index = Index { token_type: TokenType::I32, lengths: self.lengths, documents };
        let mut idx = HashingFile::create(&self.dir, &format!("{}.idx", self.name))?;
        idx.append(&index.to_bytes())?;
        Ok([self.bin.close()?, idx.close()?])
    }
}
