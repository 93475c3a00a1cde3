//! The communicator of one rank alone: every collective is the identity or a copy, and messages go to itself.

use super::mailbox::Mailbox;
use super::ordered::on_host;
use super::{Communicator, Pending, Recv, Send, Staging, UsePieces};

/// One rank.
#[derive(Default)]
pub struct Solo {
    mailbox: Mailbox,
    staging: Staging,
}

impl Solo {
    /// A world of one rank.
    pub fn new() -> Self {
        Solo::default()
    }

    /// One rank that shares a pool of temporaries.
    pub(super) fn sharing(staging: Staging) -> Self {
        Solo { mailbox: Mailbox::default(), staging }
    }
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn barrier(&self) {}

    fn split(&self, _colour: usize) -> Box<dyn Communicator> {
        Box::new(Solo::sharing(self.staging.clone()))
    }

    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        full.copy_from_slice(shard);
        Pending::done()
    }

    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], finish: UsePieces<'a>) -> Pending<'a> {
        Pending::until(move || finish(&[send]))
    }

    fn broadcast_bytes(&self, _data: &mut [u8], root: usize) {
        assert_eq!(root, 0, "broadcast from rank {root} of 1");
    }

    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, recvs: Vec<Recv<'a>>) -> Pending<'a> {
        for send in sends {
            assert_eq!(send.peer, 0, "message to rank {} of 1", send.peer);
            self.mailbox.put(0, send.tag, on_host(self, send.tensor));
        }
        let tickets: Vec<_> = recvs.iter().map(|recv| self.mailbox.post(recv.peer, recv.tag)).collect();
        Pending::until(move || {
            for (recv, ticket) in recvs.into_iter().zip(tickets) {
                let (peer, tag) = (recv.peer, recv.tag);
                let message = self.mailbox.wait(ticket, || panic!("waiting for a message of rank {peer}, tag {tag}, never sent"));
                recv.fill(message.bytes());
            }
        })
    }

    fn staging(&self) -> &Staging {
        &self.staging
    }
}
