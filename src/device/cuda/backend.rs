//! What the CUDA device needs of a machine: memory by address, kernel launches, matrix products. The real one is `driver`
//! (cudarc); the tests have another that runs the kernels' source on the CPU, so that the code above this line is the same
//! with and without a GPU.
//!
//! Everything asked of a backend happens in the order asked, as far as anybody who asks can see: kernels, products, zeros and small
//! copies go to the compute stream, large copies to a stream of their own, ordered against it by events. Only `download`, `finish`
//! and `is_complete` look at what is done; only the first two wait. What an owner of a stream handle asks of it himself (NCCL on the
//! communication stream) he orders with `record` and `wait`: see `streams`.

use crate::device::{Fp8Scales, Gemm};
use crate::tensor::DType;

/// A kernel by the file it stands in (`kernels/FILE.cu`) and its `extern "C"` name there, `<operation>_<dtype>`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Kernel {
    /// File name without the ending.
    pub file: &'static str,
    /// Name of the function.
    pub name: String,
}

impl Kernel {
    /// `operation_dtype` in `kernels/FILE.cu`.
    pub fn of(file: &'static str, operation: &str, dtype: DType) -> Kernel {
        Kernel { file, name: format!("{operation}_{}", dtype.name()) }
    }
}

/// How many threads run a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    /// Blocks along x, y and z; none may be 0.
    pub blocks: (u32, u32, u32),
    /// Threads of a block, all along x.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// Blocks along x without dynamic shared memory.
    pub fn line(blocks: usize, threads: u32) -> Grid {
        Grid { blocks: (u32::try_from(blocks).expect("fewer than 2^32 blocks"), 1, 1), threads, shared_bytes: 0 }
    }
}

/// One kernel argument: the C type stands in the comment.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Arg {
    /// Any pointer.
    Address(u64),
    /// `int`
    Int(i32),
    /// `long long`
    Long(i64),
    /// `float`
    Float(f32),
    /// `double`
    Double(f64),
    /// `const __grid_constant__ TensorMap` of kernels/hopper.cuh
    Map(TensorMap),
}

/// A matrix `[tokens, heads, dim]` of bf16 as the copy engine of a Hopper GPU takes it: in boxes of 64 dims of one head of
/// `box_tokens` tokens; zeros where a box is outside of it. A plain matrix `[rows, columns]` has one head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TensorMap {
    /// Of element (0, 0, 0), a multiple of 16.
    pub address: u64,
    /// A multiple of 8: rows begin at multiples of 16 bytes.
    pub dim: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Rows.
    pub tokens: usize,
    /// Tokens of a box, at most 256.
    pub box_tokens: u32,
}

impl TensorMap {
    /// Dims of a box: 128 bytes, as wide as the swizzle.
    pub const BOX_DIMS: usize = 64;

    /// Bytes from head to head and from token to token.
    pub fn strides(&self) -> [u64; 2] {
        [2 * self.dim, 2 * self.dim * self.heads].map(|bytes| bytes as u64)
    }
}

/// A matrix in device memory: `[rows, columns]`, row-major, contiguous.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Matrix {
    /// Address of element (0, 0).
    pub address: u64,
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
    pub columns: usize,
    /// f32 or bf16.
    pub dtype: DType,
}

/// A queue of work. What is asked of one happens in the order asked; the queues run side by side, ordered by events only.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stream {
    /// Kernels, products, zeros and small copies.
    Compute,
    /// Collectives and messages of a library that runs on the device, one stream for each group of ranks, numbered from 0: a message
    /// that is awaited must not hold up what another group does. Before compute where both want the same processors.
    Communication(usize),
    /// Large copies from and to the host.
    Copies,
}

/// A point in the work of a stream, as its backend names it. Made by `record`, ended by `release`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event(pub u64);

/// How the algorithm of a matrix product is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithms {
    /// The fastest of the library's proposals, and of kernels of ours where there are such, timed at the first use of a shape and kept on
    /// disk. Two machines, or two first starts, may add in another order.
    Measured,
    /// The library's first proposal that adds each element in one run over k, without parts (no split-K); never timed. The same for the
    /// same GPU, library and shape.
    Fixed,
}

/// A machine on which the fastest of several ways to make the same is found by timing them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Timed {
    /// GPU, libraries and kernels: what was found holds for machines of the same name.
    pub name: String,
    /// Of the cache before its memory.
    pub cache_bytes: usize,
}

/// Work that was recorded, as its backend names it. Made by `end_recording`, ended by `forget`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Graph(pub u64);

/// Addresses of the scales of a product of E4M3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScalesAt {
    /// Of the first matrix.
    pub a: u64,
    /// Of the second.
    pub b: u64,
    /// How many each has.
    pub of: Fp8Scales,
}

/// The machine below the CUDA device.
pub trait Backend: Send + Sync {
    /// For people: "NVIDIA H200, 132 processors".
    fn name(&self) -> String;
    /// Multiprocessors: how many blocks fill the device once.
    fn processors(&self) -> usize;
    /// Whether it has the instructions of Hopper alone (sm_90a), and may use them: kernels over hopper.cuh run.
    fn is_hopper(&self) -> bool;
    /// Compute capability, major and minor.
    fn capability(&self) -> (i32, i32);
    /// `None` where times decide nothing: algorithms are fixed, or nothing tells what a GPU would take.
    fn timed(&self) -> Option<Timed> {
        None
    }
    /// Memory, aligned to 256, contents unspecified; used before perhaps, but by no work that is asked for after this call. `None`
    /// when there is none left.
    fn alloc(&self, bytes: usize) -> Option<u64>;
    /// Gives memory back: work that was asked for before may still use it. Work on other streams than compute must have been waited
    /// for by compute.
    fn free(&self, address: u64, bytes: usize);
    /// Host bytes to device memory; `host` may be reused at once.
    fn upload(&self, host: &[u8], to: u64);
    /// Device bytes to host memory; waits.
    fn download(&self, from: u64, host: &mut [u8]);
    /// Writes zero bytes.
    fn zero(&self, at: u64, bytes: usize);
    /// Runs a kernel. Panics with its name when it cannot be launched.
    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]);
    /// out = or += op(a) op(b) by the library, accumulated in f32; shapes agree.
    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm);
    /// out[m,n] = a[m,k] b[n,k]^T of E4M3, times the f32 scales at these addresses, accumulated in f32.
    fn gemm_fp8(&self, out: Matrix, a: Matrix, b: Matrix, scales: ScalesAt);
    /// Waits until everything asked for is done, on all streams.
    fn finish(&self);

    /// The end of what was asked of a stream so far.
    fn record(&self, stream: Stream) -> Event;
    /// What is asked of `stream` from now on begins after the event. Does not block.
    fn wait(&self, stream: Stream, event: Event);
    /// Whether all work before the event is done.
    fn is_complete(&self, event: Event) -> bool;
    /// Ends the use of an event; waits that were asked for stay.
    fn release(&self, event: Event);
    /// A point in the compute work at which the device's clock is read when it gets there. Ended by `forget_mark`.
    fn mark(&self) -> Event;
    /// Seconds of the device from one mark to another. Waits for both.
    fn seconds_between(&self, from: Event, to: Event) -> f64;
    /// Ends the use of a mark.
    fn forget_mark(&self, mark: Event);
    /// The stream as CUDA's own libraries take it (a `CUstream`), with the device made current on the calling thread. `None` on a
    /// machine that has no CUDA below it.
    fn handle(&self, stream: Stream) -> Option<u64>;

    /// From now on kernels, products and zeros that this thread asks for are recorded instead of done; nothing else may be asked for.
    /// False where this cannot be done.
    fn begin_recording(&self) -> bool;
    /// Ends it. `None` when something that was asked for cannot be recorded.
    fn end_recording(&self) -> Option<Graph>;
    /// Asks for all of the recorded work again, with the arguments of its time. The memory that it uses must be there still.
    fn replay(&self, graph: Graph);
    /// Ends the use of recorded work.
    fn forget(&self, graph: Graph);
    /// What tells this device from every other one (its UUID): two processes that read the same use the same device.
    fn identity(&self) -> [u8; 16];
}
