//! The order of samples, as a pure function of the sample's number: which source (see `blend`), which sample of it, in an order
//! shuffled anew each epoch. Nothing is stored or communicated; where a run goes on is one number.
//!
//! Sample s of a source is its tokens s * seq_len .. s * seq_len + seq_len + 1: inputs and, one later, targets. The last
//! (n_tokens - 1) % seq_len tokens of a source belong to no sample. The shuffle of an epoch is a Feistel network (Luby and
//! Rackoff 1988) on the next even number of bits, walked along its cycles until it falls into 0..n (Black and Rogaway 2002).
//!
//! This file knows nothing of ranks: a replica asks for the numbers it wants.

use super::blend::Blend;
use super::shards::TokenShards;
use crate::error::{Error, Result};
use crate::rng::Random;
use std::ops::Range;

/// Rounds of the Feistel network. Four make a pseudo-random permutation of a large domain; small ones mix better with more.
const ROUNDS: u64 = 8;

/// A keyed permutation of 0..n, computed point by point.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    random: Random,
}

impl Permutation {
    /// The permutation of 0..n with this key; n at least 1 and at most 2^56.
    pub fn new(n: u64, random: Random) -> Permutation {
        assert!((1..=1 << 56).contains(&n), "a permutation of {n}");
        let bits = u64::BITS - (n - 1).leading_zeros();
        Permutation { n, half_bits: bits.div_ceil(2).max(1), random }
    }

    /// Where `index` goes.
    pub fn apply(&self, index: u64) -> u64 {
        assert!(index < self.n, "{index} of {}", self.n);
        let mut x = index;
        loop {
            x = self.network(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// Where `index` comes from: the inverse of [`Permutation::apply`].
    pub fn invert(&self, index: u64) -> u64 {
        assert!(index < self.n, "{index} of {}", self.n);
        let mut x = index;
        loop {
            x = self.network_back(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (self.random.bits(round << 56 | right) & mask));
        }
        left << self.half_bits | right
    }

    fn network_back(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in (0..ROUNDS).rev() {
            (left, right) = (right ^ (self.random.bits(round << 56 | left) & mask), left);
        }
        left << self.half_bits | right
    }
}

/// Samples of `seq_len` + 1 tokens in one set of shards.
struct Source {
    shards: TokenShards,
    n_samples: u64,
}

impl Source {
    fn new(shards: TokenShards, seq_len: usize) -> Result<Source> {
        if seq_len == 0 {
            return Err(Error::recipe("a sample of 0 tokens").remedy("set batch.seq_len to at least 1"));
        }
        let n_samples = shards.n_tokens().saturating_sub(1) / seq_len as u64;
        if n_samples == 0 {
            let wrong = format!("{} tokens, one sample takes {}", shards.n_tokens(), seq_len as u64 + 1);
            return Err(Error::file(shards.path(), wrong).remedy("shorten batch.seq_len, or tokenize more text"));
        }
        Ok(Source { shards, n_samples })
    }

    fn read(&self, sample: u64, out: &mut [u32]) -> Result<()> {
        self.shards.read(sample * (out.len() as u64 - 1), out)
    }

    /// Positions within the sample's `seq_len` inputs where a document begins, 0 always among them.
    fn document_starts(&self, sample: u64, seq_len: usize) -> Vec<usize> {
        let first = sample * seq_len as u64;
        let mut starts = vec![first];
        self.shards.document_starts(first..first + seq_len as u64, &mut starts);
        starts.into_iter().map(|start| (start - first) as usize).collect()
    }
}

/// What a blend has given of one of its sources.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Consumed {
    /// Samples.
    pub samples: u64,
    /// Samples over those of one pass.
    pub epochs: f64,
}

/// An endless, shuffled, weighted blend of sources.
pub struct DataOrder {
    sources: Vec<Source>,
    blend: Blend,
    seq_len: usize,
    seed: u64,
}

impl DataOrder {
    /// Blends sources by their relative weights into samples of `seq_len` + 1 tokens. Errors: no source, a bad weight, a source
    /// with less than one sample.
    pub fn new(sources: Vec<(TokenShards, f64)>, seq_len: usize, seed: u64) -> Result<DataOrder> {
        let weights: Vec<f64> = sources.iter().map(|(_, weight)| *weight).collect();
        let blend = Blend::new(&weights)?;
        let sources = sources.into_iter().map(|(shards, _)| Source::new(shards, seq_len)).collect::<Result<_>>()?;
        Ok(DataOrder { sources, blend, seq_len, seed })
    }

    /// Fills `out` (seq_len + 1 tokens) with sample `index`; any index has one.
    pub fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        assert_eq!(out.len(), self.seq_len + 1, "a sample has seq_len + 1 tokens");
        let (source, sample) = self.locate(index);
        self.sources[source].read(sample, out)
    }

    /// Positions in 0..seq_len of sample `index` where a document begins; 0 is always the first.
    pub fn document_starts(&self, index: u64) -> Vec<usize> {
        let (source, sample) = self.locate(index);
        self.sources[source].document_starts(sample, self.seq_len)
    }

    /// The source of sample `index`, and which of that source's samples it is.
    pub fn locate(&self, index: u64) -> (usize, u64) {
        let (source, nth) = self.blend.place(index);
        let n_samples = self.sources[source].n_samples;
        (source, self.epoch(source, nth / n_samples).apply(nth % n_samples))
    }

    /// The order of a source's samples in one of its epochs.
    fn epoch(&self, source: usize, epoch: u64) -> Permutation {
        Permutation::new(self.sources[source].n_samples, Random::new(self.seed, &format!("order {source} {epoch}")))
    }

    /// The shards of a source.
    pub fn shards(&self, source: usize) -> &TokenShards {
        &self.sources[source].shards
    }

    /// Tokens of a source that sample `sample` of it covers, its last target included.
    pub fn tokens_of(&self, sample: u64) -> Range<u64> {
        let first = sample * self.seq_len as u64;
        first..first + self.seq_len as u64 + 1
    }

    /// Those of them that are targets: all but the first.
    pub fn targets_of(&self, sample: u64) -> Range<u64> {
        let tokens = self.tokens_of(sample);
        tokens.start + 1..tokens.end
    }

    /// The samples of a source that cover any of these tokens of it, as input or as target.
    pub fn samples_with(&self, source: usize, tokens: Range<u64>) -> Range<u64> {
        let (seq_len, n_samples) = (self.seq_len as u64, self.sources[source].n_samples);
        if tokens.is_empty() {
            return 0..0;
        }
        let first = tokens.start.saturating_sub(seq_len).div_ceil(seq_len);
        let last = (tokens.end - 1) / seq_len;
        first.min(n_samples)..(last + 1).min(n_samples)
    }

    /// Every (index, sample) with index below `end` at which one of these samples of a source stands, ascending; the inverse of
    /// [`DataOrder::locate`]. O(samples * epochs).
    pub fn occurrences(&self, source: usize, samples: Range<u64>, end: u64) -> Vec<(u64, u64)> {
        let n_samples = self.sources[source].n_samples;
        let places = self.blend.places_of(source);
        let n_given = self.blend.counts(end)[source];
        let mut found = Vec::new();
        for epoch in 0..n_given.div_ceil(n_samples) {
            let order = self.epoch(source, epoch);
            for sample in samples.clone() {
                let nth = epoch * n_samples + order.invert(sample);
                if nth < n_given {
                    let (period, within) = (nth / places.len() as u64, nth % places.len() as u64);
                    found.push((period * self.blend.period() + places[within as usize], sample));
                }
            }
        }
        found.sort_unstable();
        found
    }

    /// Tokens of all sources.
    pub fn n_tokens(&self) -> u64 {
        self.sources.iter().map(|source| source.shards.n_tokens()).sum()
    }

    /// The blend that is really given.
    pub fn blend(&self) -> &Blend {
        &self.blend
    }

    /// What the first `n` samples took from each source.
    pub fn consumed(&self, n: u64) -> Vec<Consumed> {
        let of = |(samples, source): (u64, &Source)| Consumed { samples, epochs: samples as f64 / source.n_samples as f64 };
        self.blend.counts(n).into_iter().zip(&self.sources).map(of).collect()
    }

    /// Equal when every sample is: over the sources' fingerprints, their shares, seq_len and seed.
    pub fn fingerprint(&self) -> String {
        let sources: Vec<&str> = self.sources.iter().map(|source| source.shards.fingerprint()).collect();
        let content = serde_json::json!(["order 1", sources, self.blend.shares(), self.seq_len, self.seed]);
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(content.to_string().as_bytes()))
    }
}

/// The samples of one source from first to last, for held-out loss.
pub struct Sequential {
    source: Source,
    seq_len: usize,
}

impl Sequential {
    /// Samples of `seq_len` + 1 tokens. Errors when there is not one.
    pub fn new(shards: TokenShards, seq_len: usize) -> Result<Sequential> {
        Ok(Sequential { source: Source::new(shards, seq_len)?, seq_len })
    }

    /// How many there are.
    pub fn n_samples(&self) -> u64 {
        self.source.n_samples
    }

    /// Fills `out` (seq_len + 1 tokens) with sample `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Sequential::n_samples`].
    pub fn read(&self, index: u64, out: &mut [u32]) -> Result<()> {
        assert!(index < self.source.n_samples && out.len() == self.seq_len + 1, "sample {index} of {}", self.source.n_samples);
        self.source.read(index, out)
    }

    /// Positions in 0..seq_len of sample `index` where a document begins; 0 is always the first.
    pub fn document_starts(&self, index: u64) -> Vec<usize> {
        self.source.document_starts(index, self.seq_len)
    }
}
