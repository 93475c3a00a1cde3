//! Checkpoints: pieces of tensors from every rank, loaded again under any layout.
//!
//! A checkpoint is an artifact of kind "checkpoint": `shard-00000.h5` .. hold the pieces, `index.h5` shows every whole tensor
//! as a virtual dataset to whoever reads HDF5, `pieces.json` says where each piece lies and carries a checksum for every
//! MiB of it, `tokenizer.model` is what the data was tokenized with. Tensors are named `weights/NAME`, `master/NAME`,
//! `adam_m/NAME`, `adam_v/NAME` with NAME from [`crate::model::config::ModelConfig::param_specs`].
//!
//! What is verified when: opening checks the manifest, the size of every file and the checksum of every file but the
//! shards. Reading checks the structures of each shard that it touches and every block that it uses, before the numbers
//! reach a tensor. [`verify()`] reads everything. So a missing, truncated or flipped byte is an error that names the file,
//! and never a number. The form follows Megatron-LM's ShardedTensor; this module knows nothing of optimizers or devices.

mod commit;
pub mod compare;
mod h5;
pub mod hf;
mod plan;
pub mod retention;
pub mod safetensors;
mod save;
mod shard;
pub mod snapshot;
mod stored;

pub use save::{Meta, Piece, Planned, Streamed, save};
pub use shard::StoredType;
pub use stored::{Stored, StoredTensor, Wanted, list, open, verify};

/// Kind of the artifact.
pub const KIND: &str = "checkpoint";
/// The table of pieces.
const PIECES: &str = "pieces.json";
/// The virtual datasets.
const INDEX: &str = "index.h5";
