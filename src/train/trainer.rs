//! One rank's moving parts and its step: the samples of the plan -> micro-batches -> schedule -> loss and norm -> verdict ->
//! clip -> AdamW. What is written to the run directory stands in `report` and `resume`.

use super::batch::{BatchShape, Samples, micro_batch};
use super::exchanges::{Exchanges, Overlap};
use super::executor::{self, Keep, Nothing};
use super::health::{Health, History, Verdict};
use super::ledger::{self, LedgerWriter};
use super::optimizer::{Update, sum_exactly};
use super::pretrain::Job;
use super::resume::Lineage;
use super::run_data::RunData;
use super::run_dir;
use super::saving::Saver;
use super::state::TrainState;
use crate::comm::{Groups, agree};
use crate::device::ceiling::Ceiling;
use crate::device::{Device, Scratch};
use crate::error::{Context, Result};
use crate::exact::ExactSum;
use crate::fault;
use crate::flight::{Phase, Times};
use crate::metrics::{MetricsWriter, Row};
use crate::model::chunk::MicroBatch;
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::fp8;
use crate::model::numerics::Numerics;
use crate::parallel::schedule::{self, Messages, PipelineShape, Schedule};
use crate::recipe::{LrSchedule, Precision, Pretrain, StepPlan};
use crate::tensor::DType;
use std::collections::BTreeMap;
use std::time::Instant;

/// One rank's moving parts.
pub(super) struct Trainer<'a> {
    pub job: &'a Job<'a>,
    pub data: &'a RunData,
    pub state: TrainState,
    pub plan: StepPlan,
    pub health: Health,
    pub lineage: Lineage,
    pub saver: Saver,
    pub ceiling: Ceiling,
    /// On rank 0.
    pub metrics: Option<MetricsWriter>,
    /// On rank 0.
    pub ledger: Option<LedgerWriter>,
    /// The row of the last step when its held-out loss could not be measured.
    pub owed: Option<Row>,
    /// Of each phase.
    rates: Vec<LrSchedule>,
    exchanges: Exchanges<'a>,
    scratch: Scratch,
    /// By the number of micro-batches, one for each batch size of the plan.
    schedules: BTreeMap<usize, Schedule>,
}

/// What a step measured.
pub(super) struct StepResult {
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub step_s: f64,
    /// Tokens it consumed.
    pub n_tokens: usize,
    /// Why the update was not made.
    pub skipped: Option<String>,
    /// Where this rank's time went in it.
    pub times: Times,
    /// Where it went since the report of the step before.
    pub before: Times,
}

/// A measurement on held-out samples.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum HeldOutLoss {
    /// The recipe asks for none after this step.
    NotDue,
    /// Mean loss, nats a token.
    Measured(f64),
    /// The job was asked to stop meanwhile: the next one makes up for it.
    Interrupted,
}

/// Micro-batches of a measurement between two looks at whether the job is to stop, for each pipeline stage: the pipeline fills and
/// empties once for them.
const HELD_OUT_ROUND: usize = 16;

/// What weights and activations are stored as.
pub(crate) fn dtype_of(recipe: &Pretrain) -> DType {
    match recipe.train.precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

impl<'a> Trainer<'a> {
    /// Memory for everything, and the schedules. Collective.
    pub fn new(job: &'a Job<'a>, data: &'a RunData) -> Result<Trainer<'a>> {
        let (recipe, groups) = (job.recipe, job.groups);
        let world = &*groups.world;
        let dtype = dtype_of(recipe);
        let plan = recipe.plan();
        let mut state = agree(world, new_state(job.device, recipe, groups))?;
        let most_blocks = plan.stretches().iter().map(|stretch| recipe.numerics.blocks(stretch.global) / groups.layout.dp).max();
        agree(world, state.prepare_sums(job.device, &recipe.numerics, most_blocks.unwrap_or(1).max(1)))?;
        // All ranks measure at once, as they will compute at once.
        world.barrier();
        let mine = (job.ceiling)(dtype);
        let ceiling =
            Ceiling { gemm_flops_per_s: world.sum_f64(mine.gemm_flops_per_s), copy_bytes_per_s: world.sum_f64(mine.copy_bytes_per_s) };
        let is_first = world.rank() == 0;
        let metrics = if is_first { MetricsWriter::open(&run_dir::metrics_path(job.out)).map(Some) } else { Ok(None) };
        let metrics = agree(world, metrics)?;
        let ledger = if is_first { LedgerWriter::open(&run_dir::ledger_path(job.out)).map(Some) } else { Ok(None) };
        let ledger = agree(world, ledger)?;
        let rates = recipe.phases().iter().map(|phase| phase.lr).collect();
        let health = Health::new(&recipe.health, History::default());
        let saver = Saver::new(&recipe.checkpoint, job.deadline, job.device.memory().live_bytes);
        let exchanges = Exchanges::new(groups, if recipe.parallel.overlap { Overlap::WithComputation } else { Overlap::Nothing });
        let (scratch, lineage, schedules) = (Scratch::new(), Lineage::new(data), BTreeMap::new());
        Ok(Trainer {
            job,
            data,
            state,
            plan,
            health,
            lineage,
            saver,
            ceiling,
            metrics,
            ledger,
            owed: None,
            rates,
            exchanges,
            scratch,
            schedules,
        })
    }

    /// Steps of the run after this job, as planned.
    pub fn last_step(&self) -> u64 {
        self.job.stop_after.unwrap_or(u64::MAX).min(self.plan.n_steps())
    }

    /// A checked schedule for each batch size from here to the job's last step. The same on every rank. Errors: a batch that this
    /// layout cannot divide.
    pub fn make_schedules(&mut self) -> Result<()> {
        let (recipe, layout) = (self.job.recipe, self.job.groups.layout);
        let ahead = recipe.parallel.overlap && !self.job.groups.pp.groups_are_in_order();
        let messages = if ahead { Messages::Ahead } else { Messages::Together };
        for stretch in self.plan.stretches() {
            let (first, end) = (stretch.first_step, stretch.first_step + stretch.n_steps);
            if end <= self.state.step || first >= self.last_step() {
                continue;
            }
            let doing = || format!("planning steps {}..{end}", first + 1);
            recipe.check_batch_size(layout.dp, stretch.global).doing(doing)?;
            let n_micro = stretch.global / (layout.dp * recipe.batch.micro);
            let shape = PipelineShape { pp: layout.pp, vp: layout.vp, n_micro };
            let schedule = schedule::training(recipe.parallel.schedule, shape, messages)?;
            schedule.check().unwrap_or_else(|problem| panic!("the generated schedule is wrong: {problem}"));
            self.schedules.insert(n_micro, schedule);
        }
        Ok(())
    }

    /// Makes the weights of step 0 by seed.
    pub fn initialise(&mut self) {
        self.state.initialise(self.job.device, &self.scratch, self.job.groups, self.job.recipe.train.seed);
    }

    /// Loads this rank's part of a checkpoint. Collective.
    pub fn load(&mut self, from: &crate::checkpoint::Stored, moments: crate::recipe::Moments) -> Result<()> {
        agree(&*self.job.groups.world, self.state.read(from, moments))?;
        self.state.publish(self.job.device, &self.scratch, self.job.groups);
        Ok(())
    }

    /// Waits for the weights of the last update: before anything but the next step reads them.
    pub fn finish_weights(&mut self) {
        self.exchanges.finish_weights(&mut self.state.chunks);
    }

    /// How a step of `global` samples is divided.
    pub fn batch(&self, global: usize) -> BatchShape {
        let batch = &self.job.recipe.batch;
        BatchShape { seq_len: batch.seq_len, micro: batch.micro, global, dp: self.job.groups.layout.dp }
    }

    fn sequence_mode(&self) -> SequenceMode {
        if self.job.recipe.parallel.sequence_parallel { SequenceMode::Sharded } else { SequenceMode::Replicated }
    }

    /// The order of sums in a step of `global` samples.
    fn numerics(&self, global: usize) -> Result<Numerics<'a>> {
        Numerics::of(&self.job.recipe.numerics, self.job.device, global, self.job.groups.layout.dp)
    }

    /// The next step of the plan.
    pub fn step(&mut self) -> Result<StepResult> {
        let started = Instant::now();
        let (job, recipe) = (self.job, self.job.recipe);
        let (device, groups) = (job.device, job.groups);
        let before = groups.flight.take_times();
        let (planned, step) = (self.plan.step(self.state.step), self.state.step + 1);
        let batch = self.batch(planned.global);
        let n_tokens = batch.global_tokens();
        if planned.first_in_phase == 0 {
            self.health.begin_phase();
        }
        groups.flight.step(step);
        let reading = groups.flight.span(Phase::Data);
        let batches = self.read_batches(&self.data.phases[planned.phase].order, &batch, planned.first_in_phase);
        let batches = agree(&*groups.world, batches)?;
        drop(reading);
        let numerics = self.numerics(planned.global)?;
        let ctx = Ctx { device, tp: &*groups.tp, scratch: &self.scratch, sequence: self.sequence_mode(), numerics };
        let TrainState { chunks, optimizer, updates, .. } = &mut self.state;
        let schedule = &self.schedules[&batch.n_micro()];
        let mut during = self.exchanges.during(ctx, optimizer);
        let passed = executor::run(schedule, chunks, &ctx, groups, (&batches, Keep::Saved), &mut during);
        let reducing = groups.flight.span(Phase::Reduce);
        self.exchanges.finish_gradients(chunks, optimizer);
        drop(reducing);
        let updating = groups.flight.span(Phase::Optimizer);
        optimizer.reduce_tied(device, &self.scratch, chunks, groups);
        let loss = mean_loss(&passed.token_losses, groups, n_tokens);
        let grad_norm = optimizer.grad_norm(device, chunks, groups);
        let lr = self.rates[planned.phase].at(planned.first_in_phase + planned.global as u64);
        let skipped = match self.health.judge(step, loss, grad_norm) {
            Verdict::Sound => {
                // Bias correction counts the updates that were made.
                *updates += 1;
                let grad_scale = (recipe.train.clip_grad_norm / (grad_norm + 1e-6)).min(1.0);
                let update = Update { step: *updates, lr, grad_scale };
                optimizer.update(device, &self.scratch, chunks, &mut self.exchanges, (&recipe.optimizer, update));
                None
            }
            Verdict::Skip(reason) => {
                optimizer.discard_gradients(device, chunks);
                Some(reason)
            }
        };
        device.finish();
        drop(updating);
        self.state.step = step;
        self.state.consumed_samples += planned.global as u64;
        let entry =
            ledger::Step { step, phase: planned.phase, first: planned.first_in_phase, n: planned.global as u64, skipped: skipped.clone() };
        agree(&*groups.world, self.ledger.as_mut().map_or(Ok(()), |ledger| ledger.step(entry)))?;
        let times = groups.flight.take_times();
        Ok(StepResult { loss, grad_norm, lr, step_s: started.elapsed().as_secs_f64(), n_tokens, skipped, times, before })
    }

    /// This replica's micro-batches of the step that begins at sample `first` of an order.
    fn read_batches(&self, source: &dyn Samples, batch: &BatchShape, first: u64) -> Result<Vec<MicroBatch>> {
        let weight = 1.0 / batch.global_tokens() as f32;
        let read = |micro: usize| -> Result<MicroBatch> {
            let samples = batch.samples(first, self.job.groups.at.dp, micro);
            let read = micro_batch(self.job.device, source, samples, batch.seq_len, weight)?;
            Ok(MicroBatch { first_sample: micro * batch.micro, ..read })
        };
        (0..batch.n_micro()).map(read).collect()
    }

    /// Mean loss over the held-out samples, in nats a token. Collective.
    pub fn held_out_loss(&mut self) -> Result<HeldOutLoss> {
        self.finish_weights();
        let held_out = self.data.validation.as_ref().expect("asked for only when there is some");
        let (groups, batch) = (self.job.groups, &self.job.recipe.batch);
        let (dp, micro_samples, seq_len) = (groups.layout.dp, batch.micro, batch.seq_len);
        let n_micro = held_out.n_samples / (dp * micro_samples);
        let first = |micro: usize| ((micro * dp + groups.at.dp) * micro_samples) as u64;
        let read = |micro| {
            let samples = first(micro)..first(micro) + micro_samples as u64;
            micro_batch(self.job.device, &held_out.samples, samples, seq_len, 0.0)
        };
        let _measuring = groups.flight.span(Phase::HeldOut);
        let (sequence, numerics) = (self.sequence_mode(), self.numerics(held_out.n_samples)?);
        let ctx = Ctx { device: self.job.device, tp: &*groups.tp, scratch: &self.scratch, sequence, numerics };
        let (mut losses, round) = (Vec::new(), HELD_OUT_ROUND * groups.layout.pp);
        for begin in (0..n_micro).step_by(round) {
            fault::at("validation");
            if self.saver.stop((self.job.stop)(), &*groups.world).is_some() {
                return Ok(HeldOutLoss::Interrupted);
            }
            let micros = begin..n_micro.min(begin + round);
            let schedule = schedule::evaluation(PipelineShape { pp: groups.layout.pp, vp: groups.layout.vp, n_micro: micros.len() });
            let batches = agree(&*groups.world, micros.map(read).collect::<Result<Vec<MicroBatch>>>())?;
            let passed = executor::run(&schedule, &mut self.state.chunks, &ctx, groups, (&batches, Keep::Nothing), &mut Nothing);
            losses.extend(passed.token_losses);
        }
        Ok(HeldOutLoss::Measured(mean_loss(&losses, groups, held_out.n_samples * seq_len)))
    }
}

/// Memory for this rank's stage, its layers as the recipe divides them and with what they make again.
pub(crate) fn new_state(device: &dyn Device, recipe: &Pretrain, groups: &Groups) -> Result<TrainState> {
    let (stages, recompute) = (recipe.stages()?, recipe.train.recompute.of_layers(recipe.model.n_layers)?);
    let mut state = TrainState::with_stages(device, &recipe.model, groups, dtype_of(recipe), &stages)?;
    for (idx, chunk) in state.chunks.iter_mut().enumerate() {
        chunk.set_recompute(&recompute[stages.layers(&groups.layout, groups.at.pp, idx)]);
        if let Some(scales) = fp8::scales_of(recipe.numerics.linear) {
            chunk.train_in_fp8(device, scales)?;
        }
    }
    Ok(state)
}

/// Sum of all token losses over `n_tokens`, the same bits on every rank and, of the same losses, under every layout. The ranks of one
/// tensor-parallel group hold the same losses, so the first counts.
pub(crate) fn mean_loss(token_losses: &[Vec<f32>], groups: &Groups, n_tokens: usize) -> f64 {
    let counted = if groups.at.tp == 0 { token_losses } else { &[] };
    let mine: ExactSum = counted.iter().flatten().map(|&loss| f64::from(loss)).collect();
    sum_exactly(&*groups.world, &mine) / n_tokens as f64
}
