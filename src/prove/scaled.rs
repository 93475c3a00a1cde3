//! A user's recipe made small: few layers, a batch of a few micro-batches, nothing that needs files. Layout, widths, vocabulary,
//! sequence length, micro-batch, precision, numerics, schedule and optimizer stay.

use crate::error::{Error, Result};
use crate::recipe::{Layers, LrDecay, Mode, Pretrain, Recompute, RecomputePlan, RecomputeRange, ScheduleKind};

/// What the command line says about the size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Size {
    /// Layers; None: one a chunk.
    pub layers: Option<usize>,
    /// Samples a step; None: two micro-batches for each stage, on each replica.
    pub samples: Option<usize>,
}

/// The recipe at this size on `world` ranks. The learning rate is the peak from the first step on, or nothing would move in the
/// warm-up. Errors: no layers; whatever [`Pretrain::check`] finds comes from that.
pub fn scaled(recipe: &Pretrain, size: Size, world: usize, steps: u64) -> Result<Pretrain> {
    let mut small = recipe.clone();
    let chunks = recipe.parallel.pp * recipe.parallel.vp;
    let n_layers = size.layers.unwrap_or(chunks.max(1));
    if n_layers == 0 || size.samples == Some(0) {
        let what = if n_layers == 0 { "--layers 0" } else { "--samples 0" };
        return Err(Error::recipe(what).remedy("give a positive number, or leave it out"));
    }
    small.model.n_layers = n_layers;
    if n_layers % chunks.max(1) == 0 || matches!(&recipe.parallel.layers, Some(Layers::List(_))) {
        small.parallel.layers = None;
    }
    // Each layer makes again what the layer at its place in the whole model does.
    let of_whole = recipe.train.recompute.of_layers(recipe.model.n_layers)?;
    let kind = |layer: usize| of_whole[layer * of_whole.len() / n_layers];
    let ranges = (0..n_layers).filter(|&layer| kind(layer) != Recompute::None);
    let ranges: Vec<RecomputeRange> =
        ranges.map(|layer| RecomputeRange { layers: format!("{layer}..{}", layer + 1), kind: kind(layer) }).collect();
    small.train.recompute = if ranges.is_empty() { RecomputePlan::default() } else { RecomputePlan::Ranges(ranges) };
    let dp = recipe.parallel.dp.unwrap_or(world / (recipe.parallel.tp * recipe.parallel.pp).max(1)).max(1);
    small.batch.global = size.samples.unwrap_or(dp * recipe.batch.micro * 2 * recipe.parallel.pp);
    small.batch.ramp.clear();
    small.train.samples = steps * small.batch.global as u64;
    (small.optimizer.warmup_samples, small.optimizer.decay) = (0, LrDecay::Constant);
    (small.validation, small.start, small.phase) = (None, None, Vec::new());
    Ok(small)
}

/// The same on one rank: no exchange of any kind, nothing made again.
pub fn on_one_rank(recipe: &Pretrain) -> Pretrain {
    let mut single = recipe.clone();
    let parallel = &mut single.parallel;
    (parallel.tp, parallel.pp, parallel.dp, parallel.vp) = (1, 1, Some(1), 1);
    (parallel.schedule, parallel.sequence_parallel, parallel.layers) = (ScheduleKind::OneFOneB, false, None);
    single.train.recompute = RecomputePlan::default();
    single
}

/// Whether bits are promised.
pub fn is_reproducible(recipe: &Pretrain) -> bool {
    recipe.numerics.mode == Mode::Reproducible
}
