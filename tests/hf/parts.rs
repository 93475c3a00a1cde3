//! Hugging Face directories written by hand: names and shapes as transformers has them, values by a formula of name and index.

use serde_json::{Value, json};
use std::path::Path;
use trireme::checkpoint::{self, Wanted};
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

pub const NEMOTRON: fn() -> Value = || {
    json!({
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_size": 10, "intermediate_size": 14,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 37,
        "max_position_embeddings": 64, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "initializer_range": 0.0134, "bos_token_id": 2,
        "eos_token_id": 3, "torch_dtype": "bfloat16"
    })
};

pub const LLAMA: fn() -> Value = || {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 11,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
        "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": [2, 5], "torch_dtype": "float32"
    })
};

/// Names and shapes as transformers has them, by hand.
pub fn hf_tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
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
pub fn value(name: &str, index: usize) -> f32 {
    (Random::new(1, name).bits(index as u64) % 255) as f32 / 64.0 - 2.0
}

pub fn element_bytes(dtype: &str, value: f32) -> Vec<u8> {
    match dtype {
        "F32" => value.to_le_bytes().to_vec(),
        "BF16" => value.to_le_bytes()[2..].to_vec(), // exact, so truncation is rounding
        "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
        "F8_E4M3" => vec![0],
        "I32" => (value as i32).to_le_bytes().to_vec(),
        other => panic!("{other}"),
    }
}

pub type Spec = (String, Vec<usize>, &'static str);

/// A safetensors file as the format describes it: u64 length of the header, JSON, data.
pub fn write_safetensors(path: &Path, tensors: &[Spec]) {
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
pub fn write_hf(dir: &Path, config: &Value, dtype_of: impl Fn(&str) -> &'static str, n_files: usize) {
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

pub fn all_of(dtype: &'static str) -> impl Fn(&str) -> &'static str {
    move |_| dtype
}

/// Matrices in bf16, vectors in f32, as some trainers save them.
pub fn mixed(name: &str) -> &'static str {
    if name.contains("norm") { "F32" } else { "BF16" }
}

pub fn read_whole(checkpoint: &Path, name: &str, shape: &[usize]) -> Vec<f32> {
    let mut tensor = Tensor::host(shape, DType::F32, None).unwrap();
    let wanted = Wanted { name: format!("weights/{name}"), slice: Slice::whole(shape), tensor: &mut tensor };
    checkpoint::open(checkpoint).unwrap().read(&mut [wanted]).unwrap();
    tensor.f32().to_vec()
}

pub fn row(name: &str, row: usize, n_columns: usize) -> Vec<f32> {
    (0..n_columns).map(|column| value(name, row * n_columns + column)).collect()
}

/// trireme-checkpoint with this command line, in this directory.
pub fn checkpoint_program(dir: &Path, line: &str) -> std::process::Output {
    let program = env!("CARGO_BIN_EXE_trireme-checkpoint");
    std::process::Command::new(program).args(line.split(' ')).current_dir(dir).output().unwrap()
}
