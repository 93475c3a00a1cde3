//! Vectors of AVX-512 and AVX2.

use super::Vector;
use half::bf16;
use std::arch::x86_64::*;

/// Sixteen lanes. With `BF16` the processor rounds to bf16 itself: to nearest even, but 0 for subnormals.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>(pub __m512);

/// The mask of n < 16 lanes.
#[inline(always)]
fn first(n: usize) -> u16 {
    (1 << n) - 1
}

impl<const BF16: bool> Avx512<BF16> {
    /// As bf16, rounded to nearest even.
    #[inline(always)]
    fn rounded(self) -> __m256i {
        if BF16 {
            // SAFETY: see below; both are 256 plain bits.
            return unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0)) };
        }
        // SAFETY: see below.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
        }
    }
}

// SAFETY (every block below): the type is only used inside `kernel!` functions compiled with these target features and
// called after their detection; pointers are the caller's promise.
impl<const BF16: bool> Vector for Avx512<BF16> {
    const N: usize = 16;
    const REGISTERS: usize = 32;
    const DOTS_PAIRS: bool = BF16;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: see above.
        unsafe {
            let half = _mm256_loadu_si256(from.cast());
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(to.cast(), self.rounded()) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        // SAFETY: see above; masked lanes are not touched.
        Avx512(unsafe { _mm512_maskz_loadu_ps(first(n), from) })
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        // SAFETY: see above.
        unsafe { _mm512_mask_storeu_ps(to, first(n), self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16_first(from: *const bf16, n: usize) -> Self {
        // SAFETY: see above.
        unsafe {
            let half = _mm256_maskz_loadu_epi16(first(n), from.cast());
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_first(self, to: *mut bf16, n: usize) {
        // SAFETY: see above.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), first(n), self.rounded()) }
    }
    #[inline(always)]
    fn add(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_add_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn sub(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_sub_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn mul(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_mul_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn div(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_div_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn fma(self, y: Self, z: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, y.0, z.0) })
    }
    #[inline(always)]
    fn max(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_max_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn min(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_min_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn where_below(self, bound: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0), no.0, yes.0) })
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    fn unzip(self, y: Self) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            (Avx512(_mm512_permutex2var_ps(self.0, even, y.0)), Avx512(_mm512_permutex2var_ps(self.0, odd, y.0)))
        }
    }
    #[inline(always)]
    unsafe fn load_pairs_bf16(from: *const bf16) -> (Self, Self) {
        // A pair is a 32-bit lane: the even element below, the odd one above.
        // SAFETY: see above.
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))), Avx512(_mm512_castsi512_ps(odd)))
        }
    }
    #[inline(always)]
    fn zip(self, y: Self) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            (Avx512(_mm512_permutex2var_ps(self.0, low, y.0)), Avx512(_mm512_permutex2var_ps(self.0, high, y.0)))
        }
    }
    #[inline(always)]
    fn transpose(tile: &mut [Self; 16]) {
        // Blocks of 1, 2, 4 and 8 lanes change places; unlike shuffles of the whole vector these stay in their quarters or move them whole.
        // SAFETY: see above.
        unsafe {
            for i in (0..16).step_by(4) {
                let [a, b, c, d] = [tile[i].0, tile[i + 1].0, tile[i + 2].0, tile[i + 3].0];
                let pairs = [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b), _mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)];
                let (a, b) = (_mm512_castps_pd(pairs[0]), _mm512_castps_pd(pairs[1]));
                let (c, d) = (_mm512_castps_pd(pairs[2]), _mm512_castps_pd(pairs[3]));
                tile[i].0 = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                tile[i + 1].0 = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                tile[i + 2].0 = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                tile[i + 3].0 = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            for i in 0..4 {
                let [a, b, c, d] = [tile[i].0, tile[4 + i].0, tile[8 + i].0, tile[12 + i].0];
                let (even, odd) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
                let (even2, odd2) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(c, d), _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d));
                tile[i].0 = _mm512_shuffle_f32x4::<0b10_00_10_00>(even, even2);
                tile[4 + i].0 = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd, odd2);
                tile[8 + i].0 = _mm512_shuffle_f32x4::<0b11_01_11_01>(even, even2);
                tile[12 + i].0 = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd, odd2);
            }
        }
    }
    #[inline(always)]
    fn pack_pairs(self, high: Self) -> Self {
        if !BF16 {
            unreachable!("pairs of bf16 on a processor without their dot products");
        }
        // SAFETY: see above; all are 512 plain bits.
        unsafe {
            let apart = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high.0, self.0));
            // 16-bit lane 2 i from i, lane 2 i + 1 from 16 + i.
            let order = _mm512_add_epi32(
                _mm512_set1_epi32(0x0010_0000),
                _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x0001_0001)),
            );
            Avx512(_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, apart)))
        }
    }
    #[inline(always)]
    fn zip_halves(self, y: Self) -> (Self, Self) {
        // SAFETY: see above; all are 512 plain bits.
        unsafe {
            // 16-bit lane 2 i from i of self, lane 2 i + 1 from i of y, which is 32 + i.
            let low = _mm512_add_epi32(
                _mm512_set1_epi32(0x0020_0000),
                _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x0001_0001)),
            );
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(0x0010_0010));
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(y.0));
            let (low, high) = (_mm512_permutex2var_epi16(x, low, y), _mm512_permutex2var_epi16(x, high, y));
            (Avx512(_mm512_castsi512_ps(low)), Avx512(_mm512_castsi512_ps(high)))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, y: Self, z: Self) -> Self {
        if !BF16 {
            unreachable!("pairs of bf16 on a processor without their dot products");
        }
        // SAFETY: see above; all are 512 plain bits.
        unsafe {
            Avx512(_mm512_dpbf16_ps(z.0, std::mem::transmute::<__m512, __m512bh>(self.0), std::mem::transmute::<__m512, __m512bh>(y.0)))
        }
    }
    #[inline(always)]
    fn dot_bytes(self, y: Self, z: Self) -> Self {
        // SAFETY: see above; all are 512 plain bits.
        unsafe {
            let (x, y, z) = (_mm512_castps_si512(self.0), _mm512_castps_si512(y.0), _mm512_castps_si512(z.0));
            let sums = if BF16 {
                _mm512_dpbusd_epi32(z, x, y)
            } else {
                // Even bytes and odd ones as 16 bits each: their products in pairs need 17.
                let (even, odd) = (_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(x));
                let even = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(y)));
                _mm512_add_epi32(z, _mm512_add_epi32(even, _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(y))))
            };
            Avx512(_mm512_castsi512_ps(sums))
        }
    }
    #[inline(always)]
    fn integers_to_float(self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(self.0)) })
    }
    #[inline(always)]
    fn exp(self) -> Self {
        // As the trait's, with 2^n added to the exponent as an integer, which leaves the multiplying units to the polynomial.
        // SAFETY: see above.
        unsafe {
            let largest = _mm512_set1_ps(88.722_83);
            let log2_e = _mm512_set1_ps(std::f32::consts::LOG2_E);
            // Behind 1.5 * 2^23 stand the integers: the low bits of `shifted` are n.
            let magic = _mm512_set1_ps(12_582_912.0);
            let x = _mm512_min_ps(largest, self.0);
            let shifted = _mm512_fmadd_ps(x, log2_e, magic);
            let f = _mm512_fmsub_ps(x, log2_e, _mm512_sub_ps(shifted, magic));
            let mut p = _mm512_set1_ps(Self::EXP2[0]);
            for c in &Self::EXP2[1..] {
                p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
            }
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            let normal = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(Self::EXP_ZERO));
            // Elsewhere 0, or NaN where x is: the second operand is what comes out for NaN.
            let other = _mm512_castps_si512(_mm512_max_ps(_mm512_setzero_ps(), x));
            Avx512(_mm512_castsi512_ps(_mm512_mask_add_epi32(other, normal, _mm512_castps_si512(p), exponent)))
        }
    }
    #[inline(always)]
    fn reciprocal(self) -> Self {
        // 14 bits, doubled by a step of Newton's: a third of a division's time.
        // SAFETY: see above.
        let guess = Avx512(unsafe { _mm512_rcp14_ps(self.0) });
        // SAFETY: see above.
        let error = Avx512(unsafe { _mm512_fnmadd_ps(self.0, guess.0, _mm512_set1_ps(1.0)) });
        guess.fma(error, guess)
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub struct Avx2(pub __m256);

// SAFETY (every block below): as for Avx512.
impl Vector for Avx2 {
    const N: usize = 8;
    const REGISTERS: usize = 16;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: see above.
        unsafe { Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        // SAFETY: see above.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
            _mm_storeu_si128(to.cast(), packed);
        }
    }
    #[inline(always)]
    fn add(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_add_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn sub(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_sub_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn mul(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_mul_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn div(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_div_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn fma(self, y: Self, z: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_fmadd_ps(self.0, y.0, z.0) })
    }
    #[inline(always)]
    fn max(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_max_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn min(self, y: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_min_ps(self.0, y.0) })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_sqrt_ps(self.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn where_below(self, bound: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, bound.0)) })
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    fn dot_bytes(self, y: Self, z: Self) -> Self {
        // SAFETY: see above; all are 256 plain bits.
        unsafe {
            let (x, y, z) = (_mm256_castps_si256(self.0), _mm256_castps_si256(y.0), _mm256_castps_si256(z.0));
            let (even, odd) = (_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(x));
            let even = _mm256_madd_epi16(even, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(y)));
            let sums = _mm256_add_epi32(z, _mm256_add_epi32(even, _mm256_madd_epi16(odd, _mm256_srai_epi16::<8>(y))));
            Avx2(_mm256_castsi256_ps(sums))
        }
    }
    #[inline(always)]
    fn integers_to_float(self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(self.0)) })
    }
    #[inline(always)]
    fn unzip(self, y: Self) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let (even, odd) = (_mm256_shuffle_ps::<0b10_00_10_00>(self.0, y.0), _mm256_shuffle_ps::<0b11_01_11_01>(self.0, y.0));
            let order = |v| _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(v)));
            (Avx2(order(even)), Avx2(order(odd)))
        }
    }
    #[inline(always)]
    fn zip(self, y: Self) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(self.0, y.0), _mm256_unpackhi_ps(self.0, y.0));
            (Avx2(_mm256_permute2f128_ps::<0x20>(low, high)), Avx2(_mm256_permute2f128_ps::<0x31>(low, high)))
        }
    }
}
