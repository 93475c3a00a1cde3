//! LayerNorm1P and RMSNorm with the residual addition fused in. Between tensor-parallel regions; each rank has T' rows.

use super::ctx::Ctx;
use super::numerics::{Canonical, Numerics};
use super::param::Param;
use crate::device::{Norm as How, ScratchTensor};
use crate::parallel::pieces::{TP_PIECES, piece};
use crate::tensor::{DType, Tensor};

/// The residual stream where a norm reads it: whole, or as a sum that nobody has made yet.
pub enum Residual<'a> {
    /// x
    Whole(ScratchTensor),
    /// x + delta; the sum is made in delta's memory, so that x stays as it was.
    Sum {
        /// The stream before the last sub-layer, [T', H].
        x: &'a Tensor,
        /// What the last sub-layer adds, [T', H].
        delta: ScratchTensor,
    },
}

impl Residual<'_> {
    /// T'
    pub fn n_rows(&self) -> usize {
        match self {
            Residual::Whole(x) => x.n_rows(),
            Residual::Sum { x, .. } => x.n_rows(),
        }
    }
}

/// A norm over H.
pub struct Norm {
    /// [H]
    pub gain: Param,
    /// [H]; LayerNorm1P only.
    pub bias: Option<Param>,
    /// Which, and its epsilon.
    pub how: How,
}

/// What the backward needs.
pub struct NormSaved {
    /// The input, the summed residual: [T', H].
    pub x: ScratchTensor,
    /// Mean and inverse deviation of each row: [T', 2] f32.
    pub stats: ScratchTensor,
}

impl Norm {
    /// Its parameters, in model order.
    pub fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.gain].into_iter().chain(&self.bias)
    }

    /// Its parameters, in model order, to change.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        [&mut self.gain].into_iter().chain(&mut self.bias)
    }

    /// y[T', H] = norm(residual); the residual as a whole is in the saved part.
    pub fn forward(&self, ctx: &Ctx, residual: Residual) -> (ScratchTensor, NormSaved) {
        let bias = self.bias.as_ref().map(Param::weight);
        match residual {
            Residual::Whole(x) => {
                let (mut y, mut stats) = (ctx.take(x.dims(), x.dtype()), ctx.take(&[x.n_rows(), 2], DType::F32));
                ctx.device.norm(&mut y, &mut stats, &x, &self.gain.weight(), bias.as_deref(), self.how);
                (y, NormSaved { x, stats })
            }
            Residual::Sum { x: addend, delta: mut x } => {
                let (mut y, mut stats) = (ctx.take(x.dims(), x.dtype()), ctx.take(&[x.n_rows(), 2], DType::F32));
                ctx.device.add_norm(&mut x, addend, &mut y, &mut stats, &self.gain.weight(), bias.as_deref(), self.how);
                (y, NormSaved { x, stats })
            }
        }
    }

    /// dx[T', H] accumulated (it holds the gradient that bypasses the norm); gain and bias gradients accumulated over this
    /// rank's rows: under sequence parallelism they are summed over tp once a step, by `Chunk::finish_gradients`, or, where
    /// their sum has a canonical order, at once.
    pub fn backward(&mut self, ctx: &Ctx, saved: &NormSaved, dy: &Tensor, dx: &mut Tensor) {
        if let Numerics::Reproducible(canonical) = ctx.numerics {
            return self.backward_in_pieces(ctx, &canonical, saved, dy, dx);
        }
        let mut dbias = self.bias.as_mut().map(Param::dweight);
        let Param { value, grad, slice, .. } = &mut self.gain;
        let n = slice.shape[0];
        let (gain, mut dgain) = (value.rows(0..n), grad.as_mut().expect("training").rows_mut(0..n));
        ctx.device.norm_backward(dx, &mut dgain, dbias.as_deref_mut(), dy, &saved.x, &gain, &saved.stats, self.how);
    }

    /// The gradients of each piece of each sample by themselves, from the rank that has its rows to all; then each sample's in
    /// pairs, and the samples as weight gradients are summed.
    fn backward_in_pieces(&mut self, ctx: &Ctx, canonical: &Canonical, saved: &NormSaved, dy: &Tensor, dx: &mut Tensor) {
        let (pieces, h) = (canonical.token_pieces(), self.gain.slice.shape[0]);
        let (n_ranks, rank) = if ctx.is_sharded() { (ctx.tp.size(), ctx.tp.rank()) } else { (1, 0) };
        let mine = piece(pieces.len(), rank, n_ranks);
        let (first, rows) = (rank * dy.n_rows(), pieces[mine.start].start..pieces[mine.end - 1].end);
        assert_eq!(rows, first..first + dy.n_rows(), "tp cuts a sample between the pieces of its sums");
        let [mut dgains, mut dbiases] = [(); 2].map(|()| ctx.take(&[mine.len(), h], DType::F32));
        ctx.device.fill_zero(&mut dgains);
        ctx.device.fill_zero(&mut dbiases);
        for (i, piece) in pieces[mine].iter().enumerate() {
            let rows = piece.start - first..piece.end - first;
            let mut dbias = self.bias.is_some().then(|| dbiases.rows_mut(i..i + 1));
            ctx.device.norm_backward(
                &mut dx.rows_mut(rows.clone()),
                &mut dgains.rows_mut(i..i + 1),
                dbias.as_deref_mut(),
                &dy.rows(rows.clone()),
                &saved.x.rows(rows.clone()),
                &self.gain.weight(),
                &saved.stats.rows(rows),
                self.how,
            );
        }
        for (param, mine) in [Some(&mut self.gain), self.bias.as_mut()].into_iter().zip([dgains, dbiases]) {
            let Some(param) = param else { continue };
            let all = ctx.gather_rows(&mine); // tp: the pieces of all ranks, in order
            ctx.add_parts(param, |grad, part| {
                let rows = part.samples.start * TP_PIECES..part.samples.end * TP_PIECES;
                canonical.sums.add_groups(grad, &all.rows(rows), TP_PIECES);
            });
        }
    }
}
