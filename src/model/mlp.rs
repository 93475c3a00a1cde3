//! The feed-forward layer: up, activation, down; columns divided over tensor-parallel ranks.

use super::ctx::Ctx;
use super::linear::{ColumnParallelLinear, RowParallelLinear};
use crate::device::{Activation, ScratchTensor};
use crate::tensor::Tensor;

/// Two matrices (squared ReLU), or three of which two are interleaved in `up` (SwiGLU).
pub struct Mlp {
    /// [F / tp, H], or [2F / tp, H] with gate and up rows interleaved.
    pub up: ColumnParallelLinear,
    /// [H, F / tp]
    pub down: RowParallelLinear,
    /// Between them.
    pub activation: Activation,
}

/// What the backward needs.
pub struct MlpSaved {
    /// Input of the activation: [T, F/tp] or [T, 2F/tp].
    raised: ScratchTensor,
    /// Its output: [T, F/tp].
    activated: ScratchTensor,
}

impl Mlp {
    /// x[T', H] -> y[T', H].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> (ScratchTensor, MlpSaved) {
        let raised = self.up.forward(ctx, x);
        let mut activated = ctx.take(&[raised.n_rows(), raised.row_len() / self.activation.inputs_per_output()], raised.dtype());
        ctx.device.activation(&mut activated, &raised, self.activation);
        let y = self.down.forward(ctx, &activated);
        (y, MlpSaved { raised, activated })
    }

    /// dx[T', H] assigned from dy[T', H]; weight gradients accumulated.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, saved: &MlpSaved, dy: &Tensor) -> ScratchTensor {
        let dactivated = self.down.backward(ctx, &saved.activated, dy);
        let mut draised = ctx.take(saved.raised.dims(), saved.raised.dtype());
        ctx.device.activation_backward(&mut draised, &dactivated, &saved.raised, self.activation);
        self.up.backward(ctx, x, &draised)
    }
}
