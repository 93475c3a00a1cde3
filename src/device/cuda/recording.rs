//! Work recorded once and asked for again in one call (a CUDA graph), for passes of so many small launches that asking for them takes
//! longer than doing them: a decode step. What changes from one time to the next is read from device memory that is written before:
//! tokens and positions by the owner of those tensors, the tables of the attention over the caches here. Collectives between GPUs are
//! recorded with the rest, see `comm::nccl`.

use super::attention_cached::Tables;
use super::backend::{Backend, Graph};
use super::streams::UnderWay;
use super::{Cuda, Use, Workspace};
use crate::device::{CacheSpan, Recording};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Hears of each time that a recording is asked for: the bytes that collectives of one group move in it, and its end.
pub(crate) type OnReplay = Box<dyn Fn(usize, &Arc<UnderWay>) + Send>;

/// What work that is being recorded needs as long as it can be asked for again.
#[derive(Default)]
pub(super) struct Tape {
    /// Those of its attention over caches.
    pub(super) tables: Option<Arc<Tables>>,
    /// Memory of its calls, nobody else's. What a call has done with is lent to the calls after it.
    kept: Vec<Workspace>,
    /// By group: bytes of its collectives, and who hears of them.
    collectives: HashMap<usize, (usize, OnReplay)>,
}

impl Tape {
    /// Memory for a call that is recorded, from `ask` when none is left of the calls before it.
    pub(super) fn workspace(&mut self, bytes: usize, ask: impl FnOnce() -> Workspace) -> Workspace {
        let free = self.kept.iter().find(|kept| kept.is_free() && kept.n_bytes() == bytes).cloned();
        free.unwrap_or_else(|| {
            let workspace = ask();
            self.kept.push(workspace.clone());
            workspace
        })
    }
}

/// Recorded work.
struct Recorded {
    graph: Graph,
    tape: Mutex<Tape>,
    cuda: Cuda,
}

impl Recording for Recorded {
    fn replay(&self, spans: &[CacheSpan]) -> bool {
        let tape = self.tape.lock().expect("no panic while asking for recorded work");
        if let Some(tables) = &tape.tables {
            if !tables.have_room_for(spans) {
                return false;
            }
            tables.fill(&self.cuda, spans);
        }
        self.cuda.backend.replay(self.graph);
        if !tape.collectives.is_empty() {
            let under_way = Arc::new(self.cuda.under_way());
            tape.collectives.values().for_each(|(bytes, on_replay)| on_replay(*bytes, &under_way));
        }
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
        let before = self.tape().replace(Tape::default());
        assert!(before.is_none(), "work is recorded already");
        work();
        let tape = self.tape().take().expect("nobody else ends it");
        let graph = self.backend.end_recording()?;
        Some(Box::new(Recorded { graph, tape: Mutex::new(tape), cuda: self.sharing_memory() }))
    }

    /// The same machine, account of memory, and recording.
    pub fn sharing_memory(&self) -> Cuda {
        Cuda { hopper: self.hopper, ..Cuda::over(Arc::clone(&self.backend), Arc::clone(&self.use_of_memory)) }
    }

    pub(super) fn over(backend: Arc<dyn Backend>, use_of_memory: Arc<Use>) -> Cuda {
        Cuda { hopper: backend.is_hopper(), backend, use_of_memory, last_tables: Mutex::default() }
    }

    /// Whether work is being recorded.
    pub(crate) fn is_recording(&self) -> bool {
        self.tape().is_some()
    }

    /// A collective of a group was recorded that moves so many bytes: what `make` makes, the first time, hears of each replay. Panics
    /// when nothing is being recorded.
    pub(crate) fn when_replayed(&self, group: usize, bytes: usize, make: impl FnOnce() -> OnReplay) {
        let mut tape = self.tape();
        let collectives = &mut tape.as_mut().expect("work is recorded").collectives;
        collectives.entry(group).or_insert_with(|| (0, make())).0 += bytes;
    }
}
