//! trireme-checkpoint: checkpoints in and out of Hugging Face's form, shown, verified, compared and averaged. Wiring only; the work
//! is `checkpoint`, `checkpoint::compare`, `checkpoint::hf` and `infer::verify`.

use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use trireme::artifact::Manifest;
use trireme::checkpoint::compare::{self, Difference, Verdict};
use trireme::checkpoint::hf::{self, ExportType, Source};
use trireme::checkpoint::{self, Stored};
use trireme::cli;
use trireme::device::cpu::Cpu;
use trireme::error::{Context, Error, IoContext, Kind, Result};
use trireme::infer::verify::{self, Compared};

/// Checkpoints in and out of Hugging Face's form, shown, verified, compared and averaged.
///
/// Examples:
///   trireme-checkpoint import nvidia/Minitron-4B-Base --out base
///   trireme-checkpoint export runs/first --out first-hf --dtype bf16 --shard-size 2GB --verify
///   trireme-checkpoint show runs/first
///   trireme-checkpoint verify runs/first
///   trireme-checkpoint diff runs/first runs/second
///   trireme-checkpoint average runs/first/checkpoints/step-000000{80,90} runs/first --out first-mean
#[derive(Parser)]
#[command(name = "trireme-checkpoint", version, verbatim_doc_comment)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Turn safetensors of NemotronForCausalLM or LlamaForCausalLM into a checkpoint of weights
    Import {
        /// Directory with config.json and the weights; tokenizer, chat template and settings of generation in it come along
        hf_dir: PathBuf,
        /// Checkpoint to write
        #[arg(long)]
        out: PathBuf,
        /// Then read both again and compare every weight, and the logits of a few token sequences, bit by bit; exit code 4 on any
        /// difference. Both sides run this program's forward in f32, a slice of a matrix at a time: it shows that the two say the same,
        /// not that transformers computes the same of them (the tests of this program show that)
        #[arg(long, verbatim_doc_comment)]
        verify: bool,
    },
    /// Write a checkpoint's weights as a directory that transformers loads
    Export {
        /// A checkpoint, or a run (its newest checkpoint)
        checkpoint: PathBuf,
        /// Directory to write
        #[arg(long)]
        out: PathBuf,
        /// f32 (of training in bf16: its f32 master weights), bf16 or f16 (both rounded to nearest even; a value beyond f16's is an error);
        /// left out: each tensor as it is stored, which of an import from F16 is f32
        #[arg(long, value_parser = parse_export_type)]
        dtype: Option<ExportType>,
        /// Most bytes of a file of weights, unless one tensor alone is larger: a number, or one with KB, MB, GB, KiB, MiB or GiB
        #[arg(long, default_value = "5GB", value_parser = cli::parse_bytes)]
        shard_size: u64,
        /// Then read both again and compare as import --verify does, the checkpoint's weights as --dtype makes them
        #[arg(long)]
        verify: bool,
    },
    /// Print what a checkpoint holds: name, type, shape and pieces of every tensor
    Show {
        /// A checkpoint, or a run (its newest checkpoint)
        checkpoint: PathBuf,
    },
    /// Read every byte of a checkpoint, or of all checkpoints of a run, and compare it with what was written
    Verify {
        /// A checkpoint, or a run
        checkpoint: PathBuf,
    },
    /// Compare two checkpoints tensor by tensor: equal, or how many elements differ and by how many ulp at most. Exit code 1 on any
    /// difference
    Diff {
        /// A checkpoint, or a run (its newest checkpoint)
        first: PathBuf,
        /// Another
        second: PathBuf,
    },
    /// Write the mean of the weights of several checkpoints of one model as a checkpoint of weights
    Average {
        /// Checkpoints, or runs (their newest checkpoints)
        #[arg(required = true, num_args = 2..)]
        checkpoints: Vec<PathBuf>,
        /// Checkpoint to write
        #[arg(long)]
        out: PathBuf,
    },
}

fn parse_export_type(text: &str) -> std::result::Result<ExportType, String> {
    match text {
        "f32" => Ok(ExportType::F32),
        "bf16" => Ok(ExportType::Bf16),
        "f16" => Ok(ExportType::F16),
        other => Err(format!("{other:?} is none of f32, bf16 and f16")),
    }
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
    let filter = std::env::var("TRIREME_LOG").unwrap_or("warn".into());
    env_logger::Builder::new().parse_filters(&filter).format_timestamp(None).format_target(false).init();
    cli::main_with(|| run(&args))
}

fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Import { hf_dir, out, verify } => {
            tell_written(out, &hf::import(hf_dir, out)?)?;
            if *verify { compare_logits(hf_dir, out, ExportType::AsStored) } else { Ok(()) }
        }
        What::Export { checkpoint, out, dtype, shard_size, verify } => {
            let dtype = dtype.unwrap_or(ExportType::AsStored);
            tell_written(out, &hf::export_in_files(checkpoint, out, dtype, *shard_size)?)?;
            if *verify { compare_logits(out, checkpoint, dtype) } else { Ok(()) }
        }
        What::Show { checkpoint } => say(&describe(&checkpoint::open(checkpoint)?)),
        What::Verify { checkpoint } => verify_files(checkpoint),
        What::Diff { first, second } => diff(&checkpoint::open(first)?, &checkpoint::open(second)?),
        What::Average { checkpoints, out } => {
            let stored = checkpoints.iter().map(|path| checkpoint::open(path)).collect::<Result<Vec<Stored>>>()?;
            tell_written(out, &compare::average(&stored, out)?)
        }
    }
}

/// Standard output may be a pipe that somebody closes (`| head`): an error, not a panic.
fn say(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").at("standard output")
}

fn tell_written(out: &Path, manifest: &Manifest) -> Result<()> {
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    say(&format!("{}: {} files, {:.1} MB, fingerprint {}", out.display(), manifest.files.len(), bytes as f64 / 1e6, manifest.fingerprint))
}

fn compare_logits(hf_dir: &Path, checkpoint: &Path, dtype: ExportType) -> Result<()> {
    let (source, stored) = (Source::open(hf_dir)?, checkpoint::open(checkpoint)?);
    let sides = format!("{} and {}", hf_dir.display(), stored.dir().display());
    let Compared { n_sequences, n_outputs, n_weights } = verify::compare(&Cpu::new(), source, stored, dtype)?;
    say(&format!("{sides}: {n_weights} weights and {n_outputs} outputs of {n_sequences} token sequences, all the same bits"))
}

fn describe(stored: &Stored) -> String {
    let meta = stored.meta();
    let (model, layout) = (&meta.model, &meta.layout);
    let (embeddings, others) = model.n_params();
    let mut lines = vec![
        stored.dir().display().to_string(),
        format!("step {}, {} samples consumed, written by {}", meta.step, meta.consumed_samples, stored.manifest().producer),
        format!("layout tp {} x pp {} x dp {} (vp {})", layout.tp, layout.pp, layout.dp, layout.vp),
        format!("{embeddings} embedding parameters and {others} others: {}", serde_json::to_string(model).expect("plain data")),
        format!("tokenizer {}", meta.tokenizer.as_ref().map_or("none".into(), |bytes| format!("of {} bytes", bytes.len()))),
        String::new(),
    ];
    let names = stored.tensors().keys().map(String::len);
    let width = names.max().unwrap_or(0).max(6);
    lines.push(format!("{:width$}  type  {:>16}  pieces", "tensor", "shape"));
    for (name, tensor) in stored.tensors() {
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
        lines.push(format!("{name:width$}  {:4}  {shape:>16}  {:6}", tensor.dtype.name(), tensor.n_pieces()));
    }
    lines.join("\n")
}

fn diff(first: &Stored, second: &Stored) -> Result<()> {
    let all = compare::diff(first, second)?;
    let width = all.iter().map(|difference| difference.name.len()).max().unwrap_or(0);
    for Difference { name, verdict } in &all {
        say(&format!("{name:width$}  {verdict}"))?;
    }
    let different: Vec<&Difference> = all.iter().filter(|difference| difference.verdict != Verdict::Equal).collect();
    match different.iter().max_by_key(|difference| difference.verdict.severity()) {
        None => say(&format!("{} and {}: {} tensors, all equal", first.dir().display(), second.dir().display(), all.len())),
        Some(worst) => {
            let wrong = format!("{} of {} tensors differ, most of all {}: {}", different.len(), all.len(), worst.name, worst.verdict);
            Err(Error::new(Kind::Other, wrong).doing(format!("comparing {} with {}", first.dir().display(), second.dir().display())))
        }
    }
}

fn verify_files(path: &Path) -> Result<()> {
    let steps = checkpoint::list(path)?;
    let all: Vec<PathBuf> = if steps.is_empty() { vec![path.into()] } else { steps.into_iter().map(|(_, path)| path).collect() };
    let mut damaged = Vec::new();
    for dir in &all {
        match checkpoint::verify(dir) {
            Err(error) => damaged.push(error),
            Ok(report) => {
                for (file, state) in report {
                    let verdict = if state.is_ok() { "ok" } else { "DAMAGED" };
                    say(&format!("{verdict:8}{:>16} bytes  {}", file.bytes, dir.join(&file.name).display()))?;
                    damaged.extend(state.err());
                }
            }
        }
        if let Err(error) = checkpoint::open(dir).map(drop)
            && damaged.is_empty()
        {
            damaged.push(error); // every byte as written, but written wrong
        }
    }
    let n = damaged.len();
    match damaged.into_iter().next() {
        Some(first) => Err::<(), Error>(first).doing(|| format!("{n} damaged, the first")),
        None => say(&format!("{}: every byte as it was written", path.display())),
    }
}
