//! Saving a checkpoint: collectively, from the pieces that the ranks hold, or by one process that streams them.
//!
//! All ranks agree on success after each step, so a full disk on one of them is the same error on all, and nothing that
//! looks finished is left behind. It knows nothing of how the pieces came about.

use super::shard::{PieceSpec, ShardWriter, StoredShard};
use super::{INDEX, KIND, PIECES, h5};
use crate::artifact::{ArtifactWriter, Begin, FileEntry, HashingFile, Input, MANIFEST, Manifest};
use crate::comm::{Communicator, agree};
use crate::error::{Context, IoContext, Result};
use crate::model::config::ModelConfig;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::slice::Slice;
use crate::tensor::Tensor;
use crate::text;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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
    let doing = || format!("saving the checkpoint {}", out.display());
    let (writer, finished) = match agree(world, begin_on_root(out, meta, world.rank())).doing(doing)? {
        Some(Begin::Write(writer)) => (Some(writer), None),
        Some(Begin::Finished(manifest)) => (None, Some(manifest)),
        None => (None, None),
    };
    let Some(dir) = announce(world, writer.as_ref().map(ArtifactWriter::dir)) else {
        return Ok(broadcast_manifest(world, finished.as_ref()));
    };
    let mine = choose(pieces, world);
    let written = agree(world, write_pieces(&dir, world.rank(), &mine)).doing(doing)?;
    let reports = world.gather_variable(&serde_json::to_vec(&written).expect("plain data"));
    let finished = writer.map(|writer| finish(writer, meta, decode_reports(&reports))).transpose();
    let manifest = agree(world, finished).doing(doing)?;
    Ok(broadcast_manifest(world, manifest.as_ref()))
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

fn shard_name(idx: usize) -> String {
    format!("shard-{idx:05}.h5")
}

fn begin_on_root(out: &Path, meta: &Meta, rank: usize) -> Result<Option<Begin>> {
    if rank > 0 {
        return Ok(None);
    }
    set_damaged_aside(out)?;
    begin(out, meta, Vec::new()).map(Some)
}

fn begin(out: &Path, meta: &Meta, mut inputs: Vec<Input>) -> Result<Begin> {
    if let Some(tokenizer) = &meta.tokenizer {
        let fingerprint = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(tokenizer));
        inputs.push(Input { role: "tokenizer".into(), path: text::file_name(tokenizer).into(), fingerprint });
    }
    ArtifactWriter::begin(out, KIND, meta.settings(), inputs)
}

/// A resumed run that fell back to an older checkpoint comes by the damaged one again: it makes way, but is not deleted.
fn set_damaged_aside(out: &Path) -> Result<()> {
    if !out.join(MANIFEST).is_file() {
        return Ok(());
    }
    let Err(damage) = Manifest::open(out, KIND).and_then(|manifest| manifest.verify(out)) else { return Ok(()) };
    let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = (0..).map(|k| out.with_file_name(format!("damaged-{k}-{name}"))).find(|path| !path.exists());
    let aside = aside.expect("endless candidates");
    log::warn!("{damage}; moved to {}", aside.display());
    fs::rename(out, &aside).at(out)
}

/// Rank 0 tells the others where to write; None when there is nothing to write.
fn announce(world: &dyn Communicator, dir: Option<&Path>) -> Option<PathBuf> {
    let mut word = world.gather_variable(dir.map_or(&[], |dir| dir.as_os_str().as_bytes()));
    let path = std::mem::take(&mut word[0]);
    (!path.is_empty()).then(|| PathBuf::from(OsString::from_vec(path)))
}

fn broadcast_manifest(world: &dyn Communicator, manifest: Option<&Manifest>) -> Manifest {
    let mine = manifest.map(|manifest| serde_json::to_vec(manifest).expect("plain data")).unwrap_or_default();
    serde_json::from_slice(&world.gather_variable(&mine)[0]).expect("rank 0 sent a manifest")
}

fn spec_of(piece: &Piece) -> PieceSpec {
    PieceSpec {
        name: piece.name.clone(),
        global_shape: piece.global_shape.clone(),
        slice: piece.slice.clone(),
        dtype: piece.tensor.dtype().into(),
    }
}

/// The pieces that this rank writes: all ranks know what all ranks hold, and decide alike.
fn choose<'a, 'b>(pieces: &'b [Piece<'a>], world: &dyn Communicator) -> Vec<&'b Piece<'a>> {
    let specs: Vec<PieceSpec> = pieces.iter().map(spec_of).collect();
    for piece in pieces {
        assert_eq!(piece.tensor.n_elements(), piece.slice.n_elements(), "values of {} for {:?}", piece.name, piece.slice);
    }
    let all = world.gather_variable(&serde_json::to_vec(&specs).expect("plain data"));
    let all: Vec<Vec<PieceSpec>> = all.iter().map(|text| serde_json::from_slice(text).expect("plain data of a rank")).collect();
    let writers = assign(&all);
    check_cover(&all, world);
    let rank = world.rank();
    pieces.iter().enumerate().filter(|(idx, _)| writers.contains(&(rank, *idx))).map(|(_, piece)| piece).collect()
}

/// Picks one (rank, piece) for each distinct slice, largest first, the rank with the least to write so far.
fn assign(all: &[Vec<PieceSpec>]) -> BTreeSet<(usize, usize)> {
    let mut holders: BTreeMap<(&str, &[usize], &[usize]), Vec<(usize, usize)>> = BTreeMap::new();
    for (rank, specs) in all.iter().enumerate() {
        for (idx, spec) in specs.iter().enumerate().filter(|(_, spec)| spec.n_bytes() > 0) {
            holders.entry((&spec.name, &spec.slice.offset, &spec.slice.shape)).or_default().push((rank, idx));
        }
    }
    let spec = |(rank, idx): (usize, usize)| &all[rank][idx];
    let mut groups: Vec<Vec<(usize, usize)>> = holders.into_values().collect();
    groups.sort_by_key(|group| (group.len() > 1, std::cmp::Reverse(spec(group[0]).n_bytes())));
    let (mut load, mut chosen) = (vec![0u64; all.len()], BTreeSet::new());
    for group in groups {
        let &writer = group.iter().min_by_key(|(rank, _)| (load[*rank], *rank)).expect("a group has a holder");
        for &holder in &group {
            assert_eq!(spec(holder), spec(writer), "replicas of a piece differ in type or shape");
        }
        load[writer.0] += spec(writer).n_bytes();
        chosen.insert(writer);
    }
    chosen
}

/// The distinct slices of every tensor tile it. Each rank checks its share of the tensors.
fn check_cover(all: &[Vec<PieceSpec>], world: &dyn Communicator) {
    let mut tensors: BTreeMap<&str, Vec<&PieceSpec>> = BTreeMap::new();
    for spec in all.iter().flatten().filter(|spec| spec.n_bytes() > 0) {
        tensors.entry(&spec.name).or_default().push(spec);
    }
    for (name, mut specs) in tensors.into_iter().skip(world.rank()).step_by(world.size()) {
        specs.sort_by(|a, b| (&a.slice.offset, &a.slice.shape).cmp(&(&b.slice.offset, &b.slice.shape)));
        specs.dedup_by(|a, b| a.slice == b.slice);
        let total: usize = specs[0].global_shape.iter().product();
        assert_eq!(specs.iter().map(|spec| spec.slice.n_elements()).sum::<usize>(), total, "the pieces of {name} do not tile it");
        for (i, a) in specs.iter().enumerate() {
            assert_eq!((&a.global_shape, a.dtype), (&specs[0].global_shape, specs[0].dtype), "pieces of {name} disagree");
            for b in &specs[..i] {
                assert!(a.slice.intersect(&b.slice).is_none(), "pieces of {name} overlap: {:?} and {:?}", a.slice, b.slice);
            }
        }
    }
}

type Written = (FileEntry, StoredShard);

fn write_pieces(dir: &Path, rank: usize, pieces: &[&Piece]) -> Result<Option<Written>> {
    if pieces.is_empty() {
        return Ok(None);
    }
    let mut writer = ShardWriter::create(dir, &shard_name(rank), pieces.iter().map(|piece| spec_of(piece)).collect())?;
    let order: Vec<PieceSpec> = writer.pieces().cloned().collect();
    let by_slice: BTreeMap<(&str, &[usize], &[usize]), &Tensor> =
        pieces.iter().map(|p| ((p.name.as_str(), &p.slice.offset[..], &p.slice.shape[..]), p.tensor)).collect();
    for spec in &order {
        writer.append(&by_slice[&(spec.name.as_str(), &spec.slice.offset[..], &spec.slice.shape[..])].host_bytes())?;
    }
    writer.close().map(Some)
}

fn decode_reports(reports: &[Vec<u8>]) -> Vec<Written> {
    let decode = |text: &Vec<u8>| serde_json::from_slice::<Option<Written>>(text).expect("plain data of a rank");
    reports.iter().filter_map(decode).collect()
}

/// Rank 0: index, table and tokenizer, then the commit.
fn finish(mut writer: ArtifactWriter, meta: &Meta, written: Vec<Written>) -> Result<Manifest> {
    let (entries, shards): (Vec<FileEntry>, Vec<StoredShard>) = written.into_iter().unzip();
    entries.into_iter().for_each(|entry| writer.add(entry));
    let dir = writer.dir().to_path_buf();
    let index = write_index(&dir, meta, &shards)?;
    writer.add(index);
    writer.add(write_file(&dir, PIECES, &serde_json::to_vec(&shards).expect("plain data"))?);
    if let Some(tokenizer) = &meta.tokenizer {
        writer.add(write_file(&dir, text::file_name(tokenizer), tokenizer)?);
    }
    writer.count("step", meta.step);
    writer.count("consumed_samples", meta.consumed_samples);
    writer.count("tensor_bytes", shards.iter().flat_map(|shard| &shard.pieces).map(|piece| piece.spec.n_bytes()).sum::<u64>());
    writer.commit()
}

fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry> {
    let mut file = HashingFile::create(dir, name)?;
    file.append(bytes)?;
    file.close()
}

fn write_index(dir: &Path, meta: &Meta, shards: &[StoredShard]) -> Result<FileEntry> {
    let mut tensors: BTreeMap<&str, h5::Virtual> = BTreeMap::new();
    for shard in shards {
        for piece in &shard.pieces {
            let spec = &piece.spec;
            let tensor = tensors.entry(&spec.name).or_insert_with(|| h5::Virtual {
                path: spec.name.clone(),
                dtype: spec.dtype.dtype(),
                shape: spec.global_shape.clone(),
                sources: Vec::new(),
            });
            let (file, path) = (shard.file.clone(), piece.dataset.clone());
            tensor.sources.push(h5::Source { file, path, slice: spec.slice.clone() });
        }
    }
    let json = |value: serde_json::Result<String>| h5::Attribute::Text(value.expect("plain data"));
    let attributes = [
        ("step", h5::Attribute::Number(meta.step)),
        ("consumed_samples", h5::Attribute::Number(meta.consumed_samples)),
        ("model", json(serde_json::to_string(&meta.model))),
        ("layout", json(serde_json::to_string(&meta.layout))),
    ];
    let memory = h5::index(&tensors.into_values().collect::<Vec<_>>(), &attributes)?;
    copy_file(&memory, dir, INDEX)
}

fn copy_file(memory: &File, dir: &Path, name: &str) -> Result<FileEntry> {
    let mut file = HashingFile::create(dir, name)?;
    let (mut block, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let n = memory.read_at(&mut block, at).at(dir.join(name))?;
        if n == 0 {
            return file.close();
        }
        file.append(&block[..n])?;
        at += n as u64;
    }
}
