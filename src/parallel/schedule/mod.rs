//! Pipeline schedules as data: what each stage does in one step, as a list. Made by a pure function ([`gpipe`],
//! [`one_f_one_b`], [`interleaved`], [`zero_bubble_h1`], [`forward_only`]), completed with messages by [`insert_messages`] or
//! [`post_ahead`], proved by [`Schedule::check`], then priced (`parallel::simulate`) or executed. Sources: Huang et al. 2019
//! (GPipe), Narayanan et al. 2019 (1F1B) and 2021 (interleaving; the order is Megatron-LM's), Qi et al. 2023 (zero bubble).
//! This file knows nothing of tensors, time or communicators.
//!
//! # Executing a schedule
//!
//! The executor walks the list of its stage. It keeps two maps from (what, chunk, micro) to a tensor: the inbox and the
//! outbox. The key always names the **consumer**: for an activation, the chunk whose forward reads it; for a gradient, the
//! chunk whose backward reads it (so the gradient of that chunk's output).
//! - `Forward {chunk, micro}`: unless the chunk begins the model, take (Activation, chunk, micro) out of the inbox. Where the
//!   result goes is [`PipelineShape::next`]: `None`, it is the loss; another stage, put it in the outbox under
//!   (Activation, next.chunk, micro); **this very stage** (one stage with several chunks), put it in the inbox, no message.
//! - `Backward {chunk, micro}`: unless the chunk ends the model, take (Gradient, chunk, micro) out of the inbox. The gradient of
//!   its input goes to [`PipelineShape::previous`] in the same way.
//! - `BackwardInput {chunk, micro}`: as `Backward`, but the gradients of the weight matrices are left to
//!   `BackwardWeights {chunk, micro}`, some time later.
//! - `Exchange {sends, recvs}`: post all of them together (sends out of the outbox, recvs into the inbox), then wait for all.
//! - `Post {sends, recvs}`: post each by itself and go on. `Await {sends, recvs}`: wait for these, posted before.
//! - `ReduceGrads {chunk}`: no more gradient is added to this chunk's weights; reduce them over the replicas.
//!
//! # Text
//!
//! A schedule prints as one line a stage: `F0.3` forward of chunk 0, micro-batch 3; `B0.3` its backward, or in halves `I0.3` the
//! gradient of its input and `W0.3` those of its weights; `R0` reduce the gradients of chunk 0; `[>a0.3@1 <g0.1@1]` one exchange:
//! send the activation for chunk 0, micro-batch 3 to stage 1 and receive the gradient for chunk 0, micro-batch 1 from stage 1;
//! `(>a0.3@1)` post that message, `{>a0.3@1}` wait for it.

mod check;
mod display;
mod generate;
mod messages;

pub use check::Liveness;
pub use generate::{forward_only, gpipe, interleaved, one_f_one_b, zero_bubble_h1};
pub use messages::{Rhythm, insert_messages, post_ahead};

use crate::error::Result;
use crate::recipe::ScheduleKind;

/// Sizes of one pipeline and its step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PipelineShape {
    /// Stages.
    pub pp: usize,
    /// Chunks of the model on each stage.
    pub vp: usize,
    /// Micro-batches a step.
    pub n_micro: usize,
}

/// One chunk of the model: where it is. Its number in the model is chunk * pp + stage.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChunkAt {
    /// Pipeline stage.
    pub stage: usize,
    /// Chunk on that stage.
    pub chunk: usize,
}

impl PipelineShape {
    /// The chunk that reads the activations of `at`; `None` at the end of the model. From the last stage it wraps around to
    /// the first stage's next chunk.
    pub fn next(&self, at: ChunkAt) -> Option<ChunkAt> {
        self.chunk_at(at.chunk * self.pp + at.stage + 1)
    }

    /// The chunk whose activations `at` reads; `None` at the beginning of the model.
    pub fn previous(&self, at: ChunkAt) -> Option<ChunkAt> {
        (at.chunk * self.pp + at.stage).checked_sub(1).and_then(|number| self.chunk_at(number))
    }

    fn chunk_at(&self, number: usize) -> Option<ChunkAt> {
        (number < self.pp * self.vp).then(|| ChunkAt { stage: number % self.pp, chunk: number / self.pp })
    }
}

/// What a message carries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum What {
    /// Output of a chunk, read by the forward of the next.
    Activation,
    /// Gradient of a chunk's output, read by its backward.
    Gradient,
}

/// One message of an [`Action::Exchange`]. `chunk` is the receiver's chunk index, for activations and for gradients, in the
/// sender's list and in the receiver's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Parcel {
    /// Activation or gradient.
    pub what: What,
    /// The chunk, on the receiving stage, that reads it.
    pub chunk: usize,
    /// Micro-batch.
    pub micro: usize,
    /// The other stage: the receiver of a send, the sender of a receive.
    pub peer: usize,
}

/// Chunks a stage that [`Parcel::tag`] can tell apart.
pub const MAX_CHUNKS: usize = 64;

impl Parcel {
    /// A number for the message that is equal on both sides and different for each (what, chunk, micro):
    /// (micro * MAX_CHUNKS + chunk) * 2 + what. OpenMPI's largest tag (2^31 - 1) is enough for 16 million micro-batches.
    pub fn tag(&self) -> u32 {
        assert!(self.chunk < MAX_CHUNKS, "chunk {} of at most {MAX_CHUNKS}", self.chunk);
        let what = usize::from(self.what == What::Gradient);
        u32::try_from((self.micro * MAX_CHUNKS + self.chunk) * 2 + what).expect("fewer than 2^25 micro-batches a step")
    }
}

/// One thing a stage does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Run a chunk forwards on a micro-batch.
    Forward {
        /// Chunk on this stage.
        chunk: usize,
        /// Micro-batch.
        micro: usize,
    },
    /// Run a chunk backwards on a micro-batch.
    Backward {
        /// Chunk on this stage.
        chunk: usize,
        /// Micro-batch.
        micro: usize,
    },
    /// Run a chunk backwards on a micro-batch, but for the gradients of its matrices.
    BackwardInput {
        /// Chunk on this stage.
        chunk: usize,
        /// Micro-batch.
        micro: usize,
    },
    /// The gradients of a chunk's matrices from a micro-batch whose `BackwardInput` is done.
    BackwardWeights {
        /// Chunk on this stage.
        chunk: usize,
        /// Micro-batch.
        micro: usize,
    },
    /// Post messages and go on.
    Post {
        /// Messages to other stages.
        sends: Vec<Parcel>,
        /// Messages from other stages.
        recvs: Vec<Parcel>,
    },
    /// Wait for messages that were posted.
    Await {
        /// Messages to other stages.
        sends: Vec<Parcel>,
        /// Messages from other stages.
        recvs: Vec<Parcel>,
    },
    /// Post all messages together, then wait for all.
    Exchange {
        /// Messages to other stages.
        sends: Vec<Parcel>,
        /// Messages from other stages.
        recvs: Vec<Parcel>,
    },
    /// Reduce the weight gradients of a chunk over the replicas.
    ReduceGrads {
        /// Chunk on this stage.
        chunk: usize,
    },
}

/// What every stage does in one step. Prints as text, see the head of this file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Sizes.
    pub shape: PipelineShape,
    /// The actions of each stage, in order.
    pub stages: Vec<Vec<Action>>,
}

/// When messages are posted and waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Messages {
    /// All between two computations at once, and waited for at once: for communicators that carry out groups of messages one
    /// after another.
    Together,
    /// Each by itself: sends when they are made, receives one computation ahead, so that they are under way meanwhile.
    Ahead,
}

/// The complete schedule of a training step. Errors: a recipe error when the shape does not suit the kind.
pub fn training(kind: ScheduleKind, shape: PipelineShape, messages: Messages) -> Result<Schedule> {
    let compute = match kind {
        ScheduleKind::GPipe => gpipe(shape)?,
        ScheduleKind::OneFOneB => one_f_one_b(shape)?,
        ScheduleKind::Interleaved => interleaved(shape)?,
        ScheduleKind::ZeroBubbleH1 => zero_bubble_h1(shape)?,
    };
    // With a single group of micro-batches some stages never alternate, so pairs cannot go in step.
    let in_step = kind == ScheduleKind::Interleaved && shape.n_micro != shape.pp;
    Ok(match messages {
        Messages::Ahead => post_ahead(&compute),
        Messages::Together => insert_messages(&compute, if in_step { Rhythm::Pairs } else { Rhythm::Single }),
    })
}

/// The complete schedule of forwards alone: held-out loss and scoring.
pub fn evaluation(shape: PipelineShape) -> Schedule {
    insert_messages(&forward_only(shape), Rhythm::Single)
}
