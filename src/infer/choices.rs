//! Likelihoods of continuations: of several that may follow a context, which one the model would rather write. Contexts and
//! continuations become tokens as in lm-evaluation-harness (its `_encode_pair` and `_loglikelihood_tokens`), so that the sums are its
//! sums; the forward passes are those of `scorer`.

use super::score_input::{self, Wrong};
use super::scorer::{Scorer, TokenScores, Wanted};
use crate::checkpoint::{Stored, hf};
use crate::error::{Error, Result};
use crate::model::chunk::Chunk;
use crate::text::{Tokenizer, is_python_space};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A context and what may follow it, as tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pair {
    /// At least one token.
    pub context: Vec<u32>,
    /// At least one token.
    pub continuation: Vec<u32>,
}

/// What begins a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// The context of what has none: beginning of sequence, or end of sequence where there is no beginning.
    pub empty: Option<u32>,
    /// Put before every context that does not begin with its text.
    pub always: Option<u32>,
}

impl Start {
    /// Texts begin with their own tokens, and what has none cannot be asked.
    pub const NOTHING: Start = Start { empty: None, always: None };

    /// Of a model. Err: `Always` of a model without a beginning-of-sequence token.
    pub fn of(stored: &Stored, when: BeginOfSequence) -> Result<Start> {
        let bos = hf::bos_id(stored)?;
        let empty = bos.or(hf::eos_ids(stored)?.first().copied());
        match (when, bos) {
            (BeginOfSequence::Auto, Some(bos)) if hf::adds_first(stored, bos)? => Ok(Start { empty, always: Some(bos) }),
            (BeginOfSequence::WhenEmpty | BeginOfSequence::Auto, _) => Ok(Start { empty, always: None }),
            (BeginOfSequence::Always, Some(bos)) => Ok(Start { empty, always: Some(bos) }),
            (BeginOfSequence::Always, None) => {
                Err(Error::recipe("--bos always: the model has no beginning-of-sequence token").remedy("use --bos empty"))
            }
        }
    }
}

/// Before which contexts the beginning-of-sequence token stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BeginOfSequence {
    /// As the tokenizer that the model came with asks for; where it asks for nothing, those without any text.
    Auto,
    /// Those without any text.
    WhenEmpty,
    /// All.
    Always,
}

impl std::str::FromStr for BeginOfSequence {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<BeginOfSequence, String> {
        match text {
            "auto" => Ok(BeginOfSequence::Auto),
            "empty" => Ok(BeginOfSequence::WhenEmpty),
            "always" => Ok(BeginOfSequence::Always),
            other => Err(format!("{other:?} is none of auto, empty and always")),
        }
    }
}

impl Pair {
    /// Both texts as tokens: white space at the end of the context goes to the continuation, both are encoded in one, and cut where
    /// the context alone would end. Err: one of the two has no tokens.
    pub fn encode(tokenizer: &Tokenizer, context: &str, continuation: &str, start: Start) -> std::result::Result<Pair, String> {
        if context.is_empty() {
            return Pair::without_context(tokenizer.encode_named(continuation), start.empty);
        }
        let trimmed = context.trim_end_matches(is_python_space);
        let alone = encode(tokenizer, trimmed, start);
        let whole = encode(tokenizer, &[context, continuation].concat(), start);
        if alone.is_empty() {
            return Err(format!("the context {context:?} has no tokens"));
        }
        match whole.get(alone.len()..) {
            Some(rest) if !rest.is_empty() => Ok(Pair { continuation: rest.to_vec(), context: alone }),
            _ => Err(format!("{continuation:?} adds no token to its context")),
        }
    }

    fn without_context(mut continuation: Vec<u32>, empty: Option<u32>) -> std::result::Result<Pair, String> {
        let start = empty.ok_or("the context is empty, and the model has neither a beginning- nor an end-of-sequence token")?;
        if continuation.first() == Some(&start) {
            continuation.remove(0);
        }
        match continuation.is_empty() {
            true => Err("the context is empty, and the continuation has no tokens".into()),
            false => Ok(Pair { context: vec![start], continuation }),
        }
    }

    /// Context and continuation in one.
    pub fn joined(&self) -> Vec<u32> {
        [&self.context[..], &self.continuation].concat()
    }

    /// What a model of this longest sequence sees: the context loses tokens from its left. How many. Err: the continuation alone is too
    /// long.
    pub fn cut(&mut self, max_tokens: usize) -> std::result::Result<usize, String> {
        let n = self.continuation.len();
        if n > max_tokens {
            return Err(format!("a continuation has {n} tokens, the model's longest sequence is {max_tokens}"));
        }
        // The last token is a target only.
        let n_cut = (self.context.len() + n).saturating_sub(max_tokens + 1);
        self.context.drain(..n_cut);
        Ok(n_cut)
    }
}

/// The tokens of a text that begins a sequence. One that names the beginning itself has it once.
pub fn encode(tokenizer: &Tokenizer, text: &str, start: Start) -> Vec<u32> {
    let begins = |bos: u32| tokenizer.piece_text(bos).is_some_and(|piece| text.starts_with(&piece));
    let first = start.always.filter(|&bos| !begins(bos));
    first.into_iter().chain(tokenizer.encode_named(text)).collect()
}

/// How likely a continuation is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Likelihood {
    /// Of each of its tokens, in nats.
    pub logprobs: Vec<f32>,
    /// Their sum, in f64.
    pub sum: f64,
    /// Whether none of its tokens has a more likely one in its place.
    pub is_greedy: bool,
}

/// The likelihoods of all continuations after their contexts, in order, on every rank. Collective.
pub fn likelihoods(scorer: &Scorer, chunks: &mut [Chunk], pairs: &[Pair]) -> Result<Vec<Likelihood>> {
    let joined: Vec<Vec<u32>> = pairs.iter().map(Pair::joined).collect();
    Ok(scorer.tokens(chunks, &wanted(pairs, &joined))?.into_iter().map(Likelihood::from).collect())
}

/// The continuations, of pairs that are joined.
pub fn wanted<'t>(pairs: &[Pair], joined: &'t [Vec<u32>]) -> Vec<Wanted<'t>> {
    pairs.iter().zip(joined).map(|(pair, tokens)| Wanted { tokens, first: pair.context.len() }).collect()
}

impl From<TokenScores> for Likelihood {
    fn from(TokenScores { logprobs, is_greedy }: TokenScores) -> Likelihood {
        let sum = logprobs.iter().map(|&x| f64::from(x)).sum();
        Likelihood { sum, logprobs, is_greedy: is_greedy.into_iter().all(|is| is) }
    }
}

/// Index of the largest value; the first of equal ones.
pub fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (idx, value) in values.into_iter().enumerate() {
        if value > best.1 {
            best = (idx, value);
        }
    }
    best.0
}

/// Text or its tokens.
#[derive(Deserialize)]
#[serde(untagged)]
enum Given {
    Text(String),
    Tokens(Vec<u32>),
}

/// A line of the input as typed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: String,
    context: Given,
    choices: Vec<Given>,
}

/// A choice of a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// After its context.
    pub pair: Pair,
    /// Tokens that the context lost on its left.
    pub n_cut: usize,
    /// Characters of the text; none when it was given as tokens.
    pub chars: Option<usize>,
    /// Bytes of it in UTF-8.
    pub bytes: Option<usize>,
}

/// A context and at least one continuation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// As given.
    pub id: String,
    /// In order.
    pub choices: Vec<Choice>,
}

/// What a question's continuations must fit.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// The model's longest sequence.
    pub max_tokens: usize,
    /// Needed for text.
    pub tokenizer: Option<&'a Tokenizer>,
    /// What begins a sequence.
    pub start: Start,
}

/// Reads and checks a file of questions; the first wrong line is an error that names it.
pub fn read_questions(path: &Path, limits: Limits) -> Result<Vec<Question>> {
    score_input::read(path, "a line is {\"id\", \"context\", \"choices\": [..]}, texts or lists of tokens", |line| {
        checked(line, limits).map_err(|what| Wrong { what, remedy: "correct the line" })
    })
}

fn checked(line: Line, limits: Limits) -> std::result::Result<Question, String> {
    if line.choices.is_empty() {
        return Err("has no choices".into());
    }
    let choice = |(idx, given): (usize, Given)| -> std::result::Result<Choice, String> {
        let named = |what: String| format!("choice {idx}: {what}");
        let (mut pair, text) = match (&line.context, given) {
            (Given::Text(context), Given::Text(text)) => {
                let tokenizer = limits.tokenizer.ok_or_else(|| named("has text, but the checkpoint has no tokenizer".into()))?;
                (Pair::encode(tokenizer, context, &text, limits.start).map_err(named)?, Some(text))
            }
            (Given::Tokens(context), Given::Tokens(tokens)) => (Pair { context: context.clone(), continuation: tokens }, None),
            _ => return Err(named("context and choices must both be texts, or both be lists of tokens".into())),
        };
        if pair.context.is_empty() || pair.continuation.is_empty() {
            return Err(named("context and choice need at least one token each".into()));
        }
        if let Some(token) = pair.context.iter().chain(&pair.continuation).find(|&&token| token as usize >= limits.vocab_size) {
            return Err(named(format!("token {token} is not below the vocabulary size {}", limits.vocab_size)));
        }
        let n_cut = pair.cut(limits.max_tokens).map_err(named)?;
        let (chars, bytes) = (text.as_ref().map(|text| text.chars().count()), text.as_ref().map(String::len));
        Ok(Choice { pair, n_cut, chars, bytes })
    };
    let choices = line.choices.into_iter().enumerate().map(choice).collect::<std::result::Result<_, _>>()?;
    Ok(Question { id: line.id, choices })
}

/// A scored choice.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ScoredChoice {
    /// The tokens that were scored.
    pub tokens: Vec<u32>,
    /// How likely they are.
    #[serde(flatten)]
    pub likelihood: Likelihood,
    /// Characters of the text as given; null for tokens.
    pub chars: Option<usize>,
    /// Bytes of it in UTF-8; null for tokens.
    pub bytes: Option<usize>,
    /// Tokens that the context lost on its left to fit the model.
    pub n_cut: usize,
}

/// A scored question: one line of the output.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ScoredQuestion {
    /// As given.
    pub id: String,
    /// In the order given.
    pub choices: Vec<ScoredChoice>,
    /// The choice of the largest sum; the first of equal ones.
    pub argmax: usize,
    /// That of the largest sum by characters; null for tokens.
    pub argmax_per_char: Option<usize>,
    /// That of the largest sum by bytes; null for tokens.
    pub argmax_per_byte: Option<usize>,
}

/// Scores all questions; the result is in their order and the same on every rank. Collective.
pub fn choices(scorer: &Scorer, chunks: &mut [Chunk], questions: &[Question]) -> Result<Vec<ScoredQuestion>> {
    Ok(scored(questions, likelihoods(scorer, chunks, &pairs(questions))?))
}

/// Every choice of every question, in order.
pub fn pairs(questions: &[Question]) -> Vec<Pair> {
    questions.iter().flat_map(|question| question.choices.iter().map(|choice| choice.pair.clone())).collect()
}

/// The questions with the likelihoods of their `pairs`.
pub fn scored(questions: &[Question], likelihoods: Vec<Likelihood>) -> Vec<ScoredQuestion> {
    let mut likelihoods = likelihoods.into_iter();
    let scored = |question: &Question| {
        let one = |choice: &Choice| ScoredChoice {
            tokens: choice.pair.continuation.clone(),
            likelihood: likelihoods.next().expect("one of each pair"),
            chars: choice.chars,
            bytes: choice.bytes,
            n_cut: choice.n_cut,
        };
        scored_question(question.id.clone(), question.choices.iter().map(one).collect())
    };
    questions.iter().map(scored).collect()
}

fn scored_question(id: String, choices: Vec<ScoredChoice>) -> ScoredQuestion {
    let per = |length: fn(&ScoredChoice) -> Option<usize>| {
        let values: Option<Vec<f64>> = choices.iter().map(|one| length(one).map(|n| one.likelihood.sum / n as f64)).collect();
        values.map(argmax)
    };
    ScoredQuestion {
        id,
        argmax: argmax(choices.iter().map(|one| one.likelihood.sum)),
        argmax_per_char: per(|one| one.chars),
        argmax_per_byte: per(|one| one.bytes),
        choices,
    }
}
