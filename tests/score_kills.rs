//! Evaluations and scores that are killed, stopped and damaged, through the binaries: what was made is not made again, and every file has
//! the bytes of a job that nobody disturbed.

mod golden_evaluations;

use golden_evaluations::{Golden, Place, checkpoint};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use trireme::rng::Random;

/// A job as it is typed, without --out.
struct Job {
    program: &'static str,
    args: Vec<String>,
}

impl Job {
    fn new(program: &'static str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Job {
        Job { program, args: args.iter().map(|arg| arg.as_ref().to_str().unwrap().to_string()).collect() }
    }

    /// On so many ranks, under mpirun when there are several.
    fn run(&self, out: &Path, n_ranks: usize, more: &[&str], fault: &str) -> Output {
        let mut command = Command::new(if n_ranks > 1 { "mpirun" } else { self.program });
        if n_ranks > 1 {
            command.args(["-n", &n_ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", self.program]);
        }
        command.args(&self.args).arg("--out").arg(out).args(more);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1").env("RAYON_NUM_THREADS", "1");
        command.env("TRIREME_FAULT", fault).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command.output().unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Every file of an artifact but its manifest, which has times; HDF5 files have none.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(&path).unwrap())
    };
    entries.map(read).filter(|(name, _)| name != "manifest.json").collect()
}

/// The unfinished directory of `out`, if there is one.
fn unfinished(out: &Path) -> Option<PathBuf> {
    let prefix = format!("{}.tmp-", out.file_name().unwrap().to_str().unwrap());
    let mut entries = std::fs::read_dir(out.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
}

/// Whole and as expected, with nothing beside it.
fn assert_finished(out: &Path, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let found = files(out);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in &found {
        assert!(*bytes == expected[name], "{what}: {name} has other bytes");
    }
    assert_eq!(unfinished(out), None, "{what}");
}

/// An evaluation by likelihood and by generation.
fn evaluation(place: &Place) -> Job {
    Golden::read().write_files(&place.path("data"));
    let (model, data) = (checkpoint(place), place.path("data"));
    let tasks: [&dyn AsRef<std::ffi::OsStr>; 8] =
        [&"run", &"--checkpoint", &model, &"--data", &data, &"--task", &"winogrande", &"--task=bbh_cot_fewshot_snarks"];
    Job::new(env!("CARGO_BIN_EXE_trireme-evaluate"), &tasks)
}

/// Log-probabilities, choices, and rewards by a reward model.
fn scorings(place: &Place) -> Vec<Job> {
    let (model, reward) = (checkpoint(place), place.path("reward"));
    golden_evaluations::import("nemotron-reward", &reward);
    let noise = Random::new(8, "texts");
    let tokens = |key: usize, n: usize| -> Vec<u64> { (0..n).map(|t| noise.bits((key * 100 + t) as u64) % 37).collect() };
    let texts: String = (0..60).map(|i| format!("{{\"id\":\"t{i}\",\"tokens\":{:?}}}\n", tokens(i, 1 + (7 * i) % 24))).collect();
    std::fs::write(place.path("texts.jsonl"), texts).unwrap();
    let choices = |i: usize| (0..4).map(|c| tokens(100 + c, 1 + i % 2 * c)).collect::<Vec<_>>();
    let question = |i: usize| format!("{{\"id\":\"q{i}\",\"context\":{:?},\"choices\":{:?}}}\n", tokens(i / 2, 12 + i % 2), choices(i));
    std::fs::write(place.path("questions.jsonl"), (0..60).map(question).collect::<String>()).unwrap();
    let job = |what: &'static str, model: &Path, input: &str| {
        Job::new(env!("CARGO_BIN_EXE_trireme-score"), &[&what, &"--checkpoint", &model, &"--input", &place.path(input)])
    };
    vec![job("logprobs", &model, "texts.jsonl"), job("choices", &model, "questions.jsonl"), job("rewards", &reward, "texts.jsonl")]
}

/// Ranks and flags of one life.
const LIVES: [(usize, &[&str]); 6] = [
    (1, &["--batch-tokens", "20"]),
    (1, &["--batch-tokens", "300"]),
    (1, &[]),
    (2, &["--batch-tokens", "40"]),
    (2, &["--tp", "2", "--batch-tokens", "60"]),
    (2, &["--pp", "2", "--batch-tokens", "30"]),
];

/// Kills lives of a job at random places, at one of the first `most` times there, until so many were killed, each life with other passes,
/// ranks or layout, then lets it end. How many lives went on with what another had made. An answer made twice, lost, out of order, or
/// dependent on what it was made beside shows.
fn kill_at_random(place: &Place, job: &Job, n_kills: usize, (places, most): (&[&str], usize), seed: u64) -> usize {
    let (undisturbed, out) = (place.path("undisturbed"), place.path("killed"));
    let first = job.run(&undisturbed, 1, &[], "");
    assert!(first.status.success(), "{}", text(&first));
    let expected = files(&undisturbed);
    let random = Random::new(seed, "kills");
    let (mut n_killed, mut n_resumed, mut draw) = (0, 0, 0);
    let mut next = |n: usize| {
        draw += 1;
        (random.bits(draw) % n as u64) as usize
    };
    while n_killed < n_kills {
        let ((n_ranks, flags), at) = (LIVES[next(LIVES.len())], places[next(places.len())]);
        let fault = format!("kill at={at} n={} rank={}", 1 + next(most), next(n_ranks));
        let output = job.run(&out, n_ranks, flags, &fault);
        let said = text(&output);
        n_resumed += usize::from(said.contains("are scored already") || said.contains("are made already"));
        if output.status.success() {
            assert_finished(&out, &expected, &format!("{fault} after {n_killed} kills: {said}"));
            std::fs::remove_dir_all(&out).unwrap();
        } else {
            n_killed += 1;
        }
    }
    let end = job.run(&out, 2, &[], "");
    assert!(end.status.success(), "{}", text(&end));
    assert_finished(&out, &expected, "at the end");
    std::fs::remove_dir_all(&undisturbed).unwrap();
    std::fs::remove_dir_all(&out).unwrap();
    n_resumed
}

/// SIGKILL of random ranks at random places of an evaluation: scores and evidence have the bytes of an undisturbed one.
#[test]
fn a_killed_evaluation_loses_nothing() {
    let place = Place::new();
    let job = evaluation(&place);
    let places = ["forward", "forward", "pass", "io.write", "io.sync", "io.rename", "io.create", "collective"];
    let n_resumed = kill_at_random(&place, &job, 10, (&places, 12), 17);
    assert!(n_resumed >= 3, "only {n_resumed} lives went on from a journal");
}

/// The same of all that trireme-score makes, in lines and HDF5.
#[test]
fn killed_scores_lose_nothing() {
    let place = Place::new();
    let places = ["forward", "forward", "io.write", "io.hdf5", "io.sync", "collective"];
    for (seed, job) in scorings(&place).iter().enumerate() {
        let n_resumed = kill_at_random(&place, job, 6, (&places, 7), 30 + seed as u64);
        assert!(n_resumed >= 1, "{:?}: only {n_resumed} lives went on from a journal", job.args);
    }
}

/// A signal leaves with 75 and the journal; a line of it that was cut off, and one with a flipped bit, are scored again; the rest is not.
/// With other settings the next job refuses and names both, and so does one whose layout has no reproducible numerics when the scores so
/// far do.
#[test]
fn stopped_torn_and_damaged() {
    let place = Place::new();
    let job = evaluation(&place);
    let (undisturbed, out) = (place.path("undisturbed"), place.path("stopped"));
    assert!(job.run(&undisturbed, 1, &[], "").status.success());
    let stopped = job.run(&out, 1, &["--batch-tokens", "30"], "term at=forward n=9");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    let journal = unfinished(&out).unwrap().join("journal/reproducible-00000.lines");
    let mut bytes = std::fs::read(&journal).unwrap();
    let n_made = bytes.iter().filter(|&&byte| byte == b'\n').count();
    assert!((3..12).contains(&n_made), "{n_made} made");
    let line_start = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    bytes[line_start + 25] ^= 1;
    bytes.truncate(bytes.len() - 7);
    std::fs::write(&journal, bytes).unwrap();
    let left = std::fs::read(&journal).unwrap();
    let other = job.run(&out, 1, &["--dtype", "bf16"], "");
    assert!(other.status.code() == Some(3) && text(&other).contains("\"f32\"") && text(&other).contains("\"bf16\""), "{}", text(&other));
    let moved = journal.with_file_name("fast-00000.lines");
    std::fs::rename(&journal, &moved).unwrap();
    let other = job.run(&out, 1, &[], "");
    assert!(other.status.code() == Some(3) && text(&other).contains("has scores in fast numerics"), "{}", text(&other));
    // The job took over the directory before it looked into it.
    let directory = unfinished(&out).unwrap().join("journal");
    let journal = directory.join("reproducible-00000.lines");
    std::fs::rename(directory.join("fast-00000.lines"), &journal).unwrap();
    assert_eq!(std::fs::read(&journal).unwrap(), left, "what refused changed something");
    let end = job.run(&out, 1, &[], "");
    let said = text(&end);
    assert!(end.status.success() && said.contains(&format!(": {} of ", n_made - 2)) && said.contains("are scored already"), "{said}");
    assert!(said.contains("1 damaged lines"), "{said}");
    assert_finished(&out, &files(&undisturbed), "stopped, torn and damaged");
    let again = job.run(&out, 1, &[], "");
    assert!(again.status.success() && text(&again).contains("finished already"), "{}", text(&again));
}

/// A signal in the middle of the generated answers: the likelihoods and the answers so far are not made again.
#[test]
fn a_signal_among_generated_answers() {
    let place = Place::new();
    let job = evaluation(&place);
    let (undisturbed, out) = (place.path("undisturbed"), place.path("stopped"));
    assert!(job.run(&undisturbed, 1, &[], "").status.success());
    let stopped = job.run(&out, 1, &["--batch", "1"], "usr1 at=pass n=20");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    let journal = unfinished(&out).unwrap().join("journal");
    let n_lines = |name: &str| std::fs::read_to_string(journal.join(name)).unwrap().lines().count();
    assert!(n_lines("part-00000.lines") == 1 && n_lines("reproducible-00000.lines") > 5);
    let end = job.run(&out, 2, &["--tp", "2"], "kill at=forward n=1");
    assert!(end.status.success(), "a likelihood was made again: {}", text(&end));
    assert!(text(&end).contains("1 of 2 responses are made already"), "{}", text(&end));
    assert_finished(&out, &files(&undisturbed), "after a signal among answers");
}

/// A journal that cannot be written, on one rank of two, ends the job on both with that rank's error; what both had kept by then is not
/// made again.
#[test]
fn a_full_disk_of_one_rank_ends_all() {
    let place = Place::new();
    let (job, undisturbed, out) = (&scorings(&place)[0], place.path("undisturbed"), place.path("full"));
    assert!(job.run(&undisturbed, 1, &[], "").status.success());
    let full = job.run(&out, 2, &["--batch-tokens", "30"], "enospc at=io.write n=5 rank=1");
    let said = text(&full);
    assert!(!full.status.success() && said.contains("No space left on device") && said.contains("reproducible-00001.lines"), "{said}");
    let end = job.run(&out, 1, &[], "");
    assert!(end.status.success() && text(&end).contains("of 60 sequences are scored already"), "{}", text(&end));
    assert_finished(&out, &files(&undisturbed), "after a full disk");
}
