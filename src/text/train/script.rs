//! What a character may stand beside in a piece: SentencePiece's IsValidSentencePiece (trainer_interface.cc) with
//! split_by_unicode_script, split_digits and allow_whitespace_only_pieces. Spaces are real spaces here. This file knows
//! nothing of counts.

use super::MAX_PIECE_CHARS;
use unicode_script::{Script, UnicodeScript};

/// The sort of a character.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sort {
    /// Ends words and is in no piece: newline and the other controls but the tab.
    Separator,
    /// Only first in a piece, or in a piece of nothing else.
    Space,
    /// Always alone.
    Digit,
    /// Belongs to the script of the character before it.
    Inherited,
    /// Only beside its own.
    Script(u8),
}

/// The sorts of all characters, the common ones in a table.
pub struct Sorts {
    basic: Vec<Sort>,
}

impl Sorts {
    /// The table.
    pub fn new() -> Sorts {
        Sorts { basic: (0..0x1_0000).map(|c| char::from_u32(c).map_or(Sort::Separator, sort_of)).collect() }
    }

    /// The sort of a character.
    #[inline]
    pub fn get(&self, c: char) -> Sort {
        self.basic.get(c as usize).copied().unwrap_or_else(|| sort_of(c))
    }

    /// Whether a piece may hold `before` directly followed by `after`, as far as the two alone tell.
    #[inline]
    pub fn may_touch(before: Sort, after: Sort) -> bool {
        match (before, after) {
            (Sort::Separator | Sort::Digit, _) | (_, Sort::Separator | Sort::Digit) => false,
            (Sort::Space, _) => true,
            (_, Sort::Space) => false,
            (Sort::Script(a), Sort::Script(b)) => a == b,
            (Sort::Inherited, _) | (_, Sort::Inherited) => true,
        }
    }

    /// Whether a text may be a piece.
    pub fn is_piece(&self, text: &str) -> bool {
        let n = text.chars().count();
        if n == 0 || n > MAX_PIECE_CHARS {
            return false;
        }
        let all_space = text.chars().all(|c| c == ' ');
        let mut script = None;
        for (i, c) in text.chars().enumerate() {
            match self.get(c) {
                Sort::Separator => return false,
                Sort::Space if i > 0 && !all_space => return false,
                Sort::Digit if n > 1 => return false,
                Sort::Script(found) => match script.replace(found) {
                    Some(before) if before != found => return false,
                    _ => {}
                },
                Sort::Space | Sort::Digit | Sort::Inherited => {}
            }
        }
        true
    }
}

fn sort_of(c: char) -> Sort {
    match c {
        ' ' => Sort::Space,
        '0'..='9' | '\u{FF10}'..='\u{FF19}' => Sort::Digit,
        '\u{30FC}' => Sort::Script(Script::Han as u8),
        '\t' => Sort::Script(Script::Common as u8),
        c if c.is_control() => Sort::Separator,
        c => match c.script() {
            Script::Hiragana | Script::Katakana | Script::Han => Sort::Script(Script::Han as u8),
            Script::Inherited => Sort::Inherited,
            script => Sort::Script(script as u8),
        },
    }
}
