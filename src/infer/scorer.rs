//! Forward passes over given sequences, by the very code that training runs: sequences are packed into micro-batches without padding,
//! replicas share out the micro-batches, and what was asked of each sequence comes back on every rank. In reproducible numerics (see
//! `model::numerics`) a result has the same bits whatever it was batched with, under every layout, and in training's own forward.

use crate::comm::Groups;
use crate::device::{Device, Scratch};
use crate::error::{Error, Kind, Result};
use crate::model::chunk::{Chunk, MicroBatch};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::{BatchBlocks, Canonical, Numerics};
use crate::model::packed::WeightFormat;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::pieces::TP_PIECES;
use crate::parallel::schedule::{self, PipelineShape};
use crate::progress::Progress;
use crate::recipe::Mode;
use crate::train::executor::{self, Keep, Nothing, Passed};
use std::ops::Range;

/// How sequences are scored.
pub struct Scorer<'a> {
    /// Where it computes.
    pub device: &'a dyn Device,
    /// This rank's groups.
    pub groups: &'a Groups,
    /// Input tokens of one forward pass; a longer sequence has one to itself.
    pub batch_tokens: usize,
    /// The order of sums.
    pub numerics: Numerics<'a>,
    /// Whether this rank was asked to stop.
    pub stop: &'a dyn Fn() -> bool,
}

/// A sequence whose tokens from `first` on are scored, 1 <= first <= length.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// All tokens.
    pub tokens: &'a [u32],
    /// The first that is scored.
    pub first: usize,
}

/// What the model says of the wanted tokens of a sequence.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TokenScores {
    /// ln p(token | all before), in nats.
    pub logprobs: Vec<f32>,
    /// Whether no other token is more likely.
    pub is_greedy: Vec<bool>,
}

/// The order of sums that `asked` means: reproducible unless something is in its way, which the log then says. Err: asked for, and
/// something is in its way.
pub fn numerics<'a>(
    asked: Option<Mode>,
    device: &'a dyn Device,
    layout: ParallelLayout,
    weights: Option<WeightFormat>,
) -> Result<Numerics<'a>> {
    if asked == Some(Mode::Fast) {
        return Ok(Numerics::Fast);
    }
    let in_the_way = match device.canonical() {
        None => format!("{} has no sums in a canonical order", device.name()),
        Some(_) if TP_PIECES % layout.tp != 0 => format!("--tp {} does not divide the {TP_PIECES} pieces of each sum", layout.tp),
        Some(_) if matches!(weights, Some(WeightFormat::Fp8(_))) => "products of FP8 weights have no canonical order".into(),
        Some(sums) => {
            // Only a backward pass asks how samples are cut.
            let blocks = BatchBlocks { samples: 1, per_replica: 1 };
            return Ok(Numerics::Reproducible(Canonical { sums, blocks, batch: None }));
        }
    };
    if asked.is_some() {
        return Err(Error::recipe(format!("--numerics reproducible: {in_the_way}")).remedy("use --numerics fast"));
    }
    log::info!("numerics: fast, the last bits depend on what is batched together and on the layout, because {in_the_way}");
    Ok(Numerics::Fast)
}

impl Scorer<'_> {
    /// The wanted scores of all sequences, in their order, on every rank. Err: asked to stop, or a log-probability that is no number.
    /// Collective.
    pub fn tokens(&self, chunks: &mut [Chunk], wanted: &[Wanted]) -> Result<Vec<TokenScores>> {
        let n_rows = |one: &Wanted| if one.first < one.tokens.len() { one.tokens.len() - 1 } else { 0 };
        let work: Vec<Work> = wanted.iter().map(|one| Work { tokens: one.tokens, n_rows: n_rows(one) }).collect();
        let mut found: Vec<(usize, TokenScores)> = Vec::new();
        self.passes(chunks, &work, &mut |idx, passed, part| {
            let rows = part.rows.start + wanted[idx].first - 1..part.rows.end;
            let logprobs = passed.token_losses[0][rows.clone()].iter().map(|loss| -loss).collect();
            found.push((idx, TokenScores { logprobs, is_greedy: passed.is_greedy[0][rows].to_vec() }));
        })?;
        let mut all = vec![TokenScores::default(); wanted.len()];
        for (idx, scores) in self.gathered(&found, |scores| (&scores.logprobs, &scores.is_greedy)) {
            if let Some(i) = scores.0.iter().position(|x| !x.is_finite()) {
                let wrong = format!("the log-probability of token {} of sequence {idx} is {}", wanted[idx].first + i, scores.0[i]);
                return Err(numbers_went_wrong(wrong));
            }
            all[idx] = TokenScores { logprobs: scores.0, is_greedy: scores.1 };
        }
        Ok(all)
    }

    /// The attributes that a reward model reads off the last token of each sequence, in their order, on every rank. Errors as `tokens`.
    /// Collective.
    pub fn attributes(&self, chunks: &mut [Chunk], sequences: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let work: Vec<Work> = sequences.iter().map(|tokens| Work { tokens, n_rows: tokens.len() }).collect();
        let mut found: Vec<(usize, Vec<f32>)> = Vec::new();
        self.passes(chunks, &work, &mut |idx, passed, part| {
            let values = &passed.attributes[0];
            let n = values.len() / part.n_in_pack;
            found.push((idx, values[part.idx * n..][..n].to_vec()));
        })?;
        let mut all = vec![Vec::new(); sequences.len()];
        for (idx, (values, _)) in self.gathered(&found, |values| (values, &[])) {
            if let Some(value) = values.iter().find(|x| !x.is_finite()) {
                return Err(numbers_went_wrong(format!("an attribute of sequence {idx} is {value}")));
            }
            all[idx] = values;
        }
        Ok(all)
    }

    /// Runs this replica's share of the micro-batches and hands what the last stage has of each sequence to `take`, once a replica.
    /// All replicas go on in step, so that they leave together when one of the ranks was asked to stop. Collective.
    fn passes(&self, chunks: &mut [Chunk], work: &[Work], take: &mut dyn FnMut(usize, &Passed, PartOfPack)) -> Result<()> {
        let (groups, packs) = (self.groups, pack(work, self.batch_tokens));
        let mut progress = (groups.world.rank() == 0).then(|| Progress::new("score", packs.len() as u64, "passes"));
        let scratch = Scratch::new();
        let sequence = SequenceMode::Replicated;
        let ctx = Ctx { device: self.device, tp: &*groups.tp, scratch: &scratch, sequence, numerics: self.numerics };
        let schedule = schedule::evaluation(PipelineShape { pp: groups.layout.pp, vp: 1, n_micro: 1 });
        for round in packs.chunks(groups.layout.dp) {
            if groups.world.sum_f64(f64::from(u8::from((self.stop)()))) > 0.0 {
                return Err(
                    Error::new(Kind::Requeue, "asked to stop before all sequences were scored").remedy("run the same command again")
                );
            }
            if let Some(pack) = round.get(groups.at.dp) {
                // One micro-batch at a time: memory stays that of one, and nothing waits on a whole file.
                let batch = micro_batch(self.device, work, pack)?;
                let starts = batch.sequence_starts.clone();
                let passed = executor::run(&schedule, chunks, &ctx, groups, (&[batch], Keep::Nothing), &mut Nothing);
                let is_here = !(passed.token_losses[0].is_empty() && passed.attributes[0].is_empty());
                if is_here && groups.at.tp == 0 {
                    for (i, &idx) in pack.iter().enumerate() {
                        take(idx, &passed, PartOfPack { rows: starts[i]..starts[i + 1], idx: i, n_in_pack: pack.len() });
                    }
                }
            }
            if let Some(progress) = &mut progress {
                progress.add(round.len() as u64);
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(())
    }

    /// What all ranks found, on every rank, in no order. Collective.
    fn gathered<T>(&self, found: &[(usize, T)], parts: impl Fn(&T) -> (&[f32], &[bool])) -> Vec<Found> {
        let mut mine = Vec::new();
        for (idx, one) in found {
            let (values, flags) = parts(one);
            [*idx, values.len(), flags.len()].iter().for_each(|&n| mine.extend((n as u64).to_le_bytes()));
            values.iter().for_each(|value| mine.extend(value.to_le_bytes()));
            mine.extend(flags.iter().map(|&flag| u8::from(flag)));
        }
        self.groups.world.gather_variable(&mine).iter().flat_map(|part| decoded(part)).collect()
    }
}

/// Which sequence, and its values and flags.
type Found = (usize, (Vec<f32>, Vec<bool>));

/// The other direction of what `gathered` writes.
fn decoded(mut bytes: &[u8]) -> Vec<Found> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let [idx, n_values, n_flags] = [0, 8, 16].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize);
        let (values, rest) = bytes[24..].split_at(4 * n_values);
        let (flags, rest) = rest.split_at(n_flags);
        let values = values.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
        all.push((idx, (values, flags.iter().map(|&flag| flag != 0).collect())));
        bytes = rest;
    }
    all
}

fn numbers_went_wrong(wrong: String) -> Error {
    Error::new(Kind::Numeric, wrong).remedy("look at the checkpoint's weights with trireme-checkpoint verify, or use --dtype f32")
}

/// A sequence as the passes see it: its first `n_rows` tokens are fed. Without rows it is left out.
struct Work<'a> {
    tokens: &'a [u32],
    n_rows: usize,
}

/// Which part of a micro-batch is a sequence's.
struct PartOfPack {
    rows: Range<usize>,
    /// Among the sequences of the micro-batch.
    idx: usize,
    n_in_pack: usize,
}

/// Which sequences share a micro-batch: consecutive ones while they fit `batch_tokens`; at least one each.
fn pack(work: &[Work], batch_tokens: usize) -> Vec<Vec<usize>> {
    let (mut packs, mut n_tokens): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
    for (idx, one) in work.iter().enumerate().filter(|(_, one)| one.n_rows > 0) {
        match packs.last_mut() {
            Some(pack) if n_tokens + one.n_rows <= batch_tokens => pack.push(idx),
            _ => {
                packs.push(vec![idx]);
                n_tokens = 0;
            }
        }
        n_tokens += one.n_rows;
    }
    packs
}

/// Inputs and targets of the packed sequences.
fn micro_batch(device: &dyn Device, work: &[Work], pack: &[usize]) -> Result<MicroBatch> {
    let (mut tokens, mut targets, mut positions, mut sequence_starts) = (Vec::new(), Vec::new(), Vec::new(), vec![0]);
    for &idx in pack {
        let Work { tokens: sequence, n_rows } = work[idx];
        tokens.extend_from_slice(&sequence[..n_rows]);
        // Attributes have no targets; what stands there is not looked at.
        targets.extend((1..=n_rows).map(|next| sequence.get(next).copied().unwrap_or(0)));
        positions.extend(0..n_rows as u32);
        sequence_starts.push(tokens.len());
    }
    MicroBatch::new(device, [&tokens, &targets, &positions], &vec![0.0; tokens.len()], sequence_starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packing keeps order, loses nothing that has rows, and exceeds the limit only for a single long sequence.
    #[test]
    fn packs_cover_all_sequences() {
        let rows = [4usize, 0, 8, 29, 1, 1, 1, 10];
        let work: Vec<Work> = rows.iter().map(|&n_rows| Work { tokens: &[], n_rows }).collect();
        let packs = pack(&work, 12);
        assert_eq!(packs.concat(), vec![0, 2, 3, 4, 5, 6, 7]);
        for pack in &packs {
            let n: usize = pack.iter().map(|&idx| rows[idx]).sum();
            assert!(n <= 12 || pack.len() == 1, "{pack:?}");
        }
    }
}
