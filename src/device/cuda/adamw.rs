//! AdamW.

use super::Cuda;
use super::backend::{Arg, Kernel};
use super::grid::long;
use crate::device::{Adamw, AdamwShard};
use crate::tensor::DType;

impl Cuda {
    /// See `Device::adamw`.
    pub(super) fn adamw(&self, shard: AdamwShard<'_>, how: Adamw) {
        let n = shard.grad.n_elements();
        let all = [&*shard.master, &*shard.m, &*shard.v, &*shard.weight];
        assert!(all.iter().all(|x| x.n_elements() == n), "adamw of {:?} with {all:?}", shard.grad);
        assert!(
            all[..3].iter().all(|x| x.dtype() == DType::F32) && shard.grad.dtype() == DType::F32,
            "adamw of {:?} with {all:?}",
            shard.grad
        );
        if n == 0 {
            return;
        }
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(how.step as f64))) as f32;
        let kernel = Kernel::of("adamw", "adamw", shard.weight.dtype());
        let mut args = vec![
            Cuda::arg_mut(shard.master),
            Cuda::arg_mut(shard.m),
            Cuda::arg_mut(shard.v),
            Cuda::arg_mut(shard.weight),
            Cuda::arg(shard.grad),
        ];
        args.push(long(n));
        let scalars =
            [how.lr, how.beta1, how.beta2, how.eps, how.weight_decay, correction(how.beta1), correction(how.beta2), how.grad_scale];
        args.extend(scalars.map(Arg::Float));
        self.backend.launch(&kernel, self.flat(n), &args);
    }
}
