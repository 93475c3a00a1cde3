//! The host's sampler: time for a row of logits by vocabulary and filters, beside copying the row and beside sorting all of it, which a
//! sampler that is not careful does for each token.
//!
//!     cargo bench --bench sampler

use std::hint::black_box;
use std::time::Instant;
use trireme::infer::sampler::{self, Drawing, Sampling};
use trireme::rng::Random;

/// Rows drawn from; the time is of one, the best of several rounds.
const ROWS: usize = 24;
const ROUNDS: usize = 5;

fn best_us(mut row: impl FnMut(usize)) -> f64 {
    let round = |_| {
        let began = Instant::now();
        (0..ROWS).for_each(&mut row);
        began.elapsed().as_secs_f64() * 1e6 / ROWS as f64
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

fn main() {
    let plain = Sampling::PLAIN;
    let ways = [
        ("greedy", Sampling::GREEDY),
        ("temperature 1", plain),
        ("temperature 0.7, top-p 0.95", Sampling { temperature: 0.7, top_p: 0.95, ..plain }),
        ("top-k 50", Sampling { top_k: 50, ..plain }),
        ("min-p 0.05, penalty 1.1", Sampling { min_p: 0.05, repetition_penalty: 1.1, ..plain }),
        ("temperature 3 (flat)", Sampling { temperature: 3.0, ..plain }),
    ];
    println!("{:>10} {:>30} {:>12}", "vocabulary", "sampling", "us a row");
    for vocab_size in [32_000, 128_256, 256_000] {
        let normal = Random::new(1, "logits");
        let logits: Vec<f32> = (0..vocab_size as u64).map(|i| (3.0 * normal.normal(i)) as f32).collect();
        let prompt: Vec<u32> = (0..1000).map(|i| i * 7 % vocab_size).collect();
        let mut copy = vec![0.0f32; logits.len()];
        let us = best_us(|_| black_box(&mut copy).copy_from_slice(black_box(&logits)));
        println!("{vocab_size:>10} {:>30} {us:>12.1}", "(copy)");
        let mut order: Vec<u32> = Vec::new();
        let us = best_us(|_| {
            order.clear();
            order.extend(0..vocab_size);
            order.sort_unstable_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            black_box(&order);
        });
        println!("{vocab_size:>10} {:>30} {us:>12.1}", "(sort)");
        for (name, sampling) in ways {
            let us = best_us(|row| {
                let uniform = normal.uniform(row as u64);
                black_box(sampler::choose(&logits, &Drawing { sampling, uniform, prompt: &prompt, response: &[], n_top: 0 }));
            });
            println!("{vocab_size:>10} {name:>30} {us:>12.1}");
        }
    }
}
