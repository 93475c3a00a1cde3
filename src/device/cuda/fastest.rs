//! Which of several ways to make the same takes the least time on the machine at hand: how they are timed, and the files, beside the
//! compiled kernels, that say it to later starts. A file says of which machine and what it is and how that was timed, so that one of
//! another kind under the same name, a torn one, or one of another program is as good as none.
//!
//! Nothing here is agreed on between ranks: one that finds no file measures for itself. So what is chosen may be told by the last bits of
//! sums, and numerics whose bits must be those of all ranks and runs do not choose by time.

use super::backend::Backend;
use super::compile::{cache_folder, read_sealed, write_sealed};
use std::fmt::Debug;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_64;

/// How ways are timed, and the form of files: another number makes all of them be measured again.
const METHOD: &str = "in turn, from memory, 2";
/// How often each is timed.
const ROUNDS: usize = 5;

/// The least seconds of each way; None of one that does not run, for which `run` answers false.
///
/// Each runs once before, so that its code is loaded. Then they take turns, for a GPU that was idle reaches its clock within
/// milliseconds and one that is hot lowers it: no way is measured while the clock is another one's. Before each time `evict` writes over
/// the cache, as weights and activations of a step come from memory; the host asks for what is timed meanwhile, so that the device
/// waits for nobody between the marks.
pub(super) fn times(backend: &dyn Backend, n_ways: usize, run: &mut dyn FnMut(usize) -> bool, evict: &dyn Fn()) -> Vec<Option<f64>> {
    let mut least: Vec<Option<f64>> = (0..n_ways).map(|way| run(way).then_some(f64::INFINITY)).collect();
    for _ in 0..ROUNDS {
        let mut taken = Vec::new();
        for (way, least) in least.iter_mut().enumerate().filter(|(_, least)| least.is_some()) {
            evict();
            let from = backend.mark();
            if !run(way) {
                *least = None;
            }
            taken.push((way, from, backend.mark()));
        }
        for (way, from, to) in taken {
            let seconds = backend.seconds_between(from, to);
            least[way] = least[way].map(|least| least.min(seconds));
            [from, to].into_iter().for_each(|mark| backend.forget_mark(mark));
        }
    }
    least
}

/// The way of the least time, the first of those; None where none ran.
pub(super) fn fastest(times: &[Option<f64>]) -> Option<usize> {
    let ran = times.iter().enumerate().filter_map(|(way, time)| Some((way, (*time)?)));
    ran.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(way, _)| way)
}

/// Where an answer is kept, and of what it is.
pub(super) struct Kept {
    key: Vec<u8>,
    path: Option<PathBuf>,
}

impl Kept {
    /// The answer `kind` for `of` on a machine of this name.
    pub(super) fn of(kind: &str, machine: &str, of: &dyn Debug) -> Kept {
        let key = format!("{METHOD}, {machine}, {of:?}\0").into_bytes();
        let path = cache_folder().map(|folder| folder.join(format!("product-{:016x}.{kind}", xxh3_64(&key))));
        Kept { key, path }
    }

    /// That of an earlier start.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let bytes = read_sealed(self.path.as_ref()?)?;
        bytes.strip_prefix(&*self.key).map(<[u8]>::to_vec)
    }

    /// For later starts. Without a place every start measures for itself.
    pub(super) fn write(&self, answer: &[u8]) {
        if let Some(path) = &self.path
            && let Err(error) = write_sealed(path, &[&self.key, answer].concat())
        {
            log::debug!("{}: not kept for the next start: {error}", path.display());
        }
    }
}
