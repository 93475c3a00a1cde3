//! trireme-score: log-probabilities of given text, likelihoods of choices, attributes of a reward model. Wiring only; the work is
//! `infer::score` and `infer::choices`.

use clap::{Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin};
use trireme::checkpoint::{Stored, hf};
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::error::{Error, Result};
use trireme::infer::choices::{self, Likelihood, Limits, Pair, Question, Start, read_questions};
use trireme::infer::load::load_as;
use trireme::infer::score::{self, Sequence, read_sequences};
use trireme::infer::score_files::{self, Format};
use trireme::infer::score_journal;
use trireme::infer::scorer::{self, Scorer, TokenScores, Wanted};
use trireme::model::chunk::Chunk;
use trireme::model::config::HeadKind;
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::Runtime;

/// Score given text with a checkpoint.
///
/// The forward pass is training's. In reproducible numerics, which are taken wherever they can be had (not with fp8-tensor), a score has
/// the same bits whatever it is batched with, under every layout and any --tp, and in the forward of a training step in reproducible
/// mode: a policy scored against itself gives a log-ratio of exactly 0.
///
/// A job that is killed or stopped (exit code 75) keeps what it has scored in OUT.tmp-JOB/journal. The same command goes on from there,
/// with any number of ranks, --tp, --pp or --batch-tokens; with another checkpoint, input or numerics it refuses.
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
    #[command(verbatim_doc_comment, visible_alias = "reward")]
    Rewards(ScoreArgs),
}

#[derive(clap::Args)]
struct ScoreArgs {
    /// What to score, one JSON object a line
    #[arg(long)]
    input: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Files to write: jsonl, hdf5 or both
    #[arg(long, value_enum, default_value_t = Files::Both)]
    format: Files,
    #[command(flatten)]
    scoring: cli::Scoring,
    #[command(flatten)]
    model: cli::Model,
    #[command(flatten)]
    layout: cli::Layout,
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
    /// For the log-probabilities of their tokens.
    Texts(Vec<Sequence>),
    /// For the likelihoods of their choices, which follow.
    Questions(Vec<Question>, Vec<Pair>),
    /// For their attributes.
    Answers(Vec<Sequence>),
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
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
    let prepared = agree(world, prepare(what, args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(what, args, &prepared))? else { return Ok(()) };
    let Prepared { stored, input, layout, .. } = prepared;
    let dir = begun.journal_dir(world);
    let mode = scorer::mode(args.scoring.numerics, args.model.weights);
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::of(mode)))?;
    let device = &*device;
    let numerics = agree(world, scorer::numerics(args.scoring.numerics, device, args.model.weights))?;
    let made = score_journal::resume(world, &dir, numerics, input.n())?;
    if !made.iter().all(|made| *made) {
        let mut chunks = [agree(world, load_as(device, &stored, &groups, args.model.dtype, args.model.weights))?];
        let stop = || runtime.stop_requested();
        let scorer = Scorer { device, groups: &groups, batch_tokens: args.scoring.batch_tokens, numerics, stop: &stop };
        input.score(&scorer, &mut chunks, &made, &dir)?;
    }
    agree(world, begun.commit_with(|writer| input.write(writer, args.format.formats())))?;
    if runtime.is_first() {
        println!("{}: {}", args.out.display(), input.counted());
    }
    Ok(())
}

impl Input {
    /// How many sequences have scores.
    fn n(&self) -> usize {
        match self {
            Input::Texts(sequences) | Input::Answers(sequences) => sequences.len(),
            Input::Questions(_, pairs) => pairs.len(),
        }
    }

    /// What it is, for people.
    fn counted(&self) -> String {
        match self {
            Input::Texts(sequences) | Input::Answers(sequences) => format!("{} sequences", sequences.len()),
            Input::Questions(questions, ..) => format!("{} questions", questions.len()),
        }
    }

    /// Makes the scores that are missing and keeps them in the journal in `dir`. Collective; all ranks leave with the same result.
    fn score(&self, scorer: &Scorer, chunks: &mut [Chunk], made: &[bool], dir: &Path) -> Result<()> {
        let (groups, numerics) = (scorer.groups, scorer.numerics);
        let mut tokens =
            |wanted: &[Wanted]| score_journal::keep(groups, dir, numerics, |sink| scorer.tokens_into(chunks, wanted, made, sink));
        match self {
            Input::Texts(sequences) => tokens(&score::wanted(sequences)),
            Input::Questions(_, pairs) => tokens(&choices::wanted(pairs, &pairs.iter().map(Pair::joined).collect::<Vec<_>>())),
            Input::Answers(sequences) => {
                let tokens = score::tokens(sequences);
                score_journal::keep(groups, dir, numerics, |sink| scorer.attributes_into(chunks, &tokens, made, sink))
            }
        }
    }

    /// Writes and commits what the journal has.
    fn write(&self, writer: ArtifactWriter, formats: &[Format]) -> Result<()> {
        let (dir, n) = (writer.journal_dir(), self.n());
        match self {
            Input::Texts(sequences) => {
                // Of a single token nothing is known.
                let scores: Vec<TokenScores> = score_journal::read(&dir, n, |number| sequences[number].tokens.len() > 1)?;
                score_files::write_logprobs(writer, formats, &score::scored(sequences, &scores))
            }
            Input::Questions(questions, ..) => {
                let scores: Vec<TokenScores> = score_journal::read(&dir, n, |_| true)?;
                let likelihoods = scores.into_iter().map(Likelihood::from).collect();
                score_files::write_choices(writer, formats, &choices::scored(questions, likelihoods))
            }
            Input::Answers(sequences) => {
                let attributes = score_journal::read(&dir, n, |_| true)?;
                score_files::write_rewards(writer, formats, &score::rated(sequences, attributes))
            }
        }
    }
}

/// What every rank reads for itself.
struct Prepared {
    stored: Stored,
    input: Input,
    layout: ParallelLayout,
    start: Start,
}

fn prepare(what: &What, args: &ScoreArgs, n_ranks: usize) -> Result<Prepared> {
    let (stored, layout) = args.model.open(args.layout, n_ranks)?;
    let model = &stored.meta().model;
    match (what, model.head) {
        (What::Logprobs(_) | What::Choices(_), HeadKind::Reward(n)) => {
            let wrong = format!("a reward model of {n} attributes has no log-probabilities");
            return Err(
                Error::file(&args.model.checkpoint, wrong).remedy("use trireme-score rewards, or the checkpoint of a language model")
            );
        }
        (What::Rewards(_), HeadKind::Vocabulary) => {
            let wrong = "a language model has no reward attributes";
            return Err(
                Error::file(&args.model.checkpoint, wrong).remedy("use trireme-score logprobs, or the checkpoint of a reward model")
            );
        }
        _ => {}
    }
    let tokenizer = hf::tokenizer(&stored)?;
    let (vocab_size, max_tokens) = (model.vocab_size, model.max_tokens);
    let start = Start::of(&stored, args.scoring.bos)?;
    let texts = (tokenizer.as_ref(), start);
    let input = match what {
        // The last token is a target only.
        What::Logprobs(_) => Input::Texts(read_sequences(&args.input, vocab_size, max_tokens + 1, texts)?),
        What::Rewards(_) => Input::Answers(read_sequences(&args.input, vocab_size, max_tokens, texts)?),
        What::Choices(_) => {
            let limits = Limits { vocab_size, max_tokens, tokenizer: tokenizer.as_ref(), start };
            let questions = read_questions(&args.input, limits)?;
            let pairs = choices::pairs(&questions);
            Input::Questions(questions, pairs)
        }
    };
    Ok(Prepared { stored, input, layout, start })
}

fn begin(what: &What, args: &ScoreArgs, Prepared { stored, start, .. }: &Prepared) -> Result<Begin> {
    let formats: Vec<&str> = args.format.formats().iter().map(|format| format.name()).collect();
    let mut recipe = serde_json::json!({
        "what": what.name(), "dtype": args.model.dtype.name(), "weights": cli::weights_name(args.model.weights), "formats": formats,
        "numerics": cli::numerics_name(args.scoring.numerics),
    });
    if start.always.is_some() {
        recipe["bos"] = "always".into();
    }
    let inputs = vec![artifact::input("checkpoint", stored.dir())?, artifact::input("sequences", &args.input)?];
    ArtifactWriter::begin_or_continue(&args.out, "scores", recipe, inputs)
}
