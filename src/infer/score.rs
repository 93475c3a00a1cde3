//! Log-probabilities of given text, and reward attributes, by the very forward pass that training uses: sequences are packed
//! without padding, so a score does not depend on what it was batched with beyond the rounding of matrix products.

use crate::comm::Groups;
use crate::device::{Device, Scratch};
use crate::error::{Error, IoContext, Result};
use crate::model::chunk::{Chunk, MicroBatch};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::parallel::schedule::{self, PipelineShape};
use crate::text::Tokenizer;
use crate::train::executor::{self, Keep, Nothing};
use serde::{Deserialize, Serialize};
use std::io::BufRead;
use std::path::Path;

/// A line of the input as typed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: String,
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

/// A sequence to score.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    /// As given.
    pub id: String,
    /// At least one token.
    pub tokens: Vec<u32>,
}

/// A scored sequence: one line of the output.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Scored {
    /// As given.
    pub id: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// ln p(token | all before) of each token; null for the first, which nothing precedes.
    pub logprobs: Vec<Option<f32>>,
    /// Their sum, in f64.
    pub sum: f64,
}

/// The attributes of a sequence: one line of the output.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rated {
    /// As given.
    pub id: String,
    /// What the reward head reads off the last token, in the order of its rows; not clamped.
    pub attributes: Vec<f32>,
}

/// What is asked of a forward pass.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// The loss of every token but the first: one input token less than the sequence has.
    Losses,
    /// The attributes at the last token.
    Attributes,
}

impl Asked {
    /// Input tokens of a sequence.
    fn n_rows(self, sequence: &Sequence) -> usize {
        match self {
            Asked::Losses => sequence.tokens.len() - 1,
            Asked::Attributes => sequence.tokens.len(),
        }
    }
}

/// Reads and checks an input file of sequences of at most `longest` tokens; the first wrong line is an error that names it.
pub fn read_sequences(path: &Path, vocab_size: usize, longest: usize, tokenizer: Option<&Tokenizer>) -> Result<Vec<Sequence>> {
    let file = std::fs::File::open(path).at(path)?;
    let mut sequences = Vec::new();
    for (number, line) in std::io::BufReader::new(file).lines().enumerate() {
        let wrong = |what: String, remedy: &str| Error::file(path, format!("line {}: {what}", number + 1)).remedy(remedy);
        let line = line.map_err(|error| wrong(error.to_string(), "write UTF-8, one JSON object a line"))?;
        if line.trim().is_empty() {
            continue;
        }
        let line: Line =
            serde_json::from_str(&line).map_err(|error| wrong(error.to_string(), "a line is {\"id\", \"tokens\" or \"text\"}"))?;
        let tokens = match (line.tokens, line.text, tokenizer) {
            (Some(tokens), None, _) => tokens,
            (None, Some(text), Some(tokenizer)) => tokenizer.encode(&text),
            (None, Some(_), None) => return Err(wrong("has text, but the checkpoint has no tokenizer".into(), "give tokens")),
            _ => return Err(wrong("needs either \"tokens\" or \"text\"".into(), "give one of them")),
        };
        if tokens.is_empty() {
            return Err(wrong("has no tokens".into(), "remove the line"));
        }
        if tokens.len() > longest {
            return Err(wrong(format!("has {} tokens, this model scores at most {longest}", tokens.len()), "cut it"));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(wrong(format!("token {token} is not below the vocabulary size {vocab_size}"), "use this model's tokenizer"));
        }
        sequences.push(Sequence { id: line.id, tokens });
    }
    if sequences.is_empty() {
        return Err(Error::file(path, "nothing to score in it").remedy("write one JSON object a line"));
    }
    Ok(sequences)
}

/// Which sequences share a micro-batch: consecutive ones while they fit `batch_tokens`; at least one each.
fn pack(sequences: &[Sequence], asked: Asked, batch_tokens: usize) -> Vec<Vec<usize>> {
    let (mut packs, mut n_tokens): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
    for (idx, sequence) in sequences.iter().enumerate() {
        let rows = asked.n_rows(sequence);
        if rows == 0 {
            continue;
        }
        match packs.last_mut() {
            Some(pack) if n_tokens + rows <= batch_tokens => pack.push(idx),
            _ => {
                packs.push(vec![idx]);
                n_tokens = 0;
            }
        }
        n_tokens += rows;
    }
    packs
}

/// Inputs and targets of the packed sequences.
fn micro_batch(device: &dyn Device, sequences: &[Sequence], asked: Asked, pack: &[usize]) -> Result<MicroBatch> {
    let (mut tokens, mut targets, mut positions, mut sequence_starts) = (Vec::new(), Vec::new(), Vec::new(), vec![0]);
    for &idx in pack {
        let (sequence, n_rows) = (&sequences[idx].tokens, asked.n_rows(&sequences[idx]));
        tokens.extend_from_slice(&sequence[..n_rows]);
        // The attributes have no targets; what stands there is not looked at.
        targets.extend((1..=n_rows).map(|next| sequence.get(next).copied().unwrap_or(0)));
        positions.extend(0..n_rows as u32);
        sequence_starts.push(tokens.len());
    }
    MicroBatch::new(device, [&tokens, &targets, &positions], &vec![0.0; tokens.len()], sequence_starts)
}

/// Scores all sequences; the result is in their order and the same on every rank. Replicas share out the micro-batches.
/// Collective.
pub fn logprobs(
    device: &dyn Device,
    groups: &Groups,
    chunks: &mut [Chunk],
    sequences: &[Sequence],
    batch_tokens: usize,
) -> Result<Vec<Scored>> {
    let losses = passes(device, groups, chunks, (sequences, Asked::Losses), batch_tokens)?;
    Ok(sequences.iter().zip(losses).map(|(sequence, losses)| scored(sequence, &losses)).collect())
}

/// The same for a reward model: the attributes of all sequences. Collective.
pub fn rewards(
    device: &dyn Device,
    groups: &Groups,
    chunks: &mut [Chunk],
    sequences: &[Sequence],
    batch_tokens: usize,
) -> Result<Vec<Rated>> {
    let attributes = passes(device, groups, chunks, (sequences, Asked::Attributes), batch_tokens)?;
    Ok(sequences.iter().zip(attributes).map(|(sequence, attributes)| Rated { id: sequence.id.clone(), attributes }).collect())
}

/// What was asked of each sequence, in their order, on every rank.
fn passes(
    device: &dyn Device,
    groups: &Groups,
    chunks: &mut [Chunk],
    (sequences, asked): (&[Sequence], Asked),
    batch_tokens: usize,
) -> Result<Vec<Vec<f32>>> {
    let packs = pack(sequences, asked, batch_tokens);
    let mine: Vec<&Vec<usize>> = packs.iter().skip(groups.at.dp).step_by(groups.layout.dp).collect();
    let scratch = Scratch::new();
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let mut found: Vec<(usize, Vec<f32>)> = Vec::new();
    for pack in mine {
        // One micro-batch at a time: memory stays that of one, and nothing waits on a whole file.
        let batch = micro_batch(device, sequences, asked, pack)?;
        let schedule = schedule::evaluation(PipelineShape { pp: groups.layout.pp, vp: 1, n_micro: 1 });
        let starts = batch.sequence_starts.clone();
        let passed = executor::run(&schedule, chunks, &ctx, groups, (&[batch], Keep::Nothing), &mut Nothing);
        let values = match asked {
            Asked::Losses => &passed.token_losses[0],
            Asked::Attributes => &passed.attributes[0],
        };
        if !values.is_empty() && groups.at.tp == 0 {
            let per_sequence = values.len() / pack.len();
            let part = |i: usize| match asked {
                Asked::Losses => starts[i]..starts[i + 1],
                Asked::Attributes => i * per_sequence..(i + 1) * per_sequence,
            };
            found.extend(pack.iter().enumerate().map(|(i, &idx)| (idx, values[part(i)].to_vec())));
        }
    }
    let text = serde_json::to_vec(&found).expect("plain data");
    let mut all: Vec<Vec<f32>> = vec![Vec::new(); sequences.len()];
    for part in groups.world.gather_variable(&text) {
        let part: Vec<(usize, Vec<f32>)> = serde_json::from_slice(&part).expect("written above");
        part.into_iter().for_each(|(idx, values)| all[idx] = values);
    }
    Ok(all)
}

fn scored(sequence: &Sequence, losses: &[f32]) -> Scored {
    assert_eq!(losses.len() + 1, sequence.tokens.len());
    let logprobs = std::iter::once(None).chain(losses.iter().map(|&loss| Some(-loss))).collect();
    let sum = -losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    Scored { id: sequence.id.clone(), tokens: sequence.tokens.clone(), logprobs, sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packing keeps order, loses nothing that has a target, and exceeds the limit only for a single long sequence.
    #[test]
    fn packs_cover_all_sequences() {
        let lengths = [5usize, 1, 9, 30, 2, 2, 2, 11];
        let sequences: Vec<Sequence> = lengths.iter().map(|&n| Sequence { id: n.to_string(), tokens: vec![0; n] }).collect();
        let packs = pack(&sequences, Asked::Losses, 12);
        assert_eq!(packs.concat(), vec![0, 2, 3, 4, 5, 6, 7]);
        for pack in &packs {
            let rows: usize = pack.iter().map(|&idx| lengths[idx] - 1).sum();
            assert!(rows <= 12 || pack.len() == 1, "{pack:?}");
        }
    }
}
