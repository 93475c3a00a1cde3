//! Ranks as threads of one process: mailboxes in shared memory. Nearly all parallel tests run on it. A panic on one rank wakes
//! the others, which panic too, so nothing waits for a rank that is gone.

use super::{Communicator, Pending, PendingBytes, Recv, Send, Staging};
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Where a message belongs: from and to as world ranks, the communicator's channel, and its tag there.
type Address = (usize, usize, u64, u64);

#[derive(Default)]
struct Mail {
    boxes: HashMap<Address, VecDeque<Vec<u8>>>,
    /// The first rank that panicked.
    lost_rank: Option<usize>,
}

#[derive(Default)]
struct Shared {
    mail: Mutex<Mail>,
    arrived: Condvar,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn post(&self, to: Address, message: Vec<u8>) {
        self.lock().boxes.entry(to).or_default().push_back(message);
        self.arrived.notify_all();
    }

    /// Waits for the next message of this address.
    fn receive(&self, at: Address) -> Vec<u8> {
        let mut mail = self.lock();
        loop {
            if let Some(queue) = mail.boxes.get_mut(&at) {
                let message = queue.pop_front();
                if queue.is_empty() {
                    mail.boxes.remove(&at);
                }
                if let Some(message) = message {
                    return message;
                }
            }
            if let Some(rank) = mail.lost_rank {
                drop(mail);
                panic!("rank {rank} is gone");
            }
            mail = self.arrived.wait(mail).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn lose(&self, rank: usize) {
        self.lock().lost_rank.get_or_insert(rank);
        self.arrived.notify_all();
    }
}

/// One rank's end of a communicator over threads.
pub struct Threads {
    shared: Arc<Shared>,
    /// World ranks of the members, in rank order.
    members: Vec<usize>,
    rank: usize,
    channel: u64,
    n_collectives: AtomicU64,
    n_splits: AtomicU64,
    staging: Staging,
}

/// Point-to-point tags lie below this, collectives above, each with a number of its own.
const FIRST_COLLECTIVE: u64 = 1 << 32;

impl Threads {
    fn address(&self, from: usize, to: usize, tag: u64) -> Address {
        (self.members[from], self.members[to], self.channel, tag)
    }

    fn next_collective(&self) -> u64 {
        FIRST_COLLECTIVE + self.n_collectives.fetch_add(1, Ordering::Relaxed)
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn barrier(&self) {
        let mut all = vec![0u8; self.size()];
        self.start_all_gather_bytes(&[0], &mut all).wait();
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        let n = self.n_splits.fetch_add(1, Ordering::Relaxed);
        let colours = self.gather_f64(colour as f64);
        let ours: Vec<usize> = (0..self.size()).filter(|&rank| colours[rank] == colour as f64).collect();
        let name = [self.channel.to_le_bytes(), n.to_le_bytes(), (colour as u64).to_le_bytes()].concat();
        Box::new(Threads {
            shared: Arc::clone(&self.shared),
            members: ours.iter().map(|&rank| self.members[rank]).collect(),
            rank: ours.iter().position(|&rank| rank == self.rank).expect("a rank has its own colour"),
            channel: xxhash_rust::xxh3::xxh3_64(&name),
            n_collectives: AtomicU64::new(0),
            n_splits: AtomicU64::new(0),
            staging: Staging::default(),
        })
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        assert_eq!(full.len(), shard.len() * self.size(), "all-gather of {} bytes over {} ranks", shard.len(), self.size());
        let tag = self.next_collective();
        (0..self.size()).filter(|&to| to != self.rank).for_each(|to| self.shared.post(self.address(self.rank, to, tag), shard.to_vec()));
        Pending::until(move || {
            for from in 0..self.size() {
                let piece = &mut full[from * shard.len()..][..shard.len()];
                if from == self.rank {
                    piece.copy_from_slice(shard);
                } else {
                    piece.copy_from_slice(&self.shared.receive(self.address(from, self.rank, tag)));
                }
            }
        })
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], mut room: Vec<u8>) -> PendingBytes<'a> {
        assert_eq!(send.len(), room.len());
        assert_eq!(send.len() % self.size(), 0, "{} bytes in {} equal pieces", send.len(), self.size());
        let (tag, n) = (self.next_collective(), send.len() / self.size());
        for to in (0..self.size()).filter(|&to| to != self.rank) {
            self.shared.post(self.address(self.rank, to, tag), send[to * n..][..n].to_vec());
        }
        PendingBytes::until(move || {
            for from in 0..self.size() {
                let piece = &mut room[from * n..][..n];
                if from == self.rank {
                    piece.copy_from_slice(&send[from * n..][..n]);
                } else {
                    piece.copy_from_slice(&self.shared.receive(self.address(from, self.rank, tag)));
                }
            }
            room
        })
    }

    fn staging(&self) -> &Staging {
        &self.staging
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        let tag = self.next_collective();
        if self.rank == root {
            (0..self.size()).filter(|&to| to != root).for_each(|to| self.shared.post(self.address(root, to, tag), data.to_vec()));
        } else {
            data.copy_from_slice(&self.shared.receive(self.address(root, self.rank, tag)));
        }
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        for send in sends {
            self.shared.post(self.address(self.rank, send.peer, u64::from(send.tag)), send.tensor.bytes().to_vec());
        }
        Pending::until(move || {
            for recv in recvs {
                let message = self.shared.receive(self.address(recv.peer, self.rank, u64::from(recv.tag)));
                let room = recv.tensor.bytes_mut();
                assert_eq!(
                    room.len(),
                    message.len(),
                    "message of {} bytes from rank {} for room of {}",
                    message.len(),
                    recv.peer,
                    room.len()
                );
                room.copy_from_slice(&message);
            }
        })
    }
}

/// Runs `rank_main` on `n` ranks and returns their results in rank order. The first panic is raised again here, after all
/// ranks have ended.
pub fn run<T: std::marker::Send>(n: usize, rank_main: impl Fn(Box<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let shared = Arc::new(Shared::default());
    let run_rank = |rank: usize| {
        let world = Threads {
            shared: Arc::clone(&shared),
            members: (0..n).collect(),
            rank,
            channel: 0,
            n_collectives: AtomicU64::new(0),
            n_splits: AtomicU64::new(0),
            staging: Staging::default(),
        };
        let result = catch_unwind(AssertUnwindSafe(|| rank_main(Box::new(world))));
        if result.is_err() {
            shared.lose(rank);
        }
        result
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..n)
            .map(|rank| {
                scope.spawn({
                    let run_rank = &run_rank;
                    move || run_rank(rank)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("panics were caught")).collect()
    });
    let lost = shared.lock().lost_rank;
    let mut results: Vec<Result<T, _>> = results;
    if let Some(rank) = lost {
        match results.swap_remove(rank) {
            Err(panic) => resume_unwind(panic),
            Ok(_) => unreachable!("the lost rank panicked"),
        }
    }
    results.into_iter().map(|result| result.unwrap_or_else(|panic| resume_unwind(panic))).collect()
}
