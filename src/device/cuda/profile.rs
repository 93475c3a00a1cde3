//! Where a device's time goes: a machine that passes every call on to the one below and, between `begin` and `end`, has the device's
//! clock read before and after each kernel, product and zeroing, and the host's around everything that waits. Outside of that it costs
//! nothing. Work is not recorded (CUDA graphs) by it, so that a decode step shows its kernels too.

use super::backend::{Arg, Backend, Event, Graph, Grid, Kernel, Matrix, ScalesAt, Stream, Timed};
use crate::device::{Gemm, Store};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// The machine.
pub struct Profile {
    below: Arc<dyn Backend>,
    is_on: AtomicBool,
    taken: Mutex<Taken>,
}

/// What was asked for since `begin`.
#[derive(Default)]
struct Taken {
    begun: Option<Instant>,
    device: Vec<Call>,
    host: Vec<Wait>,
    /// Seconds of the host in asking for the device's work.
    asking_s: f64,
}

/// A piece of the device's work.
struct Call {
    what: String,
    /// Multiplications and additions of a product.
    flops: f64,
    from: Event,
    to: Event,
}

/// What the host did itself.
struct Wait {
    what: &'static str,
    seconds: f64,
}

/// Calls of one kind.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    /// The kernel with its blocks and threads, or the product with its sizes.
    pub what: String,
    /// How many.
    pub n: usize,
    /// Of all of them.
    pub seconds: f64,
    /// Of all of them; 0 where they are not counted.
    pub flops: f64,
}

/// What was seen, longest first. Displays as tables.
#[derive(Clone, PartialEq, Debug)]
pub struct Seen {
    /// The device's work.
    pub device: Vec<Line>,
    /// Copies and waits of the host, in its seconds.
    pub host: Vec<Line>,
    /// Of the device from one call's end to the next one's begin: it waited for the host, or for another stream.
    pub idle_s: f64,
    /// Of the host in asking.
    pub asking_s: f64,
    /// From `begin` to `end`.
    pub all_s: f64,
}

impl Profile {
    /// Over a machine.
    pub fn over(below: Arc<dyn Backend>) -> Arc<Profile> {
        Arc::new(Profile { below, is_on: AtomicBool::new(false), taken: Mutex::default() })
    }

    /// From now on calls are taken down, on all threads.
    pub fn begin(&self) {
        self.below.finish();
        *self.taken() = Taken { begun: Some(Instant::now()), ..Taken::default() };
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// Waits for the device, and tells what was seen since `begin`.
    pub fn end(&self) -> Seen {
        self.below.finish();
        self.is_on.store(false, Ordering::Relaxed);
        let taken = std::mem::take(&mut *self.taken());
        let all_s = taken.begun.expect("ended after it was begun").elapsed().as_secs_f64();
        let between = |from, to| self.below.seconds_between(from, to);
        let idle_s = taken.device.windows(2).map(|calls| between(calls[0].to, calls[1].from)).sum();
        let device = summed(taken.device.iter().map(|call| (call.what.as_str(), between(call.from, call.to), call.flops)));
        taken.device.iter().flat_map(|call| [call.from, call.to]).for_each(|mark| self.below.forget_mark(mark));
        let host = summed(taken.host.iter().map(|wait| (wait.what, wait.seconds, 0.0)));
        Seen { device, host, idle_s, asking_s: taken.asking_s, all_s }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().expect("no panic while holding what was taken down")
    }

    fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Work of the device.
    fn work(&self, what: impl FnOnce() -> (String, f64), ask: impl FnOnce()) {
        if !self.is_on() {
            return ask();
        }
        let started = Instant::now();
        let from = self.below.mark();
        ask();
        let to = self.below.mark();
        let asking_s = started.elapsed().as_secs_f64();
        let (what, flops) = what();
        let mut taken = self.taken();
        taken.asking_s += asking_s;
        taken.device.push(Call { what, flops, from, to });
    }

    /// What the host does or waits for.
    fn host<T>(&self, what: &'static str, call: impl FnOnce() -> T) -> T {
        if !self.is_on() {
            return call();
        }
        let started = Instant::now();
        let result = call();
        let seconds = started.elapsed().as_secs_f64();
        self.taken().host.push(Wait { what, seconds });
        result
    }
}

/// Calls by kind, those that took longest first.
fn summed<'a>(calls: impl Iterator<Item = (&'a str, f64, f64)>) -> Vec<Line> {
    let mut lines: HashMap<&str, Line> = HashMap::new();
    for (what, seconds, flops) in calls {
        let line = lines.entry(what).or_insert_with(|| Line { what: what.into(), n: 0, seconds: 0.0, flops: 0.0 });
        (line.n, line.seconds, line.flops) = (line.n + 1, line.seconds + seconds, line.flops + flops);
    }
    let mut lines: Vec<Line> = lines.into_values().collect();
    lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| a.what.cmp(&b.what)));
    lines
}

impl fmt::Display for Seen {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        let busy_s: f64 = self.device.iter().map(|line| line.seconds).sum();
        let n: usize = self.device.iter().map(|line| line.n).sum();
        writeln!(to, "| on the device | times | ms | share | us each | TFLOP/s |\n|---|---:|---:|---:|---:|---:|")?;
        for Line { what, n, seconds, flops } in &self.device {
            let rate = if *flops > 0.0 { format!("{:.0}", flops / seconds / 1e12) } else { "-".into() };
            let (ms, share, each) = (1e3 * seconds, 100.0 * seconds / self.all_s, 1e6 * seconds / *n as f64);
            writeln!(to, "| {what} | {n} | {ms:.3} | {share:.1} % | {each:.1} | {rate} |")?;
        }
        let share = |seconds: f64| format!("{:.3} | {:.1} %", 1e3 * seconds, 100.0 * seconds / self.all_s);
        writeln!(to, "| all of these | {n} | {} | | |", share(busy_s))?;
        writeln!(to, "| idle between them | | {} | | |\n", share(self.idle_s))?;
        writeln!(to, "| on the host | times | ms | share |\n|---|---:|---:|---:|")?;
        for Line { what, n, seconds, .. } in &self.host {
            writeln!(to, "| {what} | {n} | {} |", share(*seconds))?;
        }
        writeln!(to, "| asking for the device's work, clocks included | {n} | {} |", share(self.asking_s))?;
        writeln!(to, "| from begin to end | | {} |", share(self.all_s))
    }
}

/// How a product is called.
fn product((out, a, b): (&Matrix, &Matrix, &Matrix), how: Gemm) -> (String, f64) {
    let (m, n, k) = (out.rows, out.columns, if how.trans_a { a.rows } else { a.columns });
    let letter = |transposed| if transposed { 'T' } else { 'N' };
    let (store, letters) = (if how.out == Store::Accumulate { "+=" } else { "=" }, [letter(how.trans_a), letter(how.trans_b)]);
    let what =
        format!("gemm {}{} {m} x {n} x {k}, {} {store} {} {}", letters[0], letters[1], out.dtype.name(), a.dtype.name(), b.dtype.name());
    (what, 2.0 * m as f64 * n as f64 * k as f64)
}

impl Backend for Profile {
    fn name(&self) -> String {
        self.below.name()
    }

    fn processors(&self) -> usize {
        self.below.processors()
    }

    fn is_hopper(&self) -> bool {
        self.below.is_hopper()
    }

    fn capability(&self) -> (i32, i32) {
        self.below.capability()
    }

    fn timed(&self) -> Option<Timed> {
        self.below.timed()
    }

    fn identity(&self) -> [u8; 16] {
        self.below.identity()
    }

    fn alloc(&self, bytes: usize) -> Option<u64> {
        self.below.alloc(bytes)
    }

    fn free(&self, address: u64, bytes: usize) {
        self.below.free(address, bytes);
    }

    fn upload(&self, host: &[u8], to: u64) {
        self.host("upload", || self.below.upload(host, to));
    }

    fn download(&self, from: u64, host: &mut [u8]) {
        self.host("download", || self.below.download(from, host));
    }

    fn zero(&self, at: u64, bytes: usize) {
        self.work(|| (format!("zero {bytes} bytes"), 0.0), || self.below.zero(at, bytes));
    }

    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        let (x, y, z) = grid.blocks;
        let what = || (format!("{}, {x} x {y} x {z} of {}", kernel.name, grid.threads), 0.0);
        self.work(what, || self.below.launch(kernel, grid, args));
    }

    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm) {
        self.work(|| product((&out, &a, &b), how), || self.below.gemm(out, a, b, how));
    }

    fn gemm_fp8(&self, out: Matrix, a: Matrix, b: Matrix, scales: ScalesAt) {
        self.work(|| product((&out, &a, &b), Gemm::NT), || self.below.gemm_fp8(out, a, b, scales));
    }

    fn finish(&self) {
        self.host("waiting for the device", || self.below.finish());
    }

    fn record(&self, stream: Stream) -> Event {
        self.below.record(stream)
    }

    fn wait(&self, stream: Stream, event: Event) {
        self.below.wait(stream, event);
    }

    fn is_complete(&self, event: Event) -> bool {
        self.below.is_complete(event)
    }

    fn release(&self, event: Event) {
        self.below.release(event);
    }

    fn mark(&self) -> Event {
        self.below.mark()
    }

    fn seconds_between(&self, from: Event, to: Event) -> f64 {
        self.below.seconds_between(from, to)
    }

    fn forget_mark(&self, mark: Event) {
        self.below.forget_mark(mark);
    }

    fn handle(&self, stream: Stream) -> Option<u64> {
        self.below.handle(stream)
    }

    fn begin_recording(&self) -> bool {
        !self.is_on() && self.below.begin_recording()
    }

    fn end_recording(&self) -> Option<Graph> {
        self.below.end_recording()
    }

    fn replay(&self, graph: Graph) {
        self.work(|| ("recorded work".into(), 0.0), || self.below.replay(graph));
    }

    fn forget(&self, graph: Graph) {
        self.below.forget(graph);
    }
}
