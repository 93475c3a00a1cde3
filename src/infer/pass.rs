//! Passes over the model on one rank: this stage's part of the forward pass, the messages between stages, and the choices of next tokens.
//! Several passes may be under way: a stage begins the next one while later stages work on the last. A pass carries whether a rank
//! was asked to stop, so that all ranks of a replica hear of it in the same pass without waiting for each other.

use super::decode::{Decoder, NewTokens};
use super::sampler::{Choice, Drawing};
use super::sampling;
use super::schedule::Part;
use crate::comm::{Groups, InFlight, Pending, Recv, Send};
use crate::device::{CacheSpan, Device, KvCache, Scratch, ScratchTensor};
use crate::error::Result;
use crate::model::chunk::{CachedInput, CachedOutput, Chunk};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::recipe::Mode;
use crate::tensor::{DType, Tensor};

/// Tags of the messages between stages.
const HIDDEN: u32 = 0;
const SIGNAL: u32 = 1;
const CHOICES: u32 = 2;

/// Whether a rank of the replica was asked to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// None was.
    GoOn,
    /// One was.
    Stop,
}

/// What this rank computes passes with.
pub struct Passes<'a> {
    device: &'a dyn Device,
    groups: &'a Groups,
    chunk: &'a Chunk,
    numerics: Numerics<'a>,
    caches: Vec<KvCache>,
    decoder: Decoder,
    /// Temporaries of other passes, which have ever other numbers of rows.
    scratch: Scratch,
}

/// A pass under way.
pub struct UnderWay<'a> {
    signal: Signal,
    /// On the last stage.
    choices: Vec<Choice>,
    hidden: Option<InFlight<'a, (ScratchTensor, Tensor)>>,
    told: Option<InFlight<'a, Tensor>>,
}

/// The rows of a pass.
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    spans: Vec<CacheSpan>,
    wanted: Vec<usize>,
}

impl Rows {
    fn of(parts: &[Part]) -> Rows {
        let mut rows = Rows { tokens: Vec::new(), positions: Vec::new(), spans: Vec::new(), wanted: Vec::new() };
        for part in parts {
            let first = rows.tokens.len();
            rows.tokens.extend(&part.tokens);
            let end = rows.tokens.len();
            rows.positions.extend((part.past..part.past + part.tokens.len()).map(|position| position as u32));
            rows.spans.push(CacheSpan { rows: first..end, past: part.past, pages: part.pages.clone() });
            rows.wanted.extend(end - part.n_wanted..end);
        }
        rows
    }
}

impl<'a> Passes<'a> {
    /// Of a chunk in an order of sums, with a cache of so many pages. Err: out of memory.
    pub fn new(device: &'a dyn Device, groups: &'a Groups, (chunk, order): (&'a Chunk, Mode), n_pages: usize) -> Result<Passes<'a>> {
        let caches = chunk.new_caches(device, n_pages)?;
        let numerics = match order {
            Mode::Fast => Numerics::Fast,
            Mode::Reproducible => Numerics::of_inference(device),
        };
        if device.records() && !groups.tp.is_recordable() && groups.world.rank() == 0 {
            log::info!("decode steps are not recorded: tensor-parallel ranks exchange through host memory");
        }
        Ok(Passes { device, groups, chunk, numerics, caches, decoder: Decoder::default(), scratch: Scratch::of_any_rows() })
    }

    /// How many passes may be under way at one time, so that every stage has work.
    pub fn most_under_way(groups: &Groups) -> usize {
        // Where messages wait for those before them, a stage that begins a pass ahead of choices would wait for ever.
        if groups.pp.groups_are_in_order() { 1 } else { groups.layout.pp }
    }

    /// Begins a pass; `drawings` has one for each wanted row. Collective over the replica, as are signals, but stages do not wait for
    /// later ones.
    pub fn start(&mut self, parts: &[Part], drawings: &[Drawing], mine: Signal) -> UnderWay<'a> {
        let (groups, at) = (self.groups, self.groups.at);
        let asked = if mine == Signal::Stop { 1.0 } else { 0.0 };
        let mut signal = if groups.tp.sum_f64(asked) > 0.0 { Signal::Stop } else { Signal::GoOn };
        let rows = Rows::of(parts);
        let sequence = SequenceMode::Replicated;
        let ctx = Ctx { device: self.device, tp: &*groups.tp, scratch: &self.scratch, sequence, numerics: self.numerics };
        let is_decode = rows.spans.iter().all(|span| span.rows.len() == 1);
        let mut under_way = UnderWay { signal, choices: Vec::new(), hidden: None, told: None };
        let (device, n_valid) = (self.device, self.chunk.config().vocab_size);
        let choose = |logits: &Tensor| sampling::choose_rows(device, &*groups.tp, logits, n_valid, drawings);
        let is_step = is_decode && rows.wanted.len() == rows.tokens.len() && self.steps_are_apart();
        let received = (at.pp > 0).then(|| self.receive_hidden(&ctx, rows.tokens.len()));
        if let Some((_, Signal::Stop)) = received {
            signal = Signal::Stop;
        }
        let hidden = received.as_ref().map(|(hidden, _)| &**hidden);
        let (chunk, decoder, caches) = (self.chunk, &mut self.decoder, &mut self.caches);
        let (mut choices, mut output) = (Vec::new(), None);
        let mut forward = || {
            if is_step {
                let new = NewTokens { tokens: &rows.tokens, positions: &rows.positions, spans: &rows.spans };
                match decoder.step(&ctx, chunk, &new, hidden, caches) {
                    CachedOutput::Logits(logits) => choices = choose(logits),
                    // The step's own is written by the next of its size.
                    CachedOutput::Hidden(hidden) => output = Some(ctx.copy_of(hidden)),
                }
                return;
            }
            let [tokens, positions] = [&rows.tokens, &rows.positions].map(|values| upload(&ctx, values));
            let input = hidden.map_or(CachedInput::Tokens(&tokens), CachedInput::Hidden);
            match chunk.forward_cached(&ctx, input, &positions, &rows.spans, caches, &rows.wanted) {
                CachedOutput::Logits(logits) => choices = choose(&logits),
                CachedOutput::Hidden(hidden) => output = Some(hidden),
            }
        };
        // Between tensor-parallel ranks a forward waits for others.
        if groups.layout.tp == 1 {
            self.device.run_together(&mut forward)
        } else {
            forward()
        }
        let is_last = at.pp + 1 == groups.layout.pp;
        (under_way.signal, under_way.choices) = (signal, choices);
        // From the last stage there is one where no row is wanted.
        under_way.hidden = output.filter(|_| !is_last).map(|hidden| self.send_hidden(hidden, signal));
        if is_last && groups.layout.pp > 1 {
            under_way.told = Some(self.tell(&under_way.choices, signal));
        }
        under_way
    }

    /// Whether decode steps are run by a `Decoder` of their own: where the device records them, or all of one is on this rank.
    fn steps_are_apart(&self) -> bool {
        let (tp, layout) = (&self.groups.tp, self.groups.layout);
        layout.tp * layout.pp == 1 || self.device.records() && tp.is_recordable()
    }

    /// Ends the pass that was started first: its choices, one a wanted row, and whether to stop, the same on every rank of the replica.
    pub fn finish(&self, under_way: UnderWay<'a>, drawings: &[Drawing]) -> (Vec<Choice>, Signal) {
        let UnderWay { signal, choices, hidden, told } = under_way;
        hidden.map(InFlight::wait);
        let last = self.groups.layout.pp - 1;
        if self.groups.at.pp == last {
            told.map(InFlight::wait);
            return (choices, signal);
        }
        let mut words = vec![0u32; 1 + sampling::n_words(drawings)];
        let mut message = self.word_tensor(&words);
        self.groups.pp.start_group(Vec::new(), vec![Recv { peer: last, tag: CHOICES, tensor: &mut message }]).wait();
        self.device.download(&message, bytemuck::cast_slice_mut(&mut words));
        (sampling::from_words(&words[1..], drawings), signal_of(words[0]))
    }

    fn receive_hidden(&self, ctx: &Ctx, n_rows: usize) -> (ScratchTensor, Signal) {
        let peer = self.groups.at.pp - 1;
        let mut hidden = ctx.take(&[n_rows, self.chunk.config().hidden], self.chunk.dtype());
        let mut word = self.word_tensor(&[0]);
        let recvs = vec![Recv { peer, tag: HIDDEN, tensor: &mut hidden }, Recv { peer, tag: SIGNAL, tensor: &mut word }];
        self.groups.pp.start_group(Vec::new(), recvs).wait();
        let mut words = [0u32];
        self.device.download(&word, bytemuck::cast_slice_mut(&mut words));
        (hidden, signal_of(words[0]))
    }

    fn send_hidden(&self, hidden: ScratchTensor, signal: Signal) -> InFlight<'a, (ScratchTensor, Tensor)> {
        let peer = self.groups.at.pp + 1;
        InFlight::start(&*self.groups.pp, (hidden, self.word_tensor(&[signal as u32])), |pp, (hidden, word)| -> Pending {
            let sends = vec![Send { peer, tag: HIDDEN, tensor: hidden }, Send { peer, tag: SIGNAL, tensor: word }];
            pp.start_group(sends, Vec::new())
        })
    }

    /// The choices and the signal for all other stages.
    fn tell(&self, choices: &[Choice], signal: Signal) -> InFlight<'a, Tensor> {
        let words = [vec![signal as u32], sampling::to_words(choices)].concat();
        let others = 0..self.groups.layout.pp - 1;
        InFlight::start(&*self.groups.pp, self.word_tensor(&words), |pp, message| -> Pending {
            let message: &Tensor = message;
            pp.start_group(others.map(|peer| Send { peer, tag: CHOICES, tensor: message }).collect(), Vec::new())
        })
    }

    fn word_tensor(&self, words: &[u32]) -> Tensor {
        let mut tensor = self.device.alloc(&[words.len()], DType::U32).unwrap_or_else(|error| panic!("{error}"));
        self.device.upload(bytemuck::cast_slice(words), &mut tensor);
        tensor
    }
}

fn signal_of(word: u32) -> Signal {
    if word == Signal::GoOn as u32 { Signal::GoOn } else { Signal::Stop }
}

fn upload(ctx: &Ctx, values: &[u32]) -> ScratchTensor {
    let mut tensor = ctx.take(&[values.len()], DType::U32);
    ctx.device.upload(bytemuck::cast_slice(values), &mut tensor);
    tensor
}
