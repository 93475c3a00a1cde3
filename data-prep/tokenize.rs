//! `trireme-tokenize`: text and a tokenizer in, token shards out. Wiring only; the work is `data::tokenize`.

use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;
use trireme::artifact;
use trireme::cli;
use trireme::comm::agree;
use trireme::data::shards::Split;
use trireme::data::tokenize::{self, Settings, Tokenized};
use trireme::error::Result;
use trireme::progress::Progress;
use trireme::runtime::{DeviceKind, Runtime};
use trireme::text::Tokenizer;
use trireme::text::corpus::{self, Corpus};

/// Tokenizes text into Megatron's .bin/.idx shards (int32), train and validation, with a manifest.
///
/// Input is any number of .jsonl / .jsonl.gz / .jsonl.zst files ({"text": ..} a line), text files, and folders. Each document ends
/// with the end-of-sequence token. Whether it is held out depends on its text alone. Under mpirun or srun the ranks share the
/// work; the result has the same bytes for every number of ranks.
///
/// Examples:
///   trireme-tokenize --input corpus.jsonl.zst --tokenizer runs/tokenizer --out runs/tokens
///   mpirun -n 8 trireme-tokenize --input corpus/ --tokenizer runs/tokenizer --validation-share 0.002 --out runs/corpus-tokens
#[derive(Parser)]
#[command(name = "trireme-tokenize", version, verbatim_doc_comment)]
struct Arguments {
    /// Text: JSONL files, text files, folders
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<PathBuf>,
    /// A tokenizer directory or a SentencePiece .model file
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Where the shards go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the documents held out for validation; 0: none, and no validation files
    #[arg(long, default_value_t = 0.01, value_name = "SHARE")]
    validation_share: f64,
    /// The field of a JSONL line that holds the text
    #[arg(long, default_value = "text", value_name = "NAME")]
    text_field: String,
    /// A longer line or file is an error (in folders: skipped)
    #[arg(long, default_value_t = corpus::MAX_DOCUMENT_BYTES, value_name = "BYTES")]
    max_document_bytes: usize,
}

fn main() -> ExitCode {
    let arguments: Arguments = cli::parse();
    cli::main_with(|| {
        tokenize::check_share(arguments.validation_share)?;
        let runtime = Runtime::start(DeviceKind::Cpu)?;
        let result = run(&arguments, &runtime);
        runtime.close(result)
    })
}

fn run(arguments: &Arguments, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let options = corpus::Options { text_field: arguments.text_field.clone(), max_document_bytes: arguments.max_document_bytes };
    let reading = serde_json::json!({ "text_field": options.text_field, "max_document_bytes": options.max_document_bytes });
    let open =
        || -> Result<(Tokenizer, Corpus)> { Ok((Tokenizer::open(&arguments.tokenizer)?, Corpus::open_with(&arguments.input, options)?)) };
    let (tokenizer, corpus) = agree(world, open())?;
    let inputs = || -> Result<_> {
        let mut inputs = corpus.inputs("corpus")?;
        inputs.push(artifact::input("tokenizer", &arguments.tokenizer)?);
        Ok(inputs)
    };
    let inputs = agree(world, if runtime.is_first() { inputs() } else { Ok(Vec::new()) })?;
    let started = Instant::now();
    let share_bytes = corpus.disk_bytes() / world.size() as u64;
    let progress = runtime.is_first().then(|| Mutex::new(Progress::new("tokenize", share_bytes, "B")));
    let advance = |bytes| {
        if let Some(progress) = &progress {
            progress.lock().expect("progress does not panic").add(bytes);
        }
    };
    let settings = Settings {
        tokenizer: &tokenizer,
        validation_share: arguments.validation_share,
        reading,
        progress: &advance,
        stop: &|| runtime.stop_requested(),
    };
    let tokenized = tokenize::run(&arguments.out, &corpus, inputs, &settings, world)?;
    if let Some(progress) = progress {
        progress.into_inner().expect("progress does not panic").finish();
    }
    if runtime.is_first() {
        print_result(arguments, &tokenized, started.elapsed().as_secs_f64());
    }
    Ok(())
}

/// What was done, on stdout; a reader that went away has read enough.
fn print_result(arguments: &Arguments, tokenized: &Tokenized, elapsed_s: f64) {
    let mut out = std::io::stdout().lock();
    let _ = match &tokenized.report {
        None => {
            writeln!(out, "{}: finished before (fingerprint {}), nothing to do", arguments.out.display(), tokenized.manifest.fingerprint)
        }
        Some(report) => {
            let rate = report.text_bytes as f64 / 1e6 / elapsed_s.max(1e-9);
            writeln!(out, "corpus      {report}; {elapsed_s:.1} s, {rate:.1} MB/s")
        }
    };
    for split in [Split::Train, Split::Validation].map(Split::name) {
        let count = |name: &str| tokenized.manifest.count(&format!("{split}_{name}"));
        let (Some(documents), Some(tokens), Some(bytes)) = (count("documents"), count("tokens"), count("text_bytes")) else { continue };
        let per_token = bytes as f64 / tokens.max(1) as f64;
        let _ = writeln!(out, "{split:<11} {documents} documents, {tokens} tokens, {bytes} bytes of text, {per_token:.2} bytes a token");
    }
}
