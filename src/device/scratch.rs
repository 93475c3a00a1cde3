//! A pool of temporaries: taken by shape, given back when dropped, so that after the first step nothing is allocated.
//! Contents are whatever the last user left: every operation that assigns must assign all.

use super::Device;
use crate::tensor::{DType, Shape, Tensor};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

type Shelf = Mutex<HashMap<(Shape, DType), Vec<Tensor>, BuildHasherDefault<Mixed>>>;

/// A hash of a few small numbers of our own, hundreds of times a decode step.
#[derive(Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0.rotate_left(32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    fn write_u64(&mut self, x: u64) {
        // An odd factor with bits everywhere, 2^64 over the golden ratio: what was mixed is in the high bits, so they are turned down.
        self.0 = (self.0.rotate_left(32) ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, x: usize) {
        self.write_u64(x as u64);
    }
    fn write_isize(&mut self, x: isize) {
        self.write_u64(x as u64);
    }
}

/// The pool. Cheap to clone; clones share the memory.
#[derive(Clone, Default)]
pub struct Scratch {
    shelf: Arc<Shelf>,
    rows: Rows,
}

/// For how many rows memory is taken.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Rows {
    /// Those that were asked for.
    #[default]
    Exact,
    /// The next power of two.
    Rounded,
}

impl Scratch {
    /// An empty pool.
    pub fn new() -> Self {
        Scratch::default()
    }

    /// An empty pool for temporaries of ever other numbers of rows: up to twice the memory, but in few sizes.
    pub fn of_any_rows() -> Self {
        Scratch { rows: Rows::Rounded, ..Scratch::default() }
    }

    /// A tensor of this shape with unspecified contents. Panics when the device has no memory left: at this depth nobody
    /// can repair it.
    pub fn take(&self, device: &dyn Device, shape: &[usize], dtype: DType) -> ScratchTensor {
        let n_rows = if self.rows == Rows::Rounded { shape[0].next_power_of_two() } else { shape[0] };
        let key = (Shape::new(shape).with_rows(n_rows), dtype);
        let kept = self.shelf.lock().expect("no panic while holding the shelf").get_mut(&key).and_then(Vec::pop);
        let tensor = kept.unwrap_or_else(|| device.alloc(key.0.dims(), dtype).unwrap_or_else(|error| panic!("{error}")));
        ScratchTensor { tensor: Some(tensor.with_rows(shape[0])), n_rows, shelf: Arc::clone(&self.shelf) }
    }
}

/// A temporary. Dereferences to [`Tensor`]; goes back to its pool when dropped.
pub struct ScratchTensor {
    tensor: Option<Tensor>,
    /// Rows that its memory was taken for.
    n_rows: usize,
    shelf: Arc<Shelf>,
}

impl Deref for ScratchTensor {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        self.tensor.as_ref().expect("present until dropped")
    }
}

impl DerefMut for ScratchTensor {
    fn deref_mut(&mut self) -> &mut Tensor {
        self.tensor.as_mut().expect("present until dropped")
    }
}

impl Drop for ScratchTensor {
    fn drop(&mut self) {
        if let (Some(tensor), Ok(mut shelf)) = (self.tensor.take(), self.shelf.lock()) {
            let tensor = tensor.with_rows(self.n_rows);
            shelf.entry((tensor.shape(), tensor.dtype())).or_default().push(tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    /// Temporaries of many numbers of rows are made of the memory of a few, never two of one at a time, and none reaches past what it
    /// was taken for.
    #[test]
    fn rows_of_any_number_share_memory() {
        let (cpu, scratch) = (Cpu::new(), Scratch::of_any_rows());
        let taken = |n| scratch.take(&cpu, &[n, 7], DType::F32);
        for n in (1..=64).rev().chain(1..=64) {
            let (mut first, mut second) = (taken(n), taken(n));
            assert_eq!((first.dims(), first.f32().len()), (&[n, 7][..], 7 * n));
            first.f32_mut().fill(n as f32);
            second.f32_mut().fill(-1.0);
            assert!(first.f32().iter().all(|x| *x == n as f32));
        }
        assert_eq!(cpu.memory().n_allocations, 2 * 7, "1, 2, 4, .. 64 rows, twice each");
        let exact = Scratch::new();
        (1..=8).for_each(|n| drop(exact.take(&cpu, &[n, 7], DType::F32)));
        assert_eq!(cpu.memory().n_allocations, 2 * 7 + 8);
    }
}
