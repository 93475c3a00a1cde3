//! The model against Hugging Face transformers in float64 (tests/goldens/make.py): logits, losses, every gradient, and weights
//! after three clipped AdamW steps, on one rank and divided over several, through import, executor and sharded optimizer. f32
//! storage stays within five times transformers' own float32 error, bf16 storage within twice its bf16 error.

mod golden_runs;
#[path = "golden_runs/reward.rs"]
mod reward;

use golden_runs::How;
use trireme::device::Device;
use trireme::device::cpu::Cpu;
use trireme::parallel::layout::ParallelLayout;
use trireme::tensor::DType;

fn cpu() -> Box<dyn Device> {
    Box::new(Cpu::new())
}

#[test]
fn logits_equal_transformers() {
    golden_runs::check_logits(&Cpu::new());
}

/// On one rank and under tensor, pipeline and interleaved parallelism, in one micro-batch or two.
#[test]
fn training_equals_transformers() {
    let seen = golden_runs::check_training(&cpu, DType::F32, |_| true);
    let seen: Vec<_> = seen.iter().map(|layout| (layout.tp, layout.pp, layout.vp)).collect();
    assert!([(4, 1, 1), (2, 2, 2)].iter().all(|layout| seen.contains(layout)), "the variants cover only {seen:?}");
}

#[test]
fn bf16_training_stays_near_transformers() {
    golden_runs::check_training(&cpu, DType::BF16, |layout| layout.vp == 1 && layout.world() <= 2);
}

/// A reward model: attributes at the last token, loss over the labels there are, and every gradient equal those of transformers'
/// NemotronForSequenceClassification, in one micro-batch or three, divided in every way; f32 and bf16 with the tolerances above.
#[test]
fn reward_models_equal_transformers() {
    let tmp = tempfile::tempdir().unwrap();
    for (tp, pp) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        let layout = ParallelLayout { tp, pp, dp: 1, vp: 1 };
        reward::check(&cpu, How { layout, dtype: DType::F32 }, (5.0 * 7e-7, 1e-5), tmp.path());
        reward::check(&cpu, How { layout, dtype: DType::BF16 }, (3e-2, 6e-2), tmp.path());
    }
}
