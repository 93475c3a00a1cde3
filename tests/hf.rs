//! Import from and export to Hugging Face directories. The directories are written by this file from the description of
//! the format, and read back by the reference `safetensors` package; values are a formula of name and index.

mod oracles;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use trireme::checkpoint::hf::{self, ExportType, config};
use trireme::checkpoint::{self, Wanted};
use trireme::device::{Activation, NormKind};
use trireme::error::Kind;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

const NEMOTRON: fn() -> Value = || {
    json!({
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_size": 10, "intermediate_size": 14,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 37,
        "max_position_embeddings": 64, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.0134, "bos_token_id": 2,
        "eos_token_id": 3, "torch_dtype": "bfloat16"
    })
};

const LLAMA: fn() -> Value = || {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 11,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
        "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": [2, 5], "torch_dtype": "float32"
    })
};

/// Names and shapes as transformers has them, by hand.
fn hf_tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
    let n = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, ffn, heads, kv) = (n("hidden_size"), n("intermediate_size"), n("num_attention_heads"), n("num_key_value_heads"));
    let dim = config["head_dim"].as_u64().map_or(hidden / heads, |dim| dim as usize);
    let nemotron = config["model_type"] == "nemotron";
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![n("vocab_size"), hidden])];
    let norm = |name: String, tensors: &mut Vec<(String, Vec<usize>)>| {
        tensors.push((format!("{name}.weight"), vec![hidden]));
        if nemotron {
            tensors.push((format!("{name}.bias"), vec![hidden]));
        }
    };
    for layer in 0..n("num_hidden_layers") {
        let at = format!("model.layers.{layer}");
        norm(format!("{at}.input_layernorm"), &mut tensors);
        norm(format!("{at}.post_attention_layernorm"), &mut tensors);
        tensors.push((format!("{at}.self_attn.q_proj.weight"), vec![heads * dim, hidden]));
        tensors.push((format!("{at}.self_attn.k_proj.weight"), vec![kv * dim, hidden]));
        tensors.push((format!("{at}.self_attn.v_proj.weight"), vec![kv * dim, hidden]));
        tensors.push((format!("{at}.self_attn.o_proj.weight"), vec![hidden, heads * dim]));
        if !nemotron {
            tensors.push((format!("{at}.mlp.gate_proj.weight"), vec![ffn, hidden]));
        }
        tensors.push((format!("{at}.mlp.up_proj.weight"), vec![ffn, hidden]));
        tensors.push((format!("{at}.mlp.down_proj.weight"), vec![hidden, ffn]));
    }
    norm("model.norm".into(), &mut tensors);
    if config["tie_word_embeddings"] != true {
        tensors.push(("lm_head.weight".into(), vec![n("vocab_size"), hidden]));
    }
    tensors
}

/// Element `index` of a tensor; exact in f32, bf16 and f16 (a few bits of mantissa, small exponents).
fn value(name: &str, index: usize) -> f32 {
    (Random::new(1, name).bits(index as u64) % 255) as f32 / 64.0 - 2.0
}

fn element_bytes(dtype: &str, value: f32) -> Vec<u8> {
    match dtype {
        "F32" => value.to_le_bytes().to_vec(),
        "BF16" => value.to_le_bytes()[2..].to_vec(), // exact, so truncation is rounding
        "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
        "I32" => (value as i32).to_le_bytes().to_vec(),
        other => panic!("{other}"),
    }
}

type Spec = (String, Vec<usize>, &'static str);

/// A safetensors file as the format describes it: u64 length of the header, JSON, data.
fn write_safetensors(path: &Path, tensors: &[Spec]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, dtype) in tensors {
        let start = data.len();
        (0..shape.iter().product()).for_each(|i| data.extend(element_bytes(dtype, value(name, i))));
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let text = serde_json::to_vec(&header).unwrap();
    let file = [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat();
    std::fs::write(path, file).unwrap();
}

/// A directory with these types, in one file or in three.
fn write_hf(dir: &Path, config: &Value, dtype_of: impl Fn(&str) -> &'static str, n_files: usize) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<Spec> = hf_tensors(config).into_iter().map(|(name, shape)| (name.clone(), shape, dtype_of(&name))).collect();
    if n_files == 1 {
        return write_safetensors(&dir.join("model.safetensors"), &tensors);
    }
    let mut map = serde_json::Map::new();
    for file_idx in 0..n_files {
        let file = format!("model-{:05}-of-{n_files:05}.safetensors", file_idx + 1);
        let mine: Vec<Spec> = tensors.iter().skip(file_idx).step_by(n_files).cloned().collect();
        mine.iter().for_each(|(name, ..)| drop(map.insert(name.clone(), json!(file))));
        write_safetensors(&dir.join(file), &mine);
    }
    let table = json!({"metadata": {"total_size": 0}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), table.to_string()).unwrap();
}

fn all_of(dtype: &'static str) -> impl Fn(&str) -> &'static str {
    move |_| dtype
}

/// Matrices in bf16, vectors in f32, as some trainers save them.
fn mixed(name: &str) -> &'static str {
    if name.contains("norm") { "F32" } else { "BF16" }
}

fn read_whole(checkpoint: &Path, name: &str, shape: &[usize]) -> Vec<f32> {
    let mut tensor = Tensor::host(shape, DType::F32, None).unwrap();
    let wanted = Wanted { name: format!("weights/{name}"), slice: Slice::whole(shape), tensor: &mut tensor };
    checkpoint::open(checkpoint).unwrap().read(&mut [wanted]).unwrap();
    tensor.f32().to_vec()
}

fn row(name: &str, row: usize, n_columns: usize) -> Vec<f32> {
    (0..n_columns).map(|column| value(name, row * n_columns + column)).collect()
}

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
    for (dtype, name, bytes) in [(ExportType::F32, "float32", 4), (ExportType::Bf16, "bfloat16", 2)] {
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

/// Every spelling that published checkpoints use describes the same model; what is left out is what transformers assumes.
#[test]
fn config_spellings() {
    let path = Path::new("config.json");
    let expected = config::parse(path, &NEMOTRON()).unwrap();
    assert_eq!((expected.norm, expected.activation), (NormKind::LayerNorm1P, Activation::SquaredRelu));
    assert_eq!((expected.vocab_size, expected.padded_vocab(), expected.rotary_dims()), (37, 128, 2));
    let renamed = [
        ("partial_rotary_factor", "rope_percent"),
        ("partial_rotary_factor", "rope_percentage"),
        ("partial_rotary_factor", "rotary_percent"),
        ("head_dim", "kv_channels"),
        ("norm_eps", "layer_norm_eps"),
        ("norm_eps", "layernorm_epsilon"),
        ("torch_dtype", "dtype"),
        ("rope_theta", "rotary_base"),
        ("num_key_value_heads", "num_query_groups"),
        ("intermediate_size", "ffn_hidden_size"),
    ];
    for (usual, other) in renamed {
        let mut config = NEMOTRON();
        let value = config.as_object_mut().unwrap().remove(usual).unwrap();
        config[other] = value;
        assert_eq!(config::parse(path, &config).unwrap(), expected, "{other}");
    }
    let mut nested = NEMOTRON();
    nested.as_object_mut().unwrap().retain(|key, _| key != "rope_theta" && key != "partial_rotary_factor");
    nested["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 0.5});
    assert_eq!(config::parse(path, &nested).unwrap().rope_base, 12345.0);
    assert_eq!(config::parse(path, &nested).unwrap().rotary_fraction, 0.5);
    let mut bare = NEMOTRON();
    let optional = ["norm_eps", "rope_theta", "partial_rotary_factor", "tie_word_embeddings", "initializer_range", "hidden_act"];
    bare.as_object_mut().unwrap().retain(|key, _| !optional.contains(&key.as_str()));
    assert_eq!(config::parse(path, &bare).unwrap(), expected);
    (bare["head_dim"], bare["num_key_value_heads"], bare["hidden_size"]) = (Value::Null, Value::Null, json!(24));
    let defaults = config::parse(path, &bare).unwrap();
    assert_eq!((defaults.head_dim, defaults.n_kv_heads), (4, 6));
    let llama = config::parse(path, &LLAMA()).unwrap();
    assert_eq!((llama.norm, llama.activation, llama.rotary_fraction), (NormKind::RmsNorm, Activation::Swiglu, 1.0));
    assert!(llama.tied_embeddings && llama.head_dim == 2);
    // What we write, we read as the same model.
    for model in [expected, llama] {
        let written = config::write(path, &model, &config::TokenIds::default(), "float32").unwrap();
        assert_eq!(config::parse(path, &written).unwrap(), model);
    }
}

/// A config that asks for another function than ours, or for nothing sensible, is refused with the key and its value.
#[test]
fn configs_that_cannot_be_computed_are_refused() {
    let bad = [
        ("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("attention_bias", json!(true), "attention_bias"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "llama3"),
        ("rope_parameters", json!({"rope_type": "yarn"}), "yarn"),
        ("rope_percent", json!(0.25), "partial_rotary_factor = 0.5 but rope_percent = 0.25"),
        ("hidden_size", json!(-4), "-4"),
        ("hidden_size", json!(u64::MAX), "expected a positive count"),
        ("num_key_value_heads", json!(4), "does not divide"),
        ("vocab_size", Value::Null, "vocab_size"),
        ("norm_eps", json!("small"), "small"),
        ("partial_rotary_factor", json!(1.5), "1.5"),
    ];
    for (key, value, said) in bad {
        let mut config = NEMOTRON();
        config[key] = value;
        let error = config::parse(Path::new("config.json"), &config).unwrap_err();
        assert!(error.to_string().contains(said) && error.to_string().contains("config.json"), "{key}: {error}");
        assert_eq!(error.exit_code(), 3, "{error}");
    }
}

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

/// A table of files that lies, or leads out of its directory, is refused.
#[test]
fn lying_tables_are_refused() {
    let change = |said: &str, change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("hf");
        write_hf(&source, &NEMOTRON(), all_of("F32"), 3);
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
    change("nothing.safetensors", &|table| table["weight_map"]["lm_head.weight"] = json!("nothing.safetensors"));
    change("not a table", &|table| *table = json!([]));
}

/// The program as a user meets it: done is 0, a wrong file is 3 with one line that names it, a wrong command line is 2; a
/// damaged checkpoint is told file by file.
#[test]
fn exit_codes_and_lines() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(&dir.path().join("hf"), &NEMOTRON(), all_of("F32"), 1);
    let run = |line: &str, code: i32| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"))
            .args(line.split(' '))
            .current_dir(dir.path())
            .output()
            .unwrap();
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
    assert!(!dir.path().join("f").exists());
}
