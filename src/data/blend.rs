//! Which source of a blend a sample comes from, and which of the source's samples it is: a table of one period, repeated.
//!
//! Shares are made whole numbers a_d of a period P = a_0 + .. + a_n: the smallest P up to 2^16 that gives the weights as they
//! are written (0.7, 0.2, 0.1: P = 10), else P = 2^16 with the largest remainders rounded up, which moves no share by 1/P or
//! more. Within the period the j-th sample of source d may stand at places floor(j P / a_d) .. ceil((j+1) P / a_d) - 1, and
//! each place takes the source whose time ends first. These are the windows of Pfair scheduling (Baruah et al. 1996,
//! "Proportionate progress"); as the shares sum to 1, earliest deadline first meets them all, so after any k samples
//! |count_d - k a_d / P| < 1. (Megatron takes the source with the largest deficit, which is sequential and has no such bound.)
//!
//! It knows nothing of files.

use crate::error::{Error, Result};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The longest period.
pub const MAX_PERIOD: usize = 1 << 16;
/// Weights that are so near to whole numbers of a period (relative to the total) were written as such: the rounding of decimal
/// fractions, their sum and a quotient to f64, with room.
const EXACT: f64 = 1e-13;

/// A periodic schedule of sources.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blend {
    /// Samples of each source in a period.
    shares: Vec<u32>,
    /// For each place of the period: the source, and how many of its samples stand before.
    places: Vec<(u16, u32)>,
}

impl Blend {
    /// A blend by these relative weights. Errors: no source, a weight that is not a positive number, one so small that it has no
    /// place in the longest period.
    pub fn new(weights: &[f64]) -> Result<Blend> {
        if weights.is_empty() || weights.len() > MAX_PERIOD {
            let wrong = format!("a blend of {} sources, possible are 1 to {MAX_PERIOD}", weights.len());
            return Err(Error::recipe(wrong).remedy("name the sources in [[data.train]]"));
        }
        if let Some(source) = weights.iter().position(|&weight| !(weight > 0.0 && weight.is_finite())) {
            let wrong = format!("the weight of source {source} is {}, expected a positive number", weights[source]);
            return Err(Error::recipe(wrong).remedy("give it a weight, or remove the source"));
        }
        let shares = shares(weights);
        if let Some(source) = shares.iter().position(|&share| share == 0) {
            let wrong = format!("the weight of source {source} is {} of all, the least is 1/{MAX_PERIOD}", fractions(weights)[source]);
            return Err(Error::recipe(wrong).remedy("give it more weight, or remove the source"));
        }
        let places = schedule(&shares);
        Ok(Blend { shares, places })
    }

    /// Length of the period.
    pub fn period(&self) -> u64 {
        self.places.len() as u64
    }

    /// Samples of each source in a period.
    pub fn shares(&self) -> &[u32] {
        &self.shares
    }

    /// The source of sample `index`, and how many samples of that source come before it. O(1).
    pub fn place(&self, index: u64) -> (usize, u64) {
        let (source, before) = self.places[(index % self.period()) as usize];
        let source = usize::from(source);
        (source, index / self.period() * u64::from(self.shares[source]) + u64::from(before))
    }

    /// The places of a source within the period, ascending: as many as its share.
    pub fn places_of(&self, source: usize) -> Vec<u64> {
        (0..).zip(&self.places).filter(|(_, place)| usize::from(place.0) == source).map(|(at, _)| at).collect()
    }

    /// How many of the first `n` samples come from each source.
    pub fn counts(&self, n: u64) -> Vec<u64> {
        let mut counts: Vec<u64> = self.shares.iter().map(|&share| n / self.period() * u64::from(share)).collect();
        for &(source, _) in &self.places[..(n % self.period()) as usize] {
            counts[usize::from(source)] += 1;
        }
        counts
    }
}

/// Parts of 1. Scaled by the largest first, so that no sum overflows.
fn fractions(weights: &[f64]) -> Vec<f64> {
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let total: f64 = weights.iter().map(|weight| weight / largest).sum();
    weights.iter().map(|weight| weight / largest / total).collect()
}

fn shares(weights: &[f64]) -> Vec<u32> {
    let fractions = fractions(weights);
    let is_exact = |period: usize| {
        let near = |fraction: &f64| {
            let share = fraction * period as f64;
            share.round() >= 1.0 && (share - share.round()).abs() <= EXACT * period as f64
        };
        fractions.iter().all(near)
    };
    if let Some(period) = (weights.len()..=MAX_PERIOD).find(|&period| is_exact(period)) {
        return fractions.iter().map(|fraction| (fraction * period as f64).round() as u32).collect();
    }
    let mut shares: Vec<u32> = fractions.iter().map(|fraction| (fraction * MAX_PERIOD as f64).floor() as u32).collect();
    let missing = MAX_PERIOD - shares.iter().map(|&share| share as usize).sum::<usize>();
    let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
    let remainder = |source: usize| (fractions[source] * MAX_PERIOD as f64).fract();
    by_remainder.sort_by(|&a, &b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(&b)));
    for &source in by_remainder.iter().take(missing) {
        shares[source] += 1;
    }
    shares
}

/// One period by earliest deadline first.
fn schedule(shares: &[u32]) -> Vec<(u16, u32)> {
    let period: u64 = shares.iter().map(|&share| u64::from(share)).sum();
    // Sources whose next sample may be placed, by deadline; and those that have to wait, by release.
    let (mut ready, mut waiting) = (BinaryHeap::new(), BinaryHeap::new());
    for source in 0..shares.len() {
        waiting.push(Reverse((0, source)));
    }
    let mut before = vec![0u32; shares.len()];
    let deadline = |source: usize, n: u32| (u64::from(n + 1) * period).div_ceil(u64::from(shares[source]));
    let mut places = Vec::with_capacity(period as usize);
    for place in 0..period {
        while let Some(&Reverse((release, source))) = waiting.peek()
            && release <= place
        {
            waiting.pop();
            ready.push(Reverse((deadline(source, before[source]), source)));
        }
        let Reverse((due, source)) = ready.pop().expect("shares that sum to the period leave no place empty");
        assert!(due > place, "source {source} misses its window at {place} of {period}: {shares:?}");
        places.push((source as u16, before[source]));
        before[source] += 1;
        if before[source] < shares[source] {
            waiting.push(Reverse((u64::from(before[source]) * period / u64::from(shares[source]), source)));
        }
    }
    places
}
