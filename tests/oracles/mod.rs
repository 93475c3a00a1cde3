//! Runs the Python oracles. The interpreter is `TRIREME_PYTHON`, or `.venv/bin/python` in the repository.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The interpreter, if it has these modules; else the reason why the oracle is skipped is printed.
pub fn python(modules: &str) -> Option<PathBuf> {
    let fallback = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = std::env::var_os("TRIREME_PYTHON").map_or(fallback, PathBuf::from);
    match Command::new(&python).args(["-c", &format!("import {modules}")]).output() {
        Ok(output) if output.status.success() => Some(python),
        Ok(output) => {
            println!("skipped: {} lacks {modules}: {}", python.display(), String::from_utf8_lossy(&output.stderr).trim());
            None
        }
        Err(error) => {
            println!("skipped: no Python at {} ({error}); set TRIREME_PYTHON to one that has {modules}", python.display());
            None
        }
    }
}

/// Runs a script of this directory and returns what it prints, split at tabs.
pub fn run(python: &Path, script: &str, args: &[&Path]) -> Vec<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles").join(script);
    let output = Command::new(python).arg(script).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split('\t').map(String::from).collect()).collect()
}

/// A file of little-endian f32.
pub fn read_f32(path: &Path) -> Vec<f32> {
    std::fs::read(path).unwrap().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}
