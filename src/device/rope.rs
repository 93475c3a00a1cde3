//! Rotary embedding as data: which dims turn, how fast each pair turns, and by how much cos and sin are scaled. One function gives the
//! frequencies, in f64, to every device. Sources: RoFormer (Su et al. 2021) for the rotation; Chen et al. 2023 for linear scaling; YaRN
//! (Peng et al. 2023); the reference code of Llama 3.1; transformers' modeling_rope_utils.py for the names and for what is left open.

use serde::{Deserialize, Serialize};
use std::f64::consts::TAU;

/// Rotary position embedding on the first `rotary_dims` of each query and key head, pairs (i, i + rotary_dims/2), angle = position *
/// frequencies()[i]; cos and sin are multiplied by attention_factor(). Angles, cos and sin in f64, rounded once to f32.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rope {
    /// Rotated dims of each head; even; 0 rotates nothing.
    pub rotary_dims: usize,
    /// Base of the frequencies.
    pub base: f64,
    /// How the frequencies were changed for sequences longer than those of the first training.
    pub scaling: Option<RopeScaling>,
    /// Forward rotation, or the inverse one of the backward pass.
    pub direction: Direction,
}

/// Forward or backward through a rotation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Rotate by +angle.
    Forward,
    /// Rotate by -angle (the transpose: times the same attention factor).
    Backward,
}

/// Rotary frequencies for sequences longer than those that a model was first trained on.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeScaling {
    /// Every frequency divided by the factor (position interpolation).
    Linear(LinearScaling),
    /// Slow frequencies divided by the factor, fast ones kept, a ramp between (Llama 3.1 and later).
    Llama3(Llama3Scaling),
    /// The same idea with the ramp over dims, and a factor on cos and sin, which sharpens attention.
    Yarn(YarnScaling),
}

/// Position interpolation.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearScaling {
    /// New length over old.
    pub factor: f64,
}

/// As Llama 3.1 has it. A pair turns `original_max_position_embeddings` / wavelength times within the old length.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Slow frequencies are divided by it.
    pub factor: f64,
    /// Pairs that turn fewer times within the old length are slow.
    pub low_freq_factor: f64,
    /// Pairs that turn more times are fast.
    pub high_freq_factor: f64,
    /// Length of the first training.
    pub original_max_position_embeddings: usize,
}

/// YaRN.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnScaling {
    /// New length over old: slow frequencies are divided by it.
    pub factor: f64,
    /// Length of the first training.
    pub original_max_position_embeddings: usize,
    /// The ramp begins at the dim whose pair turns so many times within the old length (32 in the paper).
    pub beta_fast: f64,
    /// It ends where a pair turns so many times (1 in the paper).
    pub beta_slow: f64,
    /// Whether the ramp begins and ends at whole dims.
    pub truncate: bool,
    /// On cos and sin. None: 0.1 ln(factor) + 1, or by `mscale` and `mscale_all_dim`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// With `mscale_all_dim`, neither of them 0: the attention factor is (0.1 mscale ln(factor) + 1) over the same of mscale_all_dim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// See `mscale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
}

impl Rope {
    /// Radians per position of each pair: [rotary_dims / 2].
    pub fn frequencies(&self) -> Vec<f64> {
        let plain = |i: usize| self.base.powf(-2.0 * i as f64 / self.rotary_dims as f64);
        let pairs = 0..self.rotary_dims / 2;
        match self.scaling {
            None => pairs.map(plain).collect(),
            Some(RopeScaling::Linear(LinearScaling { factor })) => pairs.map(|i| plain(i) / factor).collect(),
            Some(RopeScaling::Llama3(how)) => pairs.map(|i| how.frequency(plain(i))).collect(),
            Some(RopeScaling::Yarn(how)) => {
                let ramp = how.ramp(self.rotary_dims, self.base);
                pairs.map(|i| interpolate(plain(i), how.factor, ramp(i))).collect()
            }
        }
    }

    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        self.scaling.map_or(1.0, |scaling| scaling.attention_factor())
    }

    /// Whether the angles and factors of both are the same, whatever the direction.
    pub fn turns_like(&self, other: &Rope) -> bool {
        Rope { direction: other.direction, ..*self } == *other
    }
}

impl RopeScaling {
    /// What cos and sin are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self {
            RopeScaling::Linear(_) | RopeScaling::Llama3(_) => 1.0,
            RopeScaling::Yarn(how) => how.attention_factor(),
        }
    }
}

/// A frequency divided by the factor in part: kept at share 0, divided at share 1.
fn interpolate(frequency: f64, factor: f64, share: f64) -> f64 {
    frequency / factor * share + frequency * (1.0 - share)
}

impl Llama3Scaling {
    fn frequency(&self, plain: f64) -> f64 {
        let turns = self.original_max_position_embeddings as f64 * plain / TAU;
        let kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        interpolate(plain, self.factor, 1.0 - kept.clamp(0.0, 1.0))
    }
}

impl YarnScaling {
    /// The share of each pair that is interpolated.
    fn ramp(&self, rotary_dims: usize, base: f64) -> impl Fn(usize) -> f64 {
        // The pair that turns so many times within the old length, as a real number.
        let pair_of =
            |turns: f64| rotary_dims as f64 * (self.original_max_position_embeddings as f64 / (turns * TAU)).ln() / (2.0 * base.ln());
        let (mut begin, mut end) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (begin, end) = (begin.floor(), end.ceil());
        }
        // transformers clamps to dims here, not to pairs.
        (begin, end) = (begin.max(0.0), end.min(rotary_dims as f64 - 1.0));
        if begin == end {
            end += 0.001; // no division by zero: a step
        }
        move |pair| ((pair as f64 - begin) / (end - begin)).clamp(0.0, 1.0)
    }

    fn attention_factor(&self) -> f64 {
        let of = |mscale: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 };
        let is_said = |mscale: &f64| *mscale != 0.0;
        match (self.attention_factor, self.mscale.filter(is_said), self.mscale_all_dim.filter(is_said)) {
            (Some(factor), ..) => factor,
            (None, Some(mscale), Some(all_dim)) => of(mscale) / of(all_dim),
            (None, ..) => of(1.0),
        }
    }
}
