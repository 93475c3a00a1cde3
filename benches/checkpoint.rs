//! Checkpoints against `dd` on the same file system, in turns, so that both meet the same minutes: writing with every checksum and
//! fsync against `dd conv=fsync` with blocks of 1 MiB and the same number of bytes, and reading, verified, against `dd` reading the
//! same files. Reads come from the page cache for both. Shares mean more than rates.
//!
//! CHECKPOINT_BENCH_DIR   where to write (the system's folder for temporary files)
//! CHECKPOINT_BENCH_MIB   bytes of a checkpoint (1024)

#[path = "../tests/common/models.rs"]
mod models;

use models::smallest_meta;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use trireme::checkpoint::{self, Piece, Wanted};
use trireme::comm::solo::Solo;
use trireme::parallel::slice::Slice;
use trireme::tensor::{DType, Tensor};

/// Columns of every tensor.
const COLUMNS: usize = 4096;
const ROUNDS: usize = 5;

fn seconds(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}

fn dd(arguments: &[String]) {
    let status = Command::new("dd").args(arguments).stderr(Stdio::null()).status().expect("dd starts");
    assert!(status.success(), "dd {arguments:?}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn save(out: &Path, tensors: &[Tensor]) {
    let piece = |(i, tensor): (usize, _)| Piece {
        name: format!("master/p{i}"),
        global_shape: vec![4096, COLUMNS],
        slice: Slice::whole(&[4096, COLUMNS]),
        tensor,
    };
    let pieces: Vec<Piece> = tensors.iter().enumerate().map(piece).collect();
    checkpoint::save(out, &smallest_meta(), &pieces, &Solo::new()).expect("a checkpoint");
}

fn load(from: &Path, tensors: &mut [Tensor]) {
    let wanted = |(i, tensor)| Wanted { name: format!("master/p{i}"), slice: Slice::whole(&[4096, COLUMNS]), tensor };
    let mut wanted: Vec<Wanted> = tensors.iter_mut().enumerate().map(wanted).collect();
    checkpoint::open(from).and_then(|stored| stored.read(&mut wanted)).expect("readable");
}

fn main() {
    let number = |name: &str, default: usize| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let n_tensors = (number("CHECKPOINT_BENCH_MIB", 1024) / 64).max(1);
    let place = std::env::var_os("CHECKPOINT_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(place).expect("a directory");
    let mut tensors: Vec<Tensor> = (0..n_tensors).map(|_| Tensor::host(&[4096, COLUMNS], DType::F32, None).expect("memory")).collect();
    for (i, tensor) in tensors.iter_mut().enumerate() {
        tensor.f32_mut().iter_mut().enumerate().for_each(|(k, x)| *x = (k ^ i) as f32);
    }
    let bytes = n_tensors * 4096 * COLUMNS * 4;
    let gb_per_s = |seconds: f64| bytes as f64 / seconds / 1e9;
    let (mut writes, mut reads) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    for _ in 0..ROUNDS {
        let (plain, out) = (dir.path().join("plain"), dir.path().join("checkpoint"));
        let path = |key: &str, path: &Path| format!("{key}={}", path.display());
        let count = format!("count={}", bytes >> 20);
        writes.0.push(seconds(|| dd(&["if=/dev/zero".into(), path("of", &plain), "bs=1M".into(), count.clone(), "conv=fsync".into()])));
        std::fs::remove_file(&plain).expect("removable");
        writes.1.push(seconds(|| save(&out, &tensors)));
        let shard = out.join("shard-00000.h5");
        reads.0.push(seconds(|| dd(&[path("if", &shard), "of=/dev/null".into(), "bs=1M".into()])));
        reads.1.push(seconds(|| load(&out, &mut tensors)));
        std::fs::remove_dir_all(&out).expect("removable");
    }
    println!("{} MiB in {} tensors, median of {ROUNDS} rounds in turns, in {}", bytes >> 20, n_tensors, dir.path().display());
    for (what, (dd, ours)) in [("write, synced", writes), ("read, verified", reads)] {
        let shares = ours.iter().zip(&dd).map(|(ours, dd)| dd / ours).collect();
        let (dd, ours) = (gb_per_s(median(dd)), gb_per_s(median(ours)));
        println!("{what:15} dd {dd:6.2} GB/s  checkpoint {ours:6.2} GB/s  share {:.2}", median(shares));
    }
}
