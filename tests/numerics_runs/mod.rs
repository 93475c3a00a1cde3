//! Whole training runs of a tiny model under any layout, and what is compared of them: bits, put together again as logical
//! tensors by their slices. Several test programs use it, none all of it.
#![allow(dead_code)] // not every test program uses all

use crate::common::models;
use std::collections::BTreeMap;
use trireme::comm::{Communicator, Groups, threads};
use trireme::device::cpu::{Cpu, Isa};
use trireme::device::{Device, Scratch};
use trireme::error::Result;
use trireme::exact::ExactSum;
use trireme::model::chunk::{MicroBatch, Ratings};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::fp8;
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::schedule::{self, Messages, PipelineShape};
use trireme::parallel::slice::Slice;
use trireme::recipe::{self, Linear, LrDecay, Mode, Optimizer, Recompute, ScheduleKind};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};
use trireme::train::batch::{BatchShape, Samples, micro_batch};
use trireme::train::exchanges::{Exchanges, Overlap};
use trireme::train::executor::{self, Keep};
use trireme::train::optimizer::{Update, sum_exactly};
use trireme::train::state::TrainState;

/// Odd pieces everywhere: A D / 8 = 6, F / 8 = 5, (A + 2G) D / 8 = 12, and samples of 12 tokens in 8 pieces.
pub fn model() -> ModelConfig {
    ModelConfig { vocab_divisor: 64, rotary_fraction: 0.67, init_std: 0.2, ..models::nemotron([8, 24, 8, 4, 6, 40, 37], 32) }
}

pub const SEQ_LEN: usize = 12;

/// One way to train.
#[derive(Clone, Debug)]
pub struct Run {
    pub model: ModelConfig,
    pub layout: ParallelLayout,
    pub micro: usize,
    pub global: usize,
    pub sequence: SequenceMode,
    pub recompute: Recompute,
    pub dtype: DType,
    pub mode: Mode,
    pub linear: Linear,
    pub isa: Isa,
    /// Opens the device of a rank; none: the CPU with these instructions.
    pub open: Option<fn() -> Box<dyn Device>>,
    /// With one chunk a stage.
    pub schedule: ScheduleKind,
}

impl Run {
    /// One rank, one sample a micro-batch.
    pub fn reference(model: ModelConfig, dtype: DType) -> Run {
        Run {
            model,
            layout: ParallelLayout::SINGLE,
            micro: 1,
            global: 16,
            sequence: SequenceMode::Replicated,
            recompute: Recompute::None,
            dtype,
            mode: Mode::Reproducible,
            linear: Linear::Stored,
            isa: Isa::detect(),
            open: None,
            schedule: ScheduleKind::OneFOneB,
        }
    }

    /// Whether the schedule and the model allow it.
    pub fn fits(&self) -> bool {
        let ParallelLayout { tp, pp, dp, vp } = self.layout;
        let divides = self.global.is_multiple_of(dp * self.micro) && self.model.n_layers.is_multiple_of(pp * vp);
        let n_micro = self.global / (dp * self.micro);
        let shards = self.sequence == SequenceMode::Sharded;
        divides && tp * pp * dp <= 8 && (vp == 1 || n_micro.is_multiple_of(pp)) && !(shards && tp == 1)
    }
}

/// What one step gave: numbers, and logical tensors by name.
#[derive(Clone, PartialEq)]
pub struct Step {
    pub loss: f64,
    pub grad_norm: f64,
    pub gradients: BTreeMap<String, Vec<f32>>,
    pub weights: BTreeMap<String, Vec<f32>>,
}

#[derive(Clone)]
pub struct Trace {
    pub steps: Vec<Step>,
}

impl Trace {
    /// Where bits differ first, for people.
    pub fn first_difference(&self, expected: &Trace) -> Option<String> {
        assert_eq!(self.steps.len(), expected.steps.len());
        for (i, (found, expected)) in self.steps.iter().zip(&expected.steps).enumerate() {
            for (what, a, b) in [("loss", found.loss, expected.loss), ("gradient norm", found.grad_norm, expected.grad_norm)] {
                if a.to_bits() != b.to_bits() {
                    return Some(format!("step {i}: {what} {a:e}, expected {b:e}"));
                }
            }
            for (what, a, b) in [("gradient", &found.gradients, &expected.gradients), ("weight", &found.weights, &expected.weights)] {
                assert!(a.keys().eq(b.keys()), "other parameters");
                for (name, a) in a {
                    let b = &b[name];
                    let differ = a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                    if differ > 0 {
                        let at = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits()).unwrap();
                        return Some(format!(
                            "step {i}: {what} {name}: {differ} of {} differ, first [{at}] {:e}, expected {:e}",
                            a.len(),
                            a[at],
                            b[at]
                        ));
                    }
                }
            }
        }
        None
    }
}

/// Tokens are a function of the sample's index.
struct Noise;

impl Samples for Noise {
    fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        let noise = Random::new(index, "tokens");
        out.iter_mut().enumerate().for_each(|(i, token)| *token = (noise.bits(i as u64) % 37) as u32);
        Ok(())
    }
}

/// Parts of logical tensors by name, as ranks hold them.
type Parts = Vec<(String, Vec<usize>, Slice, Vec<f32>)>;

/// Where element i of a part lies in the logical tensor.
fn place(shape: &[usize], slice: &Slice, i: usize) -> usize {
    let columns = shape.get(1).copied().unwrap_or(1);
    let (first, width) = if shape.len() == 2 { (slice.offset[1], slice.shape[1]) } else { (0, 1) };
    (slice.offset[0] + i / width) * columns + first + i % width
}

/// Puts parts together; what several ranks hold must be equal.
fn assemble(parts: impl Iterator<Item = (String, Vec<usize>, Slice, Vec<f32>)>) -> BTreeMap<String, Vec<f32>> {
    let mut all: BTreeMap<String, (Vec<f32>, Vec<bool>)> = BTreeMap::new();
    for (name, shape, slice, values) in parts {
        let n: usize = shape.iter().product();
        let (whole, seen) = all.entry(name.clone()).or_insert_with(|| (vec![0.0; n], vec![false; n]));
        for (i, value) in values.iter().enumerate() {
            let at = place(&shape, &slice, i);
            assert!(!seen[at] || whole[at].to_bits() == value.to_bits(), "{name}: ranks disagree about element {at}");
            (whole[at], seen[at]) = (*value, true);
        }
    }
    all.into_iter()
        .map(|(name, (whole, seen))| {
            assert!(seen.iter().all(|&seen| seen), "{name}: some elements are on no rank");
            (name, whole)
        })
        .collect()
}

fn owned(tensor: &Tensor, slice: &Slice) -> Vec<f32> {
    let rows = tensor.rows(0..slice.shape[0]);
    let mut host = Tensor::host(rows.dims(), rows.dtype(), None).unwrap();
    rows.read_bytes(0, host.bytes_mut());
    host.to_f32_vec()
}

/// Name and shape of a parameter, the slice of it that a rank owns, and the optimizer's three states of that.
type OwnedState = (String, Vec<usize>, Slice, [Vec<f32>; 3]);

/// Numbers of one rank's steps.
struct OnRank {
    loss: f64,
    grad_norm: f64,
    gradients: Parts,
    weights: Parts,
    /// master, m, v of each owned part.
    state: Vec<OwnedState>,
}

/// The optimizer's state as logical tensors: master, m, v.
pub type Saved = [BTreeMap<String, Vec<f32>>; 3];

const SETTINGS: Optimizer = Optimizer {
    lr: 1e-2,
    min_lr: 1e-2,
    warmup_samples: 0,
    decay: LrDecay::Constant,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-4,
    weight_decay: 0.1,
};

fn rank_steps(run: &Run, world: Box<dyn Communicator>, steps: std::ops::Range<u64>, from: Option<&Saved>) -> Vec<OnRank> {
    let groups = Groups::new(world, run.layout);
    let device = run.open.map_or_else(|| Box::new(Cpu::with_isa(run.isa)) as Box<dyn Device>, |open| open());
    let (device, scratch, layout) = (&*device, Scratch::new(), run.layout);
    let shape = BatchShape { seq_len: SEQ_LEN, micro: run.micro, global: run.global, dp: layout.dp };
    let kind = if layout.vp > 1 { ScheduleKind::Interleaved } else { run.schedule };
    let pipeline = PipelineShape { pp: layout.pp, vp: layout.vp, n_micro: shape.n_micro() };
    let schedule = schedule::training(kind, pipeline, Messages::Ahead).unwrap();
    let asked = recipe::Numerics { mode: run.mode, ..recipe::Numerics::default() };
    let numerics = Numerics::of(&asked, device, run.global, layout.dp).unwrap();
    let mut state = TrainState::new(device, &run.model, &groups, run.dtype).unwrap();
    state.prepare_sums(device, &asked, asked.blocks(run.global) / layout.dp).unwrap();
    state.initialise(device, &scratch, &groups, 3);
    if let Some(saved) = from {
        restore(&mut state, saved);
        state.optimizer.publish_weights(device, &scratch, &mut state.chunks, &groups);
    }
    for chunk in &mut state.chunks {
        let n_blocks = run.model.n_layers / layout.n_chunks();
        chunk.set_recompute(&vec![run.recompute; n_blocks]);
        if let Some(scales) = fp8::scales_of(run.linear) {
            chunk.train_in_fp8(device, scales).unwrap();
        }
    }
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence: run.sequence, numerics };
    let n_tokens = shape.global_tokens();
    let mut exchanges = Exchanges::new(&groups, Overlap::WithComputation);
    let mut results = Vec::new();
    for step in steps {
        let batches: Vec<MicroBatch> = (0..shape.n_micro())
            .map(|micro| {
                let samples = shape.samples(step * run.global as u64, groups.at.dp, micro);
                let read = micro_batch(device, &Noise, samples, SEQ_LEN, 1.0 / n_tokens as f32).unwrap();
                let label = |i: usize| Random::new(7, "labels").normal(i as u64) as f32;
                let ratings = match run.model.head {
                    HeadKind::Vocabulary => None,
                    HeadKind::Reward(n) => {
                        // Ratings are a function of the sample, too.
                        let first = step as usize * run.global + groups.at.dp * run.global / layout.dp + micro * run.micro;
                        let labels = (first * n..(first + run.micro) * n).map(label).collect();
                        Some(Ratings { labels, weight: 1.0 / (run.global * n) as f32 })
                    }
                };
                MicroBatch { first_sample: micro * run.micro, ratings, ..read }
            })
            .collect();
        let TrainState { chunks, optimizer, .. } = &mut state;
        let mut during = exchanges.during(ctx, optimizer);
        let passed = executor::run(&schedule, chunks, &ctx, &groups, (&batches, Keep::Saved), &mut during);
        exchanges.finish_gradients(chunks, optimizer);
        optimizer.reduce_tied(device, &scratch, chunks, &groups);
        let counted = if groups.at.tp == 0 { passed.token_losses } else { Vec::new() };
        let mine: ExactSum = counted.iter().flatten().map(|&loss| f64::from(loss)).collect();
        let loss = sum_exactly(&*groups.world, &mine) / n_tokens as f64;
        let grad_norm = optimizer.grad_norm(device, chunks, &groups);
        let (mut gradients, mut weights, mut moments) = (Vec::new(), Vec::new(), Vec::new());
        let each = |chunks: &[trireme::model::chunk::Chunk]| -> Vec<(usize, usize, String, Vec<usize>)> {
            let of_chunk = |(c, chunk): (usize, &trireme::model::chunk::Chunk)| {
                let params = chunk.params().into_iter().enumerate();
                params.map(move |(i, param)| (c, i, param.spec.name.clone(), param.spec.shape.clone())).collect::<Vec<_>>()
            };
            chunks.iter().enumerate().flat_map(of_chunk).collect()
        };
        for (c, i, name, shape) in each(chunks) {
            let slice = optimizer.shards[c][i].slice.clone();
            gradients.push((name, shape, slice.clone(), owned(optimizer.reduced_gradient(chunks, c, i), &slice)));
        }
        let update = Update { step: step + 1, lr: SETTINGS.lr, grad_scale: (0.5 / (grad_norm + 1e-6)).min(1.0) };
        optimizer.update(device, &scratch, chunks, &mut exchanges, (&SETTINGS, update));
        exchanges.finish_weights(chunks);
        for (c, i, name, shape) in each(chunks) {
            let (param, shard) = (&chunks[c].params()[i].value, &optimizer.shards[c][i]);
            let slice = chunks[c].params()[i].slice.clone();
            weights.push((name.clone(), shape.clone(), slice.clone(), owned(param, &slice)));
            let state = [&shard.master, &shard.m, &shard.v].map(|tensor| owned(tensor, &shard.slice));
            moments.push((name, shape, shard.slice.clone(), state));
        }
        results.push(OnRank { loss, grad_norm, gradients, weights, state: moments });
    }
    results
}

fn restore(state: &mut TrainState, saved: &Saved) {
    for (chunk, shards) in state.chunks.iter().zip(&mut state.optimizer.shards) {
        for (param, shard) in chunk.params().into_iter().zip(shards) {
            let columns = param.spec.shape.get(1).copied().unwrap_or(1);
            let two = shard.slice.shape.len() == 2;
            let (first, width) = if two { (shard.slice.offset[1], shard.slice.shape[1]) } else { (0, 1) };
            for (from, to) in saved.iter().zip([&mut shard.master, &mut shard.m, &mut shard.v]) {
                let from = &from[&param.spec.name];
                let at = |i: usize| (shard.slice.offset[0] + i / width) * columns + first + i % width;
                let values: Vec<f32> = (0..shard.slice.n_elements()).map(|i| from[at(i)]).collect();
                to.write_bytes(0, bytemuck::cast_slice(&values));
            }
        }
    }
}

fn collect(mut ranks: Vec<Vec<OnRank>>) -> (Trace, Saved) {
    let n_steps = ranks[0].len();
    let mut steps = Vec::new();
    let mut last: Saved = Default::default();
    for _ in 0..n_steps {
        let now: Vec<OnRank> = ranks.iter_mut().map(|rank| rank.remove(0)).collect();
        let (loss, grad_norm) = (now[0].loss, now[0].grad_norm);
        assert!(now.iter().all(|rank| rank.loss.to_bits() == loss.to_bits() && rank.grad_norm.to_bits() == grad_norm.to_bits()));
        let (mut gradients, mut weights, mut moments) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
        for rank in now {
            gradients.extend(rank.gradients);
            weights.extend(rank.weights);
            for (name, shape, slice, state) in rank.state {
                for (to, values) in moments.iter_mut().zip(state) {
                    to.push((name.clone(), shape.clone(), slice.clone(), values));
                }
            }
        }
        steps.push(Step { loss, grad_norm, gradients: assemble(gradients.into_iter()), weights: assemble(weights.into_iter()) });
        last = moments.map(|parts| assemble(parts.into_iter()));
    }
    (Trace { steps }, last)
}

/// The first steps.
pub fn train(run: &Run, n_steps: u64) -> Trace {
    collect(threads::run(run.layout.world(), |world| rank_steps(run, world, 0..n_steps, None))).0
}

/// The first steps on this rank of a world that may be of any kind: where they differ from what they should be, for people.
/// Collective.
pub fn difference_on_rank(run: &Run, world: Box<dyn Communicator>, expected: &Trace) -> Option<String> {
    let steps = rank_steps(run, world, 0..expected.steps.len() as u64, None);
    for (i, (found, expected)) in steps.into_iter().zip(&expected.steps).enumerate() {
        for (what, a, b) in [("loss", found.loss, expected.loss), ("gradient norm", found.grad_norm, expected.grad_norm)] {
            if a.to_bits() != b.to_bits() {
                return Some(format!("step {i}: {what} {a:e}, expected {b:e}"));
            }
        }
        let pairs = [("gradient", found.gradients, &expected.gradients), ("weight", found.weights, &expected.weights)];
        for (what, parts, whole) in pairs {
            for (name, shape, slice, values) in parts {
                let expected = |i: usize| whole[&name][place(&shape, &slice, i)];
                if let Some(at) = (0..values.len()).find(|&at| values[at].to_bits() != expected(at).to_bits()) {
                    return Some(format!("step {i}: {what} {name} [{at}] of {slice:?} is {:e}, expected {:e}", values[at], expected(at)));
                }
            }
        }
    }
    None
}

/// Some steps under one layout, the rest under another, which starts from the first one's optimizer state.
pub fn resumed(first: &Run, second: &Run, at: u64, n_steps: u64) -> Trace {
    let (mut trace, saved) = collect(threads::run(first.layout.world(), |world| rank_steps(first, world, 0..at, None)));
    let rest = collect(threads::run(second.layout.world(), |world| rank_steps(second, world, at..n_steps, Some(&saved)))).0;
    trace.steps.extend(rest.steps);
    trace
}
