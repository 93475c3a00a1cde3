//! Layers out of parameters: which parameter has which place in the model.

use super::attention::Attention;
use super::block::Block;
use super::config::{HeadKind, ModelConfig};
use super::head::OutputHead;
use super::heads::Head;
use super::linear::{ColumnParallelLinear, RowParallelLinear};
use super::mlp::Mlp;
use super::norm::Norm;
use super::param::Param;
use super::reward::RewardHead;
use crate::device::{self, NormKind};
use std::collections::HashMap;

/// The parameters of a chunk by name, until each is taken to its layer.
pub(super) struct Parts {
    pub(super) params: HashMap<String, Param>,
}

impl Parts {
    pub(super) fn take(&mut self, name: &str) -> Param {
        self.params.remove(name).unwrap_or_else(|| panic!("{name} is not in the parameter table"))
    }

    /// Of a layer that only multiplies.
    fn matrix(&mut self, name: &str) -> Param {
        self.take(name).of_products()
    }

    fn norm(&mut self, name: &str, config: &ModelConfig) -> Norm {
        let gain = self.take(&format!("{name}.weight"));
        let bias = (config.norm == NormKind::LayerNorm1P).then(|| self.take(&format!("{name}.bias")));
        Norm { gain, bias, how: device::Norm { kind: config.norm, eps: config.norm_eps } }
    }

    /// `first`: the chunk has the embedding too.
    pub(super) fn head(&mut self, config: &ModelConfig, first: bool) -> Head {
        let norm = self.norm("final_norm", config);
        match config.head {
            HeadKind::Reward(_) => {
                Head::Reward(Box::new(RewardHead { norm, weight: self.take("reward.weight"), bias: self.take("reward.bias") }))
            }
            HeadKind::Vocabulary => {
                let weight = match (config.tied_embeddings, first) {
                    (true, true) => None,
                    (true, false) => Some(self.take("embedding.weight")),
                    (false, _) => Some(self.take("head.weight")),
                };
                Head::Vocabulary(Box::new(OutputHead { norm, weight, vocab_size: config.vocab_size }))
            }
        }
    }

    pub(super) fn block(&mut self, layer: usize, config: &ModelConfig, tp: usize) -> Block {
        let at = format!("layers.{layer}");
        Block {
            attention_norm: self.norm(&format!("{at}.attention_norm"), config),
            attention: Attention {
                qkv: ColumnParallelLinear { weight: self.matrix(&format!("{at}.attention.qkv.weight")) },
                out: RowParallelLinear { weight: self.matrix(&format!("{at}.attention.out.weight")) },
                heads: config.heads(tp),
                rope: config.rope(),
            },
            mlp_norm: self.norm(&format!("{at}.mlp_norm"), config),
            mlp: Mlp {
                up: ColumnParallelLinear { weight: self.matrix(&format!("{at}.mlp.up.weight")) },
                down: RowParallelLinear { weight: self.matrix(&format!("{at}.mlp.down.weight")) },
                activation: config.activation,
            },
        }
    }
}
