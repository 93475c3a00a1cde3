//! The tokenizer's speed on one thread: MB of text a second, cold (nothing remembered) and warm, and opening a model.
//!
//!     cargo bench --bench tokenizer -- MODEL TEXT..        a SentencePiece .model, and files or folders of text
//!
//! Without arguments a model is trained on this crate's sources. benches/peers/tokenizer.py times SentencePiece on the same
//! documents, the two in turn, and prints the ratio.

use std::path::{Path, PathBuf};
use std::time::Instant;
use trireme::text::Tokenizer;
use trireme::text::corpus::Corpus;
use trireme::text::train::{Settings, train};

/// Documents are read up to so many bytes.
const TEXT_BYTES: usize = 48 << 20;
const ROUNDS: usize = 5;

fn main() -> Result<(), trireme::error::Error> {
    let paths: Vec<PathBuf> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).map(PathBuf::from).collect();
    let sources = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let corpus = Corpus::open(if paths.len() > 1 { &paths[1..] } else { &sources })?;
    let open_start = Instant::now();
    let tokenizer = match paths.first() {
        Some(model) => Tokenizer::open(model)?,
        None => Tokenizer::from_bytes(train(&corpus, &Settings::new(2000))?.model_bytes, Path::new("trained here"))?,
    };
    let open_ms = open_start.elapsed().as_secs_f64() * 1e3;
    let mut texts = Vec::new();
    let mut bytes = 0;
    for document in corpus.documents(0, 1) {
        let text = document?.text;
        bytes += text.len();
        texts.push(text);
        if bytes >= TEXT_BYTES {
            break;
        }
    }
    let (mut best_s, mut cold_s, mut n_ids) = (f64::INFINITY, 0.0, 0);
    let mut ids = Vec::new();
    for round in 0..ROUNDS {
        let start = Instant::now();
        n_ids = 0;
        for text in &texts {
            ids.clear();
            tokenizer.encode_into(text, &mut ids);
            n_ids += ids.len();
        }
        let elapsed_s = start.elapsed().as_secs_f64();
        cold_s = if round == 0 { elapsed_s } else { cold_s };
        best_s = best_s.min(elapsed_s);
    }
    let megabytes = bytes as f64 / 1e6;
    println!(
        "{megabytes:.1} MB in {} documents, {n_ids} ids, {:.3} bytes per id, {} pieces (opened in {open_ms:.0} ms)",
        texts.len(),
        bytes as f64 / n_ids as f64,
        tokenizer.vocab_size()
    );
    println!("encode, one thread: {:.1} MB/s best of {ROUNDS}, {:.1} MB/s the first time", megabytes / best_s, megabytes / cold_s);
    let all: Vec<u32> = texts.iter().flat_map(|text| tokenizer.encode(text)).collect();
    let start = Instant::now();
    let decoded_bytes = tokenizer.decode(&all).len();
    println!("decode, one thread: {:.1} MB/s", decoded_bytes as f64 / 1e6 / start.elapsed().as_secs_f64());
    Ok(())
}
