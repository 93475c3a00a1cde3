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

/// Least side of the product.
const SIDE: usize = 1536;
/// Least time of the product, so that asking for it does not count: the side is doubled until it takes that long.
const PRODUCT_S: f64 = 0.002;
/// Most side of the product.
const MOST_SIDE: usize = 12_288;
/// Random numbers, which are repeated: to make as many as a GPU's matrix has would take a host longer than all else here.
const NOISE: usize = (1 << 22) - 3;
/// Elements of the copy: far more than any cache.
const COPY_ELEMENTS: usize = 1 << 25;
/// Least time of the calls that are waited for together, so that waiting does not count: more are asked for until they take that long.
const TOGETHER_S: f64 = 0.002;
/// Time for each of the two.
const BUDGET_S: f64 = 0.4;

/// Measures; the best of several repetitions. Panics when the device has no memory for it.
pub fn measure(device: &dyn Device, dtype: DType) -> Ceiling {
    let alloc = |shape: &[usize], dtype| device.alloc(shape, dtype).unwrap_or_else(|error| panic!("{error}"));
    let mut side = SIDE;
    let gemm_s = loop {
        let seconds = product_s(device, dtype, side);
        if seconds >= PRODUCT_S || side >= MOST_SIDE {
            break seconds;
        }
        side *= 2;
    };
    let (from, mut to): (Tensor, Tensor) = (alloc(&[COPY_ELEMENTS], dtype), alloc(&[COPY_ELEMENTS], dtype));
    let copy_s = best_s(device, &mut || device.copy(&mut to, &from));
    Ceiling {
        gemm_flops_per_s: 2.0 * (side as f64).powi(3) / gemm_s,
        copy_bytes_per_s: (2 * COPY_ELEMENTS * dtype.bytes()) as f64 / copy_s,
    }
}

/// An array far larger than any cache, read by the largest number of each row: what bounds a decode step, which reads every weight once.
pub struct Reading<'a> {
    device: &'a dyn Device,
    /// [rows, columns] f32.
    from: Tensor,
    /// [rows] f32.
    to: Tensor,
    /// Seconds of the best pass so far.
    best_s: f64,
}

impl<'a> Reading<'a> {
    /// Panics when the device has no memory for it.
    pub fn new(device: &'a dyn Device) -> Reading<'a> {
        let alloc = |shape: &[usize]| device.alloc(shape, DType::F32).unwrap_or_else(|error| panic!("{error}"));
        let (rows, columns) = (1 << 9, COPY_ELEMENTS >> 8);
        let (mut from, to) = (alloc(&[rows, columns]), alloc(&[rows]));
        // Pages that nobody wrote are one page of zeros.
        device.copy(&mut from.rows_mut(0..rows / 2), &alloc(&[rows / 2, columns]));
        device.copy(&mut from.rows_mut(rows / 2..rows), &alloc(&[rows / 2, columns]));
        Reading { device, from, to, best_s: f64::INFINITY }
    }

    /// Bytes per second in the mean over so many seconds. Measure it in turn with what is compared with it, for as long: a machine that
    /// others use too is as fast as its best for moments only.
    pub fn bytes_per_s(&mut self, seconds: f64) -> f64 {
        let Reading { device, from, to, best_s } = self;
        let mut rate = 0.0;
        device.run_together(&mut || {
            let (begun, mut n, mut n_done) = (Instant::now(), 1, 0);
            while n_done == 0 || begun.elapsed().as_secs_f64() < seconds {
                let started = Instant::now();
                (0..n).for_each(|_| device.cross_entropy_max(to, from, from.row_len()));
                device.finish();
                let seconds = started.elapsed().as_secs_f64();
                *best_s = best_s.min(seconds / n as f64);
                n_done += n;
                n *= if seconds < TOGETHER_S { 2 } else { 1 };
            }
            rate = (n_done * from.n_bytes()) as f64 / begun.elapsed().as_secs_f64();
        });
        rate
    }

    /// The best pass of all that were measured so far: (bytes per second, seconds). What memory gives for so long at its best moment, and
    /// so a stricter limit of what takes longer than that.
    pub fn best_pass(&self) -> (f64, f64) {
        (self.from.n_bytes() as f64 / self.best_s, self.best_s)
    }
}

/// Seconds of a product of two square matrices of random numbers.
fn product_s(device: &dyn Device, dtype: DType, side: usize) -> f64 {
    let alloc = |dtype| device.alloc(&[side, side], dtype).unwrap_or_else(|error| panic!("{error}"));
    let noise = Random::new(1, "ceiling");
    let block: Vec<f32> = (0..NOISE.min(side * side) as u64).map(|i| noise.uniform(i) as f32 - 0.5).collect();
    let mut values = block.repeat((side * side).div_ceil(block.len()));
    values.truncate(side * side);
    let mut wide = alloc(DType::F32);
    device.upload(bytemuck::cast_slice(&values), &mut wide);
    let (mut a, mut b, mut out) = (alloc(dtype), alloc(dtype), alloc(dtype));
    device.copy(&mut a, &wide);
    device.copy(&mut b, &wide);
    best_s(device, &mut || device.gemm(&mut out, &a, &b, Gemm::NT))
}

/// Asked for together, so that all threads of a host are awake: else what is measured is often how fast one of them reads.
fn best_s(device: &dyn Device, work: &mut (dyn FnMut() + Send)) -> f64 {
    let mut best = f64::INFINITY;
    device.run_together(&mut || {
        let (begun, mut n) = (Instant::now(), 1);
        while begun.elapsed().as_secs_f64() < BUDGET_S {
            let started = Instant::now();
            (0..n).for_each(|_| work());
            device.finish();
            let seconds = started.elapsed().as_secs_f64();
            best = best.min(seconds / f64::from(n));
            n *= if seconds < TOGETHER_S { 2 } else { 1 };
        }
    });
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    /// Both rates are positive and finite for both dtypes, and every byte taken is given back: a report divides by them.
    #[test]
    fn rates_are_usable() {
        let cpu = Cpu::new();
        for dtype in [DType::F32, DType::BF16] {
            let ceiling = measure(&cpu, dtype);
            assert!(ceiling.gemm_flops_per_s.is_finite() && ceiling.gemm_flops_per_s > 1e6, "{ceiling:?}");
            assert!(ceiling.copy_bytes_per_s.is_finite() && ceiling.copy_bytes_per_s > 1e6, "{ceiling:?}");
        }
        let mut reading = Reading::new(&cpu);
        let read = reading.bytes_per_s(0.01);
        assert!(read.is_finite() && read > 1e6, "{read}");
        // The mean of passes, with what is between them, is no more than the best of them.
        let (best, pass_s) = reading.best_pass();
        assert!(best.is_finite() && best >= read && pass_s > 0.0, "{best} at best, {read}");
        drop(reading);
        assert_eq!(cpu.memory().live_bytes, 0);
        assert!(cpu.memory().peak_bytes >= 2 * 4 * COPY_ELEMENTS);
    }
}
