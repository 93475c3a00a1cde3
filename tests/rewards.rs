//! A reward model through the binaries: imported, asked for attributes, exported; and what is refused.

mod oracles;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn run(binary: &str, args: &[&Path]) -> Output {
    let mut command = match binary {
        "checkpoint" => Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint")),
        "score" => Command::new(env!("CARGO_BIN_EXE_trireme-score")),
        "generate" => Command::new(env!("CARGO_BIN_EXE_trireme-generate")),
        other => panic!("{other}"),
    };
    command.args(args).output().unwrap()
}

fn done(binary: &str, args: &[&Path]) {
    let output = run(binary, args);
    assert!(output.status.success(), "{binary} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Floats of a golden file, by name.
fn golden(name: &str) -> Vec<f32> {
    let bytes = std::fs::read(goldens("nemotron-reward/golden.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(name).unwrap();
    let words = data.data().chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).unwrap());
    match data.dtype() {
        safetensors::Dtype::F32 => words.map(f32::from_le_bytes).collect(),
        _ => words.map(|b| i32::from_le_bytes(b) as f32).collect(),
    }
}

/// The golden sequences, one line each.
fn write_input(path: &Path) {
    let (tokens, lengths) = (golden("tokens"), golden("lengths"));
    let columns = tokens.len() / lengths.len();
    let line = |(i, &length): (usize, &f32)| {
        let tokens: Vec<u32> = tokens[i * columns..][..length as usize].iter().map(|&token| token as u32).collect();
        serde_json::json!({"id": format!("sequence {i}"), "tokens": tokens}).to_string() + "\n"
    };
    std::fs::write(path, lengths.iter().enumerate().map(line).collect::<String>()).unwrap();
}

/// The attributes that a user gets are transformers', in input order, in JSONL and (through h5py) in HDF5, one sequence a pass or all
/// packed into one; f32's error is that of tests/model_goldens.rs.
#[test]
fn attributes_reach_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    done("checkpoint", &["import".as_ref(), &goldens("nemotron-reward"), "--out".as_ref(), &path("model")]);
    write_input(&path("input.jsonl"));
    let expected = golden("attributes");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    for batch_tokens in ["1", "1000"] {
        let out = path(batch_tokens);
        let (model, input) = (path("model"), path("input.jsonl"));
        let args = ["rewards".as_ref(), "--checkpoint".as_ref(), &*model, "--input".as_ref(), &*input, "--out".as_ref(), &*out];
        done("score", &[&args[..], &["--batch-tokens".as_ref(), batch_tokens.as_ref()]].concat());
        let lines: Vec<serde_json::Value> =
            std::fs::read_to_string(out.join("rewards.jsonl")).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let ids: Vec<&str> = lines.iter().map(|line| line["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["sequence 0", "sequence 1", "sequence 2"]);
        let found: Vec<f32> =
            lines.iter().flat_map(|line| line["attributes"].as_array().unwrap()).map(|x| x.as_f64().unwrap() as f32).collect();
        let difference = norm(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
        let error = difference / norm(&mut expected.iter().map(|&x| f64::from(x)));
        assert!(error <= 5.0 * 7e-7, "{error:.2e} off: {found:?}, expected {expected:?}");
        let Some(python) = oracles::python("h5py, numpy") else { continue };
        let script = "import h5py, sys; f = h5py.File(sys.argv[1]); print([x.decode() for x in f['ids'][:]], f['attributes'].shape); \
                      f['attributes'][...].astype('<f4').tofile(sys.argv[2])";
        let values = path("values.bin");
        let output = Command::new(python).args(["-c", script]).arg(out.join("rewards.h5")).arg(&values).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.trim(), "['sequence 0', 'sequence 1', 'sequence 2'] (3, 5)");
        assert_eq!(oracles::read_f32(&values), found);
    }
}

/// Each in one line with its remedy, exit code 3, and nothing begun: a language model has no attributes, a reward model no
/// log-probabilities and no text; a bias, which transformers would drop, is not exported.
#[test]
fn the_wrong_kind_of_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (reward, language, input, out) = (path("reward"), path("language"), path("input.jsonl"), path("out"));
    done("checkpoint", &["import".as_ref(), &goldens("nemotron-reward"), "--out".as_ref(), &reward]);
    done("checkpoint", &["import".as_ref(), &goldens("nemotron-gqa"), "--out".as_ref(), &language]);
    write_input(&input);
    let requests = path("requests.jsonl");
    std::fs::write(&requests, r#"{"id":"a","tokens":[1,2],"max_new_tokens":3}"#).unwrap();
    let score = |what: &str, model: &Path| {
        run("score", &[what.as_ref(), "--checkpoint".as_ref(), model, "--input".as_ref(), &*input, "--out".as_ref(), &*out])
    };
    let generate = ["--checkpoint".as_ref(), &*reward, "--requests".as_ref(), &*requests, "--out".as_ref(), &*out];
    let refused = [
        (score("rewards", &language), "a language model has no reward attributes; use trireme-score logprobs"),
        (score("logprobs", &reward), "a reward model of 5 attributes has no log-probabilities; use trireme-score rewards"),
        (run("generate", &generate), "a reward model of 5 attributes generates no text"),
        (run("checkpoint", &["export".as_ref(), &*reward, "--out".as_ref(), &*out]), "transformers' score layer has no bias"),
    ];
    for (output, said) in refused {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
        assert!(errors.len() == 1 && errors[0].contains(said), "{stderr}");
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(!out.exists());
    }
}

/// A classifier without a bias, as transformers makes them, comes back from a round trip byte for byte, with its labels.
#[test]
fn a_round_trip_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (source, bytes) = (path("source"), std::fs::read(goldens("nemotron-reward/model.safetensors")).unwrap());
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(goldens("nemotron-reward/config.json"), source.join("config.json")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file.tensors().into_iter().filter(|(name, _)| name != "score.bias").collect();
    safetensors::serialize_to_file(tensors.clone(), None, &source.join("model.safetensors")).unwrap();
    done("checkpoint", &["import".as_ref(), &source, "--out".as_ref(), &path("model")]);
    done("checkpoint", &["export".as_ref(), &path("model"), "--out".as_ref(), &path("back")]);
    let bytes = std::fs::read(path("back").join("model.safetensors")).unwrap();
    let back = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(back.len(), tensors.len());
    for (name, tensor) in &tensors {
        assert!(back.tensor(name).unwrap().data() == tensor.data(), "{name}");
    }
    let config = |path: PathBuf| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let (theirs, ours) = (config(source.join("config.json")), config(path("back").join("config.json")));
    for key in ["architectures", "id2label", "label2id", "hidden_size"] {
        assert_eq!(theirs[key], ours[key], "{key}");
    }
}
