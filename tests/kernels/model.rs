//! Whole models on the CUDA device over the emulator: logits and training, held to the numbers of transformers as the CPU is.

use crate::emulator::emulator;
use crate::golden_runs::{self, How};
use crate::reward;
use trireme::device::Device;
use trireme::device::cuda::Cuda;
use trireme::parallel::layout::ParallelLayout;
use trireme::tensor::DType;

fn cuda() -> Box<dyn Device> {
    Box::new(Cuda::with_backend(emulator().expect("asked for before")))
}

#[test]
fn logits_equal_transformers() {
    if emulator().is_some() {
        golden_runs::check_logits(&*cuda());
    }
}

/// On one rank and under tensor and pipeline parallelism, where tensors of the device travel through host memory.
#[test]
fn training_equals_transformers() {
    if emulator().is_some() {
        golden_runs::check_training(&cuda, DType::F32, |layout| layout.vp == 1 && layout.world() <= 2);
        golden_runs::check_training(&cuda, DType::BF16, |layout| layout.world() == 1);
    }
}

/// A reward model: attributes, loss and gradients, on one rank and two; tolerances as those of tests/model_goldens.rs.
#[test]
fn reward_models_equal_transformers() {
    if emulator().is_none() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    for tp in [1, 2] {
        let layout = ParallelLayout { tp, ..ParallelLayout::SINGLE };
        reward::check(&cuda, How { layout, dtype: DType::F32 }, (5.0 * 7e-7, 1e-5), tmp.path());
    }
    let how = How { layout: ParallelLayout::SINGLE, dtype: DType::BF16 };
    reward::check(&cuda, how, (3e-2, 6e-2), tmp.path());
}
