//! The input embedding, rows divided over tensor-parallel ranks.

use super::ctx::Ctx;
use super::param::Param;
use super::{packed, streamed};
use crate::device::ScratchTensor;
use crate::tensor::Tensor;

/// table[V/tp, H]
pub struct VocabParallelEmbedding {
    /// [V/tp, H]
    pub weight: Param,
}

impl VocabParallelEmbedding {
    /// tokens[T] -> x[T', H]: each rank looks up its own rows, the others are zero, and the sum over tp is the embedding.
    pub fn forward(&self, ctx: &Ctx, tokens: &Tensor) -> ScratchTensor {
        let mut partial = ctx.take(&[tokens.n_rows(), self.weight.slice.shape[1]], self.weight.value.dtype());
        let first_row = self.weight.slice.offset[0];
        match (&self.weight.packed, &self.weight.streamed) {
            (Some(table), _) => packed::look_up(ctx, &mut partial, tokens, table, first_row),
            (None, Some(rows)) => streamed::look_up(ctx, &mut partial, tokens, (&self.weight, &**rows)),
            (None, None) => ctx.device.embed(&mut partial, tokens, &self.weight.weight(), first_row),
        }
        ctx.pick_rows(partial) // tp: reduce-scatter or all-reduce
    }

    /// The table's gradient accumulated from dx[T', H].
    pub fn backward(&mut self, ctx: &Ctx, tokens: &Tensor, dx: &Tensor) {
        let dx = ctx.gather_rows(dx); // tp: [T', H] -> [T, H]
        let first_row = self.weight.slice.offset[0];
        ctx.add_token_rows(&mut self.weight, dx.n_rows(), |dtable, rows| {
            ctx.device.embed_backward(dtable, &dx.rows(rows.clone()), &tokens.rows(rows), first_row);
        });
    }
}
