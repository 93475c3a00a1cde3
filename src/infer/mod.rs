//! Using a trained model: batch generation with a KV cache, and scoring of given text. Both read a checkpoint of any layout.

pub mod decode;
pub mod generate;
pub mod growing;
pub mod load;
pub mod request;
mod request_line;
pub mod sampler;
pub mod samples;
pub mod sampling;
pub mod score;
