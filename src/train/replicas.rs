//! Silent data corruption: replicas that should hold the same bits are compared, and a difference names the rank that differs,
//! the step and the tensors, and ends the run before anything of it is saved.
//!
//! What is compared are the weights that the layers compute with: every one over the data-parallel replicas, and those that
//! every tensor-parallel rank holds whole (norms) over these too. Master weights and moments exist once (ZeRO-1); what goes wrong
//! in them reaches all replicas alike.

use super::trainer::Trainer;
use crate::comm::{Communicator, Groups, agree};
use crate::error::{Error, Kind, Result};
use crate::flight::Phase;
use crate::model::chunk::Chunk;
use crate::model::param::Param;
use crate::parallel::layout::{Axis, Coords, ParallelLayout};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes that are fetched from a device at a time.
const BLOCK_BYTES: usize = 8 << 20;
/// Tensors that a message names.
const NAMED: usize = 3;

/// Hashes of some tensors of a rank, in the same order on all ranks that hold them.
struct Hashes<'a> {
    names: Vec<&'a str>,
    hashes: Vec<u64>,
}

impl<'a> Hashes<'a> {
    fn of(params: impl Iterator<Item = &'a Param>) -> Hashes<'a> {
        let mut block = Vec::new();
        let (names, hashes) = params.map(|param| (param.spec.name.as_str(), hash(param, &mut block))).unzip();
        Hashes { names, hashes }
    }

    fn bytes(&self) -> Vec<u8> {
        self.hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect()
    }
}

/// xxh3 of a weight's bytes, padding left out.
fn hash(param: &Param, block: &mut Vec<u8>) -> u64 {
    let weight = param.weight();
    if weight.is_host() {
        return xxh3_64(weight.bytes());
    }
    let mut hasher = Xxh3::new();
    let n_bytes = weight.n_bytes();
    for at in (0..n_bytes).step_by(BLOCK_BYTES) {
        block.resize(BLOCK_BYTES.min(n_bytes - at), 0);
        weight.read_bytes(at, block);
        hasher.update(block);
    }
    hasher.digest()
}

/// Compares at the steps that the recipe asks for. Collective.
pub(super) fn compare_regularly(trainer: &mut Trainer) -> Result<()> {
    if !is_due(trainer) {
        return Ok(());
    }
    trainer.finish_weights();
    compare_now(trainer)
}

/// Compares before a save too, unless it was just done: what differs is never saved. Collective.
pub(super) fn compare_before_save(trainer: &Trainer) -> Result<()> {
    let never = trainer.job.recipe.observe.compare_every_steps == 0;
    if never || is_due(trainer) { Ok(()) } else { compare_now(trainer) }
}

fn is_due(trainer: &Trainer) -> bool {
    let every = trainer.job.recipe.observe.compare_every_steps;
    every > 0 && trainer.state.step % every == 0
}

fn compare_now(trainer: &Trainer) -> Result<()> {
    compare(&trainer.state.chunks, trainer.job.groups, trainer.state.step)
}

/// Compares what replicas hold after `step`. Err on all ranks, of kind Numeric, when some differ. Collective.
pub fn compare(chunks: &[Chunk], groups: &Groups, step: u64) -> Result<()> {
    let _comparing = groups.flight.span(Phase::Compare);
    let params = || chunks.iter().flat_map(Chunk::params);
    let over_dp = differing(&Hashes::of(params()), groups, Axis::Dp, step);
    let over_tp = differing(&Hashes::of(params().filter(|param| param.is_replicated_over_tp())), groups, Axis::Tp, step);
    agree(&*groups.world, over_dp.and(over_tp))
}

/// Compares over one axis: one number a rank when all is well. The same result on all ranks of the group.
fn differing(mine: &Hashes, groups: &Groups, axis: Axis, step: u64) -> Result<()> {
    let group: &dyn Communicator = match axis {
        Axis::Dp => &*groups.dp,
        _ => &*groups.tp,
    };
    if group.size() == 1 {
        return Ok(());
    }
    let together = xxh3_64(&mine.bytes()).to_le_bytes();
    let mut all = vec![0u8; together.len() * group.size()];
    group.start_all_gather_bytes(&together, &mut all).wait();
    if all.chunks_exact(together.len()).all(|theirs| theirs == &all[..together.len()]) {
        return Ok(());
    }
    let of_ranks = group.gather_variable(&mine.bytes());
    let of_ranks: Vec<Vec<u64>> = of_ranks.iter().map(|bytes| to_u64s(bytes)).collect();
    let places: Vec<String> = (0..group.size()).map(|place| place_text(groups.layout, groups.at, axis, place)).collect();
    Err(explain(&mine.names, &of_ranks, &places, step))
}

fn to_u64s(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

/// `rank 3 (tp0 pp0 dp1)` of a place in this rank's group.
fn place_text(layout: ParallelLayout, at: Coords, axis: Axis, place: usize) -> String {
    let at = match axis {
        Axis::Dp => Coords { dp: place, ..at },
        Axis::Tp => Coords { tp: place, ..at },
        Axis::Pp => Coords { pp: place, ..at },
    };
    format!("rank {} (tp{} pp{} dp{})", layout.rank(at), at.tp, at.pp, at.dp)
}

/// Which ranks are wrong, by majority for each tensor; where there is none, all that hold it.
fn explain(names: &[&str], of_ranks: &[Vec<u64>], places: &[String], step: u64) -> Error {
    let mut wrong_ranks: Vec<usize> = Vec::new();
    let mut tensors: Vec<&str> = Vec::new();
    let mut is_decided = true;
    for (idx, name) in names.iter().enumerate() {
        let hashes: Vec<u64> = of_ranks.iter().map(|hashes| hashes[idx]).collect();
        let n_like = |hash: u64| hashes.iter().filter(|&&other| other == hash).count();
        let right = hashes.iter().copied().find(|&hash| 2 * n_like(hash) > hashes.len());
        if right.is_some_and(|right| n_like(right) == hashes.len()) {
            continue;
        }
        tensors.push(name);
        is_decided &= right.is_some();
        wrong_ranks
            .extend((0..hashes.len()).filter(|&rank| Some(hashes[rank]) != right && !wrong_ranks.contains(&rank)).collect::<Vec<_>>());
    }
    wrong_ranks.sort_unstable();
    let who: Vec<&str> = wrong_ranks.iter().map(|&rank| places[rank].as_str()).collect();
    let mut what = tensors[..tensors.len().min(NAMED)].join(", ");
    if tensors.len() > NAMED {
        what.push_str(&format!(" and {} more", tensors.len() - NAMED));
    }
    let wrong = match is_decided {
        true => {
            let hold = if who.len() == 1 { "does not hold" } else { "do not hold" };
            format!("step {step}: {} {hold} what the majority of {} replicas holds: {what}", who.join(" and "), places.len())
        }
        false => format!("step {step}: {} hold different weights, which of them are wrong cannot be told: {what}", who.join(" and ")),
    };
    let remedy = "nothing of it was saved; take that machine out and start again, which goes on from the newest checkpoint; \
                  observe.compare_every_steps says how often this is looked for";
    Error::new(Kind::Numeric, wrong).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The majority decides for each tensor; two replicas that differ are both named, and nobody is called wrong.
    #[test]
    fn the_majority_decides() {
        let places: Vec<String> = (0..3).map(|rank| format!("rank {rank}")).collect();
        let names = ["a", "b", "c"];
        let text = explain(&names, &[vec![1, 2, 3], vec![1, 9, 3], vec![1, 2, 3]], &places, 40).to_string();
        assert!(text.starts_with("step 40: rank 1 does not hold what the majority of 3 replicas holds: b;"), "{text}");
        let text = explain(&names, &[vec![1, 2, 3], vec![1, 9, 8]], &places[..2], 40).to_string();
        assert!(
            text.starts_with("step 40: rank 0 and rank 1 hold different weights, which of them are wrong cannot be told: b, c;"),
            "{text}"
        );
        let text = explain(&names, &[vec![7, 2, 3], vec![1, 9, 3], vec![1, 2, 3]], &places, 40).to_string();
        assert!(text.starts_with("step 40: rank 0 and rank 1 do not hold"), "{text}");
    }
}
