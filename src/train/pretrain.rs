//! The pretraining loop: steps of the plan (`trainer`), metrics (`report`), checkpoints (`resume`), held-out loss; goes on from
//! the newest checkpoint, stops on request with everything saved. Nemotron-4 340B report, section 2.

use super::identity::Changed;
use super::replicas;
use super::resume::Lineage;
use super::run_data::{Reading, RunData};
use super::run_dir::{Opened, RunDir};
use super::saving::Stop;
use super::spans;
use super::trainer::{HeldOutLoss, StepResult, Trainer};
use crate::checkpoint;
use crate::comm::{Groups, agree};
use crate::device::Device;
use crate::device::ceiling::Ceiling;
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::flight::Phase;
use crate::progress::Progress;
use crate::recipe::Pretrain;
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
    /// What may have changed since the run's newest checkpoint.
    pub accepted: &'a [Changed],
    /// Whether this rank was asked to stop.
    pub stop: &'a dyn Fn() -> bool,
    /// When the job's time is up, on rank 0, where it is known.
    pub deadline: Option<Instant>,
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

/// Runs the job to its end. An interruption (signal) is an error of kind Requeue after the checkpoint is durable.
pub fn run(job: &Job) -> Result<Ended> {
    let world = &*job.groups.world;
    let data = RunData::open(job.recipe, job.groups, reading(job), job.stop)?;
    let recipe_toml = job.recipe.to_toml();
    let Some(run_dir) = agree_on_run_dir(job, &recipe_toml, &data)? else { return Ok(Ended::WasFinished) };
    spans::open_ledger(job.groups, job.out, &job.recipe.observe)?;
    let starting = job.groups.flight.span(Phase::Start);
    let mut trainer = Trainer::new(job, &data)?;
    fault::at("init");
    trainer.print_plan();
    trainer.start_or_resume()?;
    agree(world, trainer.make_schedules())?;
    agree(world, trainer.open_records())?;
    agree(world, run_dir.as_ref().map_or(Ok(()), |run_dir| run_dir.adopt(&recipe_toml)))?;
    drop(starting);
    let ended = train(&mut trainer);
    // Whatever ended the steps, all ranks left them alike, and a save under way is worth its end.
    let saved = trainer.saver.finish(&mut trainer.state, job.groups);
    let ended = ended.and_then(|ended| saved.map(|()| ended))?;
    if ended == Ended::Finished {
        let Lineage { accepted, started_from, .. } = trainer.lineage;
        let mut counts = vec![("steps", trainer.state.step.into()), ("consumed_samples", trainer.state.consumed_samples.into())];
        counts.push(("skipped_steps", trainer.health.n_skipped().into()));
        if !accepted.is_empty() {
            counts.push(("accepted_changes", serde_json::to_value(accepted).expect("plain data")));
        }
        let inputs = data.inputs.iter().cloned().chain(started_from).collect();
        let finish = |run_dir: RunDir| run_dir.finish(recipe_value(job.recipe), inputs, &counts);
        agree(world, run_dir.map_or(Ok(()), finish))?;
    }
    Ok(ended)
}

/// Rank 0 reads the data through once a run, when it begins or its data change on purpose; a job that goes on knows them by their
/// fingerprint, so that it starts as fast with a large corpus as with a small one.
fn reading(job: &Job) -> Reading {
    let goes_on = || checkpoint::list(job.out).is_ok_and(|checkpoints| !checkpoints.is_empty());
    let is_known = job.groups.world.rank() > 0 || (goes_on() && !job.accepted.contains(&Changed::Data));
    if is_known { Reading::Opened } else { Reading::Through }
}

/// The resolved recipe as it stands in manifests.
pub(super) fn recipe_value(recipe: &Pretrain) -> serde_json::Value {
    serde_json::to_value(recipe).expect("a recipe is plain data")
}

/// Rank 0 opens the run directory; all ranks learn whether there is anything to do. Ok(None): finished before; the inner value
/// is Some on rank 0 only.
#[allow(clippy::type_complexity)]
fn agree_on_run_dir(job: &Job, recipe_toml: &str, data: &RunData) -> Result<Option<Option<RunDir>>> {
    let world = &*job.groups.world;
    let opened = if world.rank() == 0 { open_run_dir(job, recipe_toml, data).map(Some) } else { Ok(None) };
    let opened = agree(world, opened)?;
    let finished = matches!(opened, Some(Opened::Finished(_)));
    if world.sum_f64(if finished { 1.0 } else { 0.0 }) > 0.0 {
        return Ok(None);
    }
    Ok(Some(opened.and_then(|opened| match opened {
        Opened::Ours(run_dir) => Some(run_dir),
        Opened::Finished(_) => None,
    })))
}

/// A finished run is the same work only when its data are the same.
fn open_run_dir(job: &Job, recipe_toml: &str, data: &RunData) -> Result<Opened> {
    let opened = RunDir::open(job.out, recipe_toml, job.accepted)?;
    if let Opened::Finished(manifest) = &opened {
        let was = manifest.inputs.iter().filter(|input| input.role != "start").map(|input| &input.fingerprint);
        let is = data.inputs.iter().map(|input| &input.fingerprint);
        if let Some((was, is)) = was.zip(is).find(|(was, is)| was != is) {
            let wrong = format!("was finished with data {was}, this job has data {is}");
            return Err(Error::file(job.out, wrong).remedy("choose another --out"));
        }
    }
    Ok(opened)
}

/// Steps until the end, or until asked to stop.
fn train(trainer: &mut Trainer) -> Result<Ended> {
    let (job, recipe) = (trainer.job, trainer.job.recipe);
    let (n_steps, last) = (trainer.plan.n_steps(), trainer.last_step());
    let is_first = job.groups.world.rank() == 0;
    let mut progress = is_first.then(|| Progress::new("pretrain", last.saturating_sub(trainer.state.step), "steps"));
    trainer.make_up_held_out_loss()?;
    let mut stop = trainer.saver.stop((job.stop)(), &*job.groups.world);
    while trainer.state.step < last {
        if let Some(why) = stop {
            return leave(trainer, why);
        }
        trainer.announce();
        let result = trainer.step()?;
        let is_end = trainer.state.step == last;
        let validation = recipe.validation.as_ref().filter(|v| is_end || trainer.state.step % v.every_steps == 0);
        let held_out = match validation {
            Some(_) => trainer.held_out_loss()?,
            None => HeldOutLoss::NotDue,
        };
        trainer.report(&result, held_out)?;
        check_health(trainer, &result)?;
        replicas::compare_regularly(trainer)?;
        if let Some(progress) = &mut progress {
            progress.add(1);
        }
        trainer.saver.step_done(&mut trainer.state, &*job.groups.world)?;
        if is_end || trainer.saver.is_due(trainer.state.step) {
            trainer.save()?;
        }
        stop = trainer.saver.stop((job.stop)(), &*job.groups.world);
    }
    // All steps are done, but not all measurements: the next job has only these to do.
    if let (Some(why), true) = (stop, trainer.owed.is_some()) {
        return leave(trainer, why);
    }
    if let Some(progress) = progress {
        progress.finish();
    }
    Ok(if trainer.state.step >= n_steps { Ended::Finished } else { Ended::StoppedAsPlanned })
}

/// Saves what there is to save, and says why the job ends here. Collective.
fn leave(trainer: &mut Trainer, why: Stop) -> Result<Ended> {
    let (step, n_steps) = (trainer.state.step, trainer.plan.n_steps());
    if step == 0 {
        return Err(trainer.saver.leaves_before_the_first_step(why));
    }
    log::info!("leaving     {}", trainer.saver.lost_if_killed(step));
    trainer.save()?;
    trainer.saver.finish(&mut trainer.state, trainer.job.groups)?;
    Err(trainer.saver.leaves(why, step, n_steps))
}

/// Ends the run when too many steps had to be skipped: the checkpoint from before stays the newest. The same on every rank.
fn check_health(trainer: &mut Trainer, result: &StepResult) -> Result<()> {
    let Some(wrong) = trainer.health.over_limit(trainer.state.step) else { return Ok(()) };
    trainer.saver.finish(&mut trainer.state, trainer.job.groups)?; // one under way is of a sound step
    let kept = match checkpoint::list(trainer.job.out)?.last() {
        Some((_, path)) => format!("{} is kept", path.display()),
        None => "there is no checkpoint yet".into(),
    };
    let taken = trainer.plan.step(trainer.state.step - 1);
    let (first, end) = (taken.first_in_phase, taken.first_in_phase + taken.global as u64);
    let reason = result.skipped.as_deref().unwrap_or("sound");
    let phase = &trainer.data.phases[taken.phase].name;
    let wrong = format!("step {}: {wrong}; the last: {reason}, samples {first}..{end} of phase {phase}; {kept}", trainer.state.step);
    Err(Error::new(Kind::Numeric, wrong)
        .remedy("lower the learning rate, lengthen the warm-up, or look at these samples (trireme-inspect ledger)"))
}
