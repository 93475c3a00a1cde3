//! Rotary embedding. The frequencies are a table in device memory, made at the first call that turns in this way and kept: work that is
//! recorded finds it there, for a pass is done once before it is recorded.

use super::backend::{Arg, Grid, Kernel};
use super::grid::int;
use super::{Cuda, Workspace, assert_rows};
use crate::device::{Direction, Heads, KvCache, Rope};
use crate::tensor::{DType, Tensor};

pub(super) fn assert_rope(qkv: &Tensor, positions: &Tensor, heads: Heads, how: Rope) {
    assert_rows("rope", &[qkv], qkv.n_rows(), heads.qkv_columns());
    assert!(how.rotary_dims % 2 == 0 && how.rotary_dims <= heads.dim, "rope of {} dims of {heads:?}", how.rotary_dims);
    assert_eq!(positions.n_elements(), qkv.n_rows(), "rope of {qkv:?} with {positions:?}");
}

/// Of cos and sin; of sin besides.
fn factors(how: Rope) -> [Arg; 2] {
    [Arg::Double(how.attention_factor()), Arg::Float(if how.direction == Direction::Forward { 1.0 } else { -1.0 })]
}

/// A block for each token, with room for cos and sin of its angles.
fn grid(n_tokens: usize, half: usize) -> Grid {
    Grid { shared_bytes: (2 * half * size_of::<f32>()) as u32, ..Grid::line(n_tokens, 256) }
}

impl Cuda {
    /// See `Device::rope`.
    pub(super) fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope) {
        assert_rope(qkv, positions, heads, how);
        let (n_tokens, half) = (qkv.n_rows(), how.rotary_dims / 2);
        if n_tokens == 0 || half == 0 {
            return;
        }
        let sizes = [heads.queries_per_kv(), heads.kv, heads.dim, half].map(int);
        let mut args = vec![Cuda::arg_mut(qkv), Cuda::arg(positions), self.rope_frequencies(how).arg()];
        args.extend(sizes);
        args.extend(factors(how));
        self.backend.launch(&Kernel::of("rope", "rope", qkv.dtype()), grid(n_tokens, half), &args);
    }

    /// Rotates forward, and writes keys and values of so many tokens, rows of qkv and of the cache in a table, to the cache.
    pub(super) fn rope_append(
        &self,
        qkv: &mut Tensor,
        positions: &Tensor,
        cache: &mut KvCache,
        (tokens, n_tokens): (Arg, usize),
        heads: Heads,
        how: Rope,
    ) {
        assert_rope(qkv, positions, heads, how);
        let half = how.rotary_dims / 2;
        let (keys, values) = (Cuda::arg_mut(&mut cache.keys), Cuda::arg_mut(&mut cache.values));
        let mut args = vec![Cuda::arg_mut(qkv), keys, values, Cuda::arg(positions), self.rope_frequencies(how).arg(), tokens];
        args.extend([heads.queries_per_kv(), heads.kv, heads.dim, half].map(int));
        args.push(Arg::Double(how.attention_factor()));
        self.backend.launch(&Kernel::of("rope", "rope_append", qkv.dtype()), grid(n_tokens, half), &args);
    }

    /// (cos, sin) [T, rotary_dims / 2] of the angles of a rotation in `how`'s direction, f32.
    pub(super) fn rope_angles(&self, positions: &Tensor, how: Rope) -> Workspace {
        let (n_tokens, half) = (positions.n_elements(), how.rotary_dims / 2);
        let angles = self.workspace(n_tokens * half * 2 * size_of::<f32>());
        let mut args = vec![angles.arg(), Cuda::arg(positions), self.rope_frequencies(how).arg()];
        args.extend([n_tokens, half].map(int));
        args.extend(factors(how));
        self.backend.launch(&Kernel::of("rope", "rope_angles", DType::F32), Grid::line((n_tokens * half).div_ceil(256), 256), &args);
        angles
    }

    /// f64[rotary_dims / 2].
    pub(super) fn rope_frequencies(&self, how: Rope) -> Workspace {
        let mut tables = self.use_of_memory.rope_tables.lock().expect("no panic but in the first use of a table");
        if let Some((_, table)) = tables.iter().find(|(of, _)| of.turns_like(&how)) {
            return table.clone();
        }
        assert!(!self.is_recording(), "the first use of {how:?} is recorded: do the pass once before");
        let frequencies = how.frequencies();
        let table = self.own_memory(size_of_val(&frequencies[..]));
        self.backend.upload(bytemuck::cast_slice(&frequencies), table.address());
        tables.push((how, table.clone()));
        table
    }
}
