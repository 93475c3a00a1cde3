//! Ranks as processes under mpirun: the table of collectives over MPI, all groups of all layouts, and how a job ends when one
//! rank panics, fails, is killed or is asked to stop. Started plainly, this program launches itself under mpirun, case by
//! case; started by mpirun, it is a rank. A job that hangs is a failure.

mod collective_table;
mod hanging_ranks;

use collective_table::check_all;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use trireme::cli;
use trireme::comm::mpi::Mpi;
use trireme::comm::{Groups, Recv, Send, agree};
use trireme::error::{Error, Result};
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::{DeviceKind, Runtime};
use trireme::tensor::Tensor;

/// A job that has not ended by then hangs: the longest case takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a rank does in a case.
type RankMain = fn(&Runtime) -> Result<()>;

/// One launch and what must come of it.
struct Case {
    name: &'static str,
    n_ranks: usize,
    run: RankMain,
    /// Exit code of mpirun; None: any but 0.
    code: Option<i32>,
    /// Each in exactly so many lines of the output of all ranks; after ^, at their beginning.
    lines: &'static [(&'static str, usize)],
}

const CASES: &[Case] = &[
    // Bits on MPI equal those of a plain loop in rank order, and so those over threads, for long messages cut in pieces too.
    Case { name: "collectives-2", n_ranks: 2, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 2)] },
    Case { name: "collectives-3", n_ranks: 3, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 3)] },
    Case { name: "collectives-4", n_ranks: 4, run: collectives, code: Some(0), lines: &[("equal to the plain loop", 4)] },
    // Every group of every layout has the right ranks and works while the other groups do.
    Case { name: "layouts-2", n_ranks: 2, run: layouts, code: Some(0), lines: &[("layouts of 2 ranks: 3", 2)] },
    Case { name: "layouts-3", n_ranks: 3, run: layouts, code: Some(0), lines: &[("layouts of 3 ranks: 3", 3)] },
    Case { name: "layouts-4", n_ranks: 4, run: layouts, code: Some(0), lines: &[("layouts of 4 ranks: 6", 4)] },
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
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        return cli::main_with(be_a_rank);
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |case: &&Case| filters.is_empty() || filters.iter().any(|filter| case.name.contains(filter.as_str()));
    if let Err(error) = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status() {
        eprintln!("mpirun does not start ({error}): nothing was tested; install OpenMPI (apt-get install openmpi-bin)");
        return ExitCode::FAILURE;
    }
    let (mut n_passed, mut n_failed) = (0, 0);
    for case in CASES.iter().filter(wanted) {
        let started = Instant::now();
        match launch(case) {
            Ok(()) => {
                n_passed += 1;
                println!("mpi_ranks {} on {} ranks ... ok ({:.1} s)", case.name, case.n_ranks, started.elapsed().as_secs_f64());
            }
            Err(what) => {
                n_failed += 1;
                println!("mpi_ranks {} on {} ranks ... FAILED: {what}", case.name, case.n_ranks);
            }
        }
    }
    println!("mpi_ranks: {n_passed} passed, {n_failed} failed");
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the case under mpirun and judges its end.
fn launch(case: &Case) -> std::result::Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let file = |name: &str| File::create(dir.path().join(name)).expect("a file in a fresh directory");
    let mut job = Command::new("mpirun")
        .args(["-n", &case.n_ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
        .arg(std::env::current_exe().expect("the path of this program"))
        .arg(case.name)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env(hanging_ranks::RUN_VARIABLE, dir.path())
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env_remove("RAYON_NUM_THREADS")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .spawn()
        .map_err(|error| format!("mpirun: {error}"))?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = job.try_wait().map_err(|error| error.to_string())? {
            break Some(status);
        }
        if started.elapsed() > PATIENCE {
            // mpirun ends its ranks when it is asked to end; killed, it would leave them behind.
            let _ = Command::new("kill").arg(job.id().to_string()).status();
            let _ = job.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let read = |name: &str| String::from_utf8_lossy(&std::fs::read(dir.path().join(name)).unwrap_or_default()).into_owned();
    let output = read("stdout") + &read("stderr");
    let Some(status) = status else { return Err(format!("hangs; it printed\n{output}")) };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    let code_is_right = case.code.map_or(code != 0, |expected| code == expected);
    if !code_is_right {
        return Err(format!(
            "exit code {code}, expected {}; it printed\n{output}",
            case.code.map_or("not 0".into(), |code| code.to_string())
        ));
    }
    for (text, expected) in case.lines {
        let is_in = |line: &&str| text.strip_prefix('^').map_or(line.contains(text), |beginning| line.starts_with(beginning));
        let found = output.lines().filter(is_in).count();
        if found != *expected {
            return Err(format!("{found} lines with {text:?}, expected {expected}; it printed\n{output}"));
        }
    }
    hanging_ranks::check(case.name, dir.path())
}

fn be_a_rank() -> Result<()> {
    let name = std::env::args().nth(1).unwrap_or_default();
    let case = CASES.iter().find(|case| case.name == name).ok_or_else(|| Error::recipe(format!("no case {name:?}")))?;
    if case.name == "before-mpi" {
        return Err(Error::recipe("unknown key"));
    }
    let runtime = Runtime::start(DeviceKind::Cpu)?;
    assert_eq!(runtime.world().size(), case.n_ranks);
    let result = (case.run)(&runtime);
    runtime.close(result)
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
    for (tp, pp) in (1..=n).flat_map(|tp| (1..=n).map(move |pp| (tp, pp))).filter(|(tp, pp)| n % (tp * pp) == 0) {
        let layout = layout(tp, pp, n / (tp * pp));
        check_groups(&runtime.groups(layout));
        n_layouts += 1;
    }
    println!("layouts of {n} ranks: {n_layouts}");
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
    Err(Error::recipe(if runtime.world().rank() % 2 == 0 { "key even" } else { "key odd" }))
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
    assert!(!runtime.stop_agreed(world), "nobody has asked for a stop");
    if world.rank() == 1 {
        signal_myself(name);
        while !runtime.stop_requested() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut n_steps = 0;
    while !runtime.stop_agreed(world) {
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
