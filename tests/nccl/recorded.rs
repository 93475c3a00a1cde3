//! Generation over several GPUs whose decode steps are recorded as graphs, collectives and all: the kernels' source on the CPU below the
//! stand-ins of the driver and of NCCL, which do each stream's work as late as the events allow, also of what was captured.

use crate::common::models;
use crate::options;
use std::ffi::{CStr, c_int, c_void};
use trireme::comm::nccl::Sums;
use trireme::comm::solo::Solo;
use trireme::comm::{Groups, ReduceOp};
use trireme::device::Device;
use trireme::error::Result;
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::kv_memory::Room;
use trireme::infer::request::Request;
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::schedule::Sharing;
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::runtime::{CommKind, Runtime};
use trireme::tensor::{DType, Tensor};

/// Files of kernels that generation in f32 launches.
pub const KERNELS: [&str; 10] =
    ["activation", "attention_cached", "canonical", "elementwise", "embedding", "matmul", "norm", "ordered", "rope", "sample"];

/// A function of the stand-in for the driver.
fn stand_in(name: &CStr) -> *mut c_void {
    // SAFETY: C strings; the library is loaded already.
    let symbol = unsafe { libc::dlsym(libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!symbol.is_null(), "{name:?}");
    symbol
}

/// From now on the driver captures, or not.
fn set_recording(is_on: bool) {
    // SAFETY: the stand-in defines the function with this type.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(c_int)>(stand_in(c"stand_in_refuse_captures"))(c_int::from(!is_on)) }
}

/// Graphs launched so far.
fn n_launched() -> usize {
    // SAFETY: as above.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(stand_in(c"stand_in_launched"))() as usize }
}

fn model() -> ModelConfig {
    ModelConfig { rotary_fraction: 0.5, init_std: 0.3, ..models::nemotron([2, 32, 4, 2, 16, 48, 40], 600) }
}

/// Greedy and drawn, of several lengths; in fast numerics, whose products the stand-in makes by plain loops, also one that outgrows, at 512
/// tokens, what its steps were recorded for.
fn requests(order: Mode) -> Vec<Request> {
    let request = |id: &str, n: usize, n_new: usize, temperature| {
        let prompt = (0..n as u64).map(|i| 2 + (Random::new(n as u64, "prompt").bits(i) % 38) as u32).collect();
        let plain = Request::new(id, prompt, n_new);
        Request { sampling: Sampling { temperature, ..Sampling::PLAIN }, seed: 11, ..plain }
    };
    let long = (order == Mode::Fast).then(|| request("outgrown", 507, 9, 0.0));
    [request("greedy", 9, 9, 0.0), request("drawn", 3, 8, 1.0), request("short", 1, 4, 1.0)].into_iter().chain(long).collect()
}

/// Responses of this rank, as they are written, and how many graphs were launched for them.
fn generated(device: &dyn Device, groups: &Groups, order: Mode, n_sequences: usize) -> (Vec<String>, usize) {
    let before = n_launched();
    let mut chunk = Chunk::new(device, &model(), &groups.layout, groups.at, 0, DType::F32, Purpose::Inference).unwrap();
    chunk.initialise(device, 5);
    chunk.pack(device, &*groups.tp, WeightFormat::Stored).unwrap();
    let batching = Batching { n_sequences, pass_tokens: 256, sharing: Sharing::Shared, draft_tokens: 0, kv_memory: Room::Unknown };
    let generator = Generator { device, groups, chunk: &chunk, eos_ids: vec![1], tokenizer: None, batching, order, stop: &|| false };
    let (requests, mut responses) = (requests(order), Vec::new());
    let done = Done::nothing(&requests);
    let ran = generator.run(&requests, &done, &mut |sample, response| {
        responses.push((done.number(sample).unwrap(), serde_json::to_string(&response).unwrap()));
        Ok(())
    });
    ran.unwrap();
    responses.sort();
    (responses.into_iter().map(|(_, response)| response).collect(), n_launched() - before)
}

/// What layouts have in common: the same bytes with recorded steps and without, for one sequence at a time and for several, in both orders
/// of sums; in the reproducible one those of a rank alone. Steps are recorded where `expects` says so, by all ranks alike.
fn check(runtime: &Runtime, layout: ParallelLayout, comm: CommKind, expects: bool) -> Result<()> {
    for (order, sums) in [(Mode::Reproducible, Sums::Ordered), (Mode::Fast, Sums::Library)] {
        let (device, groups) = runtime.open(layout, comm, options(sums))?;
        let device = &*device;
        for n_sequences in [1, 3] {
            let (found, n_graphs) = generated(device, &groups, order, n_sequences);
            set_recording(false);
            let (expected, none) = generated(device, &groups, order, n_sequences);
            set_recording(true);
            assert_eq!((&found, none), (&expected, 0), "{layout:?} {order:?} {n_sequences}");
            assert_eq!(n_graphs > 5, expects, "{n_graphs} graphs were launched");
            assert!(groups.world.gather_f64(n_graphs as f64).iter().all(|n| *n == n_graphs as f64));
            assert_eq!(groups.world.sum_f64(found.len() as f64), requests(order).len() as f64);
            if order == Mode::Reproducible {
                let alone = Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
                let (alone, _) = generated(device, &alone, order, n_sequences);
                assert!(found.is_empty() || found == alone, "{layout:?} {n_sequences}: {found:?} is not {alone:?}");
            }
        }
    }
    println!("responses are the same");
    Ok(())
}

/// tp x pp over NCCL.
pub fn by_nccl(runtime: &Runtime, tp: usize, pp: usize) -> Result<()> {
    check(runtime, ParallelLayout { tp, pp, dp: 1, vp: 1 }, CommKind::Nccl, true)
}

/// Over host memory: the steps of a stage are recorded when it is one rank.
pub fn by_mpi(runtime: &Runtime, tp: usize, pp: usize) -> Result<()> {
    check(runtime, ParallelLayout { tp, pp, dp: 1, vp: 1 }, CommKind::Mpi, tp == 1)
}

fn tensor(device: &dyn Device, values: &[f32]) -> Tensor {
    let mut x = device.alloc(&[values.len()], DType::F32).unwrap();
    device.upload(bytemuck::cast_slice(values), &mut x);
    x
}

fn values(x: &Tensor) -> Vec<f32> {
    bytemuck::cast_slice(&x.host_bytes()).to_vec()
}

/// Collectives of every kind between kernels, recorded: each time they read what is there then. Those that are not recorded take turns with
/// them.
pub fn collectives(runtime: &Runtime) -> Result<()> {
    let n = runtime.world().size();
    for sums in [Sums::Ordered, Sums::Library] {
        let (device, groups) = runtime.open(ParallelLayout { tp: n, pp: 1, dp: 1, vp: 1 }, CommKind::Nccl, options(sums))?;
        let (device, tp) = (&*device, &*groups.tp);
        // Small enough for one round of messages, and too large for it.
        for len in [12, 9_000] {
            let [mut x, mut sum, mut part] = [len, len, len / n].map(|len| tensor(device, &vec![0.0; len]));
            let mut all = tensor(device, &vec![0.0; len / n * n]);
            let mut work = || {
                device.copy(&mut sum, &x);
                device.scale(&mut sum, 2.0);
                tp.all_reduce(&mut sum, ReduceOp::Sum);
                tp.reduce_scatter(&sum, &mut part);
                device.scale(&mut part, 0.5);
                tp.all_gather(&part, &mut all);
                tp.all_reduce(&mut all, ReduceOp::Max);
                tp.broadcast(&mut sum, n - 1);
            };
            work();
            let recording = device.record(&mut work).expect("this device records");
            for step in 0..3 {
                let of_rank = |rank: usize| (0..len).map(|i| ((i * 7 + rank * 3 + step) % 100) as f32).collect::<Vec<f32>>();
                device.upload(bytemuck::cast_slice(&of_rank(tp.rank())), &mut x);
                assert!(recording.replay(&[]));
                // Sums of small integers are exact.
                let twice: Vec<f32> = (0..len).map(|i| (0..n).map(|rank| 2.0 * of_rank(rank)[i]).sum()).collect();
                let gathered: Vec<f32> = twice.iter().map(|x| x * n as f32 / 2.0).collect();
                assert!(values(&sum) == twice && values(&all) == gathered, "step {step} of {len} elements, {sums:?}");
                tp.all_reduce(&mut x, ReduceOp::Sum);
                assert_eq!(2.0 * values(&x)[5], twice[5]);
            }
        }
    }
    println!("recorded collectives");
    Ok(())
}

/// One rank asks for its recordings in another order: what would hang or mix up values on GPUs is seen by the stand-in.
pub fn astray(runtime: &Runtime) -> Result<()> {
    let (device, groups) = runtime.open(ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 }, CommKind::Nccl, options(Sums::Library))?;
    let mut x = tensor(&*device, &[1.0; 3]);
    groups.tp.broadcast(&mut x, 0);
    let [first, second] = [(); 2].map(|()| device.record(&mut || groups.tp.broadcast(&mut x, 0)).expect("this device records"));
    let order = if groups.tp.rank() == 0 { [&first, &second] } else { [&second, &first] };
    order.iter().for_each(|recording| assert!(recording.replay(&[])));
    device.finish();
    Ok(())
}
