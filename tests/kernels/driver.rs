//! The backend that a GPU would have, on libraries that stand in for CUDA's (stand_in.c): which calls it makes, in which order,
//! with which arguments. What a GPU does with them is not tested here.

use crate::cases::{self, Kind};
use crate::check::check;
use crate::decode_cases::{self, How};
use crate::emulator::{emulator, library::library_of};
use std::path::{Path, PathBuf};
use std::process::Command;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Algorithms;
use trireme::device::{Device, Gemm, Heads};
use trireme::recipe::Mode;
use trireme::tensor::DType;

/// Set in the process that finds the stand-ins in its library path.
const INSIDE: &str = "TRIREME_TEST_STAND_IN";

/// On the stand-ins. The fourth rank of a machine with two GPUs.
fn use_the_device() {
    let cuda = Cuda::open(3).unwrap();
    assert_eq!(cuda.name(), "cuda, stand-in, 132 processors");
    let tt = Gemm { trans_a: true, ..Gemm::NT };
    for how in [Gemm::NN, Gemm::NT, Gemm::TN, tt] {
        for how in [how, how.accumulate()] {
            check(&cuda, &cases::gemm(how, (5, 7, 3), Kind::F32), DType::F32);
            check(&cuda, &cases::gemm(how, (5, 7, 3), Kind::F32), DType::BF16);
        }
    }
    let heads = Heads { query: 4, kv: 2, dim: 128 };
    let qkv = cuda.alloc(&[70, heads.qkv_columns()], DType::BF16).unwrap();
    assert!(qkv.host_bytes().iter().all(|byte| *byte == 0));
    let (mut out, mut lse) = (cuda.alloc(&[70, 512], DType::BF16).unwrap(), cuda.alloc(&[4, 70], DType::F32).unwrap());
    for _ in 0..2 {
        cuda.attention(&mut out, &mut lse, &qkv, &[0, 70], heads);
    }
    // More uploads than the driver has room for at once, and one that is larger than the room; all from memory that is gone at once.
    for n in [200_000, 3 << 20] {
        let mut all: Vec<_> = (0..9).map(|_| cuda.alloc(&[n], DType::U32).unwrap()).collect();
        for (i, x) in all.iter_mut().enumerate() {
            cuda.upload(bytemuck::cast_slice(&vec![i as u32; n]), x);
        }
        for (i, x) in all.iter().enumerate() {
            assert!(bytemuck::cast_slice::<u8, u32>(&x.host_bytes()).iter().all(|value| *value == i as u32), "upload {i} of {n}");
        }
    }
    // Another thread has no context of its own yet.
    std::thread::scope(|scope| scope.spawn(|| assert!(cuda.alloc(&[3], DType::F32).is_ok())).join().unwrap());
    let error = cuda.alloc(&[1 << 30, 1 << 28], DType::F32).unwrap_err().to_string();
    assert!(error.contains("out of device memory"), "{error}");
}

/// Whether this process finds the stand-ins.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs one test of this program again where it finds the stand-ins of a folder, and returns what they say, line by line.
pub fn inside(folder: &Path, test: &str, environment: &[(&str, &str)]) -> Vec<String> {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    again.env("LD_LIBRARY_PATH", folder).env("TRIREME_KERNEL_CACHE", folder.join("cache")).envs(environment.iter().copied());
    let output = again.output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{environment:?}: {log}{}", String::from_utf8_lossy(&output.stdout));
    log.lines().filter_map(|line| line.strip_prefix("stand-in: ").map(String::from)).collect()
}

/// Compiles the stand-ins into a folder; None where there is no compiler.
pub fn stand_ins(folder: &Path) -> Option<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/stand_in.c");
    // The first names that are looked for, so that the real ones are not found before.
    let library = folder.join("libcuda.so");
    let made = Command::new("gcc").args(["-shared", "-fPIC", "-w", "-O2", "-o"]).arg(&library).arg(source).output();
    let Ok(made) = made else {
        println!("skipped: gcc does not start");
        return None;
    };
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for name in ["libnvrtc.so", "libcublasLt.so"] {
        // One file under three names is loaded once.
        std::fs::hard_link(&library, folder.join(name)).unwrap();
    }
    Some(())
}

/// Products come out right through cuBLASLt's column-major terms; the GPU is the rank's by
/// turns; a kernel is compiled once and taken from the disk by the next process; it is allowed its shared memory once, before its
/// first launch, and its arguments lie where the driver looks, a matrix for the copy engine encoded once; page-locked memory is taken
/// once; no device memory is lost at the end.
#[test]
fn calls_are_those_a_gpu_needs() {
    if is_inside() {
        return use_the_device();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let logs = [(); 2].map(|()| {
        let mut log = inside(folder.path(), "driver::calls_are_those_a_gpu_needs", &[]);
        log.retain(|line| !line.contains("algorithm") && !line.contains("asked for")); // see products.rs and below
        log
    });
    let launch = "attention_hopper_d128_bf16 on 4 x 1 x 1 of 384 x 1 x 1, shares 164936: 128 128 70 2 0.0883883";
    // bf16, no interleave, swizzle over 128 bytes, fetched as 256, zeros outside; boxes of queries and of keys are one here.
    let matrix = "matrix of type 9, 128 x 8 x 70, strides 256 and 2048, boxes 64 x 1 x 128, 0 3 3 0";
    let code = "loaded attention_hopper_forward.cu --gpu-architecture=sm_90a";
    let allowed = "attention_hopper_d128_bf16 may share 164936 (8)";
    let segment = "4194304 bytes page-locked";
    let chunk = "8388608 bytes page-locked"; // two, at the first download
    let expected = |compiled: &[&str]| {
        let head = ["GPU 1", "stream 0 of priority 0", "stream 1 of priority 0"];
        let tail = [code, allowed, matrix, launch, launch, "end with 0 pieces of memory"];
        [&head[..], &[segment; 4], &[chunk; 2], compiled, &tail].concat().iter().map(|line| line.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(logs[0], expected(&["compiled attention_hopper_forward.cu"]));
    assert_eq!(logs[1], expected(&[]));
    // Where Hopper's own are not wanted, those that run on every GPU do.
    let log = inside(folder.path(), "driver::calls_are_those_a_gpu_needs", &[("TRIREME_HOPPER_KERNELS", "0")]);
    assert!(log.iter().any(|line| line.starts_with("attention_d128_bf16 on 3 x 2 x 1 of 128 ")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("hopper") || line.contains("matrix of")), "{log:?}");
}

/// A folder with the emulated kernels of every file under its name, for STAND_IN_KERNELS. None where there is no compiler.
pub fn emulated_kernels(folder: &Path) -> Option<PathBuf> {
    emulator()?;
    let emulated = folder.join("emulated");
    std::fs::create_dir(&emulated).unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "cu") {
            let file = path.file_stem().unwrap().to_str().unwrap();
            std::fs::copy(library_of(file).0, emulated.join(format!("{file}.so"))).unwrap();
        }
    }
    Some(emulated)
}

/// On stand-ins that run kernels.
fn run_kernels() {
    let cuda = Cuda::open_with(0, Algorithms::Fixed).unwrap();
    for heads in [(4, 2, 64), (6, 2, 128), (2, 1, 192)] {
        check(&cuda, &cases::attention(vec![0, 17, 83], heads), DType::BF16);
        check(&cuda, &cases::attention_backward(vec![0, 17, 83], heads), DType::BF16);
        check(&cuda, &cases::attention_cached(&[(0, 280, 20), (0, 5, 1)], heads), DType::BF16);
    }
    for how in [Gemm::NT, Gemm::NN, Gemm::TN] {
        check(&cuda, &cases::gemm_in_pairs(how, (61, 47, 101), Kind::Float, 2), DType::BF16);
        check(&cuda, &cases::gemm(how, (61, 47, 101), Kind::Float), DType::BF16);
        check(&cuda, &cases::gemm(how.accumulate(), (61, 47, 101), Kind::F32), DType::BF16);
    }
    check(&cuda, &cases::gemm_in_turn(Gemm::TN.accumulate(), (61, 47, 101), 3), DType::BF16);
    for order in [Mode::Fast, Mode::Reproducible] {
        decode_cases::check(&cuda, How { dtype: DType::BF16, order, ..How::PLAIN }, |_| {});
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}

/// What the driver is given is what kernels need: arguments, shared memory, matrices for the copy engine as it encodes them, products of
/// bf16, and steps recorded as a graph whose kernels may begin early, all run with the results of the formulas.
#[test]
fn kernels_run_below_the_driver() {
    if is_inside() {
        return run_kernels();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let Some(emulated) = emulated_kernels(folder.path()) else { return };
    let log = inside(folder.path(), "driver::kernels_run_below_the_driver", &[("STAND_IN_KERNELS", emulated.to_str().unwrap())]);
    let n_dependent = |line: &str| line.strip_prefix("graph of ")?.strip_suffix(" dependent")?.rsplit(' ').next()?.parse::<usize>().ok();
    assert!(log.iter().filter_map(|line| n_dependent(line)).any(|n| n > 10), "{log:?}");
    assert!(log.iter().any(|line| line == "graph launched") && log.iter().any(|line| line.starts_with("matrix of ")), "{log:?}");
}

/// On stand-ins of 256 MiB.
fn fill_the_memory() {
    let cuda = Cuda::open(0).unwrap();
    let take = |mib: usize| cuda.alloc(&[mib << 18], DType::F32);
    let asked = |mib: usize| eprintln!("stand-in: test: {mib} MiB");
    let mut kept = take(100).unwrap();
    cuda.upload(&vec![7u8; 100 << 20], &mut kept);
    for _ in 0..3 {
        asked(100);
        drop(take(100).unwrap());
    }
    // 32 MiB are cuBLASLt's: there is no room beside the two pieces, one of which is free.
    asked(110);
    let other = take(110).unwrap();
    assert!(take(20).is_err());
    assert!(kept.host_bytes().iter().all(|byte| *byte == 7) && other.host_bytes().iter().all(|byte| *byte == 0));
}

/// Freed memory is lent again without asking the driver, and goes back to it when a piece of another size finds no room; what is in use
/// stays as it is.
#[test]
fn free_memory_goes_back_when_there_is_none_left() {
    if is_inside() {
        return fill_the_memory();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let mut log = inside(folder.path(), "driver::free_memory_goes_back_when_there_is_none_left", &[("STAND_IN_MIB", "256")]);
    log.retain(|line| line.contains("asked for") || line.starts_with("test: ") || line.starts_with("end"));
    let mib = |n: usize| format!("{} bytes of memory asked for", n << 20);
    let test = |n: usize| format!("test: {n} MiB");
    let expected =
        [mib(32), mib(100), test(100), mib(100), test(100), test(100), test(110), mib(110), "end with 0 pieces of memory".into()];
    assert_eq!(log, expected);
}

/// What a GPU refuses the stand-in refuses (refusals.c): a launch, a copy, a matrix or a call in a capture that is wrong in one thing, of
/// every kind; and not the same call where it is right.
#[test]
fn the_stand_in_refuses_what_a_gpu_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("refusals");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/refusals.c");
    let Ok(made) = Command::new("gcc").args(["-w", "-o"]).arg(&program).arg(source).args(["-lpthread", "-ldl"]).output() else {
        println!("skipped: gcc does not start");
        return;
    };
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let output = Command::new(&program).output().unwrap();
    let answers = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && answers == "151 calls\n", "{answers}");
}

/// A library of an older CUDA, whose declarations are others, is refused before anything is asked of it, in one line that says what to do.
#[test]
fn an_older_library_is_refused() {
    if is_inside() {
        let error = Cuda::open(0).err().expect("12.9 is too old").to_string();
        assert!(error.contains("libcublasLt is 12.9 on this machine, 13.0 is needed") && !error.contains('\n'), "{error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let log = inside(folder.path(), "driver::an_older_library_is_refused", &[("STAND_IN_VERSION", "120900")]);
    assert!(log.is_empty(), "{log:?}");
}
