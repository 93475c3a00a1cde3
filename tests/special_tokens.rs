//! Special tokens through the binaries: prompts, texts and conversations become the tokens that transformers makes of them, whichever files
//! of a tokenizer a model came with. The expected tokens are by hand, after transformers 5's LlamaTokenizer on the same files.

use prost::Message;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use trireme::text::model_file::{ModelProto, NormalizerSpec, PieceKind, PieceProto, TrainerSpec};

/// unknown, control pieces 1 and 2, a space, the letters from 4, a line break, a piece that the user defined.
fn model_file() -> Vec<u8> {
    let piece = |text: String, kind: PieceKind| PieceProto { piece: Some(text), score: Some(0.0), r#type: Some(kind as i32) };
    let mut pieces = vec![piece("<unk>".into(), PieceKind::Unknown)];
    pieces.extend(["<s>", "</s>"].map(|text| piece(text.into(), PieceKind::Control)));
    let normal = std::iter::once('\u{2581}').chain('a'..='z').chain(['\n']);
    pieces.extend(normal.map(|c| piece(c.into(), PieceKind::Normal)));
    pieces.push(piece("<u>".into(), PieceKind::UserDefined));
    let trainer = TrainerSpec { model_type: Some(2), ..TrainerSpec::default() };
    let normalizer = NormalizerSpec { add_dummy_prefix: Some(true), remove_extra_whitespaces: Some(false), ..NormalizerSpec::default() };
    let (trainer, normalizer) = (trainer.encode_to_vec(), normalizer.encode_to_vec());
    ModelProto { pieces, trainer_spec: Some(trainer), normalizer_spec: Some(normalizer), ..ModelProto::default() }.encode_to_vec()
}

const SPACE: u32 = 3;
const BREAK: u32 = 30;
const USER: u32 = 31;
const START: u32 = 32;
const END: u32 = 33;

fn letters(text: &str) -> Vec<u32> {
    text.bytes().map(|letter| u32::from(letter - b'a') + 4).collect()
}

/// A tokenizer.json of the same pieces in another order, which asks for `<s>` before every text.
fn json_file() -> Value {
    let mut vocab = json!({"<s>": 1, "</s>": 2, "\u{2581}": 38});
    ('a'..='z').for_each(|c| vocab[c.to_string()] = (u32::from(c) - u32::from('a') + 5).into());
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let first = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let processor = json!({"type": "TemplateProcessing", "single": [first, sequence("A")], "pair": [first, sequence("A"), sequence("B")],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(1, "<s>"), special(2, "</s>")],
           "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}, "pre_tokenizer": null,
           "post_processor": processor, "decoder": null,
           "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                     "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}})
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A checkpoint of the golden Llama with these files beside its weights.
    fn new(files: &[(&str, Vec<u8>)]) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let (golden, foreign) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama"), place.path("hf"));
        std::fs::create_dir(&foreign).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), foreign.join(name)).unwrap();
        }
        for (name, bytes) in files {
            std::fs::create_dir_all(foreign.join(name).parent().unwrap()).unwrap();
            std::fs::write(foreign.join(name), bytes).unwrap();
        }
        let mut import = Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"));
        run(import.arg("import").arg(&foreign).arg("--out").arg(place.path("checkpoint")));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The tokens of a text as scored.
    fn tokens_of(&self, out: &str, text: &str, more: &[&str]) -> Vec<u32> {
        let input = self.path(&format!("{out}.jsonl"));
        std::fs::write(&input, json!({"id": "a", "text": text}).to_string()).unwrap();
        let mut score = Command::new(env!("CARGO_BIN_EXE_trireme-score"));
        score.arg("logprobs").arg("--checkpoint").arg(self.path("checkpoint")).arg("--input").arg(input);
        run(score.arg("--out").arg(self.path(out)).args(["--format", "jsonl"]).args(more));
        let line: Value = serde_json::from_slice(&std::fs::read(self.path(out).join("logprobs.jsonl")).unwrap()).unwrap();
        serde_json::from_value(line["tokens"].clone()).unwrap()
    }

    /// Whether a prompt is these tokens: greedy responses to both have the same log-probabilities to the last digit.
    fn assert_same(&self, out: &str, prompt: Value, tokens: &[u32], more: &[&str]) {
        let of = |id: &str, mut request: Value| {
            (request["id"], request["max_new_tokens"]) = (id.into(), 4.into());
            (request["temperature"], request["logprobs"]) = (0.into(), 3.into());
            format!("{request}\n")
        };
        let requests = self.path(&format!("{out}.jsonl"));
        std::fs::write(&requests, of("asked", prompt.clone()) + &of("expected", json!({"tokens": tokens}))).unwrap();
        let mut generate = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
        generate.arg("--checkpoint").arg(self.path("checkpoint")).arg("--requests").arg(requests);
        run(generate.arg("--out").arg(self.path(out)).args(more));
        let text = std::fs::read_to_string(self.path(out).join("responses.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["tokens"], &lines[0]["logprobs"]), (&lines[1]["tokens"], &lines[1]["logprobs"]), "{prompt}");
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn config(more: Value) -> Vec<u8> {
    let template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}";
    let special = |text: &str| json!({"content": text, "special": true});
    let mut config = json!({"chat_template": template, "bos_token": "<s>", "added_tokens_decoder": {
        "1": special("<s>"), "32": special("<|im_start|>"), "33": special("<|im_end|>")}});
    more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    serde_json::to_vec(&config).unwrap()
}

/// Text as its pieces: letters, a space, a line break, and names.
fn ids(text: &str) -> Vec<u32> {
    let names = [("<unk>", 0), ("<s>", 1), ("<u>", USER), ("<|im_start|>", START), ("<|im_end|>", END), (" ", SPACE), ("\n", BREAK)];
    let (mut ids, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let named = names.iter().find_map(|(name, id)| Some((rest.strip_prefix(name)?, vec![*id])));
        let (behind, here) = named.unwrap_or_else(|| (&rest[1..], letters(&rest[..1])));
        ids.extend(here);
        rest = behind;
    }
    ids
}

/// A `.model` alone: the marks of turns are tokens that other files add, and the beginning of a text is a control piece; a template and a
/// prompt name both. Where the encoder puts a space is transformers' LlamaTokenizer's way, an older one ("legacy"), or the model's own.
#[test]
fn a_sentencepiece_model_with_added_tokens() {
    // A text, and what is encoded of it: LlamaTokenizer's, the legacy one's, the model's own.
    let cases = [
        ("hi", [" hi", " hi", " hi"]),
        (" hi", [" hi", " hi", "  hi"]),
        ("hi<|im_end|>a", [" hi<|im_end|>a", " hi<|im_end|> a", " hi<|im_end|> a"]),
        ("<s> a", ["<s> a", "<s> a", "<s>  a"]),
        ("<|im_start|>\na", ["<|im_start|>\na", "<|im_start|> \na", "<|im_start|> \na"]),
        ("a<u>b<unk>c", [" a<u>b<unk>c", " a<u> b<unk> c", " a<u>b<unk> c"]),
    ];
    let hello = json!({"messages": [{"role": "user", "content": "hi a"}]});
    let turns = ["<s><|im_start|>user\nhi a<|im_end|>", "<s><|im_start|> user\nhi a<|im_end|>"];
    let (llama, own) = (json!({"tokenizer_class": "LlamaTokenizer"}), json!({"tokenizer_class": "PreTrainedTokenizerFast"}));
    let legacy = json!({"tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": true});
    for (way, more) in [llama, legacy, own].into_iter().enumerate() {
        let place = Place::new(&[("tokenizer.model", model_file()), ("tokenizer_config.json", config(more))]);
        place.assert_same("turn", hello.clone(), &ids(turns[way.min(1)]), &[]);
        for (i, (text, expected)) in cases.iter().enumerate() {
            assert_eq!(place.tokens_of(&format!("text-{i}"), text, &["--bos", "empty"]), ids(expected[way]), "{text:?} {way}");
        }
        let prompt = [" hi<s> a", "<s> hi<s> a", " hi<s>  a"][way];
        place.assert_same("prompt", json!({"prompt": "hi<s> a"}), &ids(prompt), &[]);
        place.assert_same("nothing", json!({"prompt": ""}), &[1], &["--bos", "empty"]);
        assert_eq!(place.tokens_of("always", "hi", &["--bos", "always"]), ids("<s> hi"));
    }
}

/// Tokens of the table may take the white space around them; files of earlier versions say the same in two others; no space before
/// anything where none is asked for.
#[test]
fn how_added_tokens_are_written() {
    let end = json!({"content": "<|im_end|>", "special": true, "lstrip": true, "rstrip": true});
    let table = json!({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false, "added_tokens_decoder": {"33": end}});
    let place = Place::new(&[("tokenizer.model", model_file()), ("tokenizer_config.json", config(table))]);
    assert_eq!(place.tokens_of("table", "a \n<|im_end|> \n b", &[]), ids("a<|im_end|>b"));
    let old = json!({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false, "added_tokens_decoder": null});
    let added = json!({"<|im_start|>": 32, "<|im_end|>": 33});
    let map = json!({"additional_special_tokens": ["<|im_start|>", end], "pad_token": "b"});
    let file = |name, value: &Value| (name, serde_json::to_vec(value).unwrap());
    let files = [("tokenizer_config.json", config(old)), file("added_tokens.json", &added), file("special_tokens_map.json", &map)];
    let place = Place::new(&[&[("tokenizer.model", model_file())], &files[..]].concat());
    assert_eq!(place.tokens_of("old", "<|im_start|> a <|im_end|> b c", &[]), ids("<|im_start|> a<|im_end|>b c"));
}

/// Beside a `.model` a tokenizer.json counts, as in transformers; texts begin as it asks for, unless told otherwise.
#[test]
fn a_tokenizer_json_beside_a_sentencepiece_model() {
    let files = [("tokenizer.model", model_file()), ("tokenizer.json", serde_json::to_vec(&json_file()).unwrap())];
    let place = Place::new(&files);
    let of_json: Vec<u32> = letters("hi").iter().map(|id| id + 1).collect();
    assert_eq!(place.tokens_of("auto", "hi", &[]), [&[1], &of_json[..]].concat());
    assert_eq!(place.tokens_of("empty", "hi", &["--bos", "empty"]), of_json);
    assert_eq!(place.tokens_of("named", "<s>hi", &[]), [&[1], &of_json[..]].concat(), "a text that begins so begins so once");
    place.assert_same("prompt", json!({"prompt": "hi"}), &[&[1], &of_json[..]].concat(), &[]);
}

/// A template that cannot be read is in nobody's way who has no messages.
#[test]
fn a_broken_template() {
    let broken = config(json!({"chat_template": "{% for %}"}));
    let place = Place::new(&[("tokenizer.model", model_file()), ("tokenizer_config.json", broken)]);
    place.assert_same("prompt", json!({"prompt": "hi"}), &[&[SPACE], &letters("hi")[..]].concat(), &[]);
    let requests = place.path("messages.jsonl");
    std::fs::write(&requests, r#"{"id": "a", "messages": [{"role": "user", "content": "hi"}], "max_new_tokens": 1}"#).unwrap();
    let mut generate = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
    generate.arg("--checkpoint").arg(place.path("checkpoint")).arg("--requests").arg(requests).arg("--out").arg(place.path("messages"));
    let done = generate.output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(3) && said.contains("line 1") && said.contains("a chat template that cannot be read"), "{said}");
}

/// Messages that go on, parts of a content, and tools, documents and a day, for which the model has other templates, in
/// tokenizer_config.json or in files.
#[test]
fn conversations_to_continue_and_with_tools() {
    let turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{{ closing }}";
    let with_tools = "{% for t in tools %}{{ t.name }}{% endfor %}<|im_start|>{% for p in messages[0].content %}{{ p.text }}{% endfor %}";
    let with_documents = "{{ strftime_now('%b') | lower }}{% for d in documents %} {{ d.text }}{% endfor %}{{ messages[0].content }}";
    let named = [("tool_use", with_tools), ("rag", with_documents), ("default", turns)];
    let list = named.map(|(name, template)| json!({"name": name, "template": template}));
    let of_list = [("tokenizer_config.json", config(json!({"chat_template": list})))];
    let of_files = [
        ("chat_template.jinja", turns.into()),
        ("additional_chat_templates/tool_use.jinja", with_tools.into()),
        ("additional_chat_templates/rag.jinja", with_documents.into()),
        ("tokenizer_config.json", config(json!({}))),
    ];
    let more = json!({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false});
    for files in [&of_list[..], &of_files[..]] {
        let mut files = files.to_vec();
        let config = &mut files.last_mut().unwrap().1;
        let mut whole: Value = serde_json::from_slice(config).unwrap();
        more.as_object().unwrap().iter().for_each(|(key, value)| whole[key] = value.clone());
        *config = serde_json::to_vec(&whole).unwrap();
        let place = Place::new(&[&[("tokenizer.model", model_file())], &files[..]].concat());
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b "}]);
        let continued = json!({"messages": messages, "continue_final_message": true});
        let said = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\na b ";
        place.assert_same("continued", continued, &ids(said), &[]);
        let parts = json!([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]);
        let asked = json!({"messages": [{"role": "user", "content": parts}], "tools": [{"name": "a"}, {"name": "b"}]});
        place.assert_same("tools", asked, &ids("ab<|im_start|>hi"), &[]);
        let user = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
        let asked = json!({"messages": user, "chat_template_kwargs": {"closing": "<|im_end|>"}, "stop": "qqq"});
        place.assert_same("variables", asked, &ids("<|im_start|>user\nhi<|im_end|><|im_end|>"), &[]);
        let documents = json!({"messages": user, "documents": [{"text": "a"}, {"text": "b"}], "chat_template": "rag"});
        place.assert_same("documents", documents.clone(), &ids("nov a bhi"), &["--today", "2026-11-26"]);
        let elsewhere = json!({"messages": user, "chat_template": "rags"});
        for (out, mut request, expected) in
            [("no-day", documents, ["today's date", "--today"]), ("elsewhere", elsewhere, ["\"rags\"", "default, rag, tool_use"])]
        {
            (request["id"], request["max_new_tokens"]) = ("a".into(), 1.into());
            let requests = place.path(&format!("{out}.jsonl"));
            std::fs::write(&requests, request.to_string()).unwrap();
            let mut generate = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
            generate.arg("--checkpoint").arg(place.path("checkpoint")).arg("--requests").arg(requests).arg("--out").arg(place.path(out));
            let done = generate.output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.code() == Some(3) && said.contains("line 1") && expected.iter().all(|part| said.contains(part)), "{said}");
        }
    }
}
