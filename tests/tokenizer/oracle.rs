//! Runs the Python oracle. Its interpreter is `$TRIREME_PYTHON` or `.venv/bin/python`; with neither, a test says so and passes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A Python with sentencepiece, or none (then the reason is printed).
pub fn python() -> Option<PathBuf> {
    let named = std::env::var_os("TRIREME_PYTHON").map(PathBuf::from);
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = named.or_else(|| venv.exists().then_some(venv));
    if python.is_none() {
        println!("skipped: no Python with sentencepiece (set TRIREME_PYTHON, or make .venv as tests/run.sh does)");
    }
    python
}

/// Runs one command of the oracle with `input` on its standard input and returns its lines.
pub fn ask(python: &Path, arguments: &[&str], input: &str) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles/sentencepiece_oracle.py");
    let mut child = Command::new(python)
        .arg(script)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the interpreter starts");
    let mut stdin = child.stdin.take().expect("piped");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = stdin.write_all(input.as_bytes()); // a failed oracle closes its end; its status is checked below
        });
        child.wait_with_output().expect("the oracle runs")
    });
    assert!(output.status.success(), "oracle {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("ASCII").lines().map(String::from).collect()
}

/// SentencePiece's ids of each text.
pub fn encode(python: &Path, model: &Path, texts: &[Vec<u8>]) -> Vec<Vec<u32>> {
    let input: String = texts.iter().map(|text| hex(text) + "\n").collect();
    let lines = ask(python, &["encode", model.to_str().expect("UTF-8")], &input);
    assert_eq!(lines.len(), texts.len());
    lines.iter().map(|line| line.split_whitespace().map(|id| id.parse().expect("an id")).collect()).collect()
}

/// SentencePiece's text of each list of ids.
pub fn decode(python: &Path, model: &Path, lists: &[Vec<u32>]) -> Vec<String> {
    let line = |ids: &Vec<u32>| ids.iter().map(|id| id.to_string()).collect::<Vec<_>>().join(" ") + "\n";
    let input: String = lists.iter().map(line).collect();
    let lines = ask(python, &["decode", model.to_str().expect("UTF-8")], &input);
    assert_eq!(lines.len(), lists.len());
    lines.iter().map(|line| String::from_utf8(unhex(line)).expect("UTF-8")).collect()
}

/// Trains a model with SentencePiece's own trainer; returns the path of the `.model`.
pub fn train(python: &Path, dir: &Path, name: &str, corpus: &Path, settings: &[&str]) -> PathBuf {
    let prefix = dir.join(name);
    let mut arguments = vec!["train", prefix.to_str().expect("UTF-8"), corpus.to_str().expect("UTF-8")];
    arguments.extend_from_slice(settings);
    ask(python, &arguments, "");
    prefix.with_extension("model")
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of hex digits.
pub fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex")).collect()
}
