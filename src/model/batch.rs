//! What one pass through the model takes: tokens, what each should predict, and what its loss weighs.

use super::reward::Ratings;
use super::shared::{Asked, SharedSequence};
use crate::device::Device;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The tokens of one forward pass: whole sequences one after another, no padding.
pub struct MicroBatch {
    /// Inputs [T] u32.
    pub tokens: Tensor,
    /// What each should predict [T] u32.
    pub targets: Tensor,
    /// Position of each in its sequence [T] u32.
    pub positions: Tensor,
    /// Weight of each token's loss [T] f32: 0 where it is masked, else 1 / unmasked tokens of the whole step.
    pub weights: Tensor,
    /// [0, .., T]: sequence i is tokens s[i]..s[i+1].
    pub sequence_starts: Vec<usize>,
    /// What a reward model is trained on; it reads neither targets nor weights.
    pub ratings: Option<Ratings>,
    /// For scoring: sequences that share rows, in place of those of `sequence_starts`. Such a micro-batch has no backward.
    pub shared: Option<Vec<SharedSequence>>,
    /// For scoring: the questions that get token losses, in place of one target of each row. Such a micro-batch has no backward.
    pub asked: Option<Asked>,
    /// Samples of this replica's share of the step that come before; what canonical sums go by.
    pub first_sample: usize,
}

impl MicroBatch {
    /// Puts the columns of a micro-batch, T long each, on the device.
    pub fn new(
        device: &dyn Device,
        [tokens, targets, positions]: [&[u32]; 3],
        weights: &[f32],
        sequence_starts: Vec<usize>,
    ) -> Result<MicroBatch> {
        let upload = |values: &[u8], dtype: DType| -> Result<Tensor> {
            let mut tensor = device.alloc(&[tokens.len()], dtype)?;
            device.upload(values, &mut tensor);
            Ok(tensor)
        };
        Ok(MicroBatch {
            tokens: upload(bytemuck::cast_slice(tokens), DType::U32)?,
            targets: upload(bytemuck::cast_slice(targets), DType::U32)?,
            positions: upload(bytemuck::cast_slice(positions), DType::U32)?,
            weights: upload(bytemuck::cast_slice(weights), DType::F32)?,
            sequence_starts,
            ratings: None,
            shared: None,
            asked: None,
            first_sample: 0,
        })
    }

    /// T
    pub fn n_tokens(&self) -> usize {
        self.tokens.n_rows()
    }
}
