//! Pipeline schedules: every shape with pp <= 8, vp <= 4, m <= 32 is proved, timed against the papers' closed forms, and
//! broken on purpose.

use trireme::parallel::schedule::{
    Action, ChunkAt, MAX_CHUNKS, Parcel, PipelineShape, Rhythm, Schedule, What, evaluation, gpipe, insert_messages, interleaved,
    one_f_one_b, training,
};
use trireme::parallel::simulate::{CostModel, Timeline, simulate};
use trireme::recipe::ScheduleKind;
use trireme::rng::Random;

/// Equal chunks, free messages.
struct Equal {
    forward_s: f64,
    backward_s: f64,
}

impl CostModel for Equal {
    fn forward_s(&self, _: usize, _: usize) -> f64 {
        self.forward_s
    }
    fn backward_s(&self, _: usize, _: usize) -> f64 {
        self.backward_s
    }
    fn message_s(&self, _: usize, _: usize, _: What) -> f64 {
        0.0
    }
}

/// A backward is as long as a forward, or twice as long.
const COSTS: [Equal; 2] = [Equal { forward_s: 1.0, backward_s: 1.0 }, Equal { forward_s: 1.0, backward_s: 2.0 }];

fn shapes() -> impl Iterator<Item = PipelineShape> {
    (1..=8).flat_map(|pp| (1..=4).flat_map(move |vp| (1..=32).map(move |n_micro| PipelineShape { pp, vp, n_micro })))
}

/// Every training schedule of every shape that its kind allows.
fn all_training() -> impl Iterator<Item = (ScheduleKind, Schedule)> {
    let kinds = [ScheduleKind::GPipe, ScheduleKind::OneFOneB, ScheduleKind::Interleaved];
    shapes().flat_map(move |shape| kinds.into_iter().filter_map(move |kind| Some((kind, training(kind, shape).ok()?))))
}

/// The three papers' bubble, idle over busy time: (p - 1) / m without virtual stages, (p - 1) / (v m) with. Breaks when a
/// message is placed where one side still has work (stages then wait for each other) or an order is not the paper's.
/// All values are sums of small integers, so the comparison is exact up to the two divisions.
#[test]
fn bubbles_are_the_closed_forms() {
    let mut seen = 0;
    for (kind, schedule) in all_training() {
        let PipelineShape { pp, vp, n_micro } = schedule.shape;
        for cost in &COSTS {
            let timeline = simulate(&schedule, cost);
            let closed = (pp - 1) as f64 / (vp * n_micro) as f64;
            let found = timeline.bubble_over_ideal();
            let context = format!("{kind:?} {:?} backward {} s: {found} is not {closed}", schedule.shape, cost.backward_s);
            // One group of micro-batches, no steady phase: the last stages' forwards wait behind longer backwards, which
            // costs less than one more chunk-step for each stage.
            if kind == ScheduleKind::Interleaved && n_micro == pp && cost.backward_s > cost.forward_s {
                assert!(found >= closed - 1e-12 && found < closed * 1.2 + 1e-12, "{context}");
            } else {
                assert!((found - closed).abs() < 1e-12, "{context}");
            }
            check_timeline(&schedule, &timeline, cost);
            seen += 1;
        }
    }
    // 8 * 32 shapes of two kinds, and vp = 1..4 with each multiple of pp up to 32: 4 * sum over pp of 32 / pp.
    let interleaved: usize = (1..=8).map(|pp| 4 * (32 / pp)).sum();
    assert_eq!(seen, 2 * (2 * 8 * 32 + interleaved));
}

/// Busy time is the sum of the work, events of a stage follow each other without overlap, and the end is the makespan.
fn check_timeline(schedule: &Schedule, timeline: &Timeline, cost: &Equal) {
    let PipelineShape { pp, vp, n_micro } = schedule.shape;
    let work_s = (vp * n_micro) as f64 * (cost.forward_s + cost.backward_s);
    assert!(timeline.busy_s.iter().all(|&busy_s| busy_s == work_s), "{:?} is not {work_s} on each of {pp} stages", timeline.busy_s);
    let ends = timeline.events.windows(2).filter(|pair| pair[0].stage == pair[1].stage);
    ends.for_each(|pair| assert!(pair[0].end_s <= pair[1].start_s, "{pair:?}"));
    let last = timeline.events.iter().map(|event| event.end_s).fold(0.0, f64::max);
    assert_eq!(last, timeline.makespan_s);
    assert!((timeline.bubble_fraction - (1.0 - work_s / timeline.makespan_s)).abs() < 1e-12);
}

/// Every schedule of every shape passes the proof, and what is alive at its peak is the papers' count: all micro-batches for
/// GPipe, min(m, p - s) for 1F1B, and one more than the forwards run ahead for interleaving. The executor's memory is sized by it.
#[test]
fn every_shape_is_proved_and_has_the_known_peak() {
    for (kind, schedule) in all_training() {
        let PipelineShape { pp, vp, n_micro } = schedule.shape;
        let liveness = schedule.check().unwrap_or_else(|wrong| panic!("{kind:?} {:?}: {wrong}\n{schedule}", schedule.shape));
        for stage in 0..pp {
            let peaks = &liveness.peak_live[stage];
            let context = format!("{kind:?} {:?} stage {stage}", schedule.shape);
            match kind {
                ScheduleKind::GPipe => assert_eq!(peaks, &[n_micro], "{context}"),
                ScheduleKind::OneFOneB => assert_eq!(peaks, &[n_micro.min(pp - stage)], "{context}"),
                ScheduleKind::Interleaved => {
                    let ahead = 2 * (pp - 1 - stage) + (vp - 1) * pp;
                    assert_eq!(most_alive(&schedule.stages[stage]), (ahead + 1).min(vp * n_micro), "{context}");
                    assert!(peaks.iter().sum::<usize>() >= (ahead + 1).min(vp * n_micro), "{context}");
                }
            }
            // Tensors between chunks do not pile up: at most two come and two go at once (with a single group of micro-batches,
            // where stages do not go in step, at most the group).
            let bound = if n_micro == pp { 4.max(pp) } else { 4 };
            assert!(liveness.peak_boxed[stage] <= bound, "{context}: {} tensors in the boxes", liveness.peak_boxed[stage]);
        }
    }
}

/// Forwards less backwards, at the most, over all chunks of a stage.
fn most_alive(actions: &[Action]) -> usize {
    let (mut alive, mut most) = (0usize, 0);
    for action in actions {
        match action {
            Action::Forward { .. } => alive += 1,
            Action::Backward { .. } => alive -= 1,
            _ => {}
        }
        most = most.max(alive);
    }
    most
}

/// Forward-only schedules (held-out loss, scoring) of any shape pass the proof and keep no activation past its forward.
#[test]
fn forward_only_is_proved_for_every_shape() {
    for shape in shapes() {
        let schedule = evaluation(shape);
        let liveness = schedule.check().unwrap_or_else(|wrong| panic!("{shape:?}: {wrong}\n{schedule}"));
        assert!(liveness.peak_live.iter().flatten().all(|&n| n == 1), "{shape:?} {liveness:?}");
        assert!(!schedule.to_string().contains(['B', 'R', 'g']), "{schedule}");
        if shape.n_micro % shape.pp == 0 {
            let found_s = simulate(&schedule, &COSTS[0]).makespan_s;
            assert_eq!(found_s, (shape.vp * shape.n_micro + shape.pp - 1) as f64, "{shape:?}");
        }
    }
}

/// With uneven stages and slow messages a schedule still ends, no sooner than its busiest stage and its longest chain.
#[test]
fn uneven_costs_are_bounded_below() {
    struct Uneven(Random);
    impl CostModel for Uneven {
        fn forward_s(&self, stage: usize, chunk: usize) -> f64 {
            1.0 + self.0.uniform((stage * 100 + chunk) as u64)
        }
        fn backward_s(&self, stage: usize, chunk: usize) -> f64 {
            2.0 * self.forward_s(stage, chunk)
        }
        fn message_s(&self, from: usize, to: usize, _: What) -> f64 {
            0.1 + 0.1 * self.0.uniform((10_000 + from * 100 + to) as u64)
        }
    }
    let cost = Uneven(Random::new(0x5eed, "schedule costs"));
    for (kind, schedule) in all_training().filter(|(_, s)| s.shape.n_micro == 24) {
        let shape = schedule.shape;
        let timeline = simulate(&schedule, &cost);
        let mut chain_s = 0.0;
        let mut at = Some(ChunkAt { stage: 0, chunk: 0 });
        while let Some(here) = at {
            chain_s += cost.forward_s(here.stage, here.chunk) + cost.backward_s(here.stage, here.chunk);
            at = shape.next(here);
            if let Some(there) = at.filter(|there| there.stage != here.stage) {
                chain_s += cost.message_s(here.stage, there.stage, What::Activation);
                chain_s += cost.message_s(there.stage, here.stage, What::Gradient);
            }
        }
        let busiest_s = timeline.busy_s.iter().copied().fold(0.0, f64::max);
        assert!(timeline.makespan_s >= chain_s.max(busiest_s) - 1e-9, "{kind:?} {shape:?} {} {chain_s} {busiest_s}", timeline.makespan_s);
        assert!(timeline.makespan_s.is_finite());
    }
}

/// One action dropped, doubled, or moved before what it needs, and one message renamed or redirected: the proof must refuse
/// every one of them, at every place of the schedule.
#[test]
fn broken_schedules_are_refused() {
    let shapes = [
        (ScheduleKind::GPipe, PipelineShape { pp: 3, vp: 1, n_micro: 4 }),
        (ScheduleKind::OneFOneB, PipelineShape { pp: 4, vp: 1, n_micro: 6 }),
        (ScheduleKind::Interleaved, PipelineShape { pp: 2, vp: 2, n_micro: 4 }),
        (ScheduleKind::Interleaved, PipelineShape { pp: 3, vp: 2, n_micro: 6 }),
        (ScheduleKind::Interleaved, PipelineShape { pp: 1, vp: 3, n_micro: 3 }),
    ];
    for (kind, shape) in shapes {
        let good = training(kind, shape).expect("a possible shape");
        let refused = |what: &str, broken: &Schedule| {
            assert_ne!(broken, &good, "{what} changed nothing");
            assert!(broken.check().is_err(), "{kind:?} {shape:?}: {what} was accepted\n{broken}");
        };
        for stage in 0..shape.pp {
            for i in 0..good.stages[stage].len() {
                let place = format!("{} at {stage}:{i}", good.stages[stage][i]);
                let mut dropped = good.clone();
                dropped.stages[stage].remove(i);
                refused(&format!("dropping {place}"), &dropped);
                let mut doubled = good.clone();
                doubled.stages[stage].insert(i, good.stages[stage][i].clone());
                refused(&format!("doubling {place}"), &doubled);
                if !matches!(good.stages[stage][i], Action::Forward { chunk: 0, .. }) || stage > 0 {
                    let mut first = good.clone();
                    let action = first.stages[stage].remove(i);
                    first.stages[stage].insert(0, action);
                    if first != good {
                        refused(&format!("moving {place} to the front"), &first);
                    }
                }
                if let Action::Exchange { sends, recvs } = &good.stages[stage][i] {
                    for n in 0..sends.len() + recvs.len() {
                        break_parcel(&good, stage, i, n).iter().for_each(|broken| refused(&format!("message {n} of {place}"), broken));
                    }
                }
            }
        }
    }
}

/// The schedule with one parcel renamed in every field.
fn break_parcel(good: &Schedule, stage: usize, i: usize, n: usize) -> Vec<Schedule> {
    let PipelineShape { pp, vp, n_micro } = good.shape;
    let changes: [&dyn Fn(&mut Parcel); 4] = [
        &|p| p.micro = (p.micro + 1) % n_micro,
        &|p| p.peer = (p.peer + 1) % pp,
        &|p| p.chunk = if vp > 1 { (p.chunk + 1) % vp } else { 1 },
        &|p| p.what = if p.what == What::Activation { What::Gradient } else { What::Activation },
    ];
    let apply = |change: &&dyn Fn(&mut Parcel)| {
        let mut broken = good.clone();
        let Action::Exchange { sends, recvs } = &mut broken.stages[stage][i] else { unreachable!("an exchange") };
        change(sends.iter_mut().chain(recvs).nth(n).expect("a parcel"));
        broken
    };
    changes.iter().map(apply).collect()
}

/// Two stages that each wait for the other's message before sending their own: right by every local rule, and a deadlock.
/// This is what splitting an exchange into receive-then-send does.
#[test]
fn a_receive_before_each_send_is_a_deadlock() {
    let good = training(ScheduleKind::OneFOneB, PipelineShape { pp: 2, vp: 1, n_micro: 4 }).expect("a possible shape");
    let mut broken = good.clone();
    for actions in &mut broken.stages {
        let split = |action: Action| match action {
            Action::Exchange { sends, recvs } if !sends.is_empty() && !recvs.is_empty() => {
                vec![Action::Exchange { sends: vec![], recvs }, Action::Exchange { sends, recvs: vec![] }]
            }
            other => vec![other],
        };
        *actions = actions.drain(..).flat_map(split).collect();
    }
    let wrong = broken.check().expect_err("both stages receive first");
    assert!(wrong.starts_with("deadlock: stage 0 at [<g0.0@1], stage 1 at [<a0.1@0]"), "{wrong}");
}

/// Two sends of one channel in the other order than their receives: refused although tags would tell them apart, because a
/// device library that matches messages by order alone would swap them.
#[test]
fn sends_in_another_order_than_receives_are_refused() {
    let mut schedule = evaluation(PipelineShape { pp: 2, vp: 1, n_micro: 2 });
    let exchange = |sends, recvs| Action::Exchange { sends, recvs };
    let parcel = |micro, peer| Parcel { what: What::Activation, chunk: 0, micro, peer };
    let forward = |micro| Action::Forward { chunk: 0, micro };
    schedule.stages[0] = vec![forward(0), forward(1), exchange(vec![parcel(1, 1), parcel(0, 1)], vec![])];
    schedule.stages[1] = vec![exchange(vec![], vec![parcel(0, 0), parcel(1, 0)]), forward(0), forward(1)];
    let wrong = schedule.check().expect_err("the order differs");
    assert_eq!(wrong, "channel 0 -> 1, message 0: sent a0.1@0, received a0.0@0");
    schedule.stages[0][2] = exchange(vec![parcel(0, 1), parcel(1, 1)], vec![]);
    schedule.check().expect("the same order");
}

/// Tags differ for different messages and fit OpenMPI's 31 bits; a shared tag would let one message overwrite another.
#[test]
fn tags_are_unique() {
    let mut seen = std::collections::HashSet::new();
    for micro in [0, 1, 2, 31, 1_000_000] {
        for chunk in [0, 1, 2, MAX_CHUNKS - 1] {
            for what in [What::Activation, What::Gradient] {
                let tag = Parcel { what, chunk, micro, peer: 0 }.tag();
                assert_eq!(tag, Parcel { what, chunk, micro, peer: 5 }.tag(), "both sides must agree");
                assert!(tag < 1 << 31 && seen.insert(tag), "{what:?} {chunk} {micro}");
            }
        }
    }
}

/// The model's order of chunks: down the stages, then around to the next chunk of the first stage.
#[test]
fn chunks_follow_each_other_around_the_stages() {
    let shape = PipelineShape { pp: 3, vp: 2, n_micro: 3 };
    let mut order = vec![ChunkAt { stage: 0, chunk: 0 }];
    while let Some(next) = shape.next(order[order.len() - 1]) {
        assert_eq!(shape.previous(next), order.last().copied());
        order.push(next);
    }
    let pairs: Vec<(usize, usize)> = order.iter().map(|at| (at.stage, at.chunk)).collect();
    assert_eq!(pairs, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]);
    assert_eq!(shape.previous(order[0]), None);
}

/// Shapes that a kind cannot run are recipe errors that say which numbers would do.
#[test]
fn impossible_shapes_are_recipe_errors() {
    let shape = PipelineShape { pp: 4, vp: 2, n_micro: 6 };
    let message = interleaved(shape).expect_err("6 is no multiple of 4").to_string();
    assert!(message.contains("6 micro-batches") && message.contains("4 or 8 micro-batches"), "{message}");
    assert!(gpipe(shape).expect_err("two chunks").to_string().contains("parallel.vp = 2"));
    assert_eq!(one_f_one_b(shape).expect_err("two chunks").exit_code(), 2);
}

/// The text of small schedules, worked out by hand from the papers' figures; any change of order or message shows here.
#[test]
fn golden_texts() {
    let text = |kind, pp, vp, n_micro| training(kind, PipelineShape { pp, vp, n_micro }).expect("a possible shape").to_string();
    let gpipe = "\
0: F0.0 [>a0.0@1] F0.1 [>a0.1@1 <g0.1@1] B0.1 [<g0.0@1] B0.0 R0
1: [<a0.0@0] F0.0 [<a0.1@0] F0.1 B0.1 [>g0.1@0] B0.0 [>g0.0@0] R0
";
    assert_eq!(text(ScheduleKind::GPipe, 2, 1, 2), gpipe);
    let one_f_one_b = "\
0: F0.0 [>a0.0@1] F0.1 [>a0.1@1 <g0.0@1] B0.0 F0.2 [>a0.2@1 <g0.1@1] B0.1 [<g0.2@1] B0.2 R0
1: [<a0.0@0] F0.0 B0.0 [>g0.0@0 <a0.1@0] F0.1 B0.1 [>g0.1@0 <a0.2@0] F0.2 B0.2 [>g0.2@0] R0
";
    assert_eq!(text(ScheduleKind::OneFOneB, 2, 1, 3), one_f_one_b);
    let interleaved = "\
0: F0.0 [>a0.0@1] F0.1 [>a0.1@1 <a1.0@1] F1.0 [>a1.0@1 <a1.1@1] F1.1 [>a1.1@1 <g1.0@1] F0.2 B1.0 [>a0.2@1 >g0.0@1 <g1.1@1] F0.3 B1.1 \
[>a0.3@1 >g0.1@1 <a1.2@1 <g0.0@1] F1.2 B0.0 [>a1.2@1 <a1.3@1 <g0.1@1] F1.3 B0.1 [>a1.3@1 <g1.2@1] B1.2 [>g0.2@1 <g1.3@1] B1.3 \
[>g0.3@1 <g0.2@1] R1 B0.2 [<g0.3@1] B0.3 R0
1: [<a0.0@0] F0.0 [>a1.0@0 <a0.1@0] F0.1 [>a1.1@0 <a1.0@0] F1.0 B1.0 [>g1.0@0 <a1.1@0] F1.1 B1.1 [>g1.1@0 <a0.2@0 <g0.0@0] F0.2 B0.0 \
[>a1.2@0 >g0.0@0 <a0.3@0 <g0.1@0] F0.3 B0.1 [>a1.3@0 >g0.1@0 <a1.2@0] F1.2 B1.2 [>g1.2@0 <a1.3@0] F1.3 B1.3 [>g1.3@0 <g0.2@0] R1 B0.2 \
[>g0.2@0 <g0.3@0] B0.3 [>g0.3@0] R0
";
    assert_eq!(text(ScheduleKind::Interleaved, 2, 2, 4), interleaved);
    let one_stage = "0: F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 R1 B0.1 R0\n";
    assert_eq!(text(ScheduleKind::Interleaved, 1, 2, 2), one_stage);
    let forwards = "\
0: F0.0 [>a0.0@1] F0.1 [>a0.1@1 <a1.0@1] F1.0 [>a1.0@1 <a1.1@1] F1.1 [>a1.1@1] F0.2 [>a0.2@1 <a1.2@1] F1.2 [>a1.2@1]
1: [<a0.0@0] F0.0 [>a1.0@0 <a0.1@0] F0.1 [>a1.1@0 <a1.0@0] F1.0 [<a1.1@0] F1.1 [<a0.2@0] F0.2 [>a1.2@0 <a1.2@0] F1.2
";
    let found = evaluation(PipelineShape { pp: 2, vp: 2, n_micro: 3 }).to_string();
    assert_eq!(found, forwards);
}

/// The rhythm is a matter of time, never of correctness: the same orders with the other rhythm still pass the proof wherever
/// they can be laid out at all (pairs cannot for 1F1B's stages that never alternate).
#[test]
fn interleaving_is_correct_in_both_rhythms() {
    for shape in shapes().filter(|shape| shape.n_micro % shape.pp == 0 && shape.n_micro > shape.pp) {
        let compute = interleaved(shape).expect("a multiple");
        for rhythm in [Rhythm::Single, Rhythm::Pairs] {
            insert_messages(&compute, rhythm).check().unwrap_or_else(|wrong| panic!("{shape:?} {rhythm:?}: {wrong}"));
        }
    }
}
