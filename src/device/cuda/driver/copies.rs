//! Copies between host and device. Everything travels through page-locked memory, from which a GPU copies at its full rate without
//! the processor; plain memory would be copied at a fraction of it, and the call would wait.
//!
//! Small uploads leave from a ring on the compute stream and are not waited for. Large copies are cut into chunks, which take turns in
//! two page-locked buffers: one is on its way while the other is filled or emptied. They have a stream of their own, so that a thread
//! that saves a checkpoint and a step that computes do not wait for each other.

use super::queues::Queues;
use crate::device::cuda::backend::Stream;
use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;
use std::sync::Mutex;

/// Room for small uploads: segments are used in turn, and each waits only for its own last copies.
const SEGMENT_BYTES: usize = 4 << 20;
const N_SEGMENTS: usize = 4;
/// Larger copies are cut into chunks.
const SMALL_BYTES: usize = 1 << 20;
/// Bytes of a chunk: some tenths of a millisecond on the way.
const CHUNK_BYTES: usize = 8 << 20;
/// Bytes that one task moves between plain and page-locked memory.
const TASK_BYTES: usize = 1 << 20;

/// Page-locked memory and the event after the last copy from or to it.
struct Pinned {
    start: *mut u8,
    bytes: usize,
    last_use: Option<sys::CUevent>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(bytes: usize) -> Result<Pinned, DriverError> {
        // SAFETY: the caller made the context current; freed by `free`.
        Ok(Pinned { start: unsafe { result::malloc_host(bytes, 0) }?.cast(), bytes, last_use: None })
    }

    /// Blocks until the last copy from or to it is done.
    fn settle(&mut self, queues: &Queues) -> Result<(), DriverError> {
        if let Some(event) = self.last_use.take() {
            // SAFETY: a live event.
            unsafe { result::event::synchronize(event) }?;
            queues.release(event);
        }
        Ok(())
    }

    /// Notes that copies of this memory were asked of `stream`.
    fn used_on(&mut self, stream: Stream, queues: &Queues) -> Result<(), DriverError> {
        if let Some(event) = self.last_use.replace(queues.record(stream)?) {
            queues.release(event);
        }
        Ok(())
    }

    /// `n` of its bytes from `at` on.
    fn bytes_mut(&mut self, at: usize, n: usize) -> &mut [u8] {
        assert!(at + n <= self.bytes);
        // SAFETY: in bounds (asserted); no copy under way touches them, as callers settle before they write or read.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), n) }
    }

    fn free(self) {
        // SAFETY: allocated by `new`, freed once; the streams are empty. A failure at the end has nobody to go to.
        let _ = unsafe { result::free_host(self.start.cast()) };
        if let Some(event) = self.last_use {
            // SAFETY: a live event, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

/// Segments in turn, and how much of the present one has left.
struct Ring {
    segments: Vec<Pinned>,
    segment: usize,
    used_bytes: usize,
}

/// Page-locked memory of a GPU's copies.
pub struct Copies {
    ring: Mutex<Ring>,
    /// Pairs of buffers that no large copy uses now: as many as there were ever copies at one time.
    pairs: Mutex<Vec<[Pinned; 2]>>,
}

impl Copies {
    /// The context must be current, here and below.
    pub fn new() -> Result<Copies, DriverError> {
        let segments = (0..N_SEGMENTS).map(|_| Pinned::new(SEGMENT_BYTES)).collect::<Result<_, _>>()?;
        Ok(Copies { ring: Mutex::new(Ring { segments, segment: 0, used_bytes: 0 }), pairs: Mutex::default() })
    }

    /// Host bytes to device memory, after the compute work asked for before and before that asked for later; `host` may be reused at
    /// once.
    ///
    /// # Safety
    /// `to` is `host.len()` bytes of the context's device memory.
    pub unsafe fn upload(&self, queues: &Queues, host: &[u8], to: u64) -> Result<(), DriverError> {
        if host.len() <= SMALL_BYTES {
            // SAFETY: as promised by the caller.
            return unsafe { self.upload_small(queues, host, to) };
        }
        let mut pair = self.take_pair()?;
        queues.order(Stream::Compute, Stream::Copies)?;
        for (i, part) in host.chunks(CHUNK_BYTES).enumerate() {
            let buffer = &mut pair[i % 2];
            buffer.settle(queues)?;
            move_bytes(part, buffer.bytes_mut(0, part.len()));
            let place = to + (i * CHUNK_BYTES) as u64;
            // SAFETY: part of the caller's memory; the buffer stays as it is until its event was waited for.
            unsafe { result::memcpy_htod_async(place, buffer.bytes_mut(0, part.len()), queues.of(Stream::Copies)) }?;
            buffer.used_on(Stream::Copies, queues)?;
        }
        queues.order(Stream::Copies, Stream::Compute)?;
        self.give_pair(pair);
        Ok(())
    }

    unsafe fn upload_small(&self, queues: &Queues, host: &[u8], to: u64) -> Result<(), DriverError> {
        let mut ring = self.ring.lock().expect("no panic while holding the ring");
        let Ring { segments, segment, used_bytes } = &mut *ring;
        if *used_bytes + host.len() > SEGMENT_BYTES {
            segments[*segment].used_on(Stream::Compute, queues)?;
            *segment = (*segment + 1) % N_SEGMENTS;
            *used_bytes = 0;
            segments[*segment].settle(queues)?;
        }
        let place = segments[*segment].bytes_mut(*used_bytes, host.len());
        place.copy_from_slice(host);
        *used_bytes += host.len().next_multiple_of(64);
        // SAFETY: the caller's memory; these bytes of the segment stay as they are until it was waited for.
        unsafe { result::memcpy_htod_async(to, place, queues.of(Stream::Compute)) }
    }

    /// Device bytes to the host, after the compute work asked for before; waits for these bytes, not for work asked for later.
    ///
    /// # Safety
    /// `from` is `host.len()` bytes of the context's device memory.
    pub unsafe fn download(&self, queues: &Queues, from: u64, host: &mut [u8]) -> Result<(), DriverError> {
        let stream = if host.len() <= SMALL_BYTES { Stream::Compute } else { Stream::Copies };
        let mut pair = self.take_pair()?;
        if stream == Stream::Copies {
            queues.order(Stream::Compute, Stream::Copies)?;
        }
        let mut waiting: Option<(usize, &mut [u8])> = None;
        for (i, part) in host.chunks_mut(CHUNK_BYTES).enumerate() {
            let buffer = &mut pair[i % 2];
            buffer.settle(queues)?;
            let place = from + (i * CHUNK_BYTES) as u64;
            // SAFETY: part of the caller's memory; the buffer is read after its event was waited for.
            unsafe { result::memcpy_dtoh_async(buffer.bytes_mut(0, part.len()), place, queues.of(stream)) }?;
            buffer.used_on(stream, queues)?;
            if let Some((before, part)) = waiting.replace((i % 2, part)) {
                empty(queues, &mut pair[before], part)?;
            }
        }
        if let Some((last, part)) = waiting {
            empty(queues, &mut pair[last], part)?;
        }
        self.give_pair(pair);
        Ok(())
    }

    fn take_pair(&self) -> Result<[Pinned; 2], DriverError> {
        let kept = self.pairs.lock().expect("no panic while holding the buffers").pop();
        kept.map_or_else(|| Ok([Pinned::new(CHUNK_BYTES)?, Pinned::new(CHUNK_BYTES)?]), Ok)
    }

    fn give_pair(&self, pair: [Pinned; 2]) {
        self.pairs.lock().expect("no panic while holding the buffers").push(pair);
    }

    /// At the end; the context must be current and the streams empty.
    pub fn destroy(&mut self) {
        let segments = self.ring.get_mut().map(|ring| std::mem::take(&mut ring.segments)).unwrap_or_default();
        let pairs = self.pairs.get_mut().map(std::mem::take).unwrap_or_default();
        segments.into_iter().chain(pairs.into_iter().flatten()).for_each(Pinned::free);
    }
}

/// Moves an arrived chunk to where it was wanted.
fn empty(queues: &Queues, buffer: &mut Pinned, part: &mut [u8]) -> Result<(), DriverError> {
    buffer.settle(queues)?;
    move_bytes(buffer.bytes_mut(0, part.len()), part);
    Ok(())
}

/// One core moves fewer bytes a second than the bus.
fn move_bytes(from: &[u8], to: &mut [u8]) {
    if from.len() <= TASK_BYTES {
        return to.copy_from_slice(from);
    }
    to.par_chunks_mut(TASK_BYTES).zip(from.par_chunks(TASK_BYTES)).for_each(|(to, from)| to.copy_from_slice(from));
}
