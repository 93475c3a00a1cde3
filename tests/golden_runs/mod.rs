//! A model of tests/goldens run on any device: its logits, and three steps of training under any layout, held against the numbers
//! of transformers in float64.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use trireme::checkpoint::hf::{self, ExportType};
use trireme::checkpoint::{self, Meta, Piece, Wanted};
use trireme::comm::{Communicator, Groups, threads};
use trireme::device::{CacheSpan, Device, PAGE_TOKENS, Scratch};
use trireme::model::chunk::{CachedInput, CachedOutput, Chunk, MicroBatch, Purpose};
use trireme::model::config::Split;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::parallel::schedule::{self, Messages, PipelineShape};
use trireme::recipe::{LrDecay, Optimizer, ScheduleKind};
use trireme::tensor::{DType, Tensor};
use trireme::train::exchanges::{Exchanges, Overlap};
use trireme::train::executor::{self, Keep};
use trireme::train::optimizer::Update;
use trireme::train::state::TrainState;

/// Makes the device of a rank.
pub type Devices<'a> = &'a (dyn Fn() -> Box<dyn Device> + Sync);

pub const VARIANTS: [&str; 9] = [
    "nemotron-gqa",
    "nemotron-head-dim",
    "nemotron-rotary-full",
    "nemotron-tied",
    "llama",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "nemotron-yarn",
];

/// Tensors of a safetensors file as f64, with their shapes.
pub fn read_safetensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: &safetensors::tensor::TensorView| -> Vec<f64> {
        let words = view.data().chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).unwrap());
        match view.dtype() {
            safetensors::Dtype::F32 => words.map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            safetensors::Dtype::I32 => words.map(|b| f64::from(i32::from_le_bytes(b))).collect(),
            other => panic!("{other:?} in a golden file"),
        }
    };
    file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), values(&view)))).collect()
}

pub struct Golden {
    dir: PathBuf,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    /// Imported, as a checkpoint.
    checkpoint: PathBuf,
}

impl Golden {
    pub fn open(variant: &str, tmp: &Path) -> Golden {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(variant);
        let checkpoint = tmp.join(format!("{variant}-imported"));
        hf::import(&dir, &checkpoint).unwrap();
        Golden { tensors: read_safetensors(&dir.join("golden.safetensors")), dir, checkpoint }
    }

    /// Row `sample` as (inputs, targets).
    fn sample(&self, sample: usize) -> (Vec<u32>, Vec<u32>) {
        let (shape, tokens) = &self.tensors["tokens"];
        let row: Vec<u32> = tokens[sample * shape[1]..][..shape[1]].iter().map(|&token| token as u32).collect();
        (row[..row.len() - 1].to_vec(), row[1..].to_vec())
    }

    /// The samples in so many micro-batches (1 or 2), the loss being the mean over all their tokens.
    fn batches(&self, device: &dyn Device, n_micro: usize) -> Vec<MicroBatch> {
        let samples = [self.sample(0), self.sample(1)];
        samples.chunks(2 / n_micro).map(|samples| self.micro_batch(device, samples)).collect()
    }

    fn micro_batch(&self, device: &dyn Device, samples: &[(Vec<u32>, Vec<u32>)]) -> MicroBatch {
        let (n, n_samples) = (samples[0].0.len(), samples.len());
        let tokens: Vec<u32> = samples.iter().flat_map(|(tokens, _)| tokens.clone()).collect();
        let targets: Vec<u32> = samples.iter().flat_map(|(_, targets)| targets.clone()).collect();
        let positions: Vec<u32> = (0..n_samples).flat_map(|_| 0..n as u32).collect();
        let weights = vec![1.0 / (2 * n) as f32; tokens.len()];
        let starts = (0..=n_samples).map(|sample| sample * n).collect();
        MicroBatch::new(device, [&tokens, &targets, &positions], &weights, starts).unwrap()
    }
}

/// |a - b| over |b|, as vectors.
pub fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-30)
}

fn on_device(device: &dyn Device, values: &[u32]) -> Tensor {
    let mut tensor = device.alloc(&[values.len()], DType::U32).unwrap();
    device.upload(bytemuck::cast_slice(values), &mut tensor);
    tensor
}

/// All logits [2 * T, V] through the cached forward: one sequence at once, the other token by token.
fn logits(golden: &Golden, device: &dyn Device, dtype: DType) -> Vec<f64> {
    let scratch = Scratch::new();
    let world = trireme::comm::solo::Solo::new();
    let stored = checkpoint::open(&golden.checkpoint).unwrap();
    let config = stored.meta().model.clone();
    let at = Coords { tp: 0, pp: 0, dp: 0 };
    let mut chunk = Chunk::new(device, &config, &ParallelLayout::SINGLE, at, 0, dtype, Purpose::Inference).unwrap();
    for param in chunk.params_mut() {
        let (name, slice) = (format!("weights/{}", param.spec.name), param.slice.clone());
        stored.read(&mut [Wanted { name, slice, tensor: &mut param.value }]).unwrap();
    }
    let ctx = Ctx { device, tp: &world, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let n = golden.sample(0).0.len();
    let n_pages = n.div_ceil(PAGE_TOKENS);
    let mut caches = chunk.new_caches(device, 2 * n_pages).unwrap();
    let mut all = Vec::new();
    for (sample, pieces) in [(0, std::iter::once(0..n).collect::<Vec<_>>()), (1, (0..n).map(|t| t..t + 1).collect())] {
        let tokens = golden.sample(sample).0;
        let pages: Vec<u32> = (0..n_pages).map(|i| (2 * i + sample) as u32).collect();
        for piece in pieces {
            let input = on_device(device, &tokens[piece.clone()]);
            let positions: Vec<u32> = piece.clone().map(|t| t as u32).collect();
            let positions = on_device(device, &positions);
            let spans = [CacheSpan { rows: 0..piece.len(), past: piece.start, pages: pages.clone() }];
            let rows: Vec<usize> = (0..piece.len()).collect();
            match chunk.forward_cached(&ctx, CachedInput::Tokens(&input), &positions, &spans, &mut caches, &rows) {
                CachedOutput::Logits(logits) => {
                    let mut host = Tensor::host(logits.dims(), logits.dtype(), None).unwrap();
                    device.download(&logits, host.bytes_mut());
                    let values = host.to_f32_vec();
                    values.chunks(logits.row_len()).for_each(|row| all.extend(row[..config.vocab_size].iter().map(|&x| f64::from(x))));
                }
                CachedOutput::Hidden(_) => unreachable!(),
            }
        }
    }
    all
}

/// What three steps gave: the losses before each, the first gradients and the last weights under Hugging Face names.
pub struct Trained {
    losses: Vec<f64>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

/// How to train: layout and storage.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub layout: ParallelLayout,
    pub dtype: DType,
}

/// One rank's part of three AdamW steps as make.py does them; saves first gradients and last weights as checkpoints.
fn three_steps(golden: &Golden, device: &dyn Device, how: How, out: &Path, world: Box<dyn Communicator>) -> Vec<f64> {
    let layout = how.layout;
    let groups = Groups::new(world, layout);
    let scratch = Scratch::new();
    let stored = checkpoint::open(&golden.checkpoint).unwrap();
    let config = stored.meta().model.clone();
    let mut state = TrainState::new(device, &config, &groups, how.dtype).unwrap();
    for shard in state.chunks.iter().zip(&mut state.optimizer.shards).flat_map(|(chunk, shards)| chunk.params().into_iter().zip(shards)) {
        let (param, shard) = shard;
        let name = format!("weights/{}", param.spec.name);
        stored.read(&mut [Wanted { name, slice: shard.slice.clone(), tensor: &mut shard.master }]).unwrap();
    }
    state.optimizer.publish_weights(device, &scratch, &mut state.chunks, &groups);
    // As many micro-batches as stages, at most one a sample.
    let n_micro = layout.pp.min(2);
    let batches = golden.batches(device, n_micro);
    let kind = if layout.vp > 1 { ScheduleKind::Interleaved } else { ScheduleKind::OneFOneB };
    let schedule = schedule::training(kind, PipelineShape { pp: layout.pp, vp: layout.vp, n_micro }, Messages::Ahead).unwrap();
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Sharded, numerics: Numerics::Fast };
    let settings = Optimizer {
        lr: 1e-2,
        min_lr: 1e-2,
        warmup_samples: 0,
        decay: LrDecay::Constant,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-4,
        weight_decay: 0.1,
    };
    let mut exchanges = Exchanges::new(&groups, Overlap::WithComputation);
    let mut losses = Vec::new();
    for step in 1..=3 {
        let TrainState { chunks, optimizer, .. } = &mut state;
        let mut during = exchanges.during(ctx, optimizer);
        let passed = executor::run(&schedule, chunks, &ctx, &groups, (&batches, Keep::Saved), &mut during);
        exchanges.finish_gradients(chunks, optimizer);
        optimizer.reduce_tied(device, &scratch, chunks, &groups);
        let mine: f64 = passed.token_losses.iter().flatten().map(|&loss| f64::from(loss)).sum();
        let n_tokens = n_micro * batches[0].n_tokens();
        losses.push(groups.world.sum_f64(if groups.at.tp == 0 { mine } else { 0.0 }) / n_tokens as f64);
        if step == 1 {
            save(chunks, &groups, &out.join("gradients"), stored.meta(), |param| param.grad());
        }
        let norm = optimizer.grad_norm(device, chunks, &groups);
        let update = Update { step, lr: settings.lr, grad_scale: (1.0 / (norm + 1e-6)).min(1.0) };
        optimizer.update(device, &scratch, chunks, &mut exchanges, (&settings, update));
        device.finish();
    }
    exchanges.finish_weights(&mut state.chunks);
    save(&state.chunks, &groups, &out.join("weights"), stored.meta(), |param| &param.value);
    losses
}

/// Saves one tensor of each parameter as if it were its weight, so that export gives it its Hugging Face name. Collective.
pub fn save(chunks: &[Chunk], groups: &Groups, out: &Path, meta: &Meta, of: impl Fn(&trireme::model::param::Param) -> &Tensor) {
    let mut pieces = Vec::new();
    for chunk in chunks {
        for (idx, param) in chunk.params().into_iter().enumerate() {
            let is_on_another_rank = param.spec.split == Split::None && groups.at.tp > 0;
            if !is_on_another_rank && !chunk.is_tied_copy(idx) {
                let name = format!("weights/{}", param.spec.name);
                pieces.push(Piece { name, global_shape: param.spec.shape.clone(), slice: param.slice.clone(), tensor: of(param) });
            }
        }
    }
    checkpoint::save(out, meta, &pieces, &*groups.world).unwrap();
}

fn train_under(golden: &Golden, devices: Devices, how: How, tmp: &Path) -> Trained {
    let out = tmp.join(format!("{:?}-{how:?}", golden.dir.file_name().unwrap()));
    std::fs::create_dir(&out).unwrap();
    let losses = threads::run(how.layout.world(), |world| three_steps(golden, &*devices(), how, &out, world)).swap_remove(0);
    let mut tensors = BTreeMap::new();
    for (from, prefix) in [("gradients", "grad"), ("weights", "after")] {
        let exported = out.join(format!("{from}-exported"));
        hf::export(&out.join(from), &exported, ExportType::F32).unwrap();
        let file = read_safetensors(&exported.join("model.safetensors"));
        tensors.extend(file.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
    }
    Trained { losses, tensors }
}

/// Layouts a variant can be divided by: tp divides its kv heads, pp * vp its layers.
fn layouts(golden: &Golden) -> Vec<ParallelLayout> {
    let model = checkpoint::open(&golden.checkpoint).unwrap().meta().model.clone();
    let all = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2)];
    let fits = |&&(tp, pp, vp): &&(usize, usize, usize)| model.n_kv_heads.is_multiple_of(tp) && model.n_layers.is_multiple_of(pp * vp);
    all.iter().filter(fits).map(|&(tp, pp, vp)| ParallelLayout { tp, pp, dp: 1, vp }).collect()
}

/// Logits of every variant, with the cache filled at once and token by token. transformers' own float32 error on these sizes is 7e-7
/// relative; a path of the same precision stays within five times that. bf16 storage rounds every activation to 8 bits: 1.5e-2 is
/// what transformers itself shows; twice that is allowed.
pub fn check_logits(device: &dyn Device) {
    let tmp = tempfile::tempdir().unwrap();
    for variant in VARIANTS {
        let golden = Golden::open(variant, tmp.path());
        for (dtype, allowed) in [(DType::F32, 5.0 * 7e-7), (DType::BF16, 3e-2)] {
            let error = relative(&logits(&golden, device, dtype), &golden.tensors["logits"].1);
            assert!(error <= allowed, "{variant} {dtype:?}: logits differ by {error:.2e}, allowed {allowed:.2e}");
        }
    }
}

/// Loss, every gradient and the weights after three clipped AdamW steps of every variant, under those of its layouts that are `wanted`;
/// the layouts seen.
pub fn check_training(devices: Devices, dtype: DType, wanted: impl Fn(&ParallelLayout) -> bool) -> Vec<ParallelLayout> {
    let tmp = tempfile::tempdir().unwrap();
    let allowed = if dtype == DType::F32 { &Allowed::F32 } else { &Allowed::BF16 };
    let mut seen = Vec::new();
    for variant in VARIANTS {
        let golden = Golden::open(variant, tmp.path());
        for layout in layouts(&golden).into_iter().filter(&wanted) {
            let trained = train_under(&golden, devices, How { layout, dtype }, tmp.path());
            assert_trained_like(&golden, &trained, allowed, &format!("{variant} {dtype:?} {layout:?}"));
            seen.push(layout);
        }
    }
    assert!(!seen.is_empty());
    seen
}

/// Largest relative difference a run may show.
struct Allowed {
    /// Before the first step.
    loss: f64,
    /// Before the second and third, at weights that differ already.
    later_losses: f64,
    gradient: f64,
    /// None: weights are not compared.
    weights: Option<f64>,
}

impl Allowed {
    /// Five times what transformers' own float32 shows (loss 1e-7, gradients 2e-6). Weights: AdamW moves an element by
    /// lr * g / (|g| + eps) to begin with, so an error dg of a gradient moves it by lr * dg * eps / (|g| + eps)^2. Clipped gradients of
    /// 6000 elements are 1.3e-2 each, dg = 1e-5 of that. The one element in a hundred with |g| < eps = 1e-4 moves by up to
    /// lr * dg / eps = 1.3e-5, others far less: 1.3e-6 root mean square a step, 4e-6 after three, against weights of 0.25: 2e-5. Such a
    /// change of n weights in no particular direction changes a loss of 3 with a gradient of norm 3.5 by 3.5 * 4e-6, which is 5e-6 of it.
    const F32: Allowed = Allowed { loss: 5e-7, later_losses: 5e-6, gradient: 1e-5, weights: Some(2e-5) };
    /// Weights and activations stored in bf16, against the float64 numbers of the unrounded weights. Logits are off by 1.5e-2 in
    /// transformers' own bf16; a gradient passes the same number of roundings once more on its way back and meets rounded activations,
    /// which doubles that, and twice this is allowed, as for the logits. A token's loss moves by the difference of two logits, about 1
    /// each, so the mean of many by less than 1.5e-2 of about 4. Weights are not compared: AdamW's first steps follow the sign of a
    /// gradient, and rounding decides the sign of elements near zero; the losses of the later steps stay, because such elements hardly
    /// move them.
    const BF16: Allowed = Allowed { loss: 1.5e-2, later_losses: 1.5e-2, gradient: 6e-2, weights: None };
}

fn assert_trained_like(golden: &Golden, trained: &Trained, allowed: &Allowed, what: &str) {
    for (step, (ours, theirs)) in trained.losses.iter().zip(&golden.tensors["losses"].1).enumerate() {
        let error = (ours - theirs).abs() / theirs;
        assert!(
            error <= if step == 0 { allowed.loss } else { allowed.later_losses },
            "{what}: losses {:?} and {:?}",
            trained.losses,
            golden.tensors["losses"].1
        );
    }
    let mut n_compared = 0;
    for (name, (shape, expected)) in &golden.tensors {
        let allowed = match name.split('.').next() {
            Some("grad") => Some(allowed.gradient),
            Some("after") => allowed.weights,
            _ => None,
        };
        let Some(allowed) = allowed else { continue };
        let (found_shape, found) = trained.tensors.get(name).unwrap_or_else(|| panic!("{what}: no {name}"));
        assert_eq!(shape, found_shape, "{what}: {name}");
        let error = relative(found, expected);
        assert!(error <= allowed, "{what}: {name} differs by {error:.2e}, allowed {allowed:.2e}");
        n_compared += 1;
    }
    let n_least = if allowed.weights.is_some() { 2 * 16 } else { 16 };
    assert!(n_compared >= n_least, "{what}: only {n_compared} tensors compared");
}
