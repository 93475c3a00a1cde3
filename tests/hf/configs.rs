//! config.json: every spelling of what is computed, and a refusal of everything else.

use crate::parts::{LLAMA, NEMOTRON};
use serde_json::{Value, json};
use std::path::Path;
use trireme::checkpoint::hf::config;
use trireme::device::{Activation, NormKind, RopeScaling};

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

/// The frequencies of published models and what each key does to them are those of transformers in f64 (tests/goldens/make.py rope), and
/// so is the factor on cos and sin; a config.json that we write says the same. Both sides are off by a few roundings of powers; a frequency
/// between the two ends of a ramp is a share of one 1/factor as large, whose rounding counts factor times.
#[test]
fn frequencies_equal_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rope.json");
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(rows.len(), 19);
    let mut n_scaled = 0;
    for row in &rows {
        let model = config::parse(&path, &row["config"]).unwrap_or_else(|error| panic!("{}: {error}", row["name"]));
        let written = config::write(&path, &model, &config::TokenIds::default(), "float32").unwrap();
        assert_eq!(config::parse(&path, &written).unwrap(), model, "{}", row["name"]);
        let (rope, expected) = (model.rope(), row["frequencies"].as_array().unwrap());
        let found = rope.frequencies();
        assert_eq!(found.len(), expected.len(), "{}", row["name"]);
        let factor = row["config"]["rope_scaling"]["factor"].as_f64().unwrap_or(5.0);
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let expected = expected.as_f64().unwrap();
            let error = (found - expected).abs() / expected;
            assert!(error <= 4.0 * factor * f64::EPSILON, "{}: frequency {i} is {found:e}, expected {expected:e}", row["name"]);
            n_scaled += usize::from((expected * rope.base.powf(2.0 * i as f64 / rope.rotary_dims as f64) - 1.0).abs() > 1e-9);
        }
        let expected = row["attention_factor"].as_f64().unwrap();
        assert!((rope.attention_factor() - expected).abs() <= 2.0 * f64::EPSILON, "{}: {}", row["name"], rope.attention_factor());
    }
    assert!(n_scaled > 300, "only {n_scaled} frequencies are scaled");
}

/// Whatever transformers has called a scaled rotary embedding, it is the same one; null is absent, and what is left out is what
/// transformers assumes.
#[test]
fn spellings_of_scaled_rotary_embeddings() {
    let path = Path::new("config.json");
    let with = |table: &str, value: Value| {
        let mut config = LLAMA();
        config[table] = value;
        config
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    let mut inside = llama3.clone();
    inside["original_max_position_embeddings"] = json!(16);
    let expected = config::parse(path, &with("rope_scaling", inside.clone())).unwrap();
    let Some(RopeScaling::Llama3(how)) = expected.rope_scaling else { panic!("{expected:?}") };
    assert_eq!((how.factor, how.high_freq_factor, how.original_max_position_embeddings), (8.0, 4.0, 16));
    let mut outside = with("rope_scaling", llama3.clone());
    outside["original_max_position_embeddings"] = json!(16);
    let mut nested = inside.clone();
    nested["rope_theta"] = json!(500000.0);
    let mut nested = with("rope_parameters", nested);
    nested.as_object_mut().unwrap().remove("rope_theta");
    let mut typed = inside.clone();
    (typed["type"], typed["rope_type"], typed["mscale"]) = (json!("llama3"), Value::Null, Value::Null);
    let mut twice = with("rope_scaling", inside.clone());
    twice["rope_parameters"] = inside.clone();
    for other in [outside, nested, with("rope_scaling", typed), twice] {
        assert_eq!(config::parse(path, &other).unwrap(), expected, "{other}");
    }
    // Nothing said: the longest sequence.
    let Some(RopeScaling::Llama3(how)) = config::parse(path, &with("rope_scaling", llama3.clone())).unwrap().rope_scaling else { panic!() };
    assert_eq!(how.original_max_position_embeddings, 64);
    let yarn = json!({"type": "yarn", "original_max_position_embeddings": 16, "beta_fast": 0, "finetuned": true});
    let Some(RopeScaling::Yarn(how)) = config::parse(path, &with("rope_scaling", yarn)).unwrap().rope_scaling else { panic!() };
    assert_eq!((how.factor, how.beta_fast, how.beta_slow, how.truncate, how.attention_factor), (4.0, 32.0, 1.0, true, None));
    // Two that differ, in the file or in one table, are two models.
    let mut differ = with("rope_scaling", inside.clone());
    differ["original_max_position_embeddings"] = json!(32);
    let mut tables = with("rope_scaling", inside);
    tables["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500000.0});
    for (config, said) in [
        (differ, "original_max_position_embeddings = 32, but rope_scaling.original_max_position_embeddings = 16"),
        (tables, "rope_parameters = {\"rope_type\":\"default\",\"rope_theta\":500000.0}, but rope_scaling = {"),
    ] {
        let error = config::parse(path, &config).unwrap_err();
        assert!(error.to_string().contains(said) && error.exit_code() == 3, "{error}");
    }
    // Before transformers 4.43 only these two keys were allowed.
    let linear = with("rope_scaling", json!({"type": "linear", "factor": 2.5}));
    let model = config::parse(path, &linear).unwrap();
    let written = config::write(path, &model, &config::TokenIds::default(), "float32").unwrap();
    assert_eq!((&written["rope_scaling"], &written["rope_theta"]), (&linear["rope_scaling"], &json!(500000.0)));
    assert_eq!(written["rope_parameters"], json!({"rope_type": "linear", "factor": 2.5, "rope_theta": 500000.0}));
}

/// A config that asks for another function than ours, or for nothing sensible, is refused with the key and its value.
#[test]
fn configs_that_cannot_be_computed_are_refused() {
    let bad = [
        ("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("attention_bias", json!(true), "attention_bias"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling of type llama3 has no low_freq_factor"),
        ("rope_parameters", json!({"rope_type": "linear"}), "rope_parameters of type linear has no factor"),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "rope_scaling.type = \"dynamic\", expected default, linear, llama3"),
        ("rope_parameters", json!({"rope_type": "longrope", "factor": 4.0}), "rope_parameters.rope_type = \"longrope\", expected"),
        ("rope_scaling", json!({"rope_type": 3}), "rope_scaling.rope_type = 3, expected the name of a type"),
        ("rope_scaling", json!({"rope_type": "linear", "type": "yarn"}), "rope_type = \"linear\", but rope_scaling.type = \"yarn\""),
        ("rope_scaling", json!({"type": "linear", "factor": "2"}), "rope_scaling.factor = \"2\", expected a number"),
        ("rope_scaling", json!({"type": "linear", "factor": 0.5}), "model.rope_scaling.linear.factor = 0.5"),
        ("rope_scaling", json!({"type": "linear", "factor": 2, "beta_fast": 32}), "rope_scaling.beta_fast = 32, which rotary"),
        ("rope_scaling", json!({"type": "linear", "factor": 2, "attention_factor": 1.2}), "rope_scaling.attention_factor = 1.2, which"),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            "low_freq_factor = 4, high_freq_factor = 1",
        ),
        ("rope_scaling", json!({"type": "yarn", "original_max_position_embeddings": 0}), "original_max_position_embeddings = 0, expected"),
        ("rope_scaling", json!({"type": "yarn", "factor": 2, "beta_fast": 0.5}), "beta_fast = 0.5, beta_slow = 1"),
        ("rope_scaling", json!({"type": "yarn", "factor": 2, "truncate": 1}), "rope_scaling.truncate = 1, expected true or false"),
        ("rope_scaling", json!({"type": "yarn", "factor": 2, "attention_factor": -1}), "attention_factor = -1, mscale = none"),
        ("rope_scaling", json!({"type": "yarn", "short_factor": [1.0]}), "rope_scaling.short_factor = [1.0]"),
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
        // As large a table of parameters would fill the memory before the files are looked at.
        ("num_hidden_layers", json!(i32::MAX), "model.n_layers = 2147483647, at most 10000"),
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
    // Two spellings that disagree, whatever kind of value they have; two names of one activation do not.
    for (key, value, said) in [
        ("share_embeddings_and_output_weights", json!(true), "tie_word_embeddings = false but share_embeddings_and_output_weights = true"),
        ("activation", json!("gelu"), "activation = \"gelu\", expected relu2"),
        ("rotary_base", json!(500), "rope_theta = 10000.0 but rotary_base = 500"),
    ] {
        let mut config = NEMOTRON();
        config[key] = value;
        let error = config::parse(Path::new("config.json"), &config).unwrap_err();
        assert!(error.to_string().contains(said), "{key}: {error}");
    }
    let mut named_twice = NEMOTRON();
    named_twice["activation"] = json!("squared-relu");
    config::parse(Path::new("config.json"), &named_twice).unwrap();
    // transformers' Llama computes as if these were not there.
    for (usual, other) in [
        ("rms_norm_eps", "norm_eps"),
        ("rope_theta", "rotary_base"),
        ("num_attention_heads", "n_head"),
        ("num_key_value_heads", "num_query_groups"),
        ("tie_word_embeddings", "share_embeddings_and_output_weights"),
    ] {
        let mut config = LLAMA();
        let value = config[usual].clone();
        config[other] = value.clone();
        config::parse(Path::new("config.json"), &config).unwrap();
        config.as_object_mut().unwrap().remove(usual).unwrap();
        let error = config::parse(Path::new("config.json"), &config).unwrap_err().to_string();
        let said = format!("{other} = {value}, which transformers' Llama takes no notice of: it reads {usual}; call it {usual}");
        assert!(error.contains(&said), "{error}");
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
        ("rope_scaling", json!({})),
        ("original_max_position_embeddings", json!(32)),
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
