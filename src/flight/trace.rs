//! The rings as a trace for chrome://tracing and Perfetto: the JSON object format of Google's "Trace Event Format", complete
//! events (`"ph": "X"`, microseconds). A process is a rank; its first track is the work, then one track for each group, and
//! more where operations of one group overlap.

use super::record::{GROUPS, Group, Op, Record};
use super::report;
use super::rings::{RankRing, Rings};
use serde_json::{Value, json};
use std::ops::RangeInclusive;

/// Tracks that a group may take.
const LANES: usize = 64;

/// The trace of these ranks, of the records of these steps (all: those outside of steps too). Times are from the oldest record.
pub fn to_json(rings: &Rings, ranks: &[usize], steps: Option<RangeInclusive<u64>>) -> Value {
    let wanted = |record: &&Record| steps.as_ref().is_none_or(|steps| steps.contains(&record.step));
    let chosen: Vec<(&RankRing, Vec<&Record>)> =
        ranks.iter().filter_map(|&rank| rings.of(rank)).map(|ring| (ring, ring.records.iter().filter(wanted).collect())).collect();
    let zero_ns = chosen.iter().flat_map(|(_, records)| records).map(|record| record.start_ns).min().unwrap_or(0);
    let mut events = Vec::new();
    for (ring, records) in &chosen {
        let title = ring.title();
        events.push(json!({"ph": "M", "name": "process_name", "pid": ring.rank, "args": {"name": title}}));
        events.push(json!({"ph": "M", "name": "process_sort_index", "pid": ring.rank, "args": {"sort_index": ring.rank}}));
        let mut tracks = Tracks::default();
        for record in records {
            // What is under way ends now.
            let end_ns = if record.end_ns > 0 { record.end_ns } else { ring.heartbeat_ns.max(record.start_ns) };
            let track = tracks.place(record, end_ns);
            events.push(event(ring.rank, track, record, (zero_ns, end_ns)));
        }
        for (track, name) in tracks.names() {
            events.push(json!({"ph": "M", "name": "thread_name", "pid": ring.rank, "tid": track, "args": {"name": name}}));
            events.push(json!({"ph": "M", "name": "thread_sort_index", "pid": ring.rank, "tid": track, "args": {"sort_index": track}}));
        }
    }
    json!({"traceEvents": events, "displayTimeUnit": "ms"})
}

fn event(rank: usize, track: usize, record: &Record, (zero_ns, end_ns): (u64, u64)) -> Value {
    let us = |ns: u64| ns as f64 / 1e3;
    let name = match (record.op, record.micro) {
        (Op::Work, Some(micro)) => format!("{} {micro}", record.phase),
        (Op::Work, None) => record.phase.to_string(),
        _ if record.name.is_empty() => record.op.to_string(),
        _ => format!("{} {}", record.op, record.name),
    };
    let mut args = json!({"step": record.step, "phase": record.phase.text(), "number": record.number});
    let mut set = |key: &str, value: Value| args[key] = value;
    if record.op != Op::Work {
        set("operation", report::operation(record).into());
        set("bytes", record.bytes.into());
        set("blocked_us", us(record.exposed_ns).into());
    }
    if record.end_ns == 0 {
        set("unfinished", true.into());
    }
    for (key, value) in [("chunk", record.chunk), ("micro", record.micro), ("peer", record.peer)] {
        if let Some(value) = value {
            set(key, value.into());
        }
    }
    json!({
        "ph": "X", "name": name, "cat": record.op.text(), "pid": rank, "tid": track,
        "ts": us(record.start_ns - zero_ns), "dur": us(end_ns.saturating_sub(record.start_ns)), "args": args
    })
}

/// Which tracks of one rank are taken until when.
#[derive(Default)]
struct Tracks {
    /// By group: the end of the last event on each of its tracks.
    busy_until_ns: [Vec<u64>; GROUPS.len()],
    has_work: bool,
}

impl Tracks {
    fn place(&mut self, record: &Record, end_ns: u64) -> usize {
        if record.op == Op::Work {
            // Spans nest, so one track holds them.
            self.has_work = true;
            return 0;
        }
        let lanes = &mut self.busy_until_ns[record.group as usize];
        let free = lanes.iter().position(|&until_ns| until_ns <= record.start_ns).unwrap_or(lanes.len()).min(LANES - 1);
        if free == lanes.len() {
            lanes.push(0);
        }
        lanes[free] = lanes[free].max(end_ns);
        Tracks::number(record.group, free)
    }

    fn number(group: Group, lane: usize) -> usize {
        1 + group as usize * LANES + lane
    }

    fn names(&self) -> Vec<(usize, String)> {
        let work = self.has_work.then(|| (0, "work".to_string()));
        let lanes = GROUPS.iter().flat_map(|&group| {
            let name = move |lane: usize| if lane == 0 { group.to_string() } else { format!("{group} ({lane})") };
            (0..self.busy_until_ns[group as usize].len()).map(move |lane| (Tracks::number(group, lane), name(lane)))
        });
        work.into_iter().chain(lanes).collect()
    }
}
