//! Scores: the mean of each metric over the items of a leaf, and over all items of a group, with standard errors as
//! lm-evaluation-harness states them. A pure function of the evidence.

use super::evidence::{Evidence, fingerprint};
use super::task::Group;
use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The file of complete scores.
pub const SCORES_FILE: &str = "scores.json";
/// The file of scores over the first items only.
pub const PARTIAL_FILE: &str = "scores.partial.json";

/// What an evaluation found.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Scores {
    /// Only so many items of each leaf were asked; null when all were.
    pub limit: Option<usize>,
    /// Each task as it was asked for.
    pub tasks: Vec<TaskScores>,
}

/// One task.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TaskScores {
    /// As asked for; its evidence is `NAME.jsonl`.
    pub name: String,
    /// xxh3-64 of what was asked.
    pub fingerprint: String,
    /// Groups first, the largest first of them.
    pub scores: Vec<Score>,
    /// Groups by name with their leaves.
    pub groups: BTreeMap<String, Vec<String>>,
}

/// A metric over a leaf or a group.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Score {
    /// The leaf or the group.
    pub task: String,
    /// `metric,filter`.
    pub metric: String,
    /// Its mean over the items.
    pub value: f64,
    /// Its standard error; null for a single item.
    pub stderr: Option<f64>,
    /// Items.
    pub n: usize,
    /// Solved examples before each.
    pub n_shots: usize,
}

/// The mean, and its standard error: the sample's standard deviation over sqrt(n).
fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt()))
}

/// The mean over the items of all leaves, and its standard error from the variances within the leaves, pooled.
fn joined(leaves: &[&Score]) -> (f64, Option<f64>) {
    let n: usize = leaves.iter().map(|leaf| leaf.n).sum();
    let mean = leaves.iter().map(|leaf| leaf.value * leaf.n as f64).sum::<f64>() / n as f64;
    let term = |leaf: &&Score| leaf.stderr.map(|error| (leaf.n as f64 - 1.0) * error * error * leaf.n as f64);
    let terms: Option<f64> = leaves.iter().map(term).sum();
    (mean, terms.map(|terms| (terms / (n - leaves.len()) as f64 / n as f64).sqrt()))
}

/// The scores of a task; `n_shots` of each leaf by its name.
pub fn of_task(name: &str, items: &[Evidence], groups: &[Group], n_shots: &BTreeMap<String, usize>) -> TaskScores {
    let mut leaves: Vec<&str> = items.iter().map(|item| item.task.as_str()).collect();
    leaves.dedup();
    let of_leaf = |leaf: &str| -> Vec<Score> {
        let items: Vec<&Evidence> = items.iter().filter(|item| item.task == leaf).collect();
        let score = |metric: &String| {
            let values: Vec<f64> = items.iter().map(|item| item.metrics[metric]).collect();
            let (value, stderr) = mean_and_error(&values);
            Score { task: leaf.into(), metric: metric.clone(), value, stderr, n: values.len(), n_shots: n_shots[leaf] }
        };
        items[0].metrics.keys().map(score).collect()
    };
    let of_leaves: Vec<Score> = leaves.iter().flat_map(|leaf| of_leaf(leaf)).collect();
    let of_group = |group: &Group| -> Vec<Score> {
        let here: Vec<&Score> = of_leaves.iter().filter(|score| group.leaves.contains(&score.task)).collect();
        let mut metrics: Vec<&str> = here.iter().map(|score| score.metric.as_str()).collect();
        metrics.sort_unstable();
        metrics.dedup();
        let score = |metric: &str| {
            let parts: Vec<&Score> = here.iter().copied().filter(|score| score.metric == metric).collect();
            let (value, stderr) = joined(&parts);
            let n = parts.iter().map(|part| part.n).sum();
            Score { task: group.name.clone(), metric: metric.into(), value, stderr, n, n_shots: parts[0].n_shots }
        };
        metrics.into_iter().map(score).collect()
    };
    let scores = groups.iter().flat_map(of_group).chain(of_leaves.iter().cloned()).collect();
    let groups = groups.iter().map(|group| (group.name.clone(), group.leaves.clone())).collect();
    TaskScores { name: name.into(), fingerprint: fingerprint(items), scores, groups }
}

impl Scores {
    /// The name of its file.
    pub fn file_name(&self) -> &'static str {
        if self.limit.is_some() { PARTIAL_FILE } else { SCORES_FILE }
    }

    /// Reads the scores of an evaluation.
    pub fn read(dir: &Path) -> Result<Scores> {
        let name = if dir.join(SCORES_FILE).is_file() { SCORES_FILE } else { PARTIAL_FILE };
        let path = dir.join(name);
        let text = std::fs::read(&path).at(&path)?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::file(&path, format!("not the scores of an evaluation: {error}")).remedy("run trireme-evaluate again"))
    }

    /// As a table for people.
    pub fn table(&self) -> String {
        let mut rows = vec![["task", "shots", "metric", "filter", "value", "stderr", "n"].map(String::from)];
        for score in self.tasks.iter().flat_map(|task| &task.scores) {
            let (metric, filter) = score.metric.split_once(',').unwrap_or((&score.metric, ""));
            let stderr = score.stderr.map_or("-".into(), |error| format!("{error:.4}"));
            let (value, n) = (format!("{:.4}", score.value), score.n.to_string());
            rows.push([score.task.clone(), score.n_shots.to_string(), metric.into(), filter.into(), value, stderr, n]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        let cell = |(column, text): (usize, &String)| {
            // Words to the left, numbers to the right.
            let w = widths[column];
            if matches!(column, 0 | 2 | 3) { format!("{text:w$}") } else { format!("{text:>w$}") }
        };
        let line = |row: &[String; 7]| row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_string();
        rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written out by hand: the error of the mean of 1 0 0 1 is sqrt(1/3) / 2; pooled with 1 1 0, the variances 1/3 and 1/3 stay 1/3
    /// over 5 degrees of freedom, and the error is sqrt(1/3 / 7). A single item has none, and neither has a group with it.
    #[test]
    fn errors_are_those_of_samples() {
        let (mean, error) = mean_and_error(&[1.0, 0.0, 0.0, 1.0]);
        assert!(mean == 0.5 && (error.unwrap() - (1f64 / 3.0).sqrt() / 2.0).abs() < 1e-15);
        assert_eq!(mean_and_error(&[1.0]), (1.0, None));
        let score = |values: &[f64]| {
            let (value, stderr) = mean_and_error(values);
            Score { task: String::new(), metric: String::new(), value, stderr, n: values.len(), n_shots: 0 }
        };
        let (a, b, c) = (score(&[1.0, 0.0, 0.0, 1.0]), score(&[1.0, 1.0, 0.0]), score(&[1.0]));
        let (mean, error) = joined(&[&a, &b]);
        assert!((mean - 4.0 / 7.0).abs() < 1e-15 && (error.unwrap() - (1f64 / 3.0 / 7.0).sqrt()).abs() < 1e-15, "{mean} {error:?}");
        assert_eq!(joined(&[&a, &c]).1, None);
    }
}
