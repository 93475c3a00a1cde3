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
use crate::tensor::Tensor;
use std::sync::Arc;

/// The communication stream of a device. Clones are the same stream.
#[derive(Clone)]
pub struct CommunicationStream {
    backend: Arc<dyn Backend>,
}

impl CommunicationStream {
    /// Of this device. `None` where no CUDA is below it (a machine that is emulated): such tensors travel through the host.
    pub fn of(cuda: &Cuda) -> Option<CommunicationStream> {
        let backend = Arc::clone(&cuda.backend);
        backend.handle(Stream::Communication).map(|_| CommunicationStream { backend })
    }

    /// Makes the device current on this thread, as calls of CUDA's libraries want it, and returns the stream's `CUstream`.
    pub fn handle(&self) -> u64 {
        self.backend.handle(Stream::Communication).expect("a device that has streams keeps them")
    }

    /// Lets `ask` ask for work on the stream (given as `CUstream`, the device current on this thread), behind everything that was asked
    /// of the device before this call.
    pub fn start(&self, ask: impl FnOnce(u64)) -> UnderWay {
        let ready = self.backend.record(Stream::Compute);
        self.backend.wait(Stream::Communication, ready);
        self.backend.release(ready);
        ask(self.handle());
        UnderWay { end: Some(self.backend.record(Stream::Communication)), backend: Arc::clone(&self.backend) }
    }
}

/// Work on the communication stream that the device's own work does not wait for yet. Dropped, it joins.
#[must_use = "the device's work is behind it only after join()"]
pub struct UnderWay {
    end: Option<Event>,
    backend: Arc<dyn Backend>,
}

impl UnderWay {
    /// What is asked of the device from now on begins after it. Does not block the host.
    pub fn join(mut self) {
        self.join_now();
    }

    /// Whether it is done. For those who watch over a job; the result does not depend on asking.
    pub fn is_done(&self) -> bool {
        self.end.is_none_or(|end| self.backend.is_complete(end))
    }

    fn join_now(&mut self) {
        if let Some(end) = self.end.take() {
            self.backend.wait(Stream::Compute, end);
            self.backend.release(end);
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.join_now();
        }
    }
}

impl Cuda {
    /// Where the first element of a tensor lies in device memory, for those who hand it to CUDA's libraries. `None` for a tensor that
    /// no CUDA device made.
    pub fn address_of(tensor: &Tensor) -> Option<u64> {
        let memory = tensor.foreign_handle().and_then(|handle| handle.downcast_ref::<super::Memory>());
        memory.map(|memory| memory.address + tensor.offset_bytes() as u64)
    }
}
