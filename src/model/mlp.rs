//! The feed-forward layer: up, activation, down; columns divided over tensor-parallel ranks.

use super::ctx::Ctx;
use super::linear::{ColumnParallelLinear, RowParallelLinear};
use super::norm::{Norm, Residual};
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
    pub raised: ScratchTensor,
    /// Its output: [T, F/tp].
    activated: ScratchTensor,
}

/// What the weight gradients need once the input gradient is made.
pub struct MlpDeferred {
    /// Input of the down projection: [T, F/tp].
    activated: ScratchTensor,
    /// Gradient of the up projection's output: [T, F/tp] or [T, 2F/tp].
    draised: ScratchTensor,
}

impl Mlp {
    /// x[T', H] -> y[T', H].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> (ScratchTensor, MlpSaved) {
        let saved = self.raise(ctx, x);
        let y = self.down.forward(ctx, &saved.activated);
        (y, saved)
    }

    /// Of the norm of a residual, and nothing is kept: (y[T', H], residual[T', H] as a whole).
    pub fn forward_only(&self, ctx: &Ctx, norm: &Norm, residual: Residual) -> (ScratchTensor, ScratchTensor) {
        let (activated, x) = self.up.forward_normed(ctx, norm, residual, Some(self.activation));
        (self.down.forward(ctx, &activated), x)
    }

    /// Up projection and activation: all that the backward needs, from x[T', H].
    pub fn raise(&self, ctx: &Ctx, x: &Tensor) -> MlpSaved {
        let [raised, activated] = self.up.forward_and_activated(ctx, x, self.activation);
        MlpSaved { raised, activated }
    }

    /// The part without weights, from the up projection's output: all that the backward needs.
    pub fn activate(&self, ctx: &Ctx, raised: ScratchTensor) -> MlpSaved {
        let mut activated = ctx.take(&[raised.n_rows(), raised.row_len() / self.activation.inputs_per_output()], raised.dtype());
        ctx.device.activation(&mut activated, &raised, self.activation);
        MlpSaved { raised, activated }
    }

    /// dx[T', H] assigned from dy[T', H]; weight gradients accumulated.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, saved: &MlpSaved, dy: &Tensor) -> ScratchTensor {
        let draised = self.down.backward_activated(ctx, (&saved.raised, &saved.activated), dy, self.activation);
        self.up.backward(ctx, x, &draised)
    }

    /// The first half of `backward`: dx[T', H] assigned from dy[T', H].
    pub fn backward_input(&self, ctx: &Ctx, saved: MlpSaved, dy: &Tensor) -> (ScratchTensor, MlpDeferred) {
        let draised = self.down.backward_activated_input(ctx, &saved.raised, dy, self.activation);
        (self.up.backward_input(ctx, &draised), MlpDeferred { activated: saved.activated, draised })
    }

    /// The second half: weight gradients accumulated. `x` and `dy` are those of `backward`.
    pub fn backward_weights(&mut self, ctx: &Ctx, x: &Tensor, deferred: &MlpDeferred, dy: &Tensor) {
        self.down.backward_weight(ctx, &deferred.activated, dy);
        self.up.backward_weight(ctx, x, &deferred.draised);
    }
}
