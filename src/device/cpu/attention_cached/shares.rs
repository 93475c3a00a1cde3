//! How the work of a call is shared out: which rows attend together, and which blocks of keys make a task.

use super::{BLOCK, FEW_ROWS, ROWS, part_len};
use crate::device::cpu::team;
use crate::device::{CacheSpan, Heads};
use std::ops::Range;

/// Packing a tile takes about as long as the products of so many rows with it.
const PACKING: usize = 4;
/// Least elements of keys, times rows, that are worth a task.
pub(super) const LEAST_COST: usize = 1 << 17;

/// Rows of a span that attend together, for some kv heads. Row r of a kv head is its query head r % per_kv, of new token r / per_kv; the
/// rows of a strand are those of its first kv head, then those of the next.
pub(super) struct Strand<'a> {
    pub span: &'a CacheSpan,
    pub groups: Range<usize>,
    pub rows: Range<usize>,
    pub per_kv: usize,
}

impl Strand<'_> {
    /// Keys that a row of a kv head sees.
    pub fn visible(&self, row: usize) -> usize {
        self.span.past + row / self.per_kv + 1
    }

    /// Of all its kv heads.
    pub fn n_rows(&self) -> usize {
        self.groups.len() * self.rows.len()
    }

    pub fn n_keys(&self) -> usize {
        self.visible(self.rows.end - 1)
    }

    /// New token and query head of a row of the strand.
    pub fn place(&self, row: usize) -> (usize, usize) {
        let (group, row) = (self.groups.start + row / self.rows.len(), self.rows.start + row % self.rows.len());
        (self.span.rows.start + row / self.per_kv, group * self.per_kv + row % self.per_kv)
    }

    pub fn n_blocks(&self) -> usize {
        self.n_keys().div_ceil(BLOCK)
    }

    fn cost(&self, dim: usize) -> usize {
        self.groups.len() * (self.rows.len() + PACKING) * self.n_keys() * dim
    }
}

/// Some blocks of a strand.
pub(super) struct Piece {
    pub strand: usize,
    pub blocks: Range<usize>,
    /// Where the strand's parts are kept, if it was cut.
    pub parts_at: Option<usize>,
}

/// Who does what.
#[derive(Default)]
pub(super) struct Shares {
    pub pieces: Vec<Piece>,
    /// Pieces of each task.
    pub tasks: Vec<Range<usize>>,
    /// The strands that were cut, and where their parts are kept.
    pub cut: Vec<(usize, usize)>,
    /// Length of all parts.
    pub parts_len: usize,
}

impl Shares {
    /// Some tasks a thread: strands are cut between blocks where they cost more than a task should, and put together where less.
    pub fn of(strands: &[Strand], dim: usize, n_threads: usize) -> Shares {
        let total: usize = strands.iter().map(|strand| strand.cost(dim)).sum();
        let (of_thread, least_cost) = if team::leads() { (16, LEAST_COST / 8) } else { (4, LEAST_COST) };
        let target = if n_threads == 1 { usize::MAX } else { (total / (of_thread * n_threads)).max(least_cost) };
        let mut shares = Shares::default();
        let (mut open, mut open_cost) = (0, 0);
        for (idx, strand) in strands.iter().enumerate() {
            let (cost, n_blocks) = (strand.cost(dim), strand.n_blocks());
            let n_pieces = if cost / 3 > target / 2 { cost.div_ceil(target).min(n_blocks) } else { 1 };
            let parts_at = (n_pieces > 1).then_some(shares.parts_len);
            if let Some(at) = parts_at {
                shares.cut.push((idx, at));
                shares.parts_len += n_blocks * part_len(strand.n_rows(), dim);
            }
            for i in 0..n_pieces {
                let blocks = i * n_blocks / n_pieces..(i + 1) * n_blocks / n_pieces;
                shares.pieces.push(Piece { strand: idx, blocks, parts_at });
                open_cost += cost / n_pieces;
                if open_cost >= target / 2 {
                    shares.tasks.push(open..shares.pieces.len());
                    (open, open_cost) = (shares.pieces.len(), 0);
                }
            }
        }
        if open < shares.pieces.len() {
            shares.tasks.push(open..shares.pieces.len());
        }
        shares
    }
}

/// Kv heads whose few rows attend together, so that what lies side by side is read at once: all of them where there are blocks of keys
/// enough to share out, else as many as make a strand for each thread.
fn groups_together(n_blocks: usize, n_kv: usize, n_threads: usize) -> usize {
    if are_shared_out(n_blocks, n_threads) { n_kv } else { n_kv.div_ceil(n_threads) }
}

/// Whether threads share out blocks of keys, and not kv heads.
pub(super) fn are_shared_out(n_blocks: usize, n_threads: usize) -> bool {
    n_blocks >= 4 * n_threads
}

/// All rows of all spans.
pub(super) fn strands<'a>(spans: &'a [CacheSpan], heads: Heads, n_threads: usize) -> Vec<Strand<'a>> {
    let per_kv = heads.queries_per_kv();
    let n_blocks: usize = spans.iter().map(|span| span.n_tokens().div_ceil(BLOCK)).sum();
    let mut strands = Vec::new();
    for span in spans {
        let n_rows = span.rows.len() * per_kv;
        let n_groups = if n_rows <= FEW_ROWS { groups_together(n_blocks, heads.kv, n_threads) } else { 1 };
        // The longest first, so that the threads end together.
        for block in (0..n_rows.div_ceil(ROWS)).rev() {
            let rows = block * ROWS..((block + 1) * ROWS).min(n_rows);
            let groups = (0..heads.kv).step_by(n_groups).map(|first| first..(first + n_groups).min(heads.kv));
            strands.extend(groups.map(|groups| Strand { span, groups, rows: rows.clone(), per_kv }));
        }
    }
    strands
}
