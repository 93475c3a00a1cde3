//! Whole jobs with a batch-size ramp, phases, and a start from another run.

use crate::common::{tiny_recipe, train};
use crate::tools::{bits, differing, inspect, killed_after, ramp_and_phases, shards, step_dir, with_layout};
use std::path::Path;
use trireme::metrics::{self, Row};
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::{DecayShape, LrDecay, Moments, Pretrain, Start, Wsd};
use trireme::train::ledger::Ledger;
use trireme::train::pretrain::Ended;

fn rows(run: &Path) -> Vec<Row> {
    metrics::read(&run.join("metrics.jsonl")).unwrap()
}

/// (loss, norm, lr, tokens) of every step, as bits.
fn numbers(run: &Path) -> Vec<[u64; 4]> {
    rows(run).iter().map(|row| [row.loss.to_bits(), row.grad_norm.to_bits(), row.lr.to_bits(), row.consumed_tokens]).collect()
}

/// Killed after any step (in warm-up, at either switch of the ramp, before and in the second phase, after a skipped step) a run ends
/// with the bits of the undisturbed one: step, batch, rate, data, moments and statistics all follow from the samples consumed.
#[test]
fn a_run_resumes_exactly_at_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = ramp_and_phases(dir.path());
    recipe.parallel.dp = Some(2);
    let probe = dir.path().join("probe");
    train(&recipe, &probe, None).unwrap();
    // A limit between the two largest norms of the run skips one step at least: the largest.
    let mut norms: Vec<f64> = rows(&probe).iter().map(|row| row.grad_norm).collect();
    norms.sort_by(f64::total_cmp);
    recipe.health.max_grad_norm = Some((norms[6] + norms[7]) / 2.0);
    let straight = dir.path().join("straight");
    assert_eq!(train(&recipe, &straight, None).unwrap(), Ended::Finished);
    let ledger = Ledger::read(&straight.join("ledger.jsonl")).unwrap();
    let steps: Vec<(u64, usize, u64, u64)> = ledger.standing().map(|e| (e.step.step, e.step.phase, e.step.first, e.step.n)).collect();
    let expected = [(1, 0, 0, 4), (2, 0, 4, 4), (3, 0, 8, 4), (4, 0, 12, 8), (5, 0, 20, 8), (6, 0, 28, 12), (7, 1, 0, 12), (8, 1, 12, 12)];
    assert_eq!(steps, expected);
    assert!(ledger.entries.iter().any(|entry| entry.step.skipped.is_some()), "{ledger:?}");
    let last = bits(&straight, &recipe.model);
    for step in 1..8 {
        let resumed = dir.path().join(format!("resumed-{step}"));
        killed_after(&straight, step, &resumed);
        assert_eq!(train(&recipe, &resumed, None).unwrap(), Ended::Finished);
        assert_eq!(differing(&last, &bits(&resumed, &recipe.model)), Vec::<String>::new(), "killed after step {step}");
        assert_eq!(numbers(&straight), numbers(&resumed), "killed after step {step}");
        let again = Ledger::read(&resumed.join("ledger.jsonl")).unwrap();
        assert!(again.standing().map(|entry| &entry.step).eq(ledger.standing().map(|entry| &entry.step)), "killed after step {step}");
        assert_eq!(again.entries.len() as u64, 8 + (8 - step), "what was lost is still told");
    }
}

/// The ramp at 1, 2 and 4 replicas, changed at every switch as a growing cluster does it, is one run: the same samples at the same
/// steps with the same rates, losses equal but for the rounding of sums (n terms in f32: sqrt(n) eps, 8 for the depth).
#[test]
fn a_growing_number_of_replicas_is_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = ramp_and_phases(dir.path());
    let (single, grown) = (dir.path().join("single"), dir.path().join("grown"));
    train(&recipe, &single, None).unwrap();
    for (dp, stop_after) in [(1, Some(3)), (2, Some(5)), (4, None)] {
        train(&with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp, vp: 1 }), &grown, stop_after).unwrap();
    }
    let ledgers = [&single, &grown].map(|run| Ledger::read(&run.join("ledger.jsonl")).unwrap());
    assert!(ledgers[0].standing().map(|entry| &entry.step).eq(ledgers[1].standing().map(|entry| &entry.step)));
    assert_eq!(ledgers[1].jobs.iter().map(|job| (job.from_step, job.ranks)).collect::<Vec<_>>(), [(0, 1), (3, 2), (5, 4)]);
    let relative = 8.0 * f64::from(f32::EPSILON) * (12.0 * 16.0 * 61.0f64).sqrt();
    for (a, b) in rows(&single).iter().zip(&rows(&grown)) {
        assert_eq!((a.step, a.consumed_tokens, a.lr.to_bits()), (b.step, b.consumed_tokens, b.lr.to_bits()));
        assert!((a.loss - b.loss).abs() <= relative * a.loss, "step {}: {} and {}", a.step, a.loss, b.loss);
    }
    // 4 samples a step are no whole micro-batches on 8 replicas: told before anything is trained, with the steps that need it.
    let out = dir.path().join("too-wide");
    let error = train(&with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp: 8, vp: 1 }), &out, None).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().starts_with("planning steps 1..3: batch.ramp.0.global = 4 is not a multiple"), "{error}");
    // From step 5 on there are 12 a step, which 3 replicas can divide and not 8.
    let late = dir.path().join("late");
    train(&recipe, &late, Some(5)).unwrap();
    train(&with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp: 3, vp: 1 }), &late, None).unwrap();
}

/// The rates that steps are made with are the schedule's at the samples consumed, in each phase by itself.
#[test]
fn steps_take_the_rate_of_their_samples() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = ramp_and_phases(dir.path());
    recipe.optimizer.decay = LrDecay::Wsd(Wsd { samples: 20, shape: DecayShape::MinusSqrt });
    let run = dir.path().join("run");
    train(&recipe, &run, None).unwrap();
    let found: Vec<f64> = rows(&run).iter().map(|row| row.lr).collect();
    // Peak 1e-2, end 1e-3, warm-up 10 of 40 samples, decay from 20 on; then 1e-3 to 0 over 24.
    let wsd = |n: f64| 1e-3 + 9e-3 * (1.0 - ((n - 20.0) / 20.0).sqrt());
    let expected = [4e-3, 8e-3, 1e-2, 1e-2, wsd(28.0), wsd(40.0), 5e-4, 0.0];
    assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-16), "{found:?}, expected {expected:?}");
}

/// A phase is the same whether the recipe has it or another run begins with the checkpoint before it: data order from 0, rates of
/// its own, Adam going on. Catches a phase that reads on in the other's order, or restarts bias correction.
#[test]
fn a_phase_is_a_run_from_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = ramp_and_phases(dir.path());
    let whole = dir.path().join("whole");
    train(&recipe, &whole, None).unwrap();
    let phase = recipe.phase[0].clone();
    let mut continued = Pretrain { phase: vec![], data: phase.data, ..recipe.clone() };
    continued.batch.ramp = vec![];
    (continued.train.samples, continued.optimizer.lr, continued.optimizer.min_lr) = (phase.samples, phase.lr, phase.min_lr);
    (continued.optimizer.warmup_samples, continued.optimizer.decay) = (phase.warmup_samples, phase.decay);
    continued.start = Some(Start { checkpoint: step_dir(&whole, 6), moments: Moments::Keep });
    let out = dir.path().join("continued");
    train(&continued, &out, None).unwrap();
    assert_eq!(differing(&bits(&whole, &recipe.model), &bits(&out, &recipe.model)), Vec::<String>::new());
    let losses = |run: &Path| rows(run).iter().map(|row| row.loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(losses(&whole)[6..], losses(&out));
    // Where it came from is kept, and followed.
    let tree = inspect(&[out.to_str().unwrap(), "--lineage"]);
    assert!(tree.contains("start: checkpoint") && tree.contains("step-00000006"), "{tree}");
    // Without moments it is another run, but begins with the same weights: the same first loss.
    let mut reset = continued.clone();
    reset.start = Some(Start { checkpoint: step_dir(&whole, 6), moments: Moments::Reset });
    let out = dir.path().join("reset");
    train(&reset, &out, None).unwrap();
    assert_eq!(losses(&out)[0], losses(&whole)[6]);
    assert_ne!(losses(&out)[1], losses(&whole)[7]);
}

/// The recipe of continued training that ships for the quick start trains its two distributions in a row, here on a tiny model.
#[test]
fn the_shipped_continued_recipe_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm/recipes/quickstart_continued.toml");
    let shipped = Pretrain::load(&path, &[]).unwrap();
    let before = dir.path().join("before");
    let tiny = tiny_recipe(&shards(dir.path(), "a", 1));
    train(&tiny, &before, None).unwrap();
    let mut recipe = Pretrain { model: tiny.model, parallel: tiny.parallel, validation: None, ..shipped };
    recipe.batch = tiny.batch;
    recipe.start.as_mut().unwrap().checkpoint = before;
    let phases = [&mut recipe.train.samples, &mut recipe.phase[0].samples];
    phases.into_iter().for_each(|samples| *samples = 16);
    let sources = recipe.data.train.iter_mut().chain(&mut recipe.phase[0].data.train);
    sources.enumerate().for_each(|(i, source)| source.shards = shards(dir.path(), &format!("s{i}"), i as u64));
    let out = dir.path().join("out");
    assert_eq!(train(&recipe, &out, None).unwrap(), Ended::Finished);
    let rates: Vec<f64> = rows(&out).iter().map(|row| row.lr).collect();
    assert_eq!(rates.len(), 4);
    assert!(rates.windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
}
