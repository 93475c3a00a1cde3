//! Grouped-query causal attention with rotary positions; heads divided over tensor-parallel ranks.

use super::batch::MicroBatch;
use super::ctx::Ctx;
use super::linear::{ColumnParallelLinear, RowParallelLinear};
use super::norm::{Norm, Residual};
use super::shared;
use crate::device::{CacheSpan, Direction, Heads, KvCache, Rope, ScratchTensor};
use crate::tensor::{DType, Tensor};

/// qkv projection, attention, output projection.
pub struct Attention {
    /// [(A + 2G) D / tp, H], in groups: A/G queries, key, value.
    pub qkv: ColumnParallelLinear,
    /// [H, A D / tp]
    pub out: RowParallelLinear,
    /// Heads on this rank.
    pub heads: Heads,
    /// Rotation, forward direction.
    pub rope: Rope,
}

/// What the backward needs.
pub struct AttentionSaved {
    /// Packed and rotated: [T, (A + 2G) D / tp].
    pub qkv: ScratchTensor,
    /// [T, A D / tp]
    mixed: ScratchTensor,
    /// [A / tp, T] f32.
    lse: ScratchTensor,
}

/// What the weight gradients need once the input gradient is made.
pub struct AttentionDeferred {
    /// Input of the output projection, [T, A D / tp].
    mixed: ScratchTensor,
    /// Gradient of the qkv projection's output: [T, (A + 2G) D / tp].
    dqkv: ScratchTensor,
}

impl Attention {
    /// x[T', H] -> y[T', H].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor, batch: &MicroBatch) -> (ScratchTensor, AttentionSaved) {
        let mut qkv = self.qkv.forward(ctx, x);
        // Rows are gathered by now, so positions are those of all T tokens, whatever the sequence parallelism.
        ctx.device.rope(&mut qkv, &batch.positions, self.heads, self.rope);
        let saved = match &batch.shared {
            None => self.mix(ctx, batch, qkv),
            Some(sequences) => {
                let mixed = shared::attention(ctx, sequences, &qkv, self.heads);
                AttentionSaved { qkv, mixed, lse: ctx.take(&[1], DType::F32) } // there is no backward
            }
        };
        let y = self.out.forward(ctx, &saved.mixed);
        (y, saved)
    }

    /// The part without weights, from the packed and rotated qkv: all that the backward needs.
    pub fn mix(&self, ctx: &Ctx, batch: &MicroBatch, qkv: ScratchTensor) -> AttentionSaved {
        let mut mixed = ctx.take(&[qkv.n_rows(), self.heads.query * self.heads.dim], qkv.dtype());
        let mut lse = ctx.take(&[self.heads.query, qkv.n_rows()], DType::F32);
        ctx.device.attention(&mut mixed, &mut lse, &qkv, &batch.sequence_starts, self.heads);
        AttentionSaved { qkv, mixed, lse }
    }

    /// dx[T', H] assigned from dy[T', H]; weight gradients accumulated.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, batch: &MicroBatch, saved: &AttentionSaved, dy: &Tensor) -> ScratchTensor {
        let dmixed = self.out.backward(ctx, &saved.mixed, dy);
        let dqkv = self.mix_backward(ctx, batch, saved, &dmixed);
        self.qkv.backward(ctx, x, &dqkv)
    }

    /// The first half of `backward`: dx[T', H] assigned from dy[T', H].
    pub fn backward_input(&self, ctx: &Ctx, batch: &MicroBatch, saved: AttentionSaved, dy: &Tensor) -> (ScratchTensor, AttentionDeferred) {
        let dmixed = self.out.backward_input(ctx, dy);
        let dqkv = self.mix_backward(ctx, batch, &saved, &dmixed);
        (self.qkv.backward_input(ctx, &dqkv), AttentionDeferred { mixed: saved.mixed, dqkv })
    }

    /// The second half: weight gradients accumulated. `x` and `dy` are those of `backward`.
    pub fn backward_weights(&mut self, ctx: &Ctx, x: &Tensor, deferred: &AttentionDeferred, dy: &Tensor) {
        self.out.backward_weight(ctx, &deferred.mixed, dy);
        self.qkv.backward_weight(ctx, x, &deferred.dqkv);
    }

    /// dqkv[T, (A + 2G) D / tp] assigned, as it was before the rotation.
    fn mix_backward(&self, ctx: &Ctx, batch: &MicroBatch, saved: &AttentionSaved, dmixed: &Tensor) -> ScratchTensor {
        let AttentionSaved { qkv, mixed, lse } = saved;
        let (starts, how) = (&batch.sequence_starts, Rope { direction: Direction::Backward, ..self.rope });
        let mut dqkv = ctx.take(qkv.dims(), qkv.dtype());
        ctx.device.attention_rope_backward(&mut dqkv, dmixed, mixed, lse, qkv, &batch.positions, starts, self.heads, how);
        dqkv
    }

    /// As `forward` of the norm of a residual, for new tokens of sequences whose past is in the cache: (y[T, H], residual[T, H] as a
    /// whole).
    pub fn forward_cached(
        &self,
        ctx: &Ctx,
        norm: &Norm,
        residual: Residual,
        (positions, spans): (&Tensor, &[CacheSpan]),
        cache: &mut KvCache,
    ) -> (ScratchTensor, ScratchTensor) {
        ctx.device.attention_comes(cache, spans);
        let (mut qkv, x) = self.qkv.forward_normed(ctx, norm, residual, None);
        let mut mixed = ctx.take(&[qkv.n_rows(), self.heads.query * self.heads.dim], qkv.dtype());
        ctx.device.rope_attention_cached(&mut mixed, &mut qkv, positions, cache, spans, self.heads, self.rope);
        (self.out.forward(ctx, &mixed), x)
    }
}
