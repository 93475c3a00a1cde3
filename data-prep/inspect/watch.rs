//! A run as it goes, in the terminal: how far, how fast, when it ends against the time of its job and the next save, the loss
//! curve, held-out loss, where the time of a step goes, and what rank 0 does now.

use console::Term;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;
use trireme::artifact::MANIFEST;
use trireme::error::{Error, Result};
use trireme::flight::{self, report, rings::RankRing};
use trireme::metrics::{self, Follower, Metrics, Row, TimeUse};
use trireme::recipe::Pretrain;

/// Where the rows stand.
const METRICS: &str = "metrics.jsonl";
/// Steps over which rates and shares are taken.
const RECENT: usize = 20;
/// A rank without a sign of life for longer has ended; file systems of clusters show it late.
const SILENCE_S: f64 = 60.0;
/// Records of rank 0 that are looked at: its newest.
const NEWEST: usize = 64;
/// Size where there is no terminal.
const PAPER: Size = Size { width: 80, height: 34 };
/// Columns of the names of bars and of their numbers.
const NAME_COLUMNS: usize = 12;
const NUMBER_COLUMNS: usize = 20;

/// Of the picture, in characters.
#[derive(Clone, Copy)]
struct Size {
    width: usize,
    height: usize,
}

/// Draws the run until it ends or the user does; once when `once` says so or nobody looks.
pub fn watch(run: &Path, once: Once, every: Duration) -> Result<()> {
    let terminal = Term::stdout();
    let mut metrics = Follower::new(&run.join(METRICS));
    if once == Once::Yes || !terminal.is_term() {
        return crate::print(&picture(&View::of(run, &mut metrics)?, PAPER));
    }
    crate::print("\x1b[2J")?;
    loop {
        let (height, width) = terminal.size();
        let view = View::of(run, &mut metrics)?;
        let size = Size { width: usize::from(width).clamp(40, 200), height: usize::from(height).max(12) - 1 };
        // Over the old picture, line by line, what is left of it cleared: nothing flickers, and scrolling back works.
        let text: String = picture(&view, size).lines().map(|line| format!("{line}\x1b[K\n")).collect();
        crate::print(&format!("\x1b[H{text}\x1b[J"))?;
        let _ = std::io::stdout().flush(); // a reader who left is noticed by the next print
        if view.state.is_final() {
            return Ok(());
        }
        std::thread::sleep(every);
    }
}

/// Whether to draw once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Once {
    /// And leave.
    Yes,
    /// Until the end.
    No,
}

/// How the run is.
enum State {
    Finished,
    /// What rank 0 does.
    Running(String),
    /// No job works on it; since when rank 0 is silent, seconds.
    Ended(Option<f64>),
}

impl State {
    fn of(run: &Path, now_s: f64) -> State {
        if run.join(MANIFEST).is_file() {
            return State::Finished;
        }
        let Ok(ring) = RankRing::read_newest(&flight::ring_path(&flight::folder(run), 0), NEWEST) else { return State::Ended(None) };
        let silent_s = now_s - ring.heartbeat_ns as f64 / 1e9;
        if ring.closed_ns > 0 || silent_s > SILENCE_S {
            return State::Ended(Some(silent_s));
        }
        State::Running(match (ring.waiting(), ring.records.last()) {
            (Some(record), _) => format!("waits in {}", report::operation(record)),
            (None, Some(last)) => report::purpose(last),
            (None, None) => "starting".into(),
        })
    }

    fn is_final(&self) -> bool {
        matches!(self, State::Finished)
    }
}

/// Everything that is drawn.
struct View<'a> {
    name: String,
    state: State,
    metrics: &'a Metrics,
    n_steps: u64,
    save_every: u64,
    now_s: f64,
}

impl View<'_> {
    fn of<'a>(run: &Path, metrics: &'a mut Follower) -> Result<View<'a>> {
        let recipe_path = run.join("recipe.toml");
        if !recipe_path.is_file() {
            return Err(Error::file(run, "not a run: it has no recipe.toml").remedy("name the --out of trireme-pretrain"));
        }
        let recipe = Pretrain::load(&recipe_path, &[])?;
        // Before the first step there is no file.
        let metrics = if run.join(METRICS).is_file() { metrics.update()? } else { metrics.seen() };
        let now_s = metrics::now_unix_s();
        let (n_steps, save_every) = (recipe.plan().n_steps(), recipe.checkpoint.every_steps);
        Ok(View { name: run.display().to_string(), state: State::of(run, now_s), metrics, n_steps, save_every, now_s })
    }

    fn last(&self) -> Option<&Row> {
        self.metrics.rows.last()
    }

    fn recent(&self) -> &[Row] {
        let rows = &self.metrics.rows;
        &rows[rows.len().saturating_sub(RECENT)..]
    }

    /// Seconds from one step to the next, saves and held-out loss included.
    fn step_to_step_s(&self) -> f64 {
        let recent = self.recent();
        let [first, .., last] = recent else { return recent.first().map_or(0.0, |row| row.step_s) };
        let apart_s = (last.unix_s - first.unix_s) / (last.step - first.step).max(1) as f64;
        // Over a change of jobs the clock counts the queue too.
        let began_s = self.metrics.last_job.as_ref().map_or(0.0, |job| job.unix_s);
        if first.unix_s > began_s && apart_s > 0.0 { apart_s } else { mean(recent, |row| row.step_s) }
    }
}

fn mean(rows: &[Row], of: impl Fn(&Row) -> f64) -> f64 {
    rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64
}

/// The whole picture, at most `size.height` lines.
fn picture(view: &View, size: Size) -> String {
    let mut lines = head(view, size.width);
    let bars = bars(view, size);
    let foot = foot(view);
    let left = size.height.saturating_sub(lines.len() + bars.len() + foot.len() + 2);
    if view.metrics.rows.len() > 1 && left >= 6 {
        lines.push(String::new());
        let plot = metrics::loss_plot("Loss", &view.metrics.rows).to_text(size.width, left.clamp(8, 24));
        lines.extend(plot.lines().map(String::from));
    }
    if !bars.is_empty() {
        lines.push(String::new());
        lines.extend(bars);
    }
    lines.extend(foot);
    lines.truncate(size.height);
    lines.iter().map(|line| line.chars().take(size.width).collect::<String>().trim_end().to_string() + "\n").collect()
}

fn head(view: &View, width: usize) -> Vec<String> {
    let state = match &view.state {
        State::Finished => "finished".into(),
        State::Running(_) => format!("running on {} ranks", view.metrics.last_job.as_ref().map_or(0, |job| job.ranks)),
        State::Ended(None) => "no job works on it".into(),
        State::Ended(Some(silent_s)) => format!("no job works on it since {}", duration(*silent_s)),
    };
    let Some(last) = view.last() else { return vec![format!("{}   {state}", view.name), "no step has been measured yet".into()] };
    let share = 100.0 * last.step as f64 / view.n_steps.max(1) as f64;
    let mut lines = vec![format!("{}   {state}   step {} of {} ({share:.0} %)", view.name, last.step, view.n_steps)];
    let mut numbers = vec![format!("loss {:.4}", last.loss)];
    if let Some((row, loss)) = view.metrics.rows.iter().rev().find_map(|row| Some((row, row.validation_loss?))) {
        let bits = row.validation_bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.3} bits a byte"));
        numbers.push(format!("held-out {loss:.4} (step {}{bits})", row.step));
    }
    numbers.push(format!("grad norm {:.3}", last.grad_norm));
    numbers.push(format!("lr {:.2e}", last.lr));
    lines.extend(wrapped(&numbers, width));
    let recent = view.recent();
    let mut speed = vec![
        format!("{} tokens/s", crate::page::group(mean(recent, |row| row.tokens_per_s) as u64)),
        format!("{:.0} % of the GEMM ceiling", 100.0 * mean(recent, |row| row.share_of_gemm_ceiling)),
    ];
    if last.mfu.is_some() {
        speed.push(format!("MFU {:.1} %", 100.0 * mean(recent, |row| row.mfu.unwrap_or(f64::NAN))));
    }
    speed.push(format!("{} a step", duration(mean(recent, |row| row.step_s))));
    speed.push(format!("{} a rank", crate::page::size(last.memory_peak_bytes)));
    lines.extend(wrapped(&speed, width));
    lines.extend(wrapped(&prospects(view, last), width));
    lines
}

/// The parts beside each other, on as many lines as they take.
fn wrapped(parts: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in parts {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 3 + part.chars().count() <= width => {
                line.push_str("   ");
                line.push_str(part);
            }
            _ => lines.push(part.clone()),
        }
    }
    lines
}

/// When it ends, saves, and runs out of time.
fn prospects(view: &View, last: &Row) -> Vec<String> {
    let each_s = view.step_to_step_s();
    let mut parts = Vec::new();
    if matches!(view.state, State::Running(_)) {
        let left_s = |steps: u64| (steps as f64 * each_s - (view.now_s - last.unix_s)).max(0.0);
        let to_end = view.n_steps.saturating_sub(last.step);
        parts.push(format!("ends in {}", duration(left_s(to_end))));
        let next_save = ((last.step / view.save_every + 1) * view.save_every).min(view.n_steps);
        if to_end > 0 {
            parts.push(format!("next save in {} (step {next_save})", duration(left_s(next_save - last.step))));
        }
        if let Some(deadline_s) = view.metrics.last_job.as_ref().and_then(|job| job.deadline_unix_s) {
            let time_s = deadline_s - view.now_s;
            let reaches = last.step + (time_s.max(0.0) / each_s.max(1e-9)) as u64;
            let verdict = if reaches >= view.n_steps { "enough".into() } else { format!("enough for step {reaches}") };
            parts.push(format!("time is up in {}, {verdict}", duration(time_s)));
        }
    }
    if let Some(goodput) = &view.metrics.goodput {
        let jobs = if goodput.n_jobs == 1 { "1 job".into() } else { format!("{} jobs", goodput.n_jobs) };
        parts.push(format!("goodput {:.0} % of {} in {jobs}", 100.0 * goodput.share(), duration(goodput.wall_s)));
    }
    parts
}

/// A bar for each part of a step that counts, the longest first.
fn bars(view: &View, size: Size) -> Vec<String> {
    let timed: Vec<(&Row, TimeUse)> = view.recent().iter().filter_map(|row| Some((row, row.time?))).collect();
    if timed.is_empty() {
        return Vec::new();
    }
    let n = timed.len() as f64;
    let of_step = |i: usize| timed.iter().map(|(_, time)| time.of_step()[i].1).sum::<f64>() / n;
    let names = timed[0].1.of_step().map(|(name, _)| name);
    let mut parts: Vec<(&str, f64)> = names.iter().enumerate().map(|(i, &name)| (name, of_step(i))).collect();
    let total: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    parts.retain(|&(_, seconds)| seconds >= 0.002 * total && seconds > 0.0);
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    parts.truncate((size.height / 3).max(3));
    let around = |i: usize| timed.iter().map(|(_, time)| time.around_step()[i].1).sum::<f64>() / n;
    let mut title = format!("Where {} of a step go", duration(total));
    let bubbles: Vec<f64> = timed.iter().filter_map(|(_, time)| time.bubble_share).collect();
    if !bubbles.is_empty() {
        let _ = write!(title, ", bubble {:.0} %", 100.0 * bubbles.iter().sum::<f64>() / bubbles.len() as f64);
    }
    for (i, (name, _)) in timed[0].1.around_step().iter().enumerate().filter(|&(i, _)| around(i) > 0.0) {
        let _ = write!(title, "; {name} {} more", duration(around(i)));
    }
    let width = size.width - NAME_COLUMNS - NUMBER_COLUMNS;
    let most = parts.first().map_or(0.0, |part| part.1);
    let bar_of = |&(name, seconds): &(&str, f64)| {
        let numbers = format!("{:>9} {:>6.1} %", duration(seconds), 100.0 * seconds / total);
        format!("{name:<NAME_COLUMNS$}{numbers:<NUMBER_COLUMNS$}{}", bar(seconds / most, width))
    };
    std::iter::once(title).chain(parts.iter().map(bar_of)).collect()
}

/// A bar in eighths of a character.
fn bar(share: f64, width: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * 8.0 * width as f64).round() as usize;
    let part = match eighths % 8 {
        0 => String::new(),
        n => char::from_u32(0x2590 - n as u32).map(String::from).unwrap_or_default(),
    };
    "\u{2588}".repeat(eighths / 8) + &part
}

fn foot(view: &View) -> Vec<String> {
    match &view.state {
        State::Running(what) => vec![String::new(), format!("rank 0: {what}")],
        State::Ended(_) => vec![String::new(), "the same trireme-pretrain command goes on with it".into()],
        State::Finished => Vec::new(),
    }
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0);
    if s < 0.001 {
        return format!("{:.0} us", 1e6 * s);
    }
    if s < 1.0 {
        return format!("{:.0} ms", 1e3 * s);
    }
    if s < 60.0 {
        return format!("{s:.1} s");
    }
    let minutes = (s / 60.0).round() as u64;
    match minutes {
        0..60 => format!("{minutes} min"),
        60..2880 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} d {} h", minutes / 1440, minutes / 60 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bars have the length of their share, to an eighth of a character; times are short and round.
    #[test]
    fn bars_and_times() {
        assert_eq!(bar(1.0, 4), "\u{2588}\u{2588}\u{2588}\u{2588}");
        assert_eq!(bar(0.5, 3), "\u{2588}\u{258c}");
        assert_eq!(bar(0.0, 3), "");
        assert_eq!(bar(1.0 / 24.0, 3), "\u{258f}");
        let times = [3e-5, 0.25, 59.0, 61.0, 3600.0 * 5.0 + 60.0, 86400.0 * 90.0 + 7200.0];
        assert_eq!(times.map(duration), ["30 us", "250 ms", "59.0 s", "1 min", "5 h 1 min", "90 d 2 h"]);
    }
}
