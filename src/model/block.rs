//! One transformer block, pre-norm: x + attention(norm(x)), then + mlp(norm(.)). The last addition is left to the next norm.

use super::attention::{Attention, AttentionSaved};
use super::chunk::MicroBatch;
use super::ctx::Ctx;
use super::mlp::{Mlp, MlpSaved};
use super::norm::{Norm, NormSaved, Residual};
use crate::device::{CacheSpan, KvCache, ScratchTensor};
use crate::tensor::Tensor;

/// A block's layers.
pub struct Block {
    /// Before the attention.
    pub attention_norm: Norm,
    /// Attention.
    pub attention: Attention,
    /// Before the feed-forward layer.
    pub mlp_norm: Norm,
    /// Feed-forward layer.
    pub mlp: Mlp,
}

/// What the backward needs, and the residual stream that the next norm adds to.
pub struct BlockSaved {
    norm1: NormSaved,
    /// norm1's output [T', H].
    normed1: ScratchTensor,
    attention: AttentionSaved,
    norm2: NormSaved,
    /// norm2's output [T', H].
    normed2: ScratchTensor,
    mlp: MlpSaved,
}

impl BlockSaved {
    /// The stream after the attention, [T', H]: the block's output is this plus the returned delta.
    pub fn stream(&self) -> &Tensor {
        &self.norm2.x
    }
}

impl Block {
    /// residual[T', H] -> (delta[T', H], saved); the block's output is saved.stream() + delta.
    pub fn forward(&self, ctx: &Ctx, residual: Residual, batch: &MicroBatch) -> (ScratchTensor, BlockSaved) {
        let (normed1, norm1) = self.attention_norm.forward(ctx, residual);
        let (mixed, attention) = self.attention.forward(ctx, &normed1, batch);
        let (normed2, norm2) = self.mlp_norm.forward(ctx, Residual::Sum { x: &norm1.x, delta: mixed });
        let (delta, mlp) = self.mlp.forward(ctx, &normed2);
        (delta, BlockSaved { norm1, normed1, attention, norm2, normed2, mlp })
    }

    /// dx[T', H] comes in as the gradient of the block's output and goes out as that of its input; weight gradients
    /// accumulated.
    pub fn backward(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: &BlockSaved, dx: &mut ScratchTensor) {
        let dnormed2 = self.mlp.backward(ctx, &saved.normed2, &saved.mlp, dx);
        self.mlp_norm.backward(ctx, &saved.norm2, &dnormed2, dx);
        drop(dnormed2);
        let dnormed1 = self.attention.backward(ctx, &saved.normed1, batch, &saved.attention, dx);
        self.attention_norm.backward(ctx, &saved.norm1, &dnormed1, dx);
    }

    /// As `forward`, for new tokens of sequences whose past is in the cache: (stream, delta).
    pub fn forward_cached(
        &self,
        ctx: &Ctx,
        residual: Residual,
        new: (&Tensor, &[CacheSpan]),
        cache: &mut KvCache,
    ) -> (ScratchTensor, ScratchTensor) {
        let (positions, spans) = new;
        let (normed1, norm1) = self.attention_norm.forward(ctx, residual);
        let mixed = self.attention.forward_cached(ctx, &normed1, positions, spans, cache);
        let (normed2, norm2) = self.mlp_norm.forward(ctx, Residual::Sum { x: &norm1.x, delta: mixed });
        let (delta, _) = self.mlp.forward(ctx, &normed2);
        (norm2.x, delta)
    }
}
