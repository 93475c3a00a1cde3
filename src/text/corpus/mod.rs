//! Text corpora: folders, plain files and JSONL, plain or compressed, as one ordered list of documents that any number of
//! ranks can share.
//!
//! What a path may be:
//! - `.jsonl`, `.jsonl.gz`, `.jsonl.zst`: one JSON object a line, the document in its field `text` (or another name). Blank
//!   lines, a byte-order mark, CRLF line ends and a last line without an end are fine; a line that is not JSON, lacks the
//!   field, has something else than a string in it, holds a lone surrogate or invalid UTF-8, or is longer than the limit is
//!   an error that names file and line.
//! - any other file: one document, as it is (a byte-order mark dropped); `.gz` and `.zst` are unpacked.
//! - a folder: its files in sorted order, subfolders too. Text is known by content, not by name (source, documentation, prose
//!   of any extension or none): a file with a NUL in its first 8 KiB is binary. Not entered or read: hidden entries, folders
//!   called `target`, symbolic links, files that are data rather than text (`.lock .svg .map .sum .min.js`), and, counted in
//!   the [`Report`], binary files, files that are not UTF-8, and files longer than the limit.
//!
//! Documents without text are skipped and counted. Rank r of n gets the r-th part by bytes, and the ranks' documents in rank
//! order are the documents of a single rank in order, so what is made from them does not depend on n. This module knows
//! nothing of tokens.

mod json;
mod lines;
mod sums;
mod walk;

use crate::artifact::Input;
use crate::error::{Error, IoContext, Result};
use lines::{Line, Lines};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use sums::Sums;
use walk::{Form, Origin, Packing, Source};

/// The longest line of a JSONL file and the longest plain file, unless told otherwise: 64 MiB.
pub const MAX_DOCUMENT_BYTES: usize = 64 << 20;
/// A compressed file counts as this many times its size when the corpus is divided.
const UNPACKED_RATIO: u64 = 4;
/// A NUL among so many first bytes makes a file of a folder binary.
const SNIFF_BYTES: usize = 8 << 10;

/// How to read a corpus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The field of a JSONL line that holds the text.
    pub text_field: String,
    /// Longer lines and files are refused (in folders: skipped).
    pub max_document_bytes: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { text_field: "text".into(), max_document_bytes: MAX_DOCUMENT_BYTES }
    }
}

/// An ordered list of files to read documents from.
pub struct Corpus {
    sources: Vec<Source>,
    paths: Vec<PathBuf>,
    options: Options,
}

/// One text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Document {
    /// The text, never empty.
    pub text: String,
    /// Where it came from: the path, and for JSONL the byte at which its line starts: `docs.jsonl@1024`.
    pub source: String,
}

/// What a pass over (a part of) a corpus met.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Report {
    /// Documents given out.
    pub documents: u64,
    /// Their bytes.
    pub text_bytes: u64,
    /// Files and lines without text.
    pub empty: u64,
    /// Files of folders with a NUL near the start.
    pub binary: u64,
    /// Files of folders that are not UTF-8.
    pub invalid_utf8: u64,
    /// Files of folders longer than the limit.
    pub too_long: u64,
}

impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Report) {
        self.documents += other.documents;
        self.text_bytes += other.text_bytes;
        self.empty += other.empty;
        self.binary += other.binary;
        self.invalid_utf8 += other.invalid_utf8;
        self.too_long += other.too_long;
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} documents, {} bytes of text", self.documents, self.text_bytes)?;
        let skipped =
            [(self.empty, "empty"), (self.binary, "binary"), (self.invalid_utf8, "not UTF-8"), (self.too_long, "longer than the limit")];
        for (n, what) in skipped.into_iter().filter(|(n, _)| *n > 0) {
            write!(f, ", {n} skipped: {what}")?;
        }
        Ok(())
    }
}

impl Corpus {
    /// Lists the files of these paths, in this order, with the default [`Options`]. Errors: a path that is not there or cannot
    /// be read, and a corpus without a file that could hold text.
    pub fn open(paths: &[PathBuf]) -> Result<Corpus> {
        Corpus::open_with(paths, Options::default())
    }

    /// [`Corpus::open`] with options.
    pub fn open_with(paths: &[PathBuf], options: Options) -> Result<Corpus> {
        let mut sources = Vec::new();
        for path in paths {
            walk::list(path, &mut sources)?;
        }
        if sources.is_empty() {
            let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
            let wrong = format!("{}: an empty corpus: no file with text in it", names.join(", "));
            let remedy = "name a file or folder with text (see --help for what counts as text)";
            return Err(Error::new(crate::error::Kind::File, wrong).remedy(remedy));
        }
        Ok(Corpus { sources, paths: paths.to_vec(), options })
    }

    /// Number of files listed.
    pub fn n_files(&self) -> usize {
        self.sources.len()
    }

    /// Bytes of the listed files on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.bytes).sum()
    }

    /// The part of rank `rank` of `n_ranks`, in order. The same for every call.
    pub fn documents(&self, rank: usize, n_ranks: usize) -> Documents<'_> {
        assert!(rank < n_ranks, "rank {rank} of {n_ranks}");
        let total: u128 = self.sources.iter().map(|source| u128::from(weight(source))).sum();
        let cut = |rank: usize| (total * rank as u128 / n_ranks as u128) as u64;
        Documents {
            corpus: self,
            range: cut(rank)..cut(rank + 1),
            next_source: 0,
            next_start: 0,
            open: None,
            buffer: Vec::new(),
            report: Report::default(),
            sums: None,
            failed: false,
        }
    }

    /// One artifact input per path, as `role`: a file's checksum; a folder's is taken over the names and checksums of the files
    /// listed. Reads everything once.
    pub fn inputs(&self, role: &str) -> Result<Vec<Input>> {
        Ok(self.inputs_of(role, &Sums::default().of_all(&self.sources)?))
    }

    /// Calls `each` with the documents in order until it returns false. -> the inputs, from the very bytes that the documents were read
    /// from and those that follow them. Reads everything once.
    pub fn read_with_inputs(&self, role: &str, mut each: impl FnMut(&Document) -> bool) -> Result<Vec<Input>> {
        let mut documents = Documents { sums: Some(Sums::default()), ..self.documents(0, 1) };
        for document in documents.by_ref() {
            if !each(&document?) {
                break;
            }
        }
        let sums = documents.sums.take().expect("it was there").of_all(&self.sources)?;
        Ok(self.inputs_of(role, &sums))
    }

    fn inputs_of(&self, role: &str, sums: &[String]) -> Vec<Input> {
        let input_of = |root: &PathBuf| {
            let mut lines = String::new();
            let mut only = None;
            for (source, sum) in self.sources.iter().zip(sums).filter(|(source, _)| source.root == *root) {
                let name = source.path.strip_prefix(root).unwrap_or(Path::new(""));
                lines.push_str(&format!("{} {sum}\n", name.display()));
                only = Some(sum.clone()).filter(|_| source.origin == Origin::Named);
            }
            let fingerprint = only.unwrap_or_else(|| format!("{:016x}", xxhash_rust::xxh3::xxh3_64(lines.as_bytes())));
            Input { role: role.into(), path: root.clone(), fingerprint }
        };
        self.paths.iter().map(input_of).collect()
    }
}

/// What a file counts for when the corpus is divided.
fn weight(source: &Source) -> u64 {
    match source.packing {
        Packing::None => source.bytes,
        Packing::Gzip | Packing::Zstd => source.bytes * UNPACKED_RATIO,
    }
}

/// The documents of one rank. After an error it ends.
pub struct Documents<'a> {
    corpus: &'a Corpus,
    /// This rank's part of the weights laid end to end.
    range: std::ops::Range<u64>,
    next_source: usize,
    /// Where `next_source` starts among the weights.
    next_start: u64,
    open: Option<OpenJsonl<'a>>,
    buffer: Vec<u8>,
    report: Report,
    /// Of the files it enters, when they are wanted; it then has the whole corpus.
    sums: Option<Sums>,
    failed: bool,
}

/// A JSONL file being read: lines that start before `end` (in unpacked bytes) are this rank's.
struct OpenJsonl<'a> {
    source: &'a Source,
    lines: Lines<Box<dyn Read>>,
    end: u64,
    /// Lines before the first that was read, when that is known.
    lines_before: Option<u64>,
}

impl Documents<'_> {
    /// What was met so far.
    pub fn report(&self) -> Report {
        self.report
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            if let Some(open) = &mut self.open {
                match read_line(open, &self.corpus.options, &mut self.buffer, &mut self.report)? {
                    Some(document) => return Ok(Some(document)),
                    None => self.open = None,
                }
                continue;
            }
            let Some(source) = self.corpus.sources.get(self.next_source) else { return Ok(None) };
            let (start, end) = (self.next_start, self.next_start + weight(source));
            if start >= self.range.end {
                return Ok(None);
            }
            (self.next_source, self.next_start) = (self.next_source + 1, end);
            match source.form {
                Form::Plain if self.range.contains(&start) => {
                    if let Some(document) = read_plain(source, &self.corpus.options, (&mut self.report, &mut self.sums))? {
                        return Ok(Some(document));
                    }
                }
                Form::Jsonl if end > self.range.start => {
                    let part = self.range.start.saturating_sub(start)..self.range.end.min(end) - start;
                    self.open = Some(open_jsonl(source, part, self.corpus.options.max_document_bytes, &mut self.sums)?);
                }
                Form::Plain | Form::Jsonl => {}
            }
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        if self.failed {
            return None;
        }
        let next = self.next_document();
        self.failed = next.is_err();
        if let Ok(Some(document)) = &next {
            self.report.documents += 1;
            self.report.text_bytes += document.text.len() as u64;
        }
        next.transpose()
    }
}

/// The unpacked bytes of a file, which `sums` enters.
fn reader(source: &Source, sums: &mut Option<Sums>) -> Result<Box<dyn Read>> {
    let file = File::open(&source.path).at(&source.path)?;
    let file: Box<dyn Read> = match sums {
        Some(sums) => sums.enter(source, file)?,
        None => Box::new(file),
    };
    Ok(match source.packing {
        Packing::None => file,
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(1 << 16, file))),
        Packing::Zstd => Box::new(zstd::Decoder::new(file).at(&source.path)?),
    })
}

/// An error while reading, in words that fit the packing.
fn read_error(source: &Source, error: &std::io::Error) -> Error {
    let packed = match source.packing {
        Packing::None => return Error::io(&source.path, error),
        Packing::Gzip => "gzip",
        Packing::Zstd => "zstd",
    };
    let wrong = match error.kind() {
        std::io::ErrorKind::UnexpectedEof => format!("the {packed} data is truncated"),
        _ => format!("the {packed} data is damaged: {error}"),
    };
    Error::file(&source.path, wrong).remedy("copy or compress the file again")
}

/// A whole file as one document; none when it is skipped.
fn read_plain(source: &Source, options: &Options, (report, sums): (&mut Report, &mut Option<Sums>)) -> Result<Option<Document>> {
    let walked = source.origin == Origin::Walked;
    let (limit, mut bytes) = (options.max_document_bytes, Vec::new());
    let mut input = reader(source, sums)?;
    input.by_ref().take(SNIFF_BYTES as u64).read_to_end(&mut bytes).map_err(|error| read_error(source, &error))?;
    if walked && bytes.contains(&0) {
        report.binary += 1;
        return Ok(None);
    }
    input.take(limit.saturating_sub(bytes.len()) as u64 + 1).read_to_end(&mut bytes).map_err(|error| read_error(source, &error))?;
    if bytes.len() > limit {
        if walked {
            report.too_long += 1;
            return Ok(None);
        }
        let wrong = format!("more than {limit} bytes, the limit for one document");
        return Err(Error::file(&source.path, wrong).remedy("raise the limit (--max-document-bytes), or split the file into JSONL lines"));
    }
    if bytes.starts_with(lines::BYTE_ORDER_MARK) {
        bytes.drain(..3);
    }
    match String::from_utf8(bytes) {
        Ok(text) if text.is_empty() => {
            report.empty += 1;
            Ok(None)
        }
        Ok(text) => Ok(Some(Document { text, source: source.path.display().to_string() })),
        Err(_) if walked => {
            report.invalid_utf8 += 1;
            Ok(None)
        }
        Err(error) => {
            let wrong = format!("invalid UTF-8 at byte {}", error.utf8_error().valid_up_to());
            Err(Error::file(&source.path, wrong).remedy("convert the file to UTF-8 (iconv), or remove it"))
        }
    }
}

/// Opens a JSONL file at the first line that starts at or after `part.start` of its weight.
fn open_jsonl<'a>(source: &'a Source, part: std::ops::Range<u64>, limit: usize, sums: &mut Option<Sums>) -> Result<OpenJsonl<'a>> {
    let whole = part.start == 0 && part.end == weight(source);
    let (start, end) = match source.packing {
        Packing::None => (part.start, part.end),
        _ if whole => (0, u64::MAX),
        _ => {
            // Ranks share this file: all measure it, so that all cut at the same bytes.
            let unpacked =
                std::io::copy(&mut reader(source, &mut None)?, &mut std::io::sink()).map_err(|error| read_error(source, &error))?;
            let scale = |at: u64| (u128::from(unpacked) * u128::from(at) / u128::from(weight(source))) as u64;
            (scale(part.start), scale(part.end))
        }
    };
    if source.packing == Packing::None && start > 0 {
        let mut file = File::open(&source.path).at(&source.path)?;
        file.seek(SeekFrom::Start(start - 1)).at(&source.path)?;
        let mut lines = Lines::new(Box::new(file) as Box<dyn Read>, start - 1, limit);
        lines.skip().map_err(|error| read_error(source, &error))?;
        return Ok(OpenJsonl { source, lines, end, lines_before: None });
    }
    let mut lines = Lines::new(reader(source, sums)?, 0, limit);
    while lines.offset() < start {
        if !lines.skip().map_err(|error| read_error(source, &error))? {
            break;
        }
    }
    Ok(OpenJsonl { source, lines, end, lines_before: Some(0) })
}

/// The next document of a JSONL file, none at the end of the rank's part.
fn read_line(open: &mut OpenJsonl<'_>, options: &Options, buffer: &mut Vec<u8>, report: &mut Report) -> Result<Option<Document>> {
    loop {
        let start = open.lines.offset();
        if start >= open.end {
            return Ok(None);
        }
        let line = match open.lines.next_line(buffer).map_err(|error| read_error(open.source, &error))? {
            Line::End => return Ok(None),
            Line::TooLong => {
                let wrong = format!("a line of more than {} bytes, the limit", options.max_document_bytes);
                return Err(line_error(open, start, &wrong).remedy("raise the limit (--max-document-bytes), or split the document"));
            }
            Line::Whole => buffer.as_slice(),
        };
        let text = std::str::from_utf8(line).map_err(|error| {
            let at = start + (line.len() as u64).min(error.valid_up_to() as u64);
            line_error(open, start, &format!("invalid UTF-8 at byte {at} of the file")).remedy("convert the file to UTF-8 (iconv)")
        })?;
        let text = if start == 0 { text.strip_prefix('\u{FEFF}').unwrap_or(text) } else { text };
        if text.trim().is_empty() {
            continue;
        }
        match json::text_of(text, &options.text_field) {
            Ok(text) if text.is_empty() => report.empty += 1,
            Ok(text) => return Ok(Some(Document { text, source: format!("{}@{start}", open.source.path.display()) })),
            Err(json::Problem { column, cause }) => {
                let remedy = format!("each line must be a JSON object with a string {:?}", options.text_field);
                return Err(line_error(open, start, &format!("column {column}: {cause}")).remedy(remedy));
            }
        }
    }
}

/// An error at the line that starts at byte `start`; when reading began inside the file, its lines are counted now.
fn line_error(open: &OpenJsonl<'_>, start: u64, wrong: &str) -> Error {
    let number = match open.lines_before {
        Some(before) => Some(before + open.lines.lines_read()),
        None => lines::count_before(&open.source.path, start).ok().map(|before| before + 1),
    };
    let place = number.map_or(format!("the line at byte {start}"), |number| format!("line {number}"));
    Error::file(&open.source.path, format!("{place}: {wrong}"))
}
