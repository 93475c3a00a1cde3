//! What several test files need: tiny recipes and token shards written by hand, without the library's own writer.
#![allow(dead_code)] // not every test program uses all

pub mod models;

use std::path::Path;
use trireme::comm::{Groups, threads};
use trireme::device::Device;
use trireme::device::ceiling::Ceiling;
use trireme::device::cpu::Cpu;
use trireme::error::Result;
use trireme::model::config::ModelConfig;
use trireme::recipe::{
    Batch, Checkpoint, Data, Health, LrDecay, Numerics, Observe, Optimizer, Parallel, Precision, Pretrain, RecomputePlan, ScheduleKind,
    Source, Train,
};
use trireme::rng::Random;
use trireme::train::identity::Changed;
use trireme::train::pretrain::{self, Ended, Job};

/// Writes `dir/name.bin` and `.idx` in Megatron's form (int32), from its description alone.
pub fn write_megatron(dir: &Path, name: &str, documents: &[Vec<u32>]) {
    std::fs::create_dir_all(dir).unwrap();
    let tokens: Vec<u8> = documents.iter().flatten().flat_map(|&token| (token as i32).to_le_bytes()).collect();
    std::fs::write(dir.join(format!("{name}.bin")), tokens).unwrap();
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(4);
    index.extend((documents.len() as u64).to_le_bytes());
    index.extend((documents.len() as u64 + 1).to_le_bytes());
    documents.iter().for_each(|document| index.extend((document.len() as i32).to_le_bytes()));
    let mut offset = 0i64;
    for document in documents {
        index.extend(offset.to_le_bytes());
        offset += 4 * document.len() as i64;
    }
    (0..=documents.len() as i64).for_each(|document| index.extend(document.to_le_bytes()));
    std::fs::write(dir.join(format!("{name}.idx")), index).unwrap();
}

/// Documents of a noisy counting language, which a small model learns quickly: the next token is mostly the last plus one.
pub fn counting_documents(n_documents: usize, vocab_size: u32, seed: u64) -> Vec<Vec<u32>> {
    let noise = Random::new(seed, "counting documents");
    let mut counter = 0;
    let mut draw = |n: u64| {
        counter += 1;
        noise.bits(counter) % n
    };
    (0..n_documents)
        .map(|_| {
            let length = 20 + draw(60);
            let mut token = draw(u64::from(vocab_size)) as u32;
            (0..length)
                .map(|_| {
                    token = if draw(10) == 0 { draw(u64::from(vocab_size)) as u32 } else { (token + 1) % vocab_size };
                    token
                })
                .collect()
        })
        .collect()
}

/// A tiny Nemotron-shaped model with head_dim != hidden / heads and a vocabulary that needs padding.
pub fn tiny_model() -> ModelConfig {
    ModelConfig { vocab_divisor: 8, init_std: 0.1, ..models::nemotron([4, 24, 8, 4, 8, 48, 61], 32) }
}

/// A recipe of a few steps on the shards in `shards`.
pub fn tiny_recipe(shards: &Path) -> Pretrain {
    Pretrain {
        model: tiny_model(),
        parallel: Parallel {
            tp: 1,
            pp: 1,
            dp: None,
            vp: 1,
            schedule: ScheduleKind::OneFOneB,
            sequence_parallel: true,
            overlap: true,
            layers: None,
        },
        batch: Batch { seq_len: 16, micro: 1, global: 8, ramp: vec![] },
        train: Train { samples: 3 * 8, seed: 5, precision: Precision::F32, clip_grad_norm: 1.0, recompute: RecomputePlan::default() },
        numerics: Numerics::default(),
        optimizer: Optimizer {
            lr: 1e-2,
            min_lr: 1e-3,
            warmup_samples: 8,
            decay: LrDecay::Cosine,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-2,
            weight_decay: 0.1,
        },
        data: Data { train: vec![Source { shards: shards.into(), weight: 1.0 }], seed: 9 },
        validation: None,
        checkpoint: Checkpoint::default(),
        health: Health::default(),
        observe: Observe::default(),
        start: None,
        phase: vec![],
    }
}

/// Runs the recipe on as many threads as its layout has ranks.
pub fn train(recipe: &Pretrain, out: &Path, stop_after: Option<u64>) -> Result<Ended> {
    train_on(&|| Box::new(Cpu::new()), recipe, out, stop_after)
}

/// The same with changes that are meant.
pub fn train_accepting(recipe: &Pretrain, out: &Path, stop_after: Option<u64>, accepted: &[Changed]) -> Result<Ended> {
    job(&|| Box::new(Cpu::new()), recipe, out, (stop_after, accepted), &|| {})
}

/// The same, with these devices.
pub fn train_on(devices: &(dyn Fn() -> Box<dyn Device> + Sync), recipe: &Pretrain, out: &Path, stop_after: Option<u64>) -> Result<Ended> {
    job(devices, recipe, out, (stop_after, &[]), &|| {})
}

/// The same; each rank calls `when_asked` whenever it asks whether to stop: before the first step, and after each.
pub fn train_watched(
    devices: &(dyn Fn() -> Box<dyn Device> + Sync),
    recipe: &Pretrain,
    out: &Path,
    stop_after: Option<u64>,
    when_asked: &(dyn Fn() + Sync),
) -> Result<Ended> {
    job(devices, recipe, out, (stop_after, &[]), when_asked)
}

fn job(
    devices: &(dyn Fn() -> Box<dyn Device> + Sync),
    recipe: &Pretrain,
    out: &Path,
    (stop_after, accepted): (Option<u64>, &[Changed]),
    when_asked: &(dyn Fn() + Sync),
) -> Result<Ended> {
    let world = recipe.parallel.tp * recipe.parallel.pp * recipe.parallel.dp.unwrap_or(1);
    let results = threads::run(world, |world| {
        let layout = recipe.check(world.size())?;
        let groups = Groups::new(world, layout);
        let device = devices();
        let ceiling = |_| Ceiling { gemm_flops_per_s: 1e9, copy_bytes_per_s: 1e9 };
        let stop = || {
            when_asked();
            false
        };
        pretrain::run(&Job {
            recipe,
            groups: &groups,
            device: &*device,
            out,
            stop_after,
            accepted,
            stop: &stop,
            deadline: None,
            ceiling: &ceiling,
        })
    });
    let first = results[0].clone();
    assert!(results.iter().all(|result| *result == first), "ranks left by different doors: {results:?}");
    first
}
