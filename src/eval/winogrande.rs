//! Winogrande (Sakaguchi et al. 2020), partial scoring (Trinh and Le 2018): which of two names, put into the sentence, makes what follows
//! the gap likelier.

use super::fewshot::Sampler;
use super::item::{Ask, Choices, Item, Leaf, Metrics, solved};
use super::python::strip;
use super::read::{each, json_lines};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

const SHAPE: &str = "{\"sentence\" with a _, \"option1\", \"option2\", \"answer\": \"1\" or \"2\"}";

#[derive(Deserialize)]
struct Line {
    sentence: String,
    option1: String,
    option2: String,
    answer: String,
    #[serde(rename = "qID")]
    id: Option<String>,
}

struct Doc {
    line: Line,
    /// The sentence up to its gap, filled with either option.
    filled: Vec<String>,
    /// The rest.
    rest: String,
    gold: usize,
}

impl PartialEq for Doc {
    /// As rows of the data set, which have no ids.
    fn eq(&self, other: &Doc) -> bool {
        let key = |doc: &Doc| [&doc.line.sentence, &doc.line.option1, &doc.line.option2, &doc.line.answer].map(String::clone);
        key(self) == key(other)
    }
}

fn doc(line: Line) -> std::result::Result<Doc, String> {
    let (before, after) = line.sentence.split_once('_').ok_or_else(|| format!("no _ in {:?}", line.sentence))?;
    let gold = match line.answer.as_str() {
        "1" => 0,
        "2" => 1,
        other => return Err(format!("answer {other:?} is neither \"1\" nor \"2\"")),
    };
    if line.option1.is_empty() || line.option2.is_empty() {
        return Err("an option is empty".into());
    }
    let filled = [&line.option1, &line.option2].map(|option| format!("{before}{option}")).to_vec();
    let rest = strip(after).to_string();
    Ok(Doc { filled, rest, gold, line })
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    each(path, json_lines(path, SHAPE)?, SHAPE, doc)
}

/// The sentences of `dev`, each after `n_shots` of `train`.
pub fn load(dev: &Path, train: &Path, n_shots: usize) -> Result<Leaf> {
    let (docs, pool) = (docs(dev)?, if n_shots > 0 { docs(train)? } else { Vec::new() });
    let mut sampler = Sampler::random();
    let mut items = Vec::with_capacity(docs.len());
    for (idx, doc) in docs.iter().enumerate() {
        let examples = sampler.draw(&pool, n_shots, Some(doc)).map_err(|what| Error::file(train, what).remedy("ask for fewer --shots"))?;
        let before = solved(examples.iter().map(|one| (one.filled[one.gold].clone(), one.rest.as_str())), " ");
        let contexts = doc.filled.iter().map(|filled| [before.as_str(), filled].concat()).collect();
        let continuations = vec![format!(" {}", doc.rest); 2];
        let ask = Ask::Choices(Choices { contexts, continuations, choices: doc.filled.clone(), gold: doc.gold });
        items.push(Item { id: doc.line.id.clone().unwrap_or_else(|| (idx + 1).to_string()), ask });
    }
    Ok(Leaf { name: "winogrande".into(), n_shots, metrics: Metrics::Acc, items })
}
