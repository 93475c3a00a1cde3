//! The training data of a run: the order of each phase and the held-out samples, opened and checked against the recipe.

use super::batch::Samples;
use crate::artifact::Input;
use crate::comm::{Groups, agree};
use crate::data::order::{DataOrder, Sequential};
use crate::data::shards::{Split, TokenShards};
use crate::error::{Context, Error, Result};
use crate::fault;
use crate::recipe::Pretrain;
use std::path::{Path, PathBuf};

/// Everything a run reads.
pub(super) struct RunData {
    /// One a phase, in the recipe's order.
    pub phases: Vec<PhaseData>,
    /// None without `[validation]`.
    pub validation: Option<HeldOut>,
    /// What the run's manifest names.
    pub inputs: Vec<Input>,
    /// The SentencePiece model that all shards were made with, when their manifests know one.
    pub tokenizer: Option<Vec<u8>>,
}

/// The data of one phase.
pub(super) struct PhaseData {
    /// Its name in the recipe.
    pub name: String,
    /// Its samples, from 0.
    pub order: DataOrder,
}

/// Held-out samples and what a token of them stands for.
pub(super) struct HeldOut {
    /// In natural order.
    pub samples: Sequential,
    /// Of one measurement.
    pub n_samples: usize,
    /// Of the text, when a manifest says so.
    pub bytes_per_token: Option<f64>,
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

impl RunData {
    /// Opens all shards; this rank also reads each set through and compares checksums when it is told to, until it is asked to stop.
    /// Collective.
    pub fn open(recipe: &Pretrain, groups: &Groups, reading: Reading, stop: &dyn Fn() -> bool) -> Result<RunData> {
        let opened = Opener { recipe, reading, stop, seen: Vec::new(), inputs: Vec::new(), tokenizer: None };
        agree(&*groups.world, opened.run_data(groups.layout.dp).doing(|| "opening the training data".into()))
    }

    /// Equal when every sample of every phase is: the fingerprints of the phases' orders, joined by +.
    pub fn fingerprint(&self) -> String {
        self.phases.iter().map(|phase| phase.order.fingerprint()).collect::<Vec<_>>().join("+")
    }
}

/// How much of the shards is read before training.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reading {
    /// Everything, against its checksums.
    Through,
    /// Sizes, index and fingerprint: what takes no longer on a larger corpus.
    Opened,
}

/// Opens shards one after the other and remembers what they have in common.
struct Opener<'a> {
    recipe: &'a Pretrain,
    reading: Reading,
    stop: &'a dyn Fn() -> bool,
    /// Sets opened already.
    seen: Vec<(PathBuf, Split)>,
    inputs: Vec<Input>,
    /// The first tokenizer met, and where.
    tokenizer: Option<(PathBuf, Vec<u8>)>,
}

impl Opener<'_> {
    fn run_data(mut self, dp: usize) -> Result<RunData> {
        let recipe = self.recipe;
        let mut phases = Vec::new();
        for phase in recipe.phases() {
            let mut sources = Vec::new();
            for source in &phase.data.train {
                sources.push((self.open("train-tokens", &source.shards, Split::Train)?, source.weight));
            }
            let order = DataOrder::new(sources, recipe.batch.seq_len, phase.data.seed)?;
            phases.push(PhaseData { name: phase.name.into(), order });
        }
        let validation = match &recipe.validation {
            None => None,
            Some(validation) => {
                let shards = self.open("validation-tokens", &validation.shards, Split::Validation)?;
                let bytes_per_token = shards.text_bytes().map(|bytes| bytes as f64 / shards.n_tokens() as f64);
                let samples = Sequential::new(shards, recipe.batch.seq_len)?;
                let n_samples = held_out_samples(recipe, dp, &samples)?;
                Some(HeldOut { samples, n_samples, bytes_per_token })
            }
        };
        Ok(RunData { phases, validation, inputs: self.inputs, tokenizer: self.tokenizer.map(|(_, bytes)| bytes) })
    }

    fn open(&mut self, role: &str, path: &Path, split: Split) -> Result<TokenShards> {
        let mut shards = TokenShards::open(path, split)?;
        check_vocabulary(self.recipe, path, &shards)?;
        shards.limit_ids(self.recipe.model.vocab_size);
        self.check_tokenizer(path, &shards)?;
        let set = (path.to_path_buf(), split);
        if !self.seen.contains(&set) {
            if self.reading == Reading::Through {
                fault::at("verify");
                shards.verify_unless(self.stop)?;
            }
            self.inputs.push(shards.as_input(role, path));
            self.seen.push(set);
        }
        Ok(shards)
    }

    /// Ids of two tokenizers in one run would mean two things.
    fn check_tokenizer(&mut self, path: &Path, shards: &TokenShards) -> Result<()> {
        let Some(bytes) = shards.tokenizer_bytes() else { return Ok(()) };
        match &self.tokenizer {
            Some((first, known)) if *known != bytes => {
                let (ours, theirs) = (tokenizer_fingerprint(&bytes), tokenizer_fingerprint(known));
                let wrong = format!("made with tokenizer {ours}, but {} with tokenizer {theirs}", first.display());
                Err(Error::file(path, wrong).remedy("tokenize both with the same tokenizer"))
            }
            Some(_) => Ok(()),
            None => {
                self.tokenizer = Some((path.to_path_buf(), bytes));
                Ok(())
            }
        }
    }
}

/// xxh3-64 of a SentencePiece model, as [`crate::text::Tokenizer::fingerprint`] has it.
pub(super) fn tokenizer_fingerprint(model_file: &[u8]) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(model_file))
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
