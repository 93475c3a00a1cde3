//! The sampler against what the logits processors of Hugging Face transformers leave of the same rows (tests/goldens/sampling.py): which
//! tokens are kept, with what probabilities, and how often each is drawn.

use serde::Deserialize;
use trireme::infer::request::Request;
use trireme::infer::sampler::{self, Drawing, Sampling};
use trireme::rng::Random;

#[derive(Deserialize)]
struct Golden {
    how: How,
    prompt: Vec<u32>,
    response: Vec<u32>,
    logits: Vec<f32>,
    probabilities: Vec<f64>,
}

#[derive(Deserialize)]
struct How {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
}

impl Golden {
    fn sampling(&self) -> Sampling {
        let How { temperature, top_k, top_p, min_p, repetition_penalty } = self.how;
        Sampling { temperature, top_k, top_p, min_p, repetition_penalty }
    }

    fn drawn(&self, uniform: f64) -> usize {
        let (prompt, response) = (&self.prompt[..], &self.response[..]);
        sampler::choose(&self.logits, &Drawing { sampling: self.sampling(), uniform, prompt, response, n_top: 0 }).token as usize
    }

    /// The tokens that are kept, most likely first.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.logits.len()).filter(|&token| self.probabilities[token] > 0.0).collect();
        order.sort_by(|&a, &b| self.probabilities[b].total_cmp(&self.probabilities[a]));
        order
    }
}

fn goldens() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/sampling.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A choice is that of the noise among the running probabilities, most likely first. So the noise just before and just behind each of
/// transformers' running sums says whether the same tokens are kept, in this order, with these probabilities. A penalised logit of at
/// most 2^4 is rounded to f32, which moves it by 2^-21, a probability and a running sum of them by no more than that over the
/// temperature (at least 0.6); other rows differ by roundings of f64 sums only.
#[test]
fn kept_tokens_and_probabilities_are_those_of_transformers() {
    let mut n_compared = 0;
    for (idx, golden) in goldens().iter().enumerate() {
        let slack = if golden.how.repetition_penalty == 1.0 { 1e-13 } else { 0.5f64.powi(21) / 0.6 };
        let order = golden.order();
        let mut sum = 0.0;
        for (place, &token) in order.iter().enumerate() {
            let probability = golden.probabilities[token];
            if probability > 2.0 * slack {
                assert_eq!(golden.drawn(sum + slack), token, "row {idx}, place {place}");
                assert_eq!(golden.drawn(sum + probability - slack), token, "row {idx}, place {place}");
                n_compared += 1;
            }
            sum += probability;
        }
    }
    assert!(n_compared > 500, "{n_compared} tokens compared");
}

/// Draws with the noise of requests have transformers' probabilities, by chi-square tests: its value for d degrees of freedom exceeds
/// d (1 - 2/9d + 5 sqrt(2/9d))^3 once in three million (Wilson and Hilferty). Noise of another sample or position that is not new, or
/// not uniform, shows.
#[test]
fn draws_have_the_probabilities() {
    for (idx, golden) in goldens().iter().enumerate() {
        let request = Request { sampling: golden.sampling(), seed: idx as u64, ..Request::new("chi-square", golden.prompt.clone(), 1) };
        let (noise, n) = (request.noise(), 8000);
        let mut counts = vec![0.0; golden.logits.len()];
        for i in 0..n {
            // The position is the length of the response, which is part of what is penalised: samples stand in for it.
            let drawing = request.drawing(&noise, i, &golden.response);
            counts[sampler::choose(&golden.logits, &drawing).token as usize] += 1.0;
        }
        // Tokens that are expected less than ten times count together.
        let (mut chi2, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
        for &token in &golden.order() {
            let expected = n as f64 * golden.probabilities[token];
            if expected < 10.0 {
                rare = (rare.0 + expected, rare.1 + counts[token]);
            } else {
                chi2 += (counts[token] - expected).powi(2) / expected;
                cells += 1.0;
            }
        }
        if rare.0 >= 10.0 {
            chi2 += (rare.1 - rare.0).powi(2) / rare.0;
            cells += 1.0;
        }
        let drawn: f64 = golden.order().iter().map(|&token| counts[token]).sum();
        assert_eq!(drawn, n as f64, "row {idx}: all are among those kept");
        let d: f64 = cells - 1.0;
        let allowed = if d > 0.0 { d * (1.0 - 2.0 / (9.0 * d) + 5.0 * (2.0 / (9.0 * d)).sqrt()).powi(3) } else { 1e-6 };
        assert!(chi2 <= allowed, "row {idx}: chi-square {chi2} of {d} degrees of freedom, {allowed} allowed");
    }
}

/// The noise is a function of seed, id, sample and position: any of them changes it, and sample 0 has the noise of its position alone.
#[test]
fn noise_is_keyed_by_seed_id_sample_and_position() {
    let request = |id: &str, seed| Request { seed, ..Request::new(id, vec![1], 9) };
    let uniform = |request: &Request, index, n: usize| request.drawing(&request.noise(), index, &vec![0; n]).uniform;
    let mut all: Vec<f64> = Vec::new();
    for (id, seed) in [("a", 0), ("b", 0), ("a", 1)] {
        all.extend((0..3).flat_map(|index| (0..3).map(move |n| (index, n))).map(|(index, n)| uniform(&request(id, seed), index, n)));
    }
    assert_eq!(uniform(&request("a", 1), 0, 2), Random::new(1, "generate a").uniform(2));
    all.sort_by(f64::total_cmp);
    assert!(all.windows(2).all(|pair| pair[0] < pair[1]) && all.len() == 27);
}
