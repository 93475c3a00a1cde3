//! Which of the given sequences go through the model together, and which rows they share there. A pure function of the sequences, so that
//! all ranks, and a job that goes on with another's work, agree.

use crate::model::shared::SharedSequence;
use std::ops::Range;

/// Fewest tokens that two sequences begin with for their rows to be shared: below, copying for the attention costs more.
const LEAST_SHARED: usize = 8;

/// A sequence as the passes see it: its first `n_rows` tokens are fed. Without rows it is left out.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// All tokens.
    pub tokens: &'a [u32],
    /// How many are fed.
    pub n_rows: usize,
}

impl Work<'_> {
    fn fed(&self) -> &[u32] {
        &self.tokens[..self.n_rows]
    }
}

/// Whether sequences that begin alike have that part once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rows {
    /// Once, as far as it is that of the sequence before.
    Shared,
    /// Each its own.
    Apart,
}

/// One forward pass.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pass {
    /// Which sequences, ascending.
    pub numbers: Vec<usize>,
    /// The rows of each.
    pub sequences: Vec<SharedSequence>,
    /// Of all.
    pub n_rows: usize,
}

impl Pass {
    fn push(&mut self, number: usize, n_tokens: usize, n_shared: usize) {
        let mut rows = self.sequences.last().map_or_else(Vec::new, |before| first_rows(&before.rows, n_shared));
        let end = self.n_rows + n_tokens - n_shared;
        match rows.last_mut() {
            Some(last) if last.end == self.n_rows => last.end = end,
            _ => rows.push(self.n_rows..end),
        }
        rows.retain(|range| !range.is_empty());
        self.numbers.push(number);
        self.sequences.push(SharedSequence { rows, n_shared });
        self.n_rows = end;
    }

    /// Whether some row is that of two sequences.
    pub fn shares(&self) -> bool {
        self.sequences.iter().any(|sequence| sequence.n_shared > 0)
    }
}

/// Passes over consecutive sequences: as many as have at most `batch_tokens` rows together, at least one each, and with it all that follow
/// and need no row of their own.
pub fn passes(work: &[Work], batch_tokens: usize, how: Rows) -> Vec<Pass> {
    let mut passes: Vec<Pass> = Vec::new();
    for (number, one) in work.iter().enumerate().filter(|(_, one)| one.n_rows > 0) {
        if let Some(pass) = passes.last_mut() {
            let before = &work[pass.numbers[pass.numbers.len() - 1]];
            let n_shared = if how == Rows::Shared { n_alike(before.fed(), one.fed()) } else { 0 };
            if n_shared == one.n_rows || pass.n_rows + one.n_rows - n_shared <= batch_tokens {
                pass.push(number, one.n_rows, n_shared);
                continue;
            }
        }
        let mut pass = Pass::default();
        pass.push(number, one.n_rows, 0);
        passes.push(pass);
    }
    passes
}

/// Tokens that both begin with, when they are worth sharing.
fn n_alike(a: &[u32], b: &[u32]) -> usize {
    let n = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    if n >= LEAST_SHARED || n == b.len() { n } else { 0 }
}

/// The first `n` rows of these.
fn first_rows(rows: &[Range<usize>], n: usize) -> Vec<Range<usize>> {
    let mut left = n;
    let mut first = Vec::new();
    for range in rows {
        let n = left.min(range.len());
        if n > 0 {
            first.push(range.start..range.start + n);
        }
        left -= n;
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Without sharing, packing keeps order, loses nothing that has rows, and exceeds the limit only for a single long sequence.
    #[test]
    fn packs_cover_all_sequences() {
        let rows = [4usize, 0, 8, 29, 1, 1, 1, 10];
        let tokens = [0; 30];
        let work: Vec<Work> = rows.iter().map(|&n_rows| Work { tokens: &tokens, n_rows }).collect();
        let passes = passes(&work, 12, Rows::Apart);
        assert_eq!(passes.iter().flat_map(|pass| pass.numbers.clone()).collect::<Vec<_>>(), vec![0, 2, 3, 4, 5, 6, 7]);
        for pass in &passes {
            let n: usize = pass.numbers.iter().map(|&number| rows[number]).sum();
            assert!(pass.n_rows == n && !pass.shares() && (n <= 12 || pass.numbers.len() == 1), "{pass:?}");
        }
    }

    /// Four choices of one token after one context are one context; a question that begins with the same examples adds its own rows.
    #[test]
    fn choices_of_a_context_share_it() {
        let (context, other): (Vec<u32>, Vec<u32>) = ((0..20).collect(), (0..15).chain(90..100).collect());
        let sequences: Vec<Vec<u32>> = [&context, &other].iter().flat_map(|c| (0..4).map(|choice| [&c[..], &[choice]].concat())).collect();
        let work: Vec<Work> = sequences.iter().map(|tokens| Work { tokens, n_rows: tokens.len() - 1 }).collect();
        let passes = passes(&work, 30, Rows::Shared);
        assert_eq!((passes.len(), passes[0].n_rows), (1, 30));
        let rows: Vec<Vec<Range<usize>>> = passes[0].sequences.iter().map(|one| one.rows.clone()).collect();
        let (first, second) = (std::iter::once(0..20).collect::<Vec<_>>(), vec![0..15, 20..30]);
        assert_eq!(rows, [vec![first; 4], vec![second; 4]].concat());
    }

    proptest! {
        /// Rows of every sequence spell its tokens, the rows that are its own come last and are nobody's before, each row is some
        /// sequence's own, and the limit holds.
        #[test]
        fn rows_spell_their_sequences(sequences in prop::collection::vec(prop::collection::vec(0u32..2, 0..24), 1..30), batch in 1usize..60) {
            // Long common beginnings.
            let sequences: Vec<Vec<u32>> = sequences.iter().map(|one| [&[7; 9][..(one.len() % 3) * 4], one].concat()).collect();
            let work: Vec<Work> = sequences.iter().map(|tokens| Work { tokens, n_rows: tokens.len() }).collect();
            let mut numbers = Vec::new();
            for pass in passes(&work, batch, Rows::Shared) {
                let mut spelt: Vec<Option<u32>> = vec![None; pass.n_rows];
                for (&number, sequence) in pass.numbers.iter().zip(&pass.sequences) {
                    prop_assert_eq!(sequence.len(), sequences[number].len());
                    for (i, &token) in sequences[number].iter().enumerate() {
                        let row = &mut spelt[sequence.row(i)];
                        prop_assert_eq!(row.is_some(), i < sequence.n_shared);
                        prop_assert_eq!(*row.get_or_insert(token), token);
                    }
                }
                prop_assert!(spelt.iter().all(Option::is_some));
                let others_have_none = pass.sequences[1..].iter().all(|sequence| sequence.n_shared == sequence.len());
                prop_assert!(pass.n_rows <= batch || others_have_none);
                numbers.extend(pass.numbers);
            }
            prop_assert_eq!(numbers, (0..sequences.len()).filter(|&i| !sequences[i].is_empty()).collect::<Vec<_>>());
        }
    }
}
