//! Every collective on fresh data, for any communicator: what tests/collectives.rs runs on threads, tests/mpi_ranks.rs on
//! MPI and tests/nccl.rs between devices. Every rank knows what every other rank sends (data are a function of rank and element), so each
//! result is compared, bit for bit, with a plain loop in rank order written here.

use half::bf16;
use std::ops::Range;
use std::sync::Mutex;
use trireme::comm::{Communicator, Recv, ReduceOp, Send};
use trireme::device::Device;
use trireme::rng::Random;
use trireme::tensor::{DType, ForeignMemory, Tensor};

/// Element counts: fewer than ranks, odd, not a multiple of any number of ranks here, and past the sizes where an
/// implementation may switch its method (64 KiB in all; 64 Ki elements a rank, summed in blocks by all cores).
const SIZES: &[usize] = &[1, 2, 3, 7, 64, 1021, 5040, 30_011, 70_001];

/// Where the tensors lie.
#[derive(Clone, Copy)]
enum Place<'a> {
    Host,
    /// In memory that can only be copied to and from.
    Elsewhere,
    /// In memory of a device.
    On(&'a dyn Device),
}

/// Memory as a device has it.
struct Far(Mutex<Vec<u8>>);

impl ForeignMemory for Far {
    fn read(&self, at: usize, host: &mut [u8]) {
        host.copy_from_slice(&self.0.lock().unwrap()[at..at + host.len()]);
    }
    fn write(&self, at: usize, host: &[u8]) {
        self.0.lock().unwrap()[at..at + host.len()].copy_from_slice(host);
    }
}

/// A communicator and where the tensors are that it moves.
struct Ranks<'a> {
    comm: &'a dyn Communicator,
    place: Place<'a>,
}

impl<'a> std::ops::Deref for Ranks<'a> {
    type Target = dyn Communicator + 'a;
    fn deref(&self) -> &Self::Target {
        self.comm
    }
}

impl Ranks<'_> {
    fn place(&self, x: Tensor) -> Tensor {
        match self.place {
            Place::Host => x,
            Place::Elsewhere => Tensor::foreign(x.dims(), x.dtype(), Box::new(Far(Mutex::new(x.bytes().to_vec())))),
            Place::On(device) => {
                let mut there = device.alloc(x.dims(), x.dtype()).unwrap();
                device.upload(x.bytes(), &mut there);
                there
            }
        }
    }

    fn tensor(&self, dtype: DType, values: &[f32]) -> Tensor {
        self.place(tensor(dtype, values))
    }

    /// All ones: what an assigned result must not keep.
    fn filled(&self, dtype: DType, n: usize) -> Tensor {
        let mut tensor = Tensor::host(&[n], dtype, None).unwrap();
        tensor.bytes_mut().fill(0xff);
        self.place(tensor)
    }
}

/// Runs the whole table on one communicator, with tensors in host memory and elsewhere; panics at the first difference.
pub fn check_all(comm: &dyn Communicator) {
    for place in [Place::Host, Place::Elsewhere] {
        check_place(&Ranks { comm, place });
    }
}

/// The same with tensors in a device's memory.
#[allow(dead_code)] // for communicators between devices
pub fn check_all_on(comm: &dyn Communicator, device: &dyn Device) {
    check_place(&Ranks { comm, place: Place::On(device) });
}

fn check_place(comm: &Ranks) {
    for dtype in [DType::F32, DType::BF16] {
        for &n in SIZES {
            check_all_reduce(comm, dtype, n);
            check_reduce_scatter(comm, dtype, n);
        }
    }
    for dtype in [DType::F32, DType::BF16, DType::U32] {
        for &n in SIZES {
            check_all_gather(comm, dtype, n);
            check_broadcast(comm, dtype, n);
        }
    }
    check_numbers(comm);
    check_gather_variable(comm);
    check_overlapping(comm);
    check_messages(comm);
    comm.barrier();
}

/// What `rank` sends in the case `what`: over many binary orders of magnitude, so that the order of additions shows in the
/// last bits, with both signs, so that it shows in the first ones too.
fn values(what: &str, rank: usize, n: usize) -> Vec<f32> {
    part_of_values(what, rank, 0..n)
}

fn part_of_values(what: &str, rank: usize, part: Range<usize>) -> Vec<f32> {
    let random = Random::new(rank as u64, what);
    let value = |i: u64| {
        let bits = random.bits(i);
        let (sign, exponent, mantissa) = (bits >> 63, 127 - 12 + bits % 24, bits >> 8 & 0x7f_ffff);
        f32::from_bits((sign << 31 | exponent << 23 | mantissa) as u32)
    };
    (part.start as u64..part.end as u64).map(value).collect()
}

fn tensor(dtype: DType, values: &[f32]) -> Tensor {
    match dtype {
        DType::F32 => Tensor::from_f32(&[values.len()], values),
        DType::BF16 => Tensor::from_bf16(&[values.len()], values),
        DType::F8E4M3 => unreachable!("not in the table"),
        DType::U32 => Tensor::from_u32(&[values.len()], &values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()),
    }
}

fn rounded(dtype: DType, x: f32) -> f32 {
    if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x }
}

/// ((x0 + x1) + (x2 + x3)) + .. over ranks in f32, rounded once: halves of the ranks, each by itself.
fn in_pairs(what: &str, dtype: DType, ranks: Range<usize>, part: Range<usize>) -> Vec<f32> {
    if ranks.len() == 1 {
        return part_of_values(what, ranks.start, part).iter().map(|&x| rounded(dtype, x)).collect();
    }
    let middle = (ranks.start + ranks.end) / 2;
    let second = in_pairs(what, dtype, middle..ranks.end, part.clone());
    in_pairs(what, dtype, ranks.start..middle, part).iter().zip(second).map(|(a, b)| a + b).collect()
}

/// op over ranks in rank order in f32 of what each has in this part of its tensor, rounded once.
fn combined(what: &str, dtype: DType, op: ReduceOp, n_ranks: usize, part: Range<usize>) -> Tensor {
    if op == ReduceOp::SumInPairs {
        return tensor(dtype, &in_pairs(what, dtype, 0..n_ranks, part));
    }
    let mut sum: Vec<f32> = part_of_values(what, 0, part.clone()).iter().map(|&x| rounded(dtype, x)).collect();
    for rank in 1..n_ranks {
        for (sum, x) in sum.iter_mut().zip(part_of_values(what, rank, part.clone())) {
            let x = rounded(dtype, x);
            *sum = match op {
                ReduceOp::Sum | ReduceOp::SumInPairs => *sum + x,
                ReduceOp::Max => sum.max(x),
            };
        }
    }
    tensor(dtype, &sum)
}

fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let first = found.host_bytes().iter().zip(&*expected.host_bytes()).position(|(a, b)| a != b);
    let element = first.map(|byte| byte / found.dtype().bytes());
    assert!(element.is_none(), "{what}: {found:?} differs first in element {element:?}");
}

fn check_all_reduce(comm: &Ranks, dtype: DType, n: usize) {
    for op in ops(comm, &[ReduceOp::Sum, ReduceOp::SumInPairs, ReduceOp::Max]) {
        let what = format!("all-reduce {op:?} {dtype:?} {n}");
        let mut x = comm.tensor(dtype, &values(&what, comm.rank(), n));
        comm.all_reduce(&mut x, op);
        assert_same(&x, &combined(&what, dtype, op, comm.size(), 0..n), &what);
    }
}

/// Those that so many ranks can do: pairs need a power of two.
fn ops(comm: &Ranks, ops: &[ReduceOp]) -> Vec<ReduceOp> {
    ops.iter().copied().filter(|&op| op != ReduceOp::SumInPairs || comm.size().is_power_of_two()).collect()
}

fn check_reduce_scatter(comm: &Ranks, dtype: DType, n: usize) {
    for op in ops(comm, &[ReduceOp::Sum, ReduceOp::SumInPairs]) {
        let what = format!("reduce-scatter {op:?} {dtype:?} {n} rows a rank");
        let full = comm.tensor(dtype, &values(&what, comm.rank(), n * comm.size()));
        let mut shard = comm.filled(dtype, n);
        match op {
            ReduceOp::SumInPairs => comm.start_reduce_scatter_in_pairs(&full, &mut shard).wait(),
            _ => comm.reduce_scatter(&full, &mut shard),
        }
        let mine = comm.rank() * n..(comm.rank() + 1) * n;
        assert_same(&shard, &combined(&what, dtype, op, comm.size(), mine), &what);
    }
}

fn check_all_gather(comm: &Ranks, dtype: DType, n: usize) {
    let what = format!("all-gather {dtype:?} {n}");
    let mut full = comm.filled(dtype, n * comm.size());
    comm.all_gather(&comm.tensor(dtype, &values(&what, comm.rank(), n)), &mut full);
    let expected: Vec<f32> = (0..comm.size()).flat_map(|rank| values(&what, rank, n)).collect();
    assert_same(&full, &tensor(dtype, &expected), &what);
}

fn check_broadcast(comm: &Ranks, dtype: DType, n: usize) {
    for root in [0, comm.size() / 2, comm.size() - 1] {
        let what = format!("broadcast {dtype:?} {n} of {root}");
        let mut x = comm.tensor(dtype, &values(&what, comm.rank(), n));
        comm.broadcast(&mut x, root);
        assert_same(&x, &tensor(dtype, &values(&what, root, n)), &what);
    }
}

fn check_numbers(comm: &Ranks) {
    let number = |rank: usize| f64::from(values("numbers", rank, 1)[0]) / 3.0;
    let all: Vec<f64> = (0..comm.size()).map(number).collect();
    assert_eq!(comm.gather_f64(number(comm.rank())), all);
    let sum = all[1..].iter().fold(all[0], |sum, x| sum + x);
    assert_eq!(comm.sum_f64(number(comm.rank())).to_bits(), sum.to_bits());
}

fn check_gather_variable(comm: &Ranks) {
    let text = |rank: usize| (0..rank * 37 % 101).map(|i| (i + rank) as u8).collect::<Vec<u8>>();
    let all: Vec<Vec<u8>> = (0..comm.size()).map(text).collect();
    assert_eq!(comm.gather_variable(&text(comm.rank())), all);
    assert_eq!(comm.gather_variable(b""), vec![Vec::<u8>::new(); comm.size()]);
    let long = vec![comm.rank() as u8; if comm.rank() + 1 == comm.size() { 100_003 } else { 1 }];
    assert_eq!(comm.gather_variable(&long)[comm.size() - 1], vec![(comm.size() - 1) as u8; 100_003]);
}

/// Several collectives and messages under way at once, waited for in another order than they were started in.
fn check_overlapping(comm: &Ranks) {
    let (n, rank, size) = (4099, comm.rank(), comm.size());
    let shards: Vec<Tensor> = ["a", "b"].iter().map(|what| comm.tensor(DType::F32, &values(what, rank, n))).collect();
    let wide = comm.tensor(DType::BF16, &values("c", rank, n * size));
    let (mut full_a, mut full_b) = (comm.filled(DType::F32, n * size), comm.filled(DType::F32, n * size));
    let (mut sum, mut from_left) = (comm.filled(DType::BF16, n), comm.filled(DType::F32, n));
    {
        let gather_a = comm.start_all_gather(&shards[0], &mut full_a);
        let scatter = comm.start_reduce_scatter(&wide, &mut sum);
        let send = Send { peer: (rank + 1) % size, tag: 3, tensor: &shards[0] };
        let recv = Recv { peer: (rank + size - 1) % size, tag: 3, tensor: &mut from_left };
        let ring = comm.start_group(vec![send], vec![recv]);
        let gather_b = comm.start_all_gather(&shards[1], &mut full_b);
        gather_b.wait();
        ring.wait();
        drop(scatter);
        gather_a.wait();
    }
    for (what, full) in [("a", &full_a), ("b", &full_b)] {
        let expected: Vec<f32> = (0..size).flat_map(|rank| values(what, rank, n)).collect();
        assert_same(full, &tensor(DType::F32, &expected), "overlapping all-gather");
    }
    let expected = combined("c", DType::BF16, ReduceOp::Sum, size, rank * n..(rank + 1) * n);
    assert_same(&sum, &expected, "overlapping reduce-scatter");
    assert_same(&from_left, &tensor(DType::F32, &values("a", (rank + size - 1) % size, n)), "overlapping message");
}

/// Between each pair of ranks, in both directions at once and to itself: two tags, two messages a tag; sent in one order of
/// tags, received in the other, and the second receive of a tag waited for before the first.
fn check_messages(comm: &Ranks) {
    let (rank, size) = (comm.rank(), comm.size());
    let (long, short) = (70_001, 3);
    let message = |from: usize, to: usize, tag: u32, number: usize| {
        let n = if tag == 9 { long } else { short };
        tensor(DType::F32, &values(&format!("message to {to} tag {tag} number {number}"), from, n))
    };
    for distance in 0..size {
        let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
        let out: Vec<[Tensor; 2]> = [0, 1].map(|number| [9, 4].map(|tag| comm.place(message(rank, to, tag, number)))).into();
        let mut into: Vec<[Tensor; 2]> = [0, 1].map(|_| [comm.filled(DType::F32, short), comm.filled(DType::F32, long)]).into();
        {
            let mut pending = Vec::new();
            for (out, into) in out.iter().zip(&mut into) {
                let sends = [9, 4].iter().zip(out).map(|(&tag, tensor)| Send { peer: to, tag, tensor }).collect();
                let recvs = [4, 9].iter().zip(into).map(|(&tag, tensor)| Recv { peer: from, tag, tensor }).collect();
                pending.push(comm.start_group(sends, recvs));
            }
            pending.into_iter().rev().for_each(|pending| pending.wait());
        }
        for (number, into) in into.iter().enumerate() {
            for (tag, found) in [4, 9].into_iter().zip(into) {
                let what = format!("message {number} from {from} to {rank}, tag {tag}");
                assert_same(found, &message(from, rank, tag, number), &what);
            }
        }
    }
}
