//! Messages to one rank inside one process: by sender and tag, each in the order it was sent. A receive takes its number
//! when it is posted, so receives may be waited for in any order. Knows nothing of groups.

use super::StagingBuffer;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard};

/// The messages of one pair of ranks and one tag.
#[derive(Default)]
struct Channel {
    n_sent: u64,
    n_posted: u64,
    waiting: BTreeMap<u64, StagingBuffer>,
}

type Channels = HashMap<(usize, u32), Channel>;

/// The messages to one rank.
#[derive(Default)]
pub struct Mailbox {
    channels: Mutex<Channels>,
    arrived: Condvar,
}

/// A receive that was posted.
pub struct Ticket {
    /// Sending rank.
    pub from: usize,
    /// Tag.
    pub tag: u32,
    number: u64,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Channels> {
        // A rank that panics while it waits leaves whole channels behind, so a poisoned lock is as good as another.
        self.channels.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Delivers a message.
    pub fn put(&self, from: usize, tag: u32, message: StagingBuffer) {
        let mut channels = self.lock();
        let channel = channels.entry((from, tag)).or_default();
        let number = channel.n_sent;
        channel.n_sent += 1;
        channel.waiting.insert(number, message);
        self.arrived.notify_all();
    }

    /// Posts a receive: the next message on this channel that no earlier receive has taken.
    pub fn post(&self, from: usize, tag: u32) -> Ticket {
        let mut channels = self.lock();
        let channel = channels.entry((from, tag)).or_default();
        channel.n_posted += 1;
        Ticket { from, tag, number: channel.n_posted - 1 }
    }

    /// Blocks until the message is there. `check` is called before each sleep and panics when waiting is in vain.
    pub fn wait(&self, ticket: Ticket, check: impl Fn()) -> StagingBuffer {
        let key = (ticket.from, ticket.tag);
        let mut channels = self.lock();
        loop {
            let channel = channels.get_mut(&key).expect("a channel stays while a receive is posted");
            if let Some(message) = channel.waiting.remove(&ticket.number) {
                // Tags may be as many as micro-batches: a channel at rest is forgotten.
                if channel.waiting.is_empty() && channel.n_sent == channel.n_posted && ticket.number + 1 == channel.n_posted {
                    channels.remove(&key);
                }
                return message;
            }
            check();
            channels = self.arrived.wait(channels).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Wakes a waiting receive so that it calls its `check`.
    pub fn wake(&self) {
        let _held = self.lock();
        self.arrived.notify_all();
    }
}
