//! The table of operations: how to call each, with what arguments, and what must come out. Drives the tests and the bench.

pub mod activated;
pub mod attention;
pub mod fp8;
mod vocabulary;

use crate::oracle::{self, HeadCounts, Near, Scaled, U, near};
pub use attention::{attention, attention_backward, attention_cached};
use trireme::device::{Activation, Adamw, AdamwShard, Device, Direction, Gemm, Heads, LinearScaling, Llama3Scaling};
use trireme::device::{Norm, NormKind, NormOf, Rope, RopeScaling, Store, YarnScaling};
use trireme::tensor::{DType, Tensor};
pub use vocabulary::{Vocabulary, cross_entropy_forward, cross_entropy_gradient, cross_entropy_max, cross_entropy_sum};

/// Element type of an argument.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Kind {
    /// The dtype under test.
    Float,
    F32,
    U32,
    /// Rounded to the nearest.
    E4M3,
}

/// What the operation does with an argument.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Role {
    Input,
    /// Poisoned with NaN before the call.
    Assigned,
    /// Starts from its initial values.
    Updated,
    /// Room for what nobody asks for.
    Room,
}

/// Values out of those of arguments.
type OfArguments = dyn Fn(&[Vec<f64>]) -> Vec<f64> + Send + Sync;

/// First values.
pub enum Init {
    /// Normal with this standard deviation.
    Random(f64),
    Given(Vec<f64>),
    /// A function of the arguments before it, as they were rounded.
    From(Box<OfArguments>),
}

pub struct Arg {
    pub dims: Vec<usize>,
    pub kind: Kind,
    pub role: Role,
    pub init: Init,
}

type Run = Box<dyn Fn(&dyn Device, &mut [Tensor]) + Send + Sync>;
/// Values of all arguments and the rounding of the dtype under test, to what is near each argument that is not an input.
type Oracle = Box<dyn Fn(&[Vec<f64>], &dyn Fn(f64) -> f64) -> Vec<Vec<Near>> + Send + Sync>;

pub struct Case {
    pub operation: &'static str,
    pub shape: String,
    pub args: Vec<Arg>,
    pub run: Run,
    pub oracle: Oracle,
    /// Multiplications and additions; 0 where memory is what counts.
    pub flops: f64,
}

impl Case {
    /// Fresh tensors; `random` gives normal values for (argument, index).
    pub fn tensors(&self, dtype: DType, random: &dyn Fn(u64, u64) -> f64) -> Vec<Tensor> {
        let mut values: Vec<Vec<f64>> = Vec::new();
        let mut tensors = Vec::new();
        for (which, arg) in self.args.iter().enumerate() {
            let n = arg.dims.iter().product::<usize>();
            let raw: Vec<f64> = match &arg.init {
                Init::Random(deviation) => (0..n).map(|i| deviation * random(which as u64, i as u64)).collect(),
                Init::Given(given) => given.clone(),
                Init::From(function) => function(&values),
            };
            assert_eq!(raw.len(), n, "{} {}", self.operation, self.shape);
            let poisoned = arg.role == Role::Assigned;
            let floats: Vec<f32> = raw.iter().map(|v| if poisoned { f32::NAN } else { *v as f32 }).collect();
            let tensor = match (arg.kind, dtype) {
                (Kind::U32, _) => Tensor::from_u32(&arg.dims, &raw.iter().map(|v| *v as u32).collect::<Vec<_>>()),
                (Kind::E4M3, _) => {
                    let mut codes = Tensor::host(&arg.dims, DType::F8E4M3, None).expect("memory");
                    let rounded = floats.iter().map(|v| oracle::nearest_e4m3(f64::from(*v)));
                    codes.bytes_mut().iter_mut().zip(rounded).for_each(|(code, rounded)| *code = rounded);
                    codes
                }
                (Kind::Float, DType::BF16) => Tensor::from_bf16(&arg.dims, &floats),
                _ => Tensor::from_f32(&arg.dims, &floats),
            };
            values.push(widened(&tensor));
            tensors.push(tensor);
        }
        tensors
    }
}

/// Elements of any host tensor as f64.
pub fn widened(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        DType::U32 => tensor.u32().iter().map(|v| f64::from(*v)).collect(),
        DType::F8E4M3 => tensor.bytes().iter().map(|code| oracle::e4m3(*code)).collect(),
        _ => tensor.to_f32_vec().iter().map(|v| f64::from(*v)).collect(),
    }
}

fn arg(dims: &[usize], kind: Kind, role: Role, init: Init) -> Arg {
    Arg { dims: dims.to_vec(), kind, role, init }
}
fn input(dims: &[usize], deviation: f64) -> Arg {
    arg(dims, Kind::Float, Role::Input, Init::Random(deviation))
}
fn ids(values: Vec<usize>) -> Arg {
    arg(&[values.len()], Kind::U32, Role::Input, Init::Given(values.iter().map(|v| *v as f64).collect()))
}
fn assigned(dims: &[usize], kind: Kind) -> Arg {
    arg(dims, kind, Role::Assigned, Init::Random(1.0))
}
fn updated(dims: &[usize], kind: Kind) -> Arg {
    arg(dims, kind, Role::Updated, Init::Random(1.0))
}
fn exact(values: &[f64]) -> Vec<Near> {
    values.iter().map(|v| near(*v, 0.0)).collect()
}

pub fn heads_of((query, kv, dim): HeadCounts) -> Heads {
    Heads { query, kv, dim }
}

pub fn gemm(how: Gemm, (m, n, k): (usize, usize, usize), out: Kind) -> Case {
    let a = if how.trans_a { [k, m] } else { [m, k] };
    let b = if how.trans_b { [n, k] } else { [k, n] };
    let letters = [how.trans_a, how.trans_b].map(|t| if t { 'T' } else { 'N' });
    let accumulate = how.out == Store::Accumulate;
    let out_arg = if accumulate { updated(&[m, n], out) } else { assigned(&[m, n], out) };
    Case {
        operation: "gemm",
        shape: format!("{}{}{} [{m}, {n}, {k}] out {out:?}", letters[0], letters[1], if accumulate { " +=" } else { "" }),
        args: vec![out_arg, input(&a, 1.0), input(&b, 1.0)],
        run: Box::new(move |device, tensors| {
            let [out, a, b] = tensors else { unreachable!() };
            device.gemm(out, a, b, how);
        }),
        oracle: Box::new(move |v, _| {
            let old = accumulate.then_some(&v[0][..]);
            vec![oracle::gemm(&v[1], &v[2], old, (m, n, k), (how.trans_a, how.trans_b))]
        }),
        flops: 2.0 * m as f64 * n as f64 * k as f64,
    }
}

/// An up projection of m rows to f outputs of the activation.
pub fn gemm_activation(kind: Activation, (m, f, k): (usize, usize, usize)) -> Case {
    let n = f * kind.inputs_per_output();
    Case {
        operation: "gemm_activation",
        shape: format!("{kind:?} [{m}, {f}, {k}]"),
        args: vec![
            assigned(&[m, f], Kind::Float),
            input(&[m, k], 1.0),
            input(&[n, k], 0.3),
            arg(&[m, n], Kind::Float, Role::Room, Init::Random(1.0)),
        ],
        run: Box::new(move |device, tensors| {
            let [out, x, w, raised] = tensors else { unreachable!() };
            device.gemm_activation(out, raised, x, w, kind);
        }),
        oracle: Box::new(move |v, round| {
            let product = oracle::gemm(&v[1], &v[2], None, (m, n, k), (false, true));
            vec![oracle::activation_of_rounded(&product, kind == Activation::Swiglu, oracle::unit_of(round))]
        }),
        flops: 2.0 * m as f64 * n as f64 * k as f64,
    }
}

/// The same product, its k in so many equal pieces that are added in pairs.
pub fn gemm_in_pairs(how: Gemm, shape: (usize, usize, usize), out: Kind, n_pieces: usize) -> Case {
    let case = gemm(how, shape, out);
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [out, a, b] = tensors else { unreachable!() };
        device.canonical().expect("sums in canonical order").gemm_in_pairs(out, a, b, how, n_pieces);
    };
    Case { operation: "gemm_in_pairs", shape: format!("{}, {n_pieces} pieces", case.shape), run: Box::new(run), ..case }
}

/// A weight gradient, its k in pieces of unequal length that are added in turn.
pub fn gemm_in_turn(how: Gemm, shape: (usize, usize, usize), n_pieces: usize) -> Case {
    let case = gemm(how, shape, Kind::F32);
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [out, a, b] = tensors else { unreachable!() };
        let starts: Vec<usize> = (0..=n_pieces).map(|i| i * i * shape.2 / (n_pieces * n_pieces)).collect();
        device.canonical().expect("sums in canonical order").gemm_in_turn(out, a, b, how, &starts);
    };
    Case { operation: "gemm_in_turn", shape: format!("{}, {n_pieces} pieces", case.shape), run: Box::new(run), ..case }
}

/// copy, add, scale, fill_zero over n elements; `other` is the kind of the second operand.
pub fn elementwise(operation: &'static str, n: usize, kinds: (Kind, Kind)) -> Case {
    let x = if operation == "copy" { assigned(&[n], kinds.0) } else { updated(&[n], kinds.0) };
    Case {
        operation,
        shape: format!("[{n}] {:?} {:?}", kinds.0, kinds.1),
        args: vec![x, arg(&[n], kinds.1, Role::Input, Init::Random(1.0))],
        run: Box::new(move |device, tensors| {
            let [x, y] = tensors else { unreachable!() };
            match operation {
                "copy" => device.copy(x, y),
                "add" => device.add(x, y),
                "scale" => device.scale(x, 0.37),
                "fill_zero" => device.fill_zero(x),
                _ => unreachable!(),
            }
        }),
        oracle: Box::new(move |v, _| {
            let pairs = v[0].iter().zip(&v[1]);
            vec![match operation {
                "copy" => exact(&v[1]),
                "add" => pairs.map(|(x, y)| near(x + y, U * (x + y).abs())).collect(),
                "scale" => pairs.map(|(x, _)| f64::from(0.37f32) * x).map(|y| near(y, U * y.abs())).collect(),
                _ => pairs.map(|_| near(0.0, 0.0)).collect(),
            }]
        }),
        flops: 0.0,
    }
}

/// Columns of several ranks beside each other: as many parts of `width` as `columns` need, and some more that nobody reads.
pub fn join_columns(t: usize, columns: usize, width: usize) -> Case {
    let n_parts = columns.div_ceil(width) + 1;
    Case {
        operation: "join_columns",
        shape: format!("[{t}, {columns}] of {n_parts} parts of {width}"),
        args: vec![assigned(&[t, columns], Kind::Float), input(&[n_parts * t, width], 1.0)],
        run: Box::new(move |device, tensors| {
            let [out, parts] = tensors else { unreachable!() };
            device.join_columns(out, parts);
        }),
        oracle: Box::new(move |v, _| {
            // What each part says of each of its columns, the first to speak of one being heard.
            let mut out: Vec<Option<f64>> = vec![None; t * columns];
            for (row, values) in v[1].chunks(width).enumerate().take(columns.div_ceil(width) * t) {
                let (part, t) = (row / t, row % t);
                let first = if (part + 1) * width > columns { columns - width } else { part * width };
                for (i, value) in values.iter().enumerate() {
                    out[t * columns + first + i].get_or_insert(*value);
                }
            }
            vec![out.into_iter().map(|x| near(x.expect("every column is some part's"), 0.0)).collect()]
        }),
        flops: 0.0,
    }
}

pub fn embed(tokens: Vec<usize>, (rows, h): (usize, usize), first_row: usize) -> Case {
    let t = tokens.len();
    Case {
        operation: "embed",
        shape: format!("[{t}, {h}] of {rows} rows from {first_row}"),
        args: vec![assigned(&[t, h], Kind::Float), ids(tokens), input(&[rows, h], 1.0)],
        run: Box::new(move |device, tensors| {
            let [out, tokens, table] = tensors else { unreachable!() };
            device.embed(out, tokens, table, first_row);
        }),
        oracle: Box::new(move |v, _| {
            let here = |t: f64| t as usize >= first_row && (t as usize) < first_row + rows;
            let value = |t: f64, i: usize| if here(t) { v[2][(t as usize - first_row) * h + i] } else { 0.0 };
            vec![v[1].iter().flat_map(|t| (0..h).map(|i| near(value(*t, i), 0.0)).collect::<Vec<_>>()).collect()]
        }),
        flops: 0.0,
    }
}

pub fn embed_backward(tokens: Vec<usize>, (rows, h): (usize, usize), first_row: usize) -> Case {
    let t = tokens.len();
    Case {
        operation: "embed_backward",
        shape: format!("[{t}, {h}] of {rows} rows from {first_row}"),
        args: vec![updated(&[rows, h], Kind::F32), ids(tokens), input(&[t, h], 1.0)],
        run: Box::new(move |device, tensors| {
            let [dtable, tokens, dout] = tensors else { unreachable!() };
            device.embed_backward(dtable, dout, tokens, first_row);
        }),
        oracle: Box::new(move |v, _| {
            let mut out: Vec<Near> = v[0].iter().map(|x| near(*x, (t + 1) as f64 * U * x.abs())).collect();
            for (row, token) in v[1].iter().enumerate() {
                let token = *token as usize;
                if token >= first_row && token < first_row + rows {
                    for i in 0..h {
                        let to = &mut out[(token - first_row) * h + i];
                        to.value += v[2][row * h + i];
                        to.bound += (t + 1) as f64 * U * v[2][row * h + i].abs();
                    }
                }
            }
            vec![out]
        }),
        flops: 0.0,
    }
}

fn norm_of(layer: bool) -> Norm {
    Norm { kind: if layer { NormKind::LayerNorm1P } else { NormKind::RmsNorm }, eps: 1e-5 }
}

pub fn norm(layer: bool, (t, h): (usize, usize)) -> Case {
    Case {
        operation: "norm",
        shape: format!("{} [{t}, {h}]", if layer { "layernorm1p" } else { "rmsnorm" }),
        args: vec![assigned(&[t, h], Kind::Float), assigned(&[t, 2], Kind::F32), input(&[t, h], 2.0), input(&[h], 1.0), input(&[h], 1.0)],
        run: Box::new(move |device, tensors| {
            let [out, stats, x, gain, bias] = tensors else { unreachable!() };
            device.norm(out, stats, x, gain, layer.then_some(&*bias), norm_of(layer));
        }),
        oracle: Box::new(move |v, _| {
            let (out, stats) = oracle::norm(&v[2], &v[3], layer.then_some(&v[4]), layer, f64::from(1e-5f32));
            vec![out, stats]
        }),
        flops: 0.0,
    }
}

pub fn add_norm(layer: bool, (t, h): (usize, usize)) -> Case {
    Case {
        operation: "add_norm",
        shape: format!("{} [{t}, {h}]", if layer { "layernorm1p" } else { "rmsnorm" }),
        args: vec![
            updated(&[t, h], Kind::Float),
            assigned(&[t, h], Kind::Float),
            assigned(&[t, 2], Kind::F32),
            input(&[t, h], 2.0),
            input(&[h], 1.0),
            input(&[h], 1.0),
        ],
        run: Box::new(move |device, tensors| {
            let [x, out, stats, delta, gain, bias] = tensors else { unreachable!() };
            device.add_norm(x, delta, out, stats, gain, layer.then_some(&*bias), norm_of(layer));
        }),
        oracle: Box::new(move |v, round| {
            let sum: Vec<f64> = v[0].iter().zip(&v[3]).map(|(x, d)| round(x + d)).collect();
            let (out, stats) = oracle::norm(&sum, &v[4], layer.then_some(&v[5]), layer, f64::from(1e-5f32));
            vec![exact(&sum), out, stats]
        }),
        flops: 0.0,
    }
}

/// The norm of x + delta, a product and its activation; where the device has them apart this is what they are together.
pub fn add_norm_gemm(layer: bool, kind: Option<Activation>, (m, f, k): (usize, usize, usize)) -> Case {
    let n = f * kind.map_or(1, Activation::inputs_per_output);
    Case {
        operation: "add_norm_gemm",
        shape: format!("{} {kind:?} [{m}, {f}, {k}]", if layer { "layernorm1p" } else { "rmsnorm" }),
        args: vec![
            assigned(&[m, f], Kind::Float),
            assigned(&[m, k], Kind::Float),
            input(&[m, k], 2.0),
            input(&[m, k], 2.0),
            input(&[k], 1.0),
            input(&[k], 1.0),
            input(&[n, k], 0.3),
        ],
        run: Box::new(move |device, tensors| {
            let [out, sum, x, delta, gain, bias, w] = tensors else { unreachable!() };
            let norm = NormOf { gain, bias: layer.then_some(&*bias), how: norm_of(layer) };
            device.add_norm_gemm(out, sum, [x, delta], norm, w, kind);
        }),
        oracle: Box::new(move |v, round| {
            let sum: Vec<f64> = v[2].iter().zip(&v[3]).map(|(x, d)| round(x + d)).collect();
            let (normed, _) = oracle::norm(&sum, &v[4], layer.then_some(&v[5]), layer, f64::from(1e-5f32));
            let unit = oracle::unit_of(round);
            let product = oracle::gemm_of_rounded(&normed, &v[6], (m, n, k), unit);
            let out = match kind {
                Some(kind) => oracle::activation_of_rounded(&product, kind == Activation::Swiglu, unit),
                None => product,
            };
            vec![out, exact(&sum)]
        }),
        flops: 2.0 * m as f64 * n as f64 * k as f64,
    }
}

pub fn norm_backward(layer: bool, (t, h): (usize, usize)) -> Case {
    let stats = move |v: &[Vec<f64>]| -> Vec<f64> {
        let (_, stats) = oracle::norm(&v[4], &v[5], None, layer, f64::from(1e-5f32));
        stats.iter().map(|s| s.value).collect()
    };
    Case {
        operation: "norm_backward",
        shape: format!("{} [{t}, {h}]", if layer { "layernorm1p" } else { "rmsnorm" }),
        args: vec![
            updated(&[t, h], Kind::Float),
            updated(&[h], Kind::F32),
            updated(&[h], Kind::F32),
            input(&[t, h], 1.0),
            input(&[t, h], 2.0),
            input(&[h], 1.0),
            arg(&[t, 2], Kind::F32, Role::Input, Init::From(Box::new(stats))),
        ],
        run: Box::new(move |device, tensors| {
            let [dx, dgain, dbias, dy, x, gain, stats] = tensors else { unreachable!() };
            device.norm_backward(dx, dgain, layer.then_some(dbias), dy, x, gain, stats, norm_of(layer));
        }),
        oracle: Box::new(move |v, _| {
            let g = oracle::norm_backward((&v[0], &v[1], &v[2]), &v[3], &v[4], &v[5], &v[6], layer);
            vec![g.dx, g.dgain, if layer { g.dbias } else { exact(&v[2]) }]
        }),
        flops: 0.0,
    }
}

pub fn rope(t: usize, heads: HeadCounts, (rotary_dims, scaled): (usize, Scaled), direction: Direction) -> Case {
    let columns = heads_of(heads).qkv_columns();
    let (factor, original_max_position_embeddings) = (8.0, 512);
    let scaling = match scaled {
        Scaled::Plain => None,
        Scaled::Linear => Some(RopeScaling::Linear(LinearScaling { factor })),
        Scaled::Llama3 => Some(RopeScaling::Llama3(Llama3Scaling {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        })),
        Scaled::Yarn => Some(RopeScaling::Yarn(YarnScaling {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        })),
    };
    let how = Rope { rotary_dims, base: 10000.0, scaling, direction };
    Case {
        operation: "rope",
        shape: format!("[{t}] heads {heads:?} rotary {rotary_dims} {scaled:?} {direction:?}"),
        args: vec![updated(&[t, columns], Kind::Float), ids((0..t).map(|i| (i * 37) % 4099).collect())],
        run: Box::new(move |device, tensors| {
            let [qkv, positions] = tensors else { unreachable!() };
            device.rope(qkv, positions, heads_of(heads), how);
        }),
        oracle: Box::new(move |v, _| {
            let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
            vec![oracle::rope(&v[0], &v[1], heads, ((rotary_dims, 10000.0), scaled), sign)]
        }),
        flops: 0.0,
    }
}

pub fn activation(kind: Activation, (t, f): (usize, usize)) -> Case {
    Case {
        operation: "activation",
        shape: format!("{kind:?} [{t}, {f}]"),
        args: vec![assigned(&[t, f], Kind::Float), input(&[t, f * kind.inputs_per_output()], 3.0)],
        run: Box::new(move |device, tensors| {
            let [out, x] = tensors else { unreachable!() };
            device.activation(out, x, kind);
        }),
        oracle: Box::new(move |v, _| vec![oracle::activation(&v[1], kind == Activation::Swiglu)]),
        flops: 0.0,
    }
}

pub fn activation_backward(kind: Activation, (t, f): (usize, usize)) -> Case {
    let inputs = [t, f * kind.inputs_per_output()];
    Case {
        operation: "activation_backward",
        shape: format!("{kind:?} [{t}, {f}]"),
        args: vec![assigned(&inputs, Kind::Float), input(&[t, f], 1.0), input(&inputs, 3.0)],
        run: Box::new(move |device, tensors| {
            let [dx, dout, x] = tensors else { unreachable!() };
            device.activation_backward(dx, dout, x, kind);
        }),
        oracle: Box::new(move |v, _| vec![oracle::activation_backward(&v[1], &v[2], kind == Activation::Swiglu)]),
        flops: 0.0,
    }
}

pub fn adamw(n: usize, step: u64, weight_decay: f32) -> Case {
    let how = Adamw { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, step, grad_scale: 0.7 };
    let squares = move |v: &[Vec<f64>]| v[1].iter().map(|m| 1.3 * m * m + 1e-6).collect();
    Case {
        operation: "adamw",
        shape: format!("[{n}] step {step} decay {weight_decay}"),
        args: vec![
            updated(&[n], Kind::F32),
            arg(&[n], Kind::F32, Role::Updated, Init::Random(0.1)),
            arg(&[n], Kind::F32, Role::Updated, Init::From(Box::new(squares))),
            assigned(&[n], Kind::Float),
            arg(&[n], Kind::F32, Role::Input, Init::Random(0.3)),
        ],
        run: Box::new(move |device, tensors| {
            let [master, m, v, weight, grad] = tensors else { unreachable!() };
            device.adamw(AdamwShard { master, m, v, grad, weight }, how);
        }),
        oracle: Box::new(move |v, _| {
            let (b1, b2) = (f64::from(how.beta1), f64::from(how.beta2));
            let (lr, eps, scale) = (f64::from(how.lr), f64::from(how.eps), f64::from(how.grad_scale));
            let mut out = vec![Vec::new(); 4];
            for (i, gradient) in v[4].iter().enumerate() {
                let g = gradient * scale;
                let m = b1 * v[1][i] + (1.0 - b1) * g;
                let second = b2 * v[2][i] + (1.0 - b2) * g * g;
                let m_bound = 4.0 * U * ((b1 * v[1][i]).abs() + ((1.0 - b1) * g).abs());
                let m_hat_scale = 1.0 / (1.0 - b1.powi(step as i32));
                let denominator = (second / (1.0 - b2.powi(step as i32))).sqrt() + eps;
                let update = m * m_hat_scale / denominator;
                let weight = v[0][i] - lr * (update + f64::from(how.weight_decay) * v[0][i]);
                let step_bound = lr * (m_bound * m_hat_scale / denominator + 12.0 * U * update.abs());
                let bound = step_bound + 2.0 * U * (v[0][i].abs() + weight.abs());
                out[0].push(near(weight, bound));
                out[1].push(near(m, m_bound));
                out[2].push(near(second, 5.0 * U * second));
                out[3].push(near(weight, bound));
            }
            out
        }),
        flops: 0.0,
    }
}
