//! Decode steps: one new token of each sequence under way. A step is hundreds of small operations of which each takes the device less
//! time than asking for it takes the host, so a step of as many sequences as one before is recorded, where the device can, and asked for
//! in one call from then on. Positions, pages and lengths are read from device memory that is written before.

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
    /// [n] u32
    tokens: ScratchTensor,
    /// [n] u32
    positions: ScratchTensor,
    /// [n, V]
    logits: Option<ScratchTensor>,
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
        let n = new.spans.len();
        let ctx = Ctx { scratch: &self.scratch, ..*ctx };
        let step = self.steps.entry(n).or_insert_with(|| {
            let [tokens, positions] = [(); 2].map(|()| ctx.take(&[n], DType::U32));
            Step { how: How::First, tokens, positions, logits: None }
        });
        ctx.device.upload(bytemuck::cast_slice(new.tokens), &mut step.tokens);
        ctx.device.upload(bytemuck::cast_slice(new.positions), &mut step.positions);
        ctx.device.run_together(&mut || step.run(&ctx, chunk, new.spans, caches));
        step.logits.as_ref().expect("every way of running leaves logits")
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
            self.logits = None;
            let recorded =
                ctx.device.record(&mut || self.logits = Some(forward(ctx, chunk, (&self.tokens, &self.positions), spans, caches)));
            self.how = recorded.map_or(How::Plain, How::Recorded);
        }
        match &self.how {
            How::Recorded(recording) => assert!(recording.replay(spans), "it was recorded with them"),
            How::First | How::Again | How::Plain => {
                self.logits = None;
                self.logits = Some(forward(ctx, chunk, (&self.tokens, &self.positions), spans, caches));
            }
        }
        if let How::First = self.how {
            self.how = How::Again;
        }
    }
}

fn forward(ctx: &Ctx, chunk: &Chunk, new: (&Tensor, &Tensor), spans: &[CacheSpan], caches: &mut [KvCache]) -> ScratchTensor {
    let (tokens, positions) = new;
    let rows: Vec<usize> = (0..spans.len()).collect();
    match chunk.forward_cached(ctx, CachedInput::Tokens(tokens), positions, spans, caches, &rows) {
        CachedOutput::Logits(logits) => logits,
        CachedOutput::Hidden(_) => unreachable!("the whole model ends in logits"),
    }
}
