//! Weights of products in a form of the device's own, made once after loading: what inference on a device multiplies by when it can
//! do better than with a weight as it is stored.
//!
//! Each element of a product is a sum of its own, in an order that depends on the weight alone: k in equal pieces
//! (`crate::parallel::pieces`), each summed over its terms in order, the pieces added in pairs. So a row of a product has the same bits
//! alone and among any others, and tensor-parallel ranks that hold a share of the pieces each and add in pairs have those of one rank.

use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// What a packed weight's elements are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PackedForm {
    /// As they came: f32 or bf16.
    Float(DType),
    /// Integers of -127 to 127 with a scale for each output channel: the size of the largest / 127. The input is rounded the same way,
    /// with a scale for each row and piece of k. The sums of the products of integers are exact.
    Int8,
}

/// W[n, k] in the form of the device that packed it.
pub struct PackedWeight {
    /// What its elements are.
    pub form: PackedForm,
    /// Output channels, n.
    pub n_rows: usize,
    /// Terms of each sum, k.
    pub row_len: usize,
    /// Pieces of k that are added in pairs: 1, 2, 4 or 8.
    pub n_pieces: usize,
    /// The elements, [panels, words, lanes]: known to the device alone.
    pub words: Tensor,
    /// [n] f32, with `PackedForm::Int8`.
    pub scale: Option<Tensor>,
}

impl PackedWeight {
    /// Bytes that a product reads of it.
    pub fn n_bytes(&self) -> usize {
        self.words.n_bytes() + self.scale.as_ref().map_or(0, Tensor::n_bytes)
    }
}

/// Products with packed weights. Sums are made as the head of this file says, whatever the other sizes and the threads.
pub trait PackedProducts: Send + Sync {
    /// weight[n, k] float with k in `n_pieces` (1, 2, 4 or 8) equal pieces, elements as they are. Err: out of memory.
    fn pack(&self, weight: &Tensor, n_pieces: usize) -> Result<PackedWeight>;
    /// sizes[n] f32 = the size of the largest of each row of weight[n, k] float; not finite where one of them is not.
    fn sizes(&self, sizes: &mut Tensor, weight: &Tensor);
    /// As `pack`, elements rounded to integers by the scales that the sizes[n] of the rows give, all of them finite; a row that is one
    /// of several ranks' parts of a longer row has the size of that. Err: out of memory.
    fn pack_int8(&self, weight: &Tensor, sizes: &Tensor, n_pieces: usize) -> Result<PackedWeight>;
    /// out[m, n] = x[m, k] W^T, x float (of the weight's type, where it is one), out f32 or of x's type, rounded once.
    fn multiply(&self, out: &mut Tensor, x: &Tensor, weight: &PackedWeight);
    /// `Device::embed` with the table packed: out[T, k] float = row token - first_row of W, or -0 where it is not there. tokens[T] u32.
    fn look_up(&self, out: &mut Tensor, tokens: &Tensor, table: &PackedWeight, first_row: usize);
}
