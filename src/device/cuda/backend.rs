//! What the CUDA device needs of a machine: memory by address, kernel launches, matrix products. The real one is `driver`
//! (cudarc); the tests have another that runs the kernels' source on the CPU, so that the code above this line is the same
//! with and without a GPU.
//!
//! Everything asked of a backend happens in the order asked (one stream); only `download`, `finish` and `free` wait.

use crate::device::Gemm;
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

/// The machine below the CUDA device.
pub trait Backend: Send + Sync {
    /// For people: "NVIDIA H200, 132 processors".
    fn name(&self) -> String;
    /// Multiprocessors: how many blocks fill the device once.
    fn processors(&self) -> usize;
    /// New memory, aligned to 256, contents unspecified. `None` when there is none left.
    fn alloc(&self, bytes: usize) -> Option<u64>;
    /// Gives memory back, after the work that was asked for before.
    fn free(&self, address: u64, bytes: usize);
    /// Host bytes to device memory; `host` may be reused at once.
    fn upload(&self, host: &[u8], to: u64);
    /// Device bytes to host memory; waits.
    fn download(&self, from: u64, host: &mut [u8]);
    /// Writes zero bytes.
    fn zero(&self, at: u64, bytes: usize);
    /// Runs a kernel. Panics with its name when it cannot be launched.
    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]);
    /// out = or += op(a) op(b), accumulated in f32; shapes agree.
    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm);
    /// Waits until everything asked for is done.
    fn finish(&self);
}
