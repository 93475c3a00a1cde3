//! Attention over a cache of keys and values: which block attends to which keys. The tables are the same for every layer of a pass,
//! so they are made and uploaded once. Where each sequence has one new token their sizes do not depend on how many tokens it has,
//! so that a recorded pass (`recording`) is asked for again with other contents in the same memory.

use super::attention::{Form, Item, THREADS, blocks, int};
use super::backend::{Arg, Grid, Kernel};
use super::{Cuda, Workspace, assert_rows};
use crate::device::{CacheSpan, Heads, KvCache};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// Keys of a tile: shares of the keys end at whole tiles.
const KEYS: usize = 64;
/// Fewest keys of a share: below it, combining costs more than it brings.
const LEAST_KEYS: usize = 4 * KEYS;
/// Where each table begins.
const ALIGNMENT: usize = 256;

/// `Combined` of kernels/attention_cached.cu: a row whose keys were shared out.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Combined {
    first_token: i32,
    row: i32,
    partial_row: i32,
    step: i32,
    n_shares: i32,
}

/// All that the tables of a call follow from.
#[derive(Clone, PartialEq)]
pub(super) struct Call {
    spans: Vec<CacheSpan>,
    heads: Heads,
    dtype: DType,
    /// Rows of a slot.
    max_tokens: usize,
    /// About so many blocks fill the device.
    wanted: usize,
}

/// The work of a call.
#[derive(Default)]
struct Work {
    /// (row of qkv, row of the cache) of each new token.
    tokens: Vec<[i32; 2]>,
    items: Vec<Item>,
    /// Rows whose keys were shared out.
    combined: Vec<Combined>,
    /// Rows of partial results of a group.
    n_partial: usize,
}

/// How the keys of a block of rows are shared out.
#[derive(Clone, Copy)]
enum Shares {
    /// Into at most so many, as few as the keys fill.
    AtMost(usize),
    /// Into so many, the last ones empty while there are few keys.
    Exactly(usize),
}

impl Work {
    /// Keys are shared out so that there are about `wanted` blocks, in shares of whole tiles and at least four.
    fn of(call: &Call) -> Work {
        let (heads, rows) = (call.heads, Form::of(call.dtype, call.heads).rows());
        let per_kv = heads.queries_per_kv();
        let n_blocks = |span: &CacheSpan| (span.rows.len() * per_kv).div_ceil(rows);
        let n_whole = call.spans.iter().map(n_blocks).sum::<usize>() * heads.kv;
        let most = call.wanted.div_ceil(n_whole.max(1));
        let shares = if call.spans.iter().all(|span| span.rows.len() == 1) {
            Shares::Exactly(most.min(call.max_tokens.div_ceil(LEAST_KEYS)))
        } else {
            Shares::AtMost(most)
        };
        let mut work = Work::default();
        for span in &call.spans {
            let first_cache_row = span.slot * call.max_tokens;
            work.tokens.extend(span.rows.clone().enumerate().map(|(i, row)| [int(row), int(first_cache_row + span.past + i)]));
            for block in 0..n_blocks(span) {
                work.push_block(span, block * rows, (per_kv, rows), (first_cache_row, shares));
            }
        }
        work
    }

    fn push_block(&mut self, span: &CacheSpan, first_row: usize, (per_kv, rows): (usize, usize), (key_row, shares): (usize, Shares)) {
        let n_rows = rows.min(span.rows.len() * per_kv - first_row);
        let n_keys = span.past + (first_row + n_rows - 1) / per_kv + 1;
        let (Shares::AtMost(most) | Shares::Exactly(most)) = shares;
        let share = n_keys.div_ceil(most).next_multiple_of(KEYS).max(LEAST_KEYS);
        let n_shares = if matches!(shares, Shares::Exactly(_)) { most } else { n_keys.div_ceil(share) };
        let first_token = int(span.rows.start);
        for i in 0..n_shares {
            let partial_row = if n_shares > 1 { int(self.n_partial + i * n_rows) } else { -1 };
            self.items.push(Item {
                first_token,
                n_tokens: int(span.rows.len()),
                past: int(span.past),
                first_row: int(first_row),
                key_begin: int((i * share).min(n_keys)),
                key_end: int(((i + 1) * share).min(n_keys)),
                key_row: int(key_row),
                partial_row,
            });
        }
        if n_shares > 1 {
            let partial = self.n_partial;
            self.combined.extend((0..n_rows).map(|i| Combined {
                first_token,
                row: int(first_row + i),
                partial_row: int(partial + i),
                step: int(n_rows),
                n_shares: int(n_shares),
            }));
            self.n_partial += n_shares * n_rows;
        }
    }

    /// Sizes of the launches.
    fn sizes(&self) -> [usize; 4] {
        [self.tokens.len(), self.items.len(), self.combined.len(), self.n_partial]
    }

    /// The three tables, each at a multiple of ALIGNMENT.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let tables: [&[u8]; 3] =
            [bytemuck::cast_slice(&self.tokens), bytemuck::cast_slice(&self.items), bytemuck::cast_slice(&self.combined)];
        for table in tables {
            bytes.extend_from_slice(table);
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        bytes
    }
}

/// Tables of a call in device memory, and room for its partial results.
pub(super) struct Tables {
    call: Call,
    /// Tokens, items, rows to combine; then the partial results and their log-sum-exps.
    memory: Workspace,
    sizes: [usize; 4],
}

impl Tables {
    /// Memory for the tables of a call, not filled yet.
    fn new(cuda: &Cuda, call: Call) -> Tables {
        let work = Work::of(&call);
        let partial_bytes = call.heads.kv * work.n_partial * (call.heads.dim + 1) * size_of::<f32>();
        let memory = cuda.own_memory(work.bytes().len() + partial_bytes);
        Tables { call, memory, sizes: work.sizes() }
    }

    /// Uploads the tables; with `spans`, of other slots and lengths than they were made for.
    pub(super) fn fill(&self, cuda: &Cuda, spans: &[CacheSpan]) {
        let work = Work::of(&Call { spans: spans.to_vec(), ..self.call.clone() });
        let same_rows = spans.iter().map(|span| &span.rows).eq(self.call.spans.iter().map(|span| &span.rows));
        assert!(same_rows && work.sizes() == self.sizes, "a pass recorded for {:?} is asked for with {spans:?}", self.call.spans);
        assert!(spans.iter().all(|span| span.past + span.rows.len() <= self.call.max_tokens), "{spans:?} in {}", self.call.max_tokens);
        cuda.backend.upload(&work.bytes(), self.memory.address());
    }

    /// Where the tables of tokens, items, rows to combine, and the partial results begin.
    fn args(&self) -> [Arg; 5] {
        let [n_tokens, n_items, n_combined, n_partial] = self.sizes;
        let mut at = 0;
        let bytes = [
            (n_tokens * size_of::<[i32; 2]>()).next_multiple_of(ALIGNMENT),
            (n_items * size_of::<Item>()).next_multiple_of(ALIGNMENT),
            (n_combined * size_of::<Combined>()).next_multiple_of(ALIGNMENT),
            self.call.heads.kv * n_partial * self.call.heads.dim * size_of::<f32>(),
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
        if let Some(tape) = &mut *self.tape.lock().expect("no panic while holding the tape") {
            let tables = tape.tables.get_or_insert_with(|| Arc::new(Tables::new(self, call.clone())));
            assert!(tables.call == call, "the layers of a recorded pass share their spans and heads");
            return Arc::clone(tables);
        }
        let mut last = self.last_tables.lock().expect("no panic while holding the tables");
        if let Some(tables) = last.as_ref().filter(|tables| tables.call == call) {
            return Arc::clone(tables);
        }
        // The old ones go first, so that the new ones may lie in their memory.
        *last = None;
        let tables = Arc::new(Tables::new(self, call));
        tables.fill(self, &tables.call.spans);
        *last = Some(Arc::clone(&tables));
        tables
    }

    /// See `Device::attention_cached`.
    pub(super) fn attention_cached(&self, out: &mut Tensor, qkv: &Tensor, cache: &mut KvCache, spans: &[CacheSpan], heads: Heads) {
        let dims = cache.keys.dims().to_vec();
        assert!(dims.len() == 3 && dims[2] == heads.kv * heads.dim && cache.values.dims() == dims, "attention_cached: cache {dims:?}");
        assert_rows("attention_cached", &[qkv], qkv.n_rows(), heads.qkv_columns());
        assert_rows("attention_cached", &[out], qkv.n_rows(), heads.query * heads.dim);
        for span in spans {
            let fits = span.slot < dims[0] && span.past + span.rows.len() <= dims[1] && span.rows.end <= qkv.n_rows();
            assert!(fits, "attention_cached: {span:?} in a cache of {dims:?}, {qkv:?}");
        }
        if spans.iter().all(|span| span.rows.is_empty()) {
            return;
        }
        let wanted = 2 * self.backend.processors();
        let tables = self.tables(Call { spans: spans.to_vec(), heads, dtype: qkv.dtype(), max_tokens: dims[1], wanted });
        let [n_tokens, n_items, n_combined, n_partial] = tables.sizes;
        let (file, form) = ("attention_cached", Form::of(qkv.dtype(), heads));
        let [tokens, items, rows, partial, partial_lse] = tables.args();
        let group_sizes = [heads.queries_per_kv(), heads.kv].map(|n| Arg::Int(int(n)));
        let dim = Arg::Int(int(heads.dim));
        let (keys, values) = (Cuda::arg_mut(&mut cache.keys), Cuda::arg_mut(&mut cache.values));
        let args = [&[keys, values, Cuda::arg(qkv), tokens], &group_sizes[..], &[dim]].concat();
        self.backend.launch(&Kernel::of(file, "attention_append", form.dtype), Grid::line(n_tokens, THREADS), &args);

        let n_partial = Arg::Int(int(n_partial));
        let mut args = vec![Cuda::arg_mut(out), partial, partial_lse, Cuda::arg(qkv), keys, values, items, n_partial];
        args.extend(group_sizes);
        args.extend(form.last_args());
        let shared_bytes = form.attend_bytes() as u32;
        let grid = Grid { blocks: (blocks(n_items), blocks(heads.kv), 1), threads: THREADS, shared_bytes };
        self.backend.launch(&form.kernel(file, "attention_cached"), grid, &args);
        if n_combined == 0 {
            return;
        }
        let args = [&[Cuda::arg_mut(out), partial, partial_lse, rows, n_partial], &group_sizes[..], &[dim]].concat();
        let grid = Grid { blocks: (blocks(n_combined), blocks(heads.kv), 1), threads: 32, shared_bytes: 0 };
        self.backend.launch(&Kernel::of(file, "attention_combine", form.dtype), grid, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(lengths: &[usize], max_tokens: usize) -> Call {
        let spans = lengths.iter().enumerate().map(|(i, past)| CacheSpan { rows: i..i + 1, slot: lengths.len() - 1 - i, past: *past });
        Call { spans: spans.collect(), heads: Heads { query: 8, kv: 2, dim: 64 }, dtype: DType::BF16, max_tokens, wanted: 264 }
    }

    /// A decode's tables have the same sizes whatever the lengths, its shares cover each key once, in order, in whole tiles, and a
    /// row's shares are all combined: else a recorded pass would miss keys of sequences that have grown.
    #[test]
    fn decode_tables_cover_every_key_at_every_length() {
        for n_slots in [1, 3, 40] {
            let sizes = Work::of(&call(&vec![0; n_slots], 4096)).sizes();
            for past in [0, 1, 63, 64, 255, 256, 257, 1000, 4094, 4095] {
                let lengths: Vec<usize> = (0..n_slots).map(|i| (past + 97 * i) % 4096).collect();
                let work = Work::of(&call(&lengths, 4096));
                assert_eq!(work.sizes(), sizes);
                for (row, past) in lengths.iter().enumerate() {
                    let items: Vec<&Item> = work.items.iter().filter(|item| item.first_token == row as i32).collect();
                    let mut end = 0;
                    for item in &items {
                        assert!(
                            item.key_begin == end && item.key_end >= end && (item.key_begin % 64 == 0 || item.key_begin == item.key_end)
                        );
                        assert_eq!(item.key_row, ((n_slots - 1 - row) * 4096) as i32);
                        end = item.key_end;
                    }
                    assert_eq!(end as usize, past + 1);
                    assert!(items.len() == 1 || work.combined.iter().filter(|c| c.first_token == row as i32).count() == 4);
                }
            }
        }
    }
}
