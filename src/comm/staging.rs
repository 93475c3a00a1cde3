//! Buffers kept between exchanges: a fresh large allocation costs a page fault every 4 KiB.

use std::sync::Mutex;

/// A shelf of byte buffers.
#[derive(Default)]
pub struct Staging {
    shelf: Mutex<Vec<Vec<u8>>>,
}

impl Staging {
    /// A buffer of exactly this length with unspecified contents.
    pub fn take(&self, n_bytes: usize) -> Vec<u8> {
        let mut shelf = self.shelf.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let fits = shelf.iter().position(|buffer| buffer.capacity() >= n_bytes);
        let mut buffer = fits.or_else(|| shelf.len().checked_sub(1)).map_or_else(Vec::new, |idx| shelf.swap_remove(idx));
        buffer.resize(n_bytes, 0);
        buffer
    }

    /// Keeps a buffer for the next exchange.
    pub fn give_back(&self, buffer: Vec<u8>) {
        self.shelf.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(buffer);
    }
}
