//! Vectors as arrays, for processors without anything better.

use super::{Element, Vector, round_to_bf16};
use half::bf16;

/// Eight lanes in an array, for processors without anything better.
#[derive(Clone, Copy)]
pub struct Plain([f32; 8]);

impl Plain {
    #[inline(always)]
    fn map2(self, y: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Plain(std::array::from_fn(|i| f(self.0[i], y.0[i])))
    }
}

impl Vector for Plain {
    const N: usize = 8;
    const REGISTERS: usize = 16;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Plain([x; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Plain(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        Plain(unsafe { from.cast::<[bf16; 8]>().read_unaligned() }.map(Element::get))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[bf16; 8]>().write_unaligned(self.0.map(round_to_bf16)) }
    }
    #[inline(always)]
    fn add(self, y: Self) -> Self {
        self.map2(y, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, y: Self) -> Self {
        self.map2(y, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, y: Self) -> Self {
        self.map2(y, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, y: Self) -> Self {
        self.map2(y, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, y: Self, z: Self) -> Self {
        self.mul(y).add(z)
    }
    #[inline(always)]
    fn max(self, y: Self) -> Self {
        self.map2(y, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, y: Self) -> Self {
        self.map2(y, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Plain(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding and taking away 1.5 * 2^23 leaves the nearest integer, for |x| < 2^22.
        let magic = Self::splat(12_582_912.0);
        self.add(magic).sub(magic)
    }
    #[inline(always)]
    fn where_below(self, bound: Self, yes: Self, no: Self) -> Self {
        Plain(std::array::from_fn(|i| if self.0[i] < bound.0[i] { yes.0[i] } else { no.0[i] }))
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // NaN becomes 2^0; it is already in the other factor.
        Plain(self.0.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23)))
    }
    #[inline(always)]
    fn log2_e_fraction(self, n: Self) -> Self {
        // Without a fused instruction the product would lose what the subtraction leaves.
        self.map2(n, |x, n| (f64::from(x) * std::f64::consts::LOG2_E - f64::from(n)) as f32)
    }
    #[inline(always)]
    fn dot_bytes(self, y: Self, z: Self) -> Self {
        let dot = |x: f32, y: f32| -> i32 {
            let (x, y) = (x.to_bits().to_le_bytes(), y.to_bits().to_le_bytes());
            (0..4).map(|i| i32::from(x[i]) * i32::from(y[i] as i8)).sum()
        };
        Plain(std::array::from_fn(|i| f32::from_bits((z.0[i].to_bits() as i32).wrapping_add(dot(self.0[i], y.0[i])) as u32)))
    }
    #[inline(always)]
    fn integers_to_float(self) -> Self {
        Plain(self.0.map(|x| x.to_bits() as i32 as f32))
    }
    #[inline(always)]
    fn unzip(self, y: Self) -> (Self, Self) {
        let at = |i: usize| if i < 8 { self.0[i] } else { y.0[i - 8] };
        (Plain(std::array::from_fn(|i| at(2 * i))), Plain(std::array::from_fn(|i| at(2 * i + 1))))
    }
    #[inline(always)]
    fn zip(self, y: Self) -> (Self, Self) {
        let at = |i: usize| if i % 2 == 0 { self.0[i / 2] } else { y.0[i / 2] };
        (Plain(std::array::from_fn(at)), Plain(std::array::from_fn(|i| at(i + 8))))
    }
}
