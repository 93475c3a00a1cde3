//! How much time a job has: what the command line says, else what SLURM says. Formats as in slurm's sbatch --time.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// When the job's time is up; None where nobody knows. `asked` is what the command line says, from now.
///
/// SLURM puts the end into the environment (SLURM_JOB_END_TIME, seconds since 1970); older versions are asked with squeue.
pub fn deadline(asked: Option<Duration>) -> Option<Instant> {
    let left = asked.or_else(|| from_environment(&std::env::var("SLURM_JOB_END_TIME").ok()?)).or_else(ask_slurm)?;
    log::info!("walltime    {:.0} s left", left.as_secs_f64());
    Instant::now().checked_add(left)
}

/// `MINUTES`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`.
///
/// Errors: it is none of these.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write MINUTES, MM:SS, HH:MM:SS or D-HH:MM:SS");
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days), rest),
        None => (None, text),
    };
    let number = |digits: &str| digits.parse::<u64>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
    let parts = rest.split(':').map(number).collect::<Option<Vec<u64>>>().ok_or_else(wrong)?;
    let (hours, minutes, seconds) = match (days.is_some(), &parts[..]) {
        (false, &[minutes]) => (0, minutes, 0),
        (false, &[minutes, seconds]) => (0, minutes, seconds),
        (_, &[hours, minutes, seconds]) => (hours, minutes, seconds),
        (true, &[hours]) => (hours, 0, 0),
        (true, &[hours, minutes]) => (hours, minutes, 0),
        _ => return Err(wrong()),
    };
    let days = days.map_or(Some(0), number).ok_or_else(wrong)?;
    let total = || {
        let hours = days.checked_mul(24)?.checked_add(hours)?;
        hours.checked_mul(3600)?.checked_add(minutes.checked_mul(60)?)?.checked_add(seconds)
    };
    total().map(Duration::from_secs).ok_or_else(wrong)
}

/// From the second at which the job ends.
fn from_environment(end_unix_s: &str) -> Option<Duration> {
    let end = UNIX_EPOCH.checked_add(Duration::from_secs(end_unix_s.trim().parse().ok()?))?;
    Some(end.duration_since(SystemTime::now()).unwrap_or_default())
}

/// What squeue says is left of this job.
fn ask_slurm() -> Option<Duration> {
    let job = std::env::var("SLURM_JOB_ID").ok()?;
    let output = Command::new("squeue").args(["--noheader", "--jobs", &job, "--format=%L"]).stderr(Stdio::null()).output().ok()?;
    parse(String::from_utf8_lossy(&output.stdout).trim()).ok() // UNLIMITED, INVALID: nobody knows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times as SLURM's tools write and read them; a misread one is a job that is killed before it saves.
    #[test]
    fn times_are_slurms() {
        let seconds = |text: &str| parse(text).map(|time| time.as_secs()).ok();
        let cases =
            [("90", 5400), ("2:05", 125), ("1:00:00", 3600), ("2-03", 183_600), ("1-00:30", 88_200), ("1-02:03:04", 93_784), ("0:03", 3)];
        for (text, expected) in cases {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        for wrong in ["", "UNLIMITED", "INVALID", "1:2:3:4", "-5", "1.5", "+3", "1-", "x-01", "99999999999999999999"] {
            assert_eq!(seconds(wrong), None, "{wrong:?}");
        }
    }

    /// The end in the environment is a moment: what is left shrinks, and is nothing when it has passed.
    #[test]
    fn the_end_is_a_moment() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let left = from_environment(&format!("{}\n", now + 100)).unwrap().as_secs_f64();
        assert!((98.0..=100.0).contains(&left), "{left}");
        assert_eq!(from_environment("5"), Some(Duration::ZERO));
        assert_eq!(from_environment("soon"), None);
    }
}
