//! Grouped-query causal attention with rotary positions; heads divided over tensor-parallel ranks.

use super::chunk::MicroBatch;
use super::ctx::Ctx;
use super::linear::{ColumnParallelLinear, RowParallelLinear};
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
    qkv: ScratchTensor,
    /// [T, A D / tp]
    mixed: ScratchTensor,
    /// [A / tp, T] f32.
    lse: ScratchTensor,
}

impl Attention {
    /// x[T', H] -> y[T', H].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor, batch: &MicroBatch) -> (ScratchTensor, AttentionSaved) {
        let mut qkv = self.qkv.forward(ctx, x);
        // Rows are gathered by now, so positions are those of all T tokens, whatever the sequence parallelism.
        ctx.device.rope(&mut qkv, &batch.positions, self.heads, self.rope);
        let mut mixed = ctx.take(&[qkv.n_rows(), self.heads.query * self.heads.dim], qkv.dtype());
        let mut lse = ctx.take(&[self.heads.query, qkv.n_rows()], DType::F32);
        ctx.device.attention(&mut mixed, &mut lse, &qkv, &batch.sequence_starts, self.heads);
        let y = self.out.forward(ctx, &mixed);
        (y, AttentionSaved { qkv, mixed, lse })
    }

    /// dx[T', H] assigned from dy[T', H]; weight gradients accumulated.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, batch: &MicroBatch, saved: &AttentionSaved, dy: &Tensor) -> ScratchTensor {
        let AttentionSaved { qkv, mixed, lse } = saved;
        let dmixed = self.out.backward(ctx, mixed, dy);
        let mut dqkv = ctx.take(qkv.dims(), qkv.dtype());
        ctx.device.attention_backward(&mut dqkv, &dmixed, mixed, lse, qkv, &batch.sequence_starts, self.heads);
        ctx.device.rope(&mut dqkv, &batch.positions, self.heads, Rope { direction: Direction::Backward, ..self.rope });
        self.qkv.backward(ctx, x, &dqkv)
    }

    /// As `forward`, for new tokens of sequences whose past is in the cache.
    pub fn forward_cached(&self, ctx: &Ctx, x: &Tensor, positions: &Tensor, spans: &[CacheSpan], cache: &mut KvCache) -> ScratchTensor {
        let mut qkv = self.qkv.forward(ctx, x);
        ctx.device.rope(&mut qkv, positions, self.heads, self.rope);
        let mut mixed = ctx.take(&[qkv.n_rows(), self.heads.query * self.heads.dim], qkv.dtype());
        ctx.device.attention_cached(&mut mixed, &qkv, cache, spans, self.heads);
        self.out.forward(ctx, &mixed)
    }
}
