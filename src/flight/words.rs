//! The words of a ring's header, shared by its writer and its reader.

/// Positions of words; see the table in `ring`.
pub(super) mod word {
    pub const THIS_MAGIC: &[u8; 8] = b"TRFLIGHT";
    pub const THIS_VERSION: u64 = 2;
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 1;
    /// Records, rank, ranks, tp, pp, dp, vp.
    pub const RECORDS: usize = 2;
    pub const PROCESS: usize = 9;
    pub const OPENED: usize = 10;
    pub const HEARTBEAT: usize = 11;
    pub const STOP: usize = 12;
    pub const HANG: usize = 13;
    pub const CLOSED: usize = 14;
    pub const BEGUN: usize = 15;
    pub const ENTERED: usize = 16;
    /// Of the words that never change.
    pub const CHECKSUM: usize = 24;
    pub const HOST: usize = 32;
    pub const JOB: usize = 40;
}

/// Of a header: the words that are set once, when the ring is made.
pub(super) fn header_checksum(word_at: impl Fn(usize) -> u64) -> u64 {
    let fixed = (word::VERSION..=word::OPENED).chain(word::HOST..word::JOB + TEXT_WORDS);
    let bytes: Vec<u8> = fixed.flat_map(|at| word_at(at).to_le_bytes()).collect();
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// Words of a text.
pub(super) const TEXT_WORDS: usize = 8;

/// A text of at most 64 bytes; what is longer is cut.
pub(super) fn pack_text(text: &str) -> [u64; TEXT_WORDS] {
    let mut bytes = [0u8; 8 * TEXT_WORDS];
    let n = text.len().min(bytes.len());
    bytes[..n].copy_from_slice(&text.as_bytes()[..n]);
    std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().expect("8 bytes")))
}

/// Back.
pub(super) fn unpack_text(words: &[u64]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
