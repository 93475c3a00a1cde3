//! Evidence: what was asked and answered, item by item, one JSON object a line. Scores are made of it alone, so that a score can be
//! made again, and two models compared, from files.

use super::item::{Ask, Leaf};
use crate::error::{Error, IoContext, Result};
use crate::infer::choices::Likelihood;
use crate::infer::request::FinishReason;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

/// One item: a line of the evidence.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Evidence {
    /// Name of the leaf task.
    pub task: String,
    /// Index of the item in it.
    pub item: usize,
    /// The file's own name of it, or its row counted from 1.
    pub id: String,
    /// What was asked and answered.
    #[serde(flatten)]
    pub answer: Answer,
    /// `metric,filter` -> its value for this item, named as in lm-evaluation-harness: `acc,none`, `exact_match,strict-match`.
    pub metrics: BTreeMap<String, f64>,
}

/// What was asked and answered.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The likelihoods of the choices.
    Choices {
        /// One for all choices, or one for each.
        contexts: Vec<Context>,
        /// In the order of the file.
        choices: Vec<Choice>,
        /// The choice of the largest sum.
        chosen: usize,
        /// The choice of the largest sum by characters.
        chosen_per_char: usize,
        /// The right one.
        gold: usize,
    },
    /// A generated text.
    Text {
        /// The whole prompt.
        prompt: String,
        /// What the model saw of it.
        prompt_tokens: Vec<u32>,
        /// Tokens of the prompt that were cut from its left.
        n_cut: usize,
        /// What the model made of it.
        tokens: Vec<u32>,
        /// Its text, up to the first stop string.
        text: String,
        /// Why it ended.
        finish_reason: FinishReason,
        /// What each filter found in the text.
        extracted: BTreeMap<String, String>,
        /// What it should be.
        target: String,
    },
}

/// The text before a choice.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Context {
    /// The whole prompt.
    pub text: String,
    /// Its tokens, before any were cut.
    pub tokens: Vec<u32>,
}

/// A choice and what the model says of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Choice {
    /// What follows the context.
    pub text: String,
    /// Characters by which its sum is divided.
    pub n_chars: usize,
    /// The tokens that were scored.
    pub tokens: Vec<u32>,
    /// Tokens that its context lost on the left to fit the model.
    pub n_cut: usize,
    /// How likely it is.
    #[serde(flatten)]
    pub likelihood: Likelihood,
}

impl Evidence {
    /// What was asked, without any model's tokens or answers.
    fn question(&self) -> serde_json::Value {
        let texts = match &self.answer {
            Answer::Choices { contexts, choices, gold, .. } => {
                let contexts: Vec<&String> = contexts.iter().map(|context| &context.text).collect();
                let choices: Vec<&String> = choices.iter().map(|choice| &choice.text).collect();
                serde_json::json!([contexts, choices, gold])
            }
            Answer::Text { prompt, target, .. } => serde_json::json!([prompt, target]),
        };
        serde_json::json!([self.task, self.item, self.id, texts])
    }
}

/// xxh3-64 of what was asked, item by item, 16 hex digits: equal for two models that were asked the same.
pub fn fingerprint(items: &[Evidence]) -> String {
    hashed(items.iter().map(Evidence::question))
}

/// The same of what is going to be asked.
pub fn fingerprint_of_leaves(leaves: &[Leaf]) -> String {
    hashed(leaves.iter().flat_map(|leaf| {
        leaf.items.iter().enumerate().map(|(idx, item)| {
            let texts = match &item.ask {
                Ask::Choices(asked) => serde_json::json!([asked.contexts, asked.continuations, asked.gold]),
                Ask::Text(asked) => serde_json::json!([asked.text, asked.target]),
            };
            serde_json::json!([leaf.name, idx, item.id, texts])
        })
    }))
}

fn hashed(questions: impl Iterator<Item = serde_json::Value>) -> String {
    let mut hash = Xxh3::new();
    questions.for_each(|question| hash.update(format!("{question}\n").as_bytes()));
    format!("{:016x}", hash.digest())
}

/// Reads the evidence of a task. Err: not there, or a line that is none.
pub fn read(path: &Path) -> Result<Vec<Evidence>> {
    let text = std::fs::read_to_string(path).at(path)?;
    let line = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let wrong = format!("line {}: not evidence of an evaluation: {error}", i + 1);
            Error::file(path, wrong).remedy("run trireme-evaluate again")
        })
    };
    text.lines().enumerate().map(line).collect()
}
