//! Writes a `.bin`/`.idx` pair in Megatron's format (see `index`): int32 tokens, one sequence a document. Memory: 4 bytes a
//! document. It knows nothing of ranks, nor of what ends a document.

use super::index::{MAGIC, VERSION};
use crate::artifact::{FileEntry, HashingFile};
use crate::error::{Error, IoContext, Result};
use std::fs::{self, File};
use std::io::Read;
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

    /// Ends a part: its tokens stay in NAME.bin and its lengths go to NAME.lengths, for [`ShardWriter::append_part`].
    pub fn close_part(self) -> Result<()> {
        let mut lengths = HashingFile::create(&self.dir, &format!("{}.lengths", self.name))?;
        for length in &self.lengths {
            lengths.append(&length.to_le_bytes())?;
        }
        lengths.close_unsynced()?;
        self.bin.close_unsynced()?;
        Ok(())
    }

    /// Appends the part NAME, which another writer left in the same directory, and removes its files.
    pub fn append_part(&mut self, name: &str) -> Result<()> {
        let [lengths_path, bin_path] = ["lengths", "bin"].map(|ending| self.dir.join(format!("{name}.{ending}")));
        let bytes = fs::read(&lengths_path).at(&lengths_path)?;
        let lengths: Vec<i32> = bytes.as_chunks().0.iter().map(|part| i32::from_le_bytes(*part)).collect();
        let expected = lengths.iter().map(|&length| 4 * length as u64).sum::<u64>();
        let mut bin = File::open(&bin_path).at(&bin_path)?;
        let found = bin.metadata().at(&bin_path)?.len();
        if found != expected {
            let wrong = format!("{found} bytes, its documents take {expected}");
            return Err(Error::file(&bin_path, wrong).remedy("something else writes there, or the file system lost data: run again"));
        }
        self.append_lengths(&lengths);
        let mut block = vec![0; 1 << 20];
        let mut left = expected as usize;
        while left > 0 {
            let n = left.min(block.len());
            bin.read_exact(&mut block[..n]).at(&bin_path)?;
            self.bin.append(&block[..n])?;
            left -= n;
        }
        fs::remove_file(&lengths_path).at(&lengths_path)?;
        fs::remove_file(&bin_path).at(&bin_path)
    }

    fn append_lengths(&mut self, lengths: &[i32]) {
        self.lengths.extend_from_slice(lengths);
        self.n_tokens += lengths.iter().map(|&length| length as u64).sum::<u64>();
    }
}
