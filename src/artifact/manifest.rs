//! The manifest of an artifact: what it is, what it was made from, and every file with its checksum.

use super::file::{self, FileEntry, checksum, verify_file};
use crate::error::{Error, IoContext, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// File name of the manifest in every artifact.
pub const MANIFEST: &str = "manifest.json";
/// Version of the manifest's own form.
pub const FORMAT: u32 = 1;

/// What an artifact says about itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// "tokenizer", "token-shards", "checkpoint", "responses", "scores", "run".
    pub kind: String,
    /// Version of the manifest's form.
    pub format: u32,
    /// Program and version that wrote it.
    pub producer: String,
    /// The settings it was made with, resolved.
    pub recipe: serde_json::Value,
    /// What it was made from.
    pub inputs: Vec<Input>,
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
    /// Numbers that make sense for the kind: tokens, documents, step.
    pub counts: BTreeMap<String, serde_json::Value>,
    /// xxh3-128 over kind, recipe, inputs' fingerprints, files and counts: equal content, equal fingerprint.
    pub fingerprint: String,
    /// Seconds since 1970 when it was committed; not part of the fingerprint.
    pub written_unix_s: u64,
    /// xxh3-64 over everything else, the fingerprint too: what the fingerprint leaves out is not to change unnoticed either.
    pub checksum: String,
}

/// An input of an artifact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Input {
    /// What it was used as: "tokenizer", "corpus", "checkpoint".
    pub role: String,
    /// Where it was.
    #[serde(with = "lossy_path")]
    pub path: PathBuf,
    /// Its manifest's fingerprint, or a checksum of the raw file.
    pub fingerprint: String,
}

/// JSON holds Unicode only: what is not in a path is replaced. The fingerprint, not the path, says what an input was.
mod lossy_path {
    use std::path::{Path, PathBuf};

    pub fn serialize<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&path.to_string_lossy())
    }

    pub fn deserialize<'a, D: serde::Deserializer<'a>>(from: D) -> Result<PathBuf, D::Error> {
        serde::Deserialize::deserialize(from).map(|path: String| path.into())
    }
}

impl Manifest {
    /// A manifest without files and counts, dated now.
    pub fn new(kind: &str, recipe: serde_json::Value, inputs: Vec<Input>) -> Manifest {
        Manifest {
            kind: kind.into(),
            format: FORMAT,
            producer: concat!("trireme ", env!("CARGO_PKG_VERSION")).into(),
            recipe,
            inputs,
            files: Vec::new(),
            counts: BTreeMap::new(),
            fingerprint: String::new(),
            written_unix_s: super::unix_s(),
            checksum: String::new(),
        }
    }

    /// Reads the manifest of an artifact and checks its kind, its form and that every file is there with its size.
    /// Contents are checked by [`Manifest::verify`] or by the reader of each file.
    pub fn open(artifact: &Path, kind: &str) -> Result<Manifest> {
        if !artifact.is_dir() {
            return Err(Error::file(artifact, format!("no such {kind}")).remedy("check the path"));
        }
        if !artifact.join(MANIFEST).is_file() {
            let wrong = format!("not a finished {kind}: it has no {MANIFEST}");
            return Err(Error::file(artifact, wrong).remedy("run the stage that writes it again, or check the path"));
        }
        let manifest = Manifest::load(artifact)?;
        if manifest.kind != kind {
            let wrong = format!("is a {}, expected a {kind}", manifest.kind);
            return Err(Error::file(artifact, wrong).remedy("check the path"));
        }
        for file in &manifest.files {
            let path = artifact.join(&file.name);
            let found = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let wrong = format!("missing, the manifest says {} bytes", file.bytes);
                    return Err(Error::file(&path, wrong).remedy("write the artifact again, or copy all of it"));
                }
                Err(error) => return Err(Error::io(&path, &error)),
            };
            if found != file.bytes {
                let wrong = format!("{found} bytes, the manifest says {}", file.bytes);
                return Err(Error::file(&path, wrong).remedy("the file was truncated or changed: write the artifact again"));
            }
        }
        Ok(manifest)
    }

    /// Reads the manifest of an artifact of any kind and checks that it is whole; its files are not looked at.
    pub fn load(artifact: &Path) -> Result<Manifest> {
        Manifest::load_as(artifact, MANIFEST)
    }

    /// The same from a file of another name.
    pub(super) fn load_as(dir: &Path, name: &str) -> Result<Manifest> {
        let path = dir.join(name);
        let text = fs::read(&path).at(&path)?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&path, format!("not a manifest: {error}")).remedy("write the artifact again"))?;
        if manifest.format != FORMAT {
            let wrong = format!("manifest format {}, this program reads {FORMAT}", manifest.format);
            return Err(Error::file(&path, wrong).remedy("use the program that wrote it, or write it again"));
        }
        let found = manifest.compute_checksum();
        if manifest.checksum != found {
            let wrong = format!("checksum {} does not match its contents {found}", manifest.checksum);
            return Err(Error::file(&path, wrong).remedy("the manifest was edited or damaged: write the artifact again"));
        }
        let found = manifest.compute_fingerprint();
        if manifest.fingerprint != found {
            let wrong = format!("fingerprint {} does not match its contents {found}", manifest.fingerprint);
            return Err(Error::file(&path, wrong).remedy("the manifest was edited or damaged: write the artifact again"));
        }
        Ok(manifest)
    }

    /// Reads every file and compares its checksum; several files at a time.
    pub fn verify(&self, artifact: &Path) -> Result<()> {
        let failed = |file: &FileEntry| verify_file(artifact, file).err();
        self.files.par_iter().find_map_first(failed).map_or(Ok(()), Err)
    }

    /// The entry of a file by name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// A count as u64.
    pub fn count(&self, name: &str) -> Option<u64> {
        self.counts.get(name).and_then(serde_json::Value::as_u64)
    }

    /// The first setting or input in which this artifact differs from what is asked for, with both values.
    pub(super) fn difference(&self, recipe: &serde_json::Value, inputs: &[Input]) -> Option<String> {
        if let Some(difference) = first_difference("", &self.recipe, recipe) {
            return Some(format!("with other settings: {difference}"));
        }
        let of = |inputs: &[Input], idx: usize| {
            inputs.get(idx).map_or("nothing".into(), |input| format!("{} {}", input.role, input.fingerprint))
        };
        let n = self.inputs.len().max(inputs.len());
        let (old, new) = (0..n).map(|idx| (of(&self.inputs, idx), of(inputs, idx))).find(|(old, new)| old != new)?;
        Some(format!("from other inputs: it has {old}, this would have {new}"))
    }

    /// Closes a manifest: everything is filled in but the fingerprint.
    pub(super) fn seal(self, dir: &Path) -> Result<Manifest> {
        self.seal_as(dir, MANIFEST)
    }

    /// The same as a file of another name.
    pub(super) fn seal_as(mut self, dir: &Path, name: &str) -> Result<Manifest> {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
        self.fingerprint = self.compute_fingerprint();
        self.checksum = self.compute_checksum();
        let text = serde_json::to_vec_pretty(&self).expect("a manifest is plain data");
        file::write_atomically(dir, name, &text)?;
        Ok(self)
    }

    fn compute_checksum(&self) -> String {
        let all = Manifest { checksum: String::new(), ..self.clone() };
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&serde_json::to_vec(&all).expect("a manifest is plain data")))
    }

    fn compute_fingerprint(&self) -> String {
        let inputs: Vec<&String> = self.inputs.iter().map(|input| &input.fingerprint).collect();
        let content = serde_json::json!([self.kind, self.format, self.recipe, inputs, self.files, self.counts]);
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(content.to_string().as_bytes()))
    }
}

fn first_difference(name: &str, old: &serde_json::Value, new: &serde_json::Value) -> Option<String> {
    use serde_json::Value::{Null, Object};
    if let (Object(old), Object(new)) = (old, new) {
        let join = |key: &str| if name.is_empty() { key.to_string() } else { format!("{name}.{key}") };
        let mut keys: Vec<&String> = new.keys().collect();
        keys.extend(old.keys().filter(|key| !new.contains_key(*key)));
        return keys.iter().find_map(|key| first_difference(&join(key), old.get(*key).unwrap_or(&Null), new.get(*key).unwrap_or(&Null)));
    }
    (old != new).then(|| format!("it has {name} = {old}, this would have {name} = {new}"))
}

/// An input by its path: an artifact's fingerprint, the checksum of a plain file, or, for a folder without a manifest and for
/// the common beginning of several files (`corpus` for `corpus.bin` and `corpus.idx`), one over names and checksums.
pub fn input(role: &str, path: &Path) -> Result<Input> {
    let fingerprint = if path.join(MANIFEST).is_file() {
        Manifest::load(path)?.fingerprint
    } else if path.is_file() {
        checksum(path)?.xxh3
    } else {
        let files = if path.is_dir() { files_under(path)? } else { files_called(path)? };
        if files.is_empty() {
            let wrong = if path.is_dir() { "no files in it" } else { "no such file or directory" };
            return Err(Error::file(path, wrong).remedy("check the path"));
        }
        let sums: Vec<FileEntry> = files.par_iter().map(|file| checksum(file)).collect::<Result<_>>()?;
        let lines: String = sums.iter().zip(&files).map(|(sum, file)| format!("{} {}\n", relative(file, path), sum.xxh3)).collect();
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(lines.as_bytes()))
    };
    Ok(Input { role: role.into(), path: path.to_path_buf(), fingerprint })
}

/// The name of a file without that of the folder, so that a copy elsewhere has the same fingerprint.
fn relative(file: &Path, root: &Path) -> String {
    let name = file.strip_prefix(root).ok().or(file.file_name().map(Path::new)).unwrap_or(file);
    name.to_string_lossy().into_owned()
}

fn files_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(dir).sort_by_file_name() {
        let entry = entry.map_err(|error| Error::file(dir, error).remedy("check the permissions"))?;
        if entry.file_type().is_file() {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

/// The files PREFIX.*, sorted.
fn files_called(prefix: &Path) -> Result<Vec<PathBuf>> {
    let (Some(name), dir) = (prefix.file_name(), super::parent_of(prefix)) else { return Ok(Vec::new()) };
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).at(dir)? {
        let path = entry.at(dir)?.path();
        if path.is_file() && path.file_stem() == Some(name) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
