//! Linear layers divided over tensor-parallel ranks (Shoeybi et al. 2019), without bias.

use super::ctx::Ctx;
use super::param::Param;
use crate::device::{Gemm, ScratchTensor};
use crate::tensor::Tensor;

/// y[T, O/tp] = x[T, I] W^T, W[O/tp, I]: each rank has a block of the outputs.
pub struct ColumnParallelLinear {
    /// [O/tp, I]
    pub weight: Param,
}

/// y[T, O] = sum over ranks of x[T, I/tp] W^T, W[O, I/tp]: each rank has a block of the inputs.
pub struct RowParallelLinear {
    /// [O, I/tp]
    pub weight: Param,
}

impl ColumnParallelLinear {
    /// x[T', I] -> y[T, O/tp].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> ScratchTensor {
        column_forward(ctx, &self.weight, x)
    }

    /// dx[T', I] assigned; the weight gradient accumulated. `x` is the input of the forward.
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) -> ScratchTensor {
        column_backward(ctx, &mut self.weight, x, dy)
    }
}

/// `ColumnParallelLinear::forward` for a weight that lives elsewhere (a tied embedding).
pub fn column_forward(ctx: &Ctx, weight: &Param, x: &Tensor) -> ScratchTensor {
    let x = ctx.gather_rows(x); // tp: [T', I] -> [T, I]
    let mut y = ctx.take(&[x.n_rows(), weight.slice.shape[0]], x.dtype());
    ctx.device.gemm(&mut y, &x, &weight.weight(), Gemm::NT); // y = x W^T
    y
}

/// `ColumnParallelLinear::backward` for a weight that lives elsewhere.
pub fn column_backward(ctx: &Ctx, weight: &mut Param, x: &Tensor, dy: &Tensor) -> ScratchTensor {
    let mut dx_partial = ctx.take(&[dy.n_rows(), weight.slice.shape[1]], dy.dtype());
    if !ctx.is_sharded() {
        ctx.device.gemm(&mut dx_partial, dy, &weight.weight(), Gemm::NN); // dx = dy W, summed over tp below
        ctx.device.gemm(&mut weight.dweight(), dy, x, Gemm::TN.accumulate()); // dW += dy^T x
        return ctx.sum_rows(dx_partial); // tp: all-reduce
    }
    let (mut all_x, mut dx) = (ctx.take(dx_partial.dims(), x.dtype()), ctx.take(x.dims(), dy.dtype()));
    let gather = ctx.tp.start_all_gather(x, &mut all_x); // tp: gathered again rather than kept; overlaps the next line
    ctx.device.gemm(&mut dx_partial, dy, &weight.weight(), Gemm::NN); // dx = dy W, summed over tp next
    gather.wait();
    let scatter = ctx.tp.start_reduce_scatter(&dx_partial, &mut dx); // tp: overlaps the next line
    ctx.device.gemm(&mut weight.dweight(), dy, &all_x, Gemm::TN.accumulate()); // dW += dy^T x
    scatter.wait();
    dx
}

impl RowParallelLinear {
    /// x[T, I/tp] -> y[T', O].
    pub fn forward(&self, ctx: &Ctx, x: &Tensor) -> ScratchTensor {
        let mut partial = ctx.take(&[x.n_rows(), self.weight.slice.shape[0]], x.dtype());
        ctx.device.gemm(&mut partial, x, &self.weight.weight(), Gemm::NT); // y = x W^T, summed over tp next
        ctx.sum_rows(partial) // tp: reduce-scatter or all-reduce
    }

    /// dx[T, I/tp] assigned; the weight gradient accumulated. `x` is the input of the forward, dy[T', O].
    pub fn backward(&mut self, ctx: &Ctx, x: &Tensor, dy: &Tensor) -> ScratchTensor {
        let dy = ctx.gather_rows(dy); // tp: [T', O] -> [T, O]
        let mut dx = ctx.take(&[x.n_rows(), x.row_len()], x.dtype());
        ctx.device.gemm(&mut dx, &dy, &self.weight.weight(), Gemm::NN); // dx = dy W
        ctx.device.gemm(&mut self.weight.dweight(), &dy, x, Gemm::TN.accumulate()); // dW += dy^T x
        dx
    }
}
