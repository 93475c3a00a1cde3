//! Sums of f64 without rounding: the value of a sum that has no order. A fixed-point number wide enough for every f64 (Kulisch's
//! long accumulator, in limbs of 32 bits with room for carries), rounded once when it is read. Partial sums of threads and ranks
//! are merged in any order, so what is summed this way (the loss, the gradient norm) cannot depend on who summed what.

/// Limbs of 32 bits. Limb i counts units of 2^(32 i - 1088); the smallest f64 is 2^-1074, the largest below 2^1024, and 2^63 of
/// them fit.
const N_LIMBS: usize = 68;
/// Exponent of the lowest bit.
const LOWEST: i32 = -1088;
/// Additions before carries must be passed on: each adds less than 2^32 to a limb of 63 bits.
const MOST_PENDING: u32 = 1 << 30;

/// A sum of f64 values, exact. NaN and infinities are kept beside it, as plain addition would have them.
#[derive(Clone, PartialEq, Debug)]
pub struct ExactSum {
    limbs: [i64; N_LIMBS],
    n_pending: u32,
    not_finite: f64,
}

impl Default for ExactSum {
    fn default() -> Self {
        ExactSum { limbs: [0; N_LIMBS], n_pending: 0, not_finite: 0.0 }
    }
}

impl ExactSum {
    /// Bytes of [`ExactSum::to_bytes`].
    pub const N_BYTES: usize = 8 * (N_LIMBS + 1);

    /// Limbs of 32 bits, the lowest first: limb i counts units of 2^(32 i - 1088). One may hold more than 32 bits, below 2^63.
    pub const N_LIMBS: usize = N_LIMBS;

    /// A sum that somebody else added up, in its limbs; `not_finite` is the sum of the terms that had none. Panics when there are not
    /// [`ExactSum::N_LIMBS`].
    pub fn from_limbs(limbs: &[u64], not_finite: f64) -> ExactSum {
        let mut sum = ExactSum { not_finite, ..ExactSum::default() };
        assert_eq!(limbs.len(), N_LIMBS, "limbs of an exact sum");
        sum.limbs.iter_mut().zip(limbs).for_each(|(to, limb)| *to = i64::try_from(*limb).expect("a limb is below 2^63"));
        sum.pass_carries();
        sum
    }

    /// self += x
    pub fn add(&mut self, x: f64) {
        let bits = x.to_bits();
        let exponent = (bits >> 52 & 0x7ff) as u32;
        if exponent == 0x7ff {
            self.not_finite += x;
            return;
        }
        let fraction = bits & ((1 << 52) - 1);
        // x = mantissa 2^(exponent - 1075) with an exponent of at least 1; its lowest bit is bit exponent + 13 of the sum.
        let mantissa = if exponent == 0 { fraction } else { fraction | 1 << 52 };
        let bit = exponent.max(1) as i32 - 1075 - LOWEST;
        let (limb, shift) = (bit as usize / 32, bit as u32 % 32);
        let wide = u128::from(mantissa) << shift;
        let sign = if bits >> 63 == 1 { -1 } else { 1 };
        for (i, limb) in self.limbs[limb..limb + 3].iter_mut().enumerate() {
            *limb += sign * (wide >> (32 * i) & 0xffff_ffff) as i64;
        }
        self.n_pending += 1;
        if self.n_pending == MOST_PENDING {
            self.pass_carries();
        }
    }

    /// self += other
    pub fn merge(&mut self, other: &ExactSum) {
        self.pass_carries();
        let mut other = other.clone();
        other.pass_carries();
        self.limbs.iter_mut().zip(other.limbs).for_each(|(limb, more)| *limb += more);
        self.n_pending = 2;
        self.not_finite += other.not_finite;
    }

    /// The sum rounded to nearest even.
    pub fn value(&self) -> f64 {
        if self.not_finite != 0.0 {
            return self.not_finite; // NaN is not 0 either
        }
        let mut sum = self.clone();
        sum.pass_carries();
        let is_negative = sum.limbs[N_LIMBS - 1] < 0;
        if is_negative {
            sum.limbs.iter_mut().for_each(|limb| *limb = -*limb);
            sum.pass_carries();
        }
        let Some(top) = sum.limbs.iter().rposition(|&limb| limb != 0) else { return 0.0 };
        // 96 bits from the highest limb with anything in it; what lies below matters only as not being zero.
        let limb = |back: usize| top.checked_sub(back).map_or(0, |i| sum.limbs[i] as u128);
        let head = limb(0) << 64 | limb(1) << 32 | limb(2);
        let below = sum.limbs[..top.saturating_sub(2)].iter().any(|&limb| limb != 0);
        // The first of 64 bits is set, the last stands for all behind it: f64 rounds at bit 53.
        let shift = head.leading_zeros();
        let head = head << shift;
        let rest = head as u64 != 0 || below;
        let mantissa = (head >> 64) as u64 | u64::from(rest);
        let exponent = LOWEST + 32 * (top as i32 - 2) + 64 - shift as i32;
        let size = scale(mantissa as f64, exponent);
        if is_negative { -size } else { size }
    }

    /// For other ranks: [`ExactSum::from_bytes`] gives the same sum.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut sum = self.clone();
        sum.pass_carries();
        let limbs = sum.limbs.iter().flat_map(|limb| limb.to_le_bytes());
        limbs.chain(sum.not_finite.to_le_bytes()).collect()
    }

    /// The inverse of [`ExactSum::to_bytes`]. Panics when there are not [`ExactSum::N_BYTES`].
    pub fn from_bytes(bytes: &[u8]) -> ExactSum {
        assert_eq!(bytes.len(), ExactSum::N_BYTES, "an exact sum has {} bytes", ExactSum::N_BYTES);
        let word = |i: usize| <[u8; 8]>::try_from(&bytes[8 * i..8 * i + 8]).expect("8 bytes");
        let mut sum = ExactSum { n_pending: 1, not_finite: f64::from_le_bytes(word(N_LIMBS)), ..ExactSum::default() };
        sum.limbs.iter_mut().enumerate().for_each(|(i, limb)| *limb = i64::from_le_bytes(word(i)));
        sum
    }

    /// Limbs in 0..2^32, the highest with the sign.
    fn pass_carries(&mut self) {
        let mut carry = 0;
        for limb in &mut self.limbs[..N_LIMBS - 1] {
            let sum = *limb + carry;
            *limb = sum & 0xffff_ffff;
            carry = sum >> 32;
        }
        self.limbs[N_LIMBS - 1] += carry;
        self.n_pending = 1;
    }
}

impl FromIterator<f64> for ExactSum {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> ExactSum {
        let mut sum = ExactSum::default();
        values.into_iter().for_each(|x| sum.add(x));
        sum
    }
}

/// x 2^exponent. Where the result is subnormal x has no more bits than it, so every step is exact.
fn scale(x: f64, exponent: i32) -> f64 {
    let power = |n: i32| f64::from_bits(((n + 1023) as u64) << 52);
    let mut left = exponent;
    let mut x = x;
    while left < -1000 {
        x *= power(-1000);
        left += 1000;
    }
    while left > 1000 {
        x *= power(1000);
        left -= 1000;
    }
    x * power(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Random;

    fn value(i: u64, spread: u64) -> f64 {
        let bits = Random::new(5, "exact").bits(i);
        let exponent = 1023 - spread / 2 + bits % spread;
        f64::from_bits((bits >> 63) << 63 | exponent << 52 | bits >> 12)
    }

    /// Integers of many sizes, some of them cancelling: an i128 knows the sum. Wrong limbs, carries or signs would show.
    #[test]
    fn equals_integer_arithmetic() {
        for n in [1u64, 2, 3, 100, 5000] {
            let terms: Vec<i64> = (0..n).map(|i| (Random::new(n, "integers").bits(i) as i64) >> (11 + i % 50)).collect();
            let expected: i128 = terms.iter().map(|&x| i128::from(x)).sum();
            let sum: ExactSum = terms.iter().map(|&x| x as f64).collect();
            assert_eq!(sum.value(), expected as f64, "{n} terms");
            let scaled: ExactSum = terms.iter().map(|&x| x as f64 * 2f64.powi(-900)).collect();
            assert_eq!(scaled.value(), expected as f64 * 2f64.powi(-900), "{n} small terms");
        }
    }

    /// Any order and any division into partial sums gives the same bits, also through bytes: that is what it is for.
    #[test]
    fn has_no_order() {
        let terms: Vec<f64> = (0..3000).map(|i| value(i, 600)).collect();
        let forward: ExactSum = terms.iter().copied().collect();
        let backward: ExactSum = terms.iter().rev().copied().collect();
        let mut merged = ExactSum::default();
        for part in terms.chunks(7).rev() {
            let part: ExactSum = part.iter().copied().collect();
            merged.merge(&ExactSum::from_bytes(&part.to_bytes()));
        }
        assert_eq!(forward.value().to_bits(), backward.value().to_bits());
        assert_eq!(forward.value().to_bits(), merged.value().to_bits());
        assert_eq!(forward.to_bytes(), merged.to_bytes());
    }

    /// Rounding to nearest even at the edges: ties, a bit far below a tie, subnormals, overflow, cancellation, NaN.
    #[test]
    fn rounds_once() {
        let sum = |terms: &[f64]| terms.iter().copied().collect::<ExactSum>().value();
        let ulp = f64::EPSILON;
        assert_eq!(sum(&[1.0, ulp / 2.0]), 1.0);
        assert_eq!(sum(&[1.0 + ulp, ulp / 2.0]), 1.0 + 2.0 * ulp);
        assert_eq!(sum(&[1.0, ulp / 2.0, 1e-300]), 1.0 + ulp);
        assert_eq!(sum(&[-1.0, -ulp / 2.0, -1e-300]), -1.0 - ulp);
        assert_eq!(sum(&[1e300, 1.0, -1e300]), 1.0);
        assert_eq!(sum(&[5e-324, 5e-324]), 1e-323);
        assert_eq!(sum(&[f64::MIN_POSITIVE, -5e-324]), f64::MIN_POSITIVE - 5e-324);
        assert_eq!(sum(&[f64::MAX, f64::MAX]), f64::INFINITY);
        assert_eq!(sum(&[f64::MAX, f64::MAX, -f64::MAX]), f64::MAX);
        assert_eq!(sum(&[]).to_bits(), 0.0f64.to_bits());
        assert!(sum(&[1.0, f64::NAN]).is_nan() && sum(&[f64::INFINITY, f64::NEG_INFINITY]).is_nan());
        assert_eq!(sum(&[1.0, f64::INFINITY]), f64::INFINITY);
    }
}
