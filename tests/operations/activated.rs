//! Products of a training step with the activation after the up projection and before the down projection's gradient.

use super::{Case, Init, Kind, Role, arg, assigned, gemm, input};
use crate::oracle;
use trireme::device::{Activation, Device, Gemm};
use trireme::tensor::Tensor;

/// An up projection of m rows to f outputs of the activation, whose input is kept.
pub fn gemm_and_activation(kind: Activation, (m, f, k): (usize, usize, usize)) -> Case {
    let n = f * kind.inputs_per_output();
    Case {
        operation: "gemm_and_activation",
        shape: format!("{kind:?} [{m}, {f}, {k}]"),
        args: vec![assigned(&[m, f], Kind::Float), assigned(&[m, n], Kind::Float), input(&[m, k], 1.0), input(&[n, k], 0.3)],
        run: Box::new(move |device, tensors| {
            let [out, raised, x, w] = tensors else { unreachable!() };
            device.gemm_and_activation(out, raised, x, w, kind);
        }),
        oracle: Box::new(move |v, round| {
            let product = oracle::gemm(&v[2], &v[3], None, (m, n, k), (false, true));
            vec![oracle::activation_of_rounded(&product, kind == Activation::Swiglu, oracle::unit_of(round)), product]
        }),
        flops: 2.0 * m as f64 * n as f64 * k as f64,
    }
}

/// The gradient of a down projection's input, of m rows of f columns summed over k, through the activation before it.
pub fn gemm_activation_backward(kind: Activation, (m, f, k): (usize, usize, usize)) -> Case {
    let inputs = [m, f * kind.inputs_per_output()];
    Case {
        operation: "gemm_activation_backward",
        shape: format!("{kind:?} [{m}, {f}, {k}]"),
        args: vec![
            assigned(&inputs, Kind::Float),
            arg(&[m, f], Kind::Float, Role::Room, Init::Random(1.0)),
            input(&[m, k], 1.0),
            input(&[k, f], 0.3),
            input(&inputs, 3.0),
        ],
        run: Box::new(move |device, tensors| {
            let [draised, dout, dy, w, raised] = tensors else { unreachable!() };
            device.gemm_activation_backward(draised, dout, dy, w, raised, kind);
        }),
        oracle: Box::new(move |v, round| {
            let dout = oracle::gemm(&v[2], &v[3], None, (m, f, k), (false, false));
            vec![oracle::activation_backward_of_rounded(&dout, &v[4], kind == Activation::Swiglu, oracle::unit_of(round))]
        }),
        flops: 2.0 * m as f64 * f as f64 * k as f64,
    }
}

/// Both in canonical order with squared ReLU, at once where the device can. Their bits are those of the two operations
/// (decode_cases/fused.rs), each of which has an oracle.
pub fn canonical(shape: (usize, usize, usize)) -> [Case; 2] {
    let kind = Activation::SquaredRelu;
    let like_out = [shape.0, shape.1];
    let oracle = |_: &[Vec<f64>], _: &dyn Fn(f64) -> f64| unreachable!("it is for benches");
    let mut forward = gemm(Gemm::NT, shape, Kind::Float);
    forward.args.push(assigned(&like_out, Kind::Float));
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [raised, x, w, activated] = tensors else { unreachable!() };
        let sums = device.canonical().expect("sums in canonical order");
        if !sums.gemm_activated(activated, raised, x, w, kind) {
            sums.gemm_in_pairs(raised, x, w, Gemm::NT, 1);
            device.activation(activated, raised, kind);
        }
    };
    let forward = Case { operation: "canonical gemm_and_activation", run: Box::new(run), oracle: Box::new(oracle), ..forward };
    let mut backward = gemm(Gemm::NN, shape, Kind::Float);
    backward.args.extend([input(&like_out, 1.0), arg(&like_out, Kind::Float, Role::Room, Init::Random(1.0))]);
    let run = move |device: &dyn Device, tensors: &mut [Tensor]| {
        let [draised, dy, w, raised, dactivated] = tensors else { unreachable!() };
        let sums = device.canonical().expect("sums in canonical order");
        if !sums.gemm_activation_backward(draised, dy, w, raised, kind) {
            sums.gemm_in_pairs(dactivated, dy, w, Gemm::NN, 1);
            device.activation_backward(draised, dactivated, raised, kind);
        }
    };
    [forward, Case { operation: "canonical gemm_activation_backward", run: Box::new(run), oracle: Box::new(oracle), ..backward }]
}
