//! A pool of temporaries: taken by shape, given back when dropped, so that after the first step nothing is allocated.
//! Contents are whatever the last user left: every operation that assigns must assign all.
//!
//! Who has ever other shapes says when a pass is over: what no pass wanted for a while then goes back to the device.

use super::Device;
use crate::tensor::{DType, Shape, Tensor};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Passes that memory is kept for without being wanted: passes of a few kinds in turn find theirs again.
const IDLE_PASSES: u64 = 16;

/// What lies ready of a shape and type.
struct Shelf {
    of: (Shape, DType),
    ready: Vec<Tensor>,
    /// Taken from it and not given back.
    n_taken: usize,
    /// The pass that took from it last.
    last_pass: u64,
}

impl Shelf {
    /// Whether it may be that of another shape: nothing of it is anywhere.
    fn is_free(&self) -> bool {
        self.ready.is_empty() && self.n_taken == 0
    }
}

/// All of them. They are few, so they are looked through; by their marks, which lie in a cache line or two, where all of the shelves are
/// dozens of lines that other work has driven out. A place in the list is that of one shape for as long as a temporary of it is out.
#[derive(Default)]
struct Shelves {
    marks: Vec<u64>,
    list: Vec<Shelf>,
    /// Passes that are over.
    pass: u64,
}

/// Other shapes and types have other marks, nearly always.
fn mark((shape, dtype): &(Shape, DType)) -> u64 {
    let mixed = |mark: u64, dim: &usize| (mark ^ *dim as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    shape.dims().iter().fold(dtype.bytes() as u64, mixed)
}

impl Shelves {
    /// The place of a shape and type.
    fn place(&mut self, of: (Shape, DType)) -> usize {
        let mark = mark(&of);
        let found = self.marks.iter().enumerate().position(|(i, other)| *other == mark && self.list[i].of == of);
        found.unwrap_or_else(|| self.new_place(mark, Shelf { of, ready: Vec::new(), n_taken: 0, last_pass: self.pass }))
    }

    fn new_place(&mut self, mark: u64, shelf: Shelf) -> usize {
        if let Some(place) = self.list.iter().position(Shelf::is_free) {
            (self.marks[place], self.list[place]) = (mark, shelf);
            return place;
        }
        self.marks.push(mark);
        self.list.push(shelf);
        self.list.len() - 1
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
        let (place, pass) = (shelves.place(key), shelves.pass);
        let shelf = &mut shelves.list[place];
        (shelf.n_taken, shelf.last_pass) = (shelf.n_taken + 1, pass);
        let kept = shelf.ready.pop();
        drop(shelves);
        let tensor = kept.unwrap_or_else(|| device.alloc(key.0.dims(), dtype).unwrap_or_else(|error| panic!("{error}")));
        ScratchTensor { tensor: Some(tensor.with_rows(shape[0])), n_rows, place, shelves: Arc::clone(&self.shelves) }
    }

    /// A pass is over: memory of shapes that none of the last `IDLE_PASSES` took goes back to the device. Without this call all is kept.
    pub fn end_pass(&self) {
        let mut shelves = self.shelves.lock().expect("no panic while holding the shelves");
        shelves.pass += 1;
        let oldest = shelves.pass.saturating_sub(IDLE_PASSES);
        shelves.list.iter_mut().filter(|shelf| shelf.last_pass < oldest).for_each(|shelf| shelf.ready = Vec::new());
    }
}

/// A temporary. Dereferences to [`Tensor`]; goes back to its pool when dropped.
pub struct ScratchTensor {
    tensor: Option<Tensor>,
    /// Rows that its memory was taken for.
    n_rows: usize,
    /// Where its shelf stands.
    place: usize,
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
            let shelf = &mut shelves.list[self.place];
            shelf.n_taken -= 1;
            shelf.ready.push(tensor.with_rows(self.n_rows));
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

    /// Ever other columns, as statistics by head and row have them, take the memory of the last passes and not of all, nor does the list
    /// of them grow; what every pass takes is taken once, and what is out stays what it is until it comes back.
    #[test]
    fn what_no_pass_wants_goes_back() {
        let (cpu, scratch) = (Cpu::new(), Scratch::new());
        let mut held = scratch.take(&cpu, &[3, 5], DType::F32);
        held.f32_mut().fill(7.0);
        let n_passes = 50 * IDLE_PASSES as usize;
        for n in 1..=n_passes {
            drop((scratch.take(&cpu, &[64, 16], DType::F32), scratch.take(&cpu, &[16, n], DType::F32)));
            scratch.end_pass();
        }
        assert_eq!(cpu.memory().n_allocations, 2 + n_passes);
        let last: usize = (0..=IDLE_PASSES as usize).map(|ago| 16 * (n_passes - ago) * 4).sum();
        assert!(cpu.memory().live_bytes <= last + 64 * 16 * 4 + 64, "{} bytes, {last} of the last passes", cpu.memory().live_bytes);
        assert!(scratch.shelves.lock().unwrap().list.len() <= IDLE_PASSES as usize + 4);
        assert!(held.f32().iter().all(|x| *x == 7.0));
        drop(held);
        (0..=IDLE_PASSES).for_each(|_| scratch.end_pass());
        assert_eq!(cpu.memory().live_bytes, 0, "nothing was wanted");
        assert_eq!(scratch.take(&cpu, &[3, 5], DType::F32).f32().len(), 15);
    }
}
