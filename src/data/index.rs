//! The `.idx` file of Megatron's MMapIndexedDataset (megatron/core/datasets/indexed_dataset.py), little-endian:
//!
//! ```text
//! byte 0         "MMIDIDX\0\0"
//!      9         u64 version = 1
//!      17        u8 token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
//!      18        u64 N, sequences
//!      26        u64 D + 1, documents and one
//!      34        i32[N] lengths in tokens
//!      34 +  4N  i64[N] where each sequence starts in the .bin, in bytes
//!      34 + 12N  i64[D+1] number of sequences before each document, and N
//!      ..        i8[N] modes, optional
//! ```
//!
//! It knows nothing of what the tokens mean.

use crate::error::{Error, IoContext, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// First bytes of an index.
pub const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
/// Version of the format.
pub const VERSION: u64 = 1;
/// Bytes before the arrays.
pub const HEADER_BYTES: usize = 34;

/// What to do about a file that is not what it should be.
const REMEDY: &str = "the file was damaged or is something else: tokenize again, or copy it again";

/// How a token is stored in the `.bin`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TokenType {
    /// Code 1.
    U8,
    /// Code 2.
    I8,
    /// Code 3.
    I16,
    /// Code 4; what this program writes.
    I32,
    /// Code 5.
    I64,
    /// Code 8; what Megatron writes for vocabularies below 65500.
    U16,
}

impl TokenType {
    /// Bytes a token.
    pub fn size(self) -> usize {
        match self {
            TokenType::U8 | TokenType::I8 => 1,
            TokenType::I16 | TokenType::U16 => 2,
            TokenType::I32 => 4,
            TokenType::I64 => 8,
        }
    }

    fn from_code(code: u8, path: &Path) -> Result<TokenType> {
        Ok(match code {
            1 => TokenType::U8,
            2 => TokenType::I8,
            3 => TokenType::I16,
            4 => TokenType::I32,
            5 => TokenType::I64,
            8 => TokenType::U16,
            6 | 7 => {
                let wrong = format!("token type {code} is a float, tokens are integers (1, 2, 3, 4, 5 or 8)");
                return Err(Error::file(path, wrong).remedy("name a corpus of tokens"));
            }
            _ => return Err(Error::file(path, format!("token type {code}, known are 1, 2, 3, 4, 5 and 8")).remedy(REMEDY)),
        })
    }
}

/// A file mapped read-only, together with what is needed to notice that it changed its size.
pub(super) struct Mapped {
    path: PathBuf,
    file: File,
    /// None for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl Mapped {
    pub fn open(path: &Path) -> Result<Mapped> {
        let file = File::open(path).at(path)?;
        let metadata = file.metadata().at(path)?;
        if !metadata.is_file() {
            return Err(Error::file(path, "is not a file").remedy("check the path"));
        }
        // SAFETY: the map is read-only and its bytes are only ever read as plain integers. Another process that changes the
        // file changes the values, which are range-checked after reading; one that truncates it is noticed by `check_size`
        // before each read, which leaves only the moment between the two.
        let map = if metadata.len() == 0 { None } else { Some(unsafe { Mmap::map(&file) }.at(path)?) };
        Ok(Mapped { path: path.into(), file, map })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// An error when the file no longer has the size it was mapped with: touching pages past its end would kill the process.
    pub fn check_size(&self) -> Result<()> {
        let (found, mapped) = (self.file.metadata().at(&self.path)?.len(), self.bytes().len() as u64);
        if found != mapped {
            let wrong = format!("{found} bytes now, {mapped} when it was opened");
            return Err(Error::file(&self.path, wrong).remedy("another process changed it: stop that, then start again"));
        }
        Ok(())
    }
}

/// An opened index. Its arrays stay in the mapped file.
pub struct Index {
    pub(super) file: Mapped,
    token_type: TokenType,
    n_sequences: usize,
    /// D + 1.
    n_document_indices: usize,
}

impl Index {
    /// Opens an index: header and sizes are checked, the arrays are not (see [`Index::verify`]).
    pub fn open(path: &Path) -> Result<Index> {
        let file = Mapped::open(path)?;
        let bytes = file.bytes();
        if bytes.len() < HEADER_BYTES || &bytes[..9] != MAGIC {
            let found = String::from_utf8_lossy(&bytes[..bytes.len().min(9)]).escape_default().to_string();
            let wrong = format!("not a Megatron index: {} bytes that begin with {found:?}, expected \"MMIDIDX\\0\\0\"", bytes.len());
            return Err(Error::file(path, wrong).remedy(REMEDY));
        }
        let version = u64_at(bytes, 9);
        if version != VERSION {
            return Err(Error::file(path, format!("index version {version}, this program reads {VERSION}")).remedy(REMEDY));
        }
        let token_type = TokenType::from_code(bytes[17], path)?;
        let (n_sequences, n_document_indices) = (u64_at(bytes, 18), u64_at(bytes, 26));
        let expected = HEADER_BYTES as u128 + 12 * u128::from(n_sequences) + 8 * u128::from(n_document_indices);
        let found = bytes.len() as u128;
        if found != expected && found != expected + u128::from(n_sequences) {
            let wrong = format!("{found} bytes, {n_sequences} sequences and {n_document_indices} document indices take {expected}");
            return Err(Error::file(path, wrong).remedy(REMEDY));
        }
        let index = Index { token_type, n_sequences: n_sequences as usize, n_document_indices: n_document_indices as usize, file };
        index.check_end()?;
        Ok(index)
    }

    /// How tokens are stored.
    pub fn token_type(&self) -> TokenType {
        self.token_type
    }

    /// Number of sequences.
    pub fn n_sequences(&self) -> usize {
        self.n_sequences
    }

    /// Number of documents.
    pub fn n_documents(&self) -> usize {
        self.n_document_indices - 1
    }

    /// Number of tokens of all sequences.
    pub fn n_tokens(&self) -> u64 {
        self.first_token(self.n_sequences)
    }

    /// Number of tokens of a sequence.
    pub fn length(&self, sequence: usize) -> i32 {
        let at = HEADER_BYTES + 4 * sequence;
        i32::from_le_bytes(self.file.bytes()[at..at + 4].try_into().expect("4 bytes"))
    }

    /// Position of the first token of a sequence among all tokens; for `sequence` = N, the number of tokens.
    pub fn first_token(&self, sequence: usize) -> u64 {
        match sequence.checked_sub(1) {
            _ if sequence < self.n_sequences => self.offset(sequence) as u64 / self.token_type.size() as u64,
            Some(last) => self.offset(last) as u64 / self.token_type.size() as u64 + self.length(last) as u64,
            None => 0,
        }
    }

    /// The tokens of a document.
    ///
    /// # Panics
    /// When `document` is not below [`Index::n_documents`].
    pub fn document_tokens(&self, document: usize) -> Range<u64> {
        assert!(document < self.n_documents(), "document {document} of {}", self.n_documents());
        self.document_start(document)..self.document_start(document + 1)
    }

    /// The document that token `position` lies in. O(log D). None past the last, and where the file has no documents.
    pub fn document_at(&self, position: u64) -> Option<usize> {
        let (mut low, mut high) = (0, self.n_documents());
        while low < high {
            let middle = low.midpoint(high);
            if self.document_tokens(middle).end <= position { low = middle + 1 } else { high = middle }
        }
        (low < self.n_documents()).then_some(low)
    }

    /// The first token of a document; an index that was never verified cannot lead out of the file.
    fn document_start(&self, document: usize) -> u64 {
        self.first_token(self.document_index(document).clamp(0, self.n_sequences as i64) as usize)
    }

    /// Positions in `tokens`, but for its first, where a document begins; ascending, appended to `starts`. O(log D) and what is
    /// found. Empty documents begin where the next one does.
    pub fn document_starts(&self, tokens: Range<u64>, starts: &mut Vec<u64>) {
        let start_of = |document: usize| self.document_start(document);
        let (mut low, mut high) = (0, self.n_documents());
        while low < high {
            let middle = (low + high) / 2;
            if start_of(middle) > tokens.start {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let mut last = tokens.start;
        for start in (low..self.n_documents()).map(start_of).take_while(|&start| start < tokens.end) {
            if start > last {
                starts.push(start);
                last = start;
            }
        }
    }

    /// Reads the whole index: lengths are positive, sequences follow each other without gaps, document indices ascend from 0
    /// to N. Errors name the first entry that is wrong and both values.
    pub fn verify(&self) -> Result<()> {
        self.file.check_size()?;
        let wrong = |wrong: String| Err(Error::file(self.file.path(), wrong).remedy(REMEDY));
        let mut offset = 0i64;
        for sequence in 0..self.n_sequences {
            let length = self.length(sequence);
            if length < 0 {
                return wrong(format!("sequence {sequence} has a length of {length}"));
            }
            if self.offset(sequence) != offset {
                return wrong(format!("sequence {sequence} starts at byte {}, the lengths before it take {offset}", self.offset(sequence)));
            }
            offset += i64::from(length) * self.token_type.size() as i64;
        }
        let mut last = 0;
        for document in 0..self.n_document_indices {
            let index = self.document_index(document);
            if index < last || index > self.n_sequences as i64 || (document == 0 && index != 0) {
                let bound = if document == 0 { 0 } else { self.n_sequences as i64 };
                return wrong(format!("document {document} starts at sequence {index}, expected {last}..={bound}"));
            }
            last = index;
        }
        Ok(())
    }

    /// The last entries bound everything that is read through the others.
    fn check_end(&self) -> Result<()> {
        let path = self.file.path();
        if self.n_document_indices == 0 {
            return Err(Error::file(path, "0 document indices, expected at least 1").remedy(REMEDY));
        }
        let last_index = self.document_index(self.n_document_indices - 1);
        // A file that was never told of document ends (D = 0) is one long document.
        if last_index != self.n_sequences as i64 && self.n_document_indices > 1 {
            return Err(Error::file(path, format!("the last document index is {last_index}, there are {} sequences", self.n_sequences))
                .remedy(REMEDY));
        }
        if let Some(last) = self.n_sequences.checked_sub(1)
            && (self.offset(last) < 0 || self.length(last) < 0)
        {
            let wrong = format!("the last sequence is {} tokens at byte {}", self.length(last), self.offset(last));
            return Err(Error::file(path, wrong).remedy(REMEDY));
        }
        Ok(())
    }

    fn offset(&self, sequence: usize) -> i64 {
        i64_at(self.file.bytes(), HEADER_BYTES + 4 * self.n_sequences + 8 * sequence)
    }

    fn document_index(&self, document: usize) -> i64 {
        i64_at(self.file.bytes(), HEADER_BYTES + 12 * self.n_sequences + 8 * document)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn i64_at(bytes: &[u8], at: usize) -> i64 {
    u64_at(bytes, at) as i64
}
