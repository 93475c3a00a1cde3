//! trireme-inspect as a person uses it: the page of each kind, the tree down to the text, checksums, and the curve.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::Path;
use std::process::{Command, Output};
use trireme::artifact::{ArtifactWriter, Begin, HashingFile, Input, Manifest};
use trireme::metrics::{MetricsWriter, Row};
use trireme::recipe::Validation;

fn inspect(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trireme-inspect")).args(arguments).current_dir(dir).output().expect("it starts")
}

/// Its output when it succeeds.
fn page(dir: &Path, arguments: &[&str]) -> String {
    let output = inspect(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Its one line of complaint when it fails with exit code 3.
fn complaint(dir: &Path, arguments: &[&str]) -> String {
    let output = inspect(dir, arguments);
    let line = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(3), "{arguments:?}: {line}");
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    line
}

fn write(dir: &Path, name: &str, kind: &'static str, inputs: Vec<Input>, content: &[u8]) -> Manifest {
    let recipe = serde_json::json!({"vocab_size": 512, "nested": {"list": [{"a": 1}, {"a": 2}], "nothing": null}});
    let Begin::Write(mut writer) = ArtifactWriter::begin(&dir.join(name), kind, recipe, inputs).expect("a new place") else {
        panic!("finished before")
    };
    let mut file = HashingFile::create(writer.dir(), "data.bin").expect("a new file");
    file.append(content).expect("writable");
    writer.add(file.close().expect("durable"));
    writer.count("documents", 1_234_567u64);
    writer.commit().expect("durable")
}

fn input(dir: &Path, role: &str, name: &str) -> Input {
    Input { path: name.into(), ..trireme::artifact::input(role, &dir.join(name)).expect("it is there") }
}

/// A corpus file, a tokenizer made from it, shards made from both.
fn chain(dir: &Path) {
    std::fs::write(dir.join("corpus.txt"), "some text").expect("writable");
    write(dir, "tokenizer", "tokenizer", vec![input(dir, "corpus", "corpus.txt")], b"pieces");
    let inputs = vec![input(dir, "corpus", "corpus.txt"), input(dir, "tokenizer", "tokenizer")];
    write(dir, "tokens", "token-shards", inputs, &[7; 3000]);
}

/// The page has the kind, counts with separators, sizes, checksums, inputs and flattened settings.
#[test]
fn pages_say_what_an_artifact_is() {
    let dir = tempfile::tempdir().expect("a directory");
    chain(dir.path());
    let manifest = Manifest::open(&dir.path().join("tokens"), "token-shards").expect("finished");
    let text = page(dir.path(), &["tokens"]);
    for expected in [
        "tokens: token-shards (text as tokens",
        "documents  1,234,567",
        "3.0 kB",
        &manifest.files[0].xxh3,
        &manifest.fingerprint,
        "tokenizer  tokenizer",
        "vocab_size = 512",
        "nested.list.1.a = 2",
        "UTC by trireme",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
    let folder = page(dir.path(), &["."]);
    assert!(folder.contains("2 artifacts") && folder.contains("token-shards") && folder.contains("tokenizer"), "{folder}");
    assert!(complaint(dir.path(), &["corpus.txt"]).contains("not an artifact"));
    assert!(complaint(dir.path(), &["nowhere"]).contains("no such file"));
}

/// The date is the calendar's: compared with `date -u`, around leap days and century ends.
#[test]
fn dates_are_the_calendars() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = write(dir.path(), "t", "tokenizer", vec![], b"x");
    for unix_s in [0u64, 951_782_400, 951_868_799, 1_709_164_800, 4_107_542_399, 4_107_542_400, 1_790_000_000] {
        let path = dir.path().join("t/manifest.json");
        let text = std::fs::read_to_string(&path).expect("readable");
        let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        (value["written_unix_s"], value["checksum"]) = (unix_s.into(), "".into());
        value["checksum"] = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(value.to_string().as_bytes())).into();
        std::fs::write(&path, value.to_string()).expect("writable");
        let output = Command::new("date").args(["-u", "-d", &format!("@{unix_s}"), "+%Y-%m-%d %H:%M:%S UTC"]).output().expect("date");
        let expected = String::from_utf8(output.stdout).expect("ASCII");
        assert!(page(dir.path(), &["t"]).contains(expected.trim()), "{expected}");
    }
    assert_eq!(manifest.kind, "tokenizer");
}

/// The tree goes down to the text; what has changed or is gone since says so instead of being taken for the origin.
#[test]
fn lineage_follows_fingerprints() {
    let dir = tempfile::tempdir().expect("a directory");
    chain(dir.path());
    let tree = page(dir.path(), &["tokens", "--lineage"]);
    let lines: Vec<&str> = tree.lines().collect();
    assert!(lines[0].starts_with("token-shards tokens ("), "{tree}");
    assert!(lines[1].starts_with("\u{251c}\u{2500} corpus: corpus.txt [") && lines[1].ends_with("unchanged"), "{tree}");
    assert!(lines[2].starts_with("\u{2514}\u{2500} tokenizer tokenizer ("), "{tree}");
    assert!(lines[3].starts_with("   \u{2514}\u{2500} corpus: corpus.txt [") && lines.len() == 4, "{tree}");

    std::fs::write(dir.path().join("corpus.txt"), "other text").expect("writable");
    let tree = page(dir.path(), &["tokens", "--lineage"]);
    assert_eq!(tree.matches("corpus.txt has changed since").count(), 2, "{tree}");
    std::fs::remove_file(dir.path().join("corpus.txt")).expect("there");
    let tree = page(dir.path(), &["tokens", "--lineage"]);
    assert_eq!(tree.matches("corpus.txt is missing").count(), 2, "{tree}");
    std::fs::remove_dir_all(dir.path().join("tokenizer")).expect("there");
    write(dir.path(), "tokenizer", "tokenizer", vec![], b"other pieces");
    let tree = page(dir.path(), &["tokens", "--lineage"]);
    assert!(tree.contains("tokenizer has changed since") && tree.lines().count() == 3, "{tree}");
}

/// A folder of text is an origin too, and a checkpoint's lineage goes through the run it lies in.
#[test]
fn lineage_of_a_checkpoint_reaches_the_text() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = dir.path();
    std::fs::create_dir(at.join("text")).expect("new");
    std::fs::write(at.join("text/a.txt"), "one").expect("writable");
    std::fs::write(at.join("text/b.txt"), "two").expect("writable");
    let corpus = trireme::text::corpus::Corpus::open(&[at.join("text")]).expect("text");
    let mut inputs = corpus.inputs("corpus").expect("readable");
    inputs[0].path = "text".into();
    write(at, "tokens", "token-shards", inputs, b"x");
    write(at, "run", "run", vec![input(at, "train-tokens", "tokens"), input(at, "validation-tokens", "tokens")], b"x");
    write(&at.join("run"), "checkpoints/step-00000010", "checkpoint", vec![], b"weights");
    let tree = page(at, &["run/checkpoints/step-00000010", "--lineage"]);
    assert!(tree.contains("part of: run") && tree.contains("train-tokens: token-shards") && tree.contains("as above"), "{tree}");
    assert_eq!(tree.matches("corpus: text [").count(), 1, "{tree}");
    assert!(tree.contains("unchanged"), "{tree}");
    std::fs::write(at.join("text/b.txt"), "three").expect("writable");
    let tree = page(at, &["run/checkpoints/step-00000010", "--lineage"]);
    assert!(tree.contains("corpus: text has changed since"), "{tree}");
}

/// Tokens that another program wrote have no manifest: they are known by their contents.
#[test]
fn lineage_of_a_run_over_foreign_shards() {
    let dir = tempfile::tempdir().expect("a directory");
    let shards = dir.path().join("shards");
    for (split, seed) in [("train", 1), ("validation", 2)] {
        write_megatron(&shards, split, &counting_documents(60, 61, seed));
    }
    let mut recipe = tiny_recipe(&shards);
    recipe.validation = Some(Validation { shards: shards.clone(), every_steps: 3, samples: 4 });
    train(&recipe, &dir.path().join("run"), None).expect("it trains");
    let tree = page(dir.path(), &["run", "--lineage"]);
    assert_eq!(tree.matches("-tokens: ").count(), 2, "{tree}");
    assert_eq!(tree.matches("unchanged").count(), 2, "{tree}");
    write_megatron(&shards, "train", &counting_documents(60, 61, 3));
    let tree = page(dir.path(), &["run", "--lineage"]);
    assert!(tree.lines().any(|line| line.contains(" train-tokens: ") && line.contains("has changed since")), "{tree}");
    assert_eq!(tree.matches("unchanged").count(), 1, "{tree}");
}

/// --verify reads every byte: one flipped bit is found and named, in a run's checkpoints too.
#[test]
fn verify_finds_a_flipped_bit() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), "run", "run", vec![], b"metrics");
    write(&dir.path().join("run"), "checkpoints/step-00000010", "checkpoint", vec![], &[1; 10_000]);
    let text = page(dir.path(), &["run", "--verify"]);
    assert_eq!(text.matches("every checksum agrees").count(), 2, "{text}");
    let file = dir.path().join("run/checkpoints/step-00000010/data.bin");
    let mut bytes = std::fs::read(&file).expect("readable");
    bytes[5000] ^= 0x10;
    std::fs::write(&file, bytes).expect("writable");
    let line = complaint(dir.path(), &["run", "--verify"]);
    assert!(line.contains("step-00000010/data.bin") && line.contains("checksum"), "{line}");
    std::fs::write(dir.path().join("run/manifest.json"), "{").expect("writable");
    assert!(complaint(dir.path(), &["run"]).contains("not a manifest"));
}

/// The curve of an unfinished run is drawn and written as SVG; the page of the run shows the last step.
#[test]
fn a_run_is_drawn_while_it_runs() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = dir.path().join("run");
    std::fs::create_dir(&run).expect("new");
    std::fs::write(run.join("recipe.toml"), "[train]\nsamples = 800\n").expect("writable");
    assert!(complaint(dir.path(), &["plot", "run"]).contains("metrics.jsonl"));
    let mut writer = MetricsWriter::open(&run.join("metrics.jsonl")).expect("new");
    assert!(complaint(dir.path(), &["plot", "run"]).contains("no step"));
    for step in 1..=40u64 {
        let loss = 6.0 - step as f64 / 20.0;
        let validation_loss = (step % 20 == 0).then_some(loss + 0.2);
        let row = Row {
            step,
            consumed_tokens: step * 4096,
            loss,
            grad_norm: 1.0,
            lr: 1e-3,
            step_s: 0.5,
            tokens_per_s: 8192.0,
            tflops: 0.1,
            share_of_gemm_ceiling: 0.61,
            mfu: None,
            memory_peak_bytes: 123_456_789,
            validation_loss,
            validation_bits_per_byte: validation_loss.map(|loss| loss / 3.0),
            time: None,
            unix_s: 0.0,
        };
        writer.append(&row).expect("writable");
    }
    let text = page(dir.path(), &["plot", "run", "--svg", "loss.svg"]);
    assert!(text.contains("Loss of run") && text.contains("o held-out") && text.contains("loss.svg"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let svg = std::fs::read_to_string(dir.path().join("loss.svg")).expect("written");
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.matches("<circle").count() == 3, "2 points and the legend");
    assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 2, "nothing left half-written");
    let text = page(dir.path(), &["run"]);
    for expected in [
        "an unfinished run",
        "step 40, 163,840 tokens seen",
        "loss 4.0000",
        "61 % of the GEMM ceiling",
        "held-out loss 4.2000, 1.4000 bits a byte at step 40",
        "train.samples = 800",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
    assert!(complaint(dir.path(), &["plot", "run", "--svg", "no/such/folder/x.svg"]).contains("no/such/folder"));
}

/// --help teaches with examples, wrong flags are usage errors (exit code 2).
#[test]
fn help_teaches() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = page(dir.path(), &["--help"]);
    assert!(text.contains("Examples:") && text.contains("plot") && text.contains("--lineage"), "{text}");
    assert_eq!(inspect(dir.path(), &["--nonsense"]).status.code(), Some(2));
    assert_eq!(inspect(dir.path(), &[]).status.code(), Some(2));
}
