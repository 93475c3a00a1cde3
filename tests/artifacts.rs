//! The artifact contract: whole or not there, whatever happens while it is written; one writer at a time; nothing overwritten.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile, MANIFEST, Manifest, RunLock};
use trireme::error::{Error, Result};
use trireme::rng::Random;

const KIND: &str = "tokenizer";

/// Two files, one of them larger than the write buffer.
fn write(out: &Path, recipe: serde_json::Value) -> Result<Option<Manifest>> {
    let inputs = vec![artifact::Input { role: "corpus".into(), path: "somewhere".into(), fingerprint: "0123".into() }];
    let Begin::Write(mut writer) = ArtifactWriter::begin(out, KIND, recipe, inputs)? else { return Ok(None) };
    let mut large = HashingFile::create(writer.dir(), "large")?;
    for block in 0..5u8 {
        large.append(&[block; 600_000])?;
    }
    writer.add(large.close()?);
    let mut small = HashingFile::create(writer.dir(), "small")?;
    small.append(b"12345")?;
    writer.add(small.close()?);
    writer.count("third", 1.0 / 3.0);
    writer.commit().map(Some)
}

/// Not a test by itself: what the processes do that other tests start. `TEST_WRITE` names the artifact.
#[test]
fn child() {
    let Some(out) = std::env::var_os("TEST_WRITE") else { return };
    let code = match write(Path::new(&out), serde_json::json!({ "size": 7 })) {
        Ok(_) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code()
        }
    };
    std::process::exit(i32::from(code));
}

fn child_command(out: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env("TEST_WRITE", out).env_remove("SLURM_JOB_ID");
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn run_child(out: &Path, failure: Option<String>) -> Output {
    let mut command = child_command(out);
    if let Some(failure) = failure {
        command.env("TRIREME_FAULT", failure);
    }
    command.output().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn assert_whole(out: &Path) {
    let manifest = Manifest::open(out, KIND).unwrap();
    manifest.verify(out).unwrap();
    assert_eq!(
        manifest.files.iter().map(|file| (file.name.as_str(), file.bytes)).collect::<Vec<_>>(),
        [("large", 3_000_000), ("small", 5)]
    );
}

fn assert_says(error: &Error, fragments: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.exit_code(), 3, "{text}");
    assert!(!text.contains('\n') && text.contains("; "), "one line with a remedy: {text}");
    fragments.iter().for_each(|fragment| assert!(text.contains(fragment), "{text:?} does not say {fragment:?}"));
}

/// A process that dies at any step of writing leaves no artifact or a whole one; the next run cleans up and finishes. A manifest
/// or a rename too early would show as an artifact that does not verify.
#[test]
fn killed_at_every_step() {
    let mut n_killed = 0;
    for step in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("tok");
        if run_child(&out, Some(format!("abort at=io n={step}"))).status.success() {
            break;
        }
        n_killed += 1;
        assert!(step < 100, "it does not end");
        if out.exists() {
            assert_whole(&out);
        }
        assert!(run_child(&out, None).status.success(), "after a death at step {step}");
        assert_whole(&out);
        assert_eq!(names(dir.path()), ["tok"], "left over after a death at step {step}");
    }
    assert!(n_killed >= 10, "only {n_killed} steps were counted");
}

/// A full disk or a failing one at any step is one line and exit code 3, and leaves nothing; after the rename, a whole artifact.
#[test]
fn failing_at_every_step() {
    for (how, word) in [("enospc", "space"), ("eio", "nput/output")] {
        for step in 1.. {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("tok");
            let output = run_child(&out, Some(format!("{how} at=io n={step}")));
            if output.status.success() {
                assert!(step > 10, "only {step} steps were counted");
                break;
            }
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(3), "{stderr}");
            let line = stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
            assert!(line.contains(word) && line.contains(dir.path().to_str().unwrap()), "{line}");
            if out.exists() {
                assert_whole(&out);
            } else {
                assert_eq!(names(dir.path()), [""; 0], "left by {how} at step {step}");
            }
        }
    }
}

/// A file system that is really full, a small tmpfs (which needs root): one line that says so, nothing left.
#[test]
fn full_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(dir.path()).output();
    if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
        println!("skipped: cannot mount a tmpfs here ({mounted:?})");
        return;
    }
    let error = write(&dir.path().join("tok"), serde_json::json!({})).unwrap_err();
    let left = names(dir.path());
    assert!(Command::new("umount").arg("-l").arg(dir.path()).status().unwrap().success());
    assert_says(&error, &["tok.tmp-", "large", "space"]);
    assert_eq!(left, [""; 0]);
}

/// Finished, the same work is a no-op; other settings, other inputs, another kind and somebody's files are refused with both values.
#[test]
fn what_stands_there_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a/b/tok");
    let recipe = serde_json::json!({ "vocab_size": 512, "text": { "field": "text" } });
    let first = write(&out, recipe.clone()).unwrap().expect("written");
    assert!(write(&out, recipe.clone()).unwrap().is_none(), "the second time there is nothing to do");
    assert_eq!(Manifest::open(&out, KIND).unwrap(), first);
    let mut other = recipe.clone();
    other["text"]["field"] = "body".into();
    assert_says(&write(&out, other).unwrap_err(), &["tok", "text.field = \"text\"", "\"body\""]);
    let error = ArtifactWriter::begin(&out, KIND, recipe.clone(), Vec::new()).err().unwrap();
    assert_says(&error, &["corpus 0123", "nothing"]);
    assert_says(&ArtifactWriter::begin(&out, "run", recipe.clone(), Vec::new()).err().unwrap(), &["tok", "tokenizer", "run"]);
    fs::write(out.join("small"), "123").unwrap();
    assert_says(&write(&out, recipe.clone()).unwrap_err(), &["small", "3 bytes", "5"]);
    let thesis = dir.path().join("thesis");
    fs::create_dir(&thesis).unwrap();
    assert!(write(&thesis, recipe.clone()).unwrap().is_some(), "an empty directory is free");
    for path in [dir.path().join("a"), dir.path().join("file")] {
        fs::write(dir.path().join("file"), "mine").unwrap();
        assert_says(&write(&path, recipe.clone()).unwrap_err(), &["exists and is not a finished tokenizer"]);
    }
    std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
    assert_says(&write(&dir.path().join("link"), recipe.clone()).unwrap_err(), &["link"]);
    assert_says(&write(&dir.path().join(".."), recipe).unwrap_err(), &["has no file name"]);
    assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "mine");
}

/// Every damage to a file is found and named; every edit of the manifest that changes its meaning is refused.
#[test]
fn damage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tok");
    let original = write(&out, serde_json::json!({ "vocab_size": 512 })).unwrap().unwrap();
    let large = fs::read(out.join("large")).unwrap();
    let verify = || Manifest::open(&out, KIND).and_then(|manifest| manifest.verify(&out));
    let mut flipped = large.clone();
    flipped[1_234_567] ^= 4;
    fs::write(out.join("large"), flipped).unwrap();
    assert_says(&verify().unwrap_err(), &["large", "checksum", &original.files[0].xxh3]);
    fs::write(out.join("large"), &large[1..]).unwrap();
    assert_says(&verify().unwrap_err(), &["large", "2999999", "3000000"]);
    fs::remove_file(out.join("large")).unwrap();
    assert_says(&verify().unwrap_err(), &["large", "missing", "3000000"]);
    fs::write(out.join("large"), &large).unwrap();
    verify().unwrap();
    let path = out.join(MANIFEST);
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).unwrap();
        match Manifest::open(&out, KIND) {
            Err(error) => assert_says(&error, &["tok"]),
            // Who wrote it, when, and where inputs lay is not what it is.
            Ok(found) => {
                assert_eq!((&found.fingerprint, &found.files, &found.counts), (&original.fingerprint, &original.files, &original.counts))
            }
        }
    }
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_says(&verify().unwrap_err(), &[MANIFEST, "not a manifest"]);
    fs::remove_file(&path).unwrap();
    assert_says(&verify().unwrap_err(), &["tok", "not a finished tokenizer", MANIFEST]);
}

/// Numbers of any size come back as they went, so that the fingerprint holds; a parser that is off by the last bit would make a
/// good artifact look edited.
#[test]
fn numbers_survive() {
    let dir = tempfile::tempdir().unwrap();
    let random = Random::new(1, "numbers");
    let Begin::Write(mut writer) = ArtifactWriter::begin(&dir.path().join("tok"), KIND, serde_json::json!({}), Vec::new()).unwrap() else {
        panic!("new")
    };
    for k in 0..5000 {
        let x = f64::from_bits(random.bits(k));
        writer.count(&k.to_string(), if x.is_finite() { x } else { random.uniform(k) });
        writer.count(&format!("u{k}"), random.bits(k + 10_000));
    }
    let written = writer.commit().unwrap();
    assert_eq!(Manifest::open(&dir.path().join("tok"), KIND).unwrap(), written);
}

/// While one writes, the second is told who; when the first gives up, nothing of it is left and the second may.
#[test]
fn two_writers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tok");
    let Begin::Write(first) = ArtifactWriter::begin(&out, KIND, serde_json::json!({}), Vec::new()).unwrap() else { panic!("new") };
    HashingFile::create(first.dir(), "part").unwrap().append(b"half").unwrap();
    let error = ArtifactWriter::begin(&out, KIND, serde_json::json!({}), Vec::new()).err().unwrap();
    assert_says(&error, &["tok", &std::process::id().to_string(), &artifact::host_name(), ".tok.lock"]);
    let output = run_child(&out, None);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&format!("process {}", std::process::id())));
    drop(first);
    assert_eq!(names(dir.path()), [""; 0]);
    assert!(run_child(&out, None).status.success());
    assert_whole(&out);
}

/// Many processes at once on one name: each writes it, finds it finished, or is told that another does; it is whole in the end.
#[test]
fn a_race_of_processes() {
    for _ in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("tok");
        let children: Vec<_> = (0..6).map(|_| child_command(&out).spawn().unwrap()).collect();
        let outputs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        assert!(outputs.iter().any(|output| output.status.success()));
        for output in outputs.iter().filter(|output| !output.status.success()) {
            assert!(String::from_utf8_lossy(&output.stderr).contains("is being written by"), "{output:?}");
        }
        assert_whole(&out);
        assert_eq!(names(dir.path()), ["tok"]);
    }
}

fn lock_text(host: &str, pid: u32, job: &str, restarts: u32) -> String {
    serde_json::json!({ "host": host, "pid": pid, "job": job, "restarts": restarts, "since_unix_s": 1 }).to_string()
}

/// The lock of a dead process of this machine, an empty and a torn lock are taken over; that of another machine is not, but by a
/// later life of the same SLURM job.
#[test]
fn stale_locks() {
    let dir = tempfile::tempdir().unwrap();
    let (out, lock) = (dir.path().join("tok"), dir.path().join(".tok.lock"));
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    for stale in [lock_text(&artifact::host_name(), gone.id(), "5", 0), String::new(), "{\"host\":\"n0".into()] {
        fs::write(&lock, stale).unwrap();
        drop(RunLock::acquire(&lock, &out).unwrap());
        assert!(!lock.exists());
    }
    fs::write(&lock, lock_text("node17", 4242, "1234", 1)).unwrap();
    assert_says(&RunLock::acquire(&lock, &out).err().unwrap(), &["tok", "job 1234", "process 4242 on node17", ".tok.lock"]);
    let as_job = |job: &str, restarts: &str| {
        let mut command = child_command(&out);
        command.env("SLURM_JOB_ID", job).env("SLURM_RESTART_COUNT", restarts).output().unwrap().status.code()
    };
    assert_eq!(as_job("1235", "2"), Some(3), "another job");
    assert_eq!(as_job("1234", "1"), Some(3), "another step of this life of the job");
    assert_eq!(as_job("1234", "2"), Some(0), "the job after its requeue");
    assert_whole(&out);
}

/// However many take over a stale lock at once, one holds it at a time. Removing what another has just taken would let two in.
#[test]
fn a_race_for_a_stale_lock() {
    let dir = tempfile::tempdir().unwrap();
    let (lock, holders, n_held) = (dir.path().join("lock"), AtomicUsize::new(0), AtomicUsize::new(0));
    for _ in 0..50 {
        fs::write(&lock, lock_text(&artifact::host_name(), u32::MAX, "5", 0)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let Ok(held) = RunLock::acquire(&lock, Path::new("tok")) else { continue };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                        n_held.fetch_add(1, Ordering::SeqCst);
                        holders.fetch_sub(1, Ordering::SeqCst);
                        drop(held);
                    }
                });
            }
        });
        assert!(!lock.exists());
    }
    assert!(n_held.load(Ordering::SeqCst) >= 50);
}

/// Names that are not Unicode work, as output and as input, and do not collide with each other.
#[test]
fn names_of_any_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |bytes: &[u8]| -> PathBuf { dir.path().join(std::ffi::OsStr::from_bytes(bytes)) };
    let (one, two) = (path(b"t\xff"), path(b"t\xfe"));
    let Begin::Write(writing_one) = ArtifactWriter::begin(&one, KIND, serde_json::json!({}), Vec::new()).unwrap() else { panic!("new") };
    let inputs = vec![artifact::Input { role: "corpus".into(), path: one.clone(), fingerprint: "1".into() }];
    let Begin::Write(writing_two) = ArtifactWriter::begin(&two, KIND, serde_json::json!({}), inputs).unwrap() else { panic!("new") };
    writing_one.commit().unwrap();
    writing_two.commit().unwrap();
    assert!(Manifest::open(&one, KIND).is_ok() && Manifest::open(&two, KIND).is_ok());
}

/// An input's fingerprint follows its content and not its place: an artifact's manifest, a file, a folder, files of one beginning.
#[test]
fn fingerprints_of_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let fingerprint = |path: &Path| artifact::input("corpus", path).map(|input| input.fingerprint);
    for copy in ["x", "y"] {
        fs::create_dir_all(dir.path().join(copy).join("sub")).unwrap();
        for name in ["corpus.bin", "corpus.idx", "sub/file"] {
            fs::write(dir.path().join(copy).join(name), name).unwrap();
        }
    }
    let (x, y) = (dir.path().join("x"), dir.path().join("y"));
    for name in ["", "corpus", "corpus.bin", "sub"] {
        assert_eq!(fingerprint(&x.join(name)).unwrap(), fingerprint(&y.join(name)).unwrap(), "{name}");
    }
    fs::write(y.join("corpus.idx"), "changed").unwrap();
    fs::write(y.join("sub/file"), "changed").unwrap();
    for name in ["", "corpus", "sub"] {
        assert_ne!(fingerprint(&x.join(name)).unwrap(), fingerprint(&y.join(name)).unwrap(), "{name}");
    }
    let manifest = write(&dir.path().join("tok"), serde_json::json!({})).unwrap().unwrap();
    assert_eq!(fingerprint(&dir.path().join("tok")).unwrap(), manifest.fingerprint);
    assert_says(&fingerprint(&dir.path().join("nothing")).unwrap_err(), &["nothing", "check the path"]);
    assert_says(&fingerprint(Path::new("/no/such/corpus")).unwrap_err(), &["/no/such/corpus"]);
}
