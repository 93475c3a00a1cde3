//! Where a job begins, and what it leaves for the next one: new weights, another run's checkpoint, or the run's own newest; and
//! the saving of one. A checkpoint of other data, another tokenizer, another model or another recipe is refused with both
//! values, unless the user accepts the change; then the lineage has it.

use super::health::{Health, History};
use super::identity::{self, Accepted, Changed, Difference};
use super::ledger;
use super::pretrain::recipe_value;
use super::replicas;
use super::run_data::{PhaseData, RunData, tokenizer_fingerprint};
use super::run_dir;
use super::saving::{self, Sound};
use super::state::SavedAs;
use super::trainer::Trainer;
use crate::artifact::Input;
use crate::checkpoint::{self, Stored};
use crate::comm::agree;
use crate::error::{Context, Error, Result};
use crate::flight::Phase;
use crate::metrics::{self, Row};
use crate::model::config::ModelConfig;
use crate::recipe::{Moments, Pretrain, Start};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// Where weights came from besides steps.
#[derive(Clone, Debug)]
pub(super) struct Lineage {
    /// Changes that the user accepted, oldest first.
    pub accepted: Vec<Accepted>,
    /// The checkpoint of another run that this one began with.
    pub started_from: Option<Input>,
    /// The SentencePiece model, of the shards or, where they know none, of the checkpoint.
    pub tokenizer: Option<Vec<u8>>,
    /// The tokenizer's settings, the chat template and the like that the first weights came with.
    pub companions: BTreeMap<String, Vec<u8>>,
}

impl Lineage {
    /// Of a run that begins with new weights.
    pub fn new(data: &RunData) -> Lineage {
        Lineage { accepted: Vec::new(), started_from: None, tokenizer: data.tokenizer.clone(), companions: BTreeMap::new() }
    }
}

/// What a checkpoint keeps of the trainer besides tensors, step and samples.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Updates made: steps without those that were skipped, with those of the run it started from.
    updates: u64,
    health: History,
    accepted_changes: Vec<Accepted>,
    started_from: Option<Input>,
    /// What retention goes by.
    #[serde(default)]
    sound: Sound,
    /// The row of this step, when its held-out loss is still to be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owed: Option<Row>,
}

/// xxh3-128 over every number of a model.
fn model_fingerprint(model: &ModelConfig) -> String {
    let content = serde_json::to_vec(model).expect("plain data");
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&content))
}

impl Trainer<'_> {
    /// Goes on from the run's newest checkpoint that is whole, or begins. What is damaged is passed over, and told; when nothing
    /// else is left, its damage is the error. Collective.
    pub fn start_or_resume(&mut self) -> Result<()> {
        let world = &*self.job.groups.world;
        let mut first_damage = None;
        for path in saving::newest_first(self.job.out, world)? {
            let damage = match agree(world, checkpoint::open(&path)) {
                Ok(stored) => self.resume(&stored)?,
                Err(damage) => Some(damage),
            };
            match (damage, &first_damage) {
                (None, None) => return Ok(()),
                (None, Some(passed_over)) => {
                    log::warn!("{passed_over}; going on from {} instead", path.display());
                    return Ok(());
                }
                (damage, None) => first_damage = damage,
                (Some(_), Some(_)) => {}
            }
        }
        if let Some(damage) = first_damage {
            return Err(Error::doing(damage, format!("looking for a whole checkpoint in {}", self.job.out.display())));
        }
        match &self.job.recipe.start {
            Some(start) => self.start_from(start),
            None => {
                self.initialise();
                Ok(())
            }
        }
    }

    /// Says in metrics and ledger where this job begins, once it is sure that it does. Rank 0 has them.
    pub fn open_records(&mut self) -> Result<()> {
        let from_step = self.state.step;
        if let Some(metrics) = &mut self.metrics {
            if let Some(path) = &self.job.recipe.observe.prometheus {
                metrics.expose(path, self.job.out);
            }
            let ranks = self.job.groups.world.size();
            metrics.job(metrics::Job {
                from_step,
                ranks,
                unix_s: self.job.groups.flight.began_unix_s(),
                deadline_unix_s: self
                    .job
                    .deadline
                    .map(|end| metrics::now_unix_s() + end.saturating_duration_since(Instant::now()).as_secs_f64()),
            })?;
        }
        let Some(ledger) = &mut self.ledger else { return Ok(()) };
        let order = |phase: &PhaseData| ledger::PhaseOrder { name: phase.name.clone(), order: phase.order.fingerprint() };
        let phases = self.data.phases.iter().map(order).collect();
        ledger.job(ledger::Job { from_step, ranks: self.job.groups.world.size(), phases })
    }

    /// The damage, when its numbers cannot be read: then this is as if it had never been. An error when it is not of this run.
    fn resume(&mut self, stored: &Stored) -> Result<Option<Error>> {
        let meta = stored.meta();
        let place = stored.dir().display().to_string();
        let mut differences = self.model_and_tokenizer_differences(stored);
        // A phase more or less is another recipe; of those that both have, the data are compared.
        for (phase, was) in self.data.phases.iter().zip(meta.data_fingerprint.split('+')) {
            let (was, is) = (was.to_string(), phase.order.fingerprint());
            if was != is {
                differences.push(Difference { what: Changed::Data, was, is, detail: format!("phase {}", phase.name) });
            }
        }
        // Data and model are compared by their fingerprints; other keys of the recipe one by one.
        let old = serde_json::from_value::<Pretrain>(meta.recipe.clone());
        let old = old.map_err(|error| Error::file(stored.dir(), format!("its recipe cannot be read: {error}")));
        let old = old.map_err(|error| error.remedy("use the program that wrote it, or start a new run from its weights by [start]"))?;
        let others = identity::recipe_differences(&old.to_toml(), &self.job.recipe.to_toml());
        differences.extend(others.into_iter().filter(|difference| difference.what == Changed::Recipe));
        let accepted = identity::accept(&place, differences, self.job.accepted, meta.step)?;
        if self.plan.steps_before(meta.consumed_samples) != Some(meta.step) {
            let wrong = format!("stands at step {}, {} samples; no step of this recipe ends there", meta.step, meta.consumed_samples);
            return Err(
                Error::file(stored.dir(), wrong).remedy("go back to that batch size and ramp, or start a new run from it by [start]")
            );
        }
        if let Err(damage) = self.load(stored, Moments::Keep) {
            return Ok(Some(damage));
        }
        (self.state.step, self.state.consumed_samples, self.state.updates) = (meta.step, meta.consumed_samples, meta.step);
        if let Some(kept) = kept(stored)? {
            self.state.updates = kept.updates;
            self.health = Health::new(&self.job.recipe.health, kept.health);
            (self.lineage.accepted, self.lineage.started_from) = (kept.accepted_changes, kept.started_from);
            self.saver.sound = kept.sound;
            self.owed = kept.owed.filter(|_| self.data.validation.is_some());
        }
        for change in accepted.iter().filter(|_| self.job.groups.world.rank() == 0) {
            log::warn!("{} changed at step {} from {} to {}, as accepted", change.what.name(), change.at_step, change.was, change.is);
        }
        self.lineage.accepted.extend(accepted);
        self.take_tokenizer_of(stored);
        self.saver.goes_on_from(self.state.step);
        log::info!("resumed from {place} at step {}", self.state.step);
        Ok(None)
    }

    /// Step 0 of this run with the weights of another.
    fn start_from(&mut self, start: &Start) -> Result<()> {
        let world = &*self.job.groups.world;
        let stored = agree(world, checkpoint::open(&start.checkpoint).doing(|| "opening start.checkpoint".into()))?;
        let place = stored.dir().display().to_string();
        let accepted = identity::accept(&place, self.model_and_tokenizer_differences(&stored), self.job.accepted, 0)?;
        if start.moments == Moments::Keep && !stored.has_optimizer_state() {
            let wrong = "start.moments = \"keep\", but it holds weights only";
            return Err(Error::file(stored.dir(), wrong).remedy("set start.moments = \"reset\""));
        }
        self.load(&stored, start.moments)?;
        if start.moments == Moments::Keep {
            self.state.updates = kept(&stored)?.map_or(stored.meta().step, |kept| kept.updates);
        }
        let fingerprint = stored.manifest().fingerprint.clone();
        self.lineage.started_from = Some(Input { role: "start".into(), path: stored.dir().into(), fingerprint });
        self.lineage.accepted = accepted;
        self.take_tokenizer_of(&stored);
        log::info!("started from {place} (step {}), moments: {:?}", stored.meta().step, start.moments);
        Ok(())
    }

    /// The tokenizer of a checkpoint where the data know none; and what came with it, unless the data are of another.
    fn take_tokenizer_of(&mut self, stored: &Stored) {
        let theirs = &stored.meta().tokenizer;
        self.lineage.tokenizer = self.lineage.tokenizer.take().or_else(|| theirs.clone());
        if self.lineage.tokenizer == *theirs {
            self.lineage.companions = stored.meta().companions.clone();
        }
    }

    fn model_and_tokenizer_differences(&self, stored: &Stored) -> Vec<Difference> {
        let (ours, theirs) = (&self.job.recipe.model, &stored.meta().model);
        let mut differences = Vec::new();
        if ours != theirs {
            let (was, is) = (model_fingerprint(theirs), model_fingerprint(ours));
            differences.push(Difference { what: Changed::Model, was, is, detail: first_difference(theirs, ours) });
        }
        if let (Some(was), Some(is)) = (&stored.meta().tokenizer, &self.data.tokenizer)
            && was != is
        {
            let (was, is) = (tokenizer_fingerprint(was), tokenizer_fingerprint(is));
            differences.push(Difference { what: Changed::Tokenizer, was, is, detail: String::new() });
        }
        differences
    }

    /// Begins to save the state as it is now, unless that was done; the ledger is on the disk before. Collective.
    pub fn save(&mut self) -> Result<()> {
        let path = run_dir::checkpoint_path(self.job.out, self.state.step);
        self.finish_weights();
        replicas::compare_before_save(self)?;
        let _saving = self.job.groups.flight.span(Phase::Save);
        agree(&*self.job.groups.world, self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.sync()))?;
        let Lineage { accepted, started_from, tokenizer, companions } = self.lineage.clone();
        let (health, owed) = (self.health.history().clone(), self.owed.clone());
        self.saver.sound.saves(self.state.step, self.health.n_skipped());
        let (updates, sound) = (self.state.updates, self.saver.sound.clone());
        let kept = Kept { updates, health, accepted_changes: accepted, started_from, sound, owed };
        let what = SavedAs {
            recipe: recipe_value(self.job.recipe),
            data_fingerprint: self.data.fingerprint(),
            tokenizer,
            companions,
            model: &self.job.recipe.model,
            trainer: serde_json::to_value(kept).expect("plain data"),
        };
        self.saver.start(&path, &mut self.state, self.job.groups, what)
    }
}

/// What the trainer that wrote a checkpoint kept in it; None of imported weights.
fn kept(stored: &Stored) -> Result<Option<Kept>> {
    let value = stored.meta().trainer.clone();
    serde_json::from_value(value).map_err(|error| {
        let wrong = format!("what it keeps of its trainer cannot be read: {error}");
        Error::file(stored.dir(), wrong).remedy("use the program that wrote it, or start a new run from its weights by [start]")
    })
}

/// The first number in which two models differ: `rope_base = 10000.0, here 500000.0`.
fn first_difference(theirs: &ModelConfig, ours: &ModelConfig) -> String {
    let value = |model: &ModelConfig| serde_json::to_value(model).expect("plain data");
    let (theirs, ours) = (value(theirs), value(ours));
    // Of both: what is none is not among the keys.
    let keys = [&ours, &theirs].into_iter().flat_map(|model| model.as_object().into_iter().flat_map(|table| table.keys().cloned()));
    let differs = keys.into_iter().find(|key| ours[key] != theirs[key]);
    differs.map_or(String::new(), |key| format!("model.{key} = {} there, {} here", plain(&theirs[&key]), plain(&ours[&key])))
}

/// A value as a recipe has it: 1e-5 in f32 is not 9.999999747378752e-6.
fn plain(value: &serde_json::Value) -> String {
    if value.is_null() {
        return "none".into();
    }
    let short = value.as_f64().map(|wide| (wide, wide as f32)).filter(|&(wide, short)| f64::from(short) == wide);
    short.map_or(value.to_string(), |(_, short)| short.to_string())
}
