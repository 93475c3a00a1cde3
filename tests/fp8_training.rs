//! Training with products in E4M3: what layers compute, in f64; the same bits under every layout; whole runs beside those in f32.

mod common;
mod numerics_runs;
#[allow(dead_code)] // the operations' tests read more of it
#[path = "operations/oracle.rs"]
mod oracle;
#[allow(dead_code)] // the layers' tests use more of it
#[path = "model_parallel/ranks.rs"]
mod ranks;

use common::{counting_documents, tiny_recipe, write_megatron};
use numerics_runs::{Run, model as odd_model, resumed, train};
use oracle::{e4m3, nearest_e4m3};
use ranks::{DIVISIONS, Matrix, Rank, gradient, join_gradients, join_tokens, on_ranks};
use std::path::Path;
use trireme::checkpoint;
use trireme::checkpoint::compare::{self, Verdict};
use trireme::device::{Activation, Fp8Scales, NormKind};
use trireme::metrics;
use trireme::model::chunk::MicroBatch;
use trireme::model::config::{ModelConfig, Split};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::linear::{ColumnParallelLinear, RowParallelLinear};
use trireme::model::numerics::{Canonical, Numerics};
use trireme::parallel::layout::ParallelLayout;
use trireme::prove::tolerance::Tolerance;
use trireme::recipe::{Linear, Mode, Precision, Pretrain, Recompute, ScheduleKind};
use trireme::tensor::DType;

/// Rows starts[i]..starts[i + 1] together as the numbers that their E4M3 elements stand for, by the definition: the smallest power of two
/// with which the largest is at most 448, and the nearest code. Here no element is near the edges of f32.
fn rounded(x: &Matrix, starts: &[usize]) -> Matrix {
    let scales = most(x, starts).into_iter().map(|most| (-60..60).map(|k| 2f64.powi(k)).find(|scale| most / scale <= 448.0).unwrap());
    let scales: Vec<f64> = scales.collect();
    Matrix::from_fn(x.rows, x.columns, |row, column| e4m3(nearest_e4m3(x.at(row, column) / scales[row])) * scales[row])
}

/// Of each row: the largest of the rows that it shares a scale with.
fn most(x: &Matrix, starts: &[usize]) -> Vec<f64> {
    let of = |ends: &[usize]| {
        let most = (ends[0]..ends[1]).flat_map(|row| x.row(row)).fold(0f64, |most, x| most.max(x.abs()));
        vec![most; ends[1] - ends[0]]
    };
    starts.windows(2).flat_map(of).collect()
}

/// Rows of sizes from 2^-20 to 2^20 and elements of 2^29 sizes in each: one scale for all rows, or for a rank's part of a row, would round
/// most of them to other numbers.
fn uneven(name: &str, rows: usize, columns: usize) -> Matrix {
    let noise = Matrix::random(name, rows, columns, 1.0);
    Matrix::from_fn(rows, columns, |row, column| {
        let size = 2f64.powi((11 * row % 41) as i32 - 20 - (13 * column % 29) as i32);
        f64::from((noise.at(row, column) * size) as f32)
    })
}

/// Elements of `found` are off by what sums of n terms in f32 may be (n roundings of 2^-24 of the terms' sizes) from the product of the
/// rounded numbers, and by what rounding to E4M3 may do from that of the numbers themselves: each factor is off by at most 2^-4 of
/// itself, or 2^-10 of its scale, which is at most 2^-18 of the largest with that scale (448 > 2^8, scales up to twice as large as needed).
fn check(found: &Matrix, (a, b): (&Matrix, &Matrix), (starts_a, starts_b): (&[usize], &[usize]), what: &str) {
    let (of_a, of_b) = (rounded(a, starts_a), rounded(b, starts_b));
    let off = |x: &Matrix, starts: &[usize]| {
        let most = most(x, starts);
        Matrix::from_fn(x.rows, x.columns, |row, column| (x.at(row, column).abs() / 16.0).max(most[row] * 2f64.powi(-17)))
    };
    let (off_a, off_b) = (off(a, starts_a), off(b, starts_b));
    for (i, j) in (0..a.rows).flat_map(|i| (0..b.rows).map(move |j| (i, j))) {
        let sum = |term: &dyn Fn(usize) -> f64| (0..a.columns).map(term).sum::<f64>();
        let (exact, of_rounded) = (sum(&|k| a.at(i, k) * b.at(j, k)), sum(&|k| of_a.at(i, k) * of_b.at(j, k)));
        let size = sum(&|k| (of_a.at(i, k) * of_b.at(j, k)).abs());
        let (value, allowed) = (found.at(i, j), size * a.columns as f64 * 2f64.powi(-24));
        assert!(
            (value - of_rounded).abs() <= allowed,
            "{what} [{i}, {j}]: {value:e} is not {of_rounded:e}, the product of rounded numbers"
        );
        let by_rounding = sum(&|k| {
            let (a, b, off_a, off_b) = (a.at(i, k).abs(), b.at(j, k).abs(), off_a.at(i, k), off_b.at(j, k));
            a * off_b + b * off_a + off_a * off_b
        });
        assert!((value - exact).abs() <= by_rounding + allowed, "{what} [{i}, {j}]: {value:e} is too far from {exact:e}");
    }
}

const T: usize = 12;

/// Where samples begin among the T tokens, and the end.
const SAMPLES: [usize; 4] = [0, 1, 6, T];

/// Each row by itself, or all.
fn starts_of(scales: Fp8Scales, rows: usize) -> Vec<usize> {
    if scales == Fp8Scales::Rows { (0..=rows).collect() } else { vec![0, rows] }
}

/// y and dx of a rank's layer, in fast numerics dW too.
type OfRank<'a> = dyn Fn(&Rank, Fp8Scales, Mode) -> Vec<Matrix> + Sync + 'a;

/// Hands `judge` the results of the ranks of every division, with scales of every kind, and which tokens share one: each its own, all of
/// them, or in reproducible numerics those of a sample.
fn every_division(of_rank: &OfRank, judge: impl Fn((usize, SequenceMode), &[Vec<Matrix>], (Fp8Scales, &[usize]), &str)) {
    for division in DIVISIONS {
        for (scales, mode) in
            [Fp8Scales::Rows, Fp8Scales::Tensor].into_iter().flat_map(|scales| [(scales, Mode::Fast), (scales, Mode::Reproducible)])
        {
            let parts = on_ranks(division, |rank| {
                if mode == Mode::Fast {
                    return of_rank(rank, scales, mode);
                }
                let batch = MicroBatch::new(rank.ctx.device, [&[0; T]; 3], &[0.0; T], SAMPLES.to_vec()).unwrap();
                let Numerics::Reproducible(canonical) = Numerics::of_inference(rank.ctx.device) else { unreachable!() };
                let numerics = Numerics::Reproducible(Canonical { batch: Some(&batch), ..canonical });
                of_rank(&Rank { ctx: Ctx { numerics, ..rank.ctx }, layout: rank.layout, at: rank.at }, scales, mode)
            });
            let tokens = if scales == Fp8Scales::Tensor && mode == Mode::Reproducible { SAMPLES.to_vec() } else { starts_of(scales, T) };
            judge(division, &parts, (scales, &tokens), &format!("{division:?} {scales:?} {mode:?}"));
        }
    }
}

fn each(parts: &[Vec<Matrix>], i: usize) -> Vec<Matrix> {
    parts.iter().map(|part| part[i].clone()).collect()
}

/// y = x W^T with the outputs divided, dx = dy W, dW += dy^T x: the first two are those of numbers rounded with a scale for each token
/// and channel or each tensor, whichever ranks hold parts of them; the last is that of the numbers themselves. Breaks with a scale that is
/// of a rank's part of a row only, of the wrong dim, of another sample, or of an earlier tensor, and with codes that are not transposed.
#[test]
fn column_parallel_layers_multiply_rounded_numbers() {
    let (x, w, dy) = (uneven("x", T, 32), uneven("w", 64, 32), uneven("dy", T, 64));
    let of_rank = |rank: &Rank, scales: Fp8Scales, mode: Mode| {
        let mut linear = ColumnParallelLinear { weight: rank.param("w", &w, Split::Rows) };
        linear.weight.train_in_fp8(rank.ctx.device, scales).unwrap();
        let x = rank.local(&x);
        let y = Matrix::of(&linear.forward(&rank.ctx, &x));
        if mode == Mode::Reproducible {
            return vec![y, Matrix::of(&linear.backward_input(&rank.ctx, &rank.columns(&dy)))];
        }
        vec![y, Matrix::of(&linear.backward(&rank.ctx, &x, &rank.columns(&dy))), gradient(&linear.weight)]
    };
    every_division(&of_rank, |division, parts, (scales, tokens), what| {
        check(&Matrix::beside(&each(parts, 0)), (&x, &w), (tokens, &starts_of(scales, w.rows)), &format!("{what} y"));
        let dx = join_tokens(division, &each(parts, 1));
        check(&dx, (&dy, &w.transposed()), (tokens, &starts_of(scales, w.columns)), &format!("{what} dx"));
        if parts[0].len() > 2 {
            let dw = join_gradients(division, Split::Rows, &each(parts, 2));
            dw.assert_close(&dy.transposed().times(&x), T, 1, &format!("{what} dW"));
        }
    });
}

/// The same with the inputs divided.
#[test]
fn row_parallel_layers_multiply_rounded_numbers() {
    let (x, w, dy) = (uneven("x", T, 64), uneven("w", 32, 64), uneven("dy", T, 32));
    let of_rank = |rank: &Rank, scales: Fp8Scales, mode: Mode| {
        let mut linear = RowParallelLinear { weight: rank.param("w", &w, Split::Columns) };
        linear.weight.train_in_fp8(rank.ctx.device, scales).unwrap();
        let x = rank.columns(&x);
        let y = Matrix::of(&linear.forward(&rank.ctx, &x));
        if mode == Mode::Reproducible {
            return vec![y, Matrix::of(&linear.backward_input(&rank.ctx, &rank.local(&dy)))];
        }
        vec![y, Matrix::of(&linear.backward(&rank.ctx, &x, &rank.local(&dy))), gradient(&linear.weight)]
    };
    every_division(&of_rank, |division, parts, (scales, tokens), what| {
        let y = join_tokens(division, &each(parts, 0));
        check(&y, (&x, &w), (tokens, &starts_of(scales, w.rows)), &format!("{what} y"));
        check(&Matrix::beside(&each(parts, 1)), (&dy, &w.transposed()), (tokens, &starts_of(scales, w.columns)), &format!("{what} dx"));
        if parts[0].len() > 2 {
            let dw = join_gradients(division, Split::Columns, &each(parts, 2));
            dw.assert_close(&dy.transposed().times(&x), T, 1, &format!("{what} dW"));
        }
    });
}

/// A model whose weights are in steps of 16 on four ranks.
fn model() -> ModelConfig {
    ModelConfig { n_layers: 4, hidden: 32, head_dim: 8, rotary_fraction: 0.5, ffn_hidden: 64, ..odd_model() }
}

fn run(dtype: DType) -> Run {
    Run { linear: Linear::Fp8, ..Run::reference(model(), dtype) }
}

fn of(tp: usize, pp: usize, dp: usize, vp: usize) -> ParallelLayout {
    ParallelLayout { tp, pp, dp, vp }
}

/// In reproducible numerics loss, norms, gradients and weights are the same bits under every layout, micro-batch, recompute, schedule
/// and storage of rows, and others than without FP8. Breaks with any scale that depends on a layout, and with weights that are not
/// rounded again after an update.
#[test]
fn every_layout_gives_the_same_bits() {
    let llama = ModelConfig { norm: NormKind::RmsNorm, activation: Activation::Swiglu, tied_embeddings: true, ..model() };
    let tensor = Linear::Fp8Tensor;
    for (dtype, model, linear) in [
        (DType::F32, model(), Linear::Fp8),
        (DType::BF16, model(), Linear::Fp8),
        (DType::BF16, llama.clone(), Linear::Fp8),
        (DType::F32, model(), tensor),
        (DType::BF16, llama, tensor),
    ] {
        let reference = Run { model, linear, ..run(dtype) };
        let expected = train(&reference, 3);
        let stored = train(&Run { linear: Linear::Stored, ..reference.clone() }, 3);
        assert!(stored.first_difference(&expected).is_some(), "FP8 changes nothing");
        let zero_bubble = ScheduleKind::ZeroBubbleH1;
        for (layout, micro, sequence, recompute, schedule) in [
            (of(2, 1, 1, 1), 1, SequenceMode::Replicated, Recompute::None, ScheduleKind::OneFOneB),
            (of(4, 1, 1, 1), 4, SequenceMode::Sharded, Recompute::Full, ScheduleKind::OneFOneB),
            (of(1, 4, 1, 1), 2, SequenceMode::Replicated, Recompute::Selective, zero_bubble),
            (of(1, 2, 2, 2), 2, SequenceMode::Replicated, Recompute::None, ScheduleKind::OneFOneB),
            (of(1, 1, 4, 1), 4, SequenceMode::Replicated, Recompute::None, ScheduleKind::OneFOneB),
            (of(2, 2, 2, 1), 2, SequenceMode::Sharded, Recompute::Selective, zero_bubble),
        ] {
            let other = Run { layout, micro, sequence, recompute, schedule, ..reference.clone() };
            assert!(other.fits());
            assert_eq!(train(&other, 3).first_difference(&expected), None, "{other:?}");
        }
        let (first, second) = (Run { layout: of(2, 2, 1, 1), ..reference.clone() }, Run { layout: of(4, 1, 2, 1), ..reference.clone() });
        assert_eq!(resumed(&first, &second, 2, 3).first_difference(&expected), None, "{dtype:?}: moved after two steps");
    }
}

/// In fast numerics sums in other orders end now and then in another code. From equal weights the loss and each gradient stay within
/// the tolerance of `prove` for FP8, whose derivation stands there.
#[test]
fn fast_numerics_stay_within_the_tolerance() {
    for linear in [Linear::Fp8, Linear::Fp8Tensor] {
        check_fast(&Run { mode: Mode::Fast, linear, ..run(DType::F32) });
    }
}

fn check_fast(reference: &Run) {
    let expected = train(reference, 1).steps.remove(0);
    let tolerance = Tolerance::new(&reference.model, DType::F32, 16 * numerics_runs::SEQ_LEN, 4).with_fp8(reference.model.n_layers);
    for (layout, micro) in [(of(2, 1, 1, 1), 1), (of(4, 1, 2, 1), 2), (of(1, 2, 1, 1), 4)] {
        let found = train(&Run { layout, micro, ..reference.clone() }, 1).steps.remove(0);
        let near = |a: f64, b: f64| (a - b).abs() <= tolerance.gradient() * b.abs();
        assert!(near(found.loss, expected.loss) && near(found.grad_norm, expected.grad_norm), "{layout:?}");
        for (name, expected) in &expected.gradients {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let apart = norm(&mut found.gradients[name].iter().zip(expected).map(|(a, b)| a - b));
            let size = norm(&mut expected.iter().copied());
            assert!(apart <= tolerance.gradient() * size, "{layout:?}: {name} is {apart} from one of {size}");
        }
    }
}

fn recipe(dir: &Path) -> Pretrain {
    let shards = dir.join("shards");
    if !shards.exists() {
        write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    }
    let mut recipe = tiny_recipe(&shards);
    (recipe.model.hidden, recipe.model.ffn_hidden) = (32, 64);
    recipe.numerics.linear = Linear::Fp8;
    recipe
}

fn losses(run: &Path) -> Vec<f64> {
    metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(|row| row.loss).collect()
}

/// A run in FP8 loses what the same run loses without, in every step, within 0.25 nats.
///
/// Each operand of a product is off by at most 2^-4 of itself, evenly up and down, so a root mean square of 2^-4 / sqrt(3), and a
/// product of two by r = 2^-4 sqrt(2/3) = 0.051 of itself. A block adds to the stream what two products one after another make, twice:
/// off by 2 r = 0.1 of what it adds at most, as are the sums of such blocks, and the logits, which are linear in them, by 0.1 of
/// themselves. A token with probability p of its target and logits of up to ln 61 + 2 = 6 above the rest then moves its loss by
/// (1 - p) 0.6 to first order, up or down, and by p (1 - p) 0.6^2 / 2 < 0.045, always up, to second: with p between 1/61 and 1 the mean of
/// 128 tokens by 0.6 / sqrt(128) = 0.053 and 0.045, together below 0.1. Gradients have errors of the same 0.1 of themselves in other
/// directions in each step, which moves the course of the weights by less than the draw of the samples does; as much again and half is left
/// for that. That the loss falls by ten times as much is asked too: a product that comes out wrong shows at once.
#[test]
fn a_run_follows_the_one_without() {
    let dir = tempfile::tempdir().unwrap();
    for (precision, tp) in [(Precision::F32, 1), (Precision::Bf16, 2)] {
        let mut recipe = recipe(dir.path());
        (recipe.train.precision, recipe.parallel.tp, recipe.parallel.dp) = (precision, tp, Some(2));
        (recipe.train.samples, recipe.optimizer.eps) = (80 * 8, 1e-8);
        let mut all = Vec::new();
        for linear in [Linear::Fp8, Linear::Fp8Tensor, Linear::Stored] {
            recipe.numerics.linear = linear;
            let out = dir.path().join(format!("{precision:?}-{linear:?}"));
            common::train(&recipe, &out, None).unwrap();
            all.push(losses(&out));
        }
        let stored = all.pop().unwrap();
        assert!(stored[0] - stored.last().unwrap() > 2.0, "{precision:?}: {stored:?}");
        for (losses, scales) in all.iter().zip(["a scale for each token and channel", "one for each tensor"]) {
            let furthest = losses.iter().zip(&stored).map(|(a, b)| (a - b).abs()).fold(0f64, f64::max);
            println!("{precision:?}, {scales}: {} to {} nats, furthest {furthest}", losses[0], losses.last().unwrap());
            assert!(furthest > 0.0 && furthest <= 0.25, "{precision:?}, {scales}: {furthest} nats apart, {losses:?}, {stored:?}");
            assert!(losses[0] - losses.last().unwrap() > 2.0, "{precision:?}, {scales}: {losses:?}");
        }
    }
}

/// Stopped after each step and resumed, a run in fast numerics has the bits of one that was not: no scale comes from an earlier step.
#[test]
fn a_resumed_run_has_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe(dir.path());
    (recipe.parallel.tp, recipe.parallel.dp, recipe.train.precision) = (2, Some(1), Precision::Bf16);
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    common::train(&recipe, &whole, None).unwrap();
    for stop_after in [Some(1), Some(2), None] {
        common::train(&recipe, &parts, stop_after).unwrap();
    }
    assert_eq!(losses(&whole), losses(&parts));
    let [whole, parts] = [whole, parts].map(|run| checkpoint::open(&run).unwrap());
    let compared = compare::diff(&whole, &parts).unwrap();
    assert!(compared.iter().all(|tensor| tensor.verdict == Verdict::Equal), "{compared:?}");
    assert!(compared.len() > 4 * 4, "{compared:?}");
}

/// A rank's part that is not in steps of 16 is refused with the parameter's name, before anything is written of a step; so is going on
/// without FP8 with a run that was made with it, unless that is meant.
#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut narrow = recipe(dir.path());
    (narrow.parallel.tp, narrow.model.ffn_hidden) = (4, 96);
    let error = common::train(&narrow, &dir.path().join("narrow"), None).unwrap_err().to_string();
    let all = ["layers.0.mlp.up.weight has 24 x 32", "no multiples of 16", "numerics.linear = \"stored\""];
    assert!(all.iter().all(|part| error.contains(part)), "{error}");
    // One dim is as bad as the other.
    for (rows, columns) in [(32, 24), (24, 32)] {
        let refused = on_ranks(DIVISIONS[0], |rank| {
            let mut param = rank.param("w", &Matrix::from_fn(rows, columns, |_, _| 1.0), Split::Columns);
            param.train_in_fp8(rank.ctx.device, Fp8Scales::Rows).unwrap_err().to_string()
        });
        assert!(refused[0].contains(&format!("w has {rows} x {columns}")), "{refused:?}");
    }
    let mut begun = recipe(dir.path());
    let out = dir.path().join("begun");
    common::train(&begun, &out, Some(1)).unwrap();
    begun.numerics.linear = Linear::Stored;
    let error = common::train(&begun, &out, None).unwrap_err().to_string();
    assert!(error.contains("numerics.linear = \"fp8\"") && error.contains("--accept-changed recipe"), "{error}");
}
