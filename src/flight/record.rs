//! One record of the ring, and what it is packed into: 16 words of 64 bits.
//!
//! ```text
//! word 0   number, from 1; 0 while it is written
//!      1   start, 2 begin of the blocking wait, 3 end: nanoseconds since 1970, 0 not yet
//!      4   nanoseconds that the rank was blocked in it
//!      5   bytes          6   sequence in its group          7   step
//!      8   byte 0 operation, 1 group, 2 phase; bytes 4-7 chunk
//!      9   bytes 0-3 micro-batch, 4-7 peer
//!      10  bytes 0-3 tag
//!      11-15  name, UTF-8, padded with zeros
//! ```
//! A chunk, micro-batch, peer or tag that there is none of is 2^32 - 1.

use std::fmt;

/// Words of a record.
pub(super) const WORDS: usize = 16;
/// Bytes of a name.
const NAME_BYTES: usize = 40;
const NONE: u32 = u32::MAX;

/// Defines an enum that is stored as one byte, with its text and the list of all.
macro_rules! coded {
    ($(#[$meta:meta])* $name:ident, $all:ident, [$($(#[$doc:meta])* $variant:ident = $text:literal),* $(,)?]) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $name { $($(#[$doc])* $variant),* }

        /// All of them, in the order of their codes.
        pub const $all: &[$name] = &[$($name::$variant),*];

        impl $name {
            /// As people read it.
            pub fn text(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }

            fn from_code(code: u8) -> Option<$name> {
                $all.get(usize::from(code)).copied()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.text())
            }
        }
    };
}

coded!(
    /// What was done.
    Op, OPS, [
        /// Work of a phase; no communication.
        Work = "work",
        /// All ranks wait for all.
        Barrier = "barrier",
        /// New communicators.
        Split = "split",
        /// Shards of all to all.
        AllGather = "all-gather",
        /// A piece of each to each.
        AllToAll = "all-to-all",
        /// The root's bytes to all.
        Broadcast = "broadcast",
        /// The sum or maximum to all.
        AllReduce = "all-reduce",
        /// A part of the sum to each.
        ReduceScatter = "reduce-scatter",
        /// One number of each to all.
        GatherNumbers = "gather of numbers",
        /// Bytes of different lengths of each to all.
        GatherBytes = "gather of bytes",
        /// A message to a peer.
        Send = "send",
        /// A message from a peer.
        Recv = "receive",
    ]
);

coded!(
    /// Over which ranks.
    Group, GROUPS, [
        /// All ranks.
        World = "world",
        /// A tensor-parallel group.
        Tp = "tp",
        /// A data-parallel group.
        Dp = "dp",
        /// A pipeline.
        Pp = "pp",
        /// Any other, whose ranks the layout does not tell.
        Other = "other",
    ]
);

coded!(
    /// What a rank was busy with, so what a communication was for.
    Phase, PHASES, [
        /// Anything else.
        Other = "other",
        /// Opening data, loading or initialising weights.
        Start = "start",
        /// Reading the samples of a step.
        Data = "data",
        /// A pass over the pipeline, outside of its actions: its messages and its bubble.
        Pipeline = "pipeline",
        /// Forward through a chunk.
        Forward = "forward",
        /// Backward through a chunk.
        Backward = "backward",
        /// Reducing gradients over the replicas.
        Reduce = "reduce",
        /// Norm of the gradient, update, new weights to all replicas.
        Optimizer = "optimizer",
        /// Held-out loss.
        HeldOut = "held-out",
        /// Writing a checkpoint.
        Save = "save",
        /// Comparing replicas.
        Compare = "compare",
    ]
);

impl Op {
    /// Whether all ranks of the group take part, in the same order.
    pub fn is_collective(self) -> bool {
        !matches!(self, Op::Work | Op::Send | Op::Recv)
    }
}

/// A tensor's name or what a communication is for: at most 40 bytes, longer ones are cut at their beginning.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Name(pub(super) [u64; NAME_BYTES / 8]);

impl Name {
    /// Keeps the end of a longer text: `..attention.qkv.weight` tells more than `layers.17.`.
    pub fn new(text: &str) -> Name {
        let skipped = text.len().saturating_sub(NAME_BYTES);
        let start = (skipped..=text.len()).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
        let mut bytes = [0u8; NAME_BYTES];
        bytes[..text.len() - start].copy_from_slice(&text.as_bytes()[start..]);
        Name::from_bytes(&bytes)
    }

    /// The shape of a tensor, `[512, 256] bf16`: what a communication without a name is known by.
    pub fn of_shape(dims: &[usize], dtype: &str) -> Name {
        use std::io::Write;
        let mut bytes = [0u8; NAME_BYTES];
        let mut room = &mut bytes[..];
        // A text that does not fit is cut.
        let _ = match dims {
            [n] => write!(room, "[{n}] {dtype}"),
            [rows, row_len] => write!(room, "[{rows}, {row_len}] {dtype}"),
            more => write!(room, "{more:?} {dtype}"),
        };
        Name::from_bytes(&bytes)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0[0] == 0
    }

    fn from_bytes(bytes: &[u8; NAME_BYTES]) -> Name {
        let mut words = [0; NAME_BYTES / 8];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().expect("8 bytes"));
        }
        Name(words)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).take_while(|&byte| byte != 0).collect();
        f.write_str(&String::from_utf8_lossy(&bytes))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

/// What is known when an operation begins.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// What.
    pub op: Op,
    /// Over which ranks.
    pub group: Group,
    /// Bytes that this rank contributes or receives, the larger.
    pub bytes: u64,
    /// Of a collective: the how manieth of its group, from 1. Of a message: the how manieth in this direction with this peer.
    pub sequence: u64,
    /// The other rank of a message, the root of a broadcast: its place in the group.
    pub peer: Option<u32>,
    /// Tag of a message.
    pub tag: Option<u32>,
    /// Used when the recorder was not given a name.
    pub name: Name,
}

/// A record as it is read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Record {
    /// From 1, one more than the record before it.
    pub number: u64,
    /// Begin, nanoseconds since 1970.
    pub start_ns: u64,
    /// When the rank began to wait for it; 0: not yet.
    pub wait_ns: u64,
    /// End; 0: not yet.
    pub end_ns: u64,
    /// How long the rank was blocked in it.
    pub exposed_ns: u64,
    /// See [`Event`].
    pub bytes: u64,
    /// See [`Event`].
    pub sequence: u64,
    /// Optimizer step under way, from 1; 0: none.
    pub step: u64,
    /// What.
    pub op: Op,
    /// Over which ranks.
    pub group: Group,
    /// For what.
    pub phase: Phase,
    /// Chunk of the model on this stage.
    pub chunk: Option<u32>,
    /// Micro-batch.
    pub micro: Option<u32>,
    /// See [`Event`].
    pub peer: Option<u32>,
    /// See [`Event`].
    pub tag: Option<u32>,
    /// The tensor, or what for.
    pub name: Name,
}

fn pair(low: Option<u32>, high: Option<u32>) -> u64 {
    u64::from(low.unwrap_or(NONE)) | u64::from(high.unwrap_or(NONE)) << 32
}

fn unpair(word: u64) -> (Option<u32>, Option<u32>) {
    let some = |half: u32| (half != NONE).then_some(half);
    (some(word as u32), some((word >> 32) as u32))
}

/// Of all words but the times that change, and of itself.
fn checksum(words: &[u64; WORDS]) -> u32 {
    let mut fixed = *words;
    (fixed[2], fixed[3], fixed[4]) = (0, 0, 0);
    fixed[10] &= u64::from(u32::MAX);
    xxhash_rust::xxh3::xxh3_64(bytemuck::cast_slice(&fixed)) as u32
}

impl Record {
    /// The words, the number first.
    pub(super) fn pack(&self) -> [u64; WORDS] {
        let codes = u64::from(self.op as u8) | u64::from(self.group as u8) << 8 | u64::from(self.phase as u8) << 16;
        let mut words = [0; WORDS];
        words[..11].copy_from_slice(&[
            self.number,
            self.start_ns,
            self.wait_ns,
            self.end_ns,
            self.exposed_ns,
            self.bytes,
            self.sequence,
            self.step,
            codes | pair(Some(0), self.chunk),
            pair(self.micro, self.peer),
            pair(self.tag, Some(0)),
        ]);
        words[11..].copy_from_slice(&self.name.0);
        words[10] |= u64::from(checksum(&words)) << 32;
        words
    }

    /// None for an empty or damaged record. (The times that are set after a record was written are not under its checksum.)
    pub(super) fn unpack(words: &[u64; WORDS]) -> Option<Record> {
        if (words[10] >> 32) as u32 != checksum(words) {
            return None;
        }
        let [op, group, phase, ..] = words[8].to_le_bytes();
        let (micro, peer) = unpair(words[9]);
        Some(Record {
            number: Some(words[0]).filter(|&number| number > 0)?,
            start_ns: words[1],
            wait_ns: words[2],
            end_ns: words[3],
            exposed_ns: words[4],
            bytes: words[5],
            sequence: words[6],
            step: words[7],
            op: Op::from_code(op)?,
            group: Group::from_code(group)?,
            phase: Phase::from_code(phase)?,
            chunk: unpair(words[8]).1,
            micro,
            peer,
            tag: unpair(words[10]).0,
            name: Name(words[11..].try_into().expect("5 words")),
        })
    }

    /// Communication that is not complete.
    pub fn is_open(&self) -> bool {
        self.op != Op::Work && self.end_ns == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field survives packing, with the largest values and without the optional ones: a ring is read after a crash by
    /// another program, which has nothing else to go by.
    #[test]
    fn records_survive_packing() {
        for (i, (&op, &group)) in OPS.iter().flat_map(|op| GROUPS.iter().map(move |group| (op, group))).enumerate() {
            let some = |n: u32| (i % 2 == 0).then_some(n);
            let record = Record {
                number: u64::MAX - i as u64,
                start_ns: 1,
                wait_ns: 2,
                end_ns: 3,
                exposed_ns: 4,
                bytes: u64::MAX,
                sequence: 6,
                step: 7,
                op,
                group,
                phase: PHASES[i % PHASES.len()],
                chunk: some(8),
                micro: some(u32::MAX - 1),
                peer: some(9),
                tag: some(0),
                name: Name::new("layers.95.attention.qkv.weight"),
            };
            assert_eq!(Record::unpack(&record.pack()), Some(record));
        }
        assert_eq!(Record::unpack(&[0; WORDS]), None, "never written");
        let mut damaged = [1; WORDS];
        damaged[8] = u64::MAX;
        assert_eq!(Record::unpack(&damaged), None, "a code of no operation");
    }

    /// Long names keep their end, and are cut between characters.
    #[test]
    fn names_are_cut_at_their_beginning() {
        let long = format!("{}.attention.qkv.weight", "x".repeat(60));
        assert_eq!(Name::new(&long).to_string(), long[long.len() - NAME_BYTES..]);
        let umlauts = "\u{e4}".repeat(30) + "x";
        assert_eq!(Name::new(&umlauts).to_string(), "\u{e4}".repeat(19) + "x");
        assert_eq!(Name::new("").to_string(), "");
        assert!(Name::new("").is_empty() && !Name::new("a").is_empty());
        assert_eq!(Name::of_shape(&[512, 256], "bf16").to_string(), "[512, 256] bf16");
        assert_eq!(Name::of_shape(&[usize::MAX; 4], "bf16").to_string().len(), NAME_BYTES);
    }
}
