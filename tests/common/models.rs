//! The shape that most models of tests and benches have, with what they differ in left to be said.
#![allow(dead_code)] // not every test program uses all

use trireme::checkpoint::Meta;
use trireme::device::{Activation, NormKind, RopeScaling, YarnScaling};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::parallel::layout::ParallelLayout;

/// A Nemotron-shaped model of these layers, hidden size, query heads, kv heads, head dim, feed-forward columns and pieces.
pub fn nemotron(dims: [usize; 7], max_tokens: usize) -> ModelConfig {
    let [n_layers, hidden, n_heads, n_kv_heads, head_dim, ffn_hidden, vocab_size] = dims;
    ModelConfig {
        n_layers,
        hidden,
        n_heads,
        n_kv_heads,
        head_dim,
        ffn_hidden,
        vocab_size,
        vocab_divisor: 128,
        max_tokens,
        norm: NormKind::LayerNorm1P,
        norm_eps: 1e-5,
        activation: Activation::SquaredRelu,
        rotary_fraction: 0.5,
        rope_base: 10000.0,
        rope_scaling: None,
        tied_embeddings: false,
        head: HeadKind::Vocabulary,
        init_std: 0.02,
    }
}

/// Frequencies scaled for 16 times as many tokens as these, each pair by another share, cos and sin by a factor.
pub fn yarn(original_max_position_embeddings: usize) -> RopeScaling {
    RopeScaling::Yarn(YarnScaling {
        factor: 16.0,
        original_max_position_embeddings,
        beta_fast: 8.0,
        beta_slow: 0.25,
        truncate: false,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
    })
}

/// Of a checkpoint whose model nobody looks at.
pub fn smallest_meta() -> Meta {
    Meta {
        step: 1,
        consumed_samples: 1,
        model: nemotron([1, 8, 1, 1, 8, 8, 8], 8),
        layout: ParallelLayout::SINGLE,
        recipe: serde_json::json!({}),
        data_fingerprint: String::new(),
        tokenizer: None,
        companions: Default::default(),
        trainer: serde_json::Value::Null,
    }
}
