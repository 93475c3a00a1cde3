//! config.json of Hugging Face, both ways. Reading takes every spelling that the published Nemotron and Llama checkpoints
//! have used, flat or inside `rope_parameters`; writing gives one that transformers 4 and 5 both read. A key that would
//! change the function in a way this program does not compute is an error. Source: transformers' configuration_nemotron.py
//! and configuration_llama.py, and the history of nvidia/Minitron-4B-Base.

use super::{rope, unsupported};
use crate::device::{Activation, NormKind};
use crate::error::{Error, IoContext, Result};
use crate::model::config::{HeadKind, ModelConfig};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Name of the file.
pub const FILE: &str = "config.json";
/// Embedding rows are padded to a multiple of this on import (Megatron's make_vocab_size_divisible_by).
const VOCAB_DIVISOR: usize = 128;

/// How the name of an architecture with a score layer ends.
const CLASSIFIER: &str = "ForSequenceClassification";

/// The architectures that are understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Nemotron,
    Llama,
}

/// A key, every spelling of it (a dot enters an object), and what transformers takes when there is none.
const HIDDEN: &[&str] = &["hidden_size", "n_embd"];
const LAYERS: &[&str] = &["num_hidden_layers", "num_layers", "n_layer"];
const HEADS: &[&str] = &["num_attention_heads", "n_head"];
const KV_HEADS: &[&str] = &["num_key_value_heads", "num_query_groups"];
const HEAD_DIM: &[&str] = &["head_dim", "kv_channels", "attention_head_dim"];
const FFN: &[&str] = &["intermediate_size", "ffn_hidden_size"];
const VOCAB: &[&str] = &["vocab_size"];
const MAX_TOKENS: &[&str] = &["max_position_embeddings", "max_sequence_length", "encoder_seq_length"];
const EPS: &[&str] = &["norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "rms_norm_eps"];
const ROTARY: &[&str] = &[
    "partial_rotary_factor",
    "rope_percent",
    "rope_percentage",
    "rotary_percent",
    "rotary_percentage",
    "rotary_pct",
    "rope_parameters.partial_rotary_factor",
    "rope_scaling.partial_rotary_factor",
];
const BASE: &[&str] = &["rope_theta", "rotary_base", "rotary_emb_base", "rope_parameters.rope_theta", "rope_scaling.rope_theta"];
const TIED: &[&str] = &["tie_word_embeddings", "share_embeddings_and_output_weights"];
const INIT_STD: &[&str] = &["initializer_range", "init_method_std"];
/// Read with the tables of the rotary embedding.
const ORIGINAL: &[&str] = &[rope::ORIGINAL];
const LABELS: &[&str] = &["num_labels"];
const ACTIVATION: &[&str] = &["hidden_act", "hidden_activation", "activation", "activation_function"];
/// What transformers' Llama reads of these. It takes no notice of the other spellings, so a config.json with one of them alone describes
/// another function to it than to whoever wrote it.
const OF_LLAMA: &[&str] = &[
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters.rope_theta",
    "rope_scaling.rope_theta",
    "tie_word_embeddings",
];
/// All of them.
const READ: [&[&str]; 16] =
    [HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, MAX_TOKENS, EPS, ROTARY, BASE, ORIGINAL, TIED, INIT_STD, LABELS, ACTIVATION];

/// Reads `dir/config.json`: the model that it describes. Keys that nobody here has heard of are told.
pub fn read(dir: &Path) -> Result<ModelConfig> {
    let path = dir.join(FILE);
    let text = fs::read(&path).at(&path)?;
    let value: Value =
        serde_json::from_slice(&text).map_err(|error| Error::file(&path, format!("not JSON: {error}")).remedy("download it again"))?;
    let model = parse(&path, &value)?;
    let unheard_of = unsupported::unheard_of(&value, &READ.concat());
    if !unheard_of.is_empty() {
        log::warn!("{}: not known here and not used: {}", path.display(), unheard_of.join(", "));
    }
    Ok(model)
}

/// The model that a config.json describes; `path` is for messages.
pub fn parse(path: &Path, config: &Value) -> Result<ModelConfig> {
    let keys = Keys { path, config };
    let family = keys.family()?;
    keys.refuse_what_is_not_computed(family)?;
    let (hidden, n_heads, max_tokens) = (keys.size(HIDDEN)?, keys.size(HEADS)?, keys.size(MAX_TOKENS)?);
    let (rotary, eps, init_std) = match family {
        Family::Nemotron => (0.5, 1e-5, 0.0134),
        Family::Llama => (1.0, 1e-6, 0.02),
    };
    let (norm, activation) = match family {
        Family::Nemotron => (NormKind::LayerNorm1P, Activation::SquaredRelu),
        Family::Llama => (NormKind::RmsNorm, Activation::Swiglu),
    };
    let model = ModelConfig {
        n_layers: keys.size(LAYERS)?,
        hidden,
        n_heads,
        n_kv_heads: keys.size_or(KV_HEADS, n_heads)?,
        head_dim: keys.size_or(HEAD_DIM, hidden / n_heads.max(1))?,
        ffn_hidden: keys.size(FFN)?,
        vocab_size: keys.size(VOCAB)?,
        vocab_divisor: VOCAB_DIVISOR,
        max_tokens,
        norm,
        norm_eps: keys.number_or(EPS, eps)? as f32,
        activation,
        rotary_fraction: keys.number_or(ROTARY, rotary)?,
        rope_base: keys.number_or(BASE, 10000.0)?,
        rope_scaling: rope::read(config, max_tokens).map_err(|wrong| keys.wrong(wrong))?,
        tied_embeddings: keys.flag(TIED)?,
        head: keys.head()?,
        init_std: keys.number_or(INIT_STD, init_std)?,
    };
    model.check().map_err(|error| Error::file(path, error).remedy("correct config.json"))?;
    Ok(model)
}

struct Keys<'a> {
    path: &'a Path,
    config: &'a Value,
}

impl<'a> Keys<'a> {
    fn wrong(&self, what: String) -> Error {
        Error::file(self.path, what).remedy("correct config.json, or convert the model first")
    }

    fn family(&self) -> Result<Family> {
        let architecture = self.config["architectures"][0].as_str();
        let model_type = self.config["model_type"].as_str();
        match (architecture, model_type) {
            (Some("NemotronForCausalLM" | "NemotronForSequenceClassification") | None, Some("nemotron"))
            | (Some("NemotronForCausalLM" | "NemotronForSequenceClassification"), None) => Ok(Family::Nemotron),
            (Some("LlamaForCausalLM" | "LlamaForSequenceClassification") | None, Some("llama"))
            | (Some("LlamaForCausalLM" | "LlamaForSequenceClassification"), None) => Ok(Family::Llama),
            (Some(name), Some(kind)) if name.starts_with("NemotronFor") || name.starts_with("LlamaFor") => {
                Err(self.wrong(format!("architecture {name} with model_type {kind}")))
            }
            _ => {
                let found = architecture.or(model_type).unwrap_or("none");
                let wrong = format!("architecture {found}, expected NemotronForCausalLM or LlamaForCausalLM");
                Err(Error::file(self.path, wrong).remedy("only these two, and their ForSequenceClassification, can be imported"))
            }
        }
    }

    /// A sequence classifier is a reward model: its score layer reads one number a label off the last token. transformers writes
    /// the labels' names only, and two of them when nothing was said.
    fn head(&self) -> Result<HeadKind> {
        if !self.config["architectures"][0].as_str().is_some_and(|name| name.ends_with(CLASSIFIER)) {
            return Ok(HeadKind::Vocabulary);
        }
        let named = self.config["id2label"].as_object().map_or(2, |names| names.len());
        Ok(HeadKind::Reward(self.size_or(LABELS, named)?))
    }

    /// The value under one of the spellings; several must agree. null is absent.
    fn find(&self, spellings: &[&'static str]) -> Result<Option<(&'static str, &'a Value)>> {
        let mut found: Option<(&'static str, &Value)> = None;
        for spelling in spellings {
            let value = spelling.split('.').try_fold(self.config, |value, key| value.get(key));
            let Some(value) = value.filter(|value| !value.is_null()) else { continue };
            match found {
                // 1 and 1.0 are one number; texts and flags are equal or not.
                Some((first, other)) if other != value && (other.as_f64().is_none() || other.as_f64() != value.as_f64()) => {
                    return Err(self.wrong(format!("{first} = {other} but {spelling} = {value}")));
                }
                Some(_) => {}
                None => found = Some((spelling, value)),
            }
        }
        Ok(found)
    }

    fn size(&self, spellings: &[&'static str]) -> Result<usize> {
        match self.find(spellings)? {
            Some((key, value)) => self.as_size(key, value),
            None => Err(self.wrong(format!("has no {}", spellings[0]))),
        }
    }

    fn size_or(&self, spellings: &[&'static str], default: usize) -> Result<usize> {
        self.find(spellings)?.map_or(Ok(default), |(key, value)| self.as_size(key, value))
    }

    /// A count; more than a signed 32-bit number is a mistake, and keeps products of two within 64 bits.
    fn as_size(&self, key: &str, value: &Value) -> Result<usize> {
        let size = value.as_u64().filter(|size| (1..=i32::MAX as u64).contains(size));
        size.map(|size| size as usize).ok_or_else(|| self.wrong(format!("{key} = {value}, expected a positive count")))
    }

    fn number_or(&self, spellings: &[&'static str], default: f64) -> Result<f64> {
        match self.find(spellings)? {
            Some((key, value)) => value.as_f64().ok_or_else(|| self.wrong(format!("{key} = {value}, expected a number"))),
            None => Ok(default),
        }
    }

    fn flag(&self, spellings: &[&'static str]) -> Result<bool> {
        match self.find(spellings)? {
            Some((key, value)) => value.as_bool().ok_or_else(|| self.wrong(format!("{key} = {value}, expected true or false"))),
            None => Ok(false),
        }
    }

    fn refuse_what_is_not_computed(&self, family: Family) -> Result<()> {
        if let Some(wrong) = unsupported::first(self.config) {
            return Err(self.wrong(wrong));
        }
        // transformers' Llama rotates whole heads and takes no notice of such a key.
        match self.find(ROTARY)? {
            Some((key, value)) if family == Family::Llama && value.as_f64() != Some(1.0) => {
                return Err(self.wrong(format!("{key} = {value}, but Llama models rotate whole heads")));
            }
            _ => {}
        }
        if family == Family::Llama {
            self.refuse_names_that_llama_has_not()?;
        }
        let accepted: &[&str] = match family {
            Family::Nemotron => &["relu2", "squared-relu", "squared_relu"],
            Family::Llama => &["silu", "swish"],
        };
        let said = ACTIVATION.iter().map(|key| (key, &self.config[*key])).filter(|(_, value)| !value.is_null());
        for (key, value) in said {
            if !value.as_str().is_some_and(|name| accepted.contains(&name)) {
                return Err(self.wrong(format!("{key} = {value}, expected {}", accepted[0])));
            }
        }
        Ok(())
    }

    fn refuse_names_that_llama_has_not(&self) -> Result<()> {
        for spellings in [HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, MAX_TOKENS, EPS, BASE, TIED] {
            let own: Vec<&'static str> = spellings.iter().copied().filter(|name| OF_LLAMA.contains(name)).collect();
            let (own_value, any) = (self.find(&own)?, self.find(spellings)?);
            if let (None, Some((key, value))) = (own_value, any) {
                let wrong = format!("{key} = {value}, which transformers' Llama takes no notice of: it reads {}", own[0]);
                return Err(Error::file(self.path, wrong).remedy(format!("call it {} if that is what the weights are for", own[0])));
            }
        }
        Ok(())
    }
}

/// Token ids that generation needs; null when unknown.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TokenIds {
    /// Beginning of a text.
    pub bos: Value,
    /// End of a text; one id or several.
    pub eos: Value,
    /// Padding.
    pub pad: Value,
}

/// The config.json of a model, or why transformers has none for it. `dtype` is "float32", "bfloat16" or "float16".
pub fn write(path: &Path, model: &ModelConfig, ids: &TokenIds, dtype: &str) -> Result<Value> {
    let family = match (model.norm, model.activation) {
        (NormKind::LayerNorm1P, Activation::SquaredRelu) => Family::Nemotron,
        (NormKind::RmsNorm, Activation::Swiglu) if model.rotary_fraction == 1.0 => Family::Llama,
        (norm, activation) => {
            let wrong = format!("{norm:?} with {activation:?}, rotary {}", model.rotary_fraction);
            return Err(Error::file(path, wrong).remedy("transformers has Nemotron and Llama models only; keep it as it is"));
        }
    };
    let (name, model_type, activation, eps_key) = match family {
        Family::Nemotron => ("Nemotron", "nemotron", "relu2", "norm_eps"),
        Family::Llama => ("Llama", "llama", "silu", "rms_norm_eps"),
    };
    let ending = if model.head == HeadKind::Vocabulary { "ForCausalLM" } else { CLASSIFIER };
    // The shortest decimal of the f32, not the f64 nearest to it: 1e-5 stays 1e-5.
    let eps: f64 = model.norm_eps.to_string().parse().expect("a float prints as a float");
    let mut config = json!({
        "architectures": [format!("{name}{ending}")],
        "model_type": model_type,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_tokens,
        "hidden_act": activation,
        eps_key: eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "use_cache": true,
        "torch_dtype": dtype,
        "dtype": dtype,
    });
    rope::write(&mut config, model, (family == Family::Nemotron).then_some(model.rotary_fraction));
    if let HeadKind::Reward(n) = model.head {
        let names = |flip: fn(usize) -> (String, Value)| Value::Object((0..n).map(flip).collect());
        config["num_labels"] = json!(n);
        config["id2label"] = names(|idx| (idx.to_string(), json!(format!("LABEL_{idx}"))));
        config["label2id"] = names(|idx| (format!("LABEL_{idx}"), json!(idx)));
    }
    Ok(config)
}
