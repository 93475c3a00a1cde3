//! One page about what lies at a path.

use serde_json::Value;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use trireme::artifact::{MANIFEST, Manifest};
use trireme::error::{Error, Result};
use trireme::metrics;
use trireme::train::identity::Accepted;

/// The page of an artifact, an unfinished run, or a folder of artifacts.
pub fn of(path: &Path) -> Result<String> {
    if path.join(MANIFEST).is_file() {
        return of_artifact(path);
    }
    if path.join("recipe.toml").is_file() {
        return of_unfinished_run(path);
    }
    let inside = artifacts_in(path);
    if inside.is_empty() {
        let wrong = format!("not an artifact: it has no {MANIFEST}, and no folder in it has one");
        return Err(Error::file(path, wrong).remedy("name what a trireme program wrote; NAME.tmp-* is unfinished work"));
    }
    let mut out = format!("{}: {} artifacts\n", path.display(), inside.len());
    for path in &inside {
        let manifest = crate::open(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = manifest.files.iter().map(|file| file.bytes).sum();
        line(&mut out, &format!("{name:<24} {:<14} {:>10}  {}", manifest.kind, size(bytes), date(manifest.written_unix_s)));
    }
    Ok(out)
}

/// Finished artifacts directly inside a folder, by name.
pub fn artifacts_in(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.join(MANIFEST).is_file()).collect();
    found.sort();
    found
}

fn of_artifact(path: &Path) -> Result<String> {
    let manifest = crate::open(path)?;
    let mut out = format!("{}: {}\n", path.display(), describe_kind(&manifest.kind));
    line(&mut out, &format!("written      {} by {}", date(manifest.written_unix_s), manifest.producer));
    line(&mut out, &format!("fingerprint  {}", manifest.fingerprint));
    if !manifest.counts.is_empty() {
        out.push_str("\nCounts\n");
        let width = manifest.counts.keys().map(String::len).max().unwrap_or(0);
        let shown = manifest.counts.iter().filter(|(_, value)| !value.is_array());
        shown.for_each(|(name, value)| line(&mut out, &format!("{name:<width$}  {}", number(value))));
    }
    out.push_str(&files(&manifest));
    if !manifest.inputs.is_empty() {
        out.push_str("\nMade from\n");
        let width = manifest.inputs.iter().map(|input| input.role.len()).max().unwrap_or(0);
        for input in &manifest.inputs {
            line(&mut out, &format!("{:<width$}  {}  ({})", input.role, input.path.display(), input.fingerprint));
        }
    }
    let changes = accepted_changes(&manifest);
    if !changes.is_empty() {
        out.push_str("\nAccepted changes\n");
        changes.iter().for_each(|change| line(&mut out, change));
    }
    out.push_str(&progress_of_run(path)?);
    let settings = settings(&manifest.recipe);
    if !settings.is_empty() {
        out.push_str("\nSettings\n");
        settings.iter().for_each(|setting| line(&mut out, setting));
    }
    Ok(out)
}

fn of_unfinished_run(path: &Path) -> Result<String> {
    let mut out = format!("{}: an unfinished run (no {MANIFEST} yet); the same trireme-pretrain command goes on with it\n", path.display());
    out.push_str(&progress_of_run(path)?);
    let recipe = path.join("recipe.toml");
    let text = std::fs::read_to_string(&recipe).map_err(|error| Error::io(&recipe, &error))?;
    let value: Value = toml::from_str(&text).map_err(|error| {
        Error::file(&recipe, format!("not TOML: {}", error.message())).remedy("start the run again in another directory")
    })?;
    out.push_str("\nSettings\n");
    settings(&value).iter().for_each(|setting| line(&mut out, setting));
    Ok(out)
}

fn files(manifest: &Manifest) -> String {
    let total = manifest.files.iter().map(|file| file.bytes).sum();
    let mut out = format!("\nFiles ({} in {})\n", size(total), manifest.files.len());
    let width = manifest.files.iter().map(|file| file.name.len()).max().unwrap_or(0);
    const SHOWN: usize = 20;
    for file in manifest.files.iter().take(SHOWN) {
        line(&mut out, &format!("{:<width$}  {:>10}  xxh3 {}", file.name, size(file.bytes), file.xxh3));
    }
    if manifest.files.len() > SHOWN {
        line(&mut out, &format!("and {} more", manifest.files.len() - SHOWN));
    }
    out
}

/// What the user changed on purpose while a run or the run of a checkpoint was under way, one change a line.
pub fn accepted_changes(manifest: &Manifest) -> Vec<String> {
    let of_checkpoint = manifest.recipe.pointer("/trainer/accepted_changes");
    let value = manifest.counts.get("accepted_changes").or(of_checkpoint).cloned().unwrap_or_default();
    let changes: Vec<Accepted> = serde_json::from_value(value).unwrap_or_default();
    let describe = |change: &Accepted| {
        let Accepted { what, at_step, was, is } = change;
        format!("{} changed after step {at_step} from {was} to {is}", what.name())
    };
    changes.iter().map(describe).collect()
}

/// The last measurements and the checkpoints, where there are some.
fn progress_of_run(path: &Path) -> Result<String> {
    let mut out = String::new();
    let metrics_path = path.join("metrics.jsonl");
    if metrics_path.is_file() {
        let metrics = metrics::read_all(&metrics_path)?;
        let rows = &metrics.rows;
        if let Some(last) = rows.last() {
            out.push_str("\nLast step\n");
            line(&mut out, &format!("step {}, {} tokens seen", last.step, group(last.consumed_tokens)));
            line(&mut out, &format!("loss {:.4}, gradient norm {:.3}, learning rate {:.2e}", last.loss, last.grad_norm, last.lr));
            let ceiling = 100.0 * last.share_of_gemm_ceiling;
            line(&mut out, &format!("{} tokens/s, {ceiling:.0} % of the GEMM ceiling", group(last.tokens_per_s as u64)));
            line(&mut out, &format!("{} memory on the fullest rank", size(last.memory_peak_bytes)));
        }
        if let Some(row) = rows.iter().rev().find(|row| row.validation_loss.is_some()) {
            let bits = row.validation_bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits a byte"));
            line(&mut out, &format!("held-out loss {:.4}{bits} at step {}", row.validation_loss.unwrap_or(f64::NAN), row.step));
        }
        if let Some(goodput) = &metrics.goodput {
            let (jobs, wall_s) = (goodput.n_jobs, goodput.wall_s);
            let plural = if jobs == 1 { "" } else { "s" };
            let share = 100.0 * goodput.share();
            out.push_str(&format!("\nGoodput: {share:.1} % of {wall_s:.1} s in {jobs} job{plural} were steps that count\n"));
            for (what, seconds) in goodput.parts() {
                line(&mut out, &format!("{what:<18} {seconds:>12.1} s  {:>5.1} %", 100.0 * seconds / wall_s));
            }
        }
    }
    let checkpoints = artifacts_in(&path.join("checkpoints"));
    if !checkpoints.is_empty() {
        out.push_str("\nCheckpoints\n");
        checkpoints.iter().for_each(|checkpoint| line(&mut out, &checkpoint.display().to_string()));
    }
    Ok(out)
}

fn describe_kind(kind: &str) -> String {
    let meaning = match kind {
        "tokenizer" => "a SentencePiece model",
        "token-shards" => "text as tokens, in Megatron's .bin and .idx",
        "checkpoint" => "weights and optimizer state in HDF5; index.h5 shows every tensor whole",
        "run" => "a finished run",
        "responses" => "generated text, one JSON line a request",
        "scores" => "log-probabilities of tokens",
        _ => return kind.into(),
    };
    format!("{kind} ({meaning})")
}

/// Settings as `a.b = value`, one a line.
fn settings(value: &Value) -> Vec<String> {
    fn walk(at: &str, value: &Value, lines: &mut Vec<String>) {
        let join = |key: &str| if at.is_empty() { key.to_string() } else { format!("{at}.{key}") };
        match value {
            Value::Object(entries) => entries.iter().for_each(|(key, value)| walk(&join(key), value, lines)),
            Value::Array(items) if items.iter().any(Value::is_object) => {
                items.iter().enumerate().for_each(|(i, value)| walk(&join(&i.to_string()), value, lines));
            }
            Value::Null => {}
            leaf => lines.push(format!("{at} = {leaf}")),
        }
    }
    let mut lines = Vec::new();
    walk("", value, &mut lines);
    lines
}

fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| value.to_string(), group)
}

/// 1234567 as 1,234,567.
pub fn group(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in a unit that suits them (powers of 1000).
pub fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let power = (0..units.len()).rev().find(|&power| bytes >= 1000u64.pow(power as u32)).unwrap_or(0);
    if power == 0 { format!("{bytes} B") } else { format!("{:.1} {}", bytes as f64 / 1000f64.powi(power as i32), units[power]) }
}

/// Seconds since 1970 as a date and time, UTC (Hinnant's days-to-civil).
pub fn date(unix_s: u64) -> String {
    let (days, second) = ((unix_s / 86400) as i64 + 719_468, unix_s % 86400);
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // March is 0
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", second / 3600, second / 60 % 60, second % 60)
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "  {text}").expect("writing to a string cannot fail");
}
