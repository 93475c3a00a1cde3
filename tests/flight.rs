//! The flight ledger: what rings tell of ranks that hang, diverge or fall silent; what a whole run records; the trace.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use trireme::flight::rings::{RankRing, Rings};
use trireme::flight::{Event, Group, Name, Op, Open, Phase, Record, Recorder, report, ring_path, trace};
use trireme::parallel::layout::ParallelLayout;
use trireme::rng::Random;

fn layout(tp: usize, pp: usize, dp: usize) -> ParallelLayout {
    ParallelLayout { tp, pp, dp, vp: 1 }
}

/// Recorders of all ranks of a layout, opened in `folder`.
fn recorders(folder: &Path, layout: ParallelLayout, n_records: u64) -> Vec<Recorder> {
    let open = |rank| {
        let recorder = Recorder::new();
        recorder.open(folder, n_records, layout, rank).expect("a ring");
        recorder
    };
    (0..layout.world()).map(open).collect()
}

fn event(op: Op, group: Group, sequence: u64) -> Event {
    Event { op, group, bytes: 4000, sequence, peer: None, tag: None, name: Name::default() }
}

fn message(op: Op, sequence: u64, peer: u32) -> Event {
    Event { peer: Some(peer), tag: Some(5), ..event(op, Group::Pp, sequence) }
}

/// Enters and completes a collective on one rank.
fn complete(recorder: &Recorder, op: Op, group: Group, sequence: u64) {
    recorder.leave(recorder.enter(&event(op, group, sequence)));
}

fn divergence(folder: &Path) -> String {
    report::divergence(&Rings::read(folder).expect("rings")).join("\n")
}

/// The rank that never came is named with the operation and what it does instead, and not those that wait for it, nor those
/// that wait in other groups behind it: else people look at the wrong machine.
#[test]
fn the_rank_that_never_came_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let ranks = recorders(dir.path(), layout(2, 1, 2), 64);
    // tp groups are {0, 1} and {2, 3}, dp groups {0, 2} and {1, 3}.
    ranks.iter().for_each(|rank| complete(rank, Op::AllReduce, Group::Tp, 1));
    let _busy = ranks[3].span_at(Phase::Forward, 0, Some(6));
    ranks[2].name("layers.1.attention.out.weight");
    let first: Open = ranks[2].enter(&event(Op::AllReduce, Group::Tp, 2));
    std::thread::sleep(std::time::Duration::from_millis(2));
    let second = ranks[0].enter(&event(Op::ReduceScatter, Group::Dp, 1));
    std::thread::sleep(std::time::Duration::from_millis(2));
    let third = ranks[1].enter(&event(Op::AllReduce, Group::Tp, 2));
    let text = divergence(dir.path());
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("rank 3 (tp1 pp0 dp1, "), "{text}");
    let operation = ") never entered all-reduce 2 of tp (layers.1.attention.out.weight, 4.0 kB; other)";
    assert!(lines[0].ends_with(operation), "{text}");
    assert!(lines[1].starts_with("rank 2 waits for it since ") && lines[1].ends_with("; 2 more wait elsewhere, behind them"), "{text}");
    assert!(lines[2].contains("it is in forward of micro-batch 6, chunk 0 since "), "{text}");
    [first, second, third].into_iter().zip([2, 0, 1]).for_each(|(open, rank)| ranks[rank].leave(open));
    assert_eq!(divergence(dir.path()), "none: no rank waits for another");
}

/// In a circle of waits the operation that was entered first is the one that was left out.
#[test]
fn a_circle_is_resolved_by_who_came_first() {
    let dir = tempfile::tempdir().expect("a directory");
    let ranks = recorders(dir.path(), layout(1, 1, 3), 64);
    let mut open = vec![ranks[0].enter(&event(Op::AllReduce, Group::Dp, 1)), ranks[2].enter(&event(Op::AllReduce, Group::Dp, 1))];
    std::thread::sleep(std::time::Duration::from_millis(2));
    open.push(ranks[1].enter(&event(Op::Barrier, Group::World, 1)));
    let text = divergence(dir.path());
    assert!(text.starts_with("rank 1 (tp0 pp0 dp1, ") && text.contains(") never entered all-reduce 1 of dp"), "{text}");
    assert!(text.contains("ranks 0, 2 wait for it") && text.contains("rank 1 waits in barrier 1 of world"), "{text}");
    open.into_iter().zip([0, 2, 1]).for_each(|(open, rank)| ranks[rank].leave(open));
}

/// A call that does not fit those of the others is named although nobody waits: mixed-up bytes would be the next thing seen.
#[test]
fn calls_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let ranks = recorders(dir.path(), layout(1, 1, 3), 64);
    for (rank, recorder) in ranks.iter().enumerate() {
        complete(recorder, Op::AllReduce, Group::Dp, 1);
        complete(recorder, if rank == 1 { Op::AllGather } else { Op::ReduceScatter }, Group::Dp, 2);
        complete(recorder, Op::Barrier, Group::Dp, 3);
    }
    let text = divergence(dir.path());
    let expected = "calls that do not belong together: rank 1 called all-gather 2 of dp";
    assert!(text.starts_with(expected) && text.contains("ranks 0, 2 called reduce-scatter 2 of dp"), "{text}");
}

/// A message is waited for until its other end is posted; in a pipeline the stage that does not post is named, not the ones
/// behind it.
#[test]
fn the_stage_that_does_not_send_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let ranks = recorders(dir.path(), layout(1, 3, 1), 64);
    // One activation has gone through all stages.
    for stage in 0..2 {
        ranks[stage].leave(ranks[stage].enter(&message(Op::Send, 1, stage as u32 + 1)));
        ranks[stage + 1].leave(ranks[stage + 1].enter(&message(Op::Recv, 1, stage as u32)));
    }
    let last = ranks[2].enter(&message(Op::Recv, 2, 1));
    std::thread::sleep(std::time::Duration::from_millis(2));
    let middle = ranks[1].enter(&message(Op::Recv, 2, 0));
    let text = divergence(dir.path());
    let expected = ") never posted the other end of receive 2 from pp0 (4.0 kB, tag 5; other)";
    assert!(text.starts_with("rank 0 (tp0 pp0 dp0, ") && text.lines().next().is_some_and(|line| line.ends_with(expected)), "{text}");
    assert!(text.contains("rank 1 waits for it since ") && text.contains("1 more wait elsewhere"), "{text}");
    ranks[2].leave(last);
    ranks[1].leave(middle);
}

/// A process without a sign of life, an ended one and a missing one are told apart from one that computes.
#[test]
fn silence_and_good_order_are_told_apart() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut ranks = recorders(dir.path(), layout(1, 1, 4), 64);
    ranks.iter().for_each(|rank| complete(rank, Op::Barrier, Group::World, 1));
    std::thread::sleep(std::time::Duration::from_millis(900));
    ranks[0].asked_to_stop();
    [0, 2].iter().for_each(|&rank: &usize| ranks[rank].heartbeat());
    drop(ranks.pop());
    let text = divergence(dir.path());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("rank 1 (tp0 pp0 dp1, ") && text.contains("is silent since "), "{text}");
    assert!(text.contains("the others were asked to stop at ") && text.contains("its last record is barrier 1 of world"), "{text}");
    let whole = report::of(&Rings::read(dir.path()).expect("rings"));
    assert!(whole.contains("rank 3: ended in good order") && whole.contains("ranks 0, 2: runs, other"), "{whole}");
    std::fs::remove_file(ring_path(dir.path(), 1)).expect("there");
    assert!(divergence(dir.path()).starts_with("rank 1 left no ring"));
    std::fs::write(ring_path(dir.path(), 1), b"something else").expect("writable");
    assert!(divergence(dir.path()).starts_with("rank 1 left no ring"));
}

/// A ring keeps the newest records, whole and in order, however often it went around; an operation that was overwritten while
/// it was under way does not damage the one in its place.
#[test]
fn a_full_ring_keeps_the_newest() {
    let dir = tempfile::tempdir().expect("a directory");
    let recorder = recorders(dir.path(), ParallelLayout::SINGLE, 64).pop().expect("one");
    let old = recorder.enter(&event(Op::Barrier, Group::World, 1));
    (2..=1000).for_each(|sequence| complete(&recorder, Op::AllReduce, Group::World, sequence));
    recorder.leave(old);
    let rings = Rings::read(dir.path()).expect("rings");
    let records = &rings.of(0).expect("a ring").records;
    let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
    assert_eq!(numbers, (1000 - 64 + 1 + 16..=1000).collect::<Vec<u64>>());
    assert!(records.iter().all(|r| r.op == Op::AllReduce && r.sequence == r.number && r.end_ns >= r.start_ns), "{records:?}");
    assert!(records.windows(2).all(|pair| pair[0].end_ns <= pair[1].start_ns), "one after the other");
}

/// A ring that was cut or has flipped bits is read as what is left of it or refused in a line, and the report of it is text: a
/// post-mortem must not die of what killed its subject.
#[test]
fn damaged_rings_are_read_or_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let ranks = recorders(dir.path(), layout(1, 1, 2), 64);
    (1..=100).for_each(|sequence| ranks.iter().for_each(|rank| complete(rank, Op::AllReduce, Group::World, sequence)));
    let open = ranks[0].enter(&event(Op::Barrier, Group::Dp, 1));
    let path = ring_path(dir.path(), 0);
    let whole = std::fs::read(&path).expect("readable");
    let noise = Random::new(7, "damaged rings");
    let mut n_refused = 0;
    for round in 0..300 {
        let mut bytes = whole.clone();
        let draw = |i: u64, n: usize| (noise.bits(round * 16 + i) % n as u64) as usize;
        if round % 3 == 0 {
            bytes.truncate(draw(0, whole.len()));
        }
        let n = bytes.len().min(if round % 2 == 0 { 400 } else { usize::MAX });
        // Mostly the header, where a wrong number does most.
        (1..=1 + draw(1, 4) as u64).filter(|_| n > 0).for_each(|i| bytes[draw(1 + i, n)] ^= 1 << draw(8 + i, 8));
        // A file of its own: the ring itself is mapped.
        std::fs::remove_file(&path).expect("there");
        std::fs::write(&path, &bytes).expect("writable");
        n_refused += usize::from(RankRing::read(&path).is_err());
        match Rings::read(dir.path()) {
            Ok(rings) => assert!(report::of(&rings).lines().count() >= 5),
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
    assert!((100..300).contains(&n_refused), "{n_refused} of 300 refused");
    ranks[0].leave(open);
}

/// A whole run records every collective in the same order on all ranks of a group, with tensors, phases and micro-batches; all
/// ranks end in good order, the trace of it is whole, and the next job of the run keeps the rings of this one.
#[test]
fn a_run_is_recorded() {
    let dir = tempfile::tempdir().expect("a directory");
    let (shards, run) = (dir.path().join("shards"), dir.path().join("run"));
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.dp) = (2, 2, Some(2));
    train(&recipe, &run, Some(2)).expect("it trains");
    let rings = Rings::read(&run.join("flight")).expect("rings");
    assert_eq!(report::divergence(&rings), ["none: all ranks ended in good order"]);
    for group in [Group::World, Group::Tp, Group::Dp] {
        let calls = |rank: usize| {
            let records = rings.of(rank).expect("a ring").records.iter().filter(|r| r.group == group && r.op.is_collective());
            // Reports of ranks differ in length.
            let bytes = |r: &Record| if r.op == Op::GatherBytes { 0 } else { r.bytes };
            records.map(|r| (r.sequence, r.op, bytes(r), r.phase, r.micro)).collect::<Vec<_>>()
        };
        for rank in 0..8 {
            let first = rings.members(group, rank)[0];
            assert!(!calls(rank).is_empty() && calls(rank) == calls(first), "{group} of rank {rank}");
        }
    }
    let first = rings.of(0).expect("a ring");
    let has = |op: Op, group: Group, phase: Phase, name: &str| {
        let same = |r: &&Record| (r.op, r.group, r.phase, r.step) == (op, group, phase, 2);
        first.records.iter().filter(same).any(|r| r.name.to_string().contains(name) && r.end_ns > 0)
    };
    assert!(has(Op::ReduceScatter, Group::Dp, Phase::Reduce, "layers.0.mlp.up.weight"));
    assert!(has(Op::AllGather, Group::Dp, Phase::Optimizer, "layers.0.mlp.up.weight"));
    assert!(has(Op::AllGather, Group::Tp, Phase::Forward, "[8, 24] f32") && has(Op::ReduceScatter, Group::Tp, Phase::Backward, "[16, 24]"));
    assert!(has(Op::Send, Group::Pp, Phase::Pipeline, "[8, 24]") && has(Op::Recv, Group::Pp, Phase::Pipeline, "[8, 24]"));
    let forwards = first.records.iter().filter(|r| (r.op, r.phase, r.step) == (Op::Work, Phase::Forward, 1));
    assert_eq!(forwards.map(|r| r.micro).collect::<Vec<_>>(), (0..4).map(Some).collect::<Vec<_>>());
    let text = report::of(&rings);
    assert!(text.contains("Stragglers: last to enter, of ") && text.contains("Exposed communication: per cent of the "), "{text}");
    check_trace(&trace::to_json(&rings, &[0, 5], Some(2..=2)));
    let started = first.opened_ns;
    train(&recipe, &run, None).expect("it goes on");
    assert_eq!(Rings::read(&run.join("flight.previous")).expect("kept").of(0).expect("a ring").opened_ns, started);
    assert!(Rings::read(&run.join("flight")).expect("new").of(0).expect("a ring").opened_ns > started);
}

/// What chrome://tracing and Perfetto need: complete events with times that are not negative, on tracks that have names, on each
/// of which events nest or follow each other.
fn check_trace(value: &Value) {
    let text = value.to_string();
    let back: Value = serde_json::from_str(&text).expect("valid JSON");
    let events = back["traceEvents"].as_array().expect("a list");
    let mut tracks: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
    let mut names = Vec::new();
    for event in events {
        let (process, track) = (event["pid"].as_u64().expect("a process"), event["tid"].as_u64());
        match event["ph"].as_str().expect("a kind") {
            "M" if event["name"] == "thread_name" => names.push((process, track.expect("a track"))),
            "M" => assert!(event["args"].is_object()),
            "X" => {
                let (start, duration) = (event["ts"].as_f64().expect("a time"), event["dur"].as_f64().expect("a duration"));
                assert!(start >= 0.0 && duration >= 0.0 && event["args"]["step"] == 2 && event["name"].is_string(), "{event}");
                tracks.entry((process, track.expect("a track"))).or_default().push((start, start + duration));
            }
            other => panic!("an event of kind {other}"),
        }
    }
    let used: Vec<(u64, u64)> = tracks.keys().copied().collect();
    names.sort_unstable();
    assert_eq!(names, used, "each track has a name");
    assert!(used.iter().filter(|(process, _)| *process == 5).count() >= 4, "work, tp, dp and pp: {used:?}");
    for (track, mut spans) in tracks {
        spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut around: Vec<f64> = Vec::new();
        for (start, end) in spans {
            // Times are nanoseconds written as microseconds: comparing them may be off by their last digit.
            around.retain(|&outer| outer > start + 1e-3);
            assert!(around.iter().all(|&outer| end <= outer + 1e-3), "overlaps on track {track:?} at {start}");
            around.push(end);
        }
    }
}
