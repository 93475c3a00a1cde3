//! ARC-Challenge (Clark et al. 2018): questions of school science. The rows of AI2's own file and of the Hugging Face data set.

use super::fewshot::Sampler;
use super::item::{Leaf, Metrics, choices_after, solved};
use super::read::{each, json_lines};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

const SHAPE: &str = "{\"id\", \"question\": {\"stem\", \"choices\": [{\"text\", \"label\"}]}, \"answerKey\"}, or \
                     {\"id\", \"question\", \"choices\": {\"text\": [..], \"label\": [..]}, \"answerKey\"}";

#[derive(Deserialize)]
struct Line {
    id: Option<String>,
    question: Question,
    choices: Option<Columns>,
    #[serde(rename = "answerKey")]
    answer_key: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Question {
    Text(String),
    WithChoices { stem: String, choices: Vec<Labelled> },
}

#[derive(Deserialize)]
struct Labelled {
    text: String,
    label: String,
}

#[derive(Deserialize)]
struct Columns {
    text: Vec<String>,
    label: Vec<String>,
}

#[derive(PartialEq)]
struct Doc {
    id: Option<String>,
    question: String,
    choices: Vec<String>,
    gold: usize,
}

impl Doc {
    fn text(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }
}

fn doc(line: Line) -> std::result::Result<Doc, String> {
    let (question, choices) = match (line.question, line.choices) {
        (Question::WithChoices { stem, choices }, None) => (stem, choices),
        (Question::Text(question), Some(Columns { text, label })) if text.len() == label.len() => {
            (question, text.into_iter().zip(label).map(|(text, label)| Labelled { text, label }).collect())
        }
        (Question::Text(_), Some(Columns { text, label })) => return Err(format!("{} texts, {} labels", text.len(), label.len())),
        (Question::Text(_), None) => return Err("has no choices".into()),
        (Question::WithChoices { .. }, Some(_)) => return Err("has choices twice".into()),
    };
    if let Some(empty) = choices.iter().find(|choice| choice.text.is_empty()) {
        return Err(format!("choice {} is empty", empty.label));
    }
    let gold = choices.iter().position(|choice| choice.label == line.answer_key).ok_or_else(|| {
        let labels: Vec<&str> = choices.iter().map(|choice| choice.label.as_str()).collect();
        format!("answerKey {:?} is not among the labels {labels:?}", line.answer_key)
    })?;
    Ok(Doc { id: line.id, question, choices: choices.into_iter().map(|choice| choice.text).collect(), gold })
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    each(path, json_lines(path, SHAPE)?, SHAPE, doc)
}

/// The questions of `test`, each after `n_shots` of `train`.
pub fn load(test: &Path, train: &Path, n_shots: usize) -> Result<Leaf> {
    let (docs, pool) = (docs(test)?, if n_shots > 0 { docs(train)? } else { Vec::new() });
    let mut sampler = Sampler::random();
    let mut items = Vec::with_capacity(docs.len());
    for (idx, doc) in docs.into_iter().enumerate() {
        let examples = sampler.draw(&pool, n_shots, None).map_err(|what| Error::file(train, what).remedy("ask for fewer --shots"))?;
        let before = solved(examples.iter().map(|one| (one.text(), one.choices[one.gold].as_str())), " ");
        let id = doc.id.clone().unwrap_or_else(|| (idx + 1).to_string());
        items.push(choices_after(id, before + &doc.text(), doc.choices, doc.gold));
    }
    Ok(Leaf { name: "arc_challenge".into(), n_shots, metrics: Metrics::AccAndAccNorm, items })
}
