//! Hugging Face's tokenizers (`tokenizer.json`: byte-level BPE and the rest) by the crate of that name, which defines what their ids
//! are. This is the only file that names it.

use super::Special;
use crate::error::{Error, Result};
use std::path::Path;
use tokenizers::DecoderWrapper;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};

/// Names by which the families of open models call their special tokens, the most usual first; a `tokenizer.json` itself does not
/// say which of its special tokens ends a text.
const EOS: [&str; 6] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]"];
const BOS: [&str; 5] = ["<s>", "<|begin_of_text|>", "<|endoftext|>", "<bos>", "[CLS]"];
const PAD: [&str; 4] = ["<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]"];
const UNK: [&str; 3] = ["<unk>", "<|unk|>", "[UNK]"];

/// A tokenizer of Hugging Face; threads share it.
pub struct JsonTokenizer {
    tokenizer: tokenizers::Tokenizer,
    vocab_size: usize,
    /// See [`JsonTokenizer::is_anchor`].
    decodes_locally: bool,
    /// The last token decodes to another text when one follows.
    last_is_other: bool,
}

impl JsonTokenizer {
    /// From the text of a `tokenizer.json`; `origin` is named in errors.
    pub fn from_bytes(bytes: &[u8], origin: &Path) -> Result<JsonTokenizer> {
        let wrong = |error: &dyn std::fmt::Display| {
            let line = error.to_string().replace('\n', " ");
            Error::file(origin, format!("not a tokenizer of Hugging Face: {line}")).remedy("download it again")
        };
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| wrong(&error))?;
        // A file may ask for cut or padded texts; ours are taken as they are.
        tokenizer.with_truncation(None).map_err(|error| wrong(&error))?;
        tokenizer.with_padding(None);
        if let Some(decoder) = tokenizer.get_decoder() {
            let decoder = without_end_strips(decoder).map_err(|error| wrong(&error))?;
            tokenizer.with_decoder(Some(decoder));
        }
        let highest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = highest.map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            return Err(wrong(&"its vocabulary is empty"));
        }
        let decodes_locally = tokenizer.get_decoder().is_none_or(decodes_locally);
        let last_is_other = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::BPE(_)));
        Ok(JsonTokenizer { tokenizer, vocab_size, decodes_locally, last_is_other })
    }

    /// Appends the ids of a text.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        // What can fail is a model that has no piece for a text and no unknown piece: such text has no ids.
        if let Ok(encoding) = self.tokenizer.encode_fast(text, false) {
            ids.extend_from_slice(encoding.get_ids());
        }
    }

    /// The first of the tokens that the file itself puts around a text.
    pub fn first_added(&self) -> Option<u32> {
        self.tokenizer.encode_fast("", true).ok()?.get_ids().first().copied()
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// Whether this token parts a text: with it as their first, the tokens behind decode to its text (alone, or before others, see
    /// [`JsonTokenizer::last_is_other`]) and then what they decode to behind all the tokens before. Not so for a token
    /// that is invisible, ends or begins inside a character, or may be part of a run of bytes.
    pub fn is_anchor(&self, id: u32) -> bool {
        let is_byte = || self.token_of(id).is_some_and(|token| token.len() == 6 && token.starts_with("<0x"));
        let is_clear = |text: String| !text.is_empty() && !text.contains('\u{FFFD}');
        self.decodes_locally && is_clear(self.decode(&[id])) && !is_byte()
    }

    /// Whether the last token decodes to another text when one follows (BPE with a suffix at ends of words, which becomes a space).
    pub fn last_is_other(&self) -> bool {
        self.last_is_other
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The text of a token; None for an id outside the vocabulary.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Ids with a meaning of their own, by their usual names.
    pub fn special(&self) -> Special {
        let first = |names: &[&str]| names.iter().find_map(|name| self.tokenizer.token_to_id(name));
        Special { unk: first(&UNK), bos: first(&BOS), eos: first(&EOS), pad: first(&PAD) }
    }
}

/// A decoder that takes characters from the ends of texts as one that replaces them by nothing: the crate's own goes wrong, with a panic,
/// over a text that is shorter than what it may take.
fn without_end_strips(decoder: &DecoderWrapper) -> tokenizers::Result<DecoderWrapper> {
    let decoders = match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().map(without_end_strips).collect::<tokenizers::Result<_>>()?,
        DecoderWrapper::Strip(Strip { content, start, stop, .. }) if *stop > 0 => {
            let at_end = ReplacePattern::Regex(format!(r"\x{{{:x}}}{{1,{stop}}}\z", u32::from(*content)));
            vec![DecoderWrapper::Strip(Strip::new(*content, *start, 0)), DecoderWrapper::Replace(Replace::new(at_end, "")?)]
        }
        other => return Ok(other.clone()),
    };
    Ok(DecoderWrapper::Sequence(Sequence::new(decoders)))
}

/// Whether a decoder looks at one token at a time, but for the first and the last token, for runs of bytes, and for whether the token
/// before is the same (CTC): so do byte-level BPE, BPE with a suffix, WordPiece and what SentencePiece's models are converted to. Without a
/// decoder tokens stand apart by a space.
fn decodes_locally(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_)
        | DecoderWrapper::Metaspace(_)
        | DecoderWrapper::WordPiece(_)
        | DecoderWrapper::BPE(_)
        | DecoderWrapper::CTC(_) => true,
        DecoderWrapper::Sequence(sequence) => {
            let decoders = sequence.get_decoders();
            let fuse = decoders.iter().position(|decoder| matches!(decoder, DecoderWrapper::Fuse(_))).unwrap_or(decoders.len());
            let by_token = |decoder: &DecoderWrapper| {
                matches!(decoder, DecoderWrapper::Replace(_) | DecoderWrapper::ByteFallback(_) | DecoderWrapper::Strip(_))
            };
            let at_start = |decoder: &DecoderWrapper| match decoder {
                DecoderWrapper::Fuse(_) => true,
                DecoderWrapper::Strip(strip) => strip.stop == 0,
                _ => false,
            };
            decoders[..fuse].iter().all(by_token) && decoders[fuse..].iter().all(at_start)
        }
        _ => false,
    }
}
