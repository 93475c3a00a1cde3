//! The CPU device: plain host memory, rayon over rows.

use super::{Activation, Adamw, AdamwShard, CacheSpan, Device, Direction, Gemm, Heads, KvCache, MemoryUse, Norm, NormKind, Rope, Store};
use crate::error::{Error, Kind, Result};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The host as a device. All threads of the global rayon pool.
#[derive(Default)]
pub struct Cpu {
    live_bytes: Arc<AtomicUsize>,
    peak_bytes: AtomicUsize,
    n_allocations: AtomicUsize,
}

impl Cpu {
    /// Uses the global rayon pool.
    pub fn new() -> Cpu {
        Cpu::default()
    }
}

fn store(out: &mut Tensor, values: &[f32], how: Store) {
    match (out.dtype(), how) {
        (DType::F32, Store::Assign) => out.f32_mut().copy_from_slice(values),
        (DType::F32, Store::Accumulate) => out.f32_mut().iter_mut().zip(values).for_each(|(o, v)| *o += v),
        (DType::BF16, Store::Assign) => out.bf16_mut().iter_mut().zip(values).for_each(|(o, v)| *o = half::bf16::from_f32(*v)),
        (DType::BF16, Store::Accumulate) => {
            out.bf16_mut().iter_mut().zip(values).for_each(|(o, v)| *o = half::bf16::from_f32(o.to_f32() + v))
        }
        (DType::U32, _) => panic!("store into a u32 tensor"),
    }
}

fn normalise(x: &[f32], stats: &mut [f32], gain: &[f32], bias: Option<&[f32]>, how: Norm) -> Vec<f32> {
    let n = gain.len();
    let mut out = vec![0.0; x.len()];
    for (t, row) in x.chunks_exact(n).enumerate() {
        let mean = match how.kind {
            NormKind::LayerNorm1P => row.iter().sum::<f32>() / n as f32,
            NormKind::RmsNorm => 0.0,
        };
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n as f32;
        let rstd = 1.0 / (var + how.eps).sqrt();
        (stats[2 * t], stats[2 * t + 1]) = (mean, rstd);
        for i in 0..n {
            let g = if how.kind == NormKind::LayerNorm1P { 1.0 + gain[i] } else { gain[i] };
            out[t * n + i] = (row[i] - mean) * rstd * g + bias.map_or(0.0, |b| b[i]);
        }
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

impl Device for Cpu {
    fn name(&self) -> String {
        format!("cpu, {} threads", rayon::current_num_threads())
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let live = Arc::clone(&self.live_bytes);
        let on_drop = Arc::new(move |bytes| {
            live.fetch_sub(bytes, Ordering::Relaxed);
        });
        let bytes = (shape.iter().product::<usize>() * dtype.bytes()).max(64);
        let held = self.live_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let Some(tensor) = Tensor::host(shape, dtype, Some(on_drop)) else {
            self.live_bytes.fetch_sub(bytes, Ordering::Relaxed);
            let wrong = format!("out of memory: {bytes} bytes for a tensor {shape:?}, {} bytes are in use", held - bytes);
            return Err(Error::new(Kind::Other, wrong).remedy("use a smaller micro-batch or model, or more ranks"));
        };
        self.peak_bytes.fetch_max(held, Ordering::Relaxed);
        self.n_allocations.fetch_add(1, Ordering::Relaxed);
        Ok(tensor)
    }

    fn upload(&self, host: &[u8], to: &mut Tensor) {
        to.bytes_mut().copy_from_slice(host);
    }

    fn download(&self, from: &Tensor, host: &mut [u8]) {
        host.copy_from_slice(from.bytes());
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            live_bytes: self.live_bytes.load(Ordering::Relaxed),
            peak_bytes: self.peak_bytes.load(Ordering::Relaxed),
            n_allocations: self.n_allocations.load(Ordering::Relaxed),
        }
    }

    fn finish(&self) {}

    fn fill_zero(&self, x: &mut Tensor) {
        x.bytes_mut().fill(0);
    }

    fn copy(&self, out: &mut Tensor, x: &Tensor) {
        assert_eq!(out.n_elements(), x.n_elements(), "copy {x:?} to {out:?}");
        if out.dtype() == x.dtype() { out.bytes_mut().copy_from_slice(x.bytes()) } else { store(out, &x.to_f32_vec(), Store::Assign) }
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        assert_eq!(x.n_elements(), y.n_elements(), "add {y:?} to {x:?}");
        store(x, &y.to_f32_vec(), Store::Accumulate);
    }

    fn scale(&self, x: &mut Tensor, factor: f32) {
        let values: Vec<f32> = x.to_f32_vec().iter().map(|v| v * factor).collect();
        store(x, &values, Store::Assign);
    }

    fn sum_squares(&self, x: &Tensor) -> f64 {
        x.f32().chunks(4096).map(|block| block.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()).sum()
    }

    fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        let (m, k) = if how.trans_a { (a.row_len(), a.n_rows()) } else { (a.n_rows(), a.row_len()) };
        let (k_b, n) = if how.trans_b { (b.row_len(), b.n_rows()) } else { (b.n_rows(), b.row_len()) };
        assert!(k == k_b && out.n_rows() == m && out.row_len() == n, "gemm {out:?} = {a:?} x {b:?}, {how:?}");
        if m == 0 || n == 0 {
            return;
        }
        let (a_values, b_values) = (a.to_f32_vec(), b.to_f32_vec());
        let (a_cs, a_rs) = if how.trans_a { (m as isize, 1) } else { (1, k as isize) };
        let (b_cs, b_rs) = if how.trans_b { (k as isize, 1) } else { (1, n as isize) };
        let mut result = vec![0.0f32; m * n];
        let parallel = if m * n * k < 1 << 17 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
        // SAFETY: shapes and strides describe the three slices exactly; `result` is not aliased.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                result.as_mut_ptr(),
                1,
                n as isize,
                false,
                a_values.as_ptr(),
                a_cs,
                a_rs,
                b_values.as_ptr(),
                b_cs,
                b_rs,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                parallel,
            );
        }
        store(out, &result, how.out);
    }

    fn embed(&self, out: &mut Tensor, tokens: &Tensor, table: &Tensor, first_row: usize) {
        let h = table.row_len();
        let table_values = table.to_f32_vec();
        let mut values = vec![0.0; tokens.n_elements() * h];
        for (row, &token) in values.chunks_exact_mut(h).zip(tokens.u32()) {
            if let Some(at) = (token as usize).checked_sub(first_row).filter(|at| *at < table.n_rows()) {
                row.copy_from_slice(&table_values[at * h..][..h]);
            }
        }
        store(out, &values, Store::Assign);
    }

    fn embed_backward(&self, dtable: &mut Tensor, dout: &Tensor, tokens: &Tensor, first_row: usize) {
        let (h, n_rows) = (dtable.row_len(), dtable.n_rows());
        let dout_values = dout.to_f32_vec();
        let dtable = dtable.f32_mut();
        for (row, &token) in dout_values.chunks_exact(h).zip(tokens.u32()) {
            if let Some(at) = (token as usize).checked_sub(first_row).filter(|at| *at < n_rows) {
                dtable[at * h..][..h].iter_mut().zip(row).for_each(|(d, v)| *d += v);
            }
        }
    }

    fn norm(&self, out: &mut Tensor, stats: &mut Tensor, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, how: Norm) {
        let bias = bias.map(Tensor::to_f32_vec);
        let values = normalise(&x.to_f32_vec(), stats.f32_mut(), &gain.to_f32_vec(), bias.as_deref(), how);
        store(out, &values, Store::Assign);
    }

    fn add_norm(
        &self,
        x: &mut Tensor,
        delta: &Tensor,
        out: &mut Tensor,
        stats: &mut Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        how: Norm,
    ) {
        self.add(x, delta);
        self.norm(out, stats, x, gain, bias, how);
    }

    fn norm_backward(
        &self,
        dx: &mut Tensor,
        dgain: &mut Tensor,
        mut dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        gain: &Tensor,
        stats: &Tensor,
        how: Norm,
    ) {
        let n = gain.n_elements();
        let (dy, x, gain, stats) = (dy.to_f32_vec(), x.to_f32_vec(), gain.to_f32_vec(), stats.f32());
        let mut values = vec![0.0; x.len()];
        for t in 0..x.len() / n {
            let (mean, rstd) = (stats[2 * t], stats[2 * t + 1]);
            let hat: Vec<f32> = x[t * n..][..n].iter().map(|v| (v - mean) * rstd).collect();
            let dy = &dy[t * n..][..n];
            let plus = if how.kind == NormKind::LayerNorm1P { 1.0 } else { 0.0 };
            let g: Vec<f32> = dy.iter().zip(&gain).map(|(d, w)| d * (w + plus)).collect();
            let along = dot(&g, &hat) / n as f32;
            let offset = if how.kind == NormKind::LayerNorm1P { g.iter().sum::<f32>() / n as f32 } else { 0.0 };
            for i in 0..n {
                values[t * n + i] = rstd * (g[i] - offset - hat[i] * along);
                dgain.f32_mut()[i] += dy[i] * hat[i];
            }
            if let Some(dbias) = &mut dbias {
                dbias.f32_mut().iter_mut().zip(dy).for_each(|(b, d)| *b += d);
            }
        }
        store(dx, &values, Store::Accumulate);
    }

    fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope) {
        let (columns, half) = (heads.qkv_columns(), how.rotary_dims / 2);
        let mut values = qkv.to_f32_vec();
        let rotated: Vec<usize> =
            (0..heads.query).map(|h| heads.query_column(h)).chain((0..heads.kv).map(|g| heads.key_column(g))).collect();
        for (row, &position) in values.chunks_exact_mut(columns).zip(positions.u32()) {
            for i in 0..half {
                let angle = f64::from(position) * how.base.powf(-2.0 * i as f64 / how.rotary_dims as f64);
                let (cos, mut sin) = (angle.cos() as f32, angle.sin() as f32);
                if how.direction == Direction::Backward {
                    sin = -sin;
                }
                for &at in &rotated {
                    let (a, b) = (row[at + i], row[at + i + half]);
                    row[at + i] = a * cos - b * sin;
                    row[at + i + half] = b * cos + a * sin;
                }
            }
        }
        store(qkv, &values, Store::Assign);
    }

    fn attention(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads) {
        let (n_tokens, columns, d) = (qkv.n_rows(), heads.qkv_columns(), heads.dim);
        let values = qkv.to_f32_vec();
        let mut result = vec![0.0; out.n_elements()];
        let lse = lse.f32_mut();
        let scale = 1.0 / (d as f32).sqrt();
        for ends in sequence_starts.windows(2) {
            for t in ends[0]..ends[1] {
                for head in 0..heads.query {
                    let group = head / heads.queries_per_kv();
                    let q = &values[t * columns + heads.query_column(head)..][..d];
                    let key = |s: usize| &values[s * columns + heads.key_column(group)..][..d];
                    let scores: Vec<f32> = (ends[0]..=t).map(|s| scale * dot(q, key(s))).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                    lse[head * n_tokens + t] = max + sum.ln();
                    let row = &mut result[t * heads.query * d + head * d..][..d];
                    for (s, score) in (ends[0]..=t).zip(&scores) {
                        let p = (score - max).exp() / sum;
                        let v = &values[s * columns + heads.value_column(group)..][..d];
                        row.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                    }
                }
            }
        }
        store(out, &result, Store::Assign);
    }

    fn attention_backward(
        &self,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        qkv: &Tensor,
        sequence_starts: &[usize],
        heads: Heads,
    ) {
        let (n_tokens, columns, d) = (qkv.n_rows(), heads.qkv_columns(), heads.dim);
        let (values, dout, out, lse) = (qkv.to_f32_vec(), dout.to_f32_vec(), out.to_f32_vec(), lse.f32());
        let mut result = vec![0.0; dqkv.n_elements()];
        let scale = 1.0 / (d as f32).sqrt();
        for ends in sequence_starts.windows(2) {
            for t in ends[0]..ends[1] {
                for head in 0..heads.query {
                    let group = head / heads.queries_per_kv();
                    let q_at = t * columns + heads.query_column(head);
                    let o_at = (t * heads.query + head) * d;
                    let (d_row, o_row) = (&dout[o_at..][..d], &out[o_at..][..d]);
                    let delta = dot(d_row, o_row);
                    for s in ends[0]..=t {
                        let k_at = s * columns + heads.key_column(group);
                        let v_at = s * columns + heads.value_column(group);
                        let score = scale * dot(&values[q_at..][..d], &values[k_at..][..d]);
                        let p = (score - lse[head * n_tokens + t]).exp();
                        let ds = p * (dot(d_row, &values[v_at..][..d]) - delta) * scale;
                        for i in 0..d {
                            result[q_at + i] += ds * values[k_at + i];
                            result[k_at + i] += ds * values[q_at + i];
                            result[v_at + i] += p * d_row[i];
                        }
                    }
                }
            }
        }
        store(dqkv, &result, Store::Assign);
    }

    fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads) {
        let (columns, d, kv_columns) = (heads.qkv_columns(), heads.dim, heads.kv * heads.dim);
        let max_tokens = cache.keys.dims()[1];
        let values = qkv.to_f32_vec();
        let mut result = out.to_f32_vec();
        let scale = 1.0 / (d as f32).sqrt();
        for span in spans {
            assert!(span.past + span.rows.len() <= max_tokens, "{span:?} in a cache of {max_tokens} tokens");
            let first = span.slot * max_tokens;
            for (i, t) in span.rows.clone().enumerate() {
                let row = first + span.past + i;
                let (mut k, mut v) = (Vec::new(), Vec::new());
                for g in 0..heads.kv {
                    k.extend_from_slice(&values[t * columns + heads.key_column(g)..][..d]);
                    v.extend_from_slice(&values[t * columns + heads.value_column(g)..][..d]);
                }
                let (slots, bytes) = (cache.keys.dims()[0], [slots_of(&cache.keys), kv_columns]);
                assert!(span.slot < slots);
                store(&mut cache.keys.reshaped_mut(&bytes).rows_mut(row..row + 1), &k, Store::Assign);
                store(&mut cache.values.reshaped_mut(&bytes).rows_mut(row..row + 1), &v, Store::Assign);
            }
            let flat = [slots_of(&cache.keys), kv_columns];
            let present = first..first + span.past + span.rows.len();
            let keys = cache.keys.reshaped(&flat).rows(present.clone()).to_f32_vec();
            let cached_values = cache.values.reshaped(&flat).rows(present).to_f32_vec();
            for (i, t) in span.rows.clone().enumerate() {
                for head in 0..heads.query {
                    let group = head / heads.queries_per_kv();
                    let q = &values[t * columns + heads.query_column(head)..][..d];
                    let scores: Vec<f32> = (0..=span.past + i).map(|s| scale * dot(q, &keys[s * kv_columns + group * d..][..d])).collect();
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                    let row = &mut result[(t * heads.query + head) * d..][..d];
                    row.fill(0.0);
                    for (s, score) in scores.iter().enumerate() {
                        let p = (score - max).exp() / sum;
                        let v = &cached_values[s * kv_columns + group * d..][..d];
                        row.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                    }
                }
            }
        }
        store(out, &result, Store::Assign);
    }

    fn activation(&self, out: &mut Tensor, x: &Tensor, kind: Activation) {
        let x = x.to_f32_vec();
        let values: Vec<f32> = match kind {
            Activation::SquaredRelu => x.iter().map(|v| v.max(0.0) * v.max(0.0)).collect(),
            Activation::Swiglu => x.chunks_exact(2).map(|v| v[0] / (1.0 + (-v[0]).exp()) * v[1]).collect(),
        };
        store(out, &values, Store::Assign);
    }

    fn activation_backward(&self, dx: &mut Tensor, dout: &Tensor, x: &Tensor, kind: Activation) {
        let (dout, x) = (dout.to_f32_vec(), x.to_f32_vec());
        let values: Vec<f32> = match kind {
            Activation::SquaredRelu => x.iter().zip(&dout).map(|(v, d)| 2.0 * v.max(0.0) * d).collect(),
            Activation::Swiglu => {
                let pair = |(v, d): (&[f32], &f32)| {
                    let sigmoid = 1.0 / (1.0 + (-v[0]).exp());
                    [d * v[1] * sigmoid * (1.0 + v[0] * (1.0 - sigmoid)), d * v[0] * sigmoid]
                };
                x.chunks_exact(2).zip(&dout).flat_map(pair).collect()
            }
        };
        store(dx, &values, Store::Assign);
    }

    fn cross_entropy_max(&self, max: &mut Tensor, logits: &Tensor, n_valid: usize) {
        let values = logits.to_f32_vec();
        for (max, row) in max.f32_mut().iter_mut().zip(values.chunks_exact(logits.row_len())) {
            *max = row[..n_valid].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        }
    }

    fn cross_entropy_sum(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        let values = logits.to_f32_vec();
        for (t, row) in values.chunks_exact(logits.row_len()).enumerate() {
            sum.f32_mut()[t] = row[..n_valid].iter().map(|v| (v - max.f32()[t]).exp()).sum();
            let column = (targets.u32()[t] as usize).checked_sub(first_row).filter(|c| *c < n_valid);
            target_logit.f32_mut()[t] = column.map_or(0.0, |c| row[c]);
        }
    }

    fn cross_entropy_gradient(
        &self,
        logits: &mut Tensor,
        max: &Tensor,
        sum: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        let columns = logits.row_len();
        let mut values = logits.to_f32_vec();
        for (t, row) in values.chunks_exact_mut(columns).enumerate() {
            let weight = weights.f32()[t];
            if weight == 0.0 {
                row.fill(0.0);
                continue;
            }
            let (max, sum) = (max.f32()[t], sum.f32()[t]);
            let target = (targets.u32()[t] as usize).checked_sub(first_row);
            for (i, v) in row.iter_mut().enumerate() {
                let one = if Some(i) == target { 1.0 } else { 0.0 };
                *v = if i < n_valid { weight * ((*v - max).exp() / sum - one) } else { 0.0 };
            }
        }
        store(logits, &values, Store::Assign);
    }

    fn adamw(&self, shard: AdamwShard<'_>, how: Adamw) {
        let (m, v, master) = (shard.m.f32_mut(), shard.v.f32_mut(), shard.master.f32_mut());
        let m_scale = (1.0 / (1.0 - f64::from(how.beta1).powi(how.step as i32))) as f32;
        let v_scale = (1.0 / (1.0 - f64::from(how.beta2).powi(how.step as i32))) as f32;
        for (i, g) in shard.grad.f32().iter().enumerate() {
            let g = g * how.grad_scale;
            m[i] = how.beta1 * m[i] + (1.0 - how.beta1) * g;
            v[i] = how.beta2 * v[i] + (1.0 - how.beta2) * g * g;
            let update = m[i] * m_scale / ((v[i] * v_scale).sqrt() + how.eps);
            master[i] -= how.lr * (update + how.weight_decay * master[i]);
        }
        store(shard.weight, master, Store::Assign);
    }
}

fn slots_of(cache: &Tensor) -> usize {
    cache.dims()[0] * cache.dims()[1]
}
