//! Using a trained model: batch generation with a KV cache, and scoring of given text. Both read a checkpoint of any layout.

pub mod decode;
pub mod generate;
pub mod load;
pub mod request;
pub mod sampler;
pub mod score;
