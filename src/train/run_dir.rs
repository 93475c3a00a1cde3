//! The run directory of a training stage: who owns it, its resolved recipe, its metrics, its checkpoints, and the manifest
//! that closes it.
//!
//! ```text
//! RUN/.lock                      the job that writes here now
//! RUN/recipe.toml                the resolved recipe of the newest job
//! RUN/metrics.jsonl              one line a step, append-only
//! RUN/events.out.tfevents..      the same for TensorBoard
//! RUN/flight/                    what each rank of the last job recorded of itself
//! RUN/ledger.jsonl               which samples each step consumed, append-only
//! RUN/checkpoints/step-00000100/ artifacts of kind "checkpoint"
//! RUN/manifest.json              written last; no manifest, not finished
//! ```

use super::identity::{self, Changed};
use crate::artifact::{self, Manifest, RunLock};
use crate::checkpoint;
use crate::error::{Error, IoContext, Result};
use crate::metrics::EVENTS_FILE;
use std::fs;
use std::path::{Path, PathBuf};

/// A run directory, held by this job while it lives.
pub struct RunDir {
    path: PathBuf,
    _lock: RunLock,
}

/// What stands where a run wants to go.
pub enum Opened {
    /// The same run, finished: its manifest.
    Finished(Manifest),
    /// To be started or continued.
    Ours(RunDir),
}

impl RunDir {
    /// Opens or makes `path` for the run of this recipe; one process of a job calls this. Refuses a directory that another
    /// job writes, that holds a run of another recipe (unless the change is accepted), or that is no run at all. A run with
    /// checkpoints is compared with the newest of them when it is loaded, not here.
    pub fn open(path: &Path, recipe_toml: &str, accepted: &[Changed]) -> Result<Opened> {
        let recipe_path = path.join("recipe.toml");
        if path.exists() && !recipe_path.exists() && holds_anything_foreign(path)? {
            return Err(Error::file(path, "exists and is not a run (no recipe.toml)").remedy("choose another --out, or remove it first"));
        }
        fs::create_dir_all(path.join("checkpoints")).at(path)?;
        let lock = RunLock::acquire(&path.join(".lock"), path)?;
        if !recipe_path.exists() {
            let run_dir = RunDir { path: path.into(), _lock: lock };
            run_dir.adopt(recipe_toml)?;
            return Ok(Opened::Ours(run_dir));
        }
        let old = || fs::read_to_string(&recipe_path).at(&recipe_path);
        if path.join(artifact::MANIFEST).exists() {
            if let Some(difference) = identity::recipe_differences(&old()?, recipe_toml).into_iter().next() {
                let wrong = format!("a run that was finished with {}, this job has {}", difference.was, difference.is);
                return Err(Error::file(path, wrong).remedy("choose another --out"));
            }
            return Ok(Opened::Finished(Manifest::load(path)?));
        }
        if checkpoint::list(path)?.is_empty() {
            identity::accept(&path.display().to_string(), identity::recipe_differences(&old()?, recipe_toml), accepted, 0)?;
        }
        Ok(Opened::Ours(RunDir { path: path.into(), _lock: lock }))
    }

    /// Makes this the recipe of the run.
    pub fn adopt(&self, recipe_toml: &str) -> Result<()> {
        let recipe_path = self.path.join("recipe.toml");
        if fs::read_to_string(&recipe_path).is_ok_and(|old| old == recipe_toml) {
            return Ok(());
        }
        artifact::write_atomically(&self.path, "recipe.toml", recipe_toml.as_bytes())
    }

    /// Closes the run: the manifest, last.
    pub fn finish(self, recipe: serde_json::Value, inputs: Vec<artifact::Input>, counts: &[(&str, serde_json::Value)]) -> Result<()> {
        let mut manifest = Manifest::new("run", recipe, inputs);
        let files = ["ledger.jsonl", "metrics.jsonl", "recipe.toml", EVENTS_FILE];
        manifest.files = files.iter().map(|name| artifact::checksum_as(&self.path, name)).collect::<Result<_>>()?;
        manifest.counts = counts.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        artifact::seal(&self.path, manifest)
    }
}

/// Whether there is more than what a job leaves that ended before its recipe was written.
fn holds_anything_foreign(path: &Path) -> Result<bool> {
    for entry in fs::read_dir(path).at(path)? {
        let entry = entry.at(path)?;
        let name = entry.file_name();
        let is_empty_folder = || fs::read_dir(entry.path()).is_ok_and(|mut inside| inside.next().is_none());
        let is_ours = name == ".lock" || name == ".recipe.toml.tmp" || (name == "checkpoints" && is_empty_folder());
        if !is_ours {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Where the checkpoint of a step goes.
pub fn checkpoint_path(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

/// Where the metrics go.
pub fn metrics_path(run: &Path) -> PathBuf {
    run.join("metrics.jsonl")
}

/// Where the token ledger goes.
pub fn ledger_path(run: &Path) -> PathBuf {
    run.join("ledger.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run directory is opened by the same recipe only, by one job at a time, and never made of somebody's files.
    #[test]
    fn refuses_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let Opened::Ours(held) = RunDir::open(&run, "a = 1\n", &[]).unwrap() else { panic!("a new run") };
        drop(held);
        assert!(
            matches!(RunDir::open(&run, "a = 1\n[parallel]\ntp = 2\n", &[]).unwrap(), Opened::Ours(_)),
            "another layout is the same run"
        );
        let error = RunDir::open(&run, "a = 2\n", &[Changed::Data]).err().unwrap();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("`a = 1`") && error.to_string().contains("`a = 2`"), "{error}");
        assert!(matches!(RunDir::open(&run, "a = 2\n", &[Changed::Recipe]).unwrap(), Opened::Ours(_)), "accepted");
        // A job that was killed before it wrote its recipe is not in the way.
        fs::remove_file(run.join("recipe.toml")).unwrap();
        fs::write(run.join(".recipe.toml.tmp"), "a =").unwrap();
        assert!(matches!(RunDir::open(&run, "a = 3\n", &[]).unwrap(), Opened::Ours(_)));
        let foreign = dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("thesis.tex"), "x").unwrap();
        assert_eq!(RunDir::open(&foreign, "a = 1\n", &[]).err().unwrap().exit_code(), 3);
    }
}
