//! trireme-score: log-probabilities of given text. Wiring only; the work is `infer::score`.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint::{self, Stored};
use trireme::cli;
use trireme::comm::agree;
use trireme::data::h5;
use trireme::error::Result;
use trireme::infer::load::{self, check_layout, layout_for, load_chunk};
use trireme::infer::score::{self, Scored, Sequence};
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::{DeviceKind, Runtime};
use trireme::tensor::DType;

/// Score given text with a checkpoint.
#[derive(Parser)]
#[command(name = "trireme-score", version)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// ln p(token | all before) of each token, and the sum.
    ///
    /// A line of the input is {"id": "a", "tokens": [..]} or {"id": "a", "text": ".."}. Written are OUT/logprobs.jsonl, one line
    /// {"id", "tokens", "logprobs", "sum"} each in input order (the first token has no log-probability: null), and
    /// OUT/logprobs.h5 with the same as flat datasets: ids, starts [n+1], tokens, logprobs (NaN for first tokens), sums.
    ///
    /// Example:
    ///   trireme-score logprobs --checkpoint runs/first --input pairs.jsonl --out runs/first-logprobs
    #[command(verbatim_doc_comment)]
    Logprobs(LogprobArgs),
}

#[derive(clap::Args)]
struct LogprobArgs {
    /// A checkpoint, or a run (its newest checkpoint)
    #[arg(long)]
    checkpoint: PathBuf,
    /// Sequences, one JSON object a line
    #[arg(long)]
    input: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Tensor-parallel ranks
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Pipeline stages
    #[arg(long, default_value_t = 1)]
    pp: usize,
    /// Tokens in one forward pass (sequences are never cut)
    #[arg(long, default_value_t = 2048)]
    batch_tokens: usize,
    /// Storage of weights and activations: f32 or bf16
    #[arg(long, default_value = "f32", value_parser = cli::parse_dtype)]
    dtype: DType,
    /// Where to compute: cpu or cuda (one GPU a rank)
    #[arg(long, default_value = "cpu")]
    device: DeviceKind,
}

fn main() -> ExitCode {
    let args = Args::parse();
    cli::main_with(|| match &args.what {
        What::Logprobs(args) => logprobs(args),
    })
}

fn logprobs(args: &LogprobArgs) -> Result<()> {
    let runtime = Runtime::start(args.device)?;
    let result = score_logprobs(args, &runtime);
    runtime.close(result)
}

fn score_logprobs(args: &LogprobArgs, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let (stored, sequences, layout) = agree(world, prepare(args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(args, &stored))? else { return Ok(()) };
    let groups = runtime.groups(layout);
    let device = agree(&*groups.world, runtime.device())?;
    let device = &*device;
    let mut chunks = [agree(&*groups.world, load_chunk(device, &stored, &groups, args.dtype))?];
    let scored = agree(&*groups.world, score::logprobs(device, &groups, &mut chunks, &sequences, args.batch_tokens))?;
    agree(&*groups.world, begun.commit_with(|writer| write(writer, &scored)))?;
    if runtime.is_first() {
        println!("{}: {} sequences", args.out.join("logprobs.jsonl").display(), scored.len());
    }
    Ok(())
}

fn prepare(args: &LogprobArgs, n_ranks: usize) -> Result<(Stored, Vec<Sequence>, ParallelLayout)> {
    let layout = layout_for(n_ranks, args.tp, args.pp)?;
    let stored = checkpoint::open(&args.checkpoint)?;
    let model = &stored.meta().model;
    check_layout(model, &layout)?;
    let tokenizer = load::tokenizer(&stored)?;
    let sequences = score::read_sequences(&args.input, model.vocab_size, model.max_tokens, tokenizer.as_ref())?;
    Ok((stored, sequences, layout))
}

fn begin(args: &LogprobArgs, stored: &Stored) -> Result<Begin> {
    let recipe = serde_json::json!({ "what": "logprobs", "dtype": args.dtype.name() });
    let inputs = vec![artifact::input("checkpoint", stored.dir())?, artifact::input("sequences", &args.input)?];
    ArtifactWriter::begin(&args.out, "scores", recipe, inputs)
}

fn write(mut writer: ArtifactWriter, scored: &[Scored]) -> Result<()> {
    let mut file = HashingFile::create(writer.dir(), "logprobs.jsonl")?;
    for one in scored {
        let mut line = serde_json::to_vec(one).expect("a score is plain data");
        line.push(b'\n');
        file.append(&line)?;
    }
    writer.add(file.close()?);
    let table = h5::LogprobTable {
        ids: scored.iter().map(|one| one.id.clone()).collect(),
        starts: std::iter::once(0)
            .chain(scored.iter().scan(0u64, |end, one| {
                *end += one.tokens.len() as u64;
                Some(*end)
            }))
            .collect(),
        tokens: scored.iter().flat_map(|one| one.tokens.iter().copied()).collect(),
        logprobs: scored.iter().flat_map(|one| one.logprobs.iter().map(|x| x.unwrap_or(f32::NAN))).collect(),
        sums: scored.iter().map(|one| one.sum).collect(),
    };
    writer.add(h5::write_logprobs(writer.dir(), "logprobs.h5", &table)?);
    writer.count("sequences", scored.len());
    writer.count("tokens", table.tokens.len());
    writer.commit().map(|_| ())
}
