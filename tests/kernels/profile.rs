//! What a train step of the shapes of benches/train_step.rs asks of a GPU, and how often the host waits for it: on a machine that does
//! nothing, below what takes every call down; and what a decode step asks for.

use crate::common::{counting_documents, models, tiny_recipe, write_megatron};
use crate::driver::{inside, is_inside, stand_ins};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::ceiling::Ceiling;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::{Arg, Backend, Event, Graph, Grid, Kernel, Matrix, ScalesAt, Stream};
use trireme::device::cuda::profile::{Line, Profile, Seen};
use trireme::device::{CacheSpan, Device, Gemm, Scratch};
use trireme::infer::decode::{Decoder, NewTokens};
use trireme::metrics;
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::{Mode, Precision, Pretrain};
use trireme::tensor::DType;
use trireme::train::pretrain::{self, Job};

/// A Hopper GPU of 132 processors on which every call takes a microsecond and changes nothing; what is read from it are ones.
#[derive(Default)]
struct Idle {
    n_bytes: AtomicU64,
    time_us: AtomicU64,
}

impl Idle {
    fn works(&self) {
        self.time_us.fetch_add(1, Ordering::Relaxed);
    }
}

impl Backend for Idle {
    fn name(&self) -> String {
        "idle".into()
    }
    fn processors(&self) -> usize {
        132
    }
    fn is_hopper(&self) -> bool {
        true
    }
    fn capability(&self) -> (i32, i32) {
        (9, 0)
    }
    fn identity(&self) -> [u8; 16] {
        [0; 16]
    }
    fn alloc(&self, bytes: usize) -> Option<u64> {
        Some(256 + self.n_bytes.fetch_add(bytes.next_multiple_of(256) as u64, Ordering::Relaxed))
    }
    fn free(&self, _address: u64, _bytes: usize) {}
    fn upload(&self, _host: &[u8], _to: u64) {}
    fn download(&self, _from: u64, host: &mut [u8]) {
        host.chunks_exact_mut(4).for_each(|four| four.copy_from_slice(&1.0f32.to_ne_bytes()));
    }
    fn zero(&self, _at: u64, _bytes: usize) {
        self.works();
    }
    fn launch(&self, _kernel: &Kernel, _grid: Grid, _args: &[Arg]) {
        self.works();
    }
    fn gemm(&self, _out: Matrix, _a: Matrix, _b: Matrix, _how: Gemm) {
        self.works();
    }
    fn gemm_fp8(&self, _out: Matrix, _a: Matrix, _b: Matrix, _scales: ScalesAt) {
        self.works();
    }
    fn finish(&self) {}
    fn record(&self, _stream: Stream) -> Event {
        Event(0)
    }
    fn wait(&self, _stream: Stream, _event: Event) {}
    fn is_complete(&self, _event: Event) -> bool {
        true
    }
    fn release(&self, _event: Event) {}
    fn mark(&self) -> Event {
        Event(self.time_us.load(Ordering::Relaxed))
    }
    fn seconds_between(&self, from: Event, to: Event) -> f64 {
        (to.0 - from.0) as f64 * 1e-6
    }
    fn forget_mark(&self, _mark: Event) {}
    fn handle(&self, _stream: Stream) -> Option<u64> {
        None
    }
    fn begin_recording(&self) -> bool {
        true
    }
    fn end_recording(&self) -> Option<Graph> {
        Some(Graph(0))
    }
    fn replay(&self, _graph: Graph) {}
    fn forget(&self, _graph: Graph) {}
}

const MICROS: usize = 2;

/// The model of head dim 128, its other sizes small, with so many layers.
fn recipe(n_layers: usize, shards: &std::path::Path) -> Pretrain {
    let mut recipe = tiny_recipe(shards);
    let model = &mut recipe.model;
    (model.hidden, model.n_layers, model.n_heads, model.n_kv_heads) = (256, n_layers, 4, 2);
    (model.head_dim, model.ffn_hidden, model.vocab_size, model.max_tokens) = (128, 768, 2048, 4096);
    (recipe.batch.seq_len, recipe.batch.micro, recipe.batch.global) = (4096, 4, 4 * MICROS);
    (recipe.train.samples, recipe.train.precision) = (3 * 4 * MICROS as u64, Precision::Bf16);
    recipe
}

/// What a step after the first asks for.
fn train_step(n_layers: usize) -> Seen {
    let tmp = tempfile::tempdir().unwrap();
    let shards = tmp.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(800, 2000, 1));
    let (recipe, groups) = (recipe(n_layers, &shards), Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE));
    let profile = Profile::over(Arc::new(Idle::default()));
    let device = Cuda::with_backend(Arc::clone(&profile) as Arc<dyn Backend>);
    // Asked after each step, and some times before the first: the second is taken down.
    let (out, seen) = (tmp.path().join("run"), Cell::new(None));
    let stop = || {
        match metrics::read(&out.join("metrics.jsonl")).map_or(0, |rows| rows.len()) {
            1 => profile.begin(),
            2 => seen.set(Some(profile.end())),
            _ => {}
        }
        false
    };
    let job = Job {
        recipe: &recipe,
        groups: &groups,
        device: &device,
        out: &out,
        stop_after: None,
        accepted: &[],
        stop: &stop,
        deadline: None,
        ceiling: &|_| Ceiling { gemm_flops_per_s: 1.0, copy_bytes_per_s: 1.0 },
    };
    pretrain::run(&job).unwrap();
    seen.take().expect("three steps")
}

/// How often something was asked for.
fn count(lines: &[Line], is: impl Fn(&str) -> bool) -> usize {
    lines.iter().filter(|line| is(&line.what)).map(|line| line.n).sum()
}

/// In a step the host reads from the device what the loss of each micro-batch is made of, and one sum for the norm of all gradients,
/// however many layers there are: a device that waits for its host once for every tensor idles longer than the sum takes. And a layer
/// asks for so many kernels and products, no more; the table of it says all.
#[test]
fn a_train_step_waits_for_its_loss_and_its_norm() {
    let (one, three) = (train_step(1), train_step(3));
    for seen in [&one, &three] {
        let read = count(&seen.host, |what| what == "download");
        assert_eq!((read, count(&seen.host, |what| what.starts_with("waiting"))), (3 * MICROS + 1, 1), "{seen}");
    }
    let of_two_layers = |is: &dyn Fn(&str) -> bool| count(&three.device, is) - count(&one.device, is);
    let each_micro = |name: &'static str| of_two_layers(&|what| what.starts_with(name)) as f64 / (2 * MICROS) as f64;
    for (name, n) in [
        ("gemm NT", 4.0),
        ("gemm NN", 4.0),
        ("gemm TN", 4.0),
        ("attention_hopper_d128", 1.0),
        ("attention_delta", 1.0),
        ("attention_hopper_dq", 1.0),
        ("attention_hopper_dkv", 1.0),
        ("rope_bf16", 1.0),
        ("rope_angles", 1.0),
        ("add_norm", 2.0),
        ("norm_backward", 2.0),
        ("norm_sum", 2.0),
        ("squared_relu_backward", 1.0),
        ("adamw", 8.0 / MICROS as f64), // once a step: four matrices, gains and biases of two norms
    ] {
        assert_eq!(each_micro(name), n, "{name}: {three}");
    }
    // Every call takes a microsecond of this device.
    let us = |line: &Line| (1e6 * line.seconds).round() as usize;
    assert!(three.device.iter().all(|line| us(line) == line.n) && three.idle_s == 0.0, "{three}");
    let product = three.device.iter().find(|line| line.what == "gemm NT 16384 x 768 x 256, bf16 = bf16 bf16").expect("the up projection");
    assert_eq!((product.n, product.flops), (3 * MICROS, (3 * MICROS) as f64 * 2.0 * 16384.0 * 768.0 * 256.0));
    let text = three.to_string();
    assert!(text.contains("| gemm NT 16384 x 768 x 256, bf16 = bf16 bf16 | 6 | 0.006 |"), "{text}");
}

/// What a decode step of one sequence with keys for several shares asks for.
fn decode_step(n_layers: usize, order: Mode) -> Seen {
    let profile = Profile::over(Arc::new(Idle::default()));
    let device = Cuda::with_backend(Arc::clone(&profile) as Arc<dyn Backend>);
    let config = models::nemotron([n_layers, 256, 4, 2, 128, 768, 2048], 2048);
    let (at, solo, scratch) = (Coords { tp: 0, pp: 0, dp: 0 }, Solo::new(), Scratch::new());
    let chunk = Chunk::new(&device, &config, &ParallelLayout::SINGLE, at, 0, DType::BF16, Purpose::Inference).unwrap();
    let mut caches = chunk.new_caches(&device, 32).unwrap();
    let numerics = if order == Mode::Fast { Numerics::Fast } else { Numerics::of_inference(&device) };
    let ctx = Ctx { device: &device, tp: &solo, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
    let spans = [CacheSpan { rows: 0..1, past: 1800, pages: (0..29).collect() }];
    let mut decoder = Decoder::default();
    let mut step = || {
        decoder.logits(&ctx, &chunk, &NewTokens { tokens: &[1], positions: &[1800], spans: &spans }, &mut caches);
    };
    step();
    profile.begin();
    step();
    profile.end()
}

/// The launches of a layer of a decode step: each costs some microseconds of a step that reads a billion weights in half a thousand.
#[test]
fn a_decode_step_asks_for_few_kernels() {
    let kernels = [("attention_rope_cached_deep", 1)];
    let fast = [("gemv_norm_1_bf16", 1), ("gemv_norm_squared_relu_1", 1), ("gemv_1_bf16_bf16", 2)];
    let canonical = [("add_norm", 2), ("matmul_hopper_small_nt", 4), ("matmul_add", 2), ("squared_relu", 1)];
    for (order, products) in [(Mode::Fast, &fast[..]), (Mode::Reproducible, &canonical[..])] {
        let (one, three) = (decode_step(1, order), decode_step(3, order));
        let each = |is: &dyn Fn(&str) -> bool| (count(&three.device, is) - count(&one.device, is)) / 2;
        for (name, n) in kernels.iter().chain(products) {
            assert_eq!(each(&|what| what.starts_with(name)), *n, "{name}: {three}");
        }
        let all: usize = kernels.iter().chain(products).map(|(_, n)| n).sum();
        assert_eq!(each(&|_| true), all, "{three}");
    }
}

fn profile_the_device() {
    let (cuda, profile) = Cuda::open_profiled(0).unwrap();
    let (mut x, mut y) = (cuda.alloc(&[3], DType::F32).unwrap(), cuda.alloc(&[3], DType::F32).unwrap());
    cuda.scale(&mut x, 3.0);
    for _ in 0..2 {
        profile.begin();
        cuda.scale(&mut x, 2.0);
        cuda.scale(&mut x, 2.0);
        cuda.fill_zero(&mut y);
        // Is not recorded, or its kernels could not be told apart.
        assert!(cuda.record(&mut || unreachable!()).is_none());
        let _ = x.host_bytes();
        let seen = profile.end();
        let n = |what: &str| count(&seen.device, |line| line == what);
        assert_eq!((n("scale_f32, 1 x 1 x 1 of 256"), n("zero 12 bytes"), seen.device.len()), (2, 1, 2), "{seen}");
        assert_eq!(count(&seen.host, |what| what == "download"), 1);
    }
    let recording = cuda.record(&mut || cuda.scale(&mut x, 2.0)).expect("outside of begin and end it is recorded");
    assert!(recording.replay(&[]));
}

/// The driver's events tell the time, live from call to call and end with the profile; what was asked for before and after is not in it.
#[test]
fn the_driver_is_profiled() {
    if is_inside() {
        return profile_the_device();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    inside(folder.path(), "profile::the_driver_is_profiled", &[]);
}
