//! Loss and every gradient of one batch by a checkpoint, under Hugging Face names: written to a safetensors file, and compared with
//! those that another program has computed.
//!
//! The loss is the mean of -ln p(token | all before) over all tokens but the first of each sequence, as
//! `torch.nn.functional.cross_entropy` gives it for the concatenated sequences; gradients are neither clipped nor scaled.

use super::joined::{Parts, join};
use super::steps;
use super::table::{Differences, Judge, Row, Table};
use super::tolerance::Tolerance;
use crate::artifact;
use crate::checkpoint::Stored;
use crate::checkpoint::hf::{
    self,
    names::{Mapped, mapping},
};
use crate::checkpoint::safetensors::{Element, Planned, Weights, Writer};
use crate::comm::{Groups, agree};
use crate::device::{Device, Scratch};
use crate::error::{Context, Error, Kind, Result};
use crate::infer::choices::Start;
use crate::infer::score::{self, Sequence};
use crate::model::chunk::MicroBatch;
use crate::model::config::{HeadKind, ModelConfig, ParamSpec};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::parallel::schedule::{self, Messages, PipelineShape};
use crate::recipe::{Moments, ScheduleKind};
use crate::tensor::DType;
use crate::train::exchanges::{Exchanges, Overlap};
use crate::train::executor::{self, Keep};
use crate::train::mean_loss;
use crate::train::state::TrainState;
use std::path::Path;

/// Name of the loss, a tensor of one element.
pub const LOSS: &str = "loss";

/// The batch of a file: lines {"id", "tokens"}, or {"id", "text"} where the checkpoint has a tokenizer. Errors (exit code 3): a reward
/// model, a wrong line, a sequence of one token.
pub fn read_batch(stored: &Stored, path: &Path) -> Result<Vec<Sequence>> {
    let model = &stored.meta().model;
    if let HeadKind::Reward(n) = model.head {
        let wrong = format!("a reward model of {n} attributes, which predicts no tokens");
        return Err(Error::file(stored.dir(), wrong).remedy("use the checkpoint of a language model"));
    }
    let sequences = score::read_sequences(path, model.vocab_size, model.max_tokens + 1, (hf::tokenizer(stored)?.as_ref(), Start::NOTHING))?;
    match sequences.iter().find(|sequence| sequence.tokens.len() < 2) {
        None => Ok(sequences),
        Some(sequence) => {
            let wrong = format!("sequence {:?} has 1 token, which leaves none to predict", sequence.id);
            Err(Error::file(path, wrong).remedy("give at least 2 tokens"))
        }
    }
}

/// Loss and gradients of a batch on this rank.
pub struct Gradients {
    /// The same on every rank.
    pub loss: f64,
    model: ModelConfig,
    dtype: DType,
    n_tokens: usize,
    parts: Parts,
}

/// One forward and backward with the checkpoint's weights, stored as `dtype`. Replicas share out the sequences. Collective.
pub fn compute(device: &dyn Device, groups: &Groups, stored: &Stored, sequences: &[Sequence], dtype: DType) -> Result<Gradients> {
    let (world, layout, model) = (&*groups.world, groups.layout, stored.meta().model.clone());
    let n_tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len() - 1).sum();
    let scratch = Scratch::new();
    let mut state = agree(world, TrainState::new(device, &model, groups, dtype))?;
    agree(world, state.read(stored, Moments::Reset))?;
    state.publish(device, &scratch, groups);
    // All replicas run as many micro-batches; those past the last sequence are the first again, weighing nothing.
    let n_micro = sequences.len().div_ceil(layout.dp);
    let mine: Vec<Option<&Sequence>> = (0..n_micro).map(|micro| sequences.get(micro * layout.dp + groups.at.dp)).collect();
    let weight = 1.0 / n_tokens as f32;
    let batch = |of: &Option<&Sequence>| of.map_or(micro_batch(device, &sequences[0], 0.0), |of| micro_batch(device, of, weight));
    let batches = agree(world, mine.iter().map(batch).collect::<Result<Vec<MicroBatch>>>())?;
    let messages = if groups.pp.groups_are_in_order() { Messages::Together } else { Messages::Ahead };
    let schedule = schedule::training(ScheduleKind::OneFOneB, PipelineShape { pp: layout.pp, vp: 1, n_micro }, messages)?;
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let mut exchanges = Exchanges::new(groups, Overlap::WithComputation);
    let TrainState { chunks, optimizer, .. } = &mut state;
    let mut during = exchanges.during(ctx, optimizer);
    let mut passed = executor::run(&schedule, chunks, &ctx, groups, (&batches, Keep::Saved), &mut during);
    exchanges.finish_gradients(chunks, optimizer);
    optimizer.reduce_tied(device, &scratch, chunks, groups);
    for (losses, _) in passed.token_losses.iter_mut().zip(&mine).filter(|(_, of)| of.is_none()) {
        losses.clear();
    }
    let loss = mean_loss(&passed.token_losses, groups, n_tokens);
    device.finish();
    let parts = steps::gradients(chunks, optimizer);
    Ok(Gradients { loss, model, dtype, n_tokens, parts })
}

fn micro_batch(device: &dyn Device, sequence: &Sequence, weight: f32) -> Result<MicroBatch> {
    let tokens = &sequence.tokens;
    let n = tokens.len() - 1;
    let positions: Vec<u32> = (0..n as u32).collect();
    MicroBatch::new(device, [&tokens[..n], &tokens[1..], &positions], &vec![weight; n], vec![0, n])
}

/// Gradients computed elsewhere: one safetensors file of f32, bf16 or f16, named as transformers names the parameters, and "loss" if
/// it is there.
pub struct Reference(Weights);

impl Reference {
    /// Opens it for the gradients of this model. Errors (exit code 3): no such file; a tensor that is missing, of another shape, or none
    /// of this model.
    pub fn open(path: &Path, model: &ModelConfig) -> Result<Reference> {
        let weights = Weights::open_file(path).doing(|| "opening the reference".into())?;
        let wanted: Vec<(String, Vec<usize>)> = mapping(model).into_iter().flat_map(|mapped| mapped.sources).collect();
        let fail = |wrong: String, remedy: &str| Err(Error::file(path, wrong).remedy(remedy));
        const SAVE: &str = "save {name: parameter.grad for each of model.named_parameters()} and \"loss\"";
        for (name, shape) in &wanted {
            match weights.entries().get(name) {
                None => return fail(format!("has no gradient of {name}"), SAVE),
                Some(entry) if entry.shape != *shape => {
                    return fail(format!("{name} is {:?}, this model's is {shape:?}", entry.shape), "use the gradients of this checkpoint");
                }
                Some(_) => drop(weights.expect(name, shape)?),
            }
        }
        for (name, entry) in weights.entries() {
            let is_loss = name == LOSS && entry.shape.iter().product::<usize>() == 1;
            if !is_loss && !wanted.iter().any(|(known, _)| known == name) {
                return fail(format!("has a tensor {name} {:?}, which is no parameter of this model", entry.shape), SAVE);
            }
        }
        Ok(Reference(weights))
    }

    /// All elements, widened to f32.
    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.0.entries()[name].shape.clone();
        let element = self.0.expect(name, &shape)?;
        // A number of shape [] is one row.
        let (n_rows, mut values) = (shape.first().copied().unwrap_or(1), Vec::new());
        let half = |b: &[u8]| [b[0], b[1]];
        self.0.read_rows(name, 0..n_rows, &mut |bytes| {
            match element {
                Element::F32 => values.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
                Element::Bf16 => values.extend(bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(half(b)).to_f32())),
                Element::F16 => values.extend(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes(half(b)).to_f32())),
            }
            Ok(())
        })?;
        Ok(values)
    }
}

/// Refuses an output that is there already, before anything is computed.
pub fn check_output(out: &Path) -> Result<()> {
    if out.exists() {
        return Err(Error::file(out, "exists").remedy("move it away, or name another file"));
    }
    let parent = parent(out);
    if parent.is_dir() { Ok(()) } else { Err(Error::file(parent, "no such directory").remedy("make it first")) }
}

fn parent(out: &Path) -> &Path {
    out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Gradients {
    /// Writes loss and gradients in f32 to `out`, which appears when it is whole, and compares with the reference; the table is on rank
    /// 0, which holds one gradient at a time. Collective.
    pub fn finish(&self, groups: &Groups, out: Option<&Path>, reference: Option<&Reference>) -> Result<Option<Table>> {
        let is_first = groups.world.rank() == 0;
        let Some(out) = out else { return self.each(groups, None, reference) };
        let (dir, name) = (parent(out), out.file_name().unwrap_or_default().to_string_lossy());
        let unfinished = format!(".{name}.tmp-{}", std::process::id());
        let begin = || Writer::create(dir, &unfinished, &self.planned()).map(Some);
        let mut writer = agree(&*groups.world, if is_first { begin() } else { Ok(None) })?;
        let written = self.each(groups, writer.as_mut(), reference);
        let put = |writer: Writer| {
            writer.close()?;
            artifact::rename(&dir.join(&unfinished), out)?;
            artifact::sync_dir(dir)
        };
        let done = written.and_then(|table| writer.map_or(Ok(()), put).map(|()| table));
        if is_first && done.is_err() {
            let _ = std::fs::remove_file(dir.join(&unfinished));
        }
        agree(&*groups.world, done)
    }

    fn planned(&self) -> Vec<Planned> {
        let tensor = |(name, shape): (String, Vec<usize>)| Planned { name, shape, element: Element::F32 };
        let sources = mapping(&self.model).into_iter().flat_map(|mapped| mapped.sources);
        std::iter::once((LOSS.to_string(), vec![1])).chain(sources).map(tensor).collect()
    }

    /// Each tensor in the order of `planned`: to the writer, and against the reference. Every rank goes through all of them, whatever
    /// goes wrong on rank 0.
    fn each(&self, groups: &Groups, mut writer: Option<&mut Writer>, reference: Option<&Reference>) -> Result<Option<Table>> {
        let tolerance = Tolerance::new(&self.model, self.dtype, self.n_tokens, groups.layout.tp).gradient();
        let is_first = groups.world.rank() == 0;
        let mut rows: Vec<Row> = Vec::new();
        let mut one = |name: &str, values: &[f32]| -> Result<()> {
            if let Some(writer) = &mut writer {
                values.iter().try_for_each(|value| writer.append(&value.to_le_bytes()))?;
            }
            if let Some(reference) = reference.filter(|reference| reference.0.entries().contains_key(name)) {
                let mut differences = Differences::new(DType::F32);
                differences.add(values, &reference.read(name)?);
                rows.push(differences.row(if name == LOSS { name.to_string() } else { format!("gradient {name}") }, tolerance));
            }
            Ok(())
        };
        let mut result = if is_first { one(LOSS, &[self.loss as f32]) } else { Ok(()) };
        for (spec, mapped) in self.model.param_specs().iter().zip(mapping(&self.model)) {
            let whole = self.joined(groups, spec);
            if is_first && result.is_ok() {
                result = self.sources(spec, &mapped, &whole?, &mut one);
            }
        }
        result?;
        Ok((is_first && reference.is_some()).then_some(Table { judge: Judge::Norms, rows }))
    }

    /// A logical gradient on rank 0, nothing elsewhere. Collective.
    fn joined(&self, groups: &Groups, spec: &ParamSpec) -> Result<Vec<f32>> {
        let (mut whole, mut n_conflicts) = (Vec::new(), 0);
        join(&*groups.world, spec, &self.parts, &mut |joined| {
            n_conflicts += joined.conflicts.len();
            if groups.world.rank() == 0 {
                whole.extend(joined.values);
            }
        });
        if n_conflicts > 0 {
            let wrong = format!("ranks disagree about {n_conflicts} elements of the gradient of {}", spec.name);
            return Err(Error::new(Kind::Numeric, wrong).remedy("find the faulty rank: run the recipe proof in this layout"));
        }
        Ok(whole)
    }

    /// Hands on the Hugging Face tensors that a parameter holds.
    fn sources(&self, spec: &ParamSpec, mapped: &Mapped, whole: &[f32], one: &mut dyn FnMut(&str, &[f32]) -> Result<()>) -> Result<()> {
        let row_len = spec.shape.get(1).copied().unwrap_or(1);
        for (source, (name, _)) in mapped.sources.iter().enumerate() {
            let rows = mapped.rows_of_source(&self.model, source);
            let values: Vec<f32> = rows.into_iter().flat_map(|rows| &whole[rows.start * row_len..rows.end * row_len]).copied().collect();
            one(name, &values)?;
        }
        Ok(())
    }
}
