//! Work over the rayon pool, or the team where this thread leads it: ranges with a least size, so that small tensors stay on the calling
//! thread; slices that several tasks write disjointly; and buffers that outlive the call, because fresh pages cost more than the work on
//! them.

use super::team;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Least elements worth a task.
pub const GRAIN: usize = 32 * 1024;
/// The team takes tasks so many times smaller.
const TEAM_TASKS: usize = 8;

/// Whether there is nobody to share work with.
fn is_alone() -> bool {
    rayon::current_num_threads() == 1 || team::is_at_work()
}

/// `grain`, or less of it where tasks cost next to nothing.
fn grain_here(grain: usize) -> usize {
    if team::leads() { (grain / TEAM_TASKS).max(1) } else { grain }
}

/// Calls `work` with ranges that cover 0..n, of at least `grain` (but the last), in parallel when there is more than one.
pub fn for_ranges(n: usize, grain: usize, work: impl Fn(Range<usize>) + Sync) {
    let n_ranges = n.div_ceil(grain_here(grain).max(1)).min(4 * rayon::current_num_threads());
    if n_ranges <= 1 || is_alone() {
        if n > 0 {
            work(0..n);
        }
        return;
    }
    let size = n.div_ceil(n_ranges).next_multiple_of(if grain >= 64 { 64 } else { 1 });
    let work = |i: usize| work(i * size..((i + 1) * size).min(n));
    if !team::share_out(n.div_ceil(size), &work) {
        (0..n.div_ceil(size)).into_par_iter().for_each(work);
    }
}

/// As `for_ranges` over rows of so many elements.
pub fn for_rows(n_rows: usize, row_elements: usize, work: impl Fn(Range<usize>) + Sync) {
    for_ranges(n_rows, (GRAIN / row_elements.max(1)).max(1), work);
}

/// Tasks 0..n, one at a time to whoever is free; on the calling thread when all of them together are `cost` < one grain.
pub fn for_tasks(n: usize, cost: usize, work: impl Fn(usize) + Sync) {
    if n <= 1 || cost < grain_here(GRAIN) || is_alone() {
        (0..n).for_each(work);
    } else if !team::share_out(n, &work) {
        (0..n).into_par_iter().with_max_len(1).for_each(&work);
    }
}

/// A slice that tasks write in disjoint parts.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts, and whoever takes them promises that they are disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows the slice for as long as parts are handed out.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shared { start: slice.as_mut_ptr(), len: slice.len(), of: PhantomData }
    }

    /// SAFETY: no two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: in bounds; disjoint by the caller's promise; the borrow of the whole lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// A cache line, for alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Buffers between calls. Threads have shelves of their own, as far as there are some, so that they neither wait for each other nor get
/// what lies in another's caches.
#[derive(Default)]
pub struct Pool {
    shelves: [Shelf; SHELVES],
}

const SHELVES: usize = 16;
/// Most buffers on a shelf.
const MOST_KEPT: usize = 16;

#[derive(Default)]
#[repr(align(128))]
struct Shelf(Mutex<Vec<Vec<Line>>>);

impl Pool {
    /// This thread's.
    fn shelf(&self) -> &Mutex<Vec<Vec<Line>>> {
        static N_THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static PLACE: usize = N_THREADS.fetch_add(1, Ordering::Relaxed) % SHELVES;
        }
        &self.shelves[PLACE.with(|place| *place)].0
    }
}

/// A buffer of f32, 64-byte aligned, contents unspecified; back to its pool when dropped.
pub struct Buffer<'a> {
    lines: Vec<Line>,
    len: usize,
    pool: &'a Pool,
}

impl Pool {
    /// The smallest that is large enough, else the largest, grown.
    pub fn take(&self, len: usize) -> Buffer<'_> {
        let n_lines = len.div_ceil(16).max(1);
        let mut shelf = self.shelf().lock().expect("nobody panics while holding the shelf");
        let fits = (0..shelf.len()).filter(|i| shelf[*i].len() >= n_lines).min_by_key(|i| shelf[*i].len());
        let mut lines = match fits {
            Some(i) => shelf.swap_remove(i),
            None => Vec::new(),
        };
        drop(shelf);
        if lines.is_empty() {
            lines = vec![Line([0.0; 16]); n_lines];
        }
        Buffer { lines, len, pool: self }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if let Ok(mut shelf) = self.pool.shelf().lock() {
            shelf.push(std::mem::take(&mut self.lines));
            // A few of each size are enough; the smallest are the cheapest to make again.
            if shelf.len() > MOST_KEPT {
                let smallest = (0..shelf.len()).min_by_key(|i| shelf[*i].len()).expect("not empty");
                shelf.swap_remove(smallest);
            }
        }
    }
}

impl std::ops::Deref for Buffer<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: lines are 16 f32 each without padding, and there are enough of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
