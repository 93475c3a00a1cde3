//! HellaSwag (Zellers et al. 2019): which of four endings goes on with what was described.

use super::fewshot::Sampler;
use super::item::{Leaf, Metrics, choices_after, solved};
use super::python::{capitalize, strip};
use super::read::{each, json_lines};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

const SHAPE: &str = "{\"activity_label\", \"ctx_a\", \"ctx_b\", \"endings\": [..], \"label\"}";

#[derive(Deserialize)]
struct Line {
    ind: Option<Value>,
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: Value,
    source_id: Option<String>,
    split: Option<String>,
}

#[derive(PartialEq)]
struct Doc {
    /// What tells rows of the same text apart.
    row: (Option<Value>, Option<String>, Option<String>),
    query: String,
    choices: Vec<String>,
    gold: usize,
}

/// The text without the marks that WikiHow's pages left in it.
fn cleaned(text: &str) -> String {
    without_brackets(&strip(text).replace(" [title]", ". ")).replace("  ", " ")
}

/// Without each `[` up to the next `]` of its line.
fn without_brackets(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(open) = rest.find('[') {
        let inside = &rest[open..];
        let end = inside.find(['\n', ']']).filter(|&end| inside[end..].starts_with(']'));
        out.push_str(&rest[..open]);
        rest = match end {
            Some(end) => &inside[end + 1..],
            None => {
                out.push('[');
                &inside[1..]
            }
        };
    }
    out + rest
}

fn doc(line: Line) -> std::result::Result<Doc, String> {
    let query = cleaned(&format!("{}: {} {}", line.activity_label, line.ctx_a, capitalize(&line.ctx_b)));
    let choices: Vec<String> = line.endings.iter().map(|ending| cleaned(ending)).collect();
    if let Some(empty) = choices.iter().position(String::is_empty) {
        return Err(format!("ending {empty} is empty"));
    }
    let label = match &line.label {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().map(|label| label as usize),
    };
    let gold = label.filter(|&label| label < choices.len());
    let gold = gold.ok_or_else(|| format!("label {} is not among the {} endings", line.label, choices.len()))?;
    Ok(Doc { row: (line.ind, line.source_id, line.split), query, choices, gold })
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    each(path, json_lines(path, SHAPE)?, SHAPE, doc)
}

/// The descriptions of `val`, each after `n_shots` of `train`.
pub fn load(val: &Path, train: &Path, n_shots: usize) -> Result<Leaf> {
    let (docs, pool) = (docs(val)?, if n_shots > 0 { docs(train)? } else { Vec::new() });
    let mut sampler = Sampler::random();
    let mut items = Vec::with_capacity(docs.len());
    for (idx, doc) in docs.iter().enumerate() {
        let examples = sampler.draw(&pool, n_shots, Some(doc)).map_err(|what| Error::file(train, what).remedy("ask for fewer --shots"))?;
        let before = solved(examples.iter().map(|one| (one.query.clone(), one.choices[one.gold].as_str())), " ");
        let id = doc.row.0.as_ref().map_or_else(|| (idx + 1).to_string(), Value::to_string);
        items.push(choices_after(id, before + &doc.query, doc.choices.clone(), doc.gold));
    }
    Ok(Leaf { name: "hellaswag".into(), n_shots, metrics: Metrics::AccAndAccNorm, items })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Python's `re.sub(r"\[.*?\]", "", text)` and the replacements around it.
    #[test]
    fn brackets_vanish_as_in_python() {
        for (text, expected) in [
            (" a [title] b [step]  c ", "a. b  c"),
            ("x [substeps] y", "x y"),
            ("[a [b] c] d", " c] d"),
            ("open [ and\n] closed", "open [ and\n] closed"),
            ("[[x]", ""),
            ("a   b", "a  b"),
        ] {
            assert_eq!(cleaned(text), expected, "{text:?}");
        }
    }
}
