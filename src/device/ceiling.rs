//! What a device can do at best, measured through its own operations in about a second: the yardstick of every rate that is
//! reported.

use super::{Device, Gemm};
use crate::rng::Random;
use crate::tensor::{DType, Tensor};
use std::time::Instant;

/// Best rates seen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ceiling {
    /// Floating-point operations per second of a large square matrix product on random data.
    pub gemm_flops_per_s: f64,
    /// Bytes read plus bytes written per second of a large copy.
    pub copy_bytes_per_s: f64,
}

/// Side of the product.
const SIDE: usize = 1536;
/// Elements of the copy: far more than any cache.
const COPY_ELEMENTS: usize = 1 << 25;
/// Time for each of the two.
const BUDGET_S: f64 = 0.4;

/// Measures; the best of several repetitions. Panics when the device has no memory for it.
pub fn measure(device: &dyn Device, dtype: DType) -> Ceiling {
    let alloc = |shape: &[usize], dtype| device.alloc(shape, dtype).unwrap_or_else(|error| panic!("{error}"));
    let noise = Random::new(1, "ceiling");
    let values: Vec<f32> = (0..(SIDE * SIDE) as u64).map(|i| noise.uniform(i) as f32 - 0.5).collect();
    let mut wide = alloc(&[SIDE, SIDE], DType::F32);
    device.upload(bytemuck::cast_slice(&values), &mut wide);
    let (mut a, mut b, mut out) = (alloc(&[SIDE, SIDE], dtype), alloc(&[SIDE, SIDE], dtype), alloc(&[SIDE, SIDE], dtype));
    device.copy(&mut a, &wide);
    device.copy(&mut b, &wide);
    let gemm_s = best_s(device, &mut || device.gemm(&mut out, &a, &b, Gemm::NT));
    let (from, mut to): (Tensor, Tensor) = (alloc(&[COPY_ELEMENTS], dtype), alloc(&[COPY_ELEMENTS], dtype));
    let copy_s = best_s(device, &mut || device.copy(&mut to, &from));
    Ceiling {
        gemm_flops_per_s: 2.0 * (SIDE as f64).powi(3) / gemm_s,
        copy_bytes_per_s: (2 * COPY_ELEMENTS * dtype.bytes()) as f64 / copy_s,
    }
}

fn best_s(device: &dyn Device, work: &mut dyn FnMut()) -> f64 {
    let begun = Instant::now();
    let mut best = f64::INFINITY;
    while begun.elapsed().as_secs_f64() < BUDGET_S {
        let started = Instant::now();
        work();
        device.finish();
        best = best.min(started.elapsed().as_secs_f64());
    }
    best
}
