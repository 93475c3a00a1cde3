//! Saves that fail or are killed, in processes of their own.

use crate::parts::*;
use std::path::{Path, PathBuf};
use trireme::artifact::Manifest;
use trireme::checkpoint;
use trireme::comm::threads;
use trireme::parallel::layout::ParallelLayout;
use trireme::rng::Random;

/// A child process of this test, told by the environment what to do; its standard output.
fn child(test: &str, shell_prefix: &str, dir: &Path) -> std::process::Child {
    let me = std::env::current_exe().unwrap();
    let line = format!("{shell_prefix} exec '{}' --exact {test} --nocapture", me.display());
    std::process::Command::new("bash")
        .args(["-c", &line])
        .env("TRIREME_TEST_CHILD", dir)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

fn as_child() -> Option<PathBuf> {
    std::env::var_os("TRIREME_TEST_CHILD").map(PathBuf::from)
}

/// Saves step 2 on two ranks and prints what each of them got.
fn save_and_tell(folder: &Path) {
    let layout = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    let results = threads::run(2, |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(&folder.join("step-00000002"), &meta(model(false), layout, 2), &parts, 2, &*world)
    });
    for result in results {
        println!("rank got: {}", result.map_or_else(|error| format!("{} {error}", error.exit_code()), |_| "saved".into()));
    }
}

fn assert_unharmed(run: &Path, results: &[String], limit: &str) {
    let folder = run.join("checkpoints");
    assert_eq!(results.len(), 2, "{limit}: {results:?}");
    assert_eq!(results[0], results[1], "{limit}: the ranks left by different doors");
    if results[0] == "saved" {
        assert_eq!(entries(&folder), ["step-00000001", "step-00000002"], "{limit}");
        assert_true(&all_parts(), &load_parts(&folder.join("step-00000002"), &all_parts()).unwrap(), 2);
    } else {
        assert_eq!(entries(&folder), ["step-00000001"], "{limit}: {results:?}");
    }
    assert_true(&all_parts(), &load_parts(&folder.join("step-00000001"), &all_parts()).unwrap(), 1);
}

fn results_of(child: std::process::Child) -> Vec<String> {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let results: Vec<String> = text.lines().filter_map(|line| line.split_once("rank got: ")).map(|(_, result)| result.into()).collect();
    assert!(!results.is_empty(), "the child said {text} {}", String::from_utf8_lossy(&output.stderr));
    results
}

/// A save that fails at the n-th kilobyte of a file (the limit on file sizes stands in for every write error) gives all
/// ranks the same error, leaves the previous checkpoint loadable, and nothing under the name of the new one.
#[test]
fn a_failing_write_leaves_nothing_behind() {
    if let Some(folder) = as_child() {
        return save_and_tell(&folder);
    }
    let mut failures = 0;
    for kilobytes in [0, 1, 3, 20, 60, 100, 140, 100_000] {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join("checkpoints");
        save_small(&folder.join("step-00000001"), 1, 1);
        let results =
            results_of(child("faults::a_failing_write_leaves_nothing_behind", &format!("trap '' XFSZ; ulimit -f {kilobytes};"), &folder));
        println!("{kilobytes} KB: {}", results[0]);
        failures += usize::from(results[0] != "saved");
        assert_unharmed(run.path(), &results, &format!("{kilobytes} KB"));
    }
    assert!((4..8).contains(&failures), "{failures} of 8 limits bit");
}

/// A disk without room for a checkpoint, however little is missing: found before anything is written, an error with both sizes and
/// the remedy, exit code 3, on all ranks; nothing left behind.
#[test]
fn a_full_disk_is_an_error_with_a_remedy() {
    if let Some(folder) = as_child() {
        save_small(&folder.join("step-00000001"), 1, 1);
        // The small file system is filled until so many percent of what a checkpoint needs are left.
        let percent: u64 = std::env::var("TRIREME_TEST_REST").unwrap().parse().unwrap();
        let pages = |name: &String| std::fs::metadata(folder.join("step-00000001").join(name)).unwrap().len().div_ceil(4096);
        let rest = entries(&folder.join("step-00000001")).iter().map(pages).sum::<u64>() * percent / 100;
        let ballast = std::fs::File::create(folder.join("../ballast")).unwrap();
        let block = [0u8; 4096];
        while std::io::Write::write_all(&mut &ballast, &block).is_ok() {}
        let filled = ballast.metadata().unwrap().len();
        ballast.set_len(filled.saturating_sub(rest * 4096)).unwrap();
        save_and_tell(&folder);
        assert_true(&all_parts(), &load_parts(&folder.join("step-00000001"), &all_parts()).unwrap(), 1);
        return println!("left: {}", entries(&folder).join(" "));
    }
    let possible = std::process::Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return println!("skipped: no permission to mount a small tmpfs in a namespace of its own");
    }
    for rest in [0, 1, 10, 40, 60, 75, 85, 92, 97] {
        let dir = tempfile::tempdir().unwrap();
        let me = std::env::current_exe().unwrap();
        let (place, test) = (dir.path().display(), "faults::a_full_disk_is_an_error_with_a_remedy");
        let line = format!(
            "mount -t tmpfs -o size=4m tmpfs '{place}' && TRIREME_TEST_CHILD='{place}/checkpoints' TRIREME_TEST_REST={rest} \
             exec '{}' --exact {test} --nocapture",
            me.display()
        );
        let output = std::process::Command::new("unshare").args(["-m", "bash", "-c", &line]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let results: Vec<&str> = text.lines().filter_map(|line| line.split_once("rank got: ")).map(|(_, result)| result).collect();
        assert!(text.contains("left: step-00000001\n"), "{text} {}", String::from_utf8_lossy(&output.stderr));
        println!("{rest} %: {}", results[0]);
        assert_eq!(results.len(), 2);
        assert_eq!(results[0], results[1]);
        assert!(results[0].starts_with("3 ") && results[0].contains("free some space"), "{rest}: {}", results[0]);
    }
}

/// SIGKILL at any moment leaves a run whose newest checkpoint is whole and holds the truth: a directory has its final
/// name only after everything in it is on the disk.
#[test]
fn a_killed_save_leaves_whole_checkpoints() {
    if let Some(folder) = as_child() {
        for step in 1.. {
            save_small(&folder.join(format!("step-{step:08}")), step, step);
            println!("saved {step}");
        }
    }
    let random = Random::new(23, "kill times");
    let run = tempfile::tempdir().unwrap();
    let folder = run.path().join("checkpoints");
    std::fs::create_dir(&folder).unwrap();
    for case in 0..6 {
        let mut process = child("faults::a_killed_save_leaves_whole_checkpoints", "", &folder);
        // Killed at some moment after the first save of this life; how many more there are does not matter.
        let mut told = String::new();
        let mut lines = std::io::BufReader::new(process.stdout.take().unwrap());
        while !told.contains("saved") {
            assert!(std::io::BufRead::read_line(&mut lines, &mut told).unwrap() > 0, "the child ended: {told}");
        }
        std::thread::sleep(std::time::Duration::from_micros(random.bits(case) % 30_000));
        process.kill().unwrap();
        process.wait().unwrap();
        let newest = checkpoint::open(run.path()).unwrap();
        let step = newest.meta().step;
        assert_true(&all_parts(), &load_parts(run.path(), &all_parts()).unwrap(), step);
        for name in entries(&folder).iter().filter(|name| name.starts_with("step-") && !name.contains(".tmp-")) {
            assert!(Manifest::open(&folder.join(name), checkpoint::KIND).is_ok(), "{name} is not whole");
        }
    }
    // Whoever writes a checkpoint next removes what a killed job left of it.
    for name in entries(&folder).iter().filter_map(|name| name.split_once(".tmp-")).map(|(name, _)| name) {
        let step = name["step-".len()..].parse().unwrap();
        save_small(&folder.join(name), step, step);
    }
    assert!(!entries(&folder).iter().any(|name| name.contains(".tmp-")), "{:?}", entries(&folder));
}
