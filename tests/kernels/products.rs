//! Which algorithm a matrix product gets, on a stand-in for cuBLASLt that proposes three: the second is the fastest, and adds up parts
//! of sums.

use crate::cases::{self, Kind};
use crate::check::check;
use crate::driver::{emulated_kernels, inside, is_inside, stand_ins};
use std::path::Path;
use std::time::Duration;
use trireme::comm::nccl::{Options, Sums};
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Algorithms;
use trireme::device::{Activation, Device, Gemm};
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

/// Files of choices with this ending.
fn choices(cache: &Path, ending: &str) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(cache).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut choices: Vec<_> = files.filter(|path| path.extension().is_some_and(|found| found == ending)).collect();
    choices.sort();
    choices
}

/// The fastest proposal is taken once it was timed, is found on disk by the next start without asking, and is asked for again where the
/// file is torn, is another product's, or is of another library. It is timed on memory that is not in the cache, and the clock of a GPU that only wakes
/// decides nothing. Fixed algorithms are the first proposal that adds whole sums, are not
/// timed and leave the disk alone. Timing does not touch what a product adds to.
#[test]
fn the_fastest_algorithm_is_kept() {
    if is_inside() {
        let algorithms = if is_fixed() { Algorithms::Fixed } else { Algorithms::Measured };
        return multiply(&Cuda::open_with(0, algorithms).unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let cache = folder.path().join("cache");
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
    assert_eq!(choices(&cache, "algorithm").len(), 2);
    assert_eq!(used(&run(&[]), 2), 0);
    // A file that was cut short, then one that is another product's.
    let [first, second] = &choices(&cache, "algorithm")[..] else { panic!("two products") };
    let whole = std::fs::read(first).unwrap();
    std::fs::write(first, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(used(&run(&[]), 2), 2);
    std::fs::copy(second, first).unwrap();
    assert_eq!(used(&run(&[]), 2), 2);
    assert_eq!(used(&run(&[]), 2), 0);
    // Another library.
    assert_eq!(used(&run(&[("STAND_IN_VERSION", "130100")]), 2), 4);
    assert_eq!(choices(&cache, "algorithm").len(), 4);
    let log = run(&[(HOW, "fixed")]);
    assert_eq!(used(&log, 1), 2);
    assert!(log.iter().all(|line| !line.ends_with("parts of sums allowed")), "{log:?}");
    assert_eq!(choices(&cache, "algorithm").len(), 4);
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

/// Products that two can make, each twice: with squared ReLU, forward and backward, and by themselves, of which one is added to what is
/// there; and two that only the library makes, for their rows are no units of the copy engine, or their sums are added to bf16.
fn multiply_in_turn(cuda: &Cuda) {
    let (shape, relu) = ((130, 512, 64), Activation::SquaredRelu);
    for _ in 0..2 {
        check(cuda, &cases::activated::gemm_and_activation(relu, shape), DType::BF16);
        check(cuda, &cases::activated::gemm_activation_backward(relu, shape), DType::BF16);
        check(cuda, &cases::gemm(Gemm::NN, (72, 64, 40), Kind::Float), DType::BF16);
        check(cuda, &cases::gemm(Gemm::TN.accumulate(), (72, 64, 45), Kind::F32), DType::BF16);
        check(cuda, &cases::gemm(Gemm::NT, (72, 64, 45), Kind::Float), DType::BF16);
        check(cuda, &cases::gemm(Gemm::NN.accumulate(), (72, 64, 40), Kind::F32), DType::BF16);
    }
    cuda.contest_table().lines().skip(2).for_each(|line| eprintln!("stand-in: {line}"));
}

/// Our kernels make a product where they take less time than the library's fastest algorithm, and than that with the pass of an
/// activation where they end in it: measured at the first use of a shape, found on disk by the next start, and measured again where the
/// file is torn or the machine is another one. The numbers are right whoever makes them. Fixed algorithms leave all to the library, as
/// does who does without kernels of Hopper.
#[test]
fn products_are_made_by_the_fastest() {
    if is_inside() {
        let algorithms = if is_fixed() { Algorithms::Fixed } else { Algorithms::Measured };
        return multiply_in_turn(&Cuda::open_with(0, algorithms).unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let Some(emulated) = emulated_kernels(folder.path()) else { return };
    let cache_of = |name: &str| folder.path().join(name);
    // The library takes 3 ms, a pass 2.
    let run = |cache: &str, own_ms: u32, environment: &[(&str, &str)]| {
        let (times, cache) = (format!("matmul_hopper_={own_ms} squared_relu=2"), cache_of(cache));
        let mut all = vec![("STAND_IN_KERNELS", emulated.to_str().unwrap()), ("STAND_IN_PROCESSORS", "4"), ("STAND_IN_MS", &times)];
        all.push(("TRIREME_KERNEL_CACHE", cache.to_str().unwrap()));
        all.extend(environment);
        inside(folder.path(), "products::products_are_made_by_the_fastest", &all)
    };
    let count = |log: &[String], what: &str| log.iter().filter(|line| line.starts_with(what)).count();
    let (forward, backward) =
        ("kernel matmul_hopper_whole_nt_squared_relu_bf16", "kernel matmul_hopper_whole_nn_squared_relu_backward_bf16");
    let (plain, added) = ("kernel matmul_hopper_small_nn_bf16", "kernel matmul_hopper_small_turn_tn_bf16");
    let passes = ["kernel squared_relu_bf16", "kernel squared_relu_backward_bf16"];
    // Once to load it and five times to time it; then twice where it is the fastest.
    let (timed, taken) = (6, 2);
    for (own_ms, ends, alone) in [(2, true, true), (4, true, false), (6, false, false)] {
        let (cache, of) = (format!("cache{own_ms}"), |is_own: bool| timed + if is_own { taken } else { 0 });
        let log = run(&cache, own_ms, &[]);
        let makers = |what: &str, library_ms: u32, is_own: bool| {
            let taken = if is_own { "own kernel" } else { "cuBLASLt" };
            format!("| {what} | {library_ms}000.0 | {own_ms}000.0 | {taken} |")
        };
        // The library's way to the activation has the product by whoever is the fastest.
        let product_ms = own_ms.min(3);
        for line in [
            makers("NT 130 x 512 x 64, bf16 =, squared_relu", product_ms + 2, ends),
            makers("NN 130 x 512 x 64, bf16 =, squared_relu_backward", product_ms + 2, ends),
            makers("NT 130 x 512 x 64, bf16 =", 3, alone),
            makers("NN 72 x 64 x 40, bf16 =", 3, alone),
            makers("TN 72 x 64 x 45, f32 +=", 3, alone),
        ] {
            assert!(log.contains(&line), "{line}: {log:#?}");
        }
        assert_eq!(count(&log, "| "), 6, "{log:#?}");
        for (kernel, is_own) in [(forward, ends), (backward, ends), (plain, alone), (added, alone)] {
            assert_eq!(count(&log, kernel), of(is_own), "{own_ms} ms, {kernel}: {log:#?}");
        }
        passes.iter().for_each(|pass| assert_eq!(count(&log, pass), of(!ends), "{own_ms} ms, {pass}: {log:#?}"));
        assert_eq!(choices(&cache_of(&cache), "maker").len(), 6);
        // What was found stays, whatever it would take now.
        let log = run(&cache, 8 - own_ms, &[]);
        for (kernel, is_own) in [(forward, ends), (backward, ends), (plain, alone), (added, alone), (passes[0], !ends), (passes[1], !ends)]
        {
            assert_eq!(count(&log, kernel), if is_own { taken } else { 0 }, "{own_ms} ms, {kernel}: {log:#?}");
        }
        assert_eq!(count(&log, "algorithms proposed"), 0, "{log:#?}");
    }
    // Files that were cut short are measured again, as on another library; then they are there for it.
    for cut in choices(&cache_of("cache2"), "maker") {
        let whole = std::fs::read(&cut).unwrap();
        std::fs::write(cut, &whole[..whole.len() - 1]).unwrap();
    }
    let n_own = |log: &[String]| count(log, "kernel matmul_hopper_");
    assert!(n_own(&run("cache2", 2, &[])) > timed * 4);
    assert_eq!(n_own(&run("cache2", 2, &[])), taken * 4);
    let other = [("STAND_IN_VERSION", "130100")];
    assert!(n_own(&run("cache2", 2, &other)) > timed * 4);
    assert_eq!((choices(&cache_of("cache2"), "maker").len(), n_own(&run("cache2", 2, &other))), (12, taken * 4));
    for without in [(HOW, "fixed"), ("TRIREME_HOPPER_KERNELS", "0")] {
        let log = run("without", 2, &[without]);
        assert_eq!((n_own(&log), count(&log, passes[0]), count(&log, passes[1])), (0, taken, taken), "{without:?}: {log:#?}");
        assert_eq!(choices(&cache_of("without"), "maker").len(), 0);
    }
}
