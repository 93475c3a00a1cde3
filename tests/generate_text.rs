//! Text through the binary: a model of Hugging Face with a tokenizer, prompts, stop strings, samples and log-probabilities in a file of
//! requests, and what stands in the file of responses.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use trireme::text::Tokenizer;

/// Byte-level tokens for the 40 ids of the golden Llama: special ones, letters, words, and a character in three parts.
fn tokenizer_json() -> Vec<u8> {
    let mut tokens: Vec<String> = ["<pad>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend(('a'..='z').map(String::from));
    tokens.extend(["\u{120}", "ab", "ba", "the", "\u{120}a", "\u{120}b", "\u{e3}", "\u{123}", "\u{124}", "\u{10a}", "."].map(String::from));
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let special = |id: u32| {
        json!({"id": id, "content": tokens[id as usize], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                       "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []});
    let value = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1), special(2)],
                       "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level, "model": model});
    serde_json::to_vec(&value).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let (golden, foreign) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama"), place.path("hf"));
        std::fs::create_dir(&foreign).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), foreign.join(name)).unwrap();
        }
        std::fs::write(foreign.join("tokenizer.json"), tokenizer_json()).unwrap();
        let mut import = Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"));
        let done = import.arg("import").arg(&foreign).arg("--out").arg(place.path("checkpoint")).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn generate(&self, out: &str, requests: &[Value], more: &[&str]) -> Vec<Value> {
        let file = self.path(&format!("{out}.jsonl"));
        std::fs::write(&file, requests.iter().map(|request| format!("{request}\n")).collect::<String>()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
        command.arg("--checkpoint").arg(self.path("checkpoint")).arg("--requests").arg(file).arg("--out").arg(self.path(out)).args(more);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let text = std::fs::read_to_string(self.path(out).join("responses.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn ids(response: &Value) -> Vec<u32> {
    response["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A response with stop strings has the tokens of the one without (same id and seed, so the same noise) up to the first with which
/// the text of all has a stop, and that text up to it; without stops the text is the decoding of the tokens.
#[test]
fn stop_strings_cut_what_would_have_been() {
    let (place, tokenizer) = (Place::new(), Tokenizer::from_bytes(tokenizer_json(), Path::new("tokenizer.json")).unwrap());
    let request = |i: usize| json!({"id": format!("r{i}"), "prompt": "the ab", "max_new_tokens": 14, "temperature": 1.5, "seed": i, "n": 3, "logprobs": i % 4});
    let stops = [json!(["a", " b"]), json!(["e", "th"]), json!(["あ", "z."]), json!(["ab", "b"]), json!(["\n", "q"])];
    let free: Vec<Value> = (0..20).map(request).collect();
    let stopped: Vec<Value> = free
        .iter()
        .enumerate()
        .map(|(i, request)| {
            let mut request = request.clone();
            request["stop"] = stops[i % stops.len()].clone();
            request
        })
        .collect();
    let (whole, cut) = (place.generate("whole", &free, &["--batch", "7"]), place.generate("cut", &stopped, &["--batch", "16"]));
    assert_eq!((whole.len(), cut.len()), (60, 60));
    let mut n_cut = 0;
    for (i, (whole, cut)) in whole.iter().zip(&cut).enumerate() {
        assert_eq!((&whole["id"], &whole["index"]), (&json!(format!("r{}", i / 3)), &json!(i % 3)));
        let (all, stop) = (ids(whole), stops[i / 3 % stops.len()].as_array().unwrap());
        assert_eq!(whole["text"], tokenizer.decode(&all));
        let first = (1..=all.len()).find_map(|n| {
            let text = tokenizer.decode(&all[..n]);
            let at = stop.iter().filter_map(|stop| text.find(stop.as_str().unwrap())).min()?;
            Some((n, text[..at].to_string()))
        });
        match first {
            Some((n, text)) => {
                assert_eq!((ids(cut), &cut["text"], &cut["finish_reason"]), (all[..n].to_vec(), &json!(text), &json!("stop")), "{i}");
                n_cut += 1;
            }
            None => assert_eq!((&cut["text"], &cut["finish_reason"]), (&whole["text"], &whole["finish_reason"]), "{i}"),
        }
    }
    assert!((10..60).contains(&n_cut), "{n_cut} of 60 were cut");
}

/// Log-probabilities: as many of the most likely tokens as were asked for, in descending order, the taken one with the same value where
/// it is among them, most likely first when greedy; they add up to the response's. Filters and penalty do not change them.
#[test]
fn log_probabilities_are_the_models_own() {
    let place = Place::new();
    let request = |id: &str, logprobs: usize, more: Value| {
        let mut request = json!({"id": id, "tokens": [5, 9, 30], "max_new_tokens": 6, "logprobs": logprobs});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    };
    let requests = [
        request("greedy", 3, json!({"temperature": 0})),
        request("all", 40, json!({"temperature": 0.5, "top_k": 4, "repetition_penalty": 1.7, "min_p": 0.01})),
        request("none", 0, json!({"n": 2})),
    ];
    let responses = place.generate("out", &requests, &[]);
    for (response, k) in responses.iter().zip([3, 40, 0, 0]) {
        let entries = response["logprobs"].as_array().unwrap();
        let ended = usize::from(response["finish_reason"] == "stop");
        assert_eq!(entries.len(), ids(response).len() + ended);
        let sum: f64 = entries.iter().map(|entry| entry["logprob"].as_f64().unwrap()).sum();
        assert!((sum - response["logprob"].as_f64().unwrap()).abs() < 1e-12);
        for (entry, id) in entries.iter().zip(ids(response)) {
            assert_eq!(entry["token"], id);
            let top: Vec<(u64, f64)> = entry["top_logprobs"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| (one["token"].as_u64().unwrap(), one["logprob"].as_f64().unwrap()))
                .collect();
            assert_eq!(top.len(), k);
            assert!(top.windows(2).all(|pair| pair[0].1 > pair[1].1 || (pair[0].1 == pair[1].1 && pair[0].0 < pair[1].0)));
            let own = entry["logprob"].as_f64().unwrap();
            assert!(top.iter().all(|(token, logprob)| *token != u64::from(id) || *logprob == own));
            assert!(response["id"] != "greedy" || top[0] == (u64::from(id), own));
            // All of them are a distribution: exponentials of 40 log-probabilities rounded to f64.
            assert!(k < 40 || (top.iter().map(|(_, logprob)| logprob.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }
}

/// Logits that are no numbers end the job with exit code 4 and one line that names the request, on whatever rank they were seen, instead
/// of a file of nonsense; what was made before stays in the journal.
#[test]
fn logits_that_are_no_numbers_are_an_error() {
    let place = Place::new();
    let weights = place.path("hf/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let (wrong, requests) = (place.path("wrong"), place.path("requests.jsonl"));
    let mut import = Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"));
    assert!(import.arg("import").arg(place.path("hf")).arg("--out").arg(&wrong).status().unwrap().success());
    std::fs::write(&requests, "{\"id\":\"a\",\"tokens\":[5],\"max_new_tokens\":3}\n").unwrap();
    let mut generate = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
    let done = generate.arg("--checkpoint").arg(&wrong).arg("--requests").arg(&requests).arg("--out").arg(place.path("out")).output();
    let done = done.unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{said}");
    assert!(said.lines().filter(|line| line.starts_with("error:")).count() == 1 && said.contains("request \"a\""), "{said}");
    assert!(!place.path("out").exists());
}
