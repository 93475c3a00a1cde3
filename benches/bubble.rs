//! Pipelines on two stages and replicas on two ranks, as threads of which each computes on one core of its own.
//!
//! First: the bubble of each schedule as it was measured, beside the one that the simulator gives for the very times of that run's
//! actions, and the closed form for their means. The two stages have equal layers and a small head. Second: how long ranks stand
//! still for the exchanges between replicas, overlapped with computation and not.
//!
//! `cargo bench --bench bubble [-- STEPS]`. Times come from the flight ledger, as in a real run.

#[path = "../tests/common/models.rs"]
mod models;

use std::path::Path;
use trireme::comm::{Communicator, Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::device::{Device, Scratch};
use trireme::flight::rings::Rings;
use trireme::flight::{Group, Op, Phase};
use trireme::model::chunk::MicroBatch;
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::schedule::{self, Action, Messages, PipelineShape, Schedule, What};
use trireme::parallel::simulate::{CostModel, simulate};
use trireme::recipe::{LrDecay, Optimizer, ScheduleKind};
use trireme::rng::Random;
use trireme::tensor::DType;
use trireme::train::exchanges::{Exchanges, Overlap};
use trireme::train::executor::{self, Keep};
use trireme::train::optimizer::Update;
use trireme::train::state::TrainState;

/// Tokens a micro-batch.
const T: usize = 256;

fn model() -> ModelConfig {
    models::nemotron([8, 384, 6, 2, 64, 1536, 256], T)
}

/// What is run: layout, schedule, exchanges.
#[derive(Clone, Copy)]
struct How {
    layout: ParallelLayout,
    kind: ScheduleKind,
    n_micro: usize,
    overlap: Overlap,
}

impl How {
    fn schedule(&self) -> Schedule {
        let shape = PipelineShape { pp: self.layout.pp, vp: self.layout.vp, n_micro: self.n_micro };
        schedule::training(self.kind, shape, Messages::Ahead).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Of each measured step of this rank: seconds, and seconds blocked for other replicas and for other stages.
type Steps = Vec<[f64; 3]>;

/// One step to warm up, then the measured ones, recorded in `folder`.
fn run(how: How, steps: u64, folder: &Path) -> Vec<Steps> {
    threads::run(how.layout.world(), |world| {
        // One core a rank: as many ranks as there are cores do not disturb each other.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        pool.install(|| run_rank(how, steps, folder, world))
    })
}

fn run_rank(how: How, steps: u64, folder: &Path, world: Box<dyn Communicator>) -> Steps {
    let groups = Groups::new(world, how.layout);
    groups.flight.open(folder, 1 << 14, how.layout, groups.world.rank()).unwrap_or_else(|error| panic!("{error}"));
    let (device, scratch) = (Cpu::new(), Scratch::new());
    let mut state = TrainState::new(&device, &model(), &groups, DType::F32).unwrap_or_else(|error| panic!("{error}"));
    state.initialise(&device, &scratch, &groups, 1);
    let batches: Vec<MicroBatch> = (0..how.n_micro).map(|micro| batch(&device, micro, how)).collect();
    let schedule = how.schedule();
    let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let mut exchanges = Exchanges::new(&groups, how.overlap);
    let settings = Optimizer {
        lr: 1e-4,
        min_lr: 1e-4,
        warmup_samples: 0,
        decay: LrDecay::Constant,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let mut measured = Vec::new();
    for step in 1..=steps + 1 {
        groups.flight.step(step);
        groups.world.barrier();
        groups.flight.take_times();
        let started = std::time::Instant::now();
        let TrainState { chunks, optimizer, .. } = &mut state;
        let mut during = exchanges.during(ctx, optimizer);
        executor::run(&schedule, chunks, &ctx, &groups, (&batches, Keep::Saved), &mut during);
        exchanges.finish_gradients(chunks, optimizer);
        let update = Update { step, lr: settings.lr, grad_scale: 1.0 };
        optimizer.update(&device, &scratch, chunks, &mut exchanges, (&settings, update));
        let times = groups.flight.take_times();
        let exposed = |group| trireme::flight::PHASES.iter().map(|&phase| times.exposed_s(group, phase)).sum::<f64>();
        measured.push([started.elapsed().as_secs_f64(), exposed(Group::Dp), exposed(Group::Pp)]);
    }
    exchanges.finish_weights(&mut state.chunks);
    measured.split_off(1)
}

fn batch(device: &dyn Device, micro: usize, how: How) -> MicroBatch {
    let noise = Random::new(7, "bench tokens");
    let token = |i: usize| (noise.bits((micro * 2 * T + i) as u64) % 256) as u32;
    let (tokens, targets): (Vec<u32>, Vec<u32>) = ((0..T).map(token).collect(), (T..2 * T).map(token).collect());
    let positions: Vec<u32> = (0..T as u32).collect();
    let weight = 1.0 / (T * how.n_micro * how.layout.dp) as f32;
    MicroBatch::new(device, [&tokens, &targets, &positions], &[weight; T], vec![0, T]).unwrap_or_else(|error| panic!("{error}"))
}

/// The times of a step's actions, by stage and index in its list.
struct Measured {
    action_s: Vec<Vec<f64>>,
    message_s: f64,
}

impl CostModel for Measured {
    fn forward_s(&self, _: usize, _: usize) -> f64 {
        unreachable!("every action has its own time")
    }
    fn backward_s(&self, _: usize, _: usize) -> f64 {
        unreachable!("every action has its own time")
    }
    fn message_s(&self, _: usize, _: usize, _: What) -> f64 {
        self.message_s
    }
    fn action_s(&self, stage: usize, action_idx: usize, _: &Action) -> f64 {
        self.action_s[stage][action_idx]
    }
}

fn computes(action: &Action) -> bool {
    use Action::{Backward, BackwardInput, BackwardWeights, Forward};
    matches!(action, Forward { .. } | Backward { .. } | BackwardInput { .. } | BackwardWeights { .. })
}

/// What the rings say of a step: its actions' times, and the time from the first stage's begin to the last one's end.
fn step_of(rings: &Rings, schedule: &Schedule, step: u64, message_s: f64) -> (Measured, f64) {
    let (mut first_ns, mut last_ns, mut action_s) = (u64::MAX, 0, Vec::new());
    for (stage, actions) in schedule.stages.iter().enumerate() {
        let records =
            || rings.of(stage).expect("a ring of each rank").records.iter().filter(|record| record.step == step && record.op == Op::Work);
        let pass = records().find(|record| record.phase == Phase::Pipeline).expect("a pass");
        (first_ns, last_ns) = (first_ns.min(pass.start_ns), last_ns.max(pass.end_ns));
        let mut times =
            records().filter(|r| r.phase == Phase::Forward || r.phase == Phase::Backward).map(|r| (r.end_ns - r.start_ns) as f64 / 1e9);
        let time_of = |action: &Action| if computes(action) { times.next().expect("a record of each action") } else { 0.0 };
        action_s.push(actions.iter().map(time_of).collect());
    }
    (Measured { action_s, message_s }, (last_ns - first_ns) as f64 / 1e9)
}

/// Seconds from posting a tensor that crosses a boundary until it is received: half a round trip, the best of many.
fn message_s() -> f64 {
    use trireme::comm::{Recv, Send};
    let times = threads::run(2, |world| {
        let device = Cpu::new();
        let mut tensor = device.alloc(&[T, model().hidden], DType::F32).unwrap_or_else(|error| panic!("{error}"));
        let peer = 1 - world.rank();
        let mut round_trip = |i: u32| {
            let started = std::time::Instant::now();
            if peer == 1 {
                world.start_group(vec![Send { peer, tag: i, tensor: &tensor }], Vec::new()).wait();
            }
            world.start_group(Vec::new(), vec![Recv { peer, tag: i, tensor: &mut tensor }]).wait();
            if peer == 0 {
                world.start_group(vec![Send { peer, tag: i, tensor: &tensor }], Vec::new()).wait();
            }
            started.elapsed().as_secs_f64()
        };
        (0..50).map(&mut round_trip).fold(f64::INFINITY, f64::min)
    });
    0.5 * times[0]
}

/// Idle over compute time that the papers give for these mean times of forward, and the halves of backward.
fn closed_form(how: How, forward_s: f64, halves_s: [f64; 2]) -> f64 {
    let (pp, vp) = (how.layout.pp as f64, how.layout.vp as f64);
    let [input_s, weights_s] = halves_s;
    let idle_s = match how.kind {
        ScheduleKind::ZeroBubbleH1 => (pp - 1.0) * (forward_s + input_s - weights_s),
        _ => (pp - 1.0) * (forward_s + input_s + weights_s),
    };
    let busy_s = vp * how.n_micro as f64 * (forward_s + input_s + weights_s);
    idle_s / (busy_s + idle_s)
}

fn bubbles(steps: u64) {
    let message_s = message_s();
    println!("message between stages: {:.0} us\n", message_s * 1e6);
    println!("| schedule | micro-batches | closed form | simulated bubble | measured bubble | step measured / simulated | within 2 % |");
    println!("|---|---:|---:|---:|---:|---:|---|");
    let kinds = [(ScheduleKind::GPipe, 1), (ScheduleKind::OneFOneB, 1), (ScheduleKind::Interleaved, 2), (ScheduleKind::ZeroBubbleH1, 1)];
    for ((kind, vp), n_micro) in kinds.into_iter().flat_map(|kind| [(kind, 4), (kind, 8)]) {
        let how = How { layout: ParallelLayout { pp: 2, vp, ..ParallelLayout::SINGLE }, kind, n_micro, overlap: Overlap::WithComputation };
        let folder = tempfile::tempdir().expect("a temporary directory");
        run(how, steps, folder.path());
        let rings = Rings::read(folder.path()).unwrap_or_else(|error| panic!("{error}"));
        let schedule = how.schedule();
        let mut rows: Vec<[f64; 4]> = Vec::new();
        for step in 2..=steps + 1 {
            let (measured, pass_s) = step_of(&rings, &schedule, step, message_s);
            let timeline = simulate(&schedule, &measured);
            let busy_s: f64 = timeline.busy_s.iter().sum::<f64>() / timeline.busy_s.len() as f64;
            rows.push([means(how, &schedule, &measured), timeline.bubble_fraction, 1.0 - busy_s / pass_s, pass_s / timeline.makespan_s]);
        }
        let median = |i: usize| {
            let mut column: Vec<f64> = rows.iter().map(|row| row[i]).collect();
            column.sort_by(f64::total_cmp);
            column[column.len() / 2]
        };
        let [closed, simulated, found, ratio] = [0, 1, 2, 3].map(median);
        let verdict = if (ratio - 1.0).abs() <= 0.02 { "yes" } else { "no" };
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        println!(
            "| {} vp {vp} | {n_micro} | {} | {} | {} | {ratio:.4} | {verdict} |",
            kind.name(),
            percent(closed),
            percent(simulated),
            percent(found)
        );
    }
}

/// The closed form for the mean times of a step.
fn means(how: How, schedule: &Schedule, measured: &Measured) -> f64 {
    let mean = |of: &dyn Fn(&Action) -> bool| {
        let actions = schedule.stages.iter().zip(&measured.action_s).flat_map(|(actions, times)| actions.iter().zip(times));
        let times: Vec<f64> = actions.filter(|(action, _)| of(action)).map(|(_, &time)| time).collect();
        if times.is_empty() { 0.0 } else { times.iter().sum::<f64>() / times.len() as f64 }
    };
    let whole = mean(&|action| matches!(action, Action::Backward { .. }));
    let halves =
        [mean(&|action| matches!(action, Action::BackwardInput { .. })), mean(&|action| matches!(action, Action::BackwardWeights { .. }))];
    closed_form(how, mean(&|action| matches!(action, Action::Forward { .. })), [whole + halves[0], halves[1]])
}

fn exposed(steps: u64) {
    println!("\n| exchanges between 2 replicas | step | exposed in a step | share |");
    println!("|---|---:|---:|---:|");
    for (name, overlap) in [("waited for at once", Overlap::Nothing), ("overlapped", Overlap::WithComputation)] {
        let layout = ParallelLayout { dp: 2, ..ParallelLayout::SINGLE };
        let how = How { layout, kind: ScheduleKind::OneFOneB, n_micro: 2, overlap };
        let folder = tempfile::tempdir().expect("a temporary directory");
        let ranks = run(how, steps, folder.path());
        let mut rows: Vec<[f64; 3]> = ranks.concat();
        rows.sort_by(|a, b| a[1].total_cmp(&b[1]));
        let [step_s, exposed_s, _] = rows[rows.len() / 2];
        println!("| {name} | {:.1} ms | {:.1} ms | {:.1} % |", step_s * 1e3, exposed_s * 1e3, 100.0 * exposed_s / step_s);
    }
}

fn main() {
    let steps = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(7);
    bubbles(steps);
    exposed(steps);
}
