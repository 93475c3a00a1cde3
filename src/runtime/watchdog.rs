//! A thread that turns a hang into a report and an end: when this rank is blocked in one communication for too long, it says
//! so in its ring; the lowest rank that did reads the rings of all, prints what they tell together (`flight::report`), and
//! ends the job with exit code 1.
//!
//! It also keeps the sign of life in the ring, by which a stopped or killed process is told from one that waits or computes.

use super::{coordinates, end_job};
use crate::flight::rings::Rings;
use crate::flight::{Blocked, Phase, Recorder, report};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two looks.
const TICK: Duration = Duration::from_millis(100);
/// A look that comes so late means that the whole job was suspended (by SLURM, by a debugger): patience begins anew.
const SUSPENDED: Duration = Duration::from_secs(5);
/// For ranks that were blocked a little later to notice too.
const GRACE: Duration = Duration::from_secs(2);
/// How long a rank leaves it to a lower one to report and to end the job.
const LEFT_TO_LOWER: Duration = Duration::from_secs(15);
/// How long the launcher may take to end this process.
const LAST_RESORT: Duration = Duration::from_secs(20);
/// Exit code of a hang.
const HANG_CODE: i32 = 1;

/// How long a rank may be blocked in one communication, in seconds; None: for ever.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Patience {
    /// While training.
    pub step_s: Option<f64>,
    /// While others start, load or save, a save beside the training too.
    pub files_s: Option<f64>,
}

impl Patience {
    fn of(&self, phase: Phase) -> Option<f64> {
        match phase {
            Phase::Start | Phase::Save => self.files_s,
            _ => self.step_s,
        }
    }
}

/// The thread; it ends when this is dropped.
pub struct Watchdog {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches this rank. `stop_requested`: whether it was asked to stop, which the ring tells too.
    pub fn start(flight: &Recorder, rank: usize, patience: Patience, stop_requested: fn() -> bool) -> Watchdog {
        let done = Arc::new(AtomicBool::new(false));
        let (flight, is_done) = (flight.clone(), Arc::clone(&done));
        let watch = move || {
            let (mut last_look, mut awake_since) = (Instant::now(), Instant::now());
            while !is_done.load(Ordering::Relaxed) {
                flight.heartbeat();
                if stop_requested() {
                    flight.asked_to_stop();
                }
                if last_look.elapsed() > SUSPENDED {
                    awake_since = Instant::now();
                }
                last_look = Instant::now();
                if let Some(blocked) = overdue(&flight, patience, awake_since.elapsed()) {
                    on_hang(&flight, rank, &blocked);
                }
                std::thread::park_timeout(TICK);
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(watch);
        // A machine without room for one more thread goes unwatched rather than not at all.
        let thread = thread.map_err(|error| log::warn!("no watchdog: {error}")).ok();
        Watchdog { done, thread }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // Its panic has ended the process already.
            let _ = thread.join();
        }
    }
}

/// What this rank is blocked in for too long, of the time that it was awake.
fn overdue(flight: &Recorder, patience: Patience, awake: Duration) -> Option<Blocked> {
    let blocked = flight.blocked()?;
    // Another rank's optimizer may wait for its disk, whatever this one is at.
    let phase = if flight.is_saving() { Phase::Save } else { blocked.record.phase };
    patience.of(phase).is_some_and(|limit_s| blocked.seconds.min(awake.as_secs_f64()) > limit_s).then_some(blocked)
}

/// Returns only when the communication went on after all.
fn on_hang(flight: &Recorder, rank: usize, blocked: &Blocked) {
    flight.notice_hang();
    let goes_on = || flight.blocked().is_none_or(|now| now.record.number != blocked.record.number);
    let mut rings = None;
    let started = Instant::now();
    while started.elapsed() < GRACE + LEFT_TO_LOWER {
        if goes_on() {
            return;
        }
        flight.heartbeat();
        std::thread::sleep(TICK);
        if started.elapsed() >= GRACE {
            rings = flight.folder().and_then(|folder| Rings::read(&folder).ok());
            let lower = rings.as_ref().is_some_and(|rings: &Rings| rings.all().any(|ring| ring.rank < rank && ring.hang_ns > 0));
            if !lower {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    say_and_end(rings.as_ref(), blocked)
}

fn say_and_end(rings: Option<&Rings>, blocked: &Blocked) -> ! {
    let record = &blocked.record;
    let mut text = format!(
        "[{}] error: blocked for {:.0} s in {}; ending the job (observe.hang_after_s sets the limit)\n",
        coordinates(),
        blocked.seconds,
        report::operation(record)
    );
    match rings {
        Some(rings) => text.push_str(&report::of(rings)),
        None => text.push_str("the flight ledgers of the other ranks cannot be read here\n"),
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
    // An abort that hangs in turn is no end.
    std::thread::spawn(|| {
        std::thread::sleep(LAST_RESORT);
        // SAFETY: ends this process at once; nothing of it is used any more.
        unsafe { libc::_exit(HANG_CODE) }
    });
    end_job(HANG_CODE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::{Event, Group, Name, Op};
    use crate::parallel::layout::ParallelLayout;

    /// A rank that waits for others in a step is overdue after the patience of steps, but while a checkpoint is written beside the
    /// training only after that of files: one of the others may wait for its disk. Breaks when a slow disk is taken for a hang.
    #[test]
    fn a_slow_disk_is_no_hang() {
        let (dir, flight) = (tempfile::tempdir().expect("a folder"), Recorder::new());
        flight.open(dir.path(), 16, ParallelLayout::SINGLE, 0).expect("a ring");
        let event = Event { op: Op::AllReduce, group: Group::Dp, bytes: 4, sequence: 1, peer: None, tag: None, name: Name::default() };
        let step = flight.span(Phase::Optimizer);
        let open = flight.enter(&event);
        std::thread::sleep(Duration::from_millis(20));
        let overdue_with = |step_s, files_s| overdue(&flight, Patience { step_s, files_s }, Duration::from_secs(60)).is_some();
        assert!(overdue_with(Some(0.01), Some(60.0)));
        flight.save_begins();
        assert!(!overdue_with(Some(0.01), Some(60.0)) && !overdue_with(Some(0.01), None));
        assert!(overdue_with(Some(60.0), Some(0.01)), "a disk has its limit too");
        flight.save_ended();
        assert!(overdue_with(Some(0.01), Some(60.0)));
        flight.leave(open);
        drop(step);
        assert!(!overdue_with(Some(0.0), Some(0.0)));
    }
}
