//! The attention kernels: their source runs on the CPU against f64 formulas (attention.cpp beside this file).

use std::path::Path;
use std::process::Command;

/// Forward, backward and cached attention are inside their derived bounds for head dims 64, 128, 192 and 40, ragged sequences
/// and grouped heads; a wrong fragment, mask, stage or share of the keys breaks it.
#[test]
fn attention_agrees_with_f64_formulas() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = new_folder("attention");
    let program = folder.join("attention");
    let compiled = match Command::new("g++")
        .args(["-O2", "-std=c++17", "-w", "-DTRIREME_EMULATE", "-x", "c++"])
        .arg(root.join("tests/kernels/attention.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: g++ does not start ({error})");
            return;
        }
    };
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let checked = Command::new(&program).output().unwrap();
    let report = String::from_utf8_lossy(&checked.stdout);
    println!("{report}{}", String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success() && report.lines().count() == 64, "{report}");
    std::fs::remove_dir_all(&folder).unwrap();
}

fn new_folder(name: &str) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
