//! trireme-pretrain: token shards -> checkpoints and metrics. Wiring only; the loop is `train::pretrain`.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use trireme::cli;
use trireme::comm::agree;
use trireme::comm::nccl::Sums;
use trireme::device::ceiling;
use trireme::error::Result;
use trireme::recipe::Pretrain;
use trireme::runtime::{Patience, Runtime, walltime};
use trireme::train::identity::Changed;
use trireme::train::pretrain::{self, Ended, Job};

/// Pretrain a decoder on token shards, on one rank or many.
///
/// Everything scientific is in the recipe; the command line says where. Started again on the same --out it goes on from the
/// newest checkpoint; when the run is finished it says so and does nothing. SIGTERM and SIGUSR1 save and exit with 75.
///
/// Pipelines (parallel.schedule): "gpipe", "1f1b", "interleaved" (parallel.vp chunks a stage), "zb-h1" (backward in halves). Stages
/// have equally many layers, or those of parallel.layers: a list, "auto", or { embedding, head } in layers. train.recompute trades
/// work for memory: "none", "selective", "full", or ranges of layers. parallel.overlap = false waits for each exchange at once.
///
/// Examples:
///   mpirun -n 2 trireme-pretrain --recipe slurm/recipes/quickstart.toml --out runs/first
///   mpirun -n 4 trireme-pretrain --recipe r.toml --set parallel.tp=2 --set optimizer.lr=3e-4 --out runs/tp2dp2
#[derive(Parser)]
#[command(name = "trireme-pretrain", version, verbatim_doc_comment)]
struct Args {
    /// Recipe in TOML: model, parallel, batch, train, optimizer, data
    #[arg(long)]
    recipe: PathBuf,
    /// Override of one key of the recipe, e.g. train.samples=1000 (may be given again)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Run directory: checkpoints, metrics.jsonl, and a manifest when finished
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    place: cli::Place,
    /// What has changed on purpose since the newest checkpoint: data, tokenizer, model or recipe (may be given again); the run's
    /// lineage keeps it
    #[arg(long = "accept-changed", value_name = "WHAT")]
    accepted: Vec<Changed>,
    /// Save and leave after this step, to be continued by the same command
    #[arg(long, value_name = "STEP")]
    stop_after: Option<u64>,
    /// Time that this job has, as SLURM writes it: MINUTES, MM:SS, HH:MM:SS, D-HH:MM:SS. Shortly before it is over the run saves and
    /// leaves with 75. Left out, SLURM is asked
    #[arg(long, value_name = "TIME", value_parser = walltime::parse)]
    walltime: Option<Duration>,
}

fn main() -> ExitCode {
    let args: Args = cli::parse();
    cli::main_with(|| run(&args))
}

fn run(args: &Args) -> Result<()> {
    let recipe = Pretrain::load(&args.recipe, &args.sets)?;
    let runtime = Runtime::start(args.place.device)?;
    let result = pretrain(args, &recipe, &runtime);
    runtime.close(result)
}

fn pretrain(args: &Args, recipe: &Pretrain, runtime: &Runtime) -> Result<()> {
    let layout = agree(runtime.world(), recipe.check(runtime.world().size()))?;
    let (device, groups) = runtime.open(layout, args.place.comm, args.place.nccl(Sums::of(recipe.numerics.mode)))?;
    let limit = |seconds: f64| (seconds > 0.0).then_some(seconds);
    let patience = Patience { step_s: limit(recipe.observe.hang_after_s), files_s: limit(recipe.observe.hang_in_files_after_s) };
    let _watchdog = runtime.watch(&groups.flight, patience);
    let device = &*device;
    let stop = || runtime.stop_requested();
    let deadline = if runtime.is_first() { walltime::deadline(args.walltime) } else { None };
    let job = Job {
        recipe,
        groups: &groups,
        device,
        out: &args.out,
        stop_after: args.stop_after,
        accepted: &args.accepted,
        stop: &stop,
        deadline,
        ceiling: &|dtype| ceiling::measure(device, dtype),
    };
    let ended = pretrain::run(&job)?;
    if runtime.is_first() {
        match ended {
            Ended::WasFinished => println!("{}: finished already, nothing to do", args.out.display()),
            Ended::Finished => println!("{}: finished", args.out.display()),
            Ended::StoppedAsPlanned => println!("{}: saved and stopped as planned; the same command goes on", args.out.display()),
        }
    }
    Ok(())
}
