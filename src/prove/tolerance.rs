//! How much two computations of the same numbers may differ that add in other orders. The derivation stands in `prove`.

use crate::model::config::ModelConfig;
use crate::tensor::DType;

/// Two computations, each within three times its expected error.
const K: f64 = 4.0;

/// Half the distance of 1 and the next number.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F8E4M3 => 2f64.powi(-4),
        DType::BF16 => 2f64.powi(-9),
        DType::F32 | DType::U32 => 2f64.powi(-24),
    }
}

/// What rounding depends on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tolerance {
    gradient: f64,
    operations: f64,
    dtype: DType,
    init_std: f64,
}

impl Tolerance {
    /// Of a model whose weights and activations are stored as `dtype`, for steps of so many tokens, with products divided by `tp`.
    pub fn new(model: &ModelConfig, dtype: DType, step_tokens: usize, tp: usize) -> Tolerance {
        let sums = [model.hidden, model.ffn_hidden, model.n_heads * model.head_dim, model.padded_vocab(), step_tokens];
        let longest = sums.into_iter().max().unwrap_or(1) as f64;
        let operations = 2.0 * (6.0 * model.n_layers as f64 + 3.0);
        let of_sums = unit_roundoff(DType::F32) * (longest * operations).sqrt();
        let of_storage = if dtype == DType::BF16 { unit_roundoff(dtype) * (tp as f64 * operations).sqrt() } else { 0.0 };
        Tolerance { gradient: K * (of_sums + of_storage), operations, dtype, init_std: model.init_std }
    }

    /// The same where the linear layers of `n_layers` blocks multiply E4M3.
    pub fn with_fp8(self, n_layers: usize) -> Tolerance {
        let products = 8.0 * n_layers as f64;
        Tolerance { gradient: self.gradient + K * unit_roundoff(DType::F8E4M3) * (products * 2.0 / 3.0).sqrt(), ..self }
    }

    /// |a - b| / |b| of a gradient, a loss or a norm at equal weights.
    pub fn gradient(&self) -> f64 {
        self.gradient
    }

    /// The same in step `step` (from 1) of a run with this learning rate, whose weights differ since the first.
    pub fn gradient_in_step(&self, step: u64, lr: f64) -> f64 {
        self.gradient + self.operations.sqrt() * self.weight_rms(step - 1, lr) / self.init_std
    }

    /// |a - b| of `n_elements` weights of norm `norm` after `steps` steps.
    pub fn weights(&self, steps: u64, lr: f64, n_elements: usize, norm: f64) -> f64 {
        self.weight_rms(steps, lr) * (n_elements as f64).sqrt() + unit_roundoff(self.dtype) * norm
    }

    /// Root mean square of the weights' difference after `steps` steps.
    fn weight_rms(&self, steps: u64, lr: f64) -> f64 {
        (1..=steps).map(|step| 2.0 * lr * self.gradient_in_step(step, lr).min(1.0).sqrt()).sum()
    }
}
