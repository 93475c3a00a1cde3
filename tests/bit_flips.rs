//! One flipped bit in any file of a run and of token shards: who reads it next refuses it and names the file, or leaves out the record
//! and says so. What is not under any checksum is listed here, byte by byte. Files of checkpoints are in `checkpoint::damage` too.

mod common;

use common::{tiny_recipe, train};
use std::path::{Path, PathBuf};
use std::process::Command;
use trireme::artifact::Manifest;
use trireme::checkpoint;
use trireme::data::shards::{Split, TokenShards};
use trireme::error::Result;
use trireme::flight::rings::RankRing;
use trireme::metrics::{self, MetricsWriter};
use trireme::recipe::{Pretrain, Validation};
use trireme::rng::Random;
use trireme::train::ledger::Ledger;

/// Flips of each file.
const FLIPS: u64 = 40;

/// Calls `with` for so many flips of a file at random places: with the byte's position. The file is whole again afterwards.
fn flips(path: &Path, n: u64, mut with: impl FnMut(usize)) {
    let whole = std::fs::read(path).unwrap();
    let random = Random::new(3, path.file_name().unwrap().to_str().unwrap());
    for draw in (0..n).map(|n| random.bits(n)) {
        let (byte, bit) = (draw as usize % whole.len(), draw >> 61);
        let mut damaged = whole.clone();
        damaged[byte] ^= 1 << bit;
        std::fs::write(path, &damaged).unwrap();
        with(byte);
    }
    std::fs::write(path, &whole).unwrap();
}

/// Whether a reader refused a file by its name, with exit code 3; anything else but success is a failure of the test.
fn is_refused<T>(read: Result<T>, path: &Path, byte: usize) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    match read {
        Ok(_) => false,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(name) && error.exit_code() == 3 && !text.contains('\n'), "byte {byte} of {name}: {text}");
            true
        }
    }
}

fn files_of(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Token shards with a manifest, as the programs make them, and a recipe on them.
fn shards_and_recipe(dir: &Path) -> (PathBuf, Pretrain) {
    let text: String = (0..400).map(|i| format!("rower {} of bench {} pulls {}\n\n", i * 7 % 31, i * 3 % 17, i % 5)).collect();
    std::fs::create_dir(dir.join("text")).unwrap();
    let lines = text.split("\n\n").map(|line| serde_json::json!({ "text": line }).to_string() + "\n").collect::<String>();
    std::fs::write(dir.join("text/a.jsonl"), lines).unwrap();
    let run = |program: &str, line: &str| {
        let output = Command::new(program).args(line.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(env!("CARGO_BIN_EXE_trireme-train-tokenizer"), "--input text --vocab-size 296 --out tokenizer");
    run(env!("CARGO_BIN_EXE_trireme-tokenize"), "--input text --tokenizer tokenizer --out shards --validation-share 0.2");
    let shards = dir.join("shards");
    let mut recipe = tiny_recipe(&shards);
    recipe.model.vocab_size = 296;
    recipe.checkpoint.every_steps = 1;
    recipe.validation = Some(Validation { shards: shards.clone(), every_steps: 2, samples: 4 });
    (shards, recipe)
}

/// Token shards: tokens, index, tokenizer and manifest, either split.
#[test]
fn token_shards() {
    let dir = tempfile::tempdir().unwrap();
    let (shards, _) = shards_and_recipe(dir.path());
    let manifest = Manifest::load(&shards).unwrap();
    let files = files_of(&shards);
    let names: Vec<&str> = files.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["manifest.json", "tokenizer.model", "train.bin", "train.idx", "validation.bin", "validation.idx"]);
    for path in &files {
        flips(path, FLIPS, |byte| {
            let read = |split| TokenShards::open(&shards, split).and_then(|shards| shards.verify());
            let refused = is_refused(read(Split::Train).and_then(|()| read(Split::Validation)), path, byte);
            // 1e-5 may become 1E-5.
            let says_the_same = path.ends_with("manifest.json") && Manifest::load(&shards).is_ok_and(|found| found == manifest);
            assert!(refused || says_the_same, "byte {byte} of {} was not noticed", path.display());
        });
    }
}

/// A run under way: metrics, ledger, TensorBoard's events, the rings of the flight ledger, its recipe, its newest checkpoint.
#[test]
fn runs_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let (_, recipe) = shards_and_recipe(dir.path());
    let run = dir.path().join("run");
    train(&recipe, &run, Some(2)).unwrap();
    lines(&run.join("metrics.jsonl"), &|path| metrics::read_all(path).map(|all| all.rows.len()));
    lines(&run.join("ledger.jsonl"), &|path| Ledger::read(path).map(|ledger| ledger.entries.len()));
    events(&run);
    ring(&run.join("flight/rank-00000.ring"));
    // The recipe is for people; what counts is the checkpoint's, and the next job writes the file anew.
    let toml = std::fs::read_to_string(run.join("recipe.toml")).unwrap();
    flips(&run.join("recipe.toml"), 4, |_| {
        train(&recipe, &run, Some(2)).unwrap();
        assert_eq!(std::fs::read_to_string(run.join("recipe.toml")).unwrap(), toml);
    });
    let newest = run.join("checkpoints/step-00000002");
    let manifest = Manifest::load(&newest).unwrap();
    let mut n_files = 0;
    for path in files_of(&newest) {
        n_files += 1;
        flips(&path, FLIPS / 4, |byte| {
            let verified = checkpoint::verify(&newest).and_then(|files| files.into_iter().try_for_each(|(_, state)| state));
            let says_the_same = path.ends_with("manifest.json") && Manifest::load(&newest).is_ok_and(|found| found == manifest);
            assert!(is_refused(verified, &path, byte) || says_the_same, "byte {byte} of {} was not noticed", path.display());
        });
    }
    assert_eq!(n_files, 5, "shard, index, pieces, tokenizer, manifest");
}

/// A file of lines: refused with the line, but for the end of the last one, which makes it a line that was cut off.
fn lines(path: &Path, read: &dyn Fn(&Path) -> Result<usize>) {
    let n_bytes = std::fs::metadata(path).unwrap().len() as usize;
    let n = read(path).unwrap();
    flips(path, 4 * FLIPS, |byte| match read(path) {
        Ok(found) => assert!(byte + 1 == n_bytes && found + 1 == n, "byte {byte} of {} was not noticed", path.display()),
        error => {
            assert!(error.as_ref().unwrap_err().to_string().contains("line "), "{error:?}");
            is_refused(error, path, byte);
        }
    });
}

/// TensorBoard's events: refused, or everything from the damaged record on is gone before another is written, never a wrong number.
fn events(run: &Path) {
    let path = files_of(run).into_iter().find(|path| path.to_str().unwrap().contains("events.out.tfevents")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    flips(&path, FLIPS, |byte| {
        if !is_refused(MetricsWriter::open(&run.join("metrics.jsonl")), &path, byte) {
            let left = std::fs::read(&path).unwrap();
            assert!(left.len() <= byte && whole.starts_with(&left), "byte {byte} of the events was not noticed");
        }
    });
}

/// A ring: the header is refused, a damaged record is left out, all others are read as they were. Under no checksum is what changes
/// after it was written: words 11 to 20 of the header (signs of life, counts) and the times of a record but its beginning.
fn ring(path: &Path) {
    const HEADER_BYTES: usize = 4096;
    let whole = RankRing::read(path).unwrap();
    assert!(whole.records.len() > 100, "{} records", whole.records.len());
    let used_bytes = HEADER_BYTES + 128 * whole.records.len();
    let bytes = std::fs::read(path).unwrap();
    let random = Random::new(5, "ring");
    let (mut n_refused, mut n_left_out) = (0, 0);
    for draw in (0..400).map(|n| random.bits(n)) {
        // Half of them in the words of the header that are used.
        let byte =
            if draw & 1 == 0 { (draw >> 8) as usize % 384 } else { HEADER_BYTES + (draw >> 8) as usize % (used_bytes - HEADER_BYTES) };
        let mut damaged = bytes.clone();
        damaged[byte] ^= 1 << (draw >> 61);
        std::fs::write(path, &damaged).unwrap();
        let word = byte / 8;
        let read = RankRing::read(path);
        if byte < HEADER_BYTES {
            let is_open = (11..=20).contains(&word) || (21..=31).contains(&word) && word != 24;
            let refused = is_refused(read, path, byte);
            assert!(refused || is_open, "word {word} of the header was not noticed");
            n_refused += usize::from(refused);
            continue;
        }
        let found = read.unwrap();
        let idx = (byte - HEADER_BYTES) / 128;
        let is_open = (2..=4).contains(&(word % 16));
        let mut others = whole.records.clone();
        let hit = others.remove(idx);
        if found.records == others {
            n_left_out += 1;
        } else {
            let kept = &found.records[idx];
            assert!(is_open && kept.number == hit.number && kept.name == hit.name, "word {} of record {idx} was not noticed", word % 16);
        }
    }
    assert!(n_refused > 100 && n_left_out > 80, "{n_refused} refused, {n_left_out} left out");
    std::fs::write(path, bytes).unwrap();
}

/// A finished run: everything that its manifest names, and the manifest.
#[test]
fn finished_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (_, recipe) = shards_and_recipe(dir.path());
    let run = dir.path().join("run");
    train(&recipe, &run, None).unwrap();
    let manifest = Manifest::load(&run).unwrap();
    let files = files_of(&run);
    assert_eq!(files.len(), manifest.files.len() + 1, "{files:?}");
    for path in &files {
        flips(path, FLIPS, |byte| {
            let read = Manifest::open(&run, "run").and_then(|manifest| manifest.verify(&run));
            let says_the_same = path.ends_with("manifest.json") && Manifest::load(&run).is_ok_and(|found| found == manifest);
            assert!(is_refused(read, path, byte) || says_the_same, "byte {byte} of {} was not noticed", path.display());
        });
    }
}
