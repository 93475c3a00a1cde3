//! E4M3 on every device: rounding against its definition, products against f64, weights of a model.

use crate::cases::fp8::scale_of;
use crate::common::{counting_documents, tiny_model, tiny_recipe, train, train_on, write_megatron};
use crate::driver::{inside, is_inside, stand_ins};
use crate::emulator::{emulator, hopper};
use crate::oracle::{e4m3, nearest_e4m3};
use half::bf16;
use std::path::Path;
use trireme::checkpoint;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::comm::threads;
use trireme::device::cpu::Cpu;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::backend::Algorithms;
use trireme::device::{Device, Fp8Scales, Scratch};
use trireme::infer::load::load_chunk;
use trireme::infer::score::{self, Sequence};
use trireme::infer::scorer::Scorer;
use trireme::model::chunk::{Chunk, ChunkSaved, MicroBatch, Output};
use trireme::model::config::{Init, ModelConfig, ParamSpec, Place, Split};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::linear::ColumnParallelLinear;
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::model::param::{Param, Purpose};
use trireme::parallel::layout::{Coords, ParallelLayout};
use trireme::recipe::Linear;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

fn values(seed: u64, n: usize) -> Vec<f32> {
    let noise = Random::new(seed, "fp8");
    (0..n as u64).map(|i| noise.normal(i) as f32 * if i % 97 == 0 { 30.0 } else { 1.0 }).collect()
}

fn tensor(device: &dyn Device, dims: &[usize], values: &[f32], dtype: DType) -> Tensor {
    let host = if dtype == DType::BF16 { Tensor::from_bf16(dims, values) } else { Tensor::from_f32(dims, values) };
    let mut there = device.alloc(dims, dtype).unwrap();
    device.upload(host.bytes(), &mut there);
    there
}

fn floats(x: &Tensor) -> Vec<f32> {
    match x.dtype() {
        DType::BF16 => bytemuck::cast_slice::<u8, bf16>(&x.host_bytes()).iter().map(|x| x.to_f32()).collect(),
        _ => bytemuck::cast_slice::<u8, f32>(&x.host_bytes()).to_vec(),
    }
}

/// Codes and scales of a tensor.
fn quantised(device: &dyn Device, x: &Tensor, scales: Fp8Scales) -> (Tensor, Tensor) {
    let n_scales = scales.axis().n_scales((x.n_rows(), x.row_len()));
    let mut codes = device.alloc(x.dims(), DType::F8E4M3).unwrap();
    let mut scale = device.alloc(&[n_scales], DType::F32).unwrap();
    device.upload(&vec![0xff; 4 * n_scales], &mut scale);
    device.quantise(&mut codes, &mut scale, x, scales.axis());
    (codes, scale)
}

/// The CPU, and the CUDA device over the emulator where there is one.
fn devices() -> Vec<Box<dyn Device>> {
    let cuda = hopper().map(|machine| Box::new(Cuda::with_backend(machine)) as Box<dyn Device>);
    std::iter::once(Box::new(Cpu::new()) as Box<dyn Device>).chain(cuda).collect()
}

/// Every bf16 there is, with the scale 1 (the first element of each row is 448 and no other is larger): the nearest E4M3, ties to
/// even, by a search through all of them. A rounding that is wrong in one place only would pass any random test.
#[test]
fn every_bf16_becomes_the_nearest_number() {
    let all: Vec<f32> = (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()).filter(|x| x.abs() <= 448.0).collect();
    let rows: Vec<Vec<f32>> = all.chunks(255).map(|part| [&[448.0], part, &vec![0.0; 255 - part.len()]].concat()).collect();
    let x = rows.concat();
    for device in devices() {
        for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
            let (codes, scale) = quantised(&*device, &tensor(&*device, &[rows.len(), 256], &x, DType::BF16), scales);
            assert!(floats(&scale).iter().all(|scale| *scale == 1.0));
            for (code, x) in codes.host_bytes().iter().zip(&x) {
                assert_eq!(*code, nearest_e4m3(f64::from(*x)), "{x:e} on {}", device.name());
            }
        }
    }
    // Those that no scale of 1 leaves to be rounded: above the largest, infinite, not a number.
    for x in (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()) {
        assert_eq!(trireme::device::cpu::fp8::rounded(x), nearest_e4m3(f64::from(x)), "{x:e}");
    }
    assert!((0..=255u8).all(|code| {
        let (found, wanted) = (f64::from(trireme::device::cpu::fp8::widened(code)), e4m3(code));
        found == wanted || found.is_nan() && wanted.is_nan()
    }));
}

/// What is no number stays none, behind codes and scales, and so does all that shares its scale with an infinity; nothing else does. A loss
/// that overflows must not be trained on as a number.
#[test]
fn what_is_no_number_stays_none() {
    let mut x = values(11, 4 * 48);
    (x[5], x[48 + 7], x[2 * 48 + 47]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    for (device, dtype) in devices().iter().flat_map(|device| [DType::F32, DType::BF16].map(|dtype| (device, dtype))) {
        let x = tensor(&**device, &[4, 48], &x, dtype);
        for (scales, rows_lost) in [(Fp8Scales::Rows, 1..3), (Fp8Scales::Tensor, 0..4)] {
            let (codes, scale) = quantised(&**device, &x, scales);
            let (codes, scale) = (codes.host_bytes().to_vec(), floats(&scale));
            for (i, code) in codes.iter().enumerate() {
                let is_none = (e4m3(*code) * f64::from(scale[i / (codes.len() / scale.len())])).is_nan();
                assert_eq!(is_none, i == 5 || rows_lost.contains(&(i / 48)), "element {i} of {dtype:?}, {scales:?}, on {}", device.name());
            }
            // The element itself says so, not its scale alone.
            assert_eq!(codes[5] & 0x7f, 0x7f, "{dtype:?}, {scales:?}, on {}", device.name());
        }
    }
}

/// The scale is the smallest power of two with which the largest is at most 448; a number is off by at most half of the last of three
/// bits of mantissa, 2^-4 of it, or by half of 2^-9 scales near 0; zeros have scale 1. CUDA's kernels give the bits of the CPU.
#[test]
fn numbers_are_near_what_they_stand_for() {
    for dtype in [DType::F32, DType::BF16] {
        for (rows, columns) in [(1, 1), (3, 17), (5, 1030), (2, 48)] {
            for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
                let mut x = values(7, rows * columns);
                x[..columns].fill(if rows > 1 { 0.0 } else { 3.0 });
                let mut bits = Vec::new();
                for device in devices() {
                    let x = tensor(&*device, &[rows, columns], &x, dtype);
                    let (codes, scale) = quantised(&*device, &x, scales);
                    let (x, codes, scale) = (floats(&x), codes.host_bytes().to_vec(), floats(&scale));
                    let n_each = x.len() / scale.len();
                    for (part, scale) in x.chunks(n_each).zip(&scale) {
                        let most = part.iter().fold(0f32, |most, x| most.max(x.abs()));
                        assert_eq!(f64::from(*scale), scale_of(f64::from(most)));
                    }
                    for (i, (x, code)) in x.iter().zip(&codes).enumerate() {
                        let (x, by) = (f64::from(*x), f64::from(scale[i / n_each]));
                        let off = (e4m3(*code) * by - x).abs();
                        let allowed = x.abs() * 2f64.powi(-4) + by * 2f64.powi(-10);
                        assert!(off <= allowed, "{x} became {} times {by}", e4m3(*code));
                    }
                    bits.push((codes, scale));
                }
                assert!(bits.iter().all(|one| *one == bits[0]), "{dtype:?} {rows} x {columns}, {scales:?}");
            }
        }
    }
}

/// Codes and scales made on the host, so that products are tested alone, and on machines whose kernels do not run.
fn given(device: &dyn Device, seed: u64, (rows, k): (usize, usize), scales: Fp8Scales) -> (Tensor, Tensor, Vec<f64>) {
    let codes: Vec<u8> = values(seed, rows * k).iter().map(|x| nearest_e4m3(f64::from(*x) * 40.0)).collect();
    let by: Vec<f32> = values(seed + 1, if scales == Fp8Scales::Rows { rows } else { 1 })
        .iter()
        .map(|x| 2f32.powi((x.clamp(-2.0, 2.0) * 4.0) as i32 - 9))
        .collect();
    let mut matrix = device.alloc(&[rows, k], DType::F8E4M3).unwrap();
    device.upload(&codes, &mut matrix);
    let wide = (0..rows * k).map(|i| e4m3(codes[i]) * f64::from(by[if by.len() == 1 { 0 } else { i / k }])).collect();
    (matrix, tensor(device, &[by.len()], &by, DType::F32), wide)
}

/// Products are those of the numbers behind the codes, in f64: k + 2 roundings of f32 (2^-24 each) of the sum of sizes, and that of
/// the output's dtype.
fn check_products(device: &dyn Device, dtypes: &[DType]) {
    for (m, n, k) in [(1, 16, 16), (5, 48, 32), (17, 32, 160)] {
        for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
            let (a, of_a, x) = given(device, 3, (m, k), scales);
            let (b, of_b, y) = given(device, 5, (n, k), scales);
            for &dtype in dtypes {
                let mut out = tensor(device, &[m, n], &vec![f32::NAN; m * n], dtype);
                device.gemm_fp8(&mut out, (&a, &of_a), (&b, &of_b));
                let u = if dtype == DType::BF16 { 2f64.powi(-8) } else { 0.0 };
                for (at, found) in floats(&out).iter().enumerate() {
                    let terms = || (0..k).map(|l| x[at / n * k + l] * y[at % n * k + l]);
                    let (sum, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let allowed = size * (k + 2) as f64 * 2f64.powi(-24) + sum.abs() * u;
                    assert!((f64::from(*found) - sum).abs() <= allowed, "{found} is not {sum}: {m} x {n} x {k}, {scales:?}, {dtype:?}");
                }
            }
        }
    }
}

#[test]
fn products_are_those_of_the_numbers() {
    devices().iter().for_each(|device| check_products(&**device, &[DType::F32, DType::BF16]));
}

/// y, dx and dW of a linear layer in training, whose weight has changed once since it was first rounded.
fn trained(device: &dyn Device, scales: Fp8Scales, dtype: DType, [x, w, dy]: [&[f32]; 3]) -> [Vec<f32>; 3] {
    let (tp, scratch) = (Solo::new(), Scratch::new());
    let ctx = Ctx { device, tp: &tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let at = Coords { tp: 0, pp: 0, dp: 0 };
    let spec = ParamSpec {
        name: "w".into(),
        shape: vec![80, 48],
        split: Split::Rows,
        decay: false,
        init: Init::Constant(0.0),
        place: Place::Head,
    };
    let mut weight = Param::new(device, spec, (&ParallelLayout::SINGLE, at), dtype, Purpose::Training).unwrap();
    weight.train_in_fp8(device, scales).unwrap();
    let mut layer = ColumnParallelLinear { weight };
    let (x, dy) = (tensor(device, &[67, 48], x, dtype), tensor(device, &[67, 80], dy, dtype));
    assert!(floats(&layer.forward(&ctx, &x)).iter().all(|y| *y == 0.0));
    layer.weight.value = tensor(device, &[80, 48], w, dtype);
    layer.weight.forget_rounded();
    let (y, dx) = (floats(&layer.forward(&ctx, &x)), floats(&layer.backward(&ctx, &x, &dy)));
    [y, dx, floats(layer.weight.grad())]
}

/// A layer in training multiplies the same codes on CUDA as on the CPU (whose own are held to f64 formulas in tests/fp8_training.rs), for
/// its outputs and, transposed, for its input gradients: sums of n terms in f32 in another order are 2 n roundings of the terms' sizes
/// apart, which rounding to E4M3 makes at most (1 + 2^-4)^2 times as large; in bf16 the last bit of the result besides. One code that is
/// another would be seen: it moves a term by 2^-4 of itself.
#[test]
fn layers_in_training_have_the_codes_of_the_cpu() {
    let Some(machine) = hopper() else { return };
    let cuda = Cuda::with_backend(machine);
    let (t, o, i) = (67, 80, 48);
    let [x, w, dy] = [values(11, t * i), values(12, o * i), values(13, t * o)];
    let both = [Fp8Scales::Rows, Fp8Scales::Tensor];
    for (scales, (dtype, last_bit)) in
        both.into_iter().flat_map(|scales| [(DType::F32, 0.0), (DType::BF16, 2f64.powi(-7))].map(|of| (scales, of)))
    {
        let (found, expected) = (trained(&cuda, scales, dtype, [&x, &w, &dy]), trained(&Cpu::new(), scales, dtype, [&x, &w, &dy]));
        let sizes = [
            (i, (0..t * o).map(|at| (0..i).map(|k| size(x[at / o * i + k], w[at % o * i + k])).sum()).collect::<Vec<f64>>()),
            (o, (0..t * i).map(|at| (0..o).map(|k| size(dy[at / i * o + k], w[k * i + at % i])).sum()).collect()),
            (t, (0..o * i).map(|at| (0..t).map(|k| size(dy[k * o + at / i], x[k * i + at % i])).sum()).collect()),
        ];
        for (what, ((found, expected), (n, sizes))) in found.iter().zip(&expected).zip(&sizes).enumerate() {
            assert!(expected.iter().any(|x| *x != 0.0));
            for ((found, expected), size) in found.iter().zip(expected).zip(sizes) {
                let (found, expected) = (f64::from(*found), f64::from(*expected));
                let allowed = 2.0 * *n as f64 * 2f64.powi(-24) * 1.13 * size + last_bit * expected.abs();
                assert!((found - expected).abs() <= allowed, "{dtype:?} {what}: {found} and {expected}, {allowed} is allowed");
            }
        }
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}

fn size(a: f32, b: f32) -> f64 {
    (f64::from(a) * f64::from(b)).abs()
}

/// A whole run in FP8 on CUDA loses what it loses on the CPU: within 0.1 nats in the first step, which starts from equal weights (see
/// `a_run_follows_the_one_without` of tests/fp8_training.rs), and goes on. A GPU without scales of rows is refused with what to do.
#[test]
fn a_run_in_fp8_is_that_of_the_cpu() {
    let (Some(_), Some(_)) = (hopper(), emulator()) else { return };
    let dir = tempfile::tempdir().unwrap();
    write_megatron(&dir.path().join("shards"), "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&dir.path().join("shards"));
    (recipe.model.hidden, recipe.model.ffn_hidden, recipe.model.n_layers) = (32, 64, 2);
    (recipe.batch.global, recipe.train.samples, recipe.numerics.linear) = (4, 8, Linear::Fp8);
    let losses =
        |out: &Path| -> Vec<f64> { trireme::metrics::read(&out.join("metrics.jsonl")).unwrap().iter().map(|row| row.loss).collect() };
    let (on_cpu, on_cuda, refused) = (dir.path().join("cpu"), dir.path().join("cuda"), dir.path().join("refused"));
    train(&recipe, &on_cpu, None).unwrap();
    train_on(&|| Box::new(Cuda::with_backend(hopper().unwrap())), &recipe, &on_cuda, None).unwrap();
    let (expected, found) = (losses(&on_cpu), losses(&on_cuda));
    assert!((found[0] - expected[0]).abs() < 0.1 && found.len() == 2 && found[1].is_finite(), "{found:?}, {expected:?}");
    let error = train_on(&|| Box::new(Cuda::with_backend(emulator().unwrap())), &recipe, &refused, None).unwrap_err().to_string();
    assert!(error.contains("compute capability 8.9") && error.contains("numerics.linear = \"stored\""), "{error}");
    // One scale a tensor is enough for it.
    recipe.numerics.linear = Linear::Fp8Tensor;
    train_on(&|| Box::new(Cuda::with_backend(emulator().unwrap())), &recipe, &dir.path().join("tensor"), None).unwrap();
    let (found, rows) = (losses(&dir.path().join("tensor")), losses(&on_cpu));
    assert!((found[0] - rows[0]).abs() < 0.1, "{found:?}, {rows:?}");
}

/// In the process: how algorithms are chosen.
const HOW: &str = "TRIREME_TEST_ALGORITHMS";

/// What cuBLASLt is asked for is the product that is meant, with the scales at their operands, in the one form that Hopper has: the
/// stand-in refuses every other. Its algorithm is the fastest, found on disk by the next start, or the fixed one, as of other products.
#[test]
fn calls_of_products_are_those_of_hopper() {
    if is_inside() {
        let is_fixed = std::env::var_os(HOW).is_some_and(|how| how == "fixed");
        let algorithms = if is_fixed { Algorithms::Fixed } else { Algorithms::Measured };
        return check_products(&Cuda::open_with(0, algorithms).unwrap(), &[DType::F32]);
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    // Three shapes with scales of rows and of tensors each. To be measured a product is asked about twice.
    for (how, proposed, algorithm) in [("measured", 12, "2"), ("measured", 0, "2"), ("fixed", 6, "1")] {
        let log = inside(folder.path(), "fp8::calls_of_products_are_those_of_hopper", &[(HOW, how)]);
        assert_eq!(log.iter().filter(|line| line.starts_with("algorithms proposed")).count(), proposed, "{how}: {log:?}");
        let used: Vec<&str> = log.iter().filter_map(|line| line.strip_prefix("product by algorithm ")).collect();
        assert!(used.len() == 6 && used.iter().all(|used| *used == algorithm), "{how}: {log:?}");
    }
}

/// A trained model with such weights still computes, and differently, so they are used. Weights that tensor cores
/// cannot multiply, and a GPU that cannot, are refused in a line that says so.
#[test]
fn a_model_keeps_its_weights_so() {
    let tmp = tempfile::tempdir().unwrap();
    let shards = tmp.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let mut recipe = tiny_recipe(&shards);
    let run = |recipe: &trireme::recipe::Pretrain, name: &str| {
        let run = tmp.path().join(name);
        train(recipe, &run, None).unwrap();
        checkpoint::open(&run).unwrap()
    };
    let groups = || Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
    let narrow = run(&recipe, "narrow");
    let mut chunk = load_chunk(&Cpu::new(), &narrow, &groups(), DType::F32).unwrap();
    let error = chunk.pack(&Cpu::new(), &Solo::new(), WeightFormat::Fp8(Fp8Scales::Rows)).unwrap_err().to_string();
    assert!(error.contains("no multiples of 16") && error.contains("x 24"), "{error}");
    if let Some(machine) = emulator() {
        let cuda = Cuda::with_backend(machine);
        let error = cuda.check_fp8(Fp8Scales::Rows).unwrap_err().to_string();
        assert!(error.contains("compute capability 8.9, products of fp8 with a scale for each row need 9.0"), "{error}");
        assert!(cuda.check_fp8(Fp8Scales::Tensor).is_ok());
    }
    (recipe.model.hidden, recipe.train.samples) = (32, 10 * 8);
    let wide = run(&recipe, "wide");
    let sequence = Sequence { id: "a".into(), tokens: (0..20).map(|i| i * 7 % 61).collect() };
    let sum = |device: &dyn Device, scales: Option<Fp8Scales>| {
        let mut chunks = [load_chunk(device, &wide, &groups(), DType::F32).unwrap()];
        scales.iter().for_each(|scales| chunks[0].pack(device, &Solo::new(), WeightFormat::Fp8(*scales)).unwrap());
        let scorer = Scorer { device, groups: &groups(), batch_tokens: 64, numerics: Numerics::Fast, stop: &|| false };
        score::logprobs(&scorer, &mut chunks, std::slice::from_ref(&sequence)).unwrap()[0].sum
    };
    let exact = sum(&Cpu::new(), None);
    for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
        for device in devices() {
            let found = sum(&*device, Some(scales));
            assert!(found.is_finite() && found != exact, "{found}");
            println!("{scales:?} on {}: {found}, {exact} in f32", device.name());
        }
    }
}

/// Whether a parameter is one that is kept as E4M3: by the definition, the four products of a block.
fn is_linear(name: &str) -> bool {
    ["qkv.weight", "out.weight", "up.weight", "down.weight"].iter().any(|end| name.starts_with("layers.") && name.ends_with(end))
}

/// The model of the test below, with its first weights.
fn model(device: &dyn Device, groups: &Groups, purpose: Purpose) -> Chunk {
    let config = ModelConfig { hidden: 32, n_layers: 2, ffn_hidden: 64, ..tiny_model() };
    let mut chunk = Chunk::new(device, &config, &groups.layout, groups.at, 0, DType::F32, purpose).unwrap();
    chunk.initialise(device, 3);
    chunk
}

/// ln p(next | first) of a pair, and how far it may move by roundings of weights and of inputs: the S^2 of
/// `log_probabilities_move_as_derived`.
struct Moving {
    logprob: f64,
    weights: f64,
    inputs: f64,
}

/// Of each pair, by the f32 model.
fn moving(chunk: &mut Chunk, pairs: &[[u32; 2]]) -> Vec<Moving> {
    let (device, groups, scratch) = (Cpu::new(), Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE), Scratch::new());
    let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Replicated, numerics: Numerics::Fast };
    let of_pair = |&[first, next]: &[u32; 2]| {
        let batch = MicroBatch::new(&device, [&[first], &[next], &[0]], &[1.0], vec![0, 1]).unwrap();
        let mut saved = ChunkSaved::default();
        let Output::TokenLosses(tokens) = chunk.forward(&ctx, None, &batch, Some(&mut saved)) else { unreachable!() };
        chunk.params_mut().into_iter().for_each(|param| device.fill_zero(param.grad_mut()));
        chunk.backward(&ctx, &batch, saved, None);
        let mut moving = Moving { logprob: -f64::from(tokens.losses[0]), weights: 0.0, inputs: 0.0 };
        for param in chunk.params().into_iter().filter(|param| is_linear(&param.spec.name)) {
            let (grad, value, columns) = (param.grad().to_f32_vec(), param.value.to_f32_vec(), param.value.row_len());
            let tiny = value.iter().fold(0f32, |most, w| most.max(w.abs())) / 224.0 / 1024.0;
            let mut of_input = vec![0f64; columns];
            for (i, (g, w)) in grad.iter().zip(&value).enumerate() {
                moving.weights += (f64::from(*g) * f64::from((w.abs() / 16.0).max(tiny))).powi(2);
                of_input[i % columns] += f64::from(*g) * f64::from(*w);
            }
            moving.inputs += of_input.iter().map(|of| (of / 16.0).powi(2)).sum::<f64>();
        }
        moving
    };
    pairs.iter().map(of_pair).collect()
}

/// The same log-probabilities as they are scored, with E4M3; those of one weight are taken times `wrong`.
fn scored_in_fp8(device: &dyn Device, groups: &Groups, scales: Fp8Scales, pairs: &[[u32; 2]], wrong: f32) -> Vec<f64> {
    let mut chunks = [model(device, groups, Purpose::Inference)];
    chunks[0].pack(device, &*groups.tp, WeightFormat::Fp8(scales)).unwrap();
    for param in chunks[0].params_mut().into_iter().filter(|param| param.spec.name == "layers.1.mlp.down.weight") {
        device.scale(param.scale.as_mut().unwrap(), wrong);
    }
    let sequences: Vec<Sequence> = pairs.iter().map(|pair| Sequence { id: String::new(), tokens: pair.to_vec() }).collect();
    let scorer = Scorer { device, groups, batch_tokens: 64, numerics: Numerics::Fast, stop: &|| false };
    score::logprobs(&scorer, &mut chunks, &sequences).unwrap().iter().map(|scored| scored.sum).collect()
}

/// The weights of a model as the numbers that their codes and scales stand for, by the definition.
fn round_weights(chunk: &mut Chunk, scales: Fp8Scales) {
    for param in chunk.params_mut().into_iter().filter(|param| is_linear(&param.spec.name)) {
        let (value, columns) = (param.value.to_f32_vec(), param.value.row_len());
        let n_each = if scales == Fp8Scales::Rows { columns } else { value.len() };
        let round = |part: &[f32]| {
            let scale = scale_of(f64::from(part.iter().fold(0f32, |most, w| most.max(w.abs()))));
            part.iter().map(|w| (e4m3(nearest_e4m3(f64::from(*w) / scale)) * scale) as f32).collect::<Vec<f32>>()
        };
        param.value.f32_mut().copy_from_slice(&value.chunks(n_each).flat_map(round).collect::<Vec<f32>>());
    }
}

/// How far log-probabilities may move, from the gradient of each.
///
/// A rounding to E4M3 moves an element v by at most c = 2^-4 |v| (a tiny one by 2^-10 of its scale), up or down as chance has it, so
/// nearly evenly within +-c. To first order a move d of an element moves ln p by its derivative times d. For weights the derivative
/// is the gradient g. The derivative by an input x_k of a product y = W x, times x_k, is sum_o W_ok (dln p/dy_o) x_k, and with one
/// token g_ok = (dln p/dy_o) x_k, so it is sum_o W_ok g_ok: the gradients of the weights tell both. With S^2 the sum of all
/// (derivative c)^2, the sum of independent moves has a variance of at most S^2 / 3, and exceeds 6 S / sqrt(3) with a probability
/// below 2 exp(-18), as even distributions are sub-Gaussian with their own variance. What is of second order are moves of moves: a
/// product is off by 2^-4 sqrt(2/3) = 5 % of itself, after the 8 products of two layers by 14 %, by twice that where it is squared:
/// less than a third more is allowed for it.
///
/// Inputs of different tokens are rounded independently, so of n pairs the mean of (3 move^2 / S^2) exceeds 1 + 2 sqrt(t/n) + 2 t/n
/// with a probability below exp(-t), t = 18 (Laurent and Massart 2000, lemma 1): the sharper check, which the scales of one weight fail
/// when they are twice what they should be.
///
/// Three models: f32; f32 with weights rounded by the definition; E4M3. The first two differ by the weights' S, the last two by the
/// inputs', the first and the last by both, on two tensor-parallel ranks as well.
#[test]
fn log_probabilities_move_as_derived() {
    let solo = || Groups::new(Box::new(Solo::new()), ParallelLayout::SINGLE);
    let pairs: Vec<[u32; 2]> = (0..61).map(|first| [first, (first * 7 + 3) % 61]).collect();
    let exact = moving(&mut model(&Cpu::new(), &solo(), Purpose::Training), &pairs);
    let second_order = 4.0 / 3.0;
    // |move| / (S / sqrt(3)): the largest, and the root mean square.
    let moves = |from: &[Moving], to: &[f64], s2: &dyn Fn(&Moving) -> f64| {
        let squares: Vec<f64> = from.iter().zip(to).map(|(from, to)| 3.0 * (to - from.logprob).powi(2) / s2(from)).collect();
        let (most, sum) = squares.iter().fold((0f64, 0.0), |(most, sum), square| (most.max(*square), sum + square));
        (most.sqrt(), (sum / squares.len() as f64).sqrt())
    };
    let t_of_n = 18.0 / pairs.len() as f64;
    let allowed = (second_order * 6.0, second_order * (1.0 + 2.0 * f64::sqrt(t_of_n) + 2.0 * t_of_n).sqrt());
    let both = |moving: &Moving| moving.weights + moving.inputs;
    let furthest = exact.iter().map(|moving| allowed.0 * (both(moving) / 3.0).sqrt()).fold(0f64, f64::max);
    println!("log-probabilities may move by up to {furthest}");
    for scales in [Fp8Scales::Rows, Fp8Scales::Tensor] {
        let mut rounded = model(&Cpu::new(), &solo(), Purpose::Training);
        round_weights(&mut rounded, scales);
        let rounded = moving(&mut rounded, &pairs);
        let logprobs: Vec<f64> = rounded.iter().map(|moving| moving.logprob).collect();
        let by_weights = moves(&exact, &logprobs, &|moving| moving.weights);
        assert!(by_weights.0 > 0.0 && by_weights.0 <= allowed.0, "{scales:?}: weights {by_weights:?}, {allowed:?} is allowed");
        for device in devices() {
            let what = format!("{scales:?} on {}", device.name());
            let found = scored_in_fp8(&*device, &solo(), scales, &pairs, 1.0);
            let by_inputs = moves(&rounded, &found, &|moving| moving.inputs);
            assert!(by_inputs.0 > 0.0 && by_inputs.0 <= allowed.0, "{what}: inputs {by_inputs:?}, {allowed:?} is allowed");
            assert!(by_inputs.1 <= allowed.1, "{what}: inputs {by_inputs:?}, {allowed:?} is allowed");
            let by_both = moves(&exact, &found, &both);
            assert!(by_both.0 <= allowed.0, "{what}: {by_both:?}, {allowed:?} is allowed");
            let wrong = moves(&rounded, &scored_in_fp8(&*device, &solo(), scales, &pairs, 2.0), &|moving| moving.inputs);
            assert!(wrong.1 > allowed.1, "{what}: a wrong scale is not seen, {wrong:?}");
            println!("{what}: weights {by_weights:?}, inputs {by_inputs:?}, both {by_both:?}, a wrong scale {wrong:?} of {allowed:?}");
        }
        let layout = ParallelLayout { tp: 2, ..ParallelLayout::SINGLE };
        let on_two = threads::run(2, |world| scored_in_fp8(&Cpu::new(), &Groups::new(world, layout), scales, &pairs, 1.0));
        let by_both = moves(&exact, &on_two[0], &both);
        assert!(on_two[0] == on_two[1] && by_both.0 <= allowed.0, "{scales:?}, two ranks: {by_both:?}, {allowed:?} is allowed");
    }
}
