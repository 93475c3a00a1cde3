//! Which algorithm a matrix product gets, on a stand-in for cuBLASLt that proposes three: the second is the fastest, and adds up parts
//! of sums.

use crate::cases::{self, Kind};
use crate::check::check;
use crate::driver::{inside, is_inside, stand_ins};
use std::path::Path;
use std::time::Duration;
use trireme::comm::nccl::{Options, Sums};
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Algorithms;
use trireme::device::{Device, Gemm};
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::{CommKind, DeviceKind, Runtime};
use trireme::tensor::DType;

/// In the process: how algorithms are chosen.
const HOW: &str = "TRIREME_TEST_ALGORITHMS";

fn is_fixed() -> bool {
    std::env::var_os(HOW).is_some_and(|how| how == "fixed")
}

/// Two shapes, each product twice, checked against the oracle: sums into the output too.
fn multiply(cuda: &dyn Device) {
    for how in [Gemm::NT, Gemm::TN.accumulate()] {
        for _ in 0..2 {
            check(cuda, &cases::gemm(how, (5, 7, 3), Kind::F32), DType::BF16);
        }
    }
}

fn choices(folder: &Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(folder.join("cache")).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut choices: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "algorithm")).collect();
    choices.sort();
    choices
}

/// The fastest proposal is taken once it was timed, is found on disk by the next start without asking, and is asked for again where the
/// file is torn, is another product's, or is of another library. Fixed algorithms are the first proposal that adds whole sums, are not
/// timed and leave the disk alone. Timing does not touch what a product adds to.
#[test]
fn the_fastest_algorithm_is_kept() {
    if is_inside() {
        let algorithms = if is_fixed() { Algorithms::Fixed } else { Algorithms::Measured };
        return multiply(&Cuda::open_with(0, algorithms).unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let run = |environment: &[(&str, &str)]| {
        let mut log = inside(folder.path(), "products::the_fastest_algorithm_is_kept", environment);
        log.retain(|line| line.contains("algorithm"));
        log
    };
    let used = |log: &[String], algorithm: usize| {
        let products: Vec<&String> = log.iter().filter(|line| line.starts_with("product by")).collect();
        assert!(products.len() == 4 && products.iter().all(|line| line.ends_with(&format!("algorithm {algorithm}"))), "{log:?}");
        log.iter().filter(|line| line.starts_with("algorithms proposed")).count()
    };
    // Asked once for the plan and once for the timing.
    assert_eq!(used(&run(&[]), 2), 4);
    assert_eq!(choices(folder.path()).len(), 2);
    assert_eq!(used(&run(&[]), 2), 0);
    // A file that was cut short, then one that is another product's.
    let [first, second] = &choices(folder.path())[..] else { panic!("two products") };
    let whole = std::fs::read(first).unwrap();
    std::fs::write(first, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(used(&run(&[]), 2), 2);
    std::fs::copy(second, first).unwrap();
    assert_eq!(used(&run(&[]), 2), 2);
    assert_eq!(used(&run(&[]), 2), 0);
    // Another library.
    assert_eq!(used(&run(&[("STAND_IN_VERSION", "130100")]), 2), 4);
    assert_eq!(choices(folder.path()).len(), 4);
    let log = run(&[(HOW, "fixed")]);
    assert_eq!(used(&log, 1), 2);
    assert!(log.iter().all(|line| !line.ends_with("parts of sums allowed")), "{log:?}");
    assert_eq!(choices(folder.path()).len(), 4);
}

/// A job whose sums over ranks have an order, which is what reproducible numerics ask for, has fixed algorithms; every other the fastest.
#[test]
fn ordered_sums_come_with_fixed_algorithms() {
    if is_inside() {
        let sums = if is_fixed() { Sums::Ordered } else { Sums::Library };
        let runtime = Runtime::start(DeviceKind::Cuda).unwrap();
        let options = Options { sums, timeout: Duration::from_secs(60) };
        return multiply(&*runtime.open(ParallelLayout::SINGLE, CommKind::Auto, options).unwrap().0);
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    for (how, algorithm) in [("measured", "2"), ("fixed", "1")] {
        let log = inside(folder.path(), "products::ordered_sums_come_with_fixed_algorithms", &[(HOW, how)]);
        let used: Vec<&str> = log.iter().filter_map(|line| line.strip_prefix("product by algorithm ")).collect();
        assert!(used.len() == 4 && used.iter().all(|used| *used == algorithm), "{how}: {log:?}");
    }
}
