//! Threads that wait for work without going to sleep, for passes of many small operations (`Device::run_together`): to hand over a task
//! costs some hundred nanoseconds, where waking a thread costs tens of microseconds, more than most operations of a decode step take.
//!
//! The thread that asks for a pass leads; its helpers are threads of the team's own. Tasks 0..n of an operation are shared out in equal
//! ranges in order, one a member, so that each reads memory onwards; who has finished its own takes from the end of another's. Which
//! member does a task changes no bit of any result.
//!
//! While a helper waits it fetches its share of what the leader says will be read next (`read_next`) into its second-level cache, so that
//! memory is not idle during the small operations that the leader does alone.
//!
//! Nothing is ever waited for that has not begun: where no helper gets a processor, the leader does it all. But a helper that loses its
//! processor amid a task is waited for; so where others want the processors too and that happens, the leader works alone for a while that
//! is long beside what it lost. A helper spins for `SPIN` and then sleeps until the next operation.

use super::lanes::{prefetch_line, prefetch_near};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a helper waits awake: as long as the host takes between two decode steps.
const SPIN: Duration = Duration::from_micros(200);
/// Looks between two looks at the clock, or, for the leader, before it offers its processor to others.
const LOOKS: usize = 256;
/// A wait for a helper's last task that is no stall, beside a few times what a task takes.
const WAIT: Duration = Duration::from_micros(150);
const TASKS_OF_WAIT: u32 = 8;
/// The leader works alone as long as it was stalled, and twice as many times as long after each stall that follows soon: within so many
/// times as long as it was alone, up to so many times.
const SOON: u64 = 16;
const MOST_ALONE: u64 = 64;
/// Most tasks of an operation; those of others go another way.
pub const MOST_TASKS: usize = 1 << 15;

/// Most bytes that a helper fetches of what is read next: no more than its second-level cache keeps beside other things.
const MOST_FETCHED: usize = 128 * 1024;
/// Later operations of which it is known what they read.
pub const MOST_NEXT: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Lines that it fetches between two looks for an operation.
const LINES: usize = 16;

/// A task of the operation at hand, as its borrow is hidden from the helpers.
type Work = *const (dyn Fn(usize) + Sync);

thread_local! {
    /// The crew that this thread leads, while no task of it runs here.
    static LEADS: Cell<Option<*const Crew>> = const { Cell::new(None) };
    /// Whether this thread does a task of a crew.
    static IS_AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// The threads of a device that wait for work; none before the first pass.
#[derive(Default)]
pub struct Team {
    crew: Mutex<Option<Hired>>,
}

/// A crew and its threads.
struct Hired {
    crew: Arc<Crew>,
    threads: Vec<JoinHandle<()>>,
}

/// One cache line for each, so that members do not wait for each other's lines.
#[repr(align(128))]
struct Member {
    /// Its tasks that nobody has begun: (operation, first, end) in 32, 16 and 16 bits. The operation keeps one who comes late from taking
    /// a task of another operation, and tells who waits that there is another.
    tasks: AtomicU64,
    /// What they are tasks of, beside them: the same for all members.
    work: UnsafeCell<Option<Work>>,
    /// Whether it sleeps or is about to.
    sleeps: AtomicBool,
    /// The processor it was last seen on.
    processor: AtomicI32,
}

/// Memory that the tasks of an operation read in order, as many units of each row as equal shares allow.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Reads {
    /// Address.
    pub at: usize,
    /// Bytes of a unit.
    pub of_unit: usize,
    /// Units of a row, one behind the other.
    pub n_units: usize,
    /// Rows.
    pub n_rows: usize,
    /// Bytes from one row to the next.
    pub row_bytes: usize,
}

impl Reads {
    /// Units in one row.
    pub fn row(at: usize, of_unit: usize, n_units: usize) -> Reads {
        Reads { at, of_unit, n_units, n_rows: 1, row_bytes: 0 }
    }

    /// What a member reads of each row: address in the first, and bytes.
    fn share(&self, idx: usize, n_members: usize) -> (usize, usize) {
        let [first, end] = [idx, idx + 1].map(|i| i * self.n_units / n_members * self.of_unit);
        (self.at + first, end - first)
    }
}

/// What the members share.
struct Crew {
    members: Vec<Member>,
    /// Number of the operation at hand; of the leader.
    operation: AtomicU32,
    /// What later operations read, the next first: a `Reads` each. Nothing depends on it, so it may be read half written.
    next: [[AtomicUsize; 5]; MOST_NEXT],
    /// Tasks of the operation that are not done.
    n_left: AtomicUsize,
    /// When it was hired.
    hired: Instant,
    /// The nanoseconds after that in which the leader works alone, now or the last time; of the leader.
    alone_from: AtomicU64,
    alone_until: AtomicU64,
    /// How many times as long as a stall that was.
    alone_times: AtomicU64,
    /// Whether the helpers are to end.
    is_over: AtomicBool,
    /// What the first task that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The helpers, member 1 first.
    helpers: Mutex<Vec<Thread>>,
}

// SAFETY: `work` is written by the leader while no task is left, and read by whoever has taken a task and not finished it.
unsafe impl Sync for Crew {}
// SAFETY: as above; what it points to is used between the beginning and the end of an operation alone, which the leader waits for.
unsafe impl Send for Crew {}

impl Team {
    /// Runs `work` on this thread with its operations shared out to `n_threads`, itself among them. False, and nothing is done, where the
    /// team serves another thread.
    pub fn lead(&self, n_threads: usize, work: &mut dyn FnMut()) -> bool {
        let mut hired = match self.crew.try_lock() {
            Ok(hired) => hired,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(), // a task panicked; the crew is whole
            Err(TryLockError::WouldBlock) => return false,
        };
        if hired.as_ref().is_none_or(|hired| hired.crew.members.len() != n_threads) {
            *hired = None;
            *hired = Some(Hired::new(n_threads));
        }
        let crew: &Crew = &hired.as_ref().expect("hired above").crew;
        crew.members[0].processor.store(processor(), Ordering::Relaxed);
        let before = LEADS.replace(Some(std::ptr::from_ref(crew)));
        let outcome = catch_unwind(AssertUnwindSafe(work));
        LEADS.set(before);
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
        true
    }
}

/// Whether this thread leads a crew: its operations may then be shared out in small tasks.
pub fn leads() -> bool {
    LEADS.get().is_some()
}

/// Whether this thread does a task of a crew, all of whose members are at work: what the task asks for is best done here.
pub fn is_at_work() -> bool {
    IS_AT_WORK.get()
}

/// Says what operations after the next one read, in order, for helpers that wait; of no more than `MOST_NEXT`.
pub fn read_next(reads: impl Iterator<Item = Reads>) {
    if let Some(crew) = LEADS.get() {
        // SAFETY: `lead` holds the crew for as long as it stands there.
        let next = unsafe { &(*crew).next };
        for (to, reads) in next.iter().zip(reads.chain(std::iter::repeat(Reads::default()))) {
            let Reads { at, of_unit, n_units, n_rows, row_bytes } = reads;
            to.iter().zip([at, of_unit, n_units, n_rows, row_bytes]).for_each(|(to, x)| to.store(x, Ordering::Relaxed));
        }
    }
}

/// Has the leader's own share fetched, so that it comes while the leader gets the operation ready that reads it.
pub fn fetch_own(reads: Reads) {
    if let Some(crew) = LEADS.get() {
        // SAFETY: `lead` holds the crew for as long as it stands there.
        let (at, len) = reads.share(0, unsafe { &*crew }.members.len());
        let lines = (0..reads.n_rows).flat_map(|row| (0..len).step_by(LINE).map(move |line| row * reads.row_bytes + line));
        lines.for_each(|line| prefetch_line((at + line) as *const u8));
    }
}

/// Does tasks 0..n with the crew that this thread leads; false, and nothing is done, where it leads none or there are too many.
pub fn share_out(n: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
    let Some(crew) = LEADS.get().filter(|_| n <= MOST_TASKS) else { return false };
    // A task that shares out work itself must not find the crew that is busy with it.
    LEADS.set(None);
    IS_AT_WORK.set(true);
    // SAFETY: `lead` holds the crew for as long as it stands there.
    let outcome = unsafe { &*crew }.run(n, work);
    IS_AT_WORK.set(false);
    LEADS.set(Some(crew));
    outcome.unwrap_or_else(|panic| resume_unwind(panic));
    true
}

impl Hired {
    fn new(n_threads: usize) -> Hired {
        let member = |_| Member {
            tasks: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            sleeps: AtomicBool::new(false),
            processor: AtomicI32::new(-1),
        };
        let crew = Arc::new(Crew {
            members: (0..n_threads).map(member).collect(),
            operation: AtomicU32::new(0),
            next: Default::default(),
            n_left: AtomicUsize::new(0),
            hired: Instant::now(),
            alone_from: AtomicU64::new(0),
            alone_until: AtomicU64::new(0),
            alone_times: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            panic: Mutex::new(None),
            helpers: Mutex::new(Vec::new()),
        });
        let help = |idx: usize| {
            let crew = Arc::clone(&crew);
            std::thread::Builder::new().name(format!("helper {idx}")).spawn(move || crew.help(idx))
        };
        let threads: Vec<_> = (1..n_threads)
            .map(|idx| {
                help(idx)
                    .unwrap_or_else(|error| panic!("starting helper {idx} of {n_threads} threads: {error}; set RAYON_NUM_THREADS lower"))
            })
            .collect();
        *crew.helpers.lock().expect("nobody else yet") = threads.iter().map(|thread| thread.thread().clone()).collect();
        Hired { crew, threads }
    }
}

impl Drop for Hired {
    fn drop(&mut self) {
        self.crew.is_over.store(true, Ordering::Relaxed);
        self.crew.begin(0, None);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // it panics in no task
        }
    }
}

impl Crew {
    /// As leader: all tasks, in whatever order; Err with what a task panicked with.
    fn run(&self, n: usize, work: &(dyn Fn(usize) + Sync)) -> Result<(), Box<dyn Any + Send>> {
        if self.is_alone() {
            return catch_unwind(AssertUnwindSafe(|| (0..n).for_each(work)));
        }
        // SAFETY: only the lifetime is hidden: nobody uses it after the last task is done, and that is waited for below.
        let hidden = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Work>(std::ptr::from_ref(work)) };
        self.n_left.store(n, Ordering::Relaxed);
        let begun = Instant::now();
        self.begin(n, Some(hidden));
        let n_done = self.take_part(0);
        self.wait(begun, n_done);
        match self.panic.lock().expect("nobody panics under the lock").take() {
            None => Ok(()),
            Some(panic) => Err(panic),
        }
    }

    /// Waits for the tasks of helpers, after so many of its own since then.
    fn wait(&self, begun: Instant, n_done: usize) {
        let (mut n_looks, mut waits_since) = (0, None);
        while self.n_left.load(Ordering::Acquire) > 0 {
            n_looks += 1;
            if n_looks % LOOKS == 0 {
                waits_since.get_or_insert_with(Instant::now);
                // Who has the last task may wait for this processor.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let Some(since) = waits_since else { return };
        let (waited, of_task) = (since.elapsed(), (since - begun) / n_done.max(1) as u32);
        if waited > WAIT + TASKS_OF_WAIT * of_task {
            self.stalled(waited);
        }
    }

    /// A helper lost its processor amid a task for so long: who does that again and again is not asked for a while.
    fn stalled(&self, waited: Duration) {
        let [from, until, times] = [&self.alone_from, &self.alone_until, &self.alone_times].map(|x| x.load(Ordering::Relaxed));
        let now = self.hired.elapsed().as_nanos() as u64;
        let is_soon = now < until + SOON * (until - from);
        let times = if is_soon { (2 * times).min(MOST_ALONE) } else { 1 };
        self.alone_from.store(now, Ordering::Relaxed);
        self.alone_until.store(now + times * waited.as_nanos() as u64, Ordering::Relaxed);
        self.alone_times.store(times, Ordering::Relaxed);
    }

    /// Whether the leader works without the helpers for now.
    fn is_alone(&self) -> bool {
        let until = self.alone_until.load(Ordering::Relaxed);
        until > 0 && (self.hired.elapsed().as_nanos() as u64) < until
    }

    /// Shares out the tasks of the next operation and tells the helpers.
    fn begin(&self, n: usize, work: Option<Work>) {
        let (operation, n_members) = (self.operation.load(Ordering::Relaxed).wrapping_add(1), self.members.len());
        for (idx, member) in self.members.iter().enumerate() {
            // Both at once: who waits for the one takes their cache line away.
            // SAFETY: no task is left, so nobody else looks.
            unsafe { *member.work.get() = work };
            member.tasks.store(tasks(operation, idx * n / n_members, (idx + 1) * n / n_members), Ordering::Release);
        }
        self.operation.store(operation, Ordering::Relaxed);
        // Either a helper that goes to sleep sees the new number, or it is seen to sleep.
        fence(Ordering::SeqCst);
        for (idx, member) in self.members.iter().enumerate().skip(1) {
            if member.sleeps.load(Ordering::Relaxed) && member.sleeps.swap(false, Ordering::Relaxed) {
                self.helpers.lock().expect("nobody panics under the lock")[idx - 1].unpark();
            }
        }
    }

    /// Does tasks of the operation at hand until none is left to begin: its own in order, then the last of another member. How many.
    /// They are counted together, at the end: the count is everybody's, and passing it around takes as long as a small task.
    fn take_part(&self, idx: usize) -> usize {
        let (n, mut n_done) = (self.members.len(), 0);
        for (place, member) in (0..n).map(|i| (i, &self.members[(idx + i) % n])) {
            while let Some(task) = member.take(place == 0) {
                // SAFETY: this task is not done, so the leader waits in `run`, and the work is alive and the one it was taken from.
                let work = unsafe { &*(*member.work.get()).expect("an operation has begun") };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(task))) {
                    self.panic.lock().expect("nobody panics under the lock").get_or_insert(panic);
                }
                n_done += 1;
            }
        }
        if n_done > 0 {
            self.n_left.fetch_sub(n_done, Ordering::Release);
        }
        n_done
    }

    /// What a helper does.
    fn help(&self, idx: usize) {
        IS_AT_WORK.set(true);
        let (mut seen, mut fetched) = (0, [Fetched::default(); MOST_NEXT]);
        loop {
            self.fetch(idx, seen, &mut fetched);
            seen = self.next_operation(idx, seen);
            if self.is_over.load(Ordering::Relaxed) {
                return;
            }
            self.take_part(idx);
        }
    }

    /// Fetches what is read next until there is another operation than `seen`.
    fn fetch(&self, idx: usize, seen: u32, fetched: &mut [Fetched; MOST_NEXT]) {
        let before = std::mem::take(fetched);
        let mut room = MOST_FETCHED;
        for (next, fetched) in self.next.iter().zip(fetched) {
            let [at, of_unit, n_units, n_rows, row_bytes] = next.each_ref().map(|x| x.load(Ordering::Relaxed));
            let reads = Reads { at, of_unit, n_units, n_rows, row_bytes };
            *fetched = before.iter().find(|before| before.of == reads).copied().unwrap_or(Fetched { of: reads, ..Fetched::default() });
            let (at, len) = reads.share(idx, self.members.len());
            let n_bytes = (len * n_rows).min(room);
            room -= n_bytes;
            while fetched.n_bytes < n_bytes && self.members[idx].operation() == seen {
                (0..LINES).for_each(|_| prefetch_near(fetched.next_line(at, len)));
                // Of more than memory brings meanwhile, a processor drops the rest.
                std::hint::spin_loop();
            }
        }
    }

    /// Waits until there is another operation than `seen`, awake for a while, then asleep.
    fn next_operation(&self, idx: usize, seen: u32) -> u32 {
        let member = &self.members[idx];
        let mut waits_since = None;
        loop {
            for _ in 0..LOOKS {
                let operation = member.operation();
                if operation != seen {
                    return operation;
                }
                std::hint::spin_loop();
            }
            let since = *waits_since.get_or_insert_with(|| {
                self.keep_apart(idx);
                Instant::now()
            });
            if since.elapsed() >= SPIN {
                member.sleeps.store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                while member.operation() == seen && member.sleeps.load(Ordering::Relaxed) {
                    std::thread::park();
                }
                member.sleeps.store(false, Ordering::Relaxed);
                self.keep_apart(idx); // it was woken where the leader runs, more often than not
            }
        }
    }

    /// Leaves a processor on which a member before this one runs: woken where the one who woke it runs, a thread may stay there for many
    /// steps beside a processor with nothing to do.
    fn keep_apart(&self, idx: usize) {
        let here = processor();
        self.members[idx].processor.store(here, Ordering::Relaxed);
        let earlier: Vec<i32> = self.members[..idx].iter().map(|member| member.processor.load(Ordering::Relaxed)).collect();
        if here >= 0 && earlier.contains(&here) {
            leave(&earlier);
            self.members[idx].processor.store(processor(), Ordering::Relaxed);
        }
    }
}

/// How much a helper has fetched of what.
#[derive(Clone, Copy, Default)]
struct Fetched {
    of: Reads,
    n_bytes: usize,
    /// The place of the next line: from the first row to its row, and in the row.
    row: usize,
    column: usize,
}

impl Fetched {
    /// The next line of rows of `len` bytes, the first at `at`.
    fn next_line(&mut self, at: usize, len: usize) -> *const u8 {
        let line = at + self.row + self.column;
        self.n_bytes += LINE.min(len - self.column);
        self.column += LINE;
        if self.column >= len {
            (self.row, self.column) = (self.row + self.of.row_bytes, 0);
        }
        line as *const u8
    }
}

/// Tasks first..end of an operation in one word.
fn tasks(operation: u32, first: usize, end: usize) -> u64 {
    u64::from(operation) << 32 | (first as u64) << 16 | end as u64
}

impl Member {
    /// The operation that its tasks are of.
    fn operation(&self) -> u32 {
        (self.tasks.load(Ordering::Acquire) >> 32) as u32
    }

    /// Takes its first or its last task.
    fn take(&self, from_front: bool) -> Option<usize> {
        let mut seen = self.tasks.load(Ordering::Acquire);
        loop {
            let (first, end) = ((seen >> 16 & 0xffff) as usize, (seen & 0xffff) as usize);
            if first >= end {
                return None;
            }
            let (task, left) = if from_front { (first, seen + (1 << 16)) } else { (end - 1, seen - 1) };
            match self.tasks.compare_exchange_weak(seen, left, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(task),
                Err(now) => seen = now,
            }
        }
    }
}

/// The processor that this thread runs on, or -1.
fn processor() -> i32 {
    // SAFETY: it takes nothing.
    unsafe { libc::sched_getcpu() }
}

/// Moves this thread to a processor it may run on that is none of these, if there is one, and lets it run everywhere again.
fn leave(processors: &[i32]) {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: a set of processors is plain bits of this size, and 0 is this thread.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size, &mut all) != 0 {
            return;
        }
        let mut others = all;
        processors.iter().filter(|at| **at >= 0).for_each(|at| libc::CPU_CLR(*at as usize, &mut others));
        if libc::CPU_COUNT(&others) > 0 {
            libc::sched_setaffinity(0, size, &others);
            libc::sched_setaffinity(0, size, &all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every task is done once, however many threads and tasks there are, operation after operation and after a sleep; work that is
    /// shared out by a task is done by another way.
    #[test]
    fn every_task_is_done_once() {
        let team = Team::default();
        for n_threads in [1, 2, 3, 5, 2] {
            let mut n_operations = 0;
            let led = team.lead(n_threads, &mut || {
                for n in (0..40).chain([999, MOST_TASKS]).chain((0..2000).map(|i| i % 7)) {
                    let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                    assert!(
                        leads()
                            && share_out(n, &|task| {
                                counts[task].fetch_add(1, Ordering::Relaxed);
                                assert!(is_at_work());
                                assert!(!share_out(1, &|_| unreachable!("nobody is free")));
                            })
                    );
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{n} tasks on {n_threads}");
                    n_operations += 1;
                    if n_operations % 500 == 0 {
                        std::thread::sleep(4 * SPIN);
                    }
                }
                assert!(!share_out(MOST_TASKS + 1, &|_| unreachable!("too many")));
            });
            assert!(led && !leads() && !is_at_work() && n_operations == 2042);
        }
    }

    /// A task that panics on whichever thread panics the leader after the others are done, and the team goes on.
    #[test]
    fn a_panic_reaches_the_leader() {
        let team = Team::default();
        for bad in [0, 63] {
            let n_done = AtomicUsize::new(0);
            let work = |task: usize| {
                assert!(task != bad, "task {task}");
                n_done.fetch_add(1, Ordering::Relaxed);
            };
            let outcome = catch_unwind(AssertUnwindSafe(|| team.lead(2, &mut || assert!(share_out(64, &work)))));
            let said = *outcome.expect_err("a task panicked").downcast::<String>().expect("a message");
            assert_eq!((said, n_done.load(Ordering::Relaxed)), (format!("task {bad}"), 63));
            assert!(!leads() && team.lead(2, &mut || assert!(share_out(8, &|_| ()))));
        }
    }

    /// One thread at a time is served; the other is told so and not kept waiting.
    #[test]
    fn the_team_serves_one_at_a_time() {
        let team = Team::default();
        assert!(team.lead(2, &mut || {
            let other = std::thread::scope(|scope| scope.spawn(|| team.lead(2, &mut || unreachable!("the team is busy"))).join());
            assert!(!other.expect("it does not panic"));
        }));
    }
}
