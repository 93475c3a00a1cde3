//! One rank: every collective is the identity.

use super::{Communicator, Pending, PendingBytes, Recv, Send, Staging};

/// The world of a single rank.
#[derive(Default)]
pub struct Solo {
    staging: Staging,
}

impl Solo {
    /// A world of one.
    pub fn new() -> Solo {
        Solo::default()
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
        Box::new(Solo::new())
    }
    fn start_all_gather_bytes<'a>(&'a self, shard: &'a [u8], full: &'a mut [u8]) -> Pending<'a> {
        full.copy_from_slice(shard);
        Pending::done()
    }
    fn start_all_to_all_bytes<'a>(&'a self, send: &'a [u8], mut room: Vec<u8>) -> PendingBytes<'a> {
        room.copy_from_slice(send);
        PendingBytes::until(move || room)
    }
    fn staging(&self) -> &Staging {
        &self.staging
    }
    fn broadcast_bytes(&self, _data: &mut [u8], root: usize) {
        assert_eq!(root, 0, "a world of one has rank 0 only");
    }
    fn start_group<'a>(&'a self, sends: Vec<Send<'a>>, mut recvs: Vec<Recv<'a>>) -> Pending<'a> {
        // A rank may write to itself: messages of one tag arrive in the order they were sent.
        assert_eq!(sends.len(), recvs.len(), "a world of one can only send to itself what it receives in the same group");
        for send in &sends {
            let to = recvs.iter().position(|recv| recv.tag == send.tag).expect("every send has its receive");
            recvs.remove(to).tensor.bytes_mut().copy_from_slice(send.tensor.bytes());
        }
        Pending::done()
    }
}
