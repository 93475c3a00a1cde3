//! Which files a path stands for, and what each of them is. This file opens none of them.

use crate::error::{Error, IoContext, Result};
use std::path::{Path, PathBuf};
use walkdir::{DirEntry, WalkDir};

/// Endings of files in folders that are data rather than text.
const NOT_TEXT: [&str; 5] = [".lock", ".svg", ".map", ".sum", ".min.js"];

/// How documents lie in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// The file is one document.
    Plain,
    /// A document a line.
    Jsonl,
}

/// How a file is compressed, by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packing {
    /// Not at all.
    None,
    /// `.gz`
    Gzip,
    /// `.zst`
    Zstd,
}

/// Whether the user named the file, or it was found in a folder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Named: what is wrong with it is an error.
    Named,
    /// Found: binary and the like are skipped.
    Walked,
}

/// A file of a corpus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// The path given that led to it.
    pub root: PathBuf,
    /// Its size on disk when it was listed, not zero.
    pub bytes: u64,
    /// How documents lie in it.
    pub form: Form,
    /// How it is compressed.
    pub packing: Packing,
    /// Named or found.
    pub origin: Origin,
}

/// Appends the files that `root` stands for.
pub fn list(root: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let meta = std::fs::metadata(root).at(root)?;
    if !meta.is_dir() {
        add(root, root, meta.len(), Origin::Named, sources);
        return Ok(());
    }
    let entries = WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(|entry| entry.depth() == 0 || is_wanted(entry));
    for entry in entries {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(root).to_path_buf();
            match error.io_error() {
                Some(io) => Error::io(&path, io),
                None => Error::file(&path, error),
            }
        })?;
        if entry.file_type().is_file() {
            let bytes = entry.metadata().map_err(|error| Error::file(entry.path(), error))?.len();
            add(root, entry.path(), bytes, Origin::Walked, sources);
        }
    }
    Ok(())
}

fn is_wanted(entry: &DirEntry) -> bool {
    let name = entry.file_name().to_string_lossy();
    if name.starts_with('.') {
        return false;
    }
    if entry.file_type().is_dir() { name != "target" } else { !NOT_TEXT.iter().any(|ending| name.ends_with(ending)) }
}

fn add(root: &Path, path: &Path, bytes: u64, origin: Origin, sources: &mut Vec<Source>) {
    let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let (stem, packing) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
        (Some(stem), _) => (stem, Packing::Gzip),
        (_, Some(stem)) => (stem, Packing::Zstd),
        _ => (name.as_str(), Packing::None),
    };
    let form = if stem.ends_with(".jsonl") { Form::Jsonl } else { Form::Plain };
    if bytes > 0 {
        sources.push(Source { path: path.into(), root: root.into(), bytes, form, packing, origin });
    }
}
