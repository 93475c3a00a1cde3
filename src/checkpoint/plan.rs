//! Who writes what: all ranks know what all ranks hold, and decide alike. A slice that several ranks hold is written once. Knows
//! nothing of files.

use super::save::Piece;
use super::shard::PieceSpec;
use crate::comm::Communicator;
use std::collections::{BTreeMap, BTreeSet};

/// What a rank has to write, and what all ranks together write.
pub(super) struct Plan<'a, 'b> {
    /// The pieces that this rank writes.
    pub mine: Vec<&'b Piece<'a>>,
    /// Bytes of the values of all ranks.
    pub total_bytes: u64,
    /// Pieces of all ranks.
    pub n_pieces: usize,
}

/// The description of a piece.
pub(super) fn spec_of(piece: &Piece) -> PieceSpec {
    PieceSpec {
        name: piece.name.clone(),
        global_shape: piece.global_shape.clone(),
        slice: piece.slice.clone(),
        dtype: piece.tensor.dtype().into(),
    }
}

/// Divides the pieces of all ranks among them. Collective.
///
/// # Panics
/// When the pieces of a tensor do not tile it, or replicas differ.
pub(super) fn plan<'a, 'b>(pieces: &'b [Piece<'a>], world: &dyn Communicator) -> Plan<'a, 'b> {
    let specs: Vec<PieceSpec> = pieces.iter().map(spec_of).collect();
    for piece in pieces {
        assert_eq!(piece.tensor.n_elements(), piece.slice.n_elements(), "values of {} for {:?}", piece.name, piece.slice);
    }
    let all = world.gather_variable(&serde_json::to_vec(&specs).expect("plain data"));
    let all: Vec<Vec<PieceSpec>> = all.iter().map(|text| serde_json::from_slice(text).expect("plain data of a rank")).collect();
    let writers = assign(&all);
    check_cover(&all, world);
    let rank = world.rank();
    Plan {
        mine: pieces.iter().enumerate().filter(|(idx, _)| writers.contains(&(rank, *idx))).map(|(_, piece)| piece).collect(),
        total_bytes: writers.iter().map(|&(rank, idx)| all[rank][idx].n_bytes()).sum(),
        n_pieces: writers.len(),
    }
}

/// Name, offset and shape of a slice.
type Place<'a> = (&'a str, &'a [usize], &'a [usize]);

/// Picks one (rank, piece) for each distinct slice, largest first, the rank with the least to write so far.
fn assign(all: &[Vec<PieceSpec>]) -> BTreeSet<(usize, usize)> {
    let mut holders: BTreeMap<Place, Vec<(usize, usize)>> = BTreeMap::new();
    for (rank, specs) in all.iter().enumerate() {
        for (idx, spec) in specs.iter().enumerate().filter(|(_, spec)| spec.n_bytes() > 0) {
            holders.entry((&spec.name, &spec.slice.offset, &spec.slice.shape)).or_default().push((rank, idx));
        }
    }
    let spec = |(rank, idx): (usize, usize)| &all[rank][idx];
    let mut groups: Vec<Vec<(usize, usize)>> = holders.into_values().collect();
    groups.sort_by_key(|group| (group.len() > 1, std::cmp::Reverse(spec(group[0]).n_bytes())));
    let (mut load, mut chosen) = (vec![0u64; all.len()], BTreeSet::new());
    for group in groups {
        let &writer = group.iter().min_by_key(|(rank, _)| (load[*rank], *rank)).expect("a group has a holder");
        for &holder in &group {
            assert_eq!(spec(holder), spec(writer), "replicas of a piece differ in type or shape");
        }
        load[writer.0] += spec(writer).n_bytes();
        chosen.insert(writer);
    }
    chosen
}

/// The distinct slices of every tensor tile it. Each rank checks its share of the tensors.
fn check_cover(all: &[Vec<PieceSpec>], world: &dyn Communicator) {
    let mut tensors: BTreeMap<&str, Vec<&PieceSpec>> = BTreeMap::new();
    for spec in all.iter().flatten().filter(|spec| spec.n_bytes() > 0) {
        tensors.entry(&spec.name).or_default().push(spec);
    }
    for (name, mut specs) in tensors.into_iter().skip(world.rank()).step_by(world.size()) {
        specs.sort_by(|a, b| (&a.slice.offset, &a.slice.shape).cmp(&(&b.slice.offset, &b.slice.shape)));
        specs.dedup_by(|a, b| a.slice == b.slice);
        let total: usize = specs[0].global_shape.iter().product();
        assert_eq!(specs.iter().map(|spec| spec.slice.n_elements()).sum::<usize>(), total, "the pieces of {name} do not tile it");
        for (i, a) in specs.iter().enumerate() {
            assert_eq!((&a.global_shape, a.dtype), (&specs[0].global_shape, specs[0].dtype), "pieces of {name} disagree");
            for b in &specs[..i] {
                assert!(a.slice.intersect(&b.slice).is_none(), "pieces of {name} overlap: {:?} and {:?}", a.slice, b.slice);
            }
        }
    }
}
