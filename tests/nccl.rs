//! Collectives between GPUs over NCCL, without either: ranks as processes under mpirun on libraries that stand in for CUDA's
//! (kernels/stand_in.c) and NCCL's (nccl/stand_in.c), the latter really moving data between the processes. What is tested is every
//! call and its order; what a GPU does with them is not.

mod collective_table;
mod common;
#[allow(dead_code)] // they are made here and opened by the ranks
#[path = "kernels/library.rs"]
mod library;
mod mpi_job;
#[path = "nccl/recorded.rs"]
mod recorded;

use collective_table::{check_all, check_all_on};
use mpi_job::{Case, Program};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use trireme::comm::nccl::{Options, Sums};
use trireme::comm::{Groups, ReduceOp};
use trireme::device::Device;
use trireme::error::Result;
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::{CommKind, DeviceKind, Runtime};
use trireme::tensor::DType;

/// Set for the programs that find the stand-ins in their library path.
const LIBRARIES: &str = "LD_LIBRARY_PATH";
/// NCCL's sums in another order than that of the ranks.
const REVERSE: (&str, &str) = ("STAND_IN_SUMS", "reverse");
/// Communication goes on while its rank does something else, as a GPU's does: another stage may wait for a message whose sender never
/// waits.
const SENT_AT_ONCE: (&str, &str) = ("STAND_IN_EAGER", "252");
const WITHOUT: (&str, &str) = ("STAND_IN_WITHOUT_NCCL", "1");
const OLD: (&str, &str) = ("STAND_IN_NCCL_VERSION", "21704");
const ONE_GPU: (&str, &str) = ("STAND_IN_ONE_GPU", "1");
const FALLEN_BACK: &str = "collectives between GPUs go through host memory over MPI: ";

const NOT_RECORDED: &str = "decode steps are not recorded: tensor-parallel ranks exchange through host memory";
/// Of two and of four ranks.
const SAME: [(&str, usize); 2] = [("responses are the same", 2), ("responses are the same", 4)];
/// Where all steps are recorded, and where none are.
const ALL: [(&str, usize); 2] = [(NOT_RECORDED, 0), (NOT_RECORDED, 8)];

/// What cases set for the stand-ins.
const SET: &[(&str, (&str, &str))] = &[
    ("ordered-2", REVERSE),
    ("ordered-3", REVERSE),
    ("ordered-4", REVERSE),
    ("library-order", REVERSE),
    ("groups", ("STAND_IN_EAGER", "1")),
    ("missing", WITHOUT),
    ("missing-asked", WITHOUT),
    ("old", OLD),
    ("old-asked", OLD),
    ("one-gpu", ONE_GPU),
    ("one-gpu-asked", ONE_GPU),
    ("graphs-3", ("STAND_IN_EAGER", "1")),
    ("recorded-tp", REVERSE),
    ("recorded-pp", SENT_AT_ONCE),
    ("recorded-tp-pp", SENT_AT_ONCE),
    ("recorded-pp-mpi", ("STAND_IN_EAGER", "1")),
    ("failure", ("STAND_IN_FAIL", "1:5")),
    ("gpu-failure", ("STAND_IN_FAIL", "1:5:214")),
    ("hang", ("STAND_IN_HANG", "0:3")),
];

const CASES: &[Case] = &[
    // Bits equal those of a plain loop in rank order although the library adds in another order: it is not asked to add.
    Case { name: "ordered-2", n_ranks: 2, run: ordered, code: Some(0), lines: &[("equal to the plain loop", 2)] },
    Case { name: "ordered-3", n_ranks: 3, run: ordered, code: Some(0), lines: &[("equal to the plain loop", 3)] },
    Case { name: "ordered-4", n_ranks: 4, run: ordered, code: Some(0), lines: &[("equal to the plain loop", 4)] },
    // The library's own sums of f32, when it happens to add in rank order; bf16 and maxima in rank order, whatever it does.
    Case { name: "library-2", n_ranks: 2, run: library, code: Some(0), lines: &[("collectives between GPUs by NCCL 2.27.7", 1)] },
    Case { name: "library-3", n_ranks: 3, run: library, code: Some(0), lines: &[("equal to the plain loop", 3)] },
    Case { name: "library-4", n_ranks: 4, run: library, code: Some(0), lines: &[("equal to the plain loop", 4)] },
    // It is the library that adds f32 then: its order shows in the bits.
    Case { name: "library-order", n_ranks: 3, run: library_order, code: Some(0), lines: &[("the library's order", 3)] },
    // Every group has the right ranks and works after the others; streams that do their work early are as good as late ones.
    Case { name: "groups", n_ranks: 4, run: groups, code: Some(0), lines: &[("every group", 4)] },
    // Without NCCL the job runs all the same, and says how; where NCCL was asked for it says what is missing and ends with 2.
    Case { name: "missing", n_ranks: 2, run: fallen_back, code: Some(0), lines: &[("no NCCL: libnccl.so.2 was not found", 1)] },
    Case { name: "missing-asked", n_ranks: 2, run: demanded, code: Some(2), lines: &[("^error: --comm nccl: no NCCL: ", 1)] },
    Case { name: "old", n_ranks: 2, run: fallen_back, code: Some(0), lines: &[("NCCL on this machine is 2.17.4, 2.18 is needed", 1)] },
    Case { name: "old-asked", n_ranks: 3, run: demanded, code: Some(2), lines: &[("^error: --comm nccl: NCCL on this", 1)] },
    Case { name: "one-gpu", n_ranks: 3, run: fallen_back, code: Some(0), lines: &[("ranks 0 and 1 share one GPU", 1)] },
    Case { name: "one-gpu-asked", n_ranks: 2, run: demanded, code: Some(2), lines: &[("^error: --comm nccl: ranks 0", 1)] },
    Case { name: "by-mpi", n_ranks: 2, run: by_mpi, code: Some(0), lines: &[(FALLEN_BACK, 0), ("by NCCL", 0)] },
    // Collectives recorded between kernels, whichever stream is late.
    Case { name: "graphs-2", n_ranks: 2, run: recorded::collectives, code: Some(0), lines: &[("recorded collectives", 2)] },
    Case { name: "graphs-3", n_ranks: 3, run: recorded::collectives, code: Some(0), lines: &[("recorded collectives", 3)] },
    // Responses do not tell whether the steps of several ranks were recorded; where they cannot be it is said (four generations in each
    // order of sums).
    Case { name: "recorded-tp", n_ranks: 2, run: |runtime| recorded::by_nccl(runtime, 2, 1), code: Some(0), lines: &[SAME[0], ALL[0]] },
    Case { name: "recorded-pp", n_ranks: 2, run: |runtime| recorded::by_nccl(runtime, 1, 2), code: Some(0), lines: &[SAME[0], ALL[0]] },
    Case { name: "recorded-tp-pp", n_ranks: 4, run: |runtime| recorded::by_nccl(runtime, 2, 2), code: Some(0), lines: &[SAME[1], ALL[0]] },
    Case { name: "recorded-pp-mpi", n_ranks: 2, run: |runtime| recorded::by_mpi(runtime, 1, 2), code: Some(0), lines: &[SAME[0], ALL[0]] },
    Case { name: "apart-tp-mpi", n_ranks: 2, run: |runtime| recorded::by_mpi(runtime, 2, 1), code: Some(0), lines: &[SAME[0], ALL[1]] },
    Case {
        name: "astray",
        n_ranks: 2,
        run: recorded::astray,
        code: None,
        lines: &[("stand-in: expected 3 of 7, 2, another message came: 3 of 7, 1", 1)],
    },
    // A failure on the way ends the job with a line that names who, what and how much, after NCCL was told to let go.
    Case {
        name: "failure",
        n_ranks: 3,
        run: endless,
        code: Some(101),
        lines: &[
            ("[r001 tp1 pp0 dp0 ", 1),
            (
                "all-reduce of 4000 bytes as rank 1 of 3 by NCCL: remote process exited or there was a network error (the stand-in was told to fail)",
                1,
            ),
            ("stand-in: aborted", 1),
        ],
    },
    // Where it was the rank's GPU that failed, the driver says so, and the exit code.
    Case {
        name: "gpu-failure",
        n_ranks: 3,
        run: endless,
        code: Some(71),
        lines: &[
            ("[r001 tp1 pp0 dp0 ", 1),
            ("has failed: CUDA_ERROR_ECC_UNCORRECTABLE (an error); run the same command on other machines", 1),
        ],
    },
    // A rank that never comes would keep the others for ever.
    Case {
        name: "hang",
        n_ranks: 2,
        run: |runtime| if runtime.is_first() { endless_for(runtime, 1) } else { endless(runtime) },
        code: Some(101),
        lines: &[("all-reduce of 4000 bytes as rank 0 of 2 by NCCL: not done after 1 s (--comm-timeout)", 1), ("stand-in: aborted", 1)],
    },
];

fn main() -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_RANK").is_some() {
        return mpi_job::main(&Program { cases: CASES, device: DeviceKind::Cuda, environment: &|_, _| Vec::new(), check: |_, _| Ok(()) });
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (all, without) = (folder.path().join("all"), folder.path().join("without"));
    if !stand_ins(&all, &without) {
        println!("skipped: gcc does not start");
        return ExitCode::SUCCESS;
    }
    let emulated = folder.path().join("emulated");
    std::fs::create_dir(&emulated).expect("a folder in a fresh one");
    for file in recorded::KERNELS {
        std::fs::copy(library::library_of(file).0, emulated.join(format!("{file}.so"))).expect("a copy");
    }
    let kernels = OsString::from(folder.path().join("kernels"));
    let path = |first: &Path| {
        let others = std::env::var_os(LIBRARIES).unwrap_or_default();
        let paths = std::iter::once(PathBuf::from(first)).chain(std::env::split_paths(&others));
        std::env::join_paths(paths).expect("paths without a colon")
    };
    let environment = |case: &Case, _: &Path| {
        let set = SET.iter().find(|(name, _)| *name == case.name).map(|(_, set)| *set);
        let libraries = path(if set == Some(WITHOUT) { &without } else { &all });
        let all = [(LIBRARIES, libraries), ("TRIREME_KERNEL_CACHE", kernels.clone())];
        let runs_kernels = case.name.starts_with("recorded-") || case.name.starts_with("apart-");
        let folder = runs_kernels.then(|| ("STAND_IN_KERNELS", emulated.clone().into_os_string()));
        all.into_iter().chain(set.map(|(name, value)| (name, value.into()))).chain(folder).collect()
    };
    mpi_job::main(&Program { cases: CASES, device: DeviceKind::Cuda, environment: &environment, check: |_, _| Ok(()) })
}

/// Compiles the stand-ins into two folders, one of them without NCCL. False where there is no compiler.
fn stand_ins(all: &Path, without: &Path) -> bool {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for (folder, nccl) in [(all, true), (without, false)] {
        std::fs::create_dir(folder).expect("a folder in a fresh one");
        // The first names that are looked for, so that the real ones are not found before.
        let library = folder.join("libcuda.so");
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-fPIC", "-O1", "-w", "-pthread", "-o"]).arg(&library).arg(tests.join("kernels/stand_in.c"));
        if nccl {
            gcc.arg(tests.join("nccl/stand_in.c"));
        }
        let Ok(made) = gcc.output() else { return false };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        for name in ["libnvrtc.so", "libcublasLt.so"].into_iter().chain(nccl.then_some("libnccl.so.2")) {
            // One file under several names is loaded once.
            std::fs::hard_link(&library, folder.join(name)).expect("a link");
        }
        if !nccl {
            // In the way of a real one.
            ["libnccl.so.2", "libnccl.so"].iter().for_each(|name| std::fs::write(folder.join(name), "").expect("an empty file"));
        }
    }
    true
}

fn layout(tp: usize, pp: usize, dp: usize) -> ParallelLayout {
    ParallelLayout { tp, pp, dp, vp: 1 }
}

fn options(sums: Sums) -> Options {
    Options { sums, timeout: Duration::from_secs(100) }
}

/// The table on the world, and on its tensor-parallel group, which is all of it again.
fn table(runtime: &Runtime, comm: CommKind, sums: Sums) -> Result<()> {
    let n = runtime.world().size();
    let (device, groups) = runtime.open(layout(n, 1, 1), comm, options(sums))?;
    check_all_on(&*groups.world, &*device);
    check_all_on(&*groups.tp, &*device);
    println!("rank {} of {n}: equal to the plain loop", groups.world.rank());
    Ok(())
}

fn ordered(runtime: &Runtime) -> Result<()> {
    table(runtime, CommKind::Nccl, Sums::Ordered)
}

fn library(runtime: &Runtime) -> Result<()> {
    table(runtime, CommKind::Auto, Sums::Library)
}

/// 2^-24 is half of the last bit of 1: 1 + 2^-24 + 2^-24 is 1 from the left, and one bit more from the right.
fn library_order(runtime: &Runtime) -> Result<()> {
    let (device, groups) = runtime.open(layout(3, 1, 1), CommKind::Nccl, options(Sums::Library))?;
    let mine = if groups.world.rank() == 0 { 1.0f32 } else { 2f32.powi(-24) };
    let mut x = device.alloc(&[1], DType::F32)?;
    device.upload(bytemuck::bytes_of(&mine), &mut x);
    groups.tp.all_reduce(&mut x, ReduceOp::Sum);
    let sum = f32::from_ne_bytes((*x.host_bytes()).try_into().expect("4 bytes"));
    assert_eq!(sum, 1.0 + f32::EPSILON, "the plain loop gives 1");
    println!("the library's order");
    Ok(())
}

fn groups(runtime: &Runtime) -> Result<()> {
    for layout in [layout(2, 1, 2), layout(2, 2, 1), layout(1, 2, 2), layout(1, 1, 4)] {
        let (device, groups) = runtime.open(layout, CommKind::Nccl, options(Sums::Ordered))?;
        check_groups(&groups, &*device);
    }
    println!("every group");
    Ok(())
}

fn check_groups(groups: &Groups, device: &dyn Device) {
    let (at, layout) = (groups.at, groups.layout);
    let code = |tp: usize, pp: usize, dp: usize| (tp + 10 * pp + 100 * dp) as f64;
    let mine = code(at.tp, at.pp, at.dp);
    assert_eq!(groups.tp.gather_f64(mine), (0..layout.tp).map(|tp| code(tp, at.pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.pp.gather_f64(mine), (0..layout.pp).map(|pp| code(at.tp, pp, at.dp)).collect::<Vec<_>>());
    assert_eq!(groups.dp.gather_f64(mine), (0..layout.dp).map(|dp| code(at.tp, at.pp, dp)).collect::<Vec<_>>());
    [&groups.tp, &groups.pp, &groups.dp].into_iter().for_each(|comm| check_all_on(&**comm, device));
    check_all(&*groups.tp);
}

/// The table through host memory, where the device's tensors can only be copied.
fn fallen_back(runtime: &Runtime) -> Result<()> {
    table(runtime, CommKind::Auto, Sums::Library)
}

fn by_mpi(runtime: &Runtime) -> Result<()> {
    table(runtime, CommKind::Mpi, Sums::Library)
}

fn demanded(runtime: &Runtime) -> Result<()> {
    runtime.open(layout(runtime.world().size(), 1, 1), CommKind::Nccl, options(Sums::Library)).map(|_| ())
}

fn endless(runtime: &Runtime) -> Result<()> {
    endless_for(runtime, 100)
}

fn endless_for(runtime: &Runtime, timeout_s: u64) -> Result<()> {
    let n = runtime.world().size();
    let how = Options { sums: Sums::Library, timeout: Duration::from_secs(timeout_s) };
    let (device, groups) = runtime.open(layout(n, 1, 1), CommKind::Nccl, how)?;
    let mut x = device.alloc(&[1000], DType::F32)?;
    loop {
        groups.tp.all_reduce(&mut x, ReduceOp::Sum);
        device.finish();
    }
}
