//! The tokenizer against Google's SentencePiece (the Python package, asked through tests/oracles/sentencepiece_oracle.py),
//! Hugging Face's, against damaged model files, and against itself: training must not depend on threads, encoding must not be quadratic.

mod adversarial;
mod encode;
mod files;
mod json;
mod oracle;
mod train;
