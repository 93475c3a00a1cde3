//! In and out again: where rows land, that nothing changes, what each type of an export holds, what comes along.

use crate::comparison::compare;
use crate::oracles;
use crate::parts::{LLAMA, NEMOTRON, all_of, checkpoint_program, hf_tensors, mixed, read_whole, row, value, write_hf};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use trireme::checkpoint::hf::{self, ExportType, config};
use trireme::checkpoint::{self, Meta, Piece};
use trireme::comm::solo::Solo;
use trireme::model::config::ModelConfig;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::Tensor;
use trireme::text::chat::{Beside, Conversation};

/// Rows land where Megatron's interleave puts them (for each kv head its query heads, then k, then v), gate and up rows
/// alternate, and the vocabulary is padded with zeros to a multiple of 128. Breaks when heads are shuffled, which training
/// losses would hardly show.
#[test]
fn rows_land_where_the_packed_layout_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("hf"), dir.path().join("c"));
    write_hf(&source, &NEMOTRON(), all_of("BF16"), 1);
    hf::import(&source, &out).unwrap();
    let (heads_a_group, dim, hidden) = (3, 4, 10);
    let qkv = read_whole(&out, "layers.1.attention.qkv.weight", &[(6 + 2 * 2) * dim, hidden]);
    for (i, found) in qkv.chunks(hidden).enumerate() {
        let (group, within) = (i / dim / (heads_a_group + 2), i / dim % (heads_a_group + 2));
        let (letter, head) = match within {
            k if k == heads_a_group => ("k", group),
            v if v == heads_a_group + 1 => ("v", group),
            q => ("q", group * heads_a_group + q),
        };
        let name = format!("model.layers.1.self_attn.{letter}_proj.weight");
        assert_eq!(found, row(&name, head * dim + i % dim, hidden), "row {i}");
    }
    let embedding = read_whole(&out, "embedding.weight", &[128, hidden]);
    for (i, found) in embedding.chunks(hidden).enumerate() {
        let expected = if i < 37 { row("model.embed_tokens.weight", i, hidden) } else { vec![0.0; hidden] };
        assert_eq!(found, expected, "row {i}");
    }
    assert_eq!(read_whole(&out, "final_norm.bias", &[hidden]), row("model.norm.bias", 0, hidden));
    let (source, out) = (dir.path().join("llama"), dir.path().join("l"));
    write_hf(&source, &LLAMA(), all_of("F32"), 1);
    hf::import(&source, &out).unwrap();
    let up = read_whole(&out, "layers.0.mlp.up.weight", &[22, 8]);
    for (i, found) in up.chunks(8).enumerate() {
        let name = format!("model.layers.0.mlp.{}_proj.weight", if i % 2 == 0 { "gate" } else { "up" });
        assert_eq!(found, row(&name, i / 2, 8), "row {i}");
    }
}

/// Import, export and import again give the same bits, for every type, one file or several, tied or not; and the export
/// holds exactly the tensors that came in, as the reference implementation of safetensors reads them.
#[test]
fn round_trips_are_exact() {
    let python = oracles::python("safetensors, numpy");
    type Types = Box<dyn Fn(&str) -> &'static str>;
    let cases: Vec<(Value, Types, usize)> = vec![
        (NEMOTRON(), Box::new(all_of("BF16")), 1),
        (NEMOTRON(), Box::new(all_of("F32")), 3),
        (NEMOTRON(), Box::new(mixed), 3),
        (NEMOTRON(), Box::new(all_of("F16")), 1),
        (LLAMA(), Box::new(all_of("BF16")), 2),
        (LLAMA(), Box::new(all_of("F32")), 1),
    ];
    for (n, (config, dtype_of, n_files)) in cases.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_hf(&at("hf"), config, dtype_of, *n_files);
        std::fs::write(at("hf").join("tokenizer.model"), b"carried along").unwrap();
        let first = hf::import(&at("hf"), &at("first")).unwrap();
        hf::export(&at("first"), &at("out"), ExportType::AsStored).unwrap();
        let second = hf::import(&at("out"), &at("second")).unwrap();
        let shards = |manifest: &trireme::artifact::Manifest| manifest.file("shard-00000.h5").unwrap().xxh3.clone();
        assert_eq!(shards(&first), shards(&second), "case {n}");
        let (a, b) = (checkpoint::open(&at("first")).unwrap(), checkpoint::open(&at("second")).unwrap());
        assert_eq!((&a.meta().model, &a.meta().tokenizer), (&b.meta().model, &b.meta().tokenizer), "case {n}");
        assert_eq!(std::fs::read(at("out").join("tokenizer.model")).unwrap(), b"carried along");
        let exported: Value = serde_json::from_slice(&std::fs::read(at("out").join("config.json")).unwrap()).unwrap();
        for key in ["architectures", "eos_token_id", "bos_token_id", "vocab_size", "rope_theta", "tie_word_embeddings"] {
            assert_eq!(exported[key], config[key], "{key}");
        }
        let Some(python) = &python else { continue };
        std::fs::create_dir(at("dump")).unwrap();
        let lines = oracles::run(python, "safetensors_dump.py", &[&at("out"), &at("dump")]);
        let shapes: BTreeMap<String, Vec<usize>> = hf_tensors(config).into_iter().collect();
        assert_eq!(lines.len(), shapes.len(), "case {n}");
        for (idx, line) in lines.iter().enumerate() {
            let shape: Vec<String> = shapes[&line[1]].iter().map(usize::to_string).collect();
            let dtype = dtype_of(&line[1]).replace("F16", "F32").replace("BF32", "BF16");
            assert_eq!(line[2..], [shape.join(","), dtype], "{}", line[1]);
            let found = oracles::read_f32(&at("dump").join(format!("{idx}.bin")));
            assert!(found.iter().enumerate().all(|(i, &x)| x == value(&line[1], i)), "{}", line[1]);
        }
    }
}

/// `--dtype` rounds or widens everything; the same export again is a no-op.
#[test]
fn exports_convert() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_hf(&at("hf"), &NEMOTRON(), mixed, 1);
    hf::import(&at("hf"), &at("c")).unwrap();
    for (dtype, name, bytes) in [(ExportType::F32, "float32", 4), (ExportType::Bf16, "bfloat16", 2), (ExportType::F16, "float16", 2)] {
        let out = at(name);
        let manifest = hf::export(&at("c"), &out, dtype).unwrap();
        assert_eq!(manifest, hf::export(&at("c"), &out, dtype).unwrap());
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!((config["torch_dtype"].as_str(), config["dtype"].as_str()), (Some(name), Some(name)));
        let file = std::fs::read(out.join("model.safetensors")).unwrap();
        let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let n: usize = hf_tensors(&NEMOTRON()).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!((header % 8, file.len()), (0, 8 + header + bytes * n));
        hf::import(&out, &at(&format!("again-{name}"))).unwrap();
        let norm = read_whole(&at(&format!("again-{name}")), "layers.0.mlp_norm.bias", &[10]);
        assert_eq!(norm, row("model.layers.0.post_attention_layernorm.bias", 0, 10));
    }
}

/// A directory in F16 comes out of `--dtype f16` as it was, bit by bit: subnormals, zeros of both signs, infinities and every NaN. A number
/// that f16 has not is an error that names its weight and place; what is small is rounded, half-way cases to even.
#[test]
fn f16_comes_out_as_it_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, config, n_files) in [("nemotron", NEMOTRON(), 3), ("llama", LLAMA(), 1)] {
        write_hf(&at(name), &config, all_of("F16"), n_files);
        let random = Random::new(7, name);
        let mut seen = 0;
        for entry in std::fs::read_dir(at(name)).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|extension| extension == "safetensors") {
                let mut bytes = std::fs::read(&entry).unwrap();
                let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                for half in bytes[header..].chunks_exact_mut(2) {
                    half.copy_from_slice(&(random.bits(seen) as u16).to_le_bytes());
                    seen += 1;
                }
                std::fs::write(&entry, bytes).unwrap();
            }
        }
        hf::import(&at(name), &at(&format!("{name}-c"))).unwrap();
        hf::export(&at(&format!("{name}-c")), &at(&format!("{name}-out")), ExportType::F16).unwrap();
        let (before, after) = (tensors_of(&at(name)), tensors_of(&at(&format!("{name}-out"))));
        assert!(before == after && seen > 1000, "{name}");
    }
    let config = NEMOTRON();
    let numbers = [(65519.0f32, Some(0x7bff)), (65520.0, None), (-70000.0, None), (2f32.powi(-25), Some(0)), (1.0 / 3.0, Some(0x3555))];
    for (n, (value, expected)) in numbers.into_iter().enumerate() {
        let at = |name: &str| at(&format!("{n}-{name}"));
        write_hf(&at("hf"), &config, all_of("F32"), 1);
        let path = at("hf").join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        hf::import(&at("hf"), &at("c")).unwrap();
        let output = checkpoint_program(dir.path(), &format!("export {n}-c --out {n}-out --dtype f16 --verify"));
        let said = String::from_utf8(output.stderr).unwrap();
        match expected {
            Some(bits) => {
                assert_eq!(output.status.code(), Some(0), "{said}");
                // The last tensor of the file that was written by hand.
                let (_, halves) = &tensors_of(&at("out"))["lm_head.weight"];
                assert_eq!(halves[halves.len() - 2..], u16::to_le_bytes(bits), "{value}");
            }
            None => {
                assert!(output.status.code() == Some(3) && said.lines().count() == 1, "{said}");
                assert!(said.contains(&format!(" head.weight[36, 9] is {value}, and f16 ends at 65504")), "{said}");
                assert!(!at("out").exists());
            }
        }
    }
}

/// `--shard-size` bounds each file unless one tensor alone is larger, the table names every tensor's file and the total, and the
/// reference implementation finds each tensor where the table says.
#[test]
fn exports_are_cut_at_a_size() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_hf(&at("hf"), &NEMOTRON(), all_of("BF16"), 1);
    let first = hf::import(&at("hf"), &at("c")).unwrap();
    // The embeddings have 740 bytes each, everything else less.
    hf::export_in_files(&at("c"), &at("e"), ExportType::AsStored, 700).unwrap();
    let table: Value = serde_json::from_slice(&std::fs::read(at("e/model.safetensors.index.json")).unwrap()).unwrap();
    let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
    for (name, shape) in hf_tensors(&NEMOTRON()) {
        *bytes.entry(table["weight_map"][&name].as_str().unwrap().into()).or_default() += 2 * shape.iter().product::<usize>();
    }
    assert_eq!(table["metadata"]["total_size"].as_u64().unwrap() as usize, bytes.values().sum::<usize>());
    assert_eq!(table["weight_map"].as_object().unwrap().len(), hf_tensors(&NEMOTRON()).len());
    let n = bytes.len();
    for (idx, (file, n_bytes)) in bytes.iter().enumerate() {
        assert_eq!(*file, format!("model-{:05}-of-{n:05}.safetensors", idx + 1));
        assert!(*n_bytes <= 700 || *n_bytes == 740, "{file}: {n_bytes}");
    }
    assert!(n > 4 && !at("e/model.safetensors").exists(), "{bytes:?}");
    let second = hf::import(&at("e"), &at("again")).unwrap();
    assert_eq!(first.file("shard-00000.h5").unwrap().xxh3, second.file("shard-00000.h5").unwrap().xxh3);
    if let Some(python) = oracles::python("safetensors, numpy") {
        std::fs::create_dir(at("dump")).unwrap();
        assert_eq!(oracles::run(&python, "safetensors_dump.py", &[&at("e"), &at("dump")]).len(), hf_tensors(&NEMOTRON()).len());
    }
}

/// Training in bf16 keeps f32 master weights: an export as f32 has them, one as bf16 or as stored has the weights that were computed
/// with. Breaks when the digits that training kept are thrown away, or when a bf16 export rounds the masters anew.
#[test]
fn f32_exports_hold_master_weights() {
    let dir = tempfile::tempdir().unwrap();
    // Padded to fewer rows than what is read back.
    let model = ModelConfig { vocab_divisor: 8, ..config::parse(Path::new("config.json"), &NEMOTRON()).unwrap() };
    // Not the rounded masters, so that the two cannot be mistaken for each other.
    let weight = |name: &str, i: usize| value(name, i);
    let master = |name: &str, i: usize| value(name, i) + 2f32.powi(-18);
    let mut tensors = Vec::new();
    for spec in model.param_specs() {
        let n = spec.shape.iter().product::<usize>();
        let of = |f: &dyn Fn(&str, usize) -> f32| (0..n).map(|i| f(&spec.name, i)).collect::<Vec<f32>>();
        tensors.push((format!("weights/{}", spec.name), spec.shape.clone(), Tensor::from_bf16(&spec.shape, &of(&weight))));
        tensors.push((format!("master/{}", spec.name), spec.shape.clone(), Tensor::from_f32(&spec.shape, &of(&master))));
    }
    let pieces: Vec<Piece> = tensors
        .iter()
        .map(|(name, shape, tensor)| Piece { name: name.clone(), global_shape: shape.clone(), slice: Slice::whole(shape), tensor })
        .collect();
    let meta = Meta {
        step: 3,
        consumed_samples: 6,
        model,
        layout: ParallelLayout::SINGLE,
        recipe: Value::Null,
        data_fingerprint: String::new(),
        tokenizer: None,
        companions: BTreeMap::new(),
        trainer: Value::Null,
    };
    checkpoint::save(&dir.path().join("c"), &meta, &pieces, &Solo::new()).unwrap();
    let exported = |dtype: ExportType| {
        let out = dir.path().join(format!("{dtype:?}"));
        hf::export(&dir.path().join("c"), &out, dtype).unwrap();
        assert_eq!(compare(&out, &dir.path().join("c"), dtype).map(|compared| compared.n_outputs), Ok(20 * 37), "{dtype:?}");
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("model.norm.bias").unwrap();
        let values: Vec<f32> = match view.dtype() {
            safetensors::Dtype::F32 => view.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            _ => view.data().chunks(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
        };
        values
    };
    let expected = |f: &dyn Fn(&str, usize) -> f32| (0..10).map(|i| f("final_norm.bias", i)).collect::<Vec<f32>>();
    assert_eq!(exported(ExportType::F32), expected(&master));
    assert_eq!(exported(ExportType::Bf16), expected(&weight));
    assert_eq!(exported(ExportType::AsStored), expected(&weight));
}

/// What stands beside the weights comes out as it went in, byte for byte, whether the tokenizer is SentencePiece's, Hugging Face's, or
/// both; what ends an answer is what generation_config.json says, as in transformers, and an id past 32 bits is none, not its last 32.
#[test]
fn companions_come_along() {
    let both: &[(&str, &str)] = &[
        ("tokenizer.model", "\u{a}\u{e}sentencepiece"),
        ("tokenizer.json", "{\"version\": \"1.0\",  \"model\": {}}\n"),
        ("tokenizer_config.json", "{\"chat_template\": [{\"name\": \"default\", \"template\": \"{{ bos_token }}x\"}]}"),
        ("special_tokens_map.json", "{\"bos_token\":\"<s>\"}"),
        ("added_tokens.json", "{}"),
        ("generation_config.json", "{\"eos_token_id\": [7, 9, 4294967299], \"temperature\": 0.6}\n"),
        ("chat_template.jinja", "{{ messages[0].content }}\n"),
    ];
    let json_only: &[(&str, &str)] = &[("tokenizer.json", "{}"), ("vocab.json", "{ }"), ("merges.txt", "a b\n"), ("README.md", "left")];
    for (name, files, eos) in [("both", both, vec![7, 9]), ("json", json_only, vec![3]), ("none", &[], vec![3])] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_hf(&at("hf"), &NEMOTRON(), all_of("BF16"), 1);
        files.iter().for_each(|(name, text)| std::fs::write(at("hf").join(name), text).unwrap());
        hf::import(&at("hf"), &at("c")).unwrap();
        hf::export(&at("c"), &at("e"), ExportType::AsStored).unwrap();
        for (file, text) in files.iter().filter(|(file, _)| *file != "README.md") {
            assert_eq!(std::fs::read(at("e").join(file)).unwrap(), text.as_bytes(), "{name}: {file}");
        }
        let made: Vec<String> =
            std::fs::read_dir(at("e")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let is_expected = |file: &String| {
            ["config.json", "generation_config.json", "model.safetensors", "manifest.json"].contains(&file.as_str())
                || files.iter().any(|(name, _)| file == name && file != "README.md")
        };
        assert!(made.iter().all(is_expected) && at("e/generation_config.json").exists(), "{made:?}");
        assert_eq!(hf::eos_ids(&checkpoint::open(&at("c")).unwrap()).unwrap(), eos, "{name}");
        // And a second time, from the export.
        hf::import(&at("e"), &at("again")).unwrap();
        let (first, second) = (checkpoint::open(&at("c")).unwrap(), checkpoint::open(&at("again")).unwrap());
        assert_eq!(first.meta().tokenizer, second.meta().tokenizer, "{name}");
        let kept = |stored: &checkpoint::Stored| {
            let mut kept = stored.meta().companions.clone();
            kept.retain(|file, _| {
                file != "config.json" && (file != "generation_config.json" || files.iter().any(|(name, _)| name == file))
            });
            kept
        };
        assert_eq!(kept(&first), kept(&second), "{name}");
    }
}

/// Of the templates that a directory holds, in files or by name in tokenizer_config.json, the one is taken that transformers takes
/// (tests/goldens/chat.py), and all come along, byte for byte.
#[test]
fn chat_templates_come_along_and_are_chosen() {
    let whole: serde_json::Value = serde_json::from_str(include_str!("../goldens/chat.json")).unwrap();
    let tokenizer = whole["tokenizer"].as_str().unwrap();
    let mut n_same = 0;
    for directory in whole["directories"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_hf(&at("hf"), &NEMOTRON(), all_of("BF16"), 1);
        std::fs::write(at("hf/tokenizer.json"), tokenizer).unwrap();
        let files = directory["files"].as_object().unwrap();
        for (name, text) in files {
            let path = at("hf").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text.as_str().unwrap()).unwrap();
        }
        hf::import(&at("hf"), &at("c")).unwrap();
        hf::export(&at("c"), &at("e"), ExportType::AsStored).unwrap();
        let stored = checkpoint::open(&at("c")).unwrap();
        let template = hf::chat_template(&stored, &hf::tokenizer(&stored).unwrap().unwrap()).unwrap().unwrap();
        for asked in directory["asked"].as_array().unwrap() {
            let given = |key: &str| Some(asked[key].clone()).filter(|given| !given.is_null());
            let (tools, documents, chat_template) = (given("tools"), given("documents"), given("chat_template"));
            let beside = Beside { tools, documents, chat_template, ..Beside::default() };
            let messages = serde_json::json!([{"role": "user", "content": " How large?"}]);
            let ours = template.prompt(&Conversation::read(messages, beside).unwrap());
            match (&ours, asked["said"].as_str()) {
                (Ok(ours), Some(theirs)) => {
                    assert_eq!(ours, theirs, "{files:?} {asked}");
                    n_same += 1;
                }
                (Err(wrong), Some(_)) => assert!(wrong.contains("which the chat template does not read"), "{files:?} {asked} {wrong}"),
                (ours, None) => assert!(ours.is_err(), "{files:?} {asked} {ours:?}"),
            }
        }
        for (name, text) in files {
            let left = name.ends_with(".txt") || name.contains("deep/");
            assert_eq!(std::fs::read(at("e").join(name)).ok().as_deref(), (!left).then_some(text.as_str().unwrap().as_bytes()), "{name}");
        }
    }
    assert!(n_same > 50, "{n_same}");
}

/// transformers loads what is exported, in one file or several, and computes the same bits from it as from the directory that it wrote
/// itself, for every golden model; from an export in bf16 it computes in f32 what the bf16 logits' own rounding allows. Without
/// transformers the tensors are compared, which it is a function of.
#[test]
fn transformers_gives_the_same_logits() {
    let python = oracles::python("torch, transformers");
    let dir = tempfile::tempdir().unwrap();
    let mut pairs = Vec::new();
    let plain = ["nemotron-gqa", "nemotron-head-dim", "nemotron-rotary-full", "nemotron-tied", "llama"];
    let scaled = ["llama-linear", "llama-llama3", "llama-yarn", "nemotron-yarn"];
    for variant in plain.into_iter().chain(scaled) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(variant);
        let at = |name: &str| dir.path().join(format!("{variant}-{name}"));
        hf::import(&source, &at("c")).unwrap();
        hf::export_in_files(&at("c"), &at("e"), ExportType::AsStored, 2000).unwrap();
        hf::export(&at("c"), &at("bf16"), ExportType::Bf16).unwrap();
        let (theirs, ours) = (tensors_of(&source), tensors_of(&at("e")));
        assert!(theirs == ours && theirs.len() > 10, "{variant}");
        assert_eq!(config::read(&source).unwrap(), config::read(&at("e")).unwrap(), "{variant}");
        pairs.push((source, at("e"), at("bf16")));
    }
    let Some(python) = python else { return };
    let paths: Vec<&Path> = pairs.iter().flat_map(|(a, b, c)| [a.as_path(), b, c]).collect();
    let lines = oracles::run(&python, "transformers_logits.py", &paths);
    assert_eq!(lines.len(), pairs.len());
    for line in &lines {
        let [_, error_of_golden, is_equal, error_of_bf16] = &line[..] else { panic!("{line:?}") };
        let number = |text: &String| text.parse::<f64>().unwrap();
        assert!(number(error_of_golden) < 5.0 * 7e-7, "the logits are not those of the goldens: {line:?}");
        assert_eq!(is_equal, "equal", "{line:?}");
        // Weights rounded to 8 bits, each once: half of what bf16 storage of weights and activations shows.
        assert!(number(error_of_bf16) < 1.5e-2 && number(error_of_bf16) > 1e-5, "{line:?}");
    }
}

/// Every tensor of a directory by name: shape, and bytes.
fn tensors_of(dir: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") && path.file_name().unwrap() != "golden.safetensors" {
            let bytes = std::fs::read(&path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            all.extend(file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))));
        }
    }
    all
}
