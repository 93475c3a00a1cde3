//! Runs a pipeline schedule: one `match` over the stage's list of actions. The order of work is in the list (see
//! `parallel::schedule`), the mathematics in `model`; this file only moves activations and gradients between them.

use super::spans;
use crate::comm::{Communicator, Groups, Recv, Send};
use crate::device::ScratchTensor;
use crate::model::chunk::{Chunk, ChunkSaved, MicroBatch, Output};
use crate::model::ctx::Ctx;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::schedule::{Action, ChunkAt, Parcel, PipelineShape, Schedule, What};
use crate::tensor::DType;
use std::collections::HashMap;

/// What a pass over the schedule leaves on this rank.
pub struct Passed {
    /// Unweighted token losses of each micro-batch, [M][T]; only on the last stage, empty elsewhere.
    pub token_losses: Vec<Vec<f32>>,
    /// Attributes of each micro-batch, [M][N * R]; only on the last stage of a reward model, empty elsewhere.
    pub attributes: Vec<Vec<f32>>,
}

/// Whether activations are kept for a backward pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// For training.
    Saved,
    /// For evaluation and scoring: the schedule has forwards only.
    Nothing,
}

/// One stage's interpreter. Tensors in flight are keyed by the parcel that would carry them.
struct Stage<'a> {
    chunks: &'a mut [Chunk],
    ctx: &'a Ctx<'a>,
    layout: ParallelLayout,
    shape: PipelineShape,
    stage: usize,
    batches: &'a [MicroBatch],
    keep: Keep,
    saved: HashMap<(usize, usize), ChunkSaved>,
    inbox: HashMap<(What, usize, usize), ScratchTensor>,
    outbox: HashMap<(What, usize, usize), ScratchTensor>,
    token_losses: Vec<Vec<f32>>,
    attributes: Vec<Vec<f32>>,
}

/// Executes this stage's part of `schedule` on its chunks. `batches[m]` is micro-batch m (all stages hold the tokens: they
/// are small). Weight gradients accumulate in the chunks' parameters; `reduce_gradients(chunks, chunk)` is called where the
/// schedule says that a chunk has seen its last backward.
pub fn run(
    schedule: &Schedule,
    chunks: &mut [Chunk],
    ctx: &Ctx,
    groups: &Groups,
    work: (&[MicroBatch], Keep),
    mut reduce_gradients: impl FnMut(&mut [Chunk], usize),
) -> Passed {
    let (batches, keep) = work;
    assert_eq!(schedule.shape.n_micro, batches.len(), "the schedule is for another number of micro-batches");
    let mut stage = Stage {
        chunks,
        ctx,
        layout: groups.layout,
        shape: schedule.shape,
        stage: groups.at.pp,
        batches,
        keep,
        saved: HashMap::new(),
        inbox: HashMap::new(),
        outbox: HashMap::new(),
        token_losses: vec![Vec::new(); batches.len()],
        attributes: vec![Vec::new(); batches.len()],
    };
    let _pass = spans::of_pass(&groups.flight, keep);
    for action in &schedule.stages[groups.at.pp] {
        let _span = spans::of_action(&groups.flight, action, keep);
        match action {
            Action::Forward { chunk, micro } => stage.forward(*chunk, *micro),
            Action::Backward { chunk, micro } => stage.backward(*chunk, *micro),
            Action::Exchange { sends, recvs } => stage.exchange(&*groups.pp, sends, recvs),
            Action::ReduceGrads { chunk } => reduce_gradients(stage.chunks, *chunk),
        }
    }
    assert!(stage.saved.is_empty() && stage.inbox.is_empty() && stage.outbox.is_empty(), "the schedule left tensors in flight");
    Passed { token_losses: stage.token_losses, attributes: stage.attributes }
}

impl Stage<'_> {
    fn forward(&mut self, chunk: usize, micro: usize) {
        let input = (!self.layout.is_first(self.stage, chunk)).then(|| self.take(What::Activation, chunk, micro));
        let mut saved = ChunkSaved::default();
        let keep = (self.keep == Keep::Saved).then_some(&mut saved);
        let output = self.chunks[chunk].forward(self.ctx, input.as_deref(), &self.batches[micro], keep);
        if self.keep == Keep::Saved {
            self.saved.insert((chunk, micro), saved);
        }
        match output {
            Output::Hidden(hidden) => self.pass_on(What::Activation, chunk, micro, hidden),
            Output::TokenLosses(losses) => self.token_losses[micro] = losses,
            Output::Attributes(attributes) => self.attributes[micro] = attributes,
        }
    }

    fn backward(&mut self, chunk: usize, micro: usize) {
        let doutput = (!self.layout.is_last(self.stage, chunk)).then(|| self.take(What::Gradient, chunk, micro));
        let saved = self.saved.remove(&(chunk, micro)).expect("a checked schedule runs a forward before its backward");
        let dinput = self.chunks[chunk].backward(self.ctx, &self.batches[micro], saved, doutput.as_deref());
        if let Some(dinput) = dinput {
            self.pass_on(What::Gradient, chunk, micro, dinput);
        }
    }

    fn take(&mut self, what: What, chunk: usize, micro: usize) -> ScratchTensor {
        self.inbox.remove(&(what, chunk, micro)).expect("a checked schedule receives before it computes")
    }

    /// Hands a result to the neighbouring model chunk: by message, or at once when that chunk lives on this stage too.
    fn pass_on(&mut self, what: What, chunk: usize, micro: usize, tensor: ScratchTensor) {
        let here = ChunkAt { stage: self.stage, chunk };
        let consumer = match what {
            What::Activation => self.shape.next(here),
            What::Gradient => self.shape.previous(here),
        };
        let consumer = consumer.expect("the ends of the model hand nothing on");
        let shelf = if consumer.stage == self.stage { &mut self.inbox } else { &mut self.outbox };
        shelf.insert((what, consumer.chunk, micro), tensor);
    }

    fn exchange(&mut self, pp: &dyn Communicator, sends: &[Parcel], recvs: &[Parcel]) {
        let key = |parcel: &Parcel| (parcel.what, parcel.chunk, parcel.micro);
        let outgoing: Vec<ScratchTensor> =
            sends.iter().map(|parcel| self.outbox.remove(&key(parcel)).expect("a checked schedule sends what it computed")).collect();
        let mut incoming: Vec<ScratchTensor> = recvs.iter().map(|parcel| self.boundary_tensor(parcel.micro)).collect();
        let sends = sends.iter().zip(&outgoing).map(|(p, tensor)| Send { peer: p.peer, tag: p.tag(), tensor }).collect();
        let awaited = recvs.iter().zip(&mut incoming).map(|(p, tensor)| Recv { peer: p.peer, tag: p.tag(), tensor }).collect();
        pp.start_group(sends, awaited).wait();
        for (parcel, tensor) in recvs.iter().zip(incoming) {
            self.inbox.insert(key(parcel), tensor);
        }
    }

    /// Memory for what crosses a stage boundary: [T, H], or [T/tp, H] under sequence parallelism.
    fn boundary_tensor(&self, micro: usize) -> ScratchTensor {
        let n_rows = self.ctx.local_rows(self.batches[micro].n_tokens());
        let dtype: DType = self.chunks[0].dtype();
        self.ctx.scratch.take(self.ctx.device, &[n_rows, self.chunks[0].config().hidden], dtype)
    }
}
