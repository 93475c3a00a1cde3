//! `trireme-tokenize`: text and a tokenizer in, token shards out. Wiring only; the work is `data::tokenize`.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use trireme::artifact;
use trireme::cli;
use trireme::comm::agree;
use trireme::data::tokenize::{self, Settings};
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
///   mpirun -n 8 trireme-tokenize --input corpus/ --tokenizer runs/tokenizer --validation-share 0.002 --out runs/tokens
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
    /// Share of the documents held out for validation
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
    let arguments = Arguments::parse();
    cli::main_with(|| {
        let runtime = Runtime::start(DeviceKind::Cpu)?;
        let result = run(&arguments, &runtime);
        runtime.close(result)
    })
}

fn run(arguments: &Arguments, runtime: &Runtime) -> Result<()> {
    let world = runtime.world();
    let open = || -> Result<(Tokenizer, Corpus)> {
        let options = corpus::Options { text_field: arguments.text_field.clone(), max_document_bytes: arguments.max_document_bytes };
        Ok((Tokenizer::open(&arguments.tokenizer)?, Corpus::open_with(&arguments.input, options)?))
    };
    let (tokenizer, corpus) = agree(world, open())?;
    let inputs = || -> Result<_> {
        let mut inputs = corpus.inputs("corpus")?;
        inputs.push(artifact::input("tokenizer", &arguments.tokenizer)?);
        Ok(inputs)
    };
    let inputs = agree(world, if runtime.is_first() { inputs() } else { Ok(Vec::new()) })?;
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
        progress: &advance,
        stop: &|| runtime.stop_requested(),
    };
    let tokenized = tokenize::run(&arguments.out, &corpus, inputs, &settings, world)?;
    if !runtime.is_first() {
        return Ok(());
    }
    if tokenized.was_finished {
        println!("{}: finished already, nothing to do", arguments.out.display());
    }
    for split in ["train", "validation"] {
        let count = |name: &str| tokenized.manifest.count(&format!("{split}_{name}")).unwrap_or(0);
        let (tokens, bytes) = (count("tokens"), count("text_bytes"));
        println!(
            "{split:<11} {} documents, {tokens} tokens, {bytes} bytes of text, {:.2} bytes a token",
            count("documents"),
            bytes as f64 / tokens.max(1) as f64
        );
    }
    Ok(())
}
