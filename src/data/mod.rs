//! Training data: token shards on disk, the order in which samples are taken from them, the stage that makes them, and small
//! named tables in HDF5.
//!
//! This module knows nothing of models or devices; only `tokenize` knows text, and that there are ranks.

pub mod blend;
pub mod h5;
pub mod index;
pub mod order;
pub mod origin;
pub mod shards;
pub mod tokenize;
pub mod writer;
