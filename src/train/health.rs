//! Numeric health: whether a step's loss and gradient norm can be trusted, decided before the update. What is judged is the
//! global loss and the global norm, which are the same bits on every rank, so all ranks decide alike at any layout. A skipped
//! step leaves weights and moments as they are; its samples count as consumed.
//!
//! A spike is a loss above mean + z * deviation of the last accepted steps (as in llm.c's and OLMo's skipping of steps), or a
//! norm above a fixed limit. This file knows nothing of tensors or files.

use crate::recipe;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What becomes of a step.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    /// The update is made.
    Sound,
    /// It is not, for this reason.
    Skip(String),
}

/// What was seen so far; a checkpoint keeps it, so that a resumed run judges as the undisturbed one.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct History {
    /// Losses of the last accepted steps of this phase, oldest first.
    losses: VecDeque<f64>,
    /// Steps skipped within the last window, ascending.
    skipped: VecDeque<u64>,
    /// Steps skipped since the run began.
    n_skipped: u64,
}

/// Judges steps in order.
pub struct Health {
    settings: recipe::Health,
    history: History,
}

impl Health {
    /// Goes on from `history`.
    pub fn new(settings: &recipe::Health, history: History) -> Health {
        Health { settings: settings.clone(), history }
    }

    /// What a checkpoint keeps.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Steps skipped since the run began.
    pub fn n_skipped(&self) -> u64 {
        self.history.n_skipped
    }

    /// Another distribution has another loss: statistics begin anew.
    pub fn begin_phase(&mut self) {
        self.history.losses.clear();
    }

    /// Judges step number `step` (from 1) and remembers it. The same arguments on every rank give the same verdict.
    pub fn judge(&mut self, step: u64, loss: f64, grad_norm: f64) -> Verdict {
        let window = self.settings.window;
        let forgotten = step.saturating_sub(window as u64);
        while self.history.skipped.front().is_some_and(|&skipped| skipped <= forgotten) {
            self.history.skipped.pop_front();
        }
        if let Some(reason) = self.complaint(loss, grad_norm) {
            self.history.skipped.push_back(step);
            self.history.n_skipped += 1;
            return Verdict::Skip(reason);
        }
        self.history.losses.push_back(loss);
        while self.history.losses.len() > window {
            self.history.losses.pop_front();
        }
        Verdict::Sound
    }

    /// What is wrong when too many steps were skipped up to `step`.
    pub fn over_limit(&self, step: u64) -> Option<String> {
        let skipped = &self.history.skipped;
        let in_a_row = (0..).zip(skipped.iter().rev()).take_while(|&(i, &at)| at + i == step).count();
        let (row_limit, window_limit) = (self.settings.max_skips_in_a_row, self.settings.max_skips_in_window);
        if in_a_row > row_limit {
            return Some(format!("{in_a_row} steps in a row would have to be skipped, health.max_skips_in_a_row = {row_limit}"));
        }
        (skipped.len() > window_limit).then(|| {
            let (n, window) = (skipped.len(), self.settings.window);
            format!("{n} of the last {window} steps would have to be skipped, health.max_skips_in_window = {window_limit}")
        })
    }

    /// Why these numbers are not to be trusted.
    fn complaint(&self, loss: f64, grad_norm: f64) -> Option<String> {
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Some(format!("loss {loss}, gradient norm {grad_norm}"));
        }
        if let Some(limit) = self.settings.max_grad_norm.filter(|&limit| grad_norm > limit) {
            return Some(format!("gradient norm {grad_norm:.4}, health.max_grad_norm = {limit}"));
        }
        let (losses, z) = (&self.history.losses, self.settings.loss_z);
        if z == 0.0 || losses.len() < self.settings.window.div_ceil(2).max(2) {
            return None;
        }
        let n = losses.len() as f64;
        let mean = losses.iter().sum::<f64>() / n;
        let deviation = (losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        let off = (loss - mean) / deviation;
        // Equal losses have no deviation and tell nothing of what is usual.
        (deviation > 0.0 && off > z)
            .then(|| format!("loss {loss:.4} is {off:.1} deviations above the mean {mean:.4} of {n} steps, health.loss_z = {z}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> recipe::Health {
        recipe::Health { window: 8, loss_z: 3.0, max_grad_norm: Some(10.0), max_skips_in_a_row: 2, max_skips_in_window: 3 }
    }

    fn is_skipped(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Skip(_))
    }

    /// Each of loss and norm alone is enough, a finite loss with a norm that is not finite too: checked by one of them only,
    /// the weights would be lost.
    #[test]
    fn what_is_not_finite_is_skipped() {
        for (loss, norm) in [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::INFINITY, 1.0), (1.0, f64::INFINITY), (f64::NEG_INFINITY, 1.0)] {
            assert!(is_skipped(&Health::new(&settings(), History::default()).judge(1, loss, norm)), "{loss} {norm}");
        }
    }

    /// The limit of the norm is exclusive; the z-score begins with half a window, is measured against accepted losses only, and
    /// falls never count.
    #[test]
    fn spikes_are_skipped() {
        let mut health = Health::new(&settings(), History::default());
        assert_eq!(health.judge(1, 2.0, 10.0), Verdict::Sound);
        assert!(is_skipped(&health.judge(2, 2.0, 10.1)));
        for (step, loss) in (3..).zip([100.0, 2.0]) {
            assert_eq!(health.judge(step, loss, 1.0), Verdict::Sound, "not enough steps to compare with");
        }
        let mut health = Health::new(&settings(), History::default());
        for (step, loss) in (1..).zip([2.0, 2.2, 1.8, 2.0]) {
            assert_eq!(health.judge(step, loss, 1.0), Verdict::Sound);
        }
        // Mean 2, variance (0 + 0.04 + 0.04 + 0) / 3: three deviations are 0.4899.
        for (step, loss) in (5..7).zip([2.491, 100.0]) {
            assert!(is_skipped(&health.judge(step, loss, 1.0)), "{loss}");
        }
        assert_eq!(health.clone_for_test().judge(7, 2.489, 1.0), Verdict::Sound, "skipped losses are not part of the mean");
        assert_eq!(health.clone_for_test().judge(7, 0.1, 1.0), Verdict::Sound, "a fall");
        health.begin_phase();
        assert_eq!(health.judge(7, 9.0, 1.0), Verdict::Sound, "another distribution");
    }

    /// The run ends one past either limit, and skips further back than the window are forgotten.
    #[test]
    fn limits() {
        let mut health = Health::new(&settings(), History::default());
        for step in 1..=2 {
            health.judge(step, f64::NAN, 1.0);
            assert_eq!(health.over_limit(step), None);
        }
        health.judge(3, f64::NAN, 1.0);
        assert!(health.over_limit(3).is_some_and(|wrong| wrong.contains("3 steps in a row")));
        let mut health = Health::new(&settings(), History::default());
        for step in 1..=20 {
            // One of three: at most three of eight steps.
            health.judge(step, if step % 3 == 0 { f64::NAN } else { 1.0 }, 1.0);
            assert_eq!(health.over_limit(step), None, "step {step}");
        }
        for step in [21, 22] {
            health.judge(step, f64::NAN, 1.0);
        }
        assert!(health.over_limit(22).is_some_and(|wrong| wrong.contains("4 of the last 8 steps")));
    }

    /// History that went through a checkpoint judges to the last bit as the one that did not.
    #[test]
    fn history_survives_a_checkpoint() {
        let mut health = Health::new(&settings(), History::default());
        for step in 1..30u64 {
            let loss = 2.0 + (step as f64).sin() / 3.0;
            let text = serde_json::to_string(health.history()).expect("plain data");
            let mut restored = Health::new(&settings(), serde_json::from_str(&text).expect("just written"));
            let norm = if step % 7 == 0 { 11.0 } else { 1.0 };
            assert_eq!(restored.judge(step, loss, norm), health.judge(step, loss, norm));
            assert_eq!(restored.history(), health.history());
        }
    }

    impl Health {
        fn clone_for_test(&self) -> Health {
            Health::new(&self.settings, self.history.clone())
        }
    }
}
