//! Host memory of tensors: zeroed, 64-byte aligned or better, and in huge pages where the kernel has them, so that reading it in order
//! does not wait for the processor's address cache.
//!
//! What is large has huge pages of its own. What is of middle size, as the weights of a small model, shares areas of several huge pages:
//! the first span that is long enough, of the area that was taken first, so what is given back is used again. What is small comes from
//! the allocator as it is.

use std::alloc::Layout;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A page of the kind that one entry of the processor's address cache reaches as far with as with 512 ordinary ones.
const HUGE_PAGE: usize = 2 << 20;
/// From so many bytes on, memory is large.
const LARGE: usize = 2 * HUGE_PAGE;
/// From so many bytes on, it is of middle size.
const MIDDLE: usize = 64 * 1024;
/// Bytes of an area.
const AREA: usize = 8 * HUGE_PAGE;
/// What spans of an area begin at multiples of: an ordinary page, so that no two tensors share one.
const STEP: usize = 4096;

/// The areas of one device; none before something of middle size is asked for.
#[derive(Default)]
pub struct Areas {
    list: Mutex<Vec<Area>>,
}

/// Huge pages side by side.
struct Area {
    pages: Pages,
    spans: Spans,
}

/// What is free of so many bytes: spans in order, between each two of them something that is taken.
struct Spans {
    free: Vec<Range<usize>>,
}

impl Spans {
    fn new(n_bytes: usize) -> Spans {
        Spans { free: std::iter::once(0..n_bytes).collect() }
    }

    /// The beginning of the first span of so many bytes, if there is one: it is free no longer.
    fn take(&mut self, n_bytes: usize) -> Option<usize> {
        let place = self.free.iter().position(|span| span.len() >= n_bytes)?;
        let span = &mut self.free[place];
        let start = span.start;
        span.start += n_bytes;
        if span.start == span.end {
            self.free.remove(place);
        }
        Some(start)
    }

    /// What was taken is free again.
    fn give_back(&mut self, span: Range<usize>) {
        let place = self.free.partition_point(|free| free.start < span.start);
        self.free.insert(place, span);
        for first in [place, place.wrapping_sub(1)] {
            if self.free.get(first).zip(self.free.get(first.wrapping_add(1))).is_some_and(|(a, b)| a.end == b.start) {
                self.free[first].end = self.free.remove(first + 1).end;
            }
        }
    }

    fn are_all(&self, n_bytes: usize) -> bool {
        self.free.first() == Some(&(0..n_bytes))
    }
}

/// Whole pages of the kernel's, which has them back when dropped: the allocator would keep what is freed, and an area that comes after may
/// not fit there.
struct Pages {
    start: *mut u8,
    size: usize,
}

// SAFETY: it is plain memory; who may touch it is governed by those who own it.
unsafe impl Send for Pages {}
impl Pages {
    /// So many zeros or more, in huge pages as far as they fill some.
    fn huge(size: usize) -> Option<Pages> {
        let size = size.checked_next_multiple_of(STEP)?;
        let (kind, access) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping, of addresses that the kernel chooses.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), size.checked_add(HUGE_PAGE)?, access, kind, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return None;
        }
        let mapped = mapped.cast::<u8>();
        let before = mapped.align_offset(HUGE_PAGE);
        let start = mapped.wrapping_add(before);
        for (at, n) in [(mapped, before), (start.wrapping_add(size), HUGE_PAGE - before)] {
            if n > 0 {
                // SAFETY: ends of the new mapping that nobody has seen; a huge page of them is too much.
                unsafe { libc::munmap(at.cast(), n) };
            }
        }
        // SAFETY: the whole pages among these bytes are ours; a kernel that has no huge pages says so, and nothing is lost. The kind of a
        // page is settled when it is first written, which is later.
        unsafe { libc::madvise(start.cast(), size - size % HUGE_PAGE, libc::MADV_HUGEPAGE) };
        Some(Pages { start, size })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: `start` is the beginning of a mapping of this size, which ends here.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

/// Memory of the allocator, given back when dropped.
struct Block {
    start: *mut u8,
    layout: Layout,
}

impl Block {
    /// So many zeros.
    fn zeroed(size: usize) -> Option<Block> {
        let layout = Layout::from_size_align(size, 64).ok()?;
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        (!start.is_null()).then_some(Block { start, layout })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `start` came from the allocator with this very layout and is freed once.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

/// Zeroed bytes.
pub struct Memory {
    start: *mut u8,
    size: usize,
    of: Owner,
}

/// Whose they are.
enum Owner {
    /// Its own pages.
    Pages { _pages: Pages },
    /// Its own block.
    Block { _block: Block },
    /// A span of an area.
    Areas(Arc<Areas>),
}

// SAFETY: it is plain memory; aliasing is governed by the borrows of the tensors above it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// So many zeros, more than none; None when the allocator refuses.
    pub fn zeroed(size: usize, areas: Option<&Arc<Areas>>) -> Option<Memory> {
        let memory = match areas {
            _ if size >= LARGE => {
                let pages = Pages::huge(size)?;
                Memory { start: pages.start, size, of: Owner::Pages { _pages: pages } }
            }
            Some(areas) if size >= MIDDLE => Memory { start: areas.take(size)?, size, of: Owner::Areas(Arc::clone(areas)) },
            _ => {
                let block = Block::zeroed(size)?;
                return Some(Memory { start: block.start, size, of: Owner::Block { _block: block } });
            }
        };
        // SAFETY: so many bytes are ours alone.
        unsafe { memory.start.write_bytes(0, size) };
        Some(memory)
    }

    /// Address of the first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Owner::Areas(areas) = &self.of {
            areas.give_back(self.start, self.size);
        }
    }
}

impl Areas {
    /// Address of so many bytes; None when the allocator refuses.
    fn take(&self, size: usize) -> Option<*mut u8> {
        let size = size.next_multiple_of(STEP);
        let mut list = self.list.lock().expect("no panic under the lock");
        let found = list.iter_mut().find_map(|area| area.take(size));
        found.or_else(|| {
            list.push(Area { pages: Pages::huge(AREA)?, spans: Spans::new(AREA) });
            list.last_mut().expect("just added").take(size)
        })
    }

    /// What `take` gave, with the same size.
    fn give_back(&self, start: *mut u8, size: usize) {
        let Ok(mut list) = self.list.lock() else { return };
        let is_in = |area: &Area| (start as usize).checked_sub(area.pages.start as usize).is_some_and(|at| at < AREA);
        let place = list.iter().position(is_in).expect("memory of one of the areas");
        let at = start as usize - list[place].pages.start as usize;
        list[place].spans.give_back(at..at + size.next_multiple_of(STEP));
        if list[place].spans.are_all(AREA) {
            list.remove(place);
        }
    }
}

impl Area {
    fn take(&mut self, size: usize) -> Option<*mut u8> {
        // SAFETY: a free span lies in the area.
        self.spans.take(size).map(|at| unsafe { self.pages.start.add(at) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Random;

    /// Whatever is taken and given back in whatever order: what is held is zeros at first, overlaps nothing else and keeps what is written
    /// to it; and when all is given back there is no area left.
    #[test]
    fn what_is_held_is_nobody_elses() {
        let (areas, noise) = (Arc::new(Areas::default()), Random::new(1, "memory"));
        let mut held: Vec<(Memory, u8)> = Vec::new();
        let mut most = 0;
        for i in 0..4000u64 {
            let drop_one = noise.uniform(3 * i) < 0.5;
            if drop_one && !held.is_empty() {
                let (memory, mark) = held.swap_remove((noise.uniform(3 * i + 1) * held.len() as f64) as usize);
                // SAFETY: it is held here alone.
                let bytes = unsafe { std::slice::from_raw_parts(memory.start(), memory.size()) };
                assert!(bytes.iter().step_by(509).chain(bytes.last()).all(|byte| *byte == mark), "{} bytes", memory.size());
            } else if held.len() < 40 {
                let size = 1 + (noise.uniform(3 * i + 2) * (LARGE - 2) as f64) as usize;
                let (memory, mark) = (Memory::zeroed(size, Some(&areas)).unwrap(), 1 + (i % 255) as u8);
                assert_eq!((memory.start() as usize % 64, memory.size()), (0, size));
                // SAFETY: it is held here alone.
                let bytes = unsafe { std::slice::from_raw_parts_mut(memory.start(), size) };
                assert!(bytes.iter().all(|byte| *byte == 0), "{size} bytes");
                bytes.fill(mark);
                held.push((memory, mark));
            }
            most = most.max(areas.list.lock().unwrap().len());
        }
        assert!(most >= 2, "{most} areas");
        held.clear();
        assert!(areas.list.lock().unwrap().is_empty());
    }

    /// Free spans that touch become one, on either side and on both.
    #[test]
    fn neighbours_are_joined() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut spans = Spans::new(30);
            let taken: Vec<usize> = (0..3).map(|_| spans.take(10).unwrap()).collect();
            assert_eq!((taken, spans.take(1)), (vec![0, 10, 20], None));
            order.iter().for_each(|i| spans.give_back(10 * i..10 * i + 10));
            assert!(spans.are_all(30), "{order:?}: {:?}", spans.free);
        }
    }

    /// What is large or small needs no area.
    #[test]
    fn only_the_middle_shares_areas() {
        let areas = Arc::new(Areas::default());
        let n_areas = || areas.list.lock().unwrap().len();
        let all: Vec<Memory> = [1, MIDDLE - 1, LARGE, LARGE + 1].iter().map(|size| Memory::zeroed(*size, Some(&areas)).unwrap()).collect();
        assert_eq!((n_areas(), all[2].start() as usize % HUGE_PAGE), (0, 0));
        let _middle = Memory::zeroed(MIDDLE, Some(&areas)).unwrap();
        assert!(n_areas() == 1 && Memory::zeroed(MIDDLE, None).is_some() && n_areas() == 1);
    }
}
