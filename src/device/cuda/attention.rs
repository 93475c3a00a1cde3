//! Attention: which block computes what. Tables of work are made here, uploaded, and read by the kernels.
//!
//! bf16 with head dims 64, 128 and 192 runs on tensor cores in tiles of 64 rows, on a Hopper GPU with its own instructions (`hopper`);
//! f32 and other dims by plain FMA in tiles of 16.

mod hopper;

use self::hopper::Turn;
use super::backend::{Arg, Grid, Kernel};
use super::{Cuda, assert_rows, assert_sequences};
use crate::device::{Heads, Rope};
use crate::tensor::{DType, Tensor};

/// Threads of a block, but for the tensor-core form of `dkv`.
pub(super) const THREADS: u32 = 128;

/// Rows of `[T, A]` of a block of `delta`.
const DELTA_ROWS: usize = 16;

/// `Item` of kernels/attention_tile.cuh: up to a tile of rows over a range of keys.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Item {
    pub(super) first_token: i32,
    pub(super) n_tokens: i32,
    pub(super) past: i32,
    pub(super) first_row: i32,
    pub(super) key_begin: i32,
    pub(super) key_end: i32,
    pub(super) key_row: i32,
    pub(super) partial_row: i32,
}

/// `Tile` of kernels/attention_backward.cu: up to a tile of rows of a sequence.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Tile {
    first_token: i32,
    n_tokens: i32,
    first_row: i32,
}

/// How a call runs: the kernels' form and its sizes.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub(super) dtype: DType,
    dim: usize,
    /// Tensor cores; else FMA.
    mma: bool,
}

pub(super) fn int(x: usize) -> i32 {
    i32::try_from(x).unwrap_or_else(|_| panic!("attention over {x} rows: more than 2^31"))
}

pub(super) fn blocks(n: usize) -> u32 {
    u32::try_from(n).expect("fewer than 2^32 blocks")
}

impl Form {
    pub(super) fn of(dtype: DType, heads: Heads) -> Form {
        let (per_kv, dim) = (heads.queries_per_kv(), heads.dim);
        assert!(per_kv * heads.kv == heads.query && (1..=256).contains(&dim), "attention of {heads:?}");
        Form { dtype, dim, mma: dtype == DType::BF16 && [64, 128, 192].contains(&dim) }
    }

    /// Rows of a tile.
    pub(super) fn rows(self) -> usize {
        if self.mma { 64 } else { 16 }
    }

    /// The kernel that runs `operation` in this form.
    pub(super) fn kernel(self, file: &'static str, operation: &str) -> Kernel {
        if self.mma { Kernel::of(file, &format!("{operation}_d{}", self.dim), self.dtype) } else { Kernel::of(file, operation, self.dtype) }
    }

    /// `n` tiles of 64 rows of D + 8 bf16.
    fn tiles_bytes(self, n: usize) -> usize {
        n * 64 * (self.dim + 8) * 2
    }

    pub(super) fn is_mma(self) -> bool {
        self.mma
    }

    /// Shared memory of a block of queries over keys that has so many stages of them; one without tensor cores has none.
    pub(super) fn attend_bytes(self, stages: usize) -> usize {
        if self.mma { self.tiles_bytes(1 + 2 * stages) } else { (16 * self.dim + 32 * (self.dim + 1) + 32 * self.dim) * 4 }
    }

    /// Shared memory of a block of `dq`; that of `dkv` keeps weights [64, 72] twice as well.
    fn dq_bytes(self) -> usize {
        if self.mma { self.tiles_bytes(6) } else { (32 * self.dim + 64 * (self.dim + 1)) * 4 }
    }

    fn dkv_bytes(self) -> usize {
        self.dq_bytes() + if self.mma { 2 * 64 * 72 * 2 } else { 0 }
    }

    /// The last arguments of a kernel: the dim where it is not in the name, then the scale.
    pub(super) fn last_args(self) -> Vec<Arg> {
        let scale = Arg::Float(1.0 / (self.dim as f32).sqrt());
        if self.mma { vec![scale] } else { vec![Arg::Int(int(self.dim)), scale] }
    }
}

/// Items of whole sequences, those over the most keys first, so that the blocks end together.
fn items(starts: &[usize], per_kv: usize, rows: usize) -> Vec<Item> {
    let mut items = Vec::new();
    for ends in starts.windows(2) {
        let n = ends[1] - ends[0];
        items.extend((0..(n * per_kv).div_ceil(rows)).map(|block| Item {
            first_token: int(ends[0]),
            n_tokens: int(n),
            past: 0,
            first_row: int(block * rows),
            key_begin: 0,
            key_end: int(n),
            key_row: int(ends[0]),
            partial_row: -1,
        }));
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.first_row));
    items
}

/// Tiles of whole sequences.
fn tiles(starts: &[usize], rows: usize) -> Vec<Tile> {
    let of = |ends: &[usize]| {
        let (first_token, n) = (int(ends[0]), ends[1] - ends[0]);
        (0..n.div_ceil(rows)).map(move |block| Tile { first_token, n_tokens: int(n), first_row: int(block * rows) })
    };
    starts.windows(2).flat_map(of).collect()
}

impl Cuda {
    /// See `Device::attention`.
    pub(super) fn attention(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads) {
        let n_tokens = qkv.n_rows();
        assert_rows("attention", &[qkv], n_tokens, heads.qkv_columns());
        assert_rows("attention", &[out], n_tokens, heads.query * heads.dim);
        assert_sequences("attention", sequence_starts, n_tokens);
        assert_eq!(lse.n_elements(), heads.query * n_tokens, "attention: {lse:?} for {heads:?}");
        let form = Form::of(qkv.dtype(), heads);
        if self.hopper && form.mma {
            return self.attention_hopper(out, lse, qkv, sequence_starts, heads);
        }
        let items = items(sequence_starts, heads.queries_per_kv(), form.rows());
        if items.is_empty() {
            return;
        }
        let table = self.table(&items);
        let grid = Grid { blocks: (blocks(items.len()), blocks(heads.kv), 1), threads: THREADS, shared_bytes: form.attend_bytes(2) as u32 };
        let sizes = [n_tokens, heads.queries_per_kv(), heads.kv].map(|n| Arg::Int(int(n)));
        let mut args = vec![Cuda::arg_mut(out), Cuda::arg_mut(lse), Cuda::arg(qkv), table.arg()];
        args.extend(sizes);
        args.extend(form.last_args());
        self.backend.launch(&form.kernel("attention_forward", "attention"), grid, &args);
    }

    /// See `Device::attention_rope_backward`: in the kernels of attention where those have the rotation.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_rope_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        positions: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
        how: Rope,
    ) {
        let half = how.rotary_dims / 2;
        if self.hopper && Form::of(qkv.dtype(), heads).mma && hopper::turns(half, heads.dim) && qkv.n_rows() > 0 {
            assert_eq!(positions.n_elements(), qkv.n_rows(), "attention_rope_backward of {qkv:?} with {positions:?}");
            let turn = Turn { angles: self.rope_angles(positions, how), half };
            self.attention_turned_backward(dqkv, dout, out, lse, qkv, sequence_starts, heads, Some(&turn));
        } else {
            self.attention_backward(dqkv, dout, out, lse, qkv, sequence_starts, heads);
            self.rope(dqkv, positions, heads, how);
        }
    }

    /// See `Device::attention_backward`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
    ) {
        self.attention_turned_backward(dqkv, dout, out, lse, qkv, sequence_starts, heads, None);
    }

    /// The same; with `turn`, which Hopper's kernels have alone, dq and dk are rotated.
    #[allow(clippy::too_many_arguments)]
    fn attention_turned_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
        turn: Option<&Turn>,
    ) {
        let n_tokens = qkv.n_rows();
        assert_rows("attention_backward", &[qkv, dqkv], n_tokens, heads.qkv_columns());
        assert_rows("attention_backward", &[out, dout], n_tokens, heads.query * heads.dim);
        assert_sequences("attention_backward", sequence_starts, n_tokens);
        assert_eq!(lse.n_elements(), heads.query * n_tokens, "attention_backward: {lse:?} for {heads:?}");
        if n_tokens == 0 {
            return;
        }
        let form = Form::of(qkv.dtype(), heads);
        let file = "attention_backward";
        let delta = self.workspace(heads.query * n_tokens * 4);
        let args =
            [delta.arg(), Cuda::arg(dout), Cuda::arg(out), Arg::Int(int(n_tokens)), Arg::Int(int(heads.query)), Arg::Int(int(heads.dim))];
        let grid = Grid::line((n_tokens * heads.query).div_ceil(DELTA_ROWS), THREADS);
        self.backend.launch(&Kernel::of(file, "attention_delta", form.dtype), grid, &args);
        if self.hopper && form.mma {
            return self.attention_hopper_backward(dqkv, dout, &delta, lse, qkv, sequence_starts, heads, turn);
        }
        let tiles = tiles(sequence_starts, form.rows());
        let table = self.table(&tiles);
        let mut args = vec![Cuda::arg_mut(dqkv), Cuda::arg(dout), delta.arg(), Cuda::arg(lse), Cuda::arg(qkv), table.arg()];
        args.extend([n_tokens, heads.queries_per_kv(), heads.kv].map(|n| Arg::Int(int(n))));
        args.extend(form.last_args());
        let grid = |y: usize, threads, shared_bytes: usize| Grid {
            blocks: (blocks(tiles.len()), blocks(y), 1),
            threads,
            shared_bytes: shared_bytes as u32,
        };
        self.backend.launch(&form.kernel(file, "attention_dq"), grid(heads.query, THREADS, form.dq_bytes()), &args);
        let threads = if form.mma { 2 * THREADS } else { THREADS };
        self.backend.launch(&form.kernel(file, "attention_dkv"), grid(heads.kv, threads, form.dkv_bytes()), &args);
    }
}
