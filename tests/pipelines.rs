//! Schedules, recompute, uneven stages and overlapped exchanges in whole training jobs: the same bits wherever the sums are the same,
//! the training of one rank everywhere; and when exchanges start and are waited for.

mod common;

use common::{counting_documents, tiny_model, tiny_recipe, train, write_megatron};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use trireme::checkpoint::{self, Wanted};
use trireme::comm::{Communicator, Groups, Pending, Recv, ReduceOp, Send, Staging, UsePieces, threads};
use trireme::device::Scratch;
use trireme::device::cpu::Cpu;
use trireme::metrics;
use trireme::model::chunk::{MicroBatch, Part};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::schedule::{self, Messages, PipelineShape};
use trireme::parallel::slice::Slice;
use trireme::recipe::{
    EndWeights, Layers, Parallel, Precision, Pretrain, Recompute, RecomputePlan, RecomputeRange, ScheduleKind, Validation,
};
use trireme::tensor::{DType, Tensor};
use trireme::train::exchanges::{During, Exchanges, Overlap};
use trireme::train::executor::{self, Between, Keep};
use trireme::train::optimizer::{ShardedAdamW, Update};
use trireme::train::pretrain::Ended;
use trireme::train::state::TrainState;

/// Losses and norms of each step, then weights and moments of the end.
#[derive(PartialEq)]
struct Run {
    steps: Vec<(f64, f64)>,
    tensors: Vec<(String, Vec<f32>)>,
}

fn read(run: &Path, recipe: &Pretrain) -> Run {
    let stored = checkpoint::open(run).unwrap();
    let mut tensors = Vec::new();
    for (kind, spec) in
        ["weights", "adam_m", "adam_v"].into_iter().flat_map(|k| recipe.model.param_specs().into_iter().map(move |s| (k, s)))
    {
        let mut tensor = Tensor::host(&spec.shape, DType::F32, None).unwrap();
        let name = format!("{kind}/{}", spec.name);
        stored.read(&mut [Wanted { name: name.clone(), slice: Slice::whole(&spec.shape), tensor: &mut tensor }]).unwrap();
        tensors.push((name, tensor.to_f32_vec()));
    }
    let steps = metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(|row| (row.loss, row.grad_norm)).collect();
    Run { steps, tensors }
}

/// Ten documents of training and held-out tokens.
fn shards(dir: &Path) -> PathBuf {
    let shards = dir.join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    write_megatron(&shards, "validation", &counting_documents(10, 61, 2));
    shards
}

fn with_layout(recipe: &Pretrain, (tp, pp, dp): (usize, usize, usize)) -> Pretrain {
    let mut recipe = recipe.clone();
    (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.dp) = (tp, pp, Some(dp));
    recipe
}

/// Within one layout nothing changes a bit of losses, gradient norms, weights or moments: not ZB-H1 in place of 1F1B, not recompute
/// of any kind or mixture of kinds, not exchanges that overlap with computation, in f32 and bf16, with and without sequence
/// parallelism. Breaks when an operation is made again on other inputs, gradients are added in another order, or an exchange reads a
/// tensor too early or too late.
#[test]
fn schedule_recompute_and_overlap_keep_the_bits() {
    let dir = tempfile::tempdir().unwrap();
    let base = tiny_recipe(&shards(dir.path()));
    let mixed = [("0..1", Recompute::Full), ("2..4", Recompute::Selective)];
    let mixed = RecomputePlan::Ranges(mixed.map(|(layers, kind)| RecomputeRange { layers: layers.into(), kind }).to_vec());
    let (one_f_one_b, zero_bubble) = (ScheduleKind::OneFOneB, ScheduleKind::ZeroBubbleH1);
    let all = RecomputePlan::All;
    let variants = [
        (one_f_one_b, all(Recompute::None), true),
        (one_f_one_b, all(Recompute::Selective), false),
        (one_f_one_b, all(Recompute::Full), true),
        (zero_bubble, all(Recompute::None), false),
        (zero_bubble, all(Recompute::None), true),
        (zero_bubble, all(Recompute::Full), true),
        (zero_bubble, mixed, true),
    ];
    for (layout, sequence_parallel, tied) in
        [((1, 4, 1), true, true), ((2, 2, 2), true, false), ((2, 2, 1), false, true), ((1, 1, 4), true, true)]
    {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut plain = with_layout(&base, layout);
            plain.parallel.sequence_parallel = sequence_parallel;
            plain.model.tied_embeddings = tied;
            plain.train.precision = precision;
            plain.parallel.overlap = false;
            let out = dir.path().join(format!("{layout:?} {precision:?}"));
            train(&plain, &out, None).unwrap();
            let expected = read(&out, &plain);
            assert!(expected.steps[2].0 < expected.steps[0].0, "it does not learn");
            for (i, (kind, recompute, overlap)) in variants.iter().enumerate() {
                let mut recipe = plain.clone();
                (recipe.parallel.schedule, recipe.parallel.overlap, recipe.train.recompute) = (*kind, *overlap, recompute.clone());
                let out = dir.path().join(format!("{layout:?} {precision:?} {i}"));
                train(&recipe, &out, None).unwrap();
                let found = read(&out, &recipe);
                let what = format!("{layout:?} {precision:?} {kind:?} {recompute:?} overlap {overlap}");
                assert_eq!(found.steps, expected.steps, "{what}");
                for ((name, found), (_, expected)) in found.tensors.iter().zip(&expected.tensors) {
                    assert!(found == expected, "{what}: {name}");
                }
            }
        }
    }
}

/// Stages with unequal numbers of layers, one of them with the embedding or the head alone, over replicas, with tied embeddings,
/// every schedule and held-out loss, train like one rank; and a run goes on where it was stopped under another division.
///
/// Allowed is what f32 sums in another order are off by, as in tests/training.rs: k * eps * sqrt(n) relative with n = 8 * 16 * 61
/// terms and k = 8 for the depth, for each step's clipped gradients times lr / eps = 1.
#[test]
fn uneven_stages_train_like_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let mut base = tiny_recipe(&shards(dir.path()));
    base.model.tied_embeddings = true;
    base.validation = Some(Validation { shards: dir.path().join("shards"), every_steps: 2, samples: 8 });
    let single = dir.path().join("single");
    train(&with_layout(&base, (1, 1, 1)), &single, None).unwrap();
    let expected = read(&single, &base);
    let held_out = |run: &Path| -> Vec<f64> {
        metrics::read(&run.join("metrics.jsonl")).unwrap().iter().filter_map(|row| row.validation_loss).collect()
    };
    let (expected_held_out, relative) = (held_out(&single), 8.0 * f64::from(f32::EPSILON) * (8.0 * 16.0 * 61.0f64).sqrt());
    let (gpipe, one_f_one_b) = (ScheduleKind::GPipe, ScheduleKind::OneFOneB);
    let (interleaved, zero_bubble) = (ScheduleKind::Interleaved, ScheduleKind::ZeroBubbleH1);
    let weighed = Layers::Weighed(EndWeights { embedding: 0.5, head: 2.0 });
    let cases = [
        ((1, 2, 2), 1, zero_bubble, Layers::List(vec![3, 1])),
        ((2, 2, 1), 1, one_f_one_b, Layers::List(vec![4, 0])),
        ((1, 2, 1), 1, gpipe, Layers::List(vec![0, 4])),
        ((1, 3, 1), 1, one_f_one_b, Layers::Auto),
        ((2, 3, 1), 1, zero_bubble, weighed),
        ((1, 2, 2), 2, interleaved, Layers::List(vec![0, 2, 1, 1])),
        ((1, 4, 2), 2, interleaved, Layers::List(vec![0, 1, 1, 0, 1, 1, 0, 0])),
    ];
    for (i, (layout, vp, kind, layers)) in cases.into_iter().enumerate() {
        let mut recipe = with_layout(&base, layout);
        (recipe.parallel.vp, recipe.parallel.schedule, recipe.parallel.layers) = (vp, kind, Some(layers.clone()));
        let (out, what) = (dir.path().join(format!("{i}")), format!("{layout:?} {kind:?} {layers:?}"));
        let world = layout.0 * layout.1 * layout.2;
        if i + 1 == 7 {
            let line = recipe.check(world).expect_err("an inner chunk is empty").to_string();
            assert!(line.contains("leaves chunk 3 empty"), "{line}");
            continue;
        }
        if i == 0 {
            // The first two steps with even stages.
            let even = Pretrain { parallel: Parallel { layers: None, ..recipe.parallel.clone() }, ..recipe.clone() };
            assert_eq!(train(&even, &out, Some(2)).unwrap(), Ended::StoppedAsPlanned);
        }
        train(&recipe, &out, None).unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = read(&out, &recipe);
        for ((loss, norm), (expected_loss, expected_norm)) in found.steps.iter().zip(&expected.steps) {
            assert!((loss - expected_loss).abs() <= relative * expected_loss, "{what}: loss {loss}, {expected_loss}");
            assert!((norm - expected_norm).abs() <= relative * expected_norm, "{what}: norm {norm}, {expected_norm}");
        }
        let held_out = held_out(&out);
        assert_eq!(held_out.len(), expected_held_out.len(), "{what}");
        assert!(held_out.iter().zip(&expected_held_out).all(|(a, b)| (a - b).abs() <= relative * b), "{what}: {held_out:?}");
        let allowed = found.steps.len() as f64 * relative;
        for ((name, found), (_, expected)) in found.tensors.iter().zip(&expected.tensors) {
            let worst = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            assert!(worst <= allowed, "{what}: {name} differs by {worst:.2e}, allowed {allowed:.2e}");
        }
    }
}

/// Layers of stages and recompute are read in each of their forms, print as they were read, and what they say is what they give.
#[test]
fn layers_and_recompute_have_several_forms() {
    let two_stages = Pretrain { parallel: Parallel { pp: 2, ..tiny_recipe(Path::new("x")).parallel }, ..tiny_recipe(Path::new("x")) };
    let text = two_stages.to_toml();
    let parse = |text: &str, sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Pretrain::parse(text, "r.toml", &sets).map_err(|error| error.to_string())
    };
    let range = |layers: &str, kind| RecomputeRange { layers: layers.into(), kind };
    let layers = [
        ("\"auto\"", Layers::Auto, [2, 2]),
        ("[1, 3]", Layers::List(vec![1, 3]), [1, 3]),
        ("[4, 0]", Layers::List(vec![4, 0]), [4, 0]),
        ("{ embedding = 2, head = 0.5 }", Layers::Weighed(EndWeights { embedding: 2.0, head: 0.5 }), [1, 3]),
    ];
    for (value, expected, counts) in layers {
        let mut recipe = parse(&text, &[&format!("parallel.layers={value}")]).expect(value);
        assert_eq!(recipe.parallel.layers, Some(expected), "{value}");
        assert_eq!(parse(&recipe.to_toml(), &[]), Ok(recipe.clone()), "{value} printed");
        // The head, 64 x 24 weights, is a sixth of a layer: one layer less beside it would be worse.
        recipe.check(2).expect(value);
        assert_eq!(recipe.stages().expect(value).counts(), counts, "{value}");
        recipe.parallel.pp = 1;
        recipe.parallel.layers = Some(Layers::Auto);
        assert_eq!(recipe.stages().expect("one stage").counts(), [4]);
    }
    let (none, selective, full) = (Recompute::None, Recompute::Selective, Recompute::Full);
    let ranges = "[{ layers = \"0..1\", kind = \"full\" }, { layers = \"2..4\", kind = \"selective\" }]";
    let recompute = [
        ("none", RecomputePlan::All(none), [none; 4]),
        ("selective", RecomputePlan::All(selective), [selective; 4]),
        ("\"full\"", RecomputePlan::All(full), [full; 4]),
        (ranges, RecomputePlan::Ranges(vec![range("0..1", full), range("2..4", selective)]), [full, none, selective, selective]),
    ];
    for (value, expected, of_layers) in recompute {
        let recipe = parse(&text, &[&format!("train.recompute={value}")]).expect(value);
        assert_eq!(recipe.train.recompute, expected, "{value}");
        assert_eq!(parse(&recipe.to_toml(), &[]), Ok(recipe.clone()), "{value} printed");
        assert_eq!(recipe.train.recompute.of_layers(4).expect(value), of_layers, "{value}");
    }
    let wrong = [
        ("train.recompute=ful", "train.recompute is \"ful\", expected one of \"none\", \"selective\", \"full\"; did you mean \"full\"?"),
        ("train.recompute=3", "train.recompute is the whole number 3, expected one of \"none\", \"selective\", \"full\", or a list"),
        ("train.recompute=[{ layer = \"0..4\", kind = \"full\" }]", "did you mean train.recompute.0.layers?"),
        ("parallel.layers=autto", "parallel.layers is \"autto\", expected one of \"auto\"; did you mean \"auto\"?"),
        ("parallel.layers=[1, -1]", "parallel.layers.1 is the whole number -1"),
        ("parallel.layers=true", "parallel.layers is true, expected \"auto\", a list of whole numbers, or { embedding, head }"),
        ("parallel.schedule=zbh1", "did you mean \"zb-h1\"?"),
    ];
    for (set, expected) in wrong {
        let line = parse(&text, &[set]).expect_err(set);
        assert!(line.contains(expected), "{set}: {line}");
    }
}

/// What a rank does, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Event {
    /// A reduce-scatter or all-gather between replicas, by its number.
    Start(&'static str, usize),
    Wait(&'static str, usize),
    /// A part's first parameter is about to be used, or its gradients are complete.
    Forward(usize),
    Done(usize),
    /// A tensor-parallel exchange: the model computes.
    Computes,
}

type Log = Arc<Mutex<Vec<Event>>>;

/// A communicator that writes down what is asked of it.
struct Recording {
    inner: Box<dyn Communicator>,
    /// Whether it is the replicas', or tensor parallel.
    is_dp: bool,
    log: Log,
    n: Mutex<usize>,
}

impl Recording {
    fn note<'a>(&'a self, kind: &'static str, pending: Pending<'a>) -> Pending<'a> {
        let add = |event| self.log.lock().unwrap().push(event);
        if !self.is_dp {
            add(Event::Computes);
            return pending;
        }
        let mut n = self.n.lock().unwrap();
        let number = *n;
        *n += 1;
        add(Event::Start(kind, number));
        Pending::until(move || {
            self.log.lock().unwrap().push(Event::Wait(kind, number));
            pending.wait();
        })
    }
}

impl Communicator for Recording {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn barrier(&self) {
        self.inner.barrier()
    }
    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        self.inner.split(colour)
    }
    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        self.inner.start_all_gather_bytes(shard, full)
    }
    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        self.inner.start_all_to_all_bytes(send, finish)
    }
    fn staging(&self) -> &Staging {
        self.inner.staging()
    }
    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        self.inner.broadcast_bytes(data, root)
    }
    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        self.inner.start_group(sends, recvs)
    }
    fn start_all_gather<'a>(&'a self, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
        self.note("gather", self.inner.start_all_gather(shard, full))
    }
    fn start_reduce_scatter<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        self.note("reduce", self.inner.start_reduce_scatter(full, shard))
    }
    fn all_reduce(&self, x: &mut Tensor, op: ReduceOp) {
        self.inner.all_reduce(x, op)
    }
}

/// What the executor tells, written down and passed on.
struct Noted<'a, 's, 'c> {
    inner: During<'s, 'c>,
    log: &'a Log,
}

impl Between for Noted<'_, '_, '_> {
    fn before_forward(&mut self, chunk: usize, part: Part) {
        self.log.lock().unwrap().push(Event::Forward(part.first_idx));
        self.inner.before_forward(chunk, part);
    }
    fn gradients_done(&mut self, chunk: usize, part: Part) {
        self.log.lock().unwrap().push(Event::Done(part.first_idx));
        self.inner.gradients_done(chunk, part);
    }
}

/// What rank 0 does in each of two steps, its weights at the end, and its parts as ranges of parameters.
type TwoSteps = (Vec<Vec<Event>>, Vec<Vec<f32>>, Vec<std::ops::Range<usize>>);

/// Two steps of two micro-batches on tp 2 x dp 2.
fn two_steps(overlap: Overlap, kind: ScheduleKind) -> TwoSteps {
    let layout = ParallelLayout { tp: 2, dp: 2, ..ParallelLayout::SINGLE };
    let mut ranks = threads::run(layout.world(), |world| {
        let log = Log::default();
        let mut groups = Groups::new(world, layout);
        let wrap = |inner, is_dp| Box::new(Recording { inner, is_dp, log: Arc::clone(&log), n: Mutex::new(0) });
        let nobody = || -> Box<dyn Communicator> { Box::new(trireme::comm::solo::Solo::new()) };
        groups.dp = wrap(std::mem::replace(&mut groups.dp, nobody()), true);
        groups.tp = wrap(std::mem::replace(&mut groups.tp, nobody()), false);
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let mut state = TrainState::new(&device, &tiny_model(), &groups, DType::F32).unwrap();
        state.initialise(&device, &scratch, &groups, 3);
        let tokens = |first: u32| (0..16).map(|t| (first + 7 * t) % 61).collect::<Vec<u32>>();
        let positions: Vec<u32> = (0..16).collect();
        let batch = |i: u32| {
            let first = 5 * i + 11 * groups.at.dp as u32;
            MicroBatch::new(&device, [&tokens(first), &tokens(first + 7), &positions], &[1.0 / 64.0; 16], vec![0, 16]).unwrap()
        };
        let batches = [batch(0), batch(1)];
        let schedule = schedule::training(kind, PipelineShape { pp: 1, vp: 1, n_micro: 2 }, Messages::Ahead).unwrap();
        let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Sharded, numerics: Numerics::Fast };
        let mut exchanges = Exchanges::new(&groups, overlap);
        let mut parts = Vec::new();
        state.chunks[0].each_part(&mut |part| parts.push(part.first_idx..part.first_idx + part.params.len()));
        let mut steps = Vec::new();
        log.lock().unwrap().clear();
        for step in 1..=2 {
            let TrainState { chunks, optimizer, .. } = &mut state;
            let mut noted = Noted { inner: exchanges.during(ctx, optimizer), log: &log };
            executor::run(&schedule, chunks, &ctx, &groups, (&batches, Keep::Saved), &mut noted);
            exchanges.finish_gradients(chunks, optimizer);
            let settings = tiny_recipe(Path::new("")).optimizer;
            let update = Update { step, lr: 1e-2, grad_scale: 1.0 };
            ShardedAdamW::update(optimizer, &device, &scratch, chunks, &mut exchanges, (&settings, update));
            steps.push(std::mem::take(&mut *log.lock().unwrap()));
        }
        exchanges.finish_weights(&mut state.chunks);
        let weights = state.chunks[0].params().into_iter().map(|param| param.value.f32().to_vec()).collect::<Vec<_>>();
        (steps, weights, parts)
    });
    ranks.swap_remove(0)
}

/// The reductions of a part of the model start when the last backward has completed its gradients, while the parts before it are
/// still being computed, and none is waited for before all have started; gathered weights are waited for part by part, each right
/// before the next step's forward reads it. Waited for at once, each start is followed by its wait. Both end with the same bits.
#[test]
fn exchanges_start_early_and_are_waited_for_late() {
    for kind in [ScheduleKind::OneFOneB, ScheduleKind::ZeroBubbleH1] {
        let (overlapped, weights, parts) = two_steps(Overlap::WithComputation, kind);
        let (at_once, weights_at_once, _) = two_steps(Overlap::Nothing, kind);
        assert!(weights == weights_at_once, "{kind:?}: other weights");
        let n_params = parts.last().unwrap().end;
        let without_computing = |step: &[Event]| step.iter().filter(|&event| *event != Event::Computes).cloned().collect::<Vec<_>>();
        // Numbers of exchanges go on over the steps, after the gathers of the initial weights: of each step, first the reductions,
        // then the gathers.
        for (step, events) in overlapped.iter().enumerate() {
            let mut expected = Vec::new();
            let gathered = 2 * step * n_params;
            for part in &parts {
                expected.push(Event::Forward(part.start));
                if step > 0 {
                    expected.extend(part.clone().map(|idx| Event::Wait("gather", gathered + idx)));
                }
            }
            let first = (1 + 2 * step) * n_params;
            let mut number = first;
            for part in parts.iter().rev() {
                expected.push(Event::Done(part.start));
                expected.extend(part.clone().map(|_| {
                    Event::Start("reduce", {
                        let n = number;
                        number += 1;
                        n
                    })
                }));
            }
            expected.extend((first..first + n_params).map(|number| Event::Wait("reduce", number)));
            expected.extend((first + n_params..first + 2 * n_params).map(|number| Event::Start("gather", number)));
            assert_eq!(without_computing(events), expected, "{kind:?} step {step}");
            // Between the first start and the last the model still computes: at least once for each part.
            let starts: Vec<usize> = (0..events.len()).filter(|&i| matches!(events[i], Event::Start("reduce", _))).collect();
            let computing = events[starts[0]..starts[starts.len() - 1]].iter().filter(|&event| *event == Event::Computes).count();
            assert!(computing >= parts.len() - 1, "{kind:?} step {step}: {computing} exchanges of the model between the starts");
        }
        for events in &at_once {
            let events = without_computing(events);
            for (i, event) in events.iter().enumerate() {
                if let Event::Start(what, number) = event {
                    assert_eq!(events[i + 1], Event::Wait(what, *number), "{kind:?}");
                }
            }
        }
    }
}
