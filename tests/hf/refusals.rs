//! Foreign files that are wrong: each is refused in one line with exit code 3, and nothing is written.

use crate::memory::peak_of;
use crate::parts::{NEMOTRON, Spec, all_of, checkpoint_program, hf_tensors, write_hf, write_safetensors};
use serde_json::{Value, json};
use std::os::unix::fs::symlink;
use std::path::Path;
use trireme::checkpoint::hf;
use trireme::error::Kind;

/// Weights that are not what config.json says, or no safetensors at all, are refused in one line with exit code 3, and
/// nothing is written.
#[test]
fn damaged_weights_are_refused() {
    type Damage = Box<dyn Fn(&Path)>;
    let edit = |change: fn(&mut Vec<u8>)| -> Damage {
        Box::new(move |dir: &Path| {
            let path = dir.join("model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            change(&mut bytes);
            std::fs::write(path, bytes).unwrap();
        })
    };
    let header = |change: fn(String) -> String| -> Damage {
        Box::new(move |dir: &Path| {
            let path = dir.join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let old = String::from_utf8(bytes[8..end].to_vec()).unwrap();
            let text = change(old.clone());
            assert_ne!(text, old, "nothing was damaged");
            std::fs::write(path, [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[end..]].concat()).unwrap();
        })
    };
    let rewrite = |change: fn(&mut Vec<Spec>)| -> Damage {
        Box::new(move |dir: &Path| {
            let mut tensors: Vec<Spec> = hf_tensors(&NEMOTRON()).into_iter().map(|(name, shape)| (name, shape, "BF16")).collect();
            change(&mut tensors);
            write_safetensors(&dir.join("model.safetensors"), &tensors);
        })
    };
    let cases: Vec<(&str, Damage)> = vec![
        ("its header describes", edit(|bytes| bytes.truncate(bytes.len() - 1))),
        ("its header describes", edit(|bytes| bytes.push(0))),
        ("says that its header has", edit(|bytes| bytes.truncate(100))),
        ("are no safetensors file", edit(|bytes| bytes.truncate(5))),
        ("says that its header has", edit(|bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()))),
        ("says that its header has", edit(|bytes| bytes[..8].copy_from_slice(&90_000_000u64.to_le_bytes()))),
        (
            "that stand for the weights (git-lfs); run git lfs pull",
            Box::new(|dir| std::fs::write(dir.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\nsize 9\n").unwrap()),
        ),
        ("bad header", edit(|bytes| bytes[8] = b'[')),
        ("bad header", edit(|bytes| bytes[9] = 0xff)),
        ("no tensor model.layers.1.self_attn.v_proj.weight", rewrite(|t| t.retain(|(name, ..)| !name.contains("1.self_attn.v_")))),
        (
            "is [24, 9], config.json asks for [24, 10]",
            rewrite(|t| {
                t.iter_mut().for_each(|t| {
                    if t.0.contains("1.self_attn.q_") {
                        t.1[1] = 9
                    }
                })
            }),
        ),
        ("is I32, expected F32, BF16 or F16", rewrite(|t| t[3].2 = "I32")),
        ("q_proj.bias", rewrite(|t| t.push(("model.layers.0.self_attn.q_proj.bias".into(), vec![24], "BF16")))),
        ("is F8_E4M3, expected F32, BF16 or F16", rewrite(|t| t[3].2 = "F8_E4M3")),
        ("bad header: model.norm.weight stands in it twice", header(|text| text.replacen("model.norm.bias", "model.norm.weight", 1))),
        // The first tensor lies where the second does; between two there is a gap; one ends beyond the file.
        (
            "bad header: invalid offset for tensor",
            header(|text| text.replacen("\"data_offsets\":[740,760]", "\"data_offsets\":[720,740]", 1)),
        ),
        (
            "bad header: invalid offset for tensor",
            header(|text| text.replacen("\"data_offsets\":[740,760]", "\"data_offsets\":[742,762]", 1)),
        ),
        ("bad header", header(|text| text.replacen("[740,760]", "[740,9999999999]", 1))),
        ("bad header", header(|text| text.replacen("[37,10]", "[4294967296,4294967296]", 1))),
        ("bad header", header(|text| text.replacen("[37,10]", "[-37,-10]", 1))),
        ("says that its header has", edit(|bytes| bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes()))),
        ("neither model.safetensors nor", Box::new(|dir| swap(dir, "model.safetensors", |path| std::fs::create_dir(path).unwrap()))),
        ("neither model.safetensors nor", Box::new(|dir| swap(dir, "model.safetensors", |path| symlink("nowhere", path).unwrap()))),
        ("neither model.safetensors nor", Box::new(|dir| swap(dir, "model.safetensors", |path| symlink("/dev/zero", path).unwrap()))),
        ("not JSON", Box::new(|dir| std::fs::write(dir.join("generation_config.json"), "{\"eos_token_id\": ").unwrap())),
        ("not JSON", Box::new(|dir| std::fs::write(dir.join("tokenizer_config.json"), "[".repeat(100_000)).unwrap())),
        (
            "268435457 bytes, expected at most 268435456",
            Box::new(|dir| std::fs::File::create(dir.join("tokenizer.json")).unwrap().set_len((256 << 20) + 1).unwrap()),
        ),
        ("neither model.safetensors nor", Box::new(|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap())),
        ("config.json", Box::new(|dir| std::fs::remove_file(dir.join("config.json")).unwrap())),
        ("not JSON", Box::new(|dir| std::fs::write(dir.join("config.json"), "{").unwrap())),
    ];
    for (said, damage) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("hf"), dir.path().join("c"));
        write_hf(&source, &NEMOTRON(), all_of("BF16"), 1);
        damage(&source);
        let error = hf::import(&source, &out).unwrap_err();
        assert!(error.to_string().contains(said) && error.kind() == Kind::File, "{said}: {error}");
        assert!(!error.to_string().contains('\n'));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{said}: something was written");
    }
}

/// Puts something else where a file was.
fn swap(dir: &Path, name: &str, put: impl Fn(&Path)) {
    std::fs::remove_file(dir.join(name)).unwrap();
    put(&dir.join(name));
}

/// Files as the caches of Hugging Face hold them, links to blobs elsewhere, are followed; so is an index over them.
#[test]
fn links_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    for (name, n_files) in [("one", 1), ("three", 3)] {
        let (blobs, snapshot) = (dir.path().join(format!("{name}-blobs")), dir.path().join(name));
        write_hf(&blobs, &NEMOTRON(), all_of("BF16"), n_files);
        std::fs::create_dir(&snapshot).unwrap();
        for entry in std::fs::read_dir(&blobs).unwrap() {
            let entry = entry.unwrap();
            symlink(Path::new("..").join(format!("{name}-blobs")).join(entry.file_name()), snapshot.join(entry.file_name())).unwrap();
        }
        hf::import(&snapshot, &dir.path().join(format!("{name}-c"))).unwrap();
    }
    std::fs::create_dir_all(dir.path().join("models--a--b/snapshots/0123")).unwrap();
    let error = hf::import(&dir.path().join("models--a--b"), &dir.path().join("c")).unwrap_err();
    assert!(error.to_string().contains("models--a--b: has no config.json but a folder snapshots") && error.exit_code() == 3, "{error}");
}

/// Values that are NaN or infinite are what somebody trained: they are imported as they are, and said, with the number and the place.
#[test]
fn wild_values_are_told() {
    let dir = tempfile::tempdir().unwrap();
    for (dtype, nan, infinite) in [("BF16", &[0xc0u8, 0x7f][..], &[0x80, 0xff][..]), ("F32", &[1, 0, 0x80, 0x7f], &[0, 0, 0x80, 0xff])] {
        let source = dir.path().join(dtype);
        write_hf(&source, &NEMOTRON(), all_of(dtype), 1);
        let path = source.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let start = bytes.len();
        // The last tensor of the file is lm_head.weight.
        bytes[start - nan.len()..].copy_from_slice(nan);
        bytes[start - 2 * nan.len()..start - nan.len()].copy_from_slice(infinite);
        std::fs::write(&path, bytes).unwrap();
        let output = checkpoint_program(dir.path(), &format!("import {dtype} --out {dtype}-c --verify"));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(said.contains(&format!("{dtype}: 1 values are NaN and 1 infinite, in 1 tensors, the first head.weight")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

/// Keys of config.json that nobody here has heard of are told; a model that has none is imported without a word.
#[test]
fn unheard_of_keys_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = NEMOTRON();
    write_hf(&dir.path().join("plain"), &config, all_of("BF16"), 1);
    (config["hyper_connections"], config["switched_off"], config["unset"]) = (json!(4), json!(false), Value::Null);
    write_hf(&dir.path().join("odd"), &config, all_of("BF16"), 1);
    let said = |name: &str| {
        let output = checkpoint_program(dir.path(), &format!("import {name} --out {name}-c"));
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(said("plain"), "");
    assert!(said("odd").trim_end().ends_with("odd/config.json: not known here and not used: hyper_connections"));
}

/// Ends of responses that are no tokens of the model are told, each by its value and its file: nothing else would show why responses
/// only end by their length. Ends that are tokens are no reason for a word.
#[test]
fn ends_that_are_no_tokens_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let said = |name: &str, of_model: Value, of_generation: Value| {
        let mut config = NEMOTRON();
        config["eos_token_id"] = of_model;
        write_hf(&dir.path().join(name), &config, all_of("BF16"), 1);
        std::fs::write(dir.path().join(name).join("generation_config.json"), json!({"eos_token_id": of_generation}).to_string()).unwrap();
        let output = checkpoint_program(dir.path(), &format!("import {name} --out {name}-c"));
        assert_eq!(output.status.code(), Some(0));
        let lines = String::from_utf8(output.stderr).unwrap();
        lines.lines().map(|line| line.rsplit('/').next().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(said("plain", json!([36, 0]), Value::Null), [""; 0]);
    assert_eq!(said("overruled", json!("2"), json!(36)), [""; 0]);
    let end = |file: &str, id: &str| format!("{file}: eos_token_id {id} is no token id below 37: no response will end by it");
    assert_eq!(said("text", json!("2"), Value::Null), [end("config.json", "\"2\"")]);
    assert_eq!(said("several", json!(2), json!([37, 2, -1])), ["37", "-1"].map(|id| end("generation_config.json", id)));
}

/// A second output layer in a file with tied embeddings is ignored only when it is the embedding; else somebody's model is another one.
#[test]
fn a_tied_head_must_be_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = NEMOTRON();
    config["tie_word_embeddings"] = json!(true);
    for (name, change, fits) in [("same", 0u8, true), ("other", 1, false)] {
        let source = dir.path().join(name);
        write_hf(&source, &config, all_of("BF16"), 1);
        let mut tensors: Vec<Spec> = hf_tensors(&config).into_iter().map(|(name, shape)| (name, shape, "BF16")).collect();
        tensors.push(("lm_head.weight".into(), vec![37, 10], "BF16"));
        write_safetensors(&source.join("model.safetensors"), &tensors);
        let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let (n, head) = (2 * 37 * 10, bytes.len() - 2 * 37 * 10);
        bytes.copy_within(header..header + n, head); // the embedding comes first, the head last
        let last = bytes.len() - 1;
        bytes[last] ^= change;
        std::fs::write(source.join("model.safetensors"), bytes).unwrap();
        let imported = hf::import(&source, &dir.path().join(format!("{name}-c")));
        match imported {
            Ok(_) => assert!(fits, "another head was dropped"),
            Err(error) => {
                assert!(!fits && error.exit_code() == 3, "{error}");
                assert!(error.to_string().contains("lm_head.weight is not model.embed_tokens.weight (row 36)"), "{error}");
            }
        }
    }
}

/// A table of files that lies, or leads out of its directory, is refused.
#[test]
fn lying_tables_are_refused() {
    let change = |said: &str, change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("hf");
        write_hf(&source, &NEMOTRON(), all_of("F32"), 3);
        std::fs::create_dir(source.join("a-folder")).unwrap();
        // Opening a pipe that nobody writes to would wait for ever.
        assert!(std::process::Command::new("mkfifo").arg(source.join("a-pipe")).status().unwrap().success());
        let path = source.join("model.safetensors.index.json");
        let mut table: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut table);
        std::fs::write(&path, table.to_string()).unwrap();
        let error = hf::import(&source, &dir.path().join("c")).unwrap_err();
        assert!(error.to_string().contains(said) && error.exit_code() == 3, "{error}");
    };
    change("outside of its directory", &|table| table["weight_map"]["lm_head.weight"] = json!("../model.safetensors"));
    change("outside of its directory", &|table| table["weight_map"]["lm_head.weight"] = json!("/etc/passwd"));
    change("model.norm.weight is not in", &|table| table["weight_map"]["model.norm.weight"] = json!("model-00002-of-00003.safetensors"));
    change("outside of its directory", &|table| table["weight_map"]["lm_head.weight"] = json!("../../x"));
    change("outside of its directory", &|table| table["weight_map"]["lm_head.weight"] = json!(".."));
    change("outside of its directory", &|table| table["weight_map"]["lm_head.weight"] = json!(""));
    change("is no regular file", &|table| table["weight_map"]["lm_head.weight"] = json!("a-pipe"));
    change("is no regular file", &|table| table["weight_map"]["lm_head.weight"] = json!("a-folder"));
    change("nothing.safetensors", &|table| table["weight_map"]["lm_head.weight"] = json!("nothing.safetensors"));
    change("not a table", &|table| *table = json!([]));
    let dir = tempfile::tempdir().unwrap();
    write_hf(&dir.path().join("hf"), &NEMOTRON(), all_of("F32"), 3);
    let path = dir.path().join("hf/model.safetensors.index.json");
    let table = std::fs::read_to_string(&path).unwrap().replacen("model.norm.bias", "model.norm.weight", 1);
    std::fs::write(&path, table).unwrap();
    let error = hf::import(&dir.path().join("hf"), &dir.path().join("c")).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight stands in it twice") && error.exit_code() == 3, "{error}");
}

/// Headers made to exhaust memory are refused in the memory of a small program: one of 2^60 bytes, one of 100 MB that is there, and one of
/// the largest size that is read, whose one shape has 3.9 million dimensions.
#[test]
fn header_bombs_take_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bomb = |length: u64, start: &str, fill: &str, end: &str| {
        let mut text = start.as_bytes().to_vec();
        let n = (length.min(8_000_000) as usize - start.len() - end.len()) / fill.len().max(1);
        text.extend(fill.as_bytes().repeat(n));
        text.extend(end.as_bytes());
        text.resize(length.min(8_000_000) as usize, b' ');
        [&length.to_le_bytes()[..], &text].concat()
    };
    let wide = bomb(8_000_000, r#"{"a":{"dtype":"F32","data_offsets":[0,0],"shape":["#, "0,", "0]}}");
    let many = bomb(
        8_000_000,
        r#"{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#,
        r#","x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#,
        "}",
    );
    let cases = [
        ("says that its header has 1152921504606846976 bytes", bomb(1 << 60, "{", "", "}"), None),
        ("says that its header has 100000000 bytes", bomb(100_000_000, "{", "", "}"), Some(8 + 100_000_000)),
        ("has a tensor a, which the model", wide, None),
        ("x stands in it twice", many, None),
    ];
    for (idx, (said, bytes, length)) in cases.into_iter().enumerate() {
        let source = dir.path().join(idx.to_string());
        write_hf(&source, &NEMOTRON(), all_of("BF16"), 1);
        let path = source.join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        if let Some(length) = length {
            std::fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        }
        let (peak, code, err) = peak_of(dir.path(), &format!("import {idx} --out c"));
        assert_eq!(code, Some(3), "{err}");
        assert!(err.contains(said) || err.contains("no tensor model.embed_tokens.weight"), "{err}");
        assert!(err.lines().count() == 1 && err.len() < 1000, "{} bytes: {}", err.len(), &err[..err.len().min(1000)]);
        assert!(peak < 300 << 20, "{said}: {} MiB", peak >> 20);
    }
}

/// The program as a user meets it: done is 0, a wrong file is 3 with one line that names it, a wrong command line is 2; a
/// damaged checkpoint is told file by file.
#[test]
fn exit_codes_and_lines() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(&dir.path().join("hf"), &NEMOTRON(), all_of("F32"), 1);
    let run = |line: &str, code: i32| {
        let output = checkpoint_program(dir.path(), line);
        let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(code), "{line}: {out}{err}");
        assert!(code != 3 || err.lines().count() == 1, "{line}: {err}");
        (out, err)
    };
    run("import hf --out c", 0);
    run("import hf --out c", 0); // a no-op
    let (shown, _) = run("show c", 0);
    let qkv = shown.lines().find(|line| line.starts_with("weights/layers.1.attention.qkv.weight")).unwrap();
    assert_eq!(qkv.split_whitespace().skip(1).collect::<Vec<_>>(), ["f32", "40", "x", "10", "1"]);
    assert!(run("verify c", 0).0.contains("every byte as it was written"));
    run("export c --out e --dtype bf16", 0);
    assert!(run("import e --out c", 3).1.contains("c: holds a checkpoint made "));
    assert!(run("import nowhere --out d", 3).1.contains("nowhere: no such directory"));
    run("export c --out x --dtype f8", 2);
    for size in ["0", "5TB", "1.5GB", "-1", "99999999999GB"] {
        run(&format!("export c --out x --shard-size={size}"), 2);
    }
    run("mend c", 2);
    let shard = dir.path().join("c/shard-00000.h5");
    let mut bytes = std::fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&shard, bytes).unwrap();
    let (out, err) = run("verify c", 3);
    assert!(out.lines().any(|line| line.starts_with("DAMAGED") && line.ends_with("shard-00000.h5")), "{out}");
    assert!(err.contains("shard-00000.h5"), "{err}");
    assert!(run("export c --out f", 3).1.contains("shard-00000.h5"));
    // A checkpoint without its manifest is unfinished, with a config.json that came along too; a directory of Hugging Face is none.
    std::fs::remove_file(dir.path().join("c/manifest.json")).unwrap();
    assert!(run("export c --out f", 3).1.contains("c: not a finished checkpoint: it has no manifest.json"));
    assert!(run("export hf --out f", 3).1.contains("hf: a model in Hugging Face's form, not a checkpoint"));
    assert!(!dir.path().join("f").exists());
}
