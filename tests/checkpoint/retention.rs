//! Which checkpoints of a run stay.

use crate::parts::*;
use std::path::Path;
use trireme::checkpoint;
use trireme::checkpoint::retention::{self, Retention};

fn folder_with(steps: impl IntoIterator<Item = u64>, run: &Path) -> std::path::PathBuf {
    let folder = run.join("checkpoints");
    std::fs::create_dir_all(&folder).unwrap();
    for step in steps {
        save_small(&folder.join(format!("step-{step:08}")), step, step);
    }
    folder
}

fn steps(run: &Path) -> Vec<u64> {
    checkpoint::list(run).unwrap().into_iter().map(|(step, _)| step).collect()
}

/// The last N and every M-th stay, the rest goes, and what an earlier removal left goes too.
#[test]
fn the_last_and_every_mth_stay() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let folder = folder_with(1..=8, run);
    std::fs::create_dir(folder.join("removed-step-00000000")).unwrap();
    retention::apply(&folder, Retention::default()).unwrap();
    assert_eq!(steps(run), [1, 2, 3, 4, 5, 6, 7, 8], "without keep_last all stay");
    retention::apply(&folder, Retention { keep_last: Some(2), keep_every: Some(3), ..Retention::default() }).unwrap();
    assert_eq!(steps(run), [3, 6, 7, 8]);
    assert_eq!(entries(&folder).len(), 4, "{:?}", entries(&folder));
    retention::apply(&folder, Retention { keep_last: Some(1), keep_every: None, ..Retention::default() }).unwrap();
    assert_eq!(steps(run), [8]);
    assert_true(&all_parts(), &load_parts(run, &all_parts()).unwrap(), 8);
}

/// Those that are asked for by their steps stay, and are not counted among the last N.
#[test]
fn some_stay_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder_with(1..=8, dir.path());
    let retention = Retention { keep_last: Some(2), keep_every: None, keep_steps: [Some(3), Some(7)] };
    retention::apply(&folder, retention).unwrap();
    assert_eq!(steps(dir.path()), [3, 7, 8]);
}

/// A damaged checkpoint is not one of the last N: else the only one to go on from could be removed for it. It stays for people.
#[test]
fn damaged_ones_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let folder = folder_with(1..=4, run);
    for step in [3, 4] {
        std::fs::remove_file(folder.join(format!("step-{step:08}/pieces.json"))).unwrap();
    }
    for keep_last in [1, 1, 1] {
        retention::apply(&folder, Retention { keep_last: Some(keep_last), keep_every: None, ..Retention::default() }).unwrap();
        assert_eq!(steps(run), [2, 3, 4]);
    }
    assert_eq!(checkpoint::open(run).unwrap().meta().step, 2);
}

/// What dead jobs left is removed when the next job begins; checkpoints and what people put there are not.
#[test]
fn leftovers_of_dead_jobs_go() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder_with([5], dir.path());
    for name in ["step-00000006.tmp-41", "removed-step-00000001", "damaged-0-step-00000004", "notes.tmp-1"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    retention::remove_unfinished(&folder).unwrap();
    assert_eq!(entries(&folder), ["damaged-0-step-00000004", "notes.tmp-1", "step-00000005"]);
}
