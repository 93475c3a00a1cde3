//! Attention over a KV cache in pages. A row (a query head of a new token) gets the same bits whatever else is in the call.
//!
//! Keys are walked in blocks of BLOCK from the sequence's first, however they are shared out. Of each block a row gets a part: the largest
//! score, the weights exp(score - largest) of the keys it sees, their sum, and the values summed with them, each score and each element
//! of the values' sum one chain of additions in a fixed order. The parts are joined one after another (the online softmax of Milakov and
//! Gimelshein 2018), here or after all of them were made, by other threads too. Rows stand in the first dim of every product and are never
//! summed over, so how many there are decides only how often a tile is used that was packed once: [words of d, key] of a page's keys,
//! [words of keys, d] of its values, words as in `terms`.

mod few;
mod shares;

use super::lanes::{Element, Isa, each, kernel, load, prefetch, store};
use super::parallel::{Pool, Shared, for_tasks};
use super::product::{Product, To, product};
use super::team::Reads;
use super::terms::{Terms, along_dims};
use crate::device::{CacheSpan, Heads, KvCache, PAGE_TOKENS};
use half::bf16;
use shares::{LEAST_COST, Piece, Shares, Strand, strands};
use std::ops::Range;

/// Keys of a block.
const BLOCK: usize = 4 * PAGE_TOKENS;
/// Most rows that a tile is packed for.
const ROWS: usize = 96;
/// Rows so few that reading keys and values takes longest: pages are then read as they lie, for all kv heads.
const FEW_ROWS: usize = 16;
/// Columns of a panel of values: as many as one tile of a product is wide.
const PANEL: usize = 64;
/// Bytes of a cache line.
const LINE: usize = 64;
/// From one row of scores to the next: off the powers of two that meet in one set of the first cache.
const SCORES: usize = BLOCK + 16;

/// The cache as its two flat arrays [n_pages * PAGE_TOKENS, G*D].
pub struct Cache<'a, E> {
    /// Keys.
    pub keys: &'a mut [E],
    /// Values.
    pub values: &'a mut [E],
}

/// Of sums[row, padded d], then the largest score and the sum of weights of each row.
fn part_len(n_rows: usize, dim: usize) -> usize {
    n_rows * (dim.next_multiple_of(16) + 2)
}

/// A part, or several that were joined: see `part_len`.
struct Part<'a> {
    sums: &'a mut [f32],
    max: &'a mut [f32],
    total: &'a mut [f32],
}

impl<'a> Part<'a> {
    fn over(memory: &'a mut [f32], n_rows: usize, dim: usize) -> Part<'a> {
        let (sums, rest) = memory.split_at_mut(n_rows * dim.next_multiple_of(16));
        let (max, total) = rest[..2 * n_rows].split_at_mut(n_rows);
        Part { sums, max, total }
    }

    /// Of no keys.
    fn clear(&mut self) {
        self.sums.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
        self.total.fill(0.0);
    }
}

/// What a task works in.
struct Room<'a> {
    /// [row, words of d]
    queries: &'a mut [f32],
    /// Of a page and a kv head: keys [words of d, PAGE_TOKENS], or values [panel, words of keys, PANEL].
    tile: &'a mut [f32],
    /// [row, SCORES]: scores, then weights as words of keys.
    scores: &'a mut [f32],
}

/// A call.
struct Call<'a, E> {
    isa: Isa,
    pool: &'a Pool,
    heads: Heads,
    terms: Terms,
    qkv: &'a [E],
    keys: &'a [E],
    values: &'a [E],
    out: Shared<'a, E>,
}

/// See `Device::attention_cached`.
pub fn attention_cached<E: Element>(isa: Isa, pool: &Pool, out: &mut [E], qkv: &[E], cache: Cache<E>, work: (&[CacheSpan], Heads)) {
    let (spans, heads) = work;
    let dim = heads.dim;
    let Cache { keys, values } = cache;
    append(keys, values, qkv, (spans, heads));
    let n_threads = rayon::current_num_threads();
    let strands = strands(spans, heads, n_threads);
    let shares = Shares::of(&strands, dim, n_threads);
    let call = Call { isa, pool, heads, terms: Terms::of::<E>(isa, dim), qkv, keys, values, out: Shared::new(out) };
    let mut memory = (shares.parts_len > 0).then(|| pool.take(shares.parts_len));
    let parts = Shared::new(memory.as_deref_mut().unwrap_or_default());
    for_tasks(shares.tasks.len(), shares.tasks.len() * LEAST_COST, |task| {
        let pieces = &shares.pieces[shares.tasks[task].clone()];
        let most = pieces.iter().map(|piece| strands[piece.strand].n_rows()).max().unwrap_or(0);
        call.with_room(most, |room, mut memory| {
            pieces.iter().for_each(|piece| call.piece(&strands[piece.strand], piece, (room, &mut memory), &parts))
        });
    });
    for_tasks(shares.cut.len(), shares.parts_len, |i| {
        let (strand, at) = (&strands[shares.cut[i].0], shares.cut[i].1);
        let len = part_len(strand.n_rows(), dim);
        let mut joined = pool.take(len);
        let mut joined = Part::over(&mut joined, strand.n_rows(), dim);
        joined.clear();
        for block in 0..strand.n_blocks() {
            // SAFETY: whoever wrote it is done, and nobody else reads this strand's parts.
            let part = unsafe { parts.part(at + block * len..at + (block + 1) * len) };
            join(isa, &mut joined, &Part::over(part, strand.n_rows(), dim));
        }
        call.finish(strand, &joined);
    });
}

/// Most new tokens whose places are fetched: more are a prompt, which takes longer than writing to them.
const MOST_PLACES: usize = 32;

/// Has the places of keys and values of a few new tokens fetched: else all threads wait for what was just written there, which is on its
/// way through the caches until memory has brought the rest of its lines.
pub fn fetch_places(cache: &KvCache, spans: &[CacheSpan]) {
    if spans.iter().map(|span| span.rows.len()).sum::<usize>() > MOST_PLACES {
        return;
    }
    for tensor in [&cache.keys, &cache.values] {
        let size = tensor.dims()[2] * tensor.dtype().bytes();
        for row in spans.iter().flat_map(|span| (span.past..span.n_tokens()).map(|token| span.cache_row(token))) {
            prefetch(&tensor.bytes()[row * size..][..size]);
        }
    }
}

/// What attention over the cache reads first, kv heads shared out: the first page of keys and of values, where one sequence has a few new
/// tokens and so little past that its heads are shared out. It lies there since the last step, out of all caches, and to wait for it
/// takes longer than to work on it.
pub fn first_reads(cache: &KvCache, spans: &[CacheSpan]) -> Option<[Reads; 2]> {
    let [span] = spans else { return None };
    let are_few = span.past > 0 && span.rows.len() <= MOST_PLACES;
    if !are_few || shares::are_shared_out(span.n_tokens().div_ceil(BLOCK), rayon::current_num_threads()) {
        return None;
    }
    Some([&cache.keys, &cache.values].map(|tensor| {
        let row_bytes = tensor.dims()[2] * tensor.dtype().bytes();
        let at = tensor.bytes()[span.cache_row(0) * row_bytes..].as_ptr() as usize;
        Reads { at, of_unit: LINE, n_units: row_bytes / LINE, n_rows: span.past.min(PAGE_TOKENS), row_bytes }
    }))
}

/// Keys and values of the new tokens to their places.
fn append<E: Element>(keys: &mut [E], values: &mut [E], qkv: &[E], (spans, heads): (&[CacheSpan], Heads)) {
    let (columns, d, width) = (heads.qkv_columns(), heads.dim, heads.kv * heads.dim);
    let n_new: usize = spans.iter().map(|span| span.rows.len()).sum();
    let (keys, values) = (Shared::new(keys), Shared::new(values));
    for_tasks(heads.kv, n_new * 2 * width, |group| {
        for span in spans {
            for (i, token) in span.rows.clone().enumerate() {
                let to = span.cache_row(span.past + i) * width + group * d;
                let from = &qkv[token * columns + heads.key_column(group)..][..2 * d];
                // SAFETY: the columns of a head belong to one task.
                let (key, value) = unsafe { (keys.part(to..to + d), values.part(to..to + d)) };
                key.copy_from_slice(&from[..d]);
                value.copy_from_slice(&from[d..]);
            }
        }
    });
}

impl<E: Element> Call<'_, E> {
    fn with_room(&self, n_rows: usize, work: impl FnOnce(&mut Room, [&mut [f32]; 2])) {
        let d = self.heads.dim;
        let keys = self.terms.words(d).next_multiple_of(16) * PAGE_TOKENS;
        let values = d.div_ceil(PANEL) * self.terms.words(PAGE_TOKENS) * PANEL;
        let lens = [n_rows * self.terms.words(d), keys.max(values), n_rows * SCORES, part_len(n_rows, d), part_len(n_rows, d)];
        let mut buffer = self.pool.take(lens.iter().map(|len| len.next_multiple_of(16)).sum());
        let mut rest = &mut buffer[..];
        let [queries, tile, scores, part, joined] = lens.map(|len| {
            let (first, behind) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(16));
            rest = behind;
            &mut first[..len]
        });
        work(&mut Room { queries, tile, scores }, [part, joined]);
    }

    /// The parts of some blocks of a strand: kept, or joined into the strand's result where these are all of them.
    fn piece(&self, strand: &Strand, piece: &Piece, (room, memory): (&mut Room, &mut [&mut [f32]; 2]), parts: &Shared<f32>) {
        let (n_rows, dim, words) = (strand.n_rows(), self.heads.dim, self.terms.words(self.heads.dim));
        self.fetch_keys(strand, piece.blocks.start * BLOCK);
        for (row, to) in (0..n_rows).zip(room.queries.chunks_exact_mut(words)) {
            let (token, head) = strand.place(row);
            let from = token * self.heads.qkv_columns() + self.heads.query_column(head);
            along_dims(self.isa, self.terms, to, &self.qkv[from..][..dim]);
        }
        let len = part_len(n_rows, dim);
        if let Some(at) = piece.parts_at {
            for block in piece.blocks.clone() {
                // SAFETY: each block of a strand is in one piece.
                let part = unsafe { parts.part(at + block * len..at + (block + 1) * len) };
                self.part(strand, block, room, &mut Part::over(part, n_rows, dim));
            }
            return;
        }
        let [mut part, mut joined] = memory.each_mut().map(|memory| Part::over(memory, n_rows, dim));
        joined.clear();
        for block in piece.blocks.clone() {
            self.part(strand, block, room, &mut part);
            join(self.isa, &mut joined, &part);
        }
        self.finish(strand, &joined);
    }

    /// A page of keys or values: rows of all kv heads, of as many keys as the strand sees.
    fn page<'a>(&self, of: &'a [E], strand: &Strand, key: usize) -> &'a [E] {
        let (n, width) = (strand.n_keys().saturating_sub(key).min(PAGE_TOKENS), self.heads.kv * self.heads.dim);
        if n == 0 { &[] } else { &of[strand.span.pages[key / PAGE_TOKENS] as usize * PAGE_TOKENS * width..][..n * width] }
    }

    /// Has the strand's part of the page of keys fetched that a piece begins with, where nothing is packed and each waits for them.
    fn fetch_keys(&self, strand: &Strand, first: usize) {
        if strand.rows.len() <= few::MOST_ROWS {
            let (d, width) = (self.heads.dim, self.heads.kv * self.heads.dim);
            for row in self.page(self.keys, strand, first).chunks_exact(width) {
                prefetch(&row[strand.groups.start * d..strand.groups.end * d]);
            }
        }
    }

    /// What of the page that is read next is fetched while the i-th kv head of a strand is at work: a share, where all of it is read.
    fn ahead<'a>(&self, next: &'a [E], strand: &Strand, i: usize) -> &'a [E] {
        if strand.groups.len() == self.heads.kv { share(next, i, self.heads.kv) } else { &[] }
    }

    /// A page with those that are read next, where the strand has so few rows a kv head that nothing is packed; None where it has more.
    fn few<'a>(&self, strand: &Strand, (rows, ahead): (&'a [E], [&'a [E]; 2]), (m, n): (usize, usize)) -> Option<few::Page<'a, E>> {
        let (d, width) = (self.heads.dim, self.heads.kv * self.heads.dim);
        let (column, n_groups, of_group) = (strand.groups.start * d, strand.groups.len(), strand.rows.len());
        let is_few = (1..=few::MOST_ROWS).contains(&m) && d % few::DIMS == 0;
        is_few.then_some(few::Page { rows, ahead, width, column, d, n, n_groups, of_group })
    }

    /// What the strand's rows get of one block.
    fn part(&self, strand: &Strand, block: usize, room: &mut Room, part: &mut Part) {
        let first = block * BLOCK;
        let n = BLOCK.min(strand.n_keys() - first);
        for at in (0..n).step_by(PAGE_TOKENS) {
            let (page, is_last) = (self.page(self.keys, strand, first + at), at + PAGE_TOKENS >= n);
            let next = if is_last { (self.values, first) } else { (self.keys, first + at + PAGE_TOKENS) };
            // Of few rows the first values come beside the first keys: of a last page there may be too little to fetch them by.
            let beside = if at == 0 && !is_last { self.page(self.values, strand, first) } else { &[] };
            self.scores(strand, (first, at, n), (page, [self.page(next.0, strand, next.1), beside]), room);
        }
        let seen: Vec<usize> = strand.rows.clone().map(|row| strand.visible(row).saturating_sub(first).min(n)).collect();
        weigh(self.isa, self.terms, room.scores, part, &seen, (1.0 / (self.heads.dim as f32).sqrt(), n));
        part.sums.fill(0.0);
        for at in (0..n).step_by(PAGE_TOKENS) {
            let (page, is_last) = (self.page(self.values, strand, first + at), at + PAGE_TOKENS >= n);
            let ahead = if is_last { (self.keys, first + BLOCK) } else { (self.values, first + at + PAGE_TOKENS) };
            self.weighted_values(strand, (at, &seen), (page, self.page(ahead.0, strand, ahead.1)), room, part);
        }
    }

    /// scores[row, at..] of the keys of a page, `at` in the block of n keys from `first`.
    fn scores(&self, strand: &Strand, (first, at, n): (usize, usize, usize), (page, ahead): (&[E], [&[E]; 2]), room: &mut Room) {
        let (dim, words, width) = (self.heads.dim, self.terms.words(self.heads.dim), self.heads.kv * self.heads.dim);
        let n = PAGE_TOKENS.min(n - at);
        // Rows that see none of these keys come first.
        let skipped = strand.rows.clone().take_while(|row| strand.visible(*row) <= first + at).count();
        let m = strand.rows.len() - skipped;
        if let Some(page) = self.few(strand, (page, ahead), (m, n)) {
            return few::scores(self.isa, self.terms, &mut room.scores[skipped * SCORES + at..], &room.queries[skipped * words..], page, m);
        }
        for (i, group) in strand.groups.clone().enumerate() {
            let row = i * strand.rows.len() + skipped;
            pack_keys(self.isa, self.terms, room.tile, (page, self.ahead(ahead[0], strand, i)), (width, n, dim), group * dim);
            let scored = Product {
                terms: self.terms,
                m,
                n: n.next_multiple_of(16),
                k: words,
                a: room.queries[row * words..].as_ptr(),
                a_row: words,
                a_column: 1,
                b: room.tile.as_ptr(),
                b_row: PAGE_TOKENS,
                c: room.scores[row * SCORES + at..].as_mut_ptr(),
                c_row: SCORES,
                how: To::Assign,
            };
            // SAFETY: queries [row, words], keys [words, PAGE_TOKENS], scores [row, SCORES] with room for the page at `at`.
            unsafe { product(self.isa, &scored) };
        }
    }

    /// part.sums[row, d] += weights[row, key] values[key, d] over the keys of a page, `at` in their block, of which the rows of a kv head
    /// have `seen` so many.
    fn weighted_values(
        &self,
        strand: &Strand,
        (at, seen): (usize, &[usize]),
        (page, next): (&[E], &[E]),
        room: &mut Room,
        part: &mut Part,
    ) {
        let (dim, width) = (self.heads.dim, self.heads.kv * self.heads.dim);
        let of_page = |row: usize| seen[row].saturating_sub(at).min(PAGE_TOKENS);
        let skipped = (0..seen.len()).take_while(|row| of_page(*row) == 0).count();
        let n = of_page(seen.len() - 1);
        let m = seen.len() - skipped;
        let is_finite = |group: usize| are_finite(self.isa, page, of_page(skipped)..n, (width, dim), group * dim);
        if let Some(page) = self.few(strand, (page, [next, &[]]), (m, n)).filter(|_| strand.groups.clone().all(is_finite)) {
            let weights = &room.scores[skipped * SCORES + self.terms.words(at)..];
            return few::values(self.isa, self.terms, &mut part.sums[skipped * dim..], weights, page, m);
        }
        for (i, group) in strand.groups.clone().enumerate() {
            let first_row = i * seen.len();
            pack_values(self.isa, self.terms, room.tile, (page, self.ahead(next, strand, i)), (width, n, dim), group * dim);
            if is_finite(group) {
                self.weighted(first_row + skipped..first_row + seen.len(), (at, n), room, part);
                continue;
            }
            // 0 times these would not be nothing: no row may meet values that it does not see.
            let mut row = skipped;
            while row < seen.len() {
                let (n, n_same) = (of_page(row), seen[row..].iter().take_while(|other| **other == seen[row]).count());
                pack_values(self.isa, self.terms, room.tile, (page, &[]), (width, n, dim), group * dim);
                self.weighted(first_row + row..first_row + row + n_same, (at, n), room, part);
                row += n_same;
            }
        }
    }

    /// part.sums of these rows += weights[row, at..] values, of n keys whose values are in the tile.
    fn weighted(&self, rows: Range<usize>, (at, n): (usize, usize), room: &Room, part: &mut Part) {
        let padded = self.heads.dim.next_multiple_of(16);
        for column in (0..padded).step_by(PANEL) {
            let weighted = Product {
                terms: self.terms,
                m: rows.len(),
                n: PANEL.min(padded - column),
                k: self.terms.words(n),
                a: room.scores[rows.start * SCORES + self.terms.words(at)..].as_ptr(),
                a_row: SCORES,
                a_column: 1,
                b: room.tile[column * self.terms.words(PAGE_TOKENS)..].as_ptr(),
                b_row: PANEL,
                c: part.sums[rows.start * padded + column..].as_mut_ptr(),
                c_row: padded,
                how: To::Continue,
            };
            // SAFETY: weights [row, SCORES], values [words, PANEL] of this panel, sums [row, padded].
            unsafe { product(self.isa, &weighted) };
        }
    }

    /// A strand's rows of out from all its parts.
    fn finish(&self, strand: &Strand, joined: &Part) {
        let (d, padded) = (self.heads.dim, self.heads.dim.next_multiple_of(16));
        for (row, sums) in (0..strand.n_rows()).zip(joined.sums.chunks_exact(padded)) {
            let (token, head) = strand.place(row);
            let at = (token * self.heads.query + head) * d;
            // SAFETY: each row belongs to one strand.
            to_out(self.isa, unsafe { self.out.part(at..at + d) }, &sums[..d], 1.0 / joined.total[row]);
        }
    }
}

/// Part i of n.
fn share<E>(of: &[E], i: usize, n: usize) -> &[E] {
    &of[i * of.len() / n..(i + 1) * of.len() / n]
}

kernel! {
    /// to[words of d, PAGE_TOKENS] of the first n keys of a page, d from `column` in rows of `width`, zeros up to a multiple of 16; what
    /// is `ahead` is fetched.
    fn pack_keys over V [E] (terms: Terms, to: &mut [f32], pages: (&[E], &[E]), size: (usize, usize, usize), column: usize) {
        let ((page, ahead), (width, n, d)) = (pages, size);
        let words = terms.words(d);
        for first in (0..n.next_multiple_of(16)).step_by(V::N) {
            for word in (0..words).step_by(V::N) {
                let mut tile = [V::zero(); 16];
                let some = V::N.min(words - word);
                // Closures would be compiled without the instructions of this function.
                if first + V::N <= n && some == V::N {
                    for (i, row) in tile.iter_mut().enumerate().take(V::N) {
                        let from = &page[(first + i) * width + column..][..d];
                        *row = match terms {
                            Terms::Single => load::<V, E>(from, word, V::N),
                            Terms::Pairs => load::<V, f32>(bytemuck::cast_slice(from), word, V::N),
                        };
                    }
                } else {
                    for (row, key) in tile.iter_mut().zip(first..n.min(first + V::N)) {
                        let from = &page[key * width + column..][..d];
                        *row = match terms {
                            Terms::Single => load::<V, E>(from, word, some),
                            Terms::Pairs => load::<V, f32>(bytemuck::cast_slice(from), word, some),
                        };
                    }
                }
                V::transpose(&mut tile);
                for (i, column) in tile.iter().enumerate().take(V::N) {
                    store(to, (word + i) * PAGE_TOKENS + first, V::N, *column);
                }
            }
            prefetch(share(ahead, first / V::N, PAGE_TOKENS / V::N));
        }
    }
}

kernel! {
    /// to[panel, words of keys, PANEL] of the first n values of a page, d from `column` in rows of `width`; what is paired with no row
    /// is 0; what is `ahead` is fetched.
    fn pack_values over V [E] (terms: Terms, to: &mut [f32], pages: (&[E], &[E]), size: (usize, usize, usize), column: usize) {
        let ((page, ahead), (width, n, d)) = (pages, size);
        let place = |word: usize, i: usize| (i / PANEL * terms.words(PAGE_TOKENS) + word) * PANEL + i % PANEL;
        let from = |key: usize| &page[key * width + column..][..d];
        match terms {
            Terms::Single => {
                for key in 0..n {
                    prefetch(share(ahead, key, PAGE_TOKENS));
                    each!(V, d, |i, some| { store(to, place(key, i), V::N, load::<V, E>(from(key), i, some)) });
                }
            }
            Terms::Pairs => {
                for word in 0..n.div_ceil(2) {
                    prefetch(share(ahead, word, PAGE_TOKENS / 2));
                    let low: &[f32] = bytemuck::cast_slice(from(2 * word));
                    let high: &[f32] = if 2 * word + 1 < n { bytemuck::cast_slice(from(2 * word + 1)) } else { &[] };
                    each!(V, d / 2, |i, some| {
                        let high = if high.is_empty() { V::zero() } else { load::<V, f32>(high, i, some) };
                        let (first, last) = load::<V, f32>(low, i, some).zip_halves(high);
                        store(to, place(word, 2 * i), V::N, first);
                        if 2 * some > V::N {
                            store(to, place(word, 2 * i + V::N), V::N, last);
                        }
                    });
                }
            }
        }
    }
}

kernel! {
    /// scores[row, SCORES] become weights exp(scale score - max) of the keys that a row sees, then zeros up to key n, in words of keys; max
    /// and total of the part are those of the row. Each kv head's rows have `seen` the same.
    fn weigh over V [] (terms: Terms, scores: &mut [f32], part: &mut Part, seen: &[usize], how: (f32, usize)) {
        let (scale, n) = how;
        for (row, scores) in scores.chunks_exact_mut(SCORES).enumerate().take(part.max.len()) {
            let seen = seen[row % seen.len()];
            let whole = seen.next_multiple_of(V::N);
            scores[seen..whole].fill(f32::NEG_INFINITY);
            let mut max = V::splat(f32::NEG_INFINITY);
            for at in (0..whole).step_by(V::N) {
                max = load::<V, f32>(scores, at, V::N).max(max);
            }
            let max = max.max_lane() * scale;
            let minus_max = V::splat(-finite(max));
            let mut total = V::zero();
            for at in (0..whole).step_by(V::N) {
                let weight = load::<V, f32>(scores, at, V::N).fma(V::splat(scale), minus_max).exp();
                total = total.add(weight);
                match terms {
                    Terms::Single => store(scores, at, V::N, weight),
                    Terms::Pairs => store::<V, bf16>(bytemuck::cast_slice_mut(scores), at, V::N, weight),
                }
            }
            match terms {
                Terms::Single => scores[whole..n.max(whole)].fill(0.0),
                Terms::Pairs => bytemuck::cast_slice_mut::<f32, bf16>(scores)[whole..n.next_multiple_of(2).max(whole)].fill(bf16::ZERO),
            }
            (part.max[row], part.total[row]) = (max, total.sum());
        }
    }
}

/// 0 in place of the largest of no scores.
fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

kernel! {
    /// joined = joined and part, of later keys.
    fn join over V [] (joined: &mut Part, part: &Part) {
        let padded = part.sums.len() / part.max.len();
        for row in 0..part.max.len() {
            let max = if part.max[row] > joined.max[row] { part.max[row] } else { joined.max[row] };
            let before = V::splat(joined.max[row] - finite(max)).exp();
            let now = V::splat(part.max[row] - finite(max)).exp();
            joined.max[row] = max;
            joined.total[row] = V::splat(part.total[row]).fma(now, V::splat(joined.total[row]).mul(before)).lanes()[0];
            for at in (row * padded..(row + 1) * padded).step_by(V::N) {
                let sum = load::<V, f32>(part.sums, at, V::N).fma(now, load::<V, f32>(joined.sums, at, V::N).mul(before));
                store(joined.sums, at, V::N, sum);
            }
        }
    }
}

kernel! {
    /// out = factor * sums, where 0 has no sign: the sign of a sum of products that are all too small depends on the zeros among them.
    fn to_out over V [E] (out: &mut [E], sums: &[f32], factor: f32) {
        each!(V, out.len(), |i, n| { store(out, i, n, load::<V, f32>(sums, i, n).mul(V::splat(factor)).add(V::zero())) });
    }
}

kernel! {
    /// Whether these rows of a page, of `width`, are finite in d columns.
    fn are_finite over V [E] (page: &[E], rows: Range<usize>, size: (usize, usize), column: usize) -> bool {
        let (width, d) = size;
        // Sums side by side: one alone waits for its own last addition.
        let mut nothing = [V::zero(); 4];
        for row in rows {
            let nothing = &mut nothing[row % 4];
            each!(V, d, |i, n| { *nothing = load::<V, E>(&page[row * width + column..][..d], i, n).fma(V::zero(), *nothing) });
        }
        nothing.iter().all(|nothing| nothing.sum() == 0.0)
    }
}
