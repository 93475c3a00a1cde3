//! The artifact contract: a directory written as `NAME.tmp-<job>/`, every file fsynced, a manifest written last, then
//! renamed. No manifest, no artifact. The manifest names every file with size and checksum (taken from memory while
//! writing) and the fingerprints of the inputs. This module knows nothing of tensors.
//!
//! ```text
//! .NAME.lock        who writes NAME now; gone when it is done
//! NAME.tmp-<job>/   under construction; of dead jobs, removed by the next that writes NAME
//!   journal/        of work that goes on where a dead job left it: what is made already, and from what (begun.json)
//! NAME/             finished: its files and manifest.json
//! ```

mod file;
mod lines;
mod lock;
mod manifest;
mod records;

pub use file::{
    FileEntry, HashingFile, available_bytes, checksum, checksum_as, open_plain, remove_dir_all, rename, sync_dir, verify_file,
    write_atomically,
};
pub use lines::{LineWriter, sealed_line, whole_lines};
pub use lock::{RunLock, host_name, job_id};
pub use manifest::{FORMAT, Input, MANIFEST, Manifest, input};
pub use records::{RecordWriter, record_parts, scan_records};

use crate::error::{Error, IoContext, Result};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What a stage finds where it is about to write.
pub enum Begin {
    /// The same work was finished before: nothing to do.
    Finished(Manifest),
    /// Write here.
    Write(ArtifactWriter),
}

/// Folder of an artifact under construction in which work that can be continued keeps what is made already.
const JOURNAL: &str = "journal";
/// What the journal belongs to: a manifest without files.
const BEGUN: &str = "begun.json";

/// An artifact under construction. Dropped without [`ArtifactWriter::commit`], it removes what it wrote, but for a journal with
/// something in it.
pub struct ArtifactWriter {
    out: PathBuf,
    tmp: PathBuf,
    kind: &'static str,
    recipe: serde_json::Value,
    inputs: Vec<Input>,
    files: Vec<FileEntry>,
    counts: BTreeMap<String, serde_json::Value>,
    committed: bool,
    has_journal: bool,
    _lock: RunLock,
}

impl ArtifactWriter {
    /// Starts `out`. Finished before with the same recipe and inputs: `Begin::Finished`. Finished with others, being written
    /// by another job, or something that is no artifact: an error that says which. One process of a job calls this.
    pub fn begin(out: &Path, kind: &'static str, recipe: serde_json::Value, inputs: Vec<Input>) -> Result<Begin> {
        ArtifactWriter::begin_with(out, kind, recipe, inputs, Leftovers::Remove)
    }

    /// The same for work that keeps what is made in [`ArtifactWriter::journal_dir`]: what a dead job left of the same recipe and inputs
    /// is taken over, whatever job it was; what one left of others is an error that says both values.
    pub fn begin_or_continue(out: &Path, kind: &'static str, recipe: serde_json::Value, inputs: Vec<Input>) -> Result<Begin> {
        ArtifactWriter::begin_with(out, kind, recipe, inputs, Leftovers::Continue)
    }

    fn begin_with(out: &Path, kind: &'static str, recipe: serde_json::Value, inputs: Vec<Input>, leftovers: Leftovers) -> Result<Begin> {
        let parent = parent_of(out);
        let name = out.file_name().ok_or_else(|| Error::file(out, "has no file name").remedy("choose another --out"))?;
        let lock_path = parent.join(joined(&[OsStr::new("."), name, OsStr::new(".lock")]));
        // Before the lock, so that what is finished needs no permission to write; and again under it, because the one who held
        // it may just have finished.
        if let Some(finished) = look(out, kind, &recipe, &inputs)? {
            if lock_path.exists() {
                drop(RunLock::acquire(&lock_path, out)); // removes what a job left that died right after the rename
            }
            return Ok(Begin::Finished(finished));
        }
        fs::create_dir_all(parent).at(parent)?;
        let lock = RunLock::acquire(&lock_path, out)?;
        if let Some(finished) = look(out, kind, &recipe, &inputs)? {
            return Ok(Begin::Finished(finished));
        }
        let tmp_prefix = joined(&[name, OsStr::new(".tmp-")]);
        let left = remove_unfinished(parent, &tmp_prefix, leftovers)?;
        let tmp = parent.join(joined(&[&tmp_prefix, OsStr::new(&job_id())]));
        let (files, counts, has_journal) = (Vec::new(), BTreeMap::new(), leftovers == Leftovers::Continue);
        let new = ArtifactWriter { out: out.into(), tmp, kind, recipe, inputs, files, counts, committed: false, has_journal, _lock: lock };
        match (leftovers, left) {
            (Leftovers::Remove, None) => {
                file::create_dir(&new.tmp)?;
                Ok(Begin::Write(new))
            }
            (Leftovers::Continue, None) => new.start_journal(),
            (Leftovers::Remove, Some(left)) => Err(interrupted(&left, "an interrupted job left work there that can be continued")),
            (Leftovers::Continue, Some(left)) => new.take_over(&left),
        }
    }

    fn start_journal(self) -> Result<Begin> {
        file::create_dir(&self.tmp)?;
        file::create_dir(&self.journal_dir())?;
        Manifest::new(self.kind, self.recipe.clone(), self.inputs.clone()).seal_as(&self.journal_dir(), BEGUN)?;
        Ok(Begin::Write(self))
    }

    /// Goes on with what a dead job left, if it is the same work.
    fn take_over(mut self, left: &Path) -> Result<Begin> {
        self.committed = true; // nothing of it is removed when this fails
        let complete = left.join(MANIFEST).is_file();
        let begun = if complete { Manifest::load(left)? } else { Manifest::load_as(&left.join(JOURNAL), BEGUN)? };
        let difference = if begun.kind == self.kind { begun.difference(&self.recipe, &self.inputs) } else { Some(String::new()) };
        if let Some(difference) = difference {
            let wrong = format!("an interrupted job left unfinished {} there, made {difference}", begun.kind);
            return Err(interrupted(left, wrong.trim_end_matches(", made ")));
        }
        if complete {
            // It died between its manifest and the last rename.
            Manifest::open(left, self.kind)?;
            self.give_name(left)?;
            return Ok(Begin::Finished(begun));
        }
        if left != self.tmp {
            file::rename(left, &self.tmp)?;
        }
        for entry in fs::read_dir(&self.tmp).at(&self.tmp)? {
            let path = entry.at(&self.tmp)?.path();
            if path.is_file() {
                file::remove_file(&path)?; // half-written: made from the journal again
            }
        }
        self.committed = false;
        Ok(Begin::Write(self))
    }

    /// Where work that can be continued keeps what is made already; it is gone when the artifact is committed.
    pub fn journal_dir(&self) -> PathBuf {
        self.tmp.join(JOURNAL)
    }

    /// The directory to write files into (also by other ranks of the job).
    pub fn dir(&self) -> &Path {
        &self.tmp
    }

    /// Registers a closed file.
    pub fn add(&mut self, file: FileEntry) {
        self.files.push(file);
    }

    /// Sets a count.
    pub fn count(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.counts.insert(name.into(), value.into());
    }

    /// Writes the manifest, syncs, renames. After this the artifact exists.
    pub fn commit(mut self) -> Result<Manifest> {
        let mut manifest = Manifest::new(self.kind, self.recipe.clone(), self.inputs.clone());
        manifest.files = std::mem::take(&mut self.files);
        manifest.counts = std::mem::take(&mut self.counts);
        check_sizes(&self.tmp, &manifest.files)?;
        let manifest = manifest.seal(&self.tmp)?;
        self.give_name(&self.tmp)?;
        self.committed = true;
        Ok(manifest)
    }

    /// Makes a directory with its manifest the artifact. One who dies in between leaves what the next finishes.
    fn give_name(&self, complete: &Path) -> Result<()> {
        if complete.join(JOURNAL).is_dir() {
            file::remove_dir_all(&complete.join(JOURNAL))?;
        }
        file::rename(complete, &self.out)?; // over an empty directory at most, as begin() saw
        sync_dir(parent_of(&self.out))
    }
}

/// What becomes of what a dead job left.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leftovers {
    Remove,
    Continue,
}

fn interrupted(left: &Path, wrong: &str) -> Error {
    Error::file(left, wrong).remedy("run that job again, choose another --out, or remove this directory to begin anew")
}

impl Drop for ArtifactWriter {
    fn drop(&mut self) {
        let is_in_use = self.has_journal && holds_more_than(&self.journal_dir(), BEGUN);
        if !self.committed && !is_in_use {
            let _ = file::remove_dir_all(&self.tmp); // best effort: the next run removes it by name
        }
    }
}

/// Closes a directory that grew in place (a run) as an artifact: its files are made durable, then the manifest appears, last.
pub fn seal(dir: &Path, manifest: Manifest) -> Result<()> {
    check_sizes(dir, &manifest.files)?;
    for file in &manifest.files {
        let path = dir.join(&file.name);
        fs::File::open(&path).and_then(|file| file.sync_all()).at(&path)?;
    }
    manifest.seal(dir).map(drop)
}

/// What stands at `out`: the same work finished; nothing, or an empty directory; or what must not be overwritten, an error.
fn look(out: &Path, kind: &str, recipe: &serde_json::Value, inputs: &[Input]) -> Result<Option<Manifest>> {
    const REMEDY: &str = "choose another --out, or remove it first";
    if fs::symlink_metadata(out).is_err() {
        return Ok(None);
    }
    if out.join(MANIFEST).is_file() {
        let old = Manifest::open(out, kind).map_err(|error| error.doing(format!("{} is taken", out.display())).remedy(REMEDY))?;
        return match old.difference(recipe, inputs) {
            None => Ok(Some(old)),
            Some(difference) => {
                let wrong = format!("holds a {kind} made {difference}");
                Err(Error::file(out, wrong).remedy(REMEDY))
            }
        };
    }
    let is_empty_dir = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    let is_link = fs::symlink_metadata(out).is_ok_and(|metadata| metadata.is_symlink());
    if !is_empty_dir || is_link {
        return Err(Error::file(out, format!("exists and is not a finished {kind}")).remedy(REMEDY));
    }
    Ok(None)
}

/// Removes what dead jobs left of the same artifact, but for what can be continued, which is returned; the lock says that no other job
/// is at it.
fn remove_unfinished(parent: &Path, prefix: &OsStr, leftovers: Leftovers) -> Result<Option<PathBuf>> {
    let mut kept = None;
    for entry in fs::read_dir(parent).at(parent)? {
        let path = entry.at(parent)?.path();
        if !path.file_name().is_some_and(|name| name.as_bytes().starts_with(prefix.as_bytes())) || !path.is_dir() {
            continue;
        }
        // Who commits removes the journal when the manifest is there.
        let is_complete = leftovers == Leftovers::Continue && path.join(MANIFEST).is_file();
        if !is_complete && !path.join(JOURNAL).join(BEGUN).is_file() {
            log::info!("{}: left by a job that ended early, removed", path.display());
            file::remove_dir_all(&path)?;
        } else if let Some(other) = kept.replace(path) {
            return Err(interrupted(&other, "two interrupted jobs left work there"));
        }
    }
    Ok(kept)
}

/// Whether a folder has anything in it beside this and empty files.
fn holds_more_than(dir: &Path, name: &str) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| entry.file_name() != name && entry.metadata().is_ok_and(|metadata| metadata.len() > 0))
}

/// What was registered is on the disk, whoever wrote it.
fn check_sizes(dir: &Path, files: &[FileEntry]) -> Result<()> {
    for file in files {
        let path = dir.join(&file.name);
        let found = fs::metadata(&path).at(&path)?.len();
        if found != file.bytes {
            let wrong = format!("{found} bytes, {} were written", file.bytes);
            return Err(Error::file(&path, wrong).remedy("something else writes there, or the file system lost data: run again"));
        }
    }
    Ok(())
}

fn joined(parts: &[&OsStr]) -> OsString {
    parts.iter().copied().collect()
}

/// The directory that holds a path.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
