//! The order of samples: a permutation in each epoch, the same whatever replica or resume asks for it, blended exactly.

mod common;

use common::write_megatron;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use trireme::data::blend::{Blend, MAX_PERIOD};
use trireme::data::order::{DataOrder, Permutation, Sequential};
use trireme::data::shards::{Split, TokenShards};
use trireme::error::Result;
use trireme::rng::Random;

/// A corpus of `n_tokens` tokens first, first + 1, .. in documents of 1, 2, 3, .. tokens.
fn counting_corpus(dir: &Path, first: u32, n_tokens: usize) -> TokenShards {
    let (mut documents, mut next, mut length) = (Vec::new(), first, 1);
    while next < first + n_tokens as u32 {
        let end = (next + length).min(first + n_tokens as u32);
        documents.push((next..end).collect());
        (next, length) = (end, length + 1);
    }
    write_megatron(dir, "train", &documents);
    TokenShards::open(dir, Split::Train).unwrap()
}

/// A blend of counting corpora: (tokens, weight) each; the million of a token says its source.
fn blend_of(sources: &[(usize, f64)], seq_len: usize, seed: u64) -> Result<DataOrder> {
    let dir = tempfile::tempdir().unwrap();
    let open = |(idx, &(n_tokens, weight)): (usize, &(usize, f64))| {
        (counting_corpus(&dir.path().join(idx.to_string()), idx as u32 * 1_000_000, n_tokens), weight)
    };
    DataOrder::new(sources.iter().enumerate().map(open).collect(), seq_len, seed)
}

fn sample(order: &DataOrder, index: u64, seq_len: usize) -> Vec<u32> {
    let mut out = vec![u32::MAX; seq_len + 1];
    order.read(index, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The keyed permutation hits every number once, for every size; a bad cycle walk would repeat some and lose others.
    #[test]
    fn permutation_is_one(n in 1u64..3000, seed in any::<u64>()) {
        let permutation = Permutation::new(n, Random::new(seed, "test"));
        let image: BTreeSet<u64> = (0..n).map(|index| permutation.apply(index)).collect();
        prop_assert_eq!(image.len() as u64, n);
        prop_assert!(image.iter().all(|&x| x < n));
        prop_assert!((0..n).all(|index| permutation.invert(permutation.apply(index)) == index));
    }

    /// Where a source's samples stand is the inverse of which sample stands where, over several epochs and any blend: asked for
    /// a document, it must neither miss a use nor invent one.
    #[test]
    fn occurrences_invert_the_order(
        sizes in prop::collection::vec((20..90usize, 1..4u32), 1..4), seq_len in 1..9usize, seed in any::<u64>(), end in 0..300u64, part in 0.0..1.0f64,
    ) {
        let sources: Vec<(usize, f64)> = sizes.iter().map(|&(n, weight)| (n, f64::from(weight))).collect();
        let order = blend_of(&sources, seq_len, seed).expect("sources of a sample and more");
        for (source, &(n_tokens, _)) in sources.iter().enumerate() {
            let first = (n_tokens as f64 * part) as u64;
            let samples = order.samples_with(source, first..(first + 5).min(n_tokens as u64));
            let expected: Vec<(u64, u64)> = (0..end)
                .map(|index| (index, order.locate(index)))
                .filter(|(_, at)| at.0 == source && samples.contains(&at.1))
                .map(|(index, at)| (index, at.1))
                .collect();
            prop_assert_eq!(order.occurrences(source, samples.clone(), end), expected);
            // A sample has the token when it lies among its seq_len + 1.
            let n_samples = (n_tokens as u64 - 1) / seq_len as u64;
            let tokens = first..(first + 5).min(n_tokens as u64);
            let has = |sample: &u64| (0..=seq_len as u64).any(|i| tokens.contains(&(sample * seq_len as u64 + i)));
            prop_assert_eq!(samples.collect::<Vec<u64>>(), (0..n_samples).filter(has).collect::<Vec<u64>>());
        }
    }

    /// After any k samples each source has k * share within less than one, for any weights; and places count each source's
    /// samples 0, 1, 2, .. without a gap. A greedy rule can be off by more with many sources.
    #[test]
    fn blend_is_exact(weights in prop::collection::vec(prop_oneof![1e-3..1.0f64, 1.0..1e3f64, Just(1.0)], 1..12), far in 0u64..1 << 40) {
        let Ok(blend) = Blend::new(&weights) else { return Ok(()) }; // shares below 1/65536 are refused: see extreme_weights
        let (period, n) = (blend.period(), weights.len());
        let mut counts = vec![0u64; n];
        for index in 0..period + 1000 {
            let (source, nth) = blend.place(index);
            prop_assert_eq!(nth, counts[source], "sample {} of {:?}", index, weights);
            counts[source] += 1;
            for (source, &count) in counts.iter().enumerate() {
                // In whole numbers: |count * P - k * a| < P.
                let (k, share) = (i128::from(index) + 1, i128::from(blend.shares()[source]));
                let off = (i128::from(count) * i128::from(period) - k * share).abs();
                prop_assert!(off < i128::from(period), "source {} after {} of {:?}", source, k, weights);
            }
        }
        // Far away the same holds, by the period; counts() agrees with place().
        let counts = blend.counts(far);
        let (source, nth) = blend.place(far);
        prop_assert_eq!(nth, counts[source]);
        prop_assert_eq!(counts.iter().sum::<u64>(), far);
        // The shares are the weights to within 1 / P, and to within rounding when a smaller period gives them.
        let total: f64 = weights.iter().sum();
        for (share, weight) in blend.shares().iter().zip(&weights) {
            let off = (f64::from(*share) / period as f64 - weight / total).abs();
            prop_assert!(off < if period < MAX_PERIOD as u64 { 1e-12 } else { 1.0 / MAX_PERIOD as f64 }, "{} of {:?}", off, weights);
        }
    }
}

/// The permutation mixes: over many keys every number goes everywhere about equally often. The counts of K random permutations
/// have covariance K / (n - 1) on the (n - 1)^2 dimensions that fixed row and column sums leave, so (n - 1) / n times the usual sum
/// is chi-squared with (n - 1)^2 degrees of freedom: within six of its standard deviations.
#[test]
fn permutation_is_uniform() {
    for n in [2u64, 3, 5, 16, 17, 33] {
        let n_keys = 2000;
        let mut hits = vec![0f64; (n * n) as usize];
        for key in 0..n_keys {
            let permutation = Permutation::new(n, Random::new(key, "uniform"));
            (0..n).for_each(|index| hits[(index * n + permutation.apply(index)) as usize] += 1.0);
        }
        let expected = n_keys as f64 / n as f64;
        let sum: f64 = hits.iter().map(|hit| (hit - expected).powi(2) / expected).sum();
        let (chi2, freedom) = (sum * (n - 1) as f64 / n as f64, ((n - 1) * (n - 1)) as f64);
        assert!((chi2 - freedom).abs() < 6.0 * (2.0 * freedom).sqrt(), "n {n}: {chi2}, expected {freedom}");
    }
}

/// Documents and their tokens find each other, empty documents and the ends included.
#[test]
fn documents_and_tokens_find_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let lengths = [3usize, 0, 0, 5, 1, 0, 7, 0];
    let documents: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![1; n]).collect();
    write_megatron(dir.path(), "train", &documents);
    let shards = TokenShards::open(dir.path(), Split::Train).unwrap();
    let mut first = 0;
    for (document, &length) in lengths.iter().enumerate() {
        assert_eq!(shards.index().document_tokens(document), first..first + length as u64);
        for token in first..first + length as u64 {
            assert_eq!(shards.index().document_at(token), Some(document), "token {token}");
        }
        first += length as u64;
    }
    assert_eq!(shards.index().document_at(first), None);
}

/// Weights as people write them get the period they mean; extreme ones are refused with both values.
#[test]
fn extreme_weights() {
    let shares = |weights: &[f64]| Blend::new(weights).map(|blend| blend.shares().to_vec());
    assert_eq!(shares(&[0.7, 0.2, 0.1]).unwrap(), [7, 2, 1]);
    assert_eq!(shares(&[5.0]).unwrap(), [1]);
    assert_eq!(shares(&[1e300, 1e300, 1e300]).unwrap(), [1, 1, 1]);
    assert_eq!(shares(&[1.0 / 3.0, 2.0 / 3.0]).unwrap(), [1, 2]);
    assert_eq!(shares(&[0.123456, 0.876544]).unwrap(), [1929, 13696]);
    assert_eq!(shares(&[f64::MIN_POSITIVE, f64::MIN_POSITIVE * 3.0]).unwrap(), [1, 3]);
    assert_eq!(shares(&[65535.0, 1.0]).unwrap(), [65535, 1]);
    let irrational = shares(&[std::f64::consts::PI, 1.0]).unwrap();
    assert_eq!(irrational.iter().sum::<u32>(), MAX_PERIOD as u32);
    assert_eq!(shares(&[1.0; 3000]).unwrap(), [1; 3000]);
    for (weights, fragments) in [
        (vec![1.0, 0.0], ["source 1", "0"]),
        (vec![-1.0, 2.0], ["source 0", "-1"]),
        (vec![1.0, f64::NAN], ["source 1", "NaN"]),
        (vec![f64::INFINITY, 1.0], ["source 0", "inf"]),
        (vec![1.0, 1e-9], ["source 1", "1/65536"]),
        (vec![], ["0 sources", "65536"]),
    ] {
        let error = shares(&weights).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(fragments.iter().all(|fragment| error.to_string().contains(fragment)), "{error}");
    }
}

/// An epoch of one source is every sample once, each the tokens s * S .. s * S + S + 1; the next epoch has another order.
#[test]
fn an_epoch_is_every_sample_once() {
    let (seq_len, n_tokens) = (7, 7 * 53 + 4); // 53 samples and three tokens that belong to none
    let order = blend_of(&[(n_tokens, 1.0)], seq_len, 3).unwrap();
    let mut epochs = Vec::new();
    for epoch in 0..3 {
        let starts: Vec<u32> = (0..53).map(|i| sample(&order, epoch * 53 + i, seq_len)[0]).collect();
        for (i, &start) in starts.iter().enumerate() {
            let expected: Vec<u32> = (start..=start + seq_len as u32).collect();
            assert_eq!(sample(&order, epoch * 53 + i as u64, seq_len), expected);
        }
        let all: BTreeSet<u32> = starts.iter().copied().collect();
        assert_eq!(all, (0..53).map(|s| s * 7).collect());
        epochs.push(starts);
    }
    assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != epochs[2]);
    assert!(epochs[0].windows(2).filter(|pair| pair[1] == pair[0] + 7).count() < 10, "shuffled, not shifted: {:?}", epochs[0]);
}

/// The samples of a step are the same set at dp 1, 2, 4, 8, and a run that stops anywhere goes on with the very same samples: the
/// order is a function of the number alone. Nothing a reader did before may change what it reads next.
#[test]
fn independent_of_replicas_and_resume() {
    let (seq_len, n) = (5, 240u64);
    let sources = [(611, 0.6), (333, 0.3), (98, 0.1)];
    let order = blend_of(&sources, seq_len, 11).unwrap();
    let straight: Vec<Vec<u32>> = (0..n).map(|i| sample(&order, i, seq_len)).collect();
    for dp in [1u64, 2, 4, 8] {
        let mut by_replica = BTreeMap::new();
        for replica in (0..dp).rev() {
            let fresh = blend_of(&sources, seq_len, 11).unwrap();
            (0..n).filter(|i| i % dp == replica).for_each(|i| drop(by_replica.insert(i, sample(&fresh, i, seq_len))));
        }
        assert_eq!(by_replica.into_values().collect::<Vec<_>>(), straight, "dp {dp}");
    }
    for resume in [1, 17, 239] {
        let fresh = blend_of(&sources, seq_len, 11).unwrap();
        assert_eq!((resume..n).map(|i| sample(&fresh, i, seq_len)).collect::<Vec<_>>(), straight[resume as usize..]);
    }
    let other_seed = blend_of(&sources, seq_len, 12).unwrap();
    assert_ne!((0..n).map(|i| sample(&other_seed, i, seq_len)).collect::<Vec<_>>(), straight);
}

/// A blend gives each source its share, wrapping around small sources epoch by epoch, each epoch complete.
#[test]
fn blend_of_sources_with_epochs() {
    let seq_len = 4;
    let order = blend_of(&[(4 * 30 + 1, 3.0), (4 * 5 + 1, 1.0)], seq_len, 0).unwrap();
    let mut of_source = [Vec::new(), Vec::new()];
    for i in 0..40 {
        let first = sample(&order, i, seq_len)[0];
        of_source[(first / 1_000_000) as usize].push(first % 1_000_000 / 4);
    }
    assert_eq!(of_source.each_ref().map(Vec::len), [30, 10]);
    assert_eq!(of_source[0].iter().copied().collect::<BTreeSet<_>>(), (0..30).collect());
    for epoch in of_source[1].chunks(5) {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<_>>(), (0..5).collect());
    }
    let consumed = order.consumed(40);
    assert_eq!([consumed[0].samples, consumed[1].samples], [30, 10]);
    assert_eq!([consumed[0].epochs, consumed[1].epochs], [1.0, 2.0]);
}

/// Equal data, shares, length and seed have equal fingerprints, and each of them changes it: resuming on other data is refused by
/// this.
#[test]
fn fingerprint_tells_orders_apart() {
    let base = || blend_of(&[(100, 1.0), (200, 3.0)], 8, 1).unwrap().fingerprint();
    assert_eq!(base(), base());
    assert_eq!(base(), blend_of(&[(100, 0.25), (200, 0.75)], 8, 1).unwrap().fingerprint(), "the same shares, written otherwise");
    let others = [
        blend_of(&[(101, 1.0), (200, 3.0)], 8, 1),
        blend_of(&[(100, 1.0), (200, 4.0)], 8, 1),
        blend_of(&[(100, 1.0), (200, 3.0)], 9, 1),
        blend_of(&[(100, 1.0), (200, 3.0)], 8, 2),
        blend_of(&[(200, 3.0), (100, 1.0)], 8, 1),
    ];
    let mut seen: BTreeSet<String> = others.into_iter().map(|order| order.unwrap().fingerprint()).collect();
    seen.insert(base());
    assert_eq!(seen.len(), 6);
}

/// A source of one token less than a sample is refused with both numbers; of exactly one sample it gives that for ever.
#[test]
fn short_sources() {
    let error = blend_of(&[(100, 1.0), (8, 1.0)], 8, 1).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert!(["train.bin", "8 tokens", "9"].iter().all(|fragment| error.to_string().contains(fragment)), "{error}");
    let order = blend_of(&[(9, 1.0)], 8, 1).unwrap();
    (0..5).for_each(|i| assert_eq!(sample(&order, i, 8), (0..9).collect::<Vec<u32>>()));
    assert_eq!(blend_of(&[(9, 1.0)], 0, 1).err().unwrap().exit_code(), 2);
    assert_eq!(blend_of(&[], 8, 1).err().unwrap().exit_code(), 2);
}

/// Held-out samples come in natural order; document starts are those of the documents, in both readers.
#[test]
fn sequential_and_document_starts() {
    let dir = tempfile::tempdir().unwrap();
    let (seq_len, n_tokens) = (6, 200);
    let samples = Sequential::new(counting_corpus(dir.path(), 0, n_tokens), seq_len).unwrap();
    assert_eq!(samples.n_samples(), 199 / 6);
    // Documents of 1, 2, 3, .. tokens begin at 0, 1, 3, 6, 10, ..
    let begins: BTreeSet<usize> = (0..30).map(|k| k * (k + 1) / 2).collect();
    let expected = |first: usize| -> Vec<usize> { (0..seq_len).filter(|at| *at == 0 || begins.contains(&(first + at))).collect() };
    for i in 0..samples.n_samples() {
        let mut out = vec![0; seq_len + 1];
        samples.read(i, &mut out).unwrap();
        assert_eq!(out, (i as u32 * 6..=i as u32 * 6 + 6).collect::<Vec<u32>>());
        assert_eq!(samples.document_starts(i), expected(i as usize * 6));
    }
    let order = blend_of(&[(n_tokens, 1.0)], seq_len, 5).unwrap();
    for i in 0..100 {
        assert_eq!(order.document_starts(i), expected(sample(&order, i, seq_len)[0] as usize));
    }
}
