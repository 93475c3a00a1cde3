//! Communicators over MPI (OpenMPI through the crate `mpi`): byte primitives only; sums are made in `ordered`. An error inside
//! MPI ends the job (MPI_ERRORS_ARE_FATAL is the default).
//!
//! One thread of a rank calls MPI at a time (MPI_THREAD_SERIALIZED), which is asserted at each call. Counts in MPI are i32,
//! so long messages travel in pieces; messages between two ranks with one tag do not overtake each other, which keeps the
//! pieces in order.

use super::ordered::on_host;
use super::solo::Solo;
use super::{Communicator, Pending, Recv, Send, Staging, StagingBuffer, UsePieces};
use crate::fault;
use mpi::ffi;
use std::os::raw::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest single message.
const PIECE_BYTES: usize = 1 << 30;
/// Tag of collectives that travel as messages; other messages use their own plus one (only 0..=32767 is sure to exist).
const COLLECTIVE_TAG: c_int = 0;

/// Held during a call into MPI.
struct Calling;

static IS_CALLING: AtomicBool = AtomicBool::new(false);

impl Calling {
    fn enter() -> Calling {
        assert!(!IS_CALLING.swap(true, Ordering::Acquire), "two threads of one rank call MPI at the same time");
        Calling
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        IS_CALLING.store(false, Ordering::Release);
    }
}

/// One rank's end of an MPI communicator. Freed when dropped.
pub struct Mpi {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    piece_bytes: usize,
    staging: Staging,
}

// SAFETY: the handle is a pointer to an object of the MPI library, which may be used from any thread, one at a time
// (MPI_THREAD_SERIALIZED); `Calling` holds that.
unsafe impl std::marker::Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let _calling = Calling::enter();
        let mut is_finalized = 0;
        // SAFETY: the handle was made by MPI_Comm_split or MPI_Comm_dup and is freed once; never after MPI_Finalize.
        unsafe {
            ffi::MPI_Finalized(&mut is_finalized);
            if is_finalized == 0 {
                ffi::MPI_Comm_free(&mut self.comm);
            }
        }
    }
}

/// Requests under way, and for receives the bytes that are expected.
#[derive(Default)]
struct Requests {
    handles: Vec<ffi::MPI_Request>,
    expected: Vec<Option<usize>>,
}

impl Requests {
    fn push(&mut self, handle: ffi::MPI_Request, expected: Option<usize>) {
        self.handles.push(handle);
        self.expected.push(expected);
    }

    /// Blocks until all are complete. A message that is too long ends the job inside MPI; one that is too short panics here.
    fn wait(mut self) {
        let _calling = Calling::enter();
        let mut handles = std::mem::take(&mut self.handles);
        // SAFETY: a status is plain data, for which zero is a value; it is written by MPI_Waitall before it is read.
        let mut statuses: Vec<ffi::MPI_Status> = vec![unsafe { std::mem::zeroed() }; handles.len()];
        // SAFETY: live requests of this process, each with room for its status.
        unsafe { ffi::MPI_Waitall(handles.len() as c_int, handles.as_mut_ptr(), statuses.as_mut_ptr()) };
        for (status, expected) in statuses.iter().zip(&self.expected) {
            let Some(expected) = *expected else { continue };
            let mut n = 0;
            // SAFETY: a status that MPI_Waitall has filled.
            unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut n) };
            assert!(n as usize == expected, "message of rank {}: {n} bytes, expected {expected}", status.MPI_SOURCE);
        }
    }
}

impl Drop for Requests {
    // Only a panic drops requests that were not waited for. MPI still writes to memory that unwinding would release, and
    // waiting might never end.
    fn drop(&mut self) {
        if !self.handles.is_empty() {
            std::process::abort();
        }
    }
}

impl Mpi {
    /// A duplicate of MPI_COMM_WORLD, so that our messages never meet those of others. MPI must be initialised. Collective.
    pub fn world() -> Mpi {
        // SAFETY: a constant of the library.
        Mpi::derived(PIECE_BYTES, Staging::default(), |new| unsafe { ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, new) })
    }

    /// The same ranks with messages cut at another length, to test the cutting. Collective.
    pub fn with_pieces(&self, piece_bytes: usize) -> Mpi {
        // SAFETY: `self.comm` is a live communicator.
        Mpi::derived(piece_bytes, self.staging.clone(), |new| unsafe { ffi::MPI_Comm_dup(self.comm, new) })
    }

    /// The ranks of this one's machine. Collective.
    pub fn on_this_machine(&self) -> Mpi {
        let key = self.rank as c_int;
        Mpi::derived(self.piece_bytes, self.staging.clone(), |new| {
            // SAFETY: `self.comm` is a live communicator; the other arguments are constants of the library.
            unsafe { ffi::MPI_Comm_split_type(self.comm, ffi::RSMPI_COMM_TYPE_SHARED, key, ffi::RSMPI_INFO_NULL, new) }
        })
    }

    /// Owns the communicator that `make` writes.
    fn derived(piece_bytes: usize, staging: Staging, make: impl FnOnce(&mut ffi::MPI_Comm) -> c_int) -> Mpi {
        let _calling = Calling::enter();
        let (mut rank, mut size) = (0, 0);
        // SAFETY: `make` leaves a live communicator; the other outputs are plain integers.
        let comm = unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            make(&mut comm);
            ffi::MPI_Comm_rank(comm, &mut rank);
            ffi::MPI_Comm_size(comm, &mut size);
            comm
        };
        Mpi { comm, rank: rank as usize, size: size as usize, piece_bytes, staging }
    }

    /// Whether all ranks come here within `limit`; a rank that failed alone finds that they do not. After `false` the job must
    /// be aborted.
    pub fn all_arrive_within(&self, limit: Duration) -> bool {
        let _calling = Calling::enter();
        let started = Instant::now();
        // SAFETY: the request touches no memory of ours; it is complete, or the caller aborts the job.
        unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            ffi::MPI_Ibarrier(self.comm, &mut request);
            loop {
                let mut done = 0;
                ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE);
                if done != 0 || started.elapsed() > limit {
                    return done != 0;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Posts sends of `bytes` to a rank, in pieces.
    ///
    /// # Safety
    /// `bytes` must stay alive and unchanged until the requests were waited for.
    unsafe fn post_send(&self, peer: usize, tag: c_int, bytes: &[u8], requests: &mut Requests) {
        for piece in pieces(bytes.len(), self.piece_bytes) {
            let piece = &bytes[piece];
            let (start, n) = (piece.as_ptr().cast::<c_void>(), piece.len() as c_int);
            // SAFETY: in bounds; lifetime as the caller promises.
            let handle = unsafe {
                let mut handle = ffi::RSMPI_REQUEST_NULL;
                ffi::MPI_Isend(start, n, ffi::RSMPI_UINT8_T, peer as c_int, tag, self.comm, &mut handle);
                handle
            };
            requests.push(handle, None);
        }
    }

    /// Posts receives into `bytes` from a rank, in pieces.
    ///
    /// # Safety
    /// `bytes` must stay alive and untouched until the requests were waited for.
    unsafe fn post_recv(&self, peer: usize, tag: c_int, bytes: &mut [u8], requests: &mut Requests) {
        for piece in pieces(bytes.len(), self.piece_bytes) {
            let piece = &mut bytes[piece];
            let (start, n) = (piece.as_mut_ptr().cast::<c_void>(), piece.len() as c_int);
            // SAFETY: in bounds; lifetime as the caller promises.
            let handle = unsafe {
                let mut handle = ffi::RSMPI_REQUEST_NULL;
                ffi::MPI_Irecv(start, n, ffi::RSMPI_UINT8_T, peer as c_int, tag, self.comm, &mut handle);
                handle
            };
            requests.push(handle, Some(piece.len()));
        }
    }

    /// The other ranks, beginning after this one, so that all do not send to the same rank at first.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size);
        (1..size).map(move |step| (rank + step) % size)
    }
}

/// Ranges of at most `piece_bytes` that cover `0..n_bytes`; an empty message is one empty piece.
fn pieces(n_bytes: usize, piece_bytes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let n_pieces = n_bytes.div_ceil(piece_bytes).max(1);
    (0..n_pieces).map(move |i| i * piece_bytes..((i + 1) * piece_bytes).min(n_bytes))
}

fn message_tag(tag: u32) -> c_int {
    c_int::try_from(tag).ok().and_then(|tag| tag.checked_add(1)).expect("tags are below 2^31 - 1")
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn barrier(&self) {
        let _calling = Calling::enter();
        // SAFETY: a live communicator.
        unsafe { ffi::MPI_Barrier(self.comm) };
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        let colour = c_int::try_from(colour).expect("colours are below 2^31");
        let part = Mpi::derived(self.piece_bytes, self.staging.clone(), |new| {
            // SAFETY: a live communicator.
            unsafe { ffi::MPI_Comm_split(self.comm, colour, self.rank as c_int, new) }
        });
        if part.size == 1 { Box::new(Solo::sharing(self.staging.clone())) } else { Box::new(part) }
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        assert_eq!(full.len(), shard.len() * self.size, "all-gather of {} bytes over {} ranks", shard.len(), self.size);
        let n = shard.len();
        let mut requests = Requests::default();
        let calling = Calling::enter();
        if full.len() <= self.piece_bytes {
            let (from, to, count) = (shard.as_ptr().cast::<c_void>(), full.as_mut_ptr().cast::<c_void>(), n as c_int);
            // SAFETY: `full` has room for all ranks' bytes; both borrows outlive the pending value, whose wait (or drop)
            // completes the request.
            let handle = unsafe {
                let mut handle = ffi::RSMPI_REQUEST_NULL;
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Iallgather(from, count, byte, to, count, byte, self.comm, &mut handle);
                handle
            };
            requests.push(handle, None);
        } else {
            for peer in self.others() {
                // SAFETY: as above.
                unsafe { self.post_recv(peer, COLLECTIVE_TAG, &mut full[peer * n..(peer + 1) * n], &mut requests) };
            }
            for peer in self.others() {
                // SAFETY: as above.
                unsafe { self.post_send(peer, COLLECTIVE_TAG, shard, &mut requests) };
            }
            full[self.rank * n..(self.rank + 1) * n].copy_from_slice(shard);
        }
        drop(calling);
        fault::at("collective");
        Pending::until(move || requests.wait())
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        assert_eq!(send.len() % self.size, 0, "{} bytes in {} equal pieces", send.len(), self.size);
        let n = send.len() / self.size;
        let mut room = self.staging.take(send.len());
        let mut requests = Requests::default();
        let calling = Calling::enter();
        if send.len() <= self.piece_bytes {
            let (from, to, count) = (send.as_ptr().cast::<c_void>(), room.bytes_mut().as_mut_ptr().cast::<c_void>(), n as c_int);
            // SAFETY: `room` is as long as `send`. `send` outlives the pending value; the memory of `room` stays where it is
            // when its owner moves, and is released only after the wait.
            let handle = unsafe {
                let mut handle = ffi::RSMPI_REQUEST_NULL;
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Ialltoall(from, count, byte, to, count, byte, self.comm, &mut handle);
                handle
            };
            requests.push(handle, None);
        } else {
            for peer in self.others() {
                // SAFETY: as above.
                unsafe { self.post_recv(peer, COLLECTIVE_TAG, &mut room.bytes_mut()[peer * n..(peer + 1) * n], &mut requests) };
            }
            for peer in self.others() {
                // SAFETY: as above.
                unsafe { self.post_send(peer, COLLECTIVE_TAG, &send[peer * n..(peer + 1) * n], &mut requests) };
            }
        }
        drop(calling);
        fault::at("collective");
        Pending::until(move || {
            requests.wait();
            // MPI has copied this rank's own piece too, unless the pieces travelled as messages.
            let piece = |rank: usize| {
                let from = if rank == self.rank { send } else { room.bytes() };
                &from[rank * n..(rank + 1) * n]
            };
            let pieces: Vec<&[u8]> = (0..self.size).map(piece).collect();
            finish(&pieces);
        })
    }

    fn staging(&self) -> &Staging {
        &self.staging
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        assert!(root < self.size, "broadcast from rank {root} of {}", self.size);
        let _calling = Calling::enter();
        for piece in data.chunks_mut(self.piece_bytes) {
            let (start, n) = (piece.as_mut_ptr().cast::<c_void>(), piece.len() as c_int);
            // SAFETY: in bounds; the call blocks until the memory is free again.
            unsafe { ffi::MPI_Bcast(start, n, ffi::RSMPI_UINT8_T, root as c_int, self.comm) };
        }
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        let mut requests = Requests::default();
        // What is not in host memory travels through it.
        let copy = |send: &Send| (!send.tensor.is_host()).then(|| on_host(self, send.tensor));
        let copies: Vec<Option<StagingBuffer>> = sends.iter().map(copy).collect();
        let mut foreign = Vec::new();
        let calling = Calling::enter();
        for recv in recvs {
            let (peer, tag) = (recv.peer, message_tag(recv.tag));
            if recv.tensor.is_host() {
                // SAFETY: the tensor is borrowed for as long as the pending value lives, whose wait completes the requests.
                unsafe { self.post_recv(peer, tag, recv.tensor.bytes_mut(), &mut requests) };
            } else {
                let mut room = self.staging.take(recv.tensor.n_bytes());
                // SAFETY: the memory of `room` stays where it is when its owner moves, and is released only after the wait.
                unsafe { self.post_recv(peer, tag, room.bytes_mut(), &mut requests) };
                foreign.push((recv, room));
            }
        }
        for (send, copy) in sends.iter().zip(&copies) {
            let bytes = copy.as_ref().map_or_else(|| send.tensor.bytes(), StagingBuffer::bytes);
            // SAFETY: the tensor is borrowed and the copy kept, where it is, until the requests were waited for.
            unsafe { self.post_send(send.peer, message_tag(send.tag), bytes, &mut requests) };
        }
        drop(calling);
        fault::at("collective");
        Pending::until(move || {
            requests.wait();
            drop(copies);
            foreign.into_iter().for_each(|(recv, room)| recv.fill(room.bytes()));
        })
    }
}
