//! The vocabulary's part of this rank in the cross entropy.

use super::Cuda;
use super::backend::Kernel;
use super::grid::{int, rows};
use crate::tensor::Tensor;

/// One value a row, each.
fn assert_values(what: &str, logits: &Tensor, values: &[&Tensor]) {
    assert!(values.iter().all(|x| x.n_elements() == logits.n_rows()), "{what} of {logits:?} with {values:?}");
}

impl Cuda {
    /// See `Device::cross_entropy_max`.
    pub(super) fn cross_entropy_max(&self, max: &mut Tensor, logits: &Tensor, n_valid: usize) {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert_values("cross_entropy_max", logits, &[max]);
        assert!(n_valid <= columns, "cross_entropy_max of {logits:?}, {n_valid} valid");
        if n > 0 {
            let args = [Cuda::arg_mut(max), Cuda::arg(logits), int(columns), int(n_valid)];
            self.backend.launch(&Kernel::of("cross_entropy", "cross_entropy_max", logits.dtype()), rows(n, columns), &args);
        }
    }

    /// See `Device::cross_entropy_sum`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn cross_entropy_sum(
        &self,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        max: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert_values("cross_entropy_sum", logits, &[sum, target_logit, max, targets]);
        assert!(n_valid <= columns, "cross_entropy_sum of {logits:?}, {n_valid} valid");
        if n > 0 {
            let mut args = vec![Cuda::arg_mut(sum), Cuda::arg_mut(target_logit), Cuda::arg(logits), Cuda::arg(max), Cuda::arg(targets)];
            args.extend([columns, first_row, n_valid].map(int));
            self.backend.launch(&Kernel::of("cross_entropy", "cross_entropy_sum", logits.dtype()), rows(n, columns), &args);
        }
    }

    /// See `Device::cross_entropy_forward`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn cross_entropy_forward(
        &self,
        max: &mut Tensor,
        sum: &mut Tensor,
        target_logit: &mut Tensor,
        logits: &Tensor,
        targets: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert_values("cross_entropy_forward", logits, &[max, sum, target_logit, targets]);
        assert!(n_valid <= columns, "cross_entropy_forward of {logits:?}, {n_valid} valid");
        if n > 0 {
            let mut args = [max, sum, target_logit].map(Cuda::arg_mut).to_vec();
            args.extend([Cuda::arg(logits), Cuda::arg(targets)]);
            args.extend([columns, first_row, n_valid].map(int));
            self.backend.launch(&Kernel::of("cross_entropy", "cross_entropy_forward", logits.dtype()), rows(n, columns), &args);
        }
    }

    /// See `Device::cross_entropy_gradient`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn cross_entropy_gradient(
        &self,
        logits: &mut Tensor,
        max: &Tensor,
        sum: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        first_row: usize,
        n_valid: usize,
    ) {
        let (n, columns) = (logits.n_rows(), logits.row_len());
        assert_values("cross_entropy_gradient", logits, &[max, sum, targets, weights]);
        assert!(n_valid <= columns, "cross_entropy_gradient of {logits:?}, {n_valid} valid");
        if logits.n_elements() > 0 {
            let mut args = vec![Cuda::arg_mut(logits), Cuda::arg(max), Cuda::arg(sum), Cuda::arg(targets), Cuda::arg(weights)];
            args.extend([columns, first_row, n_valid].map(int));
            self.backend.launch(&Kernel::of("cross_entropy", "cross_entropy_gradient", logits.dtype()), rows(n, columns), &args);
        }
    }
}
