//! config.json: every spelling of what is computed, and a refusal of everything else.

use crate::parts::{LLAMA, NEMOTRON};
use serde_json::{Value, json};
use std::path::Path;
use trireme::checkpoint::hf::config;
use trireme::device::{Activation, NormKind};

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
        ("hidden_act", "activation"),
        ("initializer_range", "init_method_std"),
        ("max_position_embeddings", "encoder_seq_length"),
        ("num_hidden_layers", "num_layers"),
        ("tie_word_embeddings", "share_embeddings_and_output_weights"),
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
    nested["rope_scaling"] = nested.as_object_mut().unwrap().remove("rope_parameters").unwrap();
    assert_eq!(config::parse(path, &nested).unwrap().rope_base, 12345.0);
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
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope_scaling.type = \"linear\""),
        ("rope_scaling", json!({"factor": 2.0}), "rope_scaling.factor = 2.0"),
        ("rope_scaling", json!({"rope_type": "default", "beta_fast": 32}), "rope_scaling.beta_fast = 32"),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "rope_parameters.full_attention = {"),
        ("rope_scaling", json!(4), "rope_scaling = 4"),
        ("mlp_bias", json!(true), "mlp_bias = true"),
        ("attention_bias", json!("qkv"), "attention_bias = \"qkv\""),
        ("sliding_window", json!(4096), "sliding_window = 4096"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "sliding_attention"),
        ("attention_chunk_size", json!(8192), "attention_chunk_size = 8192"),
        ("use_qk_norm", json!(true), "use_qk_norm = true"),
        ("num_local_experts", json!(8), "num_local_experts = 8"),
        ("residual_multiplier", json!(0.22), "residual_multiplier = 0.22"),
        ("rope_interleaved", json!(true), "rope_interleaved = true"),
        ("quantization_config", json!({"quant_method": "fp8"}), "quantization_config = {\"quant_method\":\"fp8\"}"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings = \"yes\", expected true or false"),
        ("model_type", json!("llama"), "architecture NemotronForCausalLM with model_type llama"),
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
    let half = json!({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5});
    let llama =
        { LLAMA().as_object().unwrap().clone().into_iter().filter(|(key, _)| key != "rope_theta").collect::<serde_json::Map<_, _>>() };
    let mut llama = Value::Object(llama);
    llama["rope_parameters"] = half;
    let error = config::parse(Path::new("config.json"), &llama).unwrap_err();
    assert!(error.to_string().contains("partial_rotary_factor = 0.5, but Llama models rotate whole heads"), "{error}");
}

/// What says in so many words that nothing is special is accepted: configs are full of it.
#[test]
fn keys_without_effect_are_accepted() {
    let expected = config::parse(Path::new("config.json"), &NEMOTRON()).unwrap();
    let neutral = [
        ("rope_scaling", Value::Null),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e4, "factor": 1.0, "low_freq_factor": null})),
        ("attention_bias", json!(false)),
        ("sliding_window", Value::Null),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("residual_multiplier", json!(1.0)),
        ("num_local_experts", json!(0)),
        ("attention_dropout", json!(0.0)),
        ("pretraining_tp", json!(1)),
        ("_name_or_path", json!("x")),
    ];
    for (key, value) in neutral {
        let mut config = NEMOTRON();
        config[key] = value;
        assert_eq!(config::parse(Path::new("config.json"), &config).unwrap(), expected, "{key}");
    }
    let mut switched_off = NEMOTRON();
    (switched_off["sliding_window"], switched_off["use_sliding_window"]) = (json!(4096), json!(false));
    assert_eq!(config::parse(Path::new("config.json"), &switched_off).unwrap(), expected);
}
