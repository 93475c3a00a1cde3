//! Tokens on disk and their order: Megatron's .bin/.idx shards, and samples as a pure function of their number.

pub mod blend;
pub mod h5;
pub mod index;
pub mod order;
pub mod shards;
pub mod tokenize;
pub mod writer;
