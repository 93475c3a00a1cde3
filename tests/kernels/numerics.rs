//! Reproducible numerics on the CUDA device over the emulator: whole training runs have the same bits however the work is divided.

use crate::emulator::{emulator, hopper};
use crate::numerics_runs::{Run, Trace, model, resumed, train};
use trireme::device::cuda::Cuda;
use trireme::device::{Activation, Device, NormKind};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::model::ctx::SequenceMode;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::{Mode, Recompute, ScheduleKind};
use trireme::tensor::DType;

const N_STEPS: u64 = 2;
const RECOMPUTES: [Recompute; 3] = [Recompute::None, Recompute::Selective, Recompute::Full];

fn cuda() -> Box<dyn Device> {
    Box::new(Cuda::with_backend(emulator().expect("asked for before")))
}

fn cuda_of_hopper() -> Box<dyn Device> {
    Box::new(Cuda::with_backend(hopper().expect("asked for before")))
}

fn reference(model: ModelConfig, dtype: DType) -> Run {
    Run { global: 8, open: Some(cuda), ..Run::reference(ModelConfig { n_layers: 2, ..model }, dtype) }
}

fn layout(tp: usize, pp: usize, dp: usize) -> ParallelLayout {
    ParallelLayout { tp, pp, dp, vp: 1 }
}

/// Runs over tp, pp, dp, micro-batches, recompute and sequence parallelism, the last three in turn.
fn table(reference: &Run) -> Vec<Run> {
    let layouts = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 1, 1), (4, 1, 2), (1, 1, 4)];
    let runs = layouts.into_iter().enumerate().map(|(i, (tp, pp, dp))| {
        let sequence = if tp > 1 && i % 2 == 1 { SequenceMode::Sharded } else { SequenceMode::Replicated };
        Run { layout: layout(tp, pp, dp), micro: [2, 1, 4][i % 3], recompute: RECOMPUTES[i % 3], sequence, ..reference.clone() }
    });
    runs.filter(Run::fits).collect()
}

fn check(reference: &Run, runs: Vec<Run>) -> Trace {
    let expected = train(reference, N_STEPS);
    assert!(expected.steps.iter().all(|step| step.grad_norm > 0.1), "nothing is learnt");
    for run in runs {
        assert_eq!(train(&run, N_STEPS).first_difference(&expected), None, "{run:?}");
    }
    expected
}

/// Loss, gradient norm, every gradient and weight, bit by bit, in f32; in fast numerics they differ, so the check sees a sum in another
/// order.
#[test]
fn every_layout_gives_the_same_bits_in_f32() {
    if emulator().is_none() {
        return;
    }
    let reference = reference(model(), DType::F32);
    check(&reference, table(&reference));
    let fast = Run { mode: Mode::Fast, ..reference };
    let divided = Run { layout: layout(2, 1, 2), ..fast.clone() };
    assert!(train(&divided, 1).first_difference(&train(&fast, 1)).is_some(), "fast numerics have an order, too");
}

/// The same in bf16 storage, on tensor cores: of every GPU, and of Hopper, where widths of 8 and pieces of 4 terms are none that the copy
/// engine takes.
#[test]
fn every_layout_gives_the_same_bits_in_bf16() {
    if emulator().is_none() {
        return;
    }
    for open in [cuda as fn() -> Box<dyn Device>, cuda_of_hopper] {
        let reference = Run { open: Some(open), ..reference(model(), DType::BF16) };
        check(&reference, table(&reference));
    }
}

/// The other family: RMSNorm, SwiGLU, tied embeddings, and zero-bubble scheduling; heads as wide as the kernels of tensor cores want
/// them, on every GPU and on Hopper's own instructions.
#[test]
fn the_other_family_and_wide_heads() {
    if emulator().is_none() {
        return;
    }
    let llama = ModelConfig { norm: NormKind::RmsNorm, activation: Activation::Swiglu, tied_embeddings: true, ..model() };
    let wide = ModelConfig { n_heads: 2, n_kv_heads: 2, head_dim: 64, ..llama };
    let list = |reference: &Run| {
        let divided = Run { layout: layout(2, 2, 1), recompute: Recompute::Full, sequence: SequenceMode::Sharded, ..reference.clone() };
        let split = Run { layout: layout(1, 2, 2), schedule: ScheduleKind::ZeroBubbleH1, micro: 2, ..reference.clone() };
        vec![divided, split]
    };
    for open in [cuda as fn() -> Box<dyn Device>, cuda_of_hopper] {
        let reference = Run { global: 4, open: Some(open), ..reference(wide.clone(), DType::BF16) };
        check(&reference, list(&reference));
    }
    let reward = reference(ModelConfig { head: HeadKind::Reward(5), tied_embeddings: false, ..model() }, DType::BF16);
    check(&reward, list(&reward));
}

/// Micro-batches so large that products of Hopper end in the activation, forward and backward: the bits of those of every GPU, which do
/// not, whatever is recomputed, and in the two halves of a backward.
#[test]
fn activations_at_the_end_of_products_change_no_bits() {
    if emulator().is_none() {
        return;
    }
    let alone = Run { global: 16, ..reference(ModelConfig { ffn_hidden: 512, ..model() }, DType::BF16) };
    let expected = train(&alone, N_STEPS);
    let large = Run { micro: 16, open: Some(cuda_of_hopper), ..alone };
    let halves = Run { layout: layout(1, 2, 1), schedule: ScheduleKind::ZeroBubbleH1, ..large.clone() };
    let runs = RECOMPUTES.map(|recompute| Run { recompute, ..large.clone() }).into_iter().chain([halves]);
    for run in runs {
        assert_eq!(train(&run, N_STEPS).first_difference(&expected), None, "{run:?}");
    }
}

/// Two steps of four ranks and two of another four are four steps of one.
#[test]
fn a_resume_under_another_layout_goes_on_exactly() {
    if emulator().is_none() {
        return;
    }
    let alone = reference(model(), DType::BF16);
    let expected = train(&alone, 4);
    let first = Run { layout: layout(2, 1, 2), ..alone.clone() };
    let second = Run { layout: layout(1, 2, 2), micro: 2, recompute: Recompute::Full, ..alone };
    assert_eq!(resumed(&first, &second, 2, 4).first_difference(&expected), None);
}
