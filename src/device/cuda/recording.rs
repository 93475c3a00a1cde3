//! Work recorded once and asked for again in one call (a CUDA graph), for passes of so many small launches that asking for them takes
//! longer than doing them: a decode step. What changes from one time to the next is read from device memory that is written before:
//! tokens and positions by the owner of those tensors, the tables of the attention over the caches here.

use super::attention_cached::Tables;
use super::backend::{Backend, Graph};
use super::{Cuda, Use, Workspace};
use crate::device::{CacheSpan, Recording};
use std::sync::{Arc, Mutex};

/// What work that is being recorded needs as long as it can be asked for again.
#[derive(Default)]
pub(super) struct Tape {
    /// Those of its attention over caches.
    pub(super) tables: Option<Arc<Tables>>,
    /// Memory of its calls.
    pub(super) kept: Vec<Workspace>,
}

/// Recorded work.
struct Recorded {
    graph: Graph,
    tape: Tape,
    cuda: Cuda,
}

impl Recording for Recorded {
    fn replay(&self, spans: &[CacheSpan]) -> bool {
        if let Some(tables) = &self.tape.tables {
            if !tables.have_room_for(spans) {
                return false;
            }
            tables.fill(&self.cuda, spans);
        }
        self.cuda.backend.replay(self.graph);
        true
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cuda.backend.forget(self.graph);
        }
    }
}

impl Cuda {
    /// See `Device::record`.
    pub(super) fn record_work(&self, work: &mut dyn FnMut()) -> Option<Box<dyn Recording>> {
        if !self.backend.begin_recording() {
            return None;
        }
        let before = self.tape.lock().expect("no panic while holding the tape").replace(Tape::default());
        assert!(before.is_none(), "work is recorded already");
        work();
        let tape = self.tape.lock().expect("no panic while holding the tape").take().expect("nobody else ends it");
        let graph = self.backend.end_recording()?;
        Some(Box::new(Recorded { graph, tape, cuda: self.sharing_memory() }))
    }

    /// The same machine and account of memory.
    pub fn sharing_memory(&self) -> Cuda {
        Cuda { hopper: self.hopper, ..Cuda::over(Arc::clone(&self.backend), Arc::clone(&self.use_of_memory)) }
    }

    pub(super) fn over(backend: Arc<dyn Backend>, use_of_memory: Arc<Use>) -> Cuda {
        Cuda { hopper: backend.is_hopper(), backend, use_of_memory, last_tables: Mutex::default(), tape: Mutex::default() }
    }

    /// Whether work is being recorded.
    pub(super) fn is_recording(&self) -> bool {
        self.tape.lock().expect("no panic while holding the tape").is_some()
    }
}
