//! Ranks under mpirun that hang or are killed, with their flight ledgers and the watchdog: what must be said of them.

use super::{layout, signal_myself};
use std::path::{Path, PathBuf};
use trireme::comm::{Groups, ReduceOp, agree};
use trireme::error::Result;
use trireme::flight::rings::Rings;
use trireme::flight::{self, Op, Phase, report};
use trireme::runtime::{Patience, Runtime, Watchdog};
use trireme::tensor::Tensor;

/// Names the folder that the ranks of a case take for their run directory.
pub const RUN_VARIABLE: &str = "TRIREME_TEST_RUN";

/// Far longer than a collective of these cases takes on a busy machine.
const PATIENCE_S: f64 = 3.0;

/// The operation that is in nobody's way until a rank does not come.
const ELEMENTS: usize = 1000;

fn run_directory() -> PathBuf {
    std::env::var_os(RUN_VARIABLE).expect("set by the launch").into()
}

/// Groups of dp = 3 that record, watched.
fn watched(runtime: &Runtime) -> Result<(Groups, Watchdog)> {
    let groups = runtime.groups(layout(1, 1, 3));
    let (world, run) = (&*groups.world, run_directory());
    agree(world, if world.rank() == 0 { flight::begin_folder(&run) } else { Ok(()) })?;
    agree(world, groups.flight.open(&flight::folder(&run), 256, groups.layout, world.rank()))?;
    let watchdog = runtime.watch(&groups.flight, Patience { step_s: Some(PATIENCE_S), files_s: None });
    Ok((groups, watchdog))
}

/// Four sums of gradients, as in a step; `before` is called with the number of each.
fn work(groups: &Groups, before: impl Fn(usize)) {
    let mut gradient = Tensor::from_f32(&[ELEMENTS], &vec![1.0; ELEMENTS]);
    groups.flight.step(7);
    let _span = groups.flight.span_at(Phase::Backward, 0, Some(2));
    for number in 1..=4 {
        before(number);
        groups.flight.name("layers.3.mlp.up.weight");
        groups.dp.all_reduce(&mut gradient, ReduceOp::Sum);
    }
}

/// Rank 1 is stopped by a signal before the third sum.
pub fn stands_still(runtime: &Runtime) -> Result<()> {
    let (groups, _watchdog) = watched(runtime)?;
    work(&groups, |number| {
        if number == 3 && groups.world.rank() == 1 {
            signal_myself("STOP");
        }
    });
    Ok(())
}

/// What is printed then, once.
pub const STANDS_STILL: &[(&str, usize)] = &[
    ("error: blocked for", 1),
    (") never entered all-reduce 3 of dp (layers.3.mlp.up.weight, 4.0 kB; backward of micro-batch 2, chunk 0, step 7)", 1),
    ("ranks 0, 2 wait for it since ", 1),
    ("rank 1 is silent since ", 1),
];

/// Rank 2 leaves out the third sum and goes on to a barrier of all.
pub fn leaves_out(runtime: &Runtime) -> Result<()> {
    let (groups, _watchdog) = watched(runtime)?;
    work(&groups, |number| {
        if number == 3 && groups.world.rank() == 2 {
            // Later than the others are in the sum, as a rank is that does other work instead.
            std::thread::sleep(std::time::Duration::from_millis(300));
            groups.world.barrier();
        }
    });
    Ok(())
}

/// What is printed then, once.
pub const LEAVES_OUT: &[(&str, usize)] = &[
    ("error: blocked for", 1),
    (") never entered all-reduce 3 of dp (layers.3.mlp.up.weight, ", 1),
    ("ranks 0, 1 wait for it since ", 1),
    ("rank 2 waits in barrier ", 1),
];

/// Rank 1 is killed before the fourth sum; the others wait for it until the launcher ends them.
pub fn is_killed(runtime: &Runtime) -> Result<()> {
    let (groups, _watchdog) = watched(runtime)?;
    work(&groups, |number| {
        if number == 4 && groups.world.rank() == 1 {
            signal_myself("KILL");
        }
    });
    Ok(())
}

/// What the ledgers must tell after the end of a case.
pub fn check(case: &str, run: &Path) -> std::result::Result<(), String> {
    if case != "killed-with-ledger" {
        return Ok(());
    }
    let rings = Rings::read(&flight::folder(run)).map_err(|error| error.to_string())?;
    let text = report::of(&rings);
    let problem = |what: &str| Err(format!("{what}; the report is\n{text}"));
    let Some(killed) = rings.of(1) else { return problem("the killed rank left no ring") };
    let sums: Vec<u64> = killed.records.iter().filter(|r| r.op == Op::AllReduce).map(|r| r.sequence).collect();
    if sums != [1, 2, 3] || killed.closed_ns > 0 || killed.records.iter().any(|r| r.is_open()) {
        return problem("the killed rank's records are not three sums without an end in good order");
    }
    for expected in [") never entered all-reduce 4 of dp (", "rank 1 (tp0 pp0 dp1, ", "ranks 0, 2 wait for it"] {
        if !text.contains(expected) {
            return problem(&format!("no {expected:?}"));
        }
    }
    Ok(())
}
