//! A prompt's pass by its operations: each by itself, with the weights and caches of all layers in turn, as a pass asks for them.

use std::time::Instant;
use trireme::device::{CacheSpan, Device, Heads, KvCache, Norm};
use trireme::model::chunk::Chunk;
use trireme::model::param::Param;
use trireme::tensor::DType;

/// Repetitions, of which the best counts.
const REPETITIONS: usize = 20;

/// A pass over a prompt in these pages of these caches.
pub struct Prompt<'a> {
    pub device: &'a dyn Device,
    pub chunk: &'a Chunk,
    pub caches: &'a mut [KvCache],
    pub pages: Vec<u32>,
    pub n_tokens: usize,
}

impl Prompt<'_> {
    /// Prints a table of the seconds of each operation, all layers together, over those of the pass, and of its products over the rate
    /// of a large one.
    pub fn table(&mut self, pass_s: f64, gemm_flops_per_s: f64) {
        let (t, config, dtype) = (self.n_tokens, self.chunk.config().clone(), self.chunk.dtype());
        let heads = Heads { query: config.n_heads, kv: config.n_kv_heads, dim: config.head_dim };
        let device = self.device;
        let new = |rows: usize, columns: usize, dtype| device.alloc(&[rows, columns], dtype).unwrap_or_else(|error| panic!("{error}"));
        let random = |columns: usize| {
            let mut tensor = new(t, columns, dtype);
            let values: Vec<f32> = (0..t * columns).map(|i| (i * 7919 % 1013) as f32 / 500.0 - 1.0).collect();
            let mut wide = new(t, columns, DType::F32);
            device.upload(bytemuck::cast_slice(&values), &mut wide);
            device.copy(&mut tensor, &wide);
            tensor
        };
        let mut positions = new(t, 1, DType::U32);
        device.upload(bytemuck::cast_slice(&(0..t as u32).collect::<Vec<u32>>()), &mut positions);
        let spans = [CacheSpan { rows: 0..t, past: 0, pages: self.pages.clone() }];
        println!("\n| {t} tokens | us | of the pass | of the GEMM ceiling |\n|---|---:|---:|---:|");
        let mut total_s = 0.0;
        let mut line = |name: &str, flops: f64, work: &mut (dyn FnMut() + Send)| {
            let best_s = (0..REPETITIONS).map(|_| seconds(device, work)).fold(f64::INFINITY, f64::min);
            total_s += best_s;
            let rate = if flops > 0.0 { format!("{:.2}", flops / best_s / gemm_flops_per_s) } else { "-".into() };
            println!("| {name} | {:.0} | {:.2} | {rate} |", 1e6 * best_s, best_s / pass_s);
        };
        for (name, n_rows) in [("qkv", t), ("out", t), ("up", t), ("down", t), ("head", 1)] {
            let mut weights = self.chunk.params();
            weights.retain(|param: &&Param| param.packed.is_some() && param.spec.name.ends_with(&format!("{name}.weight")));
            let [outputs, inputs] = [0, 1].map(|dim| weights[0].spec.shape[dim]);
            let (x, mut y) = (random(inputs), new(n_rows, outputs, dtype));
            let flops = 2.0 * (weights.len() * n_rows * outputs * inputs) as f64;
            let packing = device.packed().expect("the weights are packed");
            line(&format!("{name} {outputs} x {inputs}"), flops, &mut || {
                for weight in weights.iter().filter_map(|param| param.packed.as_ref()) {
                    packing.multiply(&mut y, &x.rows(0..n_rows), weight);
                }
            });
        }
        let (mut qkv, mut mixed) = (random(heads.qkv_columns()), new(t, heads.query * heads.dim, dtype));
        let scores = (t * (t + 1) / 2 * config.n_layers * heads.query * heads.dim) as f64;
        line("attention", 4.0 * scores, &mut || {
            for cache in self.caches.iter_mut() {
                device.attention_cached(&mut mixed, &qkv, cache, &spans, heads);
            }
        });
        let rope = config.rope();
        line("rope", 0.0, &mut || (0..config.n_layers).for_each(|_| device.rope(&mut qkv, &positions, heads, rope)));
        let (mut x, delta, mut normed, mut stats) =
            (random(config.hidden), random(config.hidden), random(config.hidden), new(t, 2, DType::F32));
        let (gain, how) = (new(1, config.hidden, dtype), Norm { kind: config.norm, eps: config.norm_eps });
        line("residual + norm", 0.0, &mut || {
            (0..2 * config.n_layers).for_each(|_| device.add_norm(&mut x, &delta, &mut normed, &mut stats, &gain, None, how));
        });
        let (raised, mut activated) = (random(config.ffn_hidden * config.activation.inputs_per_output()), random(config.ffn_hidden));
        line("activation", 0.0, &mut || {
            (0..config.n_layers).for_each(|_| device.activation(&mut activated, &raised, config.activation));
        });
        println!("| all | {:.0} | {:.2} | - |", 1e6 * total_s, total_s / pass_s);
    }
}

fn seconds(device: &dyn Device, work: &mut (dyn FnMut() + Send)) -> f64 {
    let started = Instant::now();
    device.run_together(work);
    device.finish();
    started.elapsed().as_secs_f64()
}
