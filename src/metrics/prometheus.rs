//! The newest row for Prometheus, as a file in its text exposition format, which the textfile collector of node_exporter reads
//! (`--collector.textfile.directory`). Written beside its place and renamed, so that a reader sees whole files only.

use super::{Row, scalars};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Writes the file anew at each row.
pub(super) struct PrometheusFile {
    path: PathBuf,
    /// What the samples are labelled with.
    run: String,
    has_failed: bool,
}

impl PrometheusFile {
    pub fn new(path: &Path, run: &Path) -> PrometheusFile {
        PrometheusFile { path: path.into(), run: run.display().to_string(), has_failed: false }
    }

    /// Training does not end because nobody can look at it: a file that cannot be written is told once.
    pub fn write(&mut self, row: &Row) {
        let tmp = self.path.with_extension("prom.tmp"); // the collector reads *.prom only
        let written = std::fs::write(&tmp, text(row, &self.run)).and_then(|()| std::fs::rename(&tmp, &self.path));
        if let Err(error) = written
            && !std::mem::replace(&mut self.has_failed, true)
        {
            log::warn!("{}: {error}; the run goes on without it", self.path.display());
        }
    }
}

/// One gauge a number.
fn text(row: &Row, run: &str) -> String {
    let run = run.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let counts = [("step", row.step as f64), ("consumed_tokens", row.consumed_tokens as f64), ("written_unix_s", row.unix_s)];
    let mut out = String::new();
    for (tag, value) in counts.into_iter().chain(scalars(row)) {
        let name = tag.replace('/', "_");
        let value = if value.is_nan() { "NaN".into() } else { format!("{value:?}").replace("inf", "Inf") };
        writeln!(out, "# TYPE trireme_{name} gauge\ntrireme_{name}{{run=\"{run}\"}} {value}").expect("writing to a string cannot fail");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line is one of the format: a type, or a name of letters with one label and a number, quotes in the label escaped; a
    /// diverged loss is NaN, not a parse error for the whole file.
    #[test]
    fn lines_are_those_of_the_format() {
        let json = "{\"step\":7,\"consumed_tokens\":9,\"loss\":null,\"grad_norm\":0.5,\"lr\":1e-9,\"step_s\":1,\"tokens_per_s\":1,\
                    \"tflops\":1,\"share_of_gemm_ceiling\":0.5,\"memory_peak_bytes\":4}";
        let row: Row = serde_json::from_str(json).expect("a row");
        let text = text(&row, "/runs/\"a\\b\"");
        assert!(text.contains("# TYPE trireme_loss_training gauge\ntrireme_loss_training{run=\"/runs/\\\"a\\\\b\\\"\"} NaN\n"), "{text}");
        assert!(text.contains("trireme_step{run=\"/runs/\\\"a\\\\b\\\"\"} 7.0\n") && text.ends_with('\n'), "{text}");
        for line in text.lines().filter(|line| !line.starts_with("# TYPE ")) {
            let (name, rest) = line.split_once("{run=\"").expect("a label");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
            assert!(rest.rsplit_once("\"} ").expect("a value").1.parse::<f64>().is_ok(), "{line}");
        }
    }
}
