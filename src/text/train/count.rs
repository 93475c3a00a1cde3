//! Counts the words of a corpus with threads, in one pass and bounded memory.
//!
//! A word is what no piece can cross: a run of spaces and the text up to the next, cut further at digits, at changes of script,
//! at controls and after [`MAX_WORD_CHARS`] characters. Sampling is by blocks of lines of about 64 KiB: a hash of the block's
//! content gives it a level (half of all blocks have level 0, a quarter level 1, ..), and the sample is all blocks of level
//! L and up, L being the smallest that keeps the sample within its bytes. So it depends on neither threads nor order, and
//! half to all of the bytes asked for are used. This file knows nothing of merges.

use super::script::{Sort, Sorts};
use super::{MAX_WORD_CHARS, Settings};
use crate::error::Result;
use crate::text::corpus::{Corpus, Report};
use crate::text::hash::FoldBuild;
use crate::text::tables::SPACE_MARK;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::xxh3_64;

const BLOCK_BYTES: usize = 64 << 10;
const N_LEVELS: usize = 24;
/// Text kept to measure and check the model on.
const KEPT_BYTES: usize = 1 << 20;

type Counts = HashMap<Box<str>, u64, FoldBuild>;

/// The words of a corpus.
pub struct Counted {
    /// Every different word (spaces as spaces) and how often it was met, in UTF-8 order.
    pub words: Vec<(Box<str>, u64)>,
    /// Bytes of the sample.
    pub sample_bytes: u64,
    /// What the reader met.
    pub corpus: Report,
    kept: Kept,
}

impl Counted {
    /// Blocks of the corpus, 1 MiB at most, chosen by hash.
    pub fn kept_texts(&self) -> impl Iterator<Item = &str> {
        self.kept.blocks.values().map(String::as_str)
    }
}

/// Counts all words, or those of a sample.
pub fn count(corpus: &Corpus, settings: &Settings) -> Result<Counted> {
    let sorts = Sorts::new();
    let level_bytes: [AtomicU64; N_LEVELS] = std::array::from_fn(|_| AtomicU64::new(0));
    let n_threads = settings.n_threads.max(1);
    let worker = |thread: usize| -> Result<Worker> {
        let mut worker = Worker::new(&sorts, settings, &level_bytes);
        let mut documents = corpus.documents(thread, n_threads);
        for document in &mut documents {
            worker.add_document(&document?.text);
        }
        worker.corpus = documents.report();
        Ok(worker)
    };
    let workers: Vec<Result<Worker>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..n_threads).map(|thread| scope.spawn(move || worker(thread))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a counting thread does not panic")).collect()
    });
    let lowest = lowest_level(&level_bytes, settings.sample_bytes);
    let sample_bytes = level_bytes[lowest..].iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum();
    let (mut total, mut report, mut kept) = (Counts::default(), Report::default(), Kept::default());
    for worker in workers {
        let worker = worker?;
        report += worker.corpus;
        for (word, count) in worker.levels.into_iter().skip(lowest).flatten() {
            *total.entry(word).or_insert(0) += count;
        }
        worker.kept.blocks.into_iter().for_each(|(hash, block)| kept.add(hash, || block));
    }
    let mut words: Vec<(Box<str>, u64)> = total.into_iter().collect();
    words.sort_unstable();
    Ok(Counted { words, sample_bytes, corpus: report, kept })
}

/// The lowest level whose blocks, with those of all higher ones, are at most `limit` bytes.
fn lowest_level(level_bytes: &[AtomicU64; N_LEVELS], limit: u64) -> usize {
    let mut sum = 0u64;
    for level in (0..N_LEVELS).rev() {
        sum += level_bytes[level].load(Ordering::Relaxed);
        if sum > limit {
            return (level + 1).min(N_LEVELS - 1);
        }
    }
    0
}

/// The texts of the smallest hashes, as many as fit: the same set in whatever order they come.
#[derive(Default)]
struct Kept {
    blocks: BTreeMap<u64, String>,
    bytes: usize,
}

impl Kept {
    fn add(&mut self, hash: u64, block: impl FnOnce() -> String) {
        let is_full = self.bytes >= KEPT_BYTES;
        if is_full && self.blocks.last_key_value().is_some_and(|(&last, _)| hash > last) || self.blocks.contains_key(&hash) {
            return;
        }
        let block = block();
        self.bytes += block.len();
        self.blocks.insert(hash, block);
        while self.bytes - self.blocks.last_key_value().map_or(0, |(_, last)| last.len()) >= KEPT_BYTES {
            self.bytes -= self.blocks.pop_last().expect("not empty").1.len();
        }
    }
}

/// One thread's counts.
struct Worker<'a> {
    sorts: &'a Sorts,
    settings: &'a Settings,
    level_bytes: &'a [AtomicU64; N_LEVELS],
    /// Levels below the lowest that can still be in the sample are empty.
    levels: Vec<Counts>,
    kept: Kept,
    corpus: Report,
}

impl<'a> Worker<'a> {
    fn new(sorts: &'a Sorts, settings: &'a Settings, level_bytes: &'a [AtomicU64; N_LEVELS]) -> Worker<'a> {
        let levels = (0..N_LEVELS).map(|_| Counts::default()).collect();
        Worker { sorts, settings, level_bytes, levels, kept: Kept::default(), corpus: Report::default() }
    }

    fn add_document(&mut self, text: &str) {
        let mut rest = text;
        while !rest.is_empty() {
            let after = rest.as_bytes().get(BLOCK_BYTES..).and_then(|tail| tail.iter().position(|&byte| byte == b'\n'));
            let (block, next) = rest.split_at(after.map_or(rest.len(), |at| BLOCK_BYTES + at + 1));
            self.add_block(block);
            rest = next;
        }
    }

    fn add_block(&mut self, block: &str) {
        let hash = xxh3_64(block.as_bytes());
        let level = (hash.leading_zeros() as usize).min(N_LEVELS - 1);
        self.level_bytes[level].fetch_add(block.len() as u64, Ordering::Relaxed);
        let lowest = lowest_level(self.level_bytes, self.settings.sample_bytes);
        self.levels[..lowest].iter_mut().filter(|counts| !counts.is_empty()).for_each(|counts| *counts = Counts::default());
        if level < lowest {
            return;
        }
        self.kept.add(hash, || {
            let end = (0..=block.len().min(2 * BLOCK_BYTES)).rev().find(|&at| block.is_char_boundary(at));
            block[..end.expect("zero is a boundary")].to_string()
        });
        let (sorts, counts) = (self.sorts, &mut self.levels[level]);
        let folded;
        let text = match block.contains(SPACE_MARK) {
            true => {
                folded = block.replace(SPACE_MARK, " ");
                &folded
            }
            false => block,
        };
        for part in between_extra_ids(text, self.settings.n_extra_ids) {
            for_each_word(sorts, part, |word| match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(counts.insert(word.into(), 1)),
            });
        }
    }
}

/// The text between `<extra_id_0>` .. `<extra_id_{n-1}>`, which the encoder cuts out before anything else.
fn between_extra_ids(text: &str, n: usize) -> Vec<&str> {
    const START: &str = "<extra_id_";
    let (mut parts, mut part_start, mut at) = (Vec::new(), 0, 0);
    while let Some(found) = text[at..].find(START).map(|found| at + found) {
        at = found + START.len();
        let digits = text[at..].bytes().take_while(u8::is_ascii_digit).count();
        let number = &text[at..at + digits];
        let is_canonical = number == "0" || !number.starts_with('0');
        if is_canonical && number.parse().is_ok_and(|id: usize| id < n) && text[at + digits..].starts_with('>') {
            parts.push(&text[part_start..found]);
            at += digits + 1;
            part_start = at;
        }
    }
    parts.push(&text[part_start..]);
    parts
}

/// The words of a text.
fn for_each_word<'t>(sorts: &Sorts, text: &'t str, mut found: impl FnMut(&'t str)) {
    let (mut start, mut n_chars, mut before) = (0, 0, Sort::Separator);
    for (at, c) in text.char_indices() {
        let sort = sorts.get(c);
        if !Sorts::may_touch(before, sort) || n_chars == MAX_WORD_CHARS {
            if before != Sort::Separator {
                found(&text[start..at]);
            }
            (start, n_chars) = (at, 0);
        }
        (before, n_chars) = (sort, n_chars + 1);
    }
    if before != Sort::Separator {
        found(&text[start..]);
    }
}
