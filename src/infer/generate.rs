//! Batch generation: requests in, responses out. What goes into each pass is decided in `schedule`, computed in `pass`; here the
//! choices become responses. Replicas share out the samples (`share`); the ranks of one replica decide everything alike. What a response
//! is depends on none of this: neither on how requests are batched, nor on the number of ranks, nor on the order in which they end.

use super::growing::{Growing, Rules};
use super::kv_memory::{self, Room};
use super::pass::{Passes, Signal, UnderWay};
use super::request::{Request, Response};
use super::sampler::{Choice, Drawing};
use super::samples::{Done, Sample};
use super::schedule::{Counts, Limits, Next, Part, Scheduler, Sharing};
use super::scorer;
use super::share::share;
use crate::comm::{Communicator, Groups, agree};
use crate::device::{Device, PAGE_TOKENS};
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::model::chunk::Chunk;
use crate::model::packed::WeightFormat;
use crate::progress::Progress;
use crate::recipe::Mode;
use crate::rng::Random;
use crate::text::Tokenizer;
use std::collections::{HashMap, VecDeque};

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
    /// How requests are batched.
    pub batching: Batching,
    /// The order of sums: reproducible, as far as device and layout have it, or the shortest. See [`order`].
    pub order: Mode,
    /// Whether this rank was asked to stop; the ranks of a replica leave together when one of them was.
    pub stop: &'a dyn Fn() -> bool,
}

/// The order of sums that `asked` means for responses: reproducible as far as it can be had, so that a response does not depend on what
/// runs beside it, nor on the layout. Err: asked for, and something is in its way.
pub fn order(asked: Option<Mode>, device: &dyn Device, weights: Option<WeightFormat>) -> Result<Mode> {
    match asked {
        Some(Mode::Reproducible) => drop(scorer::numerics(asked, device, weights)?),
        Some(Mode::Fast) => {}
        None => {
            if let Some(in_the_way) = scorer::in_the_way(weights) {
                log::info!("responses may differ from those of other layouts or batches, because {in_the_way}");
            }
        }
    }
    Ok(mode(asked))
}

/// The same before there is a device: what devices are opened for.
pub fn mode(asked: Option<Mode>) -> Mode {
    asked.unwrap_or(Mode::Reproducible)
}

/// How requests are batched, on each replica. Responses do not depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batching {
    /// Responses under way at one time.
    pub n_sequences: usize,
    /// Most tokens of a pass; of a long prompt as many as there is room for beside the responses under way.
    pub pass_tokens: usize,
    /// Whether prompts that begin alike share that part of the cache.
    pub sharing: Sharing,
    /// Most tokens that are guessed ahead of a response; 0 for none.
    pub draft_tokens: usize,
    /// Memory of the cache on this rank.
    pub kv_memory: Room,
}

/// Rows of a pass up to which a guess costs little beside reading the weights.
const DRAFT_ROWS: usize = 16;

impl Default for Batching {
    fn default() -> Batching {
        Batching { n_sequences: 16, pass_tokens: 512, sharing: Sharing::Shared, draft_tokens: 4, kv_memory: Room::Unknown }
    }
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

/// A response that is not complete.
struct Active<'a> {
    sample: Sample,
    request: &'a Request,
    noise: Random,
    growing: Growing<'a>,
}

/// The samples of this replica, under their numbers in the scheduler.
struct Batch<'a> {
    requests: &'a [Request],
    rules: Rules<'a>,
    scheduler: Scheduler<'a>,
    samples: Vec<Sample>,
    /// Those that were in a pass.
    active: HashMap<usize, Active<'a>>,
}

impl<'g> Generator<'g> {
    /// Makes this replica's share of the samples that are missing in `done`. The first rank of the replica (tp 0, pp 0) hands each to
    /// `sink` as it ends; an Err of the sink ends the work. -> what the replica did. Err when a rank of the replica was asked to stop, or
    /// when a response does not fit the memory of the cache. Collective over the replica; an Err may be of this rank alone, so
    /// `agree` comes next.
    pub fn run<'a>(&'a self, requests: &'a [Request], done: &Done, sink: &mut Sink) -> Result<Counts> {
        let (layout, at) = (self.groups.layout, self.groups.at);
        let samples = share(requests, &done.missing().collect::<Vec<_>>(), layout.dp, at.dp);
        let mut out = Out {
            sink,
            speaks: at.tp == 0 && at.pp == 0,
            failed: None,
            progress: (self.groups.world.rank() == 0).then(|| Progress::new("generate", samples.len() as u64, "responses").with("tokens")),
        };
        let limits = self.limits(requests, &samples)?;
        let mut passes = self.agree_in_replica(Passes::new(self.device, self.groups, (self.chunk, self.order), limits.n_pages))?;
        let mut batch = self.batch(requests, samples, limits, &mut out);
        // Of each group of sequences, its pass.
        let mut under_way: VecDeque<Option<(Vec<Part>, UnderWay)>> = (0..limits.n_groups).map(|_| None).collect();
        let mut leaving: Option<Error> = None;
        for group in (0..limits.n_groups).cycle() {
            if let Some((parts, pass)) = under_way.pop_front().flatten() {
                let ended = batch.finish(&parts, |drawings| passes.finish(pass, drawings), &mut out);
                leaving = leaving.or(ended.err());
            }
            let parts = if leaving.is_none() { batch.next_pass(group) } else { Vec::new() };
            if parts.is_empty() && under_way.iter().all(Option::is_none) && (leaving.is_some() || batch.scheduler.is_done()) {
                break;
            }
            let started = (!parts.is_empty()).then(|| {
                fault::at("pass");
                let mine = if (self.stop)() || out.failed.is_some() { Signal::Stop } else { Signal::GoOn };
                let pass = batch.with_drawings(&parts, |drawings| passes.start(&parts, drawings, mine));
                (parts, pass)
            });
            under_way.push_back(started);
        }
        if let Some(error) = out.failed.or(leaving) {
            return Err(error);
        }
        if let Some(progress) = out.progress {
            progress.finish();
        }
        Ok(batch.scheduler.counts())
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

    /// Most tokens of prompt and response.
    fn most_tokens(&self, request: &Request) -> usize {
        (request.tokens.len() + request.max_new_tokens).min(self.chunk.config().max_tokens)
    }

    /// What passes of this replica are made within, the same on all of its ranks.
    fn limits(&self, requests: &[Request], samples: &[Sample]) -> Result<Limits> {
        let Batching { n_sequences, pass_tokens, sharing, draft_tokens, kv_memory } = self.batching;
        let most_tokens: Vec<usize> = samples.iter().map(|sample| self.most_tokens(&requests[sample.request_idx])).collect();
        let page_bytes = kv_memory::page_bytes(self.chunk.config(), &self.groups.layout, self.chunk.dtype());
        let fitting = self.agree_in_replica(kv_memory::n_pages(&most_tokens, n_sequences, page_bytes, kv_memory))?;
        // Machines may have different amounts of memory free.
        let least = |comm: &dyn Communicator, n: f64| comm.gather_f64(n).into_iter().fold(f64::INFINITY, f64::min);
        let n_pages = least(&*self.groups.pp, least(&*self.groups.tp, fitting as f64)) as usize;
        let n_groups = Passes::most_under_way(self.groups);
        Ok(Limits { page_tokens: PAGE_TOKENS, n_pages, n_sequences, pass_tokens, n_groups, sharing, draft_tokens, draft_rows: DRAFT_ROWS })
    }

    /// The ranks of the replica go on together or not at all.
    fn agree_in_replica<T>(&self, mine: Result<T>) -> Result<T> {
        agree(&*self.groups.pp, agree(&*self.groups.tp, mine))
    }

    /// Hands all samples to the scheduler, but those that are complete without a token.
    fn batch<'a>(&'a self, requests: &'a [Request], samples: Vec<Sample>, limits: Limits, out: &mut Out) -> Batch<'a> {
        let rules = Rules { eos_ids: &self.eos_ids, max_tokens: self.chunk.config().max_tokens, tokenizer: self.tokenizer };
        let (scheduler, active) = (Scheduler::new(limits), HashMap::new());
        let mut batch = Batch { requests, rules, scheduler, samples: Vec::with_capacity(samples.len()), active };
        for sample in samples {
            let request = &requests[sample.request_idx];
            let growing = Growing::new(request, rules);
            match growing.ended_at_once() {
                Some(reason) => out.put(sample, || growing.into_response(sample.index, reason)),
                None => {
                    batch.scheduler.add(&request.tokens, self.most_tokens(request));
                    batch.samples.push(sample);
                }
            }
        }
        batch
    }
}

impl Batch<'_> {
    /// The next pass of a group: see `Scheduler::next_pass`.
    fn next_pass(&mut self, group: usize) -> Vec<Part> {
        let parts = self.scheduler.next_pass(group);
        for part in &parts {
            let sample = self.samples[part.sequence];
            let request = &self.requests[sample.request_idx];
            let begin = || Active { sample, request, noise: request.noise(), growing: Growing::new(request, self.rules) };
            self.active.entry(part.sequence).or_insert_with(begin);
        }
        parts
    }

    /// Calls `work` with how each wanted row of these parts is drawn: as if all guesses before it were right.
    fn with_drawings<T>(&self, parts: &[Part], work: impl FnOnce(&[Drawing]) -> T) -> T {
        let of_part = |part: &Part| {
            let guesses = &part.tokens[part.tokens.len() - part.n_wanted.saturating_sub(1)..];
            [self.active[&part.sequence].growing.tokens(), guesses].concat()
        };
        let responses: Vec<Vec<u32>> = parts.iter().map(of_part).collect();
        let mut drawings = Vec::new();
        for (part, response) in parts.iter().zip(&responses) {
            let one = &self.active[&part.sequence];
            let first = one.growing.tokens().len();
            drawings.extend((first..first + part.n_wanted).map(|n| one.request.drawing(&one.noise, one.sample.index, &response[..n])));
        }
        work(&drawings)
    }

    /// Takes what came of a pass: choices become tokens of responses, complete ones go out. Err, on all ranks of the replica, when one of
    /// them was asked to stop, or when logits were no numbers.
    fn finish(&mut self, parts: &[Part], pass: impl FnOnce(&[Drawing]) -> (Vec<Choice>, Signal), out: &mut Out) -> Result<()> {
        let (choices, signal) = self.with_drawings(parts, pass);
        let mut choices = choices.into_iter();
        for part in parts {
            self.advance(part, choices.by_ref().take(part.n_wanted), out)?;
        }
        match signal {
            Signal::GoOn => Ok(()),
            Signal::Stop => {
                Err(Error::new(Kind::Requeue, "asked to stop before all responses were made").remedy("run the same command again"))
            }
        }
    }

    /// Appends the choices of one part as far as its guesses were right.
    fn advance(&mut self, part: &Part, choices: impl Iterator<Item = Choice>, out: &mut Out) -> Result<()> {
        let one = self.active.get_mut(&part.sequence).expect("a part is of an active response");
        let guesses = &part.tokens[part.tokens.len() - part.n_wanted.saturating_sub(1)..];
        let (mut chosen, mut ended) = (Vec::new(), None);
        for (idx, choice) in choices.enumerate() {
            if ended.is_some() || chosen != guesses[..idx] {
                continue; // drawn for nothing
            }
            if !choice.logprob.is_finite() {
                let n_tokens = one.request.tokens.len() + one.growing.tokens().len();
                let wrong = format!("request {:?}: the logits after {n_tokens} tokens are not finite", one.request.id);
                return Err(Error::new(Kind::Numeric, wrong).remedy("check the checkpoint (trireme-checkpoint verify), or try --dtype f32"));
            }
            chosen.push(choice.token);
            ended = one.growing.push(choice);
        }
        if let Some(progress) = &mut out.progress {
            progress.add_also(chosen.len() as u64);
        }
        self.scheduler.accept(part, &chosen, if ended.is_some() { Next::Ended } else { Next::GoesOn });
        if let Some(reason) = ended {
            let one = self.active.remove(&part.sequence).expect("it was there");
            out.put(one.sample, || one.growing.into_response(one.sample.index, reason));
        }
        Ok(())
    }
}
