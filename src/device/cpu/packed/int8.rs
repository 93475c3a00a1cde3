//! Rows of numbers as integers of 8 bits with a scale. The scale of numbers is the size of the largest / 127, each becomes
//! round(x / scale), ties to even, at most 127 in size, so the integer times the scale is within half a scale of it (and a unit of
//! roundoff of the number). Numbers that are all so small that the scale were subnormal count as 0; where one is not finite, so is the
//! scale, and every product with it.

use super::{LANES, Order};
use crate::device::cpu::lanes::{Element, kernel};

/// The largest integer.
const LARGEST: f32 = 127.0;
/// What weights are stored with, unsigned, because the dot products want one side so.
const OFFSET: i32 = 128;

/// The scale of numbers of which the largest has this size.
pub fn scale_of(size: f32) -> f32 {
    let scale = size / LARGEST;
    if scale < f32::MIN_POSITIVE { 0.0 } else { scale }
}

kernel! {
    /// The size of the largest; not finite where one is not.
    pub fn size over V [E] (x: &[E]) -> f32 {
        // Without the sign, numbers are ordered as their bits are, and what is not finite comes last.
        f32::from_bits(x.iter().fold(0, |most, x| most.max(x.get().to_bits() & 0x7fff_ffff)))
    }
}

/// Added to a number up to 2^22 in size, it rounds it to the nearest integer, ties to even, and leaves that in the low bits.
const TO_INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23

kernel! {
    /// to[i] = x[i] by this scale; returns their sum.
    pub fn integers over V [E] (to: &mut [i8], x: &[E], scale: f32) -> i32 {
        if scale == 0.0 || !scale.is_finite() {
            to.fill(0);
            return 0;
        }
        let mut sum = 0;
        for (to, x) in to.iter_mut().zip(x) {
            let integer = ((x.get() / scale).clamp(-LARGEST, LARGEST) + TO_INTEGER).to_bits().wrapping_sub(TO_INTEGER.to_bits()) as i32;
            *to = integer as i8;
            sum += integer;
        }
        sum
    }
}

/// Of a panel of rows of x: scales [pieces][rows], and what each sum begins with, [pieces][rows]: the weights' offset taken off, as it
/// comes in with every term.
pub struct RowScales<'a> {
    /// The scales.
    pub scales: &'a mut [f32],
    /// 32-bit integers.
    pub begin: &'a mut [f32],
}

impl RowScales<'_> {
    /// Row `row` of so many: words of four integers each, and its scales.
    pub fn set_row<E: Element>(&mut self, isa: super::Isa, words: &mut [f32], (row, rows): (usize, usize), x: &[E], order: &Order) {
        let integers: &mut [i8] = bytemuck::cast_slice_mut(words);
        for (piece, run) in order.runs.iter().enumerate() {
            let (x, to) = (&x[run.terms.clone()], &mut integers[4 * run.words.start..4 * run.words.end]);
            let scale = scale_of(size(isa, x));
            let (to, behind) = to.split_at_mut(x.len());
            let sum = self::integers(isa, to, x, scale);
            behind.fill(0);
            self.scales[piece * rows + row] = scale;
            self.begin[piece * rows + row] = f32::from_bits((-OFFSET * sum) as u32);
        }
    }

    /// The same of a row of zeros.
    pub fn clear_row(&mut self, words: &mut [f32], (row, rows): (usize, usize)) {
        words.fill(0.0);
        for of_rows in [&mut *self.scales, &mut *self.begin] {
            of_rows[row..].iter_mut().step_by(rows).for_each(|x| *x = 0.0);
        }
    }
}

/// Row `lane` of a panel of W, [words][LANES], by its scale.
pub fn set_lane<E: Element>(isa: super::Isa, panel: &mut [f32], lane: usize, w: &[E], scale: f32, order: &Order) {
    let mut integers = vec![0i8; 4 * order.words()];
    for run in &order.runs {
        self::integers(isa, &mut integers[4 * run.words.start..][..run.terms.len()], &w[run.terms.clone()], scale);
    }
    for (to, word) in panel[lane..].iter_mut().step_by(LANES).zip(integers.chunks_exact(4)) {
        let unsigned = |i: usize| (i32::from(word[i]) + OFFSET) as u8;
        *to = f32::from_bits(u32::from_le_bytes([unsigned(0), unsigned(1), unsigned(2), unsigned(3)]));
    }
}

/// Lane `lane` of a panel of W, as numbers.
pub fn get_lane(to: &mut [f32], panel: &[f32], lane: usize, scale: f32, order: &Order) {
    for run in &order.runs {
        let words = panel[lane + run.words.start * LANES..].iter().step_by(LANES);
        for (to, word) in to[run.terms.clone()].chunks_mut(4).zip(words) {
            let bytes = word.to_bits().to_le_bytes();
            to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = (i32::from(byte) - OFFSET) as f32 * scale);
        }
    }
}
