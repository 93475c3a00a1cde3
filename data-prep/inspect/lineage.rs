//! What an artifact was made from, as a tree down to the raw text. A branch is followed where the fingerprint of what lies
//! there now is the recorded one; otherwise the tree says that it has changed or is gone.

use crate::page::date;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use trireme::artifact::{self, Input, MANIFEST, Manifest};
use trireme::data::shards::{Split, TokenShards};
use trireme::error::{Error, Result};
use trireme::text::corpus::Corpus;

/// A line of the tree and what hangs under it.
struct Node {
    line: String,
    children: Vec<Node>,
}

/// The tree of an artifact (or of a checkpoint's run).
pub fn tree(path: &Path) -> Result<String> {
    if !path.join(MANIFEST).is_file() {
        let wrong = format!("no lineage: it has no {MANIFEST}");
        return Err(Error::file(path, wrong).remedy("name a finished artifact, or one of the run's checkpoints"));
    }
    let manifest = crate::open(path)?;
    let root = node_of(path, &manifest, "", &mut HashSet::new());
    let mut out = format!("{}\n", root.line);
    draw(&root.children, "", &mut out);
    Ok(out)
}

fn draw(children: &[Node], indent: &str, out: &mut String) {
    for (i, child) in children.iter().enumerate() {
        let (branch, below) = if i + 1 == children.len() { ("\u{2514}\u{2500} ", "   ") } else { ("\u{251c}\u{2500} ", "\u{2502}  ") };
        out.push_str(&format!("{indent}{branch}{}\n", child.line));
        draw(&child.children, &format!("{indent}{below}"), out);
    }
}

fn node_of(path: &Path, manifest: &Manifest, role: &str, seen: &mut HashSet<String>) -> Node {
    let role = if role.is_empty() || role == manifest.kind { String::new() } else { format!("{role}: ") };
    let counts: Vec<String> =
        manifest.counts.iter().filter(|(_, value)| value.is_number()).map(|(name, value)| format!("{name} {value}")).collect();
    let counts = if counts.is_empty() { String::new() } else { format!(", {}", counts.join(", ")) };
    let line = format!(
        "{role}{} {} ({}{counts}) [{}]",
        manifest.kind,
        path.display(),
        date(manifest.written_unix_s),
        &manifest.fingerprint[..12.min(manifest.fingerprint.len())]
    );
    if !seen.insert(manifest.fingerprint.clone()) {
        return Node { line: format!("{line}, as above"), children: vec![] };
    }
    let mut children: Vec<Node> = crate::page::accepted_changes(manifest).into_iter().map(|line| Node { line, children: vec![] }).collect();
    children.extend(manifest.inputs.iter().map(|input| node_of_input(path, input, seen)));
    if manifest.kind == "checkpoint" {
        let started_from = manifest.recipe.pointer("/trainer/started_from").cloned().unwrap_or_default();
        let started_from: Option<Input> = serde_json::from_value(started_from).unwrap_or_default();
        children.extend(started_from.map(|input| node_of_input(path, &input, seen)));
        children.extend(run_around(path, seen));
    }
    Node { line, children }
}

/// A checkpoint says little of its inputs; the run that it lies in (RUN/checkpoints/step-N) says all.
fn run_around(checkpoint: &Path, seen: &mut HashSet<String>) -> Option<Node> {
    let checkpoint = checkpoint.canonicalize().ok()?;
    let run = checkpoint.parent()?.parent()?;
    if run.join(MANIFEST).is_file() {
        let manifest = crate::open(run).ok()?;
        return Some(node_of(run, &manifest, "part of", seen));
    }
    run.join("recipe.toml")
        .is_file()
        .then(|| Node { line: format!("part of: run {} (unfinished: its inputs are not recorded yet)", run.display()), children: vec![] })
}

fn node_of_input(owner: &Path, input: &Input, seen: &mut HashSet<String>) -> Node {
    let leaf = |says: String| Node { line: format!("{}: {} {says}", input.role, input.path.display()), children: vec![] };
    if let Some(now) = tokens_without_manifest(owner, input) {
        let same = now == input.fingerprint;
        return leaf(if same {
            format!("[{now}], unchanged")
        } else {
            format!("has changed since: it is {now}, was {}", input.fingerprint)
        });
    }
    let Some(path) = find(owner, &input.path) else {
        return leaf(format!("is missing (was {})", input.fingerprint));
    };
    if path.join(MANIFEST).is_file() {
        return match crate::open(&path) {
            Ok(manifest) if manifest.fingerprint == input.fingerprint => node_of(&path, &manifest, &input.role, seen),
            Ok(manifest) => leaf(format!("has changed since: it is {}, was {}", manifest.fingerprint, input.fingerprint)),
            Err(error) => leaf(format!("is damaged: {error}")),
        };
    }
    match fingerprint_of_raw(&path) {
        Ok(now) if now == input.fingerprint => leaf(format!("[{now}], unchanged")),
        Ok(now) => leaf(format!("has changed since: it is {now}, was {}", input.fingerprint)),
        Err(error) => leaf(format!("cannot be read: {error}")),
    }
}

/// The fingerprint of tokens that another program wrote: `.bin` and `.idx` without a manifest.
fn tokens_without_manifest(owner: &Path, input: &Input) -> Option<String> {
    let split = [Split::Train, Split::Validation].into_iter().find(|split| input.role == format!("{}-tokens", split.name()))?;
    let open = |path: PathBuf| if path.join(MANIFEST).is_file() { None } else { TokenShards::open(&path, split).ok() };
    places(owner, &input.path).into_iter().find_map(open).map(|shards| shards.fingerprint().into())
}

/// Where an input is now: as recorded (from the current directory), inside the artifact, or beside it.
fn find(owner: &Path, path: &Path) -> Option<PathBuf> {
    places(owner, path).into_iter().find(|path| path.exists())
}

fn places(owner: &Path, path: &Path) -> [PathBuf; 3] {
    let beside = owner.parent().unwrap_or(Path::new("."));
    [path.to_path_buf(), owner.join(path), beside.join(path)]
}

/// A file's checksum, or a folder's as a corpus.
fn fingerprint_of_raw(path: &Path) -> Result<String> {
    if path.is_file() {
        return Ok(artifact::checksum(path)?.xxh3);
    }
    let inputs = Corpus::open(&[path.to_path_buf()])?.inputs("corpus")?;
    inputs.into_iter().next().map(|input| input.fingerprint).ok_or_else(|| Error::file(path, "an empty corpus"))
}
