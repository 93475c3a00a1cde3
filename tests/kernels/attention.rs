//! The attention kernels: their source runs on the CPU against f64 formulas (attention.cpp beside this file).

use std::path::Path;
use std::process::{Command, Output};

/// A program of this folder, compiled over the emulator and run; None where there is no compiler.
fn run(name: &str) -> Option<Output> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = new_folder(name);
    let program = folder.join(name);
    let compiled = match Command::new("g++")
        .args(["-O2", "-std=c++17", "-w", "-Wno-psabi", "-DTRIREME_EMULATE", "-x", "c++"])
        .arg(root.join(format!("tests/kernels/{name}.cpp")))
        .arg("-o")
        .arg(&program)
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: g++ does not start ({error})");
            return None;
        }
    };
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let checked = Command::new(&program).output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    std::fs::remove_dir_all(&folder).unwrap();
    Some(checked)
}

fn assert_good(checked: &Output, n_lines: usize) {
    let report = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && report.lines().count() == n_lines, "{report}{}", String::from_utf8_lossy(&checked.stderr));
}

/// Forward, backward and cached attention are inside their derived bounds for head dims 64, 128, 192 and 40, ragged sequences
/// and grouped heads; a wrong fragment, mask, stage or share of the keys breaks it.
#[test]
fn attention_agrees_with_f64_formulas() {
    if let Some(checked) = run("attention") {
        assert_good(&checked, 64);
    }
}

/// The kernels for Hopper are inside the same bounds, over tiles that end off a sequence's end, enough blocks for every stage to be
/// used again, and 1 to 12 query heads a key head; a wrong descriptor, swizzle, box, phase or turn breaks it, and so does a barrier,
/// wait or fence that is missing, for the emulator keeps copies and products back as long as it may (kernels/emulate_hopper.h).
#[test]
fn hopper_attention_agrees_with_f64_formulas() {
    if let Some(checked) = run("attention_hopper") {
        assert_good(&checked, 36);
    }
}

fn new_folder(name: &str) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
