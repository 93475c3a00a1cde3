//! Log-probabilities of given text, and reward attributes; the forward passes are those of `scorer`.

use super::choices::{self, Start};
use super::score_input::{self, Wrong};
use super::scorer::{Scorer, TokenScores, Wanted};
use crate::error::Result;
use crate::model::chunk::Chunk;
use crate::text::Tokenizer;
use serde::{Deserialize, Serialize};
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

/// Reads and checks an input file of sequences of at most `longest` tokens, of which those that are texts begin with `start`; the first
/// wrong line is an error that names it.
pub fn read_sequences(path: &Path, vocab_size: usize, longest: usize, text: (Option<&Tokenizer>, Start)) -> Result<Vec<Sequence>> {
    let (tokenizer, start) = text;
    let wrong = |what: &str, remedy| Err(Wrong { what: what.into(), remedy });
    score_input::read(path, "a line is {\"id\", \"tokens\" or \"text\"}", |line: Line| {
        let tokens = match (line.tokens, line.text, tokenizer) {
            (Some(tokens), None, _) => tokens,
            (None, Some(text), Some(tokenizer)) => choices::encode(tokenizer, &text, start),
            (None, Some(_), None) => return wrong("has text, but the checkpoint has no tokenizer", "give tokens"),
            _ => return wrong("needs either \"tokens\" or \"text\"", "give one of them"),
        };
        if tokens.is_empty() {
            return wrong("has no tokens", "remove the line");
        }
        if tokens.len() > longest {
            return wrong(&format!("has {} tokens, this model scores at most {longest}", tokens.len()), "cut it");
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return wrong(&format!("token {token} is not below the vocabulary size {vocab_size}"), "use this model's tokenizer");
        }
        Ok(Sequence { id: line.id, tokens })
    })
}

/// Scores all sequences; the result is in their order and the same on every rank. Collective.
pub fn logprobs(scorer: &Scorer, chunks: &mut [Chunk], sequences: &[Sequence]) -> Result<Vec<Scored>> {
    Ok(scored(sequences, &scorer.tokens(chunks, &wanted(sequences))?))
}

/// The same for a reward model: the attributes of all sequences. Collective.
pub fn rewards(scorer: &Scorer, chunks: &mut [Chunk], sequences: &[Sequence]) -> Result<Vec<Rated>> {
    Ok(rated(sequences, scorer.attributes(chunks, &tokens(sequences))?))
}

/// All tokens but the first of each sequence.
pub fn wanted(sequences: &[Sequence]) -> Vec<Wanted<'_>> {
    sequences.iter().map(|one| Wanted { tokens: &one.tokens, first: 1 }).collect()
}

/// The tokens of each sequence.
pub fn tokens(sequences: &[Sequence]) -> Vec<&[u32]> {
    sequences.iter().map(|one| one.tokens.as_slice()).collect()
}

/// The sequences with the scores of `wanted`.
pub fn scored(sequences: &[Sequence], scores: &[TokenScores]) -> Vec<Scored> {
    sequences.iter().zip(scores).map(|(sequence, scores)| scored_one(sequence, &scores.logprobs)).collect()
}

/// The sequences with their attributes.
pub fn rated(sequences: &[Sequence], attributes: Vec<Vec<f32>>) -> Vec<Rated> {
    sequences.iter().zip(attributes).map(|(sequence, attributes)| Rated { id: sequence.id.clone(), attributes }).collect()
}

fn scored_one(sequence: &Sequence, logprobs: &[f32]) -> Scored {
    assert_eq!(logprobs.len() + 1, sequence.tokens.len());
    // From 0.0: the empty `sum` of floats is -0.0, which would stand so in the files.
    let sum = logprobs.iter().fold(0.0, |sum, &x| sum + f64::from(x));
    let logprobs = std::iter::once(None).chain(logprobs.iter().map(|&x| Some(x))).collect();
    Scored { id: sequence.id.clone(), tokens: sequence.tokens.clone(), logprobs, sum }
}
