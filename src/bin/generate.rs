//! trireme-generate: requests (JSONL) -> responses (JSONL). Wiring only; the work is `infer::generate`.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{self, ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint::{self, hf};
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::error::{Error, Result};
use trireme::infer::generate::Generator;
use trireme::infer::load::{check_layout, layout_for, load_chunk};
use trireme::infer::request::{Limits, OnBad, Response, read_requests};
use trireme::model::config::HeadKind;
use trireme::model::packed::WeightFormat;
use trireme::runtime::Runtime;
use trireme::tensor::DType;
use trireme::text::Tokenizer;
use trireme::text::chat::NEMOTRON_TURN;

/// Generate responses to a file of requests, in batch.
///
/// A request is one JSON object a line:
///   {"id": "a", "prompt": "Once upon", "max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "seed": 1}
/// or with "tokens": [..] or "messages": [{"role": "user", "content": "Hello"}, ..] in place of "prompt"; messages become text by the
/// chat template that came with the model, or by Nemotron's. Left out: temperature 1, top_p 1, top_k 0 (all), seed 0. Temperature 0 takes
/// the most likely token. A response is {"id", "text", "tokens", "logprob", "finish_reason": "stop"|"length"|"context"}, in the
/// order of the requests, in OUT/responses.jsonl.
///
/// Example:
///   trireme-generate --checkpoint runs/first --requests requests.jsonl --out runs/first-samples
#[derive(Parser)]
#[command(name = "trireme-generate", version, verbatim_doc_comment)]
struct Args {
    /// A checkpoint, or a run (its newest checkpoint)
    #[arg(long)]
    checkpoint: PathBuf,
    /// Requests, one JSON object a line
    #[arg(long)]
    requests: PathBuf,
    /// Directory to write
    #[arg(long)]
    out: PathBuf,
    /// Tensor-parallel ranks
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Pipeline stages
    #[arg(long, default_value_t = 1)]
    pp: usize,
    /// Responses under way at one time on a replica
    #[arg(long, default_value_t = 16)]
    batch: usize,
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
    let (device, groups) = runtime.open(prepared.layout, args.place.comm, args.place.nccl(Sums::Library))?;
    let device = &*device;
    let mut chunk = agree(&*groups.world, load_chunk(device, &prepared.stored, &groups, args.dtype))?;
    agree(&*groups.world, chunk.pack(device, &*groups.tp, args.weights.unwrap_or(WeightFormat::Stored)))?;
    let generator = Generator {
        device,
        groups: &groups,
        chunk: &chunk,
        eos_ids: prepared.eos_ids,
        tokenizer: prepared.tokenizer.as_ref(),
        n_slots: args.batch,
        stop: &|| runtime.stop_requested(),
    };
    let responses = generator.responses(&prepared.requests)?;
    agree(&*groups.world, begun.commit_with(|writer| write(writer, &responses)))?;
    if runtime.is_first() {
        println!("{}: {} responses", args.out.join("responses.jsonl").display(), responses.len());
    }
    Ok(())
}

/// What every rank reads for itself.
struct Prepared {
    stored: checkpoint::Stored,
    tokenizer: Option<Tokenizer>,
    eos_ids: Vec<u32>,
    requests: Vec<trireme::infer::request::Request>,
    layout: trireme::parallel::layout::ParallelLayout,
}

fn prepare(args: &Args, n_ranks: usize) -> Result<Prepared> {
    let layout = layout_for(n_ranks, args.tp, args.pp)?;
    let stored = checkpoint::open(&args.checkpoint)?;
    let model = &stored.meta().model;
    check_layout(model, &layout)?;
    if let HeadKind::Reward(n) = model.head {
        let wrong = format!("a reward model of {n} attributes generates no text");
        return Err(Error::file(&args.checkpoint, wrong).remedy("use the checkpoint of a language model, or trireme-score rewards"));
    }
    let tokenizer = stored.tokenizer()?;
    let template = tokenizer.as_ref().map(|tokenizer| hf::chat_template(&stored, tokenizer)).transpose()?.flatten();
    let limits =
        Limits { vocab_size: model.vocab_size, max_tokens: model.max_tokens, tokenizer: tokenizer.as_ref(), template: template.as_ref() };
    let requests = read_requests(&args.requests, limits, OnBad::Refuse)?.requests;
    let mut eos_ids = hf::eos_ids(&stored)?;
    // In Nemotron's format the next turn's mark ends an answer.
    eos_ids.extend(tokenizer.as_ref().and_then(|tokenizer| tokenizer.id_of(NEMOTRON_TURN)));
    Ok(Prepared { stored, tokenizer, eos_ids, requests, layout })
}

fn begin(args: &Args, prepared: &Prepared) -> Result<Begin> {
    let recipe = serde_json::json!({ "dtype": args.dtype.name(), "weights": cli::weights_name(args.weights) });
    let inputs = vec![artifact::input("checkpoint", prepared.stored.dir())?, artifact::input("requests", &args.requests)?];
    ArtifactWriter::begin(&args.out, "responses", recipe, inputs)
}

fn write(mut writer: ArtifactWriter, responses: &[Response]) -> Result<()> {
    let mut file = HashingFile::create(writer.dir(), "responses.jsonl")?;
    for response in responses {
        let mut line = serde_json::to_vec(response).expect("a response is plain data");
        line.push(b'\n');
        file.append(&line)?;
    }
    writer.add(file.close()?);
    writer.count("responses", responses.len());
    writer.count("tokens", responses.iter().map(|response| response.tokens.len()).sum::<usize>());
    writer.commit().map(|_| ())
}
