//! Steps whose numbers are not to be trusted, through whole jobs: who skips, what stays, and when it ends.

use crate::common::{counting_documents, tiny_recipe, train, train_accepting, write_megatron};
use crate::tools::{bits, differing, inspect, step_dir, with_layout};
use std::path::{Path, PathBuf};
use trireme::checkpoint::{self, Piece, Wanted};
use trireme::comm::solo::Solo;
use trireme::data::order::DataOrder;
use trireme::data::shards::{Split, TokenShards};
use trireme::metrics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::recipe::{Moments, Pretrain, Start};
use trireme::tensor::{DType, Tensor};
use trireme::train::identity::Changed;
use trireme::train::ledger::Ledger;

/// The token whose embedding is damaged, in few documents.
const DAMAGED: u32 = 60;

/// A recipe of 12 steps that starts from weights in which the embedding of one rare token is not a number.
fn damaged(dir: &Path) -> Pretrain {
    let shards = dir.join("shards");
    let mut documents = counting_documents(60, DAMAGED, 1);
    documents.iter_mut().step_by(9).for_each(|document| document[3] = DAMAGED);
    write_megatron(&shards, "train", &documents);
    let mut recipe = tiny_recipe(&shards);
    train(&recipe, &dir.join("sound"), Some(1)).unwrap();
    let stored = checkpoint::open(&dir.join("sound")).unwrap();
    let kinds = ["weights", "adam_m", "adam_v"];
    let names: Vec<_> = recipe.model.param_specs().into_iter().flat_map(|spec| kinds.map(|kind| (kind, spec.clone()))).collect();
    let tensors: Vec<Tensor> = names.iter().map(|(kind, spec)| damaged_tensor(&stored, kind, &spec.name, &spec.shape)).collect();
    let piece = |((kind, spec), tensor): (&(&str, trireme::model::config::ParamSpec), _)| {
        let name = format!("{kind}/{}", spec.name);
        Piece { name, global_shape: spec.shape.clone(), slice: Slice::whole(&spec.shape), tensor }
    };
    let pieces: Vec<Piece> = names.iter().zip(&tensors).map(piece).collect();
    let start = dir.join("damaged");
    checkpoint::save(&start, stored.meta(), &pieces, &Solo::new()).unwrap();
    recipe.start = Some(Start { checkpoint: start, moments: Moments::Keep });
    recipe.train.samples = 12 * 8;
    recipe.checkpoint.every_steps = 1;
    recipe
}

fn damaged_tensor(stored: &checkpoint::Stored, kind: &str, name: &str, shape: &[usize]) -> Tensor {
    let mut tensor = Tensor::host(shape, DType::F32, None).unwrap();
    stored.read(&mut [Wanted { name: format!("{kind}/{name}"), slice: Slice::whole(shape), tensor: &mut tensor }]).unwrap();
    if kind == "weights" && name.contains("embed") {
        let (row, bytes) = (DAMAGED as usize, 4 * shape[1]);
        let nan: Vec<u8> = std::iter::repeat_n(f32::NAN.to_le_bytes(), shape[1]).flatten().collect();
        tensor.write_bytes(row * bytes, &nan);
    }
    tensor
}

/// Steps (from 1) whose batch has the damaged token among its inputs.
fn steps_with_damage(recipe: &Pretrain) -> Vec<u64> {
    let shards = TokenShards::open(&recipe.data.train[0].shards, Split::Train).unwrap();
    let order = DataOrder::new(vec![(shards, 1.0)], recipe.batch.seq_len, recipe.data.seed).unwrap();
    let mut sample = vec![0; recipe.batch.seq_len + 1];
    let mut has = |index: u64| {
        order.read(index, &mut sample).unwrap();
        sample[..recipe.batch.seq_len].contains(&DAMAGED)
    };
    (1..=12).filter(|step| (8 * (step - 1)..8 * step).any(&mut has)).collect()
}

fn skipped(run: &Path) -> Vec<u64> {
    let ledger = Ledger::read(&run.join("ledger.jsonl")).unwrap();
    ledger.standing().filter(|entry| entry.step.skipped.is_some()).map(|entry| entry.step.step).collect()
}

/// With a row of the embedding that is not a number, exactly the steps that read it are skipped, on every layout: weights and
/// moments keep their bits, the other steps train, the ledger has the samples. One rank that decided alone, or one that looked at
/// the loss only, would spread the damage to every weight.
#[test]
fn steps_that_meet_nan_are_skipped_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = damaged(dir.path());
    recipe.health.max_skips_in_a_row = 12;
    let expected = steps_with_damage(&recipe);
    assert!((1..=6).contains(&expected.len()), "the corpus makes a case of some steps: {expected:?}");
    for (tp, pp, dp) in [(1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 4)] {
        let run = dir.path().join(format!("run-{tp}-{pp}-{dp}"));
        train(&with_layout(&recipe, ParallelLayout { tp, pp, dp, vp: 1 }), &run, None).unwrap();
        assert_eq!(skipped(&run), expected, "tp {tp} pp {pp} dp {dp}");
        let rows = metrics::read(&run.join("metrics.jsonl")).unwrap();
        let not_finite: Vec<u64> = rows.iter().filter(|row| !row.loss.is_finite()).map(|row| row.step).collect();
        assert_eq!(not_finite, expected);
        for step in 2..=12 {
            let (before, after) = (bits(&step_dir(&run, step - 1), &recipe.model), bits(&step_dir(&run, step), &recipe.model));
            let changed = differing(&before, &after);
            assert_eq!(changed.is_empty(), expected.contains(&step), "step {step}: {changed:?}");
        }
        // Bias correction counts updates: that of the run it started from, and those that were made.
        let stored = checkpoint::open(&run).unwrap();
        assert_eq!(stored.meta().trainer["updates"], 1 + 12 - expected.len());
        // Nothing but the damaged row is not a number in the end.
        let nans: usize = bits(&run, &recipe.model).iter().flat_map(|(_, bits)| bits).filter(|&&b| f32::from_bits(b).is_nan()).count();
        assert_eq!(nans, recipe.model.hidden);
        let page = inspect(&["ledger", run.to_str().unwrap()]);
        let first = 8 * (expected[0] - 1);
        let line = format!("step {}  samples {first}..{} of phase main, skipped: loss NaN", expected[0], first + 8);
        assert!(page.contains(&line), "{line:?} is not in\n{page}");
    }
}

/// Retention keeps the checkpoint before the first skipped step, and the one before it, which a sound step has followed, until a later
/// one has proven as good: with keep_last = 1 all that would be left of a run in trouble is a checkpoint of the trouble.
#[test]
fn checkpoints_from_before_the_trouble_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = damaged(dir.path());
    recipe.health.max_skips_in_a_row = 12;
    recipe.checkpoint.keep_last = Some(1);
    let expected = steps_with_damage(&recipe);
    let is_sound = |step: &u64| !expected.contains(step);
    let run = dir.path().join("run");
    // One job a step: what retention goes by survives in the checkpoint.
    for step in 1..=12 {
        train(&recipe, &run, Some(step)).unwrap();
        let kept: Vec<u64> = checkpoint::list(&run).unwrap().into_iter().map(|(step, _)| step).collect();
        // The newest checkpoint after which a sound step came, and the one that it led to; before the first such, the first.
        let proven = (1..step).rev().find(|before| is_sound(&(before + 1)));
        let mut wanted: Vec<u64> = proven.map_or(vec![1], |proven| vec![proven, proven + 1]).into_iter().chain([step]).collect();
        wanted.dedup();
        assert_eq!(kept, wanted, "after step {step}, skipped {expected:?}");
    }
}

/// Past the limit the job ends with exit code 4 on every rank, one line says which steps and why, and what is left is the
/// checkpoint from before, from which a changed recipe goes on.
#[test]
fn past_the_limit_the_run_ends_with_what_was_sound() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = damaged(dir.path());
    let first = steps_with_damage(&recipe)[0];
    assert!(first > 1, "a sound step comes first");
    recipe.health.max_skips_in_a_row = 0;
    let run = dir.path().join("run");
    let error = train(&with_layout(&recipe, ParallelLayout { tp: 2, pp: 1, dp: 2, vp: 1 }), &run, None).unwrap_err();
    let line = error.to_string();
    assert_eq!(error.exit_code(), 4, "{line}");
    let kept = format!("step-{:08} is kept", first - 1);
    for fragment in [&format!("step {first}: "), "1 steps in a row", "max_skips_in_a_row = 0", "loss NaN", &kept, "samples "] {
        assert!(line.contains(fragment), "{fragment:?} is not in {line}");
    }
    assert_eq!(checkpoint::list(&run).unwrap().last().map(|(step, _)| *step), Some(first - 1));
    recipe.health.max_skips_in_a_row = 12;
    assert_eq!(train(&recipe, &run, None).unwrap_err().exit_code(), 3, "a changed recipe is meant or refused");
    train_accepting(&recipe, &run, None, &[Changed::Recipe]).unwrap();
    assert_eq!(skipped(&run), steps_with_damage(&recipe));
}

/// A spike of the loss, here a few samples of another language in one batch, is skipped by its z-score at the same step on one rank
/// and on four.
#[test]
fn a_spike_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let shards: PathBuf = dir.path().join("shards");
    // Sixteen tokens in a row that always follow each other, and one stretch of noise.
    let noise = trireme::rng::Random::new(3, "noise");
    let mut tokens: Vec<u32> = (0..16 * 400u32).map(|i| i % 16).collect();
    for (i, token) in tokens[16 * 200..16 * 202].iter_mut().enumerate() {
        *token = (noise.bits(i as u64) % 61) as u32;
    }
    write_megatron(&shards, "train", &[tokens]);
    let mut recipe = tiny_recipe(&shards);
    recipe.train.samples = 8 * 49;
    recipe.optimizer.eps = 1e-8;
    recipe.health.window = 8;
    let order = DataOrder::new(vec![(TokenShards::open(&shards, Split::Train).unwrap(), 1.0)], 16, recipe.data.seed).unwrap();
    let noisy = |step: u64| (8 * (step - 1)..8 * step).any(|index| (199..202).contains(&order.locate(index).1));
    let expected: Vec<u64> = (1..=49).filter(|&step| noisy(step)).collect();
    for dp in [1, 4] {
        let run = dir.path().join(format!("run-{dp}"));
        train(&with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp, vp: 1 }), &run, None).unwrap();
        let found = skipped(&run);
        assert!(!found.is_empty() && found.iter().all(|step| expected.contains(step)), "{found:?} of {expected:?}");
        let reasons = Ledger::read(&run.join("ledger.jsonl")).unwrap();
        let reason = reasons.entries.iter().find_map(|entry| entry.step.skipped.clone()).unwrap();
        assert!(reason.contains("deviations above the mean") && reason.contains("health.loss_z = 6"), "{reason}");
    }
}
