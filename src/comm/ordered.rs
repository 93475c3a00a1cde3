//! Collectives on tensors from the byte primitives: pieces exchanged, then added in rank order (see the head of `comm`).
//! Every element is x_0 + x_1 + .. (or the same in pairs) in f32 with one rounding to the tensor's dtype, whichever way its bytes
//! travelled.
//!
//! Tensors that are not in host memory travel through it, and their collectives are complete when they were started: all ranks
//! start them in the same order, so that waiting at once cannot deadlock.

use super::{Communicator, Pending, ReduceOp, StagingBuffer};
use crate::error::{Error, Kind, Result};
use crate::tensor::{DType, Tensor};
use rayon::prelude::*;

/// An all-reduce that moves no more than this in all goes in one message round instead of two.
const SMALL_BYTES: usize = 64 * 1024;
/// Elements added by one task; an output block of this size stays in the second-level cache.
const BLOCK: usize = 16 * 1024;
/// Elements widened at a time; their f32 sums stay in the first-level cache.
const LANE_BLOCK: usize = 1024;

pub(super) fn start_all_gather<'a, C: Communicator + ?Sized>(comm: &'a C, shard: &'a Tensor, full: &'a mut Tensor) -> Pending<'a> {
    check_division("all-gather", comm.size(), full, shard);
    if !shard.is_host() || !full.is_host() {
        let mine = on_host(comm, shard);
        let mut all = comm.staging().take(full.n_bytes());
        comm.start_all_gather_bytes(mine.bytes(), all.bytes_mut()).wait();
        full.write_bytes(0, all.bytes());
        return Pending::done();
    }
    comm.start_all_gather_bytes(shard.bytes(), full.bytes_mut())
}

pub(super) fn start_reduce_scatter<'a, C: Communicator + ?Sized>(
    comm: &'a C,
    full: &'a Tensor,
    shard: &'a mut Tensor,
    op: ReduceOp,
) -> Pending<'a> {
    check_division("reduce-scatter", comm.size(), full, shard);
    check_summable("reduce-scatter", (full, op), comm.size());
    let dtype = full.dtype();
    if !shard.is_host() || !full.is_host() {
        let all = on_host(comm, full);
        let mut sum = comm.staging().take(shard.n_bytes());
        comm.start_all_to_all_bytes(all.bytes(), Box::new(|pieces| combine(pieces, sum.bytes_mut(), dtype, op))).wait();
        shard.write_bytes(0, sum.bytes());
        return Pending::done();
    }
    let finish = move |pieces: &[&[u8]]| combine(pieces, shard.bytes_mut(), dtype, op);
    comm.start_all_to_all_bytes(full.bytes(), Box::new(finish))
}

pub(super) fn all_reduce<C: Communicator + ?Sized>(comm: &C, x: &mut Tensor, op: ReduceOp) {
    check_summable("all-reduce", (x, op), comm.size());
    if comm.size() == 1 {
        return;
    }
    if x.is_host() {
        let dtype = x.dtype();
        return all_reduce_bytes(comm, x.bytes_mut(), dtype, op);
    }
    let mut bytes = on_host(comm, x);
    all_reduce_bytes(comm, bytes.bytes_mut(), x.dtype(), op);
    x.write_bytes(0, bytes.bytes());
}

pub(super) fn broadcast<C: Communicator + ?Sized>(comm: &C, x: &mut Tensor, root: usize) {
    if x.is_host() {
        return comm.broadcast_bytes(x.bytes_mut(), root);
    }
    let mut bytes = on_host(comm, x);
    comm.broadcast_bytes(bytes.bytes_mut(), root);
    x.write_bytes(0, bytes.bytes());
}

/// A copy of a tensor's bytes on the host.
pub(super) fn on_host<C: Communicator + ?Sized>(comm: &C, x: &Tensor) -> StagingBuffer {
    let mut copy = comm.staging().take(x.n_bytes());
    x.read_bytes(0, copy.bytes_mut());
    copy
}

fn all_reduce_bytes<C: Communicator + ?Sized>(comm: &C, x: &mut [u8], dtype: DType, op: ReduceOp) {
    let n_elements = x.len() / dtype.bytes();
    let n_large = if x.len() * comm.size() <= SMALL_BYTES { 0 } else { n_elements / comm.size() * comm.size() };
    // What does not divide by the ranks, fewer elements than there are ranks, travels as a small one: no padded copy.
    let (large, small) = x.split_at_mut(n_large * dtype.bytes());
    if !large.is_empty() {
        let mut shard = comm.staging().take(large.len() / comm.size());
        let finish = |pieces: &[&[u8]]| combine(pieces, shard.bytes_mut(), dtype, op);
        comm.start_all_to_all_bytes(large, Box::new(finish)).wait();
        comm.start_all_gather_bytes(shard.bytes(), large).wait();
    }
    if !small.is_empty() {
        let mut all = comm.staging().take(small.len() * comm.size());
        comm.start_all_gather_bytes(small, all.bytes_mut()).wait();
        let pieces: Vec<&[u8]> = all.bytes().chunks_exact(small.len()).collect();
        combine(&pieces, small, dtype, op);
    }
}

pub(super) fn gather_variable<C: Communicator + ?Sized>(comm: &C, mine: &[u8]) -> Vec<Vec<u8>> {
    let lengths = gather_u64(comm, mine.len() as u64);
    let longest = lengths.iter().copied().max().expect("at least this rank") as usize;
    if longest == 0 {
        return vec![Vec::new(); comm.size()];
    }
    let mut padded = comm.staging().take(longest);
    padded.bytes_mut()[..mine.len()].copy_from_slice(mine);
    padded.bytes_mut()[mine.len()..].fill(0);
    let mut all = comm.staging().take(longest * comm.size());
    comm.start_all_gather_bytes(padded.bytes(), all.bytes_mut()).wait();
    all.bytes().chunks_exact(longest).zip(lengths).map(|(bytes, n)| bytes[..n as usize].to_vec()).collect()
}

pub(super) fn agree<T>(world: &dyn Communicator, mine: Result<T>) -> Result<T> {
    if world.size() == 1 {
        return mine;
    }
    // One small round when all is well; the text travels only after a failure.
    let text = mine.as_ref().err().map(encode).unwrap_or_default();
    let lengths = gather_u64(world, text.len() as u64);
    let Some(first) = lengths.iter().position(|&n| n > 0) else { return mine };
    let mut bytes = if world.rank() == first { text } else { vec![0; lengths[first] as usize] };
    world.broadcast_bytes(&mut bytes, first);
    Err(decode(&bytes))
}

const KINDS: [Kind; 6] = [Kind::Recipe, Kind::File, Kind::Numeric, Kind::Requeue, Kind::Machine, Kind::Other];

/// Kind and text; never empty.
fn encode(error: &Error) -> Vec<u8> {
    let kind = KINDS.iter().position(|&kind| kind == error.kind()).expect("every kind is listed");
    let mut bytes = vec![kind as u8];
    bytes.extend_from_slice(error.to_string().as_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Error {
    Error::new(KINDS[bytes[0] as usize], String::from_utf8_lossy(&bytes[1..]))
}

fn gather_u64<C: Communicator + ?Sized>(comm: &C, x: u64) -> Vec<u64> {
    let mut all = vec![0u8; 8 * comm.size()];
    comm.start_all_gather_bytes(&x.to_le_bytes(), &mut all).wait();
    all.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

pub(super) fn check_division(what: &str, size: usize, full: &Tensor, shard: &Tensor) {
    let fits = full.dtype() == shard.dtype() && full.n_elements() == size * shard.n_elements();
    assert!(fits, "{what} over {size} ranks: {full:?} is not {size} times {shard:?}");
}

pub(super) fn check_summable(what: &str, (x, op): (&Tensor, ReduceOp), size: usize) {
    assert!([DType::F32, DType::BF16].contains(&x.dtype()), "{what} of {x:?}: only f32 and bf16 are summed");
    assert!(op != ReduceOp::SumInPairs || size.is_power_of_two(), "{what} in pairs over {size} ranks, not a power of two");
}

/// out = the pieces combined in rank order; all of one length and dtype.
fn combine(pieces: &[&[u8]], out: &mut [u8], dtype: DType, op: ReduceOp) {
    // Up to two pieces are a pair.
    if op == ReduceOp::SumInPairs && pieces.len() > 2 {
        return combine_in_pairs(pieces, out, dtype);
    }
    match dtype {
        DType::F32 => {
            let pieces: Vec<&[f32]> = pieces.iter().map(|piece| bytemuck::cast_slice(piece)).collect();
            in_blocks(&pieces, bytemuck::cast_slice_mut(out), |pieces, out| combine_f32(pieces, out, op));
        }
        DType::BF16 => {
            let pieces: Vec<&[u16]> = pieces.iter().map(|piece| bytemuck::cast_slice(piece)).collect();
            in_blocks(&pieces, bytemuck::cast_slice_mut(out), |pieces, out| combine_bf16(pieces, out, op));
        }
        DType::U32 | DType::F8E4M3 => unreachable!("refused before anything is sent"),
    }
}

/// Calls `block` on matching blocks of the pieces and the output, on all cores when there is enough to do.
fn in_blocks<T: Copy + Send + Sync>(pieces: &[&[T]], out: &mut [T], block: impl Fn(&[&[T]], &mut [T]) + Sync) {
    if out.len() <= 4 * BLOCK {
        return block(pieces, out);
    }
    out.par_chunks_mut(BLOCK).enumerate().for_each(|(i, out)| {
        let part: Vec<&[T]> = pieces.iter().map(|piece| &piece[i * BLOCK..i * BLOCK + out.len()]).collect();
        block(&part, out);
    });
}

/// out = ((p0 + p1) + (p2 + p3)) + ..
fn combine_in_pairs(pieces: &[&[u8]], out: &mut [u8], dtype: DType) {
    match dtype {
        DType::F32 => {
            let pieces: Vec<&[f32]> = pieces.iter().map(|piece| bytemuck::cast_slice(piece)).collect();
            in_blocks(&pieces, bytemuck::cast_slice_mut(out), |pieces, out| pairs(pieces, out, |x| x, |x| x));
        }
        DType::BF16 => {
            let pieces: Vec<&[u16]> = pieces.iter().map(|piece| bytemuck::cast_slice(piece)).collect();
            in_blocks(&pieces, bytemuck::cast_slice_mut(out), |pieces, out| pairs(pieces, out, widen, round_to_bf16));
        }
        DType::U32 | DType::F8E4M3 => unreachable!("refused before anything is sent"),
    }
}

/// One block: sums of 1, 2, 4 .. pieces wait for as many more; which ones wait is the binary number of the pieces added.
fn pairs<T: Copy>(pieces: &[&[T]], out: &mut [T], get: impl Fn(T) -> f32, round: impl Fn(f32) -> T) {
    let mut waiting = vec![[0f32; LANE_BLOCK]; pieces.len().ilog2() as usize + 1];
    for (i, out) in out.chunks_mut(LANE_BLOCK).enumerate() {
        let at = i * LANE_BLOCK..i * LANE_BLOCK + out.len();
        for (done, piece) in pieces.iter().enumerate() {
            let (earlier, rest) = waiting.split_at_mut(done.trailing_ones() as usize);
            let sum = &mut rest[0][..out.len()];
            sum.iter_mut().zip(&piece[at.clone()]).for_each(|(sum, x)| *sum = get(*x));
            for earlier in earlier {
                sum.iter_mut().zip(earlier).for_each(|(sum, x)| *sum += *x);
            }
        }
        let sum = &waiting[waiting.len() - 1];
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = round(*sum));
    }
}

fn combine_f32(pieces: &[&[f32]], out: &mut [f32], op: ReduceOp) {
    for (i, out) in out.chunks_mut(LANE_BLOCK).enumerate() {
        let at = i * LANE_BLOCK..i * LANE_BLOCK + out.len();
        out.copy_from_slice(&pieces[0][at.clone()]);
        for piece in &pieces[1..] {
            accumulate(out, piece[at.clone()].iter().copied(), op);
        }
    }
}

fn combine_bf16(pieces: &[&[u16]], out: &mut [u16], op: ReduceOp) {
    let mut sum = [0f32; LANE_BLOCK];
    for (i, out) in out.chunks_mut(LANE_BLOCK).enumerate() {
        let at = i * LANE_BLOCK..i * LANE_BLOCK + out.len();
        let sum = &mut sum[..out.len()];
        for (sum, &x) in sum.iter_mut().zip(&pieces[0][at.clone()]) {
            *sum = widen(x);
        }
        for piece in &pieces[1..] {
            accumulate(sum, piece[at.clone()].iter().map(|&x| widen(x)), op);
        }
        for (out, &sum) in out.iter_mut().zip(sum.iter()) {
            *out = round_to_bf16(sum);
        }
    }
}

/// sum = sum + x or max(sum, x); a NaN stays a NaN in either, so that a bad value is seen on every rank.
fn accumulate(sum: &mut [f32], xs: impl Iterator<Item = f32>, op: ReduceOp) {
    match op {
        ReduceOp::Sum | ReduceOp::SumInPairs => sum.iter_mut().zip(xs).for_each(|(sum, x)| *sum += x),
        ReduceOp::Max => sum.iter_mut().zip(xs).for_each(|(max, x)| *max = if *max >= x || max.is_nan() { *max } else { x }),
    }
}

fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// To nearest even, NaN to quiet NaN; without branches, so that the loop around it becomes vector code.
fn round_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding is that of half::bf16 for every upper half and the lower halves around ties: else a sum over ranks would
    /// round otherwise than the device does.
    #[test]
    fn bf16_rounds_to_nearest_even() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(round_to_bf16(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }

    /// An error keeps its kind and text on the way to other ranks, so every rank exits with the same code and message.
    #[test]
    fn errors_travel_whole() {
        for kind in KINDS {
            let error = Error::new(kind, "found 3, expected 4").remedy("try 4").doing("reading");
            let back = decode(&encode(&error));
            assert_eq!((back.kind(), back.to_string()), (kind, error.to_string()));
        }
    }
}
