//! Megatron's `.idx` (little-endian): `MMIDIDX\0\0` - u64 version 1 - u8 dtype code - u64 sequences N - u64 documents D+1 -
//! i32[N] lengths in tokens - i64[N] byte offsets - i64[D+1] document indices. Source: Megatron-LM, indexed_dataset.py.

use crate::error::{Error, Result};
use std::path::Path;

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const HEADER_BYTES: usize = 34;

/// Storage of one token in `.bin`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TokenType {
    /// Code 8: vocabularies below 65,536.
    U16,
    /// Code 4.
    I32,
}

impl TokenType {
    /// Bytes of a token.
    pub fn bytes(self) -> usize {
        match self {
            TokenType::U16 => 2,
            TokenType::I32 => 4,
        }
    }
}

/// What an index says, checked against itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Index {
    /// Storage of a token.
    pub token_type: TokenType,
    /// Length of each sequence in tokens.
    pub lengths: Vec<i32>,
    /// Sequence number at which each document begins, and N at the end.
    pub documents: Vec<i64>,
}

impl Index {
    /// Tokens in all sequences.
    pub fn n_tokens(&self) -> u64 {
        self.lengths.iter().map(|&length| length as u64).sum()
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let width = self.token_type.bytes() as i64;
        let code: u8 = match self.token_type {
            TokenType::U16 => 8,
            TokenType::I32 => 4,
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 12 * self.lengths.len() + 8 * self.documents.len());
        bytes.extend(MAGIC);
        bytes.extend(1u64.to_le_bytes());
        bytes.push(code);
        bytes.extend((self.lengths.len() as u64).to_le_bytes());
        bytes.extend((self.documents.len() as u64).to_le_bytes());
        self.lengths.iter().for_each(|length| bytes.extend(length.to_le_bytes()));
        let mut offset = 0i64;
        for &length in &self.lengths {
            bytes.extend(offset.to_le_bytes());
            offset += i64::from(length) * width;
        }
        self.documents.iter().for_each(|document| bytes.extend(document.to_le_bytes()));
        bytes
    }

    /// Reads an index; `path` is for messages. Refuses what is not one, is cut off, or contradicts itself.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Index> {
        let wrong = |what: String| Error::file(path, what).remedy("tokenize again, or take the file from its source again");
        if bytes.len() < HEADER_BYTES || &bytes[..9] != MAGIC {
            return Err(wrong("is not a Megatron index (it does not begin with MMIDIDX)".into()));
        }
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if u64_at(9) != 1 {
            return Err(wrong(format!("index version {}, this program reads 1", u64_at(9))));
        }
        let token_type = match bytes[17] {
            4 => TokenType::I32,
            8 => TokenType::U16,
            code => return Err(wrong(format!("token type code {code}, this program reads 4 (int32) and 8 (uint16)"))),
        };
        let (n_sequences, n_documents) = (u64_at(18), u64_at(26));
        let expected = n_sequences.checked_mul(12).zip(n_documents.checked_mul(8)).and_then(|(a, b)| a.checked_add(b));
        let expected = expected.and_then(|n| n.checked_add(HEADER_BYTES as u64));
        // Multi-modal corpora append one byte a sequence.
        if expected != Some(bytes.len() as u64) && expected.map(|n| n + n_sequences) != Some(bytes.len() as u64) {
            let asked = expected.map_or("more than can be".into(), |n| n.to_string());
            return Err(wrong(format!("{} bytes, but {n_sequences} sequences and {n_documents} documents need {asked}", bytes.len())));
        }
        let n = n_sequences as usize;
        let lengths: Vec<i32> =
            bytes[HEADER_BYTES..][..4 * n].chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("4"))).collect();
        let i64s = |start: usize, n: usize| -> Vec<i64> {
            bytes[start..][..8 * n].chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8"))).collect()
        };
        let offsets = i64s(HEADER_BYTES + 4 * n, n);
        let documents = i64s(HEADER_BYTES + 12 * n, n_documents as usize);
        let mut offset = 0i64;
        for (sequence, (&length, &found)) in lengths.iter().zip(&offsets).enumerate() {
            if length < 0 || found != offset {
                return Err(wrong(format!("sequence {sequence}: length {length} at byte {found}, expected byte {offset}")));
            }
            offset += i64::from(length) * token_type.bytes() as i64;
        }
        let ascending = documents.windows(2).all(|pair| pair[0] <= pair[1]);
        if documents.first() != Some(&0) || documents.last() != Some(&(n as i64)) || !ascending {
            return Err(wrong(format!("document indices do not run from 0 to {n}")));
        }
        Ok(Index { token_type, lengths, documents })
    }
}
