//! Ids and texts equal SentencePiece's, for models of SentencePiece's trainer.

use crate::adversarial::{self, Choices};
use crate::oracle;
use std::path::Path;
use trireme::text::Tokenizer;

const WITH_EXTRA_IDS: &str = "user_defined_symbols=<extra_id_0>|<extra_id_1>|<extra_id_10>";

/// Trains a model with SentencePiece on a small corpus and compares ids and texts on all sorts of strings.
fn compare(name: &str, vocab_size: usize, settings: &[&str]) {
    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let corpus = dir.path().join("corpus.txt");
    std::fs::write(&corpus, adversarial::corpus(1, 3000)).expect("written");
    let vocab = format!("vocab_size={vocab_size}");
    let mut all = vec![vocab.as_str()];
    all.extend_from_slice(settings);
    let model = oracle::train(&python, dir.path(), name, &corpus, &all);
    let mut texts = adversarial::by_hand();
    texts.extend(adversarial::random(vocab_size as u64, 6000));
    texts.push(adversarial::corpus(2, 400).into_bytes());
    texts.extend(endless_words());
    compare_texts(&python, &model, &texts);
}

/// Words without end: a megabyte of one letter, of two, of spaces, and of letters and foreign characters at random.
fn endless_words() -> Vec<Vec<u8>> {
    let mut choices = Choices::new(23);
    let letters =
        (0..200_000).map(|_| choices.one(&['a', 'b', 'e', 'i', 'n', 't', 'o', '\u{e9}', '\u{4f60}', '\u{597d}'])).collect::<String>();
    vec!["a".repeat(1_000_000).into_bytes(), "in".repeat(200_000).into_bytes(), " ".repeat(200_000).into_bytes(), letters.into_bytes()]
}

/// Every text has SentencePiece's ids, and ids (of texts and at random) decode to SentencePiece's texts.
pub fn compare_texts(python: &Path, model: &Path, texts: &[Vec<u8>]) {
    let tokenizer = Tokenizer::open(model).expect("a model of SentencePiece opens");
    let expected = oracle::encode(python, model, texts);
    for round in 0..2 {
        for (text, expected) in texts.iter().zip(&expected) {
            let found = tokenizer.encode_bytes(text);
            let shown: String = String::from_utf8_lossy(text).chars().take(300).collect();
            assert!(found == *expected, "round {round}, text {shown:?}\n  ours {found:?}\ntheirs {expected:?}");
        }
    }
    let mut lists = expected;
    let mut choices = Choices::new(17);
    let n_plain = lists.len();
    for i in 0..3000 {
        let mut ids: Vec<u32> = (0..choices.below(12)).map(|_| choices.below(tokenizer.vocab_size()) as u32).collect();
        if i % 3 == 0 {
            let cut = lists[choices.below(n_plain)].clone(); // a part of a real text: partial characters
            ids = cut[choices.below(cut.len() + 1)..].to_vec();
            ids.truncate(choices.below(20));
        } else if i % 3 == 1 {
            ids.iter_mut().for_each(|id| *id %= 270); // mostly bytes and special pieces
        }
        lists.push(ids);
    }
    for (ids, expected) in lists.iter().zip(oracle::decode(python, model, &lists)) {
        assert_eq!(tokenizer.decode(ids), expected, "ids {ids:?}");
    }
}

/// Nemotron-4's settings: no dummy prefix, `<extra_id_*>` user-defined. Would break when a merge is taken out of order, or a
/// shortcut of the encoder cuts where a merge crosses.
#[test]
fn equals_sentencepiece_without_dummy_prefix() {
    compare("plain", 900, &["add_dummy_prefix=false", WITH_EXTRA_IDS]);
}

/// With a dummy prefix a space is put in front and dropped again in decoding.
#[test]
fn equals_sentencepiece_with_dummy_prefix() {
    compare("prefix", 700, &["add_dummy_prefix=true"]);
}

/// A vocabulary so small that most characters fall back to bytes.
#[test]
fn equals_sentencepiece_with_a_tiny_vocabulary() {
    compare("tiny", 310, &["add_dummy_prefix=false", "character_coverage=0.98", WITH_EXTRA_IDS]);
}

/// Pieces across scripts, digits and spaces, long pieces: the shapes Nemotron-4 does not have, but a model may.
#[test]
fn equals_sentencepiece_with_unusual_pieces() {
    let settings = [
        "add_dummy_prefix=true",
        "split_digits=false",
        "split_by_unicode_script=false",
        "split_by_number=false",
        "split_by_whitespace=false",
        "max_sentencepiece_length=40",
        "unk_surface=?!",
        "user_defined_symbols=ab|abc|\u{2581}the|b|\u{4f60}|<extra_id_0>|in a",
    ];
    compare("unusual", 1200, &settings);
}

/// Without byte fallback a run of unknown characters is one unknown piece.
#[test]
fn equals_sentencepiece_without_byte_fallback() {
    compare("unknown", 500, &["byte_fallback=false", "add_dummy_prefix=false", "character_coverage=0.98"]);
}

/// Real text (this crate's sources): ids equal on whole files.
#[test]
fn equals_sentencepiece_on_source_code() {
    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let corpus = trireme::text::corpus::Corpus::open(&[root]).expect("the sources");
    let texts: Vec<Vec<u8>> = corpus.documents(0, 1).map(|document| document.expect("UTF-8").text.into_bytes()).collect();
    let file = dir.path().join("corpus.txt");
    std::fs::write(&file, texts.concat()).expect("written");
    let model = oracle::train(&python, dir.path(), "code", &file, &["vocab_size=2500", "add_dummy_prefix=false", WITH_EXTRA_IDS]);
    compare_texts(&python, &model, &texts);
}

/// The same for a model of one's own, named by TRIREME_TEST_MODEL (published models are too large to keep beside the tests), on
/// TRIREME_TEST_STRINGS random strings.
#[test]
fn equals_sentencepiece_for_a_model_from_outside() {
    let Some(model) = std::env::var_os("TRIREME_TEST_MODEL") else {
        println!("skipped: TRIREME_TEST_MODEL names no .model");
        return;
    };
    let Some(python) = oracle::python() else { return };
    let mut texts = adversarial::by_hand();
    let n_strings = std::env::var("TRIREME_TEST_STRINGS").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    texts.extend(adversarial::random(3, n_strings));
    let corpus =
        trireme::text::corpus::Corpus::open(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "/usr/share/doc".into()]).expect("text");
    texts.extend(corpus.documents(0, 40).map(|document| document.expect("UTF-8").text.into_bytes()));
    compare_texts(&python, Path::new(&model), &texts);
}

/// Work grows as n log n on one word without end: a quadratic merge loop would do 10^12 steps here. Each of the n letters
/// starts one pair and each of the at most n - 1 merges pushes at most two and pops what was pushed, so at most
/// n + 2 (n + 2 n) = 7 n pairs are looked at (the heap's log n is inside each).
#[test]
fn one_letter_a_million_times_is_not_quadratic() {
    let pieces: Vec<(String, f32, i32)> =
        (0..20).map(|n| ("a".repeat(1 << n), -(n as f32), 1)).filter(|piece| piece.0.len() < 1 << 16).collect();
    let tokenizer = Tokenizer::from_bytes(crate::files::model_bytes(&pieces), Path::new("made here")).expect("a model");
    let n = 1_000_000u64;
    for text in ["a".repeat(n as usize), "ab".repeat(n as usize / 2)] {
        let (ids, operations) = tokenizer.sentencepiece().expect("a model").encode_counting(&text);
        assert!(operations <= 7 * n, "{operations} pairs looked at for {n} letters");
        assert_eq!(tokenizer.decode(&ids), text);
    }
}

/// Threads share a tokenizer: each gets the ids a lone thread gets.
#[test]
fn threads_share_a_tokenizer() {
    let pieces: Vec<(String, f32, i32)> =
        ["a", "b", " ", "ab", "aba", " a"].iter().enumerate().map(|(i, text)| (text.replace(' ', "\u{2581}"), -(i as f32), 1)).collect();
    let tokenizer = Tokenizer::from_bytes(crate::files::model_bytes(&pieces), Path::new("made here")).expect("a model");
    let texts: Vec<String> = adversarial::random(5, 400).iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let alone: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode(text)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| texts.iter().zip(&alone).for_each(|(text, ids)| assert_eq!(tokenizer.encode(text), *ids)));
        }
    });
}
