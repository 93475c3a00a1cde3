//! A GPU that fails under a run of the binary, on the stand-ins of CUDA's libraries with emulated kernels: at random calls of the driver,
//! and without memory at each allocation.

use crate::common::{counting_documents, tiny_recipe, write_megatron};
use crate::driver::{emulated_kernels, stand_ins};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trireme::artifact::Manifest;
use trireme::checkpoint;
use trireme::rng::Random;

const STEPS: u64 = 3;
/// Whose memory has lost bits: from the first such call on the driver answers all with it.
const UNCORRECTABLE: &str = "214";

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A recipe of three steps that saves after each. None where there is no compiler.
    fn new() -> Option<Place> {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        stand_ins(place.dir.path())?;
        emulated_kernels(place.dir.path())?;
        let shards = place.path("shards");
        write_megatron(&shards, "train", &counting_documents(60, 61, 1));
        let mut recipe = tiny_recipe(&shards);
        recipe.model.n_layers = 1;
        recipe.train.samples = STEPS * 8;
        recipe.checkpoint.every_steps = 1;
        recipe.checkpoint.margin_s = 0.0;
        std::fs::write(place.path("recipe.toml"), recipe.to_toml()).unwrap();
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, out: &str, fault: (&str, &str)) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-pretrain"));
        command.args(["--device", "cuda", "--recipe"]).arg(self.path("recipe.toml")).arg("--out").arg(self.path(out));
        command.env("LD_LIBRARY_PATH", self.dir.path()).env("TRIREME_KERNEL_CACHE", self.path("cache"));
        command.env("STAND_IN_KERNELS", self.path("emulated")).env("RAYON_NUM_THREADS", "1").env(fault.0, fault.1);
        command.env("TRIREME_MACHINE_FAULTS", self.path("faults")).env("SLURMD_NODENAME", "n042").env_remove("RUST_BACKTRACE");
        command.output().unwrap()
    }

    /// The weights and moments at the end, as checksums of the files that hold them.
    fn end_of(&self, out: &str) -> Vec<(String, String)> {
        let last = self.path(out).join(format!("checkpoints/step-{STEPS:08}"));
        let manifest = Manifest::open(&last, checkpoint::KIND).unwrap();
        manifest.files.into_iter().filter(|file| file.name.starts_with("shard-")).map(|file| (file.name, file.xxh3)).collect()
    }

    /// An undisturbed run, and how many calls and allocations it made.
    fn undisturbed(&self) -> (u64, u64) {
        let output = self.run("undisturbed", ("STAND_IN_GPU_FAULT", ""));
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        let counts = text.lines().find_map(|line| line.strip_prefix("stand-in: ")?.strip_suffix(" allocations")?.split_once(" calls, "));
        let (calls, allocations) = counts.unwrap_or_else(|| panic!("no counts in {text}"));
        (calls.parse().unwrap(), allocations.parse().unwrap())
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn errors(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stderr).lines().filter(|line| line.contains("error: ")).map(String::from).collect()
}

fn lines_of(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(String::from).collect()
}

/// From whichever call on the GPU has failed, the job ends with 71 and one line that names machine, GPU and error, and tells the file of
/// the job's script the machine; the next job of the same command goes on, and ends with the bits of an undisturbed run.
#[test]
fn a_gpu_that_fails_is_named_and_nothing_is_lost() {
    let Some(place) = Place::new() else { return };
    let (n_calls, _) = place.undisturbed();
    let random = Random::new(u64::from(std::process::id()), "calls");
    let mut n_failed = 0;
    for round in 0..8 {
        let at = if round == 0 { 1 } else { 1 + random.bits(round) % n_calls };
        let output = place.run("faulty", ("STAND_IN_GPU_FAULT", &format!("{at}:{UNCORRECTABLE}")));
        if output.status.success() {
            // What was left to do took fewer calls; the next run begins anew.
            assert_eq!(place.end_of("faulty"), place.end_of("undisturbed"), "call {at}");
            std::fs::remove_dir_all(place.path("faulty")).unwrap();
            continue;
        }
        n_failed += 1;
        assert_eq!(output.status.code(), Some(71), "call {at}: {}", text(&output));
        let said = errors(&output);
        let [line] = &said[..] else { panic!("call {at}: {said:?}") };
        for part in ["CUDA_ERROR_ECC_UNCORRECTABLE", "; run the same command on other machines, and have n042 looked at"] {
            assert!(line.contains(part), "call {at}: {line}");
        }
        let told = lines_of(&place.path("faults"));
        assert!(told.len() >= n_failed && told.iter().all(|line| line.starts_with("n042 ")), "{told:?}");
    }
    assert!(n_failed >= 3, "{n_failed} of 8 runs failed");
    let output = place.run("faulty", ("STAND_IN_GPU_FAULT", ""));
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(place.end_of("faulty"), place.end_of("undisturbed"));
}

/// Without memory at one allocation, whichever it is, a run ends with 1 and one line that says how much was wanted, or goes on with what
/// was given back; either way the same command then ends with the bits of an undisturbed run, and nobody takes the machine for broken.
#[test]
fn memory_may_be_missing_at_any_allocation() {
    let Some(place) = Place::new() else { return };
    let (_, n_allocations) = place.undisturbed();
    let random = Random::new(u64::from(std::process::id()), "allocations");
    for round in 0..6 {
        // The first is the one that opening makes.
        let at = if round == 0 { 1 } else { 1 + random.bits(round) % n_allocations };
        let output = place.run("short", ("STAND_IN_NO_MEMORY", &at.to_string()));
        if !output.status.success() {
            assert_eq!(output.status.code(), Some(1), "allocation {at}: {}", text(&output));
            let said = errors(&output);
            let [line] = &said[..] else { panic!("allocation {at}: {said:?}") };
            assert!(line.contains("memory") && line.contains("bytes"), "allocation {at}: {line}");
            let output = place.run("short", ("STAND_IN_NO_MEMORY", ""));
            assert!(output.status.success(), "{}", text(&output));
        }
        assert_eq!(place.end_of("short"), place.end_of("undisturbed"), "allocation {at}");
        std::fs::remove_dir_all(place.path("short")).unwrap();
    }
    assert!(lines_of(&place.path("faults")).is_empty());
}
