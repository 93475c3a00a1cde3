//! Ranks as threads of one process: what nearly all parallel tests run on. A message is copied once into a pooled buffer
//! when it is posted and read from there by whoever waits for it, so `start_*` never blocks.
//!
//! A rank that panics, or that returns while others still wait for it, ends all of them: a mistake shows as a message, not
//! as a test that hangs. Knows nothing of processes.

use super::mailbox::Mailbox;
use super::ordered::on_host;
use super::solo::Solo;
use super::{Communicator, Pending, Recv, Send, Staging, StagingBuffer, UsePieces};
use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};

/// Runs `rank_main` on `n` ranks at once and returns their results in rank order. When a rank panics the others are ended
/// too, and this panics with the first message and its rank.
pub fn run<T: std::marker::Send>(n: usize, rank_main: impl Fn(Box<dyn Communicator>) -> T + Sync) -> Vec<T> {
    assert!(n > 0, "a world of no ranks");
    let hub = Arc::new(Hub::new(n));
    let world = Group::new(&hub, (0..n).collect());
    let rank_main = &rank_main;
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let spawn = |rank: usize| {
            let (hub, world) = (Arc::clone(&hub), Arc::clone(&world));
            let body = move || {
                let comm = Threads::new(world, rank, Staging::default());
                let result = catch_unwind(AssertUnwindSafe(|| rank_main(Box::new(comm))));
                hub.leave(rank, result)
            };
            std::thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, body).expect("a thread for each rank")
        };
        let threads: Vec<_> = (0..n).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught within")).collect()
    });
    if let Some((rank, payload)) = lock(&hub.first_panic).take() {
        panic!("rank {rank} of {n}: {}", panic_text(payload.as_ref()));
    }
    results.into_iter().map(|result| result.expect("no rank panicked")).collect()
}

fn panic_text(payload: &(dyn Any + std::marker::Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("panic without a text")
}

/// What a rank is ended with when another one has panicked.
struct Ended;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half changed by a panic while waiting, so a poisoned lock is as good as another.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What all groups of one world share.
struct Hub {
    /// Whether each rank has returned or panicked.
    left: Vec<AtomicBool>,
    ended: AtomicBool,
    first_panic: Mutex<FirstPanic>,
    groups: Mutex<Vec<Weak<Group>>>,
}

impl Hub {
    fn new(n: usize) -> Hub {
        let left = (0..n).map(|_| AtomicBool::new(false)).collect();
        Hub { left, ended: AtomicBool::new(false), first_panic: Mutex::new(None), groups: Mutex::new(Vec::new()) }
    }

    fn leave<T>(&self, rank: usize, result: std::thread::Result<T>) -> Option<T> {
        let result = match result {
            Ok(value) => Some(value),
            Err(payload) => {
                if !payload.is::<Ended>() {
                    lock(&self.first_panic).get_or_insert((rank, payload));
                }
                self.ended.store(true, Ordering::SeqCst);
                None
            }
        };
        self.left[rank].store(true, Ordering::SeqCst);
        let groups: Vec<Arc<Group>> = lock(&self.groups).iter().filter_map(Weak::upgrade).collect();
        groups.iter().for_each(|group| group.wake());
        result
    }
}

/// One collective call of a group: the n-th call of each rank belong together.
struct Round {
    /// What the first rank to arrive has called; all others must call the same.
    call: Call,
    posted: Vec<Option<Arc<StagingBuffer>>>,
    n_posted: usize,
    n_finished: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    Barrier,
    Split,
    AllGather { shard_bytes: usize },
    AllToAll { bytes: usize },
    Broadcast { root: usize, bytes: usize },
}

/// By round and colour: a group, and how many of its ranks have fetched it.
type Children = HashMap<(u64, u64), (Arc<Group>, usize)>;

/// The first rank that panicked, and with what.
type FirstPanic = Option<(usize, Box<dyn Any + std::marker::Send>)>;

/// What the ranks of one communicator share.
struct Group {
    hub: Arc<Hub>,
    /// World ranks of its ranks.
    members: Vec<usize>,
    rounds: Mutex<HashMap<u64, Round>>,
    complete: Condvar,
    mailboxes: Vec<Mailbox>,
    /// Groups split from this one, until all of their ranks have fetched them.
    children: Mutex<Children>,
}

impl Group {
    fn new(hub: &Arc<Hub>, members: Vec<usize>) -> Arc<Group> {
        let mailboxes = members.iter().map(|_| Mailbox::default()).collect();
        let (rounds, children) = (Mutex::default(), Mutex::default());
        let group = Arc::new(Group { hub: Arc::clone(hub), members, rounds, complete: Condvar::new(), mailboxes, children });
        let mut groups = lock(&hub.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(&group));
        group
    }

    fn wake(&self) {
        drop(lock(&self.rounds));
        self.complete.notify_all();
        self.mailboxes.iter().for_each(Mailbox::wake);
    }

    /// Panics when rank `on` will never come. Called with the lock held under which it would have posted: what it posted
    /// before it left is seen first.
    fn check(&self, on: usize, what: impl Fn() -> String) {
        if self.hub.ended.load(Ordering::SeqCst) {
            // Not a panic of this rank: the hook stays silent, the first message is the one that is read.
            resume_unwind(Box::new(Ended));
        }
        let world_rank = self.members[on];
        let left = self.hub.left[world_rank].load(Ordering::SeqCst);
        assert!(!left, "{}: rank {on} of {} (world rank {world_rank}) has returned already", what(), self.members.len());
    }

    fn post(&self, number: u64, rank: usize, call: Call, message: Option<StagingBuffer>) {
        let size = self.members.len();
        let mut rounds = lock(&self.rounds);
        let fresh = || Round { call, posted: vec![None; size], n_posted: 0, n_finished: 0 };
        let round = rounds.entry(number).or_insert_with(fresh);
        let first = round.call;
        round.posted[rank] = message.map(Arc::new);
        round.n_posted += 1;
        let wake = round.n_posted == size || matches!(call, Call::Broadcast { root, .. } if root == rank);
        drop(rounds);
        assert!(call == first, "collective {number} of a group of {size}: rank {rank} calls {call:?}, another rank {first:?}");
        if wake {
            self.complete.notify_all();
        }
    }

    /// Blocks until all ranks have posted, for a broadcast the root, and returns what they posted.
    fn finish(&self, number: u64, needs: impl Fn(&Round) -> Option<usize>) -> Vec<Option<Arc<StagingBuffer>>> {
        let mut rounds = lock(&self.rounds);
        loop {
            let round = rounds.get_mut(&number).expect("a round stays until all ranks have finished it");
            let Some(missing) = needs(round) else {
                let posted = round.posted.clone();
                round.n_finished += 1;
                if round.n_finished == self.members.len() {
                    rounds.remove(&number);
                }
                return posted;
            };
            let call = round.call;
            self.check(missing, || format!("waiting in {call:?}"));
            rounds = self.complete.wait(rounds).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// All ranks' bytes of this round, in rank order.
    fn finish_all(&self, number: u64) -> Vec<Arc<StagingBuffer>> {
        let posted = self.finish(number, |round| round.posted.iter().position(Option::is_none));
        posted.into_iter().map(|message| message.expect("all have posted")).collect()
    }
}

/// One rank's end of a group.
struct Threads {
    group: Arc<Group>,
    rank: usize,
    n_rounds: AtomicU64,
    staging: Staging,
}

impl Threads {
    fn new(group: Arc<Group>, rank: usize, staging: Staging) -> Threads {
        Threads { group, rank, n_rounds: AtomicU64::new(0), staging }
    }

    fn copy(&self, bytes: &[u8]) -> StagingBuffer {
        let mut message = self.staging.take(bytes.len());
        message.bytes_mut().copy_from_slice(bytes);
        message
    }

    fn start(&self, call: Call, bytes: &[u8]) -> u64 {
        let number = self.n_rounds.fetch_add(1, Ordering::Relaxed);
        self.group.post(number, self.rank, call, Some(self.copy(bytes)));
        number
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.members.len()
    }

    fn barrier(&self) {
        let number = self.start(Call::Barrier, &[]);
        self.group.finish_all(number);
    }

    fn split(&self, colour: usize) -> Box<dyn Communicator> {
        let number = self.start(Call::Split, &(colour as u64).to_le_bytes());
        let colours = self.group.finish_all(number);
        let colour = (colour as u64).to_le_bytes();
        let ranks: Vec<usize> = (0..self.size()).filter(|&rank| colours[rank].bytes() == colour).collect();
        if ranks.len() == 1 {
            return Box::new(Solo::sharing(self.staging.clone()));
        }
        let rank = ranks.iter().position(|&rank| rank == self.rank).expect("a rank has its own colour");
        let members: Vec<usize> = ranks.iter().map(|&rank| self.group.members[rank]).collect();
        let key = (number, u64::from_le_bytes(colour));
        let mut children = lock(&self.group.children);
        let (group, n_fetched) = children.entry(key).or_insert_with(|| (Group::new(&self.group.hub, members), 0));
        let group = Arc::clone(group);
        *n_fetched += 1;
        if *n_fetched == ranks.len() {
            children.remove(&key);
        }
        Box::new(Threads::new(group, rank, self.staging.clone()))
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        assert_eq!(full.len(), self.size() * shard.len(), "all-gather over {} ranks", self.size());
        let number = self.start(Call::AllGather { shard_bytes: shard.len() }, shard);
        Pending::until(move || {
            let n = shard.len();
            for (rank, message) in self.group.finish_all(number).iter().enumerate() {
                full[rank * n..(rank + 1) * n].copy_from_slice(message.bytes());
            }
        })
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        assert_eq!(send.len() % self.size(), 0, "all-to-all over {} ranks", self.size());
        let n = send.len() / self.size();
        let number = self.start(Call::AllToAll { bytes: send.len() }, send);
        Pending::until(move || {
            let messages = self.group.finish_all(number);
            let mine = self.rank * n..(self.rank + 1) * n;
            let pieces: Vec<&[u8]> = messages.iter().map(|message| &message.bytes()[mine.clone()]).collect();
            finish(&pieces);
        })
    }

    fn broadcast_bytes(&self, data: &mut [u8], root: usize) {
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        let number = self.n_rounds.fetch_add(1, Ordering::Relaxed);
        let message = (self.rank == root).then(|| self.copy(data));
        self.group.post(number, self.rank, Call::Broadcast { root, bytes: data.len() }, message);
        let posted = self.group.finish(number, |round| round.posted[root].is_none().then_some(root));
        if self.rank != root {
            data.copy_from_slice(posted[root].as_ref().expect("the root has posted").bytes());
        }
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        for send in sends {
            self.group.mailboxes[send.peer].put(self.rank, send.tag, on_host(self, send.tensor));
        }
        let mine = &self.group.mailboxes[self.rank];
        let tickets: Vec<_> = recvs.iter().map(|recv| mine.post(recv.peer, recv.tag)).collect();
        Pending::until(move || {
            for (recv, ticket) in recvs.into_iter().zip(tickets) {
                let (peer, tag) = (recv.peer, recv.tag);
                let message = mine.wait(ticket, || self.group.check(peer, || format!("waiting for a message with tag {tag}")));
                recv.fill(message.bytes());
            }
        })
    }

    fn staging(&self) -> &Staging {
        &self.staging
    }
}
