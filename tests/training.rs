//! Whole training jobs, through the loop that the binary runs: every layout against one rank, resume, refusal.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::Path;
use trireme::checkpoint::{self, Wanted};
use trireme::metrics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::recipe::{Precision, Pretrain, ScheduleKind};
use trireme::tensor::{DType, Tensor};
use trireme::train::pretrain::Ended;

/// All tensors of one kind in a run's newest checkpoint, whole.
fn tensors(run: &Path, recipe: &Pretrain, kind: &str) -> Vec<(String, Vec<f32>)> {
    let stored = checkpoint::open(run).unwrap();
    recipe
        .model
        .param_specs()
        .into_iter()
        .map(|spec| {
            let mut tensor = Tensor::host(&spec.shape, DType::F32, None).unwrap();
            let name = format!("{kind}/{}", spec.name);
            stored.read(&mut [Wanted { name: name.clone(), slice: Slice::whole(&spec.shape), tensor: &mut tensor }]).unwrap();
            (name, tensor.to_f32_vec())
        })
        .collect()
}

fn with_layout(recipe: &Pretrain, layout: ParallelLayout) -> Pretrain {
    let mut recipe = recipe.clone();
    (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.vp) = (layout.tp, layout.pp, layout.vp);
    recipe.parallel.dp = Some(layout.dp);
    recipe.parallel.schedule = if layout.vp > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
    recipe
}

/// Every layout of at most eight ranks that the tiny model allows.
fn layouts() -> Vec<ParallelLayout> {
    let mut all = Vec::new();
    for tp in [1, 2, 4] {
        for pp in [1, 2, 4] {
            for dp in [1, 2, 4, 8] {
                for vp in [1, 2] {
                    // Interleaving wants several stages, and four layers make at most four chunks.
                    if tp * pp * dp <= 8 && (vp == 1 || pp == 2) {
                        all.push(ParallelLayout { tp, pp, dp, vp });
                    }
                }
            }
        }
    }
    all
}

/// Largest difference of two runs' losses, gradient norms and weights against what f32 sums in another order allow.
///
/// Forward and backward values are sums of at most n = 8 * 16 * 61 terms in f32: relative error k * eps * sqrt(n) with k = 8
/// for the depth of the model. AdamW divides by sqrt(v) + eps with eps = 1e-2, so an error dg of a gradient moves a weight by
/// at most lr * dg / eps = dg a step; gradients are clipped to norm 1.
fn assert_same_training(reference: &Path, other: &Path, recipe: &Pretrain, what: &str) {
    let relative = 8.0 * f64::from(f32::EPSILON) * (8.0 * 16.0 * 61.0f64).sqrt();
    let (a, b) = (metrics::read(&reference.join("metrics.jsonl")).unwrap(), metrics::read(&other.join("metrics.jsonl")).unwrap());
    assert_eq!(a.len() as u64, recipe.plan().n_steps());
    for (a, b) in a.iter().zip(&b) {
        assert!((a.loss - b.loss).abs() <= relative * a.loss, "{what} step {}: loss {} and {}", a.step, a.loss, b.loss);
        let norm = (a.grad_norm - b.grad_norm).abs();
        assert!(norm <= relative * a.grad_norm, "{what} step {}: norm {} and {}", a.step, a.grad_norm, b.grad_norm);
    }
    let allowed = recipe.plan().n_steps() as f64 * relative;
    for kind in ["weights", "adam_m", "adam_v"] {
        for ((name, a), (_, b)) in tensors(reference, recipe, kind).iter().zip(&tensors(other, recipe, kind)) {
            let worst = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            assert!(worst <= allowed, "{what}: {name} differs by {worst:.2e}, allowed {allowed:.2e}");
        }
    }
}

fn shards(dir: &Path) -> std::path::PathBuf {
    let shards = dir.join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    write_megatron(&shards, "validation", &counting_documents(10, 61, 2));
    shards
}

/// Three steps under every layout of <= 8 ranks give the losses, norms, weights and moments of one rank. Catches any gradient
/// that is counted twice or not at all, wrong shards, wrong sample assignment, wrong messages.
#[test]
fn every_layout_trains_like_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = tiny_recipe(&shards(dir.path()));
    let single = dir.path().join("single");
    train(&with_layout(&recipe, ParallelLayout::SINGLE), &single, None).unwrap();
    for layout in layouts() {
        let out = dir.path().join(format!("{layout:?}"));
        train(&with_layout(&recipe, layout), &out, None).unwrap();
        assert_same_training(&single, &out, &recipe, &format!("{layout:?}"));
    }
}

/// The same without sequence parallelism, with several samples a micro-batch, with GPipe, with tied embeddings, and with
/// Llama's norm and activation: the other branches of the layout-dependent code.
#[test]
fn variants_train_like_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_recipe(&shards(dir.path()));
    let mut variants = Vec::new();
    let mut replicated = base.clone();
    replicated.parallel.sequence_parallel = false;
    variants.push(("replicated", replicated));
    let mut tied = base.clone();
    tied.model.tied_embeddings = true;
    variants.push(("tied", tied));
    let mut llama = base.clone();
    llama.model.norm = trireme::device::NormKind::RmsNorm;
    llama.model.activation = trireme::device::Activation::Swiglu;
    llama.model.rotary_fraction = 1.0;
    variants.push(("llama", llama));
    let mut gpipe = base.clone();
    gpipe.parallel.schedule = ScheduleKind::GPipe;
    gpipe.batch.micro = 2;
    variants.push(("gpipe", gpipe));
    for (name, recipe) in variants {
        let single = dir.path().join(format!("{name}-single"));
        train(&with_layout(&recipe, ParallelLayout::SINGLE), &single, None).unwrap();
        for (tp, pp, dp, vp) in [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 2, 2, 1), (2, 2, 1, 2), (1, 4, 2, 1)] {
            let layout = ParallelLayout { tp, pp, dp, vp };
            let mut here = with_layout(&recipe, layout);
            if vp == 1 {
                here.parallel.schedule = recipe.parallel.schedule;
            }
            let out = dir.path().join(format!("{name}-{layout:?}"));
            if here.check(layout.world()).is_err() {
                assert_eq!(name, "gpipe", "only micro-batches of two samples may not fit a layout");
                continue;
            }
            train(&here, &out, None).unwrap();
            assert_same_training(&single, &out, &recipe, &format!("{name} {layout:?}"));
        }
    }
}

/// Stopped and resumed, a run ends with the bits of the undisturbed run; in f32 and in bf16, where the f32 master weights and
/// not the rounded ones must be what is restored.
#[test]
fn resume_is_bit_exact() {
    let dir = tempfile::tempdir().unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let mut recipe = tiny_recipe(&shards(dir.path()));
        recipe.train.precision = precision;
        recipe.train.samples = 5 * 8;
        let layout = ParallelLayout { tp: 2, pp: 1, dp: 2, vp: 1 };
        let recipe = with_layout(&recipe, layout);
        let (straight, stopped) = (dir.path().join(format!("straight-{precision:?}")), dir.path().join(format!("stopped-{precision:?}")));
        assert_eq!(train(&recipe, &straight, None).unwrap(), Ended::Finished);
        assert_eq!(train(&recipe, &stopped, Some(2)).unwrap(), Ended::StoppedAsPlanned);
        assert_eq!(train(&recipe, &stopped, None).unwrap(), Ended::Finished);
        assert_eq!(train(&recipe, &stopped, None).unwrap(), Ended::WasFinished);
        for kind in ["weights", "adam_m", "adam_v"] {
            assert_eq!(tensors(&straight, &recipe, kind), tensors(&stopped, &recipe, kind), "{kind} {precision:?}");
        }
        let losses = |run: &Path| metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(|row| row.loss).collect::<Vec<_>>();
        assert_eq!(losses(&straight), losses(&stopped));
    }
}

/// A checkpoint written under one layout resumes under another, as if the layout had been that from the start.
#[test]
fn resume_under_another_layout() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = tiny_recipe(&shards(dir.path()));
    let single = dir.path().join("single");
    train(&with_layout(&recipe, ParallelLayout::SINGLE), &single, None).unwrap();
    let moved = dir.path().join("moved");
    let before = with_layout(&recipe, ParallelLayout { tp: 2, pp: 2, dp: 1, vp: 2 });
    let after = with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp: 4, vp: 1 });
    train(&before, &moved, Some(1)).unwrap();
    // The layout is part of the recipe but not of the run's identity.
    train(&after, &moved, None).unwrap();
    assert_same_training(&single, &moved, &recipe, "moved");
}

/// The loss falls on a language that can be learned: the sign of the update and the targets' shift are right.
#[test]
fn a_tiny_model_learns() {
    let dir = tempfile::tempdir().unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let mut recipe = tiny_recipe(&shards(dir.path()));
        recipe.train.precision = precision;
        recipe.train.samples = 60 * 8;
        recipe.optimizer.eps = 1e-8;
        let out = dir.path().join(format!("learn-{precision:?}"));
        train(&recipe, &out, None).unwrap();
        let rows = metrics::read(&out.join("metrics.jsonl")).unwrap();
        let (first, last) = (rows[0].loss, rows[rows.len() - 1].loss);
        // ln 61 = 4.11 to begin with; the language has 0.9 * ln(1/0.9) + 0.1 * ln(61 / 0.1) = 0.74 nats a token.
        assert!((first - 61f64.ln()).abs() < 0.7, "{precision:?} starts at {first}");
        assert!(last < 2.5 && last > 0.5, "{precision:?} ends at {last}");
    }
}

/// A run directory that belongs to another recipe is refused on every rank, and left as it is.
#[test]
fn another_recipe_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = with_layout(&tiny_recipe(&shards(dir.path())), ParallelLayout { tp: 1, pp: 1, dp: 2, vp: 1 });
    let out = dir.path().join("run");
    train(&recipe, &out, Some(1)).unwrap();
    let before = std::fs::read(out.join("metrics.jsonl")).unwrap();
    recipe.train.seed += 1;
    let error = train(&recipe, &out, None).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("seed"), "{error}");
    assert_eq!(before, std::fs::read(out.join("metrics.jsonl")).unwrap());
}
