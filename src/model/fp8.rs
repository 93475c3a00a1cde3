//! The four linear layers of each block with their products in E4M3, of weights that are kept so (inference) and of weights in training.
//! A scale belongs to one token (a row of inputs or of gradients) and to one channel of a weight, or in inference to a whole tensor.
//! The embedding, the head, norms, attention and everything between products keep the chunk's dtype.
//!
//! # Training
//!
//! | product | first operand, a scale for each | second operand, a scale for each |
//! |---|---|---|
//! | y = x W^T | x, token | W, output channel |
//! | dx = dy W | dy, token | W^T, input channel: rounded a second time, since tensor cores want both operands along the sum |
//! | dW += dy^T x | dy as it is stored | x as it is stored |
//!
//! Master weights, the weights that replicas exchange, gradients and their sums stay f32 or the chunk's dtype.
//!
//! - **dW is not in E4M3**: it sums over tokens, so its scales would have to belong to channels over all tokens of a micro-batch and the
//!   result would depend on which tokens run together; and its errors, unlike those of dx, go straight into the update (torchao's
//!   "rowwise_with_gw_hp" recipe keeps it for that). What is saved is half the work of two products in three.
//! - **dy is E4M3**, not E5M2 with its one bit of mantissa less: E5M2 is for one scale over a whole gradient, whose tokens differ by
//!   orders of magnitude (Micikevicius et al. 2022; the "hybrid" format of TransformerEngine). Within a row 2^17.8 from the largest to
//!   the least are enough; DeepSeek-V3 (2024, section 3.3.2) takes E4M3 for all three products with scales of 128 elements.
//! - **A scale is that of the tensor at hand**, not of earlier steps (delayed scaling): nothing to keep in checkpoints, so a resume or
//!   another layout has the same numbers, and no step whose values jump is cut off at 448.
//! - **What a scale spans and tp divides** (the rows of x and W before a sum over ranks, those of dy and W^T where each rank has a part of
//!   the outputs) has its largest size agreed between the ranks: 4 bytes a token. So every layout rounds to the same numbers, and in
//!   reproducible numerics, where the numbers behind the codes are multiplied as floats in the canonical order, all bits are equal.
//!
//! How far results are off is told by tests (`tests/fp8_training.rs`): E4M3 moves an element by at most 2^-4 of itself.
//! In doubt until it has run on a GPU: Hopper's tensor cores keep about 14 bits between additions of 8-bit products, so sums over long
//! rows are less exact than here; and scales of rows are cuBLASLt's OUTER_VEC_32F, see `device::cuda::blas`.

use super::chunk::Chunk;
use super::config::Split;
use super::ctx::{Ctx, Inner};
use super::numerics::Numerics;
use super::param::Param;
use crate::comm::{Communicator, ReduceOp, agree};
use crate::device::{Device, Fp8Axis, Fp8Scales, Gemm};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use std::sync::{Mutex, MutexGuard};

/// Rows and columns that tensor cores multiply at once.
const STEP: usize = 16;

/// y[T, O] float = x[T, I] W^T, W[O, I] E4M3 with its scales; x is rounded the same way. `inner` is I.
pub fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, (weight, scale): (&Tensor, &Tensor), inner: Inner) {
    let axis = if scale.n_elements() == 1 { Fp8Axis::All } else { Fp8Axis::Rows };
    let mut codes = ctx.take(x.dims(), DType::F8E4M3);
    let mut by = ctx.take(&[axis.n_scales((x.n_rows(), x.row_len()))], DType::F32);
    round(ctx, (&mut codes, &mut by), x, axis, inner);
    match ctx.numerics {
        Numerics::Fast => ctx.device.gemm_fp8(y, (&codes, &by), (weight, scale)),
        Numerics::Reproducible(_) => {
            let widened = |codes: &Tensor, scale: &Tensor| {
                let mut wide = ctx.take(codes.dims(), x.dtype());
                ctx.device.fp8_widen(&mut wide, codes, scale);
                wide
            };
            ctx.product_over(inner, y, &widened(&codes, &by), &widened(weight, scale), Gemm::NT);
        }
    }
}

/// Codes and scales of x; where ranks have parts of what shares a scale, it is that of all parts.
fn round(ctx: &Ctx, (codes, by): (&mut Tensor, &mut Tensor), x: &Tensor, axis: Fp8Axis, inner: Inner) {
    if inner == Inner::Whole || ctx.tp.size() == 1 {
        return ctx.device.quantise(codes, by, x, axis);
    }
    ctx.device.fp8_sizes(by, x, axis);
    ctx.tp.all_reduce(by, ReduceOp::Max); // tp: the largest of all parts
    ctx.device.fp8_round(codes, by, x, axis);
}

/// A weight in training as both products take it. Made again when the weight may have changed.
pub struct Rounded(Mutex<Codes>);

/// Codes and scales.
struct Codes {
    /// E4M3 [O, I] and f32 [O].
    by_output: (Tensor, Tensor),
    /// Transposed: E4M3 [I, O] and f32 [I].
    by_input: (Tensor, Tensor),
    is_current: bool,
}

/// The direction of a product with a weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Toward {
    /// y = x W^T
    Output,
    /// dx = dy W
    Input,
}

impl Rounded {
    /// Memory for a weight of this shape. Err: out of memory.
    fn new(device: &dyn Device, (rows, columns): (usize, usize)) -> Result<Rounded> {
        let alloc = |rows: usize, columns: usize| -> Result<(Tensor, Tensor)> {
            Ok((device.alloc(&[rows, columns], DType::F8E4M3)?, device.alloc(&[rows], DType::F32)?))
        };
        let (by_output, by_input) = (alloc(rows, columns)?, alloc(columns, rows)?);
        Ok(Rounded(Mutex::new(Codes { by_output, by_input, is_current: false })))
    }

    /// Of the weight as it is. Collective over tp when it has changed.
    fn current(&self, ctx: &Ctx, param: &Param) -> MutexGuard<'_, Codes> {
        let mut codes = self.0.lock().expect("no panic while rounding");
        if !codes.is_current {
            // What tp divides shares a scale with what other ranks have of the same channel.
            let (outputs, inputs) = match param.spec.split {
                Split::Rows => (Inner::Whole, Inner::Divided),
                Split::Columns => (Inner::Divided, Inner::Whole),
                Split::None => unreachable!("a linear layer of a block is divided over tp"),
            };
            let Codes { by_output, by_input, is_current } = &mut *codes;
            round(ctx, (&mut by_output.0, &mut by_output.1), &param.weight(), Fp8Axis::Rows, outputs);
            round(ctx, (&mut by_input.0, &mut by_input.1), &param.weight(), Fp8Axis::Columns, inputs);
            *is_current = true;
        }
        codes
    }
}

/// out = x W^T [T, O], or dy W [T, I], of a weight in training; `inner` is the dim that is summed over.
pub fn multiply_in_training(
    ctx: &Ctx,
    out: &mut Tensor,
    x: &Tensor,
    (param, rounded): (&Param, &Rounded),
    (toward, inner): (Toward, Inner),
) {
    let codes = rounded.current(ctx, param);
    let (weight, scale) = if toward == Toward::Output { &codes.by_output } else { &codes.by_input };
    multiply(ctx, out, x, (weight, scale), inner);
}

/// Err when the part of a weight that a rank has is not in whole steps of tensor cores.
fn check_steps(param: &Param, remedy: &str) -> Result<(usize, usize)> {
    let (rows, columns) = (param.slice.shape[0], param.slice.shape[1]);
    if rows % STEP == 0 && columns % STEP == 0 {
        return Ok((rows, columns));
    }
    let wrong = format!("fp8: {} has {rows} x {columns} elements on a rank, no multiples of {STEP}", param.spec.name);
    Err(Error::recipe(wrong).remedy(format!("use fewer tensor-parallel ranks, or {remedy}")))
}

/// What to do where a recipe's FP8 cannot be had.
const INSTEAD: &str = "set numerics.linear = \"stored\"";

impl Param {
    /// Makes the products with this weight in E4M3 from here on: see [`Chunk::train_in_fp8`].
    pub fn train_in_fp8(&mut self, device: &dyn Device) -> Result<()> {
        assert!(self.grad.is_some(), "{} is not in training", self.spec.name);
        self.rounded = Some(Rounded::new(device, check_steps(self, INSTEAD)?)?);
        Ok(())
    }

    /// `value` may have changed: in training in FP8 it is rounded again where it is next used.
    pub fn forget_rounded(&mut self) {
        if let Some(rounded) = &mut self.rounded {
            rounded.0.get_mut().expect("no panic while rounding").is_current = false;
        }
    }
}

impl Chunk {
    /// Makes the products of the blocks' linear layers in E4M3 from here on; for a chunk with gradients. Takes two bytes a weight.
    /// Err when the device cannot multiply them, a weight has not whole steps of tensor cores, or memory is out.
    pub fn train_in_fp8(&mut self, device: &dyn Device) -> Result<()> {
        device.check_fp8(Fp8Scales::Rows).map_err(|error| error.remedy(INSTEAD))?;
        self.linear_params_mut().try_for_each(|param| param.train_in_fp8(device))
    }

    /// Weights may have changed: they are rounded again where they are next used.
    pub fn forget_rounded(&mut self) {
        self.linear_params_mut().for_each(Param::forget_rounded);
    }

    /// Err when the device cannot multiply E4M3 with such scales, or a weight has not whole steps of tensor cores.
    pub(super) fn check_fp8(&mut self, device: &dyn Device, scales: Fp8Scales) -> Result<()> {
        device.check_fp8(scales)?;
        self.linear_params_mut().try_for_each(|param| check_steps(param, "leave --weights out").map(drop))
    }
}

/// Keeps a weight as E4M3 from here on. Collective over tp, whose ranks leave with the same Err: out of memory.
pub(super) fn keep(device: &dyn Device, tp: &dyn Communicator, param: &mut Param, scales: Fp8Scales) -> Result<()> {
    let (axis, shape) = (scales.axis(), (param.slice.shape[0], param.slice.shape[1]));
    let codes = device.alloc(&[shape.0, shape.1], DType::F8E4M3);
    let (mut value, mut scale) = agree(tp, codes.and_then(|codes| Ok((codes, device.alloc(&[axis.n_scales(shape)], DType::F32)?))))?;
    device.fp8_sizes(&mut scale, &param.weight(), axis);
    if scales == Fp8Scales::Tensor || param.spec.split == Split::Columns {
        tp.all_reduce(&mut scale, ReduceOp::Max); // tp: a rank has a part of what shares a scale
    }
    device.fp8_round(&mut value, &mut scale, &param.weight(), axis);
    (param.value, param.scale) = (value, Some(scale));
    Ok(())
}
