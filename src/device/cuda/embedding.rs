//! Rows of the embedding table, and their gradients in token order.

use super::backend::{Grid, Kernel};
use super::grid::{CHUNK, int, rows};
use super::{Cuda, assert_rows};
use crate::tensor::{DType, Tensor};

/// Threads of a block that adds up the gradients of a row, and so an eighth of its columns.
const BACKWARD_THREADS: usize = 128;

impl Cuda {
    /// See `Device::embed`.
    pub(super) fn embed(&self, out: &mut Tensor, tokens: &Tensor, table: &Tensor, first_row: usize) {
        let (n, columns) = (tokens.n_elements(), table.row_len());
        assert_rows("embed", &[out], n, columns);
        if out.n_elements() == 0 {
            return;
        }
        let mut args = vec![Cuda::arg_mut(out), Cuda::arg(tokens), Cuda::arg(table)];
        args.extend([columns, first_row, table.n_rows()].map(int));
        let grid = Grid { threads: rows(n, columns).threads.min(256), ..rows(n, columns) };
        self.backend.launch(&Kernel::of("embedding", "embed", table.dtype()), grid, &args);
    }

    /// See `Device::embed_backward`.
    pub(super) fn embed_backward(&self, dtable: &mut Tensor, dout: &Tensor, tokens: &Tensor, first_row: usize) {
        let (n, columns, n_rows) = (tokens.n_elements(), dtable.row_len(), dtable.n_rows());
        assert_rows("embed_backward", &[dout], n, columns);
        assert_eq!(dtable.dtype(), DType::F32, "embed_backward to {dtable:?}");
        if dout.n_elements() == 0 || n_rows == 0 {
            return;
        }
        let order = self.workspace(n * size_of::<i32>());
        let args = [order.arg(), Cuda::arg(tokens), int(n), int(first_row), int(n_rows)];
        self.backend.launch(&Kernel::of("embedding", "embed_order", DType::U32), Grid::line(n.div_ceil(256), 256), &args);
        let mut args = vec![Cuda::arg_mut(dtable), Cuda::arg(dout), Cuda::arg(tokens), order.arg()];
        args.extend([n, columns, first_row, n_rows].map(int));
        let mut grid = Grid::line(n, BACKWARD_THREADS as u32);
        grid.blocks.1 = u32::try_from(columns.div_ceil(BACKWARD_THREADS * CHUNK)).expect("rows of a table are short");
        self.backend.launch(&Kernel::of("embedding", "embed_backward", dout.dtype()), grid, &args);
    }
}
