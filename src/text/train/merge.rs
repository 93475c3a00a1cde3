//! From counted words to pieces: the most frequent joined text of two neighbours becomes a piece, again and again.
//!
//! Candidates are texts, not pairs: "aaa" is counted wherever two neighbours join to it, however they are cut, because the
//! encoder merges them all. After each new piece the words that hold it are merged on exactly as the encoder would (best
//! piece first, leftmost first), so at any time every word is cut as a model of the pieces so far would cut it. Counts are
//! kept up by differences; the heap is lazy (an entry with an old count is put back with the present one). This file knows
//! nothing of files.

use super::script::Sorts;
use crate::error::{Error, Result};
use crate::text::hash::FoldBuild;
use crate::text::tables::SPACE_MARK;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::rc::Rc;

const NO_TEXT: u32 = u32::MAX;
const NO_RANK: u32 = u32::MAX;
/// The symbol of a character without a piece.
const RARE: u32 = u32::MAX;

/// What training found.
pub struct Merged {
    /// The merges in order, spaces as spaces.
    pub pieces: Vec<Rc<str>>,
    /// The characters with a piece, by falling count, then by code.
    pub characters: Vec<char>,
    /// Share of the text's characters they make up.
    pub covered: f64,
    /// How often the last merge was met.
    pub last_count: u64,
    /// Symbols of every word at the end; [`RARE`] is a character that becomes bytes.
    words: Vec<Word>,
    sorts: Sorts,
    covered_set: HashSet<char, FoldBuild>,
}

impl Merged {
    /// The number of tokens of a counted word.
    pub fn n_parts(&self, word_idx: usize, word: &str) -> usize {
        let symbols = &self.words[word_idx].symbols;
        let n_rare = symbols.iter().filter(|&&symbol| symbol == RARE).count();
        if n_rare == 0 {
            return symbols.len();
        }
        let bytes_of = |c: char| if c == ' ' { SPACE_MARK.len_utf8() } else { c.len_utf8() };
        let rare_bytes: usize = word.chars().filter(|c| !self.covered_set.contains(c)).map(bytes_of).sum();
        symbols.len() - n_rare + rare_bytes
    }

    /// Whether a word could be a piece of its own: short enough, all characters covered, one script.
    pub fn could_be_piece(&self, word: &str) -> bool {
        self.sorts.is_piece(word) && word.chars().all(|c| self.covered_set.contains(&c))
    }
}

/// Merges until there are `n_wanted` pieces and characters together, or nothing is left to merge. Error: more characters
/// than that.
pub fn merge(words: &[(Box<str>, u64)], coverage: f64, n_wanted: usize) -> Result<Merged> {
    let (characters, covered) = choose_characters(words, coverage);
    if characters.len() > n_wanted {
        let wrong = format!("{} characters of the text need a piece, and the vocabulary has room for {n_wanted}", characters.len());
        return Err(Error::recipe(wrong).remedy("raise --vocab-size, or lower --character-coverage"));
    }
    let mut trainer = Trainer::new(&characters, words);
    let n_merges = n_wanted - characters.len();
    let (mut pieces, mut last_count) = (Vec::new(), 0);
    while pieces.len() < n_merges {
        let Some((text, count)) = trainer.best() else { break };
        trainer.make_piece(text, pieces.len() as u32);
        pieces.push(trainer.texts[text as usize].text.clone());
        last_count = count;
    }
    let covered_set = characters.iter().copied().collect();
    Ok(Merged { pieces, characters, covered, last_count, words: trainer.words, sorts: trainer.sorts, covered_set })
}

/// The most frequent characters that together make up the coverage, and the share they do make up.
fn choose_characters(words: &[(Box<str>, u64)], coverage: f64) -> (Vec<char>, f64) {
    let mut counts: HashMap<char, u64, FoldBuild> = HashMap::default();
    for (word, count) in words {
        for c in word.chars() {
            *counts.entry(c).or_insert(0) += count;
        }
    }
    let total: u64 = counts.values().sum();
    let mut sorted: Vec<(char, u64)> = counts.into_iter().collect();
    sorted.sort_unstable_by_key(|&(c, count)| (Reverse(count), c));
    let (mut chosen, mut covered) = (Vec::new(), 0u64);
    for (c, count) in sorted {
        if covered as f64 >= coverage * total as f64 {
            break;
        }
        covered += count;
        chosen.push(c);
    }
    (chosen, covered as f64 / total.max(1) as f64)
}

/// A text that is a symbol, or that two neighbours join to.
struct Text {
    text: Rc<str>,
    n_chars: u32,
    /// When it became a piece; `NO_RANK` for characters and candidates.
    rank: u32,
    /// How often two neighbours join to it now.
    count: u64,
    /// Words in which they do or did, some perhaps twice.
    words: Vec<u32>,
}

/// A word: symbols (indices of texts), and for every two neighbours the text they join to, if it may be a piece.
struct Word {
    symbols: Vec<u32>,
    joins: Vec<u32>,
    count: u64,
}

/// An entry of the heap, largest first: count, fewer characters, smaller text.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    count: u64,
    n_chars: Reverse<u32>,
    text: Reverse<Rc<str>>,
    index: u32,
}

struct Trainer {
    sorts: Sorts,
    texts: Vec<Text>,
    by_text: HashMap<Rc<str>, u32, FoldBuild>,
    /// (left, right) to the text they join to.
    by_pair: HashMap<u64, u32, FoldBuild>,
    words: Vec<Word>,
    heap: BinaryHeap<Entry>,
    /// Texts whose count rose in this step.
    risen: Vec<u32>,
}

impl Trainer {
    fn new(characters: &[char], words: &[(Box<str>, u64)]) -> Trainer {
        let mut trainer = Trainer {
            sorts: Sorts::new(),
            texts: Vec::new(),
            by_text: HashMap::default(),
            by_pair: HashMap::default(),
            words: Vec::with_capacity(words.len()),
            heap: BinaryHeap::new(),
            risen: Vec::new(),
        };
        let mut symbols: HashMap<char, u32, FoldBuild> = HashMap::default();
        for &c in characters {
            let index = trainer.text_of(c.to_string());
            symbols.insert(c, index);
        }
        for (word_idx, (word, count)) in words.iter().enumerate() {
            let symbols: Vec<u32> = word.chars().map(|c| symbols.get(&c).copied().unwrap_or(RARE)).collect();
            let joins: Vec<u32> = symbols.windows(2).map(|pair| trainer.join(pair[0], pair[1])).collect();
            joins.iter().for_each(|&text| trainer.raise(text, *count, word_idx as u32));
            trainer.words.push(Word { symbols, joins, count: *count });
        }
        trainer.push_risen();
        trainer
    }

    /// The index of a text, new or not.
    fn text_of(&mut self, text: String) -> u32 {
        if let Some(&index) = self.by_text.get(text.as_str()) {
            return index;
        }
        let (index, n_chars, text): (_, _, Rc<str>) = (self.texts.len() as u32, text.chars().count() as u32, text.into());
        self.texts.push(Text { text: text.clone(), n_chars, rank: NO_RANK, count: 0, words: Vec::new() });
        self.by_text.insert(text, index);
        index
    }

    /// The text two symbols join to, or `NO_TEXT` when it may not be a piece.
    fn join(&mut self, left: u32, right: u32) -> u32 {
        if left == RARE || right == RARE {
            return NO_TEXT;
        }
        let key = u64::from(left) << 32 | u64::from(right);
        if let Some(&text) = self.by_pair.get(&key) {
            return text;
        }
        let joined = format!("{}{}", self.texts[left as usize].text, self.texts[right as usize].text);
        let text = if self.sorts.is_piece(&joined) { self.text_of(joined) } else { NO_TEXT };
        self.by_pair.insert(key, text);
        text
    }

    fn raise(&mut self, text: u32, count: u64, word: u32) {
        if text != NO_TEXT {
            let entry = &mut self.texts[text as usize];
            entry.count += count;
            if entry.words.last() != Some(&word) {
                entry.words.push(word);
            }
            self.risen.push(text);
        }
    }

    fn lower(&mut self, text: u32, count: u64) {
        if text != NO_TEXT {
            self.texts[text as usize].count -= count;
        }
    }

    fn push_risen(&mut self) {
        let mut risen = std::mem::take(&mut self.risen);
        risen.sort_unstable();
        risen.dedup();
        for &index in &risen {
            self.push(index);
        }
        risen.clear();
        self.risen = risen;
    }

    fn push(&mut self, index: u32) {
        let Text { text, n_chars, rank, count, .. } = &self.texts[index as usize];
        if *rank == NO_RANK && *count > 0 {
            self.heap.push(Entry { count: *count, n_chars: Reverse(*n_chars), text: Reverse(text.clone()), index });
        }
    }

    /// The most frequent candidate and its count.
    fn best(&mut self) -> Option<(u32, u64)> {
        while let Some(Entry { count, index, .. }) = self.heap.pop() {
            let text = &self.texts[index as usize];
            if text.rank != NO_RANK {
                continue;
            }
            if text.count == count {
                return Some((index, count));
            }
            if text.count < count {
                self.push(index); // it fell since; had it risen, a newer entry would be there
            }
        }
        None
    }

    /// Makes a text a piece and merges all words that hold it.
    fn make_piece(&mut self, text: u32, rank: u32) {
        self.texts[text as usize].rank = rank;
        let mut word_list = std::mem::take(&mut self.texts[text as usize].words);
        word_list.sort_unstable();
        word_list.dedup();
        for word_idx in word_list {
            let empty = Word { symbols: Vec::new(), joins: Vec::new(), count: 0 };
            let mut word = std::mem::replace(&mut self.words[word_idx as usize], empty);
            self.merge_word(&mut word, word_idx);
            self.words[word_idx as usize] = word;
        }
        self.push_risen();
    }

    /// Merges a word as the encoder does with the pieces so far.
    fn merge_word(&mut self, word: &mut Word, word_idx: u32) {
        loop {
            let rank_of = |&text: &u32| if text == NO_TEXT { NO_RANK } else { self.texts[text as usize].rank };
            let ranks = word.joins.iter().map(rank_of).enumerate();
            let Some((at, rank)) = ranks.min_by_key(|&(at, rank)| (rank, at)) else { return };
            if rank == NO_RANK {
                return;
            }
            let joined = word.joins[at];
            for &text in &word.joins[at.saturating_sub(1)..(at + 2).min(word.joins.len())] {
                self.lower(text, word.count);
            }
            word.symbols[at] = joined;
            word.symbols.remove(at + 1);
            word.joins.remove(at);
            let affected = at.saturating_sub(1)..(at + 1).min(word.joins.len());
            for left in affected {
                let text = self.join(word.symbols[left], word.symbols[left + 1]);
                word.joins[left] = text;
                self.raise(text, word.count, word_idx);
            }
        }
    }
}
