//! How many pages the KV cache of a rank has: what the responses that are under way together can need at most, as far as that fits.

use super::schedule::most_pages;
use crate::device::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::parallel::layout::ParallelLayout;
use crate::tensor::DType;

/// Of the memory that is free when the model is loaded, the part that the cache may have: passes need some, and so do others.
const SHARE_OF_FREE: f64 = 0.8;

/// Bytes of a page on one rank: keys and values of its layers and heads.
pub fn page_bytes(config: &ModelConfig, layout: &ParallelLayout, dtype: DType) -> usize {
    let heads = config.n_kv_heads / layout.tp;
    2 * (config.n_layers / layout.pp) * PAGE_TOKENS * heads * config.head_dim * dtype.bytes()
}

/// Where the bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// So many bytes a rank were asked for.
    Asked(usize),
    /// So many are free for this rank.
    Free(usize),
    /// Nobody knows how many are free.
    Unknown,
}

/// Pages of a rank's cache for sequences of at most `most_tokens` tokens each (prompt and response), `n_sequences` of them together.
/// Err: the longest alone does not fit.
pub fn n_pages(most_tokens: &[usize], n_sequences: usize, page_bytes: usize, room: Room) -> Result<usize> {
    let mut pages: Vec<usize> = most_tokens.iter().map(|&tokens| most_pages(tokens, PAGE_TOKENS)).collect();
    pages.sort_unstable_by(|a, b| b.cmp(a));
    let longest = pages.first().copied().unwrap_or(0);
    let needed: usize = pages.iter().take(n_sequences).sum();
    let (fitting, what) = match room {
        Room::Asked(bytes) => (bytes / page_bytes, format!("--kv-memory {}", readable(bytes))),
        Room::Free(bytes) => (
            (SHARE_OF_FREE * bytes as f64) as usize / page_bytes,
            format!("{:.0} % of the {} that are free", 100.0 * SHARE_OF_FREE, readable(bytes)),
        ),
        Room::Unknown => (usize::MAX, String::new()),
    };
    if fitting < longest {
        let tokens = most_tokens.iter().max().expect("there is a longest");
        let wrong = format!(
            "the KV cache of one response of up to {tokens} tokens takes {} on each rank, there is room for {} ({what})",
            readable(longest * page_bytes),
            readable(fitting * page_bytes)
        );
        return Err(Error::recipe(wrong).remedy("give --kv-memory more, raise --tp or --pp, or lower max_new_tokens"));
    }
    // What was asked for in bytes is had whole: the room beyond what responses need keeps prompts for later requests.
    Ok(match room {
        Room::Asked(_) => fitting.min(u32::MAX as usize),
        Room::Free(_) | Room::Unknown => fitting.min(needed),
    })
}

/// Bytes for people.
fn readable(bytes: usize) -> String {
    const UNITS: [(usize, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(size, _)| bytes >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", bytes as f64 / *size as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough for the longest that may run together, no more than there is, and one line with both values when one response is too long.
    #[test]
    fn pages_are_what_is_needed_and_fits() {
        let lengths = [65, 1 + PAGE_TOKENS, 640, 64 * 3 + 2];
        let pages = |n_sequences, room| n_pages(&lengths, n_sequences, 1000, room);
        assert_eq!(pages(1, Room::Unknown).unwrap(), 10);
        assert_eq!(pages(2, Room::Unknown).unwrap(), 14);
        assert_eq!(pages(9, Room::Unknown).unwrap(), 16);
        assert_eq!(pages(9, Room::Free(16_000)).unwrap(), 12);
        assert_eq!(pages(2, Room::Asked(40_999)).unwrap(), 40);
        for (room, named) in [(Room::Asked(9_999), "--kv-memory 9.8 KiB"), (Room::Free(12_000), "80 % of the 11.7 KiB")] {
            let error = pages(2, room).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(named) && text.contains("640 tokens takes 9.8 KiB") && error.exit_code() == 2, "{text}");
        }
    }
}
