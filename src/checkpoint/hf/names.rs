//! The one table that maps our parameters to Hugging Face tensors, in both directions: names, and which rows become which.
//! Source: transformers' modeling_nemotron.py and modeling_llama.py for names, Megatron-LM for the interleave of qkv.

use crate::model::config::{ModelConfig, ParamSpec};
use std::ops::Range;

/// The bias of a reward model's last layer. transformers' own classifiers have none, NeMo-Aligner's reward models may.
pub const SCORE_BIAS: &str = "score.bias";

/// How the rows of one of our parameters are made of rows of Hugging Face tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pack {
    /// Row for row.
    Same,
    /// Row for row, then zero rows up to the padded vocabulary.
    Padded,
    /// For each kv head: its query heads, then the key head, then the value head.
    Qkv,
    /// Gate and up rows in turn.
    GateUp,
    /// Nothing but zeros.
    Absent,
}

/// A parameter and the Hugging Face tensors that it holds.
#[derive(Clone, PartialEq, Debug)]
pub struct Mapped {
    /// Our name, as in [`ModelConfig::param_specs`].
    pub name: String,
    /// Our shape.
    pub shape: Vec<usize>,
    /// Hugging Face names and shapes.
    pub sources: Vec<(String, Vec<usize>)>,
    pack: Pack,
}

/// Rows of a parameter that follow each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rows {
    /// These rows of this source.
    Of(usize, Range<usize>),
    /// So many rows of zeros.
    Zero(usize),
}

impl Rows {
    /// How many.
    pub fn n_rows(&self) -> usize {
        match self {
            Rows::Of(_, rows) => rows.len(),
            Rows::Zero(n) => *n,
        }
    }
}

impl Mapped {
    /// Its rows from first to last.
    pub fn rows(&self, config: &ModelConfig) -> Vec<Rows> {
        let of = |source: usize, rows: Range<usize>| Rows::Of(source, rows);
        match self.pack {
            Pack::Same => vec![of(0, 0..self.shape[0])],
            Pack::Absent => vec![Rows::Zero(self.shape[0])],
            Pack::Padded => {
                let n = self.sources[0].1[0];
                let all = vec![of(0, 0..n), Rows::Zero(self.shape[0] - n)];
                all.into_iter().filter(|rows| *rows != Rows::Zero(0)).collect()
            }
            Pack::Qkv => {
                let (dim, queries) = (config.head_dim, config.n_heads / config.n_kv_heads * config.head_dim);
                let group =
                    |g: usize| [of(0, g * queries..(g + 1) * queries), of(1, g * dim..(g + 1) * dim), of(2, g * dim..(g + 1) * dim)];
                (0..config.n_kv_heads).flat_map(group).collect()
            }
            Pack::GateUp => (0..config.ffn_hidden).flat_map(|row| [of(0, row..row + 1), of(1, row..row + 1)]).collect(),
        }
    }

    /// The same parameter where the Hugging Face side has no tensor for it: zeros.
    pub fn absent(self) -> Mapped {
        Mapped { sources: Vec::new(), pack: Pack::Absent, ..self }
    }

    /// For one source: (our first row, how many) in the order of the source's rows.
    pub fn rows_of_source(&self, config: &ModelConfig, wanted: usize) -> Vec<Range<usize>> {
        let (mut at, mut found) = (0, Vec::new());
        for rows in self.rows(config) {
            let n = rows.n_rows();
            if let Rows::Of(source, rows) = rows
                && source == wanted
            {
                found.push((rows.start, at..at + n));
            }
            at += n;
        }
        found.sort_by_key(|(start, _)| *start);
        found.into_iter().map(|(_, rows)| rows).collect()
    }
}

/// Every parameter of a model.
pub fn mapping(config: &ModelConfig) -> Vec<Mapped> {
    config.param_specs().into_iter().map(|spec| map(config, spec)).collect()
}

fn map(config: &ModelConfig, spec: ParamSpec) -> Mapped {
    let hidden = config.hidden;
    let (layer, local) = match spec.name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
        Some((number, local)) => (format!("model.layers.{number}."), local),
        None => (String::new(), spec.name.as_str()),
    };
    let same = |name: &str| (Pack::Same, vec![(format!("{layer}{name}"), spec.shape.clone())]);
    let (pack, sources) = match local {
        "embedding.weight" => (Pack::Padded, vec![("model.embed_tokens.weight".to_string(), vec![config.vocab_size, hidden])]),
        "head.weight" => (Pack::Padded, vec![("lm_head.weight".to_string(), vec![config.vocab_size, hidden])]),
        "reward.weight" => same("score.weight"),
        "reward.bias" => same(SCORE_BIAS),
        "final_norm.weight" => same("model.norm.weight"),
        "final_norm.bias" => same("model.norm.bias"),
        "attention_norm.weight" => same("input_layernorm.weight"),
        "attention_norm.bias" => same("input_layernorm.bias"),
        "mlp_norm.weight" => same("post_attention_layernorm.weight"),
        "mlp_norm.bias" => same("post_attention_layernorm.bias"),
        "attention.out.weight" => same("self_attn.o_proj.weight"),
        "mlp.down.weight" => same("mlp.down_proj.weight"),
        "attention.qkv.weight" => {
            let (query, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
            let source = |(letter, rows): (&str, usize)| (format!("{layer}self_attn.{letter}_proj.weight"), vec![rows, hidden]);
            (Pack::Qkv, [("q", query), ("k", kv), ("v", kv)].map(source).to_vec())
        }
        "mlp.up.weight" if config.activation.inputs_per_output() == 2 => {
            let source = |part: &str| (format!("{layer}mlp.{part}_proj.weight"), vec![config.ffn_hidden, hidden]);
            (Pack::GateUp, ["gate", "up"].map(source).to_vec())
        }
        "mlp.up.weight" => same("mlp.up_proj.weight"),
        other => panic!("{other} has no Hugging Face name"),
    };
    Mapped { name: spec.name, shape: spec.shape, sources, pack }
}
