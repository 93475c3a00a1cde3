//! The model as data: closed enums, sizes, and the one table of parameters that feeds init, optimizer, checkpoint and
//! import/export. Source: Nemotron-4 340B report, section 2.1; transformers' NemotronForCausalLM for the exact equations.

use crate::device::{Activation, Direction, Heads, LinearScaling, Llama3Scaling, NormKind, Rope, RopeScaling, YarnScaling};
use crate::error::{Error, Result};
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::parallel::pieces::TP_PIECES;
use crate::parallel::slice::Slice;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Everything that decides the function the model computes (not how it is trained).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Transformer blocks, `L`.
    pub n_layers: usize,
    /// Width of the residual stream, `H`.
    pub hidden: usize,
    /// Query heads, `A`.
    pub n_heads: usize,
    /// Key/value heads, `G`; divides `A`.
    pub n_kv_heads: usize,
    /// Head dim, `D`; free of hidden / heads (Minitron-8B).
    pub head_dim: usize,
    /// Feed-forward width, `F`.
    pub ffn_hidden: usize,
    /// Pieces of the tokenizer. Embedding rows are padded to a multiple of `vocab_divisor`; the padding never takes part in
    /// the softmax.
    pub vocab_size: usize,
    /// Embedding rows are a multiple of this, whatever the layout (Megatron: 128).
    pub vocab_divisor: usize,
    /// Longest sequence it is trained for.
    pub max_tokens: usize,
    /// Normalisation.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_eps: f32,
    /// Feed-forward activation.
    pub activation: Activation,
    /// Share of each head that is rotated.
    pub rotary_fraction: f64,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// How the frequencies were changed for longer sequences; None: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output layer is the embedding.
    pub tied_embeddings: bool,
    /// What the last layer projects to.
    pub head: HeadKind,
    /// Standard deviation of the initial weights; output projections use init_std / sqrt(2 L) (Megatron's scaled init).
    pub init_std: f64,
}

/// What the last layer projects to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadKind {
    /// Logits over the vocabulary.
    Vocabulary,
    /// This many reward attributes, read at one token of each sequence (HelpSteer2), with a bias.
    Reward(usize),
}

/// How a parameter is divided over tensor-parallel ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// Every rank has all of it.
    None,
    /// Equal blocks of rows (column-parallel linears [out, in], embeddings).
    Rows,
    /// Equal blocks of columns (row-parallel linears [out, in]).
    Columns,
    /// Blocks of as many rows each, of a linear that has its columns divided in training: for passes without gradients on a number of
    /// ranks that has no whole pieces of its sums. The last blocks overlap those before, where the rows do not divide.
    Outputs,
}

/// Initial values; counter-based, so they do not depend on the layout.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// All the same.
    Constant(f32),
}

/// Which part of the model a parameter belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Before the first block.
    Embedding,
    /// A block.
    Layer(usize),
    /// After the last block.
    Head,
}

/// One row of the table of parameters.
#[derive(Clone, PartialEq, Debug)]
pub struct ParamSpec {
    /// Its name in checkpoints, e.g. `layers.3.attention.qkv.weight`.
    pub name: String,
    /// Global shape, one or two dims, [out, in] for linears.
    pub shape: Vec<usize>,
    /// Division over tp.
    pub split: Split,
    /// Whether weight decay applies (not to norms and biases).
    pub decay: bool,
    /// Initial values.
    pub init: Init,
    /// Where it belongs.
    pub place: Place,
}

/// Rows of a block of outputs are a multiple of this, where there are as many: what tensor cores and vectors take at once.
const OUTPUT_STEP: usize = 16;
/// A model of more layers is a mistyped one, and the table of its parameters would fill the memory before anything else is found wrong.
const MOST_LAYERS: usize = 10_000;

impl ParamSpec {
    /// The same for passes without gradients over `tp` ranks: see [`Split::Outputs`].
    pub fn of_passes(self, tp: usize) -> ParamSpec {
        let split = if self.split == Split::Columns && TP_PIECES % tp != 0 { Split::Outputs } else { self.split };
        ParamSpec { split, ..self }
    }

    /// Rows of a block of [`Split::Outputs`] on each of `tp` ranks. Block i begins with row min(i * this, rows - this).
    pub fn block_of_outputs(&self, tp: usize) -> usize {
        let rows = self.shape[0];
        rows.div_ceil(tp).next_multiple_of(OUTPUT_STEP).min(rows)
    }

    /// The part of the global tensor that tensor-parallel rank `tp_index` of `tp` holds.
    pub fn tp_slice(&self, tp_index: usize, tp: usize) -> Slice {
        let whole = Slice::whole(&self.shape);
        match self.split {
            Split::None => whole,
            Split::Rows => whole.block(0, tp_index, tp),
            Split::Columns => whole.block(1, tp_index, tp),
            Split::Outputs => {
                let n = self.block_of_outputs(tp);
                let first = (tp_index * n).min(self.shape[0] - n);
                whole.rows(first..first + n)
            }
        }
    }

    /// The rows of its tp slice whose optimizer state rank `at` owns (ZeRO-1): blocks of ceil(rows / dp), the last ones
    /// short or empty.
    pub fn dp_slice(&self, layout: &ParallelLayout, at: Coords) -> Slice {
        let local = self.tp_slice(at.tp, layout.tp);
        let block = local.shape[0].div_ceil(layout.dp);
        local.rows(at.dp * block..(at.dp + 1) * block)
    }

    /// Number of elements of the global tensor.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl ModelConfig {
    /// Rows of the embedding: vocab_size rounded up to a multiple of vocab_divisor.
    pub fn padded_vocab(&self) -> usize {
        self.vocab_size.next_multiple_of(self.vocab_divisor)
    }

    /// Whether the embedding is read at both ends of the model; a reward model has no output layer to tie.
    pub fn ties_embeddings(&self) -> bool {
        self.tied_embeddings && self.head == HeadKind::Vocabulary
    }

    /// Rotated dims of each head: int(head_dim * fraction), the denominator of the frequencies too.
    pub fn rotary_dims(&self) -> usize {
        (self.head_dim as f64 * self.rotary_fraction) as usize
    }

    /// The rotation, forward.
    pub fn rope(&self) -> Rope {
        let (rotary_dims, base) = (self.rotary_dims(), self.rope_base);
        Rope { rotary_dims, base, scaling: self.rope_scaling, direction: Direction::Forward }
    }

    /// Heads on one of `tp` ranks.
    pub fn heads(&self, tp: usize) -> Heads {
        Heads { query: self.n_heads / tp, kv: self.n_kv_heads / tp, dim: self.head_dim }
    }

    /// The table of parameters, in model order.
    pub fn param_specs(&self) -> Vec<ParamSpec> {
        let scaled_std = self.init_std / (2.0 * self.n_layers as f64).sqrt();
        let qkv_rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim;
        let weight = |name: String, shape: [usize; 2], split, std, place| ParamSpec {
            name,
            shape: shape.to_vec(),
            split,
            decay: true,
            init: Init::Normal { std },
            place,
        };
        let norm = |name: String, place, specs: &mut Vec<ParamSpec>| {
            let vector = |name: String, value: f32| ParamSpec {
                name,
                shape: vec![self.hidden],
                split: Split::None,
                decay: false,
                init: Init::Constant(value),
                place,
            };
            match self.norm {
                NormKind::LayerNorm1P => {
                    specs.push(vector(format!("{name}.weight"), 0.0));
                    specs.push(vector(format!("{name}.bias"), 0.0));
                }
                NormKind::RmsNorm => specs.push(vector(format!("{name}.weight"), 1.0)),
            }
        };
        let mut specs = Vec::new();
        let embedding = [self.padded_vocab(), self.hidden];
        specs.push(weight("embedding.weight".into(), embedding, Split::Rows, self.init_std, Place::Embedding));
        for layer in 0..self.n_layers {
            let (at, place) = (format!("layers.{layer}"), Place::Layer(layer));
            norm(format!("{at}.attention_norm"), place, &mut specs);
            specs.push(weight(format!("{at}.attention.qkv.weight"), [qkv_rows, self.hidden], Split::Rows, self.init_std, place));
            let out = [self.hidden, self.n_heads * self.head_dim];
            specs.push(weight(format!("{at}.attention.out.weight"), out, Split::Columns, scaled_std, place));
            norm(format!("{at}.mlp_norm"), place, &mut specs);
            let up = [self.ffn_hidden * self.activation.inputs_per_output(), self.hidden];
            specs.push(weight(format!("{at}.mlp.up.weight"), up, Split::Rows, self.init_std, place));
            specs.push(weight(format!("{at}.mlp.down.weight"), [self.hidden, self.ffn_hidden], Split::Columns, scaled_std, place));
        }
        norm("final_norm".into(), Place::Head, &mut specs);
        match self.head {
            HeadKind::Vocabulary if self.tied_embeddings => {}
            HeadKind::Vocabulary => specs.push(weight("head.weight".into(), embedding, Split::Rows, self.init_std, Place::Head)),
            HeadKind::Reward(n) => {
                specs.push(weight("reward.weight".into(), [n, self.hidden], Split::None, self.init_std, Place::Head));
                let bias = ParamSpec {
                    name: "reward.bias".into(),
                    shape: vec![n],
                    split: Split::None,
                    decay: false,
                    init: Init::Constant(0.0),
                    place: Place::Head,
                };
                specs.push(bias);
            }
        }
        specs
    }

    /// The parameters of one chunk, in model order. With tied embeddings the last chunk holds a second copy of
    /// `embedding.weight` when it is not the first chunk itself.
    pub fn chunk_specs(&self, layout: &ParallelLayout, stage: usize, chunk: usize) -> Vec<ParamSpec> {
        self.specs_of_layers(layout, stage, chunk, layout.layers(stage, chunk, self.n_layers))
    }

    /// The same for a chunk with these layers.
    pub fn specs_of_layers(&self, layout: &ParallelLayout, stage: usize, chunk: usize, layers: Range<usize>) -> Vec<ParamSpec> {
        let (first, last) = (layout.is_first(stage, chunk), layout.is_last(stage, chunk));
        let tied_copy = self.ties_embeddings() && last && !first;
        let here = |spec: &ParamSpec| match spec.place {
            Place::Embedding => first || tied_copy,
            Place::Layer(layer) => layers.contains(&layer),
            Place::Head => last,
        };
        self.param_specs().into_iter().filter(here).collect()
    }

    /// Whether the sizes make sense at all, whatever the layout.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("n_layers", self.n_layers),
            ("hidden", self.hidden),
            ("n_heads", self.n_heads),
            ("n_kv_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
            ("ffn_hidden", self.ffn_hidden),
            ("vocab_size", self.vocab_size),
            ("vocab_divisor", self.vocab_divisor),
            ("max_tokens", self.max_tokens),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(Error::recipe(format!("model.{key} is 0")).remedy("give a positive number"));
            }
        }
        if self.n_layers > MOST_LAYERS {
            return Err(
                Error::recipe(format!("model.n_layers = {}, at most {MOST_LAYERS} are possible", self.n_layers)).remedy("correct it")
            );
        }
        if self.head == HeadKind::Reward(0) {
            return Err(Error::recipe("model.head has 0 reward attributes").remedy("give a positive number"));
        }
        if self.n_heads % self.n_kv_heads != 0 {
            let wrong = format!("model.n_kv_heads = {} does not divide model.n_heads = {}", self.n_kv_heads, self.n_heads);
            return Err(Error::recipe(wrong).remedy("choose a divisor of the query heads"));
        }
        if !(0.0..=1.0).contains(&self.rotary_fraction) || self.rotary_dims() % 2 != 0 {
            let wrong = format!(
                "model.rotary_fraction = {} gives {} rotated dims of head_dim = {}",
                self.rotary_fraction,
                self.rotary_dims(),
                self.head_dim
            );
            return Err(Error::recipe(wrong).remedy("choose a fraction in 0..1 that gives an even number"));
        }
        if !(self.norm_eps > 0.0) || !(self.init_std > 0.0) || !(self.rope_base > 0.0) {
            let wrong =
                format!("model.norm_eps = {}, model.init_std = {}, model.rope_base = {}", self.norm_eps, self.init_std, self.rope_base);
            return Err(Error::recipe(wrong).remedy("all three must be positive"));
        }
        self.rope_scaling.map_or(Ok(()), |scaling| check_scaling(scaling, self.rope_base))
    }

    /// Parameters of the whole model: (embeddings in and out, everything else).
    pub fn n_params(&self) -> (usize, usize) {
        let is_embedding = |spec: &ParamSpec| spec.name == "embedding.weight" || spec.name == "head.weight";
        let specs = self.param_specs();
        let sum = |wanted: bool| specs.iter().filter(|spec| is_embedding(spec) == wanted).map(ParamSpec::n_elements).sum();
        (sum(true), sum(false))
    }

    /// Floating-point operations of one training step for `n_tokens` tokens in sequences of `seq_len`: forward and backward
    /// of all matrix products, with full (non-causal) attention and no recompute, the report's own convention (its table 2).
    pub fn train_flops(&self, n_tokens: usize, seq_len: usize) -> f64 {
        let linears: usize =
            self.param_specs().iter().filter(|s| s.shape.len() == 2 && s.name != "embedding.weight").map(ParamSpec::n_elements).sum();
        let tied = if self.ties_embeddings() { self.padded_vocab() * self.hidden } else { 0 };
        let attention = 2 * self.n_layers * self.n_heads * self.head_dim * seq_len;
        6.0 * n_tokens as f64 * (linears + tied + attention) as f64
    }
}

/// Whether frequencies can be scaled so.
fn check_scaling(scaling: RopeScaling, base: f64) -> Result<()> {
    let wrong = |what: String, remedy: &str| Err(Error::recipe(format!("model.rope_scaling.{what}")).remedy(remedy));
    let (name, factor, original) = match scaling {
        RopeScaling::Linear(LinearScaling { factor }) => ("linear", factor, 1),
        RopeScaling::Llama3(Llama3Scaling { factor, original_max_position_embeddings, .. }) => {
            ("llama3", factor, original_max_position_embeddings)
        }
        RopeScaling::Yarn(YarnScaling { factor, original_max_position_embeddings, .. }) => {
            ("yarn", factor, original_max_position_embeddings)
        }
    };
    if !(factor >= 1.0 && factor.is_finite()) {
        return wrong(format!("{name}.factor = {factor}"), "give the new length over the old, at least 1");
    }
    if original == 0 {
        return wrong(format!("{name}.original_max_position_embeddings = 0"), "give the length of the first training");
    }
    match scaling {
        RopeScaling::Llama3(Llama3Scaling { low_freq_factor: low, high_freq_factor: high, .. }) if !(low > 0.0 && high > low) => wrong(
            format!("llama3 has low_freq_factor = {low}, high_freq_factor = {high}"),
            "give two positive numbers, the first the smaller",
        ),
        RopeScaling::Yarn(YarnScaling { beta_fast: fast, beta_slow: slow, .. }) if !(slow > 0.0 && fast >= slow) => {
            wrong(format!("yarn has beta_fast = {fast}, beta_slow = {slow}"), "give two positive numbers, the second not the larger")
        }
        RopeScaling::Yarn(_) if !(base > 1.0) => {
            wrong(format!("yarn with model.rope_base = {base}"), "give a base above 1, for its ramp divides by the base's logarithm")
        }
        RopeScaling::Yarn(yarn) if !(scaling.attention_factor() > 0.0 && scaling.attention_factor().is_finite()) => {
            let said = [yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim].map(|x| x.map_or("none".into(), |x| x.to_string()));
            let [attention_factor, mscale, all_dim] = said;
            let all = format!("attention_factor = {attention_factor}, mscale = {mscale}, mscale_all_dim = {all_dim}");
            wrong(
                format!("yarn has {all}: cos and sin times {}", scaling.attention_factor()),
                "give a positive factor, or none of the three",
            )
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nemotron-4 340B as published (report table 1, Hugging Face model_config.yaml).
    fn nemotron_340b() -> ModelConfig {
        ModelConfig {
            n_layers: 96,
            hidden: 18432,
            n_heads: 96,
            n_kv_heads: 8,
            head_dim: 192,
            ffn_hidden: 73728,
            vocab_size: 256_000,
            vocab_divisor: 128,
            max_tokens: 4096,
            norm: NormKind::LayerNorm1P,
            norm_eps: 1e-5,
            activation: Activation::SquaredRelu,
            rotary_fraction: 0.5,
            rope_base: 10000.0,
            rope_scaling: None,
            tied_embeddings: false,
            head: HeadKind::Vocabulary,
            init_std: 0.0063,
        }
    }

    /// The table of parameters has the report's 9.4 B embedding and 331.6 B other parameters, to the last one.
    #[test]
    fn counts_of_the_340b_model() {
        assert_eq!(nemotron_340b().n_params(), (9_437_184_000, 331_592_011_776));
        assert_eq!(nemotron_340b().rotary_dims(), 96);
    }

    /// The report's table 2: 6144 GPUs, 2304 sequences of 4096 in 8.0 s at 41.0 % of 989 TFLOP/s (printed to two digits).
    #[test]
    fn flops_reproduce_the_reported_mfu() {
        let flops = nemotron_340b().train_flops(2304 * 4096, 4096);
        let mfu = flops / (8.0 * 6144.0 * 989e12);
        assert!((mfu - 0.410).abs() < 0.003, "{mfu}");
    }

    /// Blocks of outputs have one size on all ranks, reach every row, begin where `Device::join_columns` looks for them, and stand where
    /// ranks have no whole pieces of a sum, there alone.
    #[test]
    fn blocks_of_outputs_reach_every_row() {
        for rows in [1, 5, 16, 24, 40, 48, 100, 576, 18_432] {
            let spec = ParamSpec { shape: vec![rows, 30], split: Split::Columns, ..nemotron_340b().param_specs().remove(0) };
            for tp in [3, 5, 6, 7, 10, 15] {
                let spec = spec.clone().of_passes(tp);
                let n = spec.block_of_outputs(tp);
                let blocks: Vec<Slice> = (0..tp).map(|rank| spec.tp_slice(rank, tp)).collect();
                let first = |rank: usize| (rank * n).min(rows - n);
                assert!((0..tp).all(|rank| blocks[rank] == Slice { offset: vec![first(rank), 0], shape: vec![n, 30] }), "{rows} over {tp}");
                assert!(blocks[0].offset[0] == 0 && blocks.windows(2).all(|w| w[1].offset[0] <= w[0].offset[0] + n), "{rows} over {tp}");
                assert_eq!(blocks[tp - 1].offset[0] + n, rows, "{rows} over {tp}");
            }
            assert!([1, 2, 4, 8].iter().all(|tp| spec.clone().of_passes(*tp) == spec));
        }
    }

    /// Slices of all ranks tile each parameter exactly once, also when dp does not divide the rows.
    #[test]
    fn slices_tile_every_parameter() {
        let mut config = nemotron_340b();
        (config.n_layers, config.hidden, config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_hidden, config.vocab_size) =
            (4, 24, 4, 2, 6, 40, 100);
        for (tp, dp) in [(1, 1), (2, 1), (1, 3), (2, 5)] {
            let layout = ParallelLayout { tp, pp: 1, dp, vp: 1 };
            for spec in config.param_specs() {
                let mut seen = vec![0u8; spec.n_elements()];
                for rank in 0..layout.world() {
                    let at = layout.coords(rank);
                    if spec.split == Split::None && at.tp > 0 {
                        continue;
                    }
                    let slice = spec.dp_slice(&layout, at);
                    let (offset1, shape1) = if slice.shape.len() == 2 { (slice.offset[1], slice.shape[1]) } else { (0, 1) };
                    let columns = spec.shape.get(1).copied().unwrap_or(1);
                    for row in slice.offset[0]..slice.offset[0] + slice.shape[0] {
                        for column in offset1..offset1 + shape1 {
                            seen[row * columns + column] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{} under {layout:?}", spec.name);
            }
        }
    }
}
