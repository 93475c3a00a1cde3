//! Tokens that a text may name beside what a SentencePiece model matches in it: its control pieces, and the tokens that a model of
//! Hugging Face adds behind its pieces. Plain text never means them; what a chat template writes does.

use super::model_file::{Piece, PieceKind};
use std::collections::BTreeMap;

/// A token that stands behind the pieces of a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AddedToken {
    /// Its text.
    pub text: String,
    /// Its id, not below the number of pieces.
    pub id: u32,
    /// Whether it vanishes when ids are decoded.
    pub is_special: bool,
}

/// The tokens that are found by their names.
#[derive(Default)]
pub struct Named {
    /// Text and id, longer texts first.
    names: Vec<(String, u32)>,
    /// Those behind the pieces.
    added: BTreeMap<u32, Piece>,
}

/// A part of a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut<'t> {
    /// Text between tokens, not empty.
    Text(&'t str),
    /// A token.
    Token(u32),
}

impl Named {
    /// Of these pieces, the control pieces, and what is added behind them.
    pub fn new(pieces: &[Piece], added: Vec<AddedToken>) -> Named {
        let controls = pieces.iter().enumerate().filter(|(_, piece)| piece.kind == PieceKind::Control);
        let mut names: Vec<(String, u32)> = controls.map(|(id, piece)| (piece.text.clone(), id as u32)).collect();
        let behind = added.into_iter().filter(|token| token.id as usize >= pieces.len() && !token.text.is_empty());
        let piece = |token: AddedToken| {
            let kind = if token.is_special { PieceKind::Control } else { PieceKind::UserDefined };
            (token.id, Piece { text: token.text, score: 0.0, kind })
        };
        let added: BTreeMap<u32, Piece> = behind.map(piece).collect();
        names.extend(added.iter().map(|(id, piece)| (piece.text.clone(), *id)));
        names.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        Named { names, added }
    }

    /// The token behind the pieces with this id.
    pub fn added(&self, id: u32) -> Option<&Piece> {
        self.added.get(&id)
    }

    /// The token behind the pieces with this text.
    pub fn added_id(&self, text: &str) -> Option<u32> {
        self.added.iter().find(|(_, piece)| piece.text == text).map(|(id, _)| *id)
    }

    /// A text in parts: at each place the longest name counts.
    pub fn cut<'t>(&self, text: &'t str) -> Vec<Cut<'t>> {
        let mut begins = [false; 256];
        self.names.iter().for_each(|(name, _)| begins[name.as_bytes()[0] as usize] = true);
        let (mut cuts, mut start, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let here = begins[text.as_bytes()[at] as usize];
            // A name is whole characters: where it fits begins one.
            let named = self.names.iter().find(|(name, _)| here && text.as_bytes()[at..].starts_with(name.as_bytes()));
            let Some((name, id)) = named else {
                at += 1;
                continue;
            };
            if start < at {
                cuts.push(Cut::Text(&text[start..at]));
            }
            cuts.push(Cut::Token(*id));
            at += name.len();
            start = at;
        }
        if start < text.len() {
            cuts.push(Cut::Text(&text[start..]));
        }
        cuts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Control pieces and added tokens are cut out, the longest at each place; what begins like one and is none stays text.
    #[test]
    fn names_are_cut_out() {
        let piece = |text: &str, kind| Piece { text: text.into(), score: 0.0, kind };
        let pieces = [piece("<s>", PieceKind::Control), piece("<sp", PieceKind::Normal), piece("<usr>", PieceKind::UserDefined)];
        let token = |text: &str, id| AddedToken { text: text.into(), id, is_special: true };
        let named = Named::new(&pieces, vec![token("<s>x", 3), token("\u{e9}<", 4), token("inside", 1), token("", 5)]);
        assert_eq!(named.cut(""), []);
        assert_eq!(named.cut("<s"), [Cut::Text("<s")]);
        assert_eq!(named.cut("<s><s>xa"), [Cut::Token(0), Cut::Token(3), Cut::Text("a")]);
        let expected = [Cut::Text("<usr>inside\u{e8}"), Cut::Token(4), Cut::Text("s>")];
        assert_eq!(named.cut("<usr>inside\u{e8}\u{e9}<s>"), expected);
        assert_eq!((named.added_id("<s>x"), named.added_id("<s>"), named.added(1)), (Some(3), None, None));
    }
}
