//! The proof of a schedule, from the finished lists alone: nothing here knows how they were made.

use super::{Action, ChunkAt, Parcel, PipelineShape, Schedule, What};
use std::collections::{HashMap, HashSet};

/// What a schedule keeps in memory at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Liveness {
    /// Most micro-batches of each [stage][chunk] whose forward is done and whose backward is not: the number of saved
    /// activations the executor needs. All 1 for a schedule of forwards alone (nothing is saved past the forward).
    pub peak_live: Vec<Vec<usize>>,
    /// Most tensors at once in the inbox and the outbox of each stage together.
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
    /// - every (chunk, micro) runs forward once and backward once, in this order (or, for all of them, forward alone), and
    ///   each chunk's gradients are reduced once, after its last backward;
    /// - everything that is read has been received or made on the same stage, is read once, and is sent once;
    /// - on each channel (from, to) the sends stand in the order of the receives;
    /// - nothing deadlocks even if an exchange completes only when all its partners have posted the matching ones.
    ///
    /// Returns what is alive at the peak, or the first fault.
    pub fn check(&self) -> Result<Liveness, String> {
        let PipelineShape { pp, vp, n_micro } = self.shape;
        if pp == 0 || vp == 0 || n_micro == 0 || self.stages.len() != pp {
            return Err(format!("{} stages for {:?}", self.stages.len(), self.shape));
        }
        let has_backward = |actions: &Vec<Action>| actions.iter().any(|action| matches!(action, Action::Backward { .. }));
        let trains = self.stages.iter().any(has_backward);
        let mut liveness = Liveness { peak_live: Vec::new(), peak_boxed: Vec::new() };
        for stage in 0..pp {
            let mut walk = StageWalk::new(self.shape, stage, trains);
            for action in &self.stages[stage] {
                walk.step(action).map_err(|wrong| format!("stage {stage}, {action}: {wrong}"))?;
            }
            walk.finish().map_err(|wrong| format!("stage {stage}: {wrong}"))?;
            liveness.peak_live.push(walk.peak_live);
            liveness.peak_boxed.push(walk.peak_boxed);
        }
        self.check_channels()?;
        self.check_progress()?;
        Ok(liveness)
    }

    /// On each channel the sends and the receives are the same list.
    fn check_channels(&self) -> Result<(), String> {
        let mut channels: HashMap<(usize, usize), [Vec<Parcel>; 2]> = HashMap::new();
        for (stage, actions) in self.stages.iter().enumerate() {
            for action in actions {
                let Action::Exchange { sends, recvs } = action else { continue };
                for parcel in sends {
                    // As the receiver writes it, so that the two lists can be compared.
                    let seen_there = Parcel { peer: stage, ..*parcel };
                    channels.entry((stage, parcel.peer)).or_default()[0].push(seen_there);
                }
                for parcel in recvs {
                    channels.entry((parcel.peer, stage)).or_default()[1].push(*parcel);
                }
            }
        }
        for ((from, to), [sent, received]) in &channels {
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
                    if let Action::Exchange { sends, recvs } = action {
                        let send = |end, p: &Parcel| (end, stage, p.peer, p.what, p.chunk, p.micro);
                        let recv = |end, p: &Parcel| (end, p.peer, stage, p.what, p.chunk, p.micro);
                        sends.iter().for_each(|p| progress |= posted.insert(send(End::Send, p)));
                        recvs.iter().for_each(|p| progress |= posted.insert(recv(End::Recv, p)));
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
    backward_done: HashSet<(usize, usize)>,
    reduced: HashSet<usize>,
    inbox: HashSet<Key>,
    outbox: HashSet<Key>,
    received: HashSet<Key>,
    live: Vec<usize>,
    peak_live: Vec<usize>,
    peak_boxed: usize,
}

impl StageWalk {
    fn new(shape: PipelineShape, stage: usize, trains: bool) -> StageWalk {
        StageWalk {
            shape,
            stage,
            trains,
            forward_done: HashSet::new(),
            backward_done: HashSet::new(),
            reduced: HashSet::new(),
            inbox: HashSet::new(),
            outbox: HashSet::new(),
            received: HashSet::new(),
            live: vec![0; shape.vp],
            peak_live: vec![0; shape.vp],
            peak_boxed: 0,
        }
    }

    fn step(&mut self, action: &Action) -> Result<(), String> {
        match action {
            &Action::Forward { chunk, micro } => self.forward(chunk, micro)?,
            &Action::Backward { chunk, micro } => self.backward(chunk, micro)?,
            Action::Exchange { sends, recvs } => self.exchange(sends, recvs)?,
            &Action::ReduceGrads { chunk } => {
                let done = self.backward_done.iter().filter(|&&(c, _)| c == chunk).count();
                if done != self.shape.n_micro {
                    return Err(format!("{done} of {} backwards are done", self.shape.n_micro));
                }
                if !self.reduced.insert(chunk) {
                    return Err("reduced twice".into());
                }
            }
        }
        self.peak_boxed = self.peak_boxed.max(self.inbox.len() + self.outbox.len());
        Ok(())
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

    fn backward(&mut self, chunk: usize, micro: usize) -> Result<(), String> {
        let at = self.at(chunk, micro)?;
        if !self.backward_done.insert((chunk, micro)) {
            return Err("runs twice".into());
        }
        if !self.forward_done.contains(&(chunk, micro)) {
            return Err("its forward has not run".into());
        }
        if self.shape.next(at).is_some() && !self.inbox.remove(&(What::Gradient, at, micro)) {
            return Err("its gradient is not there".into());
        }
        self.make(What::Gradient, self.shape.previous(at), micro);
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

    fn exchange(&mut self, sends: &[Parcel], recvs: &[Parcel]) -> Result<(), String> {
        if sends.is_empty() && recvs.is_empty() {
            return Err("is empty".into());
        }
        if let Some(parcel) = sends.iter().chain(recvs).find(|p| p.peer == self.stage || p.peer >= self.shape.pp) {
            return Err(format!("{parcel} has no such peer"));
        }
        // Both are in memory until the exchange completes.
        self.peak_boxed = self.peak_boxed.max(self.inbox.len() + self.outbox.len() + recvs.len());
        for parcel in sends {
            let key = (parcel.what, ChunkAt { stage: parcel.peer, chunk: parcel.chunk }, parcel.micro);
            if !self.outbox.remove(&key) {
                return Err(format!("{parcel} is not there to send"));
            }
        }
        for parcel in recvs {
            let at = self.at(parcel.chunk, parcel.micro)?;
            let key = (parcel.what, at, parcel.micro);
            if !self.received.insert(key) || !self.inbox.insert(key) {
                return Err(format!("{parcel} is received twice"));
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), String> {
        let wanted = self.shape.vp * self.shape.n_micro;
        if self.forward_done.len() != wanted {
            return Err(format!("{} of {wanted} forwards", self.forward_done.len()));
        }
        let (backwards, reduced) = if self.trains { (wanted, self.shape.vp) } else { (0, 0) };
        if self.backward_done.len() != backwards {
            return Err(format!("{} of {backwards} backwards", self.backward_done.len()));
        }
        if self.reduced.len() != reduced {
            return Err(format!("gradients of {} of {reduced} chunks are reduced", self.reduced.len()));
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
