//! The end of a language model: final norm, vocabulary-parallel logits, cross entropy. No rank ever holds all tokens' logits of the
//! whole vocabulary: the softmax needs two numbers a token from the other ranks.

use super::batch::MicroBatch;
use super::ctx::Ctx;
use super::linear::{column_backward, column_backward_input, column_backward_weight, column_forward, normed_forward};
use super::norm::{Norm, NormSaved, Residual};
use super::numerics::{Canonical, Numerics};
use super::param::Param;
use super::shared::Asked;
use crate::comm::{Recv, ReduceOp, Send};
use crate::device::ScratchTensor;
use crate::parallel::pieces::TP_PIECES;
use crate::tensor::{DType, Tensor};
use std::ops::Range;

/// Final norm and output layer.
pub struct OutputHead {
    /// Before the output layer.
    pub norm: Norm,
    /// [V/tp, H]; None when the chunk's own embedding is the output layer.
    pub weight: Option<Param>,
    /// Pieces of the tokenizer: rows past it are padding and take no part in the softmax.
    pub vocab_size: usize,
}

/// What the head says of the targets of a micro-batch.
pub struct TokenLosses {
    /// Unweighted loss of each token, -ln p(target): [T], in nats.
    pub losses: Vec<f32>,
    /// Whether no other token is more likely than the target: [T].
    pub is_greedy: Vec<bool>,
}

/// What the backward needs.
pub struct HeadSaved {
    norm: NormSaved,
    /// norm's output [T', H].
    normed: ScratchTensor,
    /// [T, V/tp]; the backward turns them into their gradient.
    logits: ScratchTensor,
    /// Largest logit over the whole vocabulary: [T] f32.
    max: ScratchTensor,
    /// Sum of exp(logit - max) over the whole vocabulary: [T] f32.
    sum: ScratchTensor,
}

/// What the weight gradient needs once the input gradient is made.
pub struct HeadDeferred {
    /// norm's output [T', H].
    normed: ScratchTensor,
    /// [T, V/tp]
    dlogits: ScratchTensor,
}

/// Which part of the vocabulary a weight holds.
struct Part {
    first_row: usize,
    n_valid: usize,
    /// Pieces of the tokenizer.
    n_vocabulary: usize,
}

/// Tag of logits that go to the rank that sums them.
const LOGITS: u32 = 0;

impl OutputHead {
    fn part(&self, weight: &Param) -> Part {
        let (first_row, rows) = (weight.slice.offset[0], weight.slice.shape[0]);
        Part { first_row, n_valid: self.vocab_size.saturating_sub(first_row).min(rows), n_vocabulary: self.vocab_size }
    }

    /// residual[T', H] -> the loss of each token.
    pub fn forward(&self, ctx: &Ctx, residual: Residual, batch: &MicroBatch, tied: Option<&Param>) -> (TokenLosses, HeadSaved) {
        let weight = self.weight.as_ref().or(tied).expect("an output layer, its own or tied");
        let part = self.part(weight);
        let (normed, norm) = self.norm.forward(ctx, residual);
        let logits = column_forward(ctx, weight, &normed);
        let [max, sum, target] = match ctx.numerics {
            Numerics::Fast if ctx.tp.size() == 1 => in_one_pass(ctx, (&logits, &part), &batch.targets),
            _ => {
                let max = max_of(ctx, &logits, &part);
                let [sum, target] = sums_of(ctx, (&logits, &part), &max, &batch.targets);
                [max, sum, target]
            }
        };
        let of_tokens = losses(ctx, [&max, &sum, &target]);
        (of_tokens, HeadSaved { norm, normed, logits, max, sum })
    }

    /// The loss of each question, in their order; rows that are asked nothing have no logits, and rows that are asked several things
    /// have them once. The bits are those of `forward` in reproducible numerics; in fast ones its single pass may sum in another order.
    pub fn answers(&self, ctx: &Ctx, residual: Residual, asked: &Asked, tied: Option<&Param>) -> TokenLosses {
        assert!(!ctx.is_sharded(), "questions are of rows that every rank has");
        let part = self.part(self.weight.as_ref().or(tied).expect("an output layer, its own or tied"));
        let logits = self.logits(ctx, residual, &asked.rows, tied);
        let max = max_of(ctx, &logits, &part);
        let mut answers = TokenLosses { losses: vec![0.0; asked.numbers.len()], is_greedy: vec![false; asked.numbers.len()] };
        let mut numbers = asked.numbers.iter();
        for targets in &asked.targets {
            let n = targets.n_rows();
            let max = max.rows(0..n);
            let [sum, target] = sums_of(ctx, (&logits.rows(0..n), &part), &max, targets);
            let found = losses(ctx, [&max, &sum, &target]);
            for ((loss, is_greedy), number) in found.losses.into_iter().zip(found.is_greedy).zip(&mut numbers) {
                (answers.losses[*number], answers.is_greedy[*number]) = (loss, is_greedy);
            }
        }
        answers
    }

    /// dx[T', H] assigned; weight gradients accumulated. The loss is sum over tokens of weights[t] * loss[t].
    pub fn backward(&mut self, ctx: &Ctx, batch: &MicroBatch, mut saved: HeadSaved, tied: Option<&mut Param>) -> ScratchTensor {
        self.loss_backward(ctx, batch, &mut saved, tied.as_deref());
        let weight = self.weight.as_mut().or(tied).expect("an output layer, its own or tied");
        weight.swap_gradients(); // nothing, unless the two uses of a tied embedding are summed apart
        let dnormed = column_backward(ctx, weight, &saved.normed, &saved.logits);
        weight.swap_gradients();
        self.norm_backward(ctx, &saved.norm, &dnormed)
    }

    /// The first half of `backward`: dx[T', H] assigned; the gradients of the norm accumulated.
    pub fn backward_input(
        &mut self,
        ctx: &Ctx,
        batch: &MicroBatch,
        mut saved: HeadSaved,
        tied: Option<&Param>,
    ) -> (ScratchTensor, HeadDeferred) {
        self.loss_backward(ctx, batch, &mut saved, tied);
        let weight = self.weight.as_ref().or(tied).expect("an output layer, its own or tied");
        let dnormed = column_backward_input(ctx, weight, &saved.logits);
        let dx = self.norm_backward(ctx, &saved.norm, &dnormed);
        (dx, HeadDeferred { normed: saved.normed, dlogits: saved.logits })
    }

    /// The second half: the gradient of the output layer accumulated.
    pub fn backward_weight(&mut self, ctx: &Ctx, deferred: &HeadDeferred, tied: Option<&mut Param>) {
        let weight = self.weight.as_mut().or(tied).expect("an output layer, its own or tied");
        weight.swap_gradients(); // as in `backward`
        column_backward_weight(ctx, weight, &deferred.normed, &deferred.dlogits);
        weight.swap_gradients();
    }

    /// The saved logits become their gradient.
    fn loss_backward(&self, ctx: &Ctx, batch: &MicroBatch, saved: &mut HeadSaved, tied: Option<&Param>) {
        let Part { first_row, n_valid, .. } = self.part(self.weight.as_ref().or(tied).expect("an output layer, its own or tied"));
        let HeadSaved { logits, max, sum, .. } = saved;
        ctx.device.cross_entropy_gradient(logits, max, sum, &batch.targets, &batch.weights, first_row, n_valid);
    }

    /// dx[T', H] assigned; the gradients of the norm accumulated.
    fn norm_backward(&mut self, ctx: &Ctx, norm: &NormSaved, dnormed: &Tensor) -> ScratchTensor {
        let mut dx = ctx.take(norm.x.dims(), norm.x.dtype());
        ctx.device.fill_zero(&mut dx);
        self.norm.backward(ctx, norm, dnormed, &mut dx);
        dx
    }

    /// Logits [n, V/tp] of some rows of the residual, for generation (rows replicated over tp).
    pub fn logits(&self, ctx: &Ctx, residual: Residual, rows: &[usize], tied: Option<&Param>) -> ScratchTensor {
        let weight = self.weight.as_ref().or(tied).expect("an output layer, its own or tied");
        if rows.iter().copied().eq(0..residual.n_rows()) {
            // A decode step wants them all.
            return normed_forward(ctx, weight, &self.norm, residual, None, |normed| column_forward(ctx, weight, normed)).0;
        }
        let (normed, _) = self.norm.forward(ctx, residual);
        let mut wanted = ctx.take(&[rows.len(), normed.row_len()], normed.dtype());
        let mut to = 0;
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            ctx.device.copy(&mut wanted.rows_mut(to..to + run.len()), &normed.rows(run[0]..run[0] + run.len()));
            to += run.len();
        }
        column_forward(ctx, weight, &wanted)
    }
}

/// The largest logit of each row over the whole vocabulary, [T] f32.
fn max_of(ctx: &Ctx, logits: &Tensor, part: &Part) -> ScratchTensor {
    let mut max = ctx.take(&[logits.n_rows()], DType::F32);
    ctx.device.cross_entropy_max(&mut max, logits, part.n_valid);
    ctx.tp.all_reduce(&mut max, ReduceOp::Max); // tp: over the vocabulary
    max
}

/// Sums of exponentials and logits of targets, [T] f32 each.
type Sums = [ScratchTensor; 2];

/// logits[T, V], targets[T] -> maxima, sums of exponentials and logits of the targets, [T] f32 each, on the one rank that has the whole
/// vocabulary. Ranks that share it have to know the maximum over all of it first, and in reproducible mode the sum has a tree.
fn in_one_pass(ctx: &Ctx, (logits, part): (&Tensor, &Part), targets: &Tensor) -> [ScratchTensor; 3] {
    let [mut max, mut sum, mut target] = [(); 3].map(|()| ctx.take(&[logits.n_rows()], DType::F32));
    ctx.device.cross_entropy_forward(&mut max, &mut sum, &mut target, logits, targets, part.first_row, part.n_valid);
    [max, sum, target]
}

/// logits[T, V/tp], max[T], targets[T] -> sums of exponentials and logits of the targets over the whole vocabulary.
fn sums_of(ctx: &Ctx, (logits, part): (&Tensor, &Part), max: &Tensor, targets: &Tensor) -> Sums {
    let Part { first_row, n_valid, .. } = *part;
    let new = || [(); 2].map(|()| ctx.take(&[logits.n_rows()], DType::F32));
    match (ctx.numerics, ctx.own_pieces()) {
        (Numerics::Fast, _) => {
            let [mut sum, mut target] = new();
            ctx.device.cross_entropy_sum(&mut sum, &mut target, logits, max, targets, first_row, n_valid);
            over_the_vocabulary(ctx, [sum, target])
        }
        (Numerics::Reproducible(canonical), Some(n_pieces)) => {
            let ([mut sum, mut target], columns) = (new(), (first_row, n_valid));
            canonical.sums.cross_entropy_sum_in_pairs(&mut sum, &mut target, logits, max, targets, columns, n_pieces);
            over_the_vocabulary(ctx, [sum, target])
        }
        (Numerics::Reproducible(canonical), None) => sums_by_rows(ctx, &canonical, (logits, part), max, targets),
    }
}

/// max[T], sum[T], target[T] over the whole vocabulary -> the loss of each target.
fn losses(ctx: &Ctx, values: [&Tensor; 3]) -> TokenLosses {
    let [max_host, sum_host, target_host] = values.map(|x| download(ctx, x));
    // The terms may be large and nearly cancel: one rounding, at the end.
    let loss = |t: usize| (f64::from(sum_host[t]).ln() + f64::from(max_host[t]) - f64::from(target_host[t])) as f32;
    let is_greedy = target_host.iter().zip(&max_host).map(|(target, max)| target == max).collect();
    TokenLosses { losses: (0..sum_host.len()).map(loss).collect(), is_greedy }
}

/// What each rank has of its part of the vocabulary, of all of it.
fn over_the_vocabulary(ctx: &Ctx, [mut sum, mut target]: Sums) -> Sums {
    ctx.tp.all_reduce(&mut sum, ctx.sum_op()); // tp: over the vocabulary
    ctx.tp.all_reduce(&mut target, ReduceOp::Sum); // tp: the one rank that has it, the others 0
    [sum, target]
}

/// The same on ranks that have no whole pieces of the sum, for passes without gradients: each gets the logits of T/tp tokens over the
/// whole vocabulary from all, (tp - 1) / tp of T V / tp numbers, and sums theirs as a single rank would. So no rank has more logits
/// than its own twice.
fn sums_by_rows(ctx: &Ctx, canonical: &Canonical, (logits, part): (&Tensor, &Part), max: &Tensor, targets: &Tensor) -> Sums {
    let (n_ranks, n_tokens) = (ctx.tp.size(), logits.n_rows());
    let n_each = n_tokens.div_ceil(n_ranks);
    let rows_of = |rank: usize| (rank * n_each).min(n_tokens)..((rank + 1) * n_each).min(n_tokens);
    let (mine, whole) = (rows_of(ctx.tp.rank()), exchange_rows(ctx, logits, &rows_of));
    let [mut sum, mut target] = [(); 2].map(|()| ctx.take(&[n_each], DType::F32));
    if !mine.is_empty() {
        let [sum, target] = &mut [sum.rows_mut(0..mine.len()), target.rows_mut(0..mine.len())];
        let (max, targets, columns) = (max.rows(mine.clone()), targets.rows(mine), (0, part.n_vocabulary));
        canonical.sums.cross_entropy_sum_in_pairs(sum, target, &whole, &max, &targets, columns, TP_PIECES);
    }
    [sum, target].map(|mine| {
        let mut all = ctx.take(&[n_ranks * n_each], DType::F32);
        ctx.tp.all_gather(&mine, &mut all); // tp: over the tokens
        ctx.copy_of(&all.rows(0..n_tokens))
    })
}

/// logits[T, V/tp] of all ranks -> [n, V] of the n rows `rows_of` this rank.
fn exchange_rows(ctx: &Ctx, logits: &Tensor, rows_of: &dyn Fn(usize) -> Range<usize>) -> ScratchTensor {
    let (n_ranks, rank, columns) = (ctx.tp.size(), ctx.tp.rank(), logits.row_len());
    let n = rows_of(rank).len();
    let mut parts = ctx.take(&[n_ranks * n, columns], logits.dtype());
    ctx.device.copy(&mut parts.rows_mut(rank * n..(rank + 1) * n), &logits.rows(rows_of(rank)));
    for step in 1..n_ranks {
        let (to, from) = ((rank + step) % n_ranks, (rank + n_ranks - step) % n_ranks);
        let (theirs, mut part) = (logits.rows(rows_of(to)), parts.rows_mut(from * n..(from + 1) * n));
        let sends = (theirs.n_rows() > 0).then(|| Send { peer: to, tag: LOGITS, tensor: &theirs });
        let recvs = (n > 0).then(|| Recv { peer: from, tag: LOGITS, tensor: &mut part });
        ctx.tp.start_group(sends.into_iter().collect(), recvs.into_iter().collect()).wait(); // tp: a part of the vocabulary
    }
    let mut whole = ctx.take(&[n, n_ranks * columns], logits.dtype());
    ctx.device.join_columns(&mut whole, &parts);
    whole
}

fn download(ctx: &Ctx, x: &Tensor) -> Vec<f32> {
    let mut values = vec![0f32; x.n_elements()];
    ctx.device.download(x, bytemuck::cast_slice_mut(&mut values));
    values
}
