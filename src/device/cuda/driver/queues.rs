//! The streams of a GPU and the events that order them.

use crate::device::cuda::backend::Stream;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_int;
use std::sync::Mutex;

/// Of the device between two events of [`Queues::mark`], which are waited for.
pub fn seconds_between(from: sys::CUevent, to: sys::CUevent) -> Result<f64, DriverError> {
    // SAFETY: live events that were recorded and tell the time.
    unsafe {
        result::event::synchronize(from)?;
        result::event::synchronize(to)?;
        Ok(f64::from(result::event::elapsed(from, to)?) / 1e3)
    }
}

/// Streams, and events that are not in use.
pub struct Queues {
    compute: sys::CUstream,
    copies: sys::CUstream,
    communication: Mutex<Vec<sys::CUstream>>,
    /// Of the communication streams.
    priority: c_int,
    idle: Mutex<Vec<sys::CUevent>>,
}

impl Queues {
    /// Streams of the context that is current on this thread.
    pub fn open() -> Result<Queues, DriverError> {
        let kind = || result::stream::StreamKind::NonBlocking;
        // Numerically smaller comes first: a collective that waits for processors delays every rank of its group.
        let (least, greatest) = result::stream::get_priority_range()?;
        Ok(Queues {
            compute: result::stream::create_with_priority(kind(), least)?,
            copies: result::stream::create_with_priority(kind(), least)?,
            communication: Mutex::default(),
            priority: greatest,
            idle: Mutex::default(),
        })
    }

    /// A stream's handle. One for communication is made at its first use, when the context must be current.
    pub fn of(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Compute => self.compute,
            Stream::Copies => self.copies,
            Stream::Communication(number) => {
                let mut made = self.communication.lock().expect("no panic while holding the streams");
                while made.len() <= number {
                    let stream = result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, self.priority);
                    made.push(stream.unwrap_or_else(|error| panic!("making a stream for communication: {error}")));
                }
                made[number]
            }
        }
    }

    fn all(&self) -> Vec<sys::CUstream> {
        let communication = self.communication.lock().expect("no panic while holding the streams");
        [self.compute, self.copies].iter().chain(&*communication).copied().collect()
    }

    /// An event at the end of what was asked of a stream; given back by `release`. The context must be current, here and below.
    pub fn record(&self, stream: Stream) -> Result<sys::CUevent, DriverError> {
        let kept = self.idle.lock().expect("no panic while holding the events").pop();
        // One that only orders is cheaper than one that tells the time.
        let event = kept.map_or_else(|| result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING), Ok)?;
        // SAFETY: a live event and a live stream of one context.
        unsafe { result::event::record(event, self.of(stream)) }?;
        Ok(event)
    }

    /// What is asked of a stream from now on begins after the event.
    pub fn wait(&self, stream: Stream, event: sys::CUevent) -> Result<(), DriverError> {
        // SAFETY: a live event and a live stream of one context.
        unsafe { result::stream::wait_event(self.of(stream), event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
    }

    /// Puts the next work of `later` behind what was asked of `earlier`.
    pub fn order(&self, earlier: Stream, later: Stream) -> Result<(), DriverError> {
        let event = self.record(earlier)?;
        self.wait(later, event)?;
        self.release(event);
        Ok(())
    }

    /// Keeps an event for the next use.
    pub fn release(&self, event: sys::CUevent) {
        self.idle.lock().expect("no panic while holding the events").push(event);
    }

    /// An event at the end of what was asked of compute so far that tells the time. The caller destroys it.
    pub fn mark(&self) -> Result<sys::CUevent, DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        // SAFETY: a live event and a live stream of one context.
        unsafe { result::event::record(event, self.compute) }?;
        Ok(event)
    }

    /// Blocks until all streams are empty.
    pub fn synchronize(&self) -> Result<(), DriverError> {
        for stream in self.all() {
            // SAFETY: a live stream.
            unsafe { result::stream::synchronize(stream) }?;
        }
        Ok(())
    }

    /// At the end; the context must be current and the streams empty.
    pub fn destroy(&mut self) {
        let idle = self.idle.get_mut().map(std::mem::take).unwrap_or_default();
        // SAFETY: live handles, destroyed once: the owner calls this from its drop. A failure at the end has nobody to go to.
        unsafe {
            idle.into_iter().for_each(|event| {
                let _ = result::event::destroy(event);
            });
            for stream in self.all() {
                let _ = result::stream::destroy(stream);
            }
        }
    }
}
