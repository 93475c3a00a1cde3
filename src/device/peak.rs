//! What makers state for their GPUs: dense products without sparsity, floating-point operations a second of one GPU at its full
//! power limit. The yardstick of published utilizations; what the very GPU reaches is measured (`ceiling`).
//!
//! Sources: NVIDIA's data sheets of A100, H100, H100 NVL, H200, GH200 and B200 (half of the figures "with sparsity"). f32 is that
//! of the plain units: products of f32 do not use TF32 here.

use crate::tensor::DType;

/// Of one GPU, by parts of its name; the first that fits. (parts, bf16, f32), 10^12 a second.
const STATED: [(&[&str], f64, f64); 9] = [
    (&["H100", "PCIe"], 756.0, 51.0),
    (&["H100", "NVL"], 835.0, 60.0),
    (&["H200", "NVL"], 835.0, 60.0),
    (&["GH200"], 989.0, 67.0),
    (&["H100"], 989.0, 67.0),
    (&["H200"], 989.0, 67.0),
    (&["H800"], 989.0, 67.0),
    (&["B200"], 2250.0, 75.0),
    (&["A100"], 312.0, 19.5),
];

/// The stated rate of the device of this name, by which a report calls utilization. None when it is not known.
pub fn stated_flops_per_s(device_name: &str, dtype: DType) -> Option<f64> {
    let fits = |parts: &[&str]| parts.iter().all(|part| device_name.contains(part));
    let (_, bf16, f32) = STATED.iter().find(|(parts, ..)| device_name.contains("NVIDIA") && fits(parts))?;
    match dtype {
        DType::BF16 => Some(bf16 * 1e12),
        DType::F32 => Some(f32 * 1e12),
        DType::U32 | DType::F8E4M3 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names that drivers report find their own figure, not that of a relative; a CPU has none.
    #[test]
    fn names_of_drivers_find_their_figure() {
        let bf16 = |name: &str| stated_flops_per_s(name, DType::BF16).map(|flops| flops / 1e12);
        assert_eq!(bf16("NVIDIA H100 80GB HBM3, 132 processors"), Some(989.0));
        assert_eq!(bf16("NVIDIA H100 PCIe, 114 processors"), Some(756.0));
        assert_eq!(bf16("NVIDIA H200 NVL, 132 processors"), Some(835.0));
        assert_eq!(bf16("NVIDIA GH200 480GB"), Some(989.0));
        assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(bf16("cpu, 2 threads, avx512 avx512bf16"), None);
        assert_eq!(stated_flops_per_s("NVIDIA H100 80GB HBM3", DType::F32), Some(67e12));
    }
}
