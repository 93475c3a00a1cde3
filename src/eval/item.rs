//! What is asked of a model: items of leaf tasks. Texts only; how they become tokens is in `answers`.

use super::extract::Extraction;

/// A task whose items are scored alike.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// As in lm-evaluation-harness: `arc_challenge`, `mmlu_anatomy`, `bbh_cot_fewshot_snarks`.
    pub name: String,
    /// Solved examples before each question.
    pub n_shots: usize,
    /// What is made of an item's answer.
    pub metrics: Metrics,
    /// In the order of the file.
    pub items: Vec<Item>,
}

/// What is made of an item's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Metrics {
    /// Whether the likeliest choice is right.
    Acc,
    /// The same, and whether the likeliest choice by characters is right.
    AccAndAccNorm,
    /// Whether what a filter finds in the text is the target, for each of these filters.
    ExactMatch(&'static [Extraction]),
}

/// One question.
#[derive(Clone, PartialEq, Debug)]
pub struct Item {
    /// The file's own name of it, or its line counted from 1.
    pub id: String,
    /// What is asked.
    pub ask: Ask,
}

/// How a question is asked.
#[derive(Clone, PartialEq, Debug)]
pub enum Ask {
    /// Which continuation is the likeliest.
    Choices(Choices),
    /// What the model goes on with.
    Text(Prompt),
}

/// Continuations to compare.
#[derive(Clone, PartialEq, Debug)]
pub struct Choices {
    /// One for all continuations, or one for each.
    pub contexts: Vec<String>,
    /// What follows the context, the space between them included.
    pub continuations: Vec<String>,
    /// The choices themselves, whose lengths `acc_norm` divides by.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
}

/// A text to go on with.
#[derive(Clone, PartialEq, Debug)]
pub struct Prompt {
    /// The whole prompt.
    pub text: String,
    /// The answer ends before the first of these.
    pub until: &'static [&'static str],
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// What the answer should be.
    pub target: String,
}

/// Between two examples, and between a description and what follows.
pub const BETWEEN_EXAMPLES: &str = "\n\n";

/// The examples as they stand before a question: each question, `between`, its answer, a blank line.
pub fn solved<'a>(examples: impl IntoIterator<Item = (String, &'a str)>, between: &str) -> String {
    examples.into_iter().map(|(question, answer)| [&question, between, answer, BETWEEN_EXAMPLES].concat()).collect()
}

/// An item of one context and several continuations, a space before each.
pub fn choices_after(id: String, context: String, choices: Vec<String>, gold: usize) -> Item {
    let continuations = choices.iter().map(|choice| format!(" {choice}")).collect();
    Item { id, ask: Ask::Choices(Choices { contexts: vec![context], continuations, choices, gold }) }
}
