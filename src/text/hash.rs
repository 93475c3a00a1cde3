//! A fast hash for small keys inside the tokenizer: 128-bit multiply and fold (the idea of wyhash and foldhash). Not for
//! anything that is stored: the tables it serves live in memory only.

use std::hash::{BuildHasher, Hasher};

const K0: u64 = 0x9E37_79B9_7F4A_7C15;
const K1: u64 = 0xD6E8_FEB8_6659_FD93;

/// Mixes 64 bits; all bits of the result depend on all bits of `x`.
#[inline]
pub fn mix(x: u64) -> u64 {
    let wide = u128::from(x ^ K1) * u128::from(K0);
    (wide as u64) ^ (wide >> 64) as u64
}

/// Builds [`FoldHasher`]s.
#[derive(Clone, Copy, Default)]
pub struct FoldBuild;

impl BuildHasher for FoldBuild {
    type Hasher = FoldHasher;
    fn build_hasher(&self) -> FoldHasher {
        FoldHasher(0)
    }
}

/// The hasher.
pub struct FoldHasher(u64);

impl Hasher for FoldHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.write_u64(u64::from_le_bytes(chunk.try_into().expect("eight bytes")));
        }
        let mut tail = [0u8; 8];
        tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
        self.write_u64(u64::from_le_bytes(tail) ^ (bytes.len() as u64) << 56);
    }
    fn write_u8(&mut self, value: u8) {
        self.0 ^= u64::from(value) << 32; // the 0xFF that ends a str: nothing to keep apart here
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0.rotate_left(23) ^ value);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}
