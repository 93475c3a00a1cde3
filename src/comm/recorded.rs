//! A communicator that writes what it does into the flight ledger, around any other. Only what this rank asks for is
//! recorded: the byte primitives below a collective belong to it.
//!
//! A collective that is recorded on the device (`Device::record`) stands here once, when it is recorded: what is asked for again is not
//! called again.
//!
//! Time from the call until it returns, and from the begin of the wait until its end, counts as blocked; time in between is
//! overlapped with other work.

use super::{Communicator, Pending, Recv, ReduceOp, Send, Staging, UsePieces};
use crate::flight::{Event, Group, Name, Op, Open, Recorder};
use crate::tensor::Tensor;
use std::sync::atomic::{AtomicU64, Ordering};

/// The communicator of a group, recorded.
pub struct Recorded {
    inner: Box<dyn Communicator>,
    group: Group,
    flight: Recorder,
    /// Collectives so far.
    n_collectives: AtomicU64,
    /// Messages so far to and from each rank.
    n_sent: Vec<AtomicU64>,
    n_received: Vec<AtomicU64>,
}

/// `inner`, recorded as the communicator of `group`; as it is when it has one rank, which communicates with nobody.
pub fn recorded(inner: Box<dyn Communicator>, group: Group, flight: &Recorder) -> Box<dyn Communicator> {
    let size = inner.size();
    if size == 1 {
        return inner;
    }
    let counters = || (0..size).map(|_| AtomicU64::new(0)).collect();
    let (n_sent, n_received) = (counters(), counters());
    Box::new(Recorded { inner, group, flight: flight.clone(), n_collectives: AtomicU64::new(0), n_sent, n_received })
}

impl Recorded {
    fn enter(&self, op: Op, bytes: usize, name: Name, root: Option<usize>) -> Open {
        let sequence = self.n_collectives.fetch_add(1, Ordering::Relaxed) + 1;
        let peer = root.map(|root| root as u32);
        self.flight.enter(&Event { op, group: self.group, bytes: bytes as u64, sequence, peer, tag: None, name })
    }

    fn enter_message(&self, op: Op, peer: usize, tag: u32, tensor: &Tensor) -> Open {
        let counters = if op == Op::Send { &self.n_sent } else { &self.n_received };
        let sequence = counters[peer].fetch_add(1, Ordering::Relaxed) + 1;
        let (bytes, name) = (tensor.n_bytes() as u64, shape(tensor));
        self.flight.enter(&Event { op, group: self.group, bytes, sequence, peer: Some(peer as u32), tag: Some(tag), name })
    }

    fn blocking<T>(&self, op: Op, bytes: usize, name: Name, root: Option<usize>, call: impl FnOnce(&dyn Communicator) -> T) -> T {
        let open = self.enter(op, bytes, name, root);
        let result = call(&*self.inner);
        self.flight.leave(open);
        result
    }

    fn starting<'a>(&'a self, op: Op, bytes: usize, name: Name, start: impl FnOnce(&'a dyn Communicator) -> Pending<'a>) -> Pending<'a> {
        let open = self.enter(op, bytes, name, None);
        let pending = start(&*self.inner);
        let mut open = self.flight.posted(open);
        Pending::until(move || {
            self.flight.block(&mut open);
            pending.wait();
            self.flight.leave(open);
        })
    }
}

fn shape(tensor: &Tensor) -> Name {
    Name::of_shape(tensor.dims(), tensor.dtype().name())
}

impl Communicator for Recorded {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn barrier(&self) {
        self.blocking(Op::Barrier, 0, Name::default(), None, |inner| inner.barrier());
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        let part = self.blocking(Op::Split, 0, Name::default(), None, |inner| inner.split(colour));
        recorded(part, Group::Other, &self.flight)
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        self.starting(Op::AllGather, full.len(), Name::default(), |inner| inner.start_all_gather_bytes(shard, full))
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        self.starting(Op::AllToAll, send.len(), Name::default(), |inner| inner.start_all_to_all_bytes(send, finish))
    }

    fn staging(&self) -> &Staging {
        self.inner.staging()
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        self.blocking(Op::Broadcast, data.len(), Name::default(), Some(root), |inner| inner.broadcast_bytes(data, root));
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        let outgoing = sends.iter().map(|send| self.enter_message(Op::Send, send.peer, send.tag, send.tensor));
        let mut open: Vec<Open> = outgoing.collect();
        // Last, so that the rank counts as blocked in a receive where there is one: a small message is sent without its receiver.
        open.extend(recvs.iter().map(|recv| self.enter_message(Op::Recv, recv.peer, recv.tag, recv.tensor)));
        let pending = self.inner.start_group(sends, recvs);
        let Some(last) = open.pop() else { return pending };
        let mut last = self.flight.posted(last);
        Pending::until(move || {
            self.flight.block(&mut last);
            pending.wait();
            open.into_iter().for_each(|message| self.flight.leave_with(message));
            self.flight.leave(last);
        })
    }

    fn groups_are_in_order(&self) -> bool {
        self.inner.groups_are_in_order()
    }

    fn is_recordable(&self) -> bool {
        self.inner.is_recordable()
    }

    fn start_all_gather<'a>(&'a self, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
        self.starting(Op::AllGather, full.n_bytes(), shape(shard), |inner| inner.start_all_gather(shard, full))
    }

    fn start_reduce_scatter<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        self.starting(Op::ReduceScatter, full.n_bytes(), shape(full), |inner| inner.start_reduce_scatter(full, shard))
    }

    fn start_reduce_scatter_in_pairs<'a>(&'a self, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
        self.starting(Op::ReduceScatter, full.n_bytes(), shape(full), |inner| inner.start_reduce_scatter_in_pairs(full, shard))
    }

    fn all_reduce(&self, x: &mut Tensor, op: ReduceOp) {
        self.blocking(Op::AllReduce, x.n_bytes(), shape(x), None, |inner| inner.all_reduce(x, op));
    }

    fn broadcast(&self, x: &mut Tensor, root: usize) {
        self.blocking(Op::Broadcast, x.n_bytes(), shape(x), Some(root), |inner| inner.broadcast(x, root));
    }

    fn sum_f64(&self, x: f64) -> f64 {
        self.blocking(Op::GatherNumbers, 8, Name::default(), None, |inner| inner.sum_f64(x))
    }

    fn gather_f64(&self, x: f64) -> Vec<f64> {
        self.blocking(Op::GatherNumbers, 8, Name::default(), None, |inner| inner.gather_f64(x))
    }

    fn gather_variable(&self, mine: &[u8]) -> Vec<Vec<u8>> {
        self.blocking(Op::GatherBytes, mine.len(), Name::default(), None, |inner| inner.gather_variable(mine))
    }
}
