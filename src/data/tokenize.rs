//! Text to token shards: documents in corpus order, encoded by all threads, written in order; held-out documents apart. Several
//! ranks take consecutive parts of the corpus, and their parts laid end to end are the very bytes of one rank.

use super::shards::{KIND, Split};
use super::writer::ShardWriter;
use crate::artifact::{ArtifactWriter, Begin, HashingFile, Input, Manifest};
use crate::comm::{Communicator, agree};
use crate::error::{Context, Error, IoContext, Kind, Result};
use crate::text::Tokenizer;
use crate::text::corpus::{Corpus, Document, Report};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Text encoded at a time: enough for all threads, small against memory.
const BATCH_BYTES: usize = 8 << 20;

/// What to do.
pub struct Settings<'a> {
    /// Encodes.
    pub tokenizer: &'a Tokenizer,
    /// Share of documents held out, by a hash of their text.
    pub validation_share: f64,
    /// Told the bytes of text done since the last call.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Whether this process was asked to stop.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

/// Counts of one split on one rank.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SplitCounts {
    /// Documents.
    pub documents: u64,
    /// Tokens, an end-of-sequence token for each document included.
    pub tokens: u64,
    /// Bytes of their text.
    pub text_bytes: u64,
    /// Length of each document in tokens.
    lengths: Vec<u32>,
}

/// One split's part file on one rank: raw tokens.
struct Part {
    path: PathBuf,
    file: std::io::BufWriter<File>,
    counts: SplitCounts,
}

impl Part {
    fn create(dir: &Path, split: Split, rank: usize) -> Result<Part> {
        let path = dir.join(part_name(split, rank));
        let file = File::create(&path).at(&path)?;
        Ok(Part { path, file: std::io::BufWriter::with_capacity(1 << 20, file), counts: SplitCounts::default() })
    }

    fn append(&mut self, tokens: &[u32], text_bytes: usize) -> Result<()> {
        std::io::Write::write_all(&mut self.file, bytemuck::cast_slice(tokens)).at(&self.path)?;
        self.counts.documents += 1;
        self.counts.tokens += tokens.len() as u64;
        self.counts.text_bytes += text_bytes as u64;
        self.counts.lengths.push(tokens.len() as u32);
        Ok(())
    }

    fn close(mut self) -> Result<SplitCounts> {
        std::io::Write::flush(&mut self.file).at(&self.path)?;
        Ok(self.counts)
    }
}

fn part_name(split: Split, rank: usize) -> String {
    format!("{}.part-{rank:05}", split.name())
}

/// What a finished job says.
pub struct Tokenized {
    /// The artifact's manifest.
    pub manifest: Manifest,
    /// Whether it was there before.
    pub was_finished: bool,
}

/// Tokenizes a corpus into `out`. Collective.
pub fn run(out: &Path, corpus: &Corpus, inputs: Vec<Input>, settings: &Settings, world: &dyn Communicator) -> Result<Tokenized> {
    let (rank, n_ranks) = (world.rank(), world.size());
    if settings.tokenizer.eos_id().is_none() {
        return Err(Error::recipe("the tokenizer has no end-of-sequence piece").remedy("train one with an eos piece: documents must end"));
    }
    if !(0.0..1.0).contains(&settings.validation_share) {
        return Err(Error::recipe(format!("--validation-share {} is not in 0..1", settings.validation_share)).remedy("give a share such as 0.01"));
    }
    let recipe = serde_json::json!({ "validation_share": settings.validation_share, "tokenizer": settings.tokenizer.fingerprint() });
    let begun = if rank == 0 { ArtifactWriter::begin(out, KIND, recipe, inputs).map(Some) } else { Ok(None) };
    let begun = agree(world, begun)?;
    // Rank 0 says where to write; nothing, when there is nothing to write.
    let dir = match &begun {
        Some(Begin::Write(writer)) => writer.dir().as_os_str().as_encoded_bytes().to_vec(),
        _ => Vec::new(),
    };
    let dir = world.gather_variable(&dir).swap_remove(0);
    if dir.is_empty() {
        let manifest = Manifest::open(out, KIND)?;
        return Ok(Tokenized { manifest, was_finished: true });
    }
    let dir = PathBuf::from(String::from_utf8_lossy(&dir).into_owned());
    let mine = agree(world, encode_part(&dir, corpus, settings, rank, n_ranks))?;
    let text = serde_json::to_vec(&mine).expect("plain data");
    let parts: Vec<[SplitCounts; 2]> =
        world.gather_variable(&text).iter().map(|part| serde_json::from_slice(part).expect("written above")).collect();
    let committed = match begun {
        Some(Begin::Write(writer)) => commit(writer, &parts, settings).map(Some),
        _ => Ok(None),
    };
    let manifest = match agree(world, committed)? {
        Some(manifest) => manifest,
        None => Manifest::open(out, KIND)?,
    };
    Ok(Tokenized { manifest, was_finished: false })
}

/// Encodes this rank's documents into part files; counts of train and validation.
fn encode_part(dir: &Path, corpus: &Corpus, settings: &Settings, rank: usize, n_ranks: usize) -> Result<[SplitCounts; 2]> {
    let mut parts = [Part::create(dir, Split::Train, rank)?, Part::create(dir, Split::Validation, rank)?];
    let mut documents = corpus.documents(rank, n_ranks);
    let mut batch: Vec<Document> = Vec::new();
    loop {
        let (mut n_bytes, mut is_last) = (0, true);
        for document in documents.by_ref() {
            let document = document.doing(|| "reading the corpus".into())?;
            n_bytes += document.text.len();
            batch.push(document);
            if n_bytes >= BATCH_BYTES {
                is_last = false;
                break;
            }
        }
        if (settings.stop)() {
            return Err(Error::new(Kind::Requeue, "asked to stop before all text was tokenized").remedy("run the same command again"));
        }
        let encoded: Vec<Vec<u32>> = batch.par_iter().map(|document| encode(settings.tokenizer, &document.text)).collect();
        for (document, tokens) in batch.drain(..).zip(encoded) {
            let part = &mut parts[usize::from(is_held_out(&document.text, settings.validation_share))];
            part.append(&tokens, document.text.len())?;
        }
        (settings.progress)(n_bytes as u64);
        if is_last {
            break;
        }
    }
    log_report(&documents.report(), rank);
    let [train, validation] = parts;
    Ok([train.close()?, validation.close()?])
}

fn log_report(report: &Report, rank: usize) {
    if rank == 0 {
        log::info!("corpus      {report}");
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = tokenizer.encode(text);
    tokens.push(tokenizer.eos_id().expect("checked at the start"));
    tokens
}

/// By the text alone, so a document keeps its split whatever its neighbours, its file, or the number of ranks.
fn is_held_out(text: &str, share: f64) -> bool {
    let hash = xxhash_rust::xxh3::xxh3_64_with_seed(text.as_bytes(), 0x7472_6972_656d_6521);
    ((hash >> 11) as f64) / ((1u64 << 53) as f64) < share
}

/// Lays the parts end to end, writes indices and counts, commits. Rank 0 alone: copying is far cheaper than encoding.
fn commit(mut writer: ArtifactWriter, parts: &[[SplitCounts; 2]], settings: &Settings) -> Result<Manifest> {
    for (number, split) in [Split::Train, Split::Validation].into_iter().enumerate() {
        let of_split: Vec<&SplitCounts> = parts.iter().map(|part| &part[number]).collect();
        let sum = |count: &dyn Fn(&SplitCounts) -> u64| of_split.iter().map(|counts| count(counts)).sum::<u64>();
        let (documents, tokens, text_bytes) = (sum(&|c| c.documents), sum(&|c| c.tokens), sum(&|c| c.text_bytes));
        if split == Split::Train && documents == 0 {
            let wrong = "no document with text is left to train on";
            return Err(Error::new(Kind::File, wrong).remedy("give more text, or a smaller --validation-share"));
        }
        let dir = writer.dir().to_path_buf();
        let mut shard = ShardWriter::create(&dir, split.name())?;
        for (rank, counts) in of_split.iter().enumerate() {
            append_part(&mut shard, &dir.join(part_name(split, rank)), counts)?;
        }
        shard.close()?.into_iter().for_each(|file| writer.add(file));
        for (name, value) in [("documents", documents), ("tokens", tokens), ("text_bytes", text_bytes)] {
            writer.count(&format!("{}_{name}", split.name()), value);
        }
    }
    let mut model = HashingFile::create(writer.dir(), "tokenizer.model")?;
    model.append(settings.tokenizer.file_bytes())?;
    writer.add(model.close()?);
    writer.count("vocab_size", settings.tokenizer.vocab_size());
    writer.commit()
}

fn append_part(shard: &mut ShardWriter, path: &Path, counts: &SplitCounts) -> Result<()> {
    let mut file = std::io::BufReader::with_capacity(1 << 20, File::open(path).at(path)?);
    let mut tokens = Vec::new();
    for &length in &counts.lengths {
        tokens.resize(length as usize, 0u32);
        file.read_exact(bytemuck::cast_slice_mut(&mut tokens)).at(path)?;
        shard.append(&tokens)?;
    }
    fs::remove_file(path).at(path)
}
