//! Pipeline schedules: every shape with pp <= 8, vp <= 4, m <= 32 is proved, timed against the papers' closed forms, and
//! broken on purpose.

use trireme::parallel::schedule::{
    Action, ChunkAt, MAX_CHUNKS, Messages, Parcel, PipelineShape, Rhythm, Schedule, What, evaluation, gpipe, insert_messages, interleaved,
    one_f_one_b, training, zero_bubble_h1,
};
use trireme::parallel::simulate::{CostModel, Timeline, simulate};
use trireme::recipe::ScheduleKind;
use trireme::rng::Random;

/// Equal chunks, equal messages.
struct Equal {
    forward_s: f64,
    /// First half and second half of a backward.
    halves_s: [f64; 2],
    message_s: f64,
}

impl CostModel for Equal {
    fn forward_s(&self, _: usize, _: usize) -> f64 {
        self.forward_s
    }
    fn backward_s(&self, _: usize, _: usize) -> f64 {
        self.halves_s[0] + self.halves_s[1]
    }
    fn backward_input_s(&self, _: usize, _: usize) -> f64 {
        self.halves_s[0]
    }
    fn backward_weights_s(&self, _: usize, _: usize) -> f64 {
        self.halves_s[1]
    }
    fn message_s(&self, _: usize, _: usize, _: What) -> f64 {
        self.message_s
    }
}

/// A backward is as long as a forward, or twice as long, or its halves differ; messages are free.
const COSTS: [Equal; 4] = [free([0.5, 0.5]), free([1.0, 1.0]), free([1.25, 0.75]), free([1.5, 1.0])];

const fn free(halves_s: [f64; 2]) -> Equal {
    Equal { forward_s: 1.0, halves_s, message_s: 0.0 }
}

const KINDS: [ScheduleKind; 4] = [ScheduleKind::GPipe, ScheduleKind::OneFOneB, ScheduleKind::Interleaved, ScheduleKind::ZeroBubbleH1];

fn shapes() -> impl Iterator<Item = PipelineShape> {
    (1..=8).flat_map(|pp| (1..=4).flat_map(move |vp| (1..=32).map(move |n_micro| PipelineShape { pp, vp, n_micro })))
}

/// Every training schedule of every shape that its kind allows.
fn all_training(messages: Messages) -> impl Iterator<Item = (ScheduleKind, Schedule)> {
    shapes().flat_map(move |shape| KINDS.into_iter().filter_map(move |kind| Some((kind, training(kind, shape, messages).ok()?))))
}

/// 8 * 32 shapes of the three kinds of one chunk, and vp = 1..4 with each multiple of pp up to 32: 4 * sum over pp of 32 / pp.
fn n_training() -> usize {
    3 * 8 * 32 + (1..=8).map(|pp| 4 * (32 / pp)).sum::<usize>()
}

/// Seconds that a stage idles in a step, by the papers: (p - 1) (F + B + W) for 1F1B and GPipe, of one of vp chunks for interleaving,
/// where B and W are the halves of a backward; for ZB-H1 (p - 1) (F + B - W) while W <= B. With fewer micro-batches than stages
/// there are only m - 1 weight gradients to fill the gaps with.
fn idle_s(kind: ScheduleKind, shape: PipelineShape, cost: &Equal) -> f64 {
    let PipelineShape { pp, n_micro, .. } = shape;
    let [input_s, weights_s] = cost.halves_s;
    match kind {
        ScheduleKind::ZeroBubbleH1 => (pp - 1) as f64 * (cost.forward_s + input_s) - (pp.min(n_micro) - 1) as f64 * weights_s,
        _ => (pp - 1) as f64 * (cost.forward_s + input_s + weights_s),
    }
}

/// The papers' bubbles, with messages posted together and ahead. Breaks when a message is placed where one side still has work
/// (stages then wait for each other) or an order is not the paper's. All values are sums of quarters, so comparisons are exact up
/// to a division.
#[test]
fn bubbles_are_the_closed_forms() {
    for messages in [Messages::Together, Messages::Ahead] {
        let mut seen = 0;
        for (kind, schedule) in all_training(messages) {
            let PipelineShape { pp, vp, n_micro } = schedule.shape;
            for cost in &COSTS {
                let timeline = simulate(&schedule, cost);
                let busy_s = (vp * n_micro) as f64 * (cost.forward_s + cost.halves_s[0] + cost.halves_s[1]);
                let closed = idle_s(kind, schedule.shape, cost) / busy_s;
                let found = timeline.bubble_over_ideal();
                let context = format!("{messages:?} {kind:?} {:?} halves {:?}: {found} is not {closed}", schedule.shape, cost.halves_s);
                // One group of micro-batches, no steady phase: with exchanges at once the last stages' forwards wait behind longer
                // backwards, which costs less than one more chunk-step for each stage.
                let waits = messages == Messages::Together && kind == ScheduleKind::Interleaved && n_micro == pp;
                if waits && cost.halves_s[0] + cost.halves_s[1] > cost.forward_s {
                    assert!(found >= closed - 1e-12 && found < closed * 1.25 + 1e-12, "{context}");
                } else {
                    assert!((found - closed).abs() < 1e-12, "{context}");
                }
                check_timeline(&schedule, &timeline, cost);
                seen += 1;
            }
        }
        assert_eq!(seen, COSTS.len() * n_training());
    }
}

/// Weight gradients longer than input gradients: ZB-H1 is off its closed form, but never worse than 1F1B.
#[test]
fn zero_bubble_is_never_worse_than_1f1b() {
    for shape in shapes().filter(|shape| shape.vp == 1) {
        for weights_s in [0.25, 1.25, 2.0, 4.0] {
            let cost = free([1.0, weights_s]);
            let time_s = |kind| simulate(&training(kind, shape, Messages::Ahead).expect("one chunk"), &cost).makespan_s;
            let (zero_bubble_s, one_f_one_b_s) = (time_s(ScheduleKind::ZeroBubbleH1), time_s(ScheduleKind::OneFOneB));
            assert!(zero_bubble_s <= one_f_one_b_s, "{shape:?} {weights_s}: {zero_bubble_s} s, 1F1B {one_f_one_b_s} s");
        }
    }
}

/// Messages that take time, up to half a forward: posted ahead, they cost an interleaved step only the way of one micro-batch
/// through all chunks and back, 2 (p v - 1) messages, however many micro-batches there are, because in warm-up and after it the next
/// receive is under way while a stage computes; GPipe the same; and ZB-H1, whose stages have a weight gradient to run while a
/// message is on its way, at most twice that. Posted together every micro-batch pays.
#[test]
fn messages_posted_ahead_are_hidden() {
    for (kind, ahead) in all_training(Messages::Ahead) {
        let PipelineShape { pp, vp, n_micro } = ahead.shape;
        for message_s in [0.125, 0.25] {
            let slow = Equal { message_s, ..free([1.0, 1.0]) };
            let extra_s = |schedule: &Schedule| simulate(schedule, &slow).makespan_s - simulate(schedule, &COSTS[1]).makespan_s;
            let (found, chain) = (extra_s(&ahead) / message_s, (2 * (pp * vp - 1)) as f64);
            let context = format!("{kind:?} {:?}: {found} messages of {message_s} s, the chain has {chain}", ahead.shape);
            match kind {
                ScheduleKind::GPipe => assert!((found - chain).abs() < 1e-9, "{context}"),
                // A single stage hands chunks over without messages.
                ScheduleKind::Interleaved if pp > 1 => assert!((found - chain).abs() < 1e-9, "{context}"),
                ScheduleKind::ZeroBubbleH1 => assert!(found <= 2.0 * chain + 1e-9, "{context}"),
                _ => {}
            }
            if kind == ScheduleKind::Interleaved && pp > 1 && n_micro > pp {
                let together = training(kind, ahead.shape, Messages::Together).expect("the same shape");
                let exposed = extra_s(&together) / message_s;
                assert!(exposed >= found + (n_micro - pp) as f64, "{context}; together {exposed}");
            }
        }
    }
}

/// Busy time is the sum of the work, events of a stage follow each other without overlap, and the end is the makespan.
fn check_timeline(schedule: &Schedule, timeline: &Timeline, cost: &Equal) {
    let PipelineShape { pp, vp, n_micro } = schedule.shape;
    let work_s = (vp * n_micro) as f64 * (cost.forward_s + cost.halves_s[0] + cost.halves_s[1]);
    assert!(timeline.busy_s.iter().all(|&busy_s| busy_s == work_s), "{:?} is not {work_s} on each of {pp} stages", timeline.busy_s);
    let ends = timeline.events.windows(2).filter(|pair| pair[0].stage == pair[1].stage);
    ends.for_each(|pair| assert!(pair[0].end_s <= pair[1].start_s, "{pair:?}"));
    let last = timeline.events.iter().map(|event| event.end_s).fold(0.0, f64::max);
    assert_eq!(last, timeline.makespan_s);
    assert!((timeline.bubble_fraction - (1.0 - work_s / timeline.makespan_s)).abs() < 1e-12);
}

/// Every schedule of every shape passes the proof (which includes that forward comes before backward, and its first half before
/// its second), and what is alive at its peak is the papers' count: all micro-batches for GPipe, min(m, p - s) for 1F1B, one more
/// than the forwards run ahead for interleaving, and for ZB-H1 min(m, p - s) before the backward and at most min(m, p) in all, which
/// is 1F1B's peak on its first stage. The executor's memory is sized by it.
#[test]
fn every_shape_is_proved_and_has_the_known_peak() {
    for messages in [Messages::Together, Messages::Ahead] {
        for (kind, schedule) in all_training(messages) {
            let PipelineShape { pp, vp, n_micro } = schedule.shape;
            let liveness = schedule.check().unwrap_or_else(|wrong| panic!("{kind:?} {:?}: {wrong}\n{schedule}", schedule.shape));
            for stage in 0..pp {
                let (peaks, deferred) = (&liveness.peak_live[stage], &liveness.peak_deferred[stage]);
                let context = format!("{messages:?} {kind:?} {:?} stage {stage}", schedule.shape);
                match kind {
                    ScheduleKind::GPipe => assert_eq!(peaks, &[n_micro], "{context}"),
                    ScheduleKind::OneFOneB => assert_eq!(peaks, &[n_micro.min(pp - stage)], "{context}"),
                    ScheduleKind::Interleaved => {
                        let ahead = 2 * (pp - 1 - stage) + (vp - 1) * pp;
                        assert_eq!(most_alive(&schedule.stages[stage]), (ahead + 1).min(vp * n_micro), "{context}");
                        assert!(peaks.iter().sum::<usize>() >= (ahead + 1).min(vp * n_micro), "{context}");
                    }
                    ScheduleKind::ZeroBubbleH1 => {
                        assert_eq!(peaks, &[n_micro.min(pp)], "{context}");
                        assert_eq!(most_alive(&schedule.stages[stage]), n_micro.min(pp - stage), "{context}");
                        assert_eq!(deferred, &[n_micro.min(stage + 1)], "{context}");
                    }
                }
                let in_halves = kind == ScheduleKind::ZeroBubbleH1;
                assert!(in_halves || deferred.iter().all(|&n| n == 0), "{context}: {deferred:?}");
                // Tensors between chunks do not pile up: at most two come and two go at once (with a single group of micro-batches,
                // where stages do not go in step, at most the group); posted ahead, two more that are still on their way.
                let bound = match messages {
                    Messages::Together if n_micro == pp => 4.max(pp),
                    Messages::Together => 4,
                    Messages::Ahead => 6,
                };
                assert!(liveness.peak_boxed[stage] <= bound, "{context}: {} tensors in the boxes", liveness.peak_boxed[stage]);
            }
        }
    }
}

/// The gradients of a weight are added in the order of the micro-batches of 1F1B, whatever else is between: so ZB-H1 trains with
/// 1F1B's bits.
#[test]
fn weight_gradients_keep_their_order() {
    for shape in shapes().filter(|shape| shape.vp == 1) {
        let order = |kind, stage: usize| -> Vec<usize> {
            let schedule = training(kind, shape, Messages::Ahead).expect("one chunk");
            let micro = |action: &Action| match *action {
                Action::Backward { micro, .. } | Action::BackwardWeights { micro, .. } => Some(micro),
                _ => None,
            };
            schedule.stages[stage].iter().filter_map(micro).collect()
        };
        for stage in 0..shape.pp {
            assert_eq!(order(ScheduleKind::ZeroBubbleH1, stage), order(ScheduleKind::OneFOneB, stage), "{shape:?} {stage}");
        }
    }
}

/// Forwards less backwards (first halves), at the most, over all chunks of a stage.
fn most_alive(actions: &[Action]) -> usize {
    let (mut alive, mut most) = (0usize, 0);
    for action in actions {
        match action {
            Action::Forward { .. } => alive += 1,
            Action::Backward { .. } | Action::BackwardInput { .. } => alive -= 1,
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
    let all = [Messages::Together, Messages::Ahead].into_iter().flat_map(all_training);
    for (kind, schedule) in all.filter(|(_, s)| s.shape.n_micro == 24) {
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
        (ScheduleKind::ZeroBubbleH1, PipelineShape { pp: 3, vp: 1, n_micro: 5 }),
        (ScheduleKind::ZeroBubbleH1, PipelineShape { pp: 1, vp: 1, n_micro: 2 }),
    ];
    for ((kind, shape), messages) in shapes.into_iter().flat_map(|shape| [(shape, Messages::Together), (shape, Messages::Ahead)]) {
        let good = training(kind, shape, messages).expect("a possible shape");
        good.check().expect("as it was made");
        let refused = |what: &str, broken: &Schedule| {
            assert_ne!(broken, &good, "{what} changed nothing");
            assert!(broken.check().is_err(), "{messages:?} {kind:?} {shape:?}: {what} was accepted\n{broken}");
        };
        for stage in 0..shape.pp {
            for i in 0..good.stages[stage].len() {
                let action = &good.stages[stage][i];
                let place = format!("{action} at {stage}:{i}");
                let mut dropped = good.clone();
                dropped.stages[stage].remove(i);
                refused(&format!("dropping {place}"), &dropped);
                let mut doubled = good.clone();
                doubled.stages[stage].insert(i, action.clone());
                refused(&format!("doubling {place}"), &doubled);
                // The model's first chunk may run forwards at any time, and a receive may be posted at any time.
                let needs_nothing = match action {
                    Action::Forward { chunk: 0, .. } => stage == 0,
                    Action::Post { sends, .. } => sends.is_empty(),
                    _ => false,
                };
                if !needs_nothing {
                    let mut first = good.clone();
                    let action = first.stages[stage].remove(i);
                    first.stages[stage].insert(0, action);
                    if first != good {
                        refused(&format!("moving {place} to the front"), &first);
                    }
                }
                if let Some((sends, recvs)) = parcels_of(&mut good.clone().stages[stage][i]) {
                    for n in 0..sends.len() + recvs.len() {
                        break_parcel(&good, stage, i, n).iter().for_each(|broken| refused(&format!("message {n} of {place}"), broken));
                    }
                }
            }
        }
    }
}

fn parcels_of(action: &mut Action) -> Option<(&mut Vec<Parcel>, &mut Vec<Parcel>)> {
    match action {
        Action::Exchange { sends, recvs } | Action::Post { sends, recvs } | Action::Await { sends, recvs } => Some((sends, recvs)),
        _ => None,
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
        let (sends, recvs) = parcels_of(&mut broken.stages[stage][i]).expect("messages");
        change(sends.iter_mut().chain(recvs).nth(n).expect("a parcel"));
        broken
    };
    changes.iter().map(apply).collect()
}

/// Two stages that each wait for the other's message before sending their own: right by every local rule, and a deadlock.
/// This is what splitting an exchange into receive-then-send does.
#[test]
fn a_receive_before_each_send_is_a_deadlock() {
    let good = training(ScheduleKind::OneFOneB, PipelineShape { pp: 2, vp: 1, n_micro: 4 }, Messages::Together).expect("a possible shape");
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

/// Waits for each message right where it is posted, before the other stage can have posted its end: a deadlock, which blocking
/// sends and receives in place of posted ones would be.
#[test]
fn waiting_where_messages_are_posted_is_a_deadlock() {
    let shape = PipelineShape { pp: 2, vp: 2, n_micro: 4 };
    let mut broken = training(ScheduleKind::Interleaved, shape, Messages::Ahead).expect("a possible shape");
    for actions in &mut broken.stages {
        let split = |action: Action| match action {
            Action::Post { sends, recvs } => vec![Action::Exchange { sends, recvs }],
            Action::Await { .. } => vec![],
            other => vec![other],
        };
        *actions = actions.drain(..).flat_map(split).collect();
    }
    let wrong = broken.check().expect_err("receives are posted before what they wait for is made");
    assert!(wrong.starts_with("deadlock: "), "{wrong}");
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
    assert!(zero_bubble_h1(shape).expect_err("two chunks").to_string().contains("\"zb-h1\""));
}

/// The text of small schedules, worked out by hand from the papers' figures; any change of order or message shows here.
#[test]
fn golden_texts() {
    let with = |messages, kind, pp, vp, n_micro| training(kind, PipelineShape { pp, vp, n_micro }, messages).expect("possible").to_string();
    let text = |kind, pp, vp, n_micro| with(Messages::Together, kind, pp, vp, n_micro);
    // Stage 1 sends each gradient up at once; its weight gradients lag by one.
    let zero_bubble = "\
0: F0.0 [>a0.0@1] F0.1 [>a0.1@1 <g0.0@1] I0.0 W0.0 F0.2 [>a0.2@1 <g0.1@1] I0.1 W0.1 [<g0.2@1] I0.2 W0.2 R0
1: [<a0.0@0] F0.0 I0.0 [>g0.0@0 <a0.1@0] F0.1 I0.1 W0.0 [>g0.1@0 <a0.2@0] F0.2 I0.2 [>g0.2@0] W0.1 W0.2 R0
";
    assert_eq!(text(ScheduleKind::ZeroBubbleH1, 2, 1, 3), zero_bubble);
    // Each receive is posted one computation before the one that reads it.
    let ahead = "\
0: F0.0 (>a0.0@1 <g0.0@1) F0.1 (>a0.1@1) {<g0.0@1} B0.0 (<g0.1@1) F0.2 {>a0.0@1} (>a0.2@1 <g0.2@1) {<g0.1@1} B0.1 {<g0.2@1} B0.2 R0 \
{>a0.1@1 >a0.2@1}
1: (<a0.0@0) {<a0.0@0} F0.0 (<a0.1@0) B0.0 (>g0.0@0) {<a0.1@0} F0.1 (<a0.2@0) B0.1 (>g0.1@0) {<a0.2@0} F0.2 B0.2 {>g0.0@0} (>g0.2@0) R0 \
{>g0.1@0 >g0.2@0}
";
    assert_eq!(with(Messages::Ahead, ScheduleKind::OneFOneB, 2, 1, 3), ahead);
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
