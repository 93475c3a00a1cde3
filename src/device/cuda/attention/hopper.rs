//! Attention on Hopper's own instructions (kernels/attention_hopper_*.cu): bf16, head dims 64, 128 and 192. The grid's x is the head,
//! so that heads that share keys run side by side, and y the tiles, those with the most work first.

use super::{Tile, blocks, int};
use crate::device::Heads;
use crate::device::cuda::backend::{Arg, Grid, Kernel, TensorMap};
use crate::device::cuda::{Cuda, Workspace};
use crate::tensor::Tensor;

/// Room to begin shared memory at a multiple of 1024 bytes.
const ALIGNMENT: usize = 1024;
const BARRIER_BYTES: usize = 8;
/// Threads of a block that adds parts, of four elements each.
const COMBINE_THREADS: u32 = 256;

/// Sizes of the forward kernel of a head dim: `FORWARD` of kernels/attention_hopper_forward.cu.
#[derive(Clone, Copy)]
struct Forward {
    threads: u32,
    /// Of a tile.
    rows: usize,
    /// Of a block of keys.
    keys: usize,
}

impl Forward {
    fn of(dim: usize) -> Forward {
        match dim {
            64 => Forward { threads: 512, rows: 192, keys: 128 },
            128 => Forward { threads: 384, rows: 128, keys: 128 },
            192 => Forward { threads: 384, rows: 128, keys: 112 },
            _ => panic!("attention on wgmma: no kernel for head dim {dim}"),
        }
    }

    /// Q, two stages of K and V, nine barriers.
    fn shared_bytes(self, dim: usize) -> usize {
        (self.rows + 4 * self.keys) * dim * 2 + 9 * BARRIER_BYTES + ALIGNMENT
    }
}

/// Rows of a tile of `dq`.
const QUERY_ROWS: usize = 128;

/// Sizes of the backward kernels of a head dim: `BACKWARD` of kernels/attention_hopper_backward.cu.
#[derive(Clone, Copy)]
struct Backward {
    dim: usize,
    /// Of a block of `dq`.
    query_keys: usize,
    /// Of a tile of `dkv`.
    keys: usize,
    /// Of a block of `dkv`.
    queries: usize,
}

impl Backward {
    const THREADS: u32 = 384;

    fn of(dim: usize) -> Backward {
        match dim {
            64 => Backward { dim, query_keys: 128, keys: 128, queries: 96 },
            128 => Backward { dim, query_keys: 96, keys: 128, queries: 64 },
            192 => Backward { dim, query_keys: 80, keys: 64, queries: 96 },
            _ => panic!("attention on wgmma: no kernel for head dim {dim}"),
        }
    }

    /// Q and dout, two stages of K and V, five barriers.
    fn dq_bytes(self) -> usize {
        (2 * QUERY_ROWS + 4 * self.query_keys) * self.dim * 2 + 5 * BARRIER_BYTES + ALIGNMENT
    }

    /// K and V, two stages of Q, dout, lse and delta, five barriers.
    fn dkv_bytes(self) -> usize {
        (2 * self.keys + 4 * self.queries) * self.dim * 2 + 4 * self.queries * 4 + 5 * BARRIER_BYTES + ALIGNMENT
    }
}

/// A rotation of gradients: (cos, sin) [T, half].
pub(super) struct Turn {
    pub(super) angles: Workspace,
    pub(super) half: usize,
}

/// Whether the backward kernels rotate so many pairs of a head: both of a pair are then in one thread, and which is known at compile time.
pub(super) fn turns(half: usize, dim: usize) -> bool {
    half == dim / 2 || half == dim / 4
}

/// Into how many parts the query heads of a group are shared out, so that there are about one and a half blocks a processor; more
/// would cost more in adding the parts than they gain.
fn n_parts(n_blocks: usize, n_processors: usize, per_kv: usize) -> usize {
    (n_processors * 3 / 2).div_ceil(n_blocks.max(1)).clamp(1, per_kv)
}

/// Tiles of `rows` rows of whole sequences, those that see the most keys first.
fn longest_first(starts: &[usize], rows: usize) -> Vec<Tile> {
    let mut tiles = super::tiles(starts, rows);
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.first_row));
    tiles
}

/// The matrix `[tokens, heads, dim]` of a tensor.
fn map(tensor: &Tensor, heads: usize, dim: usize, box_tokens: usize) -> Arg {
    Arg::Map(TensorMap { address: Cuda::address(tensor), dim, heads, tokens: tensor.n_rows(), box_tokens: box_tokens as u32 })
}

/// Heads of a row of qkv.
fn packed(heads: Heads) -> usize {
    heads.query + 2 * heads.kv
}

impl Cuda {
    /// See `Device::attention`; the shapes are checked and there is a kernel for the dim.
    pub(super) fn attention_hopper(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads) {
        let form = Forward::of(heads.dim);
        let tiles = longest_first(sequence_starts, form.rows);
        if tiles.is_empty() {
            return;
        }
        let table = self.table(&tiles);
        let of_qkv = |rows| map(qkv, packed(heads), heads.dim, rows);
        let mut args = vec![Cuda::arg_mut(out), Cuda::arg_mut(lse), of_qkv(form.rows), of_qkv(form.keys), table.arg()];
        args.extend([qkv.n_rows(), heads.queries_per_kv()].map(|n| Arg::Int(int(n))));
        args.push(Arg::Float(1.0 / (heads.dim as f32).sqrt()));
        let shared_bytes = form.shared_bytes(heads.dim) as u32;
        let grid = Grid { blocks: (blocks(heads.query), blocks(tiles.len()), 1), threads: form.threads, shared_bytes };
        let kernel = Kernel::of("attention_hopper_forward", &format!("attention_hopper_d{}", heads.dim), qkv.dtype());
        self.backend.launch(&kernel, grid, &args);
    }

    /// See `Device::attention_backward`, after `delta`; the shapes are checked and there is a kernel for the dim.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_hopper_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        delta: &Workspace,
        lse: &Tensor,
        qkv: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
        turn: Option<&Turn>,
    ) {
        const FILE: &str = "attention_hopper_backward";
        let (form, n_tokens, per_kv) = (Backward::of(heads.dim), qkv.n_rows(), heads.queries_per_kv());
        let of_qkv = |rows| map(qkv, packed(heads), heads.dim, rows);
        let of_dout = |rows| map(dout, heads.query, heads.dim, rows);
        let dqkv = Cuda::arg_mut(dqkv);
        let sizes = [n_tokens, per_kv].map(|n| Arg::Int(int(n)));
        let scale = Arg::Float(1.0 / (heads.dim as f32).sqrt());
        let turn = turn.map_or([Arg::Address(0), Arg::Int(0)], |turn| [turn.angles.arg(), Arg::Int(int(turn.half))]);
        let launch = |operation: &str, (x, y): (usize, usize), shared_bytes: usize, args: &[Arg]| {
            let kernel = Kernel::of(FILE, &format!("attention_hopper_{operation}_d{}", heads.dim), qkv.dtype());
            let grid = Grid { blocks: (blocks(x), blocks(y), 1), threads: Backward::THREADS, shared_bytes: shared_bytes as u32 };
            self.backend.launch(&kernel, grid, args);
        };

        let tiles = longest_first(sequence_starts, QUERY_ROWS);
        let table = self.table(&tiles);
        let maps = [of_qkv(QUERY_ROWS), of_dout(QUERY_ROWS), of_qkv(form.query_keys)];
        let args = [&[dqkv, delta.arg(), Cuda::arg(lse)], &maps[..], &[table.arg()], &sizes, &[scale], &turn].concat();
        launch("dq", (heads.query, tiles.len()), form.dq_bytes(), &args);

        let mut tiles = super::tiles(sequence_starts, form.keys);
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.n_tokens - tile.first_row));
        let table = self.table(&tiles);
        let n_parts = n_parts(tiles.len() * heads.kv, self.backend.processors(), per_kv);
        let n_elements = n_tokens * heads.kv * 2 * heads.dim;
        let partial = self.workspace(if n_parts > 1 { n_parts * n_elements * 4 } else { 0 });
        let maps = [of_qkv(form.keys), of_qkv(form.queries), of_dout(form.queries)];
        let tensors = [dqkv, partial.arg(), delta.arg(), Cuda::arg(lse)];
        let args = [&tensors, &maps[..], &[table.arg()], &sizes, &[Arg::Int(int(n_parts)), scale], &turn].concat();
        launch("dkv", (heads.kv * n_parts, tiles.len()), form.dkv_bytes(), &args);
        if n_parts > 1 {
            let more = [heads.kv, n_parts, heads.dim].map(|n| Arg::Int(int(n)));
            let args = [&[dqkv, partial.arg()], &sizes[..], &more, &turn].concat();
            let kernel = Kernel::of(FILE, "attention_hopper_combine", qkv.dtype());
            self.backend.launch(&kernel, Grid::line(n_elements.div_ceil(4 * COMBINE_THREADS as usize), COMBINE_THREADS), &args);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few tiles of few groups are shared out, no further than there are heads; many are not. 340B on eight ranks has one group of 12
    /// heads, so 64 tiles of 64 keys in 4096 tokens, for 132 processors.
    #[test]
    fn heads_are_shared_out_where_blocks_are_few() {
        assert_eq!(n_parts(64, 132, 12), 4);
        assert_eq!(n_parts(256, 132, 6), 1);
        assert_eq!(n_parts(32, 132, 2), 2);
        assert_eq!(n_parts(1, 132, 1), 1);
    }

    /// What a block of sm_90 may have: 227 KiB.
    #[test]
    fn shared_memory_is_there() {
        for dim in [64, 128, 192] {
            let backward = Backward::of(dim);
            for bytes in [Forward::of(dim).shared_bytes(dim), backward.dq_bytes(), backward.dkv_bytes()] {
                assert!(bytes <= 227 << 10, "{bytes} bytes for head dim {dim}");
            }
        }
    }
}
