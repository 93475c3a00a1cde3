//! Reading checkpoints: hyper-rectangles of whole tensors, assembled from the pieces, whatever layout wrote them. It knows
//! nothing of HDF5: the table of pieces says at which byte of which shard each piece lies.

use super::hf;
use super::save::{Meta, Settings};
use super::shard::{DAMAGED, ShardFile, ShardReader, StoredShard, StoredType, check_table};
use super::{INDEX, KIND, PIECES};
use crate::artifact::{FileEntry, MANIFEST, Manifest, verify_file};
use crate::error::{Error, IoContext, Result};
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use crate::text::{self, Tokenizer};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

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
    // A checkpoint that was imported has a config.json too: of one whose manifest is missing, another line says so.
    let has_ours = [MANIFEST, INDEX, PIECES].iter().any(|name| path.join(name).exists());
    if path.join("config.json").is_file() && !has_ours {
        let wrong = "a model in Hugging Face's form, not a checkpoint";
        return Err(Error::file(path, wrong).remedy("turn it into one: trireme-checkpoint import HF_DIR --out CHECKPOINT"));
    }
    if !path.join("checkpoints").is_dir() {
        return Stored::open_dir(path);
    }
    newest(path)?.ok_or_else(|| Error::file(path, "has no checkpoint yet").remedy("let the run go on until its first checkpoint"))
}

/// Reads every byte of a checkpoint, several files at a time: each file with its size and checksum, or what is wrong with it; of a
/// damaged shard the first tensor that is. An error when not even the manifest can be trusted.
pub fn verify(checkpoint: &Path) -> Result<Vec<(FileEntry, Result<()>)>> {
    let manifest = Manifest::open(checkpoint, KIND)?;
    // Without a table of pieces that can be trusted, a shard is a file like the others.
    let table = Stored::open_dir(checkpoint).ok();
    let verify = |file: &FileEntry| {
        let damage = verify_file(checkpoint, file).err();
        let shard = table.as_ref().and_then(|table| table.shards.iter().find(|shard| shard.file == file.name));
        damage.map_or(Ok(()), |damage| Err(shard.and_then(|shard| verify_shard(checkpoint, shard).err()).unwrap_or(damage)))
    };
    Ok(manifest.files.par_iter().map(|file| (file.clone(), verify(file))).collect())
}

/// Every byte of a shard against the table of pieces.
fn verify_shard(checkpoint: &Path, shard: &StoredShard) -> Result<()> {
    let file = ShardFile::open(checkpoint, shard)?;
    file.verify_frame()?;
    let mut reader = ShardReader::new(&file);
    let mut pieces = shard.pieces.iter().enumerate();
    pieces.try_for_each(|(idx, piece)| reader.read(idx, 0, piece.spec.n_bytes() as usize, |_| {}))
}

/// Every directory of a run that is named as a checkpoint (`checkpoints/step-N`), oldest first, whole or not.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    list_folder(&run_dir.join("checkpoints"))
}

/// The same of the folder of a run's checkpoints.
pub(super) fn list_folder(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
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
    /// Opens one checkpoint.
    pub(super) fn open_dir(dir: &Path) -> Result<Stored> {
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

    /// Fills every wanted tensor. Ask for everything at once: all threads read, each a part of a tensor at a time. On an error
    /// the tensors are left in any state.
    pub fn read(&self, wanted: &mut [Wanted]) -> Result<()> {
        let plan = |want: &Wanted| {
            assert_eq!(want.tensor.n_elements(), want.slice.n_elements(), "room for {} of {:?}", want.name, want.slice);
            self.places(&want.name, &want.slice, want.tensor.dtype())
        };
        let places = wanted.iter().map(plan).collect::<Result<Vec<_>>>()?;
        let seen: Vec<AtomicBool> = self.shards.iter().map(|_| AtomicBool::new(false)).collect();
        let mut tasks = Vec::new();
        let mut foreign = Vec::new();
        for (want, places) in wanted.iter_mut().zip(&places) {
            let dtype = want.tensor.dtype();
            if want.tensor.is_host() {
                tasks.extend(Task::divide(places, &want.slice, dtype, want.tensor.bytes_mut()));
            } else {
                foreign.push((want, places));
            }
        }
        self.run(&mut tasks, &seen)?;
        // Memory that is not the host's is filled by this thread, from a buffer that all threads fill.
        for (want, places) in foreign {
            let dtype = want.tensor.dtype();
            let row_bytes = want.tensor.n_bytes() / want.slice.shape[0].max(1);
            let n_rows = (FOREIGN_BYTES / row_bytes.max(1)).max(1);
            let mut buffer = vec![0; row_bytes * n_rows.min(want.slice.shape[0])];
            for first in (0..want.slice.shape[0]).step_by(n_rows) {
                let rows = rows_of(&want.slice, first, n_rows);
                let part = &mut buffer[..rows.shape[0] * row_bytes];
                self.run(&mut Task::divide(places, &rows, dtype, part), &seen)?;
                want.tensor.write_bytes(first * row_bytes, part);
            }
        }
        Ok(())
    }

    /// Reads the parts, several at a time; of several errors the first in their order.
    fn run(&self, tasks: &mut [Task], seen: &[AtomicBool]) -> Result<()> {
        tasks.par_iter_mut().find_map_first(|task| self.fill(task, seen).err()).map_or(Ok(()), Err)
    }

    fn fill(&self, task: &mut Task, seen: &[AtomicBool]) -> Result<()> {
        for &(shard_idx, piece) in task.places {
            let shard = &self.shards[shard_idx];
            let Some(common) = shard.pieces[piece].spec.slice.intersect(&task.slice) else { continue };
            let file = ShardFile::open(&self.dir, shard)?;
            if !seen[shard_idx].load(Ordering::Relaxed) {
                file.verify_frame()?;
                seen[shard_idx].store(true, Ordering::Relaxed);
            }
            copy_common(&mut ShardReader::new(&file), shard, piece, &common, task)?;
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
    let tokenizer_file = text::file_of(manifest).map(|file| file.name.as_str());
    let mut companions = BTreeMap::new();
    for name in manifest.files.iter().map(|file| &file.name).filter(|name| hf::is_companion(name) && Some(name.as_str()) != tokenizer_file)
    {
        companions.insert(name.clone(), fs::read(dir.join(name)).at(dir.join(name))?);
    }
    Ok(Meta {
        step: count("step")?,
        consumed_samples: count("consumed_samples")?,
        model: settings.model,
        layout: settings.layout,
        recipe: settings.recipe,
        data_fingerprint: settings.data_fingerprint,
        tokenizer,
        companions,
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

/// Bytes that one thread reads at a time, at least: a part costs at most two blocks of a shard more than it has.
const TASK_BYTES: usize = 32 << 20;
/// Bytes on their way to memory that is not the host's.
const FOREIGN_BYTES: usize = 128 << 20;

/// Rows of a tensor to be read by one thread.
struct Task<'a> {
    /// (shard, piece) of the whole tensor that is wanted.
    places: &'a [(usize, usize)],
    /// Which part of the whole tensor.
    slice: Slice,
    dtype: DType,
    /// Its values.
    bytes: &'a mut [u8],
}

impl<'a> Task<'a> {
    /// A wanted part, cut between rows.
    fn divide(places: &'a [(usize, usize)], slice: &Slice, dtype: DType, bytes: &'a mut [u8]) -> Vec<Task<'a>> {
        if bytes.is_empty() {
            return Vec::new();
        }
        let row_bytes = bytes.len() / slice.shape[0];
        let n_rows = (TASK_BYTES / row_bytes).max(1);
        let part = |(idx, bytes): (usize, &'a mut [u8])| Task { places, slice: rows_of(slice, idx * n_rows, n_rows), dtype, bytes };
        bytes.chunks_mut(n_rows * row_bytes).enumerate().map(part).collect()
    }
}

/// `n` rows of a slice, or as many as there are, from its row `first` on.
fn rows_of(slice: &Slice, first: usize, n: usize) -> Slice {
    let mut rows = slice.clone();
    rows.offset[0] += first;
    rows.shape[0] = n.min(slice.shape[0] - first);
    rows
}

/// Copies what a piece and a wanted part have in common.
fn copy_common(reader: &mut ShardReader, shard: &StoredShard, piece: usize, common: &Slice, task: &mut Task) -> Result<()> {
    let spec = &shard.pieces[piece].spec;
    let (stored, asked) = (spec.dtype.dtype(), task.dtype);
    for run in runs(common, &spec.slice, &task.slice) {
        let mut at = run.to * asked.bytes();
        reader.read(piece, run.from * stored.bytes(), run.n * stored.bytes(), |bytes| {
            let n = bytes.len() / stored.bytes() * asked.bytes();
            convert(bytes, stored, &mut task.bytes[at..at + n], asked);
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
