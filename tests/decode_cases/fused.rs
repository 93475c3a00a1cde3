//! Operations that are fewer launches than the operations they stand for, and rows alone against rows among others: the same bits.

use crate::cases;
use crate::oracle::HeadCounts;
use trireme::device::{
    Activation, CacheSpan, Device, Direction, Gemm, Heads, KvCache, Norm, NormKind, NormOf, PAGE_TOKENS, Rope, RopeScaling, YarnScaling,
};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// A tensor of noise; `which` tells it from others.
fn noise(device: &dyn Device, dims: &[usize], dtype: DType, which: u64) -> Tensor {
    let random = Random::new(which, "fused");
    let values: Vec<f32> = (0..dims.iter().product::<usize>() as u64).map(|i| random.normal(i) as f32).collect();
    let host = if dtype == DType::BF16 { Tensor::from_bf16(dims, &values) } else { Tensor::from_f32(dims, &values) };
    let mut tensor = device.alloc(dims, dtype).unwrap();
    device.upload(host.bytes(), &mut tensor);
    tensor
}

fn assert_same(what: &str, found: &Tensor, expected: &Tensor) {
    let at = found.host_bytes().iter().zip(expected.host_bytes().iter()).position(|(a, b)| a != b);
    assert!(at.is_none(), "{what}: {found:?} differs at byte {at:?}");
}

/// Spans (past, new tokens) in pages of their own, which follow each other downwards.
fn spans_of(lengths: &[(usize, usize)], n_pages: usize) -> Vec<CacheSpan> {
    let (mut row, mut page) = (0, n_pages as u32);
    let span = |(past, new): &(usize, usize)| {
        let pages = (0..(past + new).div_ceil(PAGE_TOKENS))
            .map(|_| {
                page -= 1;
                page
            })
            .collect();
        row += new;
        CacheSpan { rows: row - new..row, past: *past, pages }
    };
    lengths.iter().map(span).collect()
}

/// Rotation, new rows of the cache and attention as one call: the cache and the output. Also where new rows are the first or the last of a
/// tile, a page or a share of keys, among the tiles that are fetched ahead or after those.
pub fn check_rope_attention(device: &dyn Device, heads: HeadCounts, rotary_dims: usize, dtype: DType) {
    let (Heads { query, dim, .. }, n_pages) = (cases::heads_of(heads), 17);
    let how = Rope { rotary_dims, base: 10000.0, scaling: None, direction: Direction::Forward };
    let steps = [&[(5, 1)][..], &[(300, 1)], &[(0, 1), (130, 1), (600, 1)], &[(63, 1), (64, 1), (191, 1), (192, 1)], &[(511, 1), (512, 1)]];
    for lengths in steps.into_iter().chain([&[(64, 7), (3, 1), (0, 70)][..]]) {
        let spans = spans_of(lengths, n_pages);
        let t: usize = lengths.iter().map(|(_, new)| new).sum();
        let places = lengths.iter().flat_map(|(past, new)| *past as u32..(past + new) as u32).collect::<Vec<u32>>();
        let mut positions = device.alloc(&[t], DType::U32).unwrap();
        device.upload(bytemuck::cast_slice(&places), &mut positions);
        let make = || {
            let dims = [n_pages, PAGE_TOKENS, heads.1 * dim];
            let cache = KvCache { keys: noise(device, &dims, dtype, 1), values: noise(device, &dims, dtype, 2) };
            let qkv = noise(device, &[t, cases::heads_of(heads).qkv_columns()], dtype, 3);
            (noise(device, &[t, query * dim], dtype, 4), qkv, cache)
        };
        let ((mut out, mut qkv, mut cache), (mut want, mut turned, mut filled)) = (make(), make());
        device.rope(&mut turned, &positions, cases::heads_of(heads), how);
        device.attention_cached(&mut want, &turned, &mut filled, &spans, cases::heads_of(heads));
        device.rope_attention_cached(&mut out, &mut qkv, &positions, &mut cache, &spans, cases::heads_of(heads), how);
        let what = format!("heads {heads:?}, {rotary_dims} rotary, {dtype:?}, {lengths:?}");
        assert_same(&what, &cache.keys, &filled.keys);
        assert_same(&what, &cache.values, &filled.values);
        assert_same(&what, &out, &want);
    }
}

/// Attention backward and the rotation of its gradients as one call, over sequences that end within tiles and keys that are shared out;
/// positions that no other row has, and a rotation that scales.
pub fn check_attention_rope_backward(device: &dyn Device, heads: HeadCounts, rotary_dims: usize, dtype: DType) {
    let h = cases::heads_of(heads);
    let scaling = RopeScaling::Yarn(YarnScaling {
        factor: 4.0,
        original_max_position_embeddings: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: Some(1.25),
        mscale: None,
        mscale_all_dim: None,
    });
    let how = Rope { rotary_dims, base: 10000.0, scaling: Some(scaling), direction: Direction::Backward };
    for starts in [&[0, 0][..], &[0, 33], &[0, 3, 3, 10, 151]] {
        let t = *starts.last().unwrap();
        let mut positions = device.alloc(&[t], DType::U32).unwrap();
        device.upload(bytemuck::cast_slice(&(0..t as u32).map(|i| i * 37 % 4099).collect::<Vec<u32>>()), &mut positions);
        let [qkv, mut dqkv, mut want] = [1, 2, 3].map(|which| noise(device, &[t, h.qkv_columns()], dtype, which));
        let [mut out, dout] = [4, 5].map(|which| noise(device, &[t, h.query * h.dim], dtype, which));
        let mut lse = noise(device, &[h.query, t], DType::F32, 6);
        device.attention(&mut out, &mut lse, &qkv, starts, h);
        device.attention_backward(&mut want, &dout, &out, &lse, &qkv, starts, h);
        device.rope(&mut want, &positions, h, how);
        device.attention_rope_backward(&mut dqkv, &dout, &out, &lse, &qkv, &positions, starts, h, how);
        assert_same(&format!("heads {heads:?}, {rotary_dims} rotary, {dtype:?}, {starts:?}"), &dqkv, &want);
    }
}

/// Rows fed together and one by one, past the end of a share of keys: the same bits, though one row is worked on in another way.
pub fn check_rows_alone(device: &dyn Device, heads: HeadCounts, dtype: DType) {
    let (how, n_pages, past, new) = (cases::heads_of(heads), 9, 500, 24);
    let (columns, width) = (how.qkv_columns(), how.query * how.dim);
    let dims = [n_pages, PAGE_TOKENS, heads.1 * how.dim];
    let cache = || KvCache { keys: noise(device, &dims, dtype, 8), values: noise(device, &dims, dtype, 9) };
    let (qkv, mut together, mut alone) =
        (noise(device, &[new, columns], dtype, 10), noise(device, &[new, width], dtype, 11), noise(device, &[new, width], dtype, 12));
    let span = |rows: usize, past: usize| CacheSpan { rows: 0..rows, past, pages: (0..n_pages as u32).rev().collect() };
    device.attention_cached(&mut together, &qkv, &mut cache(), &[span(new, past)], how);
    let mut cache = cache();
    for i in 0..new {
        device.attention_cached(&mut alone.rows_mut(i..i + 1), &qkv.rows(i..i + 1), &mut cache, &[span(1, past + i)], how);
    }
    assert_same(&format!("rows alone, heads {heads:?}, {dtype:?}"), &alone, &together);
}

/// A product and its activation as one call.
pub fn check_gemm_activation(device: &dyn Device, kind: Activation, (m, f, k): (usize, usize, usize), dtype: DType) {
    let n = f * kind.inputs_per_output();
    let (x, w) = (noise(device, &[m, k], dtype, 5), noise(device, &[n, k], dtype, 6));
    let room = |columns: usize| noise(device, &[m, columns], dtype, 7);
    let (mut raised, mut want, mut out) = (room(n), room(f), room(f));
    device.gemm(&mut raised, &x, &w, Gemm::NT);
    device.activation(&mut want, &raised, kind);
    device.gemm_activation(&mut out, &mut room(n), &x, &w, kind);
    assert_same(&format!("{kind:?} [{m}, {f}, {k}] {dtype:?}"), &out, &want);
}

/// Products in canonical order that end in squared ReLU, forward and backward, of these sizes (rows, outputs, terms) and whether the device
/// has such ones. Where not, the outputs must be left alone.
pub fn check_canonical_activation(device: &dyn Device, list: &[((usize, usize, usize), bool)]) {
    let (sums, kind) = (device.canonical().expect("sums in canonical order"), Activation::SquaredRelu);
    for &((m, f, k), is_made) in list {
        let bf16 = |dims: [usize; 2], which| noise(device, &dims, DType::BF16, which);
        let (x, w, dy, w_down) = (bf16([m, k], 1), bf16([f, k], 2), bf16([m, k], 3), bf16([k, f], 4));
        let [mut raised, mut want_raised, mut activated, mut want] = [5, 5, 6, 6].map(|which| bf16([m, f], which));
        let what = format!("[{m}, {f}] over {k}");
        assert_eq!(sums.gemm_activated(&mut activated, &mut raised, &x, &w, kind), is_made, "{what}");
        if is_made {
            sums.gemm_in_pairs(&mut want_raised, &x, &w, Gemm::NT, 1);
            device.activation(&mut want, &want_raised, kind);
        }
        assert_same(&what, &raised, &want_raised);
        assert_same(&what, &activated, &want);

        let [mut draised, mut want, mut dactivated] = [7, 7, 8].map(|which| bf16([m, f], which));
        assert_eq!(sums.gemm_activation_backward(&mut draised, &dy, &w_down, &raised, kind), is_made, "{what}");
        if is_made {
            sums.gemm_in_pairs(&mut dactivated, &dy, &w_down, Gemm::NN, 1);
            device.activation_backward(&mut want, &dactivated, &raised, kind);
        }
        assert_same(&what, &draised, &want);
    }
}

/// The sum of a residual, its norm, a product and its activation as one call.
pub fn check_add_norm_gemm(device: &dyn Device, kind: Option<Activation>, (m, n, k): (usize, usize, usize), norm: NormKind) {
    let dtype = DType::BF16;
    let (x, delta, w) = (noise(device, &[m, k], dtype, 13), noise(device, &[m, k], dtype, 14), noise(device, &[n, k], dtype, 15));
    let (gain, bias) = (noise(device, &[k], dtype, 16), noise(device, &[k], dtype, 17));
    let norm = NormOf { gain: &gain, bias: (norm == NormKind::LayerNorm1P).then_some(&bias), how: Norm { kind: norm, eps: 1e-5 } };
    let room = |columns: usize| noise(device, &[m, columns], dtype, 18);
    let f = n / kind.map_or(1, Activation::inputs_per_output);
    let (mut want, mut want_sum, mut normed, mut stats) = (room(f), room(k), room(k), noise(device, &[m, 2], DType::F32, 19));
    device.copy(&mut want_sum, &x);
    device.add_norm(&mut want_sum, &delta, &mut normed, &mut stats, norm.gain, norm.bias, norm.how);
    match kind {
        None => device.gemm(&mut want, &normed, &w, Gemm::NT),
        Some(kind) => device.gemm_activation(&mut want, &mut room(n), &normed, &w, kind),
    }
    assert!(device.takes_norms(&x, &w));
    let (mut out, mut sum) = (room(f), room(k));
    device.add_norm_gemm(&mut out, &mut sum, [&x, &delta], norm, &w, kind);
    let what = format!("{:?}, {kind:?} [{m}, {n}, {k}]", norm.how);
    assert_same(&what, &sum, &want_sum);
    assert_same(&what, &out, &want);
}

/// All of it.
pub fn check(device: &dyn Device) {
    for dtype in [DType::F32, DType::BF16] {
        for (heads, rotary_dims) in
            [((1, 1, 8), 8), ((4, 2, 64), 32), ((6, 2, 128), 128), ((2, 1, 192), 96), ((3, 3, 40), 20), ((5, 1, 34), 18), ((16, 1, 64), 64)]
        {
            check_rope_attention(device, heads, rotary_dims, dtype);
            check_attention_rope_backward(device, heads, rotary_dims, dtype);
            check_rows_alone(device, heads, dtype);
        }
        // Nothing is rotated; chunks of eight dims do not fit; more query heads than one block's warps share.
        for (heads, rotary_dims) in [((2, 1, 64), 0), ((2, 1, 64), 24), ((17, 1, 64), 64)] {
            check_rope_attention(device, heads, rotary_dims, dtype);
        }
        for shape in [(1, 37, 128), (2, 300, 1032), (3, 9, 4096), (4, 21, 8200), (7, 12, 64)] {
            for kind in [Activation::SquaredRelu, Activation::Swiglu] {
                check_gemm_activation(device, kind, shape, dtype);
            }
        }
    }
    // Rows of one warp of a norm, of less than a block, of all it has, and of two and three turns of them.
    for shape in [(1, 38, 32), (2, 20, 1032), (1, 10, 2048), (3, 6, 4096), (4, 8, 4104), (1, 6, 8200)] {
        for norm in [NormKind::LayerNorm1P, NormKind::RmsNorm] {
            for kind in [None, Some(Activation::SquaredRelu), Some(Activation::Swiglu)] {
                check_add_norm_gemm(device, kind, shape, norm);
            }
        }
    }
}
