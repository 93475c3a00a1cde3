//! Model files: what is damaged or not supported is refused with one line, and a file read and written again is the same.

use crate::oracle;
use prost::Message;
use std::path::Path;
use trireme::error::Result;
use trireme::text::Tokenizer;
use trireme::text::model_file::{ModelFile, ModelProto, NormalizerSpec, PieceProto, TrainerSpec};

/// A model by hand: `<unk>`, `<s>`, `</s>`, the byte pieces, then these (text, score, type).
pub fn model(pieces: &[(String, f32, i32)]) -> ModelProto {
    let piece = |text: String, score: f32, kind: i32| PieceProto { piece: Some(text), score: Some(score), r#type: Some(kind) };
    let mut all = vec![piece("<unk>".into(), 0.0, 2), piece("<s>".into(), 0.0, 3), piece("</s>".into(), 0.0, 3)];
    all.extend((0..256).map(|byte| piece(format!("<0x{byte:02X}>"), 0.0, 6)));
    all.extend(pieces.iter().map(|(text, score, kind)| piece(text.clone(), *score, *kind)));
    let trainer = TrainerSpec { model_type: Some(2), byte_fallback: Some(true), ..TrainerSpec::default() };
    let normalizer = NormalizerSpec { add_dummy_prefix: Some(false), remove_extra_whitespaces: Some(false), ..NormalizerSpec::default() };
    ModelProto {
        pieces: all,
        trainer_spec: Some(trainer.encode_to_vec()),
        normalizer_spec: Some(normalizer.encode_to_vec()),
        ..ModelProto::default()
    }
}

/// [`model`], encoded.
pub fn model_bytes(pieces: &[(String, f32, i32)]) -> Vec<u8> {
    model(pieces).encode_to_vec()
}

fn small() -> ModelProto {
    model(&[("a".into(), -1.0, 1), ("b".into(), -2.0, 1), ("ab".into(), -0.5, 1)])
}

fn open(proto: &ModelProto) -> Result<Tokenizer> {
    Tokenizer::from_bytes(proto.encode_to_vec(), Path::new("x.model"))
}

/// The message of a refusal: one line that names the file and holds `part`, exit code 3.
fn assert_refused(result: Result<Tokenizer>, part: &str) {
    let error = result.expect_err(part);
    let line = error.to_string();
    assert!(line.starts_with("x.model: ") && line.contains(part) && !line.contains('\n') && line.contains("; "), "{line:?} lacks {part:?}");
    assert_eq!(error.exit_code(), 3);
}

/// Each sort of damage has its own line. Would break when a check of `checked_pieces` is lost.
#[test]
fn damaged_models_are_refused() {
    assert!(open(&small()).is_ok());
    let with = |change: &dyn Fn(&mut ModelProto)| {
        let mut proto = small();
        change(&mut proto);
        open(&proto)
    };
    assert_refused(with(&|p| p.pieces.push(p.pieces[260].clone())), "\"b\" is there twice");
    assert_refused(with(&|p| p.pieces[260].piece = Some("<s>".into())), "\"<s>\" is there twice");
    assert_refused(with(&|p| drop(p.pieces.remove(3 + 0x41))), "byte fallback without the piece <0x41>");
    assert_refused(with(&|p| p.pieces[260].piece = None), "piece 260 has no text");
    assert_refused(with(&|p| p.pieces[260].score = Some(f32::NAN)), "has score NaN");
    assert_refused(with(&|p| p.pieces[260].r#type = Some(9)), "has type 9");
    assert_refused(with(&|p| p.pieces[0].r#type = Some(1)), "is the unknown piece");
    assert_refused(with(&|p| p.pieces[260].r#type = Some(2)), "both the unknown piece");
    assert_refused(with(&|p| p.pieces[260].r#type = Some(6)), "expected <0x00> to <0xFF>");
    assert_refused(with(&|p| p.pieces[260].r#type = Some(5)), "marked unused");
    assert_refused(with(&|p| p.pieces[260].r#type = Some(3)), "is one character");
    assert_refused(with(&|p| p.trainer_spec = None), "no trainer_spec");
    assert_refused(with(&|p| p.pieces.clear()), "none of the 0 pieces");
    assert_refused(Tokenizer::from_bytes(Vec::new(), Path::new("x.model")), "empty file");
    assert_refused(Tokenizer::from_bytes(b"not a model at all".to_vec(), Path::new("x.model")), "not a SentencePiece model");
}

/// What would change ids and is not implemented is named.
#[test]
fn models_of_other_sorts_are_refused() {
    let trainer = |change: &dyn Fn(&mut TrainerSpec)| {
        let mut proto = small();
        let mut spec = TrainerSpec::decode(proto.trainer_spec.as_deref().expect("set")).expect("ours");
        change(&mut spec);
        proto.trainer_spec = Some(spec.encode_to_vec());
        open(&proto)
    };
    let normalizer = |change: &dyn Fn(&mut NormalizerSpec)| {
        let mut proto = small();
        let mut spec = NormalizerSpec::decode(proto.normalizer_spec.as_deref().expect("set")).expect("ours");
        change(&mut spec);
        proto.normalizer_spec = Some(spec.encode_to_vec());
        open(&proto)
    };
    assert_refused(trainer(&|s| s.model_type = None), "a unigram model");
    assert_refused(trainer(&|s| s.model_type = Some(4)), "a character model");
    assert_refused(trainer(&|s| s.treat_whitespace_as_suffix = Some(true)), "treat_whitespace_as_suffix");
    assert_refused(trainer(&|s| s.byte_fallback = None), "no byte fallback");
    assert_refused(normalizer(&|s| s.precompiled_charsmap = Some(vec![1; 9])), "9 bytes of character map");
    assert_refused(normalizer(&|s| s.remove_extra_whitespaces = None), "remove_extra_whitespaces");
    assert_refused(normalizer(&|s| s.escape_whitespaces = Some(false)), "escape_whitespaces");
    let mut proto = small();
    proto.denormalizer_spec = Some(NormalizerSpec { precompiled_charsmap: Some(vec![1]), ..NormalizerSpec::default() }.encode_to_vec());
    assert_refused(open(&proto), "denormaliser");
}

/// A file cut anywhere is refused, or is a whole model of fewer fields that still checks: never a panic.
#[test]
fn truncated_and_flipped_files_never_panic() {
    let bytes = small().encode_to_vec();
    let whole = Tokenizer::from_bytes(bytes.clone(), Path::new("x.model")).expect("whole");
    for length in 0..bytes.len() {
        if let Ok(cut) = Tokenizer::from_bytes(bytes[..length].to_vec(), Path::new("x.model")) {
            assert!(length > bytes.len() - 16, "{length} of {} bytes opened", bytes.len());
            assert_eq!(cut.vocab_size(), whole.vocab_size());
        }
    }
    let mut refused = 0;
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match Tokenizer::from_bytes(flipped, Path::new("x.model")) {
            Ok(tokenizer) => drop(tokenizer.decode(&tokenizer.encode("abba <s>"))),
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                refused += 1;
            }
        }
    }
    assert!(refused > 4 * bytes.len(), "only {refused} of {} flips were seen", 8 * bytes.len());
}

/// Read and written again, a model of SentencePiece's has the same bytes, fields this crate has no name for included.
#[test]
fn reading_and_writing_keeps_every_byte() {
    let mut proto = small();
    proto.self_test_data = Some(vec![0x0A, 3, 0x0A, 1, b'a']);
    let mut bytes = proto.encode_to_vec();
    bytes.extend_from_slice(&[0xCA, 0x0C, 3, 1, 2, 3]); // field 201, length-delimited: an extension
    let file = ModelFile::parse(Path::new("x.model"), &bytes).expect("parses");
    assert_eq!(file.to_bytes(), bytes);

    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let corpus = dir.path().join("corpus.txt");
    std::fs::write(&corpus, crate::adversarial::corpus(1, 500)).expect("written");
    let path = oracle::train(&python, dir.path(), "samples", &corpus, &["vocab_size=500", "self_test_sample_size=10"]);
    let bytes = std::fs::read(&path).expect("there");
    let file = ModelFile::parse(&path, &bytes).expect("parses");
    assert_eq!(file.to_bytes(), bytes);
}

/// Special ids are found as SentencePiece finds them.
#[test]
fn special_ids_equal_sentencepiece() {
    let Some(python) = oracle::python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let corpus = dir.path().join("corpus.txt");
    std::fs::write(&corpus, crate::adversarial::corpus(1, 500)).expect("written");
    for (i, settings) in [["pad_id=1", "bos_id=2", "eos_id=3"], ["pad_id=-1", "bos_id=-1", "eos_id=1"]].iter().enumerate() {
        let mut all = vec!["vocab_size=500"];
        all.extend_from_slice(settings);
        let path = oracle::train(&python, dir.path(), &format!("special{i}"), &corpus, &all);
        let tokenizer = Tokenizer::open(&path).expect("opens");
        let number = |id: Option<u32>| id.map_or(-1, i64::from);
        let ours = format!(
            "{} {} {} {} {}",
            number(tokenizer.unk_id()),
            number(tokenizer.bos_id()),
            number(tokenizer.eos_id()),
            number(tokenizer.pad_id()),
            tokenizer.vocab_size()
        );
        assert_eq!(oracle::ask(&python, &["special", path.to_str().expect("UTF-8")], ""), [ours]);
    }
}
