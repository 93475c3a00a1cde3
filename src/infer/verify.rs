//! A checkpoint against the Hugging Face directory that it was imported from or exported to: both are read again, independently of what
//! was in memory when they were written, and every weight and every logit of a few token sequences must be the same bits. The forward is
//! the same on both sides, so this shows that files say the same, not that the function is right: that is shown against transformers.
//!
//! One layer of each side is in memory at a time.

use crate::checkpoint::Stored;
use crate::checkpoint::hf::{ExportType, Exported, Source};
use crate::comm::solo::Solo;
use crate::device::{Device, Scratch};
use crate::error::{Context, Error, Kind, Result};
use crate::model::chunk::{Chunk, MicroBatch, Output, Purpose};
use crate::model::config::{HeadKind, ModelConfig};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::model::param::Param;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::rng::Random;
use crate::tensor::{DType, Tensor};

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

/// Reads the weight of this name into a tensor of its shape, f32.
type Read<'a> = dyn Fn(&str, &mut Tensor) -> Result<()> + 'a;

/// One side: what it is called, its function, and its weights in f32 by the names of our parameters.
struct Side<'a> {
    name: String,
    model: &'a ModelConfig,
    read: Box<Read<'a>>,
}

/// Compares a directory with a checkpoint; `dtype` is that of the export, or [`ExportType::AsStored`] for an import. Computes in f32.
/// Err: of kind Numeric with the first difference, or what cannot be read.
pub fn compare(device: &dyn Device, source: &Source, stored: &Stored, dtype: ExportType) -> Result<Compared> {
    let exported = Exported::new(stored, dtype);
    let ours = Side {
        name: stored.dir().display().to_string(),
        model: &stored.meta().model,
        read: Box::new(|name, into| {
            let value = exported.read(name)?;
            match value.dtype() {
                DType::BF16 => into.f32_mut().iter_mut().zip(value.bf16()).for_each(|(wide, value)| *wide = value.to_f32()),
                _ => into.f32_mut().copy_from_slice(value.f32()),
            }
            Ok(())
        }),
    };
    let theirs =
        Side { name: source.dir().display().to_string(), model: source.model(), read: Box::new(|name, into| source.read(name, into)) };
    let doing = || format!("comparing {} with {}", ours.name, theirs.name);
    compare_sides(device, [&ours, &theirs]).doing(doing)
}

fn compare_sides(device: &dyn Device, sides: [&Side; 2]) -> Result<Compared> {
    let [ours, theirs] = sides;
    // How far the vocabulary is padded is not part of the function.
    let same = ModelConfig { vocab_divisor: ours.model.vocab_divisor, ..theirs.model.clone() };
    if same != *ours.model {
        return Err(differs(format!("{:?} here, {same:?} there", ours.model)));
    }
    let model = ours.model;
    let batch = sequences(device, model)?;
    let layout = ParallelLayout { tp: 1, pp: model.n_layers, dp: 1, vp: 1 };
    let mut streams: [Option<Tensor>; 2] = [None, None];
    let mut n_weights = 0;
    for stage in 0..layout.pp {
        let at = Coords { tp: 0, pp: stage, dp: 0 };
        let (chunks, n) = load(device, sides, &layout, at)?;
        n_weights += n;
        let pass = if layout.is_last(stage, 0) { outputs } else { stream };
        streams = [0, 1].map(|idx| Some(pass(device, &chunks[idx], streams[idx].as_ref(), &batch)));
        let what = if layout.is_last(stage, 0) { "the output".into() } else { format!("the stream after layer {stage}") };
        let [a, b] = [0, 1].map(|idx| streams[idx].as_ref().expect("just made"));
        compare_bits(&what, [a, b])?;
    }
    let n_outputs = streams[0].as_ref().map_or(0, Tensor::n_elements);
    Ok(Compared { n_sequences: batch.sequence_starts.len() - 1, n_outputs, n_weights })
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

/// One layer of both sides, with the embedding before the first and the head after the last, and how many weights they have, all of them
/// the same bits. Rows that pad the vocabulary are not compared.
fn load(device: &dyn Device, sides: [&Side; 2], layout: &ParallelLayout, at: Coords) -> Result<([Chunk; 2], usize)> {
    let chunk = |side: &Side| Chunk::new(device, side.model, layout, at, 0, DType::F32, Purpose::Inference);
    let mut chunks = [chunk(sides[0])?, chunk(sides[1])?];
    let [ours, theirs] = &mut chunks;
    let mut n_weights = 0;
    for (a, b) in ours.params_mut().into_iter().zip(theirs.params_mut()) {
        let values = [read(sides[0], a)?, read(sides[1], b)?];
        let is_padded = ["embedding.weight", "head.weight"].contains(&a.spec.name.as_str());
        let n_rows = if is_padded { sides[0].model.vocab_size } else { a.slice.shape[0] };
        let [here, there] = [0, 1].map(|idx| values[idx].rows(0..n_rows));
        compare_bits(&a.spec.name, [&here, &there])?;
        n_weights += here.n_elements();
        device.upload(values[0].bytes(), &mut a.value);
        device.upload(values[1].bytes(), &mut b.value);
    }
    Ok((chunks, n_weights))
}

fn read(side: &Side, param: &Param) -> Result<Tensor> {
    let (name, shape) = (&param.spec.name, &param.slice.shape);
    let mut value = Tensor::host(shape, DType::F32, None).ok_or_else(|| no_memory(name, shape))?;
    (side.read)(name, &mut value)?;
    Ok(value)
}

fn no_memory(what: &str, shape: &[usize]) -> Error {
    Error::new(Kind::Other, format!("no memory for {what} {shape:?}")).remedy("use a machine with more memory")
}

/// Runs `pass` with what a layer is lent.
fn with_ctx<T>(device: &dyn Device, pass: impl FnOnce(&Ctx) -> T) -> T {
    let (world, scratch) = (Solo::new(), Scratch::new());
    pass(&Ctx { device, tp: &world, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast })
}

fn download(device: &dyn Device, from: &Tensor) -> Tensor {
    let mut host = Tensor::host(from.dims(), from.dtype(), None).expect("memory for the rows of a few tokens");
    device.download(from, host.bytes_mut());
    host
}

/// The stream for the next layer [T, H].
fn stream(device: &dyn Device, chunk: &Chunk, input: Option<&Tensor>, batch: &MicroBatch) -> Tensor {
    with_ctx(device, |ctx| match chunk.forward(ctx, input, batch, None) {
        Output::Hidden(stream) => download(device, &stream),
        Output::TokenLosses(_) | Output::Attributes(_) => unreachable!("only the last layer ends the model"),
    })
}

/// Logits [T, V] without those of padding, or attributes [N, R].
fn outputs(device: &dyn Device, chunk: &Chunk, input: Option<&Tensor>, batch: &MicroBatch) -> Tensor {
    let vocab_size = chunk.config().vocab_size;
    with_ctx(device, |ctx| match chunk.config().head {
        HeadKind::Vocabulary => {
            let logits = download(device, &chunk.logits(ctx, input, batch));
            let rows = logits.f32().chunks(logits.row_len());
            let values: Vec<f32> = rows.flat_map(|row| &row[..vocab_size]).copied().collect();
            Tensor::from_f32(&[batch.n_tokens(), vocab_size], &values)
        }
        HeadKind::Reward(n) => match chunk.forward(ctx, input, batch, None) {
            Output::Attributes(values) => Tensor::from_f32(&[values.len() / n, n], &values),
            Output::TokenLosses(_) | Output::Hidden(_) => unreachable!("a reward model ends in attributes"),
        },
    })
}

/// The same bits, or an error with the first that differ.
fn compare_bits(what: &str, [a, b]: [&Tensor; 2]) -> Result<()> {
    let (here, there) = (a.f32(), b.f32());
    assert_eq!(here.len(), there.len(), "{what} of two sizes");
    match here.iter().zip(there).position(|(x, y)| x.to_bits() != y.to_bits()) {
        None => Ok(()),
        Some(idx) => {
            let (row, column) = (idx / a.row_len(), idx % a.row_len());
            let n = here.iter().zip(there).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
            Err(differs(format!("{what}[{row}, {column}] is {} here and {} there, as are {n} of {}", here[idx], there[idx], here.len())))
        }
    }
}
