//! Import from and export to Hugging Face directories. The directories are written by this program's own description of the format, and
//! read back by the reference `safetensors` package and by transformers, where they are installed.

mod comparison;
mod configs;
mod memory;
#[path = "../oracles/mod.rs"]
mod oracles;
mod parts;
mod refusals;
mod round_trips;
