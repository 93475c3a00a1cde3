//! The model: layer structs with forward and backward adjacent and mirrored. It names no concrete device, communicator,
//! rank number or file.

pub mod config;
