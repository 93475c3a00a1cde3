//! What makes a run the run it is, and what may change from one job to the next: the layout, the micro-batch, where the shards
//! lie, when to save and what to record may; data, tokenizer, model and the rest of the recipe only when the user says so, which
//! is then part of the run's lineage.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// What can differ between a run and the job that would go on with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Changed {
    /// The samples or their order.
    Data,
    /// What the ids stand for.
    Tokenizer,
    /// The function.
    Model,
    /// Any other key of the recipe.
    Recipe,
}

impl Changed {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Changed::Data => "data",
            Changed::Tokenizer => "tokenizer",
            Changed::Model => "model",
            Changed::Recipe => "recipe",
        }
    }
}

impl FromStr for Changed {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Changed, String> {
        let all = [Changed::Data, Changed::Tokenizer, Changed::Model, Changed::Recipe];
        all.into_iter().find(|changed| changed.name() == name).ok_or_else(|| "expected data, tokenizer, model or recipe".into())
    }
}

/// A change that the user accepted; every later checkpoint of the run carries it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Accepted {
    /// What changed.
    pub what: Changed,
    /// Steps done when it did.
    pub at_step: u64,
    /// Before: a fingerprint, or `key = value`.
    pub was: String,
    /// Since.
    pub is: String,
}

/// Two values that should be one.
pub(super) struct Difference {
    pub what: Changed,
    /// Of the run as it was.
    pub was: String,
    /// Of this job.
    pub is: String,
    /// What exactly, beyond the values; may be empty.
    pub detail: String,
}

/// Sorts differences into those that the user accepted and the first that he did not, which is an error that names both values
/// and the flag. `place` is where the run is, as the subject of the message.
pub(super) fn accept(place: &str, differences: Vec<Difference>, accepted: &[Changed], at_step: u64) -> Result<Vec<Accepted>> {
    let mut changes = Vec::new();
    for Difference { what, was, is, detail } in differences {
        if !accepted.contains(&what) {
            let (name, detail) = (what.name(), if detail.is_empty() { detail } else { format!(" ({detail})") });
            let wrong = format!("{place} was made with {name} {was}, this job has {name} {is}{detail}");
            return Err(Error::new(crate::error::Kind::File, wrong)
                .remedy(format!("go back to that {name}, choose another --out, or say that it is meant with --accept-changed {name}")));
        }
        changes.push(Accepted { what, at_step, was, is });
    }
    Ok(changes)
}

/// The lines of two recipes that differ, `key = value` each, without what may change freely.
pub(super) fn recipe_differences(was: &str, is: &str) -> Vec<Difference> {
    let (was, is) = (identity(was), identity(is));
    let value = |lines: &[(String, String)], key: &str| lines.iter().find(|(other, _)| other == key).map(|(_, value)| value.clone());
    let mut keys: Vec<&String> = is.iter().map(|(key, _)| key).collect();
    keys.extend(was.iter().map(|(key, _)| key).filter(|key| value(&is, key).is_none()));
    let line = |key: &str, value: Option<String>| format!("`{key} = {}`", value.unwrap_or("nothing".into()));
    let differ = |key: &&String| value(&was, key) != value(&is, key);
    let difference = |key: &String| {
        let (was, is) = (line(key, value(&was, key)), line(key, value(&is, key)));
        Difference { what: kind_of(key), was, is, detail: String::new() }
    };
    keys.into_iter().filter(differ).map(difference).collect()
}

/// What a key of the recipe belongs to.
fn kind_of(key: &str) -> Changed {
    let of_phase = key.strip_prefix("phase.").and_then(|rest| rest.split_once('.')).is_some_and(|(_, key)| key.starts_with("data."));
    if key.starts_with("model.") {
        Changed::Model
    } else if of_phase || key.starts_with("data.") {
        Changed::Data
    } else {
        Changed::Recipe
    }
}

/// Keys and values of a recipe but for the layout, recompute, the micro-batch, the places of shards, the cadence of
/// checkpoints and what is recorded.
fn identity(recipe_toml: &str) -> Vec<(String, String)> {
    let table: toml::Table = recipe_toml.parse().unwrap_or_default();
    let mut lines = Vec::new();
    flatten("", &toml::Value::Table(table), &mut lines);
    let is_free = |key: &str| {
        key.starts_with("parallel.")
            || key.starts_with("checkpoint.")
            || key.starts_with("train.recompute")
            || key.starts_with("observe.")
            || key == "batch.micro"
            || key.ends_with(".shards")
    };
    lines.retain(|(key, _)| !is_free(key));
    lines
}

fn flatten(prefix: &str, value: &toml::Value, lines: &mut Vec<(String, String)>) {
    let join = |key: &str| if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&join(key), value, lines)),
        toml::Value::Array(array) => array.iter().enumerate().for_each(|(idx, value)| flatten(&join(&idx.to_string()), value, lines)),
        leaf => lines.push((prefix.into(), leaf.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key belongs to what the user would call it; a key that went unclassified would be accepted with the wrong flag.
    #[test]
    fn keys_belong_to_what_changed() {
        let was = "[model]\nhidden = 1\n[parallel]\ntp = 1\n[batch]\nmicro = 1\nglobal = 8\n[data]\nseed = 1\n[[data.train]]\nshards = 'a'\nweight = 1.0\n";
        let is =
            was.replace(" 1\n", " 2\n").replace("'a'", "'b'").replace("1.0", "2.0") + "[[phase]]\nname = 'x'\n[phase.data]\nseed = 3\n";
        let found: Vec<(Changed, String)> = recipe_differences(was, &is).into_iter().map(|d| (d.what, d.is)).collect();
        let expected = [
            (Changed::Model, "`model.hidden = 2`"),
            (Changed::Data, "`data.seed = 2`"),
            (Changed::Data, "`data.train.0.weight = 2.0`"),
            (Changed::Recipe, "`phase.0.name = \"x\"`"),
            (Changed::Data, "`phase.0.data.seed = 3`"),
        ];
        assert_eq!(found, expected.map(|(what, line)| (what, line.to_string())));
        assert!(recipe_differences(was, was).is_empty());
        let removed = recipe_differences(&is, was);
        assert!(removed.iter().any(|d| d.is == "`phase.0.name = nothing`" && d.what == Changed::Recipe));
    }

    /// One difference that was not accepted refuses all, with both values and the flag that accepts it.
    #[test]
    fn what_is_not_accepted_is_refused() {
        let differences = || recipe_differences("[data]\nseed = 1\n[train]\nseed = 1\n", "[data]\nseed = 2\n[train]\nseed = 2\n");
        let error = accept("run", differences(), &[Changed::Data], 7).expect_err("the seed of [train]");
        let line = error.to_string();
        assert!(
            line.contains("`train.seed = 1`") && line.contains("`train.seed = 2`") && line.contains("--accept-changed recipe"),
            "{line}"
        );
        let accepted = accept("run", differences(), &[Changed::Recipe, Changed::Data], 7).expect("both accepted");
        assert_eq!(accepted.len(), 2);
        assert!(accepted.iter().all(|change| change.at_step == 7));
    }
}
