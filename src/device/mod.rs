//! The device: about thirty fused operations, the vocabulary of this model, not a tensor library.
//!
//! Each operation's mathematics, shapes and precision stand here once. Implementations: `cpu` (the reading copy, and the
//! oracle of every other), later `cuda` and `dry`. Arithmetic and accumulation are f32; bf16 is storage, rounded to
//! nearest even once at the store. Compute calls do not return `Result`: a failed launch cannot be repaired by the
//! caller, so it panics with the operation and its shapes, and the hook in `runtime` ends the job.
//!
//! Dimension letters: `T` tokens in a micro-batch, `H` hidden, `F` feed-forward, `V` vocabulary, `A` query heads, `G` kv
//! heads, `D` head dim. `float` means f32 or bf16; all `float` arguments of one call have the same dtype unless said.

mod cache;
pub mod canonical;
pub mod ceiling;
pub mod cpu;
pub mod cuda;
pub mod packed;
pub mod peak;
mod rope;
mod scratch;

use crate::error::Result;
use crate::tensor::{DType, Tensor};
pub use cache::{CacheSpan, KvCache, PAGE_TOKENS};
use canonical::CanonicalSums;
use packed::PackedProducts;
pub use rope::{Direction, LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling};
pub use scratch::{Scratch, ScratchTensor};

/// Transposition and accumulation of a matrix product.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gemm {
    /// Use the transpose of `a`.
    pub trans_a: bool,
    /// Use the transpose of `b`.
    pub trans_b: bool,
    /// Whether `out` is assigned or added to.
    pub out: Store,
}

/// For what a scale of E4M3 elements is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fp8Scales {
    /// One for a whole tensor.
    Tensor,
    /// One for each row: an output channel of a weight, a token of an input.
    Rows,
}

impl Fp8Scales {
    /// What is rounded with such scales.
    pub fn axis(self) -> Fp8Axis {
        match self {
            Fp8Scales::Tensor => Fp8Axis::All,
            Fp8Scales::Rows => Fp8Axis::Rows,
        }
    }
}

/// What is rounded to E4M3 together, with one scale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fp8Axis {
    /// All elements.
    All,
    /// Each row.
    Rows,
    /// Each column, which becomes a row: tensor cores sum 8 bits along rows only.
    Columns,
    /// All elements; columns become rows.
    Transposed,
}

impl Fp8Axis {
    /// How many scales a tensor of these rows and columns has.
    pub fn n_scales(self, (rows, columns): (usize, usize)) -> usize {
        match self {
            Fp8Axis::All | Fp8Axis::Transposed => 1,
            Fp8Axis::Rows => rows,
            Fp8Axis::Columns => columns,
        }
    }

    /// Whether columns become rows.
    pub fn transposes(self) -> bool {
        matches!(self, Fp8Axis::Columns | Fp8Axis::Transposed)
    }
}

/// What happens to the output of an operation that can do either.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Store {
    /// out = value
    Assign,
    /// out += value
    Accumulate,
}

impl Gemm {
    /// out[m,n] = a[m,k] b[k,n]
    pub const NN: Gemm = Gemm { trans_a: false, trans_b: false, out: Store::Assign };
    /// out[m,n] = a[m,k] b[n,k]^T: activations times a weight stored [out, in].
    pub const NT: Gemm = Gemm { trans_a: false, trans_b: true, out: Store::Assign };
    /// out[m,n] = a[k,m]^T b[k,n]: a weight gradient.
    pub const TN: Gemm = Gemm { trans_a: true, trans_b: false, out: Store::Assign };

    /// The same product added to `out`.
    pub const fn accumulate(self) -> Gemm {
        Gemm { out: Store::Accumulate, ..self }
    }
}

/// Attention heads on this rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// Query heads, `A`.
    pub query: usize,
    /// Key/value heads (groups), `G`; divides `A`.
    pub kv: usize,
    /// Head dim, `D`.
    pub dim: usize,
}

impl Heads {
    /// Query heads that share one kv head.
    pub fn queries_per_kv(&self) -> usize {
        self.query / self.kv
    }

    /// Columns of the packed qkv row: (A + 2G) D. The row is G groups, each its A/G query heads, then its key head, then
    /// its value head (Megatron's interleave), so that a tensor-parallel shard is contiguous.
    pub fn qkv_columns(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    /// First column of query head `head` in the packed row.
    pub fn query_column(&self, head: usize) -> usize {
        let per_kv = self.queries_per_kv();
        ((head / per_kv) * (per_kv + 2) + head % per_kv) * self.dim
    }

    /// First column of key head `group` in the packed row.
    pub fn key_column(&self, group: usize) -> usize {
        (group * (self.queries_per_kv() + 2) + self.queries_per_kv()) * self.dim
    }

    /// First column of value head `group` in the packed row.
    pub fn value_column(&self, group: usize) -> usize {
        self.key_column(group) + self.dim
    }
}

/// The normalisation family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// (x - mean) / sqrt(var + eps) * (1 + gain) + bias, biased variance; gain starts at 0 (Megatron's layernorm1p).
    #[serde(rename = "layernorm1p")]
    LayerNorm1P,
    /// x / sqrt(mean(x^2) + eps) * gain; gain starts at 1 (Llama).
    #[serde(rename = "rmsnorm")]
    RmsNorm,
}

/// How to normalise.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Norm {
    /// Which function.
    pub kind: NormKind,
    /// Added to the variance (or the mean square).
    pub eps: f32,
}

/// A norm with its parameters.
#[derive(Clone, Copy)]
pub struct NormOf<'a> {
    /// [H]
    pub gain: &'a Tensor,
    /// [H]; LayerNorm1P only.
    pub bias: Option<&'a Tensor>,
    /// Which, and its epsilon.
    pub how: Norm,
}

/// The feed-forward activation family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// out = max(x, 0)^2; x[T,F] -> out[T,F] (So et al. 2021; Nemotron-4).
    SquaredRelu,
    /// out_i = silu(x_2i) * x_2i+1; x[T,2F] -> out[T,F], gate and up columns interleaved so that shards are contiguous.
    Swiglu,
}

impl Activation {
    /// Columns of the input for one column of the output.
    pub fn inputs_per_output(self) -> usize {
        match self {
            Activation::SquaredRelu => 1,
            Activation::Swiglu => 2,
        }
    }
}

/// One parameter shard for AdamW: all of the same shape.
pub struct AdamwShard<'a> {
    /// f32 master weights, updated.
    pub master: &'a mut Tensor,
    /// First moment, f32, updated.
    pub m: &'a mut Tensor,
    /// Second moment, f32, updated.
    pub v: &'a mut Tensor,
    /// Gradient, f32.
    pub grad: &'a Tensor,
    /// The weight the model computes with, float, assigned from the new master weight.
    pub weight: &'a mut Tensor,
}

/// AdamW (Loshchilov and Hutter 2019), decoupled decay, bias-corrected; the denominator is sqrt(v_hat) + eps.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Adamw {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to sqrt(v_hat).
    pub eps: f32,
    /// Decoupled weight decay; 0 for norms.
    pub weight_decay: f32,
    /// Step number from 1, for the bias correction.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping).
    pub grad_scale: f32,
}

/// How a token is drawn from a row of logits. The distribution is softmax(logit / temperature), cut to the `top_k` most likely tokens,
/// then to the smallest set of most likely ones whose share of what is left reaches `top_p`, then to those with at least `min_p` of the
/// most likely one's probability.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Draw {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// 1 keeps all.
    pub top_p: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// 0 keeps all.
    pub min_p: f64,
    /// The noise, in (0, 1): the token is the one at which the running share, most likely first, exceeds it.
    pub uniform: f64,
}

/// A drawn token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drawn {
    /// Its column. Equal logits are ordered by column.
    pub token: u32,
    /// Its log-probability under softmax(logits).
    pub logprob: f64,
}

/// Live and peak memory of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryUse {
    /// Bytes allocated now.
    pub live_bytes: usize,
    /// Most bytes allocated at one time.
    pub peak_bytes: usize,
    /// Allocations so far.
    pub n_allocations: usize,
}

/// Panics unless the parts join into `out`: see [`Device::join_columns`].
fn assert_joins(out: &Tensor, parts: &Tensor) {
    let (t, columns, width) = (out.n_rows(), out.row_len(), parts.row_len());
    let fits = width > 0 && width <= columns && parts.n_rows() >= columns.div_ceil(width) * t && out.dtype() == parts.dtype();
    assert!(fits, "join_columns of {parts:?} to {out:?}");
}

/// Operations recorded by [`Device::record`], on the tensors they were recorded with, all of which must live as long as it.
pub trait Recording: Send {
    /// Asks for them again, on what the tensors hold now. The caches are used at `spans`: as many as at the recording, each of one new
    /// token in the same row, in any pages. False, and nothing is done, when one has outgrown the recording: then record anew.
    fn replay(&self, spans: &[CacheSpan]) -> bool;
}

/// The operations. See the head of this file for letters and precision.
pub trait Device: Send + Sync {
    /// For people: "cpu, 2 threads, avx512 avx512bf16".
    fn name(&self) -> String;
    /// Sums in a canonical order, where the device has them: `numerics.mode = "reproducible"` needs them.
    fn canonical(&self) -> Option<&dyn CanonicalSums> {
        None
    }
    /// Products with weights in a form of its own, where the device has one.
    fn packed(&self) -> Option<&dyn PackedProducts> {
        None
    }

    /// Zeroed memory. Err when there is none left.
    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;
    /// Host bytes to the device; sizes equal.
    fn upload(&self, host: &[u8], to: &mut Tensor);
    /// Device bytes to the host; sizes equal.
    fn download(&self, from: &Tensor, host: &mut [u8]);
    /// Live and peak memory.
    fn memory(&self) -> MemoryUse;
    /// Waits until everything asked for is done.
    fn finish(&self);
    /// Runs `work`, which asks for many small operations one after another and waits for nobody else, where asking for them costs least.
    fn run_together(&self, work: &mut (dyn FnMut() + Send)) {
        work();
    }
    /// Whether `record` records.
    fn records(&self) -> bool {
        false
    }
    /// Records the operations that `work` asks for without doing them; they must have been done before, once, on tensors of the same
    /// shapes. They may neither move bytes between host and device nor return a number, nor write positions that they rotate by;
    /// collectives among them are those of a recordable communicator. `None` where this brings nothing or cannot be done: then ask for
    /// them each time.
    fn record(&self, _work: &mut dyn FnMut()) -> Option<Box<dyn Recording>> {
        None
    }

    /// x = 0
    fn fill_zero(&self, x: &mut Tensor);
    /// out = x, converting between f32 and bf16 if the dtypes differ. Equal element counts.
    fn copy(&self, out: &mut Tensor, x: &Tensor);
    /// x += y; dtypes may differ.
    fn add(&self, x: &mut Tensor, y: &Tensor);
    /// out[T,C] = parts[n T, W] beside each other, float of one dtype, n W >= C >= W: out[t, c] = parts[b T + t, c - min(b W, C - W)] with
    /// b = c / W. So part b has the columns from min(b W, C - W) on: where W does not divide C, the last parts overlap those before.
    fn join_columns(&self, out: &mut Tensor, parts: &Tensor);
    /// x *= factor
    fn scale(&self, x: &mut Tensor, factor: f32);
    /// Sum of squares of an f32 tensor, accumulated in f64 over fixed blocks of 4096 elements in order, so the value does
    /// not depend on the number of threads.
    fn sum_squares(&self, x: &Tensor) -> f64;
    /// The same of several, added in order. The host waits once for all of them.
    fn sum_squares_of(&self, all: &[&Tensor]) -> f64 {
        all.iter().map(|x| self.sum_squares(x)).sum()
    }

    /// out[m,n] = or += op(a)[m,k] op(b)[k,n]. a and b both f32 or both bf16; out f32 or bf16 (bf16 out only from bf16
    /// inputs). Accumulates in f32.
    fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm);

    /// Err, in one line, where products of E4M3 cannot be made.
    fn check_fp8(&self, scales: Fp8Scales) -> Result<()>;
    /// sizes f32 assigned = the largest |x| of each row [R], of each column [C], or of all [1] of x[R, C] float; 0 of nothing. NaN is
    /// passed over.
    fn fp8_sizes(&self, sizes: &mut Tensor, x: &Tensor, of: Fp8Axis);
    /// `scale` f32 holds sizes as [`Device::fp8_sizes`] made them (or the largest of several ranks') and becomes the scales: of each
    /// the smallest power of two s, at least 2^-117, with size <= 448 s; 1 for 0, and what is not finite as it is. out E4M3 assigned =
    /// x / s to nearest even, at most 448 in size, NaN for what is not a number or whose scale is infinite: [R, C], or transposed
    /// [C, R] for `Columns` and `Transposed`.
    ///
    /// With powers of two, x / s and s times an element are exact (in bf16 too), so scales can be taken out of a sum or left in it:
    /// sums keep their bits under every order that the same sums of floats have. A finer scale would gain nothing but at the edge of
    /// the range, as E4M3 has the same relative spacing at every exponent.
    fn fp8_round(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis);
    /// Both: `scale` is assigned.
    fn quantise(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        self.fp8_sizes(scale, x, of);
        self.fp8_round(out, scale, x, of);
    }
    /// out[R, C] float = the numbers that E4M3 elements stand for: times their scales, [R] or [1]. Exact.
    fn fp8_widen(&self, out: &mut Tensor, codes: &Tensor, scale: &Tensor);
    /// out[m,n] float = sum over k of a[m,k] b[n,k], E4M3, times their scales, powers of two: [m] and [n], or [1] and [1]. k and n are
    /// multiples of 16, as tensor cores want them. Accumulates in f32, or as the tensor cores of 8 bits do: Hopper's keep about 14 bits
    /// between additions to f32 (DeepSeek-AI 2024, section 3.3.2).
    fn gemm_fp8(&self, out: &mut Tensor, a: (&Tensor, &Tensor), b: (&Tensor, &Tensor));

    /// out[T,H] = table[token - first_row] where that row is in table[V/tp,H], else -0, so that the sum over ranks keeps the sign of a
    /// zero. tokens[T] u32.
    fn embed(&self, out: &mut Tensor, tokens: &Tensor, table: &Tensor, first_row: usize);
    /// dtable[V/tp,H] f32 += rows of dout[T,H] float, added in token order.
    fn embed_backward(&self, dtable: &mut Tensor, dout: &Tensor, tokens: &Tensor, first_row: usize);

    /// out[T,H] = norm(x[T,H]); stats[T,2] f32 = (mean, 1/sqrt(var + eps)); mean is 0 for RMSNorm. gain[H], bias[H] float;
    /// bias only for LayerNorm1P.
    fn norm(&self, out: &mut Tensor, stats: &mut Tensor, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, how: Norm);
    /// x += delta, then as `norm` of the sum as it was rounded to x's dtype. One pass over memory.
    #[allow(clippy::too_many_arguments)]
    fn add_norm(
        &self,
        x: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
        stats: &mut Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        how: Norm,
    );
    /// dx[T,H] float += gradient through the norm; dgain[H] and dbias[H] f32 accumulated in row order over fixed blocks.
    /// `x` is the input of the norm, `dy` the gradient of its output.
    #[allow(clippy::too_many_arguments)]
    fn norm_backward(
        &self,
        dx: &mut Tensor,
        dgain: &mut Tensor,
        dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        gain: &Tensor,
        stats: &Tensor,
        how: Norm,
    );

    /// Rotates queries and keys of the packed qkv[T, (A+2G)D] in place, and multiplies their rotated dims by the attention factor, forward
    /// and backward alike; positions[T] u32.
    fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope);

    /// Causal attention within each sequence: out[T, A*D] float; lse[A, T] f32 = log-sum-exp of the scaled scores, kept for
    /// the backward. Scale 1/sqrt(D). `sequence_starts` = [0, .., T], ascending: sequence i is rows s[i]..s[i+1].
    /// Online softmax in tiles, never a T x T matrix.
    fn attention(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads);
    /// As `attention`, of sequences whose first wanted[i] rows nobody asks for: theirs of out and lse are unspecified, the others have
    /// the bits that `attention` gives them.
    fn attention_from(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], _wanted: &[usize], heads: Heads) {
        self.attention(out, lse, qkv, sequence_starts, heads);
    }
    /// dqkv[T, (A+2G)D] float assigned from dout[T, A*D].
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
    );
    /// `attention_backward`, then `rope` of dqkv, backward: gradients of queries and keys as they were before they were rotated. The bits
    /// are those of the two.
    #[allow(clippy::too_many_arguments)]
    fn attention_rope_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        positions: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
        how: Rope,
    ) {
        self.attention_backward(dqkv, dout, out, lse, qkv, sequence_starts, heads);
        self.rope(dqkv, positions, heads, how);
    }
    /// For each span: appends its new (rotated) keys and its values to the cache, then out rows = causal attention of its
    /// new queries over past and new tokens. Cost is that of the tokens present, not of the cache's size. On a device with canonical
    /// sums a row's bits depend on its query and the keys and values that it sees only.
    fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads);
    /// A hint that `attention_cached` comes soon with this cache and these spans. It changes no result.
    fn attention_comes(&self, _cache: &KvCache, _spans: &[CacheSpan]) {}

    /// `rope` of qkv forward, then `attention_cached`: a pass over a cache. What is in qkv afterwards is unspecified.
    #[allow(clippy::too_many_arguments)]
    fn rope_attention_cached(
        &self,
        out: &mut Tensor,
        qkv: &mut Tensor,
        positions: &Tensor,
        cache: &mut KvCache,
        spans: &[CacheSpan],
        heads: Heads,
        how: Rope,
    ) {
        self.rope(qkv, positions, heads, how);
        self.attention_cached(out, qkv, cache, spans, heads);
    }

    /// out[T,F] = activation(x[T, F * inputs_per_output]).
    fn activation(&self, out: &mut Tensor, x: &Tensor, kind: Activation);
    /// out[T,F] = activation(x[T,H] w[F * inputs_per_output, H]^T), the product rounded to its dtype before: the bits of `gemm`, then
    /// `activation`. raised[T, F * inputs_per_output] is room for the product; what is in it afterwards is unspecified.
    fn gemm_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        self.gemm(raised, x, w, Gemm::NT);
        self.activation(out, raised, kind);
    }
    /// raised[T, F * inputs_per_output] = x[T,H] w^T and out[T,F] = activation(raised), both assigned: `gemm`, then `activation`, in one
    /// pass where that takes less time. Then the product is summed in another order.
    fn gemm_and_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        self.gemm(raised, x, w, Gemm::NT);
        self.activation(out, raised, kind);
    }
    /// Whether `add_norm_gemm` is less work than what it stands for, of so many rows x[T,H] and this w.
    fn takes_norms(&self, _x: &Tensor, _w: &Tensor) -> bool {
        false
    }
    /// sum = x + delta as rounded, out[T,N] = norm(sum[T,H]) w[N,H]^T, or its activation: the bits of `add_norm`, then `gemm` or
    /// `gemm_activation`. x and delta stay as they were. Asked for where `takes_norms` says so.
    fn add_norm_gemm(
        &self,
        out: &mut Tensor,
        sum: &mut Tensor,
        [x, delta]: [&Tensor; 2],
        norm: NormOf,
        w: &Tensor,
        kind: Option<Activation>,
    ) {
        let take = |dims: &[usize], dtype| self.alloc(dims, dtype).unwrap_or_else(|error| panic!("add_norm_gemm: {error}"));
        let (mut normed, mut stats) = (take(x.dims(), x.dtype()), take(&[x.n_rows(), 2], DType::F32));
        self.copy(sum, x);
        self.add_norm(sum, delta, &mut normed, &mut stats, norm.gain, norm.bias, norm.how);
        match kind {
            None => self.gemm(out, &normed, w, Gemm::NT),
            Some(kind) => self.gemm_activation(out, &mut take(&[x.n_rows(), w.n_rows()], x.dtype()), &normed, w, kind),
        }
    }
    /// dx assigned from dout[T,F]; x is the input of the activation.
    fn activation_backward(&self, dx: &mut Tensor, dout: &Tensor, x: &Tensor, kind: Activation);

    /// draised assigned = `activation_backward` of dout[T,F] = dy[T,H] w[H,F], rounded to its dtype, where raised was the activation's
    /// input: as `gemm_and_activation`. dout is room for the product; what is in it afterwards is unspecified.
    fn gemm_activation_backward(
        &self,
        draised: &mut Tensor,
        dout: &mut Tensor,
        dy: &Tensor,
        w: &Tensor,
        raised: &Tensor,
        kind: Activation,
    ) {
        self.gemm(dout, dy, w, Gemm::NN);
        self.activation_backward(draised, dout, raised, kind);
    }

    /// max[T] f32 = largest of the first n_valid columns of logits[T, V/tp] float (-inf when n_valid = 0).
    fn cross_entropy_max(&self, max: &mut Tensor, logits: &Tensor, n_valid: usize);
    /// sum[T] f32 = sum over the first n_valid columns of exp(logit - max); target_logit[T] f32 = logit of column
    /// target - first_row if that column is here, else 0. targets[T] u32. max is the maximum over the whole vocabulary.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy_sum(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    );
    /// Both of one rank's columns in one pass: max[T] f32 = largest of the first n_valid columns, sum[T] f32 = sum of their
    /// exp(logit - max), target_logit as above.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy_forward(
        &self,
        max: &mut Tensor,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    );
    /// logits = weight[t] * (exp(logit - max) / sum - [column is target]) in place; 0 in columns past n_valid and in rows
    /// of weight 0. weights[T] f32.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy_gradient(
        &self,
        logits: &mut Tensor,
        max: &Tensor,
        sum: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        first_row: usize,
        n_valid: usize,
    );

    /// One token for each row of logits[T, V] float, of its first n_valid columns: `draws`[T]. `None` where the device leaves it to the
    /// host, which then downloads the logits.
    fn sample(&self, _logits: &Tensor, _n_valid: usize, _draws: &[Draw]) -> Option<Vec<Drawn>> {
        None
    }

    /// One AdamW step on a shard, one pass over memory.
    fn adamw(&self, shard: AdamwShard<'_>, how: Adamw);
}
