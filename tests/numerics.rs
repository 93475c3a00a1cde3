//! Reproducible numerics: loss, gradient norm, every gradient by name and the weights are the same bits however the work is
//! divided, and in fast numerics they are not.

mod common;
mod numerics_runs;

use common::{counting_documents, tiny_recipe, write_megatron};
use numerics_runs::{Run, Trace, model, resumed, train};
use trireme::checkpoint::{self, Wanted};
use trireme::device::cpu::Isa;
use trireme::device::{Activation, NormKind};
use trireme::metrics;
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::SequenceMode;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::recipe::{Mode, Precision, Recompute, ScheduleKind};
use trireme::tensor::{DType, Tensor};

const N_STEPS: u64 = 2;

fn llama_tied() -> ModelConfig {
    ModelConfig { norm: NormKind::RmsNorm, activation: Activation::Swiglu, tied_embeddings: true, ..model() }
}

const RECOMPUTES: [Recompute; 3] = [Recompute::None, Recompute::Selective, Recompute::Full];

/// Every run of at most eight ranks that fits, for these micro-batches, with and without sequence parallelism, with recompute given.
fn table(reference: &Run, micros: &[usize], recomputes: &[Recompute]) -> Vec<Run> {
    let mut runs = Vec::new();
    for (tp, pp) in [1, 2, 4].into_iter().flat_map(|tp| [1, 2, 4].map(|pp| (tp, pp))) {
        for (vp, dp) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
            for (&micro, &recompute) in micros.iter().flat_map(|micro| recomputes.iter().map(move |recompute| (micro, recompute))) {
                for sequence in [SequenceMode::Replicated, SequenceMode::Sharded] {
                    let layout = ParallelLayout { tp, pp, dp, vp };
                    runs.push(Run { layout, micro, recompute, sequence, ..reference.clone() });
                }
            }
        }
    }
    runs.retain(Run::fits);
    runs
}

fn check(reference: &Run, expected: &Trace, runs: &[Run]) {
    assert!(expected.steps.iter().all(|step| step.grad_norm > 0.1 && step.loss > 1.0), "nothing is learnt");
    let started = std::time::Instant::now();
    for run in runs {
        let found = train(run, expected.steps.len() as u64);
        assert_eq!(found.first_difference(expected), None, "{run:?} and {reference:?}");
    }
    println!("{} runs in {:?}: {:.1} s", runs.len(), reference.dtype, started.elapsed().as_secs_f64());
}

fn check_all(reference: Run, micros: &[usize], recomputes: &[Recompute]) {
    let expected = train(&reference, N_STEPS);
    check(&reference, &expected, &table(&reference, micros, recomputes));
}

/// tp 1, 2, 4 x pp 1, 2, 4 x vp 1, 2 x dp 1, 2 x micro 1, 2, 4 x recompute x sequence parallelism in f32. Breaks when any sum has an
/// order that one of them decides.
#[test]
fn every_layout_gives_the_same_bits_in_f32() {
    check_all(Run::reference(model(), DType::F32), &[1, 2, 4], &RECOMPUTES);
}

/// The same in bf16 storage, where the kinds of recompute and the schedules take turns. Breaks also when something is rounded to bf16
/// before its sum over ranks is whole.
#[test]
fn every_layout_gives_the_same_bits_in_bf16() {
    let reference = Run::reference(model(), DType::BF16);
    let runs = table(&reference, &[1, 2, 4], &[Recompute::None]).into_iter().enumerate();
    let schedules = [ScheduleKind::OneFOneB, ScheduleKind::ZeroBubbleH1];
    let runs: Vec<Run> = runs.map(|(i, run)| Run { recompute: RECOMPUTES[i % 3], schedule: schedules[i / 3 % 2], ..run }).collect();
    check(&reference, &train(&reference, N_STEPS), &runs);
}

/// Llama's norm and activation, and one embedding used twice: by one chunk, by two chunks of a stage, by two stages. Its two
/// gradients would be added sample by sample in the first case and as wholes in the others.
#[test]
fn tied_embeddings_give_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        check_all(Run::reference(llama_tied(), dtype), &[2], &[Recompute::None]);
    }
}

/// A reward model: its layer is on every rank, which under fast numerics only the first one's gradient counts of.
#[test]
fn reward_models_give_the_same_bits() {
    let rated = ModelConfig { head: HeadKind::Reward(5), ..model() };
    let reference = Run::reference(rated, DType::BF16);
    let expected = train(&reference, N_STEPS);
    let of = |tp, pp, dp| ParallelLayout { tp, pp, dp, vp: 1 };
    let runs = [(of(2, 1, 1), 4), (of(4, 2, 1), 2), (of(1, 1, 4), 2), (of(2, 1, 2), 8), (of(1, 2, 2), 1)];
    let sequence = |layout: ParallelLayout| if layout.tp > 1 { SequenceMode::Sharded } else { SequenceMode::Replicated };
    for (layout, micro) in runs {
        let run = Run { layout, micro, sequence: sequence(layout), ..reference.clone() };
        assert_eq!(train(&run, N_STEPS).first_difference(&expected), None, "{run:?}");
    }
}

/// Twelve samples are four blocks of three: blocks begin and end inside of micro-batches of two, and four replicas have one each.
#[test]
fn batches_that_are_no_power_of_two_give_the_same_bits() {
    let reference = Run { global: 12, ..Run::reference(model(), DType::BF16) };
    let expected = train(&reference, N_STEPS);
    let layouts = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 4), (4, 1, 2)];
    let layouts = layouts.map(|(tp, pp, dp)| ParallelLayout { tp, pp, dp, vp: 1 });
    let sequence = |layout: ParallelLayout| if layout.tp > 1 { SequenceMode::Sharded } else { SequenceMode::Replicated };
    let mut runs: Vec<Run> = Vec::new();
    for (layout, micro) in layouts.into_iter().flat_map(|layout| [1, 2, 3, 6, 12].map(|micro| (layout, micro))) {
        runs.push(Run { layout, micro, sequence: sequence(layout), ..reference.clone() });
    }
    runs.retain(Run::fits);
    assert!(runs.len() > 15, "{} runs", runs.len());
    check(&reference, &expected, &runs);
}

/// On processors without AVX-512, and without any vectors that we know, products take another path.
#[test]
fn other_processors_give_the_same_bits_under_every_layout() {
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable] {
        for dtype in [DType::F32, DType::BF16] {
            let reference = Run { isa, ..Run::reference(model(), dtype) };
            let expected = train(&reference, 1);
            let (layout, sequence) = (ParallelLayout { tp: 4, pp: 1, dp: 2, vp: 1 }, SequenceMode::Sharded);
            let tp = Run { layout, sequence, micro: 2, ..reference.clone() };
            let pp = Run { layout: ParallelLayout { tp: 2, pp: 2, dp: 1, vp: 2 }, micro: 4, ..reference.clone() };
            check(&reference, &expected, &[tp, pp]);
        }
    }
}

/// Moved to another layout in the middle, a run goes on as if it had always been there.
#[test]
fn resuming_under_another_layout_gives_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        let reference = Run::reference(model(), dtype);
        let expected = train(&reference, 3);
        let first = Run { layout: ParallelLayout { tp: 2, pp: 2, dp: 2, vp: 1 }, micro: 2, ..reference.clone() };
        let second = Run { layout: ParallelLayout { tp: 4, pp: 2, dp: 1, vp: 2 }, sequence: SequenceMode::Sharded, ..reference.clone() };
        for (a, b, at) in [(&first, &second, 1), (&second, &reference, 2), (&reference, &first, 1)] {
            assert_eq!(resumed(a, b, at, 3).first_difference(&expected), None, "{a:?} to {b:?} in step {at}");
        }
    }
}

/// In fast numerics tensor parallelism, data parallelism and the size of a micro-batch each change bits. If they did not, the tests
/// above would prove nothing.
#[test]
fn fast_numerics_differ_between_layouts() {
    for dtype in [DType::F32, DType::BF16] {
        let reference = Run { mode: Mode::Fast, ..Run::reference(model(), dtype) };
        let expected = train(&reference, 1);
        let of = |tp, dp| ParallelLayout { tp, pp: 1, dp, vp: 1 };
        for (layout, micro) in [(of(2, 1), 1), (of(1, 2), 1), (of(1, 1), 2)] {
            let other = Run { layout, micro, ..reference.clone() };
            assert!(train(&other, 1).first_difference(&expected).is_some(), "{other:?} has the bits of {reference:?}");
        }
        // And reproducible numerics are another order than fast ones.
        let reproducible = Run { mode: Mode::Reproducible, ..reference.clone() };
        assert!(train(&reproducible, 1).first_difference(&expected).is_some());
    }
}

/// Through the loop that the binary runs, with real shards and checkpoints: metrics and every tensor of the last checkpoint.
#[test]
fn jobs_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let shards = dir.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    recipe.numerics.mode = Mode::Reproducible;
    recipe.train.precision = Precision::Bf16;
    let with = |tp, pp, dp, vp, micro| {
        let mut recipe = recipe.clone();
        (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.vp, recipe.parallel.dp) = (tp, pp, vp, Some(dp));
        recipe.parallel.schedule = if vp > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
        recipe.batch.micro = micro;
        recipe
    };
    let tensors = |run: &std::path::Path| {
        let stored = checkpoint::open(run).unwrap();
        let mut all = Vec::new();
        for (spec, kind) in recipe.model.param_specs().iter().flat_map(|spec| ["master", "adam_m", "adam_v"].map(|kind| (spec, kind))) {
            let mut tensor = Tensor::host(&spec.shape, DType::F32, None).unwrap();
            let name = format!("{kind}/{}", spec.name);
            stored.read(&mut [Wanted { name: name.clone(), slice: Slice::whole(&spec.shape), tensor: &mut tensor }]).unwrap();
            all.push((name, tensor.f32().iter().map(|x| x.to_bits()).collect::<Vec<u32>>()));
        }
        let rows = metrics::read(&run.join("metrics.jsonl")).unwrap();
        (rows.iter().map(|row| (row.loss.to_bits(), row.grad_norm.to_bits())).collect::<Vec<_>>(), all)
    };
    let single = dir.path().join("single");
    common::train(&with(1, 1, 1, 1, 1), &single, None).unwrap();
    let moved = dir.path().join("moved");
    common::train(&with(2, 2, 2, 1, 2), &moved, Some(1)).unwrap();
    common::train(&with(2, 2, 1, 2, 4), &moved, Some(2)).unwrap();
    common::train(&with(1, 1, 4, 1, 2), &moved, None).unwrap();
    assert_eq!(tensors(&single), tensors(&moved));
}
