//! What is under way between GPUs, looked after by a thread: the host does not wait for collectives, so a failed one would show only
//! as a program that waits for ever at its next look at the device.

use super::library::{IN_PROGRESS, Library, SUCCESS, ncclComm_t};
use crate::device::cuda::streams::{CommunicationStream, UnderWay};
use std::collections::VecDeque;
use std::ffi::c_int;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(50);
/// Looks without a pause while NCCL takes a call up: mostly it is done at once.
const BUSY_LOOKS: usize = 1000;
/// How long the end of a group waits for other ranks.
const PARTING: Duration = Duration::from_secs(3);
/// Between later looks.
const PAUSE: Duration = Duration::from_micros(100);

/// An operation, as an error names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// "all-gather"
    pub name: &'static str,
    /// What this rank puts in; of messages what it sends and receives.
    pub bytes: usize,
    /// This rank in its group.
    pub rank: usize,
    /// Ranks of the group.
    pub size: usize,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes as rank {} of {} by NCCL", self.name, self.bytes, self.rank, self.size)
    }
}

/// A communicator of the library.
pub struct Group {
    /// Its library.
    pub library: &'static Library,
    comm: ncclComm_t,
    stream: CommunicationStream,
    is_aborted: AtomicBool,
}

// SAFETY: a communicator may be used by several threads, one call at a time; asking for its state and giving it up may be done
// beside a call.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Owns a communicator that works on this stream.
    pub fn new(library: &'static Library, comm: ncclComm_t, stream: CommunicationStream) -> Group {
        Group { library, comm, stream, is_aborted: AtomicBool::new(false) }
    }

    /// The library's handle.
    pub fn comm(&self) -> ncclComm_t {
        self.comm
    }

    /// Success, in progress, or what went wrong since the last call.
    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: a live communicator; writes one integer.
        let asked = unsafe { (self.library.async_error)(self.comm, &mut state) };
        if asked == SUCCESS { state } else { asked }
    }

    /// Waits until the library has taken up the call that gave `result`. Panics when it failed, or takes longer than `timeout`.
    pub fn settle(&self, operation: &Operation, result: c_int, timeout: Duration) {
        let started = Instant::now();
        let mut state = result;
        for n_looks in 0.. {
            match state {
                SUCCESS => return,
                IN_PROGRESS if started.elapsed() > timeout => self.give_up(operation, &late(timeout)),
                IN_PROGRESS if n_looks > BUSY_LOOKS => std::thread::sleep(PAUSE),
                IN_PROGRESS => std::hint::spin_loop(),
                error => self.give_up(operation, &self.library.text_of(error, self.comm)),
            }
            state = self.state();
        }
    }

    /// Ends what is under way in the group, and with it the job.
    fn give_up(&self, operation: &Operation, why: &str) -> ! {
        self.stream.check();
        self.abort();
        panic!("{operation}: {why}");
    }

    fn abort(&self) {
        if !self.is_aborted.swap(true, Ordering::SeqCst) {
            // SAFETY: a live communicator, given up once and not used afterwards: what follows is the end of the job or of the group.
            unsafe { (self.library.abort)(self.comm) };
        }
    }
}

impl Group {
    /// The end of the group when all is well: what other ranks still fetch from this one is let go first. A group that another rank
    /// has left in the middle is given up after a while, and those after it at once.
    pub fn close(&self) {
        static ONE_WAS_LEFT: AtomicBool = AtomicBool::new(false);
        let started = Instant::now();
        // SAFETY: a live communicator, used by nobody else any more.
        let mut state = unsafe { (self.library.finalize)(self.comm) };
        while state == IN_PROGRESS && !ONE_WAS_LEFT.load(Ordering::Relaxed) {
            if started.elapsed() > PARTING {
                ONE_WAS_LEFT.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(PAUSE);
            state = self.state();
        }
        if state != SUCCESS {
            return self.abort();
        }
        // SAFETY: finalized, and not used afterwards.
        unsafe { (self.library.destroy)(self.comm) };
    }
}

fn late(timeout: Duration) -> String {
    format!("not done after {} s (--comm-timeout); a rank may have stopped, or the network", timeout.as_secs_f64())
}

/// An operation under way.
pub struct Flight {
    operation: Operation,
    under_way: Arc<UnderWay>,
    group: Arc<Group>,
    started: Instant,
}

impl Flight {
    /// Started now.
    pub fn new(operation: Operation, under_way: Arc<UnderWay>, group: Arc<Group>) -> Flight {
        Flight { operation, under_way, group, started: Instant::now() }
    }

    /// Panics, after giving the group up, when it has failed or takes too long.
    fn check(&self, timeout: Duration) {
        match self.group.state() {
            SUCCESS | IN_PROGRESS if self.started.elapsed() > timeout => self.group.give_up(&self.operation, &late(timeout)),
            SUCCESS | IN_PROGRESS => {}
            error => self.group.give_up(&self.operation, &self.group.library.text_of(error, self.group.comm)),
        }
    }
}

/// Everything under way on this rank.
pub struct Watch {
    flights: Mutex<VecDeque<Flight>>,
    timeout: Duration,
}

impl Watch {
    /// Looks from now on, until nobody else holds it.
    pub fn start(timeout: Duration) -> Arc<Watch> {
        let watch = Arc::new(Watch { flights: Mutex::default(), timeout });
        let weak = Arc::downgrade(&watch);
        std::thread::Builder::new().name("watch of collectives".into()).spawn(move || look_on(&weak)).expect("a thread");
        watch
    }

    /// One more.
    pub fn add(&self, flight: Flight) {
        let mut flights = self.flights();
        // The oldest make room, so that the list is about as long as what is under way.
        while flights.front().is_some_and(|flight| flight.under_way.is_done()) {
            flights.pop_front();
        }
        flights.push_back(flight);
    }

    /// Looks no more after what is under way in a group.
    pub fn forget(&self, group: &Arc<Group>) {
        self.flights().retain(|flight| !Arc::ptr_eq(&flight.group, group));
    }

    fn flights(&self) -> MutexGuard<'_, VecDeque<Flight>> {
        // A panic under the lock ends the job.
        self.flights.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn look(&self) {
        let mut flights = self.flights();
        flights.retain(|flight| !flight.under_way.is_done());
        flights.iter().for_each(|flight| flight.check(self.timeout));
    }
}

fn look_on(watch: &Weak<Watch>) {
    while let Some(watch) = watch.upgrade() {
        watch.look();
        drop(watch);
        std::thread::sleep(PERIOD);
    }
}
