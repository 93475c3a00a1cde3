//! Weights kept as E4M3 for inference: those of the four linear layers of each block, with a scale for each output channel or one for
//! the whole weight. Their inputs are rounded the same way when they are multiplied (for each token, or one for all). The embedding,
//! the head, norms and everything between products keep the chunk's dtype.

use super::chunk::Chunk;
use super::ctx::Ctx;
use crate::device::{Device, Fp8Scales};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows and columns that tensor cores multiply at once.
const STEP: usize = 16;

/// y[T, O] float = x[T, I] W^T, W[O, I] E4M3 with its scales.
pub fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, (weight, scale): (&Tensor, &Tensor)) {
    let n_scales = if scale.n_elements() == 1 { 1 } else { x.n_rows() };
    let (mut rounded, mut by) = (ctx.take(x.dims(), DType::F8E4M3), ctx.take(&[n_scales], DType::F32));
    ctx.device.quantise(&mut rounded, &mut by, x);
    ctx.device.gemm_fp8(y, (&rounded, &by), (weight, scale));
}

impl Chunk {
    /// Keeps the weights of the blocks' linear layers as E4M3 from here on; for a chunk without gradients. Err when the device cannot
    /// multiply them, or a weight has not whole steps of tensor cores.
    pub fn quantise(&mut self, device: &dyn Device, scales: Fp8Scales) -> Result<()> {
        device.check_fp8(scales)?;
        for param in self.linear_params_mut() {
            let (rows, columns) = (param.value.n_rows(), param.value.row_len());
            if rows % STEP != 0 || columns % STEP != 0 {
                let wrong = format!("fp8: {} has {rows} x {columns} elements on a rank, no multiples of {STEP}", param.spec.name);
                return Err(Error::recipe(wrong).remedy("use fewer tensor-parallel ranks, or leave --weights out"));
            }
            let n_scales = if scales == Fp8Scales::Rows { rows } else { 1 };
            let mut value = device.alloc(&[rows, columns], DType::F8E4M3)?;
            let mut scale = device.alloc(&[n_scales], DType::F32)?;
            device.quantise(&mut value, &mut scale, &param.value);
            (param.value, param.scale) = (value, Some(scale));
        }
        Ok(())
    }
}
