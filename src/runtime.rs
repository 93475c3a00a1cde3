//! The only place that initialises MPI, handles signals, or ends a job from one rank. A binary starts it, works, and closes it
//! with the result of the work.
//!
//! A Rust panic would unwind into MPI_Finalize, which waits for the other ranks for ever: so a panic prints one line with its
//! coordinates and calls MPI_Abort. An error that all ranks share ends all of them alike and is printed once; an error of one
//! rank alone is noticed (the others do not arrive) and aborts the job.
//!
//! mpirun binds each rank to one core when there are few ranks, and then a rank has one thread: `mpirun --bind-to none` lets
//! the ranks of a machine share out its cores.

pub mod walltime;
mod watchdog;

pub use watchdog::{Patience, Watchdog};

use crate::artifact::{ArtifactWriter, Begin, host_name};
use crate::comm::mpi::Mpi;
use crate::comm::nccl::{self, Nccl, Sums};
use crate::comm::solo::Solo;
use crate::comm::{Communicator, Groups, agree};
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::cuda::Cuda;
use crate::device::cuda::backend::Algorithms;
use crate::error::{Error, Kind, Result};
use crate::fault;
use crate::flight::Recorder;
use crate::parallel::layout::ParallelLayout;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

/// Where to compute.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceKind {
    /// The host's cores.
    Cpu,
    /// An NVIDIA GPU for each rank; the ranks of a machine take its GPUs in turn.
    Cuda,
}

impl std::str::FromStr for DeviceKind {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<DeviceKind, String> {
        match text {
            "cpu" => Ok(DeviceKind::Cpu),
            "cuda" => Ok(DeviceKind::Cuda),
            other => Err(format!("{other:?} is no device; use cpu or cuda")),
        }
    }
}

/// By what tensors of GPUs travel between ranks; those of the host go by MPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommKind {
    /// NCCL where every rank can use it, else MPI through host memory, which the log says with its reason.
    Auto,
    /// NCCL, or an error that says why not.
    Nccl,
    /// MPI, through host memory.
    Mpi,
}

impl std::str::FromStr for CommKind {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<CommKind, String> {
        match text {
            "auto" => Ok(CommKind::Auto),
            "nccl" => Ok(CommKind::Nccl),
            "mpi" => Ok(CommKind::Mpi),
            other => Err(format!("{other:?} is no way between GPUs; use auto, nccl or mpi")),
        }
    }
}

/// How long a failing rank waits for the others to fail alike before it ends the job.
const AGREEMENT: Duration = Duration::from_secs(10);
/// How long a rank other than 0 waits with an error from before MPI, so that rank 0 prints the same one first.
const FIRST_RANK_SPEAKS: Duration = Duration::from_secs(5);
/// Exit code of a rank that panicked.
const PANIC_CODE: i32 = 101;
/// Exit code when nobody reads stdout any more: that of a program ended by SIGPIPE.
const BROKEN_PIPE_CODE: i32 = 128 + libc::SIGPIPE;

static STOP: AtomicBool = AtomicBool::new(false);
static MPI_IS_UP: AtomicBool = AtomicBool::new(false);
/// `r017 tp1 pp3 dp0 host`, once known.
static COORDINATES: Mutex<String> = Mutex::new(String::new());

fn coordinates() -> String {
    COORDINATES.lock().map_or_else(|_| String::new(), |text| text.clone())
}

/// The running program's place in the job.
pub struct Runtime {
    // Dropped in this order: communicators before the universe, whose drop finalises MPI.
    world: Box<dyn Communicator>,
    guard: Option<Mpi>,
    _universe: Option<mpi::environment::Universe>,
    device: DeviceKind,
    /// Among the ranks of this machine.
    local_rank: usize,
    /// How many those are.
    n_local: usize,
}

/// An artifact that the ranks of a job make together: rank 0 writes it.
pub struct Begun(Option<ArtifactWriter>);

impl Begun {
    /// The folder of the artifact's journal, on every rank; of one that is begun to be continued. Collective.
    pub fn journal_dir(&self, world: &dyn Communicator) -> PathBuf {
        let mine = self.0.as_ref().map(|writer| writer.journal_dir().into_os_string().into_vec());
        let first = world.gather_variable(&mine.unwrap_or_default()).swap_remove(0);
        OsString::from_vec(first).into()
    }

    /// Rank 0 writes and commits; the others have nothing to do.
    pub fn commit_with(self, write: impl FnOnce(ArtifactWriter) -> Result<()>) -> Result<()> {
        self.0.map_or(Ok(()), write)
    }
}

impl Runtime {
    /// Joins the job: MPI when a launcher started this process (mpirun, srun --mpi=pmix), else a world of one. Sets the number
    /// of threads (this rank's share of the cores it may run on), the panic hook and the signal handlers. Err before anything
    /// is started when this machine has no such device.
    pub fn start(device: DeviceKind) -> Result<Runtime> {
        if device == DeviceKind::Cuda {
            Cuda::check_machine()?;
        }
        // Before MPI, which takes a while to start: what comes meanwhile is not lost.
        set_signal_handlers();
        let universe = if launched_rank().is_some() { Some(start_mpi()?) } else { None };
        let (world, guard): (Box<dyn Communicator>, _) = match &universe {
            Some(_) => (Box::new(Mpi::world()), Some(Mpi::world())),
            None => (Box::new(Solo::new()), None),
        };
        set_coordinates(format!("r{:03} {}", world.rank(), host_name()));
        fault::set_rank(world.rank());
        start_reporting();
        let local = guard.as_ref().map(Mpi::on_this_machine);
        let (local_rank, n_local) = local.as_ref().map_or((0, 1), |local| (local.rank(), local.size()));
        set_threads(local);
        Ok(Runtime { world, guard, _universe: universe, device, local_rank, n_local })
    }

    /// Opens this rank's device. An Err may be of this rank alone.
    pub fn device(&self) -> Result<Box<dyn Device>> {
        Ok(match self.device {
            DeviceKind::Cpu => Box::new(Cpu::new()),
            DeviceKind::Cuda => Box::new(Cuda::open(self.local_rank)?),
        })
    }

    /// This rank's share of the memory that is free where it computes, in bytes; None where nobody says.
    pub fn free_bytes(&self) -> Option<usize> {
        match self.device {
            DeviceKind::Cpu => Some(free_host_bytes()? / self.n_local),
            DeviceKind::Cuda => None,
        }
    }

    /// All ranks.
    pub fn world(&self) -> &dyn Communicator {
        &*self.world
    }

    /// Whether this rank speaks for the job.
    pub fn is_first(&self) -> bool {
        self.world.rank() == 0
    }

    /// This rank's communicators under a layout; from here on messages name its coordinates. Collective.
    pub fn groups(&self, layout: ParallelLayout) -> Groups {
        self.groups_of(self.world.split(0), layout)
    }

    fn groups_of(&self, world: Box<dyn Communicator>, layout: ParallelLayout) -> Groups {
        assert_eq!(world.size(), layout.world(), "the world does not fit {layout:?}");
        let at = layout.coords(world.rank());
        set_coordinates(format!("r{:03} tp{} pp{} dp{} {}", world.rank(), at.tp, at.pp, at.dp, host_name()));
        Groups::new(world, layout)
    }

    /// Opens every rank's device and makes the groups of a layout, between GPUs by NCCL as `comm` and `options` say. Where sums over
    /// ranks have an order, so have those of products: their algorithms are fixed. Every rank leaves with the same Err. Collective.
    pub fn open(&self, layout: ParallelLayout, comm: CommKind, options: nccl::Options) -> Result<(Box<dyn Device>, Groups)> {
        if self.device == DeviceKind::Cpu {
            return Ok((self.device()?, self.groups(layout)));
        }
        let algorithms = match options.sums {
            Sums::Library => Algorithms::Measured,
            Sums::Ordered => Algorithms::Fixed,
        };
        let cuda = agree(&*self.world, Cuda::open_with(self.local_rank, algorithms))?;
        let world = between_gpus(self.world.split(0), &cuda, comm, options)?;
        Ok((Box::new(cuda), self.groups_of(world, layout)))
    }

    /// Whether this rank got SIGTERM, SIGINT, SIGHUP or SIGUSR1.
    pub fn stop_requested(&self) -> bool {
        STOP.load(Ordering::Relaxed)
    }

    /// Watches this rank from here on: a communication that takes longer than `patience` ends the job with a report of what all
    /// ranks recorded. Until the ring of `flight` is opened there is nothing to watch.
    pub fn watch(&self, flight: &Recorder, patience: Patience) -> Watchdog {
        Watchdog::start(flight, self.world.rank(), patience, || STOP.load(Ordering::Relaxed))
    }

    /// Starts the artifact `out` on rank 0 and says so everywhere; None when it was finished before, which is told. Collective.
    pub fn begin(&self, out: &Path, begin: impl FnOnce() -> Result<Begin>) -> Result<Option<Begun>> {
        let mine = if self.is_first() { begin().map(Some) } else { Ok(None) };
        let (writer, finished) = match agree(&*self.world, mine)? {
            Some(Begin::Write(writer)) => (Some(writer), false),
            Some(Begin::Finished(_)) => (None, true),
            None => (None, false),
        };
        if self.world.sum_f64(f64::from(u8::from(finished))) == 0.0 {
            return Ok(Some(Begun(writer)));
        }
        if self.is_first() {
            println!("{}: finished already, nothing to do", out.display());
        }
        Ok(None)
    }

    /// Leaves the job with the result of its work; groups must be dropped before. Under MPI an error does not return: when all
    /// ranks fail, each different error is printed once, by the lowest rank that has it, and all leave with the exit code of
    /// the lowest; when this rank fails alone it ends the job.
    pub fn close(self, result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        let Some(guard) = &self.guard else { return Err(error) };
        if !guard.all_arrive_within(AGREEMENT) {
            self.abort(&error);
        }
        let mut mine = vec![error.exit_code()];
        mine.extend_from_slice(error.to_string().as_bytes());
        let all = guard.gather_variable(&mine);
        match all.iter().position(|theirs| *theirs == mine) {
            Some(first) if first < guard.rank() => {}
            _ if guard.rank() == 0 => drop(writeln!(std::io::stderr(), "error: {error}")),
            _ => drop(writeln!(std::io::stderr(), "[{}] error: {error}", coordinates())),
        }
        drop(self);
        std::process::exit(i32::from(all[0][0]))
    }

    /// Ends the whole job at once because of an error of this rank that the others do not know of.
    pub fn abort(&self, error: &Error) -> ! {
        let _ = writeln!(std::io::stderr(), "[{}] error: {error}", coordinates());
        end_job(i32::from(error.exit_code()))
    }
}

/// The ranks of `world` with NCCL for the tensors of their GPUs, where that is wanted and can be. Collective.
fn between_gpus(world: Box<dyn Communicator>, cuda: &Cuda, comm: CommKind, options: nccl::Options) -> Result<Box<dyn Communicator>> {
    if world.size() == 1 || comm == CommKind::Mpi {
        return Ok(world);
    }
    match nccl::check(&*world, cuda) {
        Ok(()) => Ok(Box::new(Nccl::new(world, cuda.sharing_memory(), options))),
        Err(error) if comm == CommKind::Nccl => Err(error.doing("--comm nccl")),
        Err(error) => {
            if world.rank() == 0 {
                log::warn!("collectives between GPUs go through host memory over MPI: {error}");
            }
            Ok(world)
        }
    }
}

/// The rank that a launcher (mpirun, srun --mpi=pmix) gave to this process.
fn launched_rank() -> Option<usize> {
    let names = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK"];
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// Sets what speaks to people: the panic hook and the logger. Once in a process; before MPI it goes by the launcher's rank.
pub fn start_reporting() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        set_panic_hook();
        start_logging(launched_rank().unwrap_or(0));
    });
}

/// Prints the one line of an error that ends the program, before MPI or without. All ranks of a job make the same mistake
/// mostly (a wrong recipe), so rank 0 speaks first and its exit ends the others.
pub fn report_final(error: &Error) {
    match launched_rank() {
        None | Some(0) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
        }
        Some(rank) => {
            std::thread::sleep(FIRST_RANK_SPEAKS);
            let _ = writeln!(std::io::stderr(), "[r{rank:03} {}] error: {error}", host_name());
        }
    }
}

fn start_mpi() -> Result<mpi::environment::Universe> {
    let Some((universe, threading)) = mpi::initialize_with_threading(mpi::Threading::Serialized) else {
        return Err(Error::new(Kind::Other, "MPI was initialised already").remedy("start one Runtime a process"));
    };
    if threading < mpi::Threading::Serialized {
        let wrong = format!("this MPI gives {threading:?}, Serialized is needed");
        return Err(Error::new(Kind::Other, wrong).remedy("use an MPI library that was built with threads"));
    }
    MPI_IS_UP.store(true, Ordering::SeqCst);
    Ok(universe)
}

fn set_coordinates(text: String) {
    if let Ok(mut coordinates) = COORDINATES.lock() {
        *coordinates = text;
    }
}

/// Ends the whole job at once.
fn end_job(code: i32) -> ! {
    let _ = std::io::stderr().flush();
    if MPI_IS_UP.load(Ordering::SeqCst) && !mpi::environment::is_finalized() {
        // SAFETY: MPI is initialised; the call does not return.
        unsafe { mpi::ffi::MPI_Abort(mpi::ffi::RSMPI_COMM_WORLD, code) };
    }
    std::process::exit(code)
}

fn set_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied()).unwrap_or("panic");
        if text.starts_with("failed printing to std") && text.contains("Broken pipe") {
            // The reader has seen enough (`| head`): nothing is wrong here.
            end_job(BROKEN_PIPE_CODE);
        }
        // An error that is thrown has its own exit code, and its place in the program helps nobody.
        let error = payload.downcast_ref::<Error>();
        let (text, code) = match error {
            Some(error) => (error.to_string(), i32::from(error.exit_code())),
            None => (info.location().map_or(text.into(), |at| format!("{text} ({}:{})", at.file(), at.line())), PANIC_CODE),
        };
        let coordinates = coordinates();
        let prefix = if coordinates.is_empty() { String::new() } else { format!("[{coordinates}] ") };
        let _ = writeln!(std::io::stderr(), "{prefix}error: {}", text.replace('\n', "; "));
        if error.is_none() && std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            let _ = writeln!(std::io::stderr(), "{}", std::backtrace::Backtrace::force_capture());
        }
        end_job(code)
    }));
}

/// Asks for a stop; Ctrl-C once more stops at once.
extern "C" fn on_signal(signal: libc::c_int) {
    if STOP.swap(true, Ordering::Relaxed) && signal == libc::SIGINT {
        // SAFETY: _exit may be called in a signal handler.
        unsafe { libc::_exit(128 + libc::SIGINT) };
    }
}

fn set_signal_handlers() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP] {
        // SAFETY: the handler only swaps an atomic and calls _exit; SA_RESTART keeps system calls going. What the parent ignores
        // (nohup: SIGHUP) stays ignored.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            if action.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            action = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Rank 0 says what TRIREME_LOG asks for (info by default), the others warnings, unless TRIREME_LOG_ALL_RANKS is set.
fn start_logging(rank: usize) {
    let default = if rank == 0 || std::env::var_os("TRIREME_LOG_ALL_RANKS").is_some() { "info" } else { "warn" };
    let filter = if rank == 0 { std::env::var("TRIREME_LOG").unwrap_or(default.into()) } else { default.into() };
    let mut logger = env_logger::Builder::new();
    logger.parse_filters(&filter).format(move |out, record| {
        if rank == 0 && record.level() >= log::Level::Info {
            return writeln!(out, "{}", record.args());
        }
        writeln!(out, "[{}] {}: {}", coordinates(), record.level().as_str().to_lowercase(), record.args())
    });
    // A second start in one process (tests) keeps the first logger.
    let _ = logger.try_init();
}

/// One thread for each core of this rank's share. Ranks of one machine that may run on the same cores share them out; ranks
/// bound to cores of their own keep them all. RAYON_NUM_THREADS overrides.
fn set_threads(on_this_machine: Option<Mpi>) {
    if std::env::var_os("RAYON_NUM_THREADS").is_some() {
        return;
    }
    let n_cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let n_sharing = on_this_machine.map_or(1, |local| {
        let mine = affinity();
        local.gather_variable(&mine).into_iter().filter(|theirs| *theirs == mine).count()
    });
    // Fails only when the pool exists already (tests): then it stays as it is.
    let _ = rayon::ThreadPoolBuilder::new().num_threads((n_cores / n_sharing.max(1)).max(1)).build_global();
}

/// The cores this process may run on, as the kernel says it.
fn affinity() -> Vec<u8> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("Cpus_allowed:")).unwrap_or("").as_bytes().to_vec()
}

/// Memory that this machine can give without swapping, as the kernel estimates it, and within the limit of the control group.
fn free_host_bytes() -> Option<usize> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = info.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix("kB")?.trim().parse::<usize>().ok())?;
    let limit = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    Some(limit.map_or(usize::MAX, |(most, used)| most.saturating_sub(used)).min(1024 * available))
}
