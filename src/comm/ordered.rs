//! Collectives on tensors from the byte primitives: pieces exchanged, then summed in rank order in f32 with one rounding at
//! the end (see the head of `comm`). A piece is summed by the rank that will own it, so all ranks end with the same bits.

use super::{Communicator, Pending, ReduceOp};
use crate::error::{Error, Kind, Result};
use crate::tensor::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

/// Elements that one thread sums at a time.
const BLOCK: usize = 1 << 15;

pub(super) fn start_all_gather<'a, C: Communicator + ?Sized>(comm: &'a C, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
    assert_eq!(shard.dtype(), full.dtype());
    assert_eq!(full.n_elements(), shard.n_elements() * comm.size(), "all-gather {shard:?} into {full:?} over {} ranks", comm.size());
    comm.start_all_gather_bytes(shard.bytes(), full.bytes_mut())
}

pub(super) fn start_reduce_scatter<'a, C: Communicator + ?Sized>(comm: &'a C, full: &'a Tensor, shard: &'a mut Tensor) -> Pending<'a> {
    assert_eq!(shard.dtype(), full.dtype());
    let n_ranks = comm.size();
    assert_eq!(full.n_elements(), shard.n_elements() * n_ranks, "reduce-scatter {full:?} into {shard:?} over {n_ranks} ranks");
    if n_ranks == 1 {
        shard.bytes_mut().copy_from_slice(full.bytes());
        return Pending::done();
    }
    let exchange = comm.start_all_to_all_bytes(full.bytes(), comm.staging().take(full.n_bytes()));
    Pending::until(move || {
        let pieces = exchange.wait();
        let dtype = shard.dtype();
        reduce_pieces(dtype, shard.bytes_mut(), &pieces, ReduceOp::Sum);
        comm.staging().give_back(pieces);
    })
}

/// Reduce-scatter, then all-gather, of the tensor padded to equal pieces.
pub(super) fn all_reduce<C: Communicator + ?Sized>(comm: &C, x: &mut Tensor, op: ReduceOp) {
    let n_ranks = comm.size();
    if n_ranks == 1 || x.n_elements() == 0 {
        return;
    }
    let dtype = x.dtype();
    let piece_bytes = x.n_elements().div_ceil(n_ranks) * dtype.bytes();
    let mut padded = comm.staging().take(piece_bytes * n_ranks);
    padded[..x.n_bytes()].copy_from_slice(x.bytes());
    padded[x.n_bytes()..].fill(0);
    let pieces = comm.start_all_to_all_bytes(&padded, comm.staging().take(padded.len())).wait();
    let mut mine = comm.staging().take(piece_bytes);
    reduce_pieces(dtype, &mut mine, &pieces, op);
    comm.start_all_gather_bytes(&mine, &mut padded).wait();
    let n_bytes = x.n_bytes();
    x.bytes_mut().copy_from_slice(&padded[..n_bytes]);
    [padded, pieces, mine].into_iter().for_each(|buffer| comm.staging().give_back(buffer));
}

/// out = piece 0 op piece 1 op .., where `pieces` holds equal pieces of out's size in rank order.
fn reduce_pieces(dtype: DType, out: &mut [u8], pieces: &[u8], op: ReduceOp) {
    match dtype {
        DType::F32 => reduce_typed::<f32>(out, pieces, |x| x, |x| x, op),
        DType::BF16 => reduce_typed::<bf16>(out, pieces, bf16::to_f32, bf16::from_f32, op),
        DType::U32 => panic!("u32 tensors can be gathered and sent, not summed"),
    }
}

fn reduce_typed<T: bytemuck::Pod + Send + Sync>(
    out: &mut [u8],
    pieces: &[u8],
    widen: impl Fn(T) -> f32 + Sync,
    round: impl Fn(f32) -> T + Sync,
    op: ReduceOp,
) {
    // Byte buffers may lie unaligned for T: elements are copied through small aligned blocks.
    let (width, n_ranks) = (size_of::<T>(), pieces.len() / out.len().max(1));
    out.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, out_block)| {
        let n = out_block.len() / width;
        let mut sum = vec![0f32; n];
        for rank in 0..n_ranks {
            let start = rank * (pieces.len() / n_ranks) + block * BLOCK * width;
            let values = pieces[start..start + out_block.len()].chunks_exact(width).map(|b| widen(bytemuck::pod_read_unaligned(b)));
            match (rank, op) {
                (0, _) => sum.iter_mut().zip(values).for_each(|(sum, x)| *sum = x),
                (_, ReduceOp::Sum) => sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x),
                (_, ReduceOp::Max) => sum.iter_mut().zip(values).for_each(|(sum, x)| *sum = sum.max(x)),
            }
        }
        for (to, sum) in out_block.chunks_exact_mut(width).zip(sum) {
            to.copy_from_slice(bytemuck::bytes_of(&round(sum)));
        }
    });
}

/// Lengths first, then the bytes padded to the longest.
pub(super) fn gather_variable<C: Communicator + ?Sized>(comm: &C, mine: &[u8]) -> Vec<Vec<u8>> {
    let mut lengths = vec![0u8; 8 * comm.size()];
    comm.start_all_gather_bytes(&(mine.len() as u64).to_le_bytes(), &mut lengths).wait();
    let lengths: Vec<usize> = lengths.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")) as usize).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut padded = mine.to_vec();
    padded.resize(longest, 0);
    let mut all = vec![0u8; longest * comm.size()];
    comm.start_all_gather_bytes(&padded, &mut all).wait();
    lengths.iter().enumerate().map(|(rank, &length)| all[rank * longest..][..length].to_vec()).collect()
}

pub(super) fn agree<T>(world: &dyn Communicator, mine: Result<T>) -> Result<T> {
    if world.size() == 1 {
        return mine;
    }
    let text = match &mine {
        Ok(_) => Vec::new(),
        Err(error) => format!("{}{error}", error.exit_code() as char).into_bytes(),
    };
    let failed = world.gather_variable(&text).into_iter().enumerate().find(|(_, text)| !text.is_empty());
    let Some((_, text)) = failed else { return mine };
    let text = String::from_utf8_lossy(&text);
    let mut letters = text.chars();
    let kind = match letters.next().map(|code| code as u32) {
        Some(2) => Kind::Recipe,
        Some(3) => Kind::File,
        Some(4) => Kind::Numeric,
        Some(75) => Kind::Requeue,
        _ => Kind::Other,
    };
    Err(Error::new(kind, letters.as_str()))
}
