//! Vectors of f32 lanes: one trait, three implementations (AVX-512, AVX2 with FMA, plain arrays), chosen at run time.
//!
//! A kernel is written once over `V: Vector` inside the `kernel!` macro, which compiles it under each target feature, since the
//! crate itself is built for the baseline processor. bf16 is widened at loads and rounded to nearest even at stores (by
//! integer arithmetic, or where the processor can by its own instruction, which makes subnormals 0). This file knows nothing of operations.

mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::tensor::{DType, Tensor};
use half::bf16;
pub use plain::Plain;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// What the processor can do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    /// Whatever the compiler's baseline is.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with dot products of bf16 and of bytes (VNNI): processors with the first have the second.
    Avx512Bf16,
}

impl Isa {
    /// The best this processor has.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                let dots = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
                return match (wide, dots) {
                    (true, true) => Isa::Avx512Bf16,
                    (true, false) => Isa::Avx512,
                    _ => Isa::Avx2,
                };
            }
        }
        Isa::Portable
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512 avx512bf16",
        }
    }
}

/// `N` f32 lanes. The methods are unsafe where they touch memory; all of them need the target feature of the type, which
/// `kernel!` provides.
pub trait Vector: Copy {
    /// Lanes.
    const N: usize;
    /// Vector registers of the processor.
    const REGISTERS: usize;
    /// Whether there are dot products of bf16: `pack_pairs` and `dot_pairs`.
    const DOTS_PAIRS: bool = false;
    /// 2^f for |f| <= 1/2, the highest power first.
    #[allow(clippy::approx_constant)] // one of them is close to ln 2, as it must be
    const EXP2: [f32; 6] = [1.326_472_8e-3, 9.671_514e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1, 1.0];
    /// Where `exp` becomes 0.
    const EXP_ZERO: f32 = -87.336_54;
    /// All lanes the same.
    fn splat(x: f32) -> Self;
    /// SAFETY: `N` elements are readable.
    unsafe fn load(from: *const f32) -> Self;
    /// SAFETY: `N` elements are writable.
    unsafe fn store(self, to: *mut f32);
    /// SAFETY: `N` elements are readable.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// SAFETY: `N` elements are writable.
    unsafe fn store_bf16(self, to: *mut bf16);
    /// The first `n` < `N` elements, zeros behind them. SAFETY: they are readable.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        let mut part = [0.0; 16];
        // SAFETY: the caller's promise; N <= 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), n);
            Self::load(part.as_ptr())
        }
    }
    /// The first `n` < `N` lanes. SAFETY: `n` elements are writable.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        let part = self.lanes();
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to, n) };
    }
    /// The first `n` < `N` elements, zeros behind them. SAFETY: they are readable.
    #[inline(always)]
    unsafe fn load_bf16_first(from: *const bf16, n: usize) -> Self {
        let mut part = [bf16::ZERO; 16];
        // SAFETY: the caller's promise; N <= 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), n);
            Self::load_bf16(part.as_ptr())
        }
    }
    /// The first `n` < `N` lanes. SAFETY: `n` elements are writable.
    #[inline(always)]
    unsafe fn store_bf16_first(self, to: *mut bf16, n: usize) {
        let mut part = [bf16::ZERO; 16];
        // SAFETY: the caller's promise; N <= 16.
        unsafe {
            self.store_bf16(part.as_mut_ptr());
            std::ptr::copy_nonoverlapping(part.as_ptr(), to, n);
        }
    }
    fn add(self, y: Self) -> Self;
    fn sub(self, y: Self) -> Self;
    fn mul(self, y: Self) -> Self;
    fn div(self, y: Self) -> Self;
    /// self * y + z, rounded once where the processor can.
    fn fma(self, y: Self, z: Self) -> Self;
    /// The larger; `y` where either is NaN.
    fn max(self, y: Self) -> Self;
    /// The smaller; `y` where either is NaN.
    fn min(self, y: Self) -> Self;
    fn sqrt(self) -> Self;
    /// 1 / self for finite lanes from 2^-126, within 2 units of roundoff; below 2^-126 the result may be 0.
    #[inline(always)]
    fn reciprocal(self) -> Self {
        Self::splat(1.0).div(self)
    }
    /// Nearest integer.
    fn round(self) -> Self;
    /// self < bound ? yes : no, lane by lane; no for NaN.
    fn where_below(self, bound: Self, yes: Self, no: Self) -> Self;
    /// 2^self for integral lanes in [-126, 127].
    fn power_of_two(self) -> Self;
    /// The pairs of two vectors of (even, odd) elements apart: lanes 0, 2, 4.. and lanes 1, 3, 5.. of their concatenation.
    fn unzip(self, y: Self) -> (Self, Self);
    /// The inverse of `unzip`.
    fn zip(self, y: Self) -> (Self, Self);
    /// Lane j of row i of the first N rows becomes lane i of row j: log2 N perfect shuffles.
    #[inline(always)]
    fn transpose(tile: &mut [Self; 16]) {
        let mut width = 1;
        while width < Self::N {
            let old = *tile;
            for i in 0..Self::N / 2 {
                (tile[2 * i], tile[2 * i + 1]) = old[i].zip(old[i + Self::N / 2]);
            }
            width *= 2;
        }
    }
    /// Words of two bf16, rounded to nearest even: self in the low halves, `high` in the high ones. Only where there are dot
    /// products of bf16.
    #[inline(always)]
    fn pack_pairs(self, _high: Self) -> Self {
        unreachable!("pairs of bf16 on a processor without their dot products")
    }
    /// Each word is two bf16. Those of two vectors, in pairs of one of self (in the low half) and one of y: of the first N, of the last N.
    /// Only where there are dot products of bf16.
    #[inline(always)]
    fn zip_halves(self, _y: Self) -> (Self, Self) {
        unreachable!("pairs of bf16 on a processor without their dot products")
    }
    /// z + the dot products of the pairs of bf16 in the words of self and y. Only where there are dot products of bf16.
    #[inline(always)]
    fn dot_pairs(self, _y: Self, _z: Self) -> Self {
        unreachable!("pairs of bf16 on a processor without their dot products")
    }
    /// z + the dot products of the four bytes in the words of self, unsigned, and y, signed; z and the result are 32-bit integers that
    /// wrap around.
    fn dot_bytes(self, y: Self, z: Self) -> Self;
    /// 32-bit integers as numbers, rounded to nearest even.
    fn integers_to_float(self) -> Self;
    /// 2 N elements as (even, odd). SAFETY: they are readable.
    #[inline(always)]
    unsafe fn load_pairs_bf16(from: *const bf16) -> (Self, Self) {
        // SAFETY: the caller's promise.
        unsafe { Self::load_bf16(from).unzip(Self::load_bf16(from.add(Self::N))) }
    }

    /// Zero in all lanes.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }

    /// The lanes as an array padded to 16.
    #[inline(always)]
    fn lanes(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        // SAFETY: N <= 16 elements are writable.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// Sum of the lanes, in a fixed tree.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.lanes();
        let mut width = Self::N / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let lanes = self.lanes();
        lanes[..Self::N].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// self * log2(e) - n, rounded once.
    #[inline(always)]
    fn log2_e_fraction(self, n: Self) -> Self {
        self.fma(Self::splat(std::f32::consts::LOG2_E), Self::zero().sub(n))
    }

    /// self * 2^n for integral n in [-126, 128].
    #[inline(always)]
    fn scaled(self, n: Self) -> Self {
        // In two halves, because 2^128 alone has no exponent field.
        let half = n.mul(Self::splat(0.5)).round();
        self.mul(half.power_of_two()).mul(n.sub(half).power_of_two())
    }

    /// e^self within (4 + |x| / 4) units of roundoff (2^-24), relatively; exactly 1 at 0, 0 under -87.3 (where f32 goes subnormal),
    /// inf or the largest finite number over 88.8, NaN for NaN. 2^(x log2 e) by a degree-5 minimax polynomial of the fraction (error 1.8
    /// units); the |x| / 4 is log2 e rounded to f32.
    #[inline(always)]
    fn exp(self) -> Self {
        let x = Self::splat(89.0).min(self);
        let log2_e = Self::splat(std::f32::consts::LOG2_E);
        let n = x.mul(log2_e).round();
        let f = x.log2_e_fraction(n);
        let mut p = Self::splat(Self::EXP2[0]);
        for c in &Self::EXP2[1..] {
            p = p.fma(f, Self::splat(*c));
        }
        self.where_below(Self::splat(Self::EXP_ZERO), Self::zero(), p.scaled(n))
    }
}

/// An element in memory that is f32 in registers.
pub trait Element: Copy + Send + Sync + bytemuck::Pod {
    /// Its name in tensors.
    const DTYPE: DType;
    /// To f32.
    fn get(self) -> f32;
    /// From f32, rounded to nearest even.
    fn from_f32(x: f32) -> Self;
    /// SAFETY: `V::N` elements are readable.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    /// SAFETY: `V::N` elements are writable.
    unsafe fn store<V: Vector>(to: *mut Self, x: V);
    /// The first `n` < `V::N`, zeros behind them. SAFETY: they are readable.
    unsafe fn load_first<V: Vector>(from: *const Self, n: usize) -> V;
    /// The first `n` < `V::N`. SAFETY: they are writable.
    unsafe fn store_first<V: Vector>(to: *mut Self, n: usize, x: V);
    /// 2 N elements as (even, odd). SAFETY: `2 * V::N` elements are readable.
    #[inline(always)]
    unsafe fn load_pairs<V: Vector>(from: *const Self) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe { Self::load::<V>(from).unzip(Self::load(from.add(V::N))) }
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn store<V: Vector>(to: *mut Self, x: V) {
        // SAFETY: the caller's promise.
        unsafe { x.store(to) }
    }
    #[inline(always)]
    unsafe fn load_first<V: Vector>(from: *const Self, n: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_first(from, n) }
    }
    #[inline(always)]
    unsafe fn store_first<V: Vector>(to: *mut Self, n: usize, x: V) {
        // SAFETY: the caller's promise.
        unsafe { x.store_first(to, n) }
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        round_to_bf16(x)
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store<V: Vector>(to: *mut Self, x: V) {
        // SAFETY: the caller's promise.
        unsafe { x.store_bf16(to) }
    }
    #[inline(always)]
    unsafe fn load_first<V: Vector>(from: *const Self, n: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16_first(from, n) }
    }
    #[inline(always)]
    unsafe fn store_first<V: Vector>(to: *mut Self, n: usize, x: V) {
        // SAFETY: the caller's promise.
        unsafe { x.store_bf16_first(to, n) }
    }
    #[inline(always)]
    unsafe fn load_pairs<V: Vector>(from: *const Self) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe { V::load_pairs_bf16(from) }
    }
}

/// The elements of a host tensor of this type.
pub fn elements<E: Element>(tensor: &Tensor) -> &[E] {
    assert_eq!(tensor.dtype(), E::DTYPE, "{tensor:?}");
    bytemuck::cast_slice(tensor.bytes())
}

/// The elements of a host tensor of this type, to write.
pub fn elements_mut<E: Element>(tensor: &mut Tensor) -> &mut [E] {
    assert_eq!(tensor.dtype(), E::DTYPE, "{tensor:?}");
    bytemuck::cast_slice_mut(tensor.bytes_mut())
}

#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 })
}

/// `n` <= V::N elements from `i`, zeros behind them.
#[inline(always)]
pub fn load<V: Vector, E: Element>(x: &[E], i: usize, n: usize) -> V {
    let x = &x[i..i + n];
    // SAFETY: the slice has n <= N elements.
    unsafe { if n == V::N { E::load(x.as_ptr()) } else { E::load_first(x.as_ptr(), n.min(V::N)) } }
}

/// The first `n` <= V::N lanes to `x[i..]`.
#[inline(always)]
pub fn store<V: Vector, E: Element>(x: &mut [E], i: usize, n: usize, value: V) {
    let x = &mut x[i..i + n];
    // SAFETY: the slice has n <= N elements.
    unsafe { if n == V::N { E::store(x.as_mut_ptr(), value) } else { E::store_first(x.as_mut_ptr(), n.min(V::N), value) } }
}

/// Has the processor fetch the cache lines of a slice, if it can be told to.
#[inline(always)]
pub fn prefetch<E>(x: &[E]) {
    (0..size_of_val(x)).step_by(64).for_each(|at| prefetch_line(x.as_ptr().wrapping_byte_add(at)));
}

/// The same for the cache line of an address, which need not be one of ours.
#[inline(always)]
pub fn prefetch_line<E>(at: *const E) {
    hint::<3, E>(at); // _MM_HINT_T0
}

/// The same, into the second-level cache alone.
#[inline(always)]
pub fn prefetch_near<E>(at: *const E) {
    hint::<2, E>(at); // _MM_HINT_T1
}

/// The same for a line that is read once, so that it displaces little of what the outer caches keep.
#[inline(always)]
pub fn prefetch_once<E>(at: *const E) {
    hint::<0, E>(at); // _MM_HINT_NTA
}

/// A line may come, in the way that x86 gives the number HINT; elsewhere nothing.
#[inline(always)]
fn hint<const HINT: i32, E>(at: *const E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<HINT>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// `kernel! { fn name<E..>(args) -> R { body over V } }` makes `fn name<E..>(isa, args) -> R`, compiled for every instruction set.
/// Type parameters are elements. The body sees the vector type under the name given after `over`.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident over $v:ident [$($e:ident),*] ($($arg:ident: $ty:ty),* $(,)?) $(-> $r:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<$($e: $crate::device::cpu::lanes::Element),*>(isa: $crate::device::cpu::lanes::Isa, $($arg: $ty),*) $(-> $r)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$v: $crate::device::cpu::lanes::Vector, $($e: $crate::device::cpu::lanes::Element),*>($($arg: $ty),*) $(-> $r)? $body
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::device::cpu::lanes::{Avx2, Avx512, Isa};
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512bf16<$($e: $crate::device::cpu::lanes::Element),*>($($arg: $ty),*) $(-> $r)? {
                    body::<Avx512<true>, $($e),*>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<$($e: $crate::device::cpu::lanes::Element),*>($($arg: $ty),*) $(-> $r)? {
                    body::<Avx512<false>, $($e),*>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$($e: $crate::device::cpu::lanes::Element),*>($($arg: $ty),*) $(-> $r)? {
                    body::<Avx2, $($e),*>($($arg),*)
                }
                if isa == Isa::Avx512Bf16 {
                    // SAFETY: `isa` says that the processor has these features.
                    return unsafe { avx512bf16::<$($e),*>($($arg),*) };
                }
                if isa == Isa::Avx512 {
                    // SAFETY: `isa` says that the processor has these features.
                    return unsafe { avx512::<$($e),*>($($arg),*) };
                }
                if isa == Isa::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2::<$($e),*>($($arg),*) };
                }
            }
            let _ = isa;
            body::<$crate::device::cpu::lanes::Plain, $($e),*>($($arg),*)
        }
    };
}

/// Runs the body for i = 0, N, 2N.. below len, with n = N and once for the rest with n < N, so that the whole vectors are
/// compiled without a branch.
macro_rules! each {
    ($v:ident, $len:expr, |$i:ident, $n:ident| $body:block) => {{
        let len = $len;
        let mut $i = 0;
        while $i + $v::N <= len {
            let $n = $v::N;
            $body
            $i += $v::N;
        }
        if $i < len {
            let $n = len - $i;
            $body
        }
    }};
}
pub(crate) use {each, kernel};

#[cfg(test)]
mod tests {
    use super::*;

    kernel! {
        pub fn exp_all over V [] (x: &[f32], y: &mut [f32]) {
            each!(V, x.len(), |i, n| { store(y, i, n, load::<V, f32>(x, i, n).exp()) })
        }
    }
    kernel! {
        pub fn reciprocal_all over V [] (x: &[f32], y: &mut [f32]) {
            each!(V, x.len(), |i, n| { store(y, i, n, load::<V, f32>(x, i, n).reciprocal()) })
        }
    }
    kernel! {
        pub fn convert over V [A, B] (x: &[A], y: &mut [B]) {
            each!(V, x.len(), |i, n| { store(y, i, n, load::<V, A>(x, i, n)) })
        }
    }
    kernel! {
        pub fn unzip_zip over V [] (x: &[f32], y: &mut [f32], z: &mut [f32]) {
            let (a, b) = (load::<V, f32>(x, 0, V::N), load::<V, f32>(x, V::N, V::N));
            let (even, odd) = a.unzip(b);
            store(y, 0, V::N, even);
            store(y, V::N, V::N, odd);
            let (a, b) = even.zip(odd);
            store(z, 0, V::N, a);
            store(z, V::N, V::N, b);
        }
    }

    fn isas() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|isa| *isa <= Isa::detect()).collect()
    }

    /// exp is within its stated error of the f64 one over its whole range, on every instruction set: a wrong coefficient or exponent shows.
    #[test]
    fn exp_is_accurate() {
        let x: Vec<f32> = (0..400_003).map(|i| -87.3 + 176.02 * (i as f32) / 400_002.0).collect();
        for isa in isas() {
            let mut y = vec![f32::NAN; x.len()];
            exp_all(isa, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).exp();
                let allowed = (4.0 + f64::from(x.abs()) / 4.0) * exact * f64::from(f32::EPSILON) / 2.0;
                assert!((f64::from(*y) - exact).abs() <= allowed, "{isa:?} exp({x}) = {y}, not {exact}");
            }
            let special = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, -0.0, f32::INFINITY, 1e30, 88.8, f32::NAN];
            let mut y = [0.5; 9];
            exp_all(isa, &special, &mut y);
            assert_eq!(y[..5], [0.0, 0.0, 0.0, 1.0, 1.0], "{isa:?}");
            assert!(y[5..8].iter().all(|y| *y > 3.4e38), "{isa:?} {y:?}");
            assert!(y[8].is_nan(), "{isa:?}");
        }
    }

    /// reciprocal is within its stated error over all magnitudes it promises, and 0, not NaN, for what is larger.
    #[test]
    fn reciprocal_is_accurate() {
        let x: Vec<f32> = (0..252 * 1001).map(|i| 2f32.powi(i / 1001 - 126) * (1.0 + (i % 1001) as f32 / 1001.0)).collect();
        for isa in isas() {
            let mut y = vec![f32::NAN; x.len()];
            reciprocal_all(isa, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let exact = 1.0 / f64::from(*x);
                assert!((f64::from(*y) - exact).abs() <= exact * f64::from(f32::EPSILON), "{isa:?} 1/{x:e} = {y:e}, not {exact:e}");
            }
            let mut y = [f32::NAN; 2];
            reciprocal_all(isa, &[2f32.powi(127), f32::MAX], &mut y);
            assert!(y.iter().all(|y| (0.0..=5.9e-39).contains(y)), "{isa:?} {y:?}");
        }
    }

    /// Rounding to bf16 equals the `half` crate's on ties, subnormals (0 where the processor rounds itself), overflow, infinities and NaN,
    /// and widening is exact.
    #[test]
    fn bf16_rounds_to_nearest_even() {
        let patterns = (0..1u32 << 20).map(|i| i.wrapping_mul(4099)).chain((0..1 << 16).map(|i| i << 16 | 0x8000));
        let x: Vec<f32> = patterns.map(f32::from_bits).collect();
        for isa in isas() {
            let mut y = vec![bf16::from_f32(0.0); x.len()];
            convert(isa, &x, &mut y);
            let mut z = vec![0.0f32; x.len()];
            convert(isa, &y, &mut z);
            for ((x, y), z) in x.iter().zip(&y).zip(&z) {
                let flushed = isa == Isa::Avx512Bf16 && x.is_subnormal();
                let expected = bf16::from_f32(if flushed { 0f32.copysign(*x) } else { *x });
                assert!(expected.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()), "{isa:?} {x:e}: {y:?} is not {expected:?}");
                assert!(z.to_bits() == y.to_f32().to_bits() || z.is_nan(), "{isa:?} {x:e}");
            }
        }
    }

    /// Even and odd elements are parted and joined again in order, on every instruction set.
    #[test]
    fn unzip_and_zip_are_inverse() {
        for isa in isas() {
            let n = if isa >= Isa::Avx512 { 16 } else { 8 };
            let x: Vec<f32> = (0..2 * n).map(|i| i as f32).collect();
            let (mut y, mut z) = (vec![0.0; 2 * n], vec![0.0; 2 * n]);
            unzip_zip(isa, &x, &mut y, &mut z);
            let expected: Vec<f32> = (0..n).map(|i| 2.0 * i as f32).chain((0..n).map(|i| 2.0 * i as f32 + 1.0)).collect();
            assert_eq!((y, &z), (expected, &x), "{isa:?}");
        }
    }
}
