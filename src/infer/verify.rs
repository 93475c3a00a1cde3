//! A checkpoint against the Hugging Face directory that it was imported from or exported to: both are read again, independently of what
//! was in memory when they were written, and every weight and every logit of a few token sequences must be the same bits. The forward is
//! the same on both sides, so this shows that files say the same, not that the function is right: that is shown against transformers.
//!
//! Of the matrices of both sides a slice of rows is in memory at a time (see `model::streamed`), of everything else a layer.

use crate::checkpoint::Stored;
use crate::checkpoint::hf::{ExportType, Exported, Source};
use crate::comm::solo::Solo;
use crate::device::{Device, Scratch};
use crate::error::{Context, Error, Kind, Result};
use crate::model::chunk::{Chunk, MicroBatch, Output, Purpose};
use crate::model::config::{HeadKind, ModelConfig, Split};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::model::streamed::WeightRows;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::rng::Random;
use crate::tensor::{DType, Tensor};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Tokens of each sequence, as far as the model takes them: alone, a few, and more than a handful.
const SEQUENCE_TOKENS: [usize; 3] = [1, 5, 14];

/// What was compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compared {
    /// Token sequences that went through both.
    pub n_sequences: usize,
    /// Their logits, or attributes of a reward model.
    pub n_outputs: usize,
    /// Weights.
    pub n_weights: usize,
}

/// Reads rows of the weight of this name from one on, as many as there is room for: [n, row] f32 host memory.
type ReadRows = dyn Fn(&str, usize, &mut Tensor) -> Result<()> + Send + Sync;

/// One side: what it is called, its function, and its weights by the names of our parameters.
struct Side {
    name: String,
    model: ModelConfig,
    read: Box<ReadRows>,
}

/// Compares a directory with a checkpoint; `dtype` is that of the export, or [`ExportType::AsStored`] for an import. Computes in f32.
/// Err: of kind Numeric with the first difference, or what cannot be read.
pub fn compare(device: &dyn Device, source: Source, stored: Stored, dtype: ExportType) -> Result<Compared> {
    let ours = Side {
        name: stored.dir().display().to_string(),
        model: stored.meta().model.clone(),
        read: Box::new(move |name, first, into| {
            let value = Exported::new(&stored, dtype).read_rows(name, first..first + into.n_rows())?;
            match value.dtype() {
                DType::BF16 => into.f32_mut().iter_mut().zip(value.bf16()).for_each(|(wide, value)| *wide = value.to_f32()),
                _ => into.f32_mut().copy_from_slice(value.f32()),
            }
            Ok(())
        }),
    };
    let theirs = Side {
        name: source.dir().display().to_string(),
        model: source.model().clone(),
        read: Box::new(move |name, first, into| source.read_rows(name, first, into)),
    };
    let doing = format!("comparing {} with {}", ours.name, theirs.name);
    compare_sides(device, [Arc::new(ours), Arc::new(theirs)]).doing(|| doing)
}

fn compare_sides(device: &dyn Device, [ours, theirs]: [Arc<Side>; 2]) -> Result<Compared> {
    // How far the vocabulary is padded is not part of the function.
    let same = ModelConfig { vocab_divisor: ours.model.vocab_divisor, ..theirs.model.clone() };
    if same != ours.model {
        return Err(differs(format!("{:?} here, {same:?} there", ours.model)));
    }
    let batch = sequences(device, &same)?;
    let layout = ParallelLayout { tp: 1, pp: same.n_layers, dp: 1, vp: 1 };
    let mut streams: [Option<Tensor>; 2] = [None, None];
    let mut compared = Compared { n_sequences: batch.sequence_starts.len() - 1, n_outputs: 0, n_weights: 0 };
    for stage in 0..layout.pp {
        let at = Coords { tp: 0, pp: stage, dp: 0 };
        let (what, n_columns, gives) = match (layout.is_last(stage, 0), same.head) {
            (false, _) => (format!("the stream after layer {stage}"), same.hidden, Gives::Output),
            (true, HeadKind::Vocabulary) => ("the output".into(), same.vocab_size, Gives::Logits),
            (true, HeadKind::Reward(n)) => ("the output".into(), n, Gives::Output),
        };
        // The second pass compares what it reads with the first side's.
        for (stream, (side, other)) in streams.iter_mut().zip([(&ours, None), (&theirs, Some(&ours))]) {
            let (chunk, weights) = load(device, (side, other), &layout, at)?;
            *stream = Some(pass(device, &chunk, (stream.as_ref(), &batch), gives)?);
            for weight in weights {
                compared.n_weights += weight.finish()?;
            }
        }
        let [a, b] = [0, 1].map(|idx| streams[idx].as_ref().expect("just made"));
        compare_rows(&what, [a, b], n_columns)?;
        compared.n_outputs = a.n_rows() * n_columns; // at last those of the last
    }
    Ok(compared)
}

fn differs(wrong: String) -> Error {
    Error::new(Kind::Numeric, wrong).remedy("remove what was written, write it again, and look for a failing disk or memory")
}

/// Token sequences by a fixed seed, with the first and the last id of the vocabulary among them.
fn sequences(device: &dyn Device, model: &ModelConfig) -> Result<MicroBatch> {
    let random = Random::new(0, "tokens of a comparison");
    let lengths = SEQUENCE_TOKENS.map(|n| n.min(model.max_tokens));
    let n_tokens: usize = lengths.iter().sum();
    let mut tokens: Vec<u32> = (0..n_tokens).map(|i| (random.bits(i as u64) % model.vocab_size as u64) as u32).collect();
    (tokens[0], tokens[n_tokens - 1]) = (0, model.vocab_size as u32 - 1);
    let positions: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
    let starts = (0..=lengths.len()).map(|i| lengths[..i].iter().sum()).collect();
    MicroBatch::new(device, [&tokens, &tokens, &positions], &vec![0.0; n_tokens], starts)
}

/// A weight of one side as a pass reads it; of the second side, compared with the first's on the way.
struct Weight {
    name: String,
    side: Arc<Side>,
    other: Option<Arc<Side>>,
    /// Rows that are compared: not those that pad the vocabulary.
    n_rows: usize,
    read: Mutex<Read>,
}

/// What was read of a weight.
#[derive(Default)]
struct Read {
    /// Rows that are compared.
    n_rows: usize,
    /// Their elements.
    n_elements: usize,
    /// How many of them differ, and the first: row, column, what the first side has there, and the second.
    n_different: usize,
    first: Option<(usize, usize, f32, f32)>,
    /// What could not be read.
    failed: Option<Error>,
}

impl WeightRows for Weight {
    fn read(&self, first_row: usize, into: &mut Tensor) {
        let mut read = self.lock();
        if read.failed.is_none() {
            let result = self.try_read(first_row, into, &mut read);
            read.failed = result.err();
        }
    }
}

impl Weight {
    fn lock(&self) -> MutexGuard<'_, Read> {
        self.read.lock().expect("nobody panics while reading")
    }

    fn try_read(&self, first_row: usize, into: &mut Tensor, read: &mut Read) -> Result<()> {
        let rows = |side: &Side, n: usize| {
            let shape = into.shape().with_rows(n);
            let mut rows = Tensor::host(shape.dims(), DType::F32, None).ok_or_else(|| {
                let wrong = format!("no memory for {shape:?} of {}", self.name);
                Error::new(Kind::Other, wrong).remedy("use a machine with more memory")
            })?;
            (side.read)(&self.name, first_row, &mut rows)?;
            Ok(rows)
        };
        let mine = rows(&self.side, into.n_rows())?;
        // The other side may pad the vocabulary to fewer rows.
        let end = self.n_rows.min(first_row + mine.n_rows());
        if let Some(other) = self.other.as_ref().filter(|_| end > first_row) {
            read.compare(first_row..end, [&rows(other, end - first_row)?, &mine]);
        }
        into.write_bytes(0, mine.bytes());
        Ok(())
    }

    /// How many elements were compared, all of them the same bits, when the pass is over.
    fn finish(&self) -> Result<usize> {
        let mut read = self.lock();
        let Read { n_rows, n_elements, n_different, first, failed } = &mut *read;
        let is_whole = failed.is_some() || self.other.is_none() || *n_rows == self.n_rows;
        assert!(is_whole, "a pass read {n_rows} of {} rows of {}", self.n_rows, self.name);
        match (failed.take(), first) {
            (Some(error), _) => Err(error),
            (None, None) => Ok(*n_elements),
            (None, Some((row, column, here, there))) => {
                let others = format!("as are {n_different} of {n_elements}");
                Err(differs(format!("{}[{row}, {column}] is {here} here and {there} there, {others}", self.name)))
            }
        }
    }
}

impl Read {
    /// Compares these rows of both sides but those that were; rows come in order, without gaps.
    fn compare(&mut self, rows: Range<usize>, [here, there]: [&Tensor; 2]) {
        assert!(rows.start <= self.n_rows, "rows {rows:?} come after {} rows", self.n_rows);
        let (first_row, n_columns) = (rows.start, here.row_len());
        let new = self.n_rows.max(rows.start)..rows.end;
        if new.is_empty() {
            return;
        }
        let at = |row: usize| (row - first_row) * n_columns;
        let [here, there] = [here, there].map(|side| &side.f32()[at(new.start)..at(new.end)]);
        for (idx, (x, y)) in here.iter().zip(there).enumerate().filter(|(_, (x, y))| x.to_bits() != y.to_bits()) {
            self.n_different += 1;
            self.first.get_or_insert((new.start + idx / n_columns, idx % n_columns, *x, *y));
        }
        self.n_elements += here.len();
        self.n_rows = new.end;
    }
}

/// One layer of a side, with the embedding before the first and the head after the last. Matrices are read when they are used, the rest
/// is here.
fn load(device: &dyn Device, (side, other): (&Arc<Side>, Option<&Arc<Side>>), layout: &ParallelLayout, at: Coords) -> Result<Loaded> {
    let mut chunk = Chunk::new(device, &side.model, layout, at, 0, DType::F32, Purpose::Loading)?;
    let mut weights = Vec::new();
    for param in chunk.params_mut() {
        let (name, shape) = (param.spec.name.clone(), &param.slice.shape);
        let is_padded = ["embedding.weight", "head.weight"].contains(&name.as_str());
        let n_rows = if is_padded { side.model.vocab_size } else { shape[0] };
        let weight = Arc::new(Weight { name, side: Arc::clone(side), other: other.cloned(), n_rows, read: Mutex::default() });
        if param.spec.split == Split::None {
            param.value = device.alloc(shape, DType::F32)?;
            weight.read(0, &mut param.value);
        } else {
            param.streamed = Some(Arc::clone(&weight) as Arc<dyn WeightRows>);
        }
        weights.push(weight);
    }
    Ok((chunk, weights))
}

/// A layer and its weights.
type Loaded = (Chunk, Vec<Arc<Weight>>);

/// What a pass gives.
#[derive(Clone, Copy)]
enum Gives {
    /// The stream for the next layer [T, H], or attributes [N, R].
    Output,
    /// Logits [T, padded V].
    Logits,
}

/// A pass and its temporaries, of which the output alone is left.
fn pass(device: &dyn Device, chunk: &Chunk, (input, batch): (Option<&Tensor>, &MicroBatch), gives: Gives) -> Result<Tensor> {
    let (world, scratch, numerics) = (Solo::new(), Scratch::new(), Numerics::of_inference(device));
    let ctx = &Ctx { device, tp: &world, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
    let keep = |output: &Tensor| {
        let mut kept = device.alloc(output.dims(), DType::F32)?;
        device.copy(&mut kept, output);
        Ok(kept)
    };
    let output = match gives {
        Gives::Logits => return keep(&chunk.logits(ctx, input, batch)),
        Gives::Output => chunk.forward(ctx, input, batch, None),
    };
    match output {
        Output::Hidden(stream) => keep(&stream),
        Output::Attributes(values) => {
            let n = batch.sequence_starts.len() - 1;
            let mut attributes = device.alloc(&[n, values.len() / n], DType::F32)?;
            device.upload(bytemuck::cast_slice(&values), &mut attributes);
            Ok(attributes)
        }
        Output::TokenLosses(_) => unreachable!("of the end of a language model there are logits"),
    }
}

/// The same bits in the first columns of all rows, or an error with the first that differ.
fn compare_rows(what: &str, sides: [&Tensor; 2], n_columns: usize) -> Result<()> {
    let bytes = sides.map(Tensor::host_bytes);
    let at = |side: usize, (row, column)| {
        let values: &[f32] = bytemuck::cast_slice(&bytes[side]);
        values[row * sides[side].row_len() + column]
    };
    let is_other = |place: &(usize, usize)| at(0, *place).to_bits() != at(1, *place).to_bits();
    let places = || (0..sides[0].n_rows()).flat_map(|row| (0..n_columns).map(move |column| (row, column)));
    let Some((row, column)) = places().find(is_other) else { return Ok(()) };
    let (here, there, n) = (at(0, (row, column)), at(1, (row, column)), places().filter(is_other).count());
    let others = format!("as are {n} of {}", places().count());
    Err(differs(format!("{what}[{row}, {column}] is {here} here and {there} there, {others}")))
}
