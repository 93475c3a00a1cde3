//! Training a SentencePiece BPE model with Nemotron-4's settings (byte fallback, digits alone, whitespace kept, identity
//! normalisation, no dummy prefix), following SentencePiece's own trainer (trainer_interface.cc, bpe_model_trainer.cc):
//! count words, then merge the most frequent pair of neighbours again and again.
//!
//! Differences from SentencePiece, on purpose: counts are 64-bit and exact (no pruned list of candidates); a pair that joins
//! to a piece that is there already is merged at once, as the encoder will; tabs may be part of pieces; line length has no
//! limit. The model is a function of the set of texts and the settings: not of threads, ranks, the order of files, or
//! memory. Ties between equally frequent pairs go to the piece of fewer characters, then to the smaller in UTF-8 order.
//!
//! Ids: `<unk>` 0, `<pad>` 1, `<s>` 2, `</s>` 3 (2 and 3 as in the published Nemotron configurations), `<extra_id_*>`, the 256
//! byte pieces, merges in the order they were made, characters by falling count.
//!
//! Memory: about 150 bytes and 10 more a character for every distinct word of the sample (in counting: for every thread that
//! met it), a word being at most [`MAX_WORD_CHARS`] characters, and the sample at most `sample_bytes`. This module knows nothing of files
//! but through the corpus.

mod count;
mod merge;
mod script;

use super::Tokenizer;
use super::corpus::{Corpus, Report as CorpusReport};
use super::model_file::{ModelFile, ModelProto, NormalizerSpec, PieceKind, PieceProto, TrainerSpec};
use super::tables::SPACE_MARK;
use crate::error::{Error, Kind, Result};
use count::Counted;
use merge::Merged;
use prost::Message;
use std::path::Path;

/// Words are cut after so many characters; no piece is as long.
pub const MAX_WORD_CHARS: usize = 128;
/// The longest piece, in characters (SentencePiece's default).
pub const MAX_PIECE_CHARS: usize = 16;
/// Share of the characters of the text that get a piece; the rest falls back to bytes (SentencePiece's default).
pub const CHARACTER_COVERAGE: f64 = 0.9995;
/// Text to count at most, unless told otherwise.
pub const SAMPLE_BYTES: u64 = 4 << 30;
/// How many words the report and the check of frequent words look at.
const N_REPORTED_WORDS: usize = 20;

/// What to train.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Number of pieces, all sorts together.
    pub vocab_size: usize,
    /// Number of user-defined pieces `<extra_id_0>`, `<extra_id_1>`, ..
    pub n_extra_ids: usize,
    /// 0.98 to 1: this share of the characters of the text gets a piece.
    pub character_coverage: f64,
    /// More text than this is sampled: blocks of lines, spread over the corpus by a hash of their content.
    pub sample_bytes: u64,
    /// Threads to count with; the result does not depend on it.
    pub n_threads: usize,
}

impl Settings {
    /// Nemotron-4's settings with this many pieces.
    pub fn new(vocab_size: usize) -> Settings {
        Settings {
            vocab_size,
            n_extra_ids: 3,
            character_coverage: CHARACTER_COVERAGE,
            sample_bytes: SAMPLE_BYTES,
            n_threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Refuses settings out of range, before anything is read.
    pub fn check(&self) -> Result<()> {
        if !(0.98..=1.0).contains(&self.character_coverage) {
            let wrong = format!("character coverage {}, expected 0.98 to 1", self.character_coverage);
            return Err(Error::recipe(wrong).remedy("choose a value in that range (0.9995 is usual)"));
        }
        if self.sample_bytes < 1 << 20 {
            let wrong = format!("a sample of {} bytes, expected at least 1048576 (1 MiB)", self.sample_bytes);
            return Err(Error::recipe(wrong).remedy("raise --sample-bytes"));
        }
        let least = self.n_special() + 1;
        if self.vocab_size < least || self.vocab_size > 1 << 24 {
            let wrong = format!("vocabulary size {}, expected {least} to {}", self.vocab_size, 1 << 24);
            return Err(Error::recipe(wrong).remedy("choose another --vocab-size (256000 for Nemotron-4)"));
        }
        Ok(())
    }

    /// Pieces that do not come from the text.
    fn n_special(&self) -> usize {
        4 + self.n_extra_ids + 256
    }

    fn extra_ids(&self) -> Vec<String> {
        (0..self.n_extra_ids).map(|i| format!("<extra_id_{i}>")).collect()
    }
}

/// A trained model and what there is to say about it.
pub struct Trained {
    /// The `.model` file.
    pub model_bytes: Vec<u8>,
    /// The `.vocab` file: a piece and its score a line (tabs inside pieces written `\t`).
    pub vocab_text: String,
    /// In numbers.
    pub report: Report,
}

/// A training run in numbers.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// What was read.
    pub corpus: CorpusReport,
    /// Bytes of it that were counted.
    pub sample_bytes: u64,
    /// Different words counted.
    pub distinct_words: usize,
    /// Characters that got a piece.
    pub n_characters: usize,
    /// Share of the sample's characters they make up.
    pub covered: f64,
    /// Merges made.
    pub n_merges: usize,
    /// How often the last merge was found.
    pub last_merge_count: u64,
    /// Bytes of text per token, on up to 1 MiB of the sample.
    pub bytes_per_token: f64,
    /// The most frequent words, how often they were met, and how many tokens they are.
    pub frequent_words: Vec<(String, u64, usize)>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "read          {}", self.corpus)?;
        writeln!(f, "sample        {} bytes, {} different words", self.sample_bytes, self.distinct_words)?;
        writeln!(f, "characters    {} pieces cover {:.3} % of the text, the rest is bytes", self.n_characters, 100.0 * self.covered)?;
        writeln!(f, "merges        {}, the last seen {} times", self.n_merges, self.last_merge_count)?;
        writeln!(f, "compression   {:.3} bytes per token", self.bytes_per_token)?;
        let words: Vec<String> = self.frequent_words.iter().map(|(word, _, tokens)| format!("{word:?} {tokens}")).collect();
        write!(f, "most frequent {} (word, tokens)", words.join(", "))
    }
}

/// Trains a model on a corpus. Errors: settings out of range, what the corpus reader finds, a corpus without text, and a
/// vocabulary larger than the text can fill (named with the largest possible) or smaller than its characters.
pub fn train(corpus: &Corpus, settings: &Settings) -> Result<Trained> {
    settings.check()?;
    let counted = count::count(corpus, settings)?;
    if counted.words.is_empty() {
        return Err(
            Error::new(Kind::File, format!("an empty corpus: {}", counted.corpus)).remedy("name files or folders with text in them")
        );
    }
    let n_wanted = settings.vocab_size - settings.n_special();
    let merged = merge::merge(&counted.words, settings.character_coverage, n_wanted)?;
    let n_reached = settings.n_special() + merged.characters.len() + merged.pieces.len();
    if n_reached < settings.vocab_size {
        let wrong = format!("vocabulary size {} is too large for this text: {n_reached} is the largest it can fill", settings.vocab_size);
        return Err(Error::recipe(wrong).remedy(format!("set --vocab-size to at most {n_reached}, or add text")));
    }
    let model_bytes = model_file(settings, &merged).to_bytes();
    let tokenizer = Tokenizer::from_bytes(model_bytes.clone(), Path::new("the model just trained")).expect("we write models we can read");
    check(&tokenizer, &counted, &merged);
    let report = report(&tokenizer, &counted, &merged);
    let vocab_text = vocab_text(&tokenizer, &merged);
    Ok(Trained { model_bytes, vocab_text, report })
}

/// The model in SentencePiece's messages.
fn model_file(settings: &Settings, merged: &Merged) -> ModelFile {
    let piece = |text: &str, score: f32, kind: PieceKind| PieceProto {
        piece: Some(text.into()),
        score: Some(score),
        r#type: (kind != PieceKind::Normal).then_some(kind as i32),
    };
    let mut pieces = vec![piece("<unk>", 0.0, PieceKind::Unknown)];
    pieces.extend(["<pad>", "<s>", "</s>"].map(|text| piece(text, 0.0, PieceKind::Control)));
    pieces.extend(settings.extra_ids().iter().map(|text| piece(text, 0.0, PieceKind::UserDefined)));
    pieces.extend((0..256).map(|byte| piece(&format!("<0x{byte:02X}>"), 0.0, PieceKind::Byte)));
    let texts = merged.pieces.iter().map(|text| text.to_string()).chain(merged.characters.iter().map(|c| c.to_string()));
    for (i, text) in texts.enumerate() {
        pieces.push(piece(&text.replace(' ', "\u{2581}"), -(i as f32), PieceKind::Normal));
    }
    let trainer = TrainerSpec {
        model_type: Some(2),
        vocab_size: Some(settings.vocab_size as i32),
        character_coverage: Some(settings.character_coverage as f32),
        max_sentencepiece_length: Some(MAX_PIECE_CHARS as i32),
        split_digits: Some(true),
        allow_whitespace_only_pieces: Some(true),
        user_defined_symbols: settings.extra_ids(),
        byte_fallback: Some(true),
        unk_id: Some(0),
        bos_id: Some(2),
        eos_id: Some(3),
        pad_id: Some(1),
        ..TrainerSpec::default()
    };
    let normalizer = NormalizerSpec {
        name: Some("identity".into()),
        precompiled_charsmap: Some(Vec::new()),
        add_dummy_prefix: Some(false),
        remove_extra_whitespaces: Some(false),
        escape_whitespaces: Some(true),
        ..NormalizerSpec::default()
    };
    let proto = ModelProto {
        pieces,
        trainer_spec: Some(trainer.encode_to_vec()),
        normalizer_spec: Some(normalizer.encode_to_vec()),
        ..ModelProto::default()
    };
    ModelFile { proto, unknown: Vec::new(), trainer, normalizer }
}

/// The promises of a trained model: the encoder cuts every counted word as the trainer did; a word that could be a piece and
/// was met more often than the last merge is one token (its last two parts would have been merged otherwise); text survives.
fn check(tokenizer: &Tokenizer, counted: &Counted, merged: &Merged) {
    for (word_idx, (word, count)) in counted.words.iter().enumerate() {
        let ids = tokenizer.encode(word);
        let expected = merged.n_parts(word_idx, word);
        assert!(ids.len() == expected, "{word:?} is {} tokens, and was {expected} in training", ids.len());
        if *count > merged.last_count && merged.could_be_piece(word) {
            assert!(ids.len() == 1, "{word:?}, met {count} times, is {} tokens", ids.len());
        }
    }
    for text in counted.kept_texts() {
        let found = tokenizer.decode(&tokenizer.encode(text));
        assert!(found == text.replace(SPACE_MARK, " "), "a text of {} bytes does not survive encoding and decoding", text.len());
    }
}

fn report(tokenizer: &Tokenizer, counted: &Counted, merged: &Merged) -> Report {
    let (mut bytes, mut tokens) = (0, 0);
    for text in counted.kept_texts() {
        bytes += text.len();
        tokens += tokenizer.encode(text).len();
    }
    let is_word = |word: &str| word.chars().any(char::is_alphabetic);
    let mut frequent: Vec<&(Box<str>, u64)> = counted.words.iter().filter(|(word, _)| is_word(word)).collect();
    frequent.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    frequent.truncate(N_REPORTED_WORDS);
    Report {
        corpus: counted.corpus,
        sample_bytes: counted.sample_bytes,
        distinct_words: counted.words.len(),
        n_characters: merged.characters.len(),
        covered: merged.covered,
        n_merges: merged.pieces.len(),
        last_merge_count: merged.last_count,
        bytes_per_token: bytes as f64 / tokens.max(1) as f64,
        frequent_words: frequent.iter().map(|(word, count)| (word.to_string(), *count, tokenizer.encode(word).len())).collect(),
    }
}

fn vocab_text(tokenizer: &Tokenizer, merged: &Merged) -> String {
    let n_scored = merged.pieces.len() + merged.characters.len();
    let first = tokenizer.vocab_size() - n_scored;
    let pieces = tokenizer.sentencepiece().expect("a model just trained");
    (0..tokenizer.vocab_size())
        .map(|id| {
            let score = if id > first { -((id - first) as i64) } else { 0 };
            format!("{}\t{score}\n", pieces.piece(id as u32).replace('\t', "\\t"))
        })
        .collect()
}
