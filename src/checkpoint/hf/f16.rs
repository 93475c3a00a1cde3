//! IEEE half precision to single and back. Every pattern of bits comes back from there and back again as it was, those of NaN too: a
//! directory in F16 survives a checkpoint in f32.

use half::f16;

/// Exactly, with the payload of a NaN.
pub(super) fn widen(bits: u16) -> f32 {
    let value = f16::from_bits(bits);
    if value.is_nan() {
        return f32::from_bits(u32::from(bits & 0x8000) << 16 | 0x7f80_0000 | u32::from(bits & 0x03ff) << 13);
    }
    value.to_f32()
}

/// To the nearest, of two to the even one; None when that would turn a number into infinity. Of a NaN's payload the upper bits stay.
pub(super) fn narrow(value: f32) -> Option<u16> {
    if value.is_nan() {
        let (sign, payload) = ((value.to_bits() >> 16) as u16 & 0x8000, (value.to_bits() >> 13) as u16 & 0x03ff);
        // Without payload it would be infinity.
        return Some(sign | 0x7c00 | if payload == 0 { 0x0200 } else { payload });
    }
    let near = f16::from_f32(value);
    (near.is_finite() || value.is_infinite()).then(|| near.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All 65,536 patterns come back; else an F16 directory would not.
    #[test]
    fn every_half_survives() {
        (0..=u16::MAX).for_each(|bits| assert_eq!(narrow(widen(bits)), Some(bits), "{bits:#06x} by {}", widen(bits)));
    }

    /// A half and its neighbour above lie around a number that goes to the nearer one, and from the middle to the even one, for all
    /// of them, by their values; past the middle between the largest and the next power of two there is no half.
    #[test]
    fn rounds_to_the_nearest_even() {
        // The value of a finite half by its definition, in f64.
        let value = |bits: u16| -> f64 {
            let (exponent, mantissa) = (i32::from(bits >> 10), f64::from(bits & 0x03ff));
            if exponent == 0 { mantissa * 2f64.powi(-24) } else { (1024.0 + mantissa) * 2f64.powi(exponent - 25) }
        };
        for low in 0..0x7bff_u16 {
            let middle = ((value(low) + value(low + 1)) / 2.0) as f32; // 12 significant bits: exact
            let even = low + (low & 1);
            for (number, expected) in [(middle.next_down(), low), (middle, even), (middle.next_up(), low + 1)] {
                assert_eq!(narrow(number), Some(expected), "{number}");
                assert_eq!(narrow(-number), Some(expected | 0x8000), "{number}");
            }
        }
        assert_eq!((narrow(65504.0), narrow(65520.0f32.next_down())), (Some(0x7bff), Some(0x7bff)));
        assert_eq!((narrow(65520.0), narrow(-1e30), narrow(f32::INFINITY)), (None, None, Some(0x7c00)));
        assert_eq!(narrow(f32::from_bits(0xff80_0001)), Some(0xfe00), "a NaN stays one");
    }
}
