//! `trireme-train-tokenizer`: text in, a SentencePiece `.model` out.

use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use trireme::artifact::{ArtifactWriter, Begin, HashingFile};
use trireme::cli;
use trireme::error::Result;
use trireme::text::corpus::{self, Corpus};
use trireme::text::train::{self, Settings};
use trireme::text::{ARTIFACT_KIND, MODEL_FILE, VOCAB_FILE};

/// Trains a SentencePiece BPE tokenizer with Nemotron-4's settings: byte fallback, digits alone, whitespace kept, identity
/// normalisation, <extra_id_*> as user-defined pieces. SentencePiece itself loads the result.
///
/// Example:
///   trireme-train-tokenizer --input docs/ corpus.jsonl.zst --vocab-size 8000 --out runs/tokenizer
///
/// Input is any number of .jsonl / .jsonl.gz / .jsonl.zst files ({"text": ..} a line), text files (one document each), and
/// folders (sorted; any file that is text by its content; hidden entries, `target` folders, links and .lock .svg .map .sum
/// .min.js files are left out). The result does not depend on the number of threads. Run again, a finished job says so.
#[derive(Parser)]
#[command(name = "trireme-train-tokenizer", version, verbatim_doc_comment)]
struct Arguments {
    /// Text: JSONL files, text files, folders.
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<PathBuf>,
    /// Number of pieces in all (Nemotron-4: 256000).
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Where the artifact goes: tokenizer.model, tokenizer.vocab, manifest.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of user-defined pieces <extra_id_0>, <extra_id_1>, ..
    #[arg(long, default_value_t = 3, value_name = "N")]
    extra_ids: usize,
    /// Share of the text's characters that get a piece of their own; the others become bytes.
    #[arg(long, default_value_t = train::CHARACTER_COVERAGE, value_name = "SHARE")]
    character_coverage: f64,
    /// Count at most so much text, spread over the whole input.
    #[arg(long, default_value_t = train::SAMPLE_BYTES, value_name = "BYTES")]
    sample_bytes: u64,
    /// The field of a JSONL line that holds the text.
    #[arg(long, default_value = "text", value_name = "NAME")]
    text_field: String,
    /// A longer line or file is an error (in folders: skipped).
    #[arg(long, default_value_t = corpus::MAX_DOCUMENT_BYTES, value_name = "BYTES")]
    max_document_bytes: usize,
    /// Threads to read and count with [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

fn main() -> ExitCode {
    let arguments: Arguments = cli::parse();
    cli::main_with(|| run(&arguments))
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut settings = Settings::new(arguments.vocab_size);
    settings.n_extra_ids = arguments.extra_ids;
    settings.character_coverage = arguments.character_coverage;
    settings.sample_bytes = arguments.sample_bytes;
    settings.n_threads = arguments.threads.unwrap_or(settings.n_threads);
    settings.check()?;
    let options = corpus::Options { text_field: arguments.text_field.clone(), max_document_bytes: arguments.max_document_bytes };
    let recipe = serde_json::json!({
        "vocab_size": settings.vocab_size,
        "extra_ids": settings.n_extra_ids,
        "character_coverage": settings.character_coverage,
        "sample_bytes": settings.sample_bytes,
        "text_field": options.text_field,
        "max_document_bytes": options.max_document_bytes,
    });
    let corpus = Corpus::open_with(&arguments.input, options)?;
    let inputs = corpus.inputs("corpus")?;
    let mut writer = match ArtifactWriter::begin(&arguments.out, ARTIFACT_KIND, recipe, inputs)? {
        Begin::Finished(manifest) => {
            println!("{}: finished before (fingerprint {}), nothing to do", arguments.out.display(), manifest.fingerprint);
            return Ok(());
        }
        Begin::Write(writer) => writer,
    };
    let trained = train::train(&corpus, &settings)?;
    for (name, bytes) in [(MODEL_FILE, trained.model_bytes.as_slice()), (VOCAB_FILE, trained.vocab_text.as_bytes())] {
        let mut file = HashingFile::create(writer.dir(), name)?;
        file.append(bytes)?;
        writer.add(file.close()?);
    }
    let report = &trained.report;
    writer.count("vocab_size", settings.vocab_size);
    writer.count("documents", report.corpus.documents);
    writer.count("text_bytes", report.corpus.text_bytes);
    writer.count("sample_bytes", report.sample_bytes);
    writer.count("distinct_words", report.distinct_words);
    writer.count("bytes_per_token", report.bytes_per_token);
    writer.commit()?;
    println!("{report}");
    println!("written       {}", arguments.out.join(MODEL_FILE).display());
    let _ = std::io::stdout().flush(); // a reader that went away has read enough
    Ok(())
}
