//! Corpora, recipes and comparisons that the cases share.

use crate::common::{counting_documents, tiny_recipe, write_megatron};
use std::path::{Path, PathBuf};
use std::process::Command;
use trireme::checkpoint::{self, Stored, Wanted};
use trireme::model::config::ModelConfig;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::recipe::{Data, LrDecay, Phase, Pretrain, RampStage, ScheduleKind, Source};
use trireme::tensor::{DType, Tensor};

/// Token shards of a counting language.
pub fn shards(dir: &Path, name: &str, seed: u64) -> PathBuf {
    let path = dir.join(name);
    write_megatron(&path, "train", &counting_documents(60, 61, seed));
    path
}

/// Eight steps: 3 of 4 samples, 2 of 8, 1 of 12, then 2 of 12 in a phase with data and a decay of its own.
pub fn ramp_and_phases(dir: &Path) -> Pretrain {
    let mut recipe = tiny_recipe(&shards(dir, "a", 1));
    recipe.batch.ramp = vec![RampStage { until_sample: 12, global: 4 }, RampStage { until_sample: 24, global: 8 }];
    recipe.batch.global = 12;
    (recipe.train.samples, recipe.optimizer.warmup_samples) = (40, 10);
    recipe.checkpoint.every_steps = 1;
    let train = vec![Source { shards: shards(dir, "b", 2), weight: 3.0 }, Source { shards: shards(dir, "a", 1), weight: 1.0 }];
    let data = Data { train, seed: 21 };
    recipe.phase =
        vec![Phase { name: "final".into(), samples: 24, lr: 1e-3, min_lr: 0.0, warmup_samples: 0, decay: LrDecay::Linear, data }];
    recipe
}

/// The recipe under another layout.
pub fn with_layout(recipe: &Pretrain, layout: ParallelLayout) -> Pretrain {
    let mut recipe = recipe.clone();
    (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.vp) = (layout.tp, layout.pp, layout.vp);
    recipe.parallel.dp = Some(layout.dp);
    recipe.parallel.schedule = if layout.vp > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
    recipe
}

/// The checkpoint of a step.
pub fn step_dir(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}

/// The bits of weights and moments in a checkpoint, or in a run's newest.
pub fn bits(path: &Path, model: &ModelConfig) -> Vec<(String, Vec<u32>)> {
    let stored = checkpoint::open(path).unwrap();
    let names = model.param_specs().into_iter().flat_map(|spec| ["weights", "adam_m", "adam_v"].map(|kind| (kind, spec.clone())));
    names.map(|(kind, spec)| (format!("{kind}/{}", spec.name), bits_of(&stored, kind, &spec.name, &spec.shape))).collect()
}

fn bits_of(stored: &Stored, kind: &str, name: &str, shape: &[usize]) -> Vec<u32> {
    let mut tensor = Tensor::host(shape, DType::F32, None).unwrap();
    stored.read(&mut [Wanted { name: format!("{kind}/{name}"), slice: Slice::whole(shape), tensor: &mut tensor }]).unwrap();
    tensor.to_f32_vec().into_iter().map(f32::to_bits).collect()
}

/// Names of the tensors that differ.
pub fn differing(a: &[(String, Vec<u32>)], b: &[(String, Vec<u32>)]) -> Vec<String> {
    a.iter().zip(b).filter(|(a, b)| a != b).map(|((name, _), _)| name.clone()).collect()
}

/// A run directory as a kill right after the save of `step` leaves it: later checkpoints are gone, later lines are not.
pub fn killed_after(run: &Path, step: u64, copy: &Path) {
    for entry in walkdir(run) {
        let relative = entry.strip_prefix(run).unwrap();
        let later = relative.components().any(|part| {
            let name = part.as_os_str().to_string_lossy().into_owned();
            name.strip_prefix("step-").and_then(|digits| digits.parse::<u64>().ok()).is_some_and(|other| other > step)
        });
        if later || relative == Path::new("manifest.json") || relative == Path::new(".lock") {
            continue;
        }
        let to = copy.join(relative);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&entry, &to).unwrap();
    }
}

fn walkdir(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walkdir(&path)) } else { files.push(path) }
    }
    files
}

/// What trireme-inspect prints.
pub fn inspect(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_trireme-inspect")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
