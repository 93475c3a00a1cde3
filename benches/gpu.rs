//! The operations of the CUDA device at the shapes of models of 1, 15 and 340 billion parameters (the last as one of eight
//! tensor-parallel ranks), bf16, over ceilings of the same GPU measured in turn with each: a large matrix product on random data, and
//! a copy of 1 GiB. On a Hopper GPU attention, and canonical products of 15 billion parameters, are measured with the kernels for every
//! GPU too ("portable"); and PyTorch's attention, when TRIREME_TORCH_PYTHON names a Python that has it
//! (benches/peers/torch_attention.py). Products by whoever is fastest (gemm), the library or kernels/matmul_hopper.cu, have those of
//! kernels/matmul_hopper.cu or matmul.cu that add in a canonical order below them (gemm_in_pairs, gemm_in_turn; "of gemm": over that
//! rate at the same shape); a table at the end says who was the fastest. Without a GPU it says so and ends, with exit code 2 when
//! TRIREME_NEEDS_GPU is set.
//!
//! `cargo bench --bench gpu [-- [but] WORD..]` prints a markdown table (of the lines whose model, operation and shape contain one of the
//! words, or none of them).

#[allow(dead_code)] // the tests take cases that are not timed
#[path = "../tests/operations/cases.rs"]
mod cases;
#[allow(dead_code)] // cases name their oracles, which a bench does not ask
#[path = "../tests/operations/oracle.rs"]
mod oracle;
mod traffic;

use cases::{Arg, Case, Init, Kind, Vocabulary};
use oracle::Scaled;
use std::time::Instant;
use trireme::device::cuda::Cuda;
use trireme::device::{Activation, Device, Direction, Fp8Scales, Gemm};
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

/// Tokens of a micro-batch.
const T: usize = 4096;
/// Side of the matrix product that is the ceiling.
const SIDE: usize = 8192;
/// Elements of the copy that is the ceiling: 1 GiB of bf16.
const COPY: usize = 1 << 29;
/// Least time of one measurement.
const LEAST_S: f64 = 0.02;

/// One rank of a model: hidden, feed-forward columns here, vocabulary rows here, (query heads, kv heads, head dim) here.
struct Model {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    vocabulary: usize,
    heads: (usize, usize, usize),
}

const MODELS: [Model; 3] = [
    Model { name: "1B", hidden: 2048, ffn: 8192, vocabulary: 32000, heads: (16, 8, 128) },
    Model { name: "15B", hidden: 6144, ffn: 24576, vocabulary: 32000, heads: (48, 8, 128) },
    Model { name: "340B/8", hidden: 18432, ffn: 9216, vocabulary: 32000, heads: (12, 1, 192) },
];

fn products(model: &Model) -> Vec<Case> {
    let (h, f, v) = (model.hidden, model.ffn, model.vocabulary);
    let (qkv, mixed) = (cases::heads_of(model.heads).qkv_columns(), model.heads.0 * model.heads.2);
    let mut list = Vec::new();
    // (outputs, inputs), and the pieces of a canonical sum over each: tp divides the outputs of the one and the inputs of the other.
    for ((out, inner), (of_out, of_inner)) in
        [((qkv, h), (8, 1)), ((h, mixed), (1, 8)), ((f, h), (8, 1)), ((h, f), (1, 8)), ((v, h), (8, 1))]
    {
        list.push(cases::gemm(Gemm::NT, (T, out, inner), Kind::Float));
        list.push(cases::gemm_in_pairs(Gemm::NT, (T, out, inner), Kind::Float, of_inner));
        list.push(cases::gemm(Gemm::NN, (T, inner, out), Kind::Float));
        list.push(cases::gemm_in_pairs(Gemm::NN, (T, inner, out), Kind::Float, of_out));
        list.push(cases::gemm(Gemm::TN.accumulate(), (out, inner, T), Kind::F32));
        list.push(cases::gemm_in_turn(Gemm::TN.accumulate(), (out, inner, T), 1));
    }
    list.push(cases::activated::gemm_and_activation(Activation::SquaredRelu, (T, f, h)));
    list.push(cases::activated::gemm_activation_backward(Activation::SquaredRelu, (T, f, h)));
    list.extend(cases::activated::canonical((T, f, h)));
    for starts in [vec![0, T], (0..=8).map(|i| i * T / 8).collect()] {
        list.push(cases::attention(starts.clone(), model.heads));
        list.push(cases::attention_backward(starts.clone(), model.heads));
        list.push(cases::attention::attention_rope_backward(starts, model.heads));
    }
    list
}

fn passes(model: &Model) -> Vec<Case> {
    let (h, f) = (model.hidden, model.ffn);
    let vocabulary = Vocabulary { t: T, columns: model.vocabulary, n_valid: model.vocabulary, first_row: 0 };
    let tokens = || (0..T).map(|i| i * 7919 % model.vocabulary).collect::<Vec<usize>>();
    let decode: Vec<_> = (0..32).map(|_| (0, 4095, 1)).collect();
    let mut list = vec![
        cases::gemm(Gemm::NT, (1, f, h), Kind::Float),
        cases::gemm_in_pairs(Gemm::NT, (1, f, h), Kind::Float, 1),
        cases::gemm_activation(Activation::SquaredRelu, (1, f, h)),
        cases::gemm_activation(Activation::Swiglu, (1, f / 2, h)),
        cases::add_norm_gemm(true, Some(Activation::SquaredRelu), (1, f, h)),
        cases::add_norm_gemm(true, None, (1, f, h)),
        cases::gemm(Gemm::NT, (1, h, f), Kind::Float),
        cases::gemm_in_pairs(Gemm::NT, (1, h, f), Kind::Float, 8),
        cases::gemm(Gemm::NT, (32, f, h), Kind::Float),
        cases::gemm_in_pairs(Gemm::NT, (32, f, h), Kind::Float, 1),
        cases::gemm(Gemm::NT, (1, model.vocabulary, h), Kind::Float),
        cases::attention_cached(&decode, model.heads),
        cases::attention_cached(&decode[..1], model.heads),
        cases::attention::rope_attention_cached(&decode[..1], model.heads),
        cases::elementwise("copy", T * h, (Kind::Float, Kind::Float)),
        cases::elementwise("add", T * h, (Kind::Float, Kind::Float)),
        cases::elementwise("add", T * h, (Kind::F32, Kind::Float)),
        cases::elementwise("scale", T * h, (Kind::F32, Kind::Float)),
        cases::rope(T, model.heads, (model.heads.2 / 2, Scaled::Plain), Direction::Forward),
        cases::embed(tokens(), (model.vocabulary, h), 0),
        cases::embed_backward(tokens(), (model.vocabulary, h), 0),
        cases::cross_entropy_max(vocabulary),
        cases::cross_entropy_sum(vocabulary),
        cases::cross_entropy_forward(vocabulary),
        cases::cross_entropy_gradient(vocabulary),
        cases::adamw(f * h, 100, 0.1),
        cases::fp8::widen((T, f), Fp8Scales::Rows),
    ];
    for layer in [true, false] {
        list.push(cases::norm(layer, (T, h)));
        list.push(cases::add_norm(layer, (T, h)));
        list.push(cases::norm_backward(layer, (T, h)));
    }
    for kind in [Activation::SquaredRelu, Activation::Swiglu] {
        list.push(cases::activation(kind, (T, f)));
        list.push(cases::activation_backward(kind, (T, f)));
    }
    list
}

/// Seconds of one call, over as many as take the least time; warm.
fn seconds(cuda: &Cuda, work: &mut dyn FnMut()) -> f64 {
    let mut n = 1;
    loop {
        let started = Instant::now();
        (0..n).for_each(|_| work());
        cuda.finish();
        let elapsed = started.elapsed().as_secs_f64();
        if elapsed >= LEAST_S {
            return elapsed / f64::from(n);
        }
        n *= (1.3 * LEAST_S / elapsed.max(1e-6)).ceil().clamp(2.0, 1000.0) as i32;
    }
}

/// The GPU at its best.
struct Ceiling {
    product: [Tensor; 3],
    copy: [Tensor; 2],
}

impl Ceiling {
    fn new(cuda: &Cuda) -> Ceiling {
        let alloc = |shape: &[usize]| cuda.alloc(shape, DType::BF16).unwrap_or_else(|error| panic!("{error}"));
        let random = Random::new(1, "ceiling");
        let values: Vec<half::bf16> = (0..(SIDE * SIDE) as u64).map(|i| half::bf16::from_f64(random.uniform(i) - 0.5)).collect();
        let mut product = [alloc(&[SIDE, SIDE]), alloc(&[SIDE, SIDE]), alloc(&[SIDE, SIDE])];
        product[1..].iter_mut().for_each(|x| cuda.upload(bytemuck::cast_slice(&values), x));
        Ceiling { product, copy: [alloc(&[COPY]), alloc(&[COPY])] }
    }

    /// Operations or bytes per second.
    fn rate(&mut self, cuda: &Cuda, work: Work) -> f64 {
        let [out, a, b] = &mut self.product;
        let [to, from] = &mut self.copy;
        match work {
            Work::Flops => 2.0 * (SIDE as f64).powi(3) / seconds(cuda, &mut || cuda.gemm(out, a, b, Gemm::NT)),
            Work::Bytes => 2.0 * from.n_bytes() as f64 / seconds(cuda, &mut || Device::copy(cuda, to, from)),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Flops,
    Bytes,
}

/// Values to fill arguments with: made once, repeated as often as an argument is long.
struct Noise {
    f32: Vec<f32>,
    bf16: Vec<half::bf16>,
}

impl Noise {
    const LEN: u64 = (1 << 22) - 3;

    fn new() -> Noise {
        let random = Random::new(2, "gpu");
        let f32: Vec<f32> = (0..Noise::LEN).map(|i| random.uniform(i) as f32 - 0.5).collect();
        Noise { bf16: f32.iter().map(|x| half::bf16::from_f32(*x)).collect(), f32 }
    }

    /// Arguments of a case in device memory. What follows from other arguments (an oracle's business) is noise as well.
    fn tensors(&self, cuda: &Cuda, case: &Case) -> Vec<Tensor> {
        let tensor = |arg: &Arg| {
            let dtype = match arg.kind {
                Kind::U32 => DType::U32,
                Kind::F32 => DType::F32,
                Kind::Float => DType::BF16,
                Kind::E4M3 => DType::F8E4M3,
            };
            let mut tensor = cuda.alloc(&arg.dims, dtype).unwrap_or_else(|error| panic!("{error}"));
            let given = |values: &[f64]| values.iter().map(|v| *v as u32).collect::<Vec<u32>>();
            let repeated = |block: &[u8]| {
                let mut bytes = block.repeat(tensor.n_bytes().div_ceil(block.len()));
                bytes.truncate(tensor.n_bytes());
                bytes
            };
            let bytes: Vec<u8> = match (&arg.init, dtype) {
                (Init::Given(values), DType::U32) => bytemuck::cast_slice(&given(values)).to_vec(),
                (_, DType::BF16) => repeated(bytemuck::cast_slice(&self.bf16)),
                _ => repeated(bytemuck::cast_slice(&self.f32)),
            };
            cuda.upload(&bytes, &mut tensor);
            tensor
        };
        case.args.iter().map(tensor).collect()
    }
}

/// Best (operation, ceiling) per second, taken in turn.
fn measure(cuda: &Cuda, case: &Case, mut tensors: Vec<Tensor>, ceiling: &mut Ceiling, work: Work) -> (f64, f64) {
    let amount = if work == Work::Flops { case.flops } else { traffic::bytes(case, &tensors) };
    let (mut best, mut limit) = (0.0f64, 0.0f64);
    for _ in 0..3 {
        limit = limit.max(ceiling.rate(cuda, work));
        best = best.max(amount / seconds(cuda, &mut || (case.run)(cuda, &mut tensors)));
    }
    (best, limit)
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let all_but = words.first().is_some_and(|word| word == "but");
    words.drain(..usize::from(all_but));
    let is_wanted = |text: &str| words.is_empty() || words.iter().any(|word| text.contains(word)) != all_but;
    let cuda = match Cuda::open(0) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("not run: {error}");
            std::process::exit(if std::env::var_os("TRIREME_NEEDS_GPU").is_some() { 2 } else { 0 });
        }
    };
    let portable = Cuda::open(0).unwrap_or_else(|error| panic!("{error}")).without_hopper();
    println!("Device: {}. T = {T}, bf16.\n", cuda.name());
    let (mut ceiling, noise) = (Ceiling::new(&cuda), Noise::new());
    for (work, unit, scale) in [(Work::Flops, "TFLOP/s", 1e12), (Work::Bytes, "GB/s", 1e9)] {
        let mut is_begun = false;
        // Shape and rate of the last product by whoever is fastest.
        let mut of_fastest: Option<(String, f64)> = None;
        for model in &MODELS {
            for case in if work == Work::Flops { products(model) } else { passes(model) } {
                if !is_wanted(&format!("{} {} {}", model.name, case.operation, case.shape)) {
                    continue;
                }
                if !is_begun {
                    println!("| model | operation | shape | {unit} | ceiling | share | of gemm |\n|---|---|---|---:|---:|---:|---:|");
                    is_begun = true;
                }
                let mut devices = vec![(&cuda, "")];
                let is_attention = ["attention", "attention_backward", "attention_rope_backward"].contains(&case.operation);
                let is_canonical = ["gemm_in_pairs", "gemm_in_turn"].contains(&case.operation);
                if cuda.has_hopper_kernels() && (is_attention || is_canonical && model.name == "15B") {
                    devices.push((&portable, ", portable"));
                }
                for (device, kernels) in devices {
                    let (rate, limit) = measure(device, &case, noise.tensors(device, &case), &mut ceiling, work);
                    let (name, operation, shape) = (model.name, case.operation, &case.shape);
                    let fastest = match (operation, &of_fastest) {
                        ("gemm", _) => None,
                        (_, Some((product, rate))) if shape.starts_with(product) => Some(*rate),
                        _ => None,
                    };
                    if operation == "gemm" {
                        of_fastest = Some((shape.clone(), rate));
                    }
                    println!(
                        "| {name}{kernels} | {operation} | {shape} | {:.1} | {:.1} | {:.2} | {} |",
                        rate / scale,
                        limit / scale,
                        rate / limit,
                        fastest.map_or("-".into(), |fastest| format!("{:.2}", rate / fastest))
                    );
                }
            }
        }
        if work == Work::Flops && is_wanted("attention_backward") {
            print_peer();
        }
        println!();
    }
    println!("{}", cuda.contest_table());
}

/// Rows of PyTorch's attention at the shapes of the models, measured now.
fn print_peer() {
    let Some(python) = std::env::var_os("TRIREME_TORCH_PYTHON") else {
        return println!("PyTorch: not run, TRIREME_TORCH_PYTHON is not set");
    };
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/torch_attention.py");
    let shapes = MODELS.iter().map(|model| format!("{},{},{}", model.heads.0, model.heads.1, model.heads.2));
    let mut command = std::process::Command::new(python);
    command.arg(script).arg(T.to_string()).args(shapes);
    // A bundle runs this bench with libraries of its own, which are not Python's.
    if let Some(outer) = std::env::var_os("TRIREME_OUTER_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", outer);
    }
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => println!("PyTorch: {status}"),
        Err(error) => println!("PyTorch: {error}"),
    }
}
