//! A recipe in its layout against the same recipe on one rank.

use super::joined::{Parts, join};
use super::scaled;
pub use super::scaled::Size as ProofSize;
use super::steps::{self, Trace};
use super::table::{Differences, Judge, Row, Table};
use super::tolerance::Tolerance;
use crate::comm::solo::Solo;
use crate::comm::{Groups, agree};
use crate::device::Device;
use crate::error::{Context, Result};
use crate::model::config::ParamSpec;
use crate::parallel::layout::ParallelLayout;
use crate::recipe::{Linear, Pretrain};
use crate::tensor::DType;
use crate::train::dtype_of;

/// Steps of a proof: the second is the first with moments, the third the first whose weights have been moved by them.
pub const STEPS: u64 = 3;

/// The recipe that is run: the user's at this size, checked for `world` ranks, and its layout.
pub fn plan(recipe: &Pretrain, size: ProofSize, world: usize) -> Result<(Pretrain, ParallelLayout)> {
    let small = scaled::scaled(recipe, size, world, STEPS)?;
    let layout = small.check(world).doing(|| format!("scaling the recipe down to {} layers", small.model.n_layers))?;
    small.check_batch_size(layout.dp, small.batch.global)?;
    Ok((small, layout))
}

/// Runs a planned recipe in its layout, then on rank 0 alone while the others wait, and compares. Some on rank 0. Rank 0 needs the
/// memory of the whole scaled model. Collective.
pub fn prove(recipe: &Pretrain, device: &dyn Device, groups: &Groups) -> Result<Option<Table>> {
    let world = &*groups.world;
    let divided = steps::run(recipe, device, groups, STEPS).doing(|| format!("training in {:?}", groups.layout))?;
    let alone = if world.rank() == 0 { run_alone(recipe, device).map(Some) } else { Ok(None) };
    let alone = agree(world, alone)?;
    Ok(compare(recipe, groups, &divided, alone.as_ref()))
}

/// The steps of a planned recipe on one rank, with its precision and numerics.
pub fn run_alone(recipe: &Pretrain, device: &dyn Device) -> Result<Trace> {
    let groups = Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
    steps::run(&scaled::on_one_rank(recipe), device, &groups, STEPS).doing(|| "training on rank 0 alone".into())
}

/// A run's trace on all ranks against the one that rank 0 has made `alone`; Some there. Collective.
pub fn compare(recipe: &Pretrain, groups: &Groups, divided: &Trace, alone: Option<&Trace>) -> Option<Table> {
    let (dtype, lr) = (dtype_of(recipe), recipe.optimizer.lr);
    let tokens = recipe.batch.global * recipe.batch.seq_len;
    let stored = Tolerance::new(&recipe.model, dtype, tokens, groups.layout.tp);
    let tolerance = match recipe.numerics.linear {
        Linear::Stored => stored,
        Linear::Fp8 | Linear::Fp8Tensor => stored.with_fp8(recipe.model.n_layers),
    };
    let mut rows: Vec<Row> = Vec::new();
    if let Some(alone) = alone {
        let series = [("loss", &divided.losses, &alone.losses), ("gradient norm", &divided.grad_norms, &alone.grad_norms)];
        for (what, found, expected) in series {
            for (step, (&found, &expected)) in (1..).zip(found.iter().zip(expected)) {
                let mut differences = Differences::new(dtype);
                differences.add_f64(found, expected);
                rows.push(differences.row(format!("{what} of step {step}"), tolerance.gradient_in_step(step, lr)));
            }
        }
    }
    let specs = recipe.model.param_specs();
    for spec in &specs {
        let differences = joined_differences(groups, spec, (&divided.gradients, alone.map(|alone| &alone.gradients)), DType::F32);
        rows.extend(differences.map(|found| found.row(format!("gradient {}", spec.name), tolerance.gradient())));
    }
    for spec in &specs {
        let differences = joined_differences(groups, spec, (&divided.weights, alone.map(|alone| &alone.weights)), dtype);
        rows.extend(differences.map(|found| {
            let norm = found.norm();
            let allowed = tolerance.weights(STEPS, lr, found.n_elements(), norm) / norm;
            found.row(format!("weight {}", spec.name), allowed)
        }));
    }
    let judge = if scaled::is_reproducible(recipe) { Judge::Bits } else { Judge::Norms };
    alone.map(|_| Table { judge, rows })
}

/// A parameter's parts on all ranks against the whole that rank 0 holds; None elsewhere. Collective.
fn joined_differences(groups: &Groups, spec: &ParamSpec, (mine, whole): (&Parts, Option<&Parts>), dtype: DType) -> Option<Differences> {
    let mut differences = whole.map(|_| Differences::new(dtype));
    let mut at = 0;
    join(&*groups.world, spec, mine, &mut |joined| {
        if let (Some(differences), Some(whole)) = (&mut differences, whole) {
            // On one rank every part is the whole tensor.
            let expected = &whole[&spec.name][0].values[at..at + joined.values.len()];
            differences.add(&joined.values, expected);
            differences.add_conflicts(&joined.conflicts, expected);
            at += expected.len();
        }
    });
    differences
}
