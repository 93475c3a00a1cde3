//! The golden evaluations: their files, the tiny model as a checkpoint, and the binary.
#![allow(dead_code)] // not every test program uses all

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of a test.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/evaluate")
}

/// What make.py wrote.
pub struct Golden(Value);

impl Golden {
    pub fn read() -> Golden {
        let file = std::fs::File::open(goldens().join("golden.json.gz")).unwrap();
        Golden(serde_json::from_reader(std::io::BufReader::new(flate2::read::GzDecoder::new(file))).unwrap())
    }

    /// The runs of the harness.
    pub fn runs(&self) -> &[Value] {
        self.0["runs"].as_array().unwrap()
    }

    /// The golden model with a tokenizer that asks for a beginning of sequence before every text, imported.
    pub fn beginning_checkpoint(&self, place: &Place) -> PathBuf {
        let (from, hf_dir, out) = (goldens().join("model"), place.path("beginning-hf"), place.path("beginning"));
        std::fs::create_dir(&hf_dir).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(from.join(name), hf_dir.join(name)).unwrap();
        }
        let mut tokenizer = json(&from.join("tokenizer.json"));
        tokenizer["post_processor"] = self.0["post_processor"].clone();
        std::fs::write(hf_dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        import_from(&hf_dir, &out);
        out
    }

    /// The rows of all benchmarks, each file under its published name.
    pub fn write_files(&self, dir: &Path) {
        for (name, text) in self.0["files"].as_object().unwrap() {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text.as_str().unwrap()).unwrap();
        }
    }
}

/// The golden model, imported.
pub fn checkpoint(place: &Place) -> PathBuf {
    let out = place.path("model");
    import("evaluate/model", &out);
    out
}

/// A model of the golden files, imported.
pub fn import(name: &str, out: &Path) {
    import_from(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name), out);
}

fn import_from(from: &Path, out: &Path) {
    let mut import = Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"));
    let output = import.arg("import").arg(from).arg("--out").arg(out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// trireme-evaluate.
pub fn evaluate(model: &Path, data: &Path, out: &Path, args: &[String]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-evaluate"));
    command.arg("run").arg("--checkpoint").arg(model).arg("--data").arg(data).arg("--out").arg(out).args(args).output().unwrap()
}

/// trireme-evaluate compare.
pub fn compare(a: &Path, b: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trireme-evaluate")).arg("compare").arg(a).arg(b).output().unwrap()
}

/// One error line with these parts, and this exit code.
pub fn assert_refused(output: &Output, code: i32, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!((output.status.code(), errors.len()), (Some(code), 1), "{stderr}");
    assert!(expected.iter().all(|part| errors[0].contains(part)), "{stderr}\nexpected {expected:?}");
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The objects of a file of JSON lines.
pub fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
