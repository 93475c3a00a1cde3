//! A model read from a checkpoint for inference: weights only, under any layout, whatever layout wrote it.

use crate::checkpoint::{Stored, Wanted};
use crate::comm::Groups;
use crate::device::Device;
use crate::error::{Context, Error, Result};
use crate::model::chunk::{Chunk, Purpose};
use crate::model::config::ModelConfig;
use crate::parallel::layout::ParallelLayout;
use crate::tensor::DType;

/// Whether this layout can hold this model for inference.
pub fn check_layout(config: &ModelConfig, layout: &ParallelLayout) -> Result<()> {
    let divides = [
        ("--tp", layout.tp, "kv heads", config.n_kv_heads),
        ("--tp", layout.tp, "feed-forward columns", config.ffn_hidden),
        ("--tp", layout.tp, "vocabulary rows", config.padded_vocab()),
        ("--pp", layout.pp, "layers", config.n_layers),
    ];
    for (flag, parts, what, n) in divides {
        if parts == 0 || n % parts != 0 {
            return Err(Error::recipe(format!("{flag} {parts} does not divide the {n} {what} of this model")).remedy("choose a divisor"));
        }
    }
    Ok(())
}

/// The layout of a job of `world` ranks: data parallel takes what tensor and pipeline parallel leave.
pub fn layout_for(world: usize, tp: usize, pp: usize) -> Result<ParallelLayout> {
    if tp == 0 || pp == 0 || world % (tp * pp) != 0 {
        let wrong = format!("--tp {tp} x --pp {pp} does not divide the {world} ranks of this job");
        return Err(Error::recipe(wrong).remedy("start a multiple of tp x pp ranks"));
    }
    Ok(ParallelLayout { tp, pp, dp: world / (tp * pp), vp: 1 })
}

/// Reads this rank's part of the weights, in `dtype`.
pub fn load_chunk(device: &dyn Device, stored: &Stored, groups: &Groups, dtype: DType) -> Result<Chunk> {
    let config = &stored.meta().model;
    let mut chunk = Chunk::new(device, config, &groups.layout, groups.at, 0, dtype, Purpose::Inference)?;
    let mut views = Vec::new();
    for param in chunk.params_mut() {
        let rows = 0..param.slice.shape[0];
        views.push((format!("weights/{}", param.spec.name), param.slice.clone(), param.value.rows_mut(rows)));
    }
    let mut wanted: Vec<Wanted> =
        views.iter_mut().map(|(name, slice, tensor)| Wanted { name: name.clone(), slice: slice.clone(), tensor }).collect();
    stored.read(&mut wanted).doing(|| format!("loading {}", stored.dir().display()))?;
    drop(wanted);
    drop(views);
    Ok(chunk)
}
