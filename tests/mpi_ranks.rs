//! Ranks as processes under mpirun: the table of collectives over MPI, all groups of all layouts, and how a job ends when one
//! rank panics, fails, is killed or is asked to stop.

mod collective_table;
mod common;
mod hanging_ranks;
mod mpi_job;
mod numerics_runs;

use collective_table::check_all;
use mpi_job::{Case, Program};
use numerics_runs::Run;
use std::process::{Command, ExitCode};
use std::time::Duration;
use trireme::comm::mpi::Mpi;
use trireme::comm::{Groups, Recv, Send, agree};
use trireme::error::{Error, Result};
use trireme::model::ctx::SequenceMode;
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::{DeviceKind, Runtime};
use trireme::tensor::{DType, Tensor};

const CASES: &[Case] = &[
    // Bits on MPI equal those of a plain loop in rank order, and so those over threads, for long messages cut in pieces too.
    Case { name: "collectives-2", n_ranks: 2, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 2)] },
    Case { name: "collectives-3", n_ranks: 3, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 3)] },
    Case { name: "collectives-4", n_ranks: 4, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 4)] },
    // Every group of every layout has the right ranks and works while the other groups do.
    Case { name: "layouts-2", n_ranks: 2, run: layouts, code: Some(0), lines: &[("layouts of 2 ranks: 3", 2)] },
    Case { name: "layouts-3", n_ranks: 3, run: layouts, code: Some(0), lines: &[("layouts of 3 ranks: 3", 3)] },
    Case { name: "layouts-4", n_ranks: 4, run: layouts, code: Some(0), lines: &[("layouts of 4 ranks: 6", 4)] },
    // Training over MPI gives the bits of one rank in reproducible numerics, under every layout of four: a message in another order
    // or of another precision than between threads would change them.
    Case { name: "training-4", n_ranks: 4, run: training, code: Some(0), lines: &[("the bits of one rank under 6 layouts", 4)] },
    // One rank under mpirun is a world like any other.
    Case { name: "alone", n_ranks: 1, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 1)] },
    // Ranks that may run on the same cores share them out: else n ranks compute with n times as many threads as cores.
    Case { name: "threads", n_ranks: 2, run: threads_are_shared_out, code: Some(0), lines: &[] },
    // A panic would unwind into MPI_Finalize and wait there for ever.
    Case { name: "panic", n_ranks: 3, run: panic_on_one, code: Some(101), lines: &[("[r001 tp1 pp0 dp0 ", 1), ("error: disk on fire", 1)] },
    Case { name: "panic-in-worker", n_ranks: 2, run: panic_in_worker, code: Some(101), lines: &[("error: worker on fire", 1)] },
    // What one rank alone finds wrong, all leave with, and it is said once.
    Case { name: "agreed-error", n_ranks: 4, run: agreed_error, code: Some(3), lines: &[("error: shard-2: found 3, expected 4", 1)] },
    // Without agreement the others wait somewhere else; the job must end nevertheless, with the code of the error.
    Case { name: "lone-error", n_ranks: 3, run: lone_error, code: Some(3), lines: &[("[r001 tp0 pp1 dp0 ", 1), ("shard-1: gone", 1)] },
    Case { name: "different-errors", n_ranks: 3, run: different_errors, code: Some(2), lines: &[("key even", 1), ("key odd", 1)] },
    // A wrong recipe is found before MPI starts, by every rank; rank 0 says it, without waiting for anybody.
    Case { name: "before-mpi", n_ranks: 3, run: |_| Ok(()), code: Some(2), lines: &[("^error: unknown key", 1)] },
    // A rank that the kernel kills (out of memory) takes the job with it.
    Case { name: "killed", n_ranks: 3, run: killed, code: None, lines: &[] },
    // A signal to one rank stops all at the same step: a stop that one rank took alone would leave the others in a collective.
    Case { name: "sigterm", n_ranks: 3, run: |runtime| stopped(runtime, "TERM"), code: Some(0), lines: &[("stopping together", 3)] },
    Case { name: "sigusr1", n_ranks: 2, run: |runtime| stopped(runtime, "USR1"), code: Some(0), lines: &[("stopping together", 2)] },
    // A process that stands still holds up the others for ever: they end the job, and say which rank and which operation.
    Case { name: "stopped-still", n_ranks: 3, run: hanging_ranks::stands_still, code: Some(1), lines: hanging_ranks::STANDS_STILL },
    // A rank that leaves out a collective waits elsewhere, in a circle with the others: it is the one that is named.
    Case { name: "left-out", n_ranks: 3, run: hanging_ranks::leaves_out, code: Some(1), lines: hanging_ranks::LEAVES_OUT },
    // The records of a killed rank are in the file, and tell what it was in.
    Case { name: "killed-with-ledger", n_ranks: 3, run: hanging_ranks::is_killed, code: None, lines: &[] },
    // A message of another size than its receiver expects must not pass as data.
    Case { name: "short-message", n_ranks: 2, run: short_message, code: Some(101), lines: &[("4 bytes, expected 8", 1)] },
];

fn main() -> ExitCode {
    mpi_job::main(&Program {
        cases: CASES,
        device: DeviceKind::Cpu,
        environment: &|_, folder| vec![(hanging_ranks::RUN_VARIABLE, folder.into())],
        check: hanging_ranks::check,
    })
}

fn layout(tp: usize, pp: usize, dp: usize) -> ParallelLayout {
    ParallelLayout { tp, pp, dp, vp: 1 }
}

fn collectives(runtime: &Runtime) -> Result<()> {
    check_all(runtime.world());
    // 997 bytes cut even small messages, and in the middle of an element.
    let cut = Mpi::world().with_pieces(997);
    check_all(&cut);
    println!("rank {} of {}: equal to the plain loop", runtime.world().rank(), runtime.world().size());
    Ok(())
}

fn layouts(runtime: &Runtime) -> Result<()> {
    let n = runtime.world().size();
    let mut n_layouts = 0;
    for (tp, pp) in (1..=n).flat_map(|tp| (1..=n).map(move |pp| (tp, pp))).filter(|(tp, pp)| n.is_multiple_of(tp * pp)) {
        let layout = layout(tp, pp, n / (tp * pp));
        check_groups(&runtime.groups(layout));
        n_layouts += 1;
    }
    println!("layouts of {n} ranks: {n_layouts}");
    Ok(())
}

fn training(runtime: &Runtime) -> Result<()> {
    let n = runtime.world().size();
    for dtype in [DType::F32, DType::BF16] {
        let alone = Run::reference(numerics_runs::model(), dtype);
        let expected = numerics_runs::train(&alone, 2);
        let mut n_layouts = 0;
        for (tp, pp) in (1..=n).flat_map(|tp| (1..=n).map(move |pp| (tp, pp))).filter(|(tp, pp)| n.is_multiple_of(tp * pp)) {
            let sequence = if tp > 1 { SequenceMode::Sharded } else { SequenceMode::Replicated };
            let run = Run { layout: layout(tp, pp, n / (tp * pp)), micro: 2, sequence, ..alone.clone() };
            let difference = numerics_runs::difference_on_rank(&run, Box::new(Mpi::world()), &expected);
            assert_eq!(difference, None, "{run:?}");
            n_layouts += 1;
        }
        if dtype == DType::BF16 {
            println!("the bits of one rank under {n_layouts} layouts");
        }
    }
    Ok(())
}

fn check_groups(groups: &Groups) {
    let (at, layout) = (groups.at, groups.layout);
    let code = |tp: usize, pp: usize, dp: usize| (tp + 10 * pp + 100 * dp) as f64;
    let mine = code(at.tp, at.pp, at.dp);
    assert_eq!(groups.tp.gather_f64(mine), (0..layout.tp).map(|tp| code(tp, at.pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.pp.gather_f64(mine), (0..layout.pp).map(|pp| code(at.tp, pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.dp.gather_f64(mine), (0..layout.dp).map(|dp| code(at.tp, at.pp, dp)).collect::<Vec<_>>());
    [&groups.tp, &groups.pp, &groups.dp].into_iter().for_each(|comm| check_all(&**comm));
}

fn threads_are_shared_out(runtime: &Runtime) -> Result<()> {
    let n_cores = std::thread::available_parallelism().expect("the number of cores").get();
    assert_eq!(rayon::current_num_threads(), (n_cores / runtime.world().size()).max(1), "of {n_cores} cores");
    Ok(())
}

fn panic_on_one(runtime: &Runtime) -> Result<()> {
    let groups = runtime.groups(layout(3, 1, 1));
    assert!(groups.world.rank() != 1, "disk on fire");
    groups.tp.barrier();
    Ok(())
}

fn panic_in_worker(runtime: &Runtime) -> Result<()> {
    if runtime.world().rank() == 1 {
        rayon::scope(|scope| scope.spawn(|_| panic!("worker on fire")));
    }
    runtime.world().barrier();
    Ok(())
}

fn agreed_error(runtime: &Runtime) -> Result<()> {
    let groups = runtime.groups(layout(2, 1, 2));
    let opened =
        if groups.world.rank() >= 2 { Err(Error::file(format!("shard-{}", groups.world.rank()), "found 3, expected 4")) } else { Ok(()) };
    let result = agree(&*groups.world, opened);
    let error = result.as_ref().expect_err("two ranks failed");
    assert_eq!((error.to_string().as_str(), error.exit_code()), ("shard-2: found 3, expected 4", 3));
    result
}

fn lone_error(runtime: &Runtime) -> Result<()> {
    let groups = runtime.groups(layout(1, 3, 1));
    if groups.world.rank() == 1 {
        return Err(Error::file("shard-1", "gone"));
    }
    groups.world.barrier();
    Ok(())
}

fn different_errors(runtime: &Runtime) -> Result<()> {
    Err(Error::recipe(if runtime.world().rank().is_multiple_of(2) { "key even" } else { "key odd" }))
}

/// Sends a signal to this process.
fn signal_myself(name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(std::process::id().to_string()).status();
    assert!(status.expect("kill starts").success());
}

fn killed(runtime: &Runtime) -> Result<()> {
    if runtime.world().rank() == 1 {
        signal_myself("KILL");
    }
    runtime.world().barrier();
    Ok(())
}

fn stopped(runtime: &Runtime, name: &str) -> Result<()> {
    let world = runtime.world();
    let any_asked = || world.sum_f64(f64::from(u8::from(runtime.stop_requested()))) > 0.0;
    assert!(!any_asked(), "nobody has asked for a stop");
    if world.rank() == 1 {
        signal_myself(name);
        while !runtime.stop_requested() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut n_steps = 0;
    while !any_asked() {
        n_steps += 1;
    }
    assert_eq!(world.gather_f64(f64::from(n_steps)), vec![f64::from(n_steps); world.size()]);
    println!("stopping together");
    Ok(())
}

fn short_message(runtime: &Runtime) -> Result<()> {
    let mut x = Tensor::from_f32(&[2], &[1.0, 2.0]);
    let world = runtime.world();
    if world.rank() == 0 {
        world.start_group(vec![Send { peer: 1, tag: 7, tensor: &x.rows(0..1) }], Vec::new()).wait();
    } else {
        world.start_group(Vec::new(), vec![Recv { peer: 0, tag: 7, tensor: &mut x }]).wait();
    }
    world.barrier();
    Ok(())
}
