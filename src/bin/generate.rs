//! trireme-generate: requests (JSONL) -> responses (JSONL). Wiring only; the work is `infer::generate`.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint::{self, hf};
use trireme::cli;
use trireme::comm::nccl::Sums;
use trireme::comm::{Groups, agree};
use trireme::device::Device;
use trireme::error::{Error, Result};
use trireme::infer::choices::{BeginOfSequence, Start};
use trireme::infer::generate::{self, Batching, Generator};
use trireme::infer::journal::{self, Merged};
use trireme::infer::kv_memory::Room;
use trireme::infer::load::load_packed;
use trireme::infer::request::{Limits, OnBad, RequestFile, read_requests};
use trireme::infer::samples::Done;
use trireme::model::config::HeadKind;
use trireme::model::packed::WeightFormat;
use trireme::recipe::Mode;
use trireme::runtime::Runtime;
use trireme::text::Tokenizer;
use trireme::text::chat::{Date, NEMOTRON_TURN};

/// Generate responses to a file of requests, in batch.
///
/// A request is one JSON object a line; the keys but "id", the prompt and "max_new_tokens" may be left out:
///
///   {"id": "a", "prompt": "Once upon", "max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95, "stop": ["\n\n"]}
///
///   id                  a text, of its own for every request
///   prompt              the prompt as text (see --bos), or in its place
///   messages              [{"role": "user", "content": "Hello"}, ..], by the model's chat template, or Nemotron's; a content may be a list
///                         of {"type": "text", "text": "Hello"}, and what else a template reads comes along: "tool_calls", "tool_call_id",
///                         "reasoning_content", ..
///   tokens                [1, 523, ..], its token ids
///   tools                 beside messages: JSON schemas of functions, for templates that read them
///   documents             beside messages: [{"title": "a", "text": "b"}, ..], for templates that read them
///   chat_template         beside messages: the name of one of the model's templates; left out: "default", with tools "tool_use"
///   chat_template_kwargs  beside messages: values that the template reads by name, {"enable_thinking": false}
///   continue_final_message  beside messages: true goes on with the last of them, which is no turn of its own then
///   max_new_tokens      the longest response; it also ends where the model's longest sequence does
///   temperature         1    0 takes the most likely token
///   top_k               0    draw from this many most likely tokens; 0: all
///   top_p               1    draw from the fewest most likely tokens that have this probability together
///   min_p               0    draw from tokens with at least this part of the probability of the most likely one
///   repetition_penalty  1    divides positive and multiplies negative logits of tokens in prompt or response
///   seed                0    of the noise
///   stop                []   texts of which the first that comes up ends the response, before it; or one text
///   n                   1    samples to make
///   logprobs            -    also give the log-probabilities of each token and of this many most likely ones
///
/// The filters are those of Hugging Face transformers, in its order: penalty, temperature, top_k, top_p, min_p.
///
/// A response is one JSON object a line in OUT/responses.jsonl, in the order of the requests, samples of one in turn:
///
///   {"id": "a", "index": 0, "text": "a time", "tokens": [263, 931], "logprob": -3.1, "finish_reason": "stop"}
///
///   index          which sample, from 0
///   text           the decoding of "tokens", up to where a stop string begins; a character that was not completed is U+FFFD
///   tokens         without the end-of-sequence token, with the tokens of a stop string
///   logprob        sum of the tokens' (and the end-of-sequence token's) log-probabilities under the model itself: temperature 1, no
///                  penalty, nothing left out
///   finish_reason  "stop": end of sequence or a stop string; "length": max_new_tokens; "context": the model's longest sequence;
///                  "error": the request was wrong (see --on-bad-request)
///   logprobs       when asked for, one for each token and for the end-of-sequence token:
///                  {"token": 263, "logprob": -1.2, "top_logprobs": [{"token": 263, "logprob": -1.2}, ..]}
///
/// The noise of a token is a function of seed, id, sample and position: no response depends on what else is in the file.
///
/// A job that is killed or stopped (exit code 75) keeps the responses that were complete in OUT.tmp-JOB/journal. The same command goes
/// on from there, with any number of ranks, --tp, --pp or --batch; with another checkpoint or request file it refuses.
///
/// Example:
///   trireme-generate --checkpoint runs/first --requests requests.jsonl --out runs/first-samples
#[derive(Parser)]
#[command(name = "trireme-generate", version, verbatim_doc_comment)]
struct Args {
    /// Requests, one JSON object a line
    #[arg(long)]
    requests: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    under_way: cli::UnderWay,
    /// Most tokens of one pass over the model: a long prompt is taken in pieces, beside a token of each response under way
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = cli::parse_count)]
    pass_tokens: usize,
    /// Most tokens guessed ahead of a response, from what followed the same tokens before, and verified in one pass; 0: none
    #[arg(long, value_name = "TOKENS", default_value_t = 4)]
    draft: usize,
    /// Memory of each rank's cache of keys and values: bytes, or a number with KB, MB, GB, KiB, MiB or GiB; left out: what the
    /// responses under way can need at most, as far as it is free
    #[arg(long, value_name = "SIZE", value_parser = cli::parse_bytes)]
    kv_memory: Option<u64>,
    /// What a wrong request does: refuse (the file, exit code 3, before anything is made) or record (its response has finish_reason
    /// "error" and "error": what was wrong; all others are made, the exit code is 0)
    #[arg(long, default_value = "refuse", value_name = "refuse|record", value_parser = cli::parse_on_bad)]
    on_bad_request: OnBad,
    /// Before which prompts that are texts the beginning-of-sequence token stands: empty ones, always, or auto, as the model's
    /// tokenizer.json asks for, and before empty ones. Never before tokens, and before messages as the chat template writes it
    #[arg(long, value_name = "auto|empty|always", default_value = "auto")]
    bos: BeginOfSequence,
    /// The day that it is for chat templates that ask, as those of Llama 3.2 and gpt-oss do; left out: their requests are refused, since
    /// the same request is to make the same prompt tomorrow
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = Date::read)]
    today: Option<Date>,
    /// Order of sums: reproducible, the same bytes whatever runs together and under every layout; or fast, which on GPUs takes cuBLASLt's
    /// products and FP8 tensor cores. Left out: reproducible where it can be had
    #[arg(long, value_parser = cli::parse_numerics)]
    numerics: Option<Mode>,
    #[command(flatten)]
    model: cli::Model,
    #[command(flatten)]
    layout: cli::Layout,
    #[command(flatten)]
    place: cli::Place,
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
    cli::main_with(|| run(&args))
}

fn run(args: &Args) -> Result<()> {
    let runtime = Runtime::start(args.place.device)?;
    let result = generate(args, &runtime);
    runtime.close(result)
}

fn generate(args: &Args, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let prepared = agree(world, prepare(args, world.size()))?;
    let Some(begun) = runtime.begin(&args.out, || begin(args, &prepared))? else { return Ok(()) };
    let dir = begun.journal_dir(world);
    let mut done = Done::nothing(&prepared.file.requests);
    journal::resume(world, &dir, &mut done)?;
    if done.n_made() < done.n_samples() {
        let sums = Sums::of(generate::mode(args.numerics));
        let (device, groups) = runtime.open(prepared.layout, args.place.comm, args.place.nccl(sums))?;
        make(args, runtime, &prepared, (&*device, &groups), (&done, &dir))?;
    }
    let mut merged = Merged::default();
    agree(world, begun.commit_with(|writer| write(writer, &prepared.file).map(|written| merged = written)))?;
    if runtime.is_first() {
        if let Some(first) = prepared.file.refused.first() {
            let wrong = first.response.error.as_deref().unwrap_or_default();
            log::warn!("{}: {} wrong requests, the first in {wrong}", args.requests.display(), merged.n_errors);
        }
        println!("{}: {} responses", args.out.join("responses.jsonl").display(), merged.n_responses);
    }
    Ok(())
}

/// Makes what is missing and leaves it in the journal. Collective; all ranks leave with the same result.
fn make(
    args: &Args,
    runtime: &Runtime,
    prepared: &Prepared,
    (device, groups): (&dyn Device, &Groups),
    (done, dir): (&Done, &PathBuf),
) -> Result<()> {
    let format = args.model.weights.unwrap_or(WeightFormat::Stored);
    let chunk = agree(&*groups.world, load_packed(device, &prepared.stored, groups, args.model.dtype, format))?;
    let free = || runtime.free_bytes().map_or(Room::Unknown, Room::Free);
    let kv_memory = args.kv_memory.map_or_else(free, |bytes| Room::Asked(bytes as usize));
    let batching = Batching {
        n_sequences: args.under_way.batch,
        pass_tokens: args.pass_tokens,
        draft_tokens: args.draft,
        kv_memory,
        ..Batching::default()
    };
    let generator = Generator {
        device,
        groups,
        chunk: &chunk,
        eos_ids: prepared.eos_ids.clone(),
        tokenizer: prepared.tokenizer.as_ref(),
        batching,
        order: agree(&*groups.world, generate::order(args.numerics, device, args.model.weights))?,
        stop: &|| runtime.stop_requested(),
    };
    let counts = journal::keep(&generator, &prepared.file.requests, done, dir)?;
    log::info!("replica 0: {counts}");
    Ok(())
}

/// What every rank reads for itself.
struct Prepared {
    stored: checkpoint::Stored,
    tokenizer: Option<Tokenizer>,
    eos_ids: Vec<u32>,
    file: RequestFile,
    layout: trireme::parallel::layout::ParallelLayout,
    start: Start,
}

fn prepare(args: &Args, n_ranks: usize) -> Result<Prepared> {
    let (stored, layout) = args.model.open(args.layout, n_ranks)?;
    let model = &stored.meta().model;
    if let HeadKind::Reward(n) = model.head {
        let wrong = format!("a reward model of {n} attributes generates no text");
        return Err(Error::file(&args.model.checkpoint, wrong).remedy("use the checkpoint of a language model, or trireme-score rewards"));
    }
    let tokenizer = hf::tokenizer(&stored)?;
    let mut template = tokenizer.as_ref().map(|tokenizer| hf::chat_template(&stored, tokenizer)).transpose()?.flatten();
    if let Some(template) = &mut template {
        template.set_today(args.today);
    }
    let start = Start::of(&stored, args.bos)?;
    let limits = Limits {
        vocab_size: model.vocab_size,
        max_tokens: model.max_tokens,
        tokenizer: tokenizer.as_ref(),
        template: template.as_ref(),
        start,
    };
    let file = read_requests(&args.requests, limits, args.on_bad_request)?;
    let mut eos_ids = hf::eos_ids(&stored)?;
    // In Nemotron's format the next turn's mark ends an answer.
    eos_ids.extend(tokenizer.as_ref().and_then(|tokenizer| tokenizer.id_of(NEMOTRON_TURN)));
    Ok(Prepared { stored, tokenizer, eos_ids, file, layout, start })
}

fn begin(args: &Args, prepared: &Prepared) -> Result<Begin> {
    let on_bad = cli::on_bad_name(args.on_bad_request);
    let mut recipe = serde_json::json!({
        "dtype": args.model.dtype.name(), "weights": cli::weights_name(args.model.weights),
        "numerics": cli::numerics_name(args.numerics), "on_bad_request": on_bad,
    });
    if prepared.start.always.is_some() {
        recipe["bos"] = "always".into();
    }
    if let Some(today) = args.today {
        recipe["today"] = today.to_string().into();
    }
    let inputs = vec![artifact::input("checkpoint", prepared.stored.dir())?, artifact::input("requests", &args.requests)?];
    ArtifactWriter::begin_or_continue(&args.out, "responses", recipe, inputs)
}

fn write(mut writer: ArtifactWriter, requests: &RequestFile) -> Result<Merged> {
    let mut file = HashingFile::create(writer.dir(), "responses.jsonl")?;
    let merged = journal::merge(&writer.journal_dir(), requests, &mut file)?;
    writer.add(file.close()?);
    writer.count("responses", merged.n_responses);
    writer.count("tokens", merged.n_tokens);
    writer.count("errors", merged.n_errors);
    writer.commit().map(|_| merged)
}
