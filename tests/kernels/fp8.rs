//! E4M3 on every device: rounding against its definition, products against f64, weights of a model.

use crate::common::{counting_documents, tiny_recipe, train, write_megatron};
use crate::driver::{inside, is_inside, stand_ins};
use crate::emulator::{emulator, hopper};
use half::bf16;
use trireme::checkpoint;
use trireme::comm::Groups;
use trireme::comm::solo::Solo;
use trireme::device::cpu::Cpu;
use trireme::device::cuda::Cuda;
use trireme::device::{Device, Fp8Scales};
use trireme::infer::load::load_chunk;
use trireme::infer::score::{self, Sequence};
use trireme::parallel::layout::ParallelLayout;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// By the definition of the format: 4 bits of exponent with bias 7, 3 of mantissa, no leading one when the exponent is 0.
pub fn value_of(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = if exponent == 0 { mantissa * 2f64.powi(-9) } else { (8.0 + mantissa) * 2f64.powi(exponent - 10) };
    let size = if code & 0x7f == 0x7f { f64::NAN } else { size };
    if code & 0x80 == 0 { size } else { -size }
}

/// The code of the nearest number, of two the one with an even code; the largest for all above it.
fn nearest(x: f64) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let distance = |code: u8| (value_of(code) - x.abs()).abs();
    let best = (0..=0x7eu8).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
    sign | best.unwrap()
}

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
    let n_scales = if scales == Fp8Scales::Rows { x.n_rows() } else { 1 };
    let mut codes = device.alloc(x.dims(), DType::F8E4M3).unwrap();
    let mut scale = device.alloc(&[n_scales], DType::F32).unwrap();
    device.upload(&vec![0xff; 4 * n_scales], &mut scale);
    device.quantise(&mut codes, &mut scale, x);
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
                assert_eq!(*code, nearest(f64::from(*x)), "{x:e} on {}", device.name());
            }
        }
    }
    assert_eq!([trireme::device::cpu::fp8::rounded(1e9), trireme::device::cpu::fp8::rounded(f32::NEG_INFINITY)], [0x7e, 0xfe]);
    assert_eq!(trireme::device::cpu::fp8::rounded(f32::NAN) & 0x7f, 0x7f);
    assert!((0..=255u8).all(|code| {
        let (found, wanted) = (f64::from(trireme::device::cpu::fp8::widened(code)), value_of(code));
        found == wanted || found.is_nan() && wanted.is_nan()
    }));
}

/// The scale is the largest size / 448 and rounds as f32 does; a number is off by at most half of the last of three bits of mantissa,
/// 2^-4 of it, or by half of 2^-9 scales near 0, and the rounding of the division (2^-24 of it, twice); zeros have scale 1. CUDA's
/// kernels give the bits of the CPU.
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
                        assert_eq!(*scale, if most == 0.0 { 1.0 } else { most / 448.0 });
                    }
                    for (i, (x, code)) in x.iter().zip(&codes).enumerate() {
                        let (x, by) = (f64::from(*x), f64::from(scale[i / n_each]));
                        let off = (value_of(*code) * by - x).abs();
                        let allowed = x.abs() * (2f64.powi(-4) + 2f64.powi(-22)) + by * 2f64.powi(-10);
                        assert!(off <= allowed, "{x} became {} times {by}", value_of(*code));
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
    let codes: Vec<u8> = values(seed, rows * k).iter().map(|x| nearest(f64::from(*x) * 40.0)).collect();
    let by: Vec<f32> = values(seed + 1, if scales == Fp8Scales::Rows { rows } else { 1 }).iter().map(|x| x.abs() / 448.0).collect();
    let mut matrix = device.alloc(&[rows, k], DType::F8E4M3).unwrap();
    device.upload(&codes, &mut matrix);
    let wide = (0..rows * k).map(|i| value_of(codes[i]) * f64::from(by[if by.len() == 1 { 0 } else { i / k }])).collect();
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

/// What cuBLASLt is asked for is the product that is meant, with the scales at their operands, in the one form that Hopper has: the
/// stand-in refuses every other.
#[test]
fn calls_of_products_are_those_of_hopper() {
    if is_inside() {
        return check_products(&Cuda::open(0).unwrap(), &[DType::F32]);
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    let log = inside(folder.path(), "fp8::calls_of_products_are_those_of_hopper", &[]);
    assert_eq!(log.iter().filter(|line| line.starts_with("algorithms proposed")).count(), 6, "{log:?}");
    assert_eq!(log.iter().filter(|line| line.starts_with("product by")).count(), 6, "{log:?}");
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
    let error = chunk.quantise(&Cpu::new(), Fp8Scales::Rows).unwrap_err().to_string();
    assert!(error.contains("no multiples of 16") && error.contains("x 24"), "{error}");
    if let Some(machine) = emulator() {
        let cuda = Cuda::with_backend(machine);
        let error = cuda.check_fp8(Fp8Scales::Rows).unwrap_err().to_string();
        assert!(error.contains("compute capability 8.9, products of fp8 need 9.0"), "{error}");
        assert!(cuda.check_fp8(Fp8Scales::Tensor).is_ok());
    }
    (recipe.model.hidden, recipe.train.samples) = (32, 10 * 8);
    let wide = run(&recipe, "wide");
    let sequence = Sequence { id: "a".into(), tokens: (0..20).map(|i| i * 7 % 61).collect() };
    let sum = |device: &dyn Device, scales: Option<Fp8Scales>| {
        let mut chunks = [load_chunk(device, &wide, &groups(), DType::F32).unwrap()];
        scales.iter().for_each(|scales| chunks[0].quantise(device, *scales).unwrap());
        score::logprobs(device, &groups(), &mut chunks, std::slice::from_ref(&sequence), 64).unwrap()[0].sum
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
