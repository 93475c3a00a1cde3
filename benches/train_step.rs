//! The train step against the measured GEMM ceiling, through the loop that trireme-pretrain runs, one rank: on the CPU with
//! ~30M and ~120M parameters, f32 and bf16, all threads; with `cuda` on a GPU with 1.0B (head dim 128) and 1.2B (head dim 192)
//! parameters, sequences of 4096, bf16. And PyTorch on the same shapes and device, when TRIREME_TORCH_PYTHON names a Python
//! that has it, in turn in the same run (benches/peers/torch_train.py).
//!
//!     TRIREME_TORCH_PYTHON=/path/to/python cargo bench --bench train_step [-- 30m f32]
//!     TRIREME_TORCH_PYTHON=/path/to/python cargo bench --bench train_step -- cuda [1b] [fp8]
//!
//! With `fp8` the linear layers of the blocks multiply E4M3 (`numerics.linear = "fp8"`); the ceiling and PyTorch stay in bf16. On a GPU
//! a step after those that are measured is taken down call by call: what ran on the device, how long, and how long it waited; and which
//! products cuBLASLt made and which a kernel of ours, with the times that decided it. `alone`
//! leaves PyTorch out; TRIREME_HOPPER_KERNELS=0 leaves out the kernels that only a Hopper GPU has.

#[path = "../tests/common/mod.rs"]
mod common;

use std::cell::Cell;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::cpu::Cpu;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::profile::Profile;
use trireme::device::{Device, ceiling};
use trireme::metrics;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::{Linear, Precision, Pretrain};
use trireme::train::pretrain::{self, Job};

/// What is trained: the shapes of benches/peers/torch_train.py.
struct Size {
    name: &'static str,
    /// Hidden, layers, query heads, kv heads, head dim, feed-forward, vocabulary.
    model: [usize; 7],
    seq_len: usize,
    micro: usize,
}

const CPU_SIZES: [Size; 2] = [
    Size { name: "30m", model: [384, 10, 6, 2, 64, 1536, 16384], seq_len: 512, micro: 4 },
    Size { name: "120m", model: [768, 12, 12, 4, 64, 3072, 32000], seq_len: 512, micro: 4 },
];
const CUDA_SIZES: [Size; 2] = [
    Size { name: "1b", model: [2048, 20, 16, 8, 128, 8192, 32000], seq_len: 4096, micro: 4 },
    Size { name: "1b-d192", model: [2304, 18, 12, 4, 192, 9216, 32000], seq_len: 4096, micro: 4 },
];
/// Steps before the measured ones: kernels are compiled, products' algorithms chosen, memory is taken.
const WARM: usize = 2;
const STEPS: u64 = 7;
/// The step that is taken down, counted from 0, and the first that is not measured.
const PROFILED: usize = 5;

fn recipe(size: &Size, (precision, linear): (Precision, Linear), shards: &Path) -> Pretrain {
    let mut recipe = common::tiny_recipe(shards);
    let [hidden, layers, heads, kv_heads, head_dim, ffn, vocab] = size.model;
    let model = &mut recipe.model;
    (model.hidden, model.n_layers, model.n_heads, model.n_kv_heads) = (hidden, layers, heads, kv_heads);
    (model.head_dim, model.ffn_hidden, model.vocab_size, model.max_tokens) = (head_dim, ffn, vocab, size.seq_len);
    (model.vocab_divisor, model.init_std) = (128, 0.02);
    (recipe.batch.seq_len, recipe.batch.micro, recipe.batch.global) = (size.seq_len, size.micro, size.micro);
    (recipe.train.samples, recipe.train.precision) = (STEPS * size.micro as u64, precision);
    recipe.numerics.linear = linear;
    recipe
}

/// Median tokens/s, share of the ceiling, and utilization of what the GPU's maker states where that is known.
type Rates = (f64, f64, Option<f64>);

/// Of the measured steps of a run.
fn rates(rows: &[metrics::Row]) -> Rates {
    let median = |value: &dyn Fn(&metrics::Row) -> f64| {
        let mut values: Vec<f64> = rows[WARM..PROFILED].iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let mfu = rows[0].mfu.map(|_| median(&|row| row.mfu.unwrap_or(0.0)));
    (median(&|row| row.tokens_per_s), median(&|row| row.share_of_gemm_ceiling), mfu)
}

/// Trains, and tells the rates and the table of a step as soon as they are known: the end of the run saves a large checkpoint.
fn ours((device, profile): &Opened, size: &Size, numbers: (Precision, Linear)) -> Rates {
    let device = &**device;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let shards = dir.path().join("shards");
    common::write_megatron(&shards, "train", &common::counting_documents(600 * size.seq_len / 512, size.model[6] as u32, 1));
    let recipe = recipe(size, numbers, &shards);
    let groups = Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
    let out = dir.path().join("run");
    // Asked after each step, and some times before the first.
    let (measured, is_profiled) = (Cell::new(None), Cell::new(false));
    let stop = || {
        let rows = metrics::read(&out.join("metrics.jsonl")).unwrap_or_default();
        if rows.len() == PROFILED && measured.get().is_none() {
            let (tokens_per_s, share, mfu) = rates(&rows);
            let of_peak = mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
            eprintln!("{} {}: {tokens_per_s:.0} tokens/s, {share:.3} of the GEMM ceiling{of_peak}", size.name, name_of(numbers));
            measured.set(Some((tokens_per_s, share, mfu)));
            profile.iter().for_each(|(_, profile)| profile.begin());
        } else if rows.len() > PROFILED && !is_profiled.replace(true) {
            profile.iter().for_each(|(cuda, profile)| {
                eprintln!("One step of {}:\n{}\nWho made products:\n{}", size.name, profile.end(), cuda.contest_table());
            });
        }
        false
    };
    let job = Job {
        recipe: &recipe,
        groups: &groups,
        device,
        out: &out,
        stop_after: None,
        accepted: &[],
        stop: &stop,
        deadline: None,
        ceiling: &|dtype| ceiling::measure(device, dtype),
    };
    let ended = pretrain::run(&job);
    match (measured.get(), ended) {
        (Some(rates), Ok(_)) => rates,
        (Some(rates), Err(error)) => {
            eprintln!("{}: {error}", size.name);
            rates
        }
        (None, ended) => panic!("no step was measured: {}", ended.err().map_or("there are too few".into(), |error| error.to_string())),
    }
}

/// How numbers are stored, what is multiplied where that is another thing, and whether a GPU has to do without kernels of its own.
fn name_of((precision, linear): (Precision, Linear)) -> String {
    let storage = if precision == Precision::F32 { "f32" } else { "bf16" };
    let products = if linear == Linear::Fp8 { ", products in E4M3" } else { "" };
    let is_portable = std::env::var_os("TRIREME_HOPPER_KERNELS").is_some_and(|value| value == "0");
    format!("{storage}{products}{}", if is_portable { ", kernels for every GPU" } else { "" })
}

/// A device, and on a GPU the same once more with what takes down where its time goes.
type Opened = (Box<dyn Device>, Option<(Cuda, Arc<Profile>)>);

/// The peer's tokens/s, eager and compiled, or None without a Python that has PyTorch.
fn peer(device: &str, size: &Size, dtype: &str, compile: bool) -> Option<f64> {
    let python = std::env::var("TRIREME_TORCH_PYTHON").ok()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/torch_train.py");
    let mut command = Command::new(python);
    command.arg(script).args(["--device", device, "--size", size.name, "--dtype", dtype]);
    command.args(["--seq-len", &size.seq_len.to_string(), "--sequences", &size.micro.to_string()]);
    if compile {
        command.arg("--compile");
    }
    // A bundle runs this bench with libraries of its own, which are not Python's.
    if let Some(outer) = std::env::var_os("TRIREME_OUTER_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", outer);
    }
    // What it has to say goes where ours goes: else a peer that fails would only be missing.
    let output = command.stderr(Stdio::inherit()).output().ok()?;
    let line = String::from_utf8_lossy(&output.stdout).lines().last()?.to_string();
    serde_json::from_str::<serde_json::Value>(&line).ok()?.get("tokens_per_s")?.as_f64()
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |word: &str, all: &[&str]| !wanted.iter().any(|w| all.contains(&w.as_str())) || wanted.iter().any(|w| w == word);
    let on_gpu = wanted.iter().any(|word| word == "cuda");
    let name = if on_gpu { "cuda" } else { "cpu" };
    // Anew for each measurement, so that the memory it keeps is there for the peer.
    let open = || -> Opened {
        if !on_gpu {
            return (Box::new(Cpu::new()), None);
        }
        match Cuda::open_profiled(0) {
            Ok((cuda, profile)) => (Box::new(cuda.sharing_memory()), Some((cuda, profile))),
            Err(error) => {
                println!("not run: {error}");
                std::process::exit(2);
            }
        }
    };
    let linear = if wanted.iter().any(|word| word == "fp8") { Linear::Fp8 } else { Linear::Stored };
    println!("{}\n", open().0.name());
    println!("| model | storage | tokens/s | share of GEMM ceiling | MFU | PyTorch eager | compiled | ours / best |");
    println!("|---|---|---|---|---|---|---|---|");
    for size in if on_gpu { &CUDA_SIZES } else { &CPU_SIZES } {
        for (dtype, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let is_left_out = on_gpu && precision == Precision::F32;
            if is_left_out || !is_wanted(size.name, &["30m", "120m", "1b", "1b-d192"]) || !is_wanted(dtype, &["f32", "bf16"]) {
                continue;
            }
            // Ours is told before the peer is asked, which may fail or take long.
            let (tokens_per_s, share, mfu) = ours(&open(), size, (precision, linear));
            let is_alone = wanted.iter().any(|word| word == "alone");
            let [eager, compiled] = [false, true].map(|compile| {
                let rate = if is_alone { None } else { peer(name, size, dtype, compile) };
                eprintln!("PyTorch, compiled {compile}: {} tokens/s", rate.map_or("no".into(), |rate| format!("{rate:.0}")));
                rate
            });
            let text = |rate: Option<f64>| rate.map_or("not run".into(), |rate| format!("{rate:.0}"));
            let best = eager.unwrap_or(0.0).max(compiled.unwrap_or(0.0));
            let ratio = if best > 0.0 { format!("{:.2}", tokens_per_s / best) } else { "-".into() };
            let (model, share) = (size.name, 100.0 * share);
            let dtype = name_of((precision, linear));
            let mfu = mfu.map_or("-".into(), |mfu| format!("{:.1} %", 100.0 * mfu));
            let (eager, compiled) = (text(eager), text(compiled));
            println!("| {model} | {dtype} | {tokens_per_s:.0} | {share:.0} % | {mfu} | {eager} | {compiled} | {ratio} |");
        }
    }
}
