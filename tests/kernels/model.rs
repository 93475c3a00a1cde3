//! Whole models on the CUDA device over the emulator: logits and training, held to the numbers of transformers as the CPU is.

use crate::emulator::emulator;
use crate::golden_runs::{Allowed, Golden, How, VARIANTS, assert_trained_like, layouts, logits, relative, train_under};
use crate::reward;
use trireme::device::Device;
use trireme::device::cuda::Cuda;
use trireme::parallel::layout::ParallelLayout;
use trireme::tensor::DType;

fn cuda() -> Box<dyn Device> {
    Box::new(Cuda::with_backend(emulator().expect("asked for before")))
}

/// Logits through the KV cache, at once and token by token, with the tolerances of tests/model_goldens.rs, where they are derived.
#[test]
fn logits_equal_transformers() {
    if emulator().is_none() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    for variant in VARIANTS {
        let golden = Golden::open(variant, tmp.path());
        for (dtype, allowed) in [(DType::F32, 5.0 * 7e-7), (DType::BF16, 3e-2)] {
            let error = relative(&logits(&golden, &*cuda(), dtype), &golden.tensors["logits"].1);
            assert!(error <= allowed, "{variant} {dtype:?}: logits differ by {error:.2e}, allowed {allowed:.2e}");
        }
    }
}

/// Loss, every gradient and the weights after three clipped AdamW steps, on one rank and under tensor and pipeline parallelism,
/// where tensors of the device travel through host memory; tolerances as above.
#[test]
fn training_equals_transformers() {
    if emulator().is_none() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    for variant in VARIANTS {
        let golden = Golden::open(variant, tmp.path());
        for (tp, pp) in [(1, 1), (2, 1), (1, 2)] {
            let layout = ParallelLayout { tp, pp, dp: 1, vp: 1 };
            if !layouts(&golden).contains(&layout) {
                continue;
            }
            let trained = train_under(&golden, &cuda, How { layout, dtype: DType::F32 }, tmp.path());
            let allowed = Allowed { loss: 5e-7, later_losses: 5e-6, gradient: 1e-5, weights: Some(2e-5) };
            assert_trained_like(&golden, &trained, &allowed, &format!("{variant} f32 {layout:?}"));
        }
        let how = How { layout: ParallelLayout::SINGLE, dtype: DType::BF16 };
        let trained = train_under(&golden, &cuda, how, tmp.path());
        let allowed = Allowed { loss: 1.5e-2, later_losses: 1.5e-2, gradient: 6e-2, weights: None };
        assert_trained_like(&golden, &trained, &allowed, &format!("{variant} bf16"));
    }
}

/// A reward model: attributes, loss and gradients, on one rank and two; tolerances as above.
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
