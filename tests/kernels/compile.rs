//! Every kernel compiled for sm_90a down to machine code, on machines without a GPU too: registers, shared memory, no spills.

use std::path::{Path, PathBuf};
use std::process::Command;

/// nvcc of the packages that tests/run.sh installs, else the one in the path.
fn nvcc() -> Option<PathBuf> {
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/lib");
    let pythons = std::fs::read_dir(lib).ok().into_iter().flatten().flatten();
    let installed = pythons.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc")).find(|nvcc| nvcc.is_file());
    installed.or_else(|| Command::new("nvcc").arg("--version").output().is_ok().then(|| "nvcc".into()))
}

/// ptxas accepts every kernel and keeps all of its values in registers: a spill in an inner loop costs more than any other
/// slip in a kernel, and shows nowhere else without a GPU.
#[test]
fn every_kernel_compiles_without_spills() {
    let Some(nvcc) = nvcc() else {
        println!("skipped: no nvcc (tests/run.sh installs it into .venv)");
        return;
    };
    let mut n_kernels = 0;
    for source in sources() {
        let output = Command::new(&nvcc)
            .args(["-cubin", "-arch=sm_90a", "-O3", "-std=c++17", "-Xptxas", "-v", "-o", "/dev/null"])
            .arg(&source)
            .output()
            .unwrap();
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {report}", source.display());
        // ptxas says so when it runs the products of wgmma one by one, or ignores setmaxnreg.
        let is_slow = ["serialized", "Performance Loss", "ignored", "warning"].iter().any(|word| report.contains(word));
        assert!(!is_slow, "{}: {report}", source.display());
        // ptxas says of each kernel: its name, then its spills, then its registers.
        let mut name = "";
        for line in report.lines() {
            if let Some((_, rest)) = line.split_once("Function properties for ") {
                name = rest.trim();
            } else if line.contains("spill stores") {
                assert!(!name.contains("hopper") || line.contains(" 0 bytes stack frame"), "{name} has local memory: {line}");
                assert!(line.contains(" 0 bytes spill stores, 0 bytes spill loads"), "{name} spills: {line}");
            } else if let Some((_, used)) = line.split_once("Used ") {
                n_kernels += 1;
                println!("{name}: {used}");
            }
        }
    }
    assert!(n_kernels >= 36, "only {n_kernels} kernels reported");
}

fn sources() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.retain(|path| path.extension().is_some_and(|ending| ending == "cu"));
    sources.sort();
    sources
}
