//! The proof of a schedule, from the finished lists alone: nothing here knows how they were made.

use super::{Action, ChunkAt, Parcel, PipelineShape, Schedule, What};
use std::collections::{HashMap, HashSet};

/// What a schedule keeps in memory at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Liveness {
    /// Most micro-batches of each [stage][chunk] whose forward is done and whose backward, both halves, is not: the number of
    /// saved activations the executor needs. All 1 for a schedule of forwards alone (nothing is saved past the forward).
    pub peak_live: Vec<Vec<usize>>,
    /// Most micro-batches of each [stage][chunk] that wait for the second half of their backward alone.
    pub peak_deferred: Vec<Vec<usize>>,
    /// Most tensors at once in the inbox and the outbox of each stage and on their way together.
    pub peak_boxed: Vec<usize>,
}

/// Side of a message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum End {
    Send,
    Recv,
}

/// A message by its consumer: (what, consumer, micro).
type Key = (What, ChunkAt, usize);

impl Schedule {
    /// Proves that the schedule can be executed:
    /// - every (chunk, micro) runs forward once, then backward once, whole or as input then weights (or, for all of them, forward
    ///   alone), and each chunk's gradients are reduced once, after its last backward;
    /// - everything that is read has been received (and waited for) or made on the same stage, is read once, and is sent once;
    ///   every message that is posted is waited for;
    /// - on each channel (from, to) the exchanges send in the order in which they receive; messages that are posted, which may
    ///   complete in any order, do so for each kind;
    /// - nothing deadlocks even if a message completes only when both its ends are posted.
    ///
    /// Returns what is alive at the peak, or the first fault.
    pub fn check(&self) -> Result<Liveness, String> {
        let PipelineShape { pp, vp, n_micro } = self.shape;
        if pp == 0 || vp == 0 || n_micro == 0 || self.stages.len() != pp {
            return Err(format!("{} stages for {:?}", self.stages.len(), self.shape));
        }
        let is_backward = |action: &Action| matches!(action, Action::Backward { .. } | Action::BackwardInput { .. });
        let has_backward = |actions: &Vec<Action>| actions.iter().any(is_backward);
        let trains = self.stages.iter().any(has_backward);
        let mut liveness = Liveness { peak_live: Vec::new(), peak_deferred: Vec::new(), peak_boxed: Vec::new() };
        for stage in 0..pp {
            let mut walk = StageWalk::new(self.shape, stage, trains);
            for action in &self.stages[stage] {
                walk.step(action).map_err(|wrong| format!("stage {stage}, {action}: {wrong}"))?;
            }
            walk.finish().map_err(|wrong| format!("stage {stage}: {wrong}"))?;
            liveness.peak_live.push(walk.peak_live);
            liveness.peak_deferred.push(walk.peak_deferred);
            liveness.peak_boxed.push(walk.peak_boxed);
        }
        self.check_channels()?;
        self.check_progress()?;
        Ok(liveness)
    }

    /// On each channel the sends and the receives are the same list.
    fn check_channels(&self) -> Result<(), String> {
        // By channel, and by kind where the kinds are apart.
        let mut channels: HashMap<(usize, usize, Option<What>), [Vec<Parcel>; 2]> = HashMap::new();
        for (stage, actions) in self.stages.iter().enumerate() {
            for action in actions {
                let (sends, recvs, kinds_are_apart) = match action {
                    Action::Exchange { sends, recvs } => (sends, recvs, false),
                    Action::Post { sends, recvs } => (sends, recvs, true),
                    _ => continue,
                };
                let kind = |parcel: &Parcel| kinds_are_apart.then_some(parcel.what);
                for parcel in sends {
                    // As the receiver writes it, so that the two lists can be compared.
                    let seen_there = Parcel { peer: stage, ..*parcel };
                    channels.entry((stage, parcel.peer, kind(parcel))).or_default()[0].push(seen_there);
                }
                for parcel in recvs {
                    channels.entry((parcel.peer, stage, kind(parcel))).or_default()[1].push(*parcel);
                }
            }
        }
        for ((from, to, _), [sent, received]) in &channels {
            if let Some(i) = (0..sent.len().max(received.len())).find(|&i| sent.get(i) != received.get(i)) {
                let name = |parcel: Option<&Parcel>| parcel.map_or("nothing".into(), Parcel::to_string);
                let (sent, received) = (name(sent.get(i)), name(received.get(i)));
                return Err(format!("channel {from} -> {to}, message {i}: sent {sent}, received {received}"));
            }
        }
        Ok(())
    }

    /// Runs all stages with blocking rendezvous.
    fn check_progress(&self) -> Result<(), String> {
        let mut next = vec![0; self.stages.len()];
        // Both ends of each message: (end, from, to, what, chunk, micro).
        let mut posted: HashSet<(End, usize, usize, What, usize, usize)> = HashSet::new();
        loop {
            let mut progress = false;
            for (stage, actions) in self.stages.iter().enumerate() {
                while let Some(action) = actions.get(next[stage]) {
                    let (sends, recvs, posts, waits) = match action {
                        Action::Exchange { sends, recvs } => (&sends[..], &recvs[..], true, true),
                        Action::Post { sends, recvs } => (&sends[..], &recvs[..], true, false),
                        Action::Await { sends, recvs } => (&sends[..], &recvs[..], false, true),
                        _ => (&[][..], &[][..], false, false),
                    };
                    let send = |end, p: &Parcel| (end, stage, p.peer, p.what, p.chunk, p.micro);
                    let recv = |end, p: &Parcel| (end, p.peer, stage, p.what, p.chunk, p.micro);
                    if posts {
                        sends.iter().for_each(|p| progress |= posted.insert(send(End::Send, p)));
                        recvs.iter().for_each(|p| progress |= posted.insert(recv(End::Recv, p)));
                    }
                    if waits {
                        let sent = sends.iter().all(|p| posted.contains(&send(End::Recv, p)));
                        let received = recvs.iter().all(|p| posted.contains(&recv(End::Send, p)));
                        if !sent || !received {
                            break;
                        }
                    }
                    next[stage] += 1;
                    progress = true;
                }
            }
            if !progress {
                break;
            }
        }
        let stuck = self.stages.iter().enumerate().filter_map(|(stage, actions)| {
            let action = actions.get(next[stage])?;
            Some(format!("stage {stage} at {action}"))
        });
        let stuck: Vec<String> = stuck.collect();
        if stuck.is_empty() { Ok(()) } else { Err(format!("deadlock: {}", stuck.join(", "))) }
    }
}

/// The state of one stage while its list is read.
struct StageWalk {
    shape: PipelineShape,
    stage: usize,
    trains: bool,
    forward_done: HashSet<(usize, usize)>,
    /// First half, or whole.
    input_done: HashSet<(usize, usize)>,
    /// Second half, or whole.
    weights_done: HashSet<(usize, usize)>,
    reduced: HashSet<usize>,
    inbox: HashSet<Key>,
    outbox: HashSet<Key>,
    received: HashSet<Key>,
    /// Posted and not waited for.
    under_way: HashSet<(End, Key)>,
    live: Vec<usize>,
    peak_live: Vec<usize>,
    deferred: Vec<usize>,
    peak_deferred: Vec<usize>,
    peak_boxed: usize,
}

impl StageWalk {
    fn new(shape: PipelineShape, stage: usize, trains: bool) -> StageWalk {
        StageWalk {
            shape,
            stage,
            trains,
            forward_done: HashSet::new(),
            input_done: HashSet::new(),
            weights_done: HashSet::new(),
            reduced: HashSet::new(),
            inbox: HashSet::new(),
            outbox: HashSet::new(),
            received: HashSet::new(),
            under_way: HashSet::new(),
            live: vec![0; shape.vp],
            peak_live: vec![0; shape.vp],
            deferred: vec![0; shape.vp],
            peak_deferred: vec![0; shape.vp],
            peak_boxed: 0,
        }
    }

    fn step(&mut self, action: &Action) -> Result<(), String> {
        match action {
            &Action::Forward { chunk, micro } => self.forward(chunk, micro)?,
            &Action::Backward { chunk, micro } => {
                self.backward_input(chunk, micro)?;
                self.backward_weights(chunk, micro)?;
            }
            &Action::BackwardInput { chunk, micro } => {
                self.backward_input(chunk, micro)?;
                self.peak_deferred[chunk] = self.peak_deferred[chunk].max(self.deferred[chunk]);
            }
            &Action::BackwardWeights { chunk, micro } => self.backward_weights(chunk, micro)?,
            Action::Exchange { sends, recvs } => {
                self.post(sends, recvs)?;
                self.wait(sends, recvs)?;
            }
            Action::Post { sends, recvs } => self.post(sends, recvs)?,
            Action::Await { sends, recvs } => self.wait(sends, recvs)?,
            &Action::ReduceGrads { chunk } => {
                let done = self.weights_done.iter().filter(|&&(c, _)| c == chunk).count();
                if done != self.shape.n_micro {
                    return Err(format!("{done} of {} backwards are done", self.shape.n_micro));
                }
                if !self.reduced.insert(chunk) {
                    return Err("reduced twice".into());
                }
            }
        }
        self.count_boxed();
        Ok(())
    }

    fn count_boxed(&mut self) {
        self.peak_boxed = self.peak_boxed.max(self.inbox.len() + self.outbox.len() + self.under_way.len());
    }

    fn forward(&mut self, chunk: usize, micro: usize) -> Result<(), String> {
        let at = self.at(chunk, micro)?;
        if !self.forward_done.insert((chunk, micro)) {
            return Err("runs twice".into());
        }
        if self.shape.previous(at).is_some() && !self.inbox.remove(&(What::Activation, at, micro)) {
            return Err("its input is not there".into());
        }
        self.make(What::Activation, self.shape.next(at), micro);
        self.live[chunk] += 1;
        self.peak_live[chunk] = self.peak_live[chunk].max(self.live[chunk]);
        if !self.trains {
            self.live[chunk] -= 1;
        }
        Ok(())
    }

    fn backward_input(&mut self, chunk: usize, micro: usize) -> Result<(), String> {
        let at = self.at(chunk, micro)?;
        if !self.input_done.insert((chunk, micro)) {
            return Err("runs twice".into());
        }
        if !self.forward_done.contains(&(chunk, micro)) {
            return Err("its forward has not run".into());
        }
        if self.shape.next(at).is_some() && !self.inbox.remove(&(What::Gradient, at, micro)) {
            return Err("its gradient is not there".into());
        }
        self.make(What::Gradient, self.shape.previous(at), micro);
        self.deferred[chunk] += 1;
        Ok(())
    }

    fn backward_weights(&mut self, chunk: usize, micro: usize) -> Result<(), String> {
        self.at(chunk, micro)?;
        if !self.input_done.contains(&(chunk, micro)) {
            return Err("the first half of its backward has not run".into());
        }
        if !self.weights_done.insert((chunk, micro)) {
            return Err("runs twice".into());
        }
        self.deferred[chunk] -= 1;
        self.live[chunk] -= 1;
        Ok(())
    }

    fn at(&self, chunk: usize, micro: usize) -> Result<ChunkAt, String> {
        if chunk >= self.shape.vp || micro >= self.shape.n_micro {
            return Err(format!("outside of {:?}", self.shape));
        }
        Ok(ChunkAt { stage: self.stage, chunk })
    }

    /// Puts a result where its reader finds it.
    fn make(&mut self, what: What, reader: Option<ChunkAt>, micro: usize) {
        match reader {
            None => {}
            Some(at) if at.stage == self.stage => drop(self.inbox.insert((what, at, micro))),
            Some(at) => drop(self.outbox.insert((what, at, micro))),
        }
    }

    fn post(&mut self, sends: &[Parcel], recvs: &[Parcel]) -> Result<(), String> {
        if sends.is_empty() && recvs.is_empty() {
            return Err("is empty".into());
        }
        if let Some(parcel) = sends.iter().chain(recvs).find(|p| p.peer == self.stage || p.peer >= self.shape.pp) {
            return Err(format!("{parcel} has no such peer"));
        }
        for parcel in sends {
            let key = self.sent_key(parcel);
            if !self.outbox.remove(&key) {
                return Err(format!("{parcel} is not there to send"));
            }
            self.under_way.insert((End::Send, key));
        }
        for parcel in recvs {
            let key = (parcel.what, self.at(parcel.chunk, parcel.micro)?, parcel.micro);
            if !self.received.insert(key) {
                return Err(format!("{parcel} is received twice"));
            }
            self.under_way.insert((End::Recv, key));
        }
        self.count_boxed();
        Ok(())
    }

    fn wait(&mut self, sends: &[Parcel], recvs: &[Parcel]) -> Result<(), String> {
        if sends.is_empty() && recvs.is_empty() {
            return Err("is empty".into());
        }
        for parcel in sends {
            if !self.under_way.remove(&(End::Send, self.sent_key(parcel))) {
                return Err(format!("{parcel} is not under way"));
            }
        }
        for parcel in recvs {
            let key = (parcel.what, self.at(parcel.chunk, parcel.micro)?, parcel.micro);
            if !self.under_way.remove(&(End::Recv, key)) || !self.inbox.insert(key) {
                return Err(format!("{parcel} is not under way"));
            }
        }
        Ok(())
    }

    /// A message to another stage by its consumer.
    fn sent_key(&self, parcel: &Parcel) -> Key {
        (parcel.what, ChunkAt { stage: parcel.peer, chunk: parcel.chunk }, parcel.micro)
    }

    fn finish(&self) -> Result<(), String> {
        let wanted = self.shape.vp * self.shape.n_micro;
        if self.forward_done.len() != wanted {
            return Err(format!("{} of {wanted} forwards", self.forward_done.len()));
        }
        let (backwards, reduced) = if self.trains { (wanted, self.shape.vp) } else { (0, 0) };
        for (done, what) in [(&self.input_done, "backwards"), (&self.weights_done, "backwards for the weights")] {
            if done.len() != backwards {
                return Err(format!("{} of {backwards} {what}", done.len()));
            }
        }
        if self.reduced.len() != reduced {
            return Err(format!("gradients of {} of {reduced} chunks are reduced", self.reduced.len()));
        }
        if let Some((_, (what, at, micro))) = self.under_way.iter().next() {
            return Err(format!("the {what:?} for chunk {} of stage {}, micro-batch {micro}, is never waited for", at.chunk, at.stage));
        }
        if let Some((what, at, micro)) = self.outbox.iter().next() {
            return Err(format!("the {what:?} for chunk {} of stage {}, micro-batch {micro}, is never sent", at.chunk, at.stage));
        }
        if let Some((what, at, micro)) = self.inbox.iter().next() {
            return Err(format!("the {what:?} for chunk {}, micro-batch {micro}, is never read", at.chunk));
        }
        Ok(())
    }
}
