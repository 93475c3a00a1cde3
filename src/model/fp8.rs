//! The four linear layers of each block with their products in E4M3, of weights that are kept so (inference) and of weights in training.
//! A scale belongs to one token (a row of inputs or of gradients) and to one channel of a weight, or to a whole tensor. The embedding, the
//! head, norms, attention and everything between products keep the chunk's dtype.
//!
//! # Training
//!
//! | product | first operand, a scale for each | second operand, a scale for each |
//! |---|---|---|
//! | y = x W^T | x, token | W, output channel |
//! | dx = dy W | dy, token | W^T, input channel: rounded a second time, since tensor cores want both operands along the sum |
//! | dW += dy^T x | dy as it is stored | x as it is stored |
//!
//! With one scale a tensor (`numerics.linear = "fp8-tensor"`) the same products have one for all tokens and one for all of a weight, whose
//! transpose then has the same codes. It is what GPUs of compute capability 8.9 can do, and one number less to read a row; elements
//! that are more than 2^15 below the largest of their tensor lose bits of their mantissa, and more than 2^19 below become 0.
//!
//! Master weights, the weights that replicas exchange, gradients and their sums stay f32 or the chunk's dtype.
//!
//! - **dW is not in E4M3**: it sums over tokens, so its scales would have to belong to channels over all tokens of a micro-batch and the
//!   result would depend on which tokens run together; and its errors, unlike those of dx, go straight into the update (torchao's
//!   "rowwise_with_gw_hp" recipe keeps it for that). What is saved is half the work of two products in three.
//! - **dy is E4M3**, not E5M2 with its one bit of mantissa less: E5M2 is for one scale over a whole gradient, whose tokens differ by
//!   orders of magnitude (Micikevicius et al. 2022; the "hybrid" format of TransformerEngine). Within a row 2^17.8 from the largest to
//!   the least are enough; DeepSeek-V3 (2024, section 3.3.2) takes E4M3 for all three products with scales of 128 elements. With one scale
//!   a tensor others take E5M2 here (TransformerEngine's recipe of current scaling, torchao's "tensorwise"): its range is 2^31.8. That is
//!   not done: the tokens of a gradient that are 2^19 below the largest weigh nothing in the update.
//! - **A scale is that of the tensor at hand**, not of earlier steps (delayed scaling): nothing to keep in checkpoints, so a resume or
//!   another layout has the same numbers, and no step whose values jump is cut off at 448. (Both others have this form: TransformerEngine's
//!   Float8CurrentScaling, torchao's dynamic scaling, with the largest agreed by an all-reduce where ranks hold parts.)
//! - **The tensor of one scale** is a micro-batch in fast numerics, so that it is one product. In reproducible numerics it is a sample,
//!   lest a number depend on what runs beside it: the products there are made of the numbers behind the codes, so they are still one.
//! - **What a scale spans and tp divides** (the rows of x and W before a sum over ranks, those of dy and W^T where each rank has a part of
//!   the outputs, all of a weight with one scale) has its largest size agreed between the ranks: 4 bytes a token. So every layout rounds to
//!   the same numbers, and in reproducible numerics, where the numbers behind the codes are multiplied as floats in the canonical order,
//!   all bits are equal.
//!
//! How far results are off is told by tests (`tests/fp8_training.rs`): E4M3 moves an element by at most 2^-4 of itself.
//! In doubt until it has run on a GPU: Hopper's tensor cores keep about 14 bits between additions of 8-bit products, so sums over long
//! rows are less exact than here; and scales of rows are cuBLASLt's OUTER_VEC_32F, see `device::cuda::blas`.
//!
//! # Why reproducible numerics multiply the numbers behind the codes
//!
//! A product of codes in a fixed order could be had from a kernel of our own, as those of bf16 are (kernels/matmul.cu and
//! matmul_hopper.cu), but not yet with a gain that is known:
//!
//! - `mma.sync.m16n8k32` of E4M3 is an instruction of compute capability 8.9. On 9.0 the compiler turns it into conversions to FP16 and
//!   FP16 products (NVIDIA/cutlass issue 1986): what widening does here, as fast, without its memory.
//! - `wgmma` of E4M3 is Hopper's own, at twice the rate of bf16. How it aligns and cuts the 32 products of one instruction is not
//!   documented, but measured: about 14 bits are kept (DeepSeek-V3, section 3.3.2). Each instruction gives the same bits for the same
//!   operands, so a kernel that adds its results to f32 registers every few instructions, in the canonical order, would have the same bits
//!   under every layout, if not those of another kind of device. It would be a form of kernels/matmul_hopper.cu; it is not written,
//!   because only a GPU can show what the 14 bits cost.

use super::chunk::Chunk;
use super::config::Split;
use super::ctx::{Ctx, Inner};
use super::numerics::{Canonical, Numerics};
use super::param::Param;
use crate::comm::{Communicator, ReduceOp, agree};
use crate::device::{Device, Fp8Axis, Fp8Scales, Gemm};
use crate::error::{Error, Result};
use crate::recipe::Linear;
use crate::tensor::{DType, Tensor};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Rows and columns that tensor cores multiply at once.
const STEP: usize = 16;

/// y[T, O] float = x[T, I] W^T, W[O, I] E4M3 with its scales; x is rounded the same way. `inner` is I.
pub fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, (weight, scale): (&Tensor, &Tensor), inner: Inner) {
    let (all, axis) = ([0, x.n_rows()], if scale.n_elements() == 1 { Fp8Axis::All } else { Fp8Axis::Rows });
    let starts = match ctx.numerics {
        Numerics::Reproducible(Canonical { batch: Some(batch), .. }) if axis == Fp8Axis::All => &batch.sequence_starts[..],
        _ => &all,
    };
    let tensors = Tensors { axis, starts };
    let mut codes = ctx.take(x.dims(), DType::F8E4M3);
    let mut by = ctx.take(&[tensors.n_scales()], DType::F32);
    tensors.round(ctx, (&mut codes, &mut by), x, inner);
    match ctx.numerics {
        Numerics::Fast => ctx.device.gemm_fp8(y, (&codes, &by), (weight, scale)),
        Numerics::Reproducible(_) => {
            let [mut wide_x, mut wide_weight] = [&*codes, weight].map(|codes| ctx.take(codes.dims(), x.dtype()));
            for (rows, scales) in tensors.each() {
                ctx.device.fp8_widen(&mut wide_x.rows_mut(rows.clone()), &codes.rows(rows), &by.rows(scales));
            }
            ctx.device.fp8_widen(&mut wide_weight, weight, scale);
            ctx.product_over(inner, y, &wide_x, &wide_weight, Gemm::NT);
        }
    }
}

/// Token rows that are rounded as one tensor or several, one after another.
struct Tensors<'a> {
    /// Of each tensor.
    axis: Fp8Axis,
    /// Where each begins, and the end.
    starts: &'a [usize],
}

impl Tensors<'_> {
    /// Of all.
    fn n_scales(&self) -> usize {
        if self.axis == Fp8Axis::All { self.starts.len() - 1 } else { self.starts[self.starts.len() - 1] }
    }

    /// The rows of each, and which scales are its.
    fn each(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let of = |(i, ends): (usize, &[usize])| (ends[0]..ends[1], if self.axis == Fp8Axis::All { i..i + 1 } else { ends[0]..ends[1] });
        self.starts.windows(2).enumerate().map(of)
    }

    /// Codes and scales of x; where ranks have parts of what shares a scale, it is that of all parts.
    fn round(&self, ctx: &Ctx, (codes, by): (&mut Tensor, &mut Tensor), x: &Tensor, inner: Inner) {
        if inner != Inner::Divided || ctx.tp.size() == 1 {
            for (rows, scales) in self.each() {
                ctx.device.quantise(&mut codes.rows_mut(rows.clone()), &mut by.rows_mut(scales), &x.rows(rows), self.axis);
            }
            return;
        }
        for (rows, scales) in self.each() {
            ctx.device.fp8_sizes(&mut by.rows_mut(scales), &x.rows(rows), self.axis);
        }
        ctx.tp.all_reduce(by, ReduceOp::Max); // tp: the largest of all parts
        for (rows, scales) in self.each() {
            ctx.device.fp8_round(&mut codes.rows_mut(rows.clone()), &mut by.rows_mut(scales), &x.rows(rows), self.axis);
        }
    }
}

/// A weight in training as both products take it. Made again when the weight may have changed.
pub struct Rounded(Mutex<Codes>);

/// Codes and scales.
struct Codes {
    scales: Fp8Scales,
    /// E4M3 [O, I] and f32 [O] or [1].
    by_output: (Tensor, Tensor),
    /// Transposed: E4M3 [I, O] and f32 [I] or [1].
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
    fn new(device: &dyn Device, (rows, columns): (usize, usize), scales: Fp8Scales) -> Result<Rounded> {
        let alloc = |rows: usize, columns: usize| -> Result<(Tensor, Tensor)> {
            let n_scales = scales.axis().n_scales((rows, columns));
            Ok((device.alloc(&[rows, columns], DType::F8E4M3)?, device.alloc(&[n_scales], DType::F32)?))
        };
        let (by_output, by_input) = (alloc(rows, columns)?, alloc(columns, rows)?);
        Ok(Rounded(Mutex::new(Codes { scales, by_output, by_input, is_current: false })))
    }

    /// Of the weight as it is. Collective over tp when it has changed.
    fn current(&self, ctx: &Ctx, param: &Param) -> MutexGuard<'_, Codes> {
        let mut codes = self.0.lock().expect("no panic while rounding");
        if !codes.is_current {
            // What tp divides shares a scale with what other ranks have of the same channel, or of the tensor.
            let [outputs, inputs] = match (codes.scales, param.spec.split) {
                (Fp8Scales::Tensor, _) => [(Fp8Axis::All, Inner::Divided), (Fp8Axis::Transposed, Inner::Divided)],
                (Fp8Scales::Rows, Split::Rows) => [(Fp8Axis::Rows, Inner::Whole), (Fp8Axis::Columns, Inner::Divided)],
                (Fp8Scales::Rows, Split::Columns) => [(Fp8Axis::Rows, Inner::Divided), (Fp8Axis::Columns, Inner::Whole)],
                (_, Split::None | Split::Outputs) => unreachable!("in training a linear layer of a block has its rows or columns divided"),
            };
            let Codes { by_output, by_input, is_current, .. } = &mut *codes;
            for ((codes, scale), (axis, inner)) in [(by_output, outputs), (by_input, inputs)] {
                ctx.device.fp8_sizes(scale, &param.weight(), axis);
                if inner == Inner::Divided && ctx.tp.size() > 1 {
                    ctx.tp.all_reduce(scale, ReduceOp::Max); // tp: the largest of all parts
                }
                ctx.device.fp8_round(codes, scale, &param.weight(), axis);
            }
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
/// The same where it is the scales of rows.
const INSTEAD_OF_ROWS: &str = "set numerics.linear = \"stored\", or \"fp8-tensor\" where compute capability 8.9 is enough";

/// The scales of a recipe's products; none where they are not in E4M3.
pub fn scales_of(linear: Linear) -> Option<Fp8Scales> {
    match linear {
        Linear::Stored => None,
        Linear::Fp8 => Some(Fp8Scales::Rows),
        Linear::Fp8Tensor => Some(Fp8Scales::Tensor),
    }
}

impl Param {
    /// Makes the products with this weight in E4M3 from here on: see [`Chunk::train_in_fp8`].
    pub fn train_in_fp8(&mut self, device: &dyn Device, scales: Fp8Scales) -> Result<()> {
        assert!(self.grad.is_some(), "{} is not in training", self.spec.name);
        self.rounded = Some(Rounded::new(device, check_steps(self, INSTEAD)?, scales)?);
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
    pub fn train_in_fp8(&mut self, device: &dyn Device, scales: Fp8Scales) -> Result<()> {
        let instead = if scales == Fp8Scales::Rows { INSTEAD_OF_ROWS } else { INSTEAD };
        device.check_fp8(scales).map_err(|error| error.remedy(instead))?;
        self.linear_params_mut().try_for_each(|param| param.train_in_fp8(device, scales))
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
