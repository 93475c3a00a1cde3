//! Weights of linear layers and embeddings that have no memory of their own: whoever computes with one has its rows read in slices, one
//! after another, from wherever they are. For a few tokens through a model that memory does not hold, where speed does not count.
//!
//! In reproducible numerics the bits are those of a weight in memory, since each output is a sum of its own.

use super::ctx::{Ctx, Inner};
use super::param::Param;
use crate::device::{Gemm, ScratchTensor};
use crate::tensor::{DType, Tensor};
use std::ops::Range;

/// Where the rows of a weight are.
pub trait WeightRows: Send + Sync {
    /// into[n, I] = rows of what this rank has of the weight, from its row `first_row` on. What cannot be read is left as it is: its maker
    /// knows, and asks when the pass is over.
    fn read(&self, first_row: usize, into: &mut Tensor);
}

/// Bytes of a slice, if a row is not longer.
pub const SLICE_BYTES: usize = 8 << 20;

/// Rows of a slice, and the slices of the rows that this rank has: where each begins, and which of its rows are new. All have one size;
/// the last ends where the weight does, and so repeats rows of the one before.
fn slices(weight: &Param) -> (usize, impl Iterator<Item = (usize, Range<usize>)>) {
    let (n_rows, row_bytes) = (weight.slice.shape[0], weight.slice.shape[1] * weight.value.dtype().bytes());
    let size = (SLICE_BYTES / row_bytes).clamp(1, n_rows);
    let slice = move |idx: usize| {
        let first = (idx * size).min(n_rows - size);
        (first, idx * size - first..size)
    };
    (size, (0..n_rows.div_ceil(size)).map(slice))
}

/// Memory of a slice: of one size whatever the weight, so that a pass takes it once.
fn memory(ctx: &Ctx, row_len: usize, dtype: DType) -> ScratchTensor {
    ctx.take(&[row_len.max(SLICE_BYTES / dtype.bytes())], dtype)
}

/// y[T, O] = x[T, I] W^T; `inner` is I.
pub fn multiply(ctx: &Ctx, y: &mut Tensor, x: &Tensor, (weight, rows): (&Param, &dyn WeightRows), inner: Inner) {
    let ((size, slices), n_tokens, row_len) = (slices(weight), x.n_rows(), x.row_len());
    let mut memory = memory(ctx, row_len, x.dtype());
    let mut of_slice = memory.rows_mut(0..size * row_len);
    let mut slice = of_slice.reshaped_mut(&[size, row_len]);
    let mut parts = ctx.take(&[y.row_len().div_ceil(size) * n_tokens, size], y.dtype());
    for (idx, (first, _)) in slices.enumerate() {
        rows.read(first, &mut slice);
        ctx.product_over(inner, &mut parts.rows_mut(idx * n_tokens..(idx + 1) * n_tokens), x, &slice, Gemm::NT);
    }
    ctx.device.join_columns(y, &parts);
}

/// out[T, I] = the rows of W that the tokens name, or -0 where this rank has no such row.
pub fn look_up(ctx: &Ctx, out: &mut Tensor, tokens: &Tensor, (table, rows): (&Param, &dyn WeightRows)) {
    let ((size, slices), row_len) = (slices(table), out.row_len());
    let mut memory = memory(ctx, row_len, out.dtype());
    let mut of_slice = memory.rows_mut(0..size * row_len);
    let mut slice = of_slice.reshaped_mut(&[size, row_len]);
    let mut found = ctx.take(out.dims(), out.dtype());
    for (first, new) in slices {
        let offset = table.slice.offset[0] + first;
        rows.read(first, &mut slice);
        if first == 0 {
            ctx.device.embed(out, tokens, &slice, offset);
            continue;
        }
        ctx.device.embed(&mut found, tokens, &slice.rows(new.clone()), offset + new.start);
        ctx.device.add(out, &found); // one of the two is -0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::solo::Solo;
    use crate::device::cpu::Cpu;
    use crate::device::{Activation, NormKind, Scratch};
    use crate::model::chunk::{Chunk, MicroBatch, Purpose};
    use crate::model::config::{HeadKind, ModelConfig, Split};
    use crate::model::ctx::SequenceMode;
    use crate::model::numerics::Numerics;
    use crate::parallel::layout::{Coords, ParallelLayout};
    use std::sync::{Arc, Mutex};

    /// A weight in memory, read as if it were not, and where slices began.
    struct Rows(Vec<f32>, usize, Mutex<Vec<usize>>);

    impl WeightRows for Rows {
        fn read(&self, first_row: usize, into: &mut Tensor) {
            let n = into.n_elements();
            into.f32_mut().copy_from_slice(&self.0[first_row * self.1..][..n]);
            self.2.lock().unwrap().push(first_row);
        }
    }

    /// Logits have the bits of weights in memory, tied or not, where weights are one slice, several, or several of which the last repeats
    /// rows of the one before: tokens stand in all of them, and in the repeated rows.
    #[test]
    fn slices_change_no_bit() {
        let device = Cpu::new();
        for tied_embeddings in [false, true] {
            let config = ModelConfig {
                n_layers: 1,
                hidden: 256,
                n_heads: 4,
                n_kv_heads: 2,
                head_dim: 32,
                ffn_hidden: 9000,
                vocab_size: 20_000,
                vocab_divisor: 128,
                max_tokens: 16,
                norm: NormKind::LayerNorm1P,
                norm_eps: 1e-5,
                activation: Activation::SquaredRelu,
                rotary_fraction: 0.5,
                rope_base: 10000.0,
                rope_scaling: None,
                tied_embeddings,
                head: HeadKind::Vocabulary,
                init_std: 0.1,
            };
            let at = Coords { tp: 0, pp: 0, dp: 0 };
            let chunk = |purpose| Chunk::new(&device, &config, &ParallelLayout::SINGLE, at, 0, DType::F32, purpose).unwrap();
            let (mut whole, mut streamed) = (chunk(Purpose::Inference), chunk(Purpose::Loading));
            whole.initialise(&device, 1);
            let mut sources = Vec::new();
            for (from, to) in whole.params().into_iter().zip(streamed.params_mut()) {
                if from.spec.split == Split::None {
                    to.value = Tensor::from_f32(&from.slice.shape, from.value.f32());
                    continue;
                }
                let rows = Arc::new(Rows(from.value.f32().to_vec(), from.slice.shape[1], Mutex::default()));
                to.streamed = Some(Arc::clone(&rows) as Arc<dyn WeightRows>);
                sources.push((from.spec.name.clone(), rows));
            }
            let tokens = [0u32, 8191, 8192, 11_904, 12_000, 16_383, 16_384, 19_999];
            let positions: Vec<u32> = (0..tokens.len() as u32).collect();
            let ends = vec![0, 3, tokens.len()];
            let batch = MicroBatch::new(&device, [&tokens, &tokens, &positions], &[0.0; 8], ends).unwrap();
            let logits = |chunk: &Chunk| {
                let (tp, scratch, numerics) = (Solo::new(), Scratch::new(), Numerics::of_inference(&device));
                let ctx = Ctx { device: &device, tp: &tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics };
                chunk.logits(&ctx, None, &batch).f32().iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
            };
            assert!(logits(&whole) == logits(&streamed), "tied {tied_embeddings}");
            let read = |name: &str| sources.iter().find(|(of, _)| of == name).unwrap().1.2.lock().unwrap().clone();
            // 8192 rows of 1 KiB, 233 rows of 36 000 bytes.
            let embedding = vec![0, 8192, 20_096 - 8192];
            assert_eq!(read("embedding.weight"), if tied_embeddings { embedding.repeat(2) } else { embedding });
            assert_eq!(read("layers.0.mlp.up.weight"), [0, 9000 - 8192]);
            assert_eq!(read("layers.0.mlp.down.weight"), [0, 256 - 233]);
            assert_eq!(read("layers.0.attention.qkv.weight"), [0]);
        }
    }
}
