//! Products with packed weights (`crate::device::packed`): one form for one row and for thousands.
//!
//! A weight lies in panels of 32 output channels, [words of k][32 lanes], a word being an f32, a pair of bf16 or four integers; the rows
//! of x are packed beside each call, a few at a time, [words][rows]. A tile, all rows of a panel of x with all lanes of a panel of W,
//! stays in registers for all of k, so each element is one chain over k: fused multiply-adds in order, or dot products of neighbouring
//! pairs in order (vdpbf16ps). Where the processor has no such dot products, the pairs are taken apart and their terms multiplied in
//! f32, in order. Long pieces are summed in the slabs of `panels`, so that every sum of floats here is, bit by bit, that of
//! `CanonicalSums::gemm_in_pairs`. Sums of integers (vpdpbusd, or by 16 bits) are exact; each piece becomes
//! (sum * scale of the channel) * scale of the row and piece, on every processor the same bits.
//!
//! With few rows the weight streams by once, and nothing else is read: decode runs at the bandwidth of the memory. With many, blocks of
//! panels stay in the second-level cache while the rows pass by.

mod int8;
mod tiles;

use super::lanes::{Element, Isa, elements, elements_mut};
use super::panels::{self, Piece, Side};
use super::parallel::{Shared, for_rows, for_tasks};
use super::{Cpu, elementwise, float, team};
use crate::device::Device;
use crate::device::packed::{PackedForm, PackedProducts, PackedWeight};
use crate::error::Result;
use crate::parallel::pieces::pieces;
use crate::tensor::{DType, Tensor};
use int8::RowScales;
use std::collections::VecDeque;
use std::sync::{Arc, RwLock};
use team::Reads;
use tiles::{Job, Out, Scales};

/// Output channels of a panel.
const LANES: usize = 32;
/// Bytes of the panels that a task keeps in the second-level cache while rows pass by, and fetches for the next one.
const BLOCK_BYTES: usize = 256 * 1024;
/// Rows so few that the weight streams by: a task then needs no block to keep, and may be small.
const MOST_STREAMED: usize = 32;
/// To read a weight takes as long as to multiply so many rows with it.
const LEAST_ROWS_OF_COST: usize = 4;
/// Most pieces that are added in pairs.
const MOST_PIECES: usize = 8;
/// Most terms of a piece of integers: sums of as many products of 8 bits fit 32.
const MOST_TERMS: usize = 1 << 16;

/// What a word of a panel holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Word {
    /// An f32.
    Single,
    /// Two bf16, the earlier in the low half.
    Pair,
    /// Four integers, the earliest in the lowest byte: of x as they are, of W with 128 added.
    Bytes,
}

impl Word {
    fn of(form: PackedForm) -> Word {
        match form {
            PackedForm::Float(DType::BF16) => Word::Pair,
            PackedForm::Float(_) => Word::Single,
            PackedForm::Int8 => Word::Bytes,
        }
    }

    /// Terms of k.
    fn n_terms(self) -> usize {
        match self {
            Word::Single => 1,
            Word::Pair => 2,
            Word::Bytes => 4,
        }
    }
}

/// How the words of a panel are summed.
pub struct Order {
    /// Runs of words that are summed in order, laid out one after another.
    runs: Vec<Piece>,
    /// Runs of each piece: added in turn.
    n_runs: Vec<usize>,
}

impl Order {
    /// Of k terms in so many pieces.
    fn of(isa: Isa, word: Word, k: usize, n_pieces: usize) -> Order {
        assert!(n_pieces.is_power_of_two() && n_pieces <= MOST_PIECES, "{n_pieces} pieces in pairs");
        let (mut order, mut at) = (Order { runs: Vec::new(), n_runs: Vec::new() }, 0);
        for piece in pieces(k, n_pieces) {
            let runs = match word {
                Word::Single if isa >= Isa::Avx512 => panels::slabs_of(super::terms::Terms::Single, piece),
                Word::Pair if isa == Isa::Avx512Bf16 => panels::slabs_of(super::terms::Terms::Pairs, piece),
                Word::Single | Word::Pair | Word::Bytes => vec![piece],
            };
            order.n_runs.push(runs.len());
            for terms in runs {
                let words = at..at + terms.len().div_ceil(word.n_terms());
                at = words.end;
                order.runs.push(Piece { terms, words });
            }
        }
        order
    }

    fn words(&self) -> usize {
        self.runs.last().map_or(0, |run| run.words.end)
    }
}

/// Whether a weight streams by so many rows in the small tasks of a team.
fn streams(m: usize) -> bool {
    team::leads() && m <= MOST_STREAMED
}

/// A weight as a product reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stream {
    /// Address of its panels.
    at: usize,
    n_panels: usize,
    panel_bytes: usize,
    word: Word,
}

impl Stream {
    /// Panels that a task takes together, and how many times.
    fn units(self, m: usize) -> (usize, usize) {
        let unit = tiles::panels_of_tile(self.word, m);
        (unit, self.n_panels.div_ceil(unit))
    }

    /// As many panels each as the cache holds, but as much for each thread, in enough tasks that they end together.
    fn n_tasks(self, m: usize) -> usize {
        let (n_threads, of_thread) = (rayon::current_num_threads(), if streams(m) { 16 } else { 4 });
        let n_blocks = (self.n_panels * self.panel_bytes).div_ceil(BLOCK_BYTES);
        n_blocks.max(of_thread * n_threads).next_multiple_of(n_threads).min(self.units(m).1)
    }

    /// What the tasks of a product read.
    fn reads(self, m: usize) -> Reads {
        let (unit, n_units) = self.units(m);
        Reads::row(self.at, unit * self.panel_bytes, n_units)
    }
}

/// The weights in the order in which they last passed: in a decode step the same as in the step before, so what passed longest ago
/// comes next.
#[derive(Default)]
pub struct Passing {
    weights: VecDeque<Stream>,
    /// What is read between the next weight and the one after it.
    pub between: Option<[Reads; 2]>,
}

impl Passing {
    /// What comes after this one, which passes now, the next first. What stood before it has not come again.
    fn next_after(&mut self, now: Stream) -> impl Iterator<Item = Stream> {
        if let Some(place) = self.weights.iter().position(|stream| stream.at == now.at) {
            self.weights.drain(..=place);
        }
        self.weights.push_back(now);
        self.weights.iter().take(self.weights.len() - 1).copied()
    }
}

/// The orders met so far, by word, terms and pieces.
pub type Orders = RwLock<Vec<((Word, usize, usize), Arc<Order>)>>;

impl PackedProducts for Cpu {
    fn pack(&self, weight: &Tensor, n_pieces: usize) -> Result<PackedWeight> {
        let (n, k, form) = (weight.n_rows(), weight.row_len(), PackedForm::Float(weight.dtype()));
        let order = self.order(Word::of(form), k, n_pieces);
        let mut words = self.alloc(&[n.div_ceil(LANES), order.words(), LANES], DType::F32)?;
        float!(weight.dtype(), E => self.pack_floats::<E>(words.f32_mut(), (weight, LANES), &order));
        Ok(PackedWeight { form, n_rows: n, row_len: k, n_pieces, words, scale: None })
    }

    fn sizes(&self, sizes: &mut Tensor, weight: &Tensor) {
        assert_eq!(sizes.n_elements(), weight.n_rows(), "sizes of the rows of {weight:?} to {sizes:?}");
        let (n, k, sizes) = (weight.n_rows(), weight.row_len(), Shared::new(sizes.f32_mut()));
        for_rows(n, k, |rows| {
            // SAFETY: the ranges are disjoint.
            for (size, row) in unsafe { sizes.part(rows.clone()) }.iter_mut().zip(rows) {
                *size = float!(weight.dtype(), E => int8::size(self.isa, &elements::<E>(weight)[row * k..][..k]));
            }
        });
    }

    fn pack_int8(&self, weight: &Tensor, sizes: &Tensor, n_pieces: usize) -> Result<PackedWeight> {
        let (n, k, form) = (weight.n_rows(), weight.row_len(), PackedForm::Int8);
        let order = self.order(Word::of(form), k, n_pieces);
        assert!(sizes.n_elements() == n && order.runs.iter().all(|run| run.terms.len() <= MOST_TERMS), "int8 of {weight:?}, {sizes:?}");
        let mut words = self.alloc(&[n.div_ceil(LANES), order.words(), LANES], DType::F32)?;
        let mut scale = self.alloc(&[n], DType::F32)?;
        scale.f32_mut().iter_mut().zip(sizes.f32()).for_each(|(scale, size)| *scale = int8::scale_of(*size));
        let (scales, size) = (scale.f32(), order.words() * LANES);
        let to = Shared::new(words.f32_mut());
        for_tasks(n.div_ceil(LANES), n * k, |panel| {
            // SAFETY: each panel is packed by one task.
            let to = unsafe { to.part(panel * size..(panel + 1) * size) };
            for (row, scale) in scales.iter().enumerate().take((panel + 1) * LANES).skip(panel * LANES) {
                let lane = row % LANES;
                float!(weight.dtype(), E => int8::set_lane(self.isa, to, lane, &elements::<E>(weight)[row * k..][..k], *scale, &order));
            }
        });
        Ok(PackedWeight { form, n_rows: n, row_len: k, n_pieces, words, scale: Some(scale) })
    }

    fn multiply(&self, out: &mut Tensor, x: &Tensor, weight: &PackedWeight) {
        let (m, n, k) = (x.n_rows(), weight.n_rows, weight.row_len);
        let fits = x.row_len() == k && out.n_rows() == m && out.row_len() == n && [DType::F32, x.dtype()].contains(&out.dtype());
        assert!(
            fits && [PackedForm::Int8, PackedForm::Float(x.dtype())].contains(&weight.form),
            "{out:?} = {x:?} x [{n}, {k}] {:?}",
            weight.form
        );
        if m == 0 || n == 0 {
            return;
        }
        let word = Word::of(weight.form);
        let order = self.order(word, k, weight.n_pieces);
        let (words, rows) = (order.words(), tiles::rows_of_tile(self.isa, m));
        let n_row_panels = m.div_ceil(rows);
        let (len, n_scales) = (n_row_panels * rows * words, if word == Word::Bytes { n_row_panels * rows * weight.n_pieces } else { 0 });
        let mut memory = self.pool.take(len + 2 * n_scales);
        let (packed, scales) = memory.split_at_mut(len);
        let (row_scales, begin) = scales.split_at_mut(n_scales);
        float!(x.dtype(), E => match word {
            Word::Bytes => self.pack_bytes::<E>((packed, row_scales, begin), (x, rows), &order),
            Word::Single | Word::Pair => self.pack_floats::<E>(packed, (x, rows), &order),
        });
        let scales = weight.scale.as_ref().map(|scale| Scales { weight: scale.f32(), rows: row_scales, begin });
        let out = match out.dtype() {
            DType::F32 => Out::Single(Shared::new(out.f32_mut())),
            _ => Out::Half(Shared::new(elements_mut(out))),
        };
        let job = Job { word, x: packed, rows, weight: weight.words.f32(), order: &order, scales, size: (m, n), out };
        let n_panels = n.div_ceil(LANES);
        let stream = Stream { at: weight.words.f32().as_ptr() as usize, n_panels, panel_bytes: words * LANES * size_of::<f32>(), word };
        let mut between = None;
        if streams(m) {
            let mut passing = self.passing.lock().expect("no panic under the lock");
            between = passing.between.take();
            team::read_next(between.into_iter().flatten().chain(passing.next_after(stream).map(|next| next.reads(m))));
        }
        let (unit, n_units) = stream.units(m);
        let n_tasks = stream.n_tasks(m);
        // What streams by costs what reading it takes, however few the rows are.
        let cost = n * words * if streams(m) { m.max(LEAST_ROWS_OF_COST) } else { m } / 16;
        for_tasks(n_tasks, cost, |task| {
            let [first, end] = [task, task + 1].map(|task| (unit * (task * n_units / n_tasks)).min(n_panels));
            tiles::tiles(self.isa, &job, first..end);
        });
        between.into_iter().flatten().for_each(team::fetch_own);
    }

    fn look_up(&self, out: &mut Tensor, tokens: &Tensor, table: &PackedWeight, first_row: usize) {
        let (tokens, k) = (tokens.u32(), table.row_len);
        assert!(out.n_rows() == tokens.len() && out.row_len() == k, "{} tokens of [{}, {k}] to {out:?}", tokens.len(), table.n_rows);
        assert!([PackedForm::Int8, PackedForm::Float(out.dtype())].contains(&table.form), "look up {:?} to {out:?}", table.form);
        let order = self.order(Word::of(table.form), k, table.n_pieces);
        let size = order.words() * LANES;
        float!(out.dtype(), E => {
            let out = Shared::new(elements_mut::<E>(out));
            for_rows(tokens.len(), 8 * k, |rows| {
                // SAFETY: the ranges are disjoint.
                let out = unsafe { out.part(rows.start * k..rows.end * k) };
                for (row, token) in out.chunks_exact_mut(k.max(1)).zip(&tokens[rows]) {
                    let Some(at) = (*token as usize).checked_sub(first_row).filter(|at| *at < table.n_rows) else {
                        row.fill(E::from_f32(-0.0));
                        continue;
                    };
                    let panel = &table.words.f32()[at / LANES * size..][..size];
                    match &table.scale {
                        Some(scale) => {
                            let mut wide = self.pool.take(k);
                            int8::get_lane(&mut wide, panel, at % LANES, scale.f32()[at], &order);
                            elementwise::convert(self.isa, row, &wide);
                        }
                        None => get_lane(row, panel, at % LANES, &order),
                    }
                }
            });
        });
    }
}

impl Cpu {
    /// How k terms in so many pieces are summed.
    fn order(&self, word: Word, k: usize, n_pieces: usize) -> Arc<Order> {
        let key = (word, k, n_pieces);
        if let Some((_, order)) = self.orders.read().expect("no panic under the lock").iter().find(|(of, _)| *of == key) {
            return Arc::clone(order);
        }
        let order = Arc::new(Order::of(self.isa, word, k, n_pieces));
        self.orders.write().expect("no panic under the lock").push((key, Arc::clone(&order)));
        order
    }

    /// Rows of a matrix, so many a panel, as words.
    fn pack_floats<E: Element>(&self, to: &mut [f32], (rows, width): (&Tensor, usize), order: &Order) {
        let (len, k, size) = (rows.n_rows(), rows.row_len(), width * order.words());
        if size == 0 {
            return;
        }
        let side = Side { data: elements::<E>(rows), len, k, k_contiguous: true, width };
        let to = Shared::new(to);
        for_tasks(side.n_panels(), len * k, |panel| {
            // SAFETY: each panel is packed by one task.
            panels::pack(self.isa, unsafe { to.part(panel * size..(panel + 1) * size) }, side, panel..panel + 1, &order.runs);
        });
    }

    /// Rows of x, so many a panel, as integers: (words, scales, what sums begin with). Rows past the last one have all 0.
    fn pack_bytes<E: Element>(&self, to: (&mut [f32], &mut [f32], &mut [f32]), (x, width): (&Tensor, usize), order: &Order) {
        let (m, k, n_words, n_scales) = (x.n_rows(), x.row_len(), order.words(), width * order.n_runs.len());
        let x = elements::<E>(x);
        let (words, scales, begin) = (Shared::new(to.0), Shared::new(to.1), Shared::new(to.2));
        for_tasks(m.div_ceil(width), m * k, |panel| {
            let of_scales = panel * n_scales..(panel + 1) * n_scales;
            // SAFETY: each panel is packed by one task.
            let (scales, begin) = unsafe { (scales.part(of_scales.clone()), begin.part(of_scales)) };
            // SAFETY: as above.
            let words = unsafe { words.part(panel * width * n_words..(panel + 1) * width * n_words) };
            let mut to = RowScales { scales, begin };
            let mut set_row = |words: &mut [f32], row: usize| match panel * width + row {
                at if at < m => to.set_row(self.isa, words, (row, width), &x[at * k..][..k], order),
                _ => to.clear_row(words, (row, width)),
            };
            if width == 1 {
                return set_row(words, 0);
            }
            let mut rows = self.pool.take(width * n_words);
            (0..width).for_each(|row| set_row(&mut rows[row * n_words..][..n_words], row));
            let side = Side { data: &rows[..], len: width, k: n_words, k_contiguous: true, width };
            panels::pack(self.isa, words, side, 0..1, &[Piece { terms: 0..n_words, words: 0..n_words }]);
        });
    }
}

/// Lane `lane` of a panel of floats.
fn get_lane<E: Element>(to: &mut [E], panel: &[f32], lane: usize, order: &Order) {
    let (panel, per_word): (&[E], usize) = (bytemuck::cast_slice(panel), 4 / size_of::<E>());
    for run in &order.runs {
        let words = panel[run.words.start * LANES * per_word..].chunks_exact(LANES * per_word);
        for (to, word) in to[run.terms.clone()].chunks_mut(per_word).zip(words) {
            to.copy_from_slice(&word[lane * per_word..][..to.len()]);
        }
    }
}
