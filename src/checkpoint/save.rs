//! What is saved, and two ways to save it at once: collectively, from the pieces that the ranks hold (`snapshot` is the way to
//! do that while training goes on), or by one process that streams whole tensors. It knows nothing of how the pieces came about.

use super::KIND;
use super::commit::finish;
use super::shard::{PieceSpec, ShardWriter};
use super::snapshot::{self, Options, Started};
use crate::artifact::{self, ArtifactWriter, Begin, Input, MANIFEST, Manifest};
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::slice::Slice;
use crate::tensor::Tensor;
use crate::text;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What a checkpoint says about itself.
#[derive(Clone, PartialEq, Debug)]
pub struct Meta {
    /// Optimizer steps taken; 0 for imported weights.
    pub step: u64,
    /// Samples consumed: where the data order goes on.
    pub consumed_samples: u64,
    /// The function.
    pub model: ModelConfig,
    /// The layout that wrote it. Any layout reads it.
    pub layout: ParallelLayout,
    /// The recipe of the run, resolved; for imported weights the configuration they came with.
    pub recipe: serde_json::Value,
    /// Fingerprint of the data order; empty for imported weights.
    pub data_fingerprint: String,
    /// The SentencePiece model, byte for byte, when known.
    pub tokenizer: Option<Vec<u8>>,
    /// Small files that imported weights came with, by name, byte for byte ([`super::hf::is_companion`]); they stand in the
    /// checkpoint under the same names.
    pub companions: BTreeMap<String, Vec<u8>>,
    /// What the trainer that wrote it keeps for the one that goes on; null for imported weights.
    pub trainer: serde_json::Value,
}

/// What the manifest of a checkpoint keeps as its recipe.
#[derive(Serialize, Deserialize)]
pub(super) struct Settings {
    pub model: ModelConfig,
    pub layout: ParallelLayout,
    pub data_fingerprint: String,
    pub recipe: serde_json::Value,
    #[serde(default)]
    pub trainer: serde_json::Value,
}

impl Meta {
    fn settings(&self) -> serde_json::Value {
        let settings = Settings {
            model: self.model.clone(),
            layout: self.layout,
            data_fingerprint: self.data_fingerprint.clone(),
            recipe: self.recipe.clone(),
            trainer: self.trainer.clone(),
        };
        serde_json::to_value(settings).expect("plain data")
    }
}

/// A part of a tensor, in host memory, to be saved.
pub struct Piece<'a> {
    /// Full name: `weights/NAME`, `master/NAME`, `adam_m/NAME` or `adam_v/NAME`.
    pub name: String,
    /// Shape of the whole tensor.
    pub global_shape: Vec<usize>,
    /// Which part it is. May be empty; then nothing is written.
    pub slice: Slice,
    /// Its values: as many elements as the slice, row-major, whatever the shape.
    pub tensor: &'a Tensor,
}

/// Writes a checkpoint to `out`. Collective over `world`: every rank brings the pieces that it holds. The pieces of a
/// tensor must cover it; a slice that several ranks hold (replicas) is written once, by the one with the least to write.
/// Rank 0's `meta` counts. The same checkpoint finished before is returned as it is; a damaged one is moved away.
/// Errors (a full disk, an output directory that is something else) are the same on every rank.
pub fn save(out: &Path, meta: &Meta, pieces: &[Piece], world: &dyn Communicator) -> Result<Manifest> {
    match snapshot::start(out, meta, pieces, Options::default(), world)? {
        Started::Saving(saving) => saving.wait(world),
        Started::Finished(manifest) => Ok(*manifest),
    }
}

/// A tensor that a streaming writer will bring.
pub struct Planned {
    /// Full name, `weights/NAME`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: crate::tensor::DType,
}

/// Writes a checkpoint of whole tensors from one process, tensor by tensor, without ever holding one of them.
pub struct Streamed {
    writer: ArtifactWriter,
    meta: Meta,
    shards: Vec<Vec<PieceSpec>>,
}

/// Most bytes of a shard of a streamed checkpoint, unless one tensor alone is larger.
const STREAMED_SHARD_BYTES: u64 = 4 << 30;

impl Streamed {
    /// Starts `out`; the manifest when the same was finished before.
    pub fn begin(out: &Path, meta: Meta, inputs: Vec<Input>, tensors: Vec<Planned>) -> Result<std::result::Result<Streamed, Manifest>> {
        let writer = match begin(out, &meta, inputs)? {
            Begin::Finished(manifest) => return Ok(Err(manifest)),
            Begin::Write(writer) => writer,
        };
        let (mut shards, mut bytes) = (vec![Vec::new()], 0);
        for tensor in tensors {
            let slice = Slice::whole(&tensor.shape);
            let spec = PieceSpec { name: tensor.name, global_shape: tensor.shape, slice, dtype: tensor.dtype.into() };
            if bytes > 0 && bytes + spec.n_bytes() > STREAMED_SHARD_BYTES {
                shards.push(Vec::new());
                bytes = 0;
            }
            bytes += spec.n_bytes();
            shards.last_mut().expect("never empty").push(spec);
        }
        Ok(Ok(Streamed { writer, meta, shards }))
    }

    /// Asks `bring(name, sink)` for every tensor in the order of the files; it must pass all bytes of that tensor to the
    /// sink, in any portions. Then commits.
    pub fn write(self, mut bring: impl FnMut(&str, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>) -> Result<Manifest> {
        let Streamed { writer, meta, shards } = self;
        let mut written = Vec::new();
        for (idx, specs) in shards.into_iter().enumerate() {
            let mut shard = ShardWriter::create(writer.dir(), &shard_name(idx), specs)?;
            let names: Vec<String> = shard.pieces().map(|spec| spec.name.clone()).collect();
            for name in names {
                bring(&name, &mut |bytes| shard.append(bytes))?;
            }
            written.push(shard.close()?);
        }
        finish(writer, &meta, written)
    }
}

/// The name of a rank's shard.
pub(super) fn shard_name(idx: usize) -> String {
    format!("shard-{idx:05}.h5")
}

/// Starts the artifact of a checkpoint.
pub(super) fn begin(out: &Path, meta: &Meta, mut inputs: Vec<Input>) -> Result<Begin> {
    if let Some(tokenizer) = &meta.tokenizer {
        let fingerprint = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(tokenizer));
        inputs.push(Input { role: "tokenizer".into(), path: text::file_name(tokenizer).into(), fingerprint });
    }
    ArtifactWriter::begin(out, KIND, meta.settings(), inputs)
}

/// A resumed run that fell back to an older checkpoint comes by the damaged one again: it makes way, but is not deleted.
pub(super) fn set_damaged_aside(out: &Path) -> Result<()> {
    if !out.join(MANIFEST).is_file() {
        return Ok(());
    }
    let Err(damage) = Manifest::open(out, KIND).and_then(|manifest| manifest.verify(out)) else { return Ok(()) };
    let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = (0..).map(|k| out.with_file_name(format!("damaged-{k}-{name}"))).find(|path| !path.exists());
    let aside = aside.expect("endless candidates");
    log::warn!("{damage}; moved to {}", aside.display());
    artifact::rename(out, &aside)
}
