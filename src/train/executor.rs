//! Runs a pipeline schedule: one `match` over the stage's list of actions. The order of work is in the list (see
//! `parallel::schedule`), the mathematics in `model`; this file only moves activations and gradients between them.

use super::spans;
use crate::comm::{Communicator, Groups, InFlight, Recv, Send};
use crate::device::ScratchTensor;
use crate::fault;
use crate::model::chunk::{Chunk, ChunkDeferred, ChunkSaved, MicroBatch, Output, Part};
use crate::model::ctx::Ctx;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::schedule::{Action, ChunkAt, Parcel, PipelineShape, Schedule, What};
use crate::tensor::DType;
use std::collections::HashMap;

/// What a pass over the schedule leaves on this rank.
pub struct Passed {
    /// Unweighted token losses of each micro-batch, [M][T]; only on the last stage, empty elsewhere.
    pub token_losses: Vec<Vec<f32>>,
    /// Whether no other token is more likely than the target, [M][T]; where there are token losses.
    pub is_greedy: Vec<Vec<bool>>,
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

/// What goes on between replicas while a schedule runs.
pub trait Between {
    /// Before the first forward through these parameters of a chunk.
    fn before_forward(&mut self, chunk: usize, part: Part);
    /// No more is added to these gradients of a chunk.
    fn gradients_done(&mut self, chunk: usize, part: Part);
}

/// Nothing: for forwards alone.
pub struct Nothing;

impl Between for Nothing {
    fn before_forward(&mut self, _: usize, _: Part) {}
    fn gradients_done(&mut self, _: usize, _: Part) {}
}

/// What identifies a tensor that crosses a boundary: the parcel that would carry it.
type Key = (What, usize, usize);

/// One stage's interpreter.
struct Stage<'a> {
    chunks: &'a mut [Chunk],
    ctx: &'a Ctx<'a>,
    pp: &'a dyn Communicator,
    layout: ParallelLayout,
    shape: PipelineShape,
    stage: usize,
    batches: &'a [MicroBatch],
    keep: Keep,
    between: &'a mut dyn Between,
    saved: HashMap<(usize, usize), ChunkSaved>,
    deferred: HashMap<(usize, usize), ChunkDeferred>,
    inbox: HashMap<Key, ScratchTensor>,
    outbox: HashMap<Key, ScratchTensor>,
    sending: HashMap<Key, InFlight<'a, ScratchTensor>>,
    receiving: HashMap<Key, InFlight<'a, ScratchTensor>>,
    token_losses: Vec<Vec<f32>>,
    is_greedy: Vec<Vec<bool>>,
    attributes: Vec<Vec<f32>>,
    /// Of each chunk: whether it has run forwards, and how many micro-batches will still add to its gradients.
    has_run: Vec<bool>,
    backwards_left: Vec<usize>,
}

/// Executes this stage's part of `schedule` on its chunks. `batches[m]` is micro-batch m (all stages hold the tokens: they
/// are small). Weight gradients accumulate in the chunks' parameters; `between` hears, part by part, which parameters the first
/// micro-batch is about to use, and which gradients the last one has completed.
pub fn run(
    schedule: &Schedule,
    chunks: &mut [Chunk],
    ctx: &Ctx,
    groups: &Groups,
    work: (&[MicroBatch], Keep),
    between: &mut dyn Between,
) -> Passed {
    let (batches, keep) = work;
    assert_eq!(schedule.shape.n_micro, batches.len(), "the schedule is for another number of micro-batches");
    let n_chunks = chunks.len();
    chunks.iter_mut().for_each(Chunk::forget_rounded);
    let mut stage = Stage {
        chunks,
        ctx,
        pp: &*groups.pp,
        layout: groups.layout,
        shape: schedule.shape,
        stage: groups.at.pp,
        batches,
        keep,
        between,
        saved: HashMap::new(),
        deferred: HashMap::new(),
        inbox: HashMap::new(),
        outbox: HashMap::new(),
        sending: HashMap::new(),
        receiving: HashMap::new(),
        token_losses: vec![Vec::new(); batches.len()],
        is_greedy: vec![Vec::new(); batches.len()],
        attributes: vec![Vec::new(); batches.len()],
        has_run: vec![false; n_chunks],
        backwards_left: vec![batches.len(); n_chunks],
    };
    let _pass = spans::of_pass(&groups.flight, keep);
    for action in &schedule.stages[groups.at.pp] {
        let _span = spans::of_action(&groups.flight, action, keep);
        stage.run(action);
    }
    assert!(stage.saved.is_empty() && stage.deferred.is_empty(), "the schedule left backwards undone");
    assert!(stage.inbox.is_empty() && stage.outbox.is_empty(), "the schedule left tensors unread");
    assert!(stage.sending.is_empty() && stage.receiving.is_empty(), "the schedule left messages on their way");
    Passed { token_losses: stage.token_losses, is_greedy: stage.is_greedy, attributes: stage.attributes }
}

fn key(parcel: &Parcel) -> Key {
    (parcel.what, parcel.chunk, parcel.micro)
}

impl Stage<'_> {
    fn run(&mut self, action: &Action) {
        match action {
            Action::Forward { .. } => fault::at("forward"),
            Action::Backward { .. } | Action::BackwardInput { .. } => fault::at("backward"),
            _ => {}
        }
        match action {
            Action::Forward { chunk, micro } => self.forward(*chunk, *micro),
            Action::Backward { chunk, micro } => self.backward(*chunk, *micro),
            Action::BackwardInput { chunk, micro } => self.backward_input(*chunk, *micro),
            Action::BackwardWeights { chunk, micro } => self.backward_weights(*chunk, *micro),
            Action::Exchange { sends, recvs } => self.exchange(sends, recvs),
            Action::Post { sends, recvs } => self.post(sends, recvs),
            Action::Await { sends, recvs } => self.wait(sends, recvs),
            // Begun part by part in the last backward.
            Action::ReduceGrads { chunk } => {
                assert_eq!(self.backwards_left[*chunk], 0, "a checked schedule reduces after the last backward")
            }
        }
    }

    fn forward(&mut self, chunk: usize, micro: usize) {
        let input = (!self.layout.is_first(self.stage, chunk)).then(|| self.take(What::Activation, chunk, micro));
        let mut saved = ChunkSaved::default();
        let keep = (self.keep == Keep::Saved).then_some(&mut saved);
        let is_first = !std::mem::replace(&mut self.has_run[chunk], true);
        let mut ready = |part: Part| {
            if is_first {
                self.between.before_forward(chunk, part)
            }
        };
        let output = self.chunks[chunk].forward_when(self.ctx, input.as_deref(), &self.batches[micro], keep, &mut ready);
        if self.keep == Keep::Saved {
            self.saved.insert((chunk, micro), saved);
        }
        match output {
            Output::Hidden(hidden) => self.pass_on(What::Activation, chunk, micro, hidden),
            Output::TokenLosses(tokens) => (self.token_losses[micro], self.is_greedy[micro]) = (tokens.losses, tokens.is_greedy),
            Output::Attributes(attributes) => self.attributes[micro] = attributes,
        }
    }

    fn backward(&mut self, chunk: usize, micro: usize) {
        let (doutput, saved) = (self.output_gradient(chunk, micro), self.saved_of(chunk, micro));
        let mut done = done(&mut *self.between, &mut self.backwards_left, chunk);
        let dinput = self.chunks[chunk].backward_then(self.ctx, &self.batches[micro], saved, doutput.as_deref(), &mut done);
        drop(done);
        self.pass_gradient_on(chunk, micro, dinput);
    }

    fn backward_input(&mut self, chunk: usize, micro: usize) {
        let (doutput, saved) = (self.output_gradient(chunk, micro), self.saved_of(chunk, micro));
        let (dinput, deferred) = self.chunks[chunk].backward_input(self.ctx, &self.batches[micro], saved, doutput.as_deref());
        self.deferred.insert((chunk, micro), deferred);
        self.pass_gradient_on(chunk, micro, dinput);
    }

    fn backward_weights(&mut self, chunk: usize, micro: usize) {
        let deferred = self.deferred.remove(&(chunk, micro)).expect("a checked schedule runs the first half before the second");
        let mut done = done(&mut *self.between, &mut self.backwards_left, chunk);
        self.chunks[chunk].backward_weights_then(self.ctx, &self.batches[micro], deferred, &mut done);
    }

    fn output_gradient(&mut self, chunk: usize, micro: usize) -> Option<ScratchTensor> {
        (!self.layout.is_last(self.stage, chunk)).then(|| self.take(What::Gradient, chunk, micro))
    }

    fn saved_of(&mut self, chunk: usize, micro: usize) -> ChunkSaved {
        self.saved.remove(&(chunk, micro)).expect("a checked schedule runs a forward before its backward")
    }

    fn pass_gradient_on(&mut self, chunk: usize, micro: usize, dinput: Option<ScratchTensor>) {
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

    fn exchange(&mut self, sends: &[Parcel], recvs: &[Parcel]) {
        let outgoing: Vec<ScratchTensor> = sends.iter().map(|parcel| self.outgoing(parcel)).collect();
        let mut incoming: Vec<ScratchTensor> = recvs.iter().map(|parcel| self.boundary_tensor(parcel.micro)).collect();
        let sends = sends.iter().zip(&outgoing).map(|(p, tensor)| Send { peer: p.peer, tag: p.tag(), tensor }).collect();
        let awaited = recvs.iter().zip(&mut incoming).map(|(p, tensor)| Recv { peer: p.peer, tag: p.tag(), tensor }).collect();
        self.pp.start_group(sends, awaited).wait();
        for (parcel, tensor) in recvs.iter().zip(incoming) {
            self.inbox.insert(key(parcel), tensor);
        }
    }

    fn post(&mut self, sends: &[Parcel], recvs: &[Parcel]) {
        for parcel in recvs {
            let (peer, tag) = (parcel.peer, parcel.tag());
            let tensor = self.boundary_tensor(parcel.micro);
            let start = InFlight::start(self.pp, tensor, |pp, tensor| pp.start_group(Vec::new(), vec![Recv { peer, tag, tensor }]));
            self.receiving.insert(key(parcel), start);
        }
        for parcel in sends {
            let (peer, tag) = (parcel.peer, parcel.tag());
            let tensor = self.outgoing(parcel);
            let start = InFlight::start(self.pp, tensor, |pp, tensor| pp.start_group(vec![Send { peer, tag, tensor }], Vec::new()));
            self.sending.insert(key(parcel), start);
        }
    }

    fn wait(&mut self, sends: &[Parcel], recvs: &[Parcel]) {
        for parcel in sends {
            drop(self.sending.remove(&key(parcel)).expect("a checked schedule waits for what it posted").wait());
        }
        for parcel in recvs {
            let tensor = self.receiving.remove(&key(parcel)).expect("a checked schedule waits for what it posted").wait();
            self.inbox.insert(key(parcel), tensor);
        }
    }

    fn outgoing(&mut self, parcel: &Parcel) -> ScratchTensor {
        self.outbox.remove(&key(parcel)).expect("a checked schedule sends what it computed")
    }

    /// Memory for what crosses a stage boundary: [T, H], or [T/tp, H] under sequence parallelism.
    fn boundary_tensor(&self, micro: usize) -> ScratchTensor {
        let n_rows = self.ctx.local_rows(self.batches[micro].n_tokens());
        let dtype: DType = self.chunks[0].dtype();
        self.ctx.scratch.take(self.ctx.device, &[n_rows, self.chunks[0].config().hidden], dtype)
    }
}

/// Tells `between` of the parts that a backward completes, when it is the chunk's last.
fn done<'a>(between: &'a mut dyn Between, backwards_left: &mut [usize], chunk: usize) -> impl FnMut(Part) + use<'a> {
    backwards_left[chunk] -= 1;
    let is_last = backwards_left[chunk] == 0;
    move |part| {
        if is_last {
            between.gradients_done(chunk, part);
        }
    }
}
