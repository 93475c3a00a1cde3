//! The time a schedule takes under a model of costs: an event simulation in which exchanges are blocking rendezvous, as in
//! `Schedule::check`. This file knows nothing of how schedules are made or executed.

use crate::parallel::schedule::{Action, Parcel, Schedule, What};
use std::collections::HashMap;

/// Seconds of each kind of work.
pub trait CostModel {
    /// One micro-batch forwards through a chunk.
    fn forward_s(&self, stage: usize, chunk: usize) -> f64;
    /// One micro-batch backwards through a chunk.
    fn backward_s(&self, stage: usize, chunk: usize) -> f64;
    /// One message, from the moment both sides have posted it.
    fn message_s(&self, from: usize, to: usize, what: What) -> f64;
    /// The reduction of a chunk's gradients over the replicas.
    fn reduce_s(&self, _stage: usize, _chunk: usize) -> f64 {
        0.0
    }
}

/// One action in time.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// Where.
    pub stage: usize,
    /// Index in the stage's list.
    pub action_idx: usize,
    /// When it started.
    pub start_s: f64,
    /// When it was complete.
    pub end_s: f64,
}

/// A schedule in time.
#[derive(Clone, PartialEq, Debug)]
pub struct Timeline {
    /// From the first start to the last end.
    pub makespan_s: f64,
    /// Time each stage computes (forwards and backwards).
    pub busy_s: Vec<f64>,
    /// Share of the makespan in which the average stage does not compute: 1 - mean(busy) / makespan.
    pub bubble_fraction: f64,
    /// Every action, by stage and then in order.
    pub events: Vec<Event>,
}

impl Timeline {
    /// Idle time over compute time of the average stage: the "bubble" of the papers, (p - 1) / m for GPipe.
    pub fn bubble_over_ideal(&self) -> f64 {
        let mean_busy = self.busy_s.iter().sum::<f64>() / self.busy_s.len() as f64;
        (self.makespan_s - mean_busy) / mean_busy
    }
}

/// (from, to, what, chunk, micro)
type Message = (usize, usize, What, usize, usize);

/// Runs a schedule that has passed `check`; panics on one that deadlocks.
pub fn simulate(schedule: &Schedule, cost: &dyn CostModel) -> Timeline {
    let n_stages = schedule.stages.len();
    let (mut next, mut now_s, mut busy_s) = (vec![0; n_stages], vec![0.0f64; n_stages], vec![0.0f64; n_stages]);
    let mut events: Vec<Vec<Event>> = vec![Vec::new(); n_stages];
    // When each end of each message was posted.
    let (mut send_s, mut recv_s): (HashMap<Message, f64>, HashMap<Message, f64>) = (HashMap::new(), HashMap::new());
    loop {
        let mut progress = false;
        for (stage, actions) in schedule.stages.iter().enumerate() {
            while let Some(action) = actions.get(next[stage]) {
                let start_s = now_s[stage];
                let end_s = match action {
                    &Action::Forward { chunk, .. } => start_s + cost.forward_s(stage, chunk),
                    &Action::Backward { chunk, .. } => start_s + cost.backward_s(stage, chunk),
                    &Action::ReduceGrads { chunk } => start_s + cost.reduce_s(stage, chunk),
                    Action::Exchange { sends, recvs } => {
                        let outgoing = |p: &Parcel| (stage, p.peer, p.what, p.chunk, p.micro);
                        let incoming = |p: &Parcel| (p.peer, stage, p.what, p.chunk, p.micro);
                        sends.iter().for_each(|p| progress |= send_s.insert(outgoing(p), start_s).is_none());
                        recvs.iter().for_each(|p| progress |= recv_s.insert(incoming(p), start_s).is_none());
                        let sent = sends.iter().map(|p| Some(recv_s.get(&outgoing(p))? + cost.message_s(stage, p.peer, p.what)));
                        let received = recvs.iter().map(|p| Some(send_s.get(&incoming(p))? + cost.message_s(p.peer, stage, p.what)));
                        let Some(end_s) = sent.chain(received).try_fold(start_s, |end, at| Some(end.max(at?))) else { break };
                        end_s
                    }
                };
                if matches!(action, Action::Forward { .. } | Action::Backward { .. }) {
                    busy_s[stage] += end_s - start_s;
                }
                events[stage].push(Event { stage, action_idx: next[stage], start_s, end_s });
                now_s[stage] = end_s;
                next[stage] += 1;
                progress = true;
            }
        }
        if !progress {
            break;
        }
    }
    assert!((0..n_stages).all(|stage| next[stage] == schedule.stages[stage].len()), "the schedule deadlocks: check() it first");
    let makespan_s = now_s.iter().copied().fold(0.0, f64::max);
    let bubble_fraction = 1.0 - busy_s.iter().sum::<f64>() / (n_stages as f64 * makespan_s);
    Timeline { makespan_s, busy_s, bubble_fraction, events: events.concat() }
}
