//! Text to ids, with the ids of SentencePiece's BPE (bpe_model.cc, normalizer.cc): user-defined pieces are cut out first,
//! then the pair of neighbours whose piece has the best score merges, leftmost first among equals, until none is left;
//! a character without a piece becomes its bytes.
//!
//! Fast because of two exact shortcuts: the text is cut wherever the two characters at the place occur together in no
//! piece at all (no merge can cross), and the ids of short stretches are remembered. A long stretch merges with a heap and
//! a linked list, O(n log n) however the text is made. This file knows nothing of files.

use super::hash::mix;
use super::tables::{Merge, NO_MERGE, NO_RANK, NO_SYMBOL, SPACE_MARK, Tables, fold};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Stretches up to this many symbols merge by scanning, longer ones with a heap.
const SCAN_SYMBOLS: usize = 32;
/// Stretches up to this many bytes are remembered.
const KEY_BYTES: usize = 32;
/// Stretches of at most this many ids are remembered.
const VALUE_IDS: usize = 7;
const CACHE_BITS: u32 = 15;
const NONE: u32 = u32::MAX;

/// One remembered stretch: 64 bytes, a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Remembered {
    key: [u64; 4],
    /// Bytes of the key, 0 for a free slot.
    length: u16,
    n_ids: u16,
    ids: [u32; VALUE_IDS],
}

/// What a call of the encoder works in; used again by later calls.
pub struct Scratch {
    cache: Vec<Remembered>,
    symbols: Vec<Symbol>,
    merges: Vec<Merge>,
    links: Vec<Link>,
    heap: BinaryHeap<Reverse<u64>>,
    /// Pairs looked at: scanned, pushed or popped.
    pub operations: u64,
}

/// A symbol and where its text starts in the stretch.
#[derive(Clone, Copy)]
struct Symbol {
    symbol: u32,
    start: u32,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

impl Scratch {
    /// Empty, nothing remembered.
    pub fn new() -> Scratch {
        let free = Remembered { key: [0; 4], length: 0, n_ids: 0, ids: [0; VALUE_IDS] };
        Scratch {
            cache: vec![free; 1 << CACHE_BITS],
            symbols: Vec::new(),
            merges: Vec::new(),
            links: Vec::new(),
            heap: BinaryHeap::new(),
            operations: 0,
        }
    }
}

/// Replaces what is not UTF-8 as SentencePiece does: every bad byte becomes U+FFFD.
pub fn repair(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() + bytes.len() / 8);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for _ in chunk.invalid() {
            text.push('\u{FFFD}');
        }
    }
    text
}

/// Appends the ids of `text` (a dummy prefix, if any, already in front).
pub fn encode(tables: &Tables, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
    let (bytes, user) = (text.as_bytes(), tables.user());
    let first_new_id = ids.len();
    let mut at = 0;
    while at < bytes.len() {
        let (first, first_bytes) = char_at(text, at);
        if user.may_start(first)
            && let Some((id, length)) = user.longest(&text[at..])
        {
            ids.push(id);
            at += length;
            continue;
        }
        let end = stretch_end(tables, text, at + first_bytes, first);
        encode_stretch(tables, text, at..end, scratch, ids);
        at = end;
    }
    if tables.bytes.is_none() {
        merge_unknown_runs(tables.unk, first_new_id, ids);
    }
}

/// The folded character at a byte of the text, and its length.
#[inline]
fn char_at(text: &str, at: usize) -> (u32, usize) {
    let byte = text.as_bytes()[at];
    if byte < 128 {
        return (u32::from(byte), 1);
    }
    let c = text[at..].chars().next().expect("a character boundary before the end");
    (fold(c), c.len_utf8())
}

/// Where the stretch that goes on at `at` after the character `before` ends: at the first place no piece covers, before a
/// user-defined piece, or at the end.
#[inline]
fn stretch_end(tables: &Tables, text: &str, mut at: usize, mut before: u32) -> usize {
    let (bytes, user) = (text.as_bytes(), tables.user());
    let plain = !user.first_ascii();
    while at < bytes.len() {
        let byte = bytes[at];
        if byte < 128 && before < 128 && (tables.join_ascii(before) & plain) >> byte & 1 == 1 {
            before = u32::from(byte);
            at += 1;
            continue;
        }
        let (c, c_bytes) = char_at(text, at);
        if !tables.may_join(before, c) || (user.may_start(c) && user.longest(&text[at..]).is_some()) {
            break;
        }
        before = c;
        at += c_bytes;
    }
    at
}

/// Appends the ids of one stretch, remembered or worked out.
#[inline]
fn encode_stretch(tables: &Tables, text: &str, range: std::ops::Range<usize>, scratch: &mut Scratch, ids: &mut Vec<u32>) {
    let bytes = text.as_bytes();
    let length = range.len();
    if length == 1 {
        return push_symbol(tables, tables.symbol(u32::from(bytes[range.start])), &text[range], ids);
    }
    if length > KEY_BYTES {
        return merge_stretch(tables, &text[range], scratch, ids);
    }
    let key = key_of(bytes, &range);
    let slot = (mix(mix(key[0] ^ key[2].rotate_left(29)) ^ key[1] ^ key[3].rotate_left(31)) >> (64 - CACHE_BITS)) as usize;
    let found = &scratch.cache[slot];
    if found.key == key && usize::from(found.length) == length {
        ids.extend_from_slice(&found.ids[..usize::from(found.n_ids)]);
        return;
    }
    let first = ids.len();
    merge_stretch(tables, &text[range], scratch, ids);
    let new = &ids[first..];
    if new.len() <= VALUE_IDS {
        let slot = &mut scratch.cache[slot];
        (slot.key, slot.length, slot.n_ids) = (key, length as u16, new.len() as u16);
        slot.ids[..new.len()].copy_from_slice(new);
    }
}

/// The bytes of a stretch of at most 32, padded with zeros.
#[inline]
fn key_of(bytes: &[u8], range: &std::ops::Range<usize>) -> [u64; 4] {
    let mut block = [0u8; KEY_BYTES];
    match bytes.get(range.start..range.start + KEY_BYTES) {
        Some(whole) => block.copy_from_slice(whole),
        None => block[..range.len()].copy_from_slice(&bytes[range.clone()]),
    }
    let mut key = [0u64; 4];
    for (i, word) in key.iter_mut().enumerate() {
        let kept = range.len().saturating_sub(8 * i).min(8) as u32;
        let mask = if kept == 8 { u64::MAX } else { (1 << (8 * kept)) - 1 };
        *word = u64::from_le_bytes(block[8 * i..8 * i + 8].try_into().expect("eight bytes")) & mask;
    }
    key
}

/// Merges one stretch from its characters.
fn merge_stretch(tables: &Tables, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
    assert!(text.len() < NONE as usize, "a stretch of {} bytes, the encoder counts to 4 GiB", text.len());
    scratch.symbols.clear();
    scratch.symbols.extend(text.char_indices().map(|(at, c)| Symbol { symbol: tables.symbol(fold(c)), start: at as u32 }));
    scratch.merges.clear();
    let pairs = scratch.symbols.windows(2).map(|pair| tables.merge(pair[0].symbol, pair[1].symbol));
    scratch.merges.extend(pairs);
    scratch.operations += scratch.symbols.len() as u64;
    if scratch.symbols.len() <= SCAN_SYMBOLS {
        merge_by_scan(tables, scratch);
    } else {
        merge_by_heap(tables, scratch);
    }
    for (i, symbol) in scratch.symbols.iter().enumerate() {
        let end = scratch.symbols.get(i + 1).map_or(text.len(), |next| next.start as usize);
        push_symbol(tables, symbol.symbol, &text[symbol.start as usize..end], ids);
    }
}

/// Few symbols: look at all pairs each time.
fn merge_by_scan(tables: &Tables, scratch: &mut Scratch) {
    let (symbols, merges) = (&mut scratch.symbols, &mut scratch.merges);
    loop {
        let (mut best, mut best_rank) = (0, NO_RANK);
        for (i, merge) in merges.iter().enumerate() {
            if merge.rank < best_rank {
                (best, best_rank) = (i, merge.rank);
            }
        }
        scratch.operations += merges.len() as u64;
        if best_rank == NO_RANK {
            return;
        }
        symbols[best].symbol = merges[best].result;
        symbols.remove(best + 1);
        merges.remove(best);
        if best > 0 {
            merges[best - 1] = tables.merge(symbols[best - 1].symbol, symbols[best].symbol);
        }
        if best < merges.len() {
            merges[best] = tables.merge(symbols[best].symbol, symbols[best + 1].symbol);
        }
    }
}

/// Many symbols: a heap of (rank, left) and a linked list. `merges[left]` is what `left` and its next neighbour merge into
/// now, so an entry of the heap that is out of date either differs from it in rank and is dropped, or names the very merge
/// that is due.
fn merge_by_heap(tables: &Tables, scratch: &mut Scratch) {
    let (symbols, merges, links, heap) = (&mut scratch.symbols, &mut scratch.merges, &mut scratch.links, &mut scratch.heap);
    let n = symbols.len();
    links.clear();
    links.extend((0..n as u32).map(|i| Link { previous: i.wrapping_sub(1), next: if i as usize + 1 < n { i + 1 } else { NONE } }));
    merges.push(NO_MERGE); // the last symbol has no right neighbour
    let entry = |rank: u32, left: u32| Reverse(u64::from(rank) << 32 | u64::from(left));
    let mut entries = std::mem::take(heap).into_vec();
    entries.clear();
    entries.extend(merges.iter().enumerate().filter(|(_, merge)| merge.rank != NO_RANK).map(|(i, merge)| entry(merge.rank, i as u32)));
    *heap = BinaryHeap::from(entries);
    while let Some(Reverse(top)) = heap.pop() {
        scratch.operations += 1;
        let (rank, left) = ((top >> 32) as u32, top as u32);
        let merge = merges[left as usize];
        if merge.rank != rank {
            continue;
        }
        let right = links[left as usize].next;
        let after = links[right as usize].next;
        symbols[left as usize].symbol = merge.result;
        symbols[right as usize].start = NONE;
        merges[right as usize] = NO_MERGE;
        links[left as usize].next = after;
        if after != NONE {
            links[after as usize].previous = left;
        }
        for pair in [(links[left as usize].previous, left), (left, after)] {
            if pair.0 == NONE {
                continue;
            }
            let new = match pair.1 {
                NONE => NO_MERGE,
                right => tables.merge(symbols[pair.0 as usize].symbol, symbols[right as usize].symbol),
            };
            merges[pair.0 as usize] = new;
            if new.rank != NO_RANK {
                heap.push(entry(new.rank, pair.0));
                scratch.operations += 1;
            }
        }
    }
    symbols.retain(|symbol| symbol.start != NONE);
}

/// The id of a symbol, or the bytes of a character that has none.
#[inline]
fn push_symbol(tables: &Tables, symbol: u32, text: &str, ids: &mut Vec<u32>) {
    if symbol < tables.n_pieces {
        return ids.push(symbol);
    }
    push_unknown(tables, text, ids);
}

#[cold]
fn push_unknown(tables: &Tables, text: &str, ids: &mut Vec<u32>) {
    let Some(bytes) = &tables.bytes else { return ids.push(tables.unk) };
    let mut utf8 = [0; 4];
    let seen = if text == " " { SPACE_MARK.encode_utf8(&mut utf8) } else { text };
    ids.extend(seen.bytes().map(|byte| bytes[usize::from(byte)]));
}

/// Without byte fallback SentencePiece emits one unknown piece for a run of unknown characters.
fn merge_unknown_runs(unk: u32, first: usize, ids: &mut Vec<u32>) {
    let mut kept = first;
    for i in first..ids.len() {
        if ids[i] != unk || kept == first || ids[kept - 1] != unk {
            ids[kept] = ids[i];
            kept += 1;
        }
    }
    ids.truncate(kept);
}

const _: () = assert!(NO_SYMBOL == NONE && std::mem::size_of::<Remembered>() == 64);
