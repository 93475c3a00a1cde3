//! Puts the messages into a schedule of computation.
//!
//! The method: run the computation on a clock on which every forward and backward (or pair of them, see [`Rhythm`])
//! takes one tick and a message none. A
//! message belongs to the tick at which its reader starts; there both its ends stand between two computations. Sender and
//! receiver take it up in exactly that gap, and all messages of one gap form one `Exchange`.
//!
//! Why this cannot deadlock, even if every send blocks until its receive is posted: order all computations and messages by
//! tick, messages first. On every stage the list follows this one global order. Suppose all stages are stuck, and take the
//! first unfinished item of the order: everything before it on its stage (both stages, for a message) is finished or in the
//! same posted exchange, so it can go on. `Schedule::check` proves the same from the finished list, without this argument.

use super::{Action, ChunkAt, Parcel, Schedule, What};
use std::collections::HashMap;

/// A computation: which direction of which chunk on which micro-batch.
type Work = (What, ChunkAt, usize);

/// Which computations share a tick. Wrong choices stay correct but lose time: stages then meet for messages at moments when
/// one of them has work to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rhythm {
    /// Each forward and each backward has a tick of its own: neighbours alternate (GPipe, 1F1B, forward only).
    Single,
    /// A forward and the backward after it share a tick, with messages only between pairs: all stages go in step, whatever
    /// the ratio of backward to forward (interleaved; Megatron-LM's send_forward_backward_recv_forward_backward).
    Pairs,
}

/// Adds the exchanges. Panics when the computations cannot be executed in the given order (a generator's fault).
pub fn insert_messages(compute: &Schedule, rhythm: Rhythm) -> Schedule {
    let Clock { start, ticks } = Clock::run(compute, rhythm);
    // The gap before the first action that starts at `tick` or later.
    let gap_at = |stage: usize, tick: usize| ticks[stage].partition_point(|&start| start < tick);
    let mut gaps: Vec<Vec<Gap>> = compute.stages.iter().map(|actions| vec![Gap::default(); actions.len() + 1]).collect();
    for (reader, tick) in sorted(&start) {
        let (what, at, micro) = reader;
        let Some(from) = source(compute, reader) else { continue };
        if from.stage == at.stage {
            continue; // handed over within the stage
        }
        let parcel = |peer| Parcel { what, chunk: at.chunk, micro, peer };
        gaps[from.stage][gap_at(from.stage, tick)].sends.push(parcel(at.stage));
        gaps[at.stage][gap_at(at.stage, tick)].recvs.push(parcel(from.stage));
    }
    let exchange = |gap: Gap| vec![Action::Exchange { sends: gap.sends, recvs: gap.recvs }];
    let gaps = gaps.into_iter().map(|gaps| gaps.into_iter().map(exchange).collect());
    merge(compute, gaps)
}

#[derive(Clone, Default)]
struct Gap {
    sends: Vec<Parcel>,
    recvs: Vec<Parcel>,
}

/// Sends of one kind to one stage that may be under way at once: the one just made, and one that the reader is late for.
const SENDS_UNDER_WAY: usize = 2;

/// Adds messages that overlap with computation. A send is posted as soon as it is made; a receive one computation before the one
/// that reads it, so that it is under way meanwhile (Megatron-LM's overlap in warm-up and steady state), and is waited for right
/// before. A send is waited for when its kind and stage has `SENDS_UNDER_WAY` later ones, or at the end. Needs a communicator whose
/// messages complete in any order.
pub fn post_ahead(compute: &Schedule) -> Schedule {
    let works = |stage: usize| compute.stages[stage].iter().enumerate().filter_map(move |(i, action)| Some((work(stage, action)?, i)));
    let place: HashMap<Work, usize> = (0..compute.stages.len()).flat_map(works).collect();
    let mut gaps: Vec<Vec<Ahead>> = compute.stages.iter().map(|actions| vec![Ahead::default(); actions.len() + 1]).collect();
    for stage in 0..compute.stages.len() {
        for (reader, read) in works(stage) {
            let (what, at, micro) = reader;
            let Some(from) = source(compute, reader).filter(|from| from.stage != stage) else { continue };
            let parcel = |peer| Parcel { what, chunk: at.chunk, micro, peer };
            let made = place[&(what, from, micro)];
            gaps[from.stage][made + 1].post.sends.push(parcel(stage));
            gaps[stage][read.saturating_sub(1)].post.recvs.push(parcel(from.stage));
            gaps[stage][read].wait.recvs.push(parcel(from.stage));
        }
    }
    gaps.iter_mut().for_each(|gaps| make_room(gaps));
    let actions = |gap: Ahead| {
        let room = Action::Await { sends: gap.wait.sends, recvs: Vec::new() };
        let post = Action::Post { sends: gap.post.sends, recvs: gap.post.recvs };
        vec![room, post, Action::Await { sends: Vec::new(), recvs: gap.wait.recvs }]
    };
    merge(compute, gaps.into_iter().map(|gaps| gaps.into_iter().map(actions).collect()))
}

/// A gap of `post_ahead`.
#[derive(Clone, Default)]
struct Ahead {
    post: Gap,
    wait: Gap,
}

/// Places the waits for a stage's sends.
fn make_room(gaps: &mut [Ahead]) {
    let mut sent: HashMap<(usize, What), Vec<(usize, Parcel)>> = HashMap::new();
    for (i, gap) in gaps.iter().enumerate() {
        gap.post.sends.iter().for_each(|parcel| sent.entry((parcel.peer, parcel.what)).or_default().push((i, *parcel)));
    }
    let mut waits: Vec<(usize, Parcel)> = Vec::new();
    for sends in sent.values() {
        for (i, (_, parcel)) in sends.iter().enumerate() {
            let at = sends.get(i + SENDS_UNDER_WAY).map_or(gaps.len() - 1, |&(gap, _)| gap);
            waits.push((at, *parcel));
        }
    }
    waits.sort_by_key(|(at, parcel)| (*at, parcel.what, parcel.peer, parcel.micro, parcel.chunk));
    waits.into_iter().for_each(|(at, parcel)| gaps[at].wait.sends.push(parcel));
}

/// The computation with messages in its gaps, but for empty ones: before each action, and after the last.
fn merge(compute: &Schedule, gaps: impl Iterator<Item = Vec<Vec<Action>>>) -> Schedule {
    let is_something = |action: &Action| match action {
        Action::Exchange { sends, recvs } | Action::Post { sends, recvs } | Action::Await { sends, recvs } => {
            !sends.is_empty() || !recvs.is_empty()
        }
        _ => true,
    };
    let stage = |(actions, gaps): (&Vec<Action>, Vec<Vec<Action>>)| {
        let own = actions.iter().map(|action| Some(action.clone())).chain([None]);
        gaps.into_iter().zip(own).flat_map(|(gap, own)| gap.into_iter().filter(is_something).chain(own)).collect()
    };
    Schedule { shape: compute.shape, stages: compute.stages.iter().zip(gaps).map(stage).collect() }
}

/// The chunk that makes what `reader` reads, if a chunk does.
fn source(schedule: &Schedule, (what, at, _): Work) -> Option<ChunkAt> {
    match what {
        What::Activation => schedule.shape.previous(at),
        What::Gradient => schedule.shape.next(at),
    }
}

/// Work in the global order of the proof above: by tick, ties in a fixed order.
fn sorted(start: &HashMap<Work, usize>) -> Vec<(Work, usize)> {
    let mut all: Vec<(Work, usize)> = start.iter().map(|(&work, &tick)| (work, tick)).collect();
    all.sort_by_key(|&((what, at, micro), tick)| (tick, what, at.chunk, micro, at.stage));
    all
}

fn work(stage: usize, action: &Action) -> Option<Work> {
    match *action {
        Action::Forward { chunk, micro } => Some((What::Activation, ChunkAt { stage, chunk }, micro)),
        Action::Backward { chunk, micro } | Action::BackwardInput { chunk, micro } => {
            Some((What::Gradient, ChunkAt { stage, chunk }, micro))
        }
        _ => None,
    }
}

/// The computation in ticks.
struct Clock {
    /// The tick of each forward and backward.
    start: HashMap<Work, usize>,
    /// The tick of each action of each stage. `BackwardWeights` has a tick of its own that nobody waits for; `ReduceGrads` takes no
    /// time: it stands at the tick after the backward before it.
    ticks: Vec<Vec<usize>>,
}

impl Clock {
    fn run(compute: &Schedule, rhythm: Rhythm) -> Clock {
        let n_stages = compute.stages.len();
        let (mut start, mut ticks, mut free) = (HashMap::new(), vec![Vec::new(); n_stages], vec![0; n_stages]);
        loop {
            let mut progress = false;
            for (stage, actions) in compute.stages.iter().enumerate() {
                while ticks[stage].len() < actions.len() {
                    let together: Vec<Option<Work>> =
                        unit(&actions[ticks[stage].len()..], rhythm).map(|action| work(stage, action)).collect();
                    let works = || together.iter().flatten().copied();
                    let ready = works().try_fold(free[stage], |tick, work| Some(tick.max(ready_tick(compute, &start, work, &together)?)));
                    let Some(tick) = ready else { break };
                    for work in works() {
                        start.insert(work, tick);
                        free[stage] = tick + 1;
                    }
                    if let Action::BackwardWeights { .. } = actions[ticks[stage].len()] {
                        free[stage] = tick + 1;
                    }
                    ticks[stage].extend(together.iter().map(|_| tick));
                    progress = true;
                }
            }
            if !progress {
                break;
            }
        }
        for (stage, actions) in compute.stages.iter().enumerate() {
            assert_eq!(ticks[stage].len(), actions.len(), "stage {stage} waits for ever at {:?}", actions.get(ticks[stage].len()));
        }
        Clock { start, ticks }
    }
}

/// The first actions of a list that share one tick.
fn unit(actions: &[Action], rhythm: Rhythm) -> impl Iterator<Item = &Action> {
    assert!(!matches!(actions[0], Action::Exchange { .. }), "messages are inserted once");
    let is_pair = matches!(actions, [Action::Forward { .. }, Action::Backward { .. }, ..]);
    actions[..if is_pair && rhythm == Rhythm::Pairs { 2 } else { 1 }].iter()
}

/// The first tick at which everything that `work` reads has been made; `None` when some of it has no tick yet. A backward
/// may read from the forward that shares its tick.
fn ready_tick(compute: &Schedule, start: &HashMap<Work, usize>, work: Work, together: &[Option<Work>]) -> Option<usize> {
    let (what, at, micro) = work;
    let own_forward = (what == What::Gradient).then_some((What::Activation, at, micro));
    let input = source(compute, work).map(|from| (what, from, micro));
    let earlier = own_forward.into_iter().chain(input).filter(|&read| !together.contains(&Some(read)));
    earlier.into_iter().try_fold(0, |ready, read| start.get(&read).map(|&tick| ready.max(tick + 1)))
}
