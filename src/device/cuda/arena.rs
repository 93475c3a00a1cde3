//! Device memory that was asked of the driver once and is lent again and again, so that a step after the first asks for none: every
//! size that a step takes it has given back by its end. Bookkeeping only: knows nothing of the driver or of streams. Whoever lends a
//! piece again sees to it that its last use comes before the next (on one stream, by the order of asking).

use std::collections::{BTreeMap, HashMap};

/// Sizes are multiples of this, which is also the alignment of what the driver gives.
const GRAIN_BYTES: usize = 512;

/// Below this size a piece is a power of two, so that tables whose sizes change from call to call find one.
const SMALL_BYTES: usize = 1 << 20;

/// Pieces of memory, lent and free.
#[derive(Default)]
pub struct Arena {
    /// By size: addresses of free pieces.
    free: BTreeMap<usize, Vec<u64>>,
    /// By address: sizes of lent pieces.
    lent: HashMap<u64, usize>,
}

impl Arena {
    /// A piece of at least `bytes`: a free one that is larger by no more than an eighth, else a new one from `ask` (given the size, a
    /// multiple of 512). `None` when `ask` has none.
    pub fn take(&mut self, bytes: usize, ask: impl FnOnce(usize) -> Option<u64>) -> Option<u64> {
        let wanted = if bytes < SMALL_BYTES { bytes.next_power_of_two().max(GRAIN_BYTES) } else { bytes.next_multiple_of(GRAIN_BYTES) };
        let fitting = self.free.range(wanted..=wanted + wanted / 8).next().map(|(size, _)| *size);
        let (address, size) = match fitting {
            Some(size) => (self.take_free(size), size),
            None => (ask(wanted)?, wanted),
        };
        let before = self.lent.insert(address, size);
        assert!(before.is_none(), "memory at {address:#x} is lent already");
        Some(address)
    }

    fn take_free(&mut self, size: usize) -> u64 {
        let pieces = self.free.get_mut(&size).expect("just found");
        let address = pieces.pop().expect("no empty list is kept");
        if pieces.is_empty() {
            self.free.remove(&size);
        }
        address
    }

    /// Takes a lent piece back.
    pub fn give(&mut self, address: u64) {
        let size = self.lent.remove(&address).unwrap_or_else(|| panic!("memory at {address:#x} was not lent"));
        self.free.entry(size).or_default().push(address);
    }

    /// All free pieces, which the arena forgets: to be given back to the driver.
    pub fn drain(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.free).into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of the same sizes ask for memory in the first one only, lent pieces never overlap, and a piece goes to no much smaller
    /// wish: else a step would allocate, two tensors would share bytes, or a large piece would be lost to small tensors.
    #[test]
    fn steps_of_the_same_sizes_ask_once() {
        let (mut arena, mut next, mut n_asked) = (Arena::default(), 1u64 << 20, 0);
        for step in 0..5 {
            let mut lent: Vec<(u64, usize)> = Vec::new();
            for (i, bytes) in [1usize, 700, 700, 5000, 65_536, 60_000, 5000, 0].into_iter().enumerate() {
                let address = arena.take(bytes, |size| {
                    assert!(step == 0 && size % 512 == 0 && size >= bytes, "step {step} asks for {size}");
                    n_asked += 1;
                    next += size as u64;
                    Some(next - size as u64)
                });
                let address = address.unwrap();
                assert!(lent.iter().all(|(at, size)| address + bytes as u64 <= *at || at + *size as u64 <= address), "{lent:?}");
                lent.push((address, bytes));
                // Some are given back in between.
                if i == 3 {
                    arena.give(lent.remove(1).0);
                }
            }
            lent.iter().for_each(|(address, _)| arena.give(*address));
        }
        assert!(n_asked <= 8);
        assert_eq!(arena.take(1 << 30, |_| None), None);
        let mut drained = arena.drain();
        drained.sort_unstable();
        drained.dedup();
        assert_eq!(drained.len(), n_asked);
        assert!(arena.drain().is_empty());
    }
}
