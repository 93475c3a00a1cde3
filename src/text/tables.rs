//! What the encoder looks up: characters to symbols, pairs of symbols to the piece they merge into, the user-defined
//! pieces as a trie, and which two neighbouring characters occur together inside some piece.
//!
//! Characters are handled folded: U+2581 and space are both 0x20, since SentencePiece turns every space of the text into
//! U+2581 before it looks. A *symbol* is the id of a normal piece, or a number from `n_pieces` up for a character that
//! occurs in pieces without being one, or [`NO_SYMBOL`] for a character that occurs in none and so can never merge.
//! This file knows nothing of texts.

use super::hash::{FoldBuild, mix};
use super::model_file::{Piece, PieceKind, byte_of};
use std::collections::HashMap;

/// The symbol of a character that no piece holds.
pub const NO_SYMBOL: u32 = u32::MAX;
/// The rank of a pair that does not merge.
pub const NO_RANK: u32 = u32::MAX;
/// U+2581, SentencePiece's visible space.
pub const SPACE_MARK: char = '\u{2581}';

const JOIN_BITS: u32 = 20;

/// Space and U+2581 are one.
#[inline]
pub fn fold(c: char) -> u32 {
    if c == SPACE_MARK { 0x20 } else { c as u32 }
}

/// What two symbols merge into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Merge {
    /// Smaller merges first; equal for equal scores.
    pub rank: u32,
    /// The piece.
    pub result: u32,
}

/// No merge.
pub const NO_MERGE: Merge = Merge { rank: NO_RANK, result: NO_SYMBOL };

/// Everything the encoder looks up.
pub struct Tables {
    /// Number of pieces; symbols below are piece ids.
    pub n_pieces: u32,
    /// Id of the unknown piece.
    pub unk: u32,
    /// Ids of the byte pieces, when the model has byte fallback.
    pub bytes: Option<[u32; 256]>,
    /// Symbols of the characters below 0x10000 (a table), and of the others.
    basic: Vec<u32>,
    other: HashMap<u32, u32, FoldBuild>,
    pairs: PairTable,
    join_ascii: [u128; 128],
    join_other: Vec<u64>,
    user: UserTrie,
}

impl Tables {
    /// The tables of checked pieces.
    pub fn new(pieces: &[Piece]) -> Tables {
        let mut tables = Tables {
            n_pieces: pieces.len() as u32,
            unk: pieces.iter().position(|piece| piece.kind == PieceKind::Unknown).expect("checked: there is an unknown piece") as u32,
            bytes: byte_ids(pieces),
            basic: vec![NO_SYMBOL; 0x10000],
            other: HashMap::default(),
            pairs: PairTable::new(0),
            join_ascii: [0; 128],
            join_other: vec![0; 1 << (JOIN_BITS - 6)],
            user: UserTrie::new(pieces),
        };
        let folded: Vec<Option<String>> = pieces.iter().map(folded_text).collect();
        tables.add_characters(&folded);
        tables.add_pairs(pieces, &folded);
        tables
    }

    /// One symbol a character: pieces of one character first, then the characters that only occur inside longer pieces.
    fn add_characters(&mut self, folded: &[Option<String>]) {
        let texts = || folded.iter().enumerate().filter_map(|(id, text)| text.as_deref().map(|text| (id as u32, text)));
        for (id, text) in texts() {
            let mut chars = text.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                self.set_symbol(c as u32, id);
            }
        }
        let mut next = self.n_pieces;
        for (_, text) in texts() {
            let mut before: Option<u32> = None;
            for c in text.chars().map(|c| c as u32) {
                if self.symbol(c) == NO_SYMBOL {
                    self.set_symbol(c, next);
                    next += 1;
                }
                if let Some(before) = before {
                    self.set_join(before, c);
                }
                before = Some(c);
            }
        }
    }

    /// Every way to cut a piece in two known symbols is a merge: SentencePiece looks merges up by the joined text.
    fn add_pairs(&mut self, pieces: &[Piece], folded: &[Option<String>]) {
        let ranks = ranks(pieces);
        let mut by_text: HashMap<&str, u32, FoldBuild> = HashMap::default();
        for (id, text) in folded.iter().enumerate() {
            if let Some(text) = text {
                by_text.insert(text, id as u32);
            }
        }
        let lookup = |part: &str| match by_text.get(part) {
            Some(&id) => id,
            None => {
                let mut chars = part.chars();
                match (chars.next(), chars.next()) {
                    (Some(c), None) => self.symbol(c as u32),
                    _ => NO_SYMBOL,
                }
            }
        };
        let mut found = Vec::new();
        for (id, text) in folded.iter().enumerate() {
            let Some(text) = text else { continue };
            for (cut, _) in text.char_indices().skip(1) {
                let (left, right) = (lookup(&text[..cut]), lookup(&text[cut..]));
                if left != NO_SYMBOL && right != NO_SYMBOL {
                    found.push((left, right, Merge { rank: ranks[id], result: id as u32 }));
                }
            }
        }
        let mut table = PairTable::new(found.len());
        for (left, right, merge) in found {
            table.insert(left, right, merge);
        }
        self.pairs = table;
    }

    /// The symbol of a folded character.
    #[inline]
    pub fn symbol(&self, c: u32) -> u32 {
        match self.basic.get(c as usize) {
            Some(&symbol) => symbol,
            None => self.other.get(&c).copied().unwrap_or(NO_SYMBOL),
        }
    }

    fn set_symbol(&mut self, c: u32, symbol: u32) {
        match self.basic.get_mut(c as usize) {
            Some(slot) => *slot = symbol,
            None => {
                self.other.insert(c, symbol);
            }
        }
    }

    /// What two neighbouring symbols merge into.
    #[inline]
    pub fn merge(&self, left: u32, right: u32) -> Merge {
        self.pairs.get(left, right)
    }

    fn set_join(&mut self, a: u32, b: u32) {
        if a < 128 && b < 128 {
            self.join_ascii[a as usize] |= 1 << b;
        } else {
            let bit = join_bit(a, b);
            self.join_other[bit >> 6] |= 1 << (bit & 63);
        }
    }

    /// Which ASCII characters may follow `a` (folded, below 128) inside a piece, one bit each.
    #[inline]
    pub fn join_ascii(&self, a: u32) -> u128 {
        self.join_ascii[a as usize & 127]
    }

    /// False only when no piece holds `a` directly before `b` (folded), so no merge can ever cross this place. (Pairs
    /// outside ASCII share bits by hash: a clash says true, which costs time, never exactness.)
    #[inline]
    pub fn may_join(&self, a: u32, b: u32) -> bool {
        if a < 128 && b < 128 {
            return self.join_ascii[a as usize] >> b & 1 == 1;
        }
        let bit = join_bit(a, b);
        self.join_other[bit >> 6] >> (bit & 63) & 1 == 1
    }

    /// The user-defined pieces.
    #[inline]
    pub fn user(&self) -> &UserTrie {
        &self.user
    }
}

fn join_bit(a: u32, b: u32) -> usize {
    (mix(u64::from(a) << 32 | u64::from(b)) >> (64 - JOIN_BITS)) as usize
}

/// The text a normal piece matches, folded; none for the others and for a piece that holds a real space (after escaping
/// no text does).
fn folded_text(piece: &Piece) -> Option<String> {
    let matchable = piece.kind == PieceKind::Normal && !piece.text.contains(' ');
    matchable.then(|| piece.text.replace(SPACE_MARK, " "))
}

fn byte_ids(pieces: &[Piece]) -> Option<[u32; 256]> {
    let mut ids = [NO_SYMBOL; 256];
    for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.kind == PieceKind::Byte) {
        ids[usize::from(byte_of(&piece.text).expect("checked: a byte piece"))] = id as u32;
    }
    (ids[0] != NO_SYMBOL).then_some(ids)
}

/// Ranks by falling score; equal scores have equal ranks, and then the place in the text decides.
fn ranks(pieces: &[Piece]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by(|&a, &b| pieces[b].score.total_cmp(&pieces[a].score));
    let (mut ranks, mut rank) = (vec![0; pieces.len()], 0);
    for (i, &id) in order.iter().enumerate() {
        if i > 0 && pieces[id].score != pieces[order[i - 1]].score {
            rank += 1;
        }
        ranks[id] = rank;
    }
    ranks
}

/// Pairs of symbols to merges: open addressing, at most half full.
struct PairTable {
    slots: Vec<(u64, Merge)>,
    shift: u32,
}

const EMPTY: u64 = u64::MAX;

impl PairTable {
    fn new(n_pairs: usize) -> PairTable {
        let bits = (n_pairs * 2).next_power_of_two().trailing_zeros().max(4);
        PairTable { slots: vec![(EMPTY, NO_MERGE); 1 << bits], shift: 64 - bits }
    }

    fn insert(&mut self, left: u32, right: u32, merge: Merge) {
        let key = u64::from(left) << 32 | u64::from(right);
        let mut at = (mix(key) >> self.shift) as usize;
        while self.slots[at].0 != EMPTY {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = (key, merge);
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> Merge {
        let key = u64::from(left) << 32 | u64::from(right);
        let mut at = (mix(key) >> self.shift) as usize;
        loop {
            let (found, merge) = self.slots[at];
            if found == key && key != EMPTY {
                return merge;
            }
            if found == EMPTY {
                return NO_MERGE;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }
}

/// The user-defined pieces by their folded characters.
pub struct UserTrie {
    next: HashMap<u64, u32, FoldBuild>,
    /// The piece that ends at a node.
    ends: Vec<Option<u32>>,
    first_ascii: u128,
    first_other: Vec<u32>,
}

impl UserTrie {
    fn new(pieces: &[Piece]) -> UserTrie {
        let mut trie = UserTrie { next: HashMap::default(), ends: vec![None], first_ascii: 0, first_other: Vec::new() };
        for (id, piece) in pieces.iter().enumerate() {
            if piece.kind != PieceKind::UserDefined || piece.text.contains(' ') {
                continue;
            }
            let mut node = 0u32;
            for c in piece.text.chars().map(fold) {
                let new = trie.ends.len() as u32;
                let child = *trie.next.entry(u64::from(node) << 32 | u64::from(c)).or_insert(new);
                if child == new {
                    trie.ends.push(None);
                }
                node = child;
            }
            trie.ends[node as usize] = Some(id as u32);
            match piece.text.chars().next().map(fold) {
                Some(c) if c < 128 => trie.first_ascii |= 1 << c,
                Some(c) => trie.first_other.push(c),
                None => {}
            }
        }
        trie.first_other.sort_unstable();
        trie.first_other.dedup();
        trie
    }

    /// The ASCII characters (folded) that some user-defined piece starts with, one bit each.
    #[inline]
    pub fn first_ascii(&self) -> u128 {
        self.first_ascii
    }

    /// Whether some user-defined piece starts with this folded character.
    #[inline]
    pub fn may_start(&self, c: u32) -> bool {
        if c < 128 { self.first_ascii >> c & 1 == 1 } else { !self.first_other.is_empty() && self.first_other.binary_search(&c).is_ok() }
    }

    /// The longest user-defined piece that `text` starts with: its id and its length in bytes of `text`.
    pub fn longest(&self, text: &str) -> Option<(u32, usize)> {
        let (mut node, mut longest) = (0u32, None);
        for (at, c) in text.char_indices() {
            match self.next.get(&(u64::from(node) << 32 | u64::from(fold(c)))) {
                Some(&child) => node = child,
                None => break,
            }
            if let Some(id) = self.ends[node as usize] {
                longest = Some((id, at + c.len_utf8()));
            }
        }
        longest
    }
}
