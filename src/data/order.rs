//! The order of training samples, a pure function of the sample number: nothing is stored, nothing is communicated, and
//! resuming is a number. Within a source each pass is shuffled by a keyed bijection (a Feistel network with cycle walking);
//! sources are blended exactly (`blend`). Sample s of a source is tokens s*seq_len .. s*seq_len + seq_len + 1: it begins on the
//! last token of the sample before (Megatron's convention).

use super::blend::Blend;
use super::shards::TokenShards;
use crate::error::{Error, Result};
use crate::rng::Random;

struct Source {
    shards: TokenShards,
    n_samples: u64,
    weight: f64,
}

/// Shuffled, blended samples.
pub struct DataOrder {
    sources: Vec<Source>,
    blend: Blend,
    seq_len: usize,
    seed: u64,
}

/// Where a sample comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SampleAt {
    /// Which source.
    pub source: usize,
    /// Which pass over it.
    pub epoch: u64,
    /// First token in the source.
    pub first_token: u64,
}

fn count_samples(shards: &TokenShards, seq_len: usize) -> Result<u64> {
    let n_samples = shards.n_tokens().saturating_sub(1) / seq_len as u64;
    if n_samples == 0 {
        let wrong = format!("{} tokens, one sample needs batch.seq_len + 1 = {}", shards.n_tokens(), seq_len + 1);
        return Err(Error::file(shards.dir(), wrong).remedy("take more text or shorter samples"));
    }
    Ok(n_samples)
}

impl DataOrder {
    /// Errors: a source shorter than one sample, weights that are not positive.
    pub fn new(sources: Vec<(TokenShards, f64)>, seq_len: usize, seed: u64) -> Result<DataOrder> {
        let weights: Vec<f64> = sources.iter().map(|(_, weight)| *weight).collect();
        let blend = Blend::new(&weights)?;
        let with_count =
            |(shards, weight)| -> Result<Source> { Ok(Source { n_samples: count_samples(&shards, seq_len)?, shards, weight }) };
        Ok(DataOrder { sources: sources.into_iter().map(with_count).collect::<Result<_>>()?, blend, seq_len, seed })
    }

    /// Where sample `index` comes from.
    pub fn locate(&self, index: u64) -> SampleAt {
        let (source, number) = self.blend.at(index);
        let n_samples = self.sources[source].n_samples;
        let epoch = number / n_samples;
        let key = Random::new(self.seed, &format!("order of source {source}, pass {epoch}"));
        let sample = permute(number % n_samples, n_samples, &key);
        SampleAt { source, epoch, first_token: sample * self.seq_len as u64 }
    }

    /// Fills `out` with the seq_len + 1 tokens of sample `index`.
    pub fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        let at = self.locate(index);
        read_sample(&self.sources[at.source].shards, at.first_token, self.seq_len, out);
        Ok(())
    }

    /// Tokens in all sources.
    pub fn n_tokens(&self) -> u64 {
        self.sources.iter().map(|source| source.shards.n_tokens()).sum()
    }

    /// Stands for everything that decides which tokens sample i has: sources, weights, sample length, seed.
    pub fn fingerprint(&self) -> String {
        let sources: Vec<(&str, f64)> = self.sources.iter().map(|source| (source.shards.fingerprint(), source.weight)).collect();
        let content = serde_json::json!([sources, self.seq_len, self.seed]).to_string();
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(content.as_bytes()))
    }
}

/// Samples in their natural order, for held-out loss.
pub struct Sequential {
    shards: TokenShards,
    n_samples: u64,
    seq_len: usize,
}

impl Sequential {
    /// Errors: shorter than one sample.
    pub fn new(shards: TokenShards, seq_len: usize) -> Result<Sequential> {
        Ok(Sequential { n_samples: count_samples(&shards, seq_len)?, shards, seq_len })
    }

    /// How many samples there are.
    pub fn n_samples(&self) -> u64 {
        self.n_samples
    }

    /// Fills `out` with the seq_len + 1 tokens of sample `index`.
    pub fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        assert!(index < self.n_samples, "sample {index} of {}", self.n_samples);
        read_sample(&self.shards, index * self.seq_len as u64, self.seq_len, out);
        Ok(())
    }
}

fn read_sample(shards: &TokenShards, first_token: u64, seq_len: usize, out: &mut [u32]) {
    assert_eq!(out.len(), seq_len + 1);
    shards.copy_tokens(first_token..first_token + out.len() as u64, out);
}

/// A bijection of 0..n, different for each key: four Feistel rounds on the next even number of bits, walked until the value
/// falls below n (fewer than four steps on average).
pub fn permute(x: u64, n: u64, key: &Random) -> u64 {
    assert!(x < n);
    let half_bits = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut value = x;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4u64 {
            let mixed = key.bits(right | round << 60) & mask;
            (left, right) = (right, left ^ mixed);
        }
        value = left << half_bits | right;
        if value < n {
            return value;
        }
    }
}
