//! The parallel layout as a value: rank <-> coordinates as arithmetic (after Megatron-LM's RankGenerator), no globals.
//! Ranks count tensor-parallel fastest, then data-, then pipeline-parallel, so that tp neighbours share a node.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Sizes of the parallel axes. World size = tp * dp * pp. `vp` chunks of layers live on each stage (interleaving).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ParallelLayout {
    /// Tensor parallel.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Data-parallel replicas.
    pub dp: usize,
    /// Virtual stages (chunks) on each stage.
    pub vp: usize,
}

/// Where a rank stands on each axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Coords {
    /// Index on the tensor-parallel axis.
    pub tp: usize,
    /// Pipeline stage.
    pub pp: usize,
    /// Index of the replica.
    pub dp: usize,
}

/// A parallel axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Axis {
    /// Tensor parallel.
    Tp,
    /// Data parallel.
    Dp,
    /// Pipeline parallel.
    Pp,
}

impl ParallelLayout {
    /// One rank that does everything.
    pub const SINGLE: ParallelLayout = ParallelLayout { tp: 1, pp: 1, dp: 1, vp: 1 };

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.tp * self.dp * self.pp
    }

    /// Coordinates of a rank.
    pub fn coords(&self, rank: usize) -> Coords {
        assert!(rank < self.world(), "rank {rank} of {}", self.world());
        Coords { tp: rank % self.tp, dp: rank / self.tp % self.dp, pp: rank / (self.tp * self.dp) }
    }

    /// Rank of coordinates.
    pub fn rank(&self, at: Coords) -> usize {
        (at.pp * self.dp + at.dp) * self.tp + at.tp
    }

    /// Equal for exactly the ranks of one group along `axis`.
    pub fn colour(&self, axis: Axis, at: Coords) -> usize {
        match axis {
            Axis::Tp => at.pp * self.dp + at.dp,
            Axis::Dp => at.pp * self.tp + at.tp,
            Axis::Pp => at.dp * self.tp + at.tp,
        }
    }

    /// Chunks of layers in the whole model.
    pub fn n_chunks(&self) -> usize {
        self.pp * self.vp
    }

    /// Layers of chunk `chunk` (0..vp) on stage `stage`. Model chunk number is chunk * pp + stage (Megatron's interleave),
    /// and layers are divided equally: `n_layers` must be a multiple of pp * vp (the recipe checks it).
    pub fn layers(&self, stage: usize, chunk: usize, n_layers: usize) -> Range<usize> {
        assert_eq!(n_layers % self.n_chunks(), 0, "{n_layers} layers in {} chunks", self.n_chunks());
        let per_chunk = n_layers / self.n_chunks();
        let first = (chunk * self.pp + stage) * per_chunk;
        first..first + per_chunk
    }

    /// Whether this chunk begins the model (holds the embedding).
    pub fn is_first(&self, stage: usize, chunk: usize) -> bool {
        stage == 0 && chunk == 0
    }

    /// Whether this chunk ends the model (holds the output head).
    pub fn is_last(&self, stage: usize, chunk: usize) -> bool {
        stage == self.pp - 1 && chunk == self.vp - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// rank -> coords -> rank is the identity, and each colour class has the axis' size, for every layout of <= 64 ranks.
    #[test]
    fn ranks_and_coords_are_inverse() {
        for tp in 1..=4 {
            for dp in 1..=4 {
                for pp in 1..=4 {
                    let layout = ParallelLayout { tp, pp, dp, vp: 1 };
                    for axis in [Axis::Tp, Axis::Dp, Axis::Pp] {
                        let mut groups = std::collections::BTreeMap::new();
                        for rank in 0..layout.world() {
                            let at = layout.coords(rank);
                            assert_eq!(layout.rank(at), rank);
                            *groups.entry(layout.colour(axis, at)).or_insert(0) += 1;
                        }
                        let size = match axis {
                            Axis::Tp => tp,
                            Axis::Dp => dp,
                            Axis::Pp => pp,
                        };
                        assert!(groups.values().all(|&n| n == size), "{layout:?} {axis:?} {groups:?}");
                    }
                }
            }
        }
    }
}
