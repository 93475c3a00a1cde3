//! Grids for the two forms of kernels of `kernels/rows.cuh`: flat arrays, and a block a row.

use super::Cuda;
use super::backend::{Arg, Grid};
use crate::tensor::Tensor;

/// Elements that a thread takes at a time.
pub const CHUNK: usize = 8;
/// Threads of a block over a flat array.
const THREADS: usize = 256;
/// Most threads of a block over a row.
const ROW_THREADS: usize = 512;

/// A size as the kernels take it.
pub fn int(n: usize) -> Arg {
    Arg::Int(i32::try_from(n).unwrap_or_else(|_| panic!("{n} is more than a kernel counts")))
}

/// A number of elements as the kernels take it.
pub fn long(n: usize) -> Arg {
    Arg::Long(i64::try_from(n).expect("fewer than 2^63 elements"))
}

/// Threads for a row of so many columns: whole warps.
pub fn row_threads(columns: usize) -> u32 {
    columns.div_ceil(CHUNK).next_multiple_of(32).clamp(32, ROW_THREADS) as u32
}

/// One block for each of `n` rows of so many columns.
pub fn rows(n: usize, columns: usize) -> Grid {
    Grid::line(n, row_threads(columns))
}

impl Cuda {
    /// Blocks over a flat array of `n` > 0 elements: enough to fill the device some times, so that the last ones matter little.
    pub(super) fn flat(&self, n: usize) -> Grid {
        Grid::line(n.div_ceil(THREADS * CHUNK).min(32 * self.backend.processors()), THREADS as u32)
    }
}

/// An optional tensor to read: null without.
pub fn optional(tensor: Option<&Tensor>) -> Arg {
    tensor.map_or(Arg::Address(0), Cuda::arg)
}
