//! Forward passes over given sequences, by the very code that training runs: sequences are packed into micro-batches without padding,
//! those that follow each other and begin alike share their rows (see `model::shared`), replicas share out the micro-batches, and what
//! was asked of each sequence comes back on every rank, or goes into a journal. In reproducible numerics (see
//! `model::numerics`) a result has the same bits whatever it was batched with, under every layout, and in training's own forward.

use super::score_passes::{Pass, Rows, Work, passes};
use crate::comm::{Groups, agree};
use crate::device::{Device, Fp8Scales, Scratch};
use crate::error::{Error, Kind, Result};
use crate::model::chunk::{Chunk, MicroBatch};
use crate::model::ctx::{Ctx, SequenceMode};
use crate::model::numerics::Numerics;
use crate::model::packed::WeightFormat;
use crate::model::shared::Asked;
use crate::parallel::schedule::{self, PipelineShape};
use crate::progress::Progress;
use crate::recipe::Mode;
use crate::train::executor::{self, Keep, Nothing, Passed};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How sequences are scored.
pub struct Scorer<'a> {
    /// Where it computes.
    pub device: &'a dyn Device,
    /// This rank's groups.
    pub groups: &'a Groups,
    /// Input tokens of one forward pass, shared ones counted once; a longer sequence has one to itself.
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
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct TokenScores {
    /// ln p(token | all before), in nats.
    pub logprobs: Vec<f32>,
    /// Whether no other token is more likely.
    pub is_greedy: Vec<bool>,
}

/// What keeps a form of weights from the same bits under every batch and layout.
pub(super) fn in_the_way(weights: Option<WeightFormat>) -> Option<&'static str> {
    (weights == Some(WeightFormat::Fp8(Fp8Scales::Tensor))).then_some("one FP8 scale is for all that runs together")
}

/// The order of sums that [`numerics`] will find on a device with canonical sums: what devices are opened for.
pub fn mode(asked: Option<Mode>, weights: Option<WeightFormat>) -> Mode {
    let possible = if in_the_way(weights).is_none() { Mode::Reproducible } else { Mode::Fast };
    asked.unwrap_or(possible)
}

/// The order of sums that `asked` means: reproducible unless something is in its way, which the log then says. Err: asked for, and
/// something is in its way.
pub fn numerics<'a>(asked: Option<Mode>, device: &'a dyn Device, weights: Option<WeightFormat>) -> Result<Numerics<'a>> {
    if asked == Some(Mode::Fast) {
        return Ok(Numerics::Fast);
    }
    let in_the_way = match (Numerics::of_inference(device), in_the_way(weights)) {
        (Numerics::Fast, _) => format!("{} has no sums in a canonical order", device.name()),
        (_, Some(in_the_way)) => in_the_way.into(),
        (canonical, None) => return Ok(canonical),
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
        let mut found = Vec::new();
        self.tokens_into(chunks, wanted, &vec![false; wanted.len()], &mut |number, scores| {
            found.push((number, scores));
            Ok(())
        })?;
        Ok(self.gathered(&found, wanted.len()))
    }

    /// Hands the wanted scores of each sequence that is not `made` to `sink`, on the one rank of a replica that has them. Sequences of
    /// which nothing is wanted have none. Err, the same on all ranks: asked to stop, a log-probability that is no number, or the sink's.
    /// Collective.
    pub fn tokens_into(&self, chunks: &mut [Chunk], wanted: &[Wanted], made: &[bool], sink: &mut Sink<TokenScores>) -> Result<()> {
        let n_rows = |one: &Wanted| if one.first < one.tokens.len() { one.tokens.len() - 1 } else { 0 };
        let work: Vec<Work> = wanted.iter().map(|one| Work { tokens: one.tokens, n_rows: n_rows(one) }).collect();
        let batch = |pass: &Pass| {
            let mut questions = Vec::new();
            for (&number, sequence) in pass.numbers.iter().zip(&pass.sequences) {
                let Wanted { tokens, first } = wanted[number];
                questions.extend((first..tokens.len()).map(|i| (sequence.row(i - 1), tokens[i])));
            }
            let asked = Some(Asked::new(self.device, &questions)?);
            let shared = pass.shares().then(|| pass.sequences.clone());
            Ok(MicroBatch { asked, shared, ..micro_batch(self.device, &work, pass)? })
        };
        let mut take = |pass: &Pass, passed: &Passed| {
            let mut answers = passed.token_losses[0].iter().zip(&passed.is_greedy[0]);
            for &number in &pass.numbers {
                let Wanted { tokens, first } = wanted[number];
                let of_sequence = answers.by_ref().take(tokens.len() - first);
                let (logprobs, is_greedy): (Vec<f32>, Vec<bool>) = of_sequence.map(|(loss, is_greedy)| (-loss, *is_greedy)).unzip();
                if let Some(i) = logprobs.iter().position(|x| !x.is_finite()) {
                    let wrong = format!("the log-probability of token {} of sequence {number} is {}", first + i, logprobs[i]);
                    return Err(numbers_went_wrong(wrong));
                }
                if !made[number] {
                    sink(number, TokenScores { logprobs, is_greedy })?;
                }
            }
            Ok(())
        };
        self.run(chunks, &pending(&work, (self.batch_tokens, Rows::Shared), made), &batch, &mut take)
    }

    /// The attributes that a reward model reads off the last token of each sequence, in their order, on every rank. Errors as `tokens`.
    /// Collective.
    pub fn attributes(&self, chunks: &mut [Chunk], sequences: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut found = Vec::new();
        self.attributes_into(chunks, sequences, &vec![false; sequences.len()], &mut |number, attributes| {
            found.push((number, attributes));
            Ok(())
        })?;
        Ok(self.gathered(&found, sequences.len()))
    }

    /// Hands the attributes of each sequence that is not `made` to `sink`; else as `tokens_into`. Collective.
    pub fn attributes_into(&self, chunks: &mut [Chunk], sequences: &[&[u32]], made: &[bool], sink: &mut Sink<Vec<f32>>) -> Result<()> {
        let work: Vec<Work> = sequences.iter().map(|tokens| Work { tokens, n_rows: tokens.len() }).collect();
        let batch = |pass: &Pass| micro_batch(self.device, &work, pass);
        let mut take = |pass: &Pass, passed: &Passed| {
            let values = &passed.attributes[0];
            for (&number, values) in pass.numbers.iter().zip(values.chunks(values.len() / pass.numbers.len())) {
                if let Some(value) = values.iter().find(|x| !x.is_finite()) {
                    return Err(numbers_went_wrong(format!("an attribute of sequence {number} is {value}")));
                }
                if !made[number] {
                    sink(number, values.to_vec())?;
                }
            }
            Ok(())
        };
        self.run(chunks, &pending(&work, (self.batch_tokens, Rows::Apart), made), &batch, &mut take)
    }

    /// Runs this replica's share of the passes and hands what the last stage has of each to `take`, on one rank of a replica. All
    /// replicas go on in step, so that they leave together when one of the ranks was asked to stop or cannot go on. Collective.
    fn run(
        &self,
        chunks: &mut [Chunk],
        passes: &[Pass],
        batch: &dyn Fn(&Pass) -> Result<MicroBatch>,
        take: &mut dyn FnMut(&Pass, &Passed) -> Result<()>,
    ) -> Result<()> {
        let groups = self.groups;
        let mut progress = (groups.world.rank() == 0).then(|| Progress::new("score", passes.len() as u64, "passes"));
        let scratch = Scratch::of_any_rows();
        let schedule = schedule::evaluation(PipelineShape { pp: groups.layout.pp, vp: 1, n_micro: 1 });
        let mut failed = Ok(());
        for round in passes.chunks(groups.layout.dp) {
            // One micro-batch at a time: memory stays that of one, and nothing waits on a whole file.
            let mine = match round.get(groups.at.dp).map(|pass| Ok((pass, batch(pass)?))).transpose() {
                Ok(mine) => mine,
                Err(error) => {
                    failed = Err(error);
                    None
                }
            };
            let signal = if failed.is_err() { Signal::Failed } else { Signal::of_stop((self.stop)()) };
            let signals = groups.world.gather_f64(f64::from(signal as u8));
            if signals.contains(&f64::from(Signal::Failed as u8)) {
                break;
            }
            if signals.contains(&f64::from(Signal::Stop as u8)) {
                return Err(
                    Error::new(Kind::Requeue, "asked to stop before all sequences were scored").remedy("run the same command again")
                );
            }
            if let Some((pass, batch)) = mine {
                let (tp, sequence, numerics) = (&*groups.tp, SequenceMode::Replicated, self.numerics);
                let ctx = Ctx { device: self.device, tp, scratch: &scratch, sequence, numerics };
                let passed = executor::run(&schedule, chunks, &ctx, groups, (&[batch], Keep::Nothing), &mut Nothing);
                let is_here = !(passed.token_losses[0].is_empty() && passed.attributes[0].is_empty());
                if is_here && groups.at.tp == 0 {
                    failed = take(pass, &passed);
                }
            }
            // Hardly two passes have as many rows, and statistics by head and row have them as columns, which the pool does not round.
            scratch.end_pass();
            if let Some(progress) = &mut progress {
                progress.add(round.len() as u64);
            }
        }
        agree(&*groups.world, failed)?;
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(())
    }

    /// What all ranks found, by number, on every rank. Collective.
    fn gathered<T: Serialize + DeserializeOwned + Default + Clone>(&self, found: &[(usize, T)], n: usize) -> Vec<T> {
        let mut all = vec![T::default(); n];
        for part in self.groups.world.gather_variable(&serde_json::to_vec(found).expect("scores are plain data")) {
            let theirs: Vec<(usize, T)> = serde_json::from_slice(&part).expect("written above");
            theirs.into_iter().for_each(|(number, one)| all[number] = one);
        }
        all
    }
}

/// Takes what was found of a sequence: its number, and that.
pub type Sink<'s, T> = dyn FnMut(usize, T) -> Result<()> + 's;

/// What a rank says before a round of passes.
#[derive(Clone, Copy)]
enum Signal {
    GoOn,
    Stop,
    Failed,
}

impl Signal {
    fn of_stop(stop: bool) -> Signal {
        if stop { Signal::Stop } else { Signal::GoOn }
    }
}

/// The passes with a sequence that is not made. Those that are made take part again, so that in fast numerics too, which see what is
/// batched together, a job that goes on does what the first one would have done.
fn pending(work: &[Work], (batch_tokens, how): (usize, Rows), made: &[bool]) -> Vec<Pass> {
    assert_eq!(work.len(), made.len(), "made or not, each of the sequences");
    passes(work, batch_tokens, how).into_iter().filter(|pass| pass.numbers.iter().any(|&number| !made[number])).collect()
}

fn numbers_went_wrong(wrong: String) -> Error {
    Error::new(Kind::Numeric, wrong).remedy("look at the checkpoint's weights with trireme-checkpoint verify, or use --dtype f32")
}

/// The rows of a pass. What they are asked, if it is not the next token of each, is the caller's.
fn micro_batch(device: &dyn Device, work: &[Work], pass: &Pass) -> Result<MicroBatch> {
    let (mut tokens, mut targets, mut positions, mut sequence_starts) = (Vec::new(), Vec::new(), Vec::new(), vec![0]);
    for (&number, sequence) in pass.numbers.iter().zip(&pass.sequences) {
        let own = sequence.n_shared..work[number].n_rows;
        tokens.extend_from_slice(&work[number].tokens[own.clone()]);
        // Neither attributes nor questions have targets; what stands there is not looked at.
        targets.extend(own.clone().map(|_| 0u32));
        positions.extend(own.map(|position| position as u32));
        sequence_starts.push(tokens.len());
    }
    MicroBatch::new(device, [&tokens, &targets, &positions], &vec![0.0; tokens.len()], sequence_starts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::nccl::Sums;
    use crate::device::cpu::Cpu;

    /// Devices are opened for the order of sums that scores then have: with measured algorithms, which two runs may choose differently, or
    /// the library's sums over ranks, for fast scores only.
    #[test]
    fn devices_are_opened_for_the_order_of_sums() {
        let cpu = Cpu::new();
        let formats =
            [None, Some(WeightFormat::Stored), Some(WeightFormat::Fp8(Fp8Scales::Rows)), Some(WeightFormat::Fp8(Fp8Scales::Tensor))];
        let mut n_of_each = [0, 0];
        for (asked, weights) in
            [None, Some(Mode::Fast), Some(Mode::Reproducible)].into_iter().flat_map(|asked| formats.map(|of| (asked, of)))
        {
            let Ok(found) = numerics(asked, &cpu, weights) else { continue };
            let is_reproducible = matches!(found, Numerics::Reproducible(_));
            assert_eq!(Sums::of(mode(asked, weights)) == Sums::Ordered, is_reproducible, "{asked:?}, {weights:?}");
            n_of_each[usize::from(is_reproducible)] += 1;
        }
        assert_eq!(n_of_each, [4 + 1, 3 + 3], "one FP8 scale for all keeps scores from being reproducible");
    }
}
