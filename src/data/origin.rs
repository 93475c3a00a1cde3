//! Where the text of each document of our shards came from. Nothing is stored for it: the manifest names the corpus and how it was
//! read and split, so reading the corpus again gives the documents in their order. It knows nothing of tokens.

use super::shards::{KIND, Split};
use super::tokenize::is_held_out;
use crate::artifact::{Input, MANIFEST, Manifest};
use crate::error::{Error, Result};
use crate::text::corpus::{Corpus, Options};
use std::path::{Path, PathBuf};

/// Calls `each` with the number of every document of a split and its origin, `docs.jsonl@1024` (byte of the line) or a plain
/// file's path, until it returns false. Reads the whole corpus once: what `each` was told holds only when the checksums, which come
/// last, are those of the corpus that was tokenized.
///
/// Errors: shards without a manifest, a corpus that is gone or has changed since.
pub fn each_origin(shards: &Path, split: Split, mut each: impl FnMut(u64, &str) -> bool) -> Result<()> {
    if !shards.join(MANIFEST).is_file() {
        let wrong = "was not written by trireme-tokenize (no manifest.json): nothing tells where its documents came from";
        return Err(Error::file(shards, wrong).remedy("name documents by their number"));
    }
    let manifest = Manifest::open(shards, KIND)?;
    let was: Vec<&Input> = manifest.inputs.iter().filter(|input| input.role == "corpus").collect();
    let corpus = corpus_of(shards, &manifest, &was)?;
    let share = manifest.recipe.get("validation_share").and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let mut number = 0;
    let read = corpus.read_with_inputs("corpus", |document| {
        if is_held_out(&document.text, share) != (split == Split::Validation) {
            return true;
        }
        number += 1;
        each(number - 1, &document.source)
    });
    // What cannot be read may be so because it has changed.
    let is = read.as_ref().map_or_else(|_| corpus.inputs("corpus"), |is| Ok(is.clone()));
    for (was, is) in was.iter().zip(is?) {
        if was.fingerprint != is.fingerprint {
            let wrong = format!("has changed since it was tokenized: it is {}, was {}", is.fingerprint, was.fingerprint);
            return Err(Error::file(&is.path, wrong).remedy("name documents by their number, or put the text back"));
        }
    }
    read.map(drop)
}

/// The corpus that shards were made from, as it is now.
fn corpus_of(shards: &Path, manifest: &Manifest, was: &[&Input]) -> Result<Corpus> {
    let paths: Vec<PathBuf> = was.iter().map(|input| input.path.clone()).collect();
    let reading = &manifest.recipe["reading"];
    let mut options = Options::default();
    if let Some(field) = reading["text_field"].as_str() {
        options.text_field = field.into();
    }
    if let Some(bytes) = reading["max_document_bytes"].as_u64() {
        options.max_document_bytes = bytes as usize;
    }
    Corpus::open_with(&paths, options).map_err(|error| error.doing(format!("looking for the text of {}", shards.display())))
}
