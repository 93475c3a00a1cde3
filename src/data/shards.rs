//! Token shards: `.bin`/`.idx` in Megatron's format, mapped into memory and read by token position. Ours carry a manifest
//! (artifact kind "token-shards") with checksums and the vocabulary; existing Megatron corpora, which have neither, open too.
//!
//! All documents of a shard stand end to end; position p is the p-th token of them all. This file knows nothing of samples.

use super::index::{Index, Mapped, TokenType};
use crate::artifact::{Input, MANIFEST, Manifest};
use crate::error::{Error, IoContext, Kind, Result};
use crate::text;
use rayon::prelude::*;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// Kind of an artifact of token shards.
pub const KIND: &str = "token-shards";
/// Ids from here on are never tokens: they are negative as int32.
const ID_LIMIT: u32 = 1 << 31;
/// Bytes hashed and checked at a time.
const BLOCK_BYTES: usize = 16 << 20;

/// Which part of a corpus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// `train.bin`.
    Train,
    /// `validation.bin`: held out.
    Validation,
}

impl Split {
    /// "train" or "validation": the files' stem and the prefix of the manifest's counts.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }
}

/// One split of a corpus of tokens, opened for reading. Threads share it.
pub struct TokenShards {
    bin: Mapped,
    index: Index,
    artifact: Option<Artifact>,
    split: Split,
    n_tokens: u64,
    /// Ids at or above are refused.
    id_limit: u32,
    fingerprint: String,
}

/// What a manifest adds.
struct Artifact {
    dir: PathBuf,
    manifest: Manifest,
}

impl std::fmt::Debug for TokenShards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenShards {{ {}, {} tokens, {} }}", self.bin.path().display(), self.n_tokens, self.fingerprint)
    }
}

impl TokenShards {
    /// Opens a split of `path`: a directory written by trireme-tokenize; a directory with `train.bin/.idx` (`validation`), or
    /// with a single pair of another name; or the path of a pair without its ending, as Megatron takes it. Sizes are compared
    /// with the index and the manifest, contents by [`TokenShards::verify`].
    pub fn open(path: &Path, split: Split) -> Result<TokenShards> {
        let (prefix, artifact) = find(path, split)?;
        let index = Index::open(&with_ending(&prefix, "idx"))?;
        let bin = Mapped::open(&with_ending(&prefix, "bin"))?;
        let n_tokens = index.n_tokens();
        let (found, expected) = (bin.bytes().len() as u128, u128::from(n_tokens) * index.token_type().size() as u128);
        if found != expected {
            let wrong = format!("{found} bytes, the index says {expected} ({n_tokens} tokens of {} bytes)", index.token_type().size());
            return Err(Error::file(bin.path(), wrong).remedy("the file was truncated or belongs to another index: tokenize or copy again"));
        }
        let mut shards = TokenShards { bin, index, artifact, split, n_tokens, id_limit: ID_LIMIT, fingerprint: String::new() };
        shards.check_counts()?;
        shards.id_limit = shards.vocab_size().map_or(ID_LIMIT, |vocab_size| (vocab_size as u64).min(u64::from(ID_LIMIT)) as u32);
        shards.fingerprint = shards.compute_fingerprint();
        if shards.artifact.is_none() {
            log::info!("{}: no manifest, so no checksum; damage that leaves the sizes as they are cannot be noticed", prefix.display());
        }
        Ok(shards)
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Number of documents.
    pub fn n_documents(&self) -> u64 {
        self.index.n_documents() as u64
    }

    /// The split that was opened.
    pub fn split(&self) -> Split {
        self.split
    }

    /// The `.bin` file.
    pub fn path(&self) -> &Path {
        self.bin.path()
    }

    /// The index, for tools.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Pieces of the tokenizer; None without a manifest.
    pub fn vocab_size(&self) -> Option<usize> {
        self.artifact.as_ref()?.manifest.count("vocab_size").map(|count| count as usize)
    }

    /// Bytes of the text these tokens stand for (for bits per byte); None without a manifest.
    pub fn text_bytes(&self) -> Option<u64> {
        self.artifact.as_ref()?.manifest.count(&format!("{}_text_bytes", self.split.name()))
    }

    /// The tokenizer's file that the tokens were made with; None without a manifest, or when it cannot be read.
    pub fn tokenizer_bytes(&self) -> Option<Vec<u8>> {
        fs::read(self.tokenizer_path()?).ok()
    }

    /// Where that file lies; None without a manifest.
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        let artifact = self.artifact.as_ref()?;
        text::file_of(&artifact.manifest).map(|file| artifact.dir.join(&file.name))
    }

    /// Equal for equal tokens. With a manifest it stands for the files' checksums. Without one it is made of the whole index,
    /// the size of the `.bin` and 64 blocks spread over it, so that opening stays fast on a corpus of any size.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// These tokens, opened at `path`, as the input of an artifact: by the manifest's fingerprint, which lineage follows, or
    /// without one by their own.
    pub fn as_input(&self, role: &str, path: &Path) -> Input {
        let fingerprint = self.artifact.as_ref().map_or(&self.fingerprint, |artifact| &artifact.manifest.fingerprint);
        Input { role: role.into(), path: path.into(), fingerprint: fingerprint.clone() }
    }

    /// Refuses ids at or above `vocab_size` from here on, where the manifest does not say so already.
    pub fn limit_ids(&mut self, vocab_size: usize) {
        self.id_limit = self.id_limit.min(vocab_size.min(ID_LIMIT as usize) as u32);
    }

    /// Reads everything once: checksums of both files (and the tokenizer) with a manifest, the order of the index, and that
    /// every id is below the vocabulary. Errors name the file and both values, for an id its position too.
    pub fn verify(&self) -> Result<()> {
        self.verify_unless(&|| false)
    }

    /// The same; an error of kind Requeue when `stop` says so meanwhile.
    pub fn verify_unless(&self, stop: &dyn Fn() -> bool) -> Result<()> {
        if let Some(artifact) = &self.artifact {
            let index = artifact.manifest.file(&format!("{}.idx", self.split.name()));
            for entry in index.into_iter().chain(text::file_of(&artifact.manifest)) {
                crate::artifact::verify_file(&artifact.dir, entry)?;
            }
        }
        self.index.verify()?;
        self.verify_tokens(stop)
    }

    /// Fills `out` with the tokens at positions `first..first + out.len()`.
    ///
    /// # Panics
    /// When these are not all below [`TokenShards::n_tokens`].
    pub fn read(&self, first: u64, out: &mut [u32]) -> Result<()> {
        assert!(first + out.len() as u64 <= self.n_tokens, "tokens {first} + {} of {}", out.len(), self.n_tokens);
        self.bin.check_size()?;
        let size = self.index.token_type().size();
        let start = first as usize * size;
        decode(self.index.token_type(), &self.bin.bytes()[start..start + out.len() * size], out);
        match out.iter().position(|&id| id >= self.id_limit) {
            None => Ok(()),
            Some(at) => Err(self.wrong_id(first + at as u64)),
        }
    }

    /// Positions in `tokens`, but for its first, where a document begins; ascending, appended to `starts`.
    pub fn document_starts(&self, tokens: Range<u64>, starts: &mut Vec<u64>) {
        self.index.document_starts(tokens, starts);
    }

    fn verify_tokens(&self, stop: &dyn Fn() -> bool) -> Result<()> {
        self.bin.check_size()?;
        let (bytes, size) = (self.bin.bytes(), self.index.token_type().size());
        let entry = self.artifact.as_ref().and_then(|artifact| artifact.manifest.file(&format!("{}.bin", self.split.name())));
        let (mut hash, mut first_wrong) = (Xxh3::new(), None);
        for (block_idx, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            // The checksum is one chain over the file; the ids of the block are looked at meanwhile by the other threads.
            let (_, wrong) = rayon::join(|| entry.map(|_| hash.update(block)), || self.wrong_in(block));
            first_wrong = first_wrong.or(wrong.map(|at| (block_idx * (BLOCK_BYTES / size) + at) as u64));
            if stop() {
                let wrong = format!("{}: asked to stop while it was read through: nothing to save yet", self.bin.path().display());
                return Err(Error::new(Kind::Requeue, wrong).remedy("run the same command again"));
            }
            self.bin.check_size()?;
        }
        let found = format!("{:016x}", hash.digest());
        if let Some(entry) = entry.filter(|entry| entry.xxh3 != found) {
            let wrong = format!("checksum {found}, the manifest says {}", entry.xxh3);
            return Err(Error::file(self.bin.path(), wrong).remedy("the file was damaged: tokenize again, or take a copy"));
        }
        first_wrong.map_or(Ok(()), |position| Err(self.wrong_id(position)))
    }

    /// The first token of a block that is no id below the limit.
    fn wrong_in(&self, block: &[u8]) -> Option<usize> {
        const TOKENS: usize = 1 << 16;
        let token_type = self.index.token_type();
        let wrong_in = |(idx, part): (usize, &[u8])| {
            let mut ids = vec![0; part.len() / token_type.size()];
            decode(token_type, part, &mut ids);
            ids.iter().position(|&id| id >= self.id_limit).map(|at| idx * TOKENS + at)
        };
        block.par_chunks(TOKENS * token_type.size()).enumerate().filter_map(wrong_in).min()
    }

    fn wrong_id(&self, position: u64) -> Error {
        let size = self.index.token_type().size();
        let bytes = &self.bin.bytes()[position as usize * size..][..size];
        let id = match self.index.token_type() {
            TokenType::U8 => i64::from(bytes[0]),
            TokenType::I8 => i64::from(bytes[0] as i8),
            TokenType::I16 => i64::from(i16::from_le_bytes([bytes[0], bytes[1]])),
            TokenType::U16 => i64::from(u16::from_le_bytes([bytes[0], bytes[1]])),
            TokenType::I32 => i64::from(i32::from_le_bytes(bytes.try_into().expect("4 bytes"))),
            TokenType::I64 => i64::from_le_bytes(bytes.try_into().expect("8 bytes")),
        };
        let wrong = format!("token {position} is {id}, ids must be in 0..{}", self.id_limit);
        Error::file(self.bin.path(), wrong).remedy("the file was damaged or made with another tokenizer: tokenize again")
    }

    /// The manifest's counts against the index.
    fn check_counts(&self) -> Result<()> {
        let Some(artifact) = &self.artifact else { return Ok(()) };
        for (what, found) in [("tokens", self.n_tokens), ("documents", self.n_documents())] {
            let name = format!("{}_{what}", self.split.name());
            match artifact.manifest.count(&name) {
                Some(expected) if expected == found => {}
                expected => {
                    let expected = expected.map_or("nothing".into(), |count| count.to_string());
                    let wrong = format!("{found} {what}, the manifest says {expected} for {name}");
                    return Err(Error::file(self.index.file.path(), wrong).remedy("tokenize again"));
                }
            }
        }
        Ok(())
    }

    fn compute_fingerprint(&self) -> String {
        let mut hash = Xxh3::new();
        if let Some(artifact) = &self.artifact {
            for ending in ["bin", "idx"] {
                let entry = artifact.manifest.file(&format!("{}.{ending}", self.split.name()));
                hash.update(entry.map_or("", |entry| &entry.xxh3).as_bytes());
            }
        } else {
            const BLOCKS: usize = 64;
            const BLOCK: usize = 4096;
            let bytes = self.bin.bytes();
            hash.update(self.index.file.bytes());
            hash.update(&(bytes.len() as u64).to_le_bytes());
            for block in 0..BLOCKS {
                let start = (bytes.len() as u128 * block as u128 / BLOCKS as u128) as usize;
                hash.update(&bytes[start..bytes.len().min(start + BLOCK)]);
            }
        }
        format!("{:032x}", hash.digest128())
    }
}

/// Tokens of any type as u32. What does not fit becomes at least [`ID_LIMIT`], which no check lets pass.
fn decode(token_type: TokenType, bytes: &[u8], out: &mut [u32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [u32], id: impl Fn([u8; N]) -> u32) {
        let (parts, _) = bytes.as_chunks::<N>();
        for (out, &part) in out.iter_mut().zip(parts) {
            *out = id(part);
        }
    }
    match token_type {
        TokenType::U8 => each(bytes, out, |[byte]| u32::from(byte)),
        TokenType::I8 => each(bytes, out, |[byte]| i32::from(byte as i8) as u32),
        TokenType::I16 => each(bytes, out, |part| i32::from(i16::from_le_bytes(part)) as u32),
        TokenType::U16 => each(bytes, out, |part| u32::from(u16::from_le_bytes(part))),
        TokenType::I32 => each(bytes, out, u32::from_le_bytes),
        TokenType::I64 => each(bytes, out, |part| u32::try_from(i64::from_le_bytes(part)).unwrap_or(u32::MAX)),
    }
}

/// The common path of a split's two files, without their endings, and the manifest beside them.
fn find(path: &Path, split: Split) -> Result<(PathBuf, Option<Artifact>)> {
    if path.join(MANIFEST).is_file() {
        let manifest = Manifest::open(path, KIND)?;
        for ending in ["bin", "idx"] {
            let name = format!("{}.{ending}", split.name());
            if manifest.file(&name).is_none() {
                let wrong = format!("has no {} split: the manifest names no {name}", split.name());
                return Err(Error::file(path, wrong).remedy("tokenize again with a --validation-share"));
            }
        }
        return Ok((path.join(split.name()), Some(Artifact { dir: path.into(), manifest })));
    }
    if path.is_dir() {
        return Ok((find_in_dir(path, split)?, None));
    }
    let stem = match path.extension().and_then(|ending| ending.to_str()) {
        Some("bin" | "idx") => path.with_extension(""),
        _ => path.to_path_buf(),
    };
    if !with_ending(&stem, "bin").exists() && !with_ending(&stem, "idx").exists() {
        let wrong = "no such token shards: neither a directory nor, with .bin and .idx added, a pair of files";
        return Err(Error::file(path, wrong).remedy("check the path"));
    }
    Ok((stem, None))
}

/// A pair in a directory without a manifest: that of the split's name, or the only one when none has a split's name.
fn find_in_dir(dir: &Path, split: Split) -> Result<PathBuf> {
    if dir.file_name().is_some_and(|name| name.to_string_lossy().contains(".tmp-")) {
        return Err(Error::file(dir, "is unfinished: it has no manifest.json").remedy("run trireme-tokenize again"));
    }
    let named = dir.join(split.name());
    if with_ending(&named, "bin").exists() || with_ending(&named, "idx").exists() {
        return Ok(named);
    }
    let mut stems = Vec::new();
    for entry in fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        if path.extension().is_some_and(|ending| ending == "idx") {
            stems.push(path.with_extension(""));
        }
    }
    stems.sort();
    match stems.as_slice() {
        [only] if only.file_stem().is_none_or(|stem| stem != Split::Train.name() && stem != Split::Validation.name()) => Ok(only.clone()),
        [_, _, ..] => {
            let names: Vec<_> = stems.iter().map(|stem| stem.display().to_string()).collect();
            let wrong = format!("holds {} pairs of .bin and .idx, none called {}", stems.len(), split.name());
            Err(Error::file(dir, wrong).remedy(format!("name one of them: {}", names.join(", "))))
        }
        _ => {
            let wrong = format!("no {0}.bin and {0}.idx in it", split.name());
            Err(Error::file(dir, wrong)
                .remedy("name a directory written by trireme-tokenize, or the path of a Megatron corpus without its ending"))
        }
    }
}

/// PREFIX.ending, whatever dots the prefix has.
pub(super) fn with_ending(prefix: &Path, ending: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_os_string();
    name.push(".");
    name.push(ending);
    name.into()
}
