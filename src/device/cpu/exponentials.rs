//! Exponentials of a row of logits in f64, for the sampler on the host. Every element goes through the same operations, none of them
//! fused, and sums have a fixed number of lanes: the bits are the same on every machine.

use super::lanes::{Isa, kernel};

/// Bins of a histogram over the depth of a logit: how far it is below the largest.
pub const BINS: usize = 2048;
/// Bins to a nat of depth, or a factor of e in probability; the last bin begins at 64 nats.
pub const BINS_A_NAT: f64 = 32.0;

/// Lanes of a sum.
pub const LANES: usize = 16;
/// Below it exp is 0: e^-700 of the largest counts for nothing.
const EXP_ZERO: f64 = -700.0;
/// Added to a number up to 2^51, it leaves the nearest integer in the low bits.
const TO_INTEGER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
/// ln 2 in two parts, of which the first times an integer up to 2^10 is exact.
const LN_2: [f64; 2] = [f64::from_bits(0x3fe6_2e42_fee0_0000), f64::from_bits(0x3dea_39ef_3579_3c76)];
/// 1 / n! from n = 13 down: the Taylor series of exp, off by less than 2^-57 within ln 2 / 2.
const TAYLOR: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    1.0 / 2.0,
    1.0,
    1.0,
];

/// e^x for x <= 0, within four units of roundoff; NaN for NaN.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let is_zero = x < EXP_ZERO;
    let x = if is_zero { EXP_ZERO } else { x };
    let power = x * std::f64::consts::LOG2_E + TO_INTEGER;
    let whole = power - TO_INTEGER;
    let rest = (x - whole * LN_2[0]) - whole * LN_2[1];
    let mut sum = TAYLOR[0];
    for term in &TAYLOR[1..] {
        sum = sum * rest + term;
    }
    let scale = f64::from_bits(1f64.to_bits().wrapping_add(power.to_bits() << 52));
    if is_zero { 0.0 } else { sum * scale }
}

/// The bin of a depth in nats: never a lower one for a larger depth; the last for NaN.
#[inline(always)]
fn bin_of(depth: f64) -> u32 {
    let bins = depth * BINS_A_NAT;
    let bins = if bins < (BINS - 1) as f64 { bins } else { (BINS - 1) as f64 };
    (bins - 0.5 + TO_INTEGER).to_bits() as u32 & (BINS as u32 - 1)
}

/// Weight and bin of a logit.
#[inline(always)]
fn weighed(logit: f32, top: f64, temperature: f64) -> (f64, u16) {
    let depth = (top - f64::from(logit)) / temperature;
    (exp(-depth), bin_of(depth) as u16)
}

kernel! {
    /// weights = exp((logit - top) / temperature), bins = the bins of (top - logit) / temperature; all of one length. Returns the sum of
    /// the weights, what `sum` gives when the temperature is 1.
    pub fn weigh over V [] (logits: &[f32], top: f64, temperature: f64, weights: &mut [f64], bins: &mut [u16]) -> f64 {
        let mut sums = [0.0; LANES];
        let (blocks, rest) = logits.as_chunks::<LANES>();
        let (weights, last_weights) = weights.as_chunks_mut::<LANES>();
        let (bins, last_bins) = bins.as_chunks_mut::<LANES>();
        for ((logits, weights), bins) in blocks.iter().zip(weights).zip(bins) {
            for (((logit, weight), bin), sum) in logits.iter().zip(weights).zip(bins).zip(&mut sums) {
                (*weight, *bin) = weighed(*logit, top, temperature);
                *sum += *weight;
            }
        }
        for (((logit, weight), bin), sum) in rest.iter().zip(last_weights).zip(last_bins).zip(&mut sums) {
            (*weight, *bin) = weighed(*logit, top, temperature);
            *sum += *weight;
        }
        sums.iter().sum()
    }
}

kernel! {
    /// The sum of exp(logit - top).
    pub(crate) fn sum over V [E] (logits: &[E], top: f64) -> f64 {
        let mut sums = [0.0; LANES];
        let (blocks, rest) = logits.as_chunks::<LANES>();
        for block in blocks {
            for (sum, logit) in sums.iter_mut().zip(block) {
                *sum += exp(f64::from(logit.get()) - top);
            }
        }
        for (sum, logit) in sums.iter_mut().zip(rest) {
            *sum += exp(f64::from(logit.get()) - top);
        }
        sums.iter().sum()
    }
}

kernel! {
    /// Where elements of `bins` are `bin`, added to `places` in order.
    pub fn places_of over V [] (bins: &[u16], bin: u16, places: &mut Vec<u32>) {
        for (block, bins) in bins.chunks(64).enumerate() {
            // Most blocks have none: one comparison of all of it says so.
            if bins.iter().map(|other| u16::from(*other == bin)).sum::<u16>() > 0 {
                places.extend((0..bins.len()).filter(|i| bins[*i] == bin).map(|i| (64 * block + i) as u32));
            }
        }
    }
}

kernel! {
    /// Where this number stands first; 0 when it is nowhere.
    pub(crate) fn first_of over V [E] (logits: &[E], number: f32) -> usize {
        for (block, logits) in logits.chunks(64).enumerate() {
            // Most blocks do not have it: one comparison of all of it says so.
            if logits.iter().map(|logit| u32::from(logit.get() == number)).sum::<u32>() > 0 {
                return 64 * block + logits.iter().position(|logit| logit.get() == number).unwrap_or(0);
            }
        }
        0
    }
}

kernel! {
    /// The largest of a row; -inf when it is empty or has nothing but NaN.
    pub(crate) fn largest over V [E] (logits: &[E]) -> f32 {
        let mut most = [f32::NEG_INFINITY; LANES];
        let (blocks, rest) = logits.as_chunks::<LANES>();
        for block in blocks {
            for (most, logit) in most.iter_mut().zip(block) {
                let logit = logit.get();
                *most = if logit > *most { logit } else { *most };
            }
        }
        most.into_iter().chain(rest.iter().map(|logit| logit.get())).fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The bin of a depth in nats, for a few of them.
pub fn bin(depth: f64) -> usize {
    bin_of(depth) as usize
}

/// What the processor can do.
pub fn isa() -> Isa {
    Isa::detect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Within four units of roundoff of the library's exp over its whole range, 0 below and NaN for NaN, and the same bits with
    /// every instruction set: a response may be continued on another machine.
    #[test]
    fn exponentials_are_accurate_and_the_same_everywhere() {
        let logits: Vec<f32> = (0..100_003).map(|i| -(i as f32) * 0.0071).chain([-1e30, f32::NEG_INFINITY, f32::NAN]).collect();
        let weighed = |isa: Isa, temperature: f64| {
            let (mut weights, mut bins) = (vec![0.0; logits.len()], vec![0; logits.len()]);
            weigh(isa, &logits, 0.0, temperature, &mut weights, &mut bins);
            let places = |bin: u16| -> Vec<u32> { (0..bins.len() as u32).filter(|i| bins[*i as usize] == bin).collect() };
            for bin in [0, 1, 777, BINS as u16 - 1] {
                let mut found = Vec::new();
                places_of(isa, &bins, bin, &mut found);
                assert_eq!(found, places(bin), "{isa:?}");
            }
            (weights, bins)
        };
        for temperature in [0.3, 1.0, 1.7] {
            let (weights, bins) = weighed(Isa::Portable, temperature);
            for ((&logit, &weight), &bin) in logits.iter().zip(&weights).zip(&bins) {
                let (x, depth) = (f64::from(logit) / temperature, -f64::from(logit) / temperature);
                let expected = if x < EXP_ZERO { 0.0 } else { x.exp() };
                assert!((weight - expected).abs() <= 4.0 * f64::EPSILON * expected || (x.is_nan() && weight.is_nan()), "exp {x}: {weight}");
                let exact = (depth * BINS_A_NAT).min((BINS - 1) as f64);
                assert!((f64::from(bin) - exact + 0.5).abs() <= 0.5 + 1e-9 || x.is_nan(), "depth {depth}: bin {bin}");
            }
            assert!(bins[..logits.len() - 1].is_sorted());
            let bits = |weights: &[f64]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
            let finite = &logits[..logits.len() - 1];
            for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|isa| *isa <= Isa::detect()) {
                let (others, other_bins) = weighed(isa, temperature);
                assert!(bits(&others[..finite.len()]) == bits(&weights[..finite.len()]) && other_bins == bins, "{isa:?}");
                assert_eq!(sum(isa, finite, 0.0).to_bits(), sum(Isa::Portable, finite, 0.0).to_bits(), "{isa:?}");
                let (mut weights, mut bins) = (vec![0.0; finite.len()], vec![0; finite.len()]);
                let total = weigh(isa, finite, 0.0, 1.0, &mut weights, &mut bins);
                assert_eq!(total.to_bits(), sum(isa, finite, 0.0).to_bits(), "{isa:?}");
                assert_eq!(largest(isa, &logits), 0.0);
                // The first of all, behind others, the last, and of none.
                for place in [0, 1, 63, 64, 700, finite.len() - 1] {
                    let first = finite.iter().position(|logit| *logit == finite[place]);
                    assert_eq!(Some(first_of(isa, &logits, finite[place])), first, "{isa:?}");
                }
                assert_eq!((first_of(isa, &logits, 1.0), first_of::<f32>(isa, &[], 1.0)), (0, 0), "{isa:?}");
            }
        }
    }
}
