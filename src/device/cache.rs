//! The cache of keys and values that sequences grow in, and what of it a call is about.

use super::Heads;
use crate::tensor::Tensor;

/// Tokens of a page of a KV cache. Kernels walk keys in tiles of 64 or 32, and no tile may cross pages; with larger pages more of the
/// last page of each sequence lies idle, and fewer prefixes are shared.
pub const PAGE_TOKENS: usize = 64;

/// One sequence of an `attention_cached` call: rows `rows` of the packed qkv are its new tokens; it has `past` tokens in the cache
/// already. Spans of one call may list the same pages for what their sequences have in common; a page that a span writes new tokens to
/// is in no other span's list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheSpan {
    /// Rows of qkv and out.
    pub rows: std::ops::Range<usize>,
    /// Tokens in the cache before this call.
    pub past: usize,
    /// pages[i] is the page of the cache that holds tokens i * PAGE_TOKENS .. of this sequence; enough for past and new tokens. What
    /// lies in them past the sequence's end is never read.
    pub pages: Vec<u32>,
}

impl CacheSpan {
    /// Tokens of the sequence after the call.
    pub fn n_tokens(&self) -> usize {
        self.past + self.rows.len()
    }

    /// Panics when a page that one of these spans of a call writes to is listed twice, by it or by another.
    pub fn assert_own_pages(spans: &[CacheSpan]) {
        let used = |span: &CacheSpan| span.n_tokens().div_ceil(PAGE_TOKENS);
        let mut listed: Vec<u32> = spans.iter().flat_map(|span| span.pages[..used(span)].to_vec()).collect();
        listed.sort_unstable();
        for span in spans.iter().filter(|span| !span.rows.is_empty()) {
            for page in &span.pages[span.past / PAGE_TOKENS..used(span)] {
                let n = listed.partition_point(|other| other <= page) - listed.partition_point(|other| other < page);
                assert!(n == 1, "page {page} is written by {span:?} and listed {n} times");
            }
        }
    }

    /// Row of a token in the cache, of all rows of all pages.
    pub fn cache_row(&self, token: usize) -> usize {
        self.pages[token / PAGE_TOKENS] as usize * PAGE_TOKENS + token % PAGE_TOKENS
    }
}

/// Keys and values of past tokens of one layer, in pages that sequences are given as they grow: each [n_pages, PAGE_TOKENS, G*D], float,
/// keys already rotated.
pub struct KvCache {
    /// Keys.
    pub keys: Tensor,
    /// Values.
    pub values: Tensor,
}

impl KvCache {
    /// Panics unless the spans fit the pages and the packed rows: see `CacheSpan`.
    pub(super) fn assert_fits(&self, qkv: &Tensor, spans: &[CacheSpan], heads: Heads) {
        let dims = self.keys.dims();
        let is_cache = dims.len() == 3 && dims[1..] == [PAGE_TOKENS, heads.kv * heads.dim] && self.values.dims() == dims;
        assert!(is_cache, "attention_cached: a cache of {dims:?} and {:?} for {heads:?}", self.values.dims());
        for span in spans {
            let has_pages = span.n_tokens() <= span.pages.len() * PAGE_TOKENS && span.pages.iter().all(|page| (*page as usize) < dims[0]);
            assert!(has_pages && span.rows.end <= qkv.n_rows(), "attention_cached: {span:?} in a cache of {dims:?}, {qkv:?}");
        }
    }
}
