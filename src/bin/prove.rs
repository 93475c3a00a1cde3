//! trireme-prove: is what this job computes right? Wiring only; the work is `prove`.

use clap::{ArgGroup, Parser};
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::checkpoint;
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::error::Result;
use trireme::infer::load::{check_layout, layout_for};
use trireme::prove::gradients::{self, Reference};
use trireme::prove::layouts::{self, ProofSize};
use trireme::prove::table::Table;
use trireme::recipe::Pretrain;
use trireme::runtime::Runtime;
use trireme::tensor::DType;

/// Prove on your own machines that training computes what it should.
///
/// With --recipe: three steps of your recipe at its peak learning rate, made small (one layer a pipeline chunk, two micro-batches a
/// stage, synthetic tokens: no data is needed), in its layout on all ranks, then the same on rank 0 alone. Layout, widths, vocabulary,
/// precision, schedule and
/// numerics stay yours. The table compares loss and gradient norm of each step, every gradient after the first step and every
/// weight after the last, put together again as whole tensors. With numerics.mode = "reproducible" every bit must be equal; with
/// "fast" |a - b| / |b| must be what rounding explains: 4 u sqrt(n d), u = 2^-24, n the longest sum, d = 12 layers + 6 operations;
/// in bf16 4 2^-9 sqrt(tp d) more; weights 2 steps lr sqrt(that) an element (the documentation of the module prove derives it).
/// Rank 0 needs memory for the whole small model.
///
/// With --checkpoint and --tokens: loss and every gradient of one batch, a line {"id": "a", "tokens": [..]} a sequence, written as
/// safetensors under Hugging Face names (--gradients) and compared with gradients that another program made (--reference).
/// In PyTorch, for sequences of one length:
///   loss = model(input_ids=tokens, labels=tokens).loss; loss.backward()
///   save_file({n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}, "torch.safetensors")
///
/// The table has for each row the largest difference in ulp (steps of the type it is stored in; many where a value crosses zero), the
/// largest |a - b| / largest |b|, |a - b| / |b| as vectors, what is allowed of that, and the result. Exit codes: 0 all rows hold, 4 one
/// does not, 2 command line or recipe, 3 files.
///
/// Examples:
///   srun trireme-prove --recipe my.toml --set numerics.mode=reproducible
///   mpirun -n 8 trireme-prove --recipe my.toml --set parallel.tp=4 --layers 2
///   trireme-prove --checkpoint runs/imported --tokens batch.jsonl --gradients ours.safetensors --reference torch.safetensors
#[derive(Parser)]
#[command(name = "trireme-prove", version, verbatim_doc_comment)]
#[command(group(ArgGroup::new("what").args(["recipe", "checkpoint"]).required(true)))]
#[command(group(ArgGroup::new("result").args(["gradients", "reference"]).multiple(true).conflicts_with("recipe")))]
struct Args {
    /// Recipe of trireme-pretrain
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// Override of one key of the recipe, e.g. parallel.tp=2 (may be given again)
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "checkpoint")]
    sets: Vec<String>,
    /// Layers of the small model; left out: pp x vp, one a chunk
    #[arg(long, value_name = "N", conflicts_with = "checkpoint")]
    layers: Option<usize>,
    /// Samples a step; left out: dp x micro x 2 pp
    #[arg(long, value_name = "N", conflicts_with = "checkpoint")]
    samples: Option<usize>,
    /// A checkpoint, or a run (its newest checkpoint)
    #[arg(long, requires_all = ["tokens", "result"])]
    checkpoint: Option<PathBuf>,
    /// The batch, one JSON object {"id", "tokens"} a line
    #[arg(long, value_name = "JSONL", conflicts_with = "recipe")]
    tokens: Option<PathBuf>,
    /// Write loss and gradients here
    #[arg(long, value_name = "SAFETENSORS")]
    gradients: Option<PathBuf>,
    /// Compare with the loss and the gradients of this file
    #[arg(long, value_name = "SAFETENSORS")]
    reference: Option<PathBuf>,
    /// With --checkpoint: tensor-parallel ranks
    #[arg(long, default_value_t = 1, conflicts_with = "recipe")]
    tp: usize,
    /// With --checkpoint: pipeline stages
    #[arg(long, default_value_t = 1, conflicts_with = "recipe")]
    pp: usize,
    /// With --checkpoint: storage of weights and activations, f32 or bf16
    #[arg(long, default_value = "f32", value_parser = cli::parse_dtype, conflicts_with = "recipe")]
    dtype: DType,
    #[command(flatten)]
    place: cli::Place,
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
    cli::main_with(|| {
        let recipe = args.recipe.as_ref().map(|path| Pretrain::load(path, &args.sets)).transpose()?;
        let runtime = Runtime::start(args.place.device)?;
        let result = match &recipe {
            Some(recipe) => prove_layout(&args, recipe, &runtime),
            None => prove_gradients(&args, &runtime),
        };
        runtime.close(result)
    })
}

fn prove_layout(args: &Args, recipe: &Pretrain, runtime: &Runtime) -> Result<()> {
    let size = ProofSize { layers: args.layers, samples: args.samples };
    let (small, layout) = agree(runtime.world(), layouts::plan(recipe, size, runtime.world().size()))?;
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::of(small.numerics.mode)))?;
    let table = layouts::prove(&small, &*device, &groups)?;
    if runtime.is_first() {
        let (tp, pp, dp, vp) = (layout.tp, layout.pp, layout.dp, layout.vp);
        let (layers, samples) = (small.model.n_layers, small.batch.global);
        println!("tp {tp} x pp {pp} x dp {dp}, vp {vp}, against one rank: {layers} layers, {} steps of {samples} samples", layouts::STEPS);
    }
    judge(runtime, table)
}

fn prove_gradients(args: &Args, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let (checkpoint, tokens) = (args.checkpoint.as_ref().expect("clap asks for it"), args.tokens.as_ref().expect("clap asks for it"));
    let prepare = || {
        let layout = layout_for(world.size(), args.tp, args.pp)?;
        let stored = checkpoint::open(checkpoint)?;
        check_layout(&stored.meta().model, &layout)?;
        let sequences = gradients::read_batch(&stored, tokens)?;
        let reference = args.reference.as_ref().map(|path| Reference::open(path, &stored.meta().model)).transpose()?;
        args.gradients.as_ref().map_or(Ok(()), |out| gradients::check_output(out))?;
        Ok((layout, stored, sequences, reference))
    };
    let (layout, stored, sequences, reference) = agree(world, prepare())?;
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::Library))?;
    let computed = gradients::compute(&*device, &groups, &stored, &sequences, args.dtype)?;
    let table = computed.finish(&groups, args.gradients.as_deref(), reference.as_ref())?;
    if runtime.is_first() {
        let written = args.gradients.as_ref().map_or(String::new(), |out| format!("{}: ", out.display()));
        println!("{written}loss {} and the gradients of {} sequences", computed.loss, sequences.len());
    }
    judge(runtime, table)
}

/// Shows the table of rank 0; all ranks leave with its verdict.
fn judge(runtime: &Runtime, table: Option<Table>) -> Result<()> {
    if let Some(table) = &table {
        println!("{table}");
    }
    agree(runtime.world(), table.map_or(Ok(()), |table| table.verdict()))
}
