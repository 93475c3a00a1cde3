//! Batch generation: requests in, responses out, in request order. Slots of a KV cache are refilled as responses end
//! (continuous batching). Replicas share out the requests; the ranks of one replica work in lockstep.

use super::decode::{Decoder, NewTokens};
use super::request::{FinishReason, Request, Response};
use super::sampler::{self, Choice};
use crate::comm::{Communicator, Groups, Recv, Send};
use crate::device::{CacheSpan, Device, Draw, KvCache, Scratch, ScratchTensor};
use crate::error::{Error, Kind, Result};
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
struct Active {
    request_idx: usize,
    slot: usize,
    noise: Random,
    /// Tokens to feed in the next pass: the prompt, then the last choice.
    feed: Vec<u32>,
    /// Tokens in the cache.
    past: usize,
    tokens: Vec<u32>,
    logprob: f64,
}

impl Generator<'_> {
    /// Responses to this replica's share of `requests` (every dp-th), with their index. The same on every rank of the replica.
    pub fn run(&self, requests: &[Request]) -> Result<Vec<(usize, Response)>> {
        let (dp, dp_idx) = (self.groups.layout.dp, self.groups.at.dp);
        let mut waiting: VecDeque<usize> = (dp_idx..requests.len()).step_by(dp).collect();
        let mut progress = (self.groups.world.rank() == 0).then(|| Progress::new("generate", waiting.len() as u64, "responses"));
        let n_slots = self.n_slots.min(waiting.len()).max(1);
        let longest = waiting.iter().map(|&idx| self.capacity_of(&requests[idx])).max().unwrap_or(1);
        let mut caches = self.chunk.new_caches(self.device, n_slots, longest)?;
        let mut free: Vec<usize> = (0..n_slots).rev().collect();
        let (mut active, mut done) = (Vec::new(), Vec::new());
        let mut memory = Memory::default();
        loop {
            self.admit(requests, &mut waiting, &mut free, &mut active, &mut done);
            if active.is_empty() {
                break;
            }
            if self.is_asked_to_stop() {
                return Err(Error::new(Kind::Requeue, "asked to stop before all responses were made").remedy("run the same command again"));
            }
            let choices = self.pass(&mut memory, &mut caches, &mut active, requests);
            let before = done.len();
            self.advance(requests, &choices, (&mut active, &mut free, &mut done));
            if let Some(progress) = &mut progress {
                progress.add((done.len() - before) as u64);
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(done)
    }

    /// Whether any rank of this replica was: signals do not arrive everywhere in the same iteration, and a rank that left alone would
    /// be waited for. Collective over the replica.
    fn is_asked_to_stop(&self) -> bool {
        let mine = if (self.stop)() { 1.0 } else { 0.0 };
        self.groups.pp.sum_f64(self.groups.tp.sum_f64(mine)) > 0.0
    }

    /// Cache rows a request can need.
    fn capacity_of(&self, request: &Request) -> usize {
        (request.tokens.len() + request.max_new_tokens).min(self.chunk.config().max_tokens)
    }

    /// Moves waiting requests into free slots.
    fn admit(
        &self,
        requests: &[Request],
        waiting: &mut VecDeque<usize>,
        free: &mut Vec<usize>,
        active: &mut Vec<Active>,
        done: &mut Vec<(usize, Response)>,
    ) {
        let mut n_tokens = 0;
        while let (Some(&request_idx), Some(&slot)) = (waiting.front(), free.last()) {
            let request = &requests[request_idx];
            if n_tokens > 0 && n_tokens + request.tokens.len() > PREFILL_TOKENS {
                return;
            }
            waiting.pop_front();
            if request.max_new_tokens == 0 {
                done.push((request_idx, self.response(request, Vec::new(), 0.0, FinishReason::Length)));
                continue;
            }
            n_tokens += request.tokens.len();
            free.pop();
            let noise = Random::new(request.seed, &format!("generate {}", request.id));
            let feed = request.tokens.clone();
            active.push(Active { request_idx, slot, noise, feed, past: 0, tokens: Vec::new(), logprob: 0.0 });
        }
    }

    /// One forward pass over all active slots; the next token of each, in the order of `active`.
    fn pass(&self, memory: &mut Memory, caches: &mut [KvCache], active: &mut [Active], requests: &[Request]) -> Vec<Choice> {
        let (mut spans, mut tokens, mut positions, mut last_rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for one in active.iter_mut() {
            let first = tokens.len();
            positions.extend((one.past..one.past + one.feed.len()).map(|position| position as u32));
            tokens.append(&mut one.feed);
            spans.push(CacheSpan { rows: first..tokens.len(), slot: one.slot, past: one.past });
            one.past += tokens.len() - first;
            last_rows.push(tokens.len() - 1);
        }
        let is_decode = spans.iter().all(|span| span.rows.len() == 1);
        // Prompts come in all lengths: their temporaries are not kept.
        let prefill = Scratch::new();
        let scratch = if is_decode { &memory.decode } else { &prefill };
        let ctx = Ctx { device: self.device, tp: &*self.groups.tp, scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
        if is_decode && self.groups.layout.tp * self.groups.layout.pp == 1 {
            let new = NewTokens { tokens: &tokens, positions: &positions, spans: &spans };
            let logits = memory.decoder.logits(&ctx, self.chunk, &new, caches);
            return self.sample(logits, active, requests);
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
        let mut choices = vec![Choice { token: 0, logprob: 0.0 }; active.len()];
        match output {
            CachedOutput::Hidden(hidden) => self.send_hidden(&hidden),
            CachedOutput::Logits(logits) => choices = self.sample(&logits, active, requests),
        }
        if last_stage > 0 {
            share_choices(&*self.groups.pp, &mut choices, last_stage);
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

    /// logits[n, V/tp] of all tensor-parallel ranks -> one choice a row, the same on all of them.
    fn sample(&self, logits: &Tensor, active: &[Active], requests: &[Request]) -> Vec<Choice> {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        let tp = self.groups.layout.tp;
        if tp == 1
            && let Some(choices) = self.sample_on_device(logits, active, requests)
        {
            return choices;
        }
        let mut mine = vec![0u8; logits.n_bytes()];
        self.device.download(logits, &mut mine);
        let mut all = vec![0u8; mine.len() * tp];
        self.groups.tp.start_all_gather_bytes(&mine, &mut all).wait();
        let values: Vec<f32> = match logits.dtype() {
            DType::F32 => all.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect(),
            DType::BF16 => all.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            DType::U32 | DType::F8E4M3 => unreachable!("logits are floats"),
        };
        let vocab_size = self.chunk.config().vocab_size;
        let mut row = Vec::with_capacity(columns * tp);
        (0..n)
            .map(|idx| {
                row.clear();
                (0..tp).for_each(|part| row.extend_from_slice(&values[(part * n + idx) * columns..][..columns]));
                let one = &active[idx];
                let position = one.tokens.len() as u64;
                sampler::choose(&row[..vocab_size], requests[one.request_idx].sampling, &one.noise, position)
            })
            .collect()
    }

    /// The same where the device draws, so that no logits are downloaded; the noise is that of the host's sampler.
    fn sample_on_device(&self, logits: &Tensor, active: &[Active], requests: &[Request]) -> Option<Vec<Choice>> {
        let draw = |one: &Active| requests[one.request_idx].sampling.draw(&one.noise, one.tokens.len() as u64);
        let draws: Vec<Draw> = active.iter().map(draw).collect();
        let drawn = self.device.sample(logits, self.chunk.config().vocab_size, &draws)?;
        Some(drawn.into_iter().map(|one| Choice { token: one.token, logprob: one.logprob }).collect())
    }

    /// Appends the choices, ends what is complete and frees its slots.
    fn advance(&self, requests: &[Request], choices: &[Choice], state: (&mut Vec<Active>, &mut Vec<usize>, &mut Vec<(usize, Response)>)) {
        let (active, free, done) = state;
        let mut going_on = Vec::with_capacity(active.len());
        for (mut one, choice) in active.drain(..).zip(choices) {
            let request = &requests[one.request_idx];
            one.logprob += choice.logprob;
            let stopped = self.eos_ids.contains(&choice.token);
            if !stopped {
                one.tokens.push(choice.token);
            }
            let reason = if stopped {
                Some(FinishReason::Stop)
            } else if one.tokens.len() == request.max_new_tokens {
                Some(FinishReason::Length)
            } else if request.tokens.len() + one.tokens.len() >= self.chunk.config().max_tokens {
                Some(FinishReason::Context)
            } else {
                None
            };
            match reason {
                Some(reason) => {
                    free.push(one.slot);
                    done.push((one.request_idx, self.response(request, one.tokens, one.logprob, reason)));
                }
                None => {
                    one.feed.push(choice.token);
                    going_on.push(one);
                }
            }
        }
        *active = going_on;
    }

    fn response(&self, request: &Request, tokens: Vec<u32>, logprob: f64, finish_reason: FinishReason) -> Response {
        let text = self.tokenizer.map(|tokenizer| tokenizer.decode(&tokens));
        Response { id: request.id.clone(), text, tokens, logprob, finish_reason }
    }
}

/// The last stage's choices on all stages.
fn share_choices(pp: &dyn Communicator, choices: &mut [Choice], root: usize) {
    let mut bytes: Vec<u8> =
        choices.iter().flat_map(|choice| [u64::from(choice.token).to_le_bytes(), choice.logprob.to_le_bytes()].concat()).collect();
    pp.broadcast_bytes(&mut bytes, root);
    for (choice, bytes) in choices.iter_mut().zip(bytes.chunks_exact(16)) {
        choice.token = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as u32;
        choice.logprob = f64::from_le_bytes(bytes[8..].try_into().expect("8 bytes"));
    }
}

/// Responses of all replicas in request order, on every rank. Collective.
pub fn gather(groups: &Groups, mine: &[(usize, Response)]) -> Vec<Response> {
    // One rank of each replica speaks for it.
    let speaks = groups.at.tp == 0 && groups.at.pp == 0;
    let text = if speaks { serde_json::to_vec(mine).expect("responses are plain data") } else { b"[]".to_vec() };
    let parts = groups.world.gather_variable(&text);
    let mut all: Vec<(usize, Response)> =
        parts.iter().flat_map(|part| serde_json::from_slice::<Vec<(usize, Response)>>(part).expect("written above")).collect();
    all.sort_by_key(|(idx, _)| *idx);
    all.into_iter().map(|(_, response)| response).collect()
}
