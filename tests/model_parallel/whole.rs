//! Whole models: chunks of all stages on every tensor-parallel rank, handing activations and gradients over by hand.

use super::ranks::Matrix;
use crate::common::models;
use std::collections::BTreeMap;
use trireme::comm::{Communicator, Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::device::{Activation, CacheSpan, Device, KvCache, NormKind, Scratch, ScratchTensor};
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, ChunkSaved, MicroBatch, Output, Purpose, Ratings};
use trireme::model::config::{HeadKind, Init, ModelConfig, Split};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::param::Param;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};
use trireme::train::exchanges::{Exchanges, Overlap};
use trireme::train::executor::Between;
use trireme::train::optimizer::ShardedAdamW;

pub const SEED: u64 = 17;

/// 37 pieces in 64 rows: with four ranks the third has some padding and the fourth nothing else.
pub fn nemotron() -> ModelConfig {
    ModelConfig { vocab_divisor: 64, rotary_fraction: 0.67, init_std: 0.2, ..models::nemotron([4, 24, 8, 4, 6, 40, 37], 32) }
}

pub fn llama_tied() -> ModelConfig {
    ModelConfig { norm: NormKind::RmsNorm, activation: Activation::Swiglu, tied_embeddings: true, ..nemotron() }
}

/// Its tied embeddings say nothing: a reward model has no output layer.
pub fn reward() -> ModelConfig {
    ModelConfig { head: HeadKind::Reward(5), tied_embeddings: true, ..nemotron() }
}

/// Sequences of these lengths in one micro-batch, with five ratings each that a language model does not look at.
pub fn micro_batch(lengths: &[usize], seed: u64) -> MicroBatch {
    let n: usize = lengths.iter().sum();
    let noise = Random::new(seed, "tokens");
    let token = |i: usize| (noise.bits(i as u64) % 37) as u32;
    let weight = |t: usize| if noise.bits(1000 + t as u64).is_multiple_of(4) { 0.0 } else { 1.0 / 32.0 };
    let rating = |i: usize| if noise.bits(2000 + i as u64).is_multiple_of(4) { f32::NAN } else { noise.normal(3000 + i as u64) as f32 };
    let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
    let mut sequence_starts = vec![0];
    lengths.iter().for_each(|length| sequence_starts.push(sequence_starts[sequence_starts.len() - 1] + length));
    MicroBatch {
        tokens: Tensor::from_u32(&[n], &(0..n).map(token).collect::<Vec<_>>()),
        targets: Tensor::from_u32(&[n], &(0..n).map(|t| token(n + t)).collect::<Vec<_>>()),
        positions: Tensor::from_u32(&[n], &positions),
        weights: Tensor::from_f32(&[n], &(0..n).map(weight).collect::<Vec<_>>()),
        sequence_starts,
        ratings: Some(Ratings { labels: (0..lengths.len() * 5).map(rating).collect(), weight: 1.0 / 13.0 }),
        shared: None,
        asked: None,
        first_sample: 0,
    }
}

/// Gains and biases away from their special values, the same under every layout.
fn randomise_norms(chunk: &mut Chunk) {
    for param in chunk.params_mut() {
        if let Init::Constant(value) = param.spec.init {
            let noise = Random::new(SEED, &param.spec.name);
            param.value.f32_mut().iter_mut().enumerate().for_each(|(i, x)| *x = value + 0.3 * noise.normal(i as u64) as f32);
        }
    }
}

/// All chunks of the model, in model order, as tensor-parallel rank `tp` of the layout holds them.
fn chunks(device: &dyn Device, config: &ModelConfig, layout: ParallelLayout, tp: usize, purpose: Purpose) -> Vec<Chunk> {
    let chunk = |i: usize| {
        let at = Coords { tp, pp: i % layout.pp, dp: 0 };
        let mut chunk = Chunk::new(device, config, &layout, at, i / layout.pp, DType::F32, purpose).unwrap();
        chunk.initialise(device, SEED);
        chunk
    };
    (0..layout.n_chunks()).map(chunk).collect()
}

/// Whether `Chunk::finish_gradients` is called.
#[derive(Clone, Copy, PartialEq)]
enum Finish {
    Called,
    Forgotten,
}

/// Forwards of all micro-batches, then backwards of all, as schedules interleave them.
fn forward_and_backward(chunks: &mut [Chunk], ctx: &Ctx, batches: &[MicroBatch], finish: Finish) -> Vec<f32> {
    let mut losses = Vec::new();
    let mut all_saved: Vec<Vec<ChunkSaved>> = Vec::new();
    for batch in batches {
        let mut passed: Option<ScratchTensor> = None;
        let mut saved_of_batch = Vec::new();
        for chunk in chunks.iter() {
            let mut saved = ChunkSaved::default();
            match chunk.forward(ctx, passed.as_deref(), batch, Some(&mut saved)) {
                Output::Hidden(hidden) => passed = Some(hidden),
                Output::TokenLosses(tokens) => losses.extend(tokens.losses),
                Output::Attributes(attributes) => losses.extend(attributes),
            }
            saved_of_batch.push(saved);
        }
        all_saved.push(saved_of_batch);
    }
    for (batch, saved_of_batch) in batches.iter().zip(all_saved) {
        let mut passed: Option<ScratchTensor> = None;
        for (chunk, saved) in chunks.iter_mut().zip(saved_of_batch).rev() {
            passed = chunk.backward(ctx, batch, saved, passed.as_deref());
        }
        assert!(passed.is_none(), "the first chunk has no input gradient");
    }
    if finish == Finish::Called {
        chunks.iter_mut().for_each(|chunk| chunk.finish_gradients(ctx));
    }
    losses
}

/// Gradient without padding rows; those are zero, or the sharded optimizer would average them in.
fn gradient(param: &Param) -> Matrix {
    let rows = param.slice.shape[0];
    let padding = param.grad().rows(rows..param.grad().n_rows());
    assert!(padding.f32().iter().all(|&x| x == 0.0), "{}: padding rows have gradients", param.spec.name);
    let grad = Matrix::of(&param.grad().rows(0..rows));
    if param.spec.shape.len() == 1 { grad.transposed() } else { grad }
}

/// Gradients of a rank by name; the two copies of a tied embedding are summed.
fn gradients(chunks: &[Chunk]) -> BTreeMap<String, (Split, Matrix)> {
    let mut all = BTreeMap::<String, (Split, Matrix)>::new();
    for chunk in chunks {
        for (idx, param) in chunk.params().into_iter().enumerate() {
            let mut grad = gradient(param);
            if let Some((_, first_copy)) = all.get(&param.spec.name) {
                assert!(chunk.is_tied_copy(idx), "{} is in two chunks", param.spec.name);
                grad = grad.plus(first_copy);
            }
            all.insert(param.spec.name.clone(), (param.spec.split, grad));
        }
    }
    all
}

struct Trained {
    /// [T] of each micro-batch, one after another; attributes [N * 5] of a reward model.
    losses: Matrix,
    gradients: BTreeMap<String, Matrix>,
}

fn train_on(config: &ModelConfig, layout: ParallelLayout, sequence: SequenceMode, finish: Finish) -> Trained {
    let ranks = threads::run(layout.tp, |tp| {
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let ctx = Ctx { device: &device, tp: &*tp, scratch: &scratch, sequence, numerics: Numerics::Fast };
        let mut chunks = chunks(&device, config, layout, tp.rank(), Purpose::Training);
        chunks.iter_mut().for_each(randomise_norms);
        let batches = [micro_batch(&[9, 3, 8], 1), micro_batch(&[5, 7], 2)];
        let losses = forward_and_backward(&mut chunks, &ctx, &batches, finish);
        (losses, gradients(&chunks))
    });
    assert!(ranks.iter().all(|(losses, _)| *losses == ranks[0].0), "tensor-parallel ranks disagree about the losses");
    let join = |name: &String| {
        let parts: Vec<Matrix> = ranks.iter().map(|(_, gradients)| gradients[name].1.clone()).collect();
        match ranks[0].1[name].0 {
            Split::Rows => Matrix::stack(&parts),
            Split::Columns => Matrix::beside(&parts),
            Split::Outputs => unreachable!("not in training"),
            Split::None => {
                assert!(finish == Finish::Forgotten || parts.iter().all(|part| *part == parts[0]), "{name} differs between ranks");
                parts[0].clone()
            }
        }
    };
    Trained {
        losses: Matrix { rows: 1, columns: ranks[0].0.len(), values: ranks[0].0.iter().map(|&x| f64::from(x)).collect() },
        gradients: ranks[0].1.keys().map(|name| (name.clone(), join(name))).collect(),
    }
}

/// Terms of the longest inner sum (padded vocabulary), and operations a value passes on its way through four blocks and back.
const N_TERMS: usize = 64;
const DEPTH: usize = 64;

fn assert_same(found: &Trained, expected: &Trained, what: &str) {
    found.losses.assert_close(&expected.losses, N_TERMS, DEPTH, &format!("{what}: losses"));
    assert!(found.gradients.keys().eq(expected.gradients.keys()), "{what}: other parameters");
    for (name, expected) in &expected.gradients {
        found.gradients[name].assert_close(expected, N_TERMS, DEPTH, &format!("{what}: gradient of {name}"));
    }
}

const SINGLE: ParallelLayout = ParallelLayout::SINGLE;

/// Losses of each token and every gradient of two micro-batches of uneven sequences are those of one rank, for every tensor
/// parallelism, sequence mode and cutting into chunks; with dp 5, which divides no parameter's rows, the padding stays zero.
/// Catches what is forgotten, done twice or mixed up between micro-batches at any seam of the model.
#[test]
fn model_divided_equals_whole() {
    for (name, config) in [("nemotron", nemotron()), ("llama tied", llama_tied()), ("reward", reward())] {
        let whole = train_on(&config, SINGLE, SequenceMode::Replicated, Finish::Called);
        for tp in [1, 2, 4] {
            for (pp, vp, dp) in [(1, 1, 5), (2, 1, 1), (2, 2, 5), (4, 1, 1)] {
                for sequence in [SequenceMode::Sharded, SequenceMode::Replicated] {
                    let layout = ParallelLayout { tp, pp, dp, vp };
                    let divided = train_on(&config, layout, sequence, Finish::Called);
                    assert_same(&divided, &whole, &format!("{name} {layout:?} {sequence:?}"));
                }
            }
        }
    }
}

/// Under sequence parallelism a rank's norm gradients cover its T/tp rows only, and the optimizer needs their sum over tp: without
/// it training goes on with gradients that are too small and differ between ranks, which is a classic silent bug. Matrices need no
/// such sum. Without sequence parallelism the gradients are whole, and a sum would count them tp times.
#[test]
fn norm_gradients_are_summed_over_tp() {
    let whole = train_on(&nemotron(), SINGLE, SequenceMode::Replicated, Finish::Called);
    for tp in [2, 4] {
        let layout = ParallelLayout { tp, ..SINGLE };
        let forgotten = train_on(&nemotron(), layout, SequenceMode::Sharded, Finish::Forgotten);
        for (name, expected) in &whole.gradients {
            let distance = forgotten.gradients[name].distance(expected);
            assert_eq!(distance > 0.1, name.contains("norm"), "tp {tp}: without the sum {name} differs by {distance:.2e}");
        }
        for sequence in [SequenceMode::Sharded, SequenceMode::Replicated] {
            let finished = train_on(&nemotron(), layout, sequence, Finish::Called);
            assert_same(&finished, &whole, &format!("tp {tp} {sequence:?}"));
        }
    }
}

/// Rows of padding in the embedding and the output layer can hold anything: losses and gradients keep their bits, and the padding
/// itself gets no gradient. Otherwise the softmax would leak probability to pieces that no tokenizer has.
#[test]
fn vocabulary_padding_takes_no_part() {
    for config in [nemotron(), llama_tied()] {
        for tp in [1, 2, 4] {
            let run = |garbage: Option<f32>| {
                threads::run(tp, |comm| {
                    let (device, scratch) = (Cpu::new(), Scratch::new());
                    let ctx =
                        Ctx { device: &device, tp: &*comm, scratch: &scratch, sequence: SequenceMode::Sharded, numerics: Numerics::Fast };
                    let mut chunks = chunks(&device, &config, ParallelLayout { tp, ..SINGLE }, comm.rank(), Purpose::Training);
                    for param in chunks[0].params_mut() {
                        let (first, columns) = (param.slice.offset[0], param.value.row_len());
                        if let (true, Some(garbage)) = (param.spec.shape[0] == config.padded_vocab(), garbage) {
                            let past = |i: usize| first + i / columns >= config.vocab_size;
                            let values = param.value.f32_mut().iter_mut().enumerate();
                            values.filter(|(i, _)| past(*i)).for_each(|(_, x)| *x = garbage);
                        }
                    }
                    let losses = forward_and_backward(&mut chunks, &ctx, &[micro_batch(&[9, 3, 8], 1)], Finish::Called);
                    for param in chunks[0].params() {
                        if param.spec.shape[0] == config.padded_vocab() {
                            let valid = config.vocab_size.saturating_sub(param.slice.offset[0]).min(param.slice.shape[0]);
                            let padding = param.grad().rows(valid..param.slice.shape[0]);
                            assert!(padding.f32().iter().all(|&x| x == 0.0), "{}: padding learns", param.spec.name);
                        }
                    }
                    (losses, gradients(&chunks))
                })
            };
            let clean = run(Some(0.0));
            // Finite, so that a product of a zero probability with it would still be a plain number, and nothing shows by NaN alone.
            for garbage in [None, Some(1e4)] {
                let found = run(garbage);
                for (rank, ((losses, gradients), (clean_losses, clean_gradients))) in found.iter().zip(&clean).enumerate() {
                    assert_eq!(losses, clean_losses, "tp {tp} rank {rank}: losses with {garbage:?} in the padding");
                    for (name, (_, expected)) in clean_gradients {
                        assert!(gradients[name].1 == *expected, "tp {tp} rank {rank}: gradient of {name} with {garbage:?} in the padding");
                    }
                }
            }
        }
    }
}

/// The global gradient norm counts each element of the global gradient once: norms that every tensor-parallel rank holds, and the
/// second copy of a tied embedding, must not count twice. A norm too large clips too much; nothing else would tell.
#[test]
fn replicated_parameters_are_counted_once() {
    for config in [nemotron(), llama_tied()] {
        // The gradient of element i of a parameter is a fixed number; its norm is known from the table alone.
        let element = |name: &str, i: usize| Random::new(23, name).normal(i as u64) as f32;
        let square = |name: &str, i: usize| f64::from(element(name, i)).powi(2);
        let squares = config.param_specs().into_iter().map(|spec| (0..spec.n_elements()).map(|i| square(&spec.name, i)).sum::<f64>());
        let expected = squares.sum::<f64>().sqrt();
        for (tp, pp, dp, vp) in [(1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 2, 1), (2, 2, 1, 1), (2, 2, 2, 2), (1, 4, 2, 1)] {
            let layout = ParallelLayout { tp, pp, dp, vp };
            let norms = threads::run(layout.world(), |world| grad_norm(&config, Groups::new(world, layout), element));
            for norm in norms {
                // Squares are added in f64; all are positive, so n roundings are at most n * eps of the sum.
                let n_elements: usize = config.param_specs().iter().map(|spec| spec.n_elements()).sum();
                let error = (norm - expected).abs() / expected;
                assert!(error <= f64::EPSILON * n_elements as f64, "{layout:?}: norm {norm}, expected {expected}");
            }
        }
    }
}

fn grad_norm(config: &ModelConfig, groups: Groups, element: impl Fn(&str, usize) -> f32) -> f64 {
    let (device, scratch) = (Cpu::new(), Scratch::new());
    let (layout, at) = (groups.layout, groups.at);
    let chunk = |i| Chunk::new(&device, config, &layout, at, i, DType::F32, Purpose::Training).unwrap();
    let mut chunks: Vec<Chunk> = (0..layout.vp).map(chunk).collect();
    for chunk in &mut chunks {
        let n_copies = if chunk.config().tied_embeddings && layout.n_chunks() > 1 { 2 } else { 1 };
        for param in chunk.params_mut() {
            // Powers of two, so that the sums over replicas and copies are exact.
            let parts = (layout.dp * if param.spec.name == "embedding.weight" { n_copies } else { 1 }) as f32;
            assert_eq!(param.is_replicated_over_tp(), param.spec.name.contains("norm"));
            let (slice, name) = (param.slice.clone(), param.spec.name.clone());
            let global_columns: usize = param.spec.shape[1..].iter().product();
            let (first, columns) = if slice.shape.len() == 1 { (0, 1) } else { (slice.offset[1], slice.shape[1]) };
            for (i, x) in param.grad_mut().f32_mut()[..slice.n_elements()].iter_mut().enumerate() {
                *x = element(&name, (slice.offset[0] + i / columns) * global_columns + first + i % columns) / parts;
            }
        }
    }
    let mut optimizer = ShardedAdamW::new(&device, &chunks, &layout, at).unwrap();
    let mut exchanges = Exchanges::new(&groups, Overlap::WithComputation);
    let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let mut during = exchanges.during(ctx, &mut optimizer);
    for (i, chunk) in chunks.iter_mut().enumerate() {
        chunk.each_part(&mut |part| during.gradients_done(i, part));
    }
    exchanges.finish_gradients(&mut chunks, &mut optimizer);
    optimizer.reduce_tied(&device, &scratch, &mut chunks, &groups);
    optimizer.grad_norm(&device, &chunks, &groups)
}

/// Initial weights are a function of seed, name and global index: the formula's numbers under every layout, and in bf16 the same
/// numbers rounded. Two layouts that start from different weights cannot be compared.
#[test]
fn initial_weights_do_not_depend_on_the_layout() {
    let (device, config) = (Cpu::new(), nemotron());
    for (tp, pp, dp, vp) in [(1, 1, 1, 1), (2, 2, 5, 2), (4, 1, 3, 1)] {
        let layout = ParallelLayout { tp, pp, dp, vp };
        for (rank, dtype) in (0..layout.world()).flat_map(|rank| [(rank, DType::F32), (rank, DType::BF16)]) {
            let at = layout.coords(rank);
            for chunk_idx in 0..vp {
                let mut chunk = Chunk::new(&device, &config, &layout, at, chunk_idx, dtype, Purpose::Training).unwrap();
                chunk.initialise(&device, SEED);
                for param in chunk.params() {
                    let found = param.weight().to_f32_vec();
                    let expected = expected_weights(param, dtype);
                    assert!(found == expected, "{} on rank {rank} of {layout:?} in {dtype:?}", param.spec.name);
                }
            }
        }
    }
}

fn expected_weights(param: &Param, dtype: DType) -> Vec<f32> {
    let noise = Random::new(SEED, &format!("init {}", param.spec.name));
    let value = |row: usize, column: usize| match param.spec.init {
        Init::Constant(value) => value,
        Init::Normal { std } => (std * noise.normal((row * param.spec.shape[1] + column) as u64)) as f32,
    };
    let slice = &param.slice;
    let (first, columns) = if slice.shape.len() == 1 { (0, 1) } else { (slice.offset[1], slice.shape[1]) };
    let values = (0..slice.n_elements()).map(|i| value(slice.offset[0] + i / columns, first + i % columns));
    values.map(|x| if dtype == DType::BF16 { half::bf16::from_f32(x).to_f32() } else { x }).collect()
}

/// Tokens added to the caches a few at a time, two sequences in one call, give the losses of the uncached forward, with heads and
/// vocabulary over ranks and blocks over chunks. A wrong slot, position or past would change them.
#[test]
fn cached_forward_equals_forward() {
    let lengths = [7, 5];
    for config in [nemotron(), llama_tied()] {
        for (tp, pp) in [(1, 1), (2, 1), (1, 2), (4, 2)] {
            let layout = ParallelLayout { tp, pp, ..SINGLE };
            let ranks = threads::run(tp, |comm| {
                let (device, scratch) = (Cpu::new(), Scratch::new());
                let ctx =
                    Ctx { device: &device, tp: &*comm, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
                let chunks = chunks(&device, &config, layout, comm.rank(), Purpose::Inference);
                let batch = micro_batch(&lengths, 3);
                let mut passed = None;
                let mut losses = Vec::new();
                for chunk in &chunks {
                    match chunk.forward(&ctx, passed.as_deref(), &batch, None) {
                        Output::Hidden(hidden) => passed = Some(hidden),
                        Output::TokenLosses(tokens) => losses = tokens.losses,
                        Output::Attributes(_) => unreachable!("a language model"),
                    }
                }
                (losses, cached_logits(&chunks, &ctx, &batch, lengths))
            });
            let logits = Matrix::beside(&ranks.iter().map(|(_, logits)| logits.clone()).collect::<Vec<_>>());
            let targets = micro_batch(&lengths, 3).targets;
            let loss = |t: usize| {
                let row = &logits.row(t)[..config.vocab_size];
                row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[targets.u32()[t] as usize]
            };
            let cached = Matrix::from_fn(1, logits.rows, |_, t| loss(t));
            let full = Matrix::from_fn(1, logits.rows, |_, t| f64::from(ranks[0].0[t]));
            cached.assert_close(&full, N_TERMS, DEPTH, &format!("{layout:?}"));
        }
    }
}

/// Logits [T, V/tp] in the batch's row order, after a call on another page that wants no row's logits: the first sequence in calls of
/// 3, 1, 3 tokens, the second of 1, 4, 0, in pages 2 and 0.
fn cached_logits(chunks: &[Chunk], ctx: &Ctx, batch: &MicroBatch, lengths: [usize; 2]) -> Matrix {
    let mut caches: Vec<_> = chunks.iter().map(|chunk| chunk.new_caches(ctx.device, 3).unwrap()).collect();
    assert_eq!(
        cached_call(chunks, ctx, (batch, &[0, 1, 2]), &[CacheSpan { rows: 0..3, past: 0, pages: vec![1] }], &mut caches, &[]).rows,
        0
    );
    let mut rows: Vec<Vec<f64>> = vec![Vec::new(); lengths[0] + lengths[1]];
    for pieces in [[0..3, 0..1], [3..4, 1..5], [4..7, 5..5]] {
        let (mut from, mut spans) = (Vec::new(), Vec::new());
        for (sequence, piece) in pieces.into_iter().enumerate().filter(|(_, piece)| !piece.is_empty()) {
            let start = from.len();
            from.extend(piece.clone().map(|t| batch.sequence_starts[sequence] + t));
            spans.push(CacheSpan { rows: start..from.len(), past: piece.start, pages: vec![[2, 0][sequence]] });
        }
        // Every row, last first: rows are returned in the order asked for.
        let wanted: Vec<usize> = (0..from.len()).rev().collect();
        let logits = cached_call(chunks, ctx, (batch, &from), &spans, &mut caches, &wanted);
        wanted.iter().enumerate().for_each(|(i, &row)| rows[from[row]] = logits.row(i).to_vec());
    }
    Matrix { rows: rows.len(), columns: rows[0].len(), values: rows.concat() }
}

/// One cached forward of these tokens of the batch through all chunks: logits of the wanted rows.
fn cached_call(
    chunks: &[Chunk],
    ctx: &Ctx,
    (batch, from): (&MicroBatch, &[usize]),
    spans: &[CacheSpan],
    caches: &mut [Vec<KvCache>],
    wanted: &[usize],
) -> Matrix {
    let pick = |ids: &Tensor| Tensor::from_u32(&[from.len()], &from.iter().map(|&t| ids.u32()[t]).collect::<Vec<_>>());
    let (tokens, positions) = (pick(&batch.tokens), pick(&batch.positions));
    let mut passed: Option<ScratchTensor> = None;
    for (chunk, caches) in chunks.iter().zip(caches) {
        let input = passed.as_deref().map_or(CachedInput::Tokens(&tokens), CachedInput::Hidden);
        match chunk.forward_cached(ctx, input, &positions, spans, caches, wanted) {
            CachedOutput::Hidden(hidden) => passed = Some(hidden),
            CachedOutput::Logits(logits) => return Matrix::of(&logits),
        }
    }
    assert!(wanted.is_empty(), "the last chunk gives the logits that are wanted");
    Matrix { rows: 0, columns: 0, values: Vec::new() }
}

/// After the first step, which fills the pool, a step takes no memory from the device; memory that grows with the steps ends a
/// long run. And what a temporary held before does not matter: after steps on other tokens, a step's losses and gradients have
/// the bits of a first step's.
#[test]
fn a_second_step_allocates_nothing_and_sees_nothing_of_the_first() {
    for (tp, sequence) in [(1, SequenceMode::Replicated), (2, SequenceMode::Sharded), (2, SequenceMode::Replicated)] {
        let layout = ParallelLayout { tp, pp: 2, dp: 1, vp: 2 };
        threads::run(tp, |comm: Box<dyn Communicator>| {
            type Gradients = BTreeMap<String, (Split, Matrix)>;
            // Losses, gradients and allocations so far of each step; the batches of a step have the shapes of every other's.
            let run = |steps: &[u64]| -> Vec<(Vec<f32>, Gradients, usize)> {
                let (device, scratch) = (Cpu::new(), Scratch::new());
                let ctx = Ctx { device: &device, tp: &*comm, scratch: &scratch, sequence, numerics: Numerics::Fast };
                let mut chunks = chunks(&device, &llama_tied(), layout, comm.rank(), Purpose::Training);
                let mut step = |&seed: &u64| {
                    let batches = [micro_batch(&[9, 3, 8], seed), micro_batch(&[10, 10], seed + 1)];
                    let params = chunks.iter_mut().flat_map(Chunk::params_mut);
                    params.for_each(|param| device.fill_zero(param.grad_mut()));
                    let losses = forward_and_backward(&mut chunks, &ctx, &batches, Finish::Called);
                    (losses, gradients(&chunks), device.memory().n_allocations)
                };
                steps.iter().map(&mut step).collect()
            };
            let (first, later) = (run(&[1]), run(&[5, 3, 1]));
            assert_eq!(later[0].2, later[1].2, "the second step allocated");
            assert_eq!(later[0].2, later[2].2, "the third step allocated");
            assert_eq!(later[2].0, first[0].0, "losses depend on earlier steps");
            for (name, (_, expected)) in &first[0].1 {
                assert!(later[2].1[name].1 == *expected, "the gradient of {name} depends on earlier steps");
            }
        });
    }
}
