//! Communicators over MPI (OpenMPI through the crate `mpi`). Byte primitives only; sums are made in `ordered`. Errors inside
//! MPI end the job (MPI_ERRORS_ARE_FATAL is the default).
//!
//! All calls of one rank come from one thread at a time (MPI_THREAD_SERIALIZED). Counts in MPI are i32, so long messages
//! travel in pieces; messages between two ranks with one tag do not overtake each other, which keeps the pieces in order.

use super::{Communicator, Pending, PendingBytes, Recv, Send, Staging};
use mpi::ffi;
use std::os::raw::{c_int, c_void};

/// Longest single message.
const PIECE_BYTES: usize = 1 << 30;
/// Tag of collectives that travel as messages; schedules use smaller ones.
const COLLECTIVE_TAG: c_int = c_int::MAX - 1;

/// One rank's end of an MPI communicator. Freed when dropped, which must be before MPI is finalised.
pub struct Mpi {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    piece_bytes: usize,
    staging: Staging,
}

// SAFETY: the handle is a pointer to an object that OpenMPI guards itself; MPI is initialised with MPI_THREAD_SERIALIZED or
// more and a rank calls it from one thread at a time.
unsafe impl std::marker::Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Drop for Mpi {
    fn drop(&mut self) {
        // SAFETY: made by MPI_Comm_split or MPI_Comm_dup, freed once, before MPI_Finalize (`runtime` owns the order).
        unsafe { ffi::MPI_Comm_free(&mut self.comm) };
    }
}

/// Requests under way. Waited for before the memory they touch is released.
struct Requests(Vec<ffi::MPI_Request>);

impl Requests {
    fn wait(mut self) {
        let n = self.0.len() as c_int;
        // SAFETY: `n` live requests of this process; statuses are not asked for.
        unsafe { ffi::MPI_Waitall(n, self.0.as_mut_ptr(), ffi::RSMPI_STATUSES_IGNORE) };
    }
}

impl Mpi {
    /// A duplicate of MPI_COMM_WORLD, so that our messages never meet those of others.
    pub fn world() -> Mpi {
        // SAFETY: MPI is initialised (the caller holds the universe); the outputs are plain values.
        unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm);
            Mpi::owned(comm, PIECE_BYTES)
        }
    }

    /// The same ranks with messages cut at another length, to test the cutting.
    pub fn with_pieces(&self, piece_bytes: usize) -> Mpi {
        // SAFETY: `self.comm` is a live communicator.
        unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            ffi::MPI_Comm_dup(self.comm, &mut comm);
            Mpi::owned(comm, piece_bytes)
        }
    }

    /// The ranks of this one's machine.
    pub fn on_this_machine(&self) -> Mpi {
        // SAFETY: `self.comm` is a live communicator; the result is owned here.
        unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            ffi::MPI_Comm_split_type(self.comm, ffi::RSMPI_COMM_TYPE_SHARED, self.rank as c_int, ffi::RSMPI_INFO_NULL, &mut comm);
            Mpi::owned(comm, self.piece_bytes)
        }
    }

    /// Takes over a communicator. Caller: `comm` is live and owned by nobody else.
    unsafe fn owned(comm: ffi::MPI_Comm, piece_bytes: usize) -> Mpi {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a live communicator; the outputs are plain integers.
        unsafe {
            ffi::MPI_Comm_rank(comm, &mut rank);
            ffi::MPI_Comm_size(comm, &mut size);
        }
        Mpi { comm, rank: rank as usize, size: size as usize, piece_bytes, staging: Staging::default() }
    }

    /// Whether all ranks have come here within `seconds`; a rank that failed alone finds that they have not.
    pub fn all_arrive_within(&self, seconds: f64) -> bool {
        let started = std::time::Instant::now();
        // SAFETY: the request lives until it is complete or the job is aborted by the caller.
        unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            ffi::MPI_Ibarrier(self.comm, &mut request);
            loop {
                let mut done = 0;
                ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE);
                if done != 0 {
                    return true;
                }
                if started.elapsed().as_secs_f64() > seconds {
                    return false;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }

    /// Posts sends of `bytes` to a rank.
    ///
    /// # Safety
    /// `bytes` must stay alive and unchanged until the requests were waited for.
    unsafe fn post_send(&self, peer: usize, tag: c_int, bytes: &[u8], requests: &mut Requests) {
        for piece in bytes.chunks(self.piece_bytes) {
            // SAFETY: a constant of the library.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            let start = piece.as_ptr().cast::<c_void>();
            // SAFETY: in bounds; lifetime as the caller promises.
            unsafe { ffi::MPI_Isend(start, piece.len() as c_int, ffi::RSMPI_UINT8_T, peer as c_int, tag, self.comm, &mut request) };
            requests.0.push(request);
        }
    }

    /// Posts receives into `bytes` from a rank.
    ///
    /// # Safety
    /// `bytes` must stay alive and untouched until the requests were waited for.
    unsafe fn post_recv(&self, peer: usize, tag: c_int, bytes: &mut [u8], requests: &mut Requests) {
        for piece in bytes.chunks_mut(self.piece_bytes) {
            // SAFETY: a constant of the library.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            let start = piece.as_mut_ptr().cast::<c_void>();
            // SAFETY: in bounds; lifetime as the caller promises.
            unsafe { ffi::MPI_Irecv(start, piece.len() as c_int, ffi::RSMPI_UINT8_T, peer as c_int, tag, self.comm, &mut request) };
            requests.0.push(request);
        }
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn barrier(&self) {
        // SAFETY: a live communicator.
        unsafe { ffi::MPI_Barrier(self.comm) };
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        // SAFETY: a live communicator; the result is owned by the new value.
        let part = unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            ffi::MPI_Comm_split(self.comm, colour as c_int, self.rank as c_int, &mut comm);
            Mpi::owned(comm, self.piece_bytes)
        };
        Box::new(part)
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        assert_eq!(full.len(), shard.len() * self.size, "all-gather of {} bytes over {} ranks", shard.len(), self.size);
        let mut requests = Requests(Vec::new());
        if shard.is_empty() {
            return Pending::done();
        }
        // SAFETY: both borrows outlive the pending value, whose wait (or drop) completes the requests.
        unsafe {
            if full.len() <= self.piece_bytes {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let (from, to, n) = (shard.as_ptr().cast::<c_void>(), full.as_mut_ptr().cast::<c_void>(), shard.len() as c_int);
                ffi::MPI_Iallgather(from, n, ffi::RSMPI_UINT8_T, to, n, ffi::RSMPI_UINT8_T, self.comm, &mut request);
                requests.0.push(request);
            } else {
                for (peer, room) in full.chunks_mut(shard.len()).enumerate() {
                    if peer == self.rank {
                        room.copy_from_slice(shard);
                    } else {
                        self.post_recv(peer, COLLECTIVE_TAG, room, &mut requests);
                        self.post_send(peer, COLLECTIVE_TAG, shard, &mut requests);
                    }
                }
            }
        }
        Pending::until(move || requests.wait())
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], mut room: Vec<u8>) -> PendingBytes<'a> {
        assert_eq!(send.len(), room.len());
        assert_eq!(send.len() % self.size, 0, "{} bytes in {} equal pieces", send.len(), self.size);
        let n = send.len() / self.size;
        let mut requests = Requests(Vec::new());
        // SAFETY: `send` outlives the pending value; the memory of `room` does not move when the Vec does, and both are released
        // only after the wait.
        unsafe {
            if n > 0 && send.len() <= self.piece_bytes {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let (from, to) = (send.as_ptr().cast::<c_void>(), room.as_mut_ptr().cast::<c_void>());
                ffi::MPI_Ialltoall(from, n as c_int, ffi::RSMPI_UINT8_T, to, n as c_int, ffi::RSMPI_UINT8_T, self.comm, &mut request);
                requests.0.push(request);
            } else if n > 0 {
                for peer in 0..self.size {
                    let (from, to) = (&send[peer * n..][..n], &mut room[peer * n..][..n]);
                    if peer == self.rank {
                        to.copy_from_slice(from);
                    } else {
                        self.post_recv(peer, COLLECTIVE_TAG, to, &mut requests);
                        self.post_send(peer, COLLECTIVE_TAG, from, &mut requests);
                    }
                }
            }
        }
        PendingBytes::until(move || {
            requests.wait();
            room
        })
    }

    fn staging(&self) -> &Staging {
        &self.staging
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        for piece in data.chunks_mut(self.piece_bytes) {
            let start = piece.as_mut_ptr().cast::<c_void>();
            // SAFETY: in bounds; the call blocks until the memory is free again.
            unsafe { ffi::MPI_Bcast(start, piece.len() as c_int, ffi::RSMPI_UINT8_T, root as c_int, self.comm) };
        }
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        let mut requests = Requests(Vec::new());
        let tag = |tag: u32| c_int::try_from(tag).expect("tags are below 2^31");
        // SAFETY: the tensors are borrowed for as long as the pending value lives, whose wait completes the requests.
        unsafe {
            for recv in recvs {
                self.post_recv(recv.peer, tag(recv.tag), recv.tensor.bytes_mut(), &mut requests);
            }
            for send in sends {
                self.post_send(send.peer, tag(send.tag), send.tensor.bytes(), &mut requests);
            }
        }
        Pending::until(move || requests.wait())
    }
}
