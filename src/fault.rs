//! Planned faults, to see what a run survives: a process ends, stops, or is told that the disk is full, at a named place.
//!
//! ```text
//! TRIREME_FAULT="ACTION at=PLACE [n=N] [rank=R]"      several are separated by ;
//!
//! ACTION  kill (SIGKILL)  abort  stop (SIGSTOP)  term (SIGTERM)  usr1 (SIGUSR1)  hup (SIGHUP)  panic
//!         machine                 as when the rank's machine has failed (`machine::failed`)
//!         enospc  eio  edquot     a step of writing fails so, and all after it (removing still works)
//!         short                   a write takes half of its bytes, and so do all after it
//!         eintr                   one step of writing is interrupted
//!         slow                    that step of writing, and each after it, takes 5 ms more
//!         crash                   from there on nothing changes on the disk: what is left is what a crash leaves
//! PLACE   io, or one of io.create io.write io.sync io.rename io.remove io.hdf5
//!         init  verify  forward  backward  collective  update  validation  pass
//!         save, or one of save.begin save.snapshot save.write save.report save.commit save.durable
//! N       the how-many-th time that this process comes by there (1)
//! R       only on this rank (on all)
//! ```
//!
//! Without the variable a place costs one load of a number that is always in the cache.

use crate::machine;
use rustix::process::{Signal, getpid, kill_process};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Whether the plans were read, and whether there are any.
static STATE: AtomicU8 = AtomicU8::new(UNREAD);
const UNREAD: u8 = 0;
const NONE: u8 = 1;
const ARMED: u8 = 2;

/// How much longer a step takes on a slow disk.
const SLOW: Duration = Duration::from_millis(5);

static PLANS: Mutex<Vec<Plan>> = Mutex::new(Vec::new());
static RANK: AtomicUsize = AtomicUsize::new(0);
/// After a simulated crash.
static CRASHED: AtomicBool = AtomicBool::new(false);
/// Plans made by [`plan`] hold for the whole process: one at a time.
static PLANNED: Mutex<()> = Mutex::new(());

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    Signal(Signal),
    Abort,
    Panic,
    Machine,
    Errno(i32),
    Short,
    Interrupt,
    Slow,
    Crash,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Plan {
    action: Action,
    place: String,
    n: u64,
    rank: Option<usize>,
    /// How often the place was passed.
    passed: u64,
}

/// How a step of writing is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// As asked.
    Whole,
    /// A write takes half of what it is given.
    Short,
}

/// Says which rank this process is; plans may be for one of them.
pub fn set_rank(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

/// A place in the program that a plan may name. What is no step of writing has no error to return: `enospc` and its like do
/// nothing here.
pub fn at(place: &str) {
    if STATE.load(Ordering::Relaxed) != NONE {
        let _ = pass(place);
    }
}

/// A step of writing: it goes wrong where a plan says so.
pub fn io(place: &str) -> io::Result<Fate> {
    if STATE.load(Ordering::Relaxed) == NONE { Ok(Fate::Whole) } else { pass(place) }
}

/// Plans faults in this process until the guard is dropped, in the words of `TRIREME_FAULT`; for tests. Waits for the guard of
/// another test; panics when the text is no plan.
pub fn plan(text: &str) -> Planned {
    let guard = PLANNED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let plans = parse(text).unwrap_or_else(|wrong| panic!("{text:?}: {wrong}"));
    *plans_locked() = plans;
    STATE.store(ARMED, Ordering::SeqCst);
    Planned { _guard: guard }
}

/// See [`plan`].
pub struct Planned {
    _guard: MutexGuard<'static, ()>,
}

impl Planned {
    /// Whether every planned fault has come about.
    pub fn is_over(&self) -> bool {
        plans_locked().iter().all(|plan| plan.passed >= plan.n)
    }
}

impl Drop for Planned {
    fn drop(&mut self) {
        plans_locked().clear();
        CRASHED.store(false, Ordering::SeqCst);
        STATE.store(NONE, Ordering::SeqCst);
    }
}

fn plans_locked() -> MutexGuard<'static, Vec<Plan>> {
    // A planned panic happens outside of the lock; the plans are whole whoever panicked.
    PLANS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Goes by a place while there are plans, or before it is known whether there are.
#[cold]
fn pass(place: &str) -> io::Result<Fate> {
    if STATE.load(Ordering::SeqCst) == UNREAD {
        read_environment();
    }
    let is_io = place.starts_with("io.");
    if is_io && CRASHED.load(Ordering::SeqCst) {
        return Err(crashed());
    }
    let due: Vec<Action> = {
        let mut plans = plans_locked();
        plans.iter_mut().filter_map(|plan| plan.pass(place)).collect()
    };
    let mut fate = Fate::Whole;
    for action in due {
        match action {
            Action::Signal(signal) => signal_myself(signal),
            Action::Abort => std::process::abort(),
            Action::Panic => panic!("planned at {place}"),
            Action::Machine => std::panic::panic_any(machine::failed(format!("a fault of the machine, planned at {place}"))),
            Action::Errno(code) if is_io => return Err(io::Error::from_raw_os_error(code)),
            Action::Interrupt if is_io => return Err(io::ErrorKind::Interrupted.into()),
            Action::Crash => {
                CRASHED.store(true, Ordering::SeqCst);
                return Err(crashed());
            }
            Action::Short => fate = Fate::Short,
            Action::Slow => std::thread::sleep(SLOW),
            Action::Errno(_) | Action::Interrupt => {}
        }
    }
    Ok(fate)
}

fn crashed() -> io::Error {
    io::Error::other("a crash, as planned")
}

fn signal_myself(signal: Signal) {
    kill_process(getpid(), signal).expect("a process may signal itself");
    if signal == Signal::KILL {
        // The signal ends all threads, but it may end this one last.
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// Reads the plans of the environment; a text that is none ends the process, or the test that it was meant for would pass.
fn read_environment() {
    let plans = match std::env::var("TRIREME_FAULT") {
        Err(_) => Vec::new(),
        Ok(text) => parse(&text).unwrap_or_else(|wrong| panic!("TRIREME_FAULT={text:?}: {wrong}")),
    };
    let mut held = plans_locked();
    if STATE.load(Ordering::SeqCst) == UNREAD {
        STATE.store(if plans.is_empty() { NONE } else { ARMED }, Ordering::SeqCst);
        *held = plans;
    }
}

impl Plan {
    /// Counts; what is due now.
    fn pass(&mut self, place: &str) -> Option<Action> {
        let is_here = place.strip_prefix(self.place.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        // A full or failing disk still lets files go.
        let is_spared = place == "io.remove" && self.place == "io" && matches!(self.action, Action::Errno(_));
        if !is_here || is_spared || self.rank.is_some_and(|rank| rank != RANK.load(Ordering::Relaxed)) {
            return None;
        }
        self.passed += 1;
        let goes_on = matches!(self.action, Action::Errno(_) | Action::Short | Action::Slow);
        (self.passed == self.n || (goes_on && self.passed > self.n)).then_some(self.action)
    }
}

fn parse(text: &str) -> Result<Vec<Plan>, String> {
    text.split(';').filter(|part| !part.trim().is_empty()).map(parse_one).collect()
}

fn parse_one(text: &str) -> Result<Plan, String> {
    let mut words = text.split_whitespace();
    let action = match words.next().unwrap_or_default() {
        "kill" => Action::Signal(Signal::KILL),
        "stop" => Action::Signal(Signal::STOP),
        "term" => Action::Signal(Signal::TERM),
        "hup" => Action::Signal(Signal::HUP),
        "usr1" => Action::Signal(Signal::USR1),
        "abort" => Action::Abort,
        "panic" => Action::Panic,
        "machine" => Action::Machine,
        "enospc" => Action::Errno(libc::ENOSPC),
        "edquot" => Action::Errno(libc::EDQUOT),
        "eio" => Action::Errno(libc::EIO),
        "short" => Action::Short,
        "eintr" => Action::Interrupt,
        "slow" => Action::Slow,
        "crash" => Action::Crash,
        other => return Err(format!("{other:?} is no action")),
    };
    let mut plan = Plan { action, place: String::new(), n: 1, rank: None, passed: 0 };
    for word in words {
        let number = |value: &str| value.parse::<u64>().map_err(|_| format!("{word:?} is no number"));
        match word.split_once('=') {
            Some(("at", place)) => plan.place = place.into(),
            Some(("n", value)) => plan.n = number(value)?.max(1),
            Some(("rank", value)) => plan.rank = Some(number(value)? as usize),
            _ => return Err(format!("{word:?} is none of at=PLACE, n=N, rank=R")),
        }
    }
    if plan.place.is_empty() { Err("at=PLACE is missing".into()) } else { Ok(plan) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan names its place exactly or by its beginning, and comes about at its count on its rank: else a fault test would
    /// test another moment than it says.
    #[test]
    fn plans_come_about_where_they_say() {
        let mut plan = parse("eio at=io.write n=2 rank=0; kill at=save").unwrap();
        assert_eq!((plan[0].pass("io.sync"), plan[0].pass("io.write"), plan[0].pass("io.writer")), (None, None, None));
        assert_eq!(plan[0].pass("io.write"), Some(Action::Errno(libc::EIO)));
        assert_eq!(plan[0].pass("io.write"), Some(Action::Errno(libc::EIO)), "a full disk stays full");
        assert_eq!(plan[1].pass("save.commit"), Some(Action::Signal(Signal::KILL)));
        assert_eq!(plan[1].pass("save.commit"), None, "once");
        let mut other = parse("panic at=forward rank=3").unwrap();
        assert_eq!(other[0].pass("forward"), None);
        for wrong in ["explode at=io", "kill", "kill at=io n=x", "kill here"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
