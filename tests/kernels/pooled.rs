//! The emulated machine with the arena of the real one before its memory: what a run asks of the allocator below.

use crate::common::{counting_documents, tiny_recipe, train_watched, write_megatron};
use crate::emulator::{Emulator, emulator};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use trireme::device::cuda::Cuda;
use trireme::device::cuda::arena::Arena;
use trireme::device::cuda::backend::{Arg, Backend, Event, Graph, Grid, Kernel, Matrix, ScalesAt, Stream};
use trireme::device::{Device, Gemm};

/// The backend.
pub struct Pooled {
    below: Arc<Emulator>,
    arena: Mutex<Arena>,
    /// Pieces that were asked of the emulator, with their sizes.
    pieces: Mutex<HashMap<u64, usize>>,
    n_replays: AtomicUsize,
}

impl Pooled {
    /// None, with the reason printed, where kernels cannot be emulated.
    pub fn new() -> Option<Arc<Pooled>> {
        let below = emulator()?;
        let (arena, pieces, n_replays) = (Mutex::default(), Mutex::default(), AtomicUsize::new(0));
        Some(Arc::new(Pooled { below, arena, pieces, n_replays }))
    }

    /// How often the allocator below was asked so far.
    pub fn n_asked(&self) -> usize {
        self.pieces.lock().unwrap().len()
    }

    /// How often recorded work was asked for so far.
    pub fn n_replays(&self) -> usize {
        self.n_replays.load(Ordering::Relaxed)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        for (address, bytes) in self.pieces.get_mut().unwrap().drain() {
            self.below.free(address, bytes);
        }
    }
}

impl Backend for Pooled {
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

    fn gemm_fp8(&self, out: Matrix, a: Matrix, b: Matrix, scales: ScalesAt) {
        self.below.gemm_fp8(out, a, b, scales);
    }

    fn identity(&self) -> [u8; 16] {
        self.below.identity()
    }
    fn alloc(&self, bytes: usize) -> Option<u64> {
        self.arena.lock().unwrap().take(bytes, |bytes| {
            let address = self.below.alloc(bytes)?;
            self.pieces.lock().unwrap().insert(address, bytes);
            Some(address)
        })
    }
    fn free(&self, address: u64, _bytes: usize) {
        self.arena.lock().unwrap().give(address);
    }
    fn upload(&self, host: &[u8], to: u64) {
        self.below.upload(host, to);
    }
    fn download(&self, from: u64, host: &mut [u8]) {
        self.below.download(from, host);
    }
    fn zero(&self, at: u64, bytes: usize) {
        self.below.zero(at, bytes);
    }
    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        self.below.launch(kernel, grid, args);
    }
    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm) {
        self.below.gemm(out, a, b, how);
    }
    fn finish(&self) {
        self.below.finish();
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
        self.below.begin_recording()
    }
    fn end_recording(&self) -> Option<Graph> {
        self.below.end_recording()
    }
    fn replay(&self, graph: Graph) {
        self.n_replays.fetch_add(1, Ordering::Relaxed);
        self.below.replay(graph);
    }
    fn forget(&self, graph: Graph) {
        self.below.forget(graph);
    }
}

/// Steps after the first ask for no memory: all that a step takes, temporaries, tables of a call and micro-batches, it gives back, and
/// the next finds it. A leak or a size that changes from step to step would show as a count that grows.
#[test]
fn steps_after_the_first_ask_for_no_memory() {
    let Some(backend) = Pooled::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let shards = tmp.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    recipe.model.n_layers = 2;
    (recipe.train.samples, recipe.batch.global) = (4 * 4, 4);
    let (machine, counts) = (Arc::clone(&backend), Mutex::new(Vec::new()));
    let device = || Box::new(Cuda::with_backend(Arc::clone(&machine) as Arc<dyn Backend>)) as Box<dyn Device>;
    train_watched(&device, &recipe, &tmp.path().join("run"), None, &|| counts.lock().unwrap().push(backend.n_asked())).unwrap();
    let counts = counts.into_inner().unwrap();
    // Before the first step it was asked as well.
    let counts = &counts[counts.len() - 4..];
    assert!(counts[0] > 0 && counts.iter().all(|n| *n == counts[0]), "asked for memory so often by each step: {counts:?}");
}
