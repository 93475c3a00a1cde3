//! Progress of long work: a bar with rate and time to go on a terminal, a plain line every ten seconds in a log.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between two lines in a log.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of one piece of work.
pub struct Progress {
    what: String,
    unit: String,
    total: u64,
    done: u64,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
    /// Another unit whose rate is told too, and how many there were.
    also: Option<(String, u64)>,
}

impl Progress {
    /// Begins work of `total` units. For bytes the unit is "B".
    pub fn new(what: &str, total: u64, unit: &str) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let (position, length, rate) =
                if unit == "B" { ("{bytes}", "{total_bytes}", "{bytes_per_sec}") } else { ("{human_pos}", "{human_len}", "{per_sec}") };
            let template = format!("{{prefix}} {{wide_bar}} {position}/{length} {unit} {rate} {{msg}} ends in {{eta}}");
            let style = ProgressStyle::with_template(&template).expect("a constant template");
            ProgressBar::new(total).with_style(style).with_prefix(what.to_string())
        });
        let now = Instant::now();
        Progress { what: what.into(), unit: unit.into(), total, done: 0, started: now, last_line: now, bar, also: None }
    }

    /// Tells the rate of another unit beside the rate of the work, which may stand still for long; see [`Progress::add_also`].
    #[must_use]
    pub fn with(self, unit: &str) -> Progress {
        Progress { also: Some((unit.into(), 0)), ..self }
    }

    /// `n` more of the other unit.
    pub fn add_also(&mut self, n: u64) {
        if let Some((_, count)) = &mut self.also {
            *count += n;
        }
        self.add(0);
    }

    /// `n` more units are done.
    pub fn add(&mut self, n: u64) {
        self.done += n;
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(self.rate_of_other(" "));
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                log::info!("{}", self.line());
            }
            None => {}
        }
    }

    /// The work is done.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let rate = self.done as f64 / seconds;
        let end = if self.done == 0 {
            "end unknown".to_string()
        } else {
            format!("ends in {:.0} s", self.total.saturating_sub(self.done) as f64 / rate)
        };
        let share = 100.0 * self.done as f64 / self.total.max(1) as f64;
        let Progress { what, unit, done, total, .. } = self;
        if unit == "B" {
            let mb = |bytes: f64| bytes / 1e6;
            return format!("{what}: {:.0} of {:.0} MB ({share:.0} %), {:.1} MB/s, {end}", mb(*done as f64), mb(*total as f64), mb(rate));
        }
        let other = self.rate_of_other(", ");
        format!("{what}: {done} of {total} {unit} ({share:.0} %), {rate:.2} {unit}/s{other}, {end}")
    }

    fn rate_of_other(&self, before: &str) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        self.also.as_ref().map_or(String::new(), |(unit, count)| format!("{before}{:.0} {unit}/s", *count as f64 / seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line in a log says how far, how fast and how long: a person decides on it whether to wait.
    #[test]
    fn a_line_says_rate_and_time_to_go() {
        let mut progress = Progress::new("tokenize", 400, "documents");
        progress.started -= Duration::from_secs(10);
        progress.add(100);
        let line = progress.line();
        assert!(line.starts_with("tokenize: 100 of 400 documents (25 %), ") && line.ends_with("ends in 30 s"), "{line}");

        let mut progress = Progress::new("generate", 4, "responses").with("tokens");
        progress.started -= Duration::from_secs(10);
        progress.add_also(2000);
        let line = progress.line();
        assert!(line.contains("0 of 4 responses (0 %), ") && line.ends_with(", 200 tokens/s, end unknown"), "{line}");
    }
}
