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
    /// The text of the ids.
    pub fn decode(&self, pieces: &[Piece], ids: &[u32]) -> String {
        let (mut text, mut bytes) = (String::new(), Vec::new());
        let (mut at_start, mut prefix_dropped) = (true, false);
        for &id in ids {
            let piece = pieces.get(id as usize);
            if let Some(Piece { kind: PieceKind::Byte, text: name, .. }) = piece {
                bytes.push(byte_of(name).expect("checked: a byte piece"));
                continue;
            }
            flush(&mut bytes, &mut text);
            at_start &= !prefix_dropped && text.is_empty();
            prefix_dropped = false;
            match piece {
                Some(Piece { kind: PieceKind::Control, .. }) => {}
                None | Some(Piece { kind: PieceKind::Unknown, .. }) => text.push_str(&self.unk_surface),
                Some(Piece { text: name, .. }) => {
                    let mut seen = name.as_str();
                    if at_start
                        && self.dummy_prefix
                        && let Some(rest) = seen.strip_prefix(SPACE_MARK)
                    {
                        (seen, prefix_dropped) = (rest, true);
                    }
                    text.extend(seen.chars().map(|c| if c == SPACE_MARK { ' ' } else { c }));
                }
            }
        }
        flush(&mut bytes, &mut text);
        text
    }
}

fn flush(bytes: &mut Vec<u8>, text: &mut String) {
    if !bytes.is_empty() {
        text.push_str(&repair(bytes));
        bytes.clear();
    }
}
