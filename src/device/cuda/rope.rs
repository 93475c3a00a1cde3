//! Rotary embedding. The frequencies are a table in device memory, made at the first call that turns in this way and kept: work that is
//! recorded finds it there, for a pass is done once before it is recorded.

use super::backend::{Arg, Grid, Kernel};
use super::grid::int;
use super::{Cuda, Workspace, assert_rows};
use crate::device::{Direction, Heads, Rope};
use crate::tensor::Tensor;

impl Cuda {
    /// See `Device::rope`.
    pub(super) fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope) {
        let (n_tokens, half) = (qkv.n_rows(), how.rotary_dims / 2);
        assert_rows("rope", &[qkv], n_tokens, heads.qkv_columns());
        assert!(how.rotary_dims % 2 == 0 && how.rotary_dims <= heads.dim, "rope of {} dims of {heads:?}", how.rotary_dims);
        assert_eq!(positions.n_elements(), n_tokens, "rope of {qkv:?} with {positions:?}");
        if n_tokens == 0 || half == 0 {
            return;
        }
        let grid = Grid { shared_bytes: (2 * half * size_of::<f32>()) as u32, ..Grid::line(n_tokens, 256) };
        let sizes = [heads.queries_per_kv(), heads.kv, heads.dim, half].map(int);
        let mut args = vec![Cuda::arg_mut(qkv), Cuda::arg(positions), self.rope_frequencies(how).arg()];
        args.extend(sizes);
        args.extend([Arg::Double(how.attention_factor()), Arg::Float(if how.direction == Direction::Forward { 1.0 } else { -1.0 })]);
        self.backend.launch(&Kernel::of("rope", "rope", qkv.dtype()), grid, &args);
    }

    /// f64[rotary_dims / 2].
    fn rope_frequencies(&self, how: Rope) -> Workspace {
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
