//! Token shards: Megatron's format read and written, damage refused by name, nothing that can be in a file makes the reader
//! crash or train on wrong ids.

mod oracles;

use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use trireme::artifact::{ArtifactWriter, Begin, HashingFile, MANIFEST};
use trireme::data::shards::{KIND, Split, TokenShards};
use trireme::data::writer::ShardWriter;
use trireme::error::{Error, Result};
use trireme::rng::Random;

const VOCAB: u32 = 70_000;

/// Documents of odd lengths with ids over the whole vocabulary.
fn random_documents(seed: u64, n: usize) -> Vec<Vec<u32>> {
    let random = Random::new(seed, "documents");
    let length = |d: usize| 1 + random.bits(d as u64) as usize % 90;
    let id = |d: usize, t: usize| (random.bits((d as u64 + 1) << 32 | t as u64) % u64::from(VOCAB)) as u32;
    (0..n).map(|d| (0..length(d)).map(|t| id(d, t)).collect()).collect()
}

/// An artifact of shards as trireme-tokenize leaves it.
fn write_artifact(out: &Path, documents: &[Vec<u32>]) {
    let Begin::Write(mut writer) = ArtifactWriter::begin(out, KIND, serde_json::json!({}), Vec::new()).unwrap() else { panic!("new") };
    let mut shard = ShardWriter::create(writer.dir(), "train").unwrap();
    documents.iter().for_each(|document| shard.append(document).unwrap());
    writer.count("train_documents", shard.n_documents());
    writer.count("train_tokens", shard.n_tokens());
    writer.count("train_text_bytes", 3 * shard.n_tokens());
    writer.count("vocab_size", VOCAB);
    shard.close().unwrap().into_iter().for_each(|file| writer.add(file));
    let mut model = HashingFile::create(writer.dir(), "tokenizer.model").unwrap();
    model.append(b"a model").unwrap();
    writer.add(model.close().unwrap());
    writer.commit().unwrap();
}

/// The bytes of an index, from the description of the format alone.
fn index_bytes(code: u8, size: i64, lengths: &[i32], document_indices: &[i64]) -> Vec<u8> {
    let mut bytes = b"MMIDIDX\0\0\x01\0\0\0\0\0\0\0".to_vec();
    bytes.push(code);
    bytes.extend((lengths.len() as u64).to_le_bytes());
    bytes.extend((document_indices.len() as u64).to_le_bytes());
    lengths.iter().for_each(|length| bytes.extend(length.to_le_bytes()));
    let mut offset = 0;
    for length in lengths {
        bytes.extend(i64::to_le_bytes(offset));
        offset += i64::from(*length) * size;
    }
    document_indices.iter().for_each(|index| bytes.extend(index.to_le_bytes()));
    bytes
}

fn read_all(shards: &TokenShards) -> Vec<u32> {
    let mut tokens = vec![0; shards.n_tokens() as usize];
    shards.read(0, &mut tokens).unwrap();
    tokens
}

/// Opens and verifies.
fn check(path: &Path, split: Split) -> Result<TokenShards> {
    let shards = TokenShards::open(path, split)?;
    shards.verify()?;
    Ok(shards)
}

fn assert_says(error: &Error, fragments: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.exit_code(), 3, "{text}");
    assert!(!text.contains('\n') && text.contains("; "), "one line with a remedy: {text}");
    fragments.iter().for_each(|fragment| assert!(text.contains(fragment), "{text:?} does not say {fragment:?}"));
}

/// What is written is read back at every position and range, with the manifest's numbers; an offset by one anywhere shows.
#[test]
fn written_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tokens");
    let documents = random_documents(1, 333);
    write_artifact(&out, &documents);
    let shards = check(&out, Split::Train).unwrap();
    let tokens: Vec<u32> = documents.concat();
    assert_eq!((shards.n_tokens(), shards.n_documents()), (tokens.len() as u64, 333));
    assert_eq!((shards.vocab_size(), shards.text_bytes()), (Some(VOCAB as usize), Some(3 * tokens.len() as u64)));
    assert_eq!(shards.tokenizer_bytes().unwrap(), b"a model");
    assert_eq!(read_all(&shards), tokens);
    let random = Random::new(2, "ranges");
    for k in 0..500 {
        let first = random.bits(2 * k) % (tokens.len() as u64 + 1);
        let length = random.bits(2 * k + 1) % (tokens.len() as u64 - first + 1);
        let mut out = vec![7; length as usize];
        shards.read(first, &mut out).unwrap();
        assert_eq!(out, tokens[first as usize..][..length as usize]);
        let mut starts = Vec::new();
        shards.document_starts(first..first + length, &mut starts);
        let mut expected = Vec::new();
        documents.iter().fold(0, |at, document| {
            expected.extend(Some(at).filter(|at| *at > first && *at < first + length));
            at + document.len() as u64
        });
        assert_eq!(starts, expected, "{first} + {length}");
    }
}

/// numpy reads our files by Megatron's layout, token for token.
#[test]
fn numpy_reads_ours() {
    let Some(python) = oracles::python("numpy") else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tokens");
    let documents = random_documents(3, 57);
    write_artifact(&out, &documents);
    let lines = oracles::run(&python, "megatron_index.py", &[Path::new("read"), &out.join("train")]);
    assert_eq!(lines[0], ["int32", "57", "57"]);
    let read: Vec<Vec<u32>> = lines[1..].iter().map(|line| line.iter().map(|id| id.parse().unwrap()).collect()).collect();
    assert_eq!(read, documents);
}

/// We read what Megatron's builder writes: each integer type, documents of several sequences, empty documents first and last.
#[test]
fn we_read_numpys() {
    let Some(python) = oracles::python("numpy") else { return };
    let dir = tempfile::tempdir().unwrap();
    let spec = dir.path().join("spec.json");
    for (dtype, largest) in [("uint8", 255), ("int8", 127), ("int16", 32767), ("int32", i32::MAX), ("int64", i32::MAX), ("uint16", 65535)] {
        let documents =
            vec![vec![], vec![vec![1, largest], vec![0, 2, 3]], vec![vec![9]], vec![], vec![vec![5, 4], vec![largest - 1]], vec![]];
        fs::write(&spec, serde_json::to_vec(&documents).unwrap()).unwrap();
        let prefix = dir.path().join(format!("corpus.v1_{dtype}"));
        oracles::run(&python, "megatron_index.py", &[Path::new("write"), &prefix, Path::new(dtype), &spec]);
        let shards = check(&prefix, Split::Train).unwrap();
        let expected: Vec<u32> = documents.concat().concat().into_iter().map(|id| id as u32).collect();
        assert_eq!(read_all(&shards), expected, "{dtype}");
        assert_eq!((shards.n_documents(), shards.vocab_size(), shards.text_bytes()), (6, None, None));
        let mut starts = Vec::new();
        shards.document_starts(0..expected.len() as u64, &mut starts);
        assert_eq!(starts, [5, 6], "{dtype}");
    }
    fs::write(&spec, "[[[1.0, 2.0]]]").unwrap();
    for dtype in ["float32", "float64"] {
        let prefix = dir.path().join(dtype);
        oracles::run(&python, "megatron_index.py", &[Path::new("write"), &prefix, Path::new(dtype), &spec]);
        assert_says(&TokenShards::open(&prefix, Split::Train).unwrap_err(), &[".idx", "float"]);
    }
}

/// A corpus without our manifest is found by directory, by prefix, and by either file; what is ambiguous or missing is refused.
#[test]
fn ways_to_name_a_corpus() {
    let dir = tempfile::tempdir().unwrap();
    let write = |path: PathBuf| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let name = path.to_str().unwrap();
        fs::write(format!("{name}.idx"), index_bytes(8, 2, &[2], &[0, 1])).unwrap();
        fs::write(format!("{name}.bin"), [5, 0, 6, 1]).unwrap();
    };
    let one = dir.path().join("one");
    write(one.join("wiki.en_text_document"));
    for path in
        [one.clone(), one.join("wiki.en_text_document"), one.join("wiki.en_text_document.bin"), one.join("wiki.en_text_document.idx")]
    {
        for split in [Split::Train, Split::Validation] {
            assert_eq!(read_all(&check(&path, split).unwrap()), [5, 262], "{}", path.display());
        }
    }
    let two = dir.path().join("two");
    write(two.join("a"));
    write(two.join("b"));
    assert_says(&TokenShards::open(&two, Split::Train).unwrap_err(), &["two", "2 pairs", "a, ", "b"]);
    let named = dir.path().join("named");
    write(named.join("train"));
    assert!(check(&named, Split::Train).is_ok());
    assert_says(&TokenShards::open(&named, Split::Validation).unwrap_err(), &["named", "validation.bin"]);
    fs::remove_file(named.join("train.bin")).unwrap();
    assert_says(&TokenShards::open(&named, Split::Train).unwrap_err(), &["train.bin", "check the path"]);
    let unfinished = dir.path().join("tokens.tmp-123");
    write(unfinished.join("train"));
    assert_says(&TokenShards::open(&unfinished, Split::Train).unwrap_err(), &["tokens.tmp-123", "unfinished"]);
    assert_says(&TokenShards::open(&dir.path().join("nothing"), Split::Train).unwrap_err(), &["nothing"]);
    fs::create_dir(dir.path().join("empty")).unwrap();
    assert_says(&TokenShards::open(&dir.path().join("empty"), Split::Train).unwrap_err(), &["empty", "train.bin"]);
    fs::create_dir_all(dir.path().join("odd/train.idx")).unwrap();
    assert_says(&TokenShards::open(&dir.path().join("odd"), Split::Train).unwrap_err(), &["train.idx"]);
}

/// Any flipped bit, cut or extension of a file of an artifact is refused, and the line names that file and two values.
#[test]
fn damage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tokens");
    write_artifact(&out, &random_documents(4, 40));
    let random = Random::new(5, "damage");
    for (number, name) in ["train.bin", "train.idx", "tokenizer.model"].iter().enumerate() {
        let path = out.join(name);
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            let error = check(&out, Split::Train).err().unwrap_or_else(|| panic!("{name}: {what} was not noticed"));
            assert_says(&error, &[name]);
        };
        for k in 0..60 {
            let bit = random.bits(1000 * number as u64 + k) as usize % (8 * whole.len());
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused(&flipped, &format!("bit {bit}"));
        }
        for length in [0, 1, whole.len() / 2, whole.len() - 1] {
            refused(&whole[..length], &format!("cut to {length}"));
        }
        refused(&[&whole[..], &[0; 4]].concat(), "four more bytes");
        fs::remove_file(&path).unwrap();
        assert_says(&check(&out, Split::Train).unwrap_err(), &[name, "missing"]);
        fs::write(&path, &whole).unwrap();
    }
    check(&out, Split::Train).expect("whole again");
    assert_says(&check(&out, Split::Validation).unwrap_err(), &["validation", "--validation-share"]);
    let manifest = fs::read_to_string(out.join(MANIFEST)).unwrap();
    fs::write(out.join(MANIFEST), manifest.replace("70000", "70001")).unwrap();
    assert_says(&check(&out, Split::Train).unwrap_err(), &[MANIFEST, "edited"]);
}

/// Ids outside the vocabulary are refused with their position and value, when verifying and when reading; the embedding would
/// otherwise be read out of bounds.
#[test]
fn ids_outside_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let write = |code: u8, size: usize, bytes: &[u8]| {
        let n_tokens = (bytes.len() / size) as i32;
        fs::write(dir.path().join("train.idx"), index_bytes(code, size as i64, &[n_tokens], &[0, 1])).unwrap();
        fs::write(dir.path().join("train.bin"), bytes).unwrap();
        let mut shards = TokenShards::open(dir.path(), Split::Train).unwrap();
        shards.limit_ids(100);
        shards
    };
    let refused = |shards: &TokenShards, position: u64, fragments: &[&str]| {
        assert_says(&shards.verify().unwrap_err(), fragments);
        assert_says(&shards.read(position, &mut [0]).unwrap_err(), fragments);
    };
    refused(&write(1, 1, &[1, 99, 100]), 2, &["train.bin", "token 2 is 100", "0..100"]);
    refused(&write(2, 1, &[1, 0xff, 100]), 1, &["token 1 is -1"]);
    refused(&write(3, 2, &[1, 0, 0, 0x80]), 1, &["token 1 is -32768"]);
    refused(&write(8, 2, &[1, 0, 0, 0x80]), 1, &["token 1 is 32768"]);
    refused(&write(4, 4, &[(-7i32).to_le_bytes(), 5i32.to_le_bytes()].concat()), 0, &["token 0 is -7"]);
    refused(&write(5, 8, &[5i64.to_le_bytes(), (1i64 << 32).to_le_bytes()].concat()), 1, &["token 1 is 4294967296"]);
    refused(&write(5, 8, &[5i64.to_le_bytes(), (-1i64).to_le_bytes()].concat()), 1, &["token 1 is -1"]);
    let mut many = vec![0u8; 4 * 9_000_000]; // over several blocks
    many[4 * 8_765_432] = 250;
    refused(&write(4, 4, &many), 8_765_432, &["token 8765432 is 250"]);
    assert!(write(1, 1, &[0, 99]).verify().is_ok());
}

/// A file that is cut or grows while it is mapped is an error of the next read; touching the lost pages would kill the process.
#[test]
fn truncated_under_the_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tokens");
    write_artifact(&out, &random_documents(6, 2000));
    let shards = check(&out, Split::Train).unwrap();
    let bin = fs::OpenOptions::new().write(true).open(out.join("train.bin")).unwrap();
    for length in [4096, 0, 1 << 20] {
        bin.set_len(length).unwrap();
        let mut tokens = vec![0; 1000];
        assert_says(&shards.read(shards.n_tokens() - 1000, &mut tokens).unwrap_err(), &["train.bin", "when it was opened"]);
        assert_says(&shards.verify().unwrap_err(), &["train.bin"]);
    }
}

/// An index whose arrays contradict each other is refused when verified, with the first wrong entry.
#[test]
fn contradictory_indices() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("train.bin"), [0; 24]).unwrap();
    let idx = dir.path().join("train.idx");
    let refused = |bytes: &[u8], fragments: &[&str]| {
        fs::write(&idx, bytes).unwrap();
        assert_says(&check(dir.path(), Split::Train).unwrap_err(), fragments);
    };
    let good = index_bytes(4, 4, &[1, 2, 3], &[0, 1, 3]);
    fs::write(&idx, &good).unwrap();
    check(dir.path(), Split::Train).unwrap();
    fs::write(&idx, [&good[..], &[0, 1, 0]].concat()).unwrap();
    check(dir.path(), Split::Train).expect("modes at the end are fine");
    refused(&index_bytes(4, 4, &[1, 2, 3], &[0, 2, 1, 3]), &["train.idx", "document 2", "sequence 1"]);
    refused(&index_bytes(4, 4, &[1, 2, 3], &[1, 1, 3]), &["document 0", "sequence 1"]);
    refused(&index_bytes(4, 4, &[1, 2, 3], &[0, 2]), &["2", "3 sequences"]);
    refused(&index_bytes(4, 4, &[1, 2, 3], &[]), &["0 document indices"]);
    refused(&index_bytes(4, 4, &[1, -2, 3], &[0, 3]), &["3 tokens at byte -4"]);
    refused(&index_bytes(4, 4, &[1, 2, 4], &[0, 3]), &["train.bin", "24 bytes", "28"]);
    refused(&index_bytes(4, 4, &[4, -1, 3], &[0, 3]), &["sequence 1", "-1"]);
    let mut gap = good.clone();
    gap[34 + 12 + 8] = 8; // the second sequence starts at byte 8 instead of 4
    refused(&gap, &["sequence 1", "byte 8", "4"]);
    refused(&good[..good.len() - 1], &["bytes", "take"]);
    refused(&index_bytes(9, 4, &[1, 2, 3], &[0, 3]), &["token type 9"]);
    refused(&[&good[..9], &[2], &good[10..]].concat(), &["version 2"]);
    refused(b"MMIDIDX", &["not a Megatron index"]);
    refused(b"", &["not a Megatron index", "0 bytes"]);
    let mut huge = good.clone();
    huge[18..26].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(&huge, &["18446744073709551615"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// No index, however wrong its numbers, makes opening, verifying, reading or looking for documents panic.
    #[test]
    fn wild_indices_do_not_crash(
        lengths in prop::collection::vec(any::<i32>(), 0..4),
        indices in prop::collection::vec(prop_oneof![any::<i64>(), 0i64..4], 0..4),
        damage in prop::collection::vec((9usize..200, any::<u8>()), 0..4),
        tokens in 0usize..64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = index_bytes(1, 1, &lengths, &indices);
        for (at, value) in damage {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        fs::write(dir.path().join("train.idx"), bytes).unwrap();
        fs::write(dir.path().join("train.bin"), vec![3; tokens]).unwrap();
        if let Ok(shards) = TokenShards::open(dir.path(), Split::Train) {
            let _ = shards.verify();
            let mut out = vec![0; shards.n_tokens() as usize];
            let _ = shards.read(0, &mut out);
            shards.document_starts(0..shards.n_tokens(), &mut Vec::new());
        }
    }
}
