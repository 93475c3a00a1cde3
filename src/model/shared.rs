//! What a pass over given sequences need not compute: tokens that several sequences begin with are rows of the micro-batch once, and only
//! the rows that something is asked of go through the output layer. Every operation but attention works row by row, so a shared row has
//! the bits that it would have in each of its sequences (in reproducible numerics; see `numerics`); attention sees each sequence whole.

use super::ctx::Ctx;
use crate::device::{Device, Heads, ScratchTensor};
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use std::cmp::Reverse;
use std::ops::Range;

/// Rows of whole sequences in one call of attention: enough for many threads, few beside the other temporaries of a pass.
const ATTENTION_ROWS: usize = 4096;

/// A sequence made of rows of a micro-batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SharedSequence {
    /// The rows of its tokens, in order.
    pub rows: Vec<Range<usize>>,
    /// Tokens whose rows an earlier sequence has too; the rows of the others are its own.
    pub n_shared: usize,
}

impl SharedSequence {
    /// Tokens.
    pub fn len(&self) -> usize {
        self.rows.iter().map(Range::len).sum()
    }

    /// Whether it has no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row of a token.
    pub fn row(&self, token: usize) -> usize {
        let mut before = 0;
        for range in &self.rows {
            if token - before < range.len() {
                return range.start + token - before;
            }
            before += range.len();
        }
        panic!("token {token} of a sequence of {before}")
    }
}

/// Which tokens the rows of a micro-batch are asked for.
pub struct Asked {
    /// Each row that is asked something; those with the most questions first.
    pub rows: Vec<usize>,
    /// targets[j], [n_j] u32: the j-th question of each of the first n_j rows.
    pub targets: Vec<Tensor>,
    /// Which question each target is, those of targets[0] first.
    pub numbers: Vec<usize>,
}

impl Asked {
    /// Of questions (row, token). Err: out of memory.
    pub fn new(device: &dyn Device, questions: &[(usize, u32)]) -> Result<Asked> {
        let mut by_row: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut in_order: Vec<usize> = (0..questions.len()).collect();
        in_order.sort_by_key(|&number| questions[number].0);
        for number in in_order {
            match by_row.last_mut() {
                Some((row, numbers)) if *row == questions[number].0 => numbers.push(number),
                _ => by_row.push((questions[number].0, vec![number])),
            }
        }
        by_row.sort_by_key(|(row, numbers)| (Reverse(numbers.len()), *row));
        let most = by_row.first().map_or(0, |(_, numbers)| numbers.len());
        let (mut targets, mut numbers) = (Vec::new(), Vec::new());
        for j in 0..most {
            let round: Vec<usize> = by_row.iter().map_while(|(_, numbers)| numbers.get(j).copied()).collect();
            let tokens: Vec<u32> = round.iter().map(|&number| questions[number].1).collect();
            let mut on_device = device.alloc(&[tokens.len()], DType::U32)?;
            device.upload(bytemuck::cast_slice(&tokens), &mut on_device);
            targets.push(on_device);
            numbers.extend(round);
        }
        Ok(Asked { rows: by_row.into_iter().map(|(row, _)| row).collect(), targets, numbers })
    }
}

/// Causal attention of each sequence over its rows of qkv[T, (A + 2G) D / tp] -> [T, A D / tp].
pub fn attention(ctx: &Ctx, sequences: &[SharedSequence], qkv: &Tensor, heads: Heads) -> ScratchTensor {
    let mut mixed = ctx.take(&[qkv.n_rows(), heads.query * heads.dim], qkv.dtype());
    let mut rest = sequences;
    while !rest.is_empty() {
        let (mut n_sequences, mut n_rows) = (0, 0);
        while n_sequences < rest.len() && (n_sequences == 0 || n_rows + rest[n_sequences].len() <= ATTENTION_ROWS) {
            n_rows += rest[n_sequences].len();
            n_sequences += 1;
        }
        let (now, later) = rest.split_at(n_sequences);
        let own: Vec<&SharedSequence> = now.iter().filter(|sequence| sequence.n_shared < sequence.len()).collect();
        attention_of_own(ctx, &own, qkv, &mut mixed, heads);
        rest = later;
    }
    mixed
}

/// The rows of `mixed` that belong to these sequences alone.
fn attention_of_own(ctx: &Ctx, sequences: &[&SharedSequence], qkv: &Tensor, mixed: &mut Tensor, heads: Heads) {
    let mut starts = vec![0];
    starts.extend(sequences.iter().scan(0, |end, sequence| {
        *end += sequence.len();
        Some(*end)
    }));
    let n_rows = starts[sequences.len()];
    if n_rows == 0 {
        return;
    }
    let mut whole = ctx.take(&[n_rows, qkv.row_len()], qkv.dtype());
    let mut out = ctx.take(&[n_rows, mixed.row_len()], mixed.dtype());
    let mut lse = ctx.take(&[heads.query, n_rows], DType::F32);
    let mut at = 0;
    for range in sequences.iter().flat_map(|sequence| &sequence.rows) {
        ctx.device.copy(&mut whole.rows_mut(at..at + range.len()), &qkv.rows(range.clone()));
        at += range.len();
    }
    let wanted: Vec<usize> = sequences.iter().map(|sequence| sequence.n_shared).collect();
    ctx.device.attention_from(&mut out, &mut lse, &whole, &starts, &wanted, heads);
    for (sequence, start) in sequences.iter().zip(starts) {
        let (first, n) = (sequence.row(sequence.n_shared), sequence.len() - sequence.n_shared);
        let from = start + sequence.n_shared;
        ctx.device.copy(&mut mixed.rows_mut(first..first + n), &out.rows(from..from + n));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    /// Every question is asked once, of its row, and the rows of each round are the first ones.
    #[test]
    fn questions_are_put_in_rounds() {
        let questions = [(7, 1), (2, 2), (7, 3), (9, 4), (7, 3), (9, 5), (0, 6)];
        let asked = Asked::new(&Cpu::new(), &questions).unwrap();
        assert_eq!(asked.rows, [7, 9, 0, 2]);
        let rounds: Vec<&[u32]> = asked.targets.iter().map(|targets| targets.u32()).collect();
        assert_eq!(rounds, [&[1, 4, 6, 2][..], &[3, 5], &[3]]);
        let mut number = asked.numbers.iter();
        for targets in &asked.targets {
            for (row, token) in asked.rows.iter().zip(targets.u32()) {
                assert_eq!(questions[*number.next().unwrap()], (*row, *token));
            }
        }
        let mut all = asked.numbers.clone();
        all.sort();
        assert_eq!(all, (0..questions.len()).collect::<Vec<_>>());
    }
}
