//! trireme-evaluate: benchmarks of a checkpoint, and the comparison of two evaluations. Wiring only; the work is `eval`.

use clap::{Parser, Subcommand};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint::{Stored, hf};
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::error::{Error, Kind, Result};
use trireme::eval::answers::{self, Limits, Questions};
use trireme::eval::compare::{self, ARTIFACT_KIND, Bootstrap};
use trireme::eval::evidence::{self, Evidence};
use trireme::eval::item::Leaf;
use trireme::eval::scores::{self, Scores};
use trireme::eval::task::{self, Asked, Shots, Task};
use trireme::infer::choices::{self, Likelihood, Pair, Start};
use trireme::infer::generate::{self, Batching, Generator};
use trireme::infer::journal;
use trireme::infer::kv_memory::Room;
use trireme::infer::load::load_as;
use trireme::infer::samples::Done;
use trireme::infer::score_files::write_lines;
use trireme::infer::score_journal;
use trireme::infer::scorer::{self, Scorer, TokenScores};
use trireme::model::config::HeadKind;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::runtime::Runtime;
use trireme::text::Tokenizer;

/// Benchmarks of a checkpoint, from local files, with the prompts and numbers of lm-evaluation-harness.
///
/// Examples:
///   trireme-evaluate run --checkpoint runs/first --data benchmarks --task arc_challenge --task mmlu --out runs/first-scores
///   trireme-evaluate run --checkpoint runs/first --task gsm8k=grade_school_math/data --out runs/first-gsm8k
///   trireme-evaluate compare runs/first-scores runs/second-scores
#[derive(Parser)]
#[command(name = "trireme-evaluate", version, verbatim_doc_comment)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Evaluate a checkpoint.
    ///
    /// Tasks, and their files as published, in DIR/BENCHMARK (or where --task TASK=PATH says: the folder, or the first file):
    ///   arc_challenge  ARC-Challenge-Test.jsonl; for --shots ARC-Challenge-Train.jsonl
    ///   winogrande     dev.jsonl; for --shots train_xl.jsonl
    ///   hellaswag      hellaswag_val.jsonl; for --shots hellaswag_train.jsonl
    ///   mmlu           test/SUBJECT_test.csv and dev/SUBJECT_dev.csv of all 57
    ///                  subjects, 5 shots; also mmlu_stem, mmlu_other,
    ///                  mmlu_social_sciences, mmlu_humanities, mmlu_SUBJECT
    ///   gsm8k          test.jsonl and train.jsonl, 5 shots
    ///   bbh            bbh/SUBTASK.json and cot-prompts/SUBTASK.txt of all 27,
    ///                  3 shots; also bbh_cot_fewshot_SUBTASK
    /// Choices are compared by likelihood; answers of gsm8k and bbh are generated greedily and matched.
    ///
    /// Written are OUT/TASK.jsonl, the evidence of every item (prompt, tokens, log-probabilities or generated text, what was right),
    /// and OUT/scores.json, which is also printed: values with standard errors. There is a score only when every item of every file
    /// is complete. With --limit there is OUT/scores.partial.json instead, and the exit code is 1.
    ///
    /// A job that is killed or stopped (exit code 75) keeps its answers in OUT.tmp-JOB/journal. The same command goes on from there, with
    /// any number of ranks, --tp, --pp, --batch or --batch-tokens; with another checkpoint, other items or other settings it refuses.
    #[command(verbatim_doc_comment)]
    Run(Box<EvaluateArgs>),
    /// The differences between two evaluations of the same items, B - A, with a paired bootstrap.
    Compare(CompareArgs),
}

#[derive(clap::Args)]
struct CompareArgs {
    /// An evaluation
    a: PathBuf,
    /// Another
    b: PathBuf,
    /// Draws of all items
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    resamples: u32,
    /// Key of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(clap::Args)]
struct EvaluateArgs {
    /// What to evaluate on: NAME, or NAME=PATH; any number of times
    #[arg(long = "task", required = true, value_name = "NAME[=PATH]")]
    tasks: Vec<Asked>,
    /// Where the files are, a folder for each benchmark
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Solved examples before each question of a benchmark
    #[arg(long, value_name = "BENCHMARK=N")]
    shots: Vec<Shots>,
    /// Only the first items of each leaf task: no score, to try things out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    #[command(flatten)]
    scoring: cli::Scoring,
    #[command(flatten)]
    under_way: cli::UnderWay,
    #[command(flatten)]
    model: cli::Model,
    #[command(flatten)]
    layout: cli::Layout,
    #[command(flatten)]
    place: cli::Place,
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
    cli::main_with(|| match &args.what {
        What::Compare(args) => {
            let bootstrap = Bootstrap { n_resamples: args.resamples as usize, seed: args.seed };
            println!("{}", compare::table(&compare::compare(&args.a, &args.b, bootstrap)?));
            compare::partial(&args.a, &args.b)?.iter().for_each(|said| println!("{said}"));
            Ok(())
        }
        What::Run(args) => {
            let runtime = Runtime::start(args.place.device)?;
            let result = evaluate(args, &runtime);
            runtime.close(result)
        }
    })
}

/// What every rank reads for itself.
struct Prepared {
    stored: Stored,
    tokenizer: Tokenizer,
    layout: ParallelLayout,
    tasks: Vec<Task>,
    start: Start,
    questions: Questions,
}

impl Prepared {
    fn leaves(&self) -> impl Iterator<Item = &Leaf> {
        self.tasks.iter().flat_map(|task| &task.leaves)
    }
}

fn evaluate(args: &EvaluateArgs, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let prepared = agree(world, prepare(args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(args, &prepared))? else { return complete(args) };
    let dir = begun.journal_dir(world);
    answer(args, runtime, &prepared, &dir)?;
    let mut scores = None;
    agree(world, begun.commit_with(|writer| write(args, &prepared, writer).map(|written| scores = Some(written))))?;
    if let Some(scores) = scores {
        let n_items: usize = prepared.leaves().map(|leaf| leaf.items.len()).sum();
        println!("{}\n{}: {n_items} items", scores.table(), args.out.join(scores.file_name()).display());
    }
    complete(args)
}

/// Makes the answers that the journal in `dir` does not have. Collective; all ranks leave with the same result.
fn answer(args: &EvaluateArgs, runtime: &Runtime, prepared: &Prepared, dir: &Path) -> Result<()> {
    let (world, Prepared { stored, tokenizer, questions, .. }) = (runtime.world(), prepared);
    let weights = args.model.weights;
    // Of its two halves, scores and responses, the latter are reproducible wherever the former are.
    let sums = Sums::of(generate::mode(args.scoring.numerics));
    let (device, groups) = runtime.open(prepared.layout, args.place.comm, args.place.nccl(sums))?;
    let device = &*device;
    let numerics = agree(world, scorer::numerics(args.scoring.numerics, device, weights))?;
    let made = score_journal::resume(world, dir, numerics, questions.pairs.len())?;
    let mut done = Done::nothing(&questions.requests);
    journal::resume(world, dir, &mut done)?;
    if made.iter().all(|made| *made) && done.n_made() == done.n_samples() {
        return Ok(());
    }
    let mut chunks = [agree(world, load_as(device, stored, &groups, args.model.dtype, weights))?];
    let stop = || runtime.stop_requested();
    let scorer = Scorer { device, groups: &groups, batch_tokens: args.scoring.batch_tokens, numerics, stop: &stop };
    let joined: Vec<Vec<u32>> = questions.pairs.iter().map(Pair::joined).collect();
    let wanted = choices::wanted(&questions.pairs, &joined);
    score_journal::keep(&groups, dir, numerics, |sink| scorer.tokens_into(&mut chunks, &wanted, &made, sink))?;
    if done.n_made() == done.n_samples() {
        return Ok(());
    }
    if weights.is_none() {
        agree(world, chunks[0].pack(device, &*groups.tp, WeightFormat::Stored))?;
    }
    let kv_memory = runtime.free_bytes().map_or(Room::Unknown, Room::Free);
    let generator = Generator {
        device,
        groups: &groups,
        chunk: &chunks[0],
        eos_ids: agree(world, hf::eos_ids(stored))?,
        tokenizer: Some(tokenizer),
        batching: Batching { n_sequences: args.under_way.batch, kv_memory, ..Batching::default() },
        order: agree(world, generate::order(args.scoring.numerics, device, weights))?,
        stop: &stop,
    };
    journal::keep(&generator, &questions.requests, &done, dir).map(drop)
}

/// Whether what was asked for is a score.
fn complete(args: &EvaluateArgs) -> Result<()> {
    let Some(limit) = args.limit else { return Ok(()) };
    let path = args.out.join(scores::PARTIAL_FILE);
    let wrong = format!("{}: of at most {limit} items of each task, which is no score of a benchmark", path.display());
    Err(Error::new(Kind::Other, wrong).remedy("leave out --limit"))
}

fn prepare(args: &EvaluateArgs, n_ranks: usize) -> Result<Prepared> {
    if let Some(twice) = args.tasks.iter().enumerate().find_map(|(i, task)| args.tasks[..i].iter().find(|one| one.name == task.name)) {
        return Err(Error::recipe(format!("--task {} stands twice", twice.name)).remedy("name each task once"));
    }
    task::check_shots(&args.tasks, &args.shots)?;
    let (stored, layout) = args.model.open(args.layout, n_ranks)?;
    let model = &stored.meta().model;
    if let HeadKind::Reward(n) = model.head {
        let wrong = format!("a reward model of {n} attributes has no likelihoods");
        return Err(Error::file(&args.model.checkpoint, wrong).remedy("use the checkpoint of a language model"));
    }
    let tokenizer = hf::tokenizer(&stored)?.ok_or_else(|| {
        Error::file(&args.model.checkpoint, "has no tokenizer").remedy("use a checkpoint that was trained or imported with its tokenizer")
    })?;
    let load = |asked: &Asked| task::load(asked, args.data.as_deref(), &args.shots, args.limit.map(|limit| limit as usize));
    let tasks = args.tasks.iter().map(load).collect::<Result<Vec<Task>>>()?;
    let start = Start::of(&stored, args.scoring.bos)?;
    let limits = Limits { tokenizer: &tokenizer, vocab_size: model.vocab_size, max_tokens: model.max_tokens, start };
    let questions = answers::questions(tasks.iter().flat_map(|task| &task.leaves), limits)?;
    Ok(Prepared { stored, tokenizer, layout, tasks, start, questions })
}

fn begin(args: &EvaluateArgs, prepared: &Prepared) -> Result<Begin> {
    let named = |task: &Task| (task.name.clone(), evidence::fingerprint_of_leaves(&task.leaves));
    let asked: BTreeMap<String, String> = prepared.tasks.iter().map(named).collect();
    let recipe = serde_json::json!({
        "asked": asked, "limit": args.limit, "bos": if prepared.start.always.is_some() { "always" } else { "empty" },
        "dtype": args.model.dtype.name(), "numerics": cli::numerics_name(args.scoring.numerics),
        "weights": cli::weights_name(args.model.weights),
    });
    ArtifactWriter::begin_or_continue(&args.out, ARTIFACT_KIND, recipe, vec![artifact::input("checkpoint", prepared.stored.dir())?])
}

/// The evidence of each task, in order.
fn by_task<'e>(tasks: &[Task], evidence: &'e [Evidence]) -> Vec<&'e [Evidence]> {
    let mut rest = evidence;
    let part = |task: &Task| {
        let (mine, others) = rest.split_at(task.leaves.iter().map(|leaf| leaf.items.len()).sum());
        rest = others;
        mine
    };
    tasks.iter().map(part).collect()
}

fn score(args: &EvaluateArgs, tasks: &[Task], evidence: &[Evidence]) -> Scores {
    let of_task = |(task, items): (&Task, &[Evidence])| {
        let n_shots = task.leaves.iter().map(|leaf| (leaf.name.clone(), leaf.n_shots)).collect();
        scores::of_task(&task.name, items, &task.groups, &n_shots)
    };
    Scores { limit: args.limit.map(|limit| limit as usize), tasks: tasks.iter().zip(by_task(tasks, evidence)).map(of_task).collect() }
}

/// Writes and commits what the journal has.
fn write(args: &EvaluateArgs, prepared: &Prepared, mut writer: ArtifactWriter) -> Result<Scores> {
    let Prepared { tasks, questions, tokenizer, .. } = prepared;
    let found: Vec<TokenScores> = score_journal::read(&writer.journal_dir(), questions.pairs.len(), |_| true)?;
    let likelihoods: Vec<Likelihood> = found.into_iter().map(Likelihood::from).collect();
    let responses = journal::responses(&writer.journal_dir(), &questions.requests)?;
    let evidence = questions.evidence(prepared.leaves(), &likelihoods, &responses, tokenizer);
    let scores = score(args, tasks, &evidence);
    for (task, items) in tasks.iter().zip(by_task(tasks, &evidence)) {
        write_lines(&mut writer, &format!("{}.jsonl", task.name), items)?;
    }
    let mut file = HashingFile::create(writer.dir(), scores.file_name())?;
    file.append(&serde_json::to_vec_pretty(&scores).expect("scores are plain data"))?;
    writer.add(file.close()?);
    writer.count("items", evidence.len());
    writer.commit().map(|_| scores)
}
