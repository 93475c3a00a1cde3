//! What all binaries share: their arguments, and the end of the program. One line for an error, the right exit code.

use crate::checkpoint::{self, Stored};
use crate::comm::nccl::{Options, Sums};
use crate::device::Fp8Scales;
use crate::error::{Error, Result};
use crate::infer::choices::BeginOfSequence;
use crate::infer::load::{check_layout, layout_for};
use crate::infer::request::OnBad;
use crate::model::packed::WeightFormat;
use crate::parallel::layout::ParallelLayout;
use crate::recipe::Mode;
use crate::runtime::{self, CommKind, DeviceKind};
use crate::tensor::DType;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

mod help;
pub use help::parse;

/// The model of a program that uses one: part of its arguments.
#[derive(clap::Args, Clone, Debug)]
pub struct Model {
    /// A checkpoint, or a run (its newest checkpoint)
    #[arg(long, help_heading = "Model")]
    pub checkpoint: PathBuf,
    /// Storage of weights and activations: f32 or bf16
    #[arg(long, default_value = "f32", value_parser = parse_dtype, help_heading = "Model")]
    pub dtype: DType,
    /// Keep the weights of linear layers in 8 bits: int8 (CPU, the output layer's too) or fp8 (E4M3), with a scale for each output
    /// channel, or fp8-tensor (one for each weight)
    #[arg(long, value_parser = parse_weights, help_heading = "Model")]
    pub weights: Option<WeightFormat>,
}

impl Model {
    /// The checkpoint and its layout over the ranks of the job. Err: one does not fit the other, or it cannot be read.
    pub fn open(&self, layout: Layout, n_ranks: usize) -> Result<(Stored, ParallelLayout)> {
        let layout = layout_for(n_ranks, layout.tp, layout.pp)?;
        let stored = checkpoint::open(&self.checkpoint)?;
        check_layout(&stored.meta().model, &layout)?;
        Ok((stored, layout))
    }
}

/// How a model lies over the ranks that the launcher started; what is left are replicas.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Layout {
    /// Tensor-parallel ranks: a divisor of kv heads, feed-forward columns and padded vocabulary
    #[arg(long, default_value_t = 1, help_heading = RANKS)]
    pub tp: usize,
    /// Pipeline stages
    #[arg(long, default_value_t = 1, help_heading = RANKS)]
    pub pp: usize,
}

const RANKS: &str = "Ranks and devices";

/// How given sequences are scored.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Scoring {
    /// Tokens in one forward pass over given text; what sequences begin with alike counts once, and they are never cut
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = parse_count)]
    pub batch_tokens: usize,
    /// Order of sums in log-probabilities: reproducible, or fast; left out, reproducible where it can be had
    #[arg(long, value_parser = parse_numerics)]
    pub numerics: Option<Mode>,
    /// Before which contexts, prompts and texts the beginning-of-sequence token stands: empty contexts, always, or auto, as the model's
    /// tokenizer.json asks for (lm-evaluation-harness's add_bos_token: False, True, and left out)
    #[arg(long, value_name = "auto|empty|always", default_value = "auto")]
    pub bos: BeginOfSequence,
}

/// Responses under way: part of the arguments of programs that generate.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct UnderWay {
    /// Responses under way at one time on a replica
    #[arg(long, default_value_t = 16, value_parser = parse_count)]
    pub batch: usize,
}

/// Where a program computes and how its ranks talk: part of the arguments of each that computes.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Place {
    /// Where to compute: cpu or cuda (one GPU a rank)
    #[arg(long, default_value = "cpu", help_heading = RANKS)]
    pub device: DeviceKind,
    /// Between GPUs: auto (NCCL, or MPI through host memory where NCCL cannot be used), nccl, or mpi
    #[arg(long, default_value = "auto", help_heading = RANKS)]
    pub comm: CommKind,
    /// Seconds after which an operation between GPUs that is not done ends the job
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..), help_heading = RANKS)]
    pub comm_timeout: u64,
}

impl Place {
    /// How NCCL is used, with these sums.
    pub fn nccl(&self, sums: Sums) -> Options {
        Options { sums, timeout: Duration::from_secs(self.comm_timeout) }
    }
}

/// Runs the program and turns its error into one line on stderr and its exit code (see `error`).
pub fn main_with(run: impl FnOnce() -> Result<()>) -> ExitCode {
    runtime::start_reporting();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints the one line. A closed stderr is nobody's loss.
pub fn report(error: &Error) {
    runtime::report_final(error);
}

/// For `--weights`: int8 or fp8 (a scale for each output channel), or fp8-tensor (one for each weight).
pub fn parse_weights(text: &str) -> std::result::Result<WeightFormat, String> {
    match text {
        "int8" => Ok(WeightFormat::Int8),
        "fp8" => Ok(WeightFormat::Fp8(Fp8Scales::Rows)),
        "fp8-tensor" => Ok(WeightFormat::Fp8(Fp8Scales::Tensor)),
        other => Err(format!("{other:?} is none of int8, fp8 and fp8-tensor")),
    }
}

/// `--weights` as it stands in an artifact.
pub fn weights_name(weights: Option<WeightFormat>) -> Option<&'static str> {
    match weights? {
        WeightFormat::Stored => None,
        WeightFormat::Int8 => Some("int8"),
        WeightFormat::Fp8(Fp8Scales::Rows) => Some("fp8"),
        WeightFormat::Fp8(Fp8Scales::Tensor) => Some("fp8-tensor"),
    }
}

/// For `--on-bad-request`: refuse or record.
pub fn parse_on_bad(text: &str) -> std::result::Result<OnBad, String> {
    match text {
        "refuse" => Ok(OnBad::Refuse),
        "record" => Ok(OnBad::Record),
        other => Err(format!("{other:?} is neither refuse nor record")),
    }
}

/// `--on-bad-request` as it stands in an artifact.
pub fn on_bad_name(on_bad: OnBad) -> &'static str {
    if on_bad == OnBad::Refuse { "refuse" } else { "record" }
}

/// For `--dtype`: f32 or bf16.
pub fn parse_dtype(text: &str) -> std::result::Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        other => Err(format!("{other:?} is neither f32 nor bf16")),
    }
}

/// A number from 1 up.
pub fn parse_count(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{text:?} is no number from 1 up"))
}

/// A size: a positive number of bytes, or one with KB, MB, GB (powers of 1000), KiB, MiB or GiB (powers of 1024).
pub fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("KB", 1000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("", 1)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).expect("the empty suffix fits all");
    let bytes = number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| format!("{text:?} is no size: expected bytes, or a number with KB, MB, GB, KiB, MiB or GiB"))
}

/// For `--numerics`: reproducible or fast.
pub fn parse_numerics(text: &str) -> std::result::Result<Mode, String> {
    match text {
        "reproducible" => Ok(Mode::Reproducible),
        "fast" => Ok(Mode::Fast),
        other => Err(format!("{other:?} is neither reproducible nor fast")),
    }
}

/// `--numerics` as it stands in an artifact; left out, it is what is possible.
pub fn numerics_name(numerics: Option<Mode>) -> &'static str {
    match numerics {
        None => "auto",
        Some(Mode::Reproducible) => "reproducible",
        Some(Mode::Fast) => "fast",
    }
}
