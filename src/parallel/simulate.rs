//! The time a schedule takes under a model of costs: an event simulation in which messages are rendezvous, as in
//! `Schedule::check`: on their way from the moment both ends are posted. This file knows nothing of how schedules are made or executed.

use crate::parallel::schedule::{Action, Parcel, Schedule, What};
use std::collections::HashMap;

/// Seconds of each kind of work.
pub trait CostModel {
    /// One micro-batch forwards through a chunk.
    fn forward_s(&self, stage: usize, chunk: usize) -> f64;
    /// One micro-batch backwards through a chunk.
    fn backward_s(&self, stage: usize, chunk: usize) -> f64;
    /// The first half of it: the gradient of the input.
    fn backward_input_s(&self, stage: usize, chunk: usize) -> f64 {
        0.5 * self.backward_s(stage, chunk)
    }
    /// The second half: the gradients of the weights.
    fn backward_weights_s(&self, stage: usize, chunk: usize) -> f64 {
        0.5 * self.backward_s(stage, chunk)
    }
    /// One message, from the moment both sides have posted it.
    fn message_s(&self, from: usize, to: usize, what: What) -> f64;
    /// The reduction of a chunk's gradients over the replicas.
    fn reduce_s(&self, _stage: usize, _chunk: usize) -> f64 {
        0.0
    }
    /// An action of a stage's list that is no message: by the above, unless each was measured.
    fn action_s(&self, stage: usize, _action_idx: usize, action: &Action) -> f64 {
        match *action {
            Action::Forward { chunk, .. } => self.forward_s(stage, chunk),
            Action::Backward { chunk, .. } => self.backward_s(stage, chunk),
            Action::BackwardInput { chunk, .. } => self.backward_input_s(stage, chunk),
            Action::BackwardWeights { chunk, .. } => self.backward_weights_s(stage, chunk),
            Action::ReduceGrads { chunk } => self.reduce_s(stage, chunk),
            Action::Exchange { .. } | Action::Post { .. } | Action::Await { .. } => 0.0,
        }
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
    /// Time each stage computes (forwards and backwards, whole or in halves).
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
                    Action::Exchange { sends, recvs } | Action::Post { sends, recvs } | Action::Await { sends, recvs } => {
                        let outgoing = |p: &Parcel| (stage, p.peer, p.what, p.chunk, p.micro);
                        let incoming = |p: &Parcel| (p.peer, stage, p.what, p.chunk, p.micro);
                        if !matches!(action, Action::Await { .. }) {
                            let mut post = |ends: &mut HashMap<Message, f64>, message| {
                                progress |= !ends.contains_key(&message);
                                ends.entry(message).or_insert(start_s);
                            };
                            sends.iter().for_each(|p| post(&mut send_s, outgoing(p)));
                            recvs.iter().for_each(|p| post(&mut recv_s, incoming(p)));
                        }
                        if matches!(action, Action::Post { .. }) {
                            start_s
                        } else {
                            let complete = |message: Message| {
                                let (from, to, what, ..) = message;
                                Some(send_s.get(&message)?.max(*recv_s.get(&message)?) + cost.message_s(from, to, what))
                            };
                            let (sent, received) = (sends.iter().map(outgoing), recvs.iter().map(incoming));
                            let Some(end_s) = sent.chain(received).try_fold(start_s, |end, message| Some(end.max(complete(message)?)))
                            else {
                                break;
                            };
                            end_s
                        }
                    }
                    _ => start_s + cost.action_s(stage, next[stage], action),
                };
                if is_computation(action) {
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

fn is_computation(action: &Action) -> bool {
    use Action::{Backward, BackwardInput, BackwardWeights, Forward};
    matches!(action, Forward { .. } | Backward { .. } | BackwardInput { .. } | BackwardWeights { .. })
}
