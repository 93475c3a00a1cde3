//! trireme-score: log-probabilities of given text, likelihoods of choices, attributes of a reward model. Wiring only; the work is
//! `infer::score` and `infer::choices`.

use clap::{Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin};
use trireme::checkpoint::{self, Stored};
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::error::{Error, Result};
use trireme::infer::choices::{self, BeginOfSequence, Limits, Question, Start, read_questions};
use trireme::infer::load::{check_layout, layout_for, load_chunk};
use trireme::infer::score::{self, Sequence, read_sequences};
use trireme::infer::score_files::{self, Format};
use trireme::infer::scorer::{self, Scorer};
use trireme::model::config::HeadKind;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::Mode;
use trireme::runtime::Runtime;
use trireme::tensor::DType;

/// Score given text with a checkpoint.
///
/// The forward pass is training's. In reproducible numerics, which are taken wherever they can be had (on the CPU, with tp 1, 2, 4 or
/// 8, without FP8), a score has the same bits whatever it is batched with, under every layout, and in the forward of a training step
/// in reproducible mode: a policy scored against itself gives a log-ratio of exactly 0.
#[derive(Parser)]
#[command(name = "trireme-score", version, verbatim_doc_comment)]
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
    /// Of several continuations of a context, how likely each is.
    ///
    /// A line of the input is {"id": "a", "context": "2 + 2 =", "choices": [" 4", " 5"]}, or with lists of tokens in place of all texts.
    /// White space belongs where it stands: a choice mostly begins with a space. As in lm-evaluation-harness, context and choice are
    /// encoded in one and cut where the context alone would end, and a context too long for the model loses tokens on its left.
    /// Written are OUT/choices.jsonl, one line each in input order,
    ///   {"id", "choices": [{"tokens", "logprobs", "sum", "is_greedy", "chars", "bytes", "n_cut"}], "argmax", "argmax_per_char",
    ///    "argmax_per_byte"}
    /// (chars and bytes of the text as given, n_cut: tokens that the context lost), and OUT/choices.h5 with the same as flat datasets:
    /// of each question ids, starts [n+1], argmax; of each choice sums, chars, bytes, is_greedy, n_cut, token_starts [c+1]; of each
    /// token tokens, logprobs.
    ///
    /// Example:
    ///   trireme-score choices --checkpoint runs/first --input questions.jsonl --out runs/first-choices
    #[command(verbatim_doc_comment)]
    Choices(ScoreArgs),
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
    /// What to score, one JSON object a line
    #[arg(long)]
    input: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Files to write: jsonl, hdf5 or both
    #[arg(long, value_enum, default_value_t = Files::Both)]
    format: Files,
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
    /// Order of sums: reproducible, or fast; left out, reproducible where it can be had
    #[arg(long, value_parser = cli::parse_numerics)]
    numerics: Option<Mode>,
    /// Keep the weights of linear layers in 8 bits: int8 (CPU, the output layer's too) or fp8 (E4M3), with a scale for each output
    /// channel, or fp8-tensor (one for each weight)
    #[arg(long, value_parser = cli::parse_weights)]
    weights: Option<WeightFormat>,
    /// For choices, before which contexts the beginning-of-sequence token stands: empty ones, or always
    #[arg(long, default_value = "empty")]
    bos: BeginOfSequence,
    #[command(flatten)]
    place: cli::Place,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Files {
    Jsonl,
    Hdf5,
    Both,
}

impl Files {
    fn formats(self) -> &'static [Format] {
        match self {
            Files::Jsonl => &[Format::Jsonl],
            Files::Hdf5 => &[Format::Hdf5],
            Files::Both => &[Format::Jsonl, Format::Hdf5],
        }
    }
}

/// What was read to be scored.
enum Input {
    Sequences(Vec<Sequence>),
    Questions(Vec<Question>),
}

fn main() -> ExitCode {
    let args = Args::parse();
    cli::main_with(|| {
        let (What::Logprobs(score_args) | What::Choices(score_args) | What::Rewards(score_args)) = &args.what;
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
            What::Choices(_) => "choices",
            What::Rewards(_) => "rewards",
        }
    }
}

fn score(what: &What, args: &ScoreArgs, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let (stored, input, layout) = agree(world, prepare(what, args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(what, args, &stored))? else { return Ok(()) };
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::Library))?;
    let device = &*device;
    let numerics = agree(&*groups.world, scorer::numerics(args.numerics, device, layout, args.weights))?;
    let mut chunks = [agree(&*groups.world, load_chunk(device, &stored, &groups, args.dtype))?];
    agree(&*groups.world, args.weights.map_or(Ok(()), |format| chunks[0].pack(device, &*groups.tp, format)))?;
    let stop = || runtime.stop_requested();
    let scorer = Scorer { device, groups: &groups, batch_tokens: args.batch_tokens, numerics, stop: &stop };
    let formats = args.format.formats();
    let n = match &input {
        Input::Questions(questions) => {
            let scored = agree(&*groups.world, choices::choices(&scorer, &mut chunks, questions))?;
            agree(&*groups.world, begun.commit_with(|writer| score_files::write_choices(writer, formats, &scored)))?;
            questions.len()
        }
        Input::Sequences(sequences) if matches!(what, What::Rewards(_)) => {
            let rated = agree(&*groups.world, score::rewards(&scorer, &mut chunks, sequences))?;
            agree(&*groups.world, begun.commit_with(|writer| score_files::write_rewards(writer, formats, &rated)))?;
            sequences.len()
        }
        Input::Sequences(sequences) => {
            let scored = agree(&*groups.world, score::logprobs(&scorer, &mut chunks, sequences))?;
            agree(&*groups.world, begun.commit_with(|writer| score_files::write_logprobs(writer, formats, &scored)))?;
            sequences.len()
        }
    };
    if runtime.is_first() {
        println!("{}: {n} {}", args.out.display(), if matches!(input, Input::Questions(_)) { "questions" } else { "sequences" });
    }
    Ok(())
}

fn prepare(what: &What, args: &ScoreArgs, n_ranks: usize) -> Result<(Stored, Input, ParallelLayout)> {
    let layout = layout_for(n_ranks, args.tp, args.pp)?;
    let stored = checkpoint::open(&args.checkpoint)?;
    let model = &stored.meta().model;
    check_layout(model, &layout)?;
    match (what, model.head) {
        (What::Logprobs(_) | What::Choices(_), HeadKind::Reward(n)) => {
            let wrong = format!("a reward model of {n} attributes has no log-probabilities");
            return Err(Error::file(&args.checkpoint, wrong).remedy("use trireme-score rewards, or the checkpoint of a language model"));
        }
        (What::Rewards(_), HeadKind::Vocabulary) => {
            let wrong = "a language model has no reward attributes";
            return Err(Error::file(&args.checkpoint, wrong).remedy("use trireme-score logprobs, or the checkpoint of a reward model"));
        }
        _ => {}
    }
    let tokenizer = stored.tokenizer()?;
    let (vocab_size, max_tokens) = (model.vocab_size, model.max_tokens);
    let input = match what {
        // The last token is a target only.
        What::Logprobs(_) => Input::Sequences(read_sequences(&args.input, vocab_size, max_tokens + 1, tokenizer.as_ref())?),
        What::Rewards(_) => Input::Sequences(read_sequences(&args.input, vocab_size, max_tokens, tokenizer.as_ref())?),
        What::Choices(_) => {
            let start = Start::of(&stored, args.bos)?;
            Input::Questions(read_questions(&args.input, Limits { vocab_size, max_tokens, tokenizer: tokenizer.as_ref(), start })?)
        }
    };
    Ok((stored, input, layout))
}

fn begin(what: &What, args: &ScoreArgs, stored: &Stored) -> Result<Begin> {
    let formats: Vec<&str> = args.format.formats().iter().map(|format| format.name()).collect();
    let mut recipe = serde_json::json!({
        "what": what.name(), "dtype": args.dtype.name(), "weights": cli::weights_name(args.weights), "formats": formats,
        "numerics": cli::numerics_name(args.numerics),
    });
    if let (What::Choices(_), BeginOfSequence::Always) = (what, args.bos) {
        recipe["bos"] = "always".into();
    }
    let inputs = vec![artifact::input("checkpoint", stored.dir())?, artifact::input("sequences", &args.input)?];
    ArtifactWriter::begin(&args.out, "scores", recipe, inputs)
}
