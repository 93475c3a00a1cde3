//! Damaged, shortened and missing files: found, named, passed over.

use crate::parts::*;
use trireme::checkpoint;
use trireme::comm::solo::Solo;
use trireme::error::Kind;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::DType;

/// A missing or shortened shard is an error that names it. HDF5 alone would read zeros from a virtual dataset.
#[test]
fn missing_and_truncated_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 1);
    let shard = out.join("shard-00001.h5");
    let whole = std::fs::read(&shard).unwrap();
    for n in [0, 1, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&shard, &whole[..n]).unwrap();
        let error = load_parts(&out, &all_parts()).unwrap_err();
        assert!(error.to_string().contains("shard-00001.h5") && error.exit_code() == 3, "{error}");
    }
    std::fs::remove_file(&shard).unwrap();
    let error = load_parts(&out, &all_parts()).unwrap_err();
    assert!(error.to_string().contains("shard-00001.h5") && error.exit_code() == 3, "{error}");
    std::fs::write(&shard, &whole).unwrap();
    assert_true(&all_parts(), &load_parts(&out, &all_parts()).unwrap(), 1);
}

/// Whose values a byte of a shard is, by the table of pieces.
fn tensor_at(table: &serde_json::Value, file: &str, byte: usize) -> Option<String> {
    let shard = table.as_array()?.iter().find(|shard| shard["file"] == file)?;
    let piece = shard["pieces"].as_array()?.iter().find(|piece| {
        let n: u64 = piece["slice"]["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
        let (at, size) = (piece["at"].as_u64().unwrap(), if piece["dtype"] == "bf16" { 2 } else { 4 });
        (at..at + n * size).contains(&(byte as u64))
    })?;
    Some(piece["name"].as_str()?.into())
}

/// A flipped bit anywhere in any file of a checkpoint is found before a number reaches a tensor, by loading as by
/// verifying, and the file is named, and the tensor if it is one's. In the manifest a flip may hit what means nothing (blanks, the time of
/// writing, the producer): then what is loaded must still be the truth.
#[test]
fn a_flipped_bit_is_never_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 2);
    let random = Random::new(22, "flips");
    let files = entries(&out);
    assert_eq!(files, ["index.h5", "manifest.json", "pieces.json", "shard-00000.h5", "shard-00001.h5", "tokenizer.model"]);
    let table: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("pieces.json")).unwrap()).unwrap();
    for (n, name) in files.iter().enumerate() {
        let path = out.join(name);
        let whole = std::fs::read(&path).unwrap();
        for case in 0..40 {
            let draw = random.bits((n * 100 + case) as u64);
            let (byte, bit) = (draw as usize % whole.len(), draw >> 61);
            let mut damaged = whole.clone();
            damaged[byte] ^= 1 << bit;
            std::fs::write(&path, &damaged).unwrap();
            let loaded = load_parts(&out, &all_parts());
            match (name.as_str(), loaded) {
                ("manifest.json", Ok(values)) => {
                    assert_true(&all_parts(), &values, 2);
                    let found = checkpoint::open(&out).unwrap();
                    assert_eq!(*found.meta(), meta(model(false), ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 }, 1));
                }
                (_, Ok(_)) => panic!("bit {bit} of byte {byte} of {name} was not noticed"),
                ("manifest.json", Err(error)) => assert_eq!(error.kind(), Kind::File, "{error}"),
                (_, Err(error)) => {
                    assert!(error.to_string().contains(name) && error.exit_code() == 3, "{error}");
                    let report = checkpoint::verify(&out).unwrap();
                    let bad: Vec<&str> = report.iter().filter(|(_, state)| state.is_err()).map(|(file, _)| file.name.as_str()).collect();
                    assert_eq!(bad, [name.as_str()]);
                    if let Some(tensor) = tensor_at(&table, name, byte) {
                        let said = report.iter().find_map(|(_, state)| state.as_ref().err()).unwrap().to_string();
                        assert!(error.to_string().contains(&tensor) && said.contains(&tensor), "{tensor}: {error}; {said}");
                    }
                }
            }
        }
        std::fs::write(&path, &whole).unwrap();
    }
    assert!(checkpoint::verify(&out).unwrap().iter().all(|(_, state)| state.is_ok()));
}

/// A part of a tensor is loaded though another part of it, which was not asked for, is damaged: only what is needed is
/// read. The damaged part is refused.
#[test]
fn only_the_needed_bytes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    let shape = vec![3 << 20, 1];
    let part = |rows: std::ops::Range<usize>| Part {
        name: "weights/long".into(),
        shape: shape.clone(),
        slice: Slice { offset: vec![rows.start, 0], shape: vec![rows.len(), 1] },
        dtype: DType::F32,
    };
    save_parts(&out, &meta(model(false), ParallelLayout::SINGLE, 1), &[part(0..3 << 20)], 3, &Solo::new()).unwrap();
    let shard = out.join("shard-00000.h5");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 5000;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let first = part(1000..2 << 20);
    let values = load_parts(&out, std::slice::from_ref(&first)).unwrap();
    assert_true(&[first], &values, 3);
    assert!(load_parts(&out, &[part(2 << 20..3 << 20)]).unwrap_err().to_string().contains("shard-00000.h5"));
}

/// Of a run, the newest checkpoint that is whole is opened: damage and unfinished directories are passed over.
#[test]
fn a_run_falls_back_to_an_older_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let folder = run.join("checkpoints");
    std::fs::create_dir(&folder).unwrap();
    let error = checkpoint::open(run).map(drop).unwrap_err();
    assert!(error.to_string().contains("has no checkpoint yet"), "{error}");
    for step in [90, 100, 1000] {
        save_small(&folder.join(format!("step-{step:08}")), step, step);
    }
    std::fs::create_dir(folder.join("step-00002000.tmp-77")).unwrap();
    std::fs::create_dir(folder.join("step-00003000")).unwrap(); // a crash of something else
    assert_eq!(checkpoint::open(run).unwrap().meta().step, 1000);
    let newest = folder.join("step-00001000");
    std::fs::remove_file(newest.join("shard-00000.h5")).unwrap();
    assert_eq!(checkpoint::open(run).unwrap().dir(), folder.join("step-00000100"));
    assert_true(&all_parts(), &load_parts(run, &all_parts()).unwrap(), 100);
    // The resumed run comes by the damaged one again: it is moved away, not trusted and not in the way.
    save_small(&newest, 1000, 1000);
    assert_true(&all_parts(), &load_parts(run, &all_parts()).unwrap(), 1000);
    assert!(entries(&folder).contains(&"damaged-0-step-00001000".to_string()), "{:?}", entries(&folder));
    for step in [90, 100, 1000] {
        std::fs::remove_file(folder.join(format!("step-{step:08}/manifest.json"))).unwrap();
    }
    assert_eq!(checkpoint::open(run).map(drop).unwrap_err().exit_code(), 3);
}
