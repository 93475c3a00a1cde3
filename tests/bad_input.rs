//! Bad input through the binaries: each gives one line that says where, what (both values) and what to do, the right exit
//! code, and leaves nothing half-written. (Bad text is in tests/corpus.rs, bad shards in tests/shards.rs in more depth.)

mod common;

use common::{counting_documents, tiny_model, tiny_recipe, train, write_megatron};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trireme::checkpoint::Wanted;
use trireme::parallel::slice::Slice;
use trireme::tensor::{DType, Tensor};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// Shards and a recipe that work.
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        write_megatron(&place.path("shards"), "train", &counting_documents(60, 61, 1));
        write_megatron(&place.path("shards"), "validation", &counting_documents(20, 61, 2));
        std::fs::write(place.path("recipe.toml"), tiny_recipe(&place.path("shards")).to_toml()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pretrain(&self, sets: &[&str], out: &Path) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-pretrain"));
        command.arg("--recipe").arg(self.path("recipe.toml")).arg("--out").arg(out);
        for set in sets {
            command.args(["--set", set]);
        }
        command.output().unwrap()
    }
}

/// One error line with these fragments, this exit code, and no directory that looks begun.
fn assert_refused(output: &Output, code: i32, fragments: &[&str], out: &Path) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "one line, not:\n{stderr}");
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    for fragment in fragments {
        assert!(errors[0].contains(fragment), "{:?} does not say {fragment:?}", errors[0]);
    }
    let parent = out.parent().unwrap();
    for entry in std::fs::read_dir(parent).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains(".tmp-"), "{name} was left behind");
    }
}

/// Wrong recipes: exit 2, the key, both values; nothing is made.
#[test]
fn wrong_recipes() {
    let place = Place::new();
    let out = place.path("run");
    let cases: &[(&[&str], &[&str])] = &[
        (&["optimizer.learning_rate=1"], &["learning_rate", "optimizer"]),
        (&["model.n_layer=3"], &["n_layer", "n_layers"]),
        (&["parallel.tp=3"], &["tp", "3", "8"]),
        (&["parallel.pp=3"], &["pp", "3", "4"]),
        (&["batch.micro=3"], &["micro", "3", "8"]),
        (&["batch.seq_len=64"], &["64", "32"]),
        (&["train.precision=fp12"], &["fp12", "f32", "bf16"]),
        (&["optimizer.beta1=1.5"], &["beta1", "1.5"]),
        (&["parallel.tp=2"], &["1", "2"]),
    ];
    for (sets, fragments) in cases {
        assert_refused(&place.pretrain(sets, &out), 2, fragments, &out);
        assert!(!out.exists(), "{sets:?} made a run directory");
    }
    let missing = Command::new(env!("CARGO_BIN_EXE_trireme-pretrain"))
        .args(["--recipe", "/no/such/recipe.toml", "--out"])
        .arg(&out)
        .output()
        .unwrap();
    assert_refused(&missing, 3, &["/no/such/recipe.toml"], &out);
}

/// Shards of another vocabulary, cut off, or with a flipped bit are refused before anything is trained.
#[test]
fn wrong_shards() {
    let place = Place::new();
    let out = place.path("run");
    let bin = place.path("shards").join("train.bin");
    assert_refused(&place.pretrain(&["model.vocab_size=50"], &out), 3, &["train.bin", "50"], &out);
    let whole = std::fs::read(&bin).unwrap();
    std::fs::write(&bin, &whole[..whole.len() - 10]).unwrap();
    assert_refused(&place.pretrain(&[], &out), 3, &["train.bin"], &out);
    std::fs::remove_file(&bin).unwrap();
    assert_refused(&place.pretrain(&[], &out), 3, &["train.bin"], &out);
    let gone = place.pretrain(&["data.train.0.shards=/no/such/shards"], &out);
    assert_refused(&gone, 3, &["/no/such/shards"], &out);
}

/// A checkpoint cut off or with a flipped bit is refused by every reader, named, and never trained on.
#[test]
fn wrong_checkpoints() {
    let place = Place::new();
    let (run, out) = (place.path("run"), place.path("out"));
    train(&tiny_recipe(&place.path("shards")), &run, Some(2)).unwrap();
    let checkpoint = run.join("checkpoints/step-00000002");
    let requests = place.path("requests.jsonl");
    std::fs::write(&requests, r#"{"id":"a","tokens":[1,2],"max_new_tokens":3}"#).unwrap();
    let generate = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
        command.arg("--checkpoint").arg(&checkpoint).arg("--requests").arg(&requests).arg("--out").arg(&out).output().unwrap()
    };
    let shard = checkpoint.join("shard-00000.h5");
    let whole = std::fs::read(&shard).unwrap();
    // Generation reads weights only, so the bit is one of a weight.
    let mut weight = Tensor::host(&[tiny_model().hidden], DType::F32, None).unwrap();
    let (name, slice) = ("weights/layers.0.attention_norm.weight".into(), Slice::whole(weight.shape().dims()));
    trireme::checkpoint::open(&checkpoint).unwrap().read(&mut [Wanted { name, slice, tensor: &mut weight }]).unwrap();
    let weight: &[u8] = bytemuck::cast_slice(weight.f32());
    let at = whole.windows(weight.len()).position(|window| window == weight).expect("weights are stored as they are");
    let mut flipped = whole.clone();
    flipped[at + 5] ^= 1;
    for damaged in [&whole[..whole.len() / 2], &flipped] {
        std::fs::write(&shard, damaged).unwrap();
        assert_refused(&generate(), 3, &["shard-00000.h5"], &out);
        assert!(!out.exists());
    }
    // Training reads everything, so the bit may be anywhere.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    std::fs::write(&shard, flipped).unwrap();
    assert_refused(&place.pretrain(&[], &run), 3, &["shard-00000.h5"], &run);
    std::fs::remove_file(&shard).unwrap();
    assert_refused(&generate(), 3, &["shard-00000.h5"], &out);
    std::fs::write(&shard, &whole).unwrap();
    assert_eq!(generate().status.code(), Some(0), "the undamaged checkpoint works");
}

/// What is no plain file is refused in a line and at once; a pipe that nobody writes to would be waited for, deaf to signals.
#[test]
fn input_that_is_no_file() {
    let place = Place::new();
    let (run, out, pipe) = (place.path("run"), place.path("out"), place.path("pipe"));
    train(&tiny_recipe(&place.path("shards")), &run, Some(1)).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let wrong = [
        (pipe.as_path(), "is a pipe or a device, expected a file"),
        (Path::new("/dev/null"), "is a pipe or a device, expected a file"),
        (run.as_path(), "is a folder, expected a file"),
    ];
    for (input, fragment) in wrong {
        let generate = [env!("CARGO_BIN_EXE_trireme-generate"), "--requests"];
        for program in [&generate[..], &[env!("CARGO_BIN_EXE_trireme-score"), "logprobs", "--input"]] {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]).arg(input).arg("--checkpoint").arg(&run).arg("--out").arg(&out);
            assert_refused(&command.output().unwrap(), 3, &[input.to_str().unwrap(), fragment], &out);
            assert!(!out.exists());
        }
    }
}

/// Weights in 8 bits are refused by name, both values, where there is no such form or tensor cores cannot multiply the weights; where
/// they can, both programs do their work and its manifest says with what weights.
#[test]
fn weights_in_8_bits() {
    let place = Place::new();
    let mut recipe = tiny_recipe(&place.path("shards"));
    let (narrow, wide, out) = (place.path("narrow"), place.path("wide"), place.path("out"));
    train(&recipe, &narrow, Some(1)).unwrap();
    recipe.model.hidden = 32;
    train(&recipe, &wide, Some(1)).unwrap();
    let input = place.path("input.jsonl");
    let run = |program: &str, run: &Path, weights: &str| {
        let (mut command, line) = if program == "generate" {
            (Command::new(env!("CARGO_BIN_EXE_trireme-generate")), r#"{"id":"a","tokens":[1,2],"max_new_tokens":3}"#)
        } else {
            (Command::new(env!("CARGO_BIN_EXE_trireme-score")), r#"{"id":"a","tokens":[1,2,3]}"#)
        };
        std::fs::write(&input, line).unwrap();
        if program == "score" {
            command.arg("logprobs");
        }
        let lines = if program == "score" { "--input" } else { "--requests" };
        let checkpoint = run.join("checkpoints/step-00000001");
        command.arg("--checkpoint").arg(checkpoint).arg(lines).arg(&input).arg("--out").arg(&out).args(["--weights", weights]);
        command.output().unwrap()
    };
    for program in ["generate", "score"] {
        let unknown = run(program, &wide, "fp4");
        let stderr = String::from_utf8_lossy(&unknown.stderr);
        assert!(unknown.status.code() == Some(2) && stderr.contains("\"fp4\" is none of int8, fp8 and fp8-tensor"), "{stderr}");
        let wrong = ["layers.0.attention.qkv.weight has 128 x 24 elements on a rank, no multiples of 16", "leave --weights out"];
        assert_refused(&run(program, &narrow, "fp8"), 2, &wrong, &out);
        assert!(!out.exists());
        for weights in ["int8", "fp8", "fp8-tensor"] {
            let done = run(program, &wide, weights);
            assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
            let manifest = std::fs::read_to_string(out.join("manifest.json")).unwrap();
            let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
            assert_eq!(manifest["recipe"]["weights"], weights, "{manifest}");
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

/// An output directory that another run owns, by recipe or by a live process, is refused with its owner's name.
#[test]
fn owned_output() {
    let place = Place::new();
    let run = place.path("run");
    train(&tiny_recipe(&place.path("shards")), &run, Some(1)).unwrap();
    assert_refused(&place.pretrain(&["train.seed=77"], &run), 3, &["run", "seed", "77"], &run);
    let lock = trireme::artifact::RunLock::acquire(&run.join(".lock"), &run).unwrap();
    assert_refused(&place.pretrain(&[], &run), 3, &["run", &std::process::id().to_string()], &run);
    drop(lock);
    assert_eq!(place.pretrain(&[], &run).status.code(), Some(0), "and goes on when the owner is gone");
}

/// A file system that fills up during a save ends the run with one line; the checkpoint before it stays whole. A small tmpfs is
/// the disk, so this needs root.
#[test]
fn full_disk() {
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&disk).output();
    if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
        println!("skipped: cannot mount a tmpfs here ({mounted:?})");
        return;
    }
    let run = disk.join("run");
    let output = place.pretrain(&["checkpoint.every_steps=1", "train.samples=320", "observe.flight_records=64"], &run);
    let checkpoints: Vec<PathBuf> = std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let verified = checkpoints.iter().all(|path| trireme::checkpoint::open(path).is_ok());
    Command::new("umount").arg("-l").arg(&disk).status().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.lines().any(|line| line.starts_with("error:") && line.contains("space")), "{stderr}");
    assert!(!checkpoints.is_empty() && verified, "every checkpoint that has a name is whole: {checkpoints:?}");
    assert!(checkpoints.iter().all(|path| !path.to_string_lossy().contains(".tmp-")), "{checkpoints:?}");
}

/// --help of every binary answers with a usage line and exit 0; a wrong flag with exit 2.
#[test]
fn help_and_usage() {
    for binary in [
        env!("CARGO_BIN_EXE_trireme-train-tokenizer"),
        env!("CARGO_BIN_EXE_trireme-tokenize"),
        env!("CARGO_BIN_EXE_trireme-pretrain"),
        env!("CARGO_BIN_EXE_trireme-generate"),
        env!("CARGO_BIN_EXE_trireme-score"),
        env!("CARGO_BIN_EXE_trireme-evaluate"),
        env!("CARGO_BIN_EXE_trireme-prove"),
        env!("CARGO_BIN_EXE_trireme-checkpoint"),
        env!("CARGO_BIN_EXE_trireme-inspect"),
    ] {
        let help = Command::new(binary).arg("--help").output().unwrap();
        assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("Usage:"), "{binary} --help");
        let wrong = Command::new(binary).arg("--no-such-flag").output().unwrap();
        assert_eq!(wrong.status.code(), Some(2), "{binary} --no-such-flag");
    }
}

/// Whether the NVIDIA driver is on this machine.
fn has_driver() -> bool {
    // SAFETY: a C string; an opened library stays open.
    unsafe { !libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY).is_null() }
}

/// `--device cuda` without a driver: exit 2 and one line that says what is missing and what to do, of every binary that has the
/// option. The bindings panic when the library is missing, so a guard that is left out shows here.
#[test]
fn cuda_without_a_driver() {
    if has_driver() {
        println!("skipped: this machine has an NVIDIA driver");
        return;
    }
    let place = Place::new();
    let (recipe, out) = (place.path("recipe.toml"), place.path("out"));
    let absent = place.path("absent");
    let commands: [(&str, &[&std::ffi::OsStr]); 3] = [
        (env!("CARGO_BIN_EXE_trireme-pretrain"), &["--recipe".as_ref(), recipe.as_ref()]),
        (env!("CARGO_BIN_EXE_trireme-generate"), &["--checkpoint".as_ref(), absent.as_ref(), "--requests".as_ref(), absent.as_ref()]),
        (
            env!("CARGO_BIN_EXE_trireme-score"),
            &["logprobs".as_ref(), "--checkpoint".as_ref(), absent.as_ref(), "--input".as_ref(), absent.as_ref()],
        ),
    ];
    for (binary, args) in commands {
        let output = Command::new(binary).args(args).arg("--out").arg(&out).args(["--device", "cuda"]).output().unwrap();
        assert_refused(&output, 2, &["no NVIDIA driver", "libcuda.so.1", "--device cpu"], &out);
        assert!(!out.exists());
    }
    // The one without --out.
    let output =
        Command::new(env!("CARGO_BIN_EXE_trireme-prove")).arg("--recipe").arg(&recipe).args(["--device", "cuda"]).output().unwrap();
    assert_refused(&output, 2, &["no NVIDIA driver", "libcuda.so.1", "--device cpu"], &out);
}
