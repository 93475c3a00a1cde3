//! The text of a list of ids that grows at its end, without decoding all of them again for each. It is at any time what decoding the whole
//! list gives, though that is not always what was there before and something more: bytes become a character, or not.

use super::decode::Decoding;
use super::json::JsonTokenizer;
use super::sentencepiece::SentencePiece;
use super::{Sort, Tokenizer};

/// The decoding of all ids pushed so far.
pub struct GrowingText<'a> {
    how: How<'a>,
    text: String,
    /// Bytes at the beginning of `text` that nothing changes any more.
    settled: usize,
}

enum How<'a> {
    SentencePiece(&'a SentencePiece, Decoding),
    Json(&'a JsonTokenizer, Window),
}

/// The ids whose text is not settled, behind the last that parts the text.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the first one's text when it parts the text and they are settled; else 0.
    parting_bytes: usize,
}

impl<'a> GrowingText<'a> {
    /// No ids.
    pub fn new(tokenizer: &'a Tokenizer) -> GrowingText<'a> {
        let how = match &tokenizer.sort {
            Sort::SentencePiece(sentencepiece) => How::SentencePiece(sentencepiece, Decoding::default()),
            Sort::Json(json) => How::Json(json, Window::default()),
        };
        GrowingText { how, text: String::new(), settled: 0 }
    }

    /// One id more; the byte before which the text is what it was.
    pub fn push(&mut self, id: u32) -> usize {
        let same = self.settled;
        self.text.truncate(same);
        match &mut self.how {
            How::SentencePiece(sentencepiece, decoding) => {
                sentencepiece.decode_next(decoding, id);
                let (settled, pending) = decoding.so_far();
                self.text.push_str(&settled[same..]);
                self.settled = settled.len();
                self.text.push_str(&pending);
            }
            How::Json(json, window) => {
                window.ids.push(id);
                self.text.push_str(&json.decode(&window.ids)[window.parting_bytes..]);
                if json.is_anchor(id) {
                    let n_bytes = json.decode(&[id]).len();
                    // What may become another text stays in the window.
                    let parting_bytes = if json.last_is_other() { 0 } else { n_bytes };
                    *window = Window { ids: vec![id], parting_bytes };
                    self.settled = self.text.len() - (n_bytes - parting_bytes);
                }
            }
        }
        same
    }

    /// Equal to [`Tokenizer::decode`] of all ids.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}
