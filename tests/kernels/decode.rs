//! Decode steps that were recorded: over the emulator, whose recordings run the kernels with the arguments of their time, and on the
//! stand-ins of the driver.

use crate::decode_cases::{self, How};
use crate::driver::{inside, is_inside, stand_ins};
use crate::emulator::{emulator, hopper};
use crate::pooled::Pooled;
use std::sync::Arc;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Backend;
use trireme::device::{Device, Fp8Scales};
use trireme::recipe::Mode;
use trireme::tensor::DType;

/// A step asked for in one call reads the tokens, positions, slots and lengths of its time, not those it was recorded with: its logits
/// and what it adds to the caches have the bits of the same step asked for operation by operation. Every step but the first of a size is
/// such a one, and the one in which a sequence outgrows what was recorded.
#[test]
fn recorded_steps_see_new_values() {
    let Some(backend) = Pooled::new() else { return };
    let device = Cuda::with_backend(Arc::clone(&backend) as Arc<dyn Backend>);
    let mut n_replays = 0;
    decode_cases::check(&device, How::PLAIN, |in_one_call| {
        n_replays += usize::from(in_one_call);
        assert_eq!(backend.n_replays(), n_replays);
    });
}

/// The same with E4M3: scales of inputs are made anew in every step.
#[test]
fn recorded_steps_see_new_values_with_fp8() {
    let Some(backend) = Pooled::new() else { return };
    let device = Cuda::with_backend(Arc::clone(&backend) as Arc<dyn Backend>);
    decode_cases::check(&device, How { weights: Some(Fp8Scales::Tensor), ..How::PLAIN }, |_| {});
    assert!(backend.n_replays() > 0);
}

/// The same in bf16, where a step is kernels from end to end: each does what it does ahead, up to three kernels before its turn, on what
/// memory holds then (kernels/emulate.h). In the shortest order and in the canonical one, also with Hopper's own instructions; attention by
/// FMA, and on tensor cores, where it hints at keys.
#[test]
fn recorded_kernels_may_come_early() {
    let (Some(backend), Some(hopper)) = (emulator(), hopper()) else { return };
    let of_dim_16 = [(&backend, Mode::Fast, 16), (&backend, Mode::Reproducible, 16), (&hopper, Mode::Reproducible, 16)];
    for (backend, order, head_dim) in of_dim_16.into_iter().chain([(&backend, Mode::Fast, 64)]) {
        let device = Cuda::with_backend(Arc::clone(backend) as Arc<dyn Backend>);
        let begun = backend.n_begun();
        decode_cases::check(&device, How { dtype: DType::BF16, order, head_dim, ..How::PLAIN }, |_| {});
        assert!(backend.n_begun() - begun > 90, "{} kernels began ahead", backend.n_begun() - begun);
    }
}

/// What one launch does has the bits of the launches that it stands for.
#[test]
fn fused_operations_keep_their_bits() {
    let Some(backend) = emulator() else { return };
    decode_cases::fused::check(&Cuda::with_backend(backend));
}

fn record_on_the_device() {
    let cuda = Cuda::open(0).unwrap();
    let mut x = cuda.alloc(&[3], DType::F32).unwrap();
    let mut y = cuda.alloc(&[3], DType::F32).unwrap();
    // Kernels are loaded before work is recorded.
    Device::copy(&cuda, &mut y, &x);
    let recording = cuda.record(&mut || {
        Device::copy(&cuda, &mut y, &x);
        cuda.scale(&mut y, 2.0);
    });
    let recording = recording.unwrap();
    for values in [[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]] {
        cuda.upload(bytemuck::cast_slice(&values), &mut x);
        assert!(recording.replay(&[]));
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&y.host_bytes()), values.map(|value| 2.0 * value));
    }
    drop(recording);
    // An upload would be recorded with its bytes of today.
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let bytes = [0u8; 12];
        cuda.record(&mut || cuda.upload(&bytes, &mut x));
    }));
    let message = refused.expect_err("an upload was recorded");
    assert!(message.downcast_ref::<String>().unwrap().contains("an upload while work is recorded"));
}

/// The driver captures the compute stream, makes a graph of it that does nothing yet, and launches that each time.
#[test]
fn the_driver_records_graphs() {
    if is_inside() {
        return record_on_the_device();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let log = inside(folder.path(), "decode::the_driver_records_graphs", &[]);
    let graphs: Vec<&String> = log.iter().filter(|line| line.contains("graph")).collect();
    assert_eq!(graphs, ["graph of 2 calls, 1 dependent", "graph launched", "graph launched", "graph ended"]);
}
