//! Rotary embedding.

use super::backend::{Arg, Grid, Kernel};
use super::grid::int;
use super::{Cuda, assert_rows};
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
        let mut args = vec![Cuda::arg_mut(qkv), Cuda::arg(positions)];
        args.extend(sizes);
        args.extend([Arg::Double(how.base), Arg::Float(if how.direction == Direction::Forward { 1.0 } else { -1.0 })]);
        self.backend.launch(&Kernel::of("rope", "rope", qkv.dtype()), grid, &args);
    }
}
