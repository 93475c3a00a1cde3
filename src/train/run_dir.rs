//! The run directory of a training stage: who owns it, its resolved recipe, its metrics, its checkpoints, and the manifest
//! that closes it.
//!
//! ```text
//! RUN/.lock                      the job that writes here now
//! RUN/recipe.toml                the resolved recipe
//! RUN/metrics.jsonl              one line a step, append-only
//! RUN/checkpoints/step-00000100/ artifacts of kind "checkpoint"
//! RUN/manifest.json              written last; no manifest, not finished
//! ```

use crate::artifact::{self, Manifest, RunLock};
use crate::error::{Error, IoContext, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A run directory, held by this job while it lives.
pub struct RunDir {
    path: PathBuf,
    _lock: RunLock,
}

/// What stands where a run wants to go.
pub enum Opened {
    /// The same run, finished.
    Finished,
    /// To be started or continued.
    Ours(RunDir),
}

impl RunDir {
    /// Opens or makes `path` for the run of this recipe; one process of a job calls this. Refuses a directory that another
    /// job writes, that holds a run of another recipe, or that is no run at all.
    pub fn open(path: &Path, recipe_toml: &str) -> Result<Opened> {
        let recipe_path = path.join("recipe.toml");
        if path.exists() && !recipe_path.exists() {
            let mut entries = fs::read_dir(path).at(path)?;
            if entries.next().is_some() {
                return Err(Error::file(path, "exists and is not a run (no recipe.toml)").remedy("choose another --out, or remove it first"));
            }
        }
        fs::create_dir_all(path.join("checkpoints")).at(path)?;
        let lock = RunLock::acquire(&path.join(".lock"), path)?;
        if recipe_path.exists() {
            let old = fs::read_to_string(&recipe_path).at(&recipe_path)?;
            if let Some((ours, theirs)) = first_difference(&identity(recipe_toml), &identity(&old)) {
                let wrong = format!("holds a run with another recipe: it has `{theirs}`, this one `{ours}`");
                return Err(Error::file(path, wrong).remedy("choose another --out, or go back to that recipe"));
            }
            if path.join(artifact::MANIFEST).exists() {
                return Ok(Opened::Finished);
            }
        } else {
            let tmp = path.join("recipe.toml.tmp");
            fs::write(&tmp, recipe_toml).at(&tmp)?;
            fs::File::open(&tmp).and_then(|file| file.sync_all()).at(&tmp)?;
            fs::rename(&tmp, &recipe_path).at(&recipe_path)?;
            artifact::sync_dir(path)?;
        }
        Ok(Opened::Ours(RunDir { path: path.into(), _lock: lock }))
    }

    /// Closes the run: the manifest, last.
    pub fn finish(self, recipe: serde_json::Value, inputs: Vec<artifact::Input>, counts: &[(&str, serde_json::Value)]) -> Result<()> {
        let mut manifest = Manifest::new("run", recipe, inputs);
        manifest.files = vec![artifact::checksum_as(&self.path, "metrics.jsonl")?, artifact::checksum_as(&self.path, "recipe.toml")?];
        manifest.counts = counts.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        artifact::seal(&self.path, manifest)
    }
}

/// Where the checkpoint of a step goes.
pub fn checkpoint_path(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

/// Where the metrics go.
pub fn metrics_path(run: &Path) -> PathBuf {
    run.join("metrics.jsonl")
}

/// What makes a run the run it is, one `key = value` a line: its recipe but for the layout and the micro-batch, which may
/// change from one job to the next.
fn identity(recipe_toml: &str) -> Vec<String> {
    let mut table: toml::Table = recipe_toml.parse().unwrap_or_default();
    table.remove("parallel");
    if let Some(toml::Value::Table(batch)) = table.get_mut("batch") {
        batch.remove("micro");
    }
    let mut lines = Vec::new();
    flatten("", &toml::Value::Table(table), &mut lines);
    lines
}

fn flatten(prefix: &str, value: &toml::Value, lines: &mut Vec<String>) {
    let join = |key: &str| if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&join(key), value, lines)),
        toml::Value::Array(array) => array.iter().enumerate().for_each(|(idx, value)| flatten(&join(&idx.to_string()), value, lines)),
        leaf => lines.push(format!("{prefix} = {leaf}")),
    }
}

/// The first line that differs.
fn first_difference(ours: &[String], theirs: &[String]) -> Option<(String, String)> {
    let n = ours.len().max(theirs.len());
    let line = |lines: &[String], idx: usize| lines.get(idx).cloned().unwrap_or("nothing".into());
    (0..n).map(|idx| (line(ours, idx), line(theirs, idx))).find(|(a, b)| a != b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run directory is opened by the same recipe only, by one job at a time, and never made of somebody's files.
    #[test]
    fn refuses_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let Opened::Ours(held) = RunDir::open(&run, "a = 1\n").unwrap() else { panic!("a new run") };
        drop(held);
        assert!(matches!(RunDir::open(&run, "a = 1\n[parallel]\ntp = 2\n").unwrap(), Opened::Ours(_)), "another layout is the same run");
        let error = RunDir::open(&run, "a = 2\n").err().unwrap();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("`a = 1`") && error.to_string().contains("`a = 2`"), "{error}");
        let foreign = dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("thesis.tex"), "x").unwrap();
        assert_eq!(RunDir::open(&foreign, "a = 1\n").err().unwrap().exit_code(), 3);
    }
}
