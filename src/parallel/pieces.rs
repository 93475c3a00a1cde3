//! Pieces of sums that no layout moves: the leaves of the trees in which `numerics.mode = "reproducible"` adds. Pure arithmetic on
//! lengths and indices.

use std::ops::Range;

/// Pieces of every sum that tensor parallelism divides, whatever it is: a rank has `TP_PIECES` / tp of them, so tp divides it. Where it
/// does not, sums are not divided: see `model::numerics`.
pub const TP_PIECES: usize = 8;

/// Piece `index` of `n` pieces of a dim of this length: floor(index length / n) .. floor((index + 1) length / n). Where n' divides n
/// and the length, the pieces of each n'-th of the dim are those of the whole.
pub fn piece(length: usize, index: usize, n: usize) -> Range<usize> {
    index * length / n..(index + 1) * length / n
}

/// All `n` pieces, in order.
pub fn pieces(length: usize, n: usize) -> Vec<Range<usize>> {
    (0..n).map(|index| piece(length, index, n)).collect()
}

/// Adds tensors of one shape in pairs: the first holds the sum after it. `add` is x += y.
pub fn add_in_pairs<T>(items: &mut [T], add: &impl Fn(&mut T, &T)) {
    if items.len() < 2 {
        return;
    }
    let (first, second) = items.split_at_mut(items.len() / 2);
    add_in_pairs(first, add);
    add_in_pairs(second, add);
    add(&mut first[0], &second[0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of a rank's part are those of the whole, whatever the length: else a rank would begin inside of a piece.
    #[test]
    fn pieces_of_parts_are_those_of_the_whole() {
        for length in [8, 12, 24, 40, 52, 104] {
            let whole = pieces(length, TP_PIECES);
            assert!(whole[0].start == 0 && whole[TP_PIECES - 1].end == length && whole.windows(2).all(|w| w[0].end == w[1].start));
            for tp in [1, 2, 4, 8].into_iter().filter(|tp| length % tp == 0) {
                let part = length / tp;
                let of_parts = (0..tp).flat_map(|rank| {
                    pieces(part, TP_PIECES / tp).into_iter().map(move |piece| rank * part + piece.start..rank * part + piece.end)
                });
                assert_eq!(of_parts.collect::<Vec<_>>(), whole, "{length} over {tp}");
            }
        }
    }

    /// ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), written down.
    #[test]
    fn pairs_are_neighbours_first() {
        let mut texts: Vec<String> = (0..8).map(|i| i.to_string()).collect();
        add_in_pairs(&mut texts, &|x, y| *x = format!("({x}+{y})"));
        assert_eq!(texts[0], "(((0+1)+(2+3))+((4+5)+(6+7)))");
    }
}
