//! What a config.json may say that this program does not compute: each such key with the values under which it changes nothing. All
//! else about these keys is an error with the value; keys that nobody here has heard of are told. Sources: transformers 4.40 to 5
//! (configuration_nemotron.py, configuration_llama.py), NeMo's model_config.yaml, and what forks of Llama add.

use serde_json::Value;

/// Keys whose layers do not exist here: only these values (JSON), null, or no such key.
const WITHOUT_EFFECT: &[(&[&str], &[&str], &str)] = &[
    (
        &["attention_bias", "mlp_bias", "bias", "use_bias", "qkv_bias", "attention_out_bias", "attention_qkv_bias", "add_bias_linear"],
        &["false"],
        "linear layers have no bias here",
    ),
    (
        &["sliding_window", "attention_chunk_size", "attention_window_size", "window_attn_skip_freq"],
        &[],
        "attention sees everything before a token here",
    ),
    (&["use_sliding_window"], &["false"], "attention sees everything before a token here"),
    (&["qk_layernorm", "use_qk_norm", "qk_norm"], &["false"], "queries and keys are not normalised here"),
    (&["rope_interleaved", "rotary_interleaved"], &["false"], "rotary pairs are half a head apart here"),
    (&["no_rope_layers", "no_rope_layer_interval"], &[], "every layer rotates here"),
    (&["alibi"], &["false"], "positions are rotary here"),
    (&["position_embedding_type"], &["\"rope\"", "\"rotary\""], "positions are rotary here"),
    (&["normalization"], &["\"layernorm1p\"", "\"rmsnorm\""], "norms are those of the architecture here"),
    (&["clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"], &[], "nothing is clipped here"),
    (&["logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"], &["1"], "nothing is scaled here"),
    (&["attention_multiplier", "query_pre_attn_scalar"], &[], "scores are divided by the root of head_dim here"),
    (
        &["num_local_experts", "num_experts", "n_routed_experts", "num_moe_experts", "num_experts_per_tok"],
        &["0", "1"],
        "there is one feed-forward network a layer here",
    ),
    (&["parallel_attn", "use_parallel_residual", "parallel_residual"], &["false"], "attention comes before the feed-forward network here"),
    (&["is_encoder_decoder", "add_cross_attention", "cross_attention"], &["false"], "models are decoders here"),
    (&["quantization_config", "compression_config"], &[], "weights are F32, BF16 or F16 here"),
];

/// Keys that do not change the function of given weights, or are read elsewhere.
const HARMLESS: &[&str] = &[
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "_name_or_path",
    "_attn_implementation_autoset",
    "auto_map",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "tokenizer_class",
    "task_specific_params",
    "pretraining_tp",
    "apply_query_key_layer_scaling",
    "attention_dropout",
    "hidden_dropout",
    "ffn_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "classifier_dropout",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_dict_in_generate",
    "chunk_size_feed_forward",
    "is_decoder",
    "is_llama_config",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "max_window_layers",
    "transformers.js_config",
];

/// The first thing in a config.json that this program does not compute: `key = value, but ..`.
pub(super) fn first(config: &Value) -> Option<String> {
    let windows_are_off = config["use_sliding_window"] == Value::Bool(false);
    for (keys, values, here) in WITHOUT_EFFECT {
        for key in keys.iter().filter(|key| **key != "sliding_window" || !windows_are_off) {
            let value = &config[*key];
            if !value.is_null() && !values.iter().any(|text| is(value, text)) {
                return Some(format!("{key} = {value}, but {here}"));
            }
        }
    }
    let other = config["layer_types"].as_array()?.iter().find(|kind| *kind != "full_attention")?;
    Some(format!("layer_types has {other}, but attention sees everything before a token here"))
}

/// Keys that are neither read nor known to be harmless, with a value that is not null or false.
pub(super) fn unheard_of<'a>(config: &'a Value, read: &[&str]) -> Vec<&'a str> {
    let is_known =
        |key: &str| read.contains(&key) || HARMLESS.contains(&key) || WITHOUT_EFFECT.iter().any(|(keys, ..)| keys.contains(&key));
    let says_nothing = |value: &Value| value.is_null() || value == &Value::Bool(false);
    let all = config.as_object().into_iter().flatten();
    all.filter(|(key, value)| !is_known(key) && !says_nothing(value)).map(|(key, _)| key.as_str()).collect()
}

/// Whether a value is what the text says; 1 and 1.0 are one number.
fn is(value: &Value, text: &str) -> bool {
    let expected: Value = serde_json::from_str(text).expect("JSON of ours");
    *value == expected || value.as_f64().is_some_and(|number| expected.as_f64() == Some(number))
}
