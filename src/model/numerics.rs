//! In which order sums are added, handed down to every layer. `Fast`: the shortest path, so results change in their last bits with
//! the layout. `Reproducible`: every sum that some layout divides has a canonical tree, so that they do not change at all:
//!
//! | sum | leaves | tree |
//! |---|---|---|
//! | products over a whole dim (column-parallel forward, row-parallel dx) | terms, in order | none |
//! | products over a dim that tp divides (row-parallel forward, column-parallel dx) | 8 equal pieces of the dim, f32 | in pairs: a rank adds its own, the ranks exchange f32 and add the rest; one rounding at the end |
//! | weight gradients over tokens | a sample (the tokens of a sequence, in order) | samples of a block in turn, blocks of the step in pairs |
//! | embedding gradient | a token | as weight gradients |
//! | norm gains and biases | 8 equal pieces of a sample's tokens | pieces in pairs, then as weight gradients |
//! | sum of exponentials over the vocabulary | 8 equal pieces of the padded vocabulary | in pairs |
//! | the two uses of a tied embedding | each summed to its end by itself | one addition |
//! | loss, squares of the gradient | token losses; 8 pieces of a row | exact (`crate::exact`): no order |
//!
//! A block is 1 / n of the step's samples, which follow each other, so that the blocks of a replica are a subtree: dp divides n. It
//! costs log2(n / dp) more gradients on each rank: sums of 1, 2, 4 .. blocks that wait for as many more.
//!
//! Pieces of a dim that tp divides fall to the ranks where tp divides their number. Passes without gradients have the same bits on any
//! other number of ranks, which divide no such sum: row-parallel products have blocks of whole sums instead (`linear`), and the
//! exponentials of a token are summed by one rank, to which all send their logits of it (`head`). Training asks for tp 1, 2, 4 or 8.
//!
//! The bits are those of a kind of device: of all CPUs with the same vector instructions, or of all GPUs of one model.
//!
//! Everything else is made element by element, row by row or sequence by sequence, in an order of its own.

use super::batch::MicroBatch;
use super::ctx::{Ctx, Inner};
use super::param::Param;
use crate::device::canonical::CanonicalSums;
use crate::device::{Device, Gemm, Store};
use crate::error::{Error, Result};
use crate::parallel::pieces::{TP_PIECES, pieces};
use crate::recipe::{self, Mode};
use crate::tensor::{DType, Tensor};
use std::ops::Range;

/// The order of sums.
#[derive(Clone, Copy)]
pub enum Numerics<'a> {
    /// Whatever is fastest; the bits of a result depend on the layout.
    Fast,
    /// Canonical; the bits do not.
    Reproducible(Canonical<'a>),
}

/// What canonical sums need.
#[derive(Clone, Copy)]
pub struct Canonical<'a> {
    /// The device's.
    pub sums: &'a dyn CanonicalSums,
    /// How the samples of a step are cut.
    pub blocks: BatchBlocks,
    /// The micro-batch that is at work; set by the chunk.
    pub batch: Option<&'a MicroBatch>,
}

/// The samples of a replica's share of a step, in blocks of equal size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchBlocks {
    /// Samples of a block.
    pub samples: usize,
    /// Blocks of this replica, a power of two.
    pub per_replica: usize,
}

/// Samples of a micro-batch that follow each other within one block.
pub struct Part {
    /// Their token rows.
    pub rows: Range<usize>,
    /// Where each begins among these rows, and the end.
    pub starts: Vec<usize>,
    /// Which samples of the micro-batch.
    pub samples: Range<usize>,
    /// Which of the replica's blocks ends with them, if one does.
    block_ended: Option<usize>,
}

impl<'a> Numerics<'a> {
    /// What the recipe asks for on a device, for steps of so many samples over `dp` replicas. Err: the device has no canonical sums.
    pub fn of(asked: &recipe::Numerics, device: &'a dyn Device, samples: usize, dp: usize) -> Result<Numerics<'a>> {
        if asked.mode == Mode::Fast {
            return Ok(Numerics::Fast);
        }
        let (sums, n_blocks) = (canonical(device)?, asked.blocks(samples));
        let blocks = BatchBlocks { samples: samples / n_blocks, per_replica: n_blocks / dp };
        Ok(Numerics::Reproducible(Canonical { sums, blocks, batch: None }))
    }

    /// For passes without gradients: canonical where the device can.
    pub fn of_inference(device: &'a dyn Device) -> Numerics<'a> {
        let blocks = BatchBlocks { samples: 1, per_replica: 1 }; // there are no gradients to sum over samples
        match device.canonical() {
            Some(sums) => Numerics::Reproducible(Canonical { sums, blocks, batch: None }),
            None => Numerics::Fast,
        }
    }
}

/// The device's canonical sums. Err: it has none.
pub fn canonical(device: &dyn Device) -> Result<&dyn CanonicalSums> {
    device.canonical().ok_or_else(|| {
        let wrong = format!("numerics.mode = \"reproducible\" on {}, which has no sums in a canonical order", device.name());
        Error::recipe(wrong).remedy("use --device cpu, or set numerics.mode = \"fast\"")
    })
}

impl<'a> Canonical<'a> {
    fn batch(&self) -> &'a MicroBatch {
        self.batch.expect("a chunk says which micro-batch it works on")
    }

    /// The micro-batch at work, cut where blocks end.
    pub fn parts(&self) -> Vec<Part> {
        let (batch, per_block) = (self.batch(), self.blocks.samples);
        let (starts, n_samples) = (&batch.sequence_starts, batch.sequence_starts.len() - 1);
        let (mut parts, mut first) = (Vec::new(), 0);
        while first < n_samples {
            let at = batch.first_sample + first;
            let end = n_samples.min(first + per_block - at % per_block);
            let ends_block = (batch.first_sample + end) % per_block == 0;
            parts.push(Part {
                rows: starts[first]..starts[end],
                starts: starts[first..=end].iter().map(|start| start - starts[first]).collect(),
                samples: first..end,
                block_ended: ends_block.then_some(at / per_block),
            });
            first = end;
        }
        parts
    }

    /// Rows of the leaves of norm gains: TP_PIECES of each sample of the micro-batch at work, in order.
    pub fn token_pieces(&self) -> Vec<Range<usize>> {
        let of_sample = |ends: &[usize]| {
            let start = ends[0];
            pieces(ends[1] - ends[0], TP_PIECES).into_iter().map(move |piece| start + piece.start..start + piece.end)
        };
        self.batch().sequence_starts.windows(2).flat_map(of_sample).collect()
    }
}

/// A gradient's canonical sum over the samples of a step, beside the tensor that collects the block at work.
pub struct SampleSum {
    /// Sums of 1, 2, 4 .. blocks that wait for as many more; which ones wait is the binary number of the blocks done.
    waiting: Vec<Tensor>,
    /// Samples of this step that are in.
    n_seen: usize,
}

impl SampleSum {
    /// For gradients of this shape and at most this many blocks a replica. Err: out of memory.
    pub fn new(device: &dyn Device, shape: &[usize], most_blocks: usize) -> Result<SampleSum> {
        let waiting = (0..most_blocks.ilog2()).map(|_| device.alloc(shape, DType::F32)).collect::<Result<Vec<Tensor>>>()?;
        Ok(SampleSum { waiting, n_seen: 0 })
    }

    /// Adds a part's leaves by `add(gradient, how)`, which assigns the first of a block and accumulates the others into the gradient
    /// without padding rows; when a block ends, adds it up with those that wait. After the last block `grad` is the sum over the
    /// replica's samples.
    fn add(
        &mut self,
        ctx: &Ctx,
        blocks: BatchBlocks,
        (grad, n_rows): (&mut Tensor, usize),
        part: &Part,
        add: &mut dyn FnMut(&mut Tensor, Store),
    ) {
        let how = if self.n_seen % blocks.samples == 0 { Store::Assign } else { Store::Accumulate };
        add(&mut grad.rows_mut(0..n_rows), how);
        self.n_seen += part.samples.len();
        let Some(block) = part.block_ended else { return };
        let n_full = block.trailing_ones() as usize;
        for earlier in &self.waiting[..n_full] {
            ctx.device.add(grad, earlier);
        }
        if block + 1 == blocks.per_replica {
            self.n_seen = 0;
        } else {
            std::mem::swap(grad, &mut self.waiting[n_full]);
        }
    }
}

impl<'a> Ctx<'a> {
    /// The same for layers that work on this micro-batch.
    pub fn of_batch<'b>(&self, batch: &'b MicroBatch) -> Ctx<'b>
    where
        'a: 'b,
    {
        let numerics = match self.numerics {
            Numerics::Fast => Numerics::Fast,
            Numerics::Reproducible(canonical) => Numerics::Reproducible(Canonical { batch: Some(batch), ..canonical }),
        };
        Ctx { numerics, ..*self }
    }

    /// out = op(a) op(b), summed over a dim that no layout divides.
    pub fn product(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        self.product_over(Inner::Whole, out, a, b, how);
    }

    /// What partial sums over a dim that tp divides are stored as until [`Ctx::sum_rows`] has added them.
    pub fn partial_dtype(&self, dtype: DType) -> DType {
        let travels = self.tp.size() > 1 && matches!(self.numerics, Numerics::Reproducible(_));
        if travels { DType::F32 } else { dtype }
    }

    /// out = op(a) op(b), or this rank's part of it where tp divides the dim that is summed over, as `inner` says.
    pub fn product_over(&self, inner: Inner, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        let Numerics::Reproducible(canonical) = self.numerics else { return self.device.gemm(out, a, b, how) };
        let n_pieces = match inner {
            Inner::Whole => 1,
            Inner::Divided => self.own_pieces().expect("training asks for whole pieces on each rank, other passes divide no such sum"),
            Inner::Undivided => TP_PIECES,
        };
        canonical.sums.gemm_in_pairs(out, a, b, how, n_pieces);
    }

    /// How many of the pieces of a sum that tp divides are this rank's; None where ranks would have parts of pieces.
    pub fn own_pieces(&self) -> Option<usize> {
        (TP_PIECES % self.tp.size() == 0).then(|| TP_PIECES / self.tp.size())
    }

    /// dW[out, in] += dy[T, out]^T x[T, in].
    pub fn add_weight_gradient(&self, weight: &mut Param, dy: &Tensor, x: &Tensor) {
        match self.numerics {
            Numerics::Fast => {
                let how = Gemm { out: weight.next_product(), ..Gemm::TN };
                self.device.gemm(&mut weight.dweight(), dy, x, how);
            }
            Numerics::Reproducible(canonical) => self.write_parts(weight, |dweight, part, out| {
                let (dy, x) = (dy.rows(part.rows.clone()), x.rows(part.rows.clone()));
                canonical.sums.gemm_in_turn(dweight, &dy, &x, Gemm { out, ..Gemm::TN }, &part.starts);
            }),
        }
    }

    /// Accumulates a gradient over the token rows of the micro-batch at work by `add(gradient, part)`, once for all of it or once
    /// for each of its parts.
    pub fn add_token_rows(&self, weight: &mut Param, n_tokens: usize, mut add: impl FnMut(&mut Tensor, Range<usize>)) {
        match self.numerics {
            Numerics::Fast => add(&mut weight.dweight(), 0..n_tokens),
            Numerics::Reproducible(_) => self.add_parts(weight, |dweight, part| add(dweight, part.rows.clone())),
        }
    }

    /// Calls `add(gradient, part)`, which accumulates, for the parts of the micro-batch at work, in order. Panics as `write_parts`.
    pub fn add_parts(&self, weight: &mut Param, mut add: impl FnMut(&mut Tensor, &Part)) {
        self.write_parts(weight, |grad, part, how| {
            if how == Store::Assign {
                self.device.fill_zero(grad);
            }
            add(grad, part);
        });
    }

    /// Calls `write(gradient, part, how)` for the parts of the micro-batch at work, in order; `how` is to assign for the first of a
    /// block, whatever the gradient holds. Panics in `Fast`, and when micro-batches come in another order than that of their samples:
    /// the sum would be another one.
    pub fn write_parts(&self, weight: &mut Param, mut write: impl FnMut(&mut Tensor, &Part, Store)) {
        let Numerics::Reproducible(canonical) = self.numerics else { panic!("parts of a micro-batch in fast numerics") };
        let n_rows = weight.slice.shape[0];
        let (grad, sum) = weight.grad_and_sum_mut();
        let first = canonical.batch().first_sample;
        assert!(sum.n_seen == first, "gradients of sample {first} of a step came when those of sample {} were due", sum.n_seen);
        for part in canonical.parts() {
            sum.add(self, canonical.blocks, (grad, n_rows), &part, &mut |dweight, how| write(dweight, &part, how));
        }
    }
}
