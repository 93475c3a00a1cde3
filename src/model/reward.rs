//! The end of a reward model: final norm, and a linear layer with a bias that reads attributes (helpfulness, correctness, ..) off the
//! last token of each sequence. Nemotron-4 340B report, section 3.1; HelpSteer2; NeMo-Aligner's regression reward model.

use super::batch::MicroBatch;
use super::ctx::Ctx;
use super::norm::{Norm, NormSaved, Residual};
use super::numerics::{Canonical, Numerics};
use super::param::Param;
use crate::device::{Gemm, ScratchTensor};
use crate::tensor::{DType, Tensor};
use half::bf16;

/// Final norm and attribute layer; every tensor-parallel rank holds all of it. Letters: `N` sequences, `R` attributes.
pub struct RewardHead {
    /// Before the attribute layer.
    pub norm: Norm,
    /// [R, H]
    pub weight: Param,
    /// [R]
    pub bias: Param,
}

/// What annotators gave to the sequences of a micro-batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Ratings {
    /// [N, R], row by row; NaN where an attribute was not rated.
    pub labels: Vec<f32>,
    /// Weight of each squared error in the loss: 1 / ratings of the whole step, so that sums over micro-batches and replicas are the
    /// mean however the step is cut.
    pub weight: f32,
}

/// What the backward needs.
pub struct RewardSaved {
    norm: NormSaved,
    /// norm's output at the last token of each sequence [N, H].
    read: ScratchTensor,
    /// [N, R]
    attributes: Vec<f32>,
}

/// What the weight gradients need once the input gradient is made.
pub struct RewardDeferred {
    /// norm's output at the last token of each sequence [N, H].
    read: ScratchTensor,
    /// Gradient of the attributes [N, R].
    dattributes: Vec<f32>,
}

impl RewardHead {
    /// residual[T', H] -> attributes of each sequence [N, R], row by row.
    pub fn forward(&self, ctx: &Ctx, residual: Residual, batch: &MicroBatch) -> (Vec<f32>, RewardSaved) {
        let (normed, norm) = self.norm.forward(ctx, residual);
        let mut read = ctx.take(&[n_sequences(batch), normed.row_len()], normed.dtype());
        ctx.device.fill_zero(&mut read);
        for (sequence, row) in own_rows(ctx, batch) {
            ctx.device.copy(&mut read.rows_mut(sequence..sequence + 1), &normed.rows(row..row + 1));
        }
        if ctx.is_sharded() {
            ctx.tp.all_reduce(&mut read, crate::comm::ReduceOp::Sum); // tp: the one rank that has the row, the others 0
        }
        let n_attributes = self.weight.slice.shape[0];
        let mut product = ctx.take(&[read.n_rows(), n_attributes], DType::F32);
        ctx.product(&mut product, &read, &self.weight.weight(), Gemm::NT); // attributes = read W^T + b
        let (mut attributes, bias) = (download_f32(ctx, &product), download_f32(ctx, &self.bias.weight()));
        attributes.chunks_exact_mut(n_attributes).for_each(|row| row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b));
        (attributes.clone(), RewardSaved { norm, read, attributes })
    }

    /// dx[T', H] assigned; weight gradients accumulated. The loss is the sum over rated attributes of weight * (attribute - label)^2.
    pub fn backward(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: RewardSaved) -> ScratchTensor {
        let (dx, deferred) = self.backward_input(ctx, batch, saved);
        self.backward_weight(ctx, &deferred);
        dx
    }

    /// The first half of `backward`: dx[T', H] assigned; the gradients of the norm accumulated.
    pub fn backward_input(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: RewardSaved) -> (ScratchTensor, RewardDeferred) {
        let RewardSaved { norm, read, attributes } = saved;
        let dattributes = gradient(&attributes, batch.ratings.as_ref().expect("a reward model is trained on ratings"));
        let mut dread = ctx.take(read.dims(), read.dtype());
        ctx.product(&mut dread, &self.on_device(ctx, &dattributes), &self.weight.weight(), Gemm::NN); // dread = dattributes W
        let mut dnormed = ctx.take(norm.x.dims(), norm.x.dtype());
        ctx.device.fill_zero(&mut dnormed);
        for (sequence, row) in own_rows(ctx, batch) {
            ctx.device.copy(&mut dnormed.rows_mut(row..row + 1), &dread.rows(sequence..sequence + 1));
        }
        let mut dx = ctx.take(norm.x.dims(), norm.x.dtype());
        ctx.device.fill_zero(&mut dx);
        self.norm.backward(ctx, &norm, &dnormed, &mut dx);
        (dx, RewardDeferred { read, dattributes })
    }

    /// The second half: the gradients of the attribute layer accumulated. Every rank has seen all sequences; under sequence
    /// parallelism `Chunk::finish_gradients` adds up what the ranks hold, so then the first alone contributes.
    pub fn backward_weight(&mut self, ctx: &Ctx, deferred: &RewardDeferred) {
        if let Numerics::Reproducible(canonical) = ctx.numerics {
            return self.backward_weight_in_turn(ctx, &canonical, deferred);
        }
        if ctx.is_sharded() && ctx.tp.rank() > 0 {
            return;
        }
        let RewardDeferred { read, dattributes } = deferred;
        let dproduct = self.on_device(ctx, dattributes);
        ctx.device.gemm(&mut self.weight.dweight(), &dproduct, read, Gemm::TN.accumulate()); // dW += dattributes^T read
        let n_attributes = self.weight.slice.shape[0];
        let columns = (0..n_attributes).map(|column| dattributes.iter().skip(column).step_by(n_attributes).sum());
        let dbias: Vec<f32> = columns.collect(); // db += the rows of dattributes
        let mut addend = ctx.take(&[n_attributes], DType::F32);
        ctx.device.upload(bytemuck::cast_slice(&dbias), &mut addend);
        ctx.device.add(&mut self.bias.dweight(), &addend);
    }

    /// A sequence after another, on every rank alike.
    fn backward_weight_in_turn(&mut self, ctx: &Ctx, canonical: &Canonical, deferred: &RewardDeferred) {
        let RewardDeferred { read, dattributes } = deferred;
        let (dproduct, n_attributes) = (self.on_device(ctx, dattributes), self.weight.slice.shape[0]);
        ctx.write_parts(&mut self.weight, |dweight, part, out| {
            let (rows, starts) = (part.samples.clone(), (0..=part.samples.len()).collect::<Vec<usize>>());
            canonical.sums.gemm_in_turn(dweight, &dproduct.rows(rows.clone()), &read.rows(rows), Gemm { out, ..Gemm::TN }, &starts);
        });
        let mut rows = ctx.take(&[dproduct.n_rows(), n_attributes], DType::F32);
        ctx.device.upload(bytemuck::cast_slice(dattributes), &mut rows);
        ctx.add_parts(&mut self.bias, |dbias, part| canonical.sums.add_groups(dbias, &rows.rows(part.samples.clone()), 1));
    }

    /// [N, R] as the products want it: in the dtype of the activations.
    fn on_device(&self, ctx: &Ctx, values: &[f32]) -> ScratchTensor {
        let n_attributes = self.weight.slice.shape[0];
        let mut tensor = ctx.take(&[values.len() / n_attributes, n_attributes], self.weight.value.dtype());
        match tensor.dtype() {
            DType::BF16 => {
                let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                ctx.device.upload(bytemuck::cast_slice(&rounded), &mut tensor);
            }
            _ => ctx.device.upload(bytemuck::cast_slice(values), &mut tensor),
        }
        tensor
    }
}

/// d loss / d attribute [N, R]: 2 weight (attribute - label), 0 where there is no label.
fn gradient(attributes: &[f32], ratings: &Ratings) -> Vec<f32> {
    assert_eq!(attributes.len(), ratings.labels.len(), "one label, or none, for each attribute of each sequence");
    let one = |(&attribute, &label): (&f32, &f32)| if label.is_nan() { 0.0 } else { 2.0 * ratings.weight * (attribute - label) };
    attributes.iter().zip(&ratings.labels).map(one).collect()
}

fn n_sequences(batch: &MicroBatch) -> usize {
    batch.sequence_starts.len() - 1
}

/// (sequence, row among the T' of this rank) of the last tokens that this rank holds.
fn own_rows(ctx: &Ctx, batch: &MicroBatch) -> Vec<(usize, usize)> {
    let n_rows = ctx.local_rows(batch.n_tokens());
    let first = if ctx.is_sharded() { ctx.tp.rank() * n_rows } else { 0 };
    let last_rows = batch.sequence_starts[1..].iter().map(|end| end - 1).enumerate();
    last_rows.filter(|(_, row)| (first..first + n_rows).contains(row)).map(|(sequence, row)| (sequence, row - first)).collect()
}

/// The values of a float tensor on the host.
fn download_f32(ctx: &Ctx, x: &Tensor) -> Vec<f32> {
    let mut wide = ctx.take(x.dims(), DType::F32);
    ctx.device.copy(&mut wide, x);
    let mut values = vec![0f32; x.n_elements()];
    ctx.device.download(&wide, bytemuck::cast_slice_mut(&mut values));
    values
}
