//! What a device reaches through its own trait on large, well-shaped work: the ceiling that training reports its share of.
//! This file knows nothing of any particular device.

use super::{Device, Gemm};
use crate::error::{Context, Result};
use crate::tensor::{DType, Tensor};
use std::time::{Duration, Instant};

/// Rates that nothing on this device is expected to exceed by much.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ceiling {
    /// Multiplications and additions per second of a large matrix product, f32 accumulation.
    pub gemm_flops_per_s: f64,
    /// Bytes read plus bytes written per second of a large copy.
    pub copy_bytes_per_s: f64,
}

/// Side of the square matrices.
const SIDE: usize = 1024;
/// Elements copied at a time.
const COPIED: usize = 16 << 20;
/// Spent on each of the two.
const SPENT: Duration = Duration::from_millis(400);

/// Best rates seen in about a second of products and copies of `dtype` (f32 or bf16). Err when 100 MB cannot be had.
pub fn measure(device: &dyn Device, dtype: DType) -> Result<Ceiling> {
    let doing = || "measuring the ceiling of the device".to_string();
    let matrix = || filled(device, &[SIDE, SIDE], dtype).doing(doing);
    let (a, b, mut out) = (matrix()?, matrix()?, matrix()?);
    let product_s = best_s(device, &mut || device.gemm(&mut out, &a, &b, Gemm::NT));
    let from = filled(device, &[COPIED], dtype).doing(doing)?;
    let mut to = filled(device, &[COPIED], dtype).doing(doing)?;
    let copy_s = best_s(device, &mut || device.copy(&mut to, &from));
    Ok(Ceiling { gemm_flops_per_s: 2.0 * (SIDE as f64).powi(3) / product_s, copy_bytes_per_s: 2.0 * from.n_bytes() as f64 / copy_s })
}

/// A tensor of ordinary values near 1: zeros would be kinder to some devices than real work is.
fn filled(device: &dyn Device, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let mut tensor = device.alloc(dims, dtype)?;
    let n = tensor.n_elements();
    let value = |i: usize| 1.0 + (i % 61) as f32 / 64.0;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => (0..n).flat_map(|i| value(i).to_ne_bytes()).collect(),
        DType::BF16 => (0..n).flat_map(|i| half::bf16::from_f32(value(i)).to_ne_bytes()).collect(),
        DType::U32 => panic!("the ceiling of u32 products"),
    };
    device.upload(&bytes, &mut tensor);
    Ok(tensor)
}

/// Shortest of as many runs as fit, after one to warm up.
fn best_s(device: &dyn Device, work: &mut dyn FnMut()) -> f64 {
    work();
    device.finish();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < SPENT {
        let start = Instant::now();
        work();
        device.finish();
        best = best.min(start.elapsed().as_secs_f64());
    }
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
            let ceiling = measure(&cpu, dtype).unwrap();
            assert!(ceiling.gemm_flops_per_s.is_finite() && ceiling.gemm_flops_per_s > 1e6, "{ceiling:?}");
            assert!(ceiling.copy_bytes_per_s.is_finite() && ceiling.copy_bytes_per_s > 1e6, "{ceiling:?}");
        }
        assert_eq!(cpu.memory().live_bytes, 0);
        assert!(cpu.memory().peak_bytes >= 2 * 4 * COPIED);
    }
}
