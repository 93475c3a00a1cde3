//! Where a rank's time went since it was last asked: by phase, and blocked in communication by group and phase.

use super::record::{GROUPS, Group, PHASES, Phase};

/// Seconds of one rank. The time that it was blocked in communication is within that of the phase.
#[derive(Clone, PartialEq, Debug)]
pub struct Times {
    /// By [`Phase`]; a phase within a phase counts for itself only.
    phase_s: Vec<f64>,
    /// By [`Group`] and [`Phase`].
    exposed_s: Vec<f64>,
}

impl Times {
    /// Numbers in [`Times::to_numbers`].
    pub const N_NUMBERS: usize = PHASES.len() * (1 + GROUPS.len());

    /// From seconds by phase, and by group and phase (group * phases + phase).
    pub(super) fn new(phase_s: Vec<f64>, exposed_s: Vec<f64>) -> Times {
        assert_eq!(phase_s.len() + exposed_s.len(), Times::N_NUMBERS, "one number for each phase and group");
        Times { phase_s, exposed_s }
    }

    /// Seconds in a phase, blocked ones included.
    pub fn phase_s(&self, phase: Phase) -> f64 {
        self.phase_s[phase as usize]
    }

    /// Seconds blocked in communication over a group during a phase.
    pub fn exposed_s(&self, group: Group, phase: Phase) -> f64 {
        self.exposed_s[group as usize * PHASES.len() + phase as usize]
    }

    /// Seconds in a phase without those blocked in communication.
    pub fn busy_s(&self, phase: Phase) -> f64 {
        let blocked: f64 = GROUPS.iter().map(|&group| self.exposed_s(group, phase)).sum();
        (self.phase_s(phase) - blocked).max(0.0)
    }

    /// All numbers, to be sent to another rank.
    pub fn to_numbers(&self) -> Vec<f64> {
        self.phase_s.iter().chain(&self.exposed_s).copied().collect()
    }

    /// Back. Panics when there are not [`Times::N_NUMBERS`].
    pub fn from_numbers(numbers: &[f64]) -> Times {
        let (phase_s, exposed_s) = numbers.split_at(PHASES.len());
        Times::new(phase_s.to_vec(), exposed_s.to_vec())
    }
}
