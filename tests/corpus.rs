//! The corpus reader: every document once over any number of ranks, in one order, and one line for everything a file can
//! have wrong.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use trireme::error::{Error, Result};
use trireme::rng::Random;
use trireme::text::corpus::{Corpus, Document, Options, Report};

/// A temporary folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("inside the folder")).expect("made");
        std::fs::write(path, bytes).expect("written");
    }
    dir
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("into memory");
    encoder.finish().expect("into memory")
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).expect("into memory")
}

fn texts(corpus: &Corpus, rank: usize, n_ranks: usize) -> Vec<String> {
    corpus.documents(rank, n_ranks).map(|document| document.expect("readable").text).collect()
}

/// All documents of these paths, or the first error.
fn read(paths: &[PathBuf]) -> Result<Vec<Document>> {
    Corpus::open(paths)?.documents(0, 1).collect()
}

fn read_one(name: &str, bytes: &[u8]) -> Result<Vec<String>> {
    let dir = folder(&[(name, bytes)]);
    Ok(read(&[dir.path().join(name)])?.into_iter().map(|document| document.text).collect())
}

/// The message of a failed read: one line, a remedy, exit code 3, naming the file and this.
fn assert_error(result: Result<Vec<String>>, name: &str, parts: &[&str]) -> Error {
    let error = result.expect_err(name);
    let line = error.to_string();
    assert!(line.contains(name) && line.contains("; ") && !line.contains('\n'), "{line:?}");
    for part in parts {
        assert!(line.contains(part), "{line:?} lacks {part:?}");
    }
    assert_eq!(error.exit_code(), 3);
    error
}

fn jsonl(texts: &[String]) -> Vec<u8> {
    texts.iter().map(|text| serde_json::json!({ "id": 7, "text": text }).to_string() + "\n").collect::<String>().into_bytes()
}

/// Over 1 to 9 ranks the parts laid end to end are the documents of one rank, in order: JSONL files cut inside, compressed or
/// not, and folders. Would break when two ranks disagree about whose a line is.
#[test]
fn ranks_share_the_documents_in_order() {
    let random = Random::new(11, "documents");
    let text = |i: u64| format!("{i} {}", "\u{e9}\n x".repeat((random.bits(i) % 90) as usize));
    let lists: Vec<Vec<String>> = (0..4).map(|file| (0..97).map(|i| text(file * 100 + i)).collect()).collect();
    let dir = folder(&[
        ("in/c.jsonl", &jsonl(&lists[0])),
        ("in/b/one.txt", b"plain one"),
        ("in/b/two.rs", b"plain two"),
        ("in/d.jsonl.gz", &gzip(&jsonl(&lists[1]))),
        ("in/e.jsonl.zst", &zst(&jsonl(&lists[2]))),
        ("z.jsonl", &jsonl(&lists[3])),
    ]);
    let corpus = Corpus::open(&[dir.path().join("z.jsonl"), dir.path().join("in")]).expect("opens");
    let mut expected = lists[3].clone();
    expected.extend(["plain one".to_string(), "plain two".to_string()]);
    lists[..3].iter().for_each(|list| expected.extend(list.clone()));
    for n_ranks in [1, 2, 3, 4, 9, 300] {
        let found: Vec<String> = (0..n_ranks).flat_map(|rank| texts(&corpus, rank, n_ranks)).collect();
        assert!(found == expected, "{n_ranks} ranks: {} documents of {}", found.len(), expected.len());
    }
    let half = texts(&corpus, 0, 2).len();
    assert!((100..300).contains(&half), "one of two ranks got {half} of {} documents", expected.len());
}

/// Lines may end in any way and be blank; a byte-order mark is no text; the source names file and byte.
#[test]
fn jsonl_in_all_its_forms() {
    let bytes = b"\xEF\xBB\xBF{\"text\":\"one\"}\r\n\n   \r\n{\"a\":{\"text\":[1,{}]},\"text\":\"t\\u0000w\\ud83d\\ude00o\\n\",\"b\":null}\n{\"text\":\"\"}\n{\"text\":\"three\"}";
    assert_eq!(read_one("a.jsonl", bytes).expect("fine"), ["one", "t\0w\u{1f600}o\n", "three"]);
    assert_eq!(read_one("a.jsonl.gz", &gzip(bytes)).expect("fine").len(), 3);
    assert_eq!(read_one("a.JSONL.zst", &zst(bytes)).expect("fine").len(), 3);
    let members = [gzip(b"{\"text\":\"one\"}\n{\"te"), gzip(b"xt\":\"two\"}\n")].concat();
    assert_eq!(read_one("a.jsonl.gz", &members).expect("two members"), ["one", "two"]);
    let frames = [zst(b"{\"text\":\"one\"}\n{\"te"), zst(b"xt\":\"two\"}\n")].concat();
    assert_eq!(read_one("a.jsonl.zst", &frames).expect("two frames"), ["one", "two"]);
    let deep = format!("{{\"a\":{}{},\"text\":\"deep\"}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(read_one("a.jsonl", deep.as_bytes()).expect("passed over"), ["deep"]);
    let dir = folder(&[("a.jsonl", b"{\"text\":\"one\"}\n{\"text\":\"two\"}\n")]);
    let path = dir.path().join("a.jsonl");
    assert_eq!(read(std::slice::from_ref(&path)).expect("fine")[1].source, format!("{}@15", path.display()));
    let options = Options { text_field: "body".into(), ..Options::default() };
    let dir = folder(&[("a.jsonl", b"{\"text\":1,\"body\":\"two\"}")]);
    assert_eq!(texts(&Corpus::open_with(&[dir.path().join("a.jsonl")], options).expect("opens"), 0, 1), ["two"]);
}

/// Each way a line can be wrong names file, line and cause.
#[test]
fn bad_jsonl_names_file_line_and_cause() {
    let bad = |second: &str, parts: &[&str]| {
        let bytes = format!("{{\"text\":\"one\"}}\n{second}\n{{\"text\":\"three\"}}\n");
        let mut all = vec!["line 2: "];
        all.extend_from_slice(parts);
        assert_error(read_one("a.jsonl", bytes.as_bytes()), "a.jsonl", &all);
        assert_error(read_one("a.jsonl.zst", &zst(bytes.as_bytes())), "a.jsonl.zst", &all);
    };
    bad("{\"text\":\"two\",}", &["column 15", "trailing comma"]);
    bad("{\"text\":\"two\"", &["EOF"]);
    bad("{\"text\":\"two\"} x", &["column 16", "trailing characters"]);
    bad("{\"texts\":\"two\"}", &["column ", "\"text\" is missing"]);
    bad("{\"text\":3}", &["integer `3`, expected a string"]);
    bad("{\"text\":null}", &["null, expected a string"]);
    bad("{\"text\":\"two\",\"text\":\"2\"}", &["\"text\" is there twice"]);
    bad("[\"text\"]", &["sequence, expected an object with a string \"text\""]);
    bad("{\"text\":\"\\ud800\"}", &["column ", "surrogate"]);
    bad("{\"text\":\"\\ud800x\"}", &["column ", "surrogate"]);
    bad("{\"text\":\"\\udc00x\"}", &["column ", "surrogate"]);
    bad("just text", &["column 1"]);
    let error = read_one("a.jsonl", b"{\"text\":\"one\"}\n{\"text\":\"t\xffo\"}\n");
    assert_error(error, "a.jsonl", &["line 2: invalid UTF-8 at byte 25"]);
}

/// A line that another rank began to read after still has its number in the file.
#[test]
fn errors_inside_a_rank_part_count_lines_from_the_start() {
    let good: String = (0..50).map(|i| format!("{{\"text\":\"{i}\"}}\n")).collect();
    let dir = folder(&[("a.jsonl", format!("{good}{{\"text\":5}}\n{good}").as_bytes())]);
    let corpus = Corpus::open(&[dir.path().join("a.jsonl")]).expect("opens");
    for n_ranks in [1, 3, 5] {
        let errors: Vec<Error> =
            (0..n_ranks).flat_map(|rank| corpus.documents(rank, n_ranks).filter_map(|document| document.err())).collect();
        assert_eq!(errors.len(), 1);
        assert!(errors[0].to_string().contains("line 51: "), "{}", errors[0]);
    }
}

/// A line above the limit is an error in memory bounded by the limit: resident memory grows by far less than the 100 MB line.
#[test]
fn a_line_of_100_megabytes_is_refused_in_bounded_memory() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("long.jsonl");
    let mut file = std::fs::File::create(&path).expect("created");
    file.write_all(b"{\"text\":\"one\"}\n{\"text\":\"").expect("written");
    (0..100).for_each(|_| file.write_all(&[b'a'; 1 << 20]).expect("written"));
    file.write_all(b"\"}\n").expect("written");
    let corpus =
        |limit| Corpus::open_with(std::slice::from_ref(&path), Options { max_document_bytes: limit, ..Options::default() }).expect("opens");
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("has it").to_string();
        line.split_whitespace().nth(1).and_then(|kb| kb.parse::<usize>().ok()).expect("a number") << 10
    };
    let before = peak();
    let error = corpus(4 << 20).documents(0, 1).nth(1).expect("a second line").expect_err("too long");
    let line = error.to_string();
    assert!(line.contains("long.jsonl: line 2: ") && line.contains("4194304 bytes"), "{line}");
    assert_eq!(error.exit_code(), 3);
    // The limit (doubled by a growing buffer, doubled once more while it moves) and other tests' documents beside it.
    assert!(peak() - before < 48 << 20, "{} MiB more", (peak() - before) >> 20);
    assert!(corpus(64 << 20).documents(0, 1).nth(1).expect("a second line").is_err(), "the default limit is 64 MiB");
    assert_eq!(corpus(128 << 20).documents(0, 1).nth(1).expect("a second line").expect("fits").text.len(), 100 << 20);
}

/// Compressed files cut short or damaged name the file, at every length, and never give a document less in silence.
#[test]
fn truncated_archives_are_refused() {
    let lines = jsonl(&(0..300).map(|i| format!("{i} {:016x}", Random::new(1, "noise").bits(i))).collect::<Vec<_>>());
    for (name, bytes) in
        [("a.jsonl.gz", gzip(&lines)), ("a.jsonl.zst", zst(&lines)), ("a.txt.gz", gzip(&lines)), ("a.txt.zst", zst(&lines))]
    {
        for cut in [1, 5, bytes.len() / 2, bytes.len() - 5, bytes.len() - 1] {
            assert_error(read_one(name, &bytes[..cut]), name, &[]);
        }
        assert_error(read_one(name, &bytes[..bytes.len() - 1]), name, &["truncated"]);
        assert!(read_one(name, &bytes).is_ok());
        assert_error(read_one(name, b"this is no archive"), name, &["damaged"]);
        let dir = folder(&[(name, &bytes[..bytes.len() - 3])]);
        assert!(read(&[dir.path().to_path_buf()]).is_err(), "a truncated {name} in a folder is an error too");
    }
}

/// What a folder gives, and in which order; what is skipped is counted.
#[test]
fn folders_are_walked_in_order_and_skip_what_is_not_text() {
    let dir = folder(&[
        ("b.txt", b"b"),
        ("a/z.md", b"z"),
        ("a/b/c.rs", b"c"),
        ("a.txt", b"\xEF\xBB\xBFa\r\n"),
        ("Makefile", b"all:\n"),
        ("changelog.gz", &gzip(b"log")),
        ("program", b"\x7fELF\0\0"),
        ("packed.tar.gz", &gzip(b"name\0\0\0data")),
        ("latin1.txt", b"caf\xe9"),
        ("empty.txt", b""),
        ("only-mark.txt", b"\xEF\xBB\xBF"),
        ("long.txt", &[b'x'; 5000]),
        (".hidden/x.txt", b"hidden"),
        (".hidden.txt", b"hidden"),
        ("target/x.txt", b"built"),
        ("Cargo.lock", b"lock"),
        ("logo.svg", b"<svg/>"),
        ("rows.jsonl", b"{\"text\":\"row\"}\n"),
    ]);
    std::os::unix::fs::symlink(dir.path().join("b.txt"), dir.path().join("link.txt")).expect("linked");
    let options = Options { max_document_bytes: 4000, ..Options::default() };
    let corpus = Corpus::open_with(&[dir.path().to_path_buf()], options).expect("opens");
    let mut documents = corpus.documents(0, 1);
    let found: Vec<String> = (&mut documents).map(|document| document.expect("readable").text).collect();
    assert_eq!(found, ["all:\n", "c", "z", "a\r\n", "b", "log", "row"]);
    let report = documents.report();
    assert_eq!(report, Report { documents: 7, text_bytes: 17, empty: 1, binary: 2, invalid_utf8: 1, too_long: 1 });
    assert!(report.to_string().contains("1 skipped: not UTF-8"), "{report}");
}

/// A named file is a promise: what a folder skips is an error here, and an empty corpus is one too.
#[test]
fn named_files_must_be_text() {
    assert_error(read_one("latin1.txt", b"caf\xe9 x"), "latin1.txt", &["invalid UTF-8 at byte 3"]);
    assert_eq!(read_one("nul.txt", b"a\0b").expect("UTF-8"), ["a\0b"]);
    assert_error(read_one("empty.txt", b""), "empty.txt", &["an empty corpus"]);
    assert_error(
        read_one("missing/../x.txt", b"x").and(read(&["/no/such/file".into()]).map(|_| Vec::new())),
        "/no/such/file",
        &["No such file"],
    );
    let dir = folder(&[(".hidden", b"x"), ("target/x", b"x")]);
    assert!(Corpus::open(&[dir.path().to_path_buf()]).err().expect("nothing there").to_string().contains("an empty corpus"));
    let options = Options { max_document_bytes: 10, ..Options::default() };
    let dir = folder(&[("long.txt", b"12345678901")]);
    let error =
        Corpus::open_with(&[dir.path().join("long.txt")], options).expect("opens").documents(0, 1).next().expect("one").expect_err("long");
    assert!(error.to_string().contains("more than 10 bytes"), "{error}");
}

/// Fingerprints of the inputs follow the content and the names inside a folder, not where the folder lies.
#[test]
fn input_fingerprints_follow_content() {
    let prints = |files: &[(&str, &[u8])]| {
        let dir = folder(files);
        let corpus = Corpus::open(&[dir.path().to_path_buf(), dir.path().join(files[0].0)]).expect("opens");
        let inputs = corpus.inputs("corpus").expect("readable");
        assert!(inputs.iter().all(|input| input.role == "corpus"));
        inputs.into_iter().map(|input| input.fingerprint).collect::<Vec<_>>()
    };
    let base = prints(&[("a.txt", b"one"), ("b/c.txt", b"two")]);
    assert_eq!(base, prints(&[("a.txt", b"one"), ("b/c.txt", b"two")]));
    assert_eq!(base[1], format!("{:016x}", xxhash_rust::xxh3::xxh3_64(b"one")), "a file's fingerprint is its checksum");
    let others: [&[(&str, &[u8])]; 3] = [
        &[("a.txt", b"one"), ("b/c.txt", b"twO")],
        &[("a.txt", b"one"), ("b/d.txt", b"two")],
        &[("a.txt", b"one"), ("b/c.txt", b"two"), ("d", b"x")],
    ];
    let folders: BTreeMap<String, usize> = others.iter().enumerate().map(|(i, files)| (prints(files)[0].clone(), i)).collect();
    assert_eq!(folders.len(), 3);
    assert!(!folders.contains_key(&base[0]));
}

/// One reading gives documents and fingerprints, wherever one stops looking at documents: the checksums of packed, binary and half-read
/// files are those of all their bytes, the ones that `inputs` has from a reading of its own.
#[test]
fn one_reading_gives_documents_and_fingerprints() {
    use std::io::Write;
    let lines: String = (0..20_000).map(|i| format!("{{\"text\": \"document {i}\"}}\n")).collect();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(lines.as_bytes()).expect("in memory");
    let zstd = zstd::encode_all(lines.as_bytes(), 1).expect("in memory");
    let gzip = packed.finish().expect("in memory");
    let binary = [&b"text\0"[..], &[7; 100_000]].concat();
    let dir = folder(&[
        ("a.jsonl", lines.as_bytes()),
        ("b.jsonl.gz", &gzip),
        ("c.bin", &binary),
        ("d.jsonl.zst", &zstd),
        ("e.txt", b"plain"),
        ("f.txt", b"behind"),
    ]);
    let corpus = Corpus::open(&[dir.path().to_path_buf()]).expect("opens");
    let all: Vec<(String, String)> =
        corpus.documents(0, 1).map(|document| document.expect("readable")).map(|document| (document.source, document.text)).collect();
    assert_eq!(all.len(), 3 * 20_000 + 2);
    let expected = corpus.inputs("corpus").expect("readable");
    for n in [1, 2, 19_999, 20_001, 40_003, 60_001, 60_002, usize::MAX] {
        let mut seen = Vec::new();
        let inputs = corpus.read_with_inputs("corpus", |document| {
            seen.push((document.source.clone(), document.text.clone()));
            seen.len() < n
        });
        assert_eq!(inputs.expect("readable"), expected, "after {n} documents");
        assert!(seen == all[..n.min(all.len())], "{n} documents");
    }
}

/// `trireme-train-tokenizer` from end to end: writes the artifact once, says so the second time, refuses other settings, and its
/// errors are one line with exit code 2 or 3 and nothing left behind.
#[test]
fn train_tokenizer_writes_an_artifact_once() {
    let dir = folder(&[("text/a.txt", "the cat and the hat and the bat\n".repeat(20).as_bytes()), ("bad.jsonl", b"{\"text\":3}\n")]);
    let run = |input: &str, vocab_size: &str, out: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_trireme-train-tokenizer"))
            .current_dir(dir.path())
            .args(["--input", input, "--vocab-size", vocab_size, "--out", out])
            .output()
            .expect("runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, out, _) = run("text", "280", "tok");
    assert!(code == Some(0) && out.contains("bytes per token"), "{out}");
    let tokenizer = trireme::text::Tokenizer::open(&dir.path().join("tok")).expect("an artifact");
    assert_eq!(tokenizer.vocab_size(), 280);
    assert_eq!(std::fs::read_to_string(dir.path().join("tok/tokenizer.vocab")).expect("there").lines().count(), 280);
    let (code, out, _) = run("text", "280", "tok");
    assert!(code == Some(0) && out.contains("finished before"), "{out}");
    let refused = |result: (Option<i32>, String, String), expected: i32, part: &str| {
        assert_eq!(result.0, Some(expected), "{result:?}");
        assert!(result.2.trim_end().lines().count() == 1 && result.2.contains(part), "{result:?}");
    };
    refused(run("text", "281", "tok"), 3, "other settings");
    refused(run("text", "9000", "new"), 2, "is the largest it can fill");
    refused(run("text", "3", "new"), 2, "vocabulary size 3");
    refused(run("bad.jsonl", "280", "new"), 3, "line 1: column ");
    refused(run("nowhere", "280", "new"), 3, "No such file");
    let mut left: Vec<String> = std::fs::read_dir(dir.path())
        .expect("there")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(left, ["bad.jsonl", "text", "tok"]);
    let model = dir.path().join("tok/tokenizer.model");
    let mut bytes = std::fs::read(&model).expect("there");
    bytes[4000] ^= 1;
    std::fs::write(&model, bytes).expect("written");
    assert!(trireme::text::Tokenizer::open(Path::new(&dir.path().join("tok"))).expect_err("damaged").to_string().contains("checksum"));
}
