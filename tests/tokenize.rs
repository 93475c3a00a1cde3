//! trireme-tokenize: the same bytes whatever the number of ranks and threads, the right tokens, and one line for everything bad.

#[path = "tokenizer/json.rs"]
mod json;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trireme::artifact::{MANIFEST, Manifest};
use trireme::comm::threads;
use trireme::data::shards::{KIND, Split, TokenShards};
use trireme::data::tokenize::{self, Settings};
use trireme::rng::Random;
use trireme::text::Tokenizer;
use trireme::text::corpus::Corpus;
use trireme::text::train;

/// A folder with text in several forms, and a tokenizer trained on it.
struct Place {
    dir: tempfile::TempDir,
    texts: Vec<String>,
}

impl Place {
    fn new(seed: u64) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let texts = random_texts(seed, 500);
        let lines = |texts: &[String]| texts.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n").collect::<String>();
        fs::create_dir(dir.path().join("text")).unwrap();
        fs::write(dir.path().join("text/a.jsonl"), lines(&texts[..300])).unwrap();
        fs::write(dir.path().join("text/b.jsonl.zst"), zstd::encode_all(lines(&texts[300..499]).as_bytes(), 3).unwrap()).unwrap();
        fs::write(dir.path().join("text/c.txt"), &texts[499]).unwrap();
        let corpus = Corpus::open(&[dir.path().join("text")]).unwrap();
        fs::write(dir.path().join("t.model"), train::train(&corpus, &train::Settings::new(300)).unwrap().model_bytes).unwrap();
        Place { dir, texts }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::open(&self.path("t.model")).unwrap()
    }

    fn command(&self, input: &str, out: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-tokenize"));
        command.current_dir(self.dir.path()).args(["--input", input, "--tokenizer", "t.model", "--out", out, "--validation-share", "0.1"]);
        command
    }

    fn run(&self, input: &str, out: &str, more: &[&str]) -> Output {
        self.command(input, out).args(more).output().unwrap()
    }

    /// What lies beside the input.
    fn left(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !["text", "t.model"].contains(&name.as_str())).collect()
    }
}

/// Distinct texts of words, spaces, line ends, digits and characters of several scripts.
fn random_texts(seed: u64, n: usize) -> Vec<String> {
    const WORDS: [&str; 12] =
        ["oar", "bench", " ", "  ", "\n", "trireme ", "42", "\u{3b8}\u{3ac}\u{3bb}", "\u{6d77} ", "rower, ", "\u{1f6f6}", "</s>"];
    let random = Random::new(seed, "texts");
    let word = |d: u64, w: u64| WORDS[random.bits(d << 32 | w) as usize % WORDS.len()];
    (0..n as u64).map(|d| format!("{d} ") + &(0..5 + random.bits(d) % 200).map(|w| word(d, w)).collect::<String>()).collect()
}

/// Every file's bytes but for the manifest's time and paths.
fn content(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let manifest = Manifest::open(out, KIND).unwrap();
    manifest.verify(out).unwrap();
    let mut content: BTreeMap<String, Vec<u8>> = fs::read_dir(out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != MANIFEST)
        .map(|name| (name.clone(), fs::read(out.join(&name)).unwrap()))
        .collect();
    content.insert(MANIFEST.into(), manifest.fingerprint.into_bytes());
    content
}

fn documents(out: &Path, split: Split) -> Vec<Vec<u32>> {
    let shards = TokenShards::open(out, split).unwrap();
    shards.verify().unwrap();
    let mut tokens = vec![0; shards.n_tokens() as usize];
    shards.read(0, &mut tokens).unwrap();
    let index = shards.index();
    (0..index.n_sequences()).map(|i| tokens[index.first_token(i) as usize..index.first_token(i + 1) as usize].to_vec()).collect()
}

fn assert_refused(output: &Output, code: i32, fragments: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!((output.status.code(), errors.len()), (Some(code), 1), "{stderr}");
    assert!(errors[0].contains("; "), "what to do about {:?}", errors[0]);
    fragments.iter().for_each(|fragment| assert!(errors[0].contains(fragment), "{:?} does not say {fragment:?}", errors[0]));
}

/// The shards hold each text's tokens and one EOS, in order, each text in exactly one split, with the right counts.
#[test]
fn tokens_are_those_of_the_texts() {
    let place = Place::new(1);
    let output = place.run("text", "out", &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let (tokenizer, out) = (place.tokenizer(), place.path("out"));
    let eos = tokenizer.eos_id().unwrap();
    let splits = [documents(&out, Split::Train), documents(&out, Split::Validation)];
    let mut positions: Vec<BTreeSet<usize>> = Vec::new();
    for split in &splits {
        // The number at the head of a text says which it is.
        let text_of = |document: &Vec<u32>| tokenizer.decode(&document[..document.len() - 1]);
        let number = |text: &str| text.split(' ').find(|part| !part.is_empty()).unwrap().parse::<usize>().unwrap();
        let numbers: Vec<usize> = split.iter().map(|document| number(&text_of(document))).collect();
        assert!(numbers.is_sorted(), "corpus order is kept");
        for (document, &number) in split.iter().zip(&numbers) {
            assert_eq!(document.iter().filter(|&&id| id == eos).count(), 1, "text {number}: </s> in a text is not the end");
            assert_eq!((*document.last().unwrap(), text_of(document).as_str()), (eos, place.texts[number].as_str()));
            assert_eq!(document[..document.len() - 1], tokenizer.encode(&place.texts[number]));
        }
        positions.push(numbers.into_iter().collect());
    }
    assert!(positions[0].is_disjoint(&positions[1]));
    assert_eq!(positions[0].union(&positions[1]).copied().collect::<Vec<_>>(), (0..500).collect::<Vec<_>>());
    // Binomial(500, 0.1): within six standard deviations of 50.
    assert!((positions[1].len() as f64 - 50.0).abs() < 6.0 * (500.0 * 0.1 * 0.9f64).sqrt(), "{} held out", positions[1].len());
    let manifest = Manifest::open(&out, KIND).unwrap();
    for (name, split, numbers) in [("train", &splits[0], &positions[0]), ("validation", &splits[1], &positions[1])] {
        let count = |what: &str| manifest.count(&format!("{name}_{what}")).unwrap();
        assert_eq!(count("documents"), split.len() as u64);
        assert_eq!(count("tokens"), split.iter().map(|document| document.len() as u64).sum::<u64>());
        assert_eq!(count("text_bytes"), numbers.iter().map(|&number| place.texts[number].len() as u64).sum::<u64>());
    }
    assert_eq!(manifest.count("vocab_size"), Some(300));
    assert_eq!(TokenShards::open(&out, Split::Train).unwrap().tokenizer_bytes().unwrap(), tokenizer.file_bytes());
}

/// 1 to 4 ranks, 1 and 3 threads each: the same bytes in every file and the same fingerprint. A cut in the wrong place would lose
/// or double a document, a race would reorder them.
#[test]
fn same_bytes_for_any_ranks_and_threads() {
    let place = Place::new(2);
    let tokenizer = place.tokenizer();
    let mut first = None;
    for (n_ranks, n_threads) in [(1, 1), (1, 3), (2, 1), (3, 3), (4, 1)] {
        let out = place.path(&format!("out-{n_ranks}-{n_threads}"));
        let results = threads::run(n_ranks, |world| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            let corpus = Corpus::open(&[place.path("text")]).unwrap();
            let reading = serde_json::json!({});
            let settings = Settings { tokenizer: &tokenizer, validation_share: 0.1, reading, progress: &|_| {}, stop: &|| false };
            let inputs = corpus.inputs("corpus").unwrap();
            pool.install(|| tokenize::run(&out, &corpus, inputs, &settings, &*world)).map(|done| done.manifest)
        });
        assert!(results.iter().all(|result| result == &results[0]), "{results:?}");
        let content = content(&out);
        assert_eq!(
            content.keys().collect::<Vec<_>>(),
            ["manifest.json", "tokenizer.model", "train.bin", "train.idx", "validation.bin", "validation.idx"]
        );
        let first = first.get_or_insert_with(|| content.clone());
        assert!(content == *first, "{n_ranks} ranks, {n_threads} threads");
    }
}

/// The same under mpirun with the binary itself.
#[test]
fn same_bytes_under_mpirun() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("skipped: no mpirun here");
        return;
    }
    let place = Place::new(3);
    assert_eq!(place.run("text", "solo", &[]).status.code(), Some(0));
    let solo = content(&place.path("solo"));
    for n in ["1", "2", "3"] {
        let out = format!("out{n}");
        let single = place.command("text", &out);
        let output = Command::new("mpirun")
            .current_dir(place.dir.path())
            .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", n])
            .arg(single.get_program())
            .args(single.get_args())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(content(&place.path(&out)) == solo, "{n} ranks");
        // All ranks leave by the same door when the text is bad.
        fs::write(place.path("bad.jsonl"), "{\"text\": \"fine\"}\n".repeat(50) + "{\"text\": 3}\n").unwrap();
        let bad = place.command("bad.jsonl", "bad");
        let output = Command::new("mpirun")
            .current_dir(place.dir.path())
            .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", n])
            .arg(bad.get_program())
            .args(bad.get_args())
            .output()
            .unwrap();
        assert_refused(&output, 3, &["bad.jsonl", "line 51"]);
        assert!(!place.left().iter().any(|name| name.contains("bad") && name != "bad.jsonl"), "{:?}", place.left());
    }
}

/// A text keeps its split when the corpus is shuffled or grows; a held-out text would leak into training otherwise.
#[test]
fn splits_follow_the_text() {
    let place = Place::new(4);
    assert_eq!(place.run("text", "out", &[]).status.code(), Some(0));
    let held_out: BTreeSet<Vec<u32>> = documents(&place.path("out"), Split::Validation).into_iter().collect();
    let mut shuffled = place.texts.clone();
    shuffled.reverse();
    shuffled.extend(random_texts(99, 20).into_iter().map(|text| format!("new {text}")));
    let lines: String = shuffled.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n").collect();
    fs::write(place.path("shuffled.jsonl"), lines).unwrap();
    assert_eq!(place.run("shuffled.jsonl", "again", &[]).status.code(), Some(0));
    let again: BTreeSet<Vec<u32>> = documents(&place.path("again"), Split::Validation).into_iter().collect();
    assert!(again.is_superset(&held_out));
    let train: BTreeSet<Vec<u32>> = documents(&place.path("again"), Split::Train).into_iter().collect();
    assert!(train.is_disjoint(&held_out));
}

/// Finished, it says so; other settings, another tokenizer or other text are refused and change nothing.
#[test]
fn finished_work_is_kept() {
    let place = Place::new(5);
    assert_eq!(place.run("text", "out", &[]).status.code(), Some(0));
    let before = content(&place.path("out"));
    let again = place.run("text", "out", &[]);
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).contains("finished before"), "{again:?}");
    assert_refused(&place.run("text", "out", &["--text-field", "body"]), 3, &["out", "text_field", "\"text\"", "\"body\""]);
    fs::write(place.path("text/d.txt"), "one more").unwrap();
    assert_refused(&place.run("text", "out", &[]), 3, &["out", "other inputs", "corpus"]);
    assert!(content(&place.path("out")) == before);
    assert_eq!(place.left(), ["out".to_string()].into());
}

/// Bad input of every sort: exit code 2 or 3, one line with the place, nothing left.
#[test]
fn bad_input_is_one_line() {
    let place = Place::new(6);
    let texts = place.path("texts");
    fs::create_dir(&texts).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(texts.join(name), bytes).unwrap();
    write("empty.jsonl", b"");
    write("blank.jsonl", b"\n\n{\"text\": \"\"}\n");
    write("latin1.jsonl", b"{\"text\": \"caf\xe9\"}\n");
    write("cut.jsonl.zst", &zstd::encode_all(&b"{\"text\": \"abc\"}\n".repeat(1000)[..], 3).unwrap()[..20]);
    write("long.txt", &vec![b'a'; 5000]);
    let before = place.left();
    for (input, more, code, fragments) in [
        ("texts/empty.jsonl", vec![], 3, vec!["empty corpus"]),
        ("texts/blank.jsonl", vec![], 3, vec!["empty corpus"]),
        ("texts/latin1.jsonl", vec![], 3, vec!["latin1.jsonl", "line 1", "UTF-8"]),
        ("texts/cut.jsonl.zst", vec![], 3, vec!["cut.jsonl.zst", "truncated"]),
        ("texts/long.txt", vec!["--max-document-bytes", "4999"], 3, vec!["long.txt", "4999"]),
        ("nowhere", vec![], 3, vec!["nowhere"]),
    ] {
        assert_refused(&place.run(input, "out", &more), code, &fragments);
        assert_eq!(place.left(), before, "{input}");
    }
    let with = |tokenizer: &str, share: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-tokenize"));
        command.current_dir(place.dir.path()).args([
            "--input",
            "text",
            "--out",
            "out",
            "--tokenizer",
            tokenizer,
            "--validation-share",
            share,
        ]);
        command.output().unwrap()
    };
    for share in ["1", "1.5", "NaN"] {
        assert_refused(&with("t.model", share), 2, &["--validation-share", share]);
    }
    assert_refused(&with("text", "0.1"), 3, &["text"]);
    assert_refused(&with("text/c.txt", "0.1"), 3, &["c.txt"]);
    assert_refused(&with("no.model", "0.1"), 3, &["no.model"]);
    assert_eq!(place.left(), before);
    assert_eq!(with("t.model", "0").status.code(), Some(0), "no validation split is fine");
    assert!(!place.path("out/validation.bin").exists());
    assert!(TokenShards::open(&place.path("out"), Split::Validation).unwrap_err().to_string().contains("--validation-share"));
}

/// A death or a full disk at any step of writing leaves no shards or whole ones, and the next run makes the same bytes.
#[test]
fn interrupted_at_every_step() {
    let place = Place::new(7);
    assert_eq!(place.run("text", "whole", &[]).status.code(), Some(0));
    let whole = content(&place.path("whole"));
    for step in 1.. {
        let fail = |how: &str| place.command("text", "out").env("TRIREME_FAULT", format!("{how} at=io n={step}")).output().unwrap();
        let full = fail("enospc");
        if full.status.success() {
            assert!(step > 15, "only {step} steps were counted");
            break;
        }
        assert_refused(&full, 3, &["space"]);
        if place.path("out").exists() {
            assert!(content(&place.path("out")) == whole, "step {step}");
            fs::remove_dir_all(place.path("out")).unwrap();
        }
        assert_eq!(place.left(), ["whole".to_string()].into(), "step {step}");
        assert!(!fail("abort").status.success());
        assert_eq!(place.run("text", "out", &[]).status.code(), Some(0), "after a death at step {step}");
        assert!(content(&place.path("out")) == whole, "step {step}");
        fs::remove_dir_all(place.path("out")).unwrap();
        assert_eq!(place.left(), ["whole".to_string()].into(), "step {step}");
    }
}

/// A tokenizer of Hugging Face makes shards too, and travels with them under its own name, whole.
#[test]
fn with_a_tokenizer_of_hugging_face() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("t.json"), json::tiny()).unwrap();
    fs::write(dir.path().join("text.jsonl"), "{\"text\": \"ab ab\"}\n{\"text\": \"ba\"}\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-tokenize"));
    command.current_dir(dir.path()).args(["--input", "text.jsonl", "--tokenizer", "t.json", "--out", "out", "--validation-share", "0"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shards = TokenShards::open(&dir.path().join("out"), Split::Train).unwrap();
    shards.verify().unwrap();
    assert_eq!((shards.tokenizer_bytes(), shards.vocab_size()), (Some(json::tiny()), Some(8)));
    assert!(dir.path().join("out/tokenizer.json").is_file());
    let mut tokens = vec![0; shards.n_tokens() as usize];
    shards.read(0, &mut tokens).unwrap();
    assert_eq!(tokens, [6, 7, 0, 3, 2, 0], "each document ends with <|endoftext|>");
}
