//! GSM8K (Cobbe et al. 2021): word problems, answered in writing after solved ones.

use super::extract::Extraction;
use super::fewshot::Sampler;
use super::item::{Ask, Item, Leaf, Metrics, Prompt, solved};
use super::read::{each, json_lines};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

const SHAPE: &str = "{\"question\", \"answer\"}";
const UNTIL: &[&str] = &["Question:", "</s>", "<|im_end|>"];
const MAX_NEW_TOKENS: usize = 256;

#[derive(Deserialize, PartialEq)]
struct Doc {
    question: String,
    answer: String,
}

impl Doc {
    fn text(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    each(path, json_lines(path, SHAPE)?, SHAPE, |doc: Doc| match doc.answer.contains("#### ") {
        true => Ok(doc),
        false => Err(format!("no \"#### \" before a result in answer {:?}", doc.answer)),
    })
}

/// The problems of `test`, each after `n_shots` of `train`.
pub fn load(test: &Path, train: &Path, n_shots: usize) -> Result<Leaf> {
    let (docs, pool) = (docs(test)?, if n_shots > 0 { docs(train)? } else { Vec::new() });
    let mut sampler = Sampler::random();
    let mut items = Vec::with_capacity(docs.len());
    for (idx, doc) in docs.into_iter().enumerate() {
        let examples = sampler.draw(&pool, n_shots, None).map_err(|what| Error::file(train, what).remedy("ask for fewer --shots"))?;
        let before = solved(examples.iter().map(|one| (one.text(), one.answer.as_str())), " ");
        let text = before + &doc.text();
        let ask = Ask::Text(Prompt { text, until: UNTIL, max_new_tokens: MAX_NEW_TOKENS, target: doc.answer });
        items.push(Item { id: (idx + 1).to_string(), ask });
    }
    let metrics = Metrics::ExactMatch(&[Extraction::StrictMatch, Extraction::FlexibleExtract]);
    Ok(Leaf { name: "gsm8k".into(), n_shots, metrics, items })
}
