//! Tokens that a prompt may name beside what a SentencePiece model matches in it, as transformers reads it: the model's control pieces, its
//! unknown one, and the tokens that a directory of Hugging Face adds. Text to train on never means them.

use super::model_file::{Piece, PieceKind};
use std::collections::BTreeMap;

/// A token that a directory adds to the pieces of a model, or one of them that it names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AddedToken {
    /// Its text.
    pub text: String,
    /// Its id; below the number of pieces it counts only as the name of the piece of this text.
    pub id: u32,
    /// Whether it vanishes when ids are decoded.
    pub is_special: bool,
    /// White space that it takes with it, before and behind it.
    pub takes_space: [bool; 2],
}

/// The space before stretches of text between named tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StretchSpace {
    /// Before each, when the SentencePiece model asks for one before a text.
    OfModel,
    /// Before one that begins the text, unless it begins with a space. This and what follows are transformers' LlamaTokenizer: what the
    /// model says does not count, and pieces that its user defined are named tokens.
    First,
    /// Before each that does not begin with a space ("legacy").
    Each,
    /// Before none.
    None,
}

/// The tokens that are found by their names.
pub struct Named {
    /// Longer texts first.
    names: Vec<Name>,
    /// Those behind the pieces.
    added: BTreeMap<u32, Piece>,
}

struct Name {
    text: String,
    id: u32,
    takes_space: [bool; 2],
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
    /// Of these pieces, those of `kinds`, and what is added.
    pub fn new(pieces: &[Piece], kinds: &[PieceKind], added: Vec<AddedToken>) -> Named {
        let mut names: BTreeMap<String, Name> = BTreeMap::new();
        let mut add = |name: Name| drop(names.insert(name.text.clone(), name));
        for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| kinds.contains(&piece.kind)) {
            add(Name { text: piece.text.clone(), id: id as u32, takes_space: [false; 2] });
        }
        let mut behind = BTreeMap::new();
        for AddedToken { text, id, is_special, takes_space } in added.into_iter().filter(|token| !token.text.is_empty()) {
            match pieces.get(id as usize) {
                Some(piece) if piece.text != text => continue,
                Some(_) => {}
                None => {
                    let kind = if is_special { PieceKind::Control } else { PieceKind::UserDefined };
                    behind.insert(id, Piece { text: text.clone(), score: 0.0, kind });
                }
            }
            add(Name { text, id, takes_space });
        }
        let mut names: Vec<Name> = names.into_values().filter(|name| !name.text.is_empty()).collect();
        names.sort_by_key(|name| std::cmp::Reverse(name.text.len()));
        Named { names, added: behind }
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
        self.names.iter().for_each(|name| begins[name.text.as_bytes()[0] as usize] = true);
        let (mut cuts, mut start, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let here = begins[text.as_bytes()[at] as usize];
            // A name is whole characters: where it fits begins one.
            let named = self.names.iter().find(|name| here && text.as_bytes()[at..].starts_with(name.text.as_bytes()));
            let Some(name) = named else {
                at += 1;
                continue;
            };
            let [before, behind] = name.takes_space;
            let stretch = if before { text[start..at].trim_end() } else { &text[start..at] };
            if !stretch.is_empty() {
                cuts.push(Cut::Text(stretch));
            }
            cuts.push(Cut::Token(name.id));
            at += name.text.len();
            if behind {
                at = text.len() - text[at..].trim_start().len();
            }
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

    /// Named pieces and added tokens are cut out, the longest at each place; what begins like one and is none stays text.
    #[test]
    fn names_are_cut_out() {
        let piece = |text: &str, kind| Piece { text: text.into(), score: 0.0, kind };
        let pieces = [piece("<s>", PieceKind::Control), piece("<sp", PieceKind::Normal), piece("<usr>", PieceKind::UserDefined)];
        let token = |text: &str, id| AddedToken { text: text.into(), id, is_special: true, takes_space: [id == 6, id == 7] };
        let added = || vec![token("<s>x", 3), token("\u{e9}<", 4), token("inside", 1), token("", 5), token("!", 6), token("?", 7)];
        let named = Named::new(&pieces, &[PieceKind::Control], added());
        assert_eq!(named.cut(""), []);
        assert_eq!(named.cut("<s"), [Cut::Text("<s")]);
        assert_eq!(named.cut("<s><s>xa"), [Cut::Token(0), Cut::Token(3), Cut::Text("a")]);
        let expected = [Cut::Text("<usr>inside\u{e8}"), Cut::Token(4), Cut::Text("s>")];
        assert_eq!(named.cut("<usr>inside\u{e8}\u{e9}<s>"), expected);
        // White space that tokens take with them.
        assert_eq!(
            named.cut("a \n! b ? \u{a0}c?"),
            [Cut::Text("a"), Cut::Token(6), Cut::Text(" b "), Cut::Token(7), Cut::Text("c"), Cut::Token(7)]
        );
        assert_eq!(named.cut(" !? <s> !"), [Cut::Token(6), Cut::Token(7), Cut::Token(0), Cut::Token(6)]);
        assert_eq!((named.added_id("<s>x"), named.added_id("<s>"), named.added(1)), (Some(3), None, None));
        // A piece of any kind that a directory names by its own text.
        let named = Named::new(&pieces, &[PieceKind::UserDefined], vec![token("<sp", 1)]);
        assert_eq!(named.cut("<s><sp<usr>"), [Cut::Text("<s>"), Cut::Token(1), Cut::Token(2)]);
    }
}
