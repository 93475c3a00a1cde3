//! Choosing the next token from a row of logits. The noise is a pure function of (seed, request id, sample, position), so a
//! response does not depend on what it was batched with.
//!
//! The filters and their order are those of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p. Only
//! in ties they differ: top-k keeps exactly k tokens, of equal logits those with the lowest ids.
//!
//! A vocabulary has hundreds of thousands of tokens of which a draw looks at few: a histogram over the distance from the largest
//! logit says in which of its bins the draw ends, and only the tokens of that one are sorted.

use crate::device::Draw;
use crate::device::cpu::exponentials::{self, BINS};
use crate::device::cpu::{Element, for_tasks};
use std::sync::OnceLock;

/// How to sample.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens whose probability is at least this part of the largest; 0 keeps all.
    pub min_p: f64,
    /// Logits of tokens that stand in prompt or response are divided by it when they are positive, multiplied when negative; 1 does
    /// nothing.
    pub repetition_penalty: f64,
}

impl Sampling {
    /// The model's own distribution.
    pub const PLAIN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 };
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, ..Sampling::PLAIN };
}

/// What is asked of a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Drawing<'a> {
    /// How to sample.
    pub sampling: Sampling,
    /// The noise, in (0, 1).
    pub uniform: f64,
    /// Tokens that a repetition penalty counts: the prompt ..
    pub prompt: &'a [u32],
    /// .. and what came after it.
    pub response: &'a [u32],
    /// How many of the most likely tokens are wanted beside the choice.
    pub n_top: usize,
}

impl Drawing<'_> {
    /// Whether the most likely token is asked for and nothing beside it.
    pub fn is_plain_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.repetition_penalty == 1.0 && self.n_top == 0
    }

    /// The same for a device that draws; None where only the host can.
    pub fn on_device(&self) -> Option<Draw> {
        let Sampling { temperature, top_p, top_k, min_p, repetition_penalty } = self.sampling;
        let fits = repetition_penalty == 1.0 && self.n_top == 0;
        fits.then_some(Draw { temperature, top_p, top_k, min_p, uniform: self.uniform })
    }
}

/// A chosen token and its log-probability under the model's own distribution (temperature 1, no penalty, no truncation).
#[derive(Clone, PartialEq, Debug)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Its log-probability; not finite when a logit was not.
    pub logprob: f64,
    /// The most likely tokens with theirs, as many as were wanted, most likely first, equal ones by id.
    pub top: Vec<(u32, f64)>,
}

/// Chooses from logits[V] (the tokenizer's pieces, no padding). Ties go to the lowest token id.
pub fn choose(logits: &[f32], drawing: &Drawing) -> Choice {
    let top = largest(logits);
    let how = drawing.sampling;
    let penalised = (how.repetition_penalty != 1.0).then(|| penalise(logits, drawing));
    let (scores, top_score) = penalised.as_deref().map_or((logits, top), |scores| (scores, largest(scores)));
    let sum = || total_weight(logits, f64::from(top));
    let (token, sum) = if how.temperature == 0.0 {
        (first_of(scores, top_score), sum())
    } else {
        let mut order = Descending::new(scores, f64::from(top_score), how.temperature);
        let token = draw(&mut order, how, drawing.uniform);
        // The weights of the model's own distribution were just summed, if it is drawn from.
        (token, if how.temperature == 1.0 && penalised.is_none() { order.total } else { sum() })
    };
    let top = f64::from(top);
    let log_sum = top + sum.ln();
    let logprob = |token: usize| f64::from(logits[token]) - log_sum;
    let n_top = drawing.n_top.min(logits.len());
    let top =
        if n_top == 0 { Vec::new() } else { first(logits, top, n_top).into_iter().map(|token| (token as u32, logprob(token))).collect() };
    Choice { token: token as u32, logprob: logprob(token), top }
}

/// What `choose` gives of logits as they lie where the most likely token is asked for and nothing beside it.
pub(crate) fn most_likely<E: Element>(logits: &[E]) -> Choice {
    let tops: Vec<OnceLock<f32>> = logits.chunks(BLOCK).map(|_| OnceLock::new()).collect();
    let block = |i: usize| &logits[i * BLOCK..((i + 1) * BLOCK).min(logits.len())];
    let top_of = |i: usize| *tops[i].get_or_init(|| exponentials::largest(exponentials::isa(), block(i)));
    for_tasks(tops.len(), logits.len() / 2, |i| {
        top_of(i);
    });
    let top = (0..tops.len()).map(top_of).fold(f32::NEG_INFINITY, f32::max);
    let place = |i: usize| {
        let place = exponentials::first_of(exponentials::isa(), block(i), top);
        (block(i)[place].get() == top).then_some(i * BLOCK + place)
    };
    let token = (0..tops.len()).filter(|i| top_of(*i) == top).find_map(place).unwrap_or(0);
    let top = f64::from(top);
    let logprob = f64::from(logits[token].get()) - (top + total_weight(logits, top).ln());
    Choice { token: token as u32, logprob, top: Vec::new() }
}

fn largest(logits: &[f32]) -> f32 {
    exponentials::largest(exponentials::isa(), logits)
}

/// Where this value stands first; 0 when it is nowhere, among numbers that are none.
fn first_of(scores: &[f32], value: f32) -> usize {
    exponentials::first_of(exponentials::isa(), scores, value)
}

/// The logits after the repetition penalty; however often a token stands there, it counts once.
fn penalise(logits: &[f32], drawing: &Drawing) -> Vec<f32> {
    let mut scores = logits.to_vec();
    for &token in drawing.prompt.iter().chain(drawing.response) {
        let (logit, penalty) = (f64::from(logits[token as usize]), drawing.sampling.repetition_penalty);
        scores[token as usize] = if logit < 0.0 { logit * penalty } else { logit / penalty } as f32;
    }
    scores
}

/// Elements that are weighed together: the weights of a row are summed in blocks, added in order.
const BLOCK: usize = 1024;
/// An exponential takes as long as so many simple operations.
const WEIGHING: usize = 16;

/// The sum of exp(logit - top): the total of `Descending` with temperature 1.
fn total_weight<E: Element>(logits: &[E], top: f64) -> f64 {
    let sums: Vec<OnceLock<f64>> = logits.chunks(BLOCK).map(|_| OnceLock::new()).collect();
    for_tasks(sums.len(), WEIGHING * logits.len(), |i| {
        let block = &logits[i * BLOCK..((i + 1) * BLOCK).min(logits.len())];
        sums[i].get_or_init(|| exponentials::sum(exponentials::isa(), block, top));
    });
    sums.into_iter().map(|sum| sum.into_inner().expect("each was summed")).sum()
}

/// The tokens of a row, most likely first: by bins, and inside of a bin by sorting the few that are in it. How much comes before a bin is
/// known without looking at its tokens.
struct Descending<'a> {
    logits: &'a [f32],
    top: f64,
    temperature: f64,
    /// The bin of each token.
    bins: Vec<u16>,
    /// Tokens of each bin.
    counts: Vec<u32>,
    /// The sum of their weights: probabilities relative to the largest.
    masses: Vec<f64>,
    /// All weights.
    total: f64,
    /// The tokens and weights of the bin that was looked into last, in order.
    sorted: (usize, Vec<(u32, f64)>),
}

/// Where a walk down the order ends.
#[derive(Clone, Copy, Debug)]
struct End {
    /// Behind so many tokens ..
    n_most: usize,
    /// .. or the first that brings the weight of all before it to this ..
    need: f64,
    /// .. or before the first, but the most likely, whose weight is below this.
    min_weight: f64,
}

impl End {
    const NOWHERE: End = End { n_most: usize::MAX, need: f64::INFINITY, min_weight: 0.0 };
}

/// What a walk went through.
#[derive(Clone, Copy, Debug)]
struct Walked {
    n: usize,
    weight: f64,
    /// The last token.
    last: usize,
}

impl<'a> Descending<'a> {
    fn new(logits: &'a [f32], top: f64, temperature: f64) -> Descending<'a> {
        let (mut weights, mut total, isa) = ([0.0; BLOCK], 0.0, exponentials::isa());
        let mut bins = vec![0; logits.len()];
        let (mut counts, mut masses) = (vec![0; BINS], vec![0.0; BINS]);
        for (logits, bins) in logits.chunks(BLOCK).zip(bins.chunks_mut(BLOCK)) {
            let weights = &mut weights[..logits.len()];
            total += exponentials::weigh(isa, logits, top, temperature, weights, bins);
            for (weight, bin) in weights.iter().zip(bins) {
                counts[usize::from(*bin)] += 1;
                masses[usize::from(*bin)] += weight;
            }
        }
        Descending { logits, top, temperature, bins, counts, masses, total, sorted: (BINS, Vec::new()) }
    }

    /// The tokens of a bin with their weights, in order.
    fn bin(&mut self, bin: usize) -> &[(u32, f64)] {
        if self.sorted.0 != bin {
            let mut tokens = Vec::with_capacity(self.counts[bin] as usize);
            exponentials::places_of(exponentials::isa(), &self.bins, bin as u16, &mut tokens);
            tokens.sort_unstable_by_key(|token| key(self.logits[*token as usize], *token));
            let logits: Vec<f32> = tokens.iter().map(|token| self.logits[*token as usize]).collect();
            let (mut weights, mut bins) = (vec![0.0; logits.len()], vec![0; logits.len()]);
            exponentials::weigh(exponentials::isa(), &logits, self.top, self.temperature, &mut weights, &mut bins);
            self.sorted = (bin, tokens.into_iter().zip(weights).collect());
        }
        &self.sorted.1
    }

    /// Down from the most likely token: at least that one.
    fn walk(&mut self, end: End) -> Walked {
        // Behind it every weight is below `min_weight`, whatever the rounding; before it, none is.
        let least = if end.min_weight > 0.0 { exponentials::bin(-end.min_weight.ln()) } else { BINS + 1 };
        let mut walked = Walked { n: 0, weight: 0.0, last: 0 };
        for bin in 0..BINS {
            let (count, mass) = (self.counts[bin] as usize, self.masses[bin]);
            let has_end = walked.n + count >= end.n_most || walked.weight + mass >= end.need || bin + 1 >= least;
            if count == 0 || !has_end {
                (walked.n, walked.weight) = (walked.n + count, walked.weight + mass);
                continue;
            }
            for &(token, weight) in self.bin(bin) {
                if walked.n > 0 && (walked.n == end.n_most || walked.weight >= end.need || weight < end.min_weight) {
                    return walked;
                }
                walked = Walked { n: walked.n + 1, weight: walked.weight + weight, last: token as usize };
            }
        }
        walked
    }
}

/// Sorts as descending logits, -0 behind 0, equal ones as tokens.
fn key(logit: f32, token: u32) -> u64 {
    let bits = logit.to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(token)
}

/// The `n` most likely tokens, in order.
fn first(logits: &[f32], top: f64, n: usize) -> Vec<usize> {
    let mut order = Descending::new(logits, top, 1.0);
    let mut tokens = Vec::with_capacity(n);
    for bin in 0..BINS {
        if tokens.len() < n && order.counts[bin] > 0 {
            let left = n - tokens.len();
            tokens.extend(order.bin(bin).iter().take(left).map(|(token, _)| *token as usize));
        }
    }
    tokens
}

/// Inverse transform on the truncated distribution, most likely first.
fn draw(order: &mut Descending, how: Sampling, uniform: f64) -> usize {
    let n = order.logits.len();
    let n_most = if how.top_k == 0 { n } else { how.top_k.min(n) };
    let mut kept = Walked { n, weight: order.total, last: 0 };
    if n_most < n {
        kept = order.walk(End { n_most, ..End::NOWHERE });
    }
    if how.top_p < 1.0 || how.min_p > 0.0 {
        let need = if how.top_p < 1.0 { how.top_p * kept.weight } else { f64::INFINITY };
        kept = order.walk(End { n_most, need, min_weight: how.min_p });
    }
    // The first token with which the running weight exceeds the noise; the last that is kept, if rounding leaves it below.
    let target = uniform * kept.weight;
    order.walk(End { n_most: kept.n, need: target.next_up(), min_weight: 0.0 }).last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Random;
    use half::bf16;

    fn logits(n: usize, seed: u64) -> Vec<f32> {
        let noise = Random::new(seed, "test logits");
        (0..n as u64).map(|i| (2.0 * noise.normal(i)) as f32).collect()
    }

    fn drawn(logits: &[f32], sampling: Sampling, uniform: f64) -> Choice {
        choose(logits, &Drawing { sampling, uniform, prompt: &[], response: &[], n_top: 0 })
    }

    /// Drawn frequencies match softmax(logits / temperature) by a chi-square test (99.99 % point of 49 degrees of freedom is
    /// 95.6); a wrong temperature or order of filters shifts them far beyond.
    #[test]
    fn frequencies_follow_the_softmax() {
        let (logits, temperature, n) = (logits(50, 1), 0.7, 100_000u64);
        let noise = Random::new(3, "draws");
        let how = Sampling { temperature, ..Sampling::PLAIN };
        let mut counts = vec![0.0f64; logits.len()];
        (0..n).for_each(|position| counts[drawn(&logits, how, noise.uniform(position)).token as usize] += 1.0);
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chi2: f64 = counts.iter().zip(&weights).map(|(c, w)| (c - n as f64 * w / total).powi(2) / (n as f64 * w / total)).sum();
        assert!(chi2 < 95.6, "chi-square {chi2}");
    }

    /// The definition, without shortcuts: everything sorted, every filter by itself.
    fn by_definition(logits: &[f32], how: Sampling, uniform: f64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let weight = |token: usize| ((f64::from(logits[token]) - f64::from(logits[order[0]])) / how.temperature).exp();
        let mut kept: Vec<(usize, f64)> = order.iter().map(|&token| (token, weight(token))).collect();
        if how.top_k > 0 {
            kept.truncate(how.top_k);
        }
        if how.top_p < 1.0 {
            let need = how.top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut before = 0.0;
            kept.retain(|(_, weight)| {
                before += weight;
                before - weight < need
            });
        }
        kept.retain(|&(token, weight)| token == order[0] || weight >= how.min_p);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let chosen = kept.iter().find(|(_, weight)| {
            sum += weight;
            uniform * total < sum
        });
        chosen.unwrap_or(&kept[kept.len() - 1]).0
    }

    /// Looking at a few tokens finds what sorting all of them finds, for every filter and all of them together, cold and hot (where
    /// nearly all tokens count), with ties, and at the ends of the noise. Sums that are added in another order may round past a
    /// boundary: with V <= 3000 terms, at less than 3000 2^-52 < 1e-12 of the draws, which is none of these.
    #[test]
    fn shortcuts_change_nothing() {
        let mut rows: Vec<Vec<f32>> = [1, 2, 61, 3000].iter().map(|&v| logits(v, v as u64)).collect();
        rows.push((0..777).map(|i| (i % 2) as f32).collect());
        rows.push((0..777).map(|i| if i == 500 { 0.0 } else { -1e30 }).collect());
        rows.push((0..777).map(|i| [0.0f32, -0.0, -1.0, f32::NEG_INFINITY][i % 4]).collect());
        rows.push((0..777).map(|i| -(i as f32) / 64.0).collect());
        let noise = Random::new(8, "shortcuts");
        let mut n = 0;
        for (row, temperature, top_p, top_k, min_p) in rows.iter().flat_map(|row| {
            let each = |t| [1.0, 0.9, 0.3, 1e-9].map(|p| (t, p)).into_iter();
            let pairs = [0.05, 0.7, 1.0, 3.0, 50.0].into_iter().flat_map(each);
            pairs.flat_map(move |(t, p)| [0, 1, 5, 600].into_iter().flat_map(move |k| [0.0, 1e-3, 0.2, 1.0].map(|m| (row, t, p, k, m))))
        }) {
            let how = Sampling { temperature, top_p, top_k, min_p, repetition_penalty: 1.0 };
            for uniform in [0.5f64.powi(54), 1.0 - 0.5f64.powi(30), noise.uniform(n), noise.uniform(n + 1)] {
                let found = drawn(row, how, uniform).token as usize;
                assert_eq!(found, by_definition(row, how, uniform), "{} tokens, {how:?}, {uniform}", row.len());
            }
            n += 2;
        }
    }

    /// Greedy takes the first of equals, by its own log-probability; the most likely tokens are those of a sort.
    #[test]
    fn greedy_and_most_likely() {
        let greedy = drawn(&[0.0, 2.0, 2.0], Sampling::GREEDY, 0.5);
        assert_eq!(greedy.token, 1);
        let expected = 2.0 - (1.0 + 2.0 * 2f64.exp()).ln();
        assert!((greedy.logprob - expected).abs() < 1e-12);
        let row: Vec<f32> = logits(500, 7).iter().map(|l| (l * 4.0).round() / 4.0).collect();
        let mut order: Vec<u32> = (0..500).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        for n_top in [1, 2, 33, 500] {
            let asked = Drawing { sampling: Sampling::PLAIN, uniform: 0.3, prompt: &[], response: &[], n_top };
            let choice = choose(&row, &asked);
            assert_eq!(choice.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), order[..n_top]);
            assert!(choice.top.iter().all(|(token, logprob)| *token != choice.token || *logprob == choice.logprob));
        }
    }

    /// Logits as they lie give the very choice of the same numbers widened, whatever their number, with ties, signs of zero, -inf and NaN,
    /// over blocks and at their ends: a response must not depend on how they are read.
    #[test]
    fn the_most_likely_is_the_same_read_as_it_lies() {
        let asked = Drawing { sampling: Sampling::GREEDY, uniform: 0.5, prompt: &[], response: &[], n_top: 0 };
        let (nan, least) = (f32::NAN, f32::NEG_INFINITY);
        let mut rows: Vec<Vec<f32>> = [1, 2, 63, 1023, 1024, 1025, 3000, 9001].iter().map(|&v| logits(v, v as u64)).collect();
        rows.push((0..5000).map(|i| (i % 2500) as f32).collect());
        rows.push((0..5000).map(|i| if i < 1500 { -1.0 } else { [-0.0, 0.0][i % 2] }).collect());
        rows.push((0..3000).map(|i| if i < 1024 { nan } else { least }).collect());
        rows.push((0..3000).map(|i| if i == 2000 { 3.0 } else { nan }).collect());
        rows.push(vec![nan; 1500]);
        for row in rows {
            let halves: Vec<bf16> = row.iter().map(|x| bf16::from_f32(*x)).collect();
            let widened: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            for (found, expected) in [(most_likely(&row), choose(&row, &asked)), (most_likely(&halves), choose(&widened, &asked))] {
                let same = found.logprob.to_bits() == expected.logprob.to_bits() || (found.logprob.is_nan() && expected.logprob.is_nan());
                assert!(same && found.token == expected.token && found.top.is_empty(), "{found:?}, {expected:?}");
            }
        }
    }

    /// The penalty divides positive and multiplies negative logits of what stands in prompt or response, once however often it
    /// stands there, and does not change log-probabilities.
    #[test]
    fn penalties_count_a_token_once() {
        let row = [3.0f32, 2.9, -0.5, -0.6];
        let greedy = Sampling { repetition_penalty: 1.5, ..Sampling::GREEDY };
        let asked =
            |prompt: &'static [u32], response: &'static [u32]| Drawing { sampling: greedy, uniform: 0.5, prompt, response, n_top: 0 };
        assert_eq!(penalise(&row, &asked(&[0, 2], &[0, 0, 2])), [2.0, 2.9, -0.75, -0.6]);
        let choice = choose(&row, &asked(&[0, 0], &[]));
        let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        assert!(choice.token == 1 && (choice.logprob - (f64::from(row[1]) - total.ln())).abs() < 1e-7, "{choice:?}");
        assert_eq!(choose(&row, &asked(&[0], &[1])).token, 0);
    }
}
