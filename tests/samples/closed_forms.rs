//! Learning rates against closed forms, the plan of steps against counting.

use proptest::prelude::*;
use trireme::recipe::{Batch, DecayShape, LrDecay, LrSchedule, RampStage, StepPlan, Wsd};

const SHAPES: [DecayShape; 4] = [DecayShape::Linear, DecayShape::Cosine, DecayShape::Exponential, DecayShape::MinusSqrt];

/// Megatron-LM's rate (OptimizerParamScheduler.get_lr, init_lr = 0) written from its description: how far between min_lr and lr.
fn megatron(schedule: &LrSchedule, n: u64) -> f64 {
    let LrSchedule { lr, min_lr, warmup_samples, decay, samples } = *schedule;
    let (x, w, total) = (n as f64, warmup_samples as f64, samples as f64);
    if warmup_samples > 0 && n <= warmup_samples {
        return lr * (x / w);
    }
    let x = x.min(total);
    let r = if total > w { (x - w) / (total - w) } else { 1.0 };
    let mixed = |share: f64| min_lr * (1.0 - share) + lr * share;
    match decay {
        LrDecay::Constant => lr,
        LrDecay::InverseSqrt => f64::max(min_lr, lr * w.sqrt() / x.sqrt()),
        LrDecay::Linear => mixed(1.0 - r),
        // cos^2(pi r / 2): another form of half a cosine.
        LrDecay::Cosine => mixed((std::f64::consts::FRAC_PI_2 * r).cos().powi(2)),
        LrDecay::Wsd(wsd) => {
            let q = 1.0 - (total - x) / wsd.samples as f64;
            if q <= 0.0 {
                return lr;
            }
            mixed(match wsd.shape {
                DecayShape::Linear => 1.0 - q,
                DecayShape::Cosine => (std::f64::consts::FRAC_PI_2 * q).cos().powi(2),
                DecayShape::Exponential => (std::f64::consts::LN_2 * (1.0 - q)).exp() - 1.0,
                DecayShape::MinusSqrt => 1.0 - q.sqrt(),
            })
        }
    }
}

fn any_schedule() -> impl Strategy<Value = LrSchedule> {
    (1e-9..1e2f64, 0.0..1f64, 1..1u64 << 40, 0.0..1f64, 0..8usize, 0.0..1f64).prop_map(|(lr, part, samples, warmup, shape, decay)| {
        let warmup_samples = ((samples as f64 * warmup) as u64).min(samples - 1).max(u64::from(shape == 3 && samples > 1));
        let wsd = |shape| LrDecay::Wsd(Wsd { samples: 1 + ((samples - warmup_samples - 1) as f64 * decay) as u64, shape });
        let decay = match shape {
            0 => LrDecay::Constant,
            1 => LrDecay::Linear,
            2 => LrDecay::Cosine,
            3 => LrDecay::InverseSqrt,
            shape => wsd(SHAPES[shape - 4]),
        };
        LrSchedule { lr, min_lr: lr * part, warmup_samples, decay, samples }
    })
}

proptest! {
    /// Every shape is its closed form at every sample, and stays between min_lr and lr after warm-up: a wrong denominator or a
    /// shifted sample would move all rates. Each form rounds fewer than 40 times at the size of lr.
    #[test]
    fn rates_are_the_closed_forms(schedule in any_schedule(), at in 0.0..1.2f64) {
        let n = 1 + (schedule.samples as f64 * at) as u64;
        let (found, expected) = (schedule.at(n), megatron(&schedule, n));
        prop_assert!((found - expected).abs() <= 40.0 * f64::EPSILON * schedule.lr, "{schedule:?} at {n}: {found}, expected {expected}");
        let slack = 4.0 * f64::EPSILON * schedule.lr;
        prop_assert!(found <= schedule.lr + slack && (n <= schedule.warmup_samples || found >= schedule.min_lr - slack));
    }

    /// The rate depends on samples alone: whatever the batch sizes that led there, and it never rises after warm-up.
    #[test]
    fn rates_never_rise_after_warm_up(schedule in any_schedule(), from in 0.0..1f64, step in 1..1u64 << 30) {
        let n = schedule.warmup_samples.max(1) + (schedule.samples as f64 * from) as u64;
        prop_assert!(schedule.at(n + step) <= schedule.at(n) * (1.0 + 8.0 * f64::EPSILON), "{schedule:?} at {n}");
    }

    /// The plan is what one gets by counting step after step, whatever the ramp and the phases: each step has the batch of the
    /// sample it begins at, each phase ends with the step that reaches its length; and `steps_before` inverts it, at no sample
    /// between. A plan that depended on where a job began would make a resumed run another run.
    #[test]
    fn plans_are_counted_steps(
        stages in prop::collection::vec((1..400u64, 1..40usize), 0..4),
        global in 1..50usize,
        phases in prop::collection::vec(1..500u64, 1..4),
    ) {
        let mut until_sample = 0;
        let ramp: Vec<RampStage> = stages.iter().map(|&(length, global)| {
            until_sample += length;
            RampStage { until_sample, global }
        }).collect();
        let plan = StepPlan::new(&Batch { seq_len: 4, micro: 1, global, ramp: ramp.clone() }, &phases);
        let (mut sample, mut step) = (0u64, 0u64);
        let mut borders = vec![0];
        for (phase, &length) in phases.iter().enumerate() {
            let phase_start = sample;
            while sample < phase_start + length {
                let batch = ramp.iter().find(|stage| stage.until_sample > sample).map_or(global, |stage| stage.global);
                let planned = plan.step(step);
                let found = (planned.phase, planned.first_sample, planned.first_in_phase, planned.global);
                prop_assert_eq!(found, (phase, sample, sample - phase_start, batch));
                (sample, step) = (sample + batch as u64, step + 1);
                borders.push(sample);
            }
        }
        prop_assert_eq!((plan.n_samples(), plan.n_steps()), (sample, step));
        for at in 0..sample + 60 {
            prop_assert_eq!(plan.steps_before(at), borders.binary_search(&at).ok().map(|step| step as u64), "sample {}", at);
        }
    }
}

/// Table 2's run has 900,693 steps: places in it are found at once, exactly, to the last sample.
#[test]
fn long_plans_are_exact() {
    let ramp = vec![RampStage { until_sample: 48_828_125, global: 768 }, RampStage { until_sample: 97_656_250, global: 1536 }];
    let plan = StepPlan::new(&Batch { seq_len: 4096, micro: 1, global: 2304, ramp }, &[1_953_125_000]);
    assert_eq!((plan.n_steps(), plan.n_samples()), (900_693, 1_953_125_376));
    assert_eq!(plan.step(63_578).first_sample, 63_578 * 768);
    assert_eq!((plan.step(63_579).first_sample, plan.step(63_579).global), (63_579 * 768, 1536));
    for step in [0, 1, 63_578, 63_579, 63_580, 95_367, 95_368, 500_000, 900_692] {
        assert_eq!(plan.steps_before(plan.step(step).first_sample), Some(step));
    }
    assert_eq!(plan.steps_before(1_953_125_376), Some(900_693));
}
