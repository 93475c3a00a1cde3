//! What a checkpoint does not answer, what is not overwritten, and what makes two checkpoints the same.

use crate::parts::*;
use std::path::Path;
use trireme::artifact::Manifest;
use trireme::checkpoint;
use trireme::comm::solo::Solo;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::tensor::DType;

/// Questions that a checkpoint cannot answer are refused with both sides named.
#[test]
fn unanswerable_questions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (full, bare) = (dir.path().join("full"), dir.path().join("bare"));
    save_small(&full, 1, 4);
    let weights: Vec<Part> = all_parts().into_iter().filter(|part| part.name.starts_with("weights/")).collect();
    save_parts(&bare, &meta(model(false), ParallelLayout::SINGLE, 0), &weights, 4, &Solo::new()).unwrap();
    let ask = |from: &Path, name: &str, slice: Slice| {
        let part = Part { name: name.into(), shape: slice.shape.clone(), slice, dtype: DType::F32 };
        load_parts(from, &[part]).unwrap_err().to_string()
    };
    let error = ask(&full, "weights/layers.0.attention.qvk.weight", Slice::whole(&[96, 24]));
    assert!(error.contains("nearest is weights/layers.0.attention.qkv.weight"), "{error}");
    let error = ask(&full, "weights/final_norm.bias", Slice::whole(&[25]));
    assert!(error.contains("is [24], asked for [25]"), "{error}");
    let error = ask(&bare, "adam_m/final_norm.bias", Slice::whole(&[24]));
    assert!(error.contains("holds weights only"), "{error}");
    assert!(!checkpoint::open(&bare).unwrap().has_optimizer_state());
    let error = checkpoint::open(&dir.path().join("nothing")).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 3);
}

/// The same checkpoint saved again is left as it is; other contents under the same name are refused.
#[test]
fn finished_checkpoints_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 1);
    let before = std::fs::metadata(out.join("shard-00000.h5")).unwrap().modified().unwrap();
    save_small(&out, 1, 1);
    assert_eq!(std::fs::metadata(out.join("shard-00000.h5")).unwrap().modified().unwrap(), before);
    let mut other = meta(model(false), ParallelLayout::SINGLE, 1);
    other.recipe = serde_json::json!({"train": {"seed": 8}});
    let error = save_parts(&out, &other, &all_parts(), 1, &Solo::new()).unwrap_err();
    assert!(error.to_string().contains("other settings"), "{error}");
    assert_eq!(entries(dir.path()), ["c"]);
}

/// Equal contents are equal bytes, whenever they are written: fingerprints name contents. Breaks when HDF5 stores times.
#[test]
fn equal_contents_have_equal_fingerprints() {
    let dir = tempfile::tempdir().unwrap();
    save_small(&dir.path().join("a"), 1, 1);
    std::thread::sleep(std::time::Duration::from_millis(1100)); // HDF5 counts seconds
    save_small(&dir.path().join("b"), 1, 1);
    let fingerprint = |name: &str| Manifest::open(&dir.path().join(name), checkpoint::KIND).unwrap().fingerprint;
    assert_eq!(fingerprint("a"), fingerprint("b"));
}
