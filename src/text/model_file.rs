//! The SentencePiece `.model` file: the protobuf messages of sentencepiece_model.proto (github.com/google/sentencepiece),
//! derived by hand, and the checks that a model is one this crate can follow exactly.
//!
//! The trainer, normaliser, self-test and denormaliser specs are kept as the bytes they came as, and so is every top-level
//! field of an unknown number, so that a model that is read and written again loses nothing. This file knows nothing of
//! encoding.

use crate::error::{Error, Result};
use prost::Message;
use std::collections::HashSet;
use std::path::Path;

/// `sentencepiece.ModelProto`, with the specs undecoded.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// The vocabulary; a piece's id is its place here.
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<PieceProto>,
    /// A [`TrainerSpec`], encoded.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub trainer_spec: Option<Vec<u8>>,
    /// A [`NormalizerSpec`], encoded.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub normalizer_spec: Option<Vec<u8>>,
    /// Samples for SentencePiece's own self-test, encoded.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub self_test_data: Option<Vec<u8>>,
    /// A [`NormalizerSpec`] for decoding, encoded.
    #[prost(bytes = "vec", optional, tag = "5")]
    pub denormalizer_spec: Option<Vec<u8>>,
}

/// `sentencepiece.ModelProto.SentencePiece`.
#[derive(Clone, PartialEq, Message)]
pub struct PieceProto {
    /// Its text, U+2581 for a space.
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    /// Larger merges earlier.
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    /// What it is; normal when absent.
    #[prost(enumeration = "PieceKind", optional, tag = "3")]
    pub r#type: Option<i32>,
}

/// What a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PieceKind {
    /// A character or a merge.
    Normal = 1,
    /// What stands for text that has no piece.
    Unknown = 2,
    /// Never matched from text, decodes to nothing.
    Control = 3,
    /// Matched in text before anything else, and never merged.
    UserDefined = 4,
    /// Merged over, but never emitted (not supported here).
    Unused = 5,
    /// One byte of a character that has no piece.
    Byte = 6,
}

/// `sentencepiece.NormalizerSpec`: the fields that decide about ids.
#[derive(Clone, PartialEq, Message)]
pub struct NormalizerSpec {
    /// "identity", "nmt_nfkc", ..
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// The compiled character map; empty for identity.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// A space before the text; true when absent.
    #[prost(bool, optional, tag = "3")]
    pub add_dummy_prefix: Option<bool>,
    /// Leading, trailing and repeated spaces are dropped; true when absent.
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    /// Space becomes U+2581; true when absent.
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
    /// Source of the character map.
    #[prost(string, optional, tag = "6")]
    pub normalization_rule_tsv: Option<String>,
}

/// `sentencepiece.TrainerSpec`: the fields that decide about ids, or that our own trainer sets.
#[derive(Clone, PartialEq, Message)]
pub struct TrainerSpec {
    /// 1 unigram, 2 BPE, 3 word, 4 character; unigram when absent.
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
    /// Number of pieces.
    #[prost(int32, optional, tag = "4")]
    pub vocab_size: Option<i32>,
    /// Share of the characters of the text that must have a piece.
    #[prost(float, optional, tag = "10")]
    pub character_coverage: Option<f32>,
    /// Longest piece, in characters.
    #[prost(int32, optional, tag = "20")]
    pub max_sentencepiece_length: Option<i32>,
    /// No piece across scripts.
    #[prost(bool, optional, tag = "21")]
    pub split_by_unicode_script: Option<bool>,
    /// No piece across spaces.
    #[prost(bool, optional, tag = "22")]
    pub split_by_whitespace: Option<bool>,
    /// No piece across the edge of a number.
    #[prost(bool, optional, tag = "23")]
    pub split_by_number: Option<bool>,
    /// The space belongs to the word before it.
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    /// Every digit alone.
    #[prost(bool, optional, tag = "25")]
    pub split_digits: Option<bool>,
    /// Pieces of spaces only.
    #[prost(bool, optional, tag = "26")]
    pub allow_whitespace_only_pieces: Option<bool>,
    /// Pieces of [`PieceKind::Control`].
    #[prost(string, repeated, tag = "30")]
    pub control_symbols: Vec<String>,
    /// Pieces of [`PieceKind::UserDefined`].
    #[prost(string, repeated, tag = "31")]
    pub user_defined_symbols: Vec<String>,
    /// The `.vocab` file has scores.
    #[prost(bool, optional, tag = "32")]
    pub vocabulary_output_piece_score: Option<bool>,
    /// `vocab_size` is exact.
    #[prost(bool, optional, tag = "33")]
    pub hard_vocab_limit: Option<bool>,
    /// Characters without a piece become bytes.
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    /// Id of the unknown piece.
    #[prost(int32, optional, tag = "40")]
    pub unk_id: Option<i32>,
    /// Id of beginning-of-sequence, -1 for none.
    #[prost(int32, optional, tag = "41")]
    pub bos_id: Option<i32>,
    /// Id of end-of-sequence, -1 for none.
    #[prost(int32, optional, tag = "42")]
    pub eos_id: Option<i32>,
    /// Id of padding, -1 for none.
    #[prost(int32, optional, tag = "43")]
    pub pad_id: Option<i32>,
    /// What the unknown piece decodes to; " \u{2047} " when absent.
    #[prost(string, optional, tag = "44")]
    pub unk_surface: Option<String>,
    /// Text of the unknown piece.
    #[prost(string, optional, tag = "45")]
    pub unk_piece: Option<String>,
    /// Text of beginning-of-sequence.
    #[prost(string, optional, tag = "46")]
    pub bos_piece: Option<String>,
    /// Text of end-of-sequence.
    #[prost(string, optional, tag = "47")]
    pub eos_piece: Option<String>,
    /// Text of padding.
    #[prost(string, optional, tag = "48")]
    pub pad_piece: Option<String>,
}

/// A model file: the messages, and the top-level fields this file has no name for.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelFile {
    /// The known fields.
    pub proto: ModelProto,
    /// The other top-level fields as they came, key and value.
    pub unknown: Vec<u8>,
    /// `proto.trainer_spec`, decoded.
    pub trainer: TrainerSpec,
    /// `proto.normalizer_spec`, decoded.
    pub normalizer: NormalizerSpec,
}

/// A piece as encoder and decoder want it.
#[derive(Clone, PartialEq, Debug)]
pub struct Piece {
    /// Its text, U+2581 for a space.
    pub text: String,
    /// Larger merges earlier.
    pub score: f32,
    /// What it is.
    pub kind: PieceKind,
}

impl ModelFile {
    /// Parses the bytes of a `.model`; `path` is for the messages.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<ModelFile> {
        let damaged = |what: &str, error: prost::DecodeError| {
            Error::file(path, format!("not a SentencePiece model: {what}{error}"))
                .remedy("check the path; if it is the right file, copy it again")
        };
        if bytes.is_empty() {
            return Err(Error::file(path, "an empty file, expected a SentencePiece model").remedy("copy it again"));
        }
        let proto = ModelProto::decode(bytes).map_err(|error| damaged("", error))?;
        let Some(spec) = &proto.trainer_spec else {
            let wrong = format!("{} pieces and no trainer_spec, expected a whole SentencePiece model", proto.pieces.len());
            return Err(Error::file(path, wrong).remedy("the file is truncated or something else: copy it again"));
        };
        let trainer = TrainerSpec::decode(spec.as_slice()).map_err(|error| damaged("trainer_spec: ", error))?;
        let normalizer =
            NormalizerSpec::decode(proto.normalizer_spec.as_deref().unwrap_or(&[])).map_err(|error| damaged("normalizer_spec: ", error))?;
        let unknown = unknown_fields(bytes);
        Ok(ModelFile { proto, unknown, trainer, normalizer })
    }

    /// The bytes of the `.model`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.proto.encode_to_vec();
        bytes.extend_from_slice(&self.unknown);
        bytes
    }

    /// The pieces of a model that this crate encodes and decodes exactly as SentencePiece does, or an error that names
    /// what is damaged or what the model needs.
    pub fn checked_pieces(&self, path: &Path) -> Result<Vec<Piece>> {
        self.refuse_unsupported(path)?;
        let broken = |wrong: String| Err(Error::file(path, wrong).remedy("the model is damaged: copy it again"));
        let byte_fallback = self.trainer.byte_fallback.unwrap_or(false);
        let (mut pieces, mut seen, mut bytes_seen, mut unk) = (Vec::new(), HashSet::new(), [false; 256], None);
        for (id, piece) in self.proto.pieces.iter().enumerate() {
            let text = piece.piece.clone().unwrap_or_default();
            let kind = match piece.r#type {
                None => PieceKind::Normal,
                Some(code) => match PieceKind::try_from(code) {
                    Ok(kind) => kind,
                    Err(_) => return broken(format!("piece {id} {text:?} has type {code}, expected 1 to 6")),
                },
            };
            let score = piece.score.unwrap_or(0.0);
            if text.is_empty() {
                return broken(format!("piece {id} has no text"));
            }
            if !seen.insert(text.clone()) {
                return broken(format!("piece {id} {text:?} is there twice"));
            }
            if !score.is_finite() {
                return broken(format!("piece {id} {text:?} has score {score}"));
            }
            match kind {
                PieceKind::Unknown => {
                    if let Some(first) = unk.replace(id) {
                        return broken(format!("pieces {first} and {id} are both the unknown piece"));
                    }
                }
                PieceKind::Byte => match byte_of(&text) {
                    Some(byte) if byte_fallback => bytes_seen[usize::from(byte)] = true,
                    Some(_) => return broken(format!("piece {id} {text:?} is a byte, but the model has no byte fallback")),
                    None => return broken(format!("piece {id} {text:?} has the type of a byte, expected <0x00> to <0xFF>")),
                },
                PieceKind::Unused => {
                    return refused(path, format!("piece {id} {text:?} is marked unused"), "a model without unused pieces");
                }
                PieceKind::Control if text.chars().count() == 1 => {
                    return refused(path, format!("control piece {id} {text:?} is one character"), "a longer name for it");
                }
                PieceKind::UserDefined if text.contains('\0') => {
                    return refused(path, format!("user-defined piece {id} {text:?} holds a NUL"), "another name for it");
                }
                _ => {}
            }
            pieces.push(Piece { text, score, kind });
        }
        if unk.is_none() {
            return broken(format!("none of the {} pieces is the unknown piece", pieces.len()));
        }
        match bytes_seen.iter().position(|&seen| !seen) {
            Some(byte) if byte_fallback => broken(format!("byte fallback without the piece <0x{byte:02X}>")),
            _ => Ok(pieces),
        }
    }

    fn refuse_unsupported(&self, path: &Path) -> Result<()> {
        let (trainer, normalizer) = (&self.trainer, &self.normalizer);
        let kind = trainer.model_type.unwrap_or(1);
        if kind != 2 {
            let name = ["", "unigram", "BPE", "word", "character"].get(kind as usize).copied().unwrap_or("unknown");
            return refused(path, format!("a {name} model (model_type {kind})"), "a BPE model (model_type 2)");
        }
        let charsmap_bytes = normalizer.precompiled_charsmap.as_ref().map_or(0, Vec::len);
        if charsmap_bytes > 0 {
            let name = normalizer.name.as_deref().unwrap_or("");
            return refused(path, format!("normalisation {name:?} ({charsmap_bytes} bytes of character map)"), "identity normalisation");
        }
        if normalizer.remove_extra_whitespaces.unwrap_or(true) {
            return refused(path, "remove_extra_whitespaces = true".into(), "a model that keeps whitespace");
        }
        if !normalizer.escape_whitespaces.unwrap_or(true) {
            return refused(path, "escape_whitespaces = false".into(), "a model with escape_whitespaces = true");
        }
        if trainer.treat_whitespace_as_suffix.unwrap_or(false) {
            return refused(path, "treat_whitespace_as_suffix = true".into(), "a model with whitespace as prefix");
        }
        if let Some(bytes) = &self.proto.denormalizer_spec {
            let charsmap = NormalizerSpec::decode(bytes.as_slice()).map(|spec| spec.precompiled_charsmap.unwrap_or_default());
            if charsmap.map_or(true, |map| !map.is_empty()) {
                return refused(path, "a denormaliser".into(), "a model without one");
            }
        }
        Ok(())
    }
}

fn refused<T>(path: &Path, needs: String, instead: &str) -> Result<T> {
    Err(Error::file(path, format!("the model has {needs}, which is not supported")).remedy(format!("use {instead}")))
}

/// The byte of a byte piece: `<0x0A>` is 10.
pub fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let canonical = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    if canonical { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// The top-level fields of number 6 and up of a message that is known to parse.
fn unknown_fields(bytes: &[u8]) -> Vec<u8> {
    let (mut unknown, mut at) = (Vec::new(), 0);
    while let Some((key, after_key)) = varint(bytes, at) {
        let end = match key & 7 {
            0 => varint(bytes, after_key).map(|(_, end)| end),
            1 => Some(after_key + 8),
            2 => varint(bytes, after_key).map(|(length, start)| start + length as usize),
            5 => Some(after_key + 4),
            _ => None, // groups: not used by any proto3 or proto2-lite writer of these files
        };
        let Some(end) = end.filter(|&end| end <= bytes.len()) else { break };
        if key >> 3 > 5 {
            unknown.extend_from_slice(&bytes[at..end]);
        }
        at = end;
    }
    unknown
}

/// The varint at `at` and where it ends.
fn varint(bytes: &[u8], at: usize) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (i, &byte) in bytes.get(at..)?.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7F) << (7 * i as u32).min(63);
        if byte < 0x80 {
            return Some((value, at + i + 1));
        }
    }
    None
}
