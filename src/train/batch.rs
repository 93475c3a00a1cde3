//! The batch of one step, cut for one replica: which samples, and the micro-batches made of them. A pure function of the
//! number of samples consumed so far, so resuming and changing the number of replicas need no state.

use crate::device::Device;
use crate::error::Result;
use crate::model::chunk::MicroBatch;
use std::ops::Range;

/// Where samples come from: the shuffled blend for training, a held-out set in natural order for validation.
pub trait Samples: Send + Sync {
    /// Fills `out` with the seq_len + 1 tokens of sample `index`.
    fn read(&self, index: u64, out: &mut [u32]) -> Result<()>;
}

/// How a step's samples are divided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchShape {
    /// Tokens a sample.
    pub seq_len: usize,
    /// Samples a micro-batch.
    pub micro: usize,
    /// Samples a step over all replicas.
    pub global: usize,
    /// Replicas.
    pub dp: usize,
}

impl BatchShape {
    /// Micro-batches a replica runs in a step.
    pub fn n_micro(&self) -> usize {
        self.global / (self.dp * self.micro)
    }

    /// Tokens a step.
    pub fn global_tokens(&self) -> usize {
        self.global * self.seq_len
    }

    /// Samples of micro-batch `micro_idx` of replica `dp_idx` in the step that starts at sample `consumed`.
    pub fn samples(&self, consumed: u64, dp_idx: usize, micro_idx: usize) -> Range<u64> {
        let first = consumed + (dp_idx * (self.global / self.dp) + micro_idx * self.micro) as u64;
        first..first + self.micro as u64
    }
}

/// Reads samples `range` into one micro-batch of [samples * seq_len] tokens, every token weighted `weight` in the loss
/// (1 / tokens of the whole step, so that sums over micro-batches and replicas are the mean).
pub fn micro_batch(device: &dyn Device, source: &dyn Samples, range: Range<u64>, seq_len: usize, weight: f32) -> Result<MicroBatch> {
    let n_samples = (range.end - range.start) as usize;
    let n_tokens = n_samples * seq_len;
    let (mut tokens, mut targets) = (Vec::with_capacity(n_tokens), Vec::with_capacity(n_tokens));
    let mut sample = vec![0u32; seq_len + 1];
    for index in range {
        source.read(index, &mut sample)?;
        tokens.extend_from_slice(&sample[..seq_len]);
        targets.extend_from_slice(&sample[1..]);
    }
    let positions: Vec<u32> = (0..n_tokens).map(|t| (t % seq_len) as u32).collect();
    let sequence_starts = (0..=n_samples).map(|sample| sample * seq_len).collect();
    MicroBatch::new(device, [&tokens, &targets, &positions], &vec![weight; n_tokens], sequence_starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every sample of a step goes to exactly one micro-batch, at any number of replicas; wrong arithmetic would train some
    /// samples twice and lose others.
    #[test]
    fn every_sample_once() {
        for (dp, micro) in [(1, 1), (2, 3), (4, 1), (3, 2)] {
            let shape = BatchShape { seq_len: 8, micro, global: 24, dp };
            let mut seen = [0; 24];
            for dp_idx in 0..dp {
                for micro_idx in 0..shape.n_micro() {
                    for sample in shape.samples(1000, dp_idx, micro_idx) {
                        seen[(sample - 1000) as usize] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "dp {dp} micro {micro}: {seen:?}");
        }
    }
}
