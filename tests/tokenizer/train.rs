//! The trainer: the model is SentencePiece's in form and close to it in content, and depends on nothing but text and settings.

use crate::adversarial;
use crate::encode::compare_texts;
use crate::oracle;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use trireme::text::Tokenizer;
use trireme::text::corpus::Corpus;
use trireme::text::train::{Settings, Trained, train};

fn settings(vocab_size: usize, n_threads: usize) -> Settings {
    Settings { n_threads, ..Settings::new(vocab_size) }
}

fn corpus_of(dir: &Path, files: &[(&str, String)]) -> Corpus {
    for (name, text) in files {
        std::fs::write(dir.join(name), text).expect("written");
    }
    Corpus::open(&[dir.to_path_buf()]).expect("there is text")
}

fn train_on(files: &[(&str, String)], settings: &Settings) -> Trained {
    let dir = tempfile::tempdir().expect("a temporary folder");
    train(&corpus_of(dir.path(), files), settings).expect("trains")
}

fn tokenizer(trained: &Trained) -> Tokenizer {
    Tokenizer::from_bytes(trained.model_bytes.clone(), Path::new("trained")).expect("opens")
}

/// SentencePiece loads our model with the same pieces, scores, types and settings, and encodes and decodes with it to the same
/// ids and texts. Would break when the trainer writes a model whose merges SentencePiece orders in another way.
#[test]
fn sentencepiece_loads_our_models() {
    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    for vocab_size in [330, 1100] {
        let files = [("a.txt", adversarial::corpus(1, 2000)), ("b.txt", format!("x\u{2581}y\t\tz <extra_id_1> {}", "ab".repeat(3000)))];
        let trained = train_on(&files, &settings(vocab_size, 2));
        let path: PathBuf = dir.path().join(format!("{vocab_size}.model"));
        std::fs::write(&path, &trained.model_bytes).expect("written");
        let name = path.to_str().expect("UTF-8");

        assert_eq!(oracle::ask(&python, &["special", name], ""), [format!("0 2 3 1 {vocab_size}")]);
        let spec = oracle::ask(&python, &["spec", name], "");
        for line in [
            "model_type=2",
            "byte_fallback=True",
            "split_digits=True",
            "name='identity'",
            "add_dummy_prefix=False",
            "remove_extra_whitespaces=False",
        ] {
            assert!(spec.iter().any(|found| found == line), "{line} is not in {spec:?}");
        }
        let ours = tokenizer(&trained);
        for (id, line) in oracle::ask(&python, &["pieces", name], "").iter().enumerate() {
            let first_merge = 4 + 3 + 256;
            let score = -(id.saturating_sub(first_merge) as f64);
            let found: Vec<&str> = line.split(' ').collect();
            assert_eq!(found[0], oracle::hex(ours.sentencepiece().expect("a model").piece(id as u32).as_bytes()), "piece {id}");
            assert_eq!((found[1].parse::<f64>().expect("a score") - score).abs(), 0.0, "piece {id}");
            assert_eq!(found[2], (ours.sentencepiece().expect("a model").kind(id as u32) as i32).to_string(), "piece {id}");
        }
        let mut texts = adversarial::by_hand();
        texts.extend(adversarial::random(99, 4000));
        texts.push(adversarial::corpus(2, 300).into_bytes());
        compare_texts(&python, &path, &texts);
    }
}

/// The same vocabulary as SentencePiece's own trainer on the same lines, but for the tail: its list of candidates is pruned and
/// it does not count pairs that join to an old piece, so late choices among equals differ. At least 97 of 100 pieces are common
/// (a wrong count, tie rule or boundary changes far more), and the texts are as short.
#[test]
fn agrees_with_the_trainer_of_sentencepiece() {
    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = adversarial::corpus(3, 4000);
    let file = dir.path().join("corpus.txt");
    std::fs::write(&file, &text).expect("written");
    let extra = "user_defined_symbols=<extra_id_0>|<extra_id_1>|<extra_id_2>";
    let arguments = ["vocab_size=1000", "add_dummy_prefix=false", "pad_id=1", "bos_id=2", "eos_id=3", extra];
    let theirs = Tokenizer::open(&oracle::train(&python, dir.path(), "theirs", &file, &arguments)).expect("opens");
    let ours = tokenizer(&train_on(&[("corpus.txt", text.clone())], &settings(1000, 2)));
    let pieces = |of: &Tokenizer| (0..1000).map(|id| of.sentencepiece().expect("a model").piece(id).to_string()).collect::<Vec<_>>();
    let (our_pieces, their_pieces) = (pieces(&ours), pieces(&theirs));
    assert_eq!(our_pieces[..263], their_pieces[..263], "the special pieces have other ids");
    let their_set: HashSet<&String> = their_pieces.iter().collect();
    let common = our_pieces.iter().filter(|piece| their_set.contains(piece)).count();
    assert!(common >= 970, "{common} of 1000 pieces are SentencePiece's");
    let (ours, theirs) = (ours.encode(&text).len() as f64, theirs.encode(&text).len() as f64);
    assert!((ours / theirs - 1.0).abs() < 0.01, "{ours} tokens, SentencePiece's model {theirs}");
}

/// One model whatever the threads, the order and the cutting of the files: counts are sums and ties have a rule. Also when the
/// input is sampled, since blocks are chosen by content.
#[test]
fn the_model_does_not_depend_on_threads_or_order() {
    let (a, b) = (adversarial::corpus(4, 25_000), adversarial::corpus(5, 25_000));
    assert!(a.len() + b.len() > 2 << 20, "too small to be sampled");
    let files = [("a.txt", a.clone()), ("b.txt", b.clone()), ("c.txt", a.clone())];
    let turned = [("1.txt", b), ("2.txt", a.clone()), ("3.txt", a)];
    for sample_bytes in [1 << 30, 1 << 20] {
        let with = |n_threads| Settings { sample_bytes, ..settings(800, n_threads) };
        let one = train_on(&files, &with(1));
        assert_eq!(one.report.sample_bytes < one.report.corpus.text_bytes, sample_bytes == 1 << 20);
        assert!(one.report.sample_bytes <= sample_bytes, "{} bytes of {sample_bytes}", one.report.sample_bytes);
        for n_threads in [2, 3, 7] {
            assert!(train_on(&files, &with(n_threads)).model_bytes == one.model_bytes, "{n_threads} threads, another model");
        }
        assert!(train_on(&turned, &with(2)).model_bytes == one.model_bytes, "other order, another model");
    }
}

/// Merges by hand: "ab" 5, "abc" 3 ("ab" + "c"), then ties by fewer characters and UTF-8 order. Counting a pair wrongly or
/// breaking a tie in another way changes this list.
#[test]
fn merges_of_a_corpus_small_enough_to_check_by_hand() {
    // Words: " ab" 2, " abc" 3, " xy" 2, " x" 0; pairs: (" ",a) 5, (a,b) 5, (b,c) 3, (" ",x) 2, (x,y) 2.
    let text = " ab ab abc abc abc xy xy\n".to_string();
    let trained = train_on(&[("a.txt", text)], &Settings { character_coverage: 1.0, ..settings(263 + 5 + 6, 1) });
    let tokenizer = tokenizer(&trained);
    let pieces: Vec<&str> = (263..274).map(|id| tokenizer.sentencepiece().expect("a model").piece(id)).collect();
    // 5: " a" before "ab" (0x20 < 0x61), then " ab"; 3: " abc"; 2: " x" before "xy"; then " xy". Characters by count, then code.
    assert_eq!(pieces, ["\u{2581}a", "\u{2581}ab", "\u{2581}abc", "\u{2581}x", "\u{2581}xy", "\u{2581}", "a", "b", "c", "x", "y"]);
    assert_eq!(trained.report.last_merge_count, 2);
    assert_eq!(tokenizer.encode(" abc xy ab"), [265, 267, 264]);
}

/// No piece crosses a digit, a script or a space; spaces and tabs stay; a newline is a byte.
#[test]
fn pieces_have_the_shapes_of_nemotron() {
    let files = [("a.txt", "    if x12 == 34:\n\t\treturn na\u{ef}ve\u{4f60}\u{597d} \u{4f60}\u{597d}42abc\r\n".repeat(50))];
    let trained = train_on(&files, &Settings { character_coverage: 1.0, ..settings(300, 1) });
    let tokenizer = tokenizer(&trained);
    for id in 263..300 {
        let piece = tokenizer.sentencepiece().expect("a model").piece(id);
        let n = piece.chars().count();
        assert!(n == 1 || !piece.contains(|c: char| c.is_ascii_digit() || c == '\n' || c == '\r'), "{piece:?}");
        let bare = piece.trim_start_matches('\u{2581}');
        assert!(!bare.contains('\u{2581}') && (bare.is_empty() || n - bare.chars().count() <= 1), "{piece:?}");
        assert!(!(bare.is_ascii() && piece.contains('\u{4f60}')));
    }
    let shown: Vec<&str> = tokenizer
        .encode("  12\n\t\t\u{4f60}\u{597d}4")
        .into_iter()
        .map(|id| tokenizer.sentencepiece().expect("a model").piece(id))
        .collect();
    assert_eq!(shown, ["\u{2581}\u{2581}", "1", "2", "<0x0A>", "\t\t", "\u{4f60}\u{597d}", "4"]);
}

/// Settings and texts that cannot work are refused with one line and the number to use.
#[test]
fn impossible_vocabularies_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let corpus = corpus_of(dir.path(), &[("a.txt", "one two one two three".into())]);
    let refused = |settings: &Settings| train(&corpus, settings).err().expect("refused");
    let error = refused(&settings(5000, 1));
    let largest: usize =
        error.to_string().split(" is the largest").next().and_then(|head| head.rsplit(' ').next()?.parse().ok()).expect("a number");
    assert_eq!(error.exit_code(), 2);
    assert!(train(&corpus, &settings(largest, 1)).is_ok(), "{largest} was said to be possible");
    assert!(train(&corpus, &settings(largest + 1, 1)).is_err());
    assert!(refused(&settings(265, 1)).to_string().contains("need a piece"));
    assert!(refused(&settings(100, 1)).to_string().contains("expected 264"));
    assert!(refused(&Settings { character_coverage: 0.5, ..settings(400, 1) }).to_string().contains("coverage 0.5"));
    let newline = tempfile::tempdir().expect("a temporary folder");
    let error = train(&corpus_of(newline.path(), &[("a.txt", "\n\n".into())]), &settings(400, 1)).err().expect("no words");
    assert!(error.to_string().contains("an empty corpus"), "{error}");
    assert_eq!(error.exit_code(), 3);
}

/// One word without end (no space in a megabyte) trains in memory and time of its length.
#[test]
fn a_word_without_end_is_no_problem() {
    let trained = train_on(&[("a.txt", "ab".repeat(500_000) + &"\u{4f60}".repeat(300_000))], &settings(274, 2));
    assert!(trained.report.bytes_per_token > 10.0, "{}", trained.report.bytes_per_token);
}
