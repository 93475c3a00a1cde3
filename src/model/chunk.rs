//! The part of the model between two pipeline boundaries: blocks, and the embedding or the head where they belong. The whole
//! model is one chunk when pp = vp = 1.

pub use super::batch::MicroBatch;
use super::block::{Block, BlockDeferred, BlockKept};
use super::config::{ModelConfig, ParamSpec};
use super::ctx::Ctx;
use super::embedding::VocabParallelEmbedding;
pub use super::head::TokenLosses;
use super::heads::{Head, HeadDeferred, HeadSaved};
use super::norm::Residual;
use super::numerics::Numerics;
pub use super::param::Purpose;
use super::param::{self, Param, Uses};
use super::parts::Parts;
pub use super::reward::Ratings;
use crate::comm::ReduceOp;
use crate::device::{CacheSpan, Device, KvCache, PAGE_TOKENS, ScratchTensor};
use crate::error::Result;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::recipe::Recompute;
use crate::tensor::{DType, Tensor};
use std::ops::Range;

/// What a chunk's forward gives.
pub enum Output {
    /// The residual stream [T', H] for the next chunk.
    Hidden(ScratchTensor),
    /// From the last chunk of a language model.
    TokenLosses(TokenLosses),
    /// Attributes of each sequence [N, R], row by row, from the last chunk of a reward model.
    Attributes(Vec<f32>),
}

/// The parameters of the embedding, of a block, or of the head.
pub struct Part<'a> {
    /// Index in `Chunk::params` of the first.
    pub first_idx: usize,
    /// In model order.
    pub params: Vec<&'a mut Param>,
}

/// Hears of parts in the order in which a pass reaches them.
pub type OnPart<'a> = &'a mut dyn FnMut(Part);

/// What a chunk's backward needs.
#[derive(Default)]
pub struct ChunkSaved {
    blocks: Vec<BlockKept>,
    head: Option<HeadSaved>,
}

/// What a chunk's weight gradients need once the gradient of its input is made.
pub struct ChunkDeferred {
    head: Option<HeadDeferred>,
    /// Last block first.
    blocks: Vec<BlockDeferred>,
    /// Gradient of the embedding's output [T', H], in the first chunk.
    dembedded: Option<ScratchTensor>,
}

/// Input of a cached forward.
pub enum CachedInput<'a> {
    /// Tokens [n] u32, for the first chunk.
    Tokens(&'a Tensor),
    /// The residual stream [n, H], for the others.
    Hidden(&'a Tensor),
}

/// Output of a cached forward.
pub enum CachedOutput {
    /// The residual stream [n, H] for the next chunk; from the last when no rows are wanted.
    Hidden(ScratchTensor),
    /// Logits of the wanted rows [wanted, V/tp], from the last chunk.
    Logits(ScratchTensor),
}

/// A chunk on one rank.
pub struct Chunk {
    config: ModelConfig,
    dtype: DType,
    embedding: Option<VocabParallelEmbedding>,
    blocks: Vec<Block>,
    /// Of each block.
    recompute: Vec<Recompute>,
    head: Option<Head>,
}

/// The stream on its way through the blocks.
struct Passing {
    /// The chunk's input, or what the last block adds, [T', H].
    delta: ScratchTensor,
    /// What it adds to, unless it is kept for the backward (or there was no block yet).
    stream: Option<ScratchTensor>,
}

impl Chunk {
    /// Zeroed parameters of chunk `chunk_idx` (0..vp) of stage `at.pp`, with layers divided evenly. Err: out of memory.
    pub fn new(
        device: &dyn Device,
        config: &ModelConfig,
        layout: &ParallelLayout,
        at: Coords,
        chunk_idx: usize,
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Chunk> {
        let layers = layout.layers(at.pp, chunk_idx, config.n_layers);
        Chunk::of_layers(device, config, (layout, at), (chunk_idx, layers), dtype, purpose)
    }

    /// The same with these layers.
    pub fn of_layers(
        device: &dyn Device,
        config: &ModelConfig,
        (layout, at): (&ParallelLayout, Coords),
        (chunk_idx, layers): (usize, Range<usize>),
        dtype: DType,
        purpose: Purpose,
    ) -> Result<Chunk> {
        let make = |spec: ParamSpec| -> Result<(String, Param)> {
            let spec = if purpose == Purpose::Training { spec } else { spec.of_passes(layout.tp) };
            let name = spec.name.clone();
            Ok((name, Param::new(device, spec, (layout, at), dtype, purpose)?))
        };
        let params = config.specs_of_layers(layout, at.pp, chunk_idx, layers.clone()).into_iter().map(make).collect::<Result<_>>()?;
        let mut parts = Parts { params };
        let (first, last) = (layout.is_first(at.pp, chunk_idx), layout.is_last(at.pp, chunk_idx));
        let blocks: Vec<Block> = layers.map(|layer| parts.block(layer, config, layout.tp)).collect();
        let recompute = vec![Recompute::None; blocks.len()];
        let embedding = first.then(|| VocabParallelEmbedding { weight: parts.take("embedding.weight") });
        let head = last.then(|| parts.head(config, first));
        assert!(parts.params.is_empty(), "parameters without a place: {:?}", parts.params.keys());
        Ok(Chunk { config: config.clone(), dtype, embedding, blocks, recompute, head })
    }

    /// The function it is a part of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Storage of weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sets all weights to their initial values (rounded to the chunk's dtype).
    pub fn initialise(&mut self, device: &dyn Device, seed: u64) {
        for param in self.params_mut() {
            let values = param::init_values(&param.spec, &param.slice, seed);
            let rows = 0..param.slice.shape[0];
            let bf16: Vec<half::bf16>;
            let bytes: &[u8] = match param.value.dtype() {
                DType::BF16 => {
                    bf16 = values.iter().map(|&value| half::bf16::from_f32(value)).collect();
                    bytemuck::cast_slice(&bf16)
                }
                _ => bytemuck::cast_slice(&values),
            };
            device.upload(bytes, &mut param.value.rows_mut(rows));
        }
    }

    /// All parameters, in model order.
    pub fn params(&self) -> Vec<&Param> {
        let mut all: Vec<&Param> = self.embedding.iter().map(|embedding| &embedding.weight).collect();
        self.blocks.iter().for_each(|block| all.extend(block.params()));
        self.head.iter().for_each(|head| all.extend(head.params()));
        all
    }

    /// All parameters, in model order, to change.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let mut all: Vec<&mut Param> = self.embedding.iter_mut().map(|embedding| &mut embedding.weight).collect();
        self.blocks.iter_mut().for_each(|block| all.extend(block.params_mut()));
        self.head.iter_mut().for_each(|head| all.extend(head.params_mut()));
        all
    }

    /// Number of parameters before block `idx`, or before the head when there is no such block.
    fn first_idx(&self, idx: usize) -> usize {
        usize::from(self.embedding.is_some()) + self.blocks[..idx].iter().map(|block| block.params().len()).sum::<usize>()
    }

    /// Calls `on` with each part in model order.
    pub fn each_part(&mut self, on: OnPart) {
        self.embedding_part().into_iter().for_each(&mut *on);
        (0..self.blocks.len()).for_each(|idx| on(self.block_part(idx)));
        self.head_part().into_iter().for_each(on);
    }

    fn embedding_part(&mut self) -> Option<Part<'_>> {
        self.embedding.as_mut().map(|embedding| Part { first_idx: 0, params: vec![&mut embedding.weight] })
    }

    fn block_part(&mut self, idx: usize) -> Part<'_> {
        Part { first_idx: self.first_idx(idx), params: self.blocks[idx].params_mut() }
    }

    fn head_part(&mut self) -> Option<Part<'_>> {
        let first_idx = self.first_idx(self.blocks.len());
        self.head.as_mut().map(|head| Part { first_idx, params: head.params_mut() })
    }

    /// Weights of the linear layers of the blocks.
    pub(super) fn linear_params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        self.blocks.iter_mut().flat_map(linear_params_of)
    }

    /// The same, and the output layer over the vocabulary: the head's own or the embedding, also where the head is another chunk's.
    pub(super) fn product_params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        let output = match &mut self.head {
            Some(Head::Vocabulary(head)) => head.weight.as_mut().or(self.embedding.as_mut().map(|embedding| &mut embedding.weight)),
            Some(Head::Reward(_)) => None,
            // Its copy is the output layer of the last chunk: what is looked up is the same under every layout.
            None => self.embedding.as_mut().filter(|_| self.config.ties_embeddings()).map(|embedding| &mut embedding.weight),
        };
        self.blocks.iter_mut().flat_map(linear_params_of).chain(output)
    }

    /// Index in `params()` of a tied embedding; when the model has several chunks, the other copy is in another one.
    pub fn tied_param(&self) -> Option<usize> {
        if !self.config.ties_embeddings() {
            return None;
        }
        self.params().iter().position(|param| param.spec.name == "embedding.weight")
    }

    /// Whether this parameter is the second copy of a tied embedding: not counted, not saved.
    pub fn is_tied_copy(&self, param_idx: usize) -> bool {
        self.embedding.is_none() && self.tied_param() == Some(param_idx)
    }

    /// Sets what each of the chunk's blocks makes again in the backward; nothing at first.
    pub fn set_recompute(&mut self, of_block: &[Recompute]) {
        assert_eq!(of_block.len(), self.blocks.len(), "one choice a block");
        self.recompute.copy_from_slice(of_block);
    }

    /// input[T', H] from the chunk before (None for the first) -> the stream for the next, or the token losses. With `saved`,
    /// what the backward needs is kept there.
    pub fn forward(&self, ctx: &Ctx, input: Option<&Tensor>, batch: &MicroBatch, mut saved: Option<&mut ChunkSaved>) -> Output {
        let ctx = &ctx.of_batch(batch);
        let mut passing = self.enter(ctx, input, batch);
        for idx in 0..self.blocks.len() {
            passing = self.pass_block(ctx, idx, passing, batch, &mut saved);
        }
        self.leave(ctx, passing, batch, saved)
    }

    /// As `forward`; `ready` is called with each part before it computes with it.
    pub fn forward_when(
        &mut self,
        ctx: &Ctx,
        input: Option<&Tensor>,
        batch: &MicroBatch,
        mut saved: Option<&mut ChunkSaved>,
        ready: OnPart,
    ) -> Output {
        let ctx = &ctx.of_batch(batch);
        self.embedding_part().into_iter().for_each(&mut *ready);
        let mut passing = self.enter(ctx, input, batch);
        for idx in 0..self.blocks.len() {
            ready(self.block_part(idx));
            passing = self.pass_block(ctx, idx, passing, batch, &mut saved);
        }
        self.head_part().into_iter().for_each(ready);
        self.leave(ctx, passing, batch, saved)
    }

    fn enter(&self, ctx: &Ctx, input: Option<&Tensor>, batch: &MicroBatch) -> Passing {
        let delta = match (&self.embedding, input) {
            (Some(embedding), None) => embedding.forward(ctx, &batch.tokens),
            (None, Some(input)) => ctx.copy_of(input),
            _ => panic!("exactly the first chunk has no input"),
        };
        Passing { delta, stream: None }
    }

    fn pass_block(&self, ctx: &Ctx, idx: usize, passing: Passing, batch: &MicroBatch, saved: &mut Option<&mut ChunkSaved>) -> Passing {
        let Passing { delta, stream } = passing;
        let (delta, block) = self.blocks[idx].forward(ctx, residual(&stream, saved.as_deref(), delta), batch);
        let stream = match saved {
            Some(saved) => {
                let (kept, stream) = block.keep(self.recompute[idx]);
                saved.blocks.push(kept);
                stream
            }
            None => Some(block.into_stream()),
        };
        Passing { delta, stream }
    }

    fn leave(&self, ctx: &Ctx, passing: Passing, batch: &MicroBatch, saved: Option<&mut ChunkSaved>) -> Output {
        let residual = residual(&passing.stream, saved.as_deref(), passing.delta);
        let Some(head) = &self.head else {
            return Output::Hidden(match residual {
                Residual::Whole(x) => x,
                Residual::Sum { x, mut delta } => {
                    ctx.device.add(&mut delta, x);
                    delta
                }
            });
        };
        if let Some(asked) = &batch.asked {
            assert!(saved.is_none(), "a micro-batch of questions has no backward");
            return Output::TokenLosses(head.answers(ctx, residual, asked, self.tied_weight()));
        }
        let (output, head_saved) = head.forward(ctx, residual, batch, self.tied_weight());
        if let Some(saved) = saved {
            saved.head = Some(head_saved);
        }
        output
    }

    /// As `forward`, without what a backward needs, of the last chunk of a language model: logits [T, V/tp] of every token.
    pub fn logits(&self, ctx: &Ctx, input: Option<&Tensor>, batch: &MicroBatch) -> ScratchTensor {
        let ctx = &ctx.of_batch(batch);
        let mut passing = self.enter(ctx, input, batch);
        for idx in 0..self.blocks.len() {
            passing = self.pass_block(ctx, idx, passing, batch, &mut None);
        }
        let rows: Vec<usize> = (0..batch.n_tokens()).collect();
        let head = self.head.as_ref().expect("only the last chunk has logits");
        head.logits(ctx, residual(&passing.stream, None, passing.delta), &rows, self.tied_weight())
    }

    /// doutput[T', H] from the next chunk (None for the last) -> gradient of the input (None for the first); weight gradients
    /// accumulated.
    pub fn backward(&mut self, ctx: &Ctx, batch: &MicroBatch, saved: ChunkSaved, doutput: Option<&Tensor>) -> Option<ScratchTensor> {
        self.backward_then(ctx, batch, saved, doutput, &mut |_| {})
    }

    /// As `backward`; `done` is called with each part after its gradients.
    pub fn backward_then(
        &mut self,
        ctx: &Ctx,
        batch: &MicroBatch,
        mut saved: ChunkSaved,
        doutput: Option<&Tensor>,
        done: OnPart,
    ) -> Option<ScratchTensor> {
        let ctx = &ctx.of_batch(batch);
        let mut dx = match (&mut self.head, doutput) {
            (Some(head), None) => {
                let tied = self.embedding.as_mut().map(|embedding| &mut embedding.weight);
                head.backward(ctx, batch, saved.head.take().expect("a forward that saved"), tied)
            }
            (None, Some(doutput)) => ctx.copy_of(doutput),
            _ => panic!("exactly the last chunk has no output gradient"),
        };
        self.head_part().into_iter().for_each(&mut *done);
        for idx in (0..self.blocks.len()).rev() {
            let (block, kept) = (&mut self.blocks[idx], saved.blocks.pop().expect("a forward that saved"));
            let block_saved = block.restore(ctx, batch, kept);
            block.backward(ctx, batch, &block_saved, &mut dx);
            done(self.block_part(idx));
        }
        let Some(embedding) = &mut self.embedding else { return Some(dx) };
        embedding.backward(ctx, &batch.tokens, &dx);
        self.embedding_part().into_iter().for_each(done);
        None
    }

    /// The first half of `backward`: the gradient of the input; the gradients of the norms accumulated.
    pub fn backward_input(
        &mut self,
        ctx: &Ctx,
        batch: &MicroBatch,
        mut saved: ChunkSaved,
        doutput: Option<&Tensor>,
    ) -> (Option<ScratchTensor>, ChunkDeferred) {
        let ctx = &ctx.of_batch(batch);
        let (mut dx, head) = match (&mut self.head, doutput) {
            (Some(head), None) => {
                let tied = self.embedding.as_ref().map(|embedding| &embedding.weight);
                let (dx, head) = head.backward_input(ctx, batch, saved.head.take().expect("a forward that saved"), tied);
                (dx, Some(head))
            }
            (None, Some(doutput)) => (ctx.copy_of(doutput), None),
            _ => panic!("exactly the last chunk has no output gradient"),
        };
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in self.blocks.iter_mut().rev() {
            let kept = saved.blocks.pop().expect("a forward that saved");
            let block_saved = block.restore(ctx, batch, kept);
            blocks.push(block.backward_input(ctx, batch, block_saved, &mut dx));
        }
        let (dx, dembedded) = if self.embedding.is_some() { (None, Some(dx)) } else { (Some(dx), None) };
        (dx, ChunkDeferred { head, blocks, dembedded })
    }

    /// The second half: the gradients of the matrices accumulated, in the order of `backward`.
    pub fn backward_weights(&mut self, ctx: &Ctx, batch: &MicroBatch, deferred: ChunkDeferred) {
        self.backward_weights_then(ctx, batch, deferred, &mut |_| {});
    }

    /// As `backward_weights`; `done` is called with each part after its gradients.
    pub fn backward_weights_then(&mut self, ctx: &Ctx, batch: &MicroBatch, deferred: ChunkDeferred, done: OnPart) {
        let ctx = &ctx.of_batch(batch);
        if let (Some(head), Some(deferred)) = (&mut self.head, &deferred.head) {
            head.backward_weight(ctx, deferred, self.embedding.as_mut().map(|embedding| &mut embedding.weight));
        }
        self.head_part().into_iter().for_each(&mut *done);
        for (idx, deferred) in (0..self.blocks.len()).rev().zip(deferred.blocks) {
            self.blocks[idx].backward_weights(ctx, &deferred);
            done(self.block_part(idx));
        }
        if let (Some(embedding), Some(dembedded)) = (&mut self.embedding, &deferred.dembedded) {
            embedding.backward(ctx, &batch.tokens, dembedded);
        }
        self.embedding_part().into_iter().for_each(done);
    }

    /// Takes the memory of canonical sums, for at most this many blocks of samples a replica. Err: out of memory.
    pub fn reserve_sums(&mut self, device: &dyn Device, most_blocks: usize) -> Result<()> {
        let used_twice = if self.embedding.is_some() && self.head.is_some() { self.tied_param() } else { None };
        let reserve = |(idx, param): (usize, &mut Param)| {
            let uses = if Some(idx) == used_twice { Uses::InputAndOutput } else { Uses::Once };
            param.reserve_sums(device, most_blocks, uses)
        };
        self.params_mut().into_iter().enumerate().try_for_each(reserve)
    }

    /// Once a step, after the last backward and before the sum over replicas, for all parameters: see [`finish_gradient`].
    pub fn finish_gradients(&mut self, ctx: &Ctx) {
        self.params_mut().into_iter().for_each(|param| finish_gradient(ctx, param));
    }

    /// Caches of so many pages, one a block. Tokens i * PAGE_TOKENS .. of a sequence lie in the same page of each.
    pub fn new_caches(&self, device: &dyn Device, n_pages: usize) -> Result<Vec<KvCache>> {
        let cache = |block: &Block| -> Result<KvCache> {
            let shape = [n_pages, PAGE_TOKENS, block.attention.heads.kv * block.attention.heads.dim];
            Ok(KvCache { keys: device.alloc(&shape, self.dtype)?, values: device.alloc(&shape, self.dtype)? })
        };
        self.blocks.iter().map(cache).collect()
    }

    /// New tokens of sequences whose past is in the caches. `positions`[n] u32; `wanted_rows` are the rows whose logits the last
    /// chunk returns. Rows must be replicated over tp.
    pub fn forward_cached(
        &self,
        ctx: &Ctx,
        input: CachedInput,
        positions: &Tensor,
        spans: &[CacheSpan],
        caches: &mut [KvCache],
        wanted_rows: &[usize],
    ) -> CachedOutput {
        assert!(!ctx.is_sharded(), "generation holds all rows on every rank");
        CacheSpan::assert_own_pages(spans);
        let mut delta = match (&self.embedding, input) {
            (Some(embedding), CachedInput::Tokens(tokens)) => embedding.forward(ctx, tokens),
            (None, CachedInput::Hidden(hidden)) => ctx.copy_of(hidden),
            _ => panic!("exactly the first chunk takes tokens"),
        };
        let mut stream: Option<ScratchTensor> = None;
        for (block, cache) in self.blocks.iter().zip(caches) {
            let (x, next) = block.forward_cached(ctx, residual(&stream, None, delta), (positions, spans), cache);
            stream = Some(x);
            delta = next;
        }
        match (&self.head, &stream) {
            (Some(head), _) if !wanted_rows.is_empty() => {
                CachedOutput::Logits(head.logits(ctx, residual(&stream, None, delta), wanted_rows, self.tied_weight()))
            }
            (_, Some(x)) => {
                ctx.device.add(&mut delta, x);
                CachedOutput::Hidden(delta)
            }
            (_, None) => CachedOutput::Hidden(delta),
        }
    }

    fn tied_weight(&self) -> Option<&Param> {
        self.embedding.as_ref().map(|embedding| &embedding.weight)
    }
}

fn linear_params_of(block: &mut Block) -> [&mut Param; 4] {
    let Block { attention, mlp, .. } = block;
    [&mut attention.qkv.weight, &mut attention.out.weight, &mut mlp.up.weight, &mut mlp.down.weight]
}

/// The residual stream after the last block: what that block returned, added to its stream (its own, or the one kept for the
/// backward), or the chunk's input.
fn residual<'a>(stream: &'a Option<ScratchTensor>, saved: Option<&'a ChunkSaved>, delta: ScratchTensor) -> Residual<'a> {
    let kept = || saved.and_then(|saved| saved.blocks.last()).and_then(BlockKept::stream);
    match stream.as_deref().or_else(kept) {
        Some(x) => Residual::Sum { x, delta },
        None => Residual::Whole(delta),
    }
}

/// Once a step and parameter, after its last backward and before the sum over replicas. Under sequence parallelism each rank has seen
/// T/tp rows at the norms, so the gradients of parameters that every rank holds are partial sums: a classic silent bug.
pub fn finish_gradient(ctx: &Ctx, param: &mut Param) {
    // Canonical sums are complete already.
    if ctx.is_sharded() && param.is_replicated_over_tp() && matches!(ctx.numerics, Numerics::Fast) {
        ctx.tp.all_reduce(param.grad_mut(), ReduceOp::Sum);
    }
}
