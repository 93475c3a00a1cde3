//! A shard file: pieces of tensors as contiguous HDF5 datasets, written front to back in one pass, with a checksum for
//! every block of every piece. The table of pieces, kept beside the shards as JSON, says where each piece lies; reading
//! goes by that table, block by block, and needs no HDF5. It knows nothing of ranks, models or optimizers.
//!
//! Why blocks: any part of a piece can be read alone and is still verified, at a cost of at most one block more at each
//! end of a contiguous run.

use super::h5;
use crate::artifact::{FileEntry, HashingFile};
use crate::error::{Error, IoContext, Result};
use crate::parallel::slice::Slice;
use crate::tensor::DType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes under one checksum.
pub const BLOCK_BYTES: usize = 1 << 20;

/// What to do about a damaged file of a checkpoint.
pub const DAMAGED: &str = "the file was damaged: use an older checkpoint (move this directory away and start again), or a copy";

/// A piece to be written.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PieceSpec {
    /// Full name, e.g. `weights/embedding.weight`.
    pub name: String,
    /// Shape of the whole tensor.
    pub global_shape: Vec<usize>,
    /// Which part this is.
    pub slice: Slice,
    /// Element type.
    pub dtype: StoredType,
}

impl PieceSpec {
    /// Bytes of its values.
    pub fn n_bytes(&self) -> u64 {
        (self.slice.n_elements() * self.dtype.dtype().bytes()) as u64
    }
}

/// Element type as the table spells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// Unsigned 32-bit integers.
    U32,
}

impl StoredType {
    /// As the tensors name it.
    pub fn dtype(self) -> DType {
        match self {
            StoredType::F32 => DType::F32,
            StoredType::Bf16 => DType::BF16,
            StoredType::U32 => DType::U32,
        }
    }
    /// As the tables spell it.
    pub fn name(self) -> &'static str {
        match self {
            StoredType::F32 => "f32",
            StoredType::Bf16 => "bf16",
            StoredType::U32 => "u32",
        }
    }
}

impl From<DType> for StoredType {
    fn from(dtype: DType) -> StoredType {
        match dtype {
            DType::F32 => StoredType::F32,
            DType::BF16 => StoredType::Bf16,
            DType::U32 => StoredType::U32,
            DType::F8E4M3 => unreachable!("checkpoints keep weights as they were before they were quantised"),
        }
    }
}

/// A piece in a shard file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StoredPiece {
    /// What it is.
    #[serde(flatten)]
    pub spec: PieceSpec,
    /// Path of its dataset in the shard; differs from the name only when a shard holds several pieces of one tensor.
    pub dataset: String,
    /// Byte of the file at which its values start.
    pub at: u64,
    /// xxh3-64 of each block of its values, 16 hex digits each.
    pub blocks: String,
}

/// A shard file as the table describes it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StoredShard {
    /// Its name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3-64 of everything that is not a piece (HDF5's own structures), in file order.
    pub frame_xxh3: String,
    /// Its pieces, in file order.
    pub pieces: Vec<StoredPiece>,
}

/// Writes one shard file from front to back.
pub struct ShardWriter {
    path: PathBuf,
    file: HashingFile,
    skeleton: File,
    shard: StoredShard,
    /// Bytes written so far.
    at: u64,
    /// The piece being written, and how many of its bytes are written.
    piece: usize,
    piece_at: u64,
    block: Xxh3,
    frame: Xxh3,
}

impl ShardWriter {
    /// Starts `dir/name` with these pieces. [`ShardWriter::pieces`] tells the order in which their bytes must come.
    pub fn create(dir: &Path, name: &str, specs: Vec<PieceSpec>) -> Result<ShardWriter> {
        assert!(specs.iter().all(|spec| spec.n_bytes() > 0), "an empty piece in {name}");
        let mut taken = BTreeSet::new();
        let datasets: Vec<h5::Dataset> = specs
            .iter()
            .map(|spec| {
                let again = (1..).map(|k| format!("{}@{k}", spec.name));
                let path = std::iter::once(spec.name.clone()).chain(again).find(|path| taken.insert(path.clone()));
                h5::Dataset {
                    path: path.expect("endless candidates"),
                    dtype: spec.dtype.dtype(),
                    global_shape: spec.global_shape.clone(),
                    slice: spec.slice.clone(),
                }
            })
            .collect();
        let (skeleton, offsets) = h5::skeleton(&datasets)?;
        let bytes = skeleton.metadata().at(dir.join(name))?.len();
        let places = specs.into_iter().zip(datasets).zip(offsets);
        let mut pieces: Vec<StoredPiece> =
            places.map(|((spec, dataset), at)| StoredPiece { spec, dataset: dataset.path, at, blocks: String::new() }).collect();
        pieces.sort_by_key(|piece| piece.at);
        let shard = StoredShard { file: name.into(), bytes, frame_xxh3: String::new(), pieces };
        let (block, frame) = (Xxh3::new(), Xxh3::new());
        let file = HashingFile::create(dir, name)?;
        let mut writer = ShardWriter { path: dir.join(name), file, skeleton, shard, at: 0, piece: 0, piece_at: 0, block, frame };
        writer.write_frame()?;
        Ok(writer)
    }

    /// The pieces in the order in which their bytes must be appended.
    pub fn pieces(&self) -> impl Iterator<Item = &PieceSpec> {
        self.shard.pieces.iter().map(|piece| &piece.spec)
    }

    /// Appends values: of the first piece until it is full, then of the next. A call must not reach past the end of a piece.
    pub fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        let total = self.shard.pieces[self.piece].spec.n_bytes();
        assert!(self.piece_at + bytes.len() as u64 <= total, "more bytes than {} has", self.shard.pieces[self.piece].spec.name);
        while !bytes.is_empty() {
            let room = BLOCK_BYTES - (self.piece_at % BLOCK_BYTES as u64) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.update(now);
            self.file.append(now)?;
            self.piece_at += now.len() as u64;
            self.at += now.len() as u64;
            if self.piece_at % BLOCK_BYTES as u64 == 0 || self.piece_at == total {
                self.shard.pieces[self.piece].blocks += &hex(self.block.digest());
                self.block.reset();
            }
            bytes = later;
        }
        if self.piece_at == total {
            (self.piece, self.piece_at) = (self.piece + 1, 0);
            self.write_frame()?;
        }
        Ok(())
    }

    /// Flushes to the disk. All pieces must have been appended.
    pub fn close(mut self) -> Result<(FileEntry, StoredShard)> {
        assert_eq!(self.piece, self.shard.pieces.len(), "{} is not complete", self.path.display());
        self.shard.frame_xxh3 = hex(self.frame.digest());
        let entry = self.file.close()?;
        assert_eq!(entry.bytes, self.shard.bytes);
        Ok((entry, self.shard))
    }

    /// Copies HDF5's own bytes up to the next piece, or to the end.
    fn write_frame(&mut self) -> Result<()> {
        let until = self.shard.pieces.get(self.piece).map_or(self.shard.bytes, |piece| piece.at);
        let mut frame = vec![0; (until - self.at).min(BLOCK_BYTES as u64) as usize];
        while self.at < until {
            let n = (until - self.at).min(BLOCK_BYTES as u64) as usize;
            self.skeleton.read_exact_at(&mut frame[..n], self.at).at(&self.path)?;
            self.frame.update(&frame[..n]);
            self.file.append(&frame[..n])?;
            self.at += n as u64;
        }
        Ok(())
    }
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// An open shard file.
pub struct ShardFile<'a> {
    path: PathBuf,
    file: File,
    shard: &'a StoredShard,
}

/// Reads a shard file, a block at a time, each verified before it is used.
pub struct ShardReader<'a> {
    from: &'a ShardFile<'a>,
    block: Vec<u8>,
    /// (piece, block) in `block`.
    loaded: Option<(usize, usize)>,
}

impl<'a> ShardFile<'a> {
    /// Opens a shard; nothing is verified yet.
    pub fn open(dir: &Path, shard: &'a StoredShard) -> Result<ShardFile<'a>> {
        let path = dir.join(&shard.file);
        let file = File::open(&path).at(&path)?;
        Ok(ShardFile { path, file, shard })
    }

    /// Verifies everything in it but the pieces.
    pub fn verify_frame(&self) -> Result<()> {
        let (mut hash, mut at, mut frame) = (Xxh3::new(), 0, Vec::new());
        let ends = self.shard.pieces.iter().map(|piece| (piece.at, piece.at + piece.spec.n_bytes()));
        for (until, next) in ends.chain(std::iter::once((self.shard.bytes, self.shard.bytes))) {
            while at < until {
                frame.resize((until - at).min(BLOCK_BYTES as u64) as usize, 0);
                self.read_at(&mut frame, at)?;
                hash.update(&frame);
                at += frame.len() as u64;
            }
            at = next;
        }
        let found = hex(hash.digest());
        if found != self.shard.frame_xxh3 {
            let wrong = format!("checksum {found} of the HDF5 structures, {} was written", self.shard.frame_xxh3);
            return Err(Error::file(&self.path, wrong).remedy(DAMAGED));
        }
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                let wrong = format!("ends before byte {}, {} bytes were written", at + bytes.len() as u64, self.shard.bytes);
                return Error::file(&self.path, wrong).remedy(DAMAGED);
            }
            Error::io(&self.path, &error)
        })
    }
}

impl<'a> ShardReader<'a> {
    /// A reader that has read nothing yet.
    pub fn new(from: &'a ShardFile<'a>) -> ShardReader<'a> {
        ShardReader { from, block: Vec::new(), loaded: None }
    }

    /// Hands out bytes `from .. from + n` of piece `piece`, verified, in runs that follow each other.
    pub fn read(&mut self, piece: usize, from: usize, n: usize, mut take: impl FnMut(&[u8])) -> Result<()> {
        let mut at = from;
        while at < from + n {
            let block = at / BLOCK_BYTES;
            self.load(piece, block)?;
            let start = at - block * BLOCK_BYTES;
            let end = (from + n - block * BLOCK_BYTES).min(BLOCK_BYTES);
            take(&self.block[start..end]);
            at = block * BLOCK_BYTES + end;
        }
        Ok(())
    }

    /// Brings one block of one piece into memory and verifies it.
    fn load(&mut self, piece_idx: usize, block: usize) -> Result<()> {
        if self.loaded == Some((piece_idx, block)) {
            return Ok(());
        }
        self.loaded = None;
        let piece = &self.from.shard.pieces[piece_idx];
        let start = (block * BLOCK_BYTES) as u64;
        let mut bytes = std::mem::take(&mut self.block);
        bytes.resize((piece.spec.n_bytes() - start).min(BLOCK_BYTES as u64) as usize, 0);
        self.from.read_at(&mut bytes, piece.at + start)?;
        self.block = bytes;
        let (found, written) = (hex(xxh3_64(&self.block)), &piece.blocks[block * 16..(block + 1) * 16]);
        if found != written {
            let name = &piece.spec.name;
            let wrong = format!("checksum {found} of {name} from byte {}, {written} was written", piece.at + start);
            return Err(Error::file(&self.from.path, wrong).remedy(DAMAGED));
        }
        self.loaded = Some((piece_idx, block));
        Ok(())
    }
}

/// Whether the table of a shard makes sense at all, so that reading by it stays within bounds. The table has a checksum of
/// its own; this is against tables that were written wrong.
pub fn check_table(path: &Path, shard: &StoredShard) -> Result<()> {
    let mut end = 0;
    for piece in &shard.pieces {
        let (spec, slice) = (&piece.spec, &piece.spec.slice);
        let n_dims = spec.global_shape.len();
        let fits = slice.offset.len() == n_dims
            && slice.shape.len() == n_dims
            && (1..=4).contains(&n_dims)
            && (0..n_dims).all(|d| slice.offset[d].checked_add(slice.shape[d]).is_some_and(|end| end <= spec.global_shape[d]));
        let n_elements = slice.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let n_bytes = n_elements.and_then(|n| n.checked_mul(spec.dtype.dtype().bytes())).map(|n| n as u64);
        let stops = n_bytes.and_then(|n| piece.at.checked_add(n));
        let blocks = n_bytes.map(|n| n.div_ceil(BLOCK_BYTES as u64) as usize * 16);
        if !fits
            || piece.at < end
            || stops.is_none_or(|stop| stop > shard.bytes)
            || blocks != Some(piece.blocks.len())
            || !piece.blocks.is_ascii()
        {
            let wrong = format!("the entry of {} in {} contradicts itself", spec.name, shard.file);
            return Err(Error::file(path, wrong).remedy(DAMAGED));
        }
        end = stops.expect("checked above");
    }
    Ok(())
}
