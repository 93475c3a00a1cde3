//! The text of responses while they grow, and stop strings in it, against decoding the whole list of tokens after each: SentencePiece with
//! byte fallback, and tokenizers of Hugging Face of every sort of decoder (also one whose text changes far back).

use prost::Message;
use serde_json::{Value, json};
use std::path::Path;
use trireme::infer::growing::{Growing, Rules};
use trireme::infer::request::{FinishReason, Request, Response};
use trireme::infer::sampler::Choice;
use trireme::rng::Random;
use trireme::text::model_file::{ModelProto, NormalizerSpec, PieceKind, PieceProto, TrainerSpec};
use trireme::text::{GrowingText, Tokenizer};

/// Pieces of text in which spaces are U+2581.
const PIECES: [&str; 16] = ["▁", "▁▁", "▁a", "a", "b", "ab", "▁b▁", "é", "あ", "▁あい", "😀", "\n", "c▁", "ba", "▁the", "�"];

fn bytes() -> impl Iterator<Item = String> {
    (0..256).map(|byte| format!("<0x{byte:02X}>"))
}

/// A `.model` of these pieces with byte fallback; ids: unknown, control, bytes from 2, pieces from 258.
fn sentencepiece(add_dummy_prefix: bool) -> Tokenizer {
    let piece = |text: &str, kind: PieceKind| PieceProto { piece: Some(text.into()), score: Some(0.0), r#type: Some(kind as i32) };
    let mut pieces = vec![piece("<unk>", PieceKind::Unknown), piece("</s>", PieceKind::Control)];
    pieces.extend(bytes().map(|name| piece(&name, PieceKind::Byte)));
    pieces.extend(PIECES.iter().map(|text| piece(text, PieceKind::Normal)));
    let trainer = TrainerSpec { model_type: Some(2), byte_fallback: Some(true), ..TrainerSpec::default() };
    let normalizer =
        NormalizerSpec { add_dummy_prefix: Some(add_dummy_prefix), remove_extra_whitespaces: Some(false), ..NormalizerSpec::default() };
    let proto = ModelProto {
        pieces,
        trainer_spec: Some(trainer.encode_to_vec()),
        normalizer_spec: Some(normalizer.encode_to_vec()),
        ..ModelProto::default()
    };
    Tokenizer::from_bytes(proto.encode_to_vec(), Path::new("test.model")).unwrap()
}

/// A `tokenizer.json` of these tokens and this decoder; 0 is special, 1 is added and not special.
fn tokenizer_json(tokens: impl Iterator<Item = String>, decoder: Value) -> Tokenizer {
    let added = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
    let mut vocab = serde_json::Map::new();
    for token in ["</s>".to_string(), "<tool>".to_string()].into_iter().chain(tokens) {
        let id = vocab.len();
        vocab.entry(token).or_insert(id.into());
    }
    let value = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [added(0, "</s>", true), added(1, "<tool>", false)],
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(serde_json::to_vec(&value).unwrap(), Path::new("tokenizer.json")).unwrap()
}

/// The character by which GPT-2's vocabulary writes a byte: printable ones as themselves, the others from U+0100 up in turn.
fn byte_char(byte: u8) -> char {
    let is_printed = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if is_printed(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !is_printed(b)).count();
    char::from_u32(256 + before as u32).unwrap()
}

/// Every byte, and parts of words and characters that end and begin anywhere.
fn byte_level_tokens() -> impl Iterator<Item = String> {
    const WORDS: [&str; 10] = [" a", "a ", "ab", "b\n", " the", "あ", "あい", "é", "😀x", "a\u{3042}"];
    let whole = WORDS.iter().map(|word| word.as_bytes().to_vec());
    let torn =
        WORDS.iter().flat_map(|word| (1..word.len()).flat_map(|at| [word.as_bytes()[..at].to_vec(), word.as_bytes()[at..].to_vec()]));
    let all = (0..=255).map(|byte| vec![byte]).chain(whole).chain(torn);
    all.map(|bytes: Vec<u8>| bytes.into_iter().map(byte_char).collect())
}

/// One space is taken from the beginning of a text, two from its end.
fn ends_stripped() -> Tokenizer {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 2});
    let decoder = json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]});
    tokenizer_json(bytes().chain(PIECES.iter().map(|text| text.to_string())), decoder)
}

fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let like_llama = json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let words = ["##a", "##b", "a", "n't", ".", "'", "do", ",", "##é", "?"];
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let suffixed = ["▁a", "a</w>", "a", "b</w>", "</w>", "x</w>y", "é</w>", "</w></w>"];
    let blanks = ["▁a", "<b>", "|", "a", "b", "a|b", "n't", " ."];
    let ctc = json!({"type": "CTC", "pad_token": "<b>", "word_delimiter_token": "|", "cleanup": true});
    let pieces = || PIECES.iter().map(|text| text.to_string());
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    vec![
        ("SentencePiece", sentencepiece(true)),
        ("SentencePiece without dummy prefix", sentencepiece(false)),
        ("byte level", tokenizer_json(byte_level_tokens(), byte_level)),
        ("like Llama", tokenizer_json(bytes().chain(pieces()), like_llama)),
        ("metaspace", tokenizer_json(pieces(), metaspace("always"))),
        ("metaspace, first", tokenizer_json(pieces(), metaspace("first"))),
        ("metaspace, never", tokenizer_json(pieces(), metaspace("never"))),
        ("ends stripped", ends_stripped()),
        ("bytes only", tokenizer_json(bytes().chain(pieces()), json!({"type": "ByteFallback"}))),
        ("word piece", tokenizer_json(words.iter().map(|word| word.to_string()), word_piece)),
        ("no decoder", tokenizer_json(pieces(), Value::Null)),
        (
            "BPE with a suffix",
            tokenizer_json(suffixed.iter().map(|text| text.to_string()), json!({"type": "BPEDecoder", "suffix": "</w>"})),
        ),
        ("CTC", tokenizer_json(blanks.iter().map(|text| text.to_string()), ctc)),
    ]
}

/// Ids that make sense in places: runs of a character's bytes where there are bytes, any id elsewhere, one outside the vocabulary too.
fn random_ids(tokenizer: &Tokenizer, noise: &Random, n: usize) -> Vec<u32> {
    let mut draw = 0;
    let mut next = |n: usize| {
        draw += 1;
        (noise.bits(draw) % n as u64) as usize
    };
    let mut ids = Vec::new();
    while ids.len() < n {
        let c = ["é", "あ", "😀", "ÿ", "a"][next(5)];
        let of_byte = |byte: u8| tokenizer.id_of(&format!("<0x{byte:02X}>")).or_else(|| tokenizer.id_of(&byte_char(byte).to_string()));
        let spelt: Option<Vec<u32>> = c.bytes().map(of_byte).collect();
        match (next(3), spelt) {
            (0, Some(spelt)) => ids.extend(&spelt[..1 + next(spelt.len())]),
            _ => ids.push(next(tokenizer.vocab_size() + 1) as u32),
        }
    }
    ids
}

/// Characters are stripped from the ends of a text as far as they are there, also when it is shorter than what may be taken, which the
/// crate that reads such files answers with a panic.
#[test]
fn ends_are_stripped_as_far_as_they_are_there() {
    let tokenizer = ends_stripped();
    for (pieces, expected) in [
        (&[][..], ""),
        (&["▁"], ""),
        (&["▁▁"], ""),
        (&["▁▁", "▁▁"], " "),
        (&["a"], "a"),
        (&["a", "▁"], "a"),
        (&["▁a", "▁", "▁▁"], "a "),
        (&["▁▁", "あ"], " あ"),
    ] {
        let ids: Vec<u32> = pieces.iter().map(|piece| tokenizer.id_of(piece).unwrap()).collect();
        assert_eq!(tokenizer.decode(&ids), expected, "{pieces:?}");
    }
}

/// After every id the growing text is the decoding of all ids so far, and what it calls unchanged is: else stops are missed, or the
/// text is cut where another text had the stop.
#[test]
fn the_growing_text_is_the_decoding_of_all() {
    for (name, tokenizer) in tokenizers() {
        for seed in 0..60 {
            let ids = random_ids(&tokenizer, &Random::new(seed, name), 40);
            let (mut growing, mut before) = (GrowingText::new(&tokenizer), String::new());
            for n in 1..=ids.len() {
                let same = growing.push(ids[n - 1]);
                assert_eq!(growing.as_str(), tokenizer.decode(&ids[..n]), "{name}: {:?}", &ids[..n]);
                assert_eq!(growing.as_str().get(..same), before.get(..same), "{name}: {:?}", &ids[..n]);
                assert!(growing.as_str().is_char_boundary(same));
                before = growing.as_str().to_string();
            }
        }
    }
}

/// Those whose decoders look at more than a token at a time, or are not known to look at one.
const RARE: [&str; 4] = ["word piece", "no decoder", "ends stripped", "bytes only"];

/// Long texts of the usual tokenizers stay cheap: what is decoded again for a token does not grow with the text.
#[test]
fn the_growing_text_settles() {
    for (name, tokenizer) in tokenizers().iter().filter(|(name, _)| !RARE.contains(name)) {
        let id = ["▁a", "Ġa"].iter().find_map(|token| tokenizer.id_of(token)).unwrap();
        let mut growing = GrowingText::new(tokenizer);
        let other = tokenizer.id_of("a").unwrap();
        // Not the same token again, which CTC takes for one.
        (0..1000).for_each(|_| _ = (growing.push(other), growing.push(id)));
        assert!(growing.push(other) + 4 > growing.as_str().len() - 2 && growing.as_str().len() > 2000, "{name}");
    }
}

/// What a response is by definition: tokens up to the first with which the decoding of all contains a stop string, and the text before
/// the one of them that begins first.
fn by_definition(tokenizer: &Tokenizer, ids: &[u32], stop: &[String]) -> (usize, String, FinishReason) {
    for n in 1..=ids.len() {
        let text = tokenizer.decode(&ids[..n]);
        if let Some(cut) = stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            return (n, text[..cut].to_string(), FinishReason::Stop);
        }
    }
    (ids.len(), tokenizer.decode(ids), FinishReason::Length)
}

fn grown(tokenizer: &Tokenizer, request: &Request, ids: &[u32], eos_ids: &[u32]) -> Response {
    let mut growing = Growing::new(request, Rules { eos_ids, max_tokens: 1 << 20, tokenizer: Some(tokenizer) });
    for &token in ids {
        if let Some(reason) = growing.push(Choice { token, logprob: -0.5, top: Vec::new() }) {
            return growing.into_response(0, reason);
        }
    }
    panic!("more tokens than were asked for")
}

/// Stop strings across tokens, inside tokens, overlapping, of several bytes; taken out of the text itself so that they come up. Text,
/// tokens and reason are those of the definition.
#[test]
fn stops_are_found_where_the_definition_has_them() {
    let mut n_stopped = 0;
    for (name, tokenizer) in tokenizers() {
        for seed in 0..80 {
            let noise = Random::new(seed, &format!("stops {name}"));
            let ids = random_ids(&tokenizer, &noise, 30);
            let chars: Vec<char> = tokenizer.decode(&ids).chars().collect();
            let piece = |k: u64| {
                let at = (noise.bits(1000 + 2 * k) % chars.len().max(1) as u64) as usize;
                let length = 1 + (noise.bits(1001 + 2 * k) % 5) as usize;
                chars.iter().skip(at).take(length).filter(|&&c| c != '\u{FFFD}').collect::<String>()
            };
            let stop: Vec<String> = (0..1 + seed % 3).map(piece).filter(|stop| !stop.is_empty()).collect();
            let request = Request { stop: stop.clone(), ..Request::new("a", vec![1], ids.len()) };
            let response = grown(&tokenizer, &request, &ids, &[]);
            let (n, text, reason) = by_definition(&tokenizer, &ids, &stop);
            let found = (response.tokens.as_slice(), response.text.as_deref(), response.finish_reason);
            assert_eq!(found, (&ids[..n], Some(text.as_str()), reason), "{name}: {ids:?} {stop:?}");
            n_stopped += usize::from(reason == FinishReason::Stop);
        }
    }
    assert!(n_stopped > 200, "{n_stopped} of 720 stopped");
}

/// The cases by hand: a stop across three tokens, one that ends inside a token, of two the one that begins first, a character whose bytes
/// are not complete, and the end-of-sequence token, which counts in log-probabilities only.
#[test]
fn stops_by_hand() {
    let tokenizer = sentencepiece(true);
    let id = |piece: &str| tokenizer.id_of(piece).unwrap();
    let spelt = |c: &str| c.bytes().map(|byte| id(&format!("<0x{byte:02X}>"))).collect::<Vec<u32>>();
    let request = |stop: &[&str], max_new_tokens| Request {
        stop: stop.iter().map(|stop| stop.to_string()).collect(),
        logprobs: Some(0),
        ..Request::new("a", vec![1], max_new_tokens)
    };
    let text_of = |ids: &[u32], stop: &[&str]| {
        let response = grown(&tokenizer, &request(stop, ids.len()), ids, &[1]);
        (response.text.unwrap(), response.tokens.len(), response.finish_reason)
    };
    let across = [id("▁a"), id("b"), id("▁the"), id("b"), id("a")];
    assert_eq!(text_of(&across, &["b theb"]), ("a".into(), 4, FinishReason::Stop));
    assert_eq!(text_of(&across, &["b t"]), ("a".into(), 3, FinishReason::Stop), "it ends inside a token");
    assert_eq!(text_of(&across, &["he", "b the"]), ("a".into(), 3, FinishReason::Stop), "both are complete at once, one begins first");
    assert_eq!(text_of(&across, &["ab the!", "b"]), ("a".into(), 2, FinishReason::Stop), "what is complete first ends it");
    assert_eq!(text_of(&across, &["x"]).2, FinishReason::Length);
    assert_eq!(text_of(&across[..1], &["a"]), (String::new(), 1, FinishReason::Stop));
    let torn = [vec![id("▁a")], spelt("あ")].concat();
    assert_eq!(text_of(&torn, &["あ"]), ("a".into(), 4, FinishReason::Stop), "its bytes are one character only when all are there");
    assert_eq!(text_of(&torn[..3], &["あ"]), ("a\u{FFFD}\u{FFFD}".into(), 3, FinishReason::Length), "what is not complete is U+FFFD");
    let ended = grown(&tokenizer, &request(&["x"], 9), &[id("a"), id("b"), 1], &[1]);
    assert_eq!((ended.text.as_deref(), ended.tokens.len(), ended.finish_reason), (Some("ab"), 2, FinishReason::Stop));
    let logprobs = ended.logprobs.unwrap();
    assert_eq!((ended.logprob, logprobs.len(), logprobs[2].token), (-1.5, 3, 1));
}
