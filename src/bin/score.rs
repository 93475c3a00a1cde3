//! trireme-score: log-probabilities of given text, attributes of a reward model. Wiring only; the work is `infer::score`.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint::{self, Stored};
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::data::h5;
use trireme::error::{Error, Result};
use trireme::infer::load::{check_layout, layout_for, load_chunk};
use trireme::infer::score::{self, Rated, Scored, Sequence};
use trireme::model::config::HeadKind;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::Runtime;
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
    Logprobs(ScoreArgs),
    /// The attributes that a reward model gives to each text.
    ///
    /// A line of the input is {"id": "a", "tokens": [..]} or {"id": "a", "text": ".."}; the attributes are read off its last token.
    /// Written are OUT/rewards.jsonl, one line {"id", "attributes"} each in input order, and OUT/rewards.h5 with the same as datasets:
    /// ids [n], attributes [n, R].
    ///
    /// Example:
    ///   trireme-checkpoint import reward-model-hf --out runs/reward
    ///   trireme-score rewards --checkpoint runs/reward --input answers.jsonl --out runs/answers-rewards
    #[command(verbatim_doc_comment)]
    Rewards(ScoreArgs),
}

#[derive(clap::Args)]
struct ScoreArgs {
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
    /// Keep the weights of linear layers in 8 bits: int8 (CPU, the output layer's too) or fp8 (E4M3), with a scale for each output
    /// channel, or fp8-tensor (one for each weight)
    #[arg(long, value_parser = cli::parse_weights)]
    weights: Option<WeightFormat>,
    #[command(flatten)]
    place: cli::Place,
}

fn main() -> ExitCode {
    let args = Args::parse();
    cli::main_with(|| {
        let (What::Logprobs(score_args) | What::Rewards(score_args)) = &args.what;
        let runtime = Runtime::start(score_args.place.device)?;
        let result = score(&args.what, score_args, &runtime);
        runtime.close(result)
    })
}

impl What {
    /// Its name in the artifact and of its files.
    fn name(&self) -> &'static str {
        match self {
            What::Logprobs(_) => "logprobs",
            What::Rewards(_) => "rewards",
        }
    }
}

fn score(what: &What, args: &ScoreArgs, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let (stored, sequences, layout) = agree(world, prepare(what, args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(what, args, &stored))? else { return Ok(()) };
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::Library))?;
    let device = &*device;
    let mut chunks = [agree(&*groups.world, load_chunk(device, &stored, &groups, args.dtype))?];
    agree(&*groups.world, args.weights.map_or(Ok(()), |format| chunks[0].pack(device, &*groups.tp, format)))?;
    match what {
        What::Logprobs(_) => {
            let scored = agree(&*groups.world, score::logprobs(device, &groups, &mut chunks, &sequences, args.batch_tokens))?;
            agree(&*groups.world, begun.commit_with(|writer| write_logprobs(writer, &scored)))?;
        }
        What::Rewards(_) => {
            let rated = agree(&*groups.world, score::rewards(device, &groups, &mut chunks, &sequences, args.batch_tokens))?;
            agree(&*groups.world, begun.commit_with(|writer| write_rewards(writer, &rated)))?;
        }
    }
    if runtime.is_first() {
        println!("{}: {} sequences", args.out.join(format!("{}.jsonl", what.name())).display(), sequences.len());
    }
    Ok(())
}

fn prepare(what: &What, args: &ScoreArgs, n_ranks: usize) -> Result<(Stored, Vec<Sequence>, ParallelLayout)> {
    let layout = layout_for(n_ranks, args.tp, args.pp)?;
    let stored = checkpoint::open(&args.checkpoint)?;
    let model = &stored.meta().model;
    check_layout(model, &layout)?;
    let longest = match (what, model.head) {
        (What::Logprobs(_), HeadKind::Vocabulary) => model.max_tokens + 1, // the last token is a target only
        (What::Rewards(_), HeadKind::Reward(_)) => model.max_tokens,
        (What::Logprobs(_), HeadKind::Reward(n)) => {
            let wrong = format!("a reward model of {n} attributes has no log-probabilities");
            return Err(Error::file(&args.checkpoint, wrong).remedy("use trireme-score rewards, or the checkpoint of a language model"));
        }
        (What::Rewards(_), HeadKind::Vocabulary) => {
            let wrong = "a language model has no reward attributes";
            return Err(Error::file(&args.checkpoint, wrong).remedy("use trireme-score logprobs, or the checkpoint of a reward model"));
        }
    };
    let tokenizer = stored.tokenizer()?;
    let sequences = score::read_sequences(&args.input, model.vocab_size, longest, tokenizer.as_ref())?;
    Ok((stored, sequences, layout))
}

fn begin(what: &What, args: &ScoreArgs, stored: &Stored) -> Result<Begin> {
    let recipe = serde_json::json!({ "what": what.name(), "dtype": args.dtype.name(), "weights": cli::weights_name(args.weights) });
    let inputs = vec![artifact::input("checkpoint", stored.dir())?, artifact::input("sequences", &args.input)?];
    ArtifactWriter::begin(&args.out, "scores", recipe, inputs)
}

/// One JSON object a line.
fn write_lines<T: serde::Serialize>(writer: &mut ArtifactWriter, name: &str, values: &[T]) -> Result<()> {
    let mut file = HashingFile::create(writer.dir(), name)?;
    for value in values {
        let mut line = serde_json::to_vec(value).expect("a score is plain data");
        line.push(b'\n');
        file.append(&line)?;
    }
    writer.add(file.close()?);
    Ok(())
}

fn write_rewards(mut writer: ArtifactWriter, rated: &[Rated]) -> Result<()> {
    write_lines(&mut writer, "rewards.jsonl", rated)?;
    let table = h5::RewardTable {
        ids: rated.iter().map(|one| one.id.clone()).collect(),
        attributes: rated.iter().flat_map(|one| one.attributes.iter().copied()).collect(),
    };
    writer.add(h5::write_rewards(writer.dir(), "rewards.h5", &table)?);
    writer.count("sequences", rated.len());
    writer.commit().map(|_| ())
}

fn write_logprobs(mut writer: ArtifactWriter, scored: &[Scored]) -> Result<()> {
    write_lines(&mut writer, "logprobs.jsonl", scored)?;
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
