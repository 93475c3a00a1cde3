//! What the rings of all ranks tell together: who diverged first, where every rank is, who comes late, and where time is lost
//! in communication that nothing hides.
//!
//! A rank waits for those that have not entered its collective, or not posted the other end of its message. Following these
//! edges from the longest wait leads to a rank that waits for nobody, which holds up the rest; or into a circle, where the
//! operation entered first is the one that the others left out.

use super::record::{GROUPS, Group, Op, PHASES, Phase, Record};
use super::rings::{RankRing, Rings};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// A process without a sign of life for longer than this before the last one of any rank has stopped, or was ended.
const SILENCE_NS: u64 = 700_000_000;
/// A communication that takes longer although all ranks are in it does not go on.
const STUCK_S: f64 = 5.0;
/// Ranks that a list names.
const NAMED: usize = 12;

/// The whole report, as text.
pub fn of(rings: &Rings) -> String {
    let mut out = heading(rings);
    out.push_str("\nFirst divergence\n");
    divergence(rings).iter().for_each(|text| line(&mut out, text));
    out.push_str("\nWhere every rank is\n");
    places(rings).iter().for_each(|text| line(&mut out, text));
    out.push_str(&stragglers(rings));
    out.push_str(&exposed(rings));
    out
}

fn heading(rings: &Rings) -> String {
    let (layout, n) = (rings.layout, rings.all().count());
    let first = rings.all().map(|ring| ring.opened_ns).min().unwrap_or(0);
    let job = rings.all().next().map_or("", |ring| &ring.job);
    let shifts = rings
        .shifts
        .iter()
        .map(|shift| format!("  the clock of {} was {:+.1} ms off and is set\n", shift.host, shift.ahead_ns as f64 / 1e6));
    let shifts: String = shifts.collect();
    format!(
        "{}: job {job}, {n} rings of {} ranks = tp {} x pp {} (vp {}) x dp {}, from {} to {} UTC\n{shifts}",
        rings.folder.display(),
        layout.world(),
        layout.tp,
        layout.pp,
        layout.vp,
        layout.dp,
        clock(first),
        clock(rings.newest_ns())
    )
}

/// Who diverged first, one finding a line; never empty.
pub fn divergence(rings: &Rings) -> Vec<String> {
    let missing: Vec<usize> = (0..rings.layout.world()).filter(|&rank| rings.of(rank).is_none()).collect();
    let mut found = Vec::new();
    if !missing.is_empty() {
        found.push(format!("{} left no ring: ended before it was made, or on a machine without this file system", ranks_text(&missing)));
    }
    if let Some(text) = mismatch(rings) {
        found.push(text);
    }
    match root(rings) {
        Some(root) => found.extend(describe(rings, &root)),
        None => {
            found.extend(silent_ranks(rings).into_iter().map(|ring| silence(rings, ring)));
            found.extend(stuck(rings));
        }
    }
    if found.is_empty() {
        let all_closed = rings.all().all(|ring| ring.closed_ns > 0);
        found.push(if all_closed { "none: all ranks ended in good order" } else { "none: no rank waits for another" }.into());
    }
    found
}

/// The longest wait for an operation that every rank of it has entered.
fn stuck(rings: &Rings) -> Option<String> {
    let waiting = rings.all().filter(|ring| !is_silent(rings, ring)).filter_map(|ring| Some((ring, ring.waiting()?)));
    let (ring, record) = waiting.min_by_key(|(_, record)| record.wait_ns)?;
    let seconds = rings.newest_ns().saturating_sub(record.wait_ns) as f64 / 1e9;
    (seconds > STUCK_S).then(|| {
        let since = clock(record.wait_ns);
        format!("rank {} waits in {} since {since}, though nobody is missing in it", ring.rank, operation(record))
    })
}

/// An operation that ranks wait in, and the ranks that have not come.
struct Held<'a> {
    by: &'a RankRing,
    record: &'a Record,
    absent: Vec<usize>,
}

fn held<'a>(rings: &Rings, ring: &'a RankRing) -> Option<Held<'a>> {
    let record = ring.waiting()?;
    let absent = absent(rings, ring, record);
    Some(Held { by: ring, record, absent })
}

/// The ranks that `record` of `ring` waits for.
fn absent(rings: &Rings, ring: &RankRing, record: &Record) -> Vec<usize> {
    let members = rings.members(record.group, ring.rank);
    if record.op.is_collective() {
        let has_entered = |&rank: &usize| rings.of(rank).is_some_and(|ring| ring.entered(record.group) >= record.sequence);
        return members.into_iter().filter(|rank| !has_entered(rank)).collect();
    }
    // All messages under way: they are posted together and waited for together.
    let place = |rank: usize| members.iter().position(|&member| member == rank).map(|place| place as u32);
    let open = ring.records.iter().filter(|other| other.is_open() && !other.op.is_collective() && other.group == record.group);
    let unmatched = open.filter_map(|message| {
        let peer = *members.get(message.peer? as usize)?;
        let other_end = if message.op == Op::Send { Op::Recv } else { Op::Send };
        let is_posted = rings.of(peer).is_some_and(|theirs| {
            let same = |r: &&Record| (r.op, r.group, r.peer) == (other_end, record.group, place(ring.rank));
            theirs.records.iter().filter(same).any(|r| r.sequence >= message.sequence)
        });
        (!is_posted).then_some(peer)
    });
    unmatched.collect::<BTreeSet<usize>>().into_iter().collect()
}

/// The operation that holds up the job: see the head of this file.
fn root<'a>(rings: &'a Rings) -> Option<Held<'a>> {
    let waits = |ring: &'a RankRing| held(rings, ring).filter(|held| !held.absent.is_empty());
    let mut here = rings.all().filter_map(waits).min_by_key(|held| held.record.start_ns)?;
    let mut path: Vec<usize> = Vec::new();
    loop {
        path.push(here.by.rank);
        let next: Vec<Held> = here.absent.iter().filter_map(|&rank| waits(rings.of(rank)?)).collect();
        if next.len() < here.absent.len() {
            return Some(here); // somebody who does not come waits for nobody
        }
        let next = next.into_iter().min_by_key(|held| held.record.start_ns).expect("absent is not empty");
        if let Some(start) = path.iter().position(|&rank| rank == next.by.rank) {
            let circle = path[start..].iter().filter_map(|&rank| waits(rings.of(rank)?));
            return circle.min_by_key(|held| held.record.start_ns);
        }
        here = next;
    }
}

fn describe(rings: &Rings, root: &Held) -> Vec<String> {
    let operation = operation(root.record);
    let same = |ring: &&RankRing| {
        let alike = |r: &Record| (r.op, r.group, r.sequence) == (root.record.op, root.record.group, root.record.sequence);
        // A message is waited for by one rank.
        let shares = root.record.op.is_collective() && rings.members(root.record.group, ring.rank).contains(&root.by.rank);
        ring.rank == root.by.rank || shares && ring.waiting().is_some_and(alike)
    };
    let waiting: Vec<usize> = rings.all().filter(same).map(|ring| ring.rank).collect();
    let others = rings.all().filter(|ring| ring.waiting().is_some()).count() - waiting.len();
    // Who waits in turn for others is held up too; who does not is the one.
    let (waits, idle): (Vec<usize>, Vec<usize>) = root
        .absent
        .iter()
        .partition(|&&rank| rings.of(rank).is_some_and(|ring| held(rings, ring).is_some_and(|held| !held.absent.is_empty())));
    let guilty = if idle.is_empty() { waits } else { idle };
    let verb = if root.record.op.is_collective() { "never entered" } else { "never posted the other end of" };
    let subject = match guilty[..] {
        [rank] => rings.of(rank).map_or(format!("rank {rank}"), RankRing::title),
        _ => ranks_text(&guilty),
    };
    let mut found = vec![format!("{subject} {verb} {operation}")];
    let who = if waiting.len() == 1 { format!("{} waits", ranks_text(&waiting)) } else { format!("{} wait", ranks_text(&waiting)) };
    let behind = if others > 0 { format!("; {others} more wait elsewhere, behind them") } else { String::new() };
    found.push(format!("{who} for it since {}{behind}", clock(root.record.wait_ns)));
    found.extend(guilty.iter().take(NAMED).map(|&rank| format!("rank {rank} {}", state(rings, rank))));
    found
}

/// `all-reduce 1559 of dp (layers.3.mlp.up.weight, 1.2 MB; optimizer of step 12)`
pub fn operation(record: &Record) -> String {
    let name = if record.name.is_empty() { String::new() } else { format!("{}, ", record.name) };
    let place = |peer: u32| match record.group {
        Group::Tp | Group::Dp | Group::Pp => format!("{}{peer}", record.group),
        Group::World | Group::Other => format!("rank {peer}"),
    };
    let peer = record.peer.map_or(String::new(), |peer| match record.op {
        Op::Send => format!(" to {}", place(peer)),
        Op::Recv => format!(" from {}", place(peer)),
        _ => format!(" from its root {peer}"),
    });
    let of = if record.op.is_collective() { format!(" of {}", record.group) } else { String::new() };
    let tag = record.tag.map_or(String::new(), |tag| format!(", tag {tag}"));
    format!("{} {}{of}{peer} ({name}{}{tag}; {})", record.op, record.sequence, size(record.bytes), purpose(record))
}

/// `forward of micro-batch 3, chunk 0, step 12`
pub fn purpose(record: &Record) -> String {
    let micro = record.micro.map_or(String::new(), |micro| format!(" of micro-batch {micro}"));
    let chunk = record.chunk.map_or(String::new(), |chunk| format!(", chunk {chunk}"));
    let step = if record.step > 0 { format!(", step {}", record.step) } else { String::new() };
    format!("{}{micro}{chunk}{step}", record.phase)
}

/// What a rank that did not come does instead.
fn state(rings: &Rings, rank: usize) -> String {
    let Some(ring) = rings.of(rank) else { return "left no ring".into() };
    if ring.closed_ns > 0 {
        return format!("ended in good order at {}", clock(ring.closed_ns));
    }
    let last = ring.records.last().map_or("it has recorded nothing".into(), |last| match (last.op, last.end_ns) {
        (Op::Work, 0) => format!("it is in {} since {}", purpose(last), clock(last.start_ns)),
        (Op::Work, end) => format!("its last work was {}, ended {}", purpose(last), clock(end)),
        (_, 0) => format!("its last record is {}, entered {}", operation(last), clock(last.start_ns)),
        (_, end) => format!("its last record is {}, complete {}", operation(last), clock(end)),
    });
    if is_silent(rings, ring) {
        let asked = rings.all().filter(|ring| ring.stop_ns > 0).map(|ring| ring.stop_ns).min().filter(|&ns| ns > ring.heartbeat_ns);
        let asked = asked.map_or(String::new(), |ns| format!(", the others were asked to stop at {}", clock(ns)));
        return format!(
            "is silent since {}{asked}: its process was stopped or killed, or its machine is gone; {last}",
            clock(ring.heartbeat_ns)
        );
    }
    match ring.waiting() {
        Some(record) => format!("waits in {} since {}", operation(record), clock(record.wait_ns)),
        None => format!("runs (last sign of life {}); {last}", clock(ring.heartbeat_ns)),
    }
}

fn is_silent(rings: &Rings, ring: &RankRing) -> bool {
    ring.closed_ns == 0 && rings.newest_ns() > ring.heartbeat_ns.saturating_add(SILENCE_NS)
}

fn silent_ranks(rings: &Rings) -> Vec<&RankRing> {
    rings.all().filter(|ring| is_silent(rings, ring)).collect()
}

fn silence(rings: &Rings, ring: &RankRing) -> String {
    format!("{} {}", ring.title(), state(rings, ring.rank))
}

/// Ranks that called something else than the rest of their group where all must call the same.
fn mismatch(rings: &Rings) -> Option<String> {
    type Signature = (Op, u64, Option<u32>);
    // Bytes may differ where each rank contributes what it has.
    let signature = |r: &Record| -> Signature { (r.op, if r.op == Op::GatherBytes { 0 } else { r.bytes }, r.peer) };
    let mut first: Option<(u64, String)> = None;
    for (members, group) in all_groups(rings) {
        let mut calls: BTreeMap<u64, Vec<(usize, &Record)>> = BTreeMap::new();
        for ring in members.iter().filter_map(|&rank| rings.of(rank)) {
            for record in ring.records.iter().filter(|r| r.group == group && r.op.is_collective()) {
                calls.entry(record.sequence).or_default().push((ring.rank, record));
            }
        }
        let differs = |calls: &&Vec<(usize, &Record)>| calls.windows(2).any(|pair| signature(pair[0].1) != signature(pair[1].1));
        let Some(calls) = calls.values().find(differs) else { continue };
        let mut parties: Vec<(Signature, Vec<usize>, &Record)> = Vec::new();
        for &(rank, record) in calls {
            match parties.iter_mut().find(|(theirs, ..)| *theirs == signature(record)) {
                Some((_, ranks, _)) => ranks.push(rank),
                None => parties.push((signature(record), vec![rank], record)),
            }
        }
        parties.sort_by_key(|(_, ranks, _)| ranks.len());
        let start_ns = calls.iter().map(|(_, record)| record.start_ns).max().unwrap_or(0);
        let texts: Vec<String> =
            parties.iter().map(|(_, ranks, record)| format!("{} called {}", ranks_text(ranks), operation(record))).collect();
        if first.as_ref().is_none_or(|(ns, _)| start_ns < *ns) {
            first = Some((start_ns, format!("calls that do not belong together: {}", texts.join(", "))));
        }
    }
    first.map(|(_, text)| text)
}

/// Each group once, with its ranks.
fn all_groups(rings: &Rings) -> Vec<(Vec<usize>, Group)> {
    let n_ranks = |group: Group| if group == Group::World { 1 } else { rings.layout.world() };
    let of = |group: Group| (0..n_ranks(group)).map(move |rank| (rank, rings.members(group, rank), group));
    let all = GROUPS.iter().flat_map(|&group| of(group));
    all.filter(|(rank, members, _)| members.len() > 1 && members[0] == *rank).map(|(_, members, group)| (members, group)).collect()
}

/// One line for each operation that ranks are in, the fullest first.
fn places(rings: &Rings) -> Vec<String> {
    let mut by_text: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for ring in rings.all() {
        let text = if ring.closed_ns > 0 {
            "ended in good order".into()
        } else if is_silent(rings, ring) {
            state(rings, ring.rank)
        } else {
            match (ring.waiting(), ring.records.last()) {
                (Some(record), _) => format!("waits in {}", operation(record)),
                (None, Some(last)) => format!("runs, {}", purpose(last)),
                (None, None) => "has recorded nothing".into(),
            }
        };
        by_text.entry(text).or_default().push(ring.rank);
    }
    let mut all: Vec<(String, Vec<usize>)> = by_text.into_iter().collect();
    all.sort_by_key(|(_, ranks)| std::cmp::Reverse(ranks.len()));
    all.iter().map(|(text, ranks)| format!("{}: {text}", ranks_text(ranks))).collect()
}

/// How late one rank was.
#[derive(Default)]
struct Lateness {
    n_last: usize,
    late_s: f64,
    most_s: f64,
}

/// Who enters collectives last, how often, and how long after the second last.
fn stragglers(rings: &Rings) -> String {
    let (mut n_all, mut by_rank): (usize, BTreeMap<usize, Lateness>) = (0, BTreeMap::new());
    for (members, group) in all_groups(rings) {
        let mut entries: BTreeMap<u64, Vec<(u64, usize)>> = BTreeMap::new();
        for ring in members.iter().filter_map(|&rank| rings.of(rank)) {
            for record in ring.records.iter().filter(|r| r.group == group && r.op.is_collective()) {
                entries.entry(record.sequence).or_default().push((record.start_ns, ring.rank));
            }
        }
        for mut entered in entries.into_values().filter(|entered| entered.len() == members.len()) {
            entered.sort_unstable();
            let [.., (second_ns, _), (last_ns, rank)] = entered[..] else { continue };
            let (late_s, lateness) = ((last_ns - second_ns) as f64 / 1e9, by_rank.entry(rank).or_default());
            n_all += 1;
            lateness.n_last += 1;
            lateness.late_s += late_s;
            lateness.most_s = lateness.most_s.max(late_s);
        }
    }
    if n_all == 0 {
        return String::new();
    }
    let mut out = format!("\nStragglers: last to enter, of {n_all} collectives that all ranks of a group entered\n");
    let mut all: Vec<(usize, Lateness)> = by_rank.into_iter().collect();
    all.sort_by(|a, b| b.1.late_s.total_cmp(&a.1.late_s));
    for (rank, late) in all.iter().take(8) {
        let title = rings.of(*rank).map_or(format!("rank {rank}"), RankRing::title);
        let mean_ms = 1e3 * late.late_s / late.n_last as f64;
        line(
            &mut out,
            &format!(
                "{title}: {} times ({:.0} %), {mean_ms:.2} ms after the second last on average, {:.2} ms at most",
                late.n_last,
                100.0 * late.n_last as f64 / n_all as f64,
                1e3 * late.most_s
            ),
        );
    }
    out
}

/// Time blocked in communication, by group and phase, as a share of the time that the rings cover.
fn exposed(rings: &Rings) -> String {
    let mut seconds = vec![[0.0f64; PHASES.len()]; GROUPS.len()];
    let mut covered_s = 0.0;
    for ring in rings.all().filter(|ring| !ring.records.is_empty()) {
        let last_ns = ring.records.iter().map(|r| r.end_ns.max(r.start_ns)).max().unwrap_or(0);
        covered_s += (last_ns - ring.records[0].start_ns) as f64 / 1e9;
        for record in ring.records.iter().filter(|r| r.op != Op::Work) {
            seconds[record.group as usize][record.phase as usize] += record.exposed_ns as f64 / 1e9;
        }
    }
    let total: f64 = seconds.iter().flatten().sum();
    if covered_s == 0.0 || total == 0.0 {
        return String::new();
    }
    let groups: Vec<Group> = GROUPS.iter().copied().filter(|&group| seconds[group as usize].iter().sum::<f64>() > 0.0).collect();
    let used: Vec<Phase> =
        PHASES.iter().copied().filter(|&phase| groups.iter().any(|&g| seconds[g as usize][phase as usize] > 0.0)).collect();
    let mut out = format!(
        "\nExposed communication: per cent of the {:.1} s that the rings cover (mean over ranks); {:.1} % in all\n",
        covered_s / rings.all().count() as f64,
        100.0 * total / covered_s
    );
    let head: String = used.iter().map(|phase| format!("{phase:>11}")).collect();
    line(&mut out, &format!("{:<6}{head}{:>11}", "", "all"));
    for group in groups {
        let of = &seconds[group as usize];
        let cells: String = used.iter().map(|&phase| format!("{:>11.2}", 100.0 * of[phase as usize] / covered_s)).collect();
        line(&mut out, &format!("{group:<6}{cells}{:>11.2}", 100.0 * of.iter().sum::<f64>() / covered_s));
    }
    out
}

/// `rank 3`, `ranks 0, 2-5, 9 (6)`
pub fn ranks_text(ranks: &[usize]) -> String {
    if let [rank] = ranks {
        return format!("rank {rank}");
    }
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let text = |&(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    };
    let shown: Vec<String> = runs.iter().take(NAMED).map(text).collect();
    let more = if runs.len() > NAMED { ", .." } else { "" };
    let count = if ranks.len() > 3 { format!(" ({})", ranks.len()) } else { String::new() };
    format!("ranks {}{more}{count}", shown.join(", "))
}

/// Time of day, UTC, to the millisecond.
pub fn clock(unix_ns: u64) -> String {
    let (s, ms) = (unix_ns / 1_000_000_000 % 86_400, unix_ns / 1_000_000 % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", s / 3600, s / 60 % 60, s % 60)
}

fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB"];
    let power = (0..units.len()).rev().find(|&power| bytes >= 1000u64.pow(power as u32)).unwrap_or(0);
    if power == 0 { format!("{bytes} B") } else { format!("{:.1} {}", bytes as f64 / 1000f64.powi(power as i32), units[power]) }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "  {text}").expect("writing to a string cannot fail");
}
