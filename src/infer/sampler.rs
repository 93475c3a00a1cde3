//! Choosing the next token from a row of logits. The noise is a pure function of (seed, request id, position), so a
//! response does not depend on what it was batched with.

use crate::device::Draw;
use crate::rng::Random;

/// How to sample.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: usize,
}

impl Sampling {
    /// The same for a device that draws, with the noise of this position.
    pub fn draw(self, noise: &Random, position: u64) -> Draw {
        Draw { temperature: self.temperature, top_p: self.top_p, top_k: self.top_k, uniform: noise.uniform(position) }
    }
}

/// A chosen token and its log-probability under the model's own distribution (temperature 1, no truncation).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f64,
}

/// Chooses from logits[V] (the tokenizer's pieces, no padding). Ties go to the lowest token id. Order of the filters:
/// temperature, top-k, top-p, as in Hugging Face transformers.
pub fn choose(logits: &[f32], how: Sampling, noise: &Random, position: u64) -> Choice {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = f64::from(max) + logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
    let token = if how.temperature == 0.0 { arg_max(logits, max) } else { draw(logits, how, noise.uniform(position)) };
    Choice { token: token as u32, logprob: f64::from(logits[token]) - log_sum }
}

fn arg_max(logits: &[f32], max: f32) -> usize {
    logits.iter().position(|&l| l == max).expect("logits are finite")
}

/// Inverse transform on the truncated distribution, most likely first.
fn draw(logits: &[f32], how: Sampling, uniform: f64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let by_logit = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    let n_kept = if how.top_k == 0 { logits.len() } else { how.top_k.min(logits.len()) };
    if n_kept < logits.len() {
        order.select_nth_unstable_by(n_kept - 1, by_logit);
        order.truncate(n_kept);
    }
    order.sort_unstable_by(by_logit);
    let top = f64::from(logits[order[0]]);
    let weights: Vec<f64> = order.iter().map(|&token| ((f64::from(logits[token]) - top) / how.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let mut n_nucleus = 0;
    for weight in &weights {
        kept += weight;
        n_nucleus += 1;
        if kept >= how.top_p * total {
            break;
        }
    }
    let target = uniform * kept;
    let mut sum = 0.0;
    for (weight, &token) in weights[..n_nucleus].iter().zip(&order) {
        sum += weight;
        if target < sum {
            return token;
        }
    }
    order[n_nucleus - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(n: usize, seed: u64) -> Vec<f32> {
        let noise = Random::new(seed, "test logits");
        (0..n as u64).map(|i| (2.0 * noise.normal(i)) as f32).collect()
    }

    /// Drawn frequencies match softmax(logits / temperature) by a chi-square test (99.99 % point of 49 degrees of freedom is
    /// 95.6); a wrong temperature or order of filters shifts them far beyond.
    #[test]
    fn frequencies_follow_the_softmax() {
        let (logits, temperature, n) = (logits(50, 1), 0.7, 100_000u64);
        let noise = Random::new(3, "draws");
        let how = Sampling { temperature, top_p: 1.0, top_k: 0 };
        let mut counts = vec![0.0f64; logits.len()];
        (0..n).for_each(|position| counts[choose(&logits, how, &noise, position).token as usize] += 1.0);
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chi2: f64 = counts.iter().zip(&weights).map(|(c, w)| (c - n as f64 * w / total).powi(2) / (n as f64 * w / total)).sum();
        assert!(chi2 < 95.6, "chi-square {chi2}");
    }

    /// top-k draws only from the k largest, top-p only from the smallest set that reaches p, greedy takes the first of equals.
    #[test]
    fn truncation_keeps_the_right_tokens() {
        let logits = logits(40, 2);
        let mut order: Vec<usize> = (0..40).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let noise = Random::new(4, "draws");
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let mut nucleus = 0;
        let mut mass = 0.0;
        while mass < 0.6 {
            mass += f64::from(logits[order[nucleus]]).exp() / total;
            nucleus += 1;
        }
        for position in 0..5000 {
            let k = choose(&logits, Sampling { temperature: 1.0, top_p: 1.0, top_k: 3 }, &noise, position).token as usize;
            assert!(order[..3].contains(&k));
            let p = choose(&logits, Sampling { temperature: 1.0, top_p: 0.6, top_k: 0 }, &noise, position).token as usize;
            assert!(order[..nucleus].contains(&p));
        }
        let greedy = choose(&[0.0, 2.0, 2.0], Sampling { temperature: 0.0, top_p: 1.0, top_k: 0 }, &noise, 0);
        assert_eq!(greedy.token, 1);
        let expected = 2.0 - (1.0 + 2.0 * 2f64.exp()).ln();
        assert!((greedy.logprob - expected).abs() < 1e-12);
    }
}
