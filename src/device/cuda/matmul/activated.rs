//! Products that end in squared ReLU, forward and backward: in one kernel where there is one and it is wanted, else with a pass after them.

use super::super::Cuda;
use super::super::backend::{Arg, Matrix};
use super::super::contest::Maker;
use super::{Product, matrix};
use crate::device::{Activation, Gemm};
use crate::tensor::{DType, Tensor};

/// Which way it goes through the activation.
#[derive(Clone, Copy, PartialEq)]
pub(in super::super) enum Way {
    /// The product is the activation's input, and both are kept.
    Forward,
    /// It is the gradient of the activation's output, and that of its input is kept.
    Backward,
}

impl Way {
    /// In the names of kernels, of squared ReLU.
    fn name(self) -> &'static str {
        match self {
            Way::Forward => "squared_relu",
            Way::Backward => "squared_relu_backward",
        }
    }
}

impl Cuda {
    /// A product in canonical order of one piece that ends in an activation, forward (its input to `out`, itself to `other`) or backward
    /// (`other` was its input); see `CanonicalSums::gemm_activated` and `gemm_activation_backward`.
    pub(in super::super) fn multiply_activated(
        &self,
        (out, other): (&mut Tensor, u64),
        (a, b): (&Tensor, &Tensor),
        how: Gemm,
        (kind, way): (Activation, Way),
    ) -> bool {
        let product = Product::of(matrix(out), (matrix(a), matrix(b)), how);
        let fits = self.ends_in_activation(&product, other, kind);
        if fits {
            self.multiply_activated_on_hopper(&product, way.name(), other);
        }
        fits
    }

    /// Whether there is a kernel for it that is the fastest of ours.
    fn ends_in_activation(&self, product: &Product, other: u64, kind: Activation) -> bool {
        let Product { c, m, n, k, .. } = product;
        let is_wanted = self.hopper && c.dtype == DType::BF16 && kind == Activation::SquaredRelu && *m > 0 && *n > 0 && *k > 0;
        is_wanted && self.ends_in_activation_on_hopper(product, other)
    }

    /// See `Device::gemm_and_activation`.
    pub(in super::super) fn gemm_and_activation(&self, out: &mut Tensor, raised: &mut Tensor, x: &Tensor, w: &Tensor, kind: Activation) {
        let product = Product::of(matrix(raised), (matrix(x), matrix(w)), Gemm::NT);
        let fits = out.n_elements() * kind.inputs_per_output() == raised.n_elements() && out.dtype() == raised.dtype();
        assert!(fits, "gemm_and_activation to {raised:?} and {out:?}");
        let Arg::Address(other) = Cuda::arg_mut(out) else { unreachable!("a tensor is an address") };
        let mut apart = || {
            self.gemm(raised, x, w, Gemm::NT);
            self.activation(out, raised, kind);
        };
        if !self.ends_in_activation(&product, other, kind) {
            return apart();
        }
        self.contest(product.contest(Way::Forward.name()), 0, &mut |maker, _| match maker {
            Maker::Library => apart(),
            Maker::Own => self.multiply_activated_on_hopper(&product, Way::Forward.name(), other),
        });
    }

    /// See `Device::gemm_activation_backward`.
    pub(in super::super) fn gemm_activation_backward(
        &self,
        draised: &mut Tensor,
        dout: &mut Tensor,
        (dy, w): (&Tensor, &Tensor),
        raised: &Tensor,
        kind: Activation,
    ) {
        let fits = draised.dims() == raised.dims() && [&*draised, &*dout].iter().all(|x| x.dtype() == raised.dtype());
        assert!(fits, "gemm_activation_backward of {raised:?} to {draised:?} over {dout:?}");
        let (through, other) = (Product::of(matrix(dout), (matrix(dy), matrix(w)), Gemm::NN), Cuda::address(raised));
        let product = Product { c: Matrix { address: Cuda::address(draised), ..through.c }, ..through };
        draised.assert_not_lent();
        let mut apart = || {
            self.gemm(dout, dy, w, Gemm::NN);
            self.activation_backward(draised, dout, raised, kind);
        };
        if !self.ends_in_activation(&product, other, kind) {
            return apart();
        }
        self.contest(product.contest(Way::Backward.name()), 0, &mut |maker, _| match maker {
            Maker::Library => apart(),
            Maker::Own => self.multiply_activated_on_hopper(&product, Way::Backward.name(), other),
        });
    }
}
