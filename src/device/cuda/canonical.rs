//! Sums in a canonical order: products by kernels/matmul.cu, and of bf16 on a Hopper GPU by kernels/matmul_hopper.cu, where no library
//! chooses how to add; the others by kernels/canonical.cu.
//! The bits are those of every GPU of a kind, under every layout of the work; they are not those of the CPU.

use super::backend::{Grid, Kernel};
use super::grid::{CHUNK, int, long};
use super::matmul::{self, Terms, Together, Way};
use super::{Cuda, assert_rows};
use crate::device::canonical::CanonicalSums;
use crate::device::{Activation, Gemm, Store};
use crate::exact::ExactSum;
use crate::tensor::{DType, Tensor};

/// Words of kernels/canonical.cu beside the limbs of an exact sum: how many terms were infinite, how many no number.
const FLAGS: usize = 2;
/// Threads of a block that adds groups of rows, an eighth of its columns.
const GROUP_THREADS: usize = 128;

fn assert_pieces(what: &str, n_pieces: usize) {
    assert!(n_pieces.is_power_of_two() && n_pieces <= matmul::MOST_IN_PAIRS, "{what}: {n_pieces} pieces in pairs");
}

fn assert_same_size(what: &str, activated: &Tensor, raised: &Tensor, kind: Activation) {
    let fits = activated.n_elements() * kind.inputs_per_output() == raised.n_elements() && activated.dtype() == raised.dtype();
    assert!(fits, "{what}: {activated:?} from {raised:?}");
}

impl CanonicalSums for Cuda {
    fn gemm_in_pairs(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, n_pieces: usize) {
        assert_pieces("gemm_in_pairs", n_pieces);
        assert_eq!(how.out, Store::Assign, "gemm_in_pairs to {out:?}");
        self.multiply_pieces(out, (a, b), how, Terms::Equal(n_pieces), Together::InPairs);
    }

    fn gemm_in_turn(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, starts: &[usize]) {
        self.multiply_pieces(out, (a, b), how, Terms::From(starts), Together::InTurn);
    }

    fn gemm_activated(&self, activated: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) -> bool {
        assert_same_size("gemm_activated", activated, raised, kind);
        let to = Cuda::address(activated);
        activated.assert_not_lent();
        self.multiply_activated((raised, to), (x, w), Gemm::NT, (kind, Way::Forward))
    }

    fn gemm_activation_backward(&self, draised: &mut Tensor, dy: &Tensor, w: &Tensor, raised: &Tensor, kind: Activation) -> bool {
        let fits = draised.dims() == raised.dims() && draised.dtype() == raised.dtype();
        assert!(fits, "gemm_activation_backward of {raised:?} to {draised:?}");
        kind.inputs_per_output() == 1 && self.multiply_activated((draised, Cuda::address(raised)), (dy, w), Gemm::NN, (kind, Way::Backward))
    }

    fn cross_entropy_sum_in_pairs(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        (first_row, n_valid): (usize, usize),
        n_pieces: usize,
    ) {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert_pieces("cross_entropy_sum_in_pairs", n_pieces);
        let fits = n_valid <= columns && [&*sum, &*target_logit, max, targets].iter().all(|x| x.n_elements() == n);
        assert!(fits, "cross_entropy_sum_in_pairs of {logits:?}, {n_valid} valid, with {sum:?}, {target_logit:?}, {max:?}, {targets:?}");
        if n > 0 {
            let mut args = vec![Cuda::arg_mut(sum), Cuda::arg_mut(target_logit), Cuda::arg(logits), Cuda::arg(max), Cuda::arg(targets)];
            args.extend([columns, first_row, n_valid, n_pieces].map(int));
            self.backend.launch(&Kernel::of("canonical", "cross_entropy_pieces", logits.dtype()), Grid::line(n, 256), &args);
        }
    }

    fn add_groups(&self, out: &mut Tensor, rows: &Tensor, n_pieces: usize) {
        let (columns, n_rows) = (out.n_elements(), rows.n_rows());
        assert_pieces("add_groups", n_pieces);
        assert_rows("add_groups", &[rows], n_rows, columns);
        assert!(n_rows % n_pieces == 0 && out.dtype() == DType::F32 && rows.dtype() == DType::F32, "add_groups to {out:?} from {rows:?}");
        if columns > 0 && n_rows > 0 {
            let args = [Cuda::arg_mut(out), Cuda::arg(rows), int(n_rows / n_pieces), int(n_pieces), int(columns)];
            let grid = Grid::line(columns.div_ceil(GROUP_THREADS * CHUNK), GROUP_THREADS as u32);
            self.backend.launch(&Kernel::of("canonical", "add_groups", DType::F32), grid, &args);
        }
    }

    fn sum_squares(&self, x: &Tensor, n_pieces: usize) -> ExactSum {
        CanonicalSums::sum_squares_of(self, &[(x, n_pieces)])
    }

    fn sum_squares_of(&self, all: &[(&Tensor, usize)]) -> ExactSum {
        let mut all = all.to_vec();
        all.retain(|(x, _)| x.n_elements() > 0);
        let n_words = ExactSum::N_LIMBS + FLAGS;
        let n_bytes = all.len() * n_words * size_of::<u64>();
        if n_bytes == 0 {
            return ExactSum::default();
        }
        let words = self.workspace(n_bytes);
        self.backend.zero(words.address(), n_bytes);
        for (i, (x, n_pieces)) in all.iter().enumerate() {
            assert!(x.dtype() == DType::F32 && *n_pieces > 0, "sum_squares of {x:?} in {n_pieces} pieces");
            let (n_rows, columns) = (x.n_rows(), x.row_len());
            // A block adds up many pieces before it adds to the others' sum.
            let n_blocks = (n_rows * n_pieces).div_ceil(8 * 16).min(8 * self.backend.processors());
            let to = words.arg_at(i * n_words * size_of::<u64>());
            let args = [to, Cuda::arg(x), long(n_rows), int(columns), int(*n_pieces)];
            self.backend.launch(&Kernel::of("canonical", "square_pieces", DType::F32), Grid::line(n_blocks, 256), &args);
        }
        let mut found = vec![0u64; all.len() * n_words];
        self.backend.download(words.address(), bytemuck::cast_slice_mut(&mut found));
        let mut sum = ExactSum::default();
        for found in found.chunks_exact(n_words) {
            let (limbs, flags) = found.split_at(ExactSum::N_LIMBS);
            let not_finite = if flags[1] > 0 { f64::NAN } else { f64::INFINITY };
            sum.merge(&ExactSum::from_limbs(limbs, if flags.iter().all(|n| *n == 0) { 0.0 } else { not_finite }));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part of the pieces that a grid plane adds must be a subtree: else its bits would depend on how full the device is.
    #[test]
    fn parts_are_subtrees() {
        for (n_pieces, tiles, processors) in [(8, 1, 132), (8, 64, 132), (4, 500, 132), (1, 1, 132), (2, 3, 3)] {
            let parts = matmul::parts(n_pieces, tiles, processors);
            assert!(parts.is_power_of_two() && n_pieces % parts == 0, "{parts} parts of {n_pieces}");
            assert!(parts == n_pieces || tiles * parts >= processors);
        }
    }
}
