//! When a run saves, what it does meanwhile, and from what it goes on: saves under way while training goes on
//! (`checkpoint::snapshot`), the time that is left, and the newest checkpoint that is whole.
//!
//! A save counts when it is durable. Two lines tell of it: `snapshot`, from which on training goes on, and `durable`. The next save
//! waits for the one before. A stop (a signal, or the end of the job's time) lets a save under way come to its end, saves what was
//! done since, and leaves; another signal changes nothing any more.

use super::run_dir::checkpoint_path;
use super::state::{SavedAs, TrainState};
use crate::artifact::MANIFEST;
use crate::checkpoint;
use crate::checkpoint::retention::{self, Retention};
use crate::checkpoint::snapshot::{Options, Saving, Started};
use crate::comm::{Communicator, Groups, agree};
use crate::error::{Context, Error, Kind, Result};
use crate::flight::Phase;
use crate::recipe::Checkpoint;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes a second that a rank is taken to write until its first save was measured: little, so that the first is in time.
const CAUTIOUS_BYTES_PER_S: f64 = 1e8;

/// The saves of one job.
pub struct Saver {
    settings: Checkpoint,
    /// When the job's time is up; on rank 0.
    deadline: Option<Instant>,
    under_way: Option<UnderWay>,
    /// Step of the newest durable checkpoint, and since when there is work beyond it.
    durable_step: u64,
    unsaved_since: Instant,
    /// The longest save of this job, snapshot to durable, seconds; before the first one a cautious guess.
    save_s: f64,
    /// The longest step of this job, measurements and all, seconds.
    step_s: f64,
    last_step_at: Instant,
    /// What retention goes by besides the recipe.
    pub(super) sound: Sound,
}

struct UnderWay {
    saving: Saving,
    step: u64,
    path: PathBuf,
    since: Instant,
}

/// Which checkpoints to keep until the trouble that began after them is over. A step that is skipped leaves weights as they are, but is
/// often the first sign of weights that went wrong before: the last checkpoints would all be of that time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Sound {
    /// The newest checkpoint that sound steps alone followed, up to the next.
    proven: Option<u64>,
    /// The next: no step up to it was skipped.
    before_trouble: Option<u64>,
    /// The newest checkpoint, and how many steps of the run had been skipped by then.
    last: Option<(u64, u64)>,
}

impl Sound {
    /// A checkpoint of `step` is about to be saved; `n_skipped` steps of the run were skipped so far.
    pub fn saves(&mut self, step: u64, n_skipped: u64) {
        match self.last {
            Some((last, _)) if last >= step => return,
            Some((last, then)) if then == n_skipped => (self.proven, self.before_trouble) = (Some(last), Some(step)),
            Some(_) => {}
            None => self.before_trouble = Some(step),
        }
        self.last = Some((step, n_skipped));
    }

    fn keep_steps(&self) -> [Option<u64>; 2] {
        [self.proven, self.before_trouble]
    }
}

/// Why a job leaves before its work is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// A rank got a signal.
    Signal,
    /// What is left of the job's time is about what a step and a save take.
    Walltime,
}

impl Saver {
    /// Of a run that begins at step 0; `state_bytes` is about what this rank has to save.
    pub fn new(settings: &Checkpoint, deadline: Option<Instant>, state_bytes: usize) -> Saver {
        let (now, save_s) = (Instant::now(), state_bytes as f64 / CAUTIOUS_BYTES_PER_S);
        Saver {
            settings: settings.clone(),
            deadline,
            under_way: None,
            durable_step: 0,
            unsaved_since: now,
            save_s,
            step_s: 0.0,
            last_step_at: now,
            sound: Sound::default(),
        }
    }

    /// The checkpoint of this step is there already.
    pub fn goes_on_from(&mut self, step: u64) {
        let now = Instant::now();
        (self.durable_step, self.unsaved_since, self.last_step_at) = (step, now, now);
    }

    /// Whether to leave now: a rank was asked to (`is_asked`), or the time is nearly up. The same answer everywhere. Collective; once a
    /// step.
    pub fn stop(&self, is_asked: bool, world: &dyn Communicator) -> Option<Stop> {
        let mine = match (is_asked, self.is_nearly_over(Instant::now())) {
            (true, _) => 2.0,
            (false, true) => 1.0,
            (false, false) => 0.0,
        };
        match world.gather_f64(mine).into_iter().fold(0.0, f64::max) {
            2.0 => Some(Stop::Signal),
            1.0 => Some(Stop::Walltime),
            _ => None,
        }
    }

    /// One more step, and the save of one under way and of the last one, each twice as long as the longest so far, and the margin.
    fn is_nearly_over(&self, now: Instant) -> bool {
        let needed = 2.0 * (self.step_s + 2.0 * self.save_s) + self.settings.margin_s;
        self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(now) < Duration::from_secs_f64(needed))
    }

    /// A step is done: remembers how long they take, and moves a save under way on. Collective.
    pub fn step_done(&mut self, state: &mut TrainState, world: &dyn Communicator) -> Result<()> {
        let now = Instant::now();
        self.step_s = self.step_s.max(now.duration_since(self.last_step_at).as_secs_f64());
        self.last_step_at = now;
        let Some(under_way) = &mut self.under_way else { return Ok(()) };
        match under_way.saving.poll(world) {
            Ok(None) => Ok(()),
            Ok(Some(_)) => {
                self.is_durable(state);
                Ok(())
            }
            Err(error) => Err(self.failed(state, error)),
        }
    }

    /// Whether the recipe wants a checkpoint of this step.
    pub fn is_due(&self, step: u64) -> bool {
        step % self.settings.every_steps == 0
    }

    /// Takes a snapshot of the state and begins to write it to `path`, after the save before it is durable. What is there already is
    /// left. Collective.
    pub fn start(&mut self, path: &Path, state: &mut TrainState, groups: &Groups, what: SavedAs) -> Result<()> {
        if self.under_way.as_ref().is_some_and(|under_way| under_way.step == state.step) {
            return Ok(());
        }
        self.finish(state, groups)?;
        if path.join(MANIFEST).exists() && self.durable_step == state.step {
            return Ok(()); // resumed from it
        }
        let (since, step) = (Instant::now(), state.step);
        let Checkpoint { keep_last, keep_every, .. } = self.settings;
        let retention = Retention { keep_last, keep_every, keep_steps: self.sound.keep_steps() };
        let options = Options { copy_bytes: self.settings.copy_mib << 20, retention };
        match state.snapshot(path, groups, what, options).doing(|| format!("saving step {step}"))? {
            Started::Finished(_) => {
                self.durable_step = step;
                self.unsaved_since = since;
            }
            Started::Saving(saving) => {
                log::info!("snapshot    step {step} in {:.3} s; training goes on", since.elapsed().as_secs_f64());
                state.optimizer.gate = Some((std::sync::Arc::clone(saving.gate()), groups.flight.clone()));
                groups.flight.save_begins();
                self.under_way = Some(UnderWay { saving: *saving, step, path: path.into(), since });
            }
        }
        Ok(())
    }

    /// Returns when the save under way, if any, is durable. Collective.
    pub fn finish(&mut self, state: &mut TrainState, groups: &Groups) -> Result<()> {
        let world = &*groups.world;
        // Who waits for this rank's disk is as patient as in any save.
        let _saving = self.under_way.as_ref().map(|_| groups.flight.span(Phase::Save));
        while let Some(under_way) = &mut self.under_way {
            match under_way.saving.advance(world) {
                Ok(None) => {}
                Ok(Some(_)) => self.is_durable(state),
                Err(error) => return Err(self.failed(state, error)),
            }
        }
        Ok(())
    }

    fn is_durable(&mut self, state: &mut TrainState) {
        let Some(done) = self.under_way.take() else { return };
        no_more_under_way(state);
        let seconds = done.since.elapsed().as_secs_f64();
        (self.durable_step, self.unsaved_since) = (done.step, done.since);
        self.save_s = self.save_s.max(seconds);
        let waited = done.saving.gate().waited().as_secs_f64();
        log::info!(
            "durable     step {} in {seconds:.2} s: {}; training waited {waited:.2} s of that; {}",
            done.step,
            done.path.display(),
            self.lost_if_killed(state.step)
        );
    }

    fn failed(&mut self, state: &mut TrainState, error: Error) -> Error {
        no_more_under_way(state);
        let step = self.under_way.take().map_or(0, |under_way| under_way.step);
        error.doing(format!("saving step {step}"))
    }

    /// `lost work if killed now: 3 steps, 12 s`
    pub fn lost_if_killed(&self, step: u64) -> String {
        let n_steps = step - self.durable_step;
        let seconds = if n_steps == 0 { 0.0 } else { self.unsaved_since.elapsed().as_secs_f64() };
        format!("lost work if killed now: {n_steps} steps, {seconds:.1} s")
    }

    /// The end of a job that leaves before its work is done; everything is saved.
    pub fn leaves(&self, why: Stop, step: u64, n_steps: u64) -> Error {
        let wrong = format!("{}: saved at step {step} of {n_steps}", self.reason(why));
        Error::new(Kind::Requeue, wrong).remedy("run the same command again to continue")
    }

    /// The end of a job that leaves before there is anything to save: step 0 is made again from the recipe.
    pub fn leaves_before_the_first_step(&self, why: Stop) -> Error {
        let wrong = format!("{} before the first step: nothing to save yet", self.reason(why));
        Error::new(Kind::Requeue, wrong).remedy("run the same command again")
    }

    fn reason(&self, why: Stop) -> String {
        match why {
            Stop::Signal => "asked to stop".into(),
            Stop::Walltime => format!("the time is nearly up (a step takes up to {:.1} s, a save {:.1} s)", self.step_s, self.save_s),
        }
    }
}

/// Everything may be changed without asking, and whoever waits for this rank does not wait for a disk.
fn no_more_under_way(state: &mut TrainState) {
    if let Some((_, flight)) = state.optimizer.gate.take() {
        flight.save_ended();
    }
}

/// The checkpoints of a run, newest first, after what dead jobs left there was removed. Rank 0 looks, the others take its word.
/// Collective.
pub(super) fn newest_first(run_dir: &Path, world: &dyn Communicator) -> Result<Vec<PathBuf>> {
    let look = || -> Result<Vec<u64>> {
        retention::remove_unfinished(&run_dir.join("checkpoints"))?;
        Ok(checkpoint::list(run_dir)?.into_iter().map(|(step, _)| step).rev().collect())
    };
    let mine = agree(world, if world.rank() == 0 { look() } else { Ok(Vec::new()) })?;
    let word = world.gather_variable(bytemuck::cast_slice(&mine)).swap_remove(0);
    let steps = word.chunks_exact(8).map(|step| u64::from_ne_bytes(step.try_into().expect("8 bytes")));
    Ok(steps.map(|step| checkpoint_path(run_dir, step)).collect())
}
