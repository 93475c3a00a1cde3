//! Sums in a canonical order: what a device must be able to do so that results do not depend on how the work is divided
//! (`numerics.mode = "reproducible"`). Every sum that a layout could cut somewhere else is cut here in pieces that no layout moves;
//! a piece is summed over its terms in order, and how the pieces are added is part of the operation.

use super::{Activation, Gemm};
use crate::exact::ExactSum;
use crate::tensor::Tensor;

/// Sums whose order depends on the pieces only: not on the other sizes of the operands, the threads, or where a piece lies.
/// "In pairs": ((p0 + p1) + (p2 + p3)) + .. in f32, for a power of two of pieces. "In turn": out + p0 + p1 + ...
pub trait CanonicalSums: Send + Sync {
    /// out[m,n] = op(a)[m,k] op(b)[k,n] as `Device::gemm`, k in `n_pieces` equal pieces that are added in pairs, rounded once to
    /// out's type. 1, 2, 4 or 8 pieces.
    fn gemm_in_pairs(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, n_pieces: usize);
    /// raised = x w^T as `gemm_in_pairs` of one piece, and activated = its activation, with the bits of the two: in one pass. False, and
    /// nothing is done, where the device has none for these sizes.
    fn gemm_activated(&self, _activated: &mut Tensor, _raised: &mut Tensor, _x: &Tensor, _w: &Tensor, _kind: Activation) -> bool {
        false
    }
    /// draised = `activation_backward` of dy w, as `gemm_in_pairs` of one piece, at raised, with the bits of the two: in one pass. False,
    /// and nothing is done, where the device has none for these sizes.
    fn gemm_activation_backward(&self, _draised: &mut Tensor, _dy: &Tensor, _w: &Tensor, _raised: &Tensor, _kind: Activation) -> bool {
        false
    }
    /// out[m,n] f32 = or += op(a)[m,k] op(b)[k,n], k in the pieces `starts[i]..starts[i + 1]`, added in turn.
    fn gemm_in_turn(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm, starts: &[usize]);
    /// As `Device::cross_entropy_sum`, the columns in `n_pieces` equal pieces (cut at n_valid) that are added in pairs.
    #[allow(clippy::too_many_arguments)]
    fn cross_entropy_sum_in_pairs(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        columns: (usize, usize),
        n_pieces: usize,
    );
    /// out[H] f32 += rows[S * n_pieces, H] f32: the pieces of each of the S groups in pairs, the groups in turn.
    fn add_groups(&self, out: &mut Tensor, rows: &Tensor, n_pieces: usize);
    /// The squares of an f32 tensor: in f64 over each of `n_pieces` equal pieces of each row, exactly over the pieces.
    fn sum_squares(&self, x: &Tensor, n_pieces: usize) -> ExactSum;
    /// The same of several with their pieces. The host waits once for all of them.
    fn sum_squares_of(&self, all: &[(&Tensor, usize)]) -> ExactSum {
        let mut sum = ExactSum::default();
        all.iter().for_each(|(x, n_pieces)| sum.merge(&self.sum_squares(x, *n_pieces)));
        sum
    }
}
