//! Batch generation: requests in, responses out, in request order. Slots of a KV cache are refilled as responses end
//! (continuous batching). Replicas share out the requests; the ranks of one replica work in lockstep.

use super::decode::{Decoder, NewTokens};
use super::growing::{Growing, Rules};
use super::request::{Request, Response};
use super::sampler::{Choice, Drawing};
use super::samples::{Done, Sample};
use super::sampling;
use crate::comm::{Groups, Recv, Send, agree};
use crate::device::{CacheSpan, Device, KvCache, PAGE_TOKENS, Scratch, ScratchTensor};
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::model::chunk::{CachedInput, CachedOutput, Chunk};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::progress::Progress;
use crate::rng::Random;
use crate::tensor::{DType, Tensor};
use crate::text::Tokenizer;
use std::collections::VecDeque;

/// Most prompt tokens taken into one forward pass, beside the decoding rows (a first prompt is always taken whole).
const PREFILL_TOKENS: usize = 2048;

/// What a replica generates with.
pub struct Generator<'a> {
    /// Where it computes.
    pub device: &'a dyn Device,
    /// This rank's groups.
    pub groups: &'a Groups,
    /// This rank's stage of the model.
    pub chunk: &'a Chunk,
    /// Each of them ends a response; without any, all go to their full length.
    pub eos_ids: Vec<u32>,
    /// For the text of responses.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Responses under way at one time.
    pub n_slots: usize,
    /// Whether this rank was asked to stop; the ranks of a replica leave together when one of them was.
    pub stop: &'a dyn Fn() -> bool,
}

/// What passes of one run keep.
#[derive(Default)]
struct Memory {
    /// Decode steps of a model that is whole on this rank.
    decoder: Decoder,
    /// Temporaries of decode steps of a part of a model.
    decode: Scratch,
}

/// A response under way in a slot.
struct Active<'a> {
    sample: Sample,
    request: &'a Request,
    /// Of the caches, for as many tokens as any request can need.
    pages: Vec<u32>,
    noise: Random,
    /// Tokens to feed in the next pass: the prompt, then the last choice.
    feed: Vec<u32>,
    /// Tokens in the cache.
    past: usize,
    growing: Growing<'a>,
}

/// Takes every finished response, in the order in which they end.
pub type Sink<'a> = dyn FnMut(Sample, Response) -> Result<()> + 'a;

/// Where finished responses of this rank go.
struct Out<'s> {
    sink: &'s mut Sink<'s>,
    /// The first rank of a replica speaks for it.
    speaks: bool,
    /// What the sink could not take ended the work.
    failed: Option<Error>,
    progress: Option<Progress>,
}

impl Out<'_> {
    fn put(&mut self, sample: Sample, response: impl FnOnce() -> Response) {
        if let Some(progress) = &mut self.progress {
            progress.add(1);
        }
        if self.speaks && self.failed.is_none() {
            self.failed = (self.sink)(sample, response()).err();
        }
    }
}

impl<'g> Generator<'g> {
    /// Makes this replica's share of the samples that are missing in `done` (every dp-th). The first rank of the replica (tp 0, pp 0)
    /// hands each to `sink` as it ends; an Err of the sink ends the work. Err when a rank of the replica was asked to stop. Collective
    /// over the replica; an Err may be of this rank alone, so `agree` comes next.
    pub fn run<'a>(&'a self, requests: &'a [Request], done: &Done, sink: &mut Sink) -> Result<()> {
        let (dp, dp_idx) = (self.groups.layout.dp, self.groups.at.dp);
        let mut waiting: VecDeque<Sample> = done.missing().skip(dp_idx).step_by(dp).collect();
        let mut out = Out {
            sink,
            speaks: self.groups.at.tp == 0 && self.groups.at.pp == 0,
            failed: None,
            progress: (self.groups.world.rank() == 0).then(|| Progress::new("generate", waiting.len() as u64, "responses").with("tokens")),
        };
        let n_slots = self.n_slots.min(waiting.len()).max(1);
        let longest = waiting.iter().map(|sample| self.capacity_of(&requests[sample.request_idx])).max().unwrap_or(1);
        let pages = longest.div_ceil(PAGE_TOKENS) as u32;
        let mut caches = self.chunk.new_caches(self.device, n_slots * pages as usize)?;
        let mut free: Vec<Vec<u32>> = (0..n_slots as u32).rev().map(|slot| (slot * pages..(slot + 1) * pages).collect()).collect();
        let mut active: Vec<Active<'a>> = Vec::new();
        let mut memory = Memory::default();
        loop {
            self.admit(requests, &mut waiting, &mut free, &mut active, &mut out);
            if active.is_empty() {
                break;
            }
            if self.is_asked_to_stop(&out) {
                let asked = Error::new(Kind::Requeue, "asked to stop before all responses were made").remedy("run the same command again");
                return Err(out.failed.unwrap_or(asked));
            }
            fault::at("pass");
            let choices = self.pass(&mut memory, &mut caches, &mut active);
            if let Some(progress) = &mut out.progress {
                progress.add_also(active.len() as u64);
            }
            self.advance(choices, &mut active, &mut free, &mut out)?;
        }
        if let Some(progress) = out.progress {
            progress.finish();
        }
        out.failed.map_or(Ok(()), Err)
    }

    /// All responses to `requests` in their order, on every rank, in memory. Collective over all ranks, which agree on an Err.
    pub fn responses(&self, requests: &[Request]) -> Result<Vec<Response>> {
        let mut mine: Vec<(usize, Response)> = Vec::new();
        let done = Done::nothing(requests);
        let ran = self.run(requests, &done, &mut |sample, response| {
            mine.push((done.number(sample).expect("asked for"), response));
            Ok(())
        });
        agree(&*self.groups.world, ran)?;
        let parts = self.groups.world.gather_variable(&serde_json::to_vec(&mine).expect("responses are plain data"));
        let mut all: Vec<(usize, Response)> =
            parts.iter().flat_map(|part| serde_json::from_slice::<Vec<(usize, Response)>>(part).expect("written above")).collect();
        all.sort_by_key(|(number, _)| *number);
        Ok(all.into_iter().map(|(_, response)| response).collect())
    }

    /// Whether any rank of this replica was: signals do not arrive everywhere in the same iteration, and a rank that left alone would
    /// be waited for. Collective over the replica.
    fn is_asked_to_stop(&self, out: &Out) -> bool {
        let mine = if (self.stop)() || out.failed.is_some() { 1.0 } else { 0.0 };
        self.groups.pp.sum_f64(self.groups.tp.sum_f64(mine)) > 0.0
    }

    /// Cache rows a request can need.
    fn capacity_of(&self, request: &Request) -> usize {
        (request.tokens.len() + request.max_new_tokens).min(self.chunk.config().max_tokens)
    }

    /// What ends responses.
    fn rules(&self) -> Rules<'_> {
        Rules { eos_ids: &self.eos_ids, max_tokens: self.chunk.config().max_tokens, tokenizer: self.tokenizer }
    }

    /// Moves waiting samples into free slots.
    fn admit<'a>(
        &'a self,
        requests: &'a [Request],
        waiting: &mut VecDeque<Sample>,
        free: &mut Vec<Vec<u32>>,
        active: &mut Vec<Active<'a>>,
        out: &mut Out,
    ) {
        let mut n_tokens = 0;
        while let (Some(&sample), false) = (waiting.front(), free.is_empty()) {
            let request = &requests[sample.request_idx];
            if n_tokens > 0 && n_tokens + request.tokens.len() > PREFILL_TOKENS {
                return;
            }
            waiting.pop_front();
            let growing = Growing::new(request, self.rules());
            if let Some(reason) = growing.ended_at_once() {
                out.put(sample, || growing.into_response(sample.index, reason));
                continue;
            }
            n_tokens += request.tokens.len();
            let pages = free.pop().expect("looked at above");
            let (noise, feed) = (request.noise(), request.tokens.clone());
            active.push(Active { sample, request, pages, noise, feed, past: 0, growing });
        }
    }

    /// One forward pass over all active slots; the next token of each, in the order of `active`.
    fn pass(&self, memory: &mut Memory, caches: &mut [KvCache], active: &mut [Active]) -> Vec<Choice> {
        let (mut spans, mut tokens, mut positions, mut last_rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for one in active.iter_mut() {
            let first = tokens.len();
            positions.extend((one.past..one.past + one.feed.len()).map(|position| position as u32));
            tokens.append(&mut one.feed);
            spans.push(CacheSpan { rows: first..tokens.len(), past: one.past, pages: one.pages.clone() });
            one.past += tokens.len() - first;
            last_rows.push(tokens.len() - 1);
        }
        let is_decode = spans.iter().all(|span| span.rows.len() == 1);
        // Prompts come in all lengths: their temporaries are not kept.
        let prefill = Scratch::new();
        let scratch = if is_decode { &memory.decode } else { &prefill };
        let numerics = Numerics::of_inference(self.device, self.groups.layout.tp);
        let ctx = Ctx { device: self.device, tp: &*self.groups.tp, scratch, sequence: SequenceMode::Replicated, numerics };
        if is_decode && self.groups.layout.tp * self.groups.layout.pp == 1 {
            let new = NewTokens { tokens: &tokens, positions: &positions, spans: &spans };
            let logits = memory.decoder.logits(&ctx, self.chunk, &new, caches);
            return self.sample(logits, active);
        }
        let tokens = self.upload_u32(scratch, &tokens);
        let positions = self.upload_u32(scratch, &positions);
        let (stage, last_stage) = (self.groups.at.pp, self.groups.layout.pp - 1);
        let received = (stage > 0).then(|| self.receive_hidden(scratch, tokens.n_rows()));
        let input = match &received {
            None => CachedInput::Tokens(&tokens),
            Some(hidden) => CachedInput::Hidden(hidden),
        };
        let output = self.chunk.forward_cached(&ctx, input, &positions, &spans, caches, &last_rows);
        let mut choices = Vec::new();
        match output {
            CachedOutput::Hidden(hidden) => self.send_hidden(&hidden),
            CachedOutput::Logits(logits) => choices = self.sample(&logits, active),
        }
        if last_stage > 0 {
            sampling::share(&*self.groups.pp, &mut choices, &drawings(active), last_stage);
        }
        choices
    }

    fn upload_u32(&self, scratch: &Scratch, values: &[u32]) -> ScratchTensor {
        let mut tensor = scratch.take(self.device, &[values.len()], DType::U32);
        self.device.upload(bytemuck::cast_slice(values), &mut tensor);
        tensor
    }

    fn receive_hidden(&self, scratch: &Scratch, n_rows: usize) -> ScratchTensor {
        let mut hidden = scratch.take(self.device, &[n_rows, self.chunk.config().hidden], self.chunk.dtype());
        let recv = Recv { peer: self.groups.at.pp - 1, tag: 0, tensor: &mut hidden };
        self.groups.pp.start_group(Vec::new(), vec![recv]).wait();
        hidden
    }

    fn send_hidden(&self, hidden: &Tensor) {
        let send = Send { peer: self.groups.at.pp + 1, tag: 0, tensor: hidden };
        self.groups.pp.start_group(vec![send], Vec::new()).wait();
    }

    /// One choice a row of logits[n, V/tp], the same on all tensor-parallel ranks.
    fn sample(&self, logits: &Tensor, active: &[Active]) -> Vec<Choice> {
        sampling::choose_rows(self.device, &*self.groups.tp, logits, self.chunk.config().vocab_size, &drawings(active))
    }

    /// Appends the choices, ends what is complete and frees its slots. Err, on all ranks of the replica, when logits were no numbers.
    fn advance(&self, choices: Vec<Choice>, active: &mut Vec<Active>, free: &mut Vec<Vec<u32>>, out: &mut Out) -> Result<()> {
        let mut going_on = Vec::with_capacity(active.len());
        for (mut one, choice) in active.drain(..).zip(choices) {
            if !choice.logprob.is_finite() {
                let wrong = format!("request {:?}: the logits after {} tokens are not finite", one.request.id, one.past);
                return Err(Error::new(Kind::Numeric, wrong).remedy("check the checkpoint (trireme-checkpoint verify), or try --dtype f32"));
            }
            let token = choice.token;
            match one.growing.push(choice) {
                Some(reason) => {
                    free.push(one.pages);
                    out.put(one.sample, || one.growing.into_response(one.sample.index, reason));
                }
                None => {
                    one.feed.push(token);
                    going_on.push(one);
                }
            }
        }
        *active = going_on;
        Ok(())
    }
}

/// How the next token of each response is drawn.
fn drawings<'a>(active: &'a [Active]) -> Vec<Drawing<'a>> {
    active.iter().map(|one| one.request.drawing(&one.noise, one.sample.index, one.growing.tokens())).collect()
}
