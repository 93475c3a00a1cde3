//! Linear layers divided over tensor-parallel ranks (Shoeybi et al. 2019), without bias. The backward comes whole, or in its
//! two halves for schedules that run them apart (Qi et al. 2023): the gradient of the input, which the layer before waits for,
//! and the gradient of the weight, which nobody waits for. The halves give the bits of the whole.

use super::config::Split;
use super::ctx::{Ctx, Inner};
use super::fp8::Toward;
use super::norm::{Norm, Residual};
use super::numerics::Numerics;
use super::param::Param;
use super::{fp8, packed, streamed};
use crate::device::{Activation, Gemm, NormOf, ScratchTensor};
use crate::tensor::Tensor;

/// y[T, O/tp] = x[T, I] W^T, W[O/tp, I]: each rank has a block of the outputs.
pub struct ColumnParallelLinear {
    /// [O/tp, I]
    pub weight: Param,
}

/// y[T, O] = sum over ranks of x[T, I/tp] W^T, W[O, I/tp]: each rank has a block of the inputs.
///
/// Where the ranks have no whole pieces of the sum over I (tp 3, 5, 6, 7, ..; see `numerics`), passes without gradients divide the
/// outputs instead: each rank has all inputs of a block of outputs, [`Split::Outputs`], and the same memory. The inputs are gathered, each
/// output is summed on one rank as a single rank would, and the outputs are gathered: a rank receives (tp - 1) / tp (I + O) numbers a
/// token in the dtype of the activations, where the sum of a divided I takes 2 (tp - 1) / tp O of f32. In bf16 that is half of it where
/// I = O, as in attention, as much where I = 3 O, and a quarter more where I = 4 O.
pub struct RowParallelLinear {
    /// [O, I/tp], or [O/tp, I] with [`Split::Outputs`].
    pub weight: Param,
}

impl ColumnParallelLinear {
    /// x[T', I] -> y[T, O/tp].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> ScratchTensor {
        column_forward(ctx, &self.weight, x)
    }

    /// The activation of what `forward` gives, x[T', I] -> [T, F/tp]: for passes without a backward.
    pub fn forward_activated(&self, ctx: &Ctx, x: &Tensor, kind: Activation) -> ScratchTensor {
        let (x, weight) = (ctx.gather_rows(x), &self.weight); // tp: [T', I] -> [T, I]
        let [mut raised, mut y] = [1, kind.inputs_per_output()].map(|n| ctx.take(&[x.n_rows(), weight.slice.shape[0] / n], x.dtype()));
        match ctx.numerics {
            Numerics::Fast if is_plain(weight) => ctx.device.gemm_activation(&mut y, &mut raised, &x, &weight.weight(), kind),
            _ if activated_in_one_pass(ctx, (&mut y, &mut raised), &x, weight, kind) => {}
            _ => {
                multiply(ctx, &mut raised, &x, weight, Inner::Whole);
                ctx.device.activation(&mut y, &raised, kind);
            }
        }
        y
    }

    /// What `forward` gives and its activation, which the backward needs both: x[T', I] -> [T, O/tp], [T, F/tp].
    pub fn forward_and_activated(&self, ctx: &Ctx, x: &Tensor, kind: Activation) -> [ScratchTensor; 2] {
        let (x, weight) = (ctx.gather_rows(x), &self.weight); // tp: [T', I] -> [T, I]
        let [mut raised, mut y] = [1, kind.inputs_per_output()].map(|n| ctx.take(&[x.n_rows(), weight.slice.shape[0] / n], x.dtype()));
        match ctx.numerics {
            Numerics::Fast if is_plain(weight) => ctx.device.gemm_and_activation(&mut y, &mut raised, &x, &weight.weight(), kind),
            _ if activated_in_one_pass(ctx, (&mut y, &mut raised), &x, weight, kind) => {}
            _ => {
                multiply(ctx, &mut raised, &x, weight, Inner::Whole);
                ctx.device.activation(&mut y, &raised, kind);
            }
        }
        [raised, y]
    }

    /// Of the norm of a residual, and its activation where `kind` says so: (y[T, O/tp], residual[T', I] as a whole). For passes without a
    /// backward.
    pub fn forward_normed(&self, ctx: &Ctx, norm: &Norm, residual: Residual, kind: Option<Activation>) -> (ScratchTensor, ScratchTensor) {
        normed_forward(ctx, &self.weight, norm, residual, kind, |normed| match kind {
            None => self.forward(ctx, normed),
            Some(kind) => self.forward_activated(ctx, normed, kind),
        })
    }

    /// dx[T', I] assigned; the weight gradient accumulated. `x` is the input of the forward.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) -> ScratchTensor {
        column_backward(ctx, &mut self.weight, x, dy)
    }

    /// The first half of `backward`: dx[T', I] assigned from dy[T, O/tp].
    pub fn backward_input(&self, ctx: &Ctx, dy: &Tensor) -> ScratchTensor {
        column_backward_input(ctx, &self.weight, dy)
    }

    /// The second half: the weight gradient accumulated.
    pub fn backward_weight(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) {
        column_backward_weight(ctx, &mut self.weight, x, dy);
    }
}

/// `ColumnParallelLinear::forward` for a weight that lives elsewhere (a tied embedding).
pub fn column_forward(ctx: &Ctx, weight: &Param, x: &Tensor) -> ScratchTensor {
    let x = ctx.gather_rows(x); // tp: [T', I] -> [T, I]
    let mut y = ctx.take(&[x.n_rows(), weight.slice.shape[0]], x.dtype());
    multiply(ctx, &mut y, &x, weight, Inner::Whole); // y = x W^T
    y
}

/// Whether the weight is multiplied as it lies there.
fn is_plain(weight: &Param) -> bool {
    weight.packed.is_none() && weight.scale.is_none() && weight.rounded.is_none() && weight.streamed.is_none()
}

/// raised[T, out] = x[T, in] W^T and y, its activation, where the device makes both at once; else false.
fn activated_in_one_pass(ctx: &Ctx, (y, raised): (&mut Tensor, &mut Tensor), x: &Tensor, weight: &Param, kind: Activation) -> bool {
    match ctx.numerics {
        Numerics::Reproducible(canonical) if is_plain(weight) => canonical.sums.gemm_activated(y, raised, x, &weight.weight(), kind),
        _ => false,
    }
}

/// `ColumnParallelLinear::forward_normed` for a weight that lives elsewhere; `apart` is the product after the norm where the device has
/// them apart.
pub fn normed_forward(
    ctx: &Ctx,
    weight: &Param,
    norm: &Norm,
    residual: Residual,
    kind: Option<Activation>,
    apart: impl FnOnce(&Tensor) -> ScratchTensor,
) -> (ScratchTensor, ScratchTensor) {
    let may_be_within = matches!(ctx.numerics, Numerics::Fast) && is_plain(weight) && !ctx.is_sharded();
    match residual {
        Residual::Sum { x, delta } if may_be_within && ctx.device.takes_norms(x, &weight.weight()) => {
            let n = weight.slice.shape[0] / kind.map_or(1, Activation::inputs_per_output);
            let (mut sum, mut y) = (ctx.take(x.dims(), x.dtype()), ctx.take(&[x.n_rows(), n], x.dtype()));
            let (gain, bias) = (norm.gain.weight(), norm.bias.as_ref().map(Param::weight));
            let of = NormOf { gain: &gain, bias: bias.as_deref(), how: norm.how };
            ctx.device.add_norm_gemm(&mut y, &mut sum, [x, &delta], of, &weight.weight(), kind);
            (y, sum)
        }
        residual => {
            let (normed, saved) = norm.forward(ctx, residual);
            (apart(&normed), saved.x)
        }
    }
}

/// y[T, out] = x[T, in] W^T by the form that the weight is in; `inner` is in.
fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, weight: &Param, inner: Inner) {
    if let Some(rows) = &weight.streamed {
        return streamed::multiply(ctx, y, x, (weight, &**rows), inner);
    }
    match (&weight.packed, &weight.scale, &weight.rounded) {
        (Some(weight), _, _) => packed::multiply(ctx, y, x, weight),
        (None, Some(scale), _) => fp8::multiply(ctx, y, x, (&weight.value, scale), inner),
        (None, None, Some(rounded)) => fp8::multiply_in_training(ctx, y, x, (weight, rounded), (Toward::Output, inner)),
        (None, None, None) => ctx.product_over(inner, y, x, &weight.weight(), Gemm::NT),
    }
}

/// `ColumnParallelLinear::backward` for a weight that lives elsewhere.
pub fn column_backward(ctx: &Ctx, weight: &mut Param, x: &Tensor, dy: &Tensor) -> ScratchTensor {
    if !ctx.is_sharded() {
        let dx_partial = partial_input_gradient(ctx, weight, dy); // summed over tp below
        weight_gradient(ctx, weight, x, dy);
        return ctx.sum_rows(dx_partial, dy.dtype()); // tp: all-reduce
    }
    let mut all_x = ctx.take(&[dy.n_rows(), x.row_len()], x.dtype());
    let gather = ctx.tp.start_all_gather(x, &mut all_x); // tp: gathered again rather than kept; overlaps the next line
    let dx_partial = partial_input_gradient(ctx, weight, dy); // summed over tp next
    gather.wait();
    let mut dx = ctx.take(x.dims(), dx_partial.dtype());
    let scatter = ctx.start_sum_rows(&dx_partial, &mut dx); // tp: overlaps the next line
    weight_gradient(ctx, weight, &all_x, dy);
    scatter.wait();
    ctx.rounded(dx, dy.dtype())
}

/// `ColumnParallelLinear::backward_input` for a weight that lives elsewhere.
pub fn column_backward_input(ctx: &Ctx, weight: &Param, dy: &Tensor) -> ScratchTensor {
    let dx_partial = partial_input_gradient(ctx, weight, dy);
    ctx.sum_rows(dx_partial, dy.dtype()) // tp: reduce-scatter or all-reduce
}

/// `ColumnParallelLinear::backward_weight` for a weight that lives elsewhere.
pub fn column_backward_weight(ctx: &Ctx, weight: &mut Param, x: &Tensor, dy: &Tensor) {
    let x = ctx.gather_rows(x); // tp: [T', I] -> [T, I], gathered again rather than kept
    weight_gradient(ctx, weight, &x, dy);
}

impl RowParallelLinear {
    /// x[T, I/tp] -> y[T', O].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> ScratchTensor {
        if self.weight.spec.split == Split::Outputs {
            return self.forward_by_outputs(ctx, x);
        }
        let mut partial = ctx.take(&[x.n_rows(), self.weight.slice.shape[0]], ctx.partial_dtype(x.dtype()));
        multiply(ctx, &mut partial, x, &self.weight, Inner::Divided); // y = x W^T, summed over tp next
        ctx.sum_rows(partial, x.dtype()) // tp: reduce-scatter or all-reduce
    }

    /// x[T, I/tp] -> y[T, O], each rank making a block of the outputs.
    fn forward_by_outputs(&self, ctx: &Ctx, x: &Tensor) -> ScratchTensor {
        let Param { spec, slice, .. } = &self.weight;
        let x = ctx.gather_columns(x, spec.shape[1]); // tp: all-gather
        let mut part = ctx.take(&[x.n_rows(), slice.shape[0]], x.dtype());
        multiply(ctx, &mut part, &x, &self.weight, Inner::Undivided);
        ctx.gather_columns(&part, spec.shape[0]) // tp: all-gather
    }

    /// dx[T, I/tp] assigned; the weight gradient accumulated. `x` is the input of the forward, dy[T', O].
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) -> ScratchTensor {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O]
        let dx = input_gradient(ctx, &self.weight, &dy);
        weight_gradient(ctx, &mut self.weight, x, &dy);
        dx
    }

    /// `backward` of a layer whose input is an activation, through that: draised, as large as raised, the activation's input.
    pub fn backward_activated(
        &mut self,
        ctx: &Ctx,
        (raised, activated): (&Tensor, &Tensor),
        dy: &Tensor,
        kind: Activation,
    ) -> ScratchTensor {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O]
        let draised = activated_input_gradient(ctx, &self.weight, &dy, raised, kind);
        weight_gradient(ctx, &mut self.weight, activated, &dy);
        draised
    }

    /// The first half of `backward`: dx[T, I/tp] assigned from dy[T', O].
    pub fn backward_input(&self, ctx: &Ctx, dy: &Tensor) -> ScratchTensor {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O]
        input_gradient(ctx, &self.weight, &dy)
    }

    /// The first half of `backward_activated`.
    pub fn backward_activated_input(&self, ctx: &Ctx, raised: &Tensor, dy: &Tensor, kind: Activation) -> ScratchTensor {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O]
        activated_input_gradient(ctx, &self.weight, &dy, raised, kind)
    }

    /// The second half: the weight gradient accumulated.
    pub fn backward_weight(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O], gathered again rather than kept
        weight_gradient(ctx, &mut self.weight, x, &dy);
    }
}

/// dx[T, in] = dy[T, out] W.
fn input_gradient(ctx: &Ctx, weight: &Param, dy: &Tensor) -> ScratchTensor {
    let mut dx = ctx.take(&[dy.n_rows(), weight.slice.shape[1]], dy.dtype());
    multiply_transposed(ctx, &mut dx, dy, weight, Inner::Whole);
    dx
}

/// draised, as large as raised: the gradient of dx[T, in] = dy[T, out] W through the activation.
fn activated_input_gradient(ctx: &Ctx, weight: &Param, dy: &Tensor, raised: &Tensor, kind: Activation) -> ScratchTensor {
    let mut draised = ctx.take(raised.dims(), raised.dtype());
    let at_once = match ctx.numerics {
        Numerics::Fast if is_plain(weight) => {
            let mut dactivated = ctx.take(&[dy.n_rows(), weight.slice.shape[1]], dy.dtype());
            ctx.device.gemm_activation_backward(&mut draised, &mut dactivated, dy, &weight.weight(), raised, kind);
            true
        }
        Numerics::Reproducible(canonical) if is_plain(weight) => {
            canonical.sums.gemm_activation_backward(&mut draised, dy, &weight.weight(), raised, kind)
        }
        _ => false,
    };
    if !at_once {
        let dactivated = input_gradient(ctx, weight, dy);
        ctx.device.activation_backward(&mut draised, &dactivated, raised, kind);
    }
    draised
}

/// This rank's part of dx[T, in] = dy[T, out/tp] W, to be summed over tp.
fn partial_input_gradient(ctx: &Ctx, weight: &Param, dy: &Tensor) -> ScratchTensor {
    let mut dx = ctx.take(&[dy.n_rows(), weight.slice.shape[1]], ctx.partial_dtype(dy.dtype()));
    multiply_transposed(ctx, &mut dx, dy, weight, Inner::Divided);
    dx
}

/// dx[T, in] = dy[T, out] W; `inner` is out.
fn multiply_transposed(ctx: &Ctx, dx: &mut Tensor, dy: &Tensor, weight: &Param, inner: Inner) {
    match &weight.rounded {
        Some(rounded) => fp8::multiply_in_training(ctx, dx, dy, (weight, rounded), (Toward::Input, inner)),
        None => ctx.product_over(inner, dx, dy, &weight.weight(), Gemm::NN),
    }
}

/// dW[out, in] += dy[T, out]^T x[T, in].
fn weight_gradient(ctx: &Ctx, weight: &mut Param, x: &Tensor, dy: &Tensor) {
    ctx.add_weight_gradient(weight, dy, x);
}
