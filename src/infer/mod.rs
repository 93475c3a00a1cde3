//! Using a trained model: batch generation with a KV cache, scoring of given text, and the comparison of a checkpoint with
//! what it was imported from or exported to. All read a checkpoint of any layout.

pub mod decode;
pub mod generate;
pub mod growing;
pub mod journal;
pub mod load;
pub mod request;
mod request_line;
pub mod sampler;
pub mod samples;
pub mod sampling;
pub mod score;
pub mod verify;
