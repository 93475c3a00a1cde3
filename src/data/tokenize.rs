//! Text to token shards: documents in corpus order, encoded by all threads, written in order, held-out documents apart. Several
//! ranks take consecutive parts of the corpus, and their parts laid end to end are the very bytes that one rank writes.
//!
//! Memory: a few batches of text a rank, and 4 bytes a document. This file knows nothing of models.

use super::shards::{KIND, Split};
use super::writer::ShardWriter;
use crate::artifact::{ArtifactWriter, Begin, HashingFile, Input, Manifest};
use crate::comm::{Communicator, agree};
use crate::error::{Context, Error, Kind, Result};
use crate::text::Tokenizer;
use crate::text::corpus::{Corpus, Document, Report};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Text encoded at a time, for each thread and at least: enough to keep all busy, small against memory.
const BATCH_BYTES_PER_THREAD: usize = 1 << 20;
const MIN_BATCH_BYTES: usize = 4 << 20;
/// Batches read ahead of the encoder.
const READ_AHEAD: usize = 2;
/// Of the hash that decides what is held out; as old as the first shards.
const SPLIT_SEED: u64 = 0x7472_6972_656d_6521;

/// What to do.
pub struct Settings<'a> {
    /// Encodes.
    pub tokenizer: &'a Tokenizer,
    /// Share of documents held out, by a hash of their text. With 0 there is no validation split.
    pub validation_share: f64,
    /// What else decided about the result, for the manifest: how the corpus was read.
    pub reading: serde_json::Value,
    /// Told the bytes of text done since the last call.
    pub progress: &'a (dyn Fn(u64) + Sync),
    /// Whether this process was asked to stop.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

/// What a finished job says.
pub struct Tokenized {
    /// The artifact's manifest.
    pub manifest: Manifest,
    /// What was read, over all ranks; None when the job was finished before.
    pub report: Option<Report>,
}

/// Counts of one split.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Counts {
    documents: u64,
    tokens: u64,
    text_bytes: u64,
}

/// What a rank did.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct RankReport {
    counts: [Counts; 2],
    /// The fields of its [`Report`] that are not in the counts: empty, binary, invalid_utf8, too_long.
    skipped: [u64; 4],
}

/// The splits that a share of held-out documents makes.
fn splits(validation_share: f64) -> &'static [Split] {
    if validation_share > 0.0 { &[Split::Train, Split::Validation] } else { &[Split::Train] }
}

/// Refuses a share that is not in 0 <= share < 1.
pub fn check_share(validation_share: f64) -> Result<()> {
    if !(0.0..1.0).contains(&validation_share) {
        let wrong = format!("--validation-share {validation_share}, expected at least 0 and less than 1");
        return Err(Error::recipe(wrong).remedy("give a share such as 0.01"));
    }
    Ok(())
}

/// Tokenizes a corpus into `out`. Collective; rank 0's `inputs` count. The same work finished before is left as it is. Errors
/// (bad text, nothing to train on, a full disk) are the same on every rank, and leave nothing behind.
pub fn run(out: &Path, corpus: &Corpus, inputs: Vec<Input>, settings: &Settings, world: &dyn Communicator) -> Result<Tokenized> {
    check_share(settings.validation_share)?;
    if settings.tokenizer.eos_id().is_none() {
        return Err(Error::recipe("the tokenizer has no end-of-sequence piece").remedy("train one with an eos piece: documents must end"));
    }
    let recipe = serde_json::json!({
        "validation_share": settings.validation_share,
        "tokenizer": settings.tokenizer.fingerprint(),
        "reading": settings.reading,
    });
    let begun = if world.rank() == 0 { ArtifactWriter::begin(out, KIND, recipe, inputs).map(Some) } else { Ok(None) };
    let (writer, finished) = match agree(world, begun)? {
        Some(Begin::Write(writer)) => (Some(writer), None),
        Some(Begin::Finished(manifest)) => (None, Some(manifest)),
        None => (None, None),
    };
    let Some(dir) = announce(world, writer.as_ref()) else {
        return Ok(Tokenized { manifest: broadcast_manifest(world, finished), report: None });
    };
    // Parts stay open on rank 0: the others' are appended to its own.
    let (parts, mine) = agree(world, encode_part(&dir, corpus, settings, world))?;
    let reports = gather_reports(world, mine);
    let committed = writer.map(|writer| commit(writer, parts, &reports, settings)).transpose();
    let manifest = agree(world, committed)?;
    Ok(Tokenized { manifest: broadcast_manifest(world, manifest), report: Some(total_report(&reports)) })
}

/// Rank 0 tells the others where to write; None when there is nothing to write.
fn announce(world: &dyn Communicator, writer: Option<&ArtifactWriter>) -> Option<PathBuf> {
    let path = world.gather_variable(writer.map_or(&[], |writer| writer.dir().as_os_str().as_bytes())).swap_remove(0);
    (!path.is_empty()).then(|| OsString::from_vec(path).into())
}

fn broadcast_manifest(world: &dyn Communicator, manifest: Option<Manifest>) -> Manifest {
    let text = manifest.map(|manifest| serde_json::to_vec(&manifest).expect("plain data")).unwrap_or_default();
    serde_json::from_slice(&world.gather_variable(&text)[0]).expect("rank 0 sent a manifest")
}

fn gather_reports(world: &dyn Communicator, mine: RankReport) -> Vec<RankReport> {
    let text = serde_json::to_vec(&mine).expect("plain data");
    world.gather_variable(&text).iter().map(|part| serde_json::from_slice(part).expect("plain data")).collect()
}

/// The name of a rank's part of a split. Rank 0 writes the shards themselves.
fn part_name(split: Split, rank: usize) -> String {
    if rank == 0 { split.name().into() } else { format!("{}.part-{rank:05}", split.name()) }
}

/// Encodes this rank's documents. Gives the open shards on rank 0; elsewhere the parts are closed, ready to be appended.
fn encode_part(dir: &Path, corpus: &Corpus, settings: &Settings, world: &dyn Communicator) -> Result<(Vec<ShardWriter>, RankReport)> {
    let rank = world.rank();
    let create = |split: &Split| ShardWriter::create(dir, &part_name(*split, rank));
    let mut parts: Vec<ShardWriter> = splits(settings.validation_share).iter().map(create).collect::<Result<_>>()?;
    let (sender, receiver) = sync_channel(READ_AHEAD);
    let (counts, report) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_batches(corpus, rank, world.size(), sender));
        let counts = encode_batches(receiver, &mut parts, settings);
        let report = reader.join().expect("the reader does not panic");
        counts.map(|counts| (counts, report))
    })?;
    if rank > 0 {
        parts.drain(..).try_for_each(ShardWriter::close_part)?;
    }
    let skipped = [report.empty, report.binary, report.invalid_utf8, report.too_long];
    Ok((parts, RankReport { counts, skipped }))
}

/// Reads ahead of the encoder; ends early when that has gone.
fn read_batches(corpus: &Corpus, rank: usize, n_ranks: usize, sender: SyncSender<Result<Vec<Document>>>) -> Report {
    let batch_bytes = MIN_BATCH_BYTES.max(BATCH_BYTES_PER_THREAD * rayon::current_num_threads());
    let mut documents = corpus.documents(rank, n_ranks);
    loop {
        let (mut batch, mut n_bytes) = (Vec::new(), 0);
        while n_bytes < batch_bytes {
            match documents.next() {
                Some(Ok(document)) => {
                    n_bytes += document.text.len();
                    batch.push(document);
                }
                Some(Err(error)) => {
                    let _ = sender.send(Err(error)); // fails only when nobody wants to know
                    return documents.report();
                }
                None => break,
            }
        }
        if batch.is_empty() || sender.send(Ok(batch)).is_err() {
            return documents.report();
        }
    }
}

fn encode_batches(batches: Receiver<Result<Vec<Document>>>, parts: &mut [ShardWriter], settings: &Settings) -> Result<[Counts; 2]> {
    let mut counts = [Counts::default(); 2];
    for batch in batches {
        let batch = batch.doing(|| "reading the corpus".into())?;
        if (settings.stop)() {
            let wrong = "asked to stop before all text was tokenized; nothing was kept";
            return Err(Error::new(Kind::Requeue, wrong).remedy("run the same command again"));
        }
        let encoded: Vec<Vec<u32>> = batch.par_iter().map(|document| encode(settings.tokenizer, &document.text)).collect();
        for (document, tokens) in batch.iter().zip(encoded) {
            let split = usize::from(is_held_out(&document.text, settings.validation_share));
            parts[split].append(&tokens)?;
            counts[split].documents += 1;
            counts[split].tokens += tokens.len() as u64;
            counts[split].text_bytes += document.text.len() as u64;
        }
        (settings.progress)(batch.iter().map(|document| document.text.len() as u64).sum());
    }
    Ok(counts)
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = tokenizer.encode(text);
    tokens.push(tokenizer.eos_id().expect("checked at the start"));
    tokens
}

/// By the text alone, so a document keeps its split whatever its neighbours, its file, or the number of ranks, and equal texts
/// are never on both sides.
pub(super) fn is_held_out(text: &str, share: f64) -> bool {
    let hash = xxhash_rust::xxh3::xxh3_64_with_seed(text.as_bytes(), SPLIT_SEED);
    ((hash >> 11) as f64) / ((1u64 << 53) as f64) < share
}

/// Lays the parts end to end, writes indices and counts, commits. Rank 0 alone: copying is far cheaper than encoding.
fn commit(mut writer: ArtifactWriter, shards: Vec<ShardWriter>, reports: &[RankReport], settings: &Settings) -> Result<Manifest> {
    let mut total = Counts::default();
    for ((idx, &split), mut shard) in splits(settings.validation_share).iter().enumerate().zip(shards) {
        for rank in 1..reports.len() {
            shard.append_part(&part_name(split, rank))?;
        }
        let counts = sum(reports.iter().map(|report| report.counts[idx]));
        if split == Split::Train && counts.documents == 0 {
            let wrong = "an empty corpus: no document with text is left to train on";
            return Err(Error::new(Kind::File, wrong).remedy("give more text, or a smaller --validation-share"));
        }
        assert_eq!((shard.n_documents(), shard.n_tokens()), (counts.documents, counts.tokens), "parts and counts of {}", split.name());
        shard.close()?.into_iter().for_each(|file| writer.add(file));
        count_as(&mut writer, &format!("{}_", split.name()), counts);
        total = sum([total, counts].into_iter());
    }
    let mut model = HashingFile::create(writer.dir(), settings.tokenizer.file_name())?;
    model.append(settings.tokenizer.file_bytes())?;
    writer.add(model.close()?);
    count_as(&mut writer, "", total);
    writer.count("vocab_size", settings.tokenizer.vocab_size());
    writer.commit()
}

fn count_as(writer: &mut ArtifactWriter, prefix: &str, counts: Counts) {
    writer.count(&format!("{prefix}documents"), counts.documents);
    writer.count(&format!("{prefix}tokens"), counts.tokens);
    writer.count(&format!("{prefix}text_bytes"), counts.text_bytes);
}

fn sum(counts: impl Iterator<Item = Counts>) -> Counts {
    counts.fold(Counts::default(), |a, b| Counts {
        documents: a.documents + b.documents,
        tokens: a.tokens + b.tokens,
        text_bytes: a.text_bytes + b.text_bytes,
    })
}

fn total_report(reports: &[RankReport]) -> Report {
    let counts = sum(reports.iter().flat_map(|report| report.counts));
    let skipped = |idx: usize| reports.iter().map(|report| report.skipped[idx]).sum();
    Report {
        documents: counts.documents,
        text_bytes: counts.text_bytes,
        empty: skipped(0),
        binary: skipped(1),
        invalid_utf8: skipped(2),
        too_long: skipped(3),
    }
}
