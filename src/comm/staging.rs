//! Host memory for messages on their way: taken by size, given back when dropped, so that after the first steps nothing is
//! allocated and no fresh page is touched. Knows nothing of ranks.

use crate::tensor::{DType, Tensor};
use std::sync::{Arc, Mutex};

type Shelf = Arc<Mutex<Vec<Tensor>>>;

/// The pool. Clones share the memory.
#[derive(Clone, Default)]
pub struct Staging {
    shelf: Shelf,
}

impl Staging {
    /// `n_bytes` of 64-byte aligned memory with unspecified contents. Panics when the machine has no memory left.
    pub fn take(&self, n_bytes: usize) -> StagingBuffer {
        let mut shelf = self.shelf.lock().expect("no panic while holding the shelf");
        let fits = |memory: &Tensor| memory.n_bytes() >= n_bytes;
        let best = (0..shelf.len()).filter(|&i| fits(&shelf[i])).min_by_key(|&i| shelf[i].n_bytes());
        let kept = best.map(|i| shelf.swap_remove(i));
        // When none is large enough the largest makes room: the pool holds as many buffers as were ever in flight at once,
        // not one for every size.
        if kept.is_none()
            && let Some(i) = (0..shelf.len()).max_by_key(|&i| shelf[i].n_bytes())
        {
            shelf.swap_remove(i);
        }
        drop(shelf);
        let memory = kept.or_else(|| Tensor::host(&[n_bytes.div_ceil(4)], DType::U32, None));
        let memory = memory.unwrap_or_else(|| panic!("no memory for a message buffer of {n_bytes} bytes"));
        StagingBuffer { memory: Some(memory), n_bytes, shelf: Arc::clone(&self.shelf) }
    }
}

/// A temporary of the pool it goes back to when dropped.
pub struct StagingBuffer {
    memory: Option<Tensor>,
    n_bytes: usize,
    shelf: Shelf,
}

impl StagingBuffer {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory.as_ref().expect("present until dropped").bytes()[..self.n_bytes]
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory.as_mut().expect("present until dropped").bytes_mut()[..self.n_bytes]
    }
}

impl Drop for StagingBuffer {
    fn drop(&mut self) {
        if let (Some(memory), Ok(mut shelf)) = (self.memory.take(), self.shelf.lock()) {
            shelf.push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pool grows with the buffers in flight at once, not with the sizes asked for: else a long run fills the memory.
    #[test]
    fn the_pool_does_not_grow_with_sizes() {
        let staging = Staging::default();
        for n_bytes in 1..200 {
            let (mut a, b) = (staging.take(n_bytes), staging.take(2 * n_bytes));
            a.bytes_mut().fill(1);
            assert_eq!((a.bytes().len(), b.bytes().len()), (n_bytes, 2 * n_bytes));
        }
        assert_eq!(staging.shelf.lock().unwrap().len(), 2);
    }
}
