//! Values of several ranks combined in rank order, or in pairs: what communicators use where the order of a sum must be known.

use super::backend::{Arg, Kernel};
use super::grid::{int, long};
use super::{Cuda, Workspace};
use crate::comm::ReduceOp;
use crate::tensor::DType;

/// Most pieces that kernels/ordered.cu adds in pairs: 2^PAIRED.
pub(crate) const MOST_PAIRED: usize = 64;

/// One piece of `n` elements for each rank: that of `rank` at the address `own`, the others in `others`, piece r at
/// r * `stride` elements.
pub(crate) struct Pieces<'a> {
    /// Address of this rank's own piece.
    pub(crate) own: u64,
    /// Memory of `n_ranks * stride` elements.
    pub(crate) others: &'a Workspace,
    /// Which piece is the own one.
    pub(crate) rank: usize,
    /// How many pieces.
    pub(crate) n_ranks: usize,
    /// Elements of a piece.
    pub(crate) n: usize,
    /// Elements from piece to piece.
    pub(crate) stride: usize,
    /// f32 or bf16.
    pub(crate) dtype: DType,
}

impl Cuda {
    /// out[n] at an address = the pieces combined as `op` says in f32, rounded once; `out` may be the own piece.
    pub(crate) fn combine(&self, out: u64, pieces: &Pieces, op: ReduceOp) {
        if pieces.n == 0 {
            return;
        }
        let operation = match op {
            ReduceOp::Sum => "ordered_sum",
            ReduceOp::Max => "ordered_max",
            ReduceOp::SumInPairs => {
                let fits = pieces.n_ranks.is_power_of_two() && pieces.n_ranks <= MOST_PAIRED;
                assert!(fits, "the pieces of {} ranks in pairs", pieces.n_ranks);
                "ordered_pairs"
            }
        };
        let args = [
            Arg::Address(out),
            Arg::Address(pieces.own),
            pieces.others.arg(),
            int(pieces.rank),
            int(pieces.n_ranks),
            long(pieces.stride),
            long(pieces.n),
        ];
        self.backend.launch(&Kernel::of("ordered", operation, pieces.dtype), self.flat(pieces.n), &args);
    }
}
