//! Text in and out of token ids: the SentencePiece tokenizer (`.model` files read and written, ids equal to
//! SentencePiece's), its trainer, Hugging Face's tokenizers (`tokenizer.json`), and the reader of text corpora.
//!
//! This module knows nothing of models, devices or ranks beyond a number.

mod added;
pub mod chat;
pub mod corpus;
mod decode;
mod encode;
mod growing;
mod hash;
mod json;
pub mod model_file;
mod sentencepiece;
mod tables;
pub mod train;

use crate::artifact::{self, FileEntry, Manifest};
use crate::error::{Error, IoContext, Result};
pub use added::{AddedToken, StretchSpace};
pub use growing::GrowingText;
use json::JsonTokenizer;
pub use sentencepiece::SentencePiece;
use std::path::{Path, PathBuf};

/// Name of a SentencePiece model inside the artifacts that hold one.
pub const MODEL_FILE: &str = "tokenizer.model";
/// Name of a tokenizer of Hugging Face inside the artifacts that hold one.
pub const JSON_FILE: &str = "tokenizer.json";
/// Both; where there are two, the first counts.
pub const TOKENIZER_FILES: [&str; 2] = [MODEL_FILE, JSON_FILE];
/// Name of the list of pieces for people inside a tokenizer artifact.
pub const VOCAB_FILE: &str = "tokenizer.vocab";
/// Kind of a tokenizer artifact.
pub const ARTIFACT_KIND: &str = "tokenizer";

/// The tokenizer among the files of an artifact.
pub fn file_of(manifest: &Manifest) -> Option<&FileEntry> {
    TOKENIZER_FILES.iter().find_map(|name| manifest.file(name))
}

/// Under which name the bytes of a tokenizer go into an artifact: [`JSON_FILE`] when they are JSON, else [`MODEL_FILE`].
pub fn file_name(bytes: &[u8]) -> &'static str {
    // As the tag of a protobuf field, the brace would begin a group, which a `.model` has none of.
    if bytes.first() == Some(&b'{') { JSON_FILE } else { MODEL_FILE }
}

/// Whether Python's `str.isspace` holds for a character: Unicode's white space and the four separators of ASCII.
pub fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// A tokenizer, ready to encode and decode; threads share it.
pub struct Tokenizer {
    file_bytes: Vec<u8>,
    sort: Sort,
    special: Special,
}

enum Sort {
    SentencePiece(Box<SentencePiece>),
    Json(Box<JsonTokenizer>),
}

/// Ids with a meaning of their own.
#[derive(Clone, Copy, Default)]
struct Special {
    unk: Option<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer {{ {} pieces, {} }}", self.vocab_size(), self.fingerprint())
    }
}

impl Tokenizer {
    /// The token that a `tokenizer.json` asks to be put before every text; none of what is encoded here has it.
    pub fn first_added(&self) -> Option<u32> {
        match &self.sort {
            Sort::SentencePiece(_) => None,
            Sort::Json(tokenizer) => tokenizer.first_added(),
        }
    }

    /// Opens a SentencePiece `.model`, a `tokenizer.json`, or a tokenizer artifact (whose checksum is then compared). Errors: no
    /// such file, neither of the two, damaged, or of a sort that is not supported (unigram `.model`, ..).
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let file = if path.is_dir() { artifact_model(path)? } else { path.to_path_buf() };
        let bytes = std::fs::read(&file).at(&file)?;
        Tokenizer::from_bytes(bytes, &file)
    }

    /// A tokenizer from the bytes of its file; `origin` is named in errors.
    pub fn from_bytes(bytes: Vec<u8>, origin: &Path) -> Result<Tokenizer> {
        let (sort, special) = match file_name(&bytes) {
            JSON_FILE => {
                let json = JsonTokenizer::from_bytes(&bytes, origin)?;
                let special = json.special();
                (Sort::Json(Box::new(json)), special)
            }
            _ => {
                let sentencepiece = SentencePiece::from_bytes(&bytes, origin)?;
                let special = sentencepiece.special();
                (Sort::SentencePiece(Box::new(sentencepiece)), special)
            }
        };
        Ok(Tokenizer { file_bytes: bytes, sort, special })
    }

    /// The ids of a text; no beginning or end is added. Equal to SentencePiece's `encode(text, out_type=int)`, or to tokenizers'
    /// `encode(text, add_special_tokens=False)`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        self.encode_into(text, &mut ids);
        ids
    }

    /// Like [`Tokenizer::encode`], appending to `ids`.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => {
                tokenizer.encode_with(text, ids);
            }
            Sort::Json(tokenizer) => tokenizer.encode_into(text, ids),
        }
    }

    /// The ids of a text in which tokens stand by their names, as transformers reads prompts and what a chat template writes: all that a
    /// `tokenizer.json` lists, or the control pieces of a `.model` and what was added to it.
    pub fn encode_named(&self, text: &str) -> Vec<u32> {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => {
                let mut ids = Vec::with_capacity(text.len() / 3 + 8);
                tokenizer.encode_named(text, &mut ids);
                ids
            }
            Sort::Json(_) => self.encode(text),
        }
    }

    /// A `.model` with tokens that a directory of Hugging Face adds, and the space before stretches of text between named tokens. A
    /// `tokenizer.json` knows its own and stays as it is.
    pub fn with_added(self, added: Vec<AddedToken>, space: StretchSpace) -> Tokenizer {
        match self.sort {
            Sort::SentencePiece(tokenizer) => Tokenizer { sort: Sort::SentencePiece(Box::new(tokenizer.with_added(added, space))), ..self },
            Sort::Json(_) => self,
        }
    }

    /// The ids of bytes that may not be UTF-8: every bad byte counts as U+FFFD, as in SentencePiece.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.encode(text),
            Err(_) => self.encode(&encode::repair(bytes)),
        }
    }

    /// The text of ids, as SentencePiece, or tokenizers with `skip_special_tokens`, decodes it: control pieces vanish, bytes that
    /// are no character become U+FFFD each (SentencePiece) or together (tokenizers); SentencePiece's unknown, and any id outside
    /// its vocabulary, becomes " \u{2047} ".
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => tokenizer.decode(ids),
            Sort::Json(tokenizer) => tokenizer.decode(ids),
        }
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => tokenizer.vocab_size(),
            Sort::Json(tokenizer) => tokenizer.vocab_size(),
        }
    }

    /// The id of a piece by its text in the model.
    pub fn id_of(&self, piece: &str) -> Option<u32> {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => tokenizer.id_of(piece),
            Sort::Json(tokenizer) => tokenizer.id_of(piece),
        }
    }

    /// The text of a piece as the model has it; None for an id outside the vocabulary.
    pub fn piece_text(&self, id: u32) -> Option<String> {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => tokenizer.text_of(id).map(String::from),
            Sort::Json(tokenizer) => tokenizer.token_of(id),
        }
    }

    /// The SentencePiece model, if it is one.
    pub fn sentencepiece(&self) -> Option<&SentencePiece> {
        match &self.sort {
            Sort::SentencePiece(tokenizer) => Some(tokenizer),
            Sort::Json(_) => None,
        }
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

    /// The file as it was read.
    pub fn file_bytes(&self) -> &[u8] {
        &self.file_bytes
    }

    /// The name under which [`Tokenizer::file_bytes`] goes into an artifact.
    pub fn file_name(&self) -> &'static str {
        file_name(&self.file_bytes)
    }

    /// xxh3-64 of the file, 16 hex digits: what shards and checkpoints remember of their tokenizer.
    pub fn fingerprint(&self) -> String {
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&self.file_bytes))
    }
}

/// The checked model file of a tokenizer artifact.
fn artifact_model(dir: &Path) -> Result<PathBuf> {
    let manifest = Manifest::open(dir, ARTIFACT_KIND)?;
    let entry = file_of(&manifest).ok_or_else(|| {
        let wrong = format!("the manifest lists no {MODEL_FILE}");
        Error::file(dir, wrong).remedy("train the tokenizer again")
    })?;
    artifact::verify_file(dir, entry)?;
    Ok(dir.join(&entry.name))
}
