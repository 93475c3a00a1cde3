//! Every device operation at the shapes of models of 30 and 120 million parameters, f32 and bf16, over the ceiling of this
//! machine measured in the same minute: multiply-adds from registers for products, a copy of large arrays for the rest.
//!
//! `cargo bench --bench operations [-- WORD]` prints a markdown table (of the operations that contain WORD). Ceiling and operation
//! are timed in turn and the best of each is taken, so that a busy machine does them both the same harm. Bytes are those that
//! the operation must read and write once.

#[allow(dead_code)] // the tests take cases that are not timed
#[path = "../tests/operations/cases.rs"]
mod cases;
#[allow(dead_code)] // cases name their oracles, which a bench does not ask
#[path = "../tests/operations/oracle.rs"]
mod oracle;
mod traffic;

use cases::{Case, Init, Kind, Vocabulary};
use oracle::Scaled;
use std::hint::black_box;
use std::time::Instant;
use trireme::device::cpu::{Cpu, Isa};
use trireme::device::{Activation, Device, Direction, Gemm};
use trireme::tensor::DType;

const T: usize = 2048;

/// A model: hidden, vocabulary, (query heads, kv heads, head dim).
struct Model {
    name: &'static str,
    hidden: usize,
    vocabulary: usize,
    heads: (usize, usize, usize),
}

const MODELS: [Model; 2] = [
    Model { name: "30M", hidden: 384, vocabulary: 16384, heads: (6, 2, 64) },
    Model { name: "120M", hidden: 768, vocabulary: 32000, heads: (6, 2, 128) },
];

fn products(model: &Model) -> Vec<Case> {
    let (h, v) = (model.hidden, model.vocabulary);
    let qkv = cases::heads_of(model.heads).qkv_columns();
    vec![
        cases::gemm(Gemm::NT, (T, qkv, h), Kind::Float),
        cases::gemm(Gemm::NT, (T, h, h), Kind::Float),
        cases::gemm(Gemm::NT, (T, 4 * h, h), Kind::Float),
        cases::gemm(Gemm::NT, (T, h, 4 * h), Kind::Float),
        cases::gemm(Gemm::NN, (T, h, 4 * h), Kind::Float),
        cases::gemm(Gemm::NN, (T, 4 * h, h), Kind::Float),
        cases::gemm(Gemm::TN.accumulate(), (4 * h, h, T), Kind::F32),
        cases::gemm(Gemm::TN.accumulate(), (h, 4 * h, T), Kind::F32),
        cases::gemm(Gemm::NT, (T, v, h), Kind::Float),
        cases::gemm(Gemm::NN, (T, h, v), Kind::Float),
        cases::gemm(Gemm::TN.accumulate(), (v, h, T), Kind::F32),
        cases::attention(vec![0, T], model.heads),
        cases::attention_backward(vec![0, T], model.heads),
        cases::attention((0..=4).map(|i| i * T / 4).collect(), model.heads),
        cases::attention_backward((0..=4).map(|i| i * T / 4).collect(), model.heads),
    ]
}

fn passes(model: &Model) -> Vec<Case> {
    let (h, f) = (model.hidden, 4 * model.hidden);
    let vocabulary = Vocabulary { t: T / 2, columns: model.vocabulary, n_valid: model.vocabulary, first_row: 0 };
    let decode: Vec<_> = (0..16).map(|_| (0, 1023, 1)).collect();
    let mut cases = vec![
        cases::gemm(Gemm::NT, (1, f, 4 * h), Kind::Float),
        cases::gemm(Gemm::NT, (1, model.vocabulary, h), Kind::Float),
        cases::gemm(Gemm::NT, (8, model.vocabulary, h), Kind::Float),
        cases::attention_cached(&decode, model.heads),
        cases::elementwise("copy", T * f, (Kind::Float, Kind::Float)),
        cases::elementwise("copy", T * f, (Kind::Float, Kind::F32)),
        cases::elementwise("add", T * f, (Kind::Float, Kind::Float)),
        cases::elementwise("scale", T * f, (Kind::Float, Kind::Float)),
        cases::rope(T, model.heads, (model.heads.2 / 2, Scaled::Plain), Direction::Forward),
        cases::rope(T, model.heads, (model.heads.2, Scaled::Plain), Direction::Backward),
        cases::embed((0..T).map(|i| i * 7919 % model.vocabulary).collect(), (model.vocabulary, h), 0),
        cases::embed_backward((0..T).map(|i| i * 7919 % model.vocabulary).collect(), (model.vocabulary, h), 0),
        cases::cross_entropy_max(vocabulary),
        cases::cross_entropy_sum(vocabulary),
        cases::cross_entropy_forward(vocabulary),
        cases::cross_entropy_gradient(vocabulary),
        whole_cross_entropy(vocabulary),
        cases::adamw(f * h * 4, 100, 0.1),
    ];
    for layer in [true, false] {
        cases.push(cases::norm(layer, (T, h)));
        cases.push(cases::add_norm(layer, (T, h)));
        cases.push(cases::norm_backward(layer, (T, h)));
    }
    for kind in [Activation::SquaredRelu, Activation::Swiglu] {
        cases.push(cases::activation(kind, (T, f)));
        cases.push(cases::activation_backward(kind, (T, f)));
    }
    cases
}

/// The three passes over the logits of one step, one after another: read, read, read and write.
fn whole_cross_entropy(shape: Vocabulary) -> Case {
    let [max, sum, gradient] = [cases::cross_entropy_max(shape), cases::cross_entropy_sum(shape), cases::cross_entropy_gradient(shape)];
    let n_max = max.args.len();
    let n_sum = sum.args.len();
    Case {
        operation: "cross_entropy_max, _sum, _gradient",
        shape: gradient.shape.clone(),
        args: max.args.into_iter().chain(sum.args).chain(gradient.args).collect(),
        run: Box::new(move |device, tensors| {
            let (first, rest) = tensors.split_at_mut(n_max);
            let (second, third) = rest.split_at_mut(n_sum);
            (max.run)(device, first);
            (sum.run)(device, second);
            (gradient.run)(device, third);
        }),
        // Each pass is held to its own in the tests.
        oracle: max.oracle,
        flops: 0.0,
    }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// 24 chains of n multiply-adds: 32 operations each. SAFETY: needs avx512f.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn fma512(n: usize) -> f64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(1.0); 24];
        for _ in 0..n {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        (n * 24 * 32) as f64
    }

    /// 24 chains of n bf16 dot products: 64 operations each. SAFETY: needs avx512bf16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn dot512(n: usize) -> f64 {
        // SAFETY: both are 512 plain bits.
        let [x, y] = [0.1, 0.2].map(|value| unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(black_box(value))) });
        let mut sums = [_mm512_set1_ps(1.0); 24];
        for _ in 0..n {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
        }
        black_box(sums);
        (n * 24 * 64) as f64
    }

    /// 12 chains of n multiply-adds: 16 operations each. SAFETY: needs avx2 and fma.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn fma256(n: usize) -> f64 {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(1.0); 12];
        for _ in 0..n {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        (n * 12 * 16) as f64
    }
}

/// Operations done by one thread in about 3 ms.
fn burst(dtype: DType) -> f64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: each is called only where its instructions are.
    unsafe {
        match (Isa::detect(), dtype) {
            (Isa::Avx512Bf16, DType::BF16) => return peak::dot512(400_000),
            (Isa::Avx512 | Isa::Avx512Bf16, _) => return peak::fma512(400_000),
            (Isa::Avx2, _) => return peak::fma256(800_000),
            _ => {}
        }
    }
    let mut sums = [1.0f32; 32];
    for _ in 0..400_000 {
        sums.iter_mut().for_each(|sum| *sum = *sum * black_box(0.999) + 0.001);
    }
    black_box((sums, dtype));
    400_000.0 * 64.0
}

/// Operations per second from registers, all threads.
fn flops_per_s(dtype: DType) -> f64 {
    let start = Instant::now();
    let done: f64 = rayon::broadcast(|_| burst(dtype)).iter().sum();
    done / start.elapsed().as_secs_f64()
}

/// Large arrays to copy.
struct Copies {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copies {
    const SIZE: usize = 96 << 20;

    fn new() -> Copies {
        Copies { from: vec![1; Self::SIZE], to: vec![2; Self::SIZE] }
    }

    /// Bytes read and written per second, all threads.
    fn bytes_per_s(&mut self) -> f64 {
        let part = Self::SIZE / rayon::current_num_threads();
        let start = Instant::now();
        rayon::scope(|scope| {
            for (to, from) in self.to.chunks_mut(part).zip(self.from.chunks(part)) {
                scope.spawn(move |_| to.copy_from_slice(from));
            }
        });
        2.0 * Self::SIZE as f64 / start.elapsed().as_secs_f64()
    }
}

/// Best (operation, ceiling) per second, taken in turn.
fn measure(cpu: &Cpu, case: &Case, dtype: DType, copies: &mut Copies, work: Work) -> (f64, f64) {
    let mut tensors = case.tensors(dtype, &|which, i| 0.1 + ((i * 7 + which * 13) % 1021) as f64 / 1021.0);
    let amount = if work == Work::Flops { case.flops } else { traffic::bytes(case, &tensors) };
    let (mut best, mut ceiling) = (0.0f64, 0.0f64);
    (case.run)(cpu, &mut tensors);
    let begin = Instant::now();
    let mut rounds = 0;
    while rounds < 2 || (begin.elapsed().as_secs_f64() < 0.25 && rounds < 12) {
        ceiling = ceiling.max(if work == Work::Flops { flops_per_s(dtype) } else { copies.bytes_per_s() });
        for _ in 0..2 {
            let start = Instant::now();
            (case.run)(cpu, &mut tensors);
            best = best.max(amount / start.elapsed().as_secs_f64());
        }
        rounds += 1;
    }
    (best, ceiling)
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Flops,
    Bytes,
}

fn main() {
    let word = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let cpu = Cpu::new();
    let mut copies = Copies::new();
    println!("Device: {}. T = {T}.\n", cpu.name());
    for (work, unit) in [(Work::Flops, "GFLOP/s"), (Work::Bytes, "GB/s")] {
        println!("| model | operation | shape | dtype | {unit} | ceiling | share |\n|---|---|---|---|---:|---:|---:|");
        for model in &MODELS {
            for mut case in if work == Work::Flops { products(model) } else { passes(model) } {
                if !format!("{} {}", case.operation, case.shape).contains(&word) {
                    continue;
                }
                for arg in &mut case.args {
                    // Plausible values are enough here; the oracle would take minutes.
                    if let Init::From(_) = arg.init {
                        arg.init = Init::Random(1.0);
                    }
                }
                for dtype in [DType::F32, DType::BF16] {
                    let (rate, ceiling) = measure(&cpu, &case, dtype, &mut copies, work);
                    let (name, operation, shape) = (model.name, case.operation, &case.shape);
                    let share = rate / ceiling;
                    println!("| {name} | {operation} | {shape} | {dtype:?} | {:.1} | {:.1} | {share:.2} |", rate / 1e9, ceiling / 1e9);
                }
            }
        }
        println!();
    }
}
