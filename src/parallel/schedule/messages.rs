//! Puts the messages into a schedule of computation.
//!
//! The method: run the computation on a clock on which every forward and backward takes one tick and a message none. A
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

/// Adds the exchanges. Panics when the computations cannot be executed in the given order (a generator's fault).
pub fn insert_messages(compute: &Schedule) -> Schedule {
    let Clock { start, ticks } = Clock::run(compute);
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
    let merge = |(actions, gaps): (&Vec<Action>, Vec<Gap>)| {
        let mut merged = Vec::new();
        for (i, gap) in gaps.into_iter().enumerate() {
            if !gap.sends.is_empty() || !gap.recvs.is_empty() {
                merged.push(Action::Exchange { sends: gap.sends, recvs: gap.recvs });
            }
            merged.extend(actions.get(i).cloned());
        }
        merged
    };
    Schedule { shape: compute.shape, stages: compute.stages.iter().zip(gaps).map(merge).collect() }
}

#[derive(Clone, Default)]
struct Gap {
    sends: Vec<Parcel>,
    recvs: Vec<Parcel>,
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
        Action::Backward { chunk, micro } => Some((What::Gradient, ChunkAt { stage, chunk }, micro)),
        _ => None,
    }
}

/// The computation in ticks.
struct Clock {
    /// When each forward and backward starts.
    start: HashMap<Work, usize>,
    /// When each action of each stage starts. `ReduceGrads` takes no tick: it starts when the backward before it has ended.
    ticks: Vec<Vec<usize>>,
}

impl Clock {
    fn run(compute: &Schedule) -> Clock {
        let n_stages = compute.stages.len();
        let (mut start, mut ticks, mut free) = (HashMap::new(), vec![Vec::new(); n_stages], vec![0; n_stages]);
        loop {
            let mut progress = false;
            for (stage, actions) in compute.stages.iter().enumerate() {
                while let Some(action) = actions.get(ticks[stage].len()) {
                    assert!(!matches!(action, Action::Exchange { .. }), "messages are inserted once");
                    let work = work(stage, action);
                    let Some(ready) = work.map_or(Some(0), |work| ready_tick(compute, &start, work)) else { break };
                    let tick = ready.max(free[stage]);
                    if let Some(work) = work {
                        start.insert(work, tick);
                        free[stage] = tick + 1;
                    }
                    ticks[stage].push(tick);
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

/// The tick at which everything that `work` reads has been made; `None` when some of it has not been started.
fn ready_tick(compute: &Schedule, start: &HashMap<Work, usize>, work: Work) -> Option<usize> {
    let (what, at, micro) = work;
    let own_forward = (what == What::Gradient).then_some((What::Activation, at, micro));
    let input = source(compute, work).map(|from| (what, from, micro));
    own_forward.into_iter().chain(input).try_fold(0, |ready, work| start.get(&work).map(|&tick| ready.max(tick + 1)))
}
