//! BIG-Bench Hard (Suzgun et al. 2022) with three examples of step-by-step answers, which come from the published `cot-prompts`.

use super::extract::Extraction;
use super::item::{Ask, BETWEEN_EXAMPLES, Item, Leaf, Metrics, Prompt};
use super::python::strip;
use super::read::text_of;
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

const UNTIL: &[&str] = &["</s>", "Q", "\n\n"];
const MAX_NEW_TOKENS: usize = 1024;
/// Examples of a published prompt.
pub const N_SHOTS: usize = 3;
const STEPS: &str = "A: Let's think step by step.";

/// All of them.
pub const SUBTASKS: [&str; 27] = [
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
];

#[derive(Deserialize)]
struct File {
    examples: Vec<Doc>,
}

#[derive(Deserialize)]
struct Doc {
    input: String,
    target: String,
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    const REMEDY: &str = "take the published file: {\"examples\": [{\"input\", \"target\"}, ..]}";
    // Names the line and the column.
    let file: File = serde_json::from_str(&text_of(path)?).map_err(|error| Error::file(path, error).remedy(REMEDY))?;
    if file.examples.is_empty() {
        return Err(Error::file(path, "no examples in it").remedy(REMEDY));
    }
    if let Some(idx) = file.examples.iter().position(|doc| doc.target.is_empty()) {
        return Err(Error::file(path, format!("example {}: the target is empty", idx + 1)).remedy(REMEDY));
    }
    Ok(file.examples)
}

/// What stands before each question: the description and three solved examples, as `cot-prompts/SUBTASK.txt` has them after its line of
/// dashes. The harness begins every answer on a line of its own, which one of the published prompts does not.
fn solved_examples(path: &Path) -> Result<String> {
    let wrong = |what: String| Error::file(path, what).remedy("take the published cot-prompts");
    let text = text_of(path)?;
    let prompt = text.rsplit("\n-----\n").next().filter(|prompt| prompt.len() < text.len());
    let prompt = strip(prompt.ok_or_else(|| wrong("has no line of five dashes before the prompt".into()))?);
    let n = prompt.matches("\n\nQ: ").count();
    let n_answers = prompt.matches(&format!("\n{STEPS}")).count();
    if n != N_SHOTS || n_answers != N_SHOTS {
        return Err(wrong(format!("has {n} questions and {n_answers} answers {STEPS:?}, expected {N_SHOTS} of each")));
    }
    Ok(prompt.replace(&format!("{STEPS} "), &format!("{STEPS}\n")) + BETWEEN_EXAMPLES)
}

/// One subtask from `dir/bbh/SUBTASK.json` and `dir/cot-prompts/SUBTASK.txt`.
pub fn load(dir: &Path, subtask: &str) -> Result<Leaf> {
    let docs = docs(&dir.join(format!("bbh/{subtask}.json")))?;
    let before = solved_examples(&dir.join(format!("cot-prompts/{subtask}.txt")))?;
    let item = |(idx, doc): (usize, Doc)| {
        let text = format!("{before}Q: {}\n{STEPS}\n", doc.input);
        let ask = Ask::Text(Prompt { text, until: UNTIL, max_new_tokens: MAX_NEW_TOKENS, target: doc.target });
        Item { id: (idx + 1).to_string(), ask }
    };
    let items = docs.into_iter().enumerate().map(item).collect();
    let metrics = Metrics::ExactMatch(&[Extraction::GetAnswer]);
    Ok(Leaf { name: format!("bbh_cot_fewshot_{subtask}"), n_shots: N_SHOTS, metrics, items })
}
