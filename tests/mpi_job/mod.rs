//! Ranks as processes under mpirun: a test program of cases launches itself, case by case, and judges each end; started by mpirun,
//! it is a rank. A job that hangs is a failure.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use trireme::cli;
use trireme::error::{Error, Result};
use trireme::runtime::{DeviceKind, Runtime};

/// A job that has not ended by then hangs: the longest case takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a rank does in a case.
pub type RankMain = fn(&Runtime) -> Result<()>;

/// One launch and what must come of it.
pub struct Case {
    pub name: &'static str,
    pub n_ranks: usize,
    pub run: RankMain,
    /// Exit code of mpirun; None: any but 0.
    pub code: Option<i32>,
    /// Each in exactly so many lines of the output of all ranks; after ^, at their beginning.
    pub lines: &'static [(&'static str, usize)],
}

/// Variables for the ranks of a case that works in a folder.
pub type Environment<'a> = dyn Fn(&Case, &Path) -> Vec<(&'static str, OsString)> + 'a;

/// A test program.
pub struct Program<'a> {
    /// Its cases.
    pub cases: &'static [Case],
    /// What the ranks compute on.
    pub device: DeviceKind,
    /// Set for the ranks of a case, whose job may write into the folder.
    pub environment: &'a Environment<'a>,
    /// Judges what a case has left in its folder.
    pub check: fn(&str, &Path) -> std::result::Result<(), String>,
}

/// Runs the program, or the rank that it has started.
pub fn main(program: &Program) -> ExitCode {
    let Program { cases, device, .. } = *program;
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        return cli::main_with(|| be_a_rank(cases, device));
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |case: &&Case| filters.is_empty() || filters.iter().any(|filter| case.name.contains(filter.as_str()));
    if let Err(error) = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status() {
        eprintln!("mpirun does not start ({error}): nothing was tested; install OpenMPI (apt-get install openmpi-bin)");
        return ExitCode::FAILURE;
    }
    let name = env!("CARGO_CRATE_NAME");
    let (mut n_passed, mut n_failed) = (0, 0);
    for case in cases.iter().filter(wanted) {
        let started = Instant::now();
        match launch(case, program) {
            Ok(()) => {
                n_passed += 1;
                println!("{name} {} on {} ranks ... ok ({:.1} s)", case.name, case.n_ranks, started.elapsed().as_secs_f64());
            }
            Err(what) => {
                n_failed += 1;
                println!("{name} {} on {} ranks ... FAILED: {what}", case.name, case.n_ranks);
            }
        }
    }
    println!("{name}: {n_passed} passed, {n_failed} failed");
    if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the case under mpirun and judges its end.
fn launch(case: &Case, program: &Program) -> std::result::Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let file = |name: &str| File::create(dir.path().join(name)).expect("a file in a fresh directory");
    let mut job = Command::new("mpirun")
        .args(["-n", &case.n_ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
        .arg(std::env::current_exe().expect("the path of this program"))
        .arg(case.name)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env_remove("RAYON_NUM_THREADS")
        .env_remove("RUST_BACKTRACE")
        .envs((program.environment)(case, dir.path()))
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
    (program.check)(case.name, dir.path())
}

fn be_a_rank(cases: &[Case], device: DeviceKind) -> Result<()> {
    let name = std::env::args().nth(1).unwrap_or_default();
    let case = cases.iter().find(|case| case.name == name).ok_or_else(|| Error::recipe(format!("no case {name:?}")))?;
    if case.name == "before-mpi" {
        return Err(Error::recipe("unknown key"));
    }
    let runtime = Runtime::start(device)?;
    assert_eq!(runtime.world().size(), case.n_ranks);
    let result = (case.run)(&runtime);
    runtime.close(result)
}
