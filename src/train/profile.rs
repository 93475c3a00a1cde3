//! Where the time of a step went on all ranks together, from what each rank's recorder measured.

use super::trainer::StepResult;
use crate::comm::Groups;
use crate::flight::{Group, Phase, Times};
use crate::metrics::{Exposed, TimeUse};

/// The phases of which a step consists.
const IN_STEP: [Phase; 7] = [Phase::Data, Phase::Pipeline, Phase::Forward, Phase::Backward, Phase::Reduce, Phase::Optimizer, Phase::Other];
/// The phases of a pass over the pipeline, with what is between its actions.
const IN_PASS: [Phase; 4] = [Phase::Pipeline, Phase::Forward, Phase::Backward, Phase::Reduce];
/// What a stage does in it for itself.
const BUSY: [Phase; 3] = [Phase::Forward, Phase::Backward, Phase::Reduce];
/// Numbers that a rank contributes.
const N_NUMBERS: usize = 17;

/// What all ranks measured of a step.
pub(super) struct Profile {
    /// Where the time went.
    pub time: TimeUse,
    /// On the slowest rank.
    pub step_s: f64,
    /// On the fullest rank.
    pub memory_peak_bytes: u64,
}

/// Gathers and sums up; the same on every rank. `after`: what was measured since the step. Collective.
pub(super) fn of_all_ranks(groups: &Groups, result: &StepResult, after: &Times, memory_peak_bytes: usize) -> Profile {
    let mine = numbers(result, after, memory_peak_bytes as f64);
    let bytes: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut all = vec![0u8; bytes.len() * groups.world.size()];
    groups.world.start_all_gather_bytes(&bytes, &mut all).wait();
    let all: Vec<f64> = all.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect();
    sum_up(&all, groups.layout.pp)
}

fn numbers(result: &StepResult, after: &Times, peak: f64) -> [f64; N_NUMBERS] {
    let (times, before) = (&result.times, &result.before);
    let exposed = |group: Group| IN_STEP.iter().map(|&phase| times.exposed_s(group, phase)).sum::<f64>();
    let pass_s: f64 = IN_PASS.iter().map(|&phase| times.phase_s(phase)).sum();
    let busy_s: f64 = BUSY.iter().map(|&phase| times.phase_s(phase) - times.exposed_s(Group::Pp, phase)).sum();
    [
        result.step_s,
        peak,
        times.busy_s(Phase::Data),
        times.busy_s(Phase::Forward),
        times.busy_s(Phase::Backward),
        times.busy_s(Phase::Reduce),
        times.busy_s(Phase::Optimizer),
        exposed(Group::World),
        exposed(Group::Tp),
        exposed(Group::Dp),
        exposed(Group::Pp),
        after.phase_s(Phase::HeldOut),
        before.phase_s(Phase::Save),
        before.phase_s(Phase::Compare),
        pass_s,
        busy_s,
        times.phase_s(Phase::Save),
    ]
}

fn sum_up(all: &[f64], pp: usize) -> Profile {
    let n_ranks = (all.len() / N_NUMBERS) as f64;
    let column = |i: usize| all.iter().skip(i).step_by(N_NUMBERS).copied();
    let mean = |i: usize| column(i).sum::<f64>() / n_ranks;
    let most = |i: usize| column(i).fold(0.0, f64::max);
    let longest_pass_s = most(14);
    let bubble_share = (pp > 1 && longest_pass_s > 0.0).then(|| (1.0 - mean(15) / longest_pass_s).max(0.0));
    let mut time = TimeUse {
        data: mean(2),
        forward: mean(3),
        backward: mean(4),
        reduce: mean(5),
        optimizer: mean(6),
        wait_save: mean(16),
        other: 0.0,
        exposed: Exposed { world: mean(7), tp: mean(8), dp: mean(9), pp: mean(10) },
        held_out: mean(11),
        save: mean(12),
        compare: mean(13),
        bubble_share,
    };
    let known_s: f64 = time.of_step().iter().map(|(_, seconds)| seconds).sum();
    time.other = (mean(0) - known_s).max(0.0);
    Profile { time, step_s: most(0), memory_peak_bytes: most(1) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two stages, of which one computes half of the longer pass: parts add up to the step, the bubble is what is left of the
    /// pass, and the slowest and the fullest rank decide where they must.
    #[test]
    fn parts_add_up_and_the_bubble_is_what_is_left() {
        let rank = |step_s: f64, peak: f64, forward: f64, pp: f64| -> [f64; N_NUMBERS] {
            let pass_s = forward + 2.0 * forward + pp;
            [step_s, peak, 0.1, forward, 2.0 * forward, 0.0, 0.2, 0.05, 0.0, 0.0, pp, 0.0, 3.0, 0.0, pass_s, 3.0 * forward, 0.0]
        };
        let all = [rank(4.0, 10.0, 1.0, 0.2), rank(3.8, 20.0, 0.5, 1.5)].concat();
        let profile = sum_up(&all, 2);
        assert_eq!((profile.step_s, profile.memory_peak_bytes), (4.0, 20));
        let sum: f64 = profile.time.of_step().iter().map(|(_, seconds)| seconds).sum();
        assert!((sum - 3.9).abs() < 1e-12, "{sum}");
        assert_eq!(profile.time.save, 3.0);
        let bubble = profile.time.bubble_share.expect("two stages");
        assert!((bubble - (1.0 - (3.0 + 1.5) / 2.0 / 3.2)).abs() < 1e-12, "{bubble}");
        assert_eq!(sum_up(&all, 1).time.bubble_share, None);
    }
}
