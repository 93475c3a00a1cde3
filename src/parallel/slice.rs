//! Hyper-rectangles of global tensors: how a shard describes itself, whoever wrote it (after Megatron's ShardedTensor and
//! AMReX's boxes). A checkpoint is a set of slices; loading asks for other slices.

use serde::{Deserialize, Serialize};

/// offset[d] .. offset[d] + shape[d] in every dim of a global tensor.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Slice {
    /// First index in each dim.
    pub offset: Vec<usize>,
    /// Extent in each dim.
    pub shape: Vec<usize>,
}

impl Slice {
    /// The whole of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Slice {
        Slice { offset: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Block `index` of `n` equal blocks along `dim`, which `n` must divide.
    pub fn block(&self, dim: usize, index: usize, n: usize) -> Slice {
        assert!(index < n && self.shape[dim] % n == 0, "block {index} of {n} of dim {dim} of {self:?}");
        let mut block = self.clone();
        block.shape[dim] /= n;
        block.offset[dim] += index * block.shape[dim];
        block
    }

    /// Rows `rows` (of dim 0) of this slice, cut at its end: short or empty for the last ranks of an uneven division.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Slice {
        let (start, end) = (rows.start.min(self.shape[0]), rows.end.min(self.shape[0]));
        let mut part = self.clone();
        part.offset[0] += start;
        part.shape[0] = end - start;
        part
    }

    /// What both cover, or None when nothing.
    pub fn intersect(&self, other: &Slice) -> Option<Slice> {
        assert_eq!(self.shape.len(), other.shape.len());
        let mut common = Slice { offset: Vec::new(), shape: Vec::new() };
        for d in 0..self.shape.len() {
            let start = self.offset[d].max(other.offset[d]);
            let end = (self.offset[d] + self.shape[d]).min(other.offset[d] + other.shape[d]);
            if start >= end {
                return None;
            }
            common.offset.push(start);
            common.shape.push(end - start);
        }
        Some(common)
    }

    /// The same region with offsets counted from `outer`'s corner; it must lie within.
    pub fn relative_to(&self, outer: &Slice) -> Slice {
        let offset = self.offset.iter().zip(&outer.offset).map(|(inner, outer)| inner - outer).collect();
        Slice { offset, shape: self.shape.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks along any dim tile the whole: disjoint, and their sizes add up.
    #[test]
    fn blocks_tile_the_whole() {
        let whole = Slice::whole(&[12, 6]);
        for (dim, n) in [(0, 4), (1, 3)] {
            let blocks: Vec<Slice> = (0..n).map(|i| whole.block(dim, i, n)).collect();
            assert_eq!(blocks.iter().map(Slice::n_elements).sum::<usize>(), 72);
            for i in 0..n {
                for j in 0..i {
                    assert_eq!(blocks[i].intersect(&blocks[j]), None);
                }
            }
        }
        assert_eq!(whole.rows(10..20), Slice { offset: vec![10, 0], shape: vec![2, 6] });
        assert_eq!(whole.rows(15..20).n_elements(), 0);
        let part = whole.block(0, 1, 4).intersect(&whole.block(1, 2, 3)).unwrap();
        assert_eq!(part, Slice { offset: vec![3, 4], shape: vec![3, 2] });
        assert_eq!(part.relative_to(&whole.block(0, 1, 4)).offset, vec![0, 4]);
    }
}
