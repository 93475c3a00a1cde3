//! The pretraining loop: data -> micro-batches -> schedule -> clip -> AdamW -> metrics, checkpoints, held-out loss; resumes from
//! the newest checkpoint, stops on request with everything saved. Nemotron-4 340B report, section 2.

use super::batch::{BatchShape, Samples, micro_batch};
use super::executor::{self, Keep};
use super::optimizer::Update;
use super::run_dir::{self, Opened, RunDir};
use super::state::{SavedAs, TrainState};
use crate::artifact::{self, Input};
use crate::checkpoint;
use crate::comm::{Groups, agree};
use crate::data::order::{DataOrder, Sequential};
use crate::data::shards::{Split, TokenShards};
use crate::device::ceiling::Ceiling;
use crate::device::{Device, Scratch};
use crate::error::{Context, Error, Kind, Result};
use crate::metrics::{MetricsWriter, Row};
use crate::model::chunk::MicroBatch;
use crate::model::ctx::{Ctx, SequenceMode};
use crate::parallel::schedule::{self, PipelineShape, Schedule};
use crate::progress::Progress;
use crate::recipe::{Precision, Pretrain};
use crate::tensor::DType;
use std::path::Path;
use std::time::Instant;

/// One rank's part in a pretraining job.
pub struct Job<'a> {
    /// The checked recipe.
    pub recipe: &'a Pretrain,
    /// This rank's communicators, made for the recipe's layout.
    pub groups: &'a Groups,
    /// Where it computes.
    pub device: &'a dyn Device,
    /// The run directory.
    pub out: &'a Path,
    /// Save and leave after this step, as planned (exit 0).
    pub stop_after: Option<u64>,
    /// Whether any rank was asked to stop; collective.
    pub stop: &'a dyn Fn() -> bool,
    /// Measures what this rank's device can do at best (`device::ceiling::measure`); called by all ranks at once.
    pub ceiling: &'a dyn Fn(DType) -> Ceiling,
}

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// It was finished before this job began.
    WasFinished,
    /// All steps are done.
    Finished,
    /// At `stop_after`, with a checkpoint.
    StoppedAsPlanned,
}

/// Training data of a run, checked against its recipe.
struct RunData {
    order: DataOrder,
    validation: Option<HeldOut>,
    inputs: Vec<Input>,
    tokenizer: Option<Vec<u8>>,
}

/// Held-out samples and what a token of them stands for.
struct HeldOut {
    samples: Sequential,
    n_samples: usize,
    bytes_per_token: Option<f64>,
}

impl Samples for DataOrder {
    fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        DataOrder::read(self, index, out)
    }
}

impl Samples for Sequential {
    fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        Sequential::read(self, index, out)
    }
}

/// Runs the job to its end. An interruption (signal) is an error of kind Requeue after the checkpoint is durable.
pub fn run(job: &Job) -> Result<Ended> {
    let world = &*job.groups.world;
    let data = open_data(job)?;
    let recipe_toml = job.recipe.to_toml();
    let opened = agree_on_run_dir(job, &recipe_toml)?;
    let run_dir = match opened {
        None => return Ok(Ended::WasFinished),
        Some(run_dir) => run_dir,
    };
    let dtype = dtype_of(job.recipe);
    let mut trainer = Trainer::new(job, &data, dtype)?;
    trainer.start_or_resume(&data)?;
    let ended = trainer.train(&data)?;
    if ended == Ended::Finished {
        let counts = [("steps", job.recipe.train.steps.into()), ("consumed_samples", trainer.state.consumed_samples.into())];
        let finish = |run_dir: RunDir| run_dir.finish(recipe_value(job.recipe), data.inputs.clone(), &counts);
        agree(world, run_dir.map_or(Ok(()), finish))?;
    }
    Ok(ended)
}

/// The resolved recipe as it stands in manifests.
fn recipe_value(recipe: &Pretrain) -> serde_json::Value {
    serde_json::to_value(recipe).expect("a recipe is plain data")
}

/// Rank 0 opens the run directory; all ranks learn whether there is anything to do. Ok(None): finished before; the inner value
/// is Some on rank 0 only.
#[allow(clippy::type_complexity)]
fn agree_on_run_dir(job: &Job, recipe_toml: &str) -> Result<Option<Option<RunDir>>> {
    let world = &*job.groups.world;
    let opened = if world.rank() == 0 { RunDir::open(job.out, recipe_toml).map(Some) } else { Ok(None) };
    let opened = agree(world, opened)?;
    let finished = matches!(opened, Some(Opened::Finished));
    if world.sum_f64(if finished { 1.0 } else { 0.0 }) > 0.0 {
        return Ok(None);
    }
    Ok(Some(opened.and_then(|opened| match opened {
        Opened::Ours(run_dir) => Some(run_dir),
        Opened::Finished => None,
    })))
}

/// What weights and activations are stored as.
fn dtype_of(recipe: &Pretrain) -> DType {
    match recipe.train.precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

/// Opens all shards; rank 0 also reads them through and compares checksums.
fn open_data(job: &Job) -> Result<RunData> {
    let recipe = job.recipe;
    let open = |path: &Path, split: Split| -> Result<TokenShards> {
        let mut shards = TokenShards::open(path, split)?;
        check_vocabulary(recipe, path, &shards)?;
        shards.limit_ids(recipe.model.vocab_size);
        if job.groups.world.rank() == 0 {
            shards.verify()?;
        }
        Ok(shards)
    };
    let load = || -> Result<RunData> {
        let (mut sources, mut inputs) = (Vec::new(), Vec::new());
        for source in &recipe.data.train {
            let shards = open(&source.shards, Split::Train)?;
            inputs.push(shards.as_input("train-tokens", &source.shards));
            sources.push((shards, source.weight));
        }
        let tokenizer = sources.first().and_then(|(shards, _)| shards.tokenizer_bytes());
        let validation = match &recipe.validation {
            None => None,
            Some(validation) => {
                let shards = open(&validation.shards, Split::Validation)?;
                inputs.push(shards.as_input("validation-tokens", &validation.shards));
                let bytes_per_token = shards.text_bytes().map(|bytes| bytes as f64 / shards.n_tokens() as f64);
                let samples = Sequential::new(shards, recipe.batch.seq_len)?;
                let n_samples = held_out_samples(recipe, job.groups.layout.dp, &samples)?;
                Some(HeldOut { samples, n_samples, bytes_per_token })
            }
        };
        let order = DataOrder::new(sources, recipe.batch.seq_len, recipe.data.seed)?;
        Ok(RunData { order, validation, inputs, tokenizer })
    };
    agree(&*job.groups.world, load().doing(|| "opening the training data".into()))
}

/// Samples of one held-out measurement: as asked, at most what there is, a multiple of a round of micro-batches.
fn held_out_samples(recipe: &Pretrain, dp: usize, samples: &Sequential) -> Result<usize> {
    let asked = recipe.validation.as_ref().map_or(0, |validation| validation.samples);
    let round = dp * recipe.batch.micro;
    let n_samples = asked.min(samples.n_samples() as usize) / round * round;
    if n_samples == 0 {
        let wrong = format!(
            "the held-out shards have {} samples of {} tokens, one measurement needs dp x micro = {round}",
            samples.n_samples(),
            recipe.batch.seq_len
        );
        return Err(Error::recipe(wrong).remedy("hold out more text, shorten batch.seq_len, or remove [validation]"));
    }
    Ok(n_samples)
}

fn check_vocabulary(recipe: &Pretrain, path: &Path, shards: &TokenShards) -> Result<()> {
    match shards.vocab_size() {
        Some(found) if found != recipe.model.vocab_size => {
            let wrong = format!(
                "model.vocab_size = {}, but the shards in {} were made with {found} pieces",
                recipe.model.vocab_size,
                path.display()
            );
            Err(Error::recipe(wrong).remedy(format!("set model.vocab_size = {found}, or take shards of the right tokenizer")))
        }
        _ => Ok(()),
    }
}

/// One rank's moving parts.
struct Trainer<'a> {
    job: &'a Job<'a>,
    state: TrainState,
    scratch: Scratch,
    batch: BatchShape,
    schedule: Schedule,
    ceiling: Ceiling,
    metrics: Option<MetricsWriter>,
}

/// What a step measured.
struct StepResult {
    loss: f64,
    grad_norm: f64,
    lr: f64,
    step_s: f64,
}

impl<'a> Trainer<'a> {
    fn new(job: &'a Job<'a>, data: &RunData, dtype: DType) -> Result<Trainer<'a>> {
        let (recipe, groups) = (job.recipe, job.groups);
        let world = &*groups.world;
        let dp = groups.layout.dp;
        let batch = BatchShape { seq_len: recipe.batch.seq_len, micro: recipe.batch.micro, global: recipe.batch.global, dp };
        let shape = PipelineShape { pp: groups.layout.pp, vp: groups.layout.vp, n_micro: batch.n_micro() };
        let schedule = agree(world, schedule::training(recipe.parallel.schedule, shape))?;
        schedule.check().unwrap_or_else(|problem| panic!("the generated schedule is wrong: {problem}"));
        let state = agree(world, TrainState::new(job.device, &recipe.model, groups, dtype))?;
        // All ranks measure at once, as they will compute at once.
        world.barrier();
        let mine = (job.ceiling)(dtype);
        let ceiling =
            Ceiling { gemm_flops_per_s: world.sum_f64(mine.gemm_flops_per_s), copy_bytes_per_s: world.sum_f64(mine.copy_bytes_per_s) };
        let metrics = if world.rank() == 0 { MetricsWriter::open(&run_dir::metrics_path(job.out)).map(Some) } else { Ok(None) };
        let metrics = agree(world, metrics)?;
        let trainer = Trainer { job, state, scratch: Scratch::new(), batch, schedule, ceiling, metrics };
        trainer.print_plan(data);
        Ok(trainer)
    }

    /// The resolved plan as a table, before step 0.
    fn print_plan(&self, data: &RunData) {
        let (recipe, layout) = (self.job.recipe, self.job.groups.layout);
        let (embeddings, body) = recipe.model.n_params();
        let memory = self.job.device.memory();
        log::info!("device      {}", self.job.device.name());
        log::info!(
            "model       {:.1} M parameters ({:.1} M in embeddings), {} layers x {} wide, {}",
            (embeddings + body) as f64 / 1e6,
            embeddings as f64 / 1e6,
            recipe.model.n_layers,
            recipe.model.hidden,
            dtype_of(recipe).name()
        );
        log::info!(
            "layout      {} ranks = tp {} x pp {} (vp {}) x dp {}; sequence parallel {}",
            layout.world(),
            layout.tp,
            layout.pp,
            layout.vp,
            layout.dp,
            if recipe.parallel.sequence_parallel { "on" } else { "off" }
        );
        log::info!(
            "batch       {} samples x {} tokens a step, {} micro-batches of {} on each replica",
            self.batch.global,
            self.batch.seq_len,
            self.batch.n_micro(),
            self.batch.micro
        );
        log::info!("data        {} tokens a pass, order {}", data.order.n_tokens(), data.order.fingerprint());
        log::info!(
            "memory      {:.1} MiB of weights, gradients and optimizer state on this rank",
            memory.live_bytes as f64 / (1 << 20) as f64
        );
        log::info!("ceiling     {:.0} GFLOP/s of matrix product over all ranks, measured now", self.ceiling.gemm_flops_per_s / 1e9);
    }

    fn sequence_mode(&self) -> SequenceMode {
        if self.job.recipe.parallel.sequence_parallel { SequenceMode::Sharded } else { SequenceMode::Replicated }
    }

    fn start_or_resume(&mut self, data: &RunData) -> Result<()> {
        let groups = self.job.groups;
        let (device, world) = (self.job.device, &*groups.world);
        let newest = agree(world, checkpoint::latest(self.job.out))?;
        let Some(path) = newest else {
            self.state.initialise(device, &self.scratch, groups, self.job.recipe.train.seed);
            return Ok(());
        };
        let stored = agree(world, checkpoint::open(&path))?;
        if stored.meta().data_fingerprint != data.order.fingerprint() {
            let wrong =
                format!("the checkpoint consumed data {}, the recipe gives {}", stored.meta().data_fingerprint, data.order.fingerprint());
            return Err(Error::file(&path, wrong).remedy("put the shards back that the run was started with, or choose another --out"));
        }
        agree(world, self.state.load(device, &self.scratch, groups, &stored))?;
        if let Some(metrics) = &mut self.metrics {
            metrics.resumed_from(self.state.step)?;
        }
        log::info!("resumed from {} at step {}", path.display(), self.state.step);
        Ok(())
    }

    fn train(&mut self, data: &RunData) -> Result<Ended> {
        let (job, recipe) = (self.job, self.job.recipe);
        let world = &*job.groups.world;
        let last = job.stop_after.unwrap_or(u64::MAX).min(recipe.train.steps);
        let mut progress = (world.rank() == 0).then(|| Progress::new("pretrain", last.saturating_sub(self.state.step), "steps"));
        while self.state.step < last {
            let result = self.step(data)?;
            let is_end = self.state.step == last;
            let validation = recipe.validation.as_ref().filter(|v| is_end || self.state.step % v.every_steps == 0);
            let held_out_loss = match validation {
                Some(_) => Some(self.held_out_loss(data)?),
                None => None,
            };
            self.report(data, &result, held_out_loss)?;
            if let Some(progress) = &mut progress {
                progress.add(1);
            }
            let stop = (job.stop)();
            if is_end || stop || self.state.step % recipe.checkpoint.every_steps == 0 {
                self.save(data)?;
            }
            if stop && !is_end {
                let wrong = format!("asked to stop: saved at step {} of {}", self.state.step, recipe.train.steps);
                return Err(Error::new(Kind::Requeue, wrong).remedy("run the same command again to continue"));
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(if self.state.step >= recipe.train.steps { Ended::Finished } else { Ended::StoppedAsPlanned })
    }

    /// One optimizer step.
    fn step(&mut self, data: &RunData) -> Result<StepResult> {
        let started = Instant::now();
        let (job, recipe) = (self.job, self.job.recipe);
        let (device, groups) = (job.device, job.groups);
        let weight = 1.0 / self.batch.global_tokens() as f32;
        let batches = self.read_batches(&data.order, self.state.consumed_samples, weight);
        let batches = agree(&*groups.world, batches)?;
        let ctx = Ctx { device, tp: &*groups.tp, scratch: &self.scratch, sequence: self.sequence_mode() };
        let TrainState { chunks, optimizer, .. } = &mut self.state;
        let passed = executor::run(&self.schedule, chunks, &ctx, groups, (&batches, Keep::Saved), |chunks, chunk| {
            chunks[chunk].finish_gradients(&ctx);
            optimizer.reduce_chunk(chunks, chunk, groups);
        });
        optimizer.reduce_tied(device, &self.scratch, chunks, groups);
        let loss = mean_loss(&passed.token_losses, groups, self.batch.global_tokens());
        let grad_norm = optimizer.grad_norm(device, chunks, groups);
        self.check_finite(loss, grad_norm)?;
        let (step, clip) = (self.state.step + 1, recipe.train.clip_grad_norm);
        let update = Update {
            step,
            lr: recipe.optimizer.lr_at(self.state.step, recipe.train.steps),
            grad_scale: (clip / (grad_norm + 1e-6)).min(1.0),
        };
        let TrainState { chunks, optimizer, .. } = &mut self.state;
        optimizer.update(device, &self.scratch, chunks, groups, (&recipe.optimizer, update));
        device.finish();
        self.state.step = step;
        self.state.consumed_samples += self.batch.global as u64;
        Ok(StepResult { loss, grad_norm, lr: update.lr, step_s: started.elapsed().as_secs_f64() })
    }

    fn read_batches(&self, source: &dyn Samples, consumed: u64, weight: f32) -> Result<Vec<MicroBatch>> {
        let batch = &self.batch;
        (0..batch.n_micro())
            .map(|micro| micro_batch(self.job.device, source, batch.samples(consumed, self.job.groups.at.dp, micro), batch.seq_len, weight))
            .collect()
    }

    /// The same numbers are on every rank, so all ranks decide alike, before the update.
    fn check_finite(&self, loss: f64, grad_norm: f64) -> Result<()> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        let first = self.state.consumed_samples;
        let wrong = format!(
            "step {}: loss {loss}, gradient norm {grad_norm}, samples {first}..{}",
            self.state.step + 1,
            first + self.batch.global as u64
        );
        Err(Error::new(Kind::Numeric, wrong)
            .remedy("lower optimizer.lr, lengthen the warm-up, or look at these samples; the last checkpoint is kept"))
    }

    /// Mean loss over the held-out samples, in nats a token. Collective.
    fn held_out_loss(&mut self, data: &RunData) -> Result<f64> {
        let held_out = data.validation.as_ref().expect("asked for only when there is some");
        let (groups, batch) = (self.job.groups, self.batch);
        let n_micro = held_out.n_samples / (batch.dp * batch.micro);
        let schedule = schedule::evaluation(PipelineShape { pp: groups.layout.pp, vp: groups.layout.vp, n_micro });
        let first = |micro: usize| ((micro * batch.dp + groups.at.dp) * batch.micro) as u64;
        let read =
            |micro| micro_batch(self.job.device, &held_out.samples, first(micro)..first(micro) + batch.micro as u64, batch.seq_len, 0.0);
        let batches = agree(&*groups.world, (0..n_micro).map(read).collect::<Result<Vec<MicroBatch>>>())?;
        let ctx = Ctx { device: self.job.device, tp: &*groups.tp, scratch: &self.scratch, sequence: self.sequence_mode() };
        let passed = executor::run(&schedule, &mut self.state.chunks, &ctx, groups, (&batches, Keep::Nothing), |_, _| {});
        Ok(mean_loss(&passed.token_losses, groups, held_out.n_samples * batch.seq_len))
    }

    fn report(&mut self, data: &RunData, result: &StepResult, held_out_loss: Option<f64>) -> Result<()> {
        let world = &*self.job.groups.world;
        let recipe = self.job.recipe;
        let step_s = slowest(world, result.step_s);
        let peak_bytes = world.gather_f64(self.job.device.memory().peak_bytes as f64).into_iter().fold(0.0, f64::max);
        let tokens = self.batch.global_tokens();
        let flops_per_s = recipe.model.train_flops(tokens, self.batch.seq_len) / step_s;
        let bytes_per_token = data.validation.as_ref().and_then(|held_out| held_out.bytes_per_token);
        let bits_per_byte = held_out_loss.zip(bytes_per_token).map(|(loss, bytes)| loss / std::f64::consts::LN_2 / bytes);
        let row = Row {
            step: self.state.step,
            consumed_tokens: self.state.consumed_samples * self.batch.seq_len as u64,
            loss: result.loss,
            grad_norm: result.grad_norm,
            lr: result.lr,
            step_s,
            tokens_per_s: tokens as f64 / step_s,
            tflops: flops_per_s / 1e12,
            share_of_gemm_ceiling: flops_per_s / self.ceiling.gemm_flops_per_s,
            memory_peak_bytes: peak_bytes as u64,
            validation_loss: held_out_loss,
            validation_bits_per_byte: bits_per_byte,
        };
        let held_out = held_out_loss.map_or(String::new(), |loss| format!(", held-out loss {loss:.4}"));
        log::info!(
            "step {:>6}/{} loss {:.4} grad norm {:.3} lr {:.2e} {:.0} tokens/s, {:.0} % of GEMM ceiling{held_out}",
            row.step,
            recipe.train.steps,
            row.loss,
            row.grad_norm,
            row.lr,
            row.tokens_per_s,
            100.0 * row.share_of_gemm_ceiling
        );
        let written = self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.append(&row));
        agree(world, written)
    }

    fn save(&mut self, data: &RunData) -> Result<()> {
        let path = run_dir::checkpoint_path(self.job.out, self.state.step);
        if path.join(artifact::MANIFEST).exists() {
            return Ok(()); // stopped right after the regular save of this step
        }
        let started = Instant::now();
        let what = SavedAs {
            recipe: recipe_value(self.job.recipe),
            data_fingerprint: data.order.fingerprint(),
            tokenizer: data.tokenizer.clone(),
            model: &self.job.recipe.model,
        };
        self.state.save(&path, self.job.groups, what).doing(|| format!("saving step {}", self.state.step))?;
        log::info!("saved {} in {:.1} s", path.display(), started.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Sum of all token losses over `n_tokens`, the same bits on every rank. The ranks of one tensor-parallel group hold the same
/// losses, so the first counts.
fn mean_loss(token_losses: &[Vec<f32>], groups: &Groups, n_tokens: usize) -> f64 {
    let mine: f64 = token_losses.iter().flatten().map(|&loss| f64::from(loss)).sum();
    groups.world.sum_f64(if groups.at.tp == 0 { mine } else { 0.0 }) / n_tokens as f64
}

fn slowest(world: &dyn crate::comm::Communicator, seconds: f64) -> f64 {
    world.gather_f64(seconds).into_iter().fold(0.0, f64::max)
}
