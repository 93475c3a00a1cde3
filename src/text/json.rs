//! Hugging Face's tokenizers (`tokenizer.json`: byte-level BPE and the rest) by the crate of that name, which defines what their ids
//! are. This is the only file that names it.

use super::Special;
use crate::error::{Error, Result};
use std::path::Path;

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
        let highest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = highest.map_or(0, |id| id as usize + 1);
        if vocab_size == 0 {
            return Err(wrong(&"its vocabulary is empty"));
        }
        Ok(JsonTokenizer { tokenizer, vocab_size })
    }

    /// Appends the ids of a text.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        // What can fail is a model that has no piece for a text and no unknown piece: such text has no ids.
        if let Ok(encoding) = self.tokenizer.encode_fast(text, false) {
            ids.extend_from_slice(encoding.get_ids());
        }
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
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
