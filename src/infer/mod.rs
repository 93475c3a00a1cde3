//! Using a trained model: batch generation with a KV cache, scoring of given text, and the comparison of a checkpoint with
//! what it was imported from or exported to. All read a checkpoint of any layout.

pub mod choices;
pub mod decode;
pub mod draft;
pub mod generate;
pub mod growing;
pub mod journal;
pub mod kv_memory;
pub mod load;
pub mod pages;
pub mod pass;
pub mod request;
mod request_line;
pub mod sampler;
pub mod samples;
pub mod sampling;
pub mod schedule;
pub mod score;
pub mod score_files;
mod score_input;
pub mod score_journal;
pub mod score_passes;
pub mod scorer;
pub mod share;
pub mod verify;
