//! A model read from a checkpoint for inference: weights only, under any layout, whatever layout wrote it.

use crate::checkpoint::{Stored, Wanted};
use crate::comm::{Groups, agree};
use crate::device::Device;
use crate::error::{Context, Error, Result};
use crate::model::chunk::{Chunk, Purpose};
use crate::model::config::ModelConfig;
use crate::model::packed::WeightFormat;
use crate::model::param::Param;
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
    let mut chunk = new_chunk(device, stored, groups, dtype, Purpose::Inference)?;
    read(stored, chunk.params_mut())?;
    Ok(chunk)
}

/// The same with the weights of products in a format. Each is packed as soon as it is read, so that memory peaks at the packed model and
/// one weight as it is stored. Collective over tp, whose ranks leave with the same Err: see [`Chunk::pack`].
pub fn load_packed(device: &dyn Device, stored: &Stored, groups: &Groups, dtype: DType, format: WeightFormat) -> Result<Chunk> {
    let tp = &*groups.tp;
    let begin = || {
        let mut chunk = new_chunk(device, stored, groups, dtype, Purpose::Loading)?;
        let mut others = chunk.unpacked_params_mut(device, format);
        others.iter_mut().try_for_each(|param| give_memory(device, param))?;
        read(stored, others)?;
        Ok(chunk)
    };
    let mut chunk = agree(tp, begin())?;
    chunk.pack_each(device, tp, format, &mut |param| {
        give_memory(device, param)?;
        read(stored, vec![param])
    })?;
    Ok(chunk)
}

/// Either: in a format where one is given.
pub fn load_as(device: &dyn Device, stored: &Stored, groups: &Groups, dtype: DType, format: Option<WeightFormat>) -> Result<Chunk> {
    match format {
        Some(format) => load_packed(device, stored, groups, dtype, format),
        None => load_chunk(device, stored, groups, dtype),
    }
}

fn new_chunk(device: &dyn Device, stored: &Stored, groups: &Groups, dtype: DType, purpose: Purpose) -> Result<Chunk> {
    Chunk::new(device, &stored.meta().model, &groups.layout, groups.at, 0, dtype, purpose)
}

fn give_memory(device: &dyn Device, param: &mut Param) -> Result<()> {
    param.value = device.alloc(&param.slice.shape, param.value.dtype())?;
    Ok(())
}

/// Fills these weights.
fn read(stored: &Stored, params: Vec<&mut Param>) -> Result<()> {
    let mut views = Vec::new();
    for param in params {
        let rows = 0..param.slice.shape[0];
        views.push((format!("weights/{}", param.spec.name), param.slice.clone(), param.value.rows_mut(rows)));
    }
    let mut wanted: Vec<Wanted> =
        views.iter_mut().map(|(name, slice, tensor)| Wanted { name: name.clone(), slice: slice.clone(), tensor }).collect();
    stored.read(&mut wanted).doing(|| format!("loading {}", stored.dir().display()))
}
