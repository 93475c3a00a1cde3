//! The next tokens of all rows of a pass: drawn by the device where it can, by the host from the gathered logits where it cannot; and
//! written into messages for the stages of a pipeline. Which of the two draws a row depends on its own request alone.

use super::sampler::{self, Choice, Drawing};
use crate::comm::Communicator;
use crate::device::cpu::for_tasks;
use crate::device::{Device, Draw};
use crate::tensor::{DType, Tensor};
use half::bf16;
use std::borrow::Cow;
use std::sync::OnceLock;

/// One choice a row of logits[n, V/tp] of all tensor-parallel ranks, of the first `n_valid` columns; the same on all of them.
pub fn choose_rows(device: &dyn Device, tp: &dyn Communicator, logits: &Tensor, n_valid: usize, drawings: &[Drawing]) -> Vec<Choice> {
    let mut choices: Vec<Option<Choice>> = vec![None; drawings.len()];
    let gathered = if tp.size() == 1 {
        draw_on_device(device, logits, n_valid, drawings, &mut choices);
        if choices.iter().all(Option::is_some) {
            return choices.into_iter().flatten().collect();
        }
        Gathered::new(device, tp, logits)
    } else {
        let gathered = Gathered::new(device, tp, logits);
        // Also of several ranks a device that draws draws: the host has another logarithm in its last bit.
        if device.sample(&logits.rows(0..0), 1, &[]).is_some() {
            draw_on_device(device, &gathered.on_device(device), n_valid, drawings, &mut choices);
        }
        gathered
    };
    let choices: Vec<OnceLock<Choice>> = choices.into_iter().map(|choice| choice.map_or_else(OnceLock::new, OnceLock::from)).collect();
    for_tasks(choices.len(), choices.len() * n_valid, |idx| {
        choices[idx].get_or_init(|| gathered.choose(idx, n_valid, &drawings[idx]));
    });
    choices.into_iter().map(|choice| choice.into_inner().expect("each was chosen")).collect()
}

/// Fills in the rows that the device can draw, so that their logits are not downloaded when it can draw all of them.
fn draw_on_device(device: &dyn Device, logits: &Tensor, n_valid: usize, drawings: &[Drawing], choices: &mut [Option<Choice>]) {
    // What only the host can draw takes the most likely token there, which is not looked at.
    let unused = Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, uniform: 0.5 };
    let wanted: Vec<Option<Draw>> = drawings.iter().map(Drawing::on_device).collect();
    if wanted.iter().all(Option::is_none) {
        return;
    }
    let draws: Vec<Draw> = wanted.iter().map(|draw| draw.unwrap_or(unused)).collect();
    let Some(drawn) = device.sample(logits, n_valid, &draws) else { return };
    for ((choice, wanted), drawn) in choices.iter_mut().zip(&wanted).zip(drawn) {
        *choice = wanted.map(|_| Choice { token: drawn.token, logprob: drawn.logprob, top: Vec::new() });
    }
}

/// Logits of all tensor-parallel ranks on the host.
struct Gathered<'a> {
    /// The bytes of [tp, n, V/tp].
    words: Cow<'a, [u32]>,
    dtype: DType,
    tp: usize,
    n: usize,
    columns: usize,
}

impl<'a> Gathered<'a> {
    fn new(device: &dyn Device, tp: &dyn Communicator, logits: &'a Tensor) -> Gathered<'a> {
        let of = |words| Gathered { words, dtype: logits.dtype(), tp: tp.size(), n: logits.n_rows(), columns: logits.row_len() };
        // All of them lie here already, unless they end amid a word.
        let here = (tp.size() == 1 && logits.is_host()).then(|| bytemuck::try_cast_slice(logits.bytes()).ok()).flatten();
        if let Some(words) = here {
            return of(Cow::Borrowed(words));
        }
        let mut words = vec![0u32; (logits.n_bytes() * tp.size()).div_ceil(4)];
        let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..logits.n_bytes() * tp.size()];
        if tp.size() == 1 {
            device.download(logits, bytes);
        } else {
            let mut mine = vec![0u8; logits.n_bytes()];
            device.download(logits, &mut mine);
            tp.start_all_gather_bytes(&mine, bytes).wait();
        }
        of(Cow::Owned(words))
    }

    /// Whole rows [n, V], on a device.
    fn on_device(&self, device: &dyn Device) -> Tensor {
        let row_bytes = self.columns * self.dtype.bytes();
        let (bytes, mut rows) = (bytemuck::cast_slice::<u32, u8>(&self.words), Vec::with_capacity(self.n * self.tp * row_bytes));
        for (idx, part) in (0..self.n).flat_map(|idx| (0..self.tp).map(move |part| (idx, part))) {
            rows.extend_from_slice(&bytes[(part * self.n + idx) * row_bytes..][..row_bytes]);
        }
        let whole = device.alloc(&[self.n, self.columns * self.tp], self.dtype);
        let mut whole = whole.unwrap_or_else(|error| panic!("logits of all ranks: {error}"));
        device.upload(&rows, &mut whole);
        whole
    }

    /// The choice of a row, of its first `n_valid` logits.
    fn choose(&self, idx: usize, n_valid: usize, drawing: &Drawing) -> Choice {
        if self.tp > 1 || !drawing.is_plain_greedy() {
            return sampler::choose(&self.row(idx, n_valid), drawing);
        }
        let row = idx * self.columns..idx * self.columns + n_valid;
        match self.dtype {
            DType::F32 => sampler::most_likely(&bytemuck::cast_slice::<u32, f32>(&self.words)[row]),
            DType::BF16 => sampler::most_likely(&bytemuck::cast_slice::<u32, bf16>(&self.words)[row]),
            DType::U32 | DType::F8E4M3 => unreachable!("logits are floats"),
        }
    }

    /// The first `n_valid` logits of a row.
    fn row(&self, idx: usize, n_valid: usize) -> Vec<f32> {
        let mut row = Vec::with_capacity(self.columns * self.tp);
        for part in 0..self.tp {
            let first = (part * self.n + idx) * self.columns;
            match self.dtype {
                DType::F32 => row.extend_from_slice(&bytemuck::cast_slice(&self.words)[first..][..self.columns]),
                DType::BF16 => {
                    let halves: &[u16] = &bytemuck::cast_slice(&self.words)[first..][..self.columns];
                    row.extend(halves.iter().map(|half| f32::from_bits(u32::from(*half) << 16)));
                }
                DType::U32 | DType::F8E4M3 => unreachable!("logits are floats"),
            }
        }
        row.truncate(n_valid);
        row
    }
}

/// Words of a message with a choice for each of `drawings`: each choice has as many of the most likely tokens as were wanted of it, so
/// that whoever receives it knows its length.
pub fn n_words(drawings: &[Drawing]) -> usize {
    drawings.iter().map(|drawing| WORDS_A_TOKEN * (1 + drawing.n_top)).sum()
}

/// A token and its log-probability.
const WORDS_A_TOKEN: usize = 3;

/// Choices as such a message.
pub fn to_words(choices: &[Choice]) -> Vec<u32> {
    let pairs = choices.iter().flat_map(|choice| std::iter::once((choice.token, choice.logprob)).chain(choice.top.iter().copied()));
    let words = |(token, logprob): (u32, f64)| [token, logprob.to_bits() as u32, (logprob.to_bits() >> 32) as u32];
    pairs.flat_map(words).collect()
}

/// The choices of a message for these drawings.
pub fn from_words(words: &[u32], drawings: &[Drawing]) -> Vec<Choice> {
    let of_token = |words: &[u32]| (words[0], f64::from_bits(u64::from(words[1]) | u64::from(words[2]) << 32));
    let mut pairs = words.chunks_exact(WORDS_A_TOKEN).map(of_token);
    let choice = |drawing: &Drawing| {
        let (token, logprob) = pairs.next().expect("a message of n_words");
        Choice { token, logprob, top: pairs.by_ref().take(drawing.n_top).collect() }
    };
    drawings.iter().map(choice).collect()
}
