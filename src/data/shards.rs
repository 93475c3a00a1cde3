//! Token shards, memory-mapped: one `.bin`/`.idx` pair of a directory written by trireme-tokenize, or of a Megatron corpus
//! that comes without our manifest.

use super::index::{Index, TokenType};
use crate::artifact::{self, MANIFEST, Manifest};
use crate::error::{Error, IoContext, Result};
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Kind of the artifact.
pub const KIND: &str = "token-shards";

/// Which part of a corpus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// To train on.
    Train,
    /// Held out.
    Validation,
}

impl Split {
    /// File name without ending.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }
}

/// An open `.bin`/`.idx` pair.
pub struct TokenShards {
    dir: PathBuf,
    bin: PathBuf,
    split: Split,
    map: Mmap,
    token_type: TokenType,
    n_tokens: u64,
    n_documents: u64,
    manifest: Option<Manifest>,
    fingerprint: String,
}

impl TokenShards {
    /// Opens a split and checks sizes: manifest against files, index against `.bin`. Contents are compared by `verify`.
    pub fn open(dir: &Path, split: Split) -> Result<TokenShards> {
        let manifest = if dir.join(MANIFEST).exists() { Some(Manifest::open(dir, KIND)?) } else { None };
        let (bin, idx) = (dir.join(format!("{}.bin", split.name())), dir.join(format!("{}.idx", split.name())));
        let remedy = "give a directory written by trireme-tokenize, or one with train.bin and train.idx of a Megatron corpus";
        if !dir.is_dir() {
            return Err(Error::file(dir, "no such directory of token shards").remedy(remedy));
        }
        for path in [&bin, &idx] {
            if !path.is_file() {
                return Err(Error::file(path, "no such file").remedy(remedy));
            }
        }
        let index_bytes = fs::read(&idx).at(&idx)?;
        let index = Index::parse(&index_bytes, &idx)?;
        let file = File::open(&bin).at(&bin)?;
        let (found, expected) = (file.metadata().at(&bin)?.len(), index.n_tokens() * index.token_type.bytes() as u64);
        if found != expected {
            let wrong = format!("{found} bytes, but {} names {} tokens, {expected} bytes", idx.display(), index.n_tokens());
            return Err(Error::file(&bin, wrong).remedy("the file was cut off or changed: tokenize again"));
        }
        if found == 0 {
            return Err(Error::file(&bin, "no tokens in it").remedy("tokenize a corpus that has text for this split"));
        }
        // SAFETY: the file is an immutable artifact: nobody writes to it after its rename. Truncating it while a job runs is
        // outside of the contract (it would end the job by SIGBUS).
        let map = unsafe { Mmap::map(&file) }.at(&bin)?;
        let fingerprint = match &manifest {
            Some(manifest) => manifest.fingerprint.clone(),
            // Without a manifest: the index (all lengths) and the size stand for the contents.
            None => format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&index_bytes)),
        };
        let (n_tokens, n_documents, token_type) = (index.n_tokens(), index.documents.len() as u64 - 1, index.token_type);
        Ok(TokenShards { dir: dir.into(), bin, split, map, token_type, n_tokens, n_documents, manifest, fingerprint })
    }

    /// Tokens in this split.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Documents in this split.
    pub fn n_documents(&self) -> u64 {
        self.n_documents
    }

    /// Bytes of text behind the tokens of this split, when the manifest says so.
    pub fn text_bytes(&self) -> Option<u64> {
        self.manifest.as_ref()?.count(&format!("{}_text_bytes", self.split.name()))
    }

    /// Pieces of the tokenizer, when the manifest says so.
    pub fn vocab_size(&self) -> Option<usize> {
        self.manifest.as_ref()?.count("vocab_size").map(|n| n as usize)
    }

    /// The tokenizer's model file, when it is there.
    pub fn tokenizer_bytes(&self) -> Option<Vec<u8>> {
        fs::read(self.dir.join("tokenizer.model")).ok()
    }

    /// The artifact's fingerprint.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Reads the split through: its files against the manifest's checksums, and every token against the vocabulary.
    pub fn verify(&self, vocab_size: usize) -> Result<()> {
        match &self.manifest {
            None => log::info!("{}: no manifest, so its contents have no checksum to compare", self.dir.display()),
            Some(manifest) => {
                for ending in ["bin", "idx"] {
                    let name = format!("{}.{ending}", self.split.name());
                    let entry =
                        manifest.file(&name).ok_or_else(|| Error::file(self.dir.join(MANIFEST), format!("does not list {name}")))?;
                    artifact::verify_file(&self.dir, entry)?;
                }
            }
        }
        const BLOCK: u64 = 1 << 20;
        let n_blocks = self.n_tokens.div_ceil(BLOCK);
        let first_bad = (0..n_blocks).into_par_iter().find_map_first(|block| {
            let range = block * BLOCK..((block + 1) * BLOCK).min(self.n_tokens);
            let mut tokens = vec![0u32; (range.end - range.start) as usize];
            self.copy_tokens(range.clone(), &mut tokens);
            let at = tokens.iter().position(|&token| token as usize >= vocab_size)?;
            Some((range.start + at as u64, tokens[at]))
        });
        match first_bad {
            None => Ok(()),
            Some((position, token)) => {
                let wrong = format!("token {position} is {}, the vocabulary has {vocab_size} pieces", token as i32);
                Err(Error::file(&self.bin, wrong).remedy("use the tokenizer and vocab_size that the shards were made with"))
            }
        }
    }

    /// Copies tokens `range` of the concatenated documents. Panics when out of range.
    pub fn copy_tokens(&self, range: Range<u64>, out: &mut [u32]) {
        assert!(range.end <= self.n_tokens && (range.end - range.start) as usize == out.len(), "{range:?} of {}", self.n_tokens);
        let width = self.token_type.bytes();
        let bytes = &self.map[range.start as usize * width..range.end as usize * width];
        match self.token_type {
            TokenType::I32 => {
                let tokens = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes")));
                out.iter_mut().zip(tokens).for_each(|(to, token)| *to = token);
            }
            TokenType::U16 => {
                let tokens = bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes(b.try_into().expect("2 bytes"))));
                out.iter_mut().zip(tokens).for_each(|(to, token)| *to = token);
            }
        }
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
