//! Text in and out of token ids: the SentencePiece tokenizer (`.model` files read and written, ids equal to
//! SentencePiece's), its trainer, and the reader of text corpora.
//!
//! This module knows nothing of models, devices or ranks beyond a number.

pub mod corpus;
mod decode;
mod encode;
mod hash;

pub mod model_file;
mod tables;
pub mod train;

use crate::artifact::{self, Manifest};
use crate::error::{Error, IoContext, Result};
use decode::Decoder;
use encode::Scratch;
use model_file::{ModelFile, Piece, PieceKind, TrainerSpec};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tables::Tables;

/// Name of the model inside a tokenizer artifact and inside a checkpoint.
pub const MODEL_FILE: &str = "tokenizer.model";
/// Name of the list of pieces for people inside a tokenizer artifact.
pub const VOCAB_FILE: &str = "tokenizer.vocab";
/// Kind of a tokenizer artifact.
pub const ARTIFACT_KIND: &str = "tokenizer";

/// A SentencePiece BPE model, ready to encode and decode; threads share it.
pub struct Tokenizer {
    file_bytes: Vec<u8>,
    pieces: Vec<Piece>,
    tables: Tables,
    decoder: Decoder,
    special: Special,
    /// Workspaces of the encoder that no call uses just now.
    idle: Mutex<Vec<Scratch>>,
}

struct Special {
    unk: Option<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer {{ {} pieces, {} }}", self.pieces.len(), self.fingerprint())
    }
}

impl Tokenizer {
    /// Opens a `.model` file, or a tokenizer artifact (whose checksum is then compared). Errors: no such file, not a
    /// SentencePiece model, damaged, or of a sort that is not supported (unigram, normalisation other than identity, ..).
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let file = if path.is_dir() { artifact_model(path)? } else { path.to_path_buf() };
        let bytes = std::fs::read(&file).at(&file)?;
        Tokenizer::from_bytes(bytes, &file)
    }

    /// A tokenizer from the bytes of a `.model`; `origin` is named in errors.
    pub fn from_bytes(bytes: Vec<u8>, origin: &Path) -> Result<Tokenizer> {
        let model = ModelFile::parse(origin, &bytes)?;
        let pieces = model.checked_pieces(origin)?;
        let decoder = Decoder {
            unk_surface: model.trainer.unk_surface.clone().unwrap_or_else(|| " \u{2047} ".into()),
            dummy_prefix: model.normalizer.add_dummy_prefix.unwrap_or(true),
        };
        let special = special_ids(&model.trainer, &pieces);
        let tables = Tables::new(&pieces);
        Ok(Tokenizer { file_bytes: bytes, pieces, tables, decoder, special, idle: Mutex::new(Vec::new()) })
    }

    /// The ids of a text; no beginning or end is added. Equal to SentencePiece's `encode(text, out_type=int)`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        self.encode_into(text, &mut ids);
        ids
    }

    /// Like [`Tokenizer::encode`], appending to `ids`.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        self.encode_with(text, ids);
    }

    /// The ids of bytes that may not be UTF-8: every bad byte counts as U+FFFD, as in SentencePiece.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.encode(text),
            Err(_) => self.encode(&encode::repair(bytes)),
        }
    }

    /// The ids, and how many pairs of symbols were looked at: the work done, free of clocks. O(n log n) for any text; a
    /// text met before may cost less.
    pub fn encode_counting(&self, text: &str) -> (Vec<u32>, u64) {
        let mut ids = Vec::new();
        let operations = self.encode_with(text, &mut ids);
        (ids, operations)
    }

    fn encode_with(&self, text: &str, ids: &mut Vec<u32>) -> u64 {
        if text.is_empty() {
            return 0;
        }
        let mut scratch = self.idle.lock().expect("no panic while held").pop().unwrap_or_else(Scratch::new);
        let before = scratch.operations;
        if self.decoder.dummy_prefix {
            encode::encode(&self.tables, &format!(" {text}"), &mut scratch, ids);
        } else {
            encode::encode(&self.tables, text, &mut scratch, ids);
        }
        let operations = scratch.operations - before;
        self.idle.lock().expect("no panic while held").push(scratch);
        operations
    }

    /// The text of ids, as SentencePiece decodes it: control pieces vanish, bytes that are no character become U+FFFD each,
    /// unknown (and any id outside the vocabulary) becomes " \u{2047} ".
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decoder.decode(&self.pieces, ids)
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The piece of an id as the model has it: U+2581 for a space, `<0x0A>` for a byte.
    ///
    /// # Panics
    /// When `id` is not below [`Tokenizer::vocab_size`].
    pub fn piece(&self, id: u32) -> &str {
        &self.pieces[id as usize].text
    }

    /// What the piece of an id is; panics like [`Tokenizer::piece`].
    pub fn kind(&self, id: u32) -> PieceKind {
        self.pieces[id as usize].kind
    }

    /// The id of a piece by its text in the model.
    pub fn id_of(&self, piece: &str) -> Option<u32> {
        self.pieces.iter().position(|found| found.text == piece).map(|id| id as u32)
    }

    /// Beginning of sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// End of sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// Unknown.
    pub fn unk_id(&self) -> Option<u32> {
        self.special.unk
    }

    /// Padding.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad
    }

    /// The `.model` as it was read.
    pub fn file_bytes(&self) -> &[u8] {
        &self.file_bytes
    }

    /// xxh3-64 of the `.model`, 16 hex digits: what shards and checkpoints remember of their tokenizer.
    pub fn fingerprint(&self) -> String {
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&self.file_bytes))
    }
}

/// The checked model file of a tokenizer artifact.
fn artifact_model(dir: &Path) -> Result<PathBuf> {
    let manifest = Manifest::open(dir, ARTIFACT_KIND)?;
    let entry = manifest.file(MODEL_FILE).ok_or_else(|| {
        let wrong = format!("the manifest lists no {MODEL_FILE}");
        Error::file(dir, wrong).remedy("train the tokenizer again")
    })?;
    artifact::verify_file(dir, entry)?;
    Ok(dir.join(MODEL_FILE))
}

/// The special ids as SentencePiece finds them: by the piece's name in the trainer spec, and only when it is a control
/// piece (or, for unknown, the unknown piece).
fn special_ids(spec: &TrainerSpec, pieces: &[Piece]) -> Special {
    let find = |name: &Option<String>, default: &str, kind: PieceKind| {
        let name = name.as_deref().filter(|name| !name.is_empty()).unwrap_or(default);
        pieces.iter().position(|piece| piece.text == name && piece.kind == kind).map(|id| id as u32)
    };
    Special {
        unk: pieces.iter().position(|piece| piece.kind == PieceKind::Unknown).map(|id| id as u32),
        bos: find(&spec.bos_piece, "<s>", PieceKind::Control),
        eos: find(&spec.eos_piece, "</s>", PieceKind::Control),
        pad: find(&spec.pad_piece, "<pad>", PieceKind::Control),
    }
}
