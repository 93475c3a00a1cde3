//! How much memory import, export and their comparison take, as the kernel counts it.

use crate::parts::{LLAMA, hf_tensors};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Peak resident bytes of trireme-checkpoint, its exit code and what it said on stderr. The kernel's high-water mark is read until the
/// program is gone; what it adds in its last milliseconds is missed.
pub fn peak_of(dir: &Path, line: &str) -> (usize, Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_trireme-checkpoint");
    let mut command = Command::new(program);
    command.args(line.split(' ')).current_dir(dir).env("RAYON_NUM_THREADS", "2").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (status_path, mut peak) = (format!("/proc/{}/status", child.id()), 0);
    let status = loop {
        let text = std::fs::read_to_string(&status_path).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        peak = peak.max(mark.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (peak, status.code(), err)
}

/// A Llama of so many layers and pieces whose values are zeros that take no room on the disk; returns (bytes of all tensors, of gate and
/// up together).
fn write_zeros(dir: &Path, n_layers: usize, n_pieces: usize) -> (usize, usize) {
    let mut config: Value = LLAMA();
    let sizes = [("hidden_size", 768), ("intermediate_size", 3072), ("num_attention_heads", 12), ("num_key_value_heads", 12)];
    sizes.into_iter().chain([("num_hidden_layers", n_layers), ("vocab_size", n_pieces)]).for_each(|(key, n)| config[key] = json!(n));
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in hf_tensors(&config) {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let text = serde_json::to_vec(&header).unwrap();
    let mut file = std::fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&text).unwrap();
    file.set_len((8 + text.len() + end) as u64).unwrap();
    (end, 2 * 2 * 3072 * 768)
}

/// Both ways take the memory of one parameter (and fixed buffers) and a comparison that of slices, however many layers there are: a
/// model of twelve layers is 25 times its largest parameter, and takes hardly more than one of a single layer. Breaks when anything
/// holds on to tensors that are done.
#[test]
fn peak_memory_is_one_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let mut peaks: Vec<[usize; 3]> = Vec::new();
    let (mut total, mut largest) = (0, 0);
    for (name, n_layers) in [("one", 1), ("twelve", 12)] {
        (total, largest) = write_zeros(&dir.path().join(name), n_layers, 128);
        let lines = [
            format!("import {name} --out {name}-c"),
            format!("export {name}-c --out {name}-e --shard-size 30MB"),
            format!("import {name} --out {name}-c --verify"),
        ];
        peaks.push(lines.map(|line| {
            let (peak, code, err) = peak_of(dir.path(), &line);
            assert_eq!(code, Some(0), "{line}: {err}");
            peak
        }));
    }
    println!("{total} bytes, the largest parameter {largest}; import, export, comparison: {peaks:?}");
    assert!(total > 20 * largest);
    for (idx, (what, room)) in [("import", largest), ("export", largest), ("comparison", largest)].into_iter().enumerate() {
        let (one, twelve) = (peaks[0][idx], peaks[1][idx]);
        assert!(twelve < one + room, "{what}: {twelve} bytes for twelve layers, {one} for one");
    }
    assert!(peaks[1][0].max(peaks[1][1]) < total / 2, "{peaks:?}");
    let files = std::fs::read_dir(dir.path().join("twelve-e")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    let weights: Vec<u64> = files.filter(|bytes| *bytes > 1_000_000).collect();
    assert!(weights.len() >= 8 && weights.iter().all(|bytes| *bytes < 30_010_000), "{weights:?}");
}

/// A comparison takes less than one tensor: of an embedding of 151 MB, tied, the second side's pass has a slice of 8 MiB in f32, beside
/// what it read and what it compares it with, which the checkpoint also has as it is stored, and as much again packed for a product; and
/// logits of 20 tokens, of the first side, of the second, in the parts that its slices gave, and once more to keep; and an area of 16 MiB
/// that small tensors share, and 24 buffers of 96 Ki words that products on two threads leave. Breaks when either side holds a whole
/// matrix, in the type of the files even.
#[test]
fn a_comparison_takes_slices() {
    let dir = tempfile::tempdir().unwrap();
    let n_pieces = 98_304;
    write_zeros(&dir.path().join("wide"), 2, n_pieces);
    let (slice, logits, largest) = (8 << 20, 20 * n_pieces * 4, n_pieces * 768 * 2);
    let [(without, ..), (with, code, err)] = ["import wide --out c", "import wide --out c --verify"].map(|line| peak_of(dir.path(), line));
    assert_eq!(code, Some(0), "{err}");
    // The import is there already, so the second program only compares. What both have is in the first: its libraries and buffers.
    let most = without + 4 * slice + 4 * logits + (16 << 20) + 24 * (96 << 12);
    println!("import {without}, comparison {with} bytes, at most {most}; the embedding {largest}");
    assert!(with < most && most < largest, "import {without}, comparison {with} bytes, at most {most}; the embedding {largest}");
}
