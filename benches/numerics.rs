//! What reproducible numerics cost: the train step through the loop that trireme-pretrain runs, fast and reproducible in turn, on one
//! rank and on two tensor-parallel ranks (threads, each with its share of the cores).
//!
//!     cargo bench --bench numerics [-- 30m bf16]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use trireme::comm::{Groups, threads};
use trireme::device::ceiling::Ceiling;
use trireme::device::cpu::Cpu;
use trireme::metrics::{self, Row, TimeUse};
use trireme::recipe::{Mode, Precision, Pretrain};
use trireme::train::pretrain::{self, Job};

/// Name; hidden, layers, query heads, kv heads, head dim, feed-forward, vocabulary; tokens of a sequence, sequences of a micro-batch.
/// The first is the quick start's.
const SIZES: [(&str, [usize; 7], [usize; 2]); 2] =
    [("5m", [256, 6, 4, 2, 64, 1024, 8192], [256, 8]), ("30m", [384, 10, 6, 2, 64, 1536, 16384], [512, 4])];
/// Steps of a run, of which the first two are not counted.
const STEPS: u64 = 8;
/// Runs of each mode, in turn.
const TURNS: usize = 4;

fn recipe(model: [usize; 7], [seq_len, micro]: [usize; 2], (precision, tp): (Precision, usize), shards: &Path) -> Pretrain {
    let mut recipe = common::tiny_recipe(shards);
    let [hidden, layers, heads, kv_heads, head_dim, ffn, vocab] = model;
    let model = &mut recipe.model;
    (model.hidden, model.n_layers, model.n_heads, model.n_kv_heads) = (hidden, layers, heads, kv_heads);
    (model.head_dim, model.ffn_hidden, model.vocab_size, model.max_tokens) = (head_dim, ffn, vocab, seq_len);
    (model.vocab_divisor, model.init_std) = (128, 0.02);
    (recipe.batch.seq_len, recipe.batch.micro, recipe.batch.global) = (seq_len, micro, 2 * micro);
    (recipe.train.samples, recipe.train.precision) = (STEPS * 2 * micro as u64, precision);
    recipe.parallel.tp = tp;
    recipe
}

/// The rows of the steps that count.
fn run(recipe: &Pretrain, out: &Path) -> Vec<Row> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let tp = recipe.parallel.tp;
    threads::run(tp, |world| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads((cores / tp).max(1)).build().expect("threads");
        pool.install(|| {
            let layout = recipe.check(world.size()).unwrap_or_else(|error| panic!("{error}"));
            let (groups, device) = (Groups::new(world, layout), Cpu::new());
            let job = Job {
                recipe,
                groups: &groups,
                device: &device,
                out,
                stop_after: None,
                accepted: &[],
                stop: &|| false,
                deadline: None,
                ceiling: &|_| Ceiling { gemm_flops_per_s: 1e9, copy_bytes_per_s: 1e9 },
            };
            pretrain::run(&job).unwrap_or_else(|error| panic!("{error}"));
        });
    });
    metrics::read(&out.join("metrics.jsonl")).unwrap_or_else(|error| panic!("{error}")).split_off(2)
}

/// The least of a number over steps of all turns: what else ran on the machine only ever adds.
fn least(rows: &[Row], value: impl Fn(&Row) -> f64) -> f64 {
    rows.iter().map(value).fold(f64::INFINITY, f64::min)
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |word: &str, all: &[&str]| !wanted.iter().any(|w| all.contains(&w.as_str())) || wanted.iter().any(|w| w == word);
    println!("| model | storage | tp | fast tokens/s | reproducible | cost | forward ms | backward ms | optimizer ms |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|");
    for (name, model, sizes) in SIZES {
        for (storage, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            for tp in [1, 2] {
                let tp_word = format!("tp{tp}");
                if !is_wanted(name, &["5m", "30m"]) || !is_wanted(storage, &["f32", "bf16"]) || !is_wanted(&tp_word, &["tp1", "tp2"]) {
                    continue;
                }
                let dir = tempfile::tempdir().expect("a temporary directory");
                let shards = dir.path().join("shards");
                let n_documents = 2 * STEPS as usize * sizes[0] * sizes[1] / 40;
                common::write_megatron(&shards, "train", &common::counting_documents(n_documents, model[6] as u32, 1));
                let mut rows = [Vec::new(), Vec::new()];
                for turn in 0..TURNS {
                    for (rows, mode) in rows.iter_mut().zip([Mode::Fast, Mode::Reproducible]) {
                        let mut recipe = recipe(model, sizes, (precision, tp), &shards);
                        recipe.numerics.mode = mode;
                        rows.extend(run(&recipe, &dir.path().join(format!("{turn}-{mode:?}"))));
                    }
                }
                let [fast, reproducible] = rows.each_ref().map(|rows| 1.0 / least(rows, |row| 1.0 / row.tokens_per_s));
                let of = |value: &dyn Fn(&TimeUse) -> f64| {
                    let [fast, reproducible] = rows.each_ref().map(|rows| 1e3 * least(rows, |row| row.time.as_ref().map_or(0.0, value)));
                    format!("{fast:.1} / {reproducible:.1}")
                };
                let (forward, backward, optimizer) = (of(&|time| time.forward), of(&|time| time.backward), of(&|time| time.optimizer));
                let cost = 100.0 * (fast / reproducible - 1.0);
                println!(
                    "| {name} | {storage} | {tp} | {fast:.0} | {reproducible:.0} | {cost:.1} % | {forward} | {backward} | {optimizer} |"
                );
            }
        }
    }
}
