//! Randomness as a pure function of (seed, purpose, counter): Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers:
//! as easy as 1, 2, 3"). Initial weights, data order and sampling noise are keyed by logical index, so they do not depend
//! on the layout, the number of ranks, or the point of a resume.

/// A stream of random values, addressed by index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Random {
    key: [u32; 2],
}

impl Random {
    /// The stream of this seed for this purpose ("init layers.3.mlp.up.weight", "order 0 2", ..).
    pub fn new(seed: u64, purpose: &str) -> Random {
        let key = xxhash_rust::xxh3::xxh3_64_with_seed(purpose.as_bytes(), seed);
        Random { key: [key as u32, (key >> 32) as u32] }
    }

    /// 64 random bits at `index`.
    pub fn bits(&self, index: u64) -> u64 {
        let block = self.block(index);
        u64::from(block[0]) | u64::from(block[1]) << 32
    }

    /// Uniform in (0, 1), 53 bits, at `index`.
    pub fn uniform(&self, index: u64) -> f64 {
        ((self.bits(index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal at `index` (Box-Muller in f64; one value a counter).
    pub fn normal(&self, index: u64) -> f64 {
        let block = self.block(index);
        let radius_bits = u64::from(block[0]) | u64::from(block[1]) << 32;
        let angle_bits = u64::from(block[2]) | u64::from(block[3]) << 32;
        let u = ((radius_bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let v = (angle_bits >> 11) as f64 / (1u64 << 53) as f64;
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }

    fn block(&self, index: u64) -> [u32; 4] {
        philox4x32_10([index as u32, (index >> 32) as u32, 0, 0], self.key)
    }
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published test vectors of Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(philox4x32_10(pi, [0xa4093822, 0x299f31d0]), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    /// Mean, variance and fourth moment of the normals are 0, 1, 3 within five standard errors of n samples.
    #[test]
    fn normals_have_normal_moments() {
        let (stream, n) = (Random::new(7, "test"), 200_000u64);
        let mut moments = [0.0; 3];
        for i in 0..n {
            let x = stream.normal(i);
            moments[0] += x / n as f64;
            moments[1] += x * x / n as f64;
            moments[2] += x.powi(4) / n as f64;
        }
        let error = 5.0 / (n as f64).sqrt();
        assert!(moments[0].abs() < error, "{moments:?}");
        assert!((moments[1] - 1.0).abs() < error * 2f64.sqrt(), "{moments:?}");
        assert!((moments[2] - 3.0).abs() < error * 96f64.sqrt(), "{moments:?}");
    }
}
