//! The trait `Device` for `Cuda`: memory stands here, operations are forwarded to the launchers of the same name in the files
//! of their noun.

use super::{Cuda, Memory};
use crate::device::canonical::CanonicalSums;
use crate::device::{
    Activation, Adamw, AdamwShard, CacheSpan, Device, Draw, Drawn, Fp8Axis, Fp8Scales, Gemm, Heads, KvCache, MemoryUse, Norm, NormOf,
    Recording, Rope,
};
use crate::error::{Error, Kind, Result};
use crate::tensor::{DType, Tensor};
use std::sync::atomic::Ordering;

impl Device for Cuda {
    fn name(&self) -> String {
        format!("cuda, {}", self.backend.name())
    }

    fn canonical(&self) -> Option<&dyn CanonicalSums> {
        Some(self)
    }

    fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = (shape.iter().product::<usize>() * dtype.bytes()).max(64);
        let Some(memory) = Memory::new(self, bytes) else {
            let live = self.memory().live_bytes;
            let wrong = format!("out of device memory: {bytes} bytes for a tensor {shape:?}, {live} bytes are in use");
            return Err(Error::new(Kind::Other, wrong).remedy("use a smaller micro-batch or model, or more ranks"));
        };
        self.backend.zero(memory.address, bytes);
        self.use_of_memory.n_tensors.fetch_add(1, Ordering::Relaxed);
        Ok(Tensor::foreign(shape, dtype, Box::new(memory)))
    }

    fn upload(&self, host: &[u8], to: &mut Tensor) {
        assert_eq!(host.len(), to.n_bytes(), "upload to {to:?}");
        if !host.is_empty() {
            self.backend.upload(host, Cuda::address(to));
        }
    }

    fn download(&self, from: &Tensor, host: &mut [u8]) {
        assert_eq!(host.len(), from.n_bytes(), "download of {from:?}");
        if !host.is_empty() {
            self.backend.download(Cuda::address(from), host);
        }
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            live_bytes: self.use_of_memory.live_bytes.load(Ordering::Relaxed),
            peak_bytes: self.use_of_memory.peak_bytes.load(Ordering::Relaxed),
            n_allocations: self.use_of_memory.n_tensors.load(Ordering::Relaxed),
        }
    }

    fn finish(&self) {
        self.backend.finish();
    }

    fn records(&self) -> bool {
        true
    }

    fn record(&self, work: &mut dyn FnMut()) -> Option<Box<dyn Recording>> {
        self.record_work(work)
    }

    fn fill_zero(&self, x: &mut Tensor) {
        if x.n_bytes() > 0 {
            self.backend.zero(Cuda::address(x), x.n_bytes());
        }
    }

    fn copy(&self, out: &mut Tensor, x: &Tensor) {
        self.copy(out, x);
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        self.add(x, y);
    }

    fn join_columns(&self, out: &mut Tensor, parts: &Tensor) {
        self.join_columns(out, parts);
    }

    fn scale(&self, x: &mut Tensor, factor: f32) {
        self.scale(x, factor);
    }

    fn sum_squares(&self, x: &Tensor) -> f64 {
        self.sum_squares_of(&[x])
    }

    fn sum_squares_of(&self, all: &[&Tensor]) -> f64 {
        self.sum_squares_of(all)
    }

    fn gemm(&self, out: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) {
        self.gemm(out, a, b, how);
    }

    fn check_fp8(&self, scales: Fp8Scales) -> Result<()> {
        self.check_fp8(scales)
    }

    fn fp8_sizes(&self, sizes: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        self.fp8_sizes(sizes, x, of);
    }

    fn fp8_round(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        self.fp8_round(out, scale, x, of);
    }

    fn quantise(&self, out: &mut Tensor, scale: &mut Tensor, x: &Tensor, of: Fp8Axis) {
        self.quantise(out, scale, x, of);
    }

    fn fp8_widen(&self, out: &mut Tensor, codes: &Tensor, scale: &Tensor) {
        self.fp8_widen(out, codes, scale);
    }

    fn gemm_fp8(&self, out: &mut Tensor, a: (&Tensor, &Tensor), b: (&Tensor, &Tensor)) {
        self.gemm_fp8(out, a, b);
    }

    fn embed(&self, out: &mut Tensor, tokens: &Tensor, table: &Tensor, first_row: usize) {
        self.embed(out, tokens, table, first_row);
    }

    fn embed_backward(&self, dtable: &mut Tensor, dout: &Tensor, tokens: &Tensor, first_row: usize) {
        self.embed_backward(dtable, dout, tokens, first_row);
    }

    fn norm(&self, out: &mut Tensor, stats: &mut Tensor, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, how: Norm) {
        self.norm(out, stats, x, gain, bias, how);
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
        self.add_norm(x, delta, out, stats, gain, bias, how);
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
        self.norm_backward(dx, dgain, dbias, dy, x, gain, stats, how);
    }

    fn rope(&self, qkv: &mut Tensor, positions: &Tensor, heads: Heads, how: Rope) {
        self.rope(qkv, positions, heads, how);
    }

    fn attention(&self, out: &mut Tensor, lse: &mut Tensor, qkv: &Tensor, sequence_starts: &[usize], heads: Heads) {
        self.attention(out, lse, qkv, sequence_starts, heads);
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
        self.attention_backward(dqkv, dout, out, lse, qkv, sequence_starts, heads);
    }

    fn attention_rope_backward(
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
        self.attention_rope_backward(dqkv, dout, out, lse, qkv, positions, sequence_starts, heads, how);
    }

    fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads) {
        self.attention_cached(out, qkv, cache, spans, heads);
    }

    fn rope_attention_cached(
        &self,
        out: &mut Tensor,
        qkv: &mut Tensor,
        positions: &Tensor,
        cache: &mut KvCache,
        spans: &[CacheSpan],
        heads: Heads,
        how: Rope,
    ) {
        self.rope_attention_cached(out, qkv, positions, cache, (spans, heads), how);
    }

    fn activation(&self, out: &mut Tensor, x: &Tensor, kind: Activation) {
        self.activation(out, x, kind);
    }

    fn gemm_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        self.gemm_activation(out, raised, x, w, kind);
    }

    fn gemm_and_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        self.gemm_and_activation(out, raised, x, w, kind);
    }

    fn takes_norms(&self, x: &Tensor, w: &Tensor) -> bool {
        self.takes_norms(x, w)
    }

    fn add_norm_gemm(&self, out: &mut Tensor, sum: &mut Tensor, of: [&Tensor; 2], norm: NormOf, w: &Tensor, kind: Option<Activation>) {
        self.add_norm_gemm(out, sum, of, norm, w, kind);
    }

    fn activation_backward(&self, dx: &mut Tensor, dout: &Tensor, x: &Tensor, kind: Activation) {
        self.activation_backward(dx, dout, x, kind);
    }

    fn gemm_activation_backward(
        &self,
        draised: &mut Tensor,
        dout: &mut Tensor,
        dy: &Tensor,
        w: &Tensor,
        raised: &Tensor,
        kind: Activation,
    ) {
        self.gemm_activation_backward(draised, dout, (dy, w), raised, kind);
    }

    fn cross_entropy_max(&self, max: &mut Tensor, logits: &Tensor, n_valid: usize) {
        self.cross_entropy_max(max, logits, n_valid);
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
        self.cross_entropy_sum(sum, target_logit, logits, max, targets, first_row, n_valid);
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
        self.cross_entropy_forward(max, sum, target_logit, logits, targets, first_row, n_valid);
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
        self.cross_entropy_gradient(logits, max, sum, targets, weights, first_row, n_valid);
    }

    fn sample(&self, logits: &Tensor, n_valid: usize, draws: &[Draw]) -> Option<Vec<Drawn>> {
        Some(self.sample(logits, n_valid, draws))
    }

    fn adamw(&self, shard: AdamwShard<'_>, how: Adamw) {
        self.adamw(shard, how);
    }
}
