//! One token a row of logits, without downloading them.

use super::Cuda;
use super::backend::{Arg, Grid, Kernel};
use super::grid::int;
use crate::device::{Draw, Drawn};
use crate::tensor::Tensor;

/// Bins of a histogram in kernels/sample.cu.
const BINS: usize = 2048;
/// Columns of a part of a row, of which one block makes a histogram: eight for each thread.
const PART_COLUMNS: usize = 2048;
/// Most columns whose weights a sum has room for.
const MOST_COLUMNS: usize = 1 << 22;

/// `Draw` of kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct TableRow {
    temperature: f64,
    top_p: f64,
    min_p: f64,
    uniform: f64,
    top_k: i32,
    unused: i32,
}

/// `Drawn` of kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Result {
    logprob: f64,
    token: u32,
    unused: u32,
}

impl Cuda {
    /// See `Device::sample`.
    pub(super) fn sample(&self, logits: &Tensor, n_valid: usize, draws: &[Draw]) -> Vec<Drawn> {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert!(
            (1..=columns.min(MOST_COLUMNS)).contains(&n_valid) && draws.len() == n,
            "sample {} of {logits:?}, {n_valid} valid",
            draws.len()
        );
        if n == 0 {
            return Vec::new();
        }
        let table: Vec<TableRow> = draws.iter().map(table_row).collect();
        let table = self.table(&table);
        // What has the largest elements first: they are aligned.
        let n_parts = n_valid.div_ceil(PART_COLUMNS);
        let sizes =
            [n * BINS * size_of::<u64>(), n * n_parts * size_of::<f64>(), n * size_of::<Result>(), n * BINS * 4, n * n_parts * 4, n * 4];
        let memory = self.workspace(sizes.iter().sum());
        let mut at = 0;
        let [weights, partial, drawn, counts, maxima, first] = sizes.map(|bytes| {
            at += bytes;
            memory.arg_at(at - bytes)
        });
        let (logits_at, table) = (Cuda::arg(logits), table.arg());
        let (sizes_of_rows, part_columns) = ([int(columns), int(n_valid)], int(PART_COLUMNS));
        let of_parts = Grid { blocks: (n_parts as u32, u32::try_from(n).expect("few rows"), 1), threads: 256, shared_bytes: 0 };
        let launch = |name: &str, grid: Grid, first: &[Arg], last: &[Arg]| {
            let args = [first, &sizes_of_rows, last].concat();
            self.backend.launch(&Kernel::of("sample", name, logits.dtype()), grid, &args);
        };
        launch("sample_max", of_parts, &[maxima, weights, counts, first, logits_at], &[part_columns]);
        launch("sample_bins", of_parts, &[weights, counts, first, partial, logits_at, maxima, table], &[part_columns]);
        let of_rows = [drawn, logits_at, maxima, table, weights, counts, first, partial, int(n_parts)];
        launch("sample_choose", Grid::line(n, 512), &of_rows, &[]);
        let mut results = vec![Result { logprob: 0.0, token: 0, unused: 0 }; n];
        let Arg::Address(drawn) = drawn else { unreachable!("memory has an address") };
        self.backend.download(drawn, bytemuck::cast_slice_mut(&mut results));
        results.into_iter().map(|one| Drawn { token: one.token, logprob: one.logprob }).collect()
    }
}

fn table_row(draw: &Draw) -> TableRow {
    let top_k = i32::try_from(draw.top_k).unwrap_or(i32::MAX); // more than there are columns keeps all
    TableRow { temperature: draw.temperature, top_p: draw.top_p, min_p: draw.min_p, uniform: draw.uniform, top_k, unused: 0 }
}
