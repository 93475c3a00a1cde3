//! The CPU device: host memory, rayon over rows and tiles, vector instructions chosen at run time.
//!
//! This file checks shapes, chooses the element type and splits the work; the arithmetic is in the files below it. Small
//! operations stay on the calling thread. Row operations, `sum_squares`, `norm_backward`, `embed_backward` and attention do not
//! depend on the number of threads.

mod attention;
mod attention_backward;
mod attention_cached;
mod canonical;
mod elementwise;
pub mod exponentials;
mod few_rows;
pub mod fp8;
mod lanes;
mod loss;
mod matmul;
mod norm;
mod packed;
mod panels;
mod parallel;
mod product;
mod rope;
mod team;
mod terms;

use super::canonical::CanonicalSums;
use super::packed::PackedProducts;
use super::{
    Activation, Adamw, AdamwShard, CacheSpan, Device, Fp8Axis, Fp8Scales, Gemm, Heads, KvCache, MemoryUse, Norm, Rope, assert_joins,
};
use crate::error::{Error, Kind, Result};
use crate::tensor::{Areas, DType, Tensor};
use lanes::{elements, elements_mut};
use parallel::{GRAIN, Pool, Shared, for_ranges, for_rows};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use team::Team;

pub(crate) use lanes::Element;
pub use lanes::Isa;
pub use parallel::for_tasks;

/// Runs the expression with `$E` the Rust type of a dtype.
macro_rules! float {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $E = f32;
                $body
            }
            DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            DType::U32 | DType::F8E4M3 => panic!("an operation on floats was given {}", $dtype.name()),
        }
    };
}
use float;

/// The host as a device. As many threads as the rayon pool it is called in has (the global one, unless the caller is in another).
pub struct Cpu {
    isa: Isa,
    areas: Arc<Areas>,
    live_bytes: Arc<AtomicUsize>,
    peak_bytes: AtomicUsize,
    n_allocations: AtomicUsize,
    rope_tables: rope::Tables,
    orders: packed::Orders,
    passing: Mutex<packed::Passing>,
    pool: Pool,
    team: Team,
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu::new()
    }
}

impl Cpu {
    /// Uses the best instructions there are.
    pub fn new() -> Cpu {
        Cpu::with_isa(Isa::detect())
    }

    /// Uses these instructions at most; for tests of the fallbacks.
    pub fn with_isa(isa: Isa) -> Cpu {
        Cpu {
            isa: isa.min(Isa::detect()),
            areas: Arc::default(),
            live_bytes: Arc::default(),
            peak_bytes: AtomicUsize::new(0),
            n_allocations: AtomicUsize::new(0),
            rope_tables: rope::Tables::default(),
            orders: packed::Orders::default(),
            passing: Mutex::default(),
            pool: Pool::default(),
            team: Team::default(),
        }
    }
}

/// Rows of a tensor as `h`-element slices must be.
fn assert_rows(what: &str, tensors: &[&Tensor], n_rows: usize, row_len: usize) {
    for tensor in tensors {
        assert!(tensor.n_rows() == n_rows && tensor.row_len() == row_len, "{what}: {tensor:?} is not [{n_rows}, {row_len}]");
    }
}

/// Starts of sequences and their end as the trait says.
fn assert_sequences(what: &str, starts: &[usize], n_tokens: usize) {
    let ends = (starts.first(), starts.last());
    assert!(ends == (Some(&0), Some(&n_tokens)) && starts.is_sorted(), "{what}: sequence starts {starts:?} of {n_tokens} tokens");
}

impl Device for Cpu {
    fn canonical(&self) -> Option<&dyn CanonicalSums> {
        Some(self)
    }

    fn packed(&self) -> Option<&dyn PackedProducts> {
        Some(self)
    }

    fn name(&self) -> String {
        let n = rayon::current_num_threads();
        format!("cpu, {n} thread{}, {}", if n == 1 { "" } else { "s" }, self.isa.name())
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let live = Arc::clone(&self.live_bytes);
        let on_drop = Arc::new(move |bytes| {
            live.fetch_sub(bytes, Ordering::Relaxed);
        });
        let bytes = (shape.iter().product::<usize>() * dtype.bytes()).max(64);
        let held = self.live_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let Some(tensor) = Tensor::host_in(&self.areas, shape, dtype, Some(on_drop)) else {
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

    fn run_together(&self, work: &mut (dyn FnMut() + Send)) {
        let n_threads = rayon::current_num_threads();
        if n_threads == 1 || team::leads() {
            return work();
        }
        if !self.team.lead(n_threads, work) {
            // One of the pool's own threads keeps the others awake from one operation to the next; from outside each is a wake-up of all.
            rayon::scope(|_| work());
        }
    }

    fn fill_zero(&self, x: &mut Tensor) {
        let bytes = x.bytes_mut();
        let (n, shared) = (bytes.len(), Shared::new(bytes));
        // SAFETY: the ranges are disjoint.
        for_ranges(n, 8 * GRAIN, |range| unsafe { shared.part(range) }.fill(0));
    }

    fn copy(&self, out: &mut Tensor, x: &Tensor) {
        assert_eq!(out.n_elements(), x.n_elements(), "copy {x:?} to {out:?}");
        if out.dtype() == x.dtype() {
            let (from, to) = (x.bytes(), Shared::new(out.bytes_mut()));
            // SAFETY: the ranges are disjoint.
            for_ranges(from.len(), 8 * GRAIN, |range| unsafe { to.part(range.clone()) }.copy_from_slice(&from[range]));
            return;
        }
        float!(out.dtype(), O => float!(x.dtype(), X => {
            let (from, to) = (elements::<X>(x), Shared::new(elements_mut::<O>(out)));
            for_ranges(from.len(), GRAIN, |range| {
                // SAFETY: the ranges are disjoint.
                elementwise::convert(self.isa, unsafe { to.part(range.clone()) }, &from[range]);
            });
        }));
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        assert_eq!(x.n_elements(), y.n_elements(), "add {y:?} to {x:?}");
        float!(x.dtype(), X => float!(y.dtype(), Y => {
            let (from, to) = (elements::<Y>(y), Shared::new(elements_mut::<X>(x)));
            for_ranges(from.len(), GRAIN, |range| {
                // SAFETY: the ranges are disjoint.
                elementwise::add(self.isa, unsafe { to.part(range.clone()) }, &from[range]);
            });
        }));
    }

    fn join_columns(&self, out: &mut Tensor, parts: &Tensor) {
        assert_joins(out, parts);
        let (t, row, part) = (out.n_rows(), out.row_len() * out.dtype().bytes(), parts.row_len() * parts.dtype().bytes());
        let (from, out) = (parts.bytes(), Shared::new(out.bytes_mut()));
        for_rows(t, row, |rows| {
            // SAFETY: the ranges are disjoint.
            let out = unsafe { out.part(rows.start * row..rows.end * row) };
            for (out, at) in out.chunks_exact_mut(row).zip(rows) {
                for (idx, out) in out.chunks_mut(part).enumerate() {
                    let before = (idx * part).saturating_sub(row - part);
                    out.copy_from_slice(&from[(idx * t + at) * part + before..][..out.len()]);
                }
            }
        });
    }

    fn scale(&self, x: &mut Tensor, factor: f32) {
        let n = x.n_elements();
        float!(x.dtype(), X => {
            let shared = Shared::new(elements_mut::<X>(x));
            // SAFETY: the ranges are disjoint.
            for_ranges(n, GRAIN, |range| elementwise::scale(self.isa, unsafe { shared.part(range) }, factor));
        });
    }

    fn sum_squares(&self, x: &Tensor) -> f64 {
        const BLOCK: usize = 4096;
        let x = x.f32();
        let mut sums = vec![0.0f64; x.len().div_ceil(BLOCK)];
        let (n, shared) = (sums.len(), Shared::new(&mut sums));
        for_ranges(n, 2 * GRAIN / BLOCK, |blocks| {
            // SAFETY: the ranges are disjoint.
            for (sum, block) in unsafe { shared.part(blocks.clone()) }.iter_mut().zip(x[blocks.start * BLOCK..].chunks(BLOCK)) {
                *sum = elementwise::sum_squares(self.isa, block);
            }
        });
        sums.iter().sum()
    }

    fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        matmul::gemm(self.isa, &self.pool, out, a, b, how);
    }

    fn check_fp8(&self, _scales: Fp8Scales) -> Result<()> {
        Ok(())
    }

    fn fp8_sizes(&self, sizes: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        fp8::sizes(sizes, x, of);
    }

    fn fp8_round(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        fp8::round(out, scale, x, of);
    }

    fn fp8_widen(&self, out: &mut Tensor, codes: &Tensor, scale: &Tensor) {
        fp8::widen(out, codes, scale);
    }

    fn gemm_fp8(&self, out: &mut Tensor, a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) {
        fp8::gemm(self, out, a, b);
    }

    fn embed(&self, out: &mut Tensor, tokens: &Tensor, table: &Tensor, first_row: usize) {
        let h = table.row_len();
        assert_rows("embed", &[out], tokens.n_elements(), h);
        let tokens = tokens.u32();
        float!(table.dtype(), E => {
            let (table, out) = (elements::<E>(table), Shared::new(elements_mut::<E>(out)));
            for_rows(tokens.len(), h, |rows| {
                // SAFETY: the ranges are disjoint.
                let out = unsafe { out.part(rows.start * h..rows.end * h) };
                for (row, token) in out.chunks_exact_mut(h).zip(&tokens[rows]) {
                    match (*token as usize).checked_sub(first_row).filter(|at| (at + 1) * h <= table.len()) {
                        Some(at) => row.copy_from_slice(&table[at * h..][..h]),
                        None => row.fill(E::from_f32(-0.0)),
                    }
                }
            });
        });
    }

    fn embed_backward(&self, dtable: &mut Tensor, dout: &Tensor, tokens: &Tensor, first_row: usize) {
        let (n_rows, h, tokens) = (dtable.n_rows(), dtable.row_len(), tokens.u32());
        assert_rows("embed_backward", &[dout], tokens.len(), h);
        let dtable = Shared::new(dtable.f32_mut());
        float!(dout.dtype(), E => {
            let dout = elements::<E>(dout);
            // Each task owns some columns of all rows, so every sum is in token order.
            for_ranges(h, (GRAIN / tokens.len().max(1)).max(64), |columns| {
                for (t, token) in tokens.iter().enumerate() {
                    if let Some(at) = (*token as usize).checked_sub(first_row).filter(|at| *at < n_rows) {
                        // SAFETY: no other task has these columns.
                        let to = unsafe { dtable.part(at * h + columns.start..at * h + columns.end) };
                        elementwise::add(self.isa, to, &dout[t * h..][columns.clone()]);
                    }
                }
            });
        });
    }

    fn norm(&self, out: &mut Tensor, stats: &mut Tensor, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, how: Norm) {
        let (t, h) = (x.n_rows(), gain.n_elements());
        assert_rows("norm", &[x, out], t, h);
        assert_rows("norm", &[stats], t, 2);
        float!(x.dtype(), E => {
            let (x, gain, bias) = (elements::<E>(x), elements::<E>(gain), bias.map(elements::<E>));
            let (out, stats) = (Shared::new(elements_mut::<E>(out)), Shared::new(stats.f32_mut()));
            for_rows(t, h, |rows| {
                let at = rows.start * h..rows.end * h;
                // SAFETY: the ranges are disjoint.
                let (out, stats) = unsafe { (out.part(at.clone()), stats.part(rows.start * 2..rows.end * 2)) };
                norm::forward(self.isa, out, stats, &x[at], gain, bias, how);
            });
        });
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
        let (t, h) = (x.n_rows(), gain.n_elements());
        assert_rows("add_norm", &[x, delta, out], t, h);
        assert_rows("add_norm", &[stats], t, 2);
        float!(x.dtype(), E => {
            let (delta, gain, bias) = (elements::<E>(delta), elements::<E>(gain), bias.map(elements::<E>));
            let (x, out) = (Shared::new(elements_mut::<E>(x)), Shared::new(elements_mut::<E>(out)));
            let stats = Shared::new(stats.f32_mut());
            for_rows(t, h, |rows| {
                let at = rows.start * h..rows.end * h;
                // SAFETY: the ranges are disjoint.
                let (x, out) = unsafe { (x.part(at.clone()), out.part(at.clone())) };
                // SAFETY: as above.
                let stats = unsafe { stats.part(rows.start * 2..rows.end * 2) };
                norm::add_forward(self.isa, x, &delta[at], out, stats, gain, bias, how);
            });
        });
    }

    fn norm_backward(
        &self,
        dx: &mut Tensor,
        dgain: &mut Tensor,
        dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        gain: &Tensor,
        stats: &Tensor,
        how: Norm,
    ) {
        let (t, h) = (x.n_rows(), gain.n_elements());
        assert_rows("norm_backward", &[dx, dy, x], t, h);
        assert_rows("norm_backward", &[stats], t, 2);
        let n_blocks = t.div_ceil(norm::BACKWARD_ROWS);
        let mut partial = self.pool.take(n_blocks * 2 * h);
        let sums = Shared::new(&mut partial);
        float!(x.dtype(), E => {
            let (dy, x, gain, stats) = (elements::<E>(dy), elements::<E>(x), elements::<E>(gain), stats.f32());
            let dx = Shared::new(elements_mut::<E>(dx));
            for_tasks(n_blocks, t * h, |block| {
                let rows = block * norm::BACKWARD_ROWS..((block + 1) * norm::BACKWARD_ROWS).min(t);
                let at = rows.start * h..rows.end * h;
                // SAFETY: each block has its own rows and its own sums.
                let (dx, sums) = unsafe { (dx.part(at.clone()), sums.part(block * 2 * h..(block + 1) * 2 * h)) };
                let (dgain, dbias) = sums.split_at_mut(h);
                let stats = &stats[rows.start * 2..rows.end * 2];
                norm::backward(self.isa, dx, dgain, dbias, &dy[at.clone()], &x[at], gain, stats, how);
            });
        });
        for sums in partial.chunks_exact(2 * h) {
            elementwise::add(self.isa, dgain.f32_mut(), &sums[..h]);
        }
        if let Some(dbias) = dbias {
            for sums in partial.chunks_exact(2 * h) {
                elementwise::add(self.isa, dbias.f32_mut(), &sums[h..]);
            }
        }
    }

    fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope) {
        let (t, columns, positions) = (qkv.n_rows(), heads.qkv_columns(), positions.u32());
        assert_rows("rope", &[qkv], positions.len(), columns);
        assert!(how.rotary_dims % 2 == 0 && how.rotary_dims <= heads.dim, "{how:?} of {heads:?}");
        if how.rotary_dims == 0 || t == 0 {
            return;
        }
        let table = self.rope_tables.get(positions, how);
        float!(qkv.dtype(), E => {
            let qkv = Shared::new(elements_mut::<E>(qkv));
            for_rows(t, columns, |rows| {
                // SAFETY: the ranges are disjoint.
                let qkv = unsafe { qkv.part(rows.start * columns..rows.end * columns) };
                rope::rotate(self.isa, qkv, &positions[rows], table.values(), heads, how);
            });
        });
    }

    fn attention(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads) {
        self.attention_from(out, lse, qkv, sequence_starts, &vec![0; sequence_starts.len().saturating_sub(1)], heads);
    }

    fn attention_from(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], wanted: &[usize], heads: Heads) {
        assert_rows("attention", &[qkv], qkv.n_rows(), heads.qkv_columns());
        assert_rows("attention", &[out], qkv.n_rows(), heads.query * heads.dim);
        assert_sequences("attention", sequence_starts, qkv.n_rows());
        assert_eq!(lse.n_elements(), heads.query * qkv.n_rows(), "attention: {lse:?} for {heads:?}");
        assert_eq!(wanted.len() + 1, sequence_starts.len(), "attention: {wanted:?} of {sequence_starts:?}");
        float!(qkv.dtype(), E => {
            let (out, lse, qkv) = (elements_mut::<E>(out), lse.f32_mut(), elements::<E>(qkv));
            attention::attention(self.isa, &self.pool, out, lse, qkv, (sequence_starts, wanted, heads));
        });
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
        assert_rows("attention_backward", &[qkv, dqkv], qkv.n_rows(), heads.qkv_columns());
        assert_rows("attention_backward", &[out, dout], qkv.n_rows(), heads.query * heads.dim);
        assert_sequences("attention_backward", sequence_starts, qkv.n_rows());
        assert_eq!(lse.n_elements(), heads.query * qkv.n_rows(), "attention_backward: {lse:?} for {heads:?}");
        float!(qkv.dtype(), E => {
            let (dout, out, lse, qkv) = (elements::<E>(dout), elements::<E>(out), lse.f32(), elements::<E>(qkv));
            let inputs = attention_backward::Inputs { dout, out, lse, qkv, starts: sequence_starts, heads };
            attention_backward::attention_backward(self.isa, &self.pool, elements_mut::<E>(dqkv), &inputs);
        });
    }

    fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads) {
        cache.assert_fits(qkv, spans, heads);
        assert_rows("attention_cached", &[qkv], qkv.n_rows(), heads.qkv_columns());
        assert_rows("attention_cached", &[out], qkv.n_rows(), heads.query * heads.dim);
        float!(qkv.dtype(), E => {
            let (keys, values) = (elements_mut::<E>(&mut cache.keys), elements_mut::<E>(&mut cache.values));
            let cache = attention_cached::Cache { keys, values };
            let (out, qkv) = (elements_mut::<E>(out), elements::<E>(qkv));
            attention_cached::attention_cached(self.isa, &self.pool, out, qkv, cache, (spans, heads));
        });
    }

    fn attention_comes(&self, cache: &KvCache, spans: &[CacheSpan]) {
        attention_cached::fetch_places(cache, spans);
        self.passing.lock().expect("no panic under the lock").between = attention_cached::first_reads(cache, spans);
    }

    fn activation(&self, out: &mut Tensor, x: &Tensor, kind: Activation) {
        let (n, inputs) = (out.n_elements(), kind.inputs_per_output());
        assert_eq!(x.n_elements(), n * inputs, "activation {kind:?} of {x:?} to {out:?}");
        float!(x.dtype(), E => {
            let (x, out) = (elements::<E>(x), Shared::new(elements_mut::<E>(out)));
            for_ranges(n, GRAIN / inputs, |range| {
                let x = &x[range.start * inputs..range.end * inputs];
                // SAFETY: the ranges are disjoint.
                let out = unsafe { out.part(range) };
                match kind {
                    Activation::SquaredRelu => elementwise::squared_relu(self.isa, out, x),
                    Activation::Swiglu => elementwise::swiglu(self.isa, out, x),
                }
            });
        });
    }

    fn activation_backward(&self, dx: &mut Tensor, dout: &Tensor, x: &Tensor, kind: Activation) {
        let (n, inputs) = (dout.n_elements(), kind.inputs_per_output());
        assert!(x.n_elements() == n * inputs && dx.n_elements() == n * inputs, "activation {kind:?}: {dx:?} from {dout:?}, {x:?}");
        float!(x.dtype(), E => {
            let (x, dout, dx) = (elements::<E>(x), elements::<E>(dout), Shared::new(elements_mut::<E>(dx)));
            for_ranges(n, GRAIN / inputs, |range| {
                let at = range.start * inputs..range.end * inputs;
                // SAFETY: the ranges are disjoint.
                let dx = unsafe { dx.part(at.clone()) };
                match kind {
                    Activation::SquaredRelu => elementwise::squared_relu_backward(self.isa, dx, &dout[range], &x[at]),
                    Activation::Swiglu => elementwise::swiglu_backward(self.isa, dx, &dout[range], &x[at]),
                }
            });
        });
    }

    fn cross_entropy_max(&self, max: &mut Tensor, logits: &Tensor, n_valid: usize) {
        loss::maxima(self.isa, max, logits, n_valid);
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
        loss::sums(self.isa, [sum, target_logit], logits, max, targets, (first_row, n_valid));
    }

    fn cross_entropy_forward(
        &self,
        max: &mut Tensor,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        loss::forward(self.isa, [max, sum, target_logit], logits, targets, (first_row, n_valid));
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
        loss::gradient(self.isa, logits, [max, sum, targets, weights], (first_row, n_valid));
    }

    fn adamw(&self, shard: AdamwShard<'_>, how: Adamw) {
        let n = shard.grad.n_elements();
        let all = [&*shard.master, &*shard.m, &*shard.v, &*shard.weight];
        assert!(all.iter().all(|x| x.n_elements() == n), "adamw of {:?} with {all:?}", shard.grad);
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(how.step as f64))) as f32;
        let (m_scale, v_scale) = (correction(how.beta1), correction(how.beta2));
        let (master, m, v) = (Shared::new(shard.master.f32_mut()), Shared::new(shard.m.f32_mut()), Shared::new(shard.v.f32_mut()));
        let grad = shard.grad.f32();
        float!(shard.weight.dtype(), W => {
            let weight = Shared::new(elements_mut::<W>(shard.weight));
            for_ranges(n, GRAIN, |range| {
                // SAFETY: the ranges are disjoint.
                let (master, m) = unsafe { (master.part(range.clone()), m.part(range.clone())) };
                // SAFETY: as above.
                let (v, weight) = unsafe { (v.part(range.clone()), weight.part(range.clone())) };
                elementwise::adamw(self.isa, master, m, v, &grad[range], weight, &how, m_scale, v_scale);
            });
        });
    }
}
