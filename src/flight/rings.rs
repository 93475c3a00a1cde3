//! The rings of all ranks of a job, read while they are written or after the job's end.

use super::clocks::{self, Shift};
use super::record::{GROUPS, Group, Record, WORDS};
use super::ring::{HEADER_BYTES, RECORD_BYTES};
use super::words::{TEXT_WORDS, header_checksum, unpack_text, word};
use crate::error::{Error, IoContext, Result};
use crate::parallel::layout::{Axis, Coords, ParallelLayout};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Records at the old end of a full ring that may be overwritten while they are read, and are left out.
const UNSURE: usize = 16;
/// Records that are kept of all ranks together: some thousands of ranks are read within the memory of one of them.
const KEPT_OF_ALL: usize = 1 << 21;
/// Records that are kept of a rank however many there are.
const KEPT_OF_ONE: usize = 256;

/// The ring of one rank. Times are nanoseconds since 1970, 0: not.
#[derive(Clone, PartialEq, Debug)]
pub struct RankRing {
    /// Rank in the world.
    pub rank: usize,
    /// Layout of the job.
    pub layout: ParallelLayout,
    /// Machine.
    pub host: String,
    /// SLURM job or process.
    pub job: String,
    /// Process on that machine.
    pub process: u64,
    /// When the ring was made.
    pub opened_ns: u64,
    /// When the process last showed that it runs.
    pub heartbeat_ns: u64,
    /// When it was asked to stop.
    pub stop_ns: u64,
    /// When it took the job to hang.
    pub hang_ns: u64,
    /// When it ended in good order.
    pub closed_ns: u64,
    /// Collectives entered, by [`Group`].
    entered: Vec<u64>,
    /// By ascending number.
    pub records: Vec<Record>,
}

/// Whether the slot of record `expected` holds none, or a later one, because its writer is at it.
fn is_being_written(number: u64, expected: u64, n_records: u64) -> bool {
    number == 0 || (number > expected && (number - expected) % n_records == 0)
}

impl RankRing {
    /// Reads a ring; damaged records are left out, and told. Errors: it cannot be read, is not one, or its header is damaged.
    pub fn read(path: &Path) -> Result<RankRing> {
        RankRing::read_newest(path, usize::MAX)
    }

    /// The same with the newest so many records only.
    pub fn read_newest(path: &Path, n_newest: usize) -> Result<RankRing> {
        let file = File::open(path).at(path)?;
        let n_file_bytes = file.metadata().at(path)?.len();
        let wrong = |what: String| Error::file(path, what).remedy("name a run directory or its folder flight");
        let words_at = |at: usize, n_bytes: usize| -> Result<Vec<u64>> {
            let mut bytes = vec![0u8; n_bytes];
            file.read_exact_at(&mut bytes, at as u64).at(path)?;
            Ok(bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes"))).collect())
        };
        let words = if n_file_bytes < HEADER_BYTES as u64 { vec![0] } else { words_at(0, HEADER_BYTES)? };
        if words[word::MAGIC] != u64::from_le_bytes(*word::THIS_MAGIC) {
            return Err(wrong("not a flight ledger".into()));
        }
        if words[word::VERSION] != word::THIS_VERSION {
            return Err(wrong(format!("version {} of the flight ledger, this program reads {}", words[word::VERSION], word::THIS_VERSION)));
        }
        let found = header_checksum(|at| words[at]);
        if words[word::CHECKSUM] != found {
            let wrong = format!("checksum {:016x} of its header, its bytes have {found:016x}", words[word::CHECKSUM]);
            return Err(Error::file(path, wrong).remedy("the file was damaged: move it away to see the other ranks"));
        }
        let [n_records, rank, size, tp, pp, dp, vp] = std::array::from_fn(|i| words[word::RECORDS + i] as usize);
        let layout = ParallelLayout { tp, pp, dp, vp };
        let n_bytes = n_records.checked_mul(RECORD_BYTES).and_then(|n| n.checked_add(HEADER_BYTES));
        let product = [tp, pp, dp].iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        if n_bytes.map(|n| n as u64) != Some(n_file_bytes) || product != Some(size) || rank >= size || n_records == 0 {
            return Err(wrong(format!("{n_file_bytes} bytes, {n_records} records, rank {rank} of {size} do not fit together")));
        }
        let newest = words[word::BEGUN];
        if newest > u64::MAX / 2 {
            return Err(wrong(format!("{newest} records begun")));
        }
        let oldest = (newest + 1).saturating_sub(n_records as u64).max(1);
        let whole = if newest > n_records as u64 { oldest + UNSURE.min(n_records / 2) as u64 } else { oldest };
        let first = whole.max((newest + 1).saturating_sub(n_newest as u64));
        let (mut records, mut n_damaged) = (Vec::new(), 0);
        // At most two stretches of the file: the ring may go over its end.
        let mut number = first;
        while number <= newest {
            let slot = ((number - 1) % n_records as u64) as usize;
            let n = (n_records - slot).min((newest + 1 - number) as usize);
            let stretch = words_at(HEADER_BYTES + slot * RECORD_BYTES, n * RECORD_BYTES)?;
            for (number, words) in (number..).zip(stretch.chunks_exact(WORDS)) {
                match Record::unpack(words.try_into().expect("a record")).filter(|record| record.number == number) {
                    Some(record) => records.push(record),
                    None => n_damaged += usize::from(!is_being_written(words[0], number, n_records as u64)),
                }
            }
            number += n as u64;
        }
        if n_damaged > 0 {
            log::warn!("{}: {n_damaged} records are damaged and left out", path.display());
        }
        Ok(RankRing {
            rank,
            layout,
            host: unpack_text(&words[word::HOST..word::HOST + TEXT_WORDS]),
            job: unpack_text(&words[word::JOB..word::JOB + TEXT_WORDS]),
            process: words[word::PROCESS],
            opened_ns: words[word::OPENED],
            heartbeat_ns: words[word::HEARTBEAT],
            stop_ns: words[word::STOP],
            hang_ns: words[word::HANG],
            closed_ns: words[word::CLOSED],
            entered: words[word::ENTERED..word::ENTERED + GROUPS.len()].to_vec(),
            records,
        })
    }

    /// Collectives of a group that this rank has entered.
    pub fn entered(&self, group: Group) -> u64 {
        self.entered[group as usize]
    }

    /// The communication that it waits for.
    pub fn waiting(&self) -> Option<&Record> {
        self.records.iter().rev().find(|record| record.is_open() && record.wait_ns > 0)
    }

    /// Moves all of its times.
    pub(super) fn shift(&mut self, by_ns: i64) {
        let of_rank = [&mut self.opened_ns, &mut self.heartbeat_ns, &mut self.stop_ns, &mut self.hang_ns, &mut self.closed_ns];
        let of_records = self.records.iter_mut().flat_map(|record| [&mut record.start_ns, &mut record.wait_ns, &mut record.end_ns]);
        for time in of_rank.into_iter().chain(of_records).filter(|time| **time > 0) {
            *time = time.saturating_add_signed(by_ns);
        }
    }

    /// `rank 17 (tp1 pp0 dp2, n042)`
    pub fn title(&self) -> String {
        let Coords { tp, pp, dp } = self.layout.coords(self.rank);
        format!("rank {} (tp{tp} pp{pp} dp{dp}, {})", self.rank, self.host)
    }
}

/// All rings of a job.
#[derive(Clone, PartialEq, Debug)]
pub struct Rings {
    /// Where they lie.
    pub folder: PathBuf,
    /// Layout of the job.
    pub layout: ParallelLayout,
    /// By rank; None: it left none. All by the clock of the first.
    pub ranks: Vec<Option<RankRing>>,
    /// Machines whose clocks were different.
    pub shifts: Vec<Shift>,
}

impl Rings {
    /// Reads the rings in `folder`. A ring that is missing or damaged is None. Errors: there is none at all.
    pub fn read(folder: &Path) -> Result<Rings> {
        let none =
            || Error::file(folder, "no flight ledger").remedy("name a run directory that trireme-pretrain wrote, or its folder flight");
        let entries = std::fs::read_dir(folder).map_err(|_| none())?;
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "ring"));
        paths.sort();
        let mut found = Vec::new();
        let mut first_error = None;
        for path in &paths {
            match RankRing::read_newest(path, (KEPT_OF_ALL / paths.len()).max(KEPT_OF_ONE)) {
                Ok(ring) => found.push(ring),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        // A ring of another job in the folder would be older: the newest decides.
        let Some(newest) = found.iter().max_by_key(|ring| ring.opened_ns) else { return Err(first_error.unwrap_or_else(none)) };
        let (layout, job) = (newest.layout, newest.job.clone());
        let mut ranks = vec![None; layout.world()];
        for ring in found.into_iter().filter(|ring| ring.layout == layout) {
            // Without SLURM the job is the process of each rank.
            if ring.job == job || ring.job == ring.process.to_string() {
                let rank = ring.rank;
                ranks[rank] = Some(ring);
            }
        }
        let mut rings = Rings { folder: folder.into(), layout, ranks, shifts: Vec::new() };
        rings.shifts = clocks::align(&mut rings);
        Ok(rings)
    }

    /// The rings that there are.
    pub fn all(&self) -> impl Iterator<Item = &RankRing> {
        self.ranks.iter().flatten()
    }

    /// The ring of a rank.
    pub fn of(&self, rank: usize) -> Option<&RankRing> {
        self.ranks.get(rank).and_then(Option::as_ref)
    }

    /// The world ranks of a group that `rank` is in, in their order; empty for groups that the layout does not tell.
    pub fn members(&self, group: Group, rank: usize) -> Vec<usize> {
        let axis = match group {
            Group::World => return (0..self.layout.world()).collect(),
            Group::Tp => Axis::Tp,
            Group::Dp => Axis::Dp,
            Group::Pp => Axis::Pp,
            Group::Other => return Vec::new(),
        };
        let colour = |rank: usize| self.layout.colour(axis, self.layout.coords(rank));
        let mine = colour(rank);
        (0..self.layout.world()).filter(|&other| colour(other) == mine).collect()
    }

    /// The last sign of life of any rank.
    pub fn newest_ns(&self) -> u64 {
        self.all().map(|ring| ring.heartbeat_ns.max(ring.closed_ns)).max().unwrap_or(0)
    }
}
