//! The model: layer structs with forward and backward adjacent and mirrored. It names no concrete device, communicator,
//! rank number or file.
//!
//! `d` + name is the gradient of name. Every backward says which outputs it assigns and which it accumulates. `T'` is the
//! number of token rows a rank holds between tensor-parallel regions: T/tp under sequence parallelism, else T.

pub mod attention;
pub mod batch;
pub mod block;
pub mod chunk;
pub mod config;
pub mod ctx;
pub mod embedding;
pub mod fp8;
pub mod head;
pub mod heads;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod numerics;
pub mod packed;
pub mod param;
mod parts;
pub mod reward;
pub mod shared;
pub mod streamed;
