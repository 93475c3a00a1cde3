//! Tokens drawn on the CUDA device, against the host's sampler: over the emulator and on a GPU.

use trireme::device::cuda::Cuda;
use trireme::device::{Device, Draw};
use trireme::infer::sampler::{self, Drawing, Sampling};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Rows of logits on the device, with columns behind the valid ones that must not be looked at, and as the host sees them.
struct Logits {
    device: Tensor,
    rows: Vec<Vec<f32>>,
    n_valid: usize,
}

fn logits(cuda: &Cuda, dtype: DType, rows: Vec<Vec<f32>>, padding: usize) -> Logits {
    let n_valid = rows[0].len();
    let padded: Vec<f32> = rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(1e9, padding))).collect();
    let shape = [rows.len(), n_valid + padding];
    let host = if dtype == DType::F32 { Tensor::from_f32(&shape, &padded) } else { Tensor::from_bf16(&shape, &padded) };
    let mut device = cuda.alloc(&shape, dtype).unwrap();
    cuda.upload(host.bytes(), &mut device);
    let rows = host.to_f32_vec().chunks(n_valid + padding).map(|row| row[..n_valid].to_vec()).collect();
    Logits { device, rows, n_valid }
}

/// Every row drawn `how[row % how.len()]` at positions 0.., on both sides.
fn assert_same_choices(cuda: &Cuda, logits: &Logits, how: &[Sampling], what: &str) {
    let noise = Random::new(5, what);
    let drawing = |row: usize| {
        let (sampling, uniform) = (how[row % how.len()], noise.uniform(row as u64));
        Drawing { sampling, uniform, prompt: &[], response: &[], n_top: 0 }
    };
    let draws: Vec<Draw> = (0..logits.rows.len()).map(|row| drawing(row).on_device().expect("this device can")).collect();
    let drawn = cuda.sample(&logits.device, logits.n_valid, &draws).expect("this device draws");
    for (row, (values, found)) in logits.rows.iter().zip(&drawn).enumerate() {
        let expected = sampler::choose(values, &drawing(row));
        assert_eq!(found.token, expected.token, "{what}, row {row}, {:?}", how[row % how.len()]);
        // Both add V terms of at most 1 in f64, in other orders.
        let allowed = 2.0 * logits.n_valid as f64 * f64::EPSILON * (1.0 + expected.logprob.abs());
        assert!((found.logprob - expected.logprob).abs() <= allowed, "{what}, row {row}: {} is not {}", found.logprob, expected.logprob);
    }
}

fn every_way() -> Vec<Sampling> {
    let of = |temperature, top_p, top_k| Sampling { temperature, top_p, top_k, ..Sampling::PLAIN };
    let with_min_p = |min_p, how: Sampling| Sampling { min_p, ..how };
    let mut all = vec![of(0.0, 1.0, 0), of(1.0, 1.0, 0), of(0.7, 1.0, 0), of(3.0, 1.0, 0), of(1.0, 0.9, 0), of(1.3, 0.3, 0)];
    all.extend([of(1.0, 1.0, 5), of(0.8, 0.95, 40), of(2.0, 0.5, 3), of(1.0, 1.0, 1), of(1.0, 1e-9, 0), of(1.0, 1.0, 1 << 40)]);
    all.extend([with_min_p(0.1, of(1.0, 1.0, 0)), with_min_p(0.02, of(1.6, 0.9, 30)), with_min_p(1.0, of(1.0, 1.0, 0))]);
    all
}

/// Few and many elements in a bin of the first histogram. Greedy, warm and cold, with top-k, top-p, min-p and several; ties, of which bf16
/// has many; rows that are hard to bin; padding.
///
/// The device's weights are whole multiples of 2^-40 of the largest, so a running sum of V of them is off by at most V 2^-41, and a
/// choice may differ only where the noise falls so close to a boundary: 2 V 2^-41 < 2e-9 for a draw here, 1e-6 for all of them.
pub fn check(cuda: &Cuda) {
    let normal = Random::new(9, "logits");
    for (v, n_rows, scale) in [(1, 15, 1.0), (2, 30, 1.0), (61, 60, 2.0), (2047, 30, 4.0), (9000, 15, 1.5)] {
        let row = |row: usize| (0..v).map(|i| (scale * normal.normal((row * v + i) as u64)) as f32).collect::<Vec<f32>>();
        for dtype in [DType::F32, DType::BF16] {
            let logits = logits(cuda, dtype, (0..n_rows).map(row).collect(), 3);
            assert_same_choices(cuda, &logits, &every_way(), &format!("{v} columns, {dtype:?}"));
        }
    }
    // All alike, two values, far below the maximum, signed zeros, and a row that is nearly all in the last bin.
    let hard = [
        (0..777).map(|_| 3.5f32).collect::<Vec<f32>>(),
        (0..777).map(|i| (i % 2) as f32).collect(),
        (0..777).map(|i| if i == 500 { 0.0 } else { -1e30 }).collect(),
        (0..777).map(|i| [0.0f32, -0.0, -1.0][i % 3]).collect(),
        (0..777).map(|i| if i == 3 { 40.0 } else { (i % 7) as f32 * 0.01 }).collect(),
        (0..777).map(|i| -(i as f32) / 64.0).collect(),
    ];
    for row in hard {
        let logits = logits(cuda, DType::F32, vec![row; 45], 0);
        assert_same_choices(cuda, &logits, &every_way(), "hard rows");
    }
    // Rows that are no numbers give a token all the same, with a log-probability that says so.
    for value in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
        for n_valid in [5, 777] {
            let logits = logits(cuda, DType::F32, vec![vec![value; n_valid]; every_way().len()], 3);
            let draw = |sampling| Drawing { sampling, uniform: 0.5, prompt: &[], response: &[], n_top: 0 }.on_device().expect("it can");
            let drawn = cuda.sample(&logits.device, n_valid, &every_way().into_iter().map(draw).collect::<Vec<Draw>>()).expect("it draws");
            assert!(drawn.iter().all(|one| (one.token as usize) < n_valid && !one.logprob.is_finite()), "{value}: {drawn:?}");
        }
    }
    assert_eq!(cuda.memory().live_bytes, 0);
}
