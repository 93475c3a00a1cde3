//! Reading checkpoints: hyper-rectangles of whole tensors, assembled from the pieces, whatever layout wrote them. It knows
//! nothing of HDF5: the table of pieces says at which byte of which shard each piece lies.

use super::save::{Meta, Settings};
use super::shard::{DAMAGED, ShardReader, StoredShard, StoredType, check_table};
use super::{INDEX, KIND, PIECES};
use crate::artifact::{FileEntry, Manifest, verify_file};
use crate::error::{Error, IoContext, Result};
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use crate::text::{self, Tokenizer};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A finished checkpoint, opened.
pub struct Stored {
    dir: PathBuf,
    manifest: Manifest,
    meta: Meta,
    shards: Vec<StoredShard>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// A whole tensor of a checkpoint.
#[derive(Clone, PartialEq, Debug)]
pub struct StoredTensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Element type on disk.
    pub dtype: StoredType,
    /// (shard, piece in the shard) of each part.
    places: Vec<(usize, usize)>,
}

impl StoredTensor {
    /// In how many pieces it is stored.
    pub fn n_pieces(&self) -> usize {
        self.places.len()
    }
}

/// A part of a tensor that is asked for.
pub struct Wanted<'a> {
    /// Full name: `weights/NAME`, `master/NAME`, `adam_m/NAME` or `adam_v/NAME`.
    pub name: String,
    /// Which part of the whole tensor.
    pub slice: Slice,
    /// Where it goes: host memory of as many elements as the slice, row-major. f32 and bf16 convert into each other
    /// (to nearest even); u32 only reads u32.
    pub tensor: &'a mut Tensor,
}

/// Opens a checkpoint, or of a run the newest one that is whole. Skipping a damaged one is told as a warning.
pub fn open(path: &Path) -> Result<Stored> {
    if !path.join("checkpoints").is_dir() {
        return Stored::open_dir(path);
    }
    match newest(path)? {
        Some(stored) => Ok(stored),
        None => Err(Error::file(path, "has no checkpoint yet").remedy("let the run go on until its first checkpoint")),
    }
}

/// Where the newest whole checkpoint of a run is; None for a run that has not saved yet.
pub fn latest(run_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(newest(run_dir)?.map(|stored| stored.dir))
}

/// Reads every byte of a checkpoint: each file with its size and checksum, or what is wrong with it. An error when not even
/// the manifest can be trusted.
pub fn verify(checkpoint: &Path) -> Result<Vec<(FileEntry, Result<()>)>> {
    let manifest = Manifest::open(checkpoint, KIND)?;
    let report = manifest.files.iter().map(|file| (file.clone(), verify_file(checkpoint, file)));
    Ok(report.collect())
}

/// Every directory of a run that is named as a checkpoint (`checkpoints/step-N`), oldest first, whole or not.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = run_dir.join("checkpoints");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(&folder).at(&folder)? {
        let entry = entry.at(&folder)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("step-")).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        if let Some(step) = number.and_then(|digits| digits.parse().ok()) {
            steps.push((step, entry.path()));
        }
    }
    steps.sort();
    Ok(steps)
}

/// Newest first; what is not whole is skipped with a warning, unless nothing is left.
fn newest(run_dir: &Path) -> Result<Option<Stored>> {
    let mut first_damage = None;
    for (_, path) in list(run_dir)?.into_iter().rev() {
        match Stored::open_dir(&path) {
            Ok(stored) => {
                if let Some(damage) = first_damage {
                    log::warn!("{damage}; going on from {}", path.display());
                }
                return Ok(Some(stored));
            }
            Err(damage) => first_damage = first_damage.or(Some(damage)),
        }
    }
    match first_damage {
        Some(damage) => Err(damage.doing(format!("looking for a whole checkpoint in {}", run_dir.display()))),
        None => Ok(None),
    }
}

impl Stored {
    fn open_dir(dir: &Path) -> Result<Stored> {
        let manifest = Manifest::open(dir, KIND)?;
        for file in manifest.files.iter().filter(|file| !file.name.starts_with("shard-")) {
            verify_file(dir, file)?;
        }
        for needed in [PIECES, INDEX] {
            if manifest.file(needed).is_none() {
                return Err(Error::file(dir, format!("its manifest does not name {needed}")).remedy(DAMAGED));
            }
        }
        let path = dir.join(PIECES);
        let text = fs::read(&path).at(&path)?;
        let shards: Vec<StoredShard> =
            serde_json::from_slice(&text).map_err(|error| Error::file(&path, format!("not a table of pieces: {error}")).remedy(DAMAGED))?;
        for shard in &shards {
            let size = manifest.file(&shard.file).map(|file| file.bytes);
            if size != Some(shard.bytes) {
                let wrong = format!("{} has {} bytes here and {size:?} in the manifest", shard.file, shard.bytes);
                return Err(Error::file(&path, wrong).remedy(DAMAGED));
            }
            check_table(&path, shard)?;
        }
        let (meta, tensors) = (read_meta(dir, &manifest)?, gather_tensors(&path, &shards)?);
        Ok(Stored { dir: dir.into(), manifest, meta, shards, tensors })
    }

    /// What it says about itself.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizer that the weights belong to, when it is known.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let parse = |bytes: &Vec<u8>| Tokenizer::from_bytes(bytes.clone(), &self.dir.join(text::file_name(bytes)));
        self.meta.tokenizer.as_ref().map(parse).transpose()
    }

    /// Its manifest; the fingerprint goes into the manifests of what is made from it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every tensor by its full name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// Whether it holds Adam's moments to go on training from, or weights only. (Master weights are kept only where the
    /// weights are not f32 themselves.)
    pub fn has_optimizer_state(&self) -> bool {
        self.has_group("adam_m/") && self.has_group("adam_v/")
    }

    fn has_group(&self, group: &str) -> bool {
        self.tensors.keys().any(|name| name.starts_with(group))
    }

    /// Fills every wanted tensor. Ask for everything at once: each shard is then opened once and read in file order. On
    /// an error the tensors are left in any state.
    pub fn read(&self, wanted: &mut [Wanted]) -> Result<()> {
        let mut jobs = Vec::new();
        for (idx, want) in wanted.iter().enumerate() {
            assert_eq!(want.tensor.n_elements(), want.slice.n_elements(), "room for {} of {:?}", want.name, want.slice);
            let places = self.places(&want.name, &want.slice, want.tensor.dtype())?;
            jobs.extend(places.into_iter().map(|(shard, piece)| (shard, piece, idx)));
        }
        jobs.sort();
        let mut open: Option<(usize, ShardReader)> = None;
        for (shard, piece, idx) in jobs {
            if open.as_ref().is_none_or(|(at, _)| *at != shard) {
                open = Some((shard, ShardReader::open(&self.dir, &self.shards[shard])?));
            }
            let (_, reader) = open.as_mut().expect("opened above");
            copy_common(reader, &self.shards[shard], piece, &mut wanted[idx])?;
        }
        Ok(())
    }

    /// The pieces that cover a part of a tensor, or why there are none.
    fn places(&self, name: &str, slice: &Slice, dtype: DType) -> Result<Vec<(usize, usize)>> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.unknown(name))?;
        let n_dims = tensor.shape.len();
        let within = slice.offset.len() == n_dims
            && slice.shape.len() == n_dims
            && (0..n_dims).all(|d| slice.offset[d] + slice.shape[d] <= tensor.shape[d]);
        if !within {
            let wrong = format!("{name} is {:?}, asked for {:?} from {:?}", tensor.shape, slice.shape, slice.offset);
            return Err(Error::file(&self.dir, wrong).remedy("use the model sizes of the checkpoint"));
        }
        if (dtype == DType::U32) != (tensor.dtype == StoredType::U32) {
            let wrong = format!("{name} is {}, asked for as {dtype:?}", tensor.dtype.name());
            return Err(Error::file(&self.dir, wrong).remedy("ask for the stored type"));
        }
        let mut covered = 0;
        let places: Vec<(usize, usize)> = tensor
            .places
            .iter()
            .copied()
            .filter(|&(shard, piece)| {
                let common = self.shards[shard].pieces[piece].spec.slice.intersect(slice);
                covered += common.as_ref().map_or(0, Slice::n_elements);
                common.is_some()
            })
            .collect();
        if covered != slice.n_elements() {
            let held: Vec<String> = tensor.places.iter().map(|&(s, p)| describe(&self.shards[s].pieces[p].spec.slice)).collect();
            let wrong = format!("{name}: asked for {}, holds only {}", describe(slice), held.join(" "));
            return Err(Error::file(&self.dir, wrong).remedy(DAMAGED));
        }
        Ok(places)
    }

    fn unknown(&self, name: &str) -> Error {
        let group = name.split_inclusive('/').next().unwrap_or(name);
        if ["master/", "adam_m/", "adam_v/"].contains(&group) && !self.has_optimizer_state() {
            let wrong = format!("holds weights only, no {name}");
            return Error::file(&self.dir, wrong).remedy("start a new run from its weights, or resume from a checkpoint of training");
        }
        let nearest = self.tensors.keys().min_by_key(|known| strsim::damerau_levenshtein(known, name));
        let error = Error::file(&self.dir, format!("has no tensor {name}"));
        match nearest {
            Some(nearest) => error.remedy(format!("the nearest is {nearest}; use the model sizes of the checkpoint")),
            None => error.remedy(DAMAGED),
        }
    }
}

/// `[0..4, 8..16]`
fn describe(slice: &Slice) -> String {
    let ranges: Vec<String> = slice.offset.iter().zip(&slice.shape).map(|(o, n)| format!("{o}..{}", o + n)).collect();
    format!("[{}]", ranges.join(", "))
}

fn read_meta(dir: &Path, manifest: &Manifest) -> Result<Meta> {
    let settings: Settings = serde_json::from_value(manifest.recipe.clone())
        .map_err(|error| Error::file(dir, format!("its manifest does not describe a model: {error}")).remedy(DAMAGED))?;
    let count = |name: &str| {
        let missing = || Error::file(dir, format!("its manifest has no count {name}")).remedy(DAMAGED);
        manifest.count(name).ok_or_else(missing)
    };
    let tokenizer = match text::file_of(manifest) {
        Some(file) => Some(fs::read(dir.join(&file.name)).at(dir.join(&file.name))?),
        None => None,
    };
    Ok(Meta {
        step: count("step")?,
        consumed_samples: count("consumed_samples")?,
        model: settings.model,
        layout: settings.layout,
        recipe: settings.recipe,
        data_fingerprint: settings.data_fingerprint,
        tokenizer,
        trainer: settings.trainer,
    })
}

fn gather_tensors(path: &Path, shards: &[StoredShard]) -> Result<BTreeMap<String, StoredTensor>> {
    let mut tensors: BTreeMap<String, StoredTensor> = BTreeMap::new();
    for (shard_idx, shard) in shards.iter().enumerate() {
        for (piece_idx, piece) in shard.pieces.iter().enumerate() {
            let spec = &piece.spec;
            let new = || StoredTensor { shape: spec.global_shape.clone(), dtype: spec.dtype, places: Vec::new() };
            let tensor = tensors.entry(spec.name.clone()).or_insert_with(new);
            if tensor.shape != spec.global_shape || tensor.dtype != spec.dtype {
                return Err(Error::file(path, format!("the pieces of {} disagree", spec.name)).remedy(DAMAGED));
            }
            tensor.places.push((shard_idx, piece_idx));
        }
    }
    Ok(tensors)
}

/// Copies what a piece and a wanted part have in common.
fn copy_common(reader: &mut ShardReader, shard: &StoredShard, piece: usize, want: &mut Wanted) -> Result<()> {
    let spec = &shard.pieces[piece].spec;
    let common = spec.slice.intersect(&want.slice).expect("chosen because they have something in common");
    let (stored, asked) = (spec.dtype.dtype(), want.tensor.dtype());
    let mut converted = Vec::new();
    for run in runs(&common, &spec.slice, &want.slice) {
        let mut at = run.to * asked.bytes();
        reader.read(piece, run.from * stored.bytes(), run.n * stored.bytes(), |bytes| {
            let n = bytes.len() / stored.bytes() * asked.bytes();
            if want.tensor.is_host() {
                convert(bytes, stored, &mut want.tensor.bytes_mut()[at..at + n], asked);
            } else {
                converted.resize(n, 0);
                convert(bytes, stored, &mut converted, asked);
                want.tensor.write_bytes(at, &converted);
            }
            at += n;
        })?;
    }
    Ok(())
}

/// Elements that follow each other both in the piece and in what is wanted.
struct Run {
    from: usize,
    to: usize,
    n: usize,
}

/// The runs of `common` in ascending order of both.
fn runs(common: &Slice, piece: &Slice, wanted: &Slice) -> Vec<Run> {
    let n_dims = common.shape.len();
    let (mut merged, mut n) = (n_dims - 1, common.shape[n_dims - 1]);
    while merged > 0 && common.shape[merged] == piece.shape[merged] && common.shape[merged] == wanted.shape[merged] {
        merged -= 1;
        n *= common.shape[merged];
    }
    let outer = &common.shape[..merged];
    let (mut index, mut runs) = (vec![0; n_dims], Vec::new());
    for _ in 0..outer.iter().product() {
        let position = |of: &Slice| (0..n_dims).fold(0, |at, d| at * of.shape[d] + common.offset[d] + index[d] - of.offset[d]);
        runs.push(Run { from: position(piece), to: position(wanted), n });
        for d in (0..merged).rev() {
            index[d] += 1;
            if index[d] < outer[d] {
                break;
            }
            index[d] = 0;
        }
    }
    runs
}

/// Stored little-endian values into values of the asked type; widening is exact, narrowing rounds to nearest even.
fn convert(from: &[u8], stored: DType, to: &mut [u8], asked: DType) {
    match (stored, asked) {
        (DType::BF16, DType::F32) => {
            for (to, from) in to.chunks_exact_mut(4).zip(from.chunks_exact(2)) {
                to.copy_from_slice(&[0, 0, from[0], from[1]]);
            }
        }
        (DType::F32, DType::BF16) => {
            for (to, from) in to.chunks_exact_mut(2).zip(from.chunks_exact(4)) {
                let value = f32::from_le_bytes(from.try_into().expect("4 bytes"));
                to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
        }
        _ => to.copy_from_slice(from),
    }
}
