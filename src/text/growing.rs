//! The text of a list of tokens that grows at its end.

use super::Tokenizer;

/// The decoding of all tokens pushed so far.
pub struct GrowingText<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    text: String,
}

impl<'a> GrowingText<'a> {
    /// No tokens.
    pub fn new(tokenizer: &'a Tokenizer) -> GrowingText<'a> {
        GrowingText { tokenizer, ids: Vec::new(), text: String::new() }
    }

    /// One token more; the byte from which on the text may be another than before.
    pub fn push(&mut self, id: u32) -> usize {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        let same = text.bytes().zip(self.text.bytes()).take_while(|(new, old)| new == old).count();
        self.text = text;
        same
    }

    /// Equal to [`Tokenizer::decode`] of all tokens.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}
