//! The file behind a ring: a header of one page, then the records, mapped into memory and seen as 64-bit words that are read
//! and written atomically. What was stored is in the file even when the process is killed at once; only when the machine dies
//! is lost what its kernel had not written yet.
//!
//! ```text
//! word 0  "TRFLIGHT"   1  version   2  records   3  rank   4  ranks   5-8  tp pp dp vp   9  process
//!      10 opened   11 heartbeat   12 asked to stop   13 hang noticed   14 closed   (nanoseconds since 1970, 0: not)
//!      15 records begun
//!      16-20  collectives entered in world, tp, dp, pp, others     24  checksum of words 1-10 and 32-47
//!      32-39  host, 40-47 job, UTF-8 padded with zeros
//! ```

use super::record::{Group, Record, WORDS};
use super::words::{header_checksum, pack_text, word};
use crate::error::{Context, IoContext, Result};
use crate::parallel::layout::ParallelLayout;
use memmap2::MmapMut;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes before the first record.
pub(super) const HEADER_BYTES: usize = 4096;
/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 8 * WORDS;

/// A ring that this process writes.
pub(super) struct Ring {
    map: MmapMut,
    n_records: u64,
    /// Where the file is.
    pub path: PathBuf,
}

/// Who writes a ring.
pub(super) struct Owner<'a> {
    pub rank: usize,
    pub layout: ParallelLayout,
    pub host: &'a str,
    pub job: &'a str,
    pub opened_ns: u64,
}

impl Ring {
    /// Makes the file; its blocks are allocated, so that a full disk shows here and not as a signal later.
    pub fn create(path: &Path, n_records: u64, owner: &Owner) -> Result<Ring> {
        let n_bytes = HEADER_BYTES + n_records as usize * RECORD_BYTES;
        let make = || -> Result<MmapMut> {
            let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).at(path)?;
            file.write_all(&vec![0; n_bytes]).at(path)?;
            // SAFETY: the file was made by this process for itself alone; whoever else opens it only reads, and a run
            // directory is held by one job. Nobody shortens it while it is mapped.
            unsafe { MmapMut::map_mut(&file) }.at(path)
        };
        let map = make().doing(|| "making the flight ledger".into())?;
        let ring = Ring { map, n_records, path: path.into() };
        let ParallelLayout { tp, pp, dp, vp } = owner.layout;
        let numbers = [n_records, owner.rank as u64, owner.layout.world() as u64, tp as u64, pp as u64, dp as u64, vp as u64];
        numbers.iter().enumerate().for_each(|(i, &number)| ring.set(word::RECORDS + i, number));
        ring.set(word::PROCESS, u64::from(std::process::id()));
        ring.set(word::OPENED, owner.opened_ns);
        ring.set(word::HEARTBEAT, owner.opened_ns);
        for (at, text) in [(word::HOST, owner.host), (word::JOB, owner.job)] {
            pack_text(text).iter().enumerate().for_each(|(i, &value)| ring.set(at + i, value));
        }
        ring.set(word::VERSION, word::THIS_VERSION);
        ring.set(word::CHECKSUM, header_checksum(|at| ring.words()[at].load(Ordering::Relaxed)));
        ring.set(word::MAGIC, u64::from_le_bytes(*word::THIS_MAGIC));
        Ok(ring)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, is a whole number of words long, lives as long as `self`, and is accessed
        // by this process through these atomics alone.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU64>(), self.map.len() / 8) }
    }

    /// Sets a word of the header.
    pub fn set(&self, at: usize, value: u64) {
        self.words()[at].store(value, Ordering::Relaxed);
    }

    /// Sets a word of the header unless it was set before.
    pub fn set_once(&self, at: usize, value: u64) {
        let _ = self.words()[at].compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The number of a new record.
    pub fn next_number(&self) -> u64 {
        self.words()[word::BEGUN].fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Notes how many collectives of a group were entered.
    pub fn entered(&self, group: Group, sequence: u64) {
        self.set(word::ENTERED + group as usize, sequence);
    }

    fn record(&self, number: u64) -> &[AtomicU64] {
        let at = HEADER_BYTES / 8 + ((number - 1) % self.n_records) as usize * WORDS;
        &self.words()[at..at + WORDS]
    }

    /// Writes a new record over the oldest; its number comes last.
    pub fn write(&self, record: &Record) {
        let (to, words) = (self.record(record.number), record.pack());
        to[0].store(0, Ordering::Release);
        to[1..].iter().zip(&words[1..]).for_each(|(to, &word)| to.store(word, Ordering::Relaxed));
        to[0].store(words[0], Ordering::Release);
    }

    /// Changes times of a record, unless it was overwritten meanwhile.
    pub fn set_times(&self, number: u64, times: &[(Time, u64)]) {
        let to = self.record(number);
        if to[0].load(Ordering::Relaxed) == number {
            times.iter().for_each(|&(time, value)| to[time as usize].store(value, Ordering::Relaxed));
        }
    }

    /// The record of this number, unless it was overwritten.
    pub fn read(&self, number: u64) -> Option<Record> {
        let from = self.record(number);
        let words: [u64; WORDS] = std::array::from_fn(|i| from[i].load(Ordering::Relaxed));
        Record::unpack(&words).filter(|record| record.number == number)
    }

    /// Hands everything to the file system, for readers on other machines.
    pub fn flush(&self) {
        // Without it the others see an older state: that is what they say then.
        let _ = self.map.flush();
    }
}

/// Times of a record that are set after it was written, by their word.
#[derive(Clone, Copy, Debug)]
pub(super) enum Time {
    Wait = 2,
    End = 3,
    Exposed = 4,
}
