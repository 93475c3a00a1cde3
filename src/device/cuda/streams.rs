//! Work of others on the device's communication stream, in order with the device's own: how a library that communicates from device
//! memory (NCCL) overlaps with kernels without seeing them.
//!
//! A communicator holds a [`CommunicationStream`] and asks for each collective in [`CommunicationStream::start`]. It begins after all
//! that was asked of the device before (its inputs are ready, and nothing reads its outputs any more), and runs beside what is asked
//! after. [`UnderWay::join`] puts the device's next work behind it. Neither blocks the host. So a `comm::Pending` over it is
//!
//! ```ignore
//! let under_way = stream.start(|handle| nccl_all_gather(.., handle));
//! Pending::until(move || under_way.join())
//! ```
//!
//! which keeps the tensors borrowed until `join`: memory that the collective uses cannot be touched or freed before, and what is freed
//! after is reused in the order of the compute stream, behind the collective.

use super::Cuda;
use super::backend::{Backend, Event, Stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A communication stream of a device. Clones are the same stream.
#[derive(Clone)]
pub struct CommunicationStream {
    backend: Arc<dyn Backend>,
    stream: Stream,
}

impl CommunicationStream {
    /// A new one of this device: each group of ranks has its own. `None` where no CUDA is below it (a machine that is emulated): such
    /// tensors travel through the host.
    pub fn of(cuda: &Cuda) -> Option<CommunicationStream> {
        let backend = Arc::clone(&cuda.backend);
        let stream = Stream::Communication(cuda.use_of_memory.n_streams.fetch_add(1, Ordering::Relaxed));
        backend.handle(stream).map(|_| CommunicationStream { backend, stream })
    }

    /// Makes the device current on this thread, as calls of CUDA's libraries want it, and returns the stream's `CUstream`.
    pub fn handle(&self) -> u64 {
        self.backend.handle(self.stream).expect("a device that has streams keeps them")
    }

    /// Panics with what has become of the device when it has failed: what uses its memory may only say that something did.
    pub fn check(&self) {
        let now = self.backend.record(Stream::Compute);
        self.backend.is_complete(now);
        self.backend.release(now);
    }

    /// Lets `ask` ask for work on the stream (given as `CUstream`, the device current on this thread), behind everything that was asked
    /// of the device before this call.
    pub fn start(&self, ask: impl FnOnce(u64)) -> UnderWay {
        let ready = self.backend.record(Stream::Compute);
        self.backend.wait(self.stream, ready);
        self.backend.release(ready);
        ask(self.handle());
        let end = self.backend.record(self.stream);
        UnderWay { end, is_joined: AtomicBool::new(false), backend: Arc::clone(&self.backend) }
    }
}

impl Cuda {
    /// The device's own work up to here, which what is asked for next follows anyway.
    pub(super) fn under_way(&self) -> UnderWay {
        let end = self.backend.record(Stream::Compute);
        UnderWay { end, is_joined: AtomicBool::new(true), backend: Arc::clone(&self.backend) }
    }
}

/// Work on the communication stream that the device's own work does not wait for yet. Dropped, it joins.
#[must_use = "the device's work is behind it only after join()"]
pub struct UnderWay {
    end: Event,
    is_joined: AtomicBool,
    backend: Arc<dyn Backend>,
}

impl UnderWay {
    /// What is asked of the device from now on begins after it. Does not block the host.
    pub fn join(&self) {
        if !self.is_joined.swap(true, Ordering::Relaxed) {
            self.backend.wait(Stream::Compute, self.end);
        }
    }

    /// Whether it is done. For those who watch over a job; the result does not depend on asking. Not for what is recorded: it is not
    /// done at all before the recording is asked for.
    pub fn is_done(&self) -> bool {
        self.backend.is_complete(self.end)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.join();
            self.backend.release(self.end);
        }
    }
}
