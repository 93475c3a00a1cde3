//! Likelihoods of choices: questions a second, as MMLU asks them (five solved examples, four answers of one token) and as HellaSwag does
//! (one context, four endings of some twenty tokens), with the rows that choices and questions share computed once, and with each
//! choice alone.
//!
//!     cargo bench --bench choices
//!
//! "Alone" are the same lengths with other first tokens, so that nothing begins alike. Both in turn, the best of three.

#[path = "../tests/common/models.rs"]
mod models;

use std::time::Instant;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::Device;
use trireme::device::cpu::Cpu;
use trireme::infer::scorer::{self, Scorer, Wanted};
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::rng::Random;
use trireme::tensor::DType;

const VOCAB: usize = 16384;
const REPETITIONS: usize = 3;
const CHOICES: usize = 4;

/// A benchmark's lengths in tokens.
struct Shape {
    name: &'static str,
    n_questions: usize,
    /// What all questions begin with.
    examples: usize,
    context: usize,
    choice: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "MMLU, 5 shots", n_questions: 24, examples: 480, context: 90, choice: 1 },
    Shape { name: "HellaSwag", n_questions: 24, examples: 0, context: 70, choice: 22 },
];

impl Shape {
    /// Every choice with what comes before it, and how long that is.
    fn sequences(&self, alone: bool) -> Vec<(Vec<u32>, usize)> {
        let noise = Random::new(4, self.name);
        let tokens = |key: usize, n: usize| (0..n).map(move |i| (key * 1000 + i) as u64);
        let drawn = |at: u64| (noise.bits(at) % VOCAB as u64) as u32;
        let mut all = Vec::new();
        for question in 0..self.n_questions {
            for choice in 0..CHOICES {
                let before = tokens(0, self.examples).chain(tokens(1 + question, self.context));
                let whole = before.chain(tokens(1000 + CHOICES * question + choice, self.choice));
                let mut whole: Vec<u32> = whole.map(drawn).collect();
                if alone {
                    whole[0] = all.len() as u32;
                }
                all.push((whole, self.examples + self.context));
            }
        }
        all
    }
}

fn main() {
    let (cpu, groups) = (Cpu::new(), Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE));
    let config = models::nemotron([10, 384, 6, 2, 64, 1536, VOCAB], 2048);
    println!("{}, 30 M parameters, reproducible numerics\n", cpu.name());
    println!("| questions | weights | questions/s | each choice alone | ratio |\n|---|---|---:|---:|---:|");
    for (name, dtype, weights) in [("f32", DType::F32, None), ("bf16", DType::BF16, None), ("int8", DType::BF16, Some(WeightFormat::Int8))]
    {
        let at = Coords { tp: 0, pp: 0, dp: 0 };
        let mut chunk = Chunk::new(&cpu, &config, &ParallelLayout::SINGLE, at, 0, dtype, Purpose::Inference).unwrap();
        chunk.initialise(&cpu, 1);
        weights.map_or(Ok(()), |format| chunk.pack(&cpu, &*groups.tp, format)).unwrap();
        let mut chunks = [chunk];
        let numerics = scorer::numerics(None, &cpu, weights).unwrap();
        let scorer = Scorer { device: &cpu, groups: &groups, batch_tokens: 2048, numerics, stop: &|| false };
        for shape in &SHAPES {
            let mut best = [0.0f64; 2];
            for _ in 0..REPETITIONS {
                for (best, alone) in best.iter_mut().zip([false, true]) {
                    let sequences = shape.sequences(alone);
                    let wanted: Vec<Wanted> = sequences.iter().map(|(tokens, first)| Wanted { tokens, first: *first }).collect();
                    let started = Instant::now();
                    scorer.tokens(&mut chunks, &wanted).unwrap();
                    *best = best.max(shape.n_questions as f64 / started.elapsed().as_secs_f64());
                }
            }
            let [shared, alone] = best;
            println!("| {} | {name} | {shared:.1} | {alone:.1} | {:.1} |", shape.name, shared / alone);
        }
    }
}
