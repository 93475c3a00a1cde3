//! The weights of linear layers in the form that the device multiplies best by, made once after loading, for inference. Which weights:
//! those of the four linear layers of each block, and the output layer. A tied embedding is packed too, in the first chunk also where the
//! output layer is another chunk's copy, and its rows are looked up in the packed form; an embedding of its own, norms and the head of a
//! reward model stay as they are.
//!
//! On the CPU every element of a product is then a sum in the canonical order of `numerics.mode = "reproducible"`: a row's bits depend on
//! neither the other rows nor, under those numerics, on tp, whichever it is. On a device without a form of its own nothing changes.

use super::chunk::Chunk;
use super::config::Split;
use super::ctx::Ctx;
use super::fp8;
use super::param::Param;
use crate::comm::{Communicator, ReduceOp, agree};
use crate::device::packed::{PackedProducts, PackedWeight};
use crate::device::{Device, Fp8Scales};
use crate::error::{Error, Result};
use crate::parallel::pieces::TP_PIECES;
use crate::tensor::{DType, Tensor};

/// How weights are kept for inference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WeightFormat {
    /// In the chunk's dtype.
    Stored,
    /// Integers of 8 bits with a scale for each output channel; inputs of products are rounded the same way, with a scale for each
    /// token and eighth of the channels that tensor parallelism does not cut.
    Int8,
    /// E4M3, see `fp8`.
    Fp8(Fp8Scales),
}

/// y[T, O] = x[T, I] W^T.
pub fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, weight: &PackedWeight) {
    of_device(ctx).multiply(y, x, weight);
}

/// out[T, I] = the rows of W that the tokens name, W's first being `first_row`; -0 where it has no such row.
pub fn look_up(ctx: &Ctx, out: &mut Tensor, tokens: &Tensor, table: &PackedWeight, first_row: usize) {
    of_device(ctx).look_up(out, tokens, table, first_row);
}

fn of_device<'a>(ctx: &Ctx<'a>) -> &'a dyn PackedProducts {
    ctx.device.packed().expect("the device that packed the weight")
}

impl Chunk {
    /// Keeps the weights of linear layers in this format from here on, each packed in turn and its stored form given back, so that
    /// memory peaks at one copy and a weight; for a chunk without gradients. Collective over tp, whose ranks leave with the same Err: out
    /// of memory, the device has no such products, a weight is not in steps of 16 (fp8) or not finite (int8).
    pub fn pack(&mut self, device: &dyn Device, tp: &dyn Communicator, format: WeightFormat) -> Result<()> {
        self.pack_each(device, tp, format, &mut |_| Ok(()))
    }

    /// The same; `fill` is called with each weight just before it is packed, to give it memory and values where it has none.
    pub fn pack_each(
        &mut self,
        device: &dyn Device,
        tp: &dyn Communicator,
        format: WeightFormat,
        fill: &mut dyn FnMut(&mut Param) -> Result<()>,
    ) -> Result<()> {
        self.check_format(device, format)?;
        for param in self.packed_params_mut(device, format) {
            assert!(param.grad.is_none(), "{} is in training", param.spec.name);
            agree(tp, fill(param))?;
            match (format, device.packed()) {
                (WeightFormat::Fp8(scales), _) => fp8::keep(device, tp, param, scales)?,
                (WeightFormat::Int8, Some(packing)) => {
                    let sizes = row_sizes(device, packing, tp, param)?;
                    let n_pieces = n_pieces(param.spec.split, tp.size(), format);
                    let packed = finite(&sizes, &param.spec.name).and_then(|sizes| packing.pack_int8(&param.weight(), sizes, n_pieces));
                    set_packed(device, param, agree(tp, packed)?)?;
                }
                (WeightFormat::Stored, Some(packing)) => {
                    let packed = packing.pack(&param.weight(), n_pieces(param.spec.split, tp.size(), format));
                    set_packed(device, param, agree(tp, packed)?)?;
                }
                (_, None) => unreachable!("checked above"),
            }
        }
        Ok(())
    }

    /// Err where the device has no products of this format, or a weight does not fit it. Of shapes alone: the same on all ranks of tp.
    fn check_format(&mut self, device: &dyn Device, format: WeightFormat) -> Result<()> {
        match (format, device.packed()) {
            (WeightFormat::Fp8(scales), _) => self.check_fp8(device, scales),
            (WeightFormat::Int8, None) => {
                let wrong = format!("int8: {} has no products of it", device.name());
                Err(Error::recipe(wrong).remedy("use --weights fp8, or --device cpu"))
            }
            _ => Ok(()),
        }
    }

    /// The weights that a format is for, on this device.
    fn packed_params_mut(&mut self, device: &dyn Device, format: WeightFormat) -> Vec<&mut Param> {
        match format {
            WeightFormat::Fp8(_) => self.linear_params_mut().collect(),
            WeightFormat::Stored if device.packed().is_none() => Vec::new(),
            WeightFormat::Stored | WeightFormat::Int8 => self.product_params_mut().collect(),
        }
    }

    /// The parameters that stay as they are stored when weights are packed.
    pub fn unpacked_params_mut(&mut self, device: &dyn Device, format: WeightFormat) -> Vec<&mut Param> {
        let packed: Vec<String> = self.packed_params_mut(device, format).into_iter().map(|param| param.spec.name.clone()).collect();
        self.params_mut().into_iter().filter(|param| !packed.contains(&param.spec.name)).collect()
    }
}

/// Pieces of the sums of a packed weight.
fn n_pieces(split: Split, tp: usize, format: WeightFormat) -> usize {
    match split {
        // Of a sum that the ranks share, this rank's pieces.
        Split::Columns => TP_PIECES / tp,
        Split::Outputs => TP_PIECES,
        Split::Rows if format == WeightFormat::Int8 => TP_PIECES,
        Split::Rows | Split::None => 1,
    }
}

/// Gives the stored form back. Err: out of memory.
fn set_packed(device: &dyn Device, param: &mut Param, packed: PackedWeight) -> Result<()> {
    param.value = device.alloc(&[0, packed.row_len], param.value.dtype())?;
    param.packed = Some(packed);
    Ok(())
}

/// The size of the largest of each row of a weight, over all of the row. Collective over tp. Err: out of memory.
fn row_sizes(device: &dyn Device, packing: &dyn PackedProducts, tp: &dyn Communicator, param: &Param) -> Result<Tensor> {
    let weight = param.weight();
    let mut sizes = agree(tp, device.alloc(&[weight.n_rows()], DType::F32))?;
    packing.sizes(&mut sizes, &weight);
    if param.spec.split == Split::Columns {
        tp.all_reduce(&mut sizes, ReduceOp::Max); // tp: a rank has a part of each row
    }
    Ok(sizes)
}

/// The sizes, unless one is not a number that integers can have a scale of.
fn finite<'a>(sizes: &'a Tensor, name: &str) -> Result<&'a Tensor> {
    match sizes.f32().iter().find(|size| !size.is_finite()) {
        None => Ok(sizes),
        Some(size) => Err(Error::recipe(format!("int8: {name} has {size} in it")).remedy("leave --weights out, or use another checkpoint")),
    }
}
