//! Squared ReLU and SwiGLU.

use super::Cuda;
use super::backend::Kernel;
use super::grid::long;
use crate::device::Activation;
use crate::tensor::Tensor;

/// In the names of kernels.
pub(super) fn name(kind: Activation) -> &'static str {
    match kind {
        Activation::SquaredRelu => "squared_relu",
        Activation::Swiglu => "swiglu",
    }
}

impl Cuda {
    /// See `Device::activation`.
    pub(super) fn activation(&self, out: &mut Tensor, x: &Tensor, kind: Activation) {
        let n = out.n_elements();
        assert!(x.n_elements() == n * kind.inputs_per_output() && out.dtype() == x.dtype(), "activation of {x:?} to {out:?}");
        if n > 0 {
            let args = [Cuda::arg_mut(out), Cuda::arg(x), long(n)];
            self.backend.launch(&Kernel::of("activation", name(kind), x.dtype()), self.flat(n), &args);
        }
    }

    /// See `Device::activation_backward`.
    pub(super) fn activation_backward(&self, dx: &mut Tensor, dout: &Tensor, x: &Tensor, kind: Activation) {
        let n = dout.n_elements();
        let agree = dx.n_elements() == x.n_elements() && x.n_elements() == n * kind.inputs_per_output();
        assert!(agree && dx.dtype() == x.dtype() && dout.dtype() == x.dtype(), "activation_backward of {dout:?} and {x:?} to {dx:?}");
        if n > 0 {
            let args = [Cuda::arg_mut(dx), Cuda::arg(dout), Cuda::arg(x), long(n)];
            let kernel = Kernel::of("activation", &format!("{}_backward", name(kind)), x.dtype());
            self.backend.launch(&kernel, self.flat(n), &args);
        }
    }
}
