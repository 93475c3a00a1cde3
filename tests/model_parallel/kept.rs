//! What is kept between forward and backward: with recompute, and with the backward in two halves, gradients keep their bits and
//! memory is the formula's.

use super::whole::{SEED, llama_tied, micro_batch, nemotron, reward};
use std::collections::BTreeMap;
use trireme::comm::{Communicator, threads};
use trireme::device::cpu::Cpu;
use trireme::device::{Device, Scratch, ScratchTensor};
use trireme::model::chunk::{Chunk, ChunkDeferred, ChunkSaved, MicroBatch, Output, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::Recompute;
use trireme::tensor::DType;

/// How the backward of a step runs.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Backward {
    Whole,
    /// Weight gradients after all input gradients.
    Halves,
}

#[derive(Clone, Copy)]
struct Case<'a> {
    config: &'a ModelConfig,
    layout: ParallelLayout,
    sequence: SequenceMode,
    dtype: DType,
    /// Of layer l: [l % len].
    recompute: &'a [Recompute],
    backward: Backward,
}

/// Losses and gradients of one step, as bits, by name and copy.
type Bits = (Vec<u32>, BTreeMap<(String, usize), Vec<u32>>);

fn chunks(case: Case, device: &dyn Device, tp: usize) -> Vec<Chunk> {
    let Case { layout, config, .. } = case;
    let chunk = |i: usize| {
        let at = Coords { tp, pp: i % layout.pp, dp: 0 };
        let mut chunk = Chunk::new(device, config, &layout, at, i / layout.pp, case.dtype, Purpose::Training).unwrap();
        chunk.initialise(device, SEED);
        let layers = layout.layers(at.pp, i / layout.pp, config.n_layers);
        chunk.set_recompute(&layers.map(|layer| case.recompute[layer % case.recompute.len()]).collect::<Vec<_>>());
        chunk
    };
    (0..layout.n_chunks()).map(chunk).collect()
}

/// Forwards of all micro-batches, then backwards of all.
fn step(case: Case, ctx: &Ctx, chunks: &mut [Chunk], batches: &[MicroBatch]) -> Vec<u32> {
    let mut losses = Vec::new();
    let mut all_saved: Vec<Vec<ChunkSaved>> = Vec::new();
    for batch in batches {
        let (mut passed, mut saved_of_batch): (Option<ScratchTensor>, _) = (None, Vec::new());
        for chunk in chunks.iter() {
            let mut saved = ChunkSaved::default();
            match chunk.forward(ctx, passed.as_deref(), batch, Some(&mut saved)) {
                Output::Hidden(hidden) => passed = Some(hidden),
                Output::TokenLosses(tokens) => losses.extend(tokens.losses.into_iter().map(f32::to_bits)),
                Output::Attributes(values) => losses.extend(values.into_iter().map(f32::to_bits)),
            }
            saved_of_batch.push(saved);
        }
        all_saved.push(saved_of_batch);
    }
    let mut deferred: Vec<(usize, usize, ChunkDeferred)> = Vec::new();
    for (micro, (batch, saved_of_batch)) in batches.iter().zip(all_saved).enumerate() {
        let mut passed: Option<ScratchTensor> = None;
        for (i, (chunk, saved)) in chunks.iter_mut().zip(saved_of_batch).enumerate().rev() {
            passed = match case.backward {
                Backward::Whole => chunk.backward(ctx, batch, saved, passed.as_deref()),
                Backward::Halves => {
                    let (dinput, rest) = chunk.backward_input(ctx, batch, saved, passed.as_deref());
                    deferred.push((i, micro, rest));
                    dinput
                }
            };
        }
    }
    for (i, micro, rest) in deferred {
        chunks[i].backward_weights(ctx, &batches[micro], rest);
    }
    chunks.iter_mut().for_each(|chunk| chunk.finish_gradients(ctx));
    losses
}

fn bits_of(case: Case) -> Vec<Bits> {
    threads::run(case.layout.tp, |tp: Box<dyn Communicator>| {
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let ctx = Ctx { device: &device, tp: &*tp, scratch: &scratch, sequence: case.sequence, numerics: Numerics::Fast };
        let mut chunks = chunks(case, &device, tp.rank());
        let losses = step(case, &ctx, &mut chunks, &[micro_batch(&[9, 3, 8], 1), micro_batch(&[5, 7], 2)]);
        let gradient = |(i, chunk): (usize, &Chunk)| {
            let of = |param: &trireme::model::param::Param| {
                let bits = param.grad().f32().iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
                ((param.spec.name.clone(), i), bits)
            };
            chunk.params().into_iter().map(of).collect::<Vec<_>>()
        };
        (losses, chunks.iter().enumerate().flat_map(gradient).collect())
    })
}

/// Losses and all gradients have the bits of the step that keeps everything and runs the backward whole: for each kind of recompute
/// and layers of several kinds, both halves apart or not, on 1, 2 and 4 ranks with and without sequence parallelism, in f32 and
/// bf16, both families, tied embeddings, a reward head, one chunk and several. An operation made again on other inputs, a gradient added
/// twice or in another order, or a tensor overwritten while it is still needed, changes a bit.
#[test]
fn recompute_and_halves_keep_the_bits() {
    use Recompute::{Full, None, Selective};
    let kinds: [&[Recompute]; 4] = [&[None], &[Selective], &[Full], &[Full, None, Selective]];
    for config in [&nemotron(), &llama_tied(), &reward()] {
        for (tp, sequence) in
            [(1, SequenceMode::Replicated), (2, SequenceMode::Sharded), (2, SequenceMode::Replicated), (4, SequenceMode::Sharded)]
        {
            for (pp, vp) in [(1, 1), (2, 2)] {
                for dtype in [DType::F32, DType::BF16] {
                    let layout = ParallelLayout { tp, pp, dp: 1, vp };
                    let plain = Case { config, layout, sequence, dtype, recompute: kinds[0], backward: Backward::Whole };
                    let expected = bits_of(plain);
                    assert!(expected[0].1.values().any(|bits| bits.iter().any(|&x| x != 0)), "no gradient at all");
                    for recompute in kinds {
                        for backward in [Backward::Whole, Backward::Halves] {
                            if recompute == kinds[0] && backward == Backward::Whole {
                                continue;
                            }
                            let found = bits_of(Case { recompute, backward, ..plain });
                            let what = format!("{recompute:?} {backward:?} {layout:?} {sequence:?} {dtype:?}");
                            for (rank, (found, expected)) in found.iter().zip(&expected).enumerate() {
                                assert!(found.0 == expected.0, "{what}: losses on rank {rank}");
                                for (name, bits) in &expected.1 {
                                    assert!(found.1[name] == *bits, "{what}: gradient of {name:?} on rank {rank}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Bytes that a micro-batch of `t` tokens keeps in all layers and the head, by the fields of the saved structs (letters of
/// `device`, T' = T/tp under sequence parallelism, b bytes a value).
fn kept_bytes(case: Case, t: usize, what: Kept) -> usize {
    let (config, tp) = (case.config, case.layout.tp);
    let b = case.dtype.bytes();
    let local = if case.sequence == SequenceMode::Sharded { t / tp } else { t };
    let width = local * config.hidden * b;
    let (heads, d) = (config.n_heads / tp, config.head_dim);
    let qkv = t * (config.n_heads + 2 * config.n_kv_heads) / tp * d * b;
    let (mixed, lse) = (t * heads * d * b, heads * t * 4);
    let activated = t * config.ffn_hidden / tp * b;
    let raised = activated * config.activation.inputs_per_output();
    let stats = 2 * local * 2 * 4;
    let logits = t * config.padded_vocab() / tp * b;
    let layer = |kind: Recompute| match kind {
        Recompute::None => 4 * width + stats + qkv + mixed + lse + raised + activated,
        Recompute::Selective => 4 * width + stats + qkv + raised,
        Recompute::Full => width,
    };
    match what {
        // Head: its input and the norm's output, statistics, logits, maximum and sum of each token.
        Kept::Saved => {
            let layers = (0..config.n_layers).map(|i| layer(case.recompute[i % case.recompute.len()])).sum::<usize>();
            layers + 2 * width + stats / 2 + logits + 2 * t * 4
        }
        // The gradient of the embedding's output is kept too.
        Kept::Deferred => config.n_layers * (4 * width + qkv + mixed + raised + activated) + width + logits + width,
    }
}

/// What is counted.
#[derive(Clone, Copy, PartialEq)]
enum Kept {
    Saved,
    Deferred,
}

/// Peak device memory of a step that keeps `n` micro-batches of 32 tokens at once, on the first rank.
fn peak_bytes(case: Case, n: usize, what: Kept) -> usize {
    let peaks = threads::run(case.layout.tp, |tp: Box<dyn Communicator>| {
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let ctx = Ctx { device: &device, tp: &*tp, scratch: &scratch, sequence: case.sequence, numerics: Numerics::Fast };
        let mut chunks = chunks(case, &device, tp.rank());
        let batches: Vec<MicroBatch> = (0..n as u64).map(|i| micro_batch(&[32], i)).collect();
        if what == Kept::Saved {
            step(case, &ctx, &mut chunks, &batches);
            return device.memory().peak_bytes;
        }
        let mut deferred = Vec::new();
        for batch in &batches {
            let mut saved = ChunkSaved::default();
            chunks[0].forward(&ctx, None, batch, Some(&mut saved));
            deferred.push(chunks[0].backward_input(&ctx, batch, saved, None).1);
        }
        for (batch, rest) in batches.iter().zip(deferred) {
            chunks[0].backward_weights(&ctx, batch, rest);
        }
        device.memory().peak_bytes
    });
    peaks[0]
}

/// One micro-batch more in flight costs exactly the bytes of the fields that its recompute keeps, to the byte: of a layer
/// 4 T'H + T (A+2G) D/tp + T A D/tp + .., less what selective makes again, or T'H alone for full. Waiting for its weight gradients a
/// micro-batch keeps no more than between forward and backward, which is why ZB-H1 needs no more memory than 1F1B.
#[test]
fn memory_in_flight_is_the_formula() {
    use Recompute::{Full, None, Selective};
    let kinds: [&[Recompute]; 4] = [&[None], &[Selective], &[Full], &[Full, None, Selective]];
    for config in [&nemotron(), &llama_tied()] {
        for (tp, sequence) in [(1, SequenceMode::Replicated), (2, SequenceMode::Sharded), (2, SequenceMode::Replicated)] {
            for dtype in [DType::F32, DType::BF16] {
                let layout = ParallelLayout { tp, ..ParallelLayout::SINGLE };
                let mut kept_before = usize::MAX;
                for recompute in kinds {
                    let case = Case { config, layout, sequence, dtype, recompute, backward: Backward::Whole };
                    let grows = |what| peak_bytes(case, 5, what) - peak_bytes(case, 4, what);
                    let expected = kept_bytes(case, 32, Kept::Saved);
                    assert_eq!(grows(Kept::Saved), expected, "{recompute:?} tp {tp} {sequence:?} {dtype:?}");
                    let deferred = kept_bytes(case, 32, Kept::Deferred);
                    assert_eq!(grows(Kept::Deferred), deferred, "deferred, {recompute:?} tp {tp} {sequence:?} {dtype:?}");
                    if recompute == kinds[0] {
                        assert!(deferred <= expected, "{deferred} bytes deferred, {expected} saved");
                    }
                    if recompute.len() == 1 {
                        assert!(expected < kept_before, "{recompute:?} keeps no less than the kind before it");
                        kept_before = expected;
                    }
                }
            }
        }
    }
}

/// Gradients accumulate in f32 whatever the weights are stored as: a micro-batch seen n = 256 times gives n times its gradient up to
/// the roundings of n additions in f32, n * eps / 2. Accumulated in bf16 (8 bits) the sum would stop growing where a term is below
/// half a unit in its last place, after 2^8 to 2^9 of them, and be off by far more than that.
#[test]
fn gradients_accumulate_in_f32() {
    let (n, config) = (256, nemotron());
    let case = Case {
        config: &config,
        layout: ParallelLayout::SINGLE,
        sequence: SequenceMode::Replicated,
        dtype: DType::BF16,
        recompute: &[Recompute::None],
        backward: Backward::Whole,
    };
    let sum_of = |n: usize| {
        let solo = trireme::comm::solo::Solo::new();
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let ctx = Ctx { device: &device, tp: &solo, scratch: &scratch, sequence: case.sequence, numerics: Numerics::Fast };
        let mut chunks = chunks(case, &device, 0);
        for _ in 0..n {
            step(case, &ctx, &mut chunks, &[micro_batch(&[9, 3], 1)]);
        }
        chunks[0].params().into_iter().map(|param| (param.spec.name.clone(), param.grad().f32().to_vec())).collect::<Vec<_>>()
    };
    for ((name, once), (_, sum)) in sum_of(1).iter().zip(&sum_of(n)) {
        for (i, (once, sum)) in once.iter().zip(sum).enumerate() {
            let expected = f64::from(*once) * n as f64;
            // A gain's gradient adds rows in blocks, not the finished sum of each micro-batch: as many roundings for each row.
            let allowed = 12.0 * n as f64 * f64::from(f32::EPSILON) / 2.0 * expected.abs();
            assert!((f64::from(*sum) - expected).abs() <= allowed, "{name}[{i}]: {n} times {once} is {sum}");
        }
    }
}
