//! Saves on a disk that fails, in one process, by planned faults (`trireme::fault`): a crash or an error at every step of writing,
//! short and interrupted writes, a disk so slow that training overtakes the save. A plan holds for the whole process, so every test
//! here holds one, and they run one after the other.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::Path;
use trireme::checkpoint::retention::Retention;
use trireme::checkpoint::snapshot::{self, Options, Started};
use trireme::checkpoint::{self, Meta, Piece, Wanted};
use trireme::comm::threads;
use trireme::error::Result;
use trireme::fault;
use trireme::metrics;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::recipe::{Precision, Pretrain};
use trireme::tensor::{DType, Tensor};
use trireme::train::pretrain::Ended;

const SHAPE: [usize; 2] = [6, 50_000];

/// The value of an element of the checkpoint of `step`, by its global index.
fn value(step: u64, index: usize) -> f32 {
    (index as f32 + 0.5) * (step as f32 + 1.0)
}

/// Saves step `step` from two ranks, half of one tensor and one small tensor each, and removes all but the last two.
fn save(folder: &Path, step: u64) -> Vec<Result<()>> {
    let options = Options { copy_bytes: 0, retention: Retention { keep_last: Some(2), keep_every: None, ..Retention::default() } };
    threads::run(2, |world| {
        let (rank, rows) = (world.rank(), SHAPE[0] / 2);
        let numbers = |n: usize, first: usize| (0..n).map(|i| value(step, first + i)).collect::<Vec<f32>>();
        let half = Tensor::from_f32(&[rows, SHAPE[1]], &numbers(rows * SHAPE[1], rank * rows * SHAPE[1]));
        let small = Tensor::from_f32(&[3], &numbers(3, rank));
        let offset = vec![rank * rows, 0];
        let pieces = [
            Piece {
                name: "weights/big".into(),
                global_shape: SHAPE.into(),
                slice: Slice { offset, shape: vec![rows, SHAPE[1]] },
                tensor: &half,
            },
            Piece { name: format!("weights/small{rank}"), global_shape: vec![3], slice: Slice::whole(&[3]), tensor: &small },
        ];
        let layout = ParallelLayout { tp: 1, pp: 1, dp: 2, vp: 1 };
        let model = common::tiny_model();
        let (recipe, tokenizer) = (serde_json::json!({}), Some(b"a tokenizer".to_vec()));
        let meta = Meta {
            step,
            consumed_samples: step,
            model,
            layout,
            recipe,
            data_fingerprint: String::new(),
            tokenizer,
            companions: Default::default(),
            trainer: serde_json::Value::Null,
        };
        match snapshot::start(&folder.join(format!("step-{step:08}")), &meta, &pieces, options, &*world)? {
            Started::Saving(saving) => saving.wait(&*world).map(drop),
            Started::Finished(_) => Ok(()),
        }
    })
}

/// The step of the checkpoint that a run would go on from; its values are checked.
fn newest(run: &Path) -> u64 {
    let stored = checkpoint::open(run).unwrap();
    let step = stored.meta().step;
    for (name, shape, first) in [("weights/big", vec![6, 50_000], 0), ("weights/small0", vec![3], 0), ("weights/small1", vec![3], 1)] {
        let mut tensor = Tensor::host(&shape, DType::F32, None).unwrap();
        stored.read(&mut [Wanted { name: name.into(), slice: Slice::whole(&shape), tensor: &mut tensor }]).unwrap();
        assert!(tensor.f32().iter().enumerate().all(|(i, &found)| found == value(step, first + i)), "{name} of step {step}");
    }
    step
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A run with checkpoints 1, 2 and 3, saved without faults; its folder of checkpoints.
fn begun(run: &Path) -> std::path::PathBuf {
    let folder = run.join("checkpoints");
    let _no_faults = fault::plan("");
    for step in 1..=3 {
        save(&folder, step).into_iter().for_each(|result| result.unwrap());
    }
    assert_eq!(names(&folder), ["step-00000002", "step-00000003"]);
    folder
}

/// Nothing changes on the disk from the n-th step of writing on, for every n: what is left, as after a crash there, goes on from the
/// checkpoint before or from the new one, whole; and the next save of that step works and leaves no traces of the crash. A rename
/// before an fsync, a manifest before a shard, or a removal before the commit would show here.
#[test]
fn a_crash_at_every_step_of_writing() {
    let (mut n, mut before, mut after) = (0, 0, 0);
    loop {
        n += 1;
        let run = tempfile::tempdir().unwrap();
        let folder = begun(run.path());
        let planned = fault::plan(&format!("crash at=io n={n}"));
        let results = save(&folder, 4);
        let crashed = planned.is_over();
        drop(planned);
        let step = newest(run.path());
        assert!(step == 3 || step == 4, "crash {n}: goes on from {step}");
        assert_eq!(results[0], results[1], "crash {n}: the ranks left by different doors");
        assert!(results[0].is_err() || step == 4, "crash {n}: told as saved, but it is not");
        if step == 3 {
            before += 1
        } else {
            after += 1
        }
        let _no_faults = fault::plan("");
        save(&folder, 4).into_iter().for_each(|result| result.unwrap());
        save(&folder, 5).into_iter().for_each(|result| result.unwrap());
        assert_eq!(names(&folder), ["step-00000004", "step-00000005"], "crash {n}");
        assert_eq!(newest(run.path()), 5);
        if !crashed {
            break;
        }
    }
    assert!(before > 20 && after > 2, "{before} crashes before the commit and {after} after it");
}

/// A full disk, a quota, a broken disk at every step of writing: the same one-line error with exit code 3 on all ranks, the checkpoint
/// before is what the run goes on from, and nothing is left that would be in the way of the next save.
#[test]
fn an_error_at_every_step_of_writing() {
    for (how, says) in [("enospc", "free some space"), ("edquot", "free some space"), ("eio", "Input/output error")] {
        let run = tempfile::tempdir().unwrap();
        let folder = begun(run.path());
        for n in 1.. {
            let planned = fault::plan(&format!("{how} at=io n={n}"));
            let results = save(&folder, 4);
            let failed = planned.is_over();
            drop(planned);
            assert_eq!(results[0], results[1], "{how} {n}");
            match &results[0] {
                Err(error) => {
                    assert_eq!(error.exit_code(), 3, "{how} {n}: {error}");
                    let text = error.to_string();
                    let says_what = text.contains(says) || text.contains("make room in");
                    assert!(says_what && !text.contains('\n') && text.contains("step-00000004"), "{how} {n}: {text}");
                    // The very last steps make durable what has its name already.
                    assert!(names(&folder).iter().all(|name| !name.contains(".tmp-")), "{how} {n}: {:?}", names(&folder));
                }
                // Only what comes after the commit may fail without an error: removing older ones.
                Ok(()) => assert_eq!(newest(run.path()), 4, "{how} {n}"),
            }
            let step = newest(run.path());
            assert!(step == 3 || step == 4, "{how} {n}");
            if !failed {
                assert!(n > 20, "only {n} steps were counted");
                break;
            }
            let _no_faults = fault::plan("");
            if step == 4 {
                std::fs::remove_dir_all(folder.join("step-00000004")).unwrap();
            }
            if !folder.join("step-00000002").exists() {
                let _ = std::fs::remove_dir_all(folder.join("step-00000003"));
                save(&folder, 2).into_iter().for_each(|result| result.unwrap());
                save(&folder, 3).into_iter().for_each(|result| result.unwrap());
            }
        }
    }
}

/// A disk too small for one checkpoint more, a real one: what retention would remove afterwards is removed before, oldest first, and the
/// save succeeds, again and again; with nothing to remove any more it is refused before a byte is written, with both sizes, and the
/// newest checkpoint stays. Takes root (to mount a disk).
#[test]
fn room_is_made_on_a_small_disk() {
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(self.0.path()).status();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    // Two checkpoints of 1.2 MB fit, three do not.
    let mount = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=3300k", "tmpfs"]).arg(dir.path()).output();
    match mount {
        Ok(output) if output.status.success() => {}
        other => return println!("skipped: no disk could be mounted: {other:?}"),
    }
    let disk = Mounted(dir);
    let folder = disk.0.path().join("run/checkpoints");
    let _no_faults = fault::plan("");
    for step in 1..=5 {
        save(&folder, step).into_iter().for_each(|result| result.unwrap());
        assert_eq!(newest(folder.parent().unwrap()), step);
        // Without room for three there would be two; the older of them had to go before the third was written.
        let expected = if step == 1 { vec![1] } else { vec![step - 1, step] };
        assert_eq!(names(&folder), expected.iter().map(|step| format!("step-{step:08}")).collect::<Vec<_>>());
    }
    // Somebody else's file takes what the older one could give.
    std::fs::write(disk.0.path().join("other"), vec![1; 700_000]).unwrap();
    std::fs::remove_dir_all(folder.join("step-00000004")).unwrap();
    std::fs::write(disk.0.path().join("another"), vec![1; 1_000_000]).unwrap();
    for result in save(&folder, 6) {
        let error = result.unwrap_err();
        assert!(error.exit_code() == 3 && error.to_string().contains("needs 2 MiB, the file system has 0 MiB left"), "{error}");
    }
    assert_eq!(names(&folder), ["step-00000005"]);
    assert_eq!(newest(folder.parent().unwrap()), 5);
}

/// Writes that take half of what they are given, and interrupted ones, are gone on with: the checkpoint is whole.
#[test]
fn short_and_interrupted_writes() {
    for how in ["short at=io.write", "eintr at=io.write n=1", "eintr at=io.write n=4"] {
        let run = tempfile::tempdir().unwrap();
        let folder = begun(run.path());
        let planned = fault::plan(how);
        save(&folder, 4).into_iter().for_each(|result| result.unwrap());
        assert!(planned.is_over(), "{how}");
        drop(planned);
        assert_eq!(newest(run.path()), 4, "{how}");
        assert!(checkpoint::verify(&folder.join("step-00000004")).unwrap().iter().all(|(_, state)| state.is_ok()), "{how}");
    }
}

fn recipe_in(dir: &Path, precision: Precision) -> Pretrain {
    let shards = dir.join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    recipe.train.precision = precision;
    recipe.train.samples = 6 * 8;
    (recipe.parallel.tp, recipe.parallel.dp) = (1, Some(2));
    recipe
}

/// The checksums of the shards of a checkpoint: equal bytes are equal checkpoints, as one layout wrote them.
fn shards_of(run: &Path, step: u64) -> Vec<(String, String)> {
    let manifest = trireme::artifact::Manifest::open(&run.join(format!("checkpoints/step-{step:08}")), checkpoint::KIND).unwrap();
    let shards = manifest.files.into_iter().filter(|file| file.name.starts_with("shard-"));
    shards.map(|file| (file.name, file.xxh3)).collect()
}

/// On a disk so slow that training comes by every parameter before it is written, a checkpoint still holds the state of its step, and
/// training the numbers of a run that never saves: the optimizer copies a piece or waits for it. With room for copies of everything it
/// does not wait.
#[test]
fn training_overtakes_a_slow_save() {
    let dir = tempfile::tempdir().unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let recipe = recipe_in(dir.path(), precision);
        let path = |name: &str| dir.path().join(format!("{name}-{precision:?}"));
        let no_faults = fault::plan("");
        assert_eq!(train(&recipe, &path("plain"), None).unwrap(), Ended::Finished);
        let mut every = recipe.clone();
        every.checkpoint.every_steps = 1;
        for step in 1..=6 {
            train(&recipe, &path("steps"), Some(step)).unwrap();
        }
        drop(no_faults);
        for copy_mib in [0, 64] {
            every.checkpoint.copy_mib = copy_mib;
            let out = path(&format!("beside-{copy_mib}"));
            let planned = fault::plan("slow at=io.write");
            assert_eq!(train(&every, &out, None).unwrap(), Ended::Finished);
            assert!(planned.is_over());
            for step in 1..=6 {
                assert_eq!(shards_of(&out, step), shards_of(&path("steps"), step), "step {step}, {copy_mib} MiB");
            }
            let losses = |run: &Path| metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(|row| row.loss).collect::<Vec<f64>>();
            assert_eq!(losses(&out), losses(&path("plain")));
        }
    }
}

/// A flipped bit among the numbers of the newest checkpoint, in a shard that one rank alone reads: all ranks go on from the one
/// before, and the run ends with the bits of an undisturbed one. When no checkpoint is whole the run ends with the damage, not anew.
#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe_in(dir.path(), Precision::F32);
    let _no_faults = fault::plan("");
    let (straight, damaged) = (dir.path().join("straight"), dir.path().join("damaged"));
    train(&recipe, &straight, None).unwrap();
    recipe.checkpoint.every_steps = 2;
    train(&recipe, &damaged, Some(4)).unwrap();
    let flip = |step: u64| {
        let path = damaged.join(format!("checkpoints/step-{step:08}/shard-00001.h5"));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(&path, bytes).unwrap();
    };
    flip(4);
    assert_eq!(train(&recipe, &damaged, None).unwrap(), Ended::Finished);
    assert_eq!(shards_of(&damaged, 6), shards_of(&straight, 6));
    assert_eq!(shards_of(&damaged, 4).len(), 2, "the damaged one made way for a whole one");
    assert!(names(&damaged.join("checkpoints")).contains(&"damaged-0-step-00000004".into()));

    let lost = dir.path().join("lost");
    train(&recipe, &lost, Some(2)).unwrap();
    let path = lost.join("checkpoints/step-00000002/shard-00000.h5");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = train(&recipe, &lost, None).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("shard-00000.h5"), "{error}");
}
