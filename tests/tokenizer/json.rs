//! Hugging Face's tokenizers: a `tokenizer.json` is told from a `.model` by its content, and read by the crate that defines it; what is
//! tested is what we add: special tokens by name, texts taken as they are, errors that name the file. (Ids of a real model's tokenizer
//! are compared in tests/real_model.sh.)

use serde_json::json;
use std::path::Path;
use trireme::text::{JSON_FILE, Tokenizer};

/// Byte-level BPE over "a", "b", space and line break with the merges a b -> ab and Ġ ab -> Ġab, and two special tokens; it asks for
/// texts to be cut to one token and padded to nine.
pub fn tiny() -> Vec<u8> {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let padding = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
                         "pad_token": "<|endoftext|>"});
    let value = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        "padding": padding,
        "added_tokens": [special(0, "<|endoftext|>"), special(1, "<|im_start|>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false,
            "vocab": {"<|endoftext|>": 0, "<|im_start|>": 1, "a": 2, "b": 3, "Ġ": 4, "Ċ": 5, "ab": 6, "Ġab": 7},
            "merges": [["a", "b"], ["Ġ", "ab"]],
        },
    });
    serde_json::to_vec(&value).expect("plain data")
}

/// Ids by the merges, done by hand; special tokens match in the text and vanish on the way back; nothing is cut or padded.
#[test]
fn texts_come_and_go() {
    let tokenizer = Tokenizer::from_bytes(tiny(), Path::new("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("<|im_start|>ab ab\nba<|endoftext|>");
    assert_eq!(ids, [1, 6, 7, 5, 3, 2, 0]);
    assert_eq!(tokenizer.decode(&ids), "ab ab\nba");
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.pad_id()), (8, Some(0), Some(0), None));
    assert_eq!((tokenizer.id_of("Ġab"), tokenizer.piece_text(7), tokenizer.piece_text(8)), (Some(7), Some("Ġab".into()), None));
    assert_eq!((tokenizer.file_name(), tokenizer.file_bytes()), (JSON_FILE, &tiny()[..]));
    assert!(tokenizer.sentencepiece().is_none());
}

/// Anything that is not one is an error with the file's name on one line, never a panic.
#[test]
fn damage_is_named() {
    let whole = tiny();
    let no_model = br#"{"version": "1.0"}"#.to_vec();
    for bytes in [whole[..whole.len() / 2].to_vec(), b"{".to_vec(), b"{}".to_vec(), no_model] {
        let error = Tokenizer::from_bytes(bytes, Path::new("dir/tokenizer.json")).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("dir/tokenizer.json: not a tokenizer of Hugging Face") && !text.contains('\n'), "{text}");
        assert_eq!(error.exit_code(), 3);
    }
}
