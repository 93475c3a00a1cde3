//! Decode steps: one new token of each sequence under way. A step is hundreds of small operations of which each takes the device less
//! time than asking for it takes the host, so a step of as many sequences as one before is recorded, where the device can, and asked for
//! in one call from then on. Positions, pages and lengths are read from device memory that is written before.
//!
//! Of a pipeline each stage records its part; messages go between the parts. Collectives of tensor-parallel ranks are recorded too where
//! their communicator can (`Communicator::is_recordable`): the ranks of a stage see the same steps, so they record and replay the same
//! work in the same order.

use crate::device::{CacheSpan, KvCache, Recording, Scratch, ScratchTensor};
use crate::model::chunk::{CachedInput, CachedOutput, Chunk};
use crate::model::ctx::Ctx;
use crate::tensor::{DType, Tensor};
use std::collections::HashMap;

/// Steps by the number of their sequences, all over one model and its caches, which must live as long.
#[derive(Default)]
pub struct Decoder {
    steps: HashMap<usize, Step>,
    /// For steps only: what a recorded step writes to is nobody else's.
    scratch: Scratch,
}

/// A step of n sequences.
struct Step {
    how: How,
    /// [n] u32, or the residual stream [n, H].
    input: ScratchTensor,
    /// [n] u32
    positions: ScratchTensor,
    /// Logits [n, V/tp], or the residual stream [n, H].
    output: Option<CachedOutput>,
}

/// How the next step of a size runs.
enum How {
    /// It is the first: kernels are loaded and memory is taken.
    First,
    /// It was done before.
    Again,
    /// By asking for all of it in one call.
    Recorded(Box<dyn Recording>),
    /// As the first, every time: the device does not record.
    Plain,
}

/// The new token of each sequence, and its place.
pub struct NewTokens<'a> {
    /// Ids.
    pub tokens: &'a [u32],
    /// Positions in their sequences.
    pub positions: &'a [u32],
    /// Sequence i in row i.
    pub spans: &'a [CacheSpan],
}

impl Decoder {
    /// logits[n, V] after one new token of each sequence; `chunk` is the whole model, on one rank.
    pub fn logits(&mut self, ctx: &Ctx, chunk: &Chunk, new: &NewTokens, caches: &mut [KvCache]) -> &Tensor {
        match self.step(ctx, chunk, new, None, caches) {
            CachedOutput::Logits(logits) => logits,
            CachedOutput::Hidden(_) => unreachable!("the whole model ends in logits"),
        }
    }

    /// The output of a stage: logits[n, V/tp] of the last, the residual stream [n, H] of the others, which but for the first take that of
    /// the stage before, `hidden`. Collective over tp.
    pub fn step(&mut self, ctx: &Ctx, chunk: &Chunk, new: &NewTokens, hidden: Option<&Tensor>, caches: &mut [KvCache]) -> &CachedOutput {
        let n = new.spans.len();
        let ctx = Ctx { scratch: &self.scratch, ..*ctx };
        let step = self.steps.entry(n).or_insert_with(|| {
            let input = hidden.map_or_else(|| ctx.take(&[n], DType::U32), |hidden| ctx.take(hidden.dims(), hidden.dtype()));
            Step { how: How::First, input, positions: ctx.take(&[n], DType::U32), output: None }
        });
        match hidden {
            None => ctx.device.upload(bytemuck::cast_slice(new.tokens), &mut step.input),
            Some(hidden) => ctx.device.copy(&mut step.input, hidden),
        }
        ctx.device.upload(bytemuck::cast_slice(new.positions), &mut step.positions);
        ctx.device.run_together(&mut || step.run(&ctx, chunk, new.spans, caches));
        step.output.as_ref().expect("every way of running leaves an output")
    }
}

impl Step {
    fn run(&mut self, ctx: &Ctx, chunk: &Chunk, spans: &[CacheSpan], caches: &mut [KvCache]) {
        if let How::Recorded(recording) = &self.how {
            if recording.replay(spans) {
                return;
            }
            self.how = How::First; // a sequence has outgrown it
        }
        if let How::Again = self.how {
            self.output = None;
            let work = &mut || self.output = Some(forward(ctx, chunk, (&self.input, &self.positions), spans, caches));
            let recorded = if ctx.tp.is_recordable() { ctx.device.record(work) } else { None };
            // A recording that one rank lacks is of no use to the others, whose collectives would wait for it.
            let n_without = if ctx.tp.size() > 1 { ctx.tp.sum_f64(f64::from(u8::from(recorded.is_none()))) } else { 0.0 };
            self.how = recorded.filter(|_| n_without == 0.0).map_or(How::Plain, How::Recorded);
        }
        match &self.how {
            How::Recorded(recording) => assert!(recording.replay(spans), "it was recorded with them"),
            How::First | How::Again | How::Plain => {
                self.output = None;
                self.output = Some(forward(ctx, chunk, (&self.input, &self.positions), spans, caches));
            }
        }
        if let How::First = self.how {
            self.how = How::Again;
        }
    }
}

fn forward(ctx: &Ctx, chunk: &Chunk, (input, positions): (&Tensor, &Tensor), spans: &[CacheSpan], caches: &mut [KvCache]) -> CachedOutput {
    let rows: Vec<usize> = (0..spans.len()).collect();
    let input = if input.dtype() == DType::U32 { CachedInput::Tokens(input) } else { CachedInput::Hidden(input) };
    chunk.forward_cached(ctx, input, positions, spans, caches, &rows)
}
