//! Which head ends the model: logits over the vocabulary with their cross entropy (`head`), or reward attributes (`reward`).

use super::batch::MicroBatch;
use super::chunk::Output;
use super::ctx::Ctx;
use super::head::{HeadDeferred as VocabularyDeferred, HeadSaved as VocabularySaved, OutputHead, TokenLosses};
use super::norm::Residual;
use super::param::Param;
use super::reward::{RewardDeferred, RewardHead, RewardSaved};
use super::shared::Asked;
use crate::device::ScratchTensor;

/// One of the two.
pub enum Head {
    /// Of a language model.
    Vocabulary(Box<OutputHead>),
    /// Of a reward model.
    Reward(Box<RewardHead>),
}

/// What the backward needs.
pub enum HeadSaved {
    /// Of a language model.
    Vocabulary(Box<VocabularySaved>),
    /// Of a reward model.
    Reward(Box<RewardSaved>),
}

/// What the weight gradients need once the input gradient is made.
pub enum HeadDeferred {
    /// Of a language model.
    Vocabulary(VocabularyDeferred),
    /// Of a reward model.
    Reward(RewardDeferred),
}

/// A caller mixed up the parts of two models.
const OTHER_HEAD: &str = "what a head saved goes back to that head";

impl Head {
    /// residual[T', H] -> token losses or attributes. `tied` is the embedding of this chunk, if it has one.
    pub fn forward(&self, ctx: &Ctx, residual: Residual, batch: &MicroBatch, tied: Option<&Param>) -> (Output, HeadSaved) {
        match self {
            Head::Vocabulary(head) => {
                let (losses, saved) = head.forward(ctx, residual, batch, tied);
                (Output::TokenLosses(losses), HeadSaved::Vocabulary(Box::new(saved)))
            }
            Head::Reward(head) => {
                let (attributes, saved) = head.forward(ctx, residual, batch);
                (Output::Attributes(attributes), HeadSaved::Reward(Box::new(saved)))
            }
        }
    }

    /// The loss of each question that is asked of a language model, in their order.
    pub fn answers(&self, ctx: &Ctx, residual: Residual, asked: &Asked, tied: Option<&Param>) -> TokenLosses {
        match self {
            Head::Vocabulary(head) => head.answers(ctx, residual, asked, tied),
            Head::Reward(_) => panic!("a reward model has no token losses"),
        }
    }

    /// dx[T', H] assigned; weight gradients accumulated.
    pub fn backward(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: HeadSaved, tied: Option<&mut Param>) -> ScratchTensor {
        match (self, saved) {
            (Head::Vocabulary(head), HeadSaved::Vocabulary(saved)) => head.backward(ctx, batch, *saved, tied),
            (Head::Reward(head), HeadSaved::Reward(saved)) => head.backward(ctx, batch, *saved),
            _ => panic!("{OTHER_HEAD}"),
        }
    }

    /// The first half of `backward`: dx[T', H] assigned; the gradients of the norm accumulated.
    pub fn backward_input(
        &mut self,
        ctx: &Ctx,
        batch: &MicroBatch,
        saved: HeadSaved,
        tied: Option<&Param>,
    ) -> (ScratchTensor, HeadDeferred) {
        match (self, saved) {
            (Head::Vocabulary(head), HeadSaved::Vocabulary(saved)) => {
                let (dx, deferred) = head.backward_input(ctx, batch, *saved, tied);
                (dx, HeadDeferred::Vocabulary(deferred))
            }
            (Head::Reward(head), HeadSaved::Reward(saved)) => {
                let (dx, deferred) = head.backward_input(ctx, batch, *saved);
                (dx, HeadDeferred::Reward(deferred))
            }
            _ => panic!("{OTHER_HEAD}"),
        }
    }

    /// The second half: the gradients of the matrices accumulated.
    pub fn backward_weight(&mut self, ctx: &Ctx, deferred: &HeadDeferred, tied: Option<&mut Param>) {
        match (self, deferred) {
            (Head::Vocabulary(head), HeadDeferred::Vocabulary(deferred)) => head.backward_weight(ctx, deferred, tied),
            (Head::Reward(head), HeadDeferred::Reward(deferred)) => head.backward_weight(ctx, deferred),
            _ => panic!("{OTHER_HEAD}"),
        }
    }

    /// Logits [n, V/tp] of some rows of the residual, for generation. Panics for a reward model: what generates refuses it.
    pub fn logits(&self, ctx: &Ctx, residual: Residual, rows: &[usize], tied: Option<&Param>) -> ScratchTensor {
        match self {
            Head::Vocabulary(head) => head.logits(ctx, residual, rows, tied),
            Head::Reward(_) => panic!("a reward model has no logits"),
        }
    }

    /// Its own parameters, in model order.
    pub fn params(&self) -> Vec<&Param> {
        match self {
            Head::Vocabulary(head) => head.norm.params().chain(&head.weight).collect(),
            Head::Reward(head) => head.norm.params().chain([&head.weight, &head.bias]).collect(),
        }
    }

    /// Its own parameters, in model order, to change.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        match self {
            Head::Vocabulary(head) => {
                let OutputHead { norm, weight, .. } = &mut **head;
                norm.params_mut().chain(weight).collect()
            }
            Head::Reward(head) => {
                let RewardHead { norm, weight, bias } = &mut **head;
                norm.params_mut().chain([weight, bias]).collect()
            }
        }
    }
}
