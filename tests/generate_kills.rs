//! Generation that is killed, stopped and damaged, through the binary: what was made is not made again, and the response file has the
//! bytes of a run that nobody disturbed.

mod common;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use trireme::rng::Random;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A model of a few steps and 20 requests for 36 responses of all kinds.
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let shards = place.path("shards");
        write_megatron(&shards, "train", &counting_documents(60, 61, 1));
        let mut recipe = tiny_recipe(&shards);
        recipe.model.n_layers = 2;
        train(&recipe, &place.path("run"), None).unwrap();
        let more = [
            "",
            r#","temperature":0"#,
            r#","n":4,"logprobs":3"#,
            r#","temperature":0.7,"top_p":0.9,"repetition_penalty":1.3"#,
            r#","n":2,"min_p":0.05,"seed":7,"logprobs":0"#,
        ];
        let line = |i: usize| {
            let tokens: Vec<usize> = (0..1 + i % 7).map(|k| (5 * i + k) % 61).collect();
            format!("{{\"id\":\"r{i}\",\"tokens\":{tokens:?},\"max_new_tokens\":{}{}}}\n", 3 + i % 11, more[i % more.len()])
        };
        std::fs::write(place.path("requests.jsonl"), (0..20).map(line).collect::<String>()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A job on so many ranks, under mpirun when there are several.
    fn run(&self, out: &str, n_ranks: usize, more: &[&str], fault: &str) -> Output {
        let program = env!("CARGO_BIN_EXE_trireme-generate");
        let mut command = Command::new(if n_ranks > 1 { "mpirun" } else { program });
        if n_ranks > 1 {
            command.args(["-n", &n_ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", program]);
        }
        command.arg("--checkpoint").arg(self.path("run")).arg("--requests").arg(self.path("requests.jsonl"));
        command.arg("--out").arg(self.path(out)).args(more);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1").env("RAYON_NUM_THREADS", "1");
        command.env("TRIREME_FAULT", fault).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command.output().unwrap()
    }

    fn responses(&self, out: &str) -> String {
        std::fs::read_to_string(self.path(out).join("responses.jsonl")).unwrap()
    }

    /// The unfinished directory of `out`, if there is one.
    fn unfinished(&self, out: &str) -> Option<PathBuf> {
        let mut entries = std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let prefix = format!("{out}.tmp-");
        entries.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
    }

    /// Whole and as expected, with nothing beside it.
    fn assert_finished(&self, out: &str, expected: &str, what: &str) {
        assert_same(&self.responses(out), expected, what);
        assert_eq!(self.unfinished(out), None, "{what}");
        assert!(!self.path(out).join("journal").exists(), "{what}");
    }
}

/// The same bytes; the first line that is another is shown.
fn assert_same(found: &str, expected: &str, what: &str) {
    let differs = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert!(differs.is_none(), "{what}: {} is not {}", differs.unwrap().0, differs.unwrap().1);
    assert!(found == expected, "{what}: {} lines of {}", found.lines().count(), expected.lines().count());
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn part(unfinished: &Path) -> PathBuf {
    unfinished.join("journal/part-00000.lines")
}

/// Ranks and flags of one life.
const LIVES: [(usize, &[&str]); 6] = [
    (1, &["--batch", "1"]),
    (1, &["--batch", "7"]),
    (1, &[]),
    (2, &["--batch", "3"]),
    (2, &["--tp", "2"]),
    (2, &["--pp", "2", "--batch", "4"]),
];

/// SIGKILL of random ranks at random places, each life with another batch, number of ranks or layout: the file that stands there in the
/// end has the bytes of an undisturbed run. A response made twice, lost, out of order, or dependent on what it was made beside shows.
#[test]
fn random_kills_change_no_byte() {
    let place = Place::new();
    assert!(place.run("undisturbed", 1, &["--batch", "5"], "").status.success());
    let expected = place.responses("undisturbed");
    assert_eq!(expected.lines().count(), 36);
    let random = Random::new(17, "kills");
    let places = ["pass", "pass", "io.write", "io.sync", "io.rename", "io.remove", "io.create", "collective"];
    let (mut n_kills, mut n_resumed, mut draw) = (0, 0, 0);
    let mut next = |n: usize| {
        draw += 1;
        (random.bits(draw) % n as u64) as usize
    };
    while n_kills < 12 {
        let ((n_ranks, flags), at) = (LIVES[next(LIVES.len())], places[next(places.len())]);
        let fault = format!("kill at={at} n={} rank={}", 1 + next(if at == "pass" { 25 } else { 8 }), next(n_ranks));
        let output = place.run("killed", n_ranks, flags, &fault);
        n_resumed += usize::from(text(&output).contains("are made already"));
        if output.status.success() {
            place.assert_finished("killed", &expected, &format!("{fault} after {n_kills} kills: {}", text(&output)));
            std::fs::remove_dir_all(place.path("killed")).unwrap();
        } else {
            n_kills += 1;
        }
    }
    assert!(n_resumed >= 3, "only {n_resumed} lives went on from a journal");
    let end = place.run("killed", 2, &[], "");
    assert!(end.status.success(), "{}", text(&end));
    place.assert_finished("killed", &expected, "at the end");
}

/// One process, killed at every single step of writing: journal, merging, manifest, the last rename.
#[test]
fn killed_at_every_step_of_writing() {
    let place = Place::new();
    std::fs::write(place.path("requests.jsonl"), "{\"id\":\"a\",\"tokens\":[1],\"max_new_tokens\":3,\"n\":3}\n").unwrap();
    assert!(place.run("undisturbed", 1, &[], "").status.success());
    let expected = place.responses("undisturbed");
    for n in 1.. {
        let killed = place.run("killed", 1, &["--batch", "2"], &format!("kill at=io n={n}"));
        if killed.status.success() {
            assert!(n > 15, "{n} steps");
            break;
        }
        let end = place.run("killed", 1, &[], "");
        assert!(end.status.success(), "{n}: {}", text(&end));
        place.assert_finished("killed", &expected, &format!("step {n}"));
        std::fs::remove_dir_all(place.path("killed")).unwrap();
    }
}

/// A signal leaves with 75 and the journal; a line of it that was cut off, and one with a flipped bit, are made again; the rest is not.
#[test]
fn stopped_torn_and_damaged() {
    let place = Place::new();
    assert!(place.run("undisturbed", 1, &[], "").status.success());
    let expected = place.responses("undisturbed");
    let stopped = place.run("stopped", 1, &["--batch", "4"], "term at=pass n=30");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    let journal = part(&place.unfinished("stopped").unwrap());
    let mut bytes = std::fs::read(&journal).unwrap();
    let n_made = bytes.iter().filter(|&&byte| byte == b'\n').count();
    assert!((5..36).contains(&n_made), "{n_made} made");
    let line_start = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    bytes[line_start + 40] ^= 1;
    bytes.truncate(bytes.len() - 7);
    std::fs::write(&journal, bytes).unwrap();
    let end = place.run("stopped", 1, &[], "");
    let said = text(&end);
    assert!(end.status.success() && said.contains(&format!("{} of 36 responses are made already", n_made - 2)), "{said}");
    assert!(said.contains("1 damaged lines"), "{said}");
    place.assert_finished("stopped", &expected, "stopped, torn and damaged");
}

/// What an interrupted job left belongs to its inputs and settings: with a changed request file or other settings the next job refuses,
/// names both values, and loses nothing; another program does not write there either; with the old ones it goes on.
#[test]
fn changed_inputs_are_refused() {
    let place = Place::new();
    let requests = std::fs::read(place.path("requests.jsonl")).unwrap();
    assert!(place.run("undisturbed", 1, &[], "").status.success());
    let stopped = place.run("out", 1, &["--batch", "4"], "term at=pass n=30");
    assert_eq!(stopped.status.code(), Some(75), "{}", text(&stopped));
    let left = std::fs::read(part(&place.unfinished("out").unwrap())).unwrap();
    let fingerprint = |bytes: &[u8]| format!("requests {:016x}", xxhash_rust::xxh3::xxh3_64(bytes));
    let changed = [&requests[..], b"{\"id\":\"new\",\"tokens\":[1],\"max_new_tokens\":3}\n"].concat();
    std::fs::write(place.path("requests.jsonl"), &changed).unwrap();
    let refused = place.run("out", 1, &[], "");
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains(&fingerprint(&requests)) && said.contains(&fingerprint(&changed)) && said.contains("begin anew"), "{said}");
    std::fs::write(place.path("requests.jsonl"), &requests).unwrap();
    let refused = place.run("out", 1, &["--dtype", "bf16"], "");
    assert!(refused.status.code() == Some(3) && text(&refused).contains("\"f32\"") && text(&refused).contains("\"bf16\""));
    std::fs::write(place.path("sequences.jsonl"), "{\"id\":\"a\",\"tokens\":[1,2]}\n").unwrap();
    let mut score = Command::new(env!("CARGO_BIN_EXE_trireme-score"));
    score.arg("logprobs").arg("--checkpoint").arg(place.path("run")).arg("--input").arg(place.path("sequences.jsonl"));
    let scored = score.arg("--out").arg(place.path("out")).output().unwrap();
    assert!(scored.status.code() == Some(3) && text(&scored).contains("left unfinished responses there"), "{}", text(&scored));
    assert_eq!(std::fs::read(part(&place.unfinished("out").unwrap())).unwrap(), left);
    let end = place.run("out", 1, &[], "");
    assert!(end.status.success() && text(&end).contains("are made already"), "{}", text(&end));
    place.assert_finished("out", &place.responses("undisturbed"), "after refusals");
    let again = place.run("out", 1, &[], "");
    assert!(again.status.success() && text(&again).contains("finished already"), "{}", text(&again));
}

/// With --on-bad-request record a wrong line costs only itself: its response says what was wrong with which line, in its place.
#[test]
fn wrong_requests_are_recorded() {
    let place = Place::new();
    let lines = [
        r#"{"id":"good","tokens":[1,2],"max_new_tokens":2}"#,
        r#"{"id":"long","tokens":[1],"max_new_tokens":2,"top_p":3}"#,
        "",
        "{",
        r#"{"id":"last","tokens":[3],"max_new_tokens":2,"n":2}"#,
        r#"{"id":"empty","tokens":[],"max_new_tokens":2}"#,
    ];
    std::fs::write(place.path("requests.jsonl"), lines.join("\n")).unwrap();
    let refused = place.run("out", 1, &[], "");
    assert!(refused.status.code() == Some(3) && text(&refused).contains("line 2: top_p is 3"), "{}", text(&refused));
    let recorded = place.run("out", 1, &["--on-bad-request", "record"], "");
    assert!(recorded.status.success() && text(&recorded).contains("3 wrong requests"), "{}", text(&recorded));
    let found: Vec<serde_json::Value> = place.responses("out").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |key: &str| found.iter().map(|line| line[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("id"), ["good", "long", "", "last", "last", "empty"]);
    assert_eq!(of("index"), [0, 0, 0, 0, 1, 0]);
    assert_eq!(of("finish_reason"), ["length", "error", "error", "length", "length", "error"]);
    let starts = |i: usize, start: &str| found[i]["error"].as_str().is_some_and(|error| error.starts_with(start));
    assert!(starts(1, "line 2: top_p") && starts(2, "line 4: ") && starts(5, "line 6: the prompt is empty"), "{found:?}");
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(place.path("out/manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["counts"]["errors"], &manifest["counts"]["responses"]), (&3.into(), &3.into()));
}
