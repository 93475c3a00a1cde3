//! A pool of temporaries: taken by shape, given back when dropped, so that after the first step nothing is allocated.
//! Contents are whatever the last user left: every operation that assigns must assign all.

use super::Device;
use crate::tensor::{DType, Shape, Tensor};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// What lies ready of each shape and type. They are few, so they are looked through; by their marks, which lie in a cache line or two, where
/// all of the shapes were a dozen lines that other work has driven out.
#[derive(Default)]
struct Shelves {
    marks: Vec<u64>,
    of: Vec<(Shape, DType)>,
    kept: Vec<Vec<Tensor>>,
}

/// Other shapes and types have other marks, nearly always.
fn mark((shape, dtype): &(Shape, DType)) -> u64 {
    let mixed = |mark: u64, dim: &usize| (mark ^ *dim as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    shape.dims().iter().fold(dtype.bytes() as u64, mixed)
}

impl Shelves {
    /// The place of a shape and type.
    fn place(&mut self, key: (Shape, DType)) -> usize {
        let mark = mark(&key);
        let found = self.marks.iter().enumerate().position(|(i, other)| *other == mark && self.of[i] == key);
        found.unwrap_or_else(|| {
            self.marks.push(mark);
            self.of.push(key);
            self.kept.push(Vec::new());
            self.of.len() - 1
        })
    }
}

/// The pool. Cheap to clone; clones share the memory.
#[derive(Clone, Default)]
pub struct Scratch {
    shelves: Arc<Mutex<Shelves>>,
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
        let mut shelves = self.shelves.lock().expect("no panic while holding the shelves");
        let shelf = shelves.place(key);
        let kept = shelves.kept[shelf].pop();
        drop(shelves);
        let tensor = kept.unwrap_or_else(|| device.alloc(key.0.dims(), dtype).unwrap_or_else(|error| panic!("{error}")));
        ScratchTensor { tensor: Some(tensor.with_rows(shape[0])), n_rows, shelf, shelves: Arc::clone(&self.shelves) }
    }
}

/// A temporary. Dereferences to [`Tensor`]; goes back to its pool when dropped.
pub struct ScratchTensor {
    tensor: Option<Tensor>,
    /// Rows that its memory was taken for.
    n_rows: usize,
    /// Which of them is its own.
    shelf: usize,
    shelves: Arc<Mutex<Shelves>>,
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
        if let (Some(tensor), Ok(mut shelves)) = (self.tensor.take(), self.shelves.lock()) {
            shelves.kept[self.shelf].push(tensor.with_rows(self.n_rows));
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
