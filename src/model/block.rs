//! One transformer block, pre-norm: x + attention(norm(x)), then + mlp(norm(.)). The last addition is left to the next norm.
//!
//! [`Recompute`] decides what of the forward is kept until the backward, [`BlockKept`]; the backward begins with
//! `Block::restore`, which makes the rest again by the operations of the forward on their very inputs, so with the same bits.

use super::attention::{Attention, AttentionDeferred, AttentionSaved};
use super::batch::MicroBatch;
use super::ctx::Ctx;
use super::mlp::{Mlp, MlpDeferred, MlpSaved};
use super::norm::{Norm, NormSaved, Residual};
use super::param::Param;
use crate::device::{CacheSpan, KvCache, ScratchTensor};
use crate::recipe::Recompute;
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

/// What of it is kept until the backward.
pub enum BlockKept {
    /// All.
    Whole(Box<BlockSaved>),
    /// All but the outputs of the operations without weights: `mixed` and `lse` of the attention, `activated` of the
    /// feed-forward layer.
    Selective(Box<BlockSelective>),
    /// The block's input alone, [T', H].
    Input(ScratchTensor),
}

/// What selective recompute keeps.
pub struct BlockSelective {
    norm1: NormSaved,
    /// [T', H]
    normed1: ScratchTensor,
    /// [T, (A + 2G) D / tp]
    qkv: ScratchTensor,
    norm2: NormSaved,
    /// [T', H]
    normed2: ScratchTensor,
    /// [T, F/tp] or [T, 2F/tp]
    raised: ScratchTensor,
}

/// What the weight gradients need once the input gradient is made: as many bytes as `BlockSaved`, less those of the statistics.
pub struct BlockDeferred {
    /// [T', H]
    normed1: ScratchTensor,
    attention: AttentionDeferred,
    /// Gradient of the attention's output, [T', H].
    dattention: ScratchTensor,
    /// [T', H]
    normed2: ScratchTensor,
    mlp: MlpDeferred,
    /// Gradient of the feed-forward layer's output, [T', H].
    dmlp: ScratchTensor,
}

impl BlockSaved {
    /// The stream after the attention, [T', H]: the block's output is this plus the returned delta.
    pub fn stream(&self) -> &Tensor {
        &self.norm2.x
    }

    /// Drops what `recompute` makes again; the stream comes out by itself when it is not kept.
    pub fn keep(self, recompute: Recompute) -> (BlockKept, Option<ScratchTensor>) {
        let BlockSaved { norm1, normed1, attention, norm2, normed2, mlp } = self;
        match recompute {
            Recompute::None => (BlockKept::Whole(Box::new(BlockSaved { norm1, normed1, attention, norm2, normed2, mlp })), None),
            Recompute::Selective => {
                let (qkv, raised) = (attention.qkv, mlp.raised);
                (BlockKept::Selective(Box::new(BlockSelective { norm1, normed1, qkv, norm2, normed2, raised })), None)
            }
            Recompute::Full => (BlockKept::Input(norm1.x), Some(norm2.x)),
        }
    }

    /// The stream alone, when there is no backward.
    pub fn into_stream(self) -> ScratchTensor {
        self.norm2.x
    }
}

impl BlockKept {
    /// As `BlockSaved::stream`, where it is kept.
    pub fn stream(&self) -> Option<&Tensor> {
        match self {
            BlockKept::Whole(saved) => Some(saved.stream()),
            BlockKept::Selective(kept) => Some(&kept.norm2.x),
            BlockKept::Input(_) => None,
        }
    }
}

impl Block {
    /// Its parameters, in model order.
    pub fn params(&self) -> Vec<&Param> {
        let attention = [&self.attention.qkv.weight, &self.attention.out.weight];
        let mlp = [&self.mlp.up.weight, &self.mlp.down.weight];
        self.attention_norm.params().chain(attention).chain(self.mlp_norm.params()).chain(mlp).collect()
    }

    /// Its parameters, in model order, to change.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let attention = [&mut self.attention.qkv.weight, &mut self.attention.out.weight];
        let mlp = [&mut self.mlp.up.weight, &mut self.mlp.down.weight];
        self.attention_norm.params_mut().chain(attention).chain(self.mlp_norm.params_mut()).chain(mlp).collect()
    }

    /// residual[T', H] -> (delta[T', H], saved); the block's output is saved.stream() + delta.
    pub fn forward(&self, ctx: &Ctx, residual: Residual, batch: &MicroBatch) -> (ScratchTensor, BlockSaved) {
        let (normed1, norm1) = self.attention_norm.forward(ctx, residual);
        let (mixed, attention) = self.attention.forward(ctx, &normed1, batch);
        let (normed2, norm2) = self.mlp_norm.forward(ctx, Residual::Sum { x: &norm1.x, delta: mixed });
        let (delta, mlp) = self.mlp.forward(ctx, &normed2);
        (delta, BlockSaved { norm1, normed1, attention, norm2, normed2, mlp })
    }

    /// What the backward needs, from what was kept.
    pub fn restore(&self, ctx: &Ctx, batch: &MicroBatch, kept: BlockKept) -> BlockSaved {
        match kept {
            BlockKept::Whole(saved) => *saved,
            BlockKept::Selective(kept) => {
                let BlockSelective { norm1, normed1, qkv, norm2, normed2, raised } = *kept;
                let (attention, mlp) = (self.attention.mix(ctx, batch, qkv), self.mlp.activate(ctx, raised));
                BlockSaved { norm1, normed1, attention, norm2, normed2, mlp }
            }
            BlockKept::Input(x) => {
                let (normed1, norm1) = self.attention_norm.forward(ctx, Residual::Whole(x));
                let (mixed, attention) = self.attention.forward(ctx, &normed1, batch);
                let (normed2, norm2) = self.mlp_norm.forward(ctx, Residual::Sum { x: &norm1.x, delta: mixed });
                // The down projection's output is not needed: the backward has its gradient.
                let mlp = self.mlp.raise(ctx, &normed2);
                BlockSaved { norm1, normed1, attention, norm2, normed2, mlp }
            }
        }
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

    /// The first half of `backward`: dx as there; the gradients of the norms accumulated.
    pub fn backward_input(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: BlockSaved, dx: &mut ScratchTensor) -> BlockDeferred {
        let BlockSaved { norm1, normed1, attention, norm2, normed2, mlp } = saved;
        let dmlp = ctx.copy_of(dx); // dx goes on changing
        let (dnormed2, mlp) = self.mlp.backward_input(ctx, mlp, &dmlp);
        self.mlp_norm.backward(ctx, &norm2, &dnormed2, dx);
        drop((dnormed2, norm2));
        let dattention = ctx.copy_of(dx);
        let (dnormed1, attention) = self.attention.backward_input(ctx, batch, attention, &dattention);
        self.attention_norm.backward(ctx, &norm1, &dnormed1, dx);
        BlockDeferred { normed1, attention, dattention, normed2, mlp, dmlp }
    }

    /// The second half: the gradients of the projections accumulated.
    pub fn backward_weights(&mut self, ctx: &Ctx, deferred: &BlockDeferred) {
        self.mlp.backward_weights(ctx, &deferred.normed2, &deferred.mlp, &deferred.dmlp);
        self.attention.backward_weights(ctx, &deferred.normed1, &deferred.attention, &deferred.dattention);
    }

    /// As `forward`, for new tokens of sequences whose past is in the cache: (stream, delta).
    pub fn forward_cached(
        &self,
        ctx: &Ctx,
        residual: Residual,
        new: (&Tensor, &[CacheSpan]),
        cache: &mut KvCache,
    ) -> (ScratchTensor, ScratchTensor) {
        let (mixed, x) = self.attention.forward_cached(ctx, &self.attention_norm, residual, new, cache);
        let (delta, stream) = self.mlp.forward_only(ctx, &self.mlp_norm, Residual::Sum { x: &x, delta: mixed });
        (stream, delta)
    }
}
