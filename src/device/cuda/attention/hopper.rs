//! Attention on Hopper's own instructions (kernels/attention_hopper_*.cu): bf16, head dims 64, 128 and 192. The grid's x is the head,
//! so that heads that share keys run side by side, and y the tiles, those with the most work first.

use super::{Tile, blocks, int};
use crate::device::Heads;
use crate::device::cuda::Cuda;
use crate::device::cuda::backend::{Arg, Grid, Kernel, TensorMap};
use crate::tensor::Tensor;

/// Room to begin shared memory at a multiple of 1024 bytes.
const ALIGNMENT: usize = 1024;
const BARRIER_BYTES: usize = 8;

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
}
