//! Attention over a cache of keys and values: which block attends to which keys. The tables are the same for every layer of a pass,
//! so they are made and uploaded once. In a recorded pass (`recording`) their sizes do not depend on how many tokens each sequence has, up
//! to some length, so that it is asked for again with other contents in the same memory.

use super::attention::{Form, Item, THREADS, blocks, int};
use super::backend::{Arg, Grid, Kernel};
use super::rope::assert_rope;
use super::{Cuda, Workspace, assert_rows};
use crate::device::{CacheSpan, Direction, Heads, KvCache, PAGE_TOKENS, Rope};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// Keys of a share, whole tiles and pages. Shares end at multiples of it in every sequence, whatever else is computed: a row's bits follow
/// from its keys alone. Smaller ones give a decode of few sequences more blocks to work in, larger ones leave less to combine.
const SHARE: usize = 8 * PAGE_TOKENS;
/// Most rows of a block that all of its warps work on together: `FEW` of kernels/attention_tile.cuh.
const FEW_ROWS: usize = 16;
/// Where each table begins.
const ALIGNMENT: usize = 256;

/// `Shares` of kernels/attention_cached.cu: how the keys of an item's rows are shared out.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct SharesOf {
    n: i32,
    partial_row: i32,
    counter: i32,
}

/// All that the tables of a call follow from.
#[derive(Clone, PartialEq)]
pub(super) struct Call {
    spans: Vec<CacheSpan>,
    heads: Heads,
    dtype: DType,
    /// Of the cache.
    n_pages: usize,
    shares: Shares,
}

/// The work of a call.
#[derive(Default)]
struct Work {
    /// (row of qkv, row of the cache) of each new token.
    tokens: Vec<[i32; 2]>,
    items: Vec<Item>,
    /// The pages of each sequence, one after another.
    pages: Vec<u32>,
    /// One for each item.
    shares: Vec<SharesOf>,
    /// For each block of rows whose keys were shared out, so many of a group's: shares that are done.
    n_counters: usize,
    /// Rows of partial results of a group.
    n_partial: usize,
}

/// Into how many shares the keys of a block of rows are divided.
#[derive(Clone, Copy, PartialEq)]
enum Shares {
    /// As many as the keys fill.
    Filled,
    /// So many, the last ones empty: what is recorded has the same sizes until the sequences outgrow it.
    Exactly(usize),
}

impl Shares {
    /// For a recording that starts with these sequences: they may grow to twice their length before they need another one.
    fn to_record(spans: &[CacheSpan]) -> Shares {
        Shares::Exactly(spans.iter().map(filled).max().unwrap_or(1).next_power_of_two())
    }
}

/// Shares that the keys of a sequence fill.
fn filled(span: &CacheSpan) -> usize {
    span.n_tokens().div_ceil(SHARE)
}

impl Work {
    fn of(call: &Call) -> Work {
        let (heads, rows) = (call.heads, Form::of(call.dtype, call.heads).rows());
        let per_kv = heads.queries_per_kv();
        let n_blocks = |span: &CacheSpan| (span.rows.len() * per_kv).div_ceil(rows);
        let mut work = Work::default();
        for span in &call.spans {
            work.tokens.extend(span.rows.clone().enumerate().map(|(i, row)| [int(row), int(span.cache_row(span.past + i))]));
            let first_page = work.pages.len();
            work.pages.extend(&span.pages[..span.n_tokens().div_ceil(PAGE_TOKENS)]);
            for block in 0..n_blocks(span) {
                work.push_block(span, block * rows, (per_kv, rows), (first_page, call.shares));
            }
        }
        work
    }

    fn push_block(&mut self, span: &CacheSpan, first_row: usize, (per_kv, rows): (usize, usize), (first_page, shares): (usize, Shares)) {
        let n_rows = rows.min(span.rows.len() * per_kv - first_row);
        let n_keys = span.past + (first_row + n_rows - 1) / per_kv + 1;
        let n_shares = match shares {
            Shares::Filled => n_keys.div_ceil(SHARE),
            Shares::Exactly(n) => n,
        };
        let first_token = int(span.rows.start);
        let is_shared = n_shares > 1;
        for i in 0..n_shares {
            let partial_row = if is_shared { int(self.n_partial + i * n_rows) } else { -1 };
            self.items.push(Item {
                first_token,
                n_tokens: int(span.rows.len()),
                past: int(span.past),
                first_row: int(first_row),
                key_begin: int((i * SHARE).min(n_keys)),
                key_end: int(((i + 1) * SHARE).min(n_keys)),
                key_row: int(first_page),
                partial_row,
            });
            self.shares.push(SharesOf { n: int(n_shares), partial_row: int(self.n_partial), counter: int(self.n_counters) });
        }
        if is_shared {
            self.n_partial += n_shares * n_rows;
            self.n_counters += 1;
        }
    }

    /// Sizes of the launches.
    fn sizes(&self) -> [usize; 4] {
        [self.tokens.len(), self.items.len(), self.n_counters, self.n_partial]
    }

    /// The tables and the counters of `kv` groups, each at a multiple of ALIGNMENT; the table of the pages, whose size is not one of
    /// `sizes`, last.
    fn bytes(&self, kv: usize) -> Vec<u8> {
        let (mut bytes, counters) = (Vec::new(), vec![0u32; self.n_counters * kv]);
        let tables: [&[u8]; 5] = [
            bytemuck::cast_slice(&self.tokens),
            bytemuck::cast_slice(&self.items),
            bytemuck::cast_slice(&self.shares),
            bytemuck::cast_slice(&counters),
            bytemuck::cast_slice(&self.pages),
        ];
        for table in tables {
            bytes.extend_from_slice(table);
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        bytes
    }
}

/// Of the partial results and of their log-sum-exps.
fn partial_bytes(heads: Heads, n_partial: usize) -> [usize; 2] {
    let n_rows = heads.kv * n_partial;
    [n_rows * heads.dim, n_rows].map(|n| (n * size_of::<f32>()).next_multiple_of(ALIGNMENT))
}

/// Tables of a call in device memory, and room for its partial results.
pub(super) struct Tables {
    call: Call,
    /// The partial results, their log-sum-exps; then tokens, items, their shares, counters, pages.
    memory: Workspace,
    sizes: [usize; 4],
}

impl Tables {
    /// Memory for the tables of a call, not filled yet, and for so many more pages of its sequences.
    fn new(cuda: &Cuda, call: Call, n_more_pages: usize) -> Tables {
        let work = Work::of(&call);
        let to_grow = n_more_pages * size_of::<u32>();
        let memory =
            cuda.own_memory(partial_bytes(call.heads, work.n_partial).iter().sum::<usize>() + work.bytes(call.heads.kv).len() + to_grow);
        Tables { memory, sizes: work.sizes(), call }
    }

    /// Whether the tables of these sequences have room in those of the call.
    pub(super) fn have_room_for(&self, spans: &[CacheSpan]) -> bool {
        let Shares::Exactly(n) = self.call.shares else { return false };
        spans.iter().all(|span| filled(span) <= n)
    }

    /// Uploads the tables; with `spans`, of other pages and lengths than they were made for.
    pub(super) fn fill(&self, cuda: &Cuda, spans: &[CacheSpan]) {
        let work = Work::of(&Call { spans: spans.to_vec(), ..self.call.clone() });
        let same_rows = spans.iter().map(|span| &span.rows).eq(self.call.spans.iter().map(|span| &span.rows));
        assert!(same_rows && work.sizes() == self.sizes, "a pass recorded for {:?} is asked for with {spans:?}", self.call.spans);
        assert!(work.pages.len() <= spans.len() * self.call.n_pages, "{spans:?} in {} pages", self.call.n_pages);
        assert!(work.pages.iter().all(|page| (*page as usize) < self.call.n_pages), "{spans:?} in {} pages", self.call.n_pages);
        let heads = self.call.heads;
        let at = partial_bytes(heads, work.n_partial).iter().sum::<usize>() as u64;
        cuda.backend.upload(&work.bytes(heads.kv), self.memory.address() + at);
    }

    /// Where the partial results, their log-sum-exps, the tables of tokens, items and shares, the counters and the table of pages begin.
    fn args(&self) -> [Arg; 7] {
        let [n_tokens, n_items, n_counters, n_partial] = self.sizes;
        let [results, log_sum_exps] = partial_bytes(self.call.heads, n_partial);
        let mut at = 0;
        let bytes = [
            results,
            log_sum_exps,
            (n_tokens * size_of::<[i32; 2]>()).next_multiple_of(ALIGNMENT),
            (n_items * size_of::<Item>()).next_multiple_of(ALIGNMENT),
            (n_items * size_of::<SharesOf>()).next_multiple_of(ALIGNMENT),
            (n_counters * self.call.heads.kv * size_of::<u32>()).next_multiple_of(ALIGNMENT),
            0,
        ];
        bytes.map(|bytes| {
            let arg = self.memory.arg_at(at);
            at += bytes;
            arg
        })
    }
}

impl Cuda {
    /// The tables of a call: those of the layer before, where they are the same.
    fn tables(&self, call: Call) -> Arc<Tables> {
        if let Some(tape) = &mut *self.tape() {
            let tables = tape.tables.get_or_insert_with(|| {
                let most = call.spans.len() * call.n_pages;
                Arc::new(Tables::new(self, call.clone(), most))
            });
            assert!(tables.call == call, "the layers of a recorded pass share their spans and heads");
            return Arc::clone(tables);
        }
        let mut last = self.last_tables.lock().expect("no panic while holding the tables");
        if let Some(tables) = last.as_ref().filter(|tables| tables.call == call) {
            return Arc::clone(tables);
        }
        // The old ones go first, so that the new ones may lie in their memory.
        *last = None;
        let tables = Arc::new(Tables::new(self, call, 0));
        tables.fill(self, &tables.call.spans);
        *last = Some(Arc::clone(&tables));
        tables
    }

    /// The tables of a call after checking its shapes; None where it has no new token.
    fn checked_tables(&self, out: &Tensor, qkv: &Tensor, cache: &KvCache, spans: &[CacheSpan], heads: Heads) -> Option<Arc<Tables>> {
        cache.assert_fits(qkv, spans, heads);
        assert_rows("attention_cached", &[qkv], qkv.n_rows(), heads.qkv_columns());
        assert_rows("attention_cached", &[out], qkv.n_rows(), heads.query * heads.dim);
        if spans.iter().all(|span| span.rows.is_empty()) {
            return None;
        }
        let shares = if self.is_recording() { Shares::to_record(spans) } else { Shares::Filled };
        Some(self.tables(Call { spans: spans.to_vec(), heads, dtype: qkv.dtype(), n_pages: cache.keys.dims()[0], shares }))
    }

    /// See `Device::attention_cached`.
    pub(super) fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads) {
        let Some(tables) = self.checked_tables(out, qkv, cache, spans, heads) else { return };
        let args = [Cuda::arg_mut(&mut cache.keys), Cuda::arg_mut(&mut cache.values), Cuda::arg(qkv), tables.args()[2]];
        let sizes = [heads.queries_per_kv(), heads.kv, heads.dim].map(|n| Arg::Int(int(n)));
        let kernel = Kernel::of("attention_cached", "attention_append", qkv.dtype());
        self.backend.launch(&kernel, Grid::line(tables.sizes[0], THREADS), &[&args[..], &sizes].concat());
        self.attend_to_cache(out, qkv, cache, &tables, None);
    }

    /// See `Device::rope_attention_cached`: one launch for a decode step on tensor cores; else the rotation and the new rows of the cache
    /// are one, and attention is one.
    pub(super) fn rope_attention_cached(
        &self,
        out: &mut Tensor,
        qkv: &mut Tensor,
        positions: &Tensor,
        cache: &mut KvCache,
        (spans, heads): (&[CacheSpan], Heads),
        how: Rope,
    ) {
        let covers_rows = spans.iter().map(|span| span.rows.len()).sum::<usize>() == qkv.n_rows();
        if !covers_rows || how.rotary_dims == 0 || how.direction != Direction::Forward {
            self.rope(qkv, positions, heads, how);
            return self.attention_cached(out, qkv, cache, spans, heads);
        }
        let Some(tables) = self.checked_tables(out, qkv, cache, spans, heads) else { return };
        let is_step = spans.iter().all(|span| span.rows.len() == 1);
        if is_step && Form::of(qkv.dtype(), heads).is_mma() && heads.queries_per_kv() <= FEW_ROWS && how.rotary_dims % 16 == 0 {
            assert_rope(qkv, positions, heads, how);
            return self.attend_to_cache(out, qkv, cache, &tables, Some((positions, how)));
        }
        self.rope_append(qkv, positions, cache, (tables.args()[2], tables.sizes[0]), heads, how);
        self.attend_to_cache(out, qkv, cache, &tables, None);
    }

    /// Attention over a cache that the new tokens are in; or that they are put in with it, rotated `turned` (positions, how).
    fn attend_to_cache(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, tables: &Tables, turned: Option<(&Tensor, Rope)>) {
        let heads = tables.call.heads;
        let [_, n_items, _, n_partial] = tables.sizes;
        let (file, form) = ("attention_cached", Form::of(qkv.dtype(), heads));
        let [partial, partial_lse, _, items, shares, counters, pages] = tables.args();
        let (keys, values) = (Cuda::arg_mut(&mut cache.keys), Cuda::arg_mut(&mut cache.values));
        let mut args = vec![Cuda::arg_mut(out), partial, partial_lse, Cuda::arg(qkv), keys, values, pages, items, shares, counters];
        args.extend([n_partial, heads.queries_per_kv(), heads.kv].map(|n| Arg::Int(int(n))));
        if let Some((positions, how)) = turned {
            args.extend([Cuda::arg(positions), self.rope_frequencies(how).arg()]);
            args.extend([Arg::Int(int(how.rotary_dims / 2)), Arg::Double(how.attention_factor())]);
        }
        args.extend(form.last_args());
        // Few blocks, each on a processor of its own, wait for memory less with more of it under way. The bits are the same.
        let (deep, stages) = if n_items * heads.kv <= self.backend.processors() && form.is_mma() { ("_deep", 4) } else { ("", 2) };
        let operation = format!("attention_{}cached{deep}", if turned.is_some() { "rope_" } else { "" });
        let shared_bytes = form.attend_bytes(stages) as u32;
        let grid = Grid { blocks: (blocks(n_items), blocks(heads.kv), 1), threads: THREADS, shared_bytes };
        self.backend.launch(&form.kernel(file, &operation), grid, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of sequence i: every n-th of the cache, downwards.
    fn page(i: usize, n: usize, idx: usize) -> u32 {
        ((63 - idx) * n + i) as u32
    }

    fn call(lengths: &[usize]) -> Call {
        let n = lengths.len();
        let pages = |i| (0..64).map(|idx| page(i, n, idx)).collect();
        let spans = lengths.iter().enumerate().map(|(i, past)| CacheSpan { rows: i..i + 1, past: *past, pages: pages(i) });
        Call {
            spans: spans.collect(),
            heads: Heads { query: 8, kv: 2, dim: 64 },
            dtype: DType::BF16,
            n_pages: 64 * n,
            shares: Shares::Exactly(8),
        }
    }

    /// A recorded decode's tables have the same sizes whatever the lengths, its shares cover each key once, in order, each from a multiple
    /// of its size on, all of a row know how many they are and count together, and its pages are those of its sequence: else a recorded
    /// pass would miss keys of sequences that have grown, or have other bits than one that is not recorded.
    #[test]
    fn decode_tables_cover_every_key_at_every_length() {
        for n in [1, 3, 40] {
            let sizes = Work::of(&call(&vec![0; n])).sizes();
            for past in [0, 1, 63, 64, 255, 256, 257, 1000, 4094, 4095] {
                let lengths: Vec<usize> = (0..n).map(|i| (past + 97 * i) % 4096).collect();
                let work = Work::of(&call(&lengths));
                assert_eq!(work.sizes(), sizes);
                for (row, past) in lengths.iter().enumerate() {
                    let items: Vec<&Item> = work.items.iter().filter(|item| item.first_token == row as i32).collect();
                    let mut end = 0;
                    for item in &items {
                        assert!(
                            item.key_begin == end
                                && item.key_end >= end
                                && (item.key_begin % SHARE as i32 == 0 || item.key_begin == item.key_end)
                        );
                        let first_page = item.key_row as usize;
                        let pages = &work.pages[first_page..first_page + (past + 1).div_ceil(PAGE_TOKENS)];
                        assert!(pages.iter().enumerate().all(|(idx, found)| *found == page(row, n, idx)), "{pages:?}");
                        end = item.key_end;
                    }
                    assert_eq!(end as usize, past + 1);
                    let of_row = work.shares.iter().zip(&work.items).filter(|(_, item)| item.first_token == row as i32);
                    for (i, (shares, item)) in of_row.enumerate() {
                        // Four rows: the query heads of a group.
                        let partial_row = shares.partial_row + 4 * i as i32;
                        assert_eq!((shares.n, shares.counter, item.partial_row), (items.len() as i32, row as i32, partial_row));
                    }
                }
            }
        }
    }
}
