//! What every layer is lent: the device, the tensor-parallel group, temporaries, how rows are held between tensor-parallel
//! regions, and the order of sums.

use super::numerics::Numerics;
use crate::comm::{Communicator, Pending, ReduceOp};
use crate::device::{Device, Scratch, ScratchTensor};
use crate::tensor::{DType, Tensor};
use std::ops::Deref;

/// How token rows are held between tensor-parallel regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SequenceMode {
    /// Each rank has T/tp rows (Korthikanti et al. 2022): norms are divided too; regions begin with an all-gather and end
    /// with a reduce-scatter.
    Sharded,
    /// Each rank has all T rows; regions begin with nothing and end with an all-reduce. For decoding, where T may be 1.
    Replicated,
}

/// What a rank has of the dim that a product sums over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inner {
    /// All of it.
    Whole,
    /// Its share of the tensor-parallel group's: a sum over the ranks follows.
    Divided,
    /// All of it, where the ranks of other layouts have shares: summed as those do.
    Undivided,
}

/// Lent to every layer call.
#[derive(Clone, Copy)]
pub struct Ctx<'a> {
    /// Where it computes.
    pub device: &'a dyn Device,
    /// The tensor-parallel group.
    pub tp: &'a dyn Communicator,
    /// Temporaries.
    pub scratch: &'a Scratch,
    /// How rows are held between tensor-parallel regions.
    pub sequence: SequenceMode,
    /// The order of sums.
    pub numerics: Numerics<'a>,
}

/// All rows, gathered or there already.
pub enum Rows<'a> {
    /// They were there.
    Here(&'a Tensor),
    /// Gathered into a temporary.
    Gathered(ScratchTensor),
}

impl Deref for Rows<'_> {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        match self {
            Rows::Here(tensor) => tensor,
            Rows::Gathered(tensor) => tensor,
        }
    }
}

impl Ctx<'_> {
    /// A temporary with unspecified contents.
    pub fn take(&self, shape: &[usize], dtype: DType) -> ScratchTensor {
        self.scratch.take(self.device, shape, dtype)
    }

    /// A temporary with the contents of `x`.
    pub fn copy_of(&self, x: &Tensor) -> ScratchTensor {
        let mut copy = self.take(x.dims(), x.dtype());
        self.device.copy(&mut copy, x);
        copy
    }

    /// Whether rows are divided over more than one rank.
    pub fn is_sharded(&self) -> bool {
        self.sequence == SequenceMode::Sharded && self.tp.size() > 1
    }

    /// T' for `n_tokens` = T. Panics when tp does not divide T: the recipe checks it.
    pub fn local_rows(&self, n_tokens: usize) -> usize {
        if !self.is_sharded() {
            return n_tokens;
        }
        assert_eq!(n_tokens % self.tp.size(), 0, "{n_tokens} tokens over {} ranks", self.tp.size());
        n_tokens / self.tp.size()
    }

    /// x[T', C] -> [T, C]: the entry of a tensor-parallel region.
    pub fn gather_rows<'x>(&self, x: &'x Tensor) -> Rows<'x> {
        if !self.is_sharded() {
            return Rows::Here(x);
        }
        let mut full = self.take(&[x.n_rows() * self.tp.size(), x.row_len()], x.dtype());
        self.tp.all_gather(x, &mut full);
        Rows::Gathered(full)
    }

    /// Partial sums [T, C] of all ranks -> their sum, [T', C], rounded to `dtype`: the exit of a tensor-parallel region.
    pub fn sum_rows(&self, mut partial: ScratchTensor, dtype: DType) -> ScratchTensor {
        if !self.is_sharded() {
            self.tp.all_reduce(&mut partial, self.sum_op());
            return self.rounded(partial, dtype);
        }
        let mut mine = self.take(&[partial.n_rows() / self.tp.size(), partial.row_len()], partial.dtype());
        self.start_sum_rows(&partial, &mut mine).wait();
        self.rounded(mine, dtype)
    }

    /// Rows [T, C] that one rank each has, and -0 on the others -> [T', C]: exact in any order.
    pub fn pick_rows(&self, mut mine: ScratchTensor) -> ScratchTensor {
        if !self.is_sharded() {
            self.tp.all_reduce(&mut mine, ReduceOp::Sum);
            return mine;
        }
        let mut picked = self.take(&[mine.n_rows() / self.tp.size(), mine.row_len()], mine.dtype());
        self.tp.reduce_scatter(&mine, &mut picked);
        picked
    }

    /// part[T, W] of each rank -> [T, n_columns] on all, the parts beside each other as `Device::join_columns` says. Rows are replicated.
    pub fn gather_columns(&self, part: &Tensor, n_columns: usize) -> ScratchTensor {
        assert!(!self.is_sharded(), "columns are gathered of rows that every rank has");
        let mut parts = self.take(&[self.tp.size() * part.n_rows(), part.row_len()], part.dtype());
        self.tp.all_gather(part, &mut parts);
        let mut joined = self.take(&[part.n_rows(), n_columns], part.dtype());
        self.device.join_columns(&mut joined, &parts);
        joined
    }

    /// The sharded half of `sum_rows`, under way: mine[T', C] = this rank's rows of the sum, in the dtype of the partial sums.
    pub fn start_sum_rows<'x>(&'x self, partial: &'x Tensor, mine: &'x mut Tensor) -> Pending<'x> {
        match self.numerics {
            Numerics::Fast => self.tp.start_reduce_scatter(partial, mine),
            Numerics::Reproducible(_) => self.tp.start_reduce_scatter_in_pairs(partial, mine),
        }
    }

    /// How the ranks add what they sum.
    pub fn sum_op(&self) -> ReduceOp {
        match self.numerics {
            Numerics::Fast => ReduceOp::Sum,
            Numerics::Reproducible(_) => ReduceOp::SumInPairs,
        }
    }

    /// The same values as `dtype`.
    pub fn rounded(&self, x: ScratchTensor, dtype: DType) -> ScratchTensor {
        if x.dtype() == dtype {
            return x;
        }
        let mut rounded = self.take(x.dims(), dtype);
        self.device.copy(&mut rounded, &x);
        rounded
    }
}
