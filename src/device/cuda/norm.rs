//! LayerNorm1P and RMSNorm. A row lies in the registers of a block, in 1 to 5 chunks of eight columns a thread.

use super::backend::{Arg, Grid, Kernel};
use super::grid::{CHUNK, int, optional, row_threads, rows};
use super::{Cuda, assert_rows};
use crate::device::{Norm, NormKind};
use crate::tensor::{DType, Tensor};

/// Chunks of a thread that there are kernels for.
const FORMS: [usize; 4] = [1, 2, 3, 5];

/// The kernel of an operation on rows of so many columns, and its chunks of a thread.
fn form(operation: &str, columns: usize, dtype: DType) -> (Kernel, usize) {
    let needed = columns.div_ceil(CHUNK * row_threads(columns) as usize);
    let Some(chunks) = FORMS.into_iter().find(|chunks| *chunks >= needed) else {
        panic!("{operation} over rows of {columns} columns: at most {} fit in a block", 512 * CHUNK * FORMS[3]);
    };
    (Kernel::of("norm", &format!("{operation}_{chunks}"), dtype), chunks)
}

/// The last arguments of the forward kernels.
fn scalars(columns: usize, how: Norm) -> [Arg; 3] {
    [int(columns), int(usize::from(how.kind == NormKind::LayerNorm1P)), Arg::Float(how.eps)]
}

/// Shapes of a forward call.
fn assert_norm(what: &str, rows: &[&Tensor], stats: &Tensor, gain: &Tensor, bias: Option<&Tensor>) {
    let (n, columns) = (rows[0].n_rows(), gain.n_elements());
    assert_rows(what, rows, n, columns);
    assert_eq!(stats.n_elements(), 2 * n, "{what}: {stats:?} for {n} rows");
    assert!(bias.is_none_or(|bias| bias.n_elements() == columns), "{what}: {gain:?} with {bias:?}");
}

impl Cuda {
    /// See `Device::norm`.
    pub(super) fn norm(&self, out: &mut Tensor, stats: &mut Tensor, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, how: Norm) {
        assert_norm("norm", &[x, out], stats, gain, bias);
        if x.n_elements() == 0 {
            return;
        }
        let (n, columns) = (x.n_rows(), gain.n_elements());
        let mut args = vec![Cuda::arg_mut(out), Cuda::arg_mut(stats), Cuda::arg(x), Cuda::arg(gain), optional(bias)];
        args.extend(scalars(columns, how));
        self.backend.launch(&form("norm", columns, x.dtype()).0, rows(n, columns), &args);
    }

    /// See `Device::add_norm`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn add_norm(
        &self,
        x: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
        stats: &mut Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        how: Norm,
    ) {
        assert_norm("add_norm", &[x, delta, out], stats, gain, bias);
        if x.n_elements() == 0 {
            return;
        }
        let (n, columns, dtype) = (x.n_rows(), gain.n_elements(), x.dtype());
        let mut args = vec![Cuda::arg_mut(x), Cuda::arg(delta), Cuda::arg_mut(out), Cuda::arg_mut(stats), Cuda::arg(gain), optional(bias)];
        args.extend(scalars(columns, how));
        self.backend.launch(&form("add_norm", columns, dtype).0, rows(n, columns), &args);
    }

    /// See `Device::norm_backward`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn norm_backward(
        &self,
        dx: &mut Tensor,
        dgain: &mut Tensor,
        dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        gain: &Tensor,
        stats: &Tensor,
        how: Norm,
    ) {
        assert_norm("norm_backward", &[x, dx, dy], stats, gain, dbias.as_deref());
        let (n, columns, is_layer) = (x.n_rows(), gain.n_elements(), how.kind == NormKind::LayerNorm1P);
        assert!(dgain.n_elements() == columns && dgain.dtype() == DType::F32, "norm_backward to {dgain:?}");
        if x.n_elements() == 0 {
            return;
        }
        // A function of the rows alone, so that the sums do not depend on the device: some 256 blocks, and not too many partial sums.
        let rows_per_block = n.div_ceil(256).max(16);
        let n_blocks = n.div_ceil(rows_per_block);
        let partial = self.workspace(n_blocks * 2 * columns * size_of::<f32>());
        let (kernel, chunks) = form("norm_backward", columns, x.dtype());
        let threads = row_threads(columns);
        let in_shared = if chunks == FORMS[3] { 2 * chunks * CHUNK * threads as usize * size_of::<f32>() } else { 0 };
        let mut args = vec![Cuda::arg_mut(dx), partial.arg(), Cuda::arg(dy), Cuda::arg(x), Cuda::arg(gain), Cuda::arg(stats)];
        args.extend([n, columns, rows_per_block, usize::from(is_layer)].map(int));
        self.backend.launch(&kernel, Grid { shared_bytes: in_shared as u32, ..Grid::line(n_blocks, threads) }, &args);
        let dbias = dbias.filter(|_| is_layer).map_or(Arg::Address(0), Cuda::arg_mut);
        let args = [Cuda::arg_mut(dgain), dbias, partial.arg(), int(n_blocks), int(columns)];
        self.backend.launch(&Kernel::of("norm", "norm_sum", DType::F32), Grid::line(columns.div_ceil(128), 128), &args);
    }
}
