//! Weighted blend of sources as a pure function: sample number -> (source, number within the source), O(1), exact. Weights
//! become whole shares of a period of 65,536 samples; within it the order is Tijdeman's (1980, "The chairman assignment
//! problem"), so after any number k of samples each source's count differs from k * share by less than one.

use crate::error::{Error, Result};

/// Samples after which the pattern repeats; weights are rounded to multiples of 1 / PERIOD.
pub const PERIOD: u64 = 1 << 16;

/// The pattern of one period.
pub struct Blend {
    /// Samples of each source in a period.
    shares: Vec<u64>,
    /// Source of each sample of a period, and how many of that source come before it.
    pattern: Vec<(u32, u32)>,
}

impl Blend {
    /// Errors: no weight, a weight that is not positive, or one too small to get a sample of a period.
    pub fn new(weights: &[f64]) -> Result<Blend> {
        if weights.is_empty() {
            return Err(Error::recipe("data.train names no source").remedy("name at least one directory of token shards"));
        }
        if let Some(wrong) = weights.iter().find(|&&weight| !(weight > 0.0 && weight.is_finite())) {
            return Err(Error::recipe(format!("data.train has the weight {wrong}")).remedy("weights are positive numbers"));
        }
        let shares = whole_shares(weights);
        if let Some(source) = shares.iter().position(|&share| share == 0) {
            let wrong = format!("data.train.{source}.weight = {} is less than 1 / {PERIOD} of the sum", weights[source]);
            return Err(Error::recipe(wrong).remedy("raise it or leave the source out"));
        }
        Ok(Blend { pattern: tijdeman(&shares), shares })
    }

    /// (source, number within the source) of a sample.
    pub fn at(&self, sample: u64) -> (usize, u64) {
        let (source, before) = self.pattern[(sample % PERIOD) as usize];
        (source as usize, sample / PERIOD * self.shares[source as usize] + u64::from(before))
    }

    /// Samples of each source in a period of [`PERIOD`].
    pub fn shares(&self) -> &[u64] {
        &self.shares
    }
}

/// Shares of PERIOD by largest remainder; ties to the first.
fn whole_shares(weights: &[f64]) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| weight / sum * PERIOD as f64).collect();
    let mut shares: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| (exact[b] - exact[b].floor()).total_cmp(&(exact[a] - exact[a].floor())).then(a.cmp(&b)));
    let missing = PERIOD - shares.iter().sum::<u64>();
    order.iter().cycle().take(missing as usize).for_each(|&source| shares[source] += 1);
    shares
}

/// Each sample goes to the source whose deadline is nearest among those that are due. All in whole numbers: with n sources,
/// units of 1 / (PERIOD * (2n - 2)).
fn tijdeman(shares: &[u64]) -> Vec<(u32, u32)> {
    let n = shares.len();
    if n == 1 {
        return (0..PERIOD as u32).map(|before| (0, before)).collect();
    }
    let unit = 2 * n as i128 - 2;
    let period = i128::from(PERIOD);
    let mut counts = vec![0u32; n];
    let mut pattern = Vec::with_capacity(PERIOD as usize);
    for sample in 1..=PERIOD {
        // deficit = share * sample / PERIOD - count, times PERIOD * unit
        let deficit = |source: usize| (i128::from(shares[source]) * i128::from(sample) - i128::from(counts[source]) * period) * unit;
        let due = (0..n).filter(|&source| deficit(source) >= period);
        // (1 - 1/unit - deficit) / share, compared by cross multiplication
        let slack = |source: usize| (period * (unit - 1) - deficit(source), i128::from(shares[source]));
        let next = due.min_by(|&a, &b| {
            let ((slack_a, share_a), (slack_b, share_b)) = (slack(a), slack(b));
            (slack_a * share_b).cmp(&(slack_b * share_a))
        });
        let source = next.expect("Tijdeman's theorem: some source is always due");
        pattern.push((source as u32, counts[source]));
        counts[source] += 1;
    }
    pattern
}
