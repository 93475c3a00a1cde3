//! Products that two can make: cuBLASLt, with a pass of its own for an activation, and kernels/matmul_hopper.cu, which end in it. Which is
//! taken is measured at the first use of a shape and kept (`fastest`), where the machine says that times decide.

use super::Cuda;
use super::fastest::{Kept, fastest, times};
use crate::tensor::DType;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::MutexGuard;

/// Who makes a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Maker {
    /// cuBLASLt.
    Library,
    /// A kernel of ours.
    Own,
}

const MAKERS: [Maker; 2] = [Maker::Library, Maker::Own];

/// What is made: out[m, n] over k terms.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Contest {
    /// Transpositions, as kernels are named: "nt".
    pub layout: &'static str,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub out: DType,
    /// Whether it is added to what is there.
    pub adds: bool,
    /// What comes of the product, as kernels are named; nothing where it stays.
    pub end: &'static str,
}

/// The least seconds of each maker.
pub(super) type Outcome = [f64; 2];

fn winner(outcome: &Outcome) -> Maker {
    fastest(&outcome.map(Some)).map_or(Maker::Library, |which| MAKERS[which])
}

fn bytes_of(outcome: &Outcome) -> Vec<u8> {
    outcome.map(f64::to_le_bytes).concat()
}

fn outcome_of(bytes: &[u8]) -> Option<Outcome> {
    let (library, own) = bytes.split_first_chunk::<8>()?;
    Some([f64::from_le_bytes(*library), f64::from_le_bytes(own.try_into().ok()?)])
}

impl Cuda {
    /// Has the product made by whoever takes less time. `make` makes it: in the place of an output of `n_bytes`, if one is given. To be
    /// measured it is made several times, onto memory of that size where it is added to what is there, else onto itself.
    pub(super) fn contest(&self, of: Contest, n_bytes: usize, make: &mut dyn FnMut(Maker, Option<u64>)) {
        let known = self.contests().get(&of).copied();
        let outcome = match (known, self.is_recording()) {
            (Some(outcome), _) => outcome,
            (None, true) => None,
            (None, false) => {
                let outcome = self.outcome(&of, n_bytes, make);
                self.contests().insert(of, outcome);
                outcome
            }
        };
        make(outcome.map_or(Maker::Library, |outcome| winner(&outcome)), None);
    }

    /// Of an earlier start, or measured now. None where times decide nothing, or there is no room: then the library makes it.
    fn outcome(&self, of: &Contest, n_bytes: usize, make: &mut dyn FnMut(Maker, Option<u64>)) -> Option<Outcome> {
        let machine = self.backend.timed()?;
        let kept = Kept::of("maker", &machine.name, of);
        if let Some(outcome) = kept.read().and_then(|bytes| outcome_of(&bytes)) {
            return Some(outcome);
        }
        // Written over before each time, outputs that are added to with it.
        let evicted = 2 * machine.cache_bytes;
        let n_spare = evicted.max(n_bytes);
        let spare = self.backend.alloc(n_spare)?;
        let mut run = |which: usize| {
            make(MAKERS[which], of.adds.then_some(spare));
            true
        };
        let found = times(&*self.backend, MAKERS.len(), &mut run, &|| self.backend.zero(spare, evicted));
        self.backend.free(spare, n_spare);
        let outcome = [found[0]?, found[1]?];
        kept.write(&bytes_of(&outcome));
        Some(outcome)
    }

    fn contests(&self) -> MutexGuard<'_, HashMap<Contest, Option<Outcome>>> {
        self.use_of_memory.contests.lock().expect("no panic while holding the contests")
    }

    /// A table of the products that two could make so far, and who made them.
    pub fn contest_table(&self) -> String {
        let mut lines: Vec<(Contest, Outcome)> = self.contests().iter().filter_map(|(of, outcome)| Some((*of, (*outcome)?))).collect();
        lines.sort_by(|(of, a), (other, b)| b[0].total_cmp(&a[0]).then_with(|| format!("{of:?}").cmp(&format!("{other:?}"))));
        let mut table = String::from("| product | cuBLASLt, us | own kernel, us | taken |\n|---|---:|---:|---|\n");
        for (Contest { layout, m, n, k, out, adds, end }, outcome) in lines {
            let (store, [library, own]) = (if adds { "+=" } else { "=" }, outcome.map(|seconds| 1e6 * seconds));
            let end = if end.is_empty() { String::new() } else { format!(", {end}") };
            let taken = if winner(&outcome) == Maker::Own { "own kernel" } else { "cuBLASLt" };
            let what = format!("{} {m} x {n} x {k}, {} {store}{end}", layout.to_uppercase(), out.name());
            writeln!(table, "| {what} | {library:.1} | {own:.1} | {taken} |").expect("a string has room");
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An outcome comes back as it was kept; one that was cut or is longer is none.
    #[test]
    fn outcomes_are_kept_whole() {
        let bytes = bytes_of(&[0.25, 3.0]);
        assert_eq!(outcome_of(&bytes), Some([0.25, 3.0]));
        assert!([&bytes[..15], &bytes[..8], &[], &[&bytes[..], &[0]].concat()].iter().all(|bytes| outcome_of(bytes).is_none()));
        assert_eq!([winner(&[2.0, 1.0]), winner(&[1.0, 2.0]), winner(&[1.0, 1.0])], [Maker::Own, Maker::Library, Maker::Library]);
    }
}
