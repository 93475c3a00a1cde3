//! The writing side: a [`Recorder`] is lent to whoever does something that should be found afterwards. It always keeps the
//! times by phase; records are written once its ring was opened.

use super::record::{Event, GROUPS, Group, Name, Op, PHASES, Phase, Record};
use super::ring::{Owner, Ring, Time};
use super::times::Times;
use super::words::word;
use crate::artifact;
use crate::error::Result;
use crate::parallel::layout::ParallelLayout;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One rank's recorder. Clones are the same recorder.
#[derive(Clone)]
pub struct Recorder {
    inner: Arc<Inner>,
}

struct Inner {
    /// Wall time at `started`: later readings go by the monotonic clock, so that times of one rank are in order.
    started_ns: u64,
    started: Instant,
    ring: OnceLock<Ring>,
    context: Context,
    /// Number of the record that this rank is blocked in; 0: none.
    blocked: AtomicU64,
    /// Nanoseconds by phase, and by group and phase.
    phase_ns: [AtomicU64; PHASES.len()],
    exposed_ns: [AtomicU64; GROUPS.len() * PHASES.len()],
    /// Time of the spans inside the current one.
    inside_ns: AtomicU64,
    /// Whether the job writes a checkpoint beside its work.
    is_saving: AtomicBool,
}

/// What the rank is at, for the records it writes. One thread of a rank changes it.
#[derive(Default)]
struct Context {
    step: AtomicU64,
    phase: AtomicU64,
    /// Chunk and micro-batch plus one; 0: none.
    chunk: AtomicU64,
    micro: AtomicU64,
    name: [AtomicU64; 5],
}

/// An operation under way.
#[must_use = "an operation that is not ended looks like one that hangs"]
pub struct Open {
    number: u64,
    group: Group,
    since_ns: u64,
    exposed_ns: u64,
}

/// What a rank is blocked in.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Blocked {
    /// The communication.
    pub record: Record,
    /// For how long.
    pub seconds: f64,
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder::new()
    }
}

impl Recorder {
    /// A recorder without a ring.
    pub fn new() -> Recorder {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let inner = Inner {
            started_ns: since_1970.as_nanos() as u64,
            started: Instant::now(),
            ring: OnceLock::new(),
            context: Context::default(),
            blocked: AtomicU64::new(0),
            phase_ns: std::array::from_fn(|_| AtomicU64::new(0)),
            exposed_ns: std::array::from_fn(|_| AtomicU64::new(0)),
            inside_ns: AtomicU64::new(0),
            is_saving: AtomicBool::new(false),
        };
        Recorder { inner: Arc::new(inner) }
    }

    /// Makes the ring of this rank in `folder`, of so many records of 128 bytes; from here on everything is recorded. A second
    /// call does nothing.
    pub fn open(&self, folder: &Path, n_records: u64, layout: ParallelLayout, rank: usize) -> Result<()> {
        let (host, job) = (artifact::host_name(), artifact::job_id());
        let owner = Owner { rank, layout, host: &host, job: &job, opened_ns: self.now_ns() };
        let ring = Ring::create(&super::ring_path(folder, rank), n_records.max(1), &owner)?;
        let _ = self.inner.ring.set(ring);
        Ok(())
    }

    /// The folder of the rings, once opened.
    pub fn folder(&self) -> Option<PathBuf> {
        self.inner.ring.get().and_then(|ring| ring.path.parent()).map(Path::to_path_buf)
    }

    /// Nanoseconds since 1970, never less than before.
    pub fn now_ns(&self) -> u64 {
        self.inner.started_ns + self.inner.started.elapsed().as_nanos() as u64
    }

    /// When this recorder was made, near the begin of the job: seconds since 1970.
    pub fn began_unix_s(&self) -> f64 {
        self.inner.started_ns as f64 / 1e9
    }

    /// The optimizer step that begins, from 1.
    pub fn step(&self, step: u64) {
        self.inner.context.step.store(step, Ordering::Relaxed);
    }

    /// What the next communication is about: a tensor's name.
    pub fn name(&self, name: &str) {
        self.inner.context.set_name(Name::new(name));
    }

    /// Begins a phase; it lasts until the value is dropped.
    pub fn span(&self, phase: Phase) -> Span {
        self.span_of(phase, None, None)
    }

    /// Begins an action on a chunk, on one micro-batch or all.
    pub fn span_at(&self, phase: Phase, chunk: usize, micro: Option<usize>) -> Span {
        self.span_of(phase, Some(chunk as u64), micro.map(|micro| micro as u64))
    }

    fn span_of(&self, phase: Phase, chunk: Option<u64>, micro: Option<u64>) -> Span {
        let context = &self.inner.context;
        let outer = Outer {
            phase: context.phase.swap(phase as u64, Ordering::Relaxed),
            chunk: context.chunk.swap(chunk.map_or(0, |chunk| chunk + 1), Ordering::Relaxed),
            micro: context.micro.swap(micro.map_or(0, |micro| micro + 1), Ordering::Relaxed),
            inside_ns: self.inner.inside_ns.swap(0, Ordering::Relaxed),
        };
        let event = Event { op: Op::Work, group: Group::Other, bytes: 0, sequence: 0, peer: None, tag: None, name: Name::default() };
        let (number, start_ns) = self.begin(&event);
        Span { recorder: self.clone(), phase, number, start_ns, outer }
    }

    /// Writes a new record; number 0 without a ring.
    fn begin(&self, event: &Event) -> (u64, u64) {
        let start_ns = self.now_ns();
        let Some(ring) = self.inner.ring.get() else { return (0, start_ns) };
        let context = &self.inner.context;
        let less_one = |value: &AtomicU64| value.load(Ordering::Relaxed).checked_sub(1).map(|value| value as u32);
        let name = if event.op == Op::Work { Name::default() } else { context.take_name() };
        let record = Record {
            number: ring.next_number(),
            start_ns,
            wait_ns: 0,
            end_ns: 0,
            exposed_ns: 0,
            bytes: event.bytes,
            sequence: event.sequence,
            step: context.step.load(Ordering::Relaxed),
            op: event.op,
            group: event.group,
            phase: context.phase(),
            chunk: less_one(&context.chunk),
            micro: less_one(&context.micro),
            peer: event.peer,
            tag: event.tag,
            name: if name.is_empty() { event.name } else { name },
        };
        ring.write(&record);
        if event.op.is_collective() {
            ring.entered(event.group, event.sequence);
        }
        (record.number, start_ns)
    }

    /// Enters a communication; the rank counts as blocked in it.
    pub fn enter(&self, event: &Event) -> Open {
        let (number, start_ns) = self.begin(event);
        let open = Open { number, group: event.group, since_ns: start_ns, exposed_ns: 0 };
        self.block_at(&open, start_ns);
        open
    }

    /// The call that began it has returned: the rank is free until it waits.
    pub fn posted(&self, mut open: Open) -> Open {
        self.unblock(&mut open);
        if let Some(ring) = self.ring_of(&open) {
            ring.set_times(open.number, &[(Time::Wait, 0), (Time::Exposed, open.exposed_ns)]);
        }
        open
    }

    /// The rank waits for it.
    pub fn block(&self, open: &mut Open) {
        open.since_ns = self.now_ns();
        self.block_at(open, open.since_ns);
    }

    /// It is complete.
    pub fn leave(&self, mut open: Open) {
        let end_ns = self.unblock(&mut open);
        if let Some(ring) = self.ring_of(&open) {
            ring.set_times(open.number, &[(Time::Exposed, open.exposed_ns), (Time::End, end_ns)]);
        }
    }

    /// One of several that were entered together with another, which accounts for the time.
    pub fn leave_with(&self, open: Open) {
        if let Some(ring) = self.ring_of(&open) {
            ring.set_times(open.number, &[(Time::End, self.now_ns())]);
        }
    }

    fn ring_of(&self, open: &Open) -> Option<&Ring> {
        self.inner.ring.get().filter(|_| open.number > 0)
    }

    fn block_at(&self, open: &Open, now_ns: u64) {
        if let Some(ring) = self.ring_of(open) {
            ring.set_times(open.number, &[(Time::Wait, now_ns)]);
            self.inner.blocked.store(open.number, Ordering::Release);
        }
    }

    /// Returns the time.
    fn unblock(&self, open: &mut Open) -> u64 {
        let now_ns = self.now_ns();
        let blocked_ns = now_ns - open.since_ns;
        open.exposed_ns += blocked_ns;
        self.inner.blocked.store(0, Ordering::Release);
        let at = open.group as usize * PHASES.len() + self.inner.context.phase() as usize;
        self.inner.exposed_ns[at].fetch_add(blocked_ns, Ordering::Relaxed);
        now_ns
    }

    /// What this rank is blocked in, for whoever watches it. None without a ring.
    pub fn blocked(&self) -> Option<Blocked> {
        let ring = self.inner.ring.get()?;
        let number = Some(self.inner.blocked.load(Ordering::Acquire)).filter(|&number| number > 0)?;
        let record = ring.read(number)?;
        let since_ns = Some(record.wait_ns).filter(|&ns| ns > 0)?;
        Some(Blocked { record, seconds: self.now_ns().saturating_sub(since_ns) as f64 / 1e9 })
    }

    /// The job begins to write a checkpoint beside its work: any rank may have to wait for its disk, and the others for it.
    pub fn save_begins(&self) {
        self.inner.is_saving.store(true, Ordering::Relaxed);
    }

    /// That checkpoint is durable, or given up.
    pub fn save_ended(&self) {
        self.inner.is_saving.store(false, Ordering::Relaxed);
    }

    /// Whether the job writes a checkpoint beside its work.
    pub fn is_saving(&self) -> bool {
        self.inner.is_saving.load(Ordering::Relaxed)
    }

    /// Says that this process lives.
    pub fn heartbeat(&self) {
        if let Some(ring) = self.inner.ring.get() {
            ring.set(word::HEARTBEAT, self.now_ns());
        }
    }

    /// Says that it was asked to stop.
    pub fn asked_to_stop(&self) {
        if let Some(ring) = self.inner.ring.get() {
            ring.set_once(word::STOP, self.now_ns());
        }
    }

    /// Says that this rank takes its job to hang, to the ranks of other machines too.
    pub fn notice_hang(&self) {
        if let Some(ring) = self.inner.ring.get() {
            ring.set_once(word::HANG, self.now_ns());
            ring.flush();
        }
    }

    /// Where the time went since the last call.
    pub fn take_times(&self) -> Times {
        let take = |all: &[AtomicU64]| all.iter().map(|ns| ns.swap(0, Ordering::Relaxed) as f64 / 1e9).collect();
        Times::new(take(&self.inner.phase_ns), take(&self.inner.exposed_ns))
    }
}

impl Drop for Inner {
    // A rank that ends in good order says so.
    fn drop(&mut self) {
        if let Some(ring) = self.ring.get()
            && !std::thread::panicking()
        {
            ring.set_once(word::CLOSED, self.started_ns + self.started.elapsed().as_nanos() as u64);
        }
    }
}

impl Context {
    fn phase(&self) -> Phase {
        PHASES[self.phase.load(Ordering::Relaxed) as usize]
    }

    fn take_name(&self) -> Name {
        let name = Name(std::array::from_fn(|i| self.name[i].load(Ordering::Relaxed)));
        self.name[0].store(0, Ordering::Relaxed);
        if name.is_empty() { Name::default() } else { name }
    }

    fn set_name(&self, name: Name) {
        self.name.iter().zip(name.0).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
    }
}

/// The context outside of a span, to return to.
struct Outer {
    phase: u64,
    chunk: u64,
    micro: u64,
    inside_ns: u64,
}

/// A phase or action under way; dropping it ends it. Spans nest.
pub struct Span {
    recorder: Recorder,
    phase: Phase,
    number: u64,
    start_ns: u64,
    outer: Outer,
}

impl Drop for Span {
    fn drop(&mut self) {
        let inner = &self.recorder.inner;
        let end_ns = self.recorder.now_ns();
        let elapsed_ns = end_ns - self.start_ns;
        let inside_ns = inner.inside_ns.swap(self.outer.inside_ns + elapsed_ns, Ordering::Relaxed);
        inner.phase_ns[self.phase as usize].fetch_add(elapsed_ns.saturating_sub(inside_ns), Ordering::Relaxed);
        let context = &inner.context;
        context.phase.store(self.outer.phase, Ordering::Relaxed);
        context.chunk.store(self.outer.chunk, Ordering::Relaxed);
        context.micro.store(self.outer.micro, Ordering::Relaxed);
        if let Some(ring) = inner.ring.get().filter(|_| self.number > 0 && !std::thread::panicking()) {
            ring.set_times(self.number, &[(Time::End, end_ns)]);
        }
    }
}
