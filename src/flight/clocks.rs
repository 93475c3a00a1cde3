//! Clocks of different machines: who enters last can only be told to the accuracy of their agreement. A collective in which every
//! rank needs something of every other ends everywhere within a message's time, so the ends of those over all ranks tell how far
//! a machine's clock is ahead; the rings of that machine are set back by it. Ranks of one machine share its clock.

use super::record::{Group, Op, Record};
use super::rings::Rings;
use std::collections::BTreeMap;

/// Differences below it are within what messages and the scheduler take.
const LEAST_NS: u64 = 1_000_000;
/// Collectives below which nothing is concluded.
const LEAST_COLLECTIVES: usize = 5;

/// A machine whose clock was ahead (or, negative, behind) of that of rank 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shift {
    /// The machine.
    pub host: String,
    /// Nanoseconds ahead.
    pub ahead_ns: i64,
}

/// Whether it ends only after every rank has entered it.
fn joins_all(record: &&Record) -> bool {
    let joins = matches!(record.op, Op::Barrier | Op::AllGather | Op::AllReduce | Op::GatherNumbers | Op::GatherBytes);
    joins && record.group == Group::World && record.end_ns > 0
}

/// Sets the rings to the clock of the first rank that left one; returns what was changed.
pub(super) fn align(rings: &mut Rings) -> Vec<Shift> {
    let Some(first) = rings.all().next() else { return Vec::new() };
    let reference: BTreeMap<u64, u64> = first.records.iter().filter(joins_all).map(|r| (r.sequence, r.end_ns)).collect();
    let own_host = first.host.clone();
    let mut ahead: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for ring in rings.all().filter(|ring| ring.host != own_host) {
        let pairs = ring.records.iter().filter(joins_all).filter_map(|r| Some(r.end_ns.wrapping_sub(*reference.get(&r.sequence)?) as i64));
        ahead.entry(ring.host.clone()).or_default().extend(pairs);
    }
    let mut shifts = Vec::new();
    for (host, mut differences) in ahead {
        differences.sort_unstable();
        let Some(&median) = differences.get(differences.len() / 2) else { continue };
        if differences.len() < LEAST_COLLECTIVES || median.unsigned_abs() < LEAST_NS {
            continue;
        }
        rings.ranks.iter_mut().flatten().filter(|ring| ring.host == host).for_each(|ring| ring.shift(median.wrapping_neg()));
        shifts.push(Shift { host, ahead_ns: median });
    }
    shifts
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Name, Recorder};
    use super::*;
    use crate::parallel::layout::ParallelLayout;

    /// A machine whose clock is 40 ms ahead is set back to within the spread of the collectives' ends, in all of its times; one
    /// that agrees is left as it is. Without it every collective would seem to wait for that machine.
    #[test]
    fn a_clock_that_is_ahead_is_set_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = ParallelLayout { tp: 1, pp: 1, dp: 3, vp: 1 };
        let ranks: Vec<Recorder> = (0..3).map(|_| Recorder::new()).collect();
        ranks.iter().enumerate().for_each(|(rank, recorder)| recorder.open(dir.path(), 64, layout, rank).expect("a ring"));
        for sequence in 1..=9 {
            let event = Event { op: Op::Barrier, group: Group::World, bytes: 0, sequence, peer: None, tag: None, name: Name::default() };
            let open: Vec<_> = ranks.iter().map(|recorder| recorder.enter(&event)).collect();
            ranks.iter().zip(open).for_each(|(recorder, open)| recorder.leave(open));
        }
        let mut rings = Rings::read(dir.path()).expect("rings");
        let untouched = rings.clone();
        for (rank, ahead_ns) in [(1, 0), (2, 40_000_000)] {
            let ring = rings.ranks[rank].as_mut().expect("a ring");
            ring.host = format!("n{rank}");
            ring.shift(ahead_ns);
        }
        let shifts = align(&mut rings);
        assert_eq!(shifts.len(), 1, "{shifts:?}");
        // The three ranks are one thread here: their ends are microseconds apart.
        assert!(shifts[0].host == "n2" && (shifts[0].ahead_ns - 40_000_000).abs() < 2_000_000, "{shifts:?}");
        let (now, was) = (rings.of(2).expect("a ring"), untouched.of(2).expect("a ring"));
        let moved_ns = now.records[3].start_ns as i64 - was.records[3].start_ns as i64;
        assert_eq!(moved_ns, 40_000_000 - shifts[0].ahead_ns);
        assert_eq!(now.heartbeat_ns as i64 - was.heartbeat_ns as i64, moved_ns);
        assert_eq!((now.closed_ns, now.records[3].end_ns > now.records[3].start_ns), (0, true), "what is not set stays so");
    }
}
