//! Ids to text as SentencePiece's processor does (sentencepiece_processor.cc, Decode): U+2581 becomes a space, a dummy
//! prefix is dropped again, runs of byte pieces are read as UTF-8 and every byte that is not part of a character becomes
//! U+FFFD, control pieces are invisible. This file knows nothing of encoding.

use super::encode::repair;
use super::model_file::{Piece, PieceKind, byte_of};
use super::tables::SPACE_MARK;

/// What decoding needs of a model.
pub struct Decoder {
    /// What the unknown piece, and an id outside the vocabulary, decodes to.
    pub unk_surface: String,
    /// The first space is the encoder's, not the text's.
    pub dummy_prefix: bool,
}

impl Decoder {
    /// The text of the ids, of which `piece` has the pieces.
    pub fn decode<'p>(&self, piece: impl Fn(u32) -> Option<&'p Piece>, ids: &[u32]) -> String {
        let mut decoding = Decoding::default();
        ids.iter().for_each(|&id| decoding.push(self, piece(id)));
        decoding.finish()
    }
}

/// A decoding under way.
#[derive(Default)]
pub struct Decoding {
    /// Of all but the bytes behind it; nothing that follows changes it.
    text: String,
    /// A run of byte pieces that may go on.
    bytes: Vec<u8>,
    /// Something other than bytes was seen where no dummy prefix may follow.
    is_past_start: bool,
    prefix_dropped: bool,
}

impl Decoding {
    /// Takes the piece of the next id; None for an id outside the vocabulary.
    pub fn push(&mut self, decoder: &Decoder, piece: Option<&Piece>) {
        if let Some(Piece { kind: PieceKind::Byte, text: name, .. }) = piece {
            self.bytes.push(byte_of(name).expect("checked: a byte piece"));
            return;
        }
        flush(&mut self.bytes, &mut self.text);
        self.is_past_start |= self.prefix_dropped || !self.text.is_empty();
        self.prefix_dropped = false;
        match piece {
            Some(Piece { kind: PieceKind::Control, .. }) => {}
            None | Some(Piece { kind: PieceKind::Unknown, .. }) => self.text.push_str(&decoder.unk_surface),
            Some(Piece { text: name, .. }) => {
                let mut seen = name.as_str();
                if !self.is_past_start
                    && decoder.dummy_prefix
                    && let Some(rest) = seen.strip_prefix(SPACE_MARK)
                {
                    (seen, self.prefix_dropped) = (rest, true);
                }
                self.text.extend(seen.chars().map(|c| if c == SPACE_MARK { ' ' } else { c }));
            }
        }
    }

    /// The text that nothing changes any more, and what the bytes behind it would be if nothing followed.
    pub fn so_far(&self) -> (&str, String) {
        (&self.text, repair(&self.bytes))
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        flush(&mut self.bytes, &mut self.text);
        self.text
    }
}

fn flush(bytes: &mut Vec<u8>, text: &mut String) {
    if !bytes.is_empty() {
        text.push_str(&repair(bytes));
        bytes.clear();
    }
}
