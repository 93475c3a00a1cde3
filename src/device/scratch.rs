//! A pool of temporaries: taken by shape, given back when dropped, so that after the first step nothing is allocated.
//! Contents are whatever the last user left: every operation that assigns must assign all.

use super::Device;
use crate::tensor::{DType, Tensor};
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

type Shelf = Mutex<HashMap<(Vec<usize>, DType), Vec<Tensor>>>;

/// The pool. Cheap to clone; clones share the memory.
#[derive(Clone, Default)]
pub struct Scratch {
    shelf: Arc<Shelf>,
}

impl Scratch {
    /// An empty pool.
    pub fn new() -> Self {
        Scratch::default()
    }

    /// A tensor of this shape with unspecified contents. Panics when the device has no memory left: at this depth nobody
    /// can repair it.
    pub fn take(&self, device: &dyn Device, shape: &[usize], dtype: DType) -> ScratchTensor {
        let key = (shape.to_vec(), dtype);
        let kept = self.shelf.lock().expect("no panic while holding the shelf").get_mut(&key).and_then(Vec::pop);
        let tensor = kept.unwrap_or_else(|| device.alloc(shape, dtype).unwrap_or_else(|error| panic!("{error}")));
        ScratchTensor { tensor: Some(tensor), shelf: Arc::clone(&self.shelf) }
    }
}

/// A temporary. Dereferences to [`Tensor`]; goes back to its pool when dropped.
pub struct ScratchTensor {
    tensor: Option<Tensor>,
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
            shelf.entry((tensor.dims().to_vec(), tensor.dtype())).or_default().push(tensor);
        }
    }
}
