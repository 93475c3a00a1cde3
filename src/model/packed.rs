//! The weights of linear layers in the form that the device multiplies best by, made once after loading, for inference. Which weights:
//! those of the four linear layers of each block, and the output layer. A tied embedding is packed too, in the first chunk also where the
//! output layer is another chunk's copy, and its rows are looked up in the packed form; an embedding of its own, norms and the head of a
//! reward model stay as they are.
//!
//! On the CPU every element of a product is then a sum in the canonical order of `numerics.mode = "reproducible"`: a row's bits depend on
//! neither the other rows nor, under those numerics, on tp. On a device without a form of its own nothing changes.

use super::chunk::Chunk;
use super::config::Split;
use super::ctx::Ctx;
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
    /// memory peaks at one copy and a weight; for a chunk without gradients. Collective over tp. Err: out of memory, the device has no
    /// such products, or int8 of a weight that is not finite.
    pub fn pack(&mut self, device: &dyn Device, tp: &dyn Communicator, format: WeightFormat) -> Result<()> {
        let packing = match (format, device.packed()) {
            (WeightFormat::Fp8(scales), _) => return self.quantise(device, scales),
            (WeightFormat::Stored, None) => return Ok(()),
            (WeightFormat::Int8, None) => {
                let wrong = format!("int8: {} has no products of it", device.name());
                return Err(Error::recipe(wrong).remedy("use --weights fp8, or --device cpu"));
            }
            (_, Some(packing)) => packing,
        };
        // All that ranks do together comes first: one that fails alone must not be waited for.
        let sizes = if format == WeightFormat::Int8 { Some(self.row_sizes(device, packing, tp)?) } else { None };
        for (idx, param) in self.product_params_mut().enumerate() {
            assert!(param.grad.is_none(), "{} is in training", param.spec.name);
            let n_pieces = match param.spec.split {
                // Of a sum that the ranks share, this rank's pieces.
                Split::Columns if TP_PIECES % tp.size() == 0 => TP_PIECES / tp.size(),
                Split::Rows if format == WeightFormat::Int8 => TP_PIECES,
                _ => 1,
            };
            let packed = match &sizes {
                Some(sizes) => packing.pack_int8(&param.weight(), finite(&sizes[idx], &param.spec.name)?, n_pieces)?,
                None => packing.pack(&param.weight(), n_pieces)?,
            };
            param.value = device.alloc(&[0, packed.row_len], param.value.dtype())?;
            param.packed = Some(packed);
        }
        Ok(())
    }

    /// The size of the largest of each row of each weight that is packed, over all of the row. Err: out of memory.
    fn row_sizes(&mut self, device: &dyn Device, packing: &dyn PackedProducts, tp: &dyn Communicator) -> Result<Vec<Tensor>> {
        let size = |param: &mut Param| -> Result<Tensor> {
            let weight = param.weight();
            let mut sizes = device.alloc(&[weight.n_rows()], DType::F32)?;
            packing.sizes(&mut sizes, &weight);
            Ok(sizes)
        };
        let mut all = agree(tp, self.product_params_mut().map(size).collect::<Result<Vec<Tensor>>>())?;
        for (sizes, param) in all.iter_mut().zip(self.product_params_mut()).filter(|(_, param)| param.spec.split == Split::Columns) {
            assert!(param.packed.is_none(), "{} is packed already", param.spec.name);
            tp.all_reduce(sizes, ReduceOp::Max); // tp: a rank has a part of each row
        }
        Ok(all)
    }
}

/// The sizes, unless one is not a number that integers can have a scale of.
fn finite<'a>(sizes: &'a Tensor, name: &str) -> Result<&'a Tensor> {
    match sizes.f32().iter().find(|size| !size.is_finite()) {
        None => Ok(sizes),
        Some(size) => Err(Error::recipe(format!("int8: {name} has {size} in it")).remedy("leave --weights out, or use another checkpoint")),
    }
}
