//! `trireme-inspect`: what lies at a path, in words: any artifact, a run (finished or not), or a folder of them; where it came
//! from, down to the raw text; the loss curve of a run; and what its ranks recorded of themselves.

#[path = "inspect/flight.rs"]
mod flight;
#[path = "inspect/ledger.rs"]
mod ledger;
#[path = "inspect/lineage.rs"]
mod lineage;
#[path = "inspect/page.rs"]
mod page;
#[path = "inspect/watch.rs"]
mod watch;

use clap::{Args, Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use trireme::artifact::{self, MANIFEST, Manifest};
use trireme::cli;
use trireme::error::{Error, IoContext, Kind, Result};
use trireme::metrics;
use trireme::progress::Progress;

/// Describes an artifact in words: tokenizer, token shards, checkpoint, run, responses, scores.
///
/// Examples:
///   trireme-inspect runs/first                      a run: how far it is, its settings, its checkpoints
///   trireme-inspect runs/tokens --verify            read every file and compare its checksum
///   trireme-inspect runs/samples --lineage          what it was made from, down to the raw text
///   trireme-inspect plot runs/first --svg loss.svg  the loss curve, here and as a picture
///   trireme-inspect watch runs/first                live: loss, rate, time to go, next save, where the time goes
///   trireme-inspect flight runs/first               who hung or diverged first, stragglers, exposed communication
///   trireme-inspect trace runs/first --rank 0 --out trace.json   for chrome://tracing and ui.perfetto.dev
///   trireme-inspect ledger runs/first --document 17  when document 17 was trained on, and how often
#[derive(Parser)]
#[command(name = "trireme-inspect", version, verbatim_doc_comment, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    describe: Option<Describe>,
}

#[derive(Args)]
struct Describe {
    /// An artifact, a run, or a folder that holds some
    path: PathBuf,
    /// Print the tree of what it was made from
    #[arg(long)]
    lineage: bool,
    /// Read every file and compare its checksum
    #[arg(long)]
    verify: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Draw the loss curve of a run
    Plot {
        /// A run directory, or a metrics.jsonl
        run: PathBuf,
        /// Also write the curve as SVG
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Show a run as it goes, until it is finished or Ctrl-C
    Watch {
        /// A run directory
        run: PathBuf,
        /// Draw once and leave (also where the output is no terminal)
        #[arg(long)]
        once: bool,
        /// Seconds between two pictures
        #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = parse_seconds)]
        every: f64,
    },
    /// Merge the flight ledgers of all ranks: who diverged first, stragglers, exposed communication
    Flight {
        /// A run directory, or a folder of rings (RUN/flight, RUN/flight.previous)
        run: PathBuf,
    },
    /// Write the flight ledger as a trace for chrome://tracing and Perfetto
    Trace {
        /// A run directory, or a folder of rings
        run: PathBuf,
        /// Only this rank (may be given again); without it all ranks
        #[arg(long = "rank", value_name = "RANK")]
        ranks: Vec<usize>,
        /// Only these steps: 12, or 10..12 with both ends
        #[arg(long, value_name = "STEPS", value_parser = flight::parse_steps)]
        steps: Option<flight::Steps>,
        /// Where to write the JSON
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Say which samples and documents a run was trained on, when, and how often
    Ledger(ledger::Question),
}

fn main() -> ExitCode {
    let arguments: Arguments = cli::parse();
    cli::main_with(|| match (&arguments.command, &arguments.describe) {
        (Some(Command::Plot { run, svg }), _) => plot(run, svg.as_deref()),
        (Some(Command::Watch { run, once, every }), _) => {
            watch::watch(run, if *once { watch::Once::Yes } else { watch::Once::No }, Duration::from_secs_f64(*every))
        }
        (Some(Command::Flight { run }), _) => flight::report(run),
        (Some(Command::Trace { run, ranks, steps, out }), _) => flight::trace(run, ranks, steps.clone(), out),
        (Some(Command::Ledger(question)), _) => print(&ledger::answer(question)?),
        (None, Some(what)) => describe(what),
        (None, None) => Err(Error::recipe("no path given").remedy("run trireme-inspect --help")),
    })
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| format!("{text:?} is not a number from 0.1 to 3600"))
}

fn describe(what: &Describe) -> Result<()> {
    let path = &what.path;
    if !path.exists() {
        return Err(Error::file(path, "no such file or directory").remedy("check the path"));
    }
    if what.verify {
        return verify(path);
    }
    let text = if what.lineage { lineage::tree(path)? } else { page::of(path)? };
    print(&text)
}

/// Reads every byte of an artifact, or of a run's checkpoints too.
fn verify(path: &Path) -> Result<()> {
    let mut all: Vec<PathBuf> = vec![path.into()];
    all.extend(page::artifacts_in(&path.join("checkpoints")));
    all.retain(|path| path.join(MANIFEST).is_file());
    if all.is_empty() {
        return Err(Error::file(path, format!("nothing to verify: it has no {MANIFEST}")).remedy("name a finished artifact"));
    }
    for artifact_path in all {
        let manifest = open(&artifact_path)?;
        let mut progress = Progress::new("verify", manifest.files.iter().map(|file| file.bytes).sum(), "B");
        for file in &manifest.files {
            artifact::verify_file(&artifact_path, file)?;
            progress.add(file.bytes);
        }
        progress.finish();
        let n = manifest.files.len();
        print(&format!("{}: {}, {n} files, every checksum agrees\n", artifact_path.display(), manifest.kind))?;
    }
    Ok(())
}

fn plot(run: &Path, svg: Option<&Path>) -> Result<()> {
    let path = if run.is_dir() { run.join("metrics.jsonl") } else { run.into() };
    if !path.is_file() {
        return Err(Error::file(&path, "no such file").remedy("name a run directory or a metrics.jsonl"));
    }
    let rows = metrics::read(&path)?;
    if rows.is_empty() {
        return Err(Error::file(&path, "no step has been measured yet").remedy("wait for the first step"));
    }
    let plot = metrics::loss_plot(&format!("Loss of {}", run.display()), &rows);
    print(&plot.to_text(80, 22))?;
    if let Some(svg) = svg {
        write_whole(svg, plot.to_svg().as_bytes())?;
        print(&format!("\nAs a picture: {}\n", svg.display()))?;
    }
    Ok(())
}

/// Writes a file beside its place and renames it.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let tmp = path.with_file_name(format!("{name}.tmp-{}", artifact::job_id()));
    let written = std::fs::write(&tmp, bytes).and_then(|()| std::fs::rename(&tmp, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&tmp); // best effort: the error below matters
    }
    written.at(path)
}

/// The manifest of an artifact of any kind.
fn open(artifact: &Path) -> Result<Manifest> {
    let path = artifact.join(MANIFEST);
    let text = std::fs::read(&path).at(&path)?;
    let value: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|error| Error::file(&path, format!("not a manifest: {error}")).remedy("write the artifact again"))?;
    let kind = value.get("kind").and_then(|kind| kind.as_str()).unwrap_or("artifact");
    Manifest::open(artifact, kind)
}

/// Prints; a reader who has seen enough (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::Other, format!("writing to the output: {error}")))
        }
        _ => Ok(()),
    }
}
