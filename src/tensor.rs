//! Tensors: contiguous, row-major, at most four dims, no strides; rows are the only view.
//!
//! A [`Tensor`] owns (a share of) its storage. A view borrows the tensor it was taken from and dereferences to a
//! `Tensor`, so every operation takes `&Tensor` and `&mut Tensor`, whole or part. Where the bytes lie is the business of
//! the device that made them. This file knows nothing of devices.

mod memory;

pub use memory::Areas;
use memory::Memory;
use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Element types. Accumulation is always f32 (f64 on the host for scalars).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single.
    F32,
    /// bfloat16: 1 sign, 8 exponent, 7 mantissa bits.
    BF16,
    /// Token ids, positions.
    U32,
    /// E4M3: 1 sign, 4 exponent, 3 mantissa bits, no infinity; beside a tensor of f32 scales. Weights and inputs of products only.
    F8E4M3,
}

impl DType {
    /// As people write it: "bf16".
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
            DType::F8E4M3 => "f8e4m3",
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::BF16 => 2,
            DType::F8E4M3 => 1,
        }
    }
}

/// Up to four dims, row-major and contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    n_dims: usize,
}

impl Shape {
    /// Panics above four dims.
    pub fn new(dims: &[usize]) -> Self {
        assert!((1..=4).contains(&dims.len()), "a shape has 1 to 4 dims, not {dims:?}");
        let mut all = [1; 4];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, n_dims: dims.len() }
    }

    /// The same with another first dim.
    pub fn with_rows(self, n_rows: usize) -> Self {
        let mut dims = self.dims;
        dims[0] = n_rows;
        Shape { dims, ..self }
    }

    /// The dims as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.n_dims]
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// The first dim.
    pub fn rows(&self) -> usize {
        self.dims[0]
    }

    /// Elements of one row: the product of all dims but the first.
    pub fn row_len(&self) -> usize {
        self.dims()[1..].iter().product()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// Memory that is not the host's, as those see it who move bytes and know no devices: communicators and checkpoints.
pub trait ForeignMemory: Any + Send + Sync {
    /// Its bytes from `at` on, to the host; waits for work that writes them.
    fn read(&self, at: usize, host: &mut [u8]);
    /// Host bytes to its bytes from `at` on, after work that uses them; `host` may be reused at once.
    fn write(&self, at: usize, host: &[u8]);
}

/// Memory behind tensors. Host memory is 64-byte aligned; a device keeps its own handle in `Foreign`.
enum Storage {
    Host(HostBuffer),
    /// Memory of another device. The device that made it downcasts it again.
    Foreign(Box<dyn ForeignMemory>),
    /// No memory at all: the device that computes nothing.
    Nothing,
}

/// Memory of the host.
struct HostBuffer {
    memory: Memory,
    /// Told the size when the memory goes back, so that a device can count its live bytes.
    on_drop: Option<OnDrop>,
}

/// Hears how many bytes went back.
pub type OnDrop = Arc<dyn Fn(usize) + Send + Sync>;

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Some(tell) = &self.on_drop {
            tell(self.memory.size());
        }
    }
}

/// Storage and how many readers elsewhere it is lent to.
struct Shared {
    storage: Storage,
    n_lent: AtomicUsize,
}

impl Shared {
    fn new(storage: Storage) -> Arc<Shared> {
        Arc::new(Shared { storage, n_lent: AtomicUsize::new(0) })
    }
}

/// A contiguous row-major tensor.
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    shared: Arc<Shared>,
    offset_bytes: usize,
}

impl Tensor {
    /// Zeroed host memory. `None` when the allocator refuses. `on_drop` hears the freed size.
    pub fn host(shape: &[usize], dtype: DType, on_drop: Option<OnDrop>) -> Option<Tensor> {
        Tensor::host_of(None, shape, dtype, on_drop)
    }

    /// The same; memory of middle size comes from these areas.
    pub fn host_in(areas: &Arc<Areas>, shape: &[usize], dtype: DType, on_drop: Option<OnDrop>) -> Option<Tensor> {
        Tensor::host_of(Some(areas), shape, dtype, on_drop)
    }

    fn host_of(areas: Option<&Arc<Areas>>, shape: &[usize], dtype: DType, on_drop: Option<OnDrop>) -> Option<Tensor> {
        let shape = Shape::new(shape);
        let memory = Memory::zeroed((shape.n_elements() * dtype.bytes()).max(64), areas)?;
        Some(Tensor { shape, dtype, shared: Shared::new(Storage::Host(HostBuffer { memory, on_drop })), offset_bytes: 0 })
    }

    /// A host tensor with these values; for tests and small tables.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Tensor {
        let mut tensor = Tensor::host(shape, DType::F32, None).expect("memory for a small tensor");
        tensor.f32_mut().copy_from_slice(values);
        tensor
    }

    /// A host tensor with these values, rounded to nearest even bf16.
    pub fn from_bf16(shape: &[usize], values: &[f32]) -> Tensor {
        let mut tensor = Tensor::host(shape, DType::BF16, None).expect("memory for a small tensor");
        assert_eq!(tensor.shape.n_elements(), values.len());
        for (to, &from) in tensor.bf16_mut().iter_mut().zip(values) {
            *to = half::bf16::from_f32(from);
        }
        tensor
    }

    /// A host tensor with these values.
    pub fn from_u32(shape: &[usize], values: &[u32]) -> Tensor {
        let mut tensor = Tensor::host(shape, DType::U32, None).expect("memory for a small tensor");
        tensor.u32_mut().copy_from_slice(values);
        tensor
    }

    /// Memory of another device; `handle` is what that device finds again by [`Tensor::foreign_handle`].
    pub fn foreign(shape: &[usize], dtype: DType, handle: Box<dyn ForeignMemory>) -> Tensor {
        Tensor { shape: Shape::new(shape), dtype, shared: Shared::new(Storage::Foreign(handle)), offset_bytes: 0 }
    }

    /// A tensor without memory, for the device that computes nothing.
    pub fn nothing(shape: &[usize], dtype: DType) -> Tensor {
        Tensor { shape: Shape::new(shape), dtype, shared: Shared::new(Storage::Nothing), offset_bytes: 0 }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its dims, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The first dim.
    pub fn n_rows(&self) -> usize {
        self.shape.rows()
    }

    /// Elements in a row.
    pub fn row_len(&self) -> usize {
        self.shape.row_len()
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.n_elements()
    }

    /// Bytes of its elements.
    pub fn n_bytes(&self) -> usize {
        self.n_elements() * self.dtype.bytes()
    }

    /// Where its first element lies in the storage, in bytes.
    pub fn offset_bytes(&self) -> usize {
        self.offset_bytes
    }

    /// The handle of a foreign tensor.
    pub fn foreign_handle(&self) -> Option<&dyn Any> {
        match &self.shared.storage {
            Storage::Foreign(handle) => Some(&**handle as &dyn Any),
            _ => None,
        }
    }

    /// Whether its bytes are host memory.
    pub fn is_host(&self) -> bool {
        matches!(&self.shared.storage, Storage::Host(_))
    }

    /// The bytes of a host tensor. Panics for other memory.
    pub fn bytes(&self) -> &[u8] {
        let Storage::Host(buffer) = &self.shared.storage else { panic!("bytes() of a tensor that is not in host memory") };
        assert!(self.offset_bytes + self.n_bytes() <= buffer.memory.size());
        // SAFETY: in bounds (asserted), alive as long as `self.shared`; `&self` excludes a writer, because views that
        // write borrow their tensor mutably, and nobody writes what is lent.
        unsafe { std::slice::from_raw_parts(buffer.memory.start().add(self.offset_bytes), self.n_bytes()) }
    }

    /// The bytes of a host tensor, to write. Panics for other memory, and while it is lent.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.assert_not_lent();
        let Storage::Host(buffer) = &self.shared.storage else { panic!("bytes_mut() of a tensor that is not in host memory") };
        assert!(self.offset_bytes + self.n_bytes() <= buffer.memory.size());
        // SAFETY: as in `bytes`; `&mut self` is the only path to these bytes while it lives: nobody has borrowed them (asserted),
        // and to lend them takes a `&self`.
        unsafe { std::slice::from_raw_parts_mut(buffer.memory.start().add(self.offset_bytes), self.n_bytes()) }
    }

    /// Copies its bytes from `at` on to the host, wherever they lie.
    pub fn read_bytes(&self, at: usize, host: &mut [u8]) {
        assert!(at + host.len() <= self.n_bytes(), "{} bytes from {at} of {self:?}", host.len());
        match &self.shared.storage {
            Storage::Host(_) => host.copy_from_slice(&self.bytes()[at..at + host.len()]),
            Storage::Foreign(_) if host.is_empty() => {}
            Storage::Foreign(memory) => memory.read(self.offset_bytes + at, host),
            Storage::Nothing => panic!("reading a tensor without memory"),
        }
    }

    /// Copies host bytes to its bytes from `at` on, wherever they lie.
    pub fn write_bytes(&mut self, at: usize, host: &[u8]) {
        assert!(at + host.len() <= self.n_bytes(), "{} bytes from {at} of {self:?}", host.len());
        match &self.shared.storage {
            Storage::Host(_) => self.bytes_mut()[at..at + host.len()].copy_from_slice(host),
            Storage::Foreign(_) if host.is_empty() => {}
            Storage::Foreign(memory) => {
                self.assert_not_lent();
                memory.write(self.offset_bytes + at, host)
            }
            Storage::Nothing => panic!("writing a tensor without memory"),
        }
    }

    /// Its bytes on the host: themselves, or a copy of foreign ones.
    pub fn host_bytes(&self) -> Cow<'_, [u8]> {
        if self.is_host() {
            return Cow::Borrowed(self.bytes());
        }
        let mut copy = vec![0; self.n_bytes()];
        self.read_bytes(0, &mut copy);
        Cow::Owned(copy)
    }

    /// Elements of an f32 host tensor.
    pub fn f32(&self) -> &[f32] {
        assert_eq!(self.dtype, DType::F32);
        bytemuck::cast_slice(self.bytes())
    }

    /// Elements of an f32 host tensor, to write.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.dtype, DType::F32);
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Elements of a bf16 host tensor.
    pub fn bf16(&self) -> &[half::bf16] {
        assert_eq!(self.dtype, DType::BF16);
        bytemuck::cast_slice(self.bytes())
    }

    /// Elements of a bf16 host tensor, to write.
    pub fn bf16_mut(&mut self) -> &mut [half::bf16] {
        assert_eq!(self.dtype, DType::BF16);
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Elements of a u32 host tensor.
    pub fn u32(&self) -> &[u32] {
        assert_eq!(self.dtype, DType::U32);
        bytemuck::cast_slice(self.bytes())
    }

    /// Elements of a u32 host tensor, to write.
    pub fn u32_mut(&mut self) -> &mut [u32] {
        assert_eq!(self.dtype, DType::U32);
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Elements of an f32 or bf16 host tensor, widened to f32; for tests, samplers and reports.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.f32().to_vec(),
            DType::BF16 => self.bf16().iter().map(|x| x.to_f32()).collect(),
            DType::U32 | DType::F8E4M3 => panic!("to_f32_vec() of {self:?}"),
        }
    }

    /// A share for a reader elsewhere (another thread). While it lives, writing the tensor or a part of it is a panic.
    pub fn lend(&self) -> Lent {
        self.shared.n_lent.fetch_add(1, Ordering::AcqRel);
        Lent { tensor: self.alias(0..self.n_rows()) }
    }

    /// Panics while a reader elsewhere has a share of the memory. Who writes it by another way than [`Tensor::bytes_mut`] asks first.
    pub fn assert_not_lent(&self) {
        let n_lent = self.shared.n_lent.load(Ordering::Acquire);
        assert!(n_lent == 0, "{self:?} is written while {n_lent} others read it");
    }

    fn alias(&self, rows: Range<usize>) -> Tensor {
        assert!(rows.start <= rows.end && rows.end <= self.n_rows(), "rows {rows:?} of {:?}", self.shape);
        let mut shape = self.shape;
        shape.dims[0] = rows.len();
        let offset_bytes = self.offset_bytes + rows.start * self.row_len() * self.dtype.bytes();
        Tensor { shape, dtype: self.dtype, shared: Arc::clone(&self.shared), offset_bytes }
    }

    /// These rows, to read.
    pub fn rows(&self, rows: Range<usize>) -> TensorView<'_> {
        TensorView { tensor: self.alias(rows), of: PhantomData }
    }

    /// These rows, to write.
    pub fn rows_mut(&mut self, rows: Range<usize>) -> TensorViewMut<'_> {
        TensorViewMut { tensor: self.alias(rows), of: PhantomData }
    }

    /// The same memory as another number of rows. Panics when host memory has not so many.
    pub fn with_rows(self, n_rows: usize) -> Tensor {
        let tensor = Tensor { shape: self.shape.with_rows(n_rows), ..self };
        if let Storage::Host(buffer) = &tensor.shared.storage {
            assert!(tensor.offset_bytes + tensor.n_bytes() <= buffer.memory.size(), "{n_rows} rows of {:?}", self.shape);
        }
        tensor
    }

    /// The same elements under another shape of equal size.
    pub fn reshaped(&self, dims: &[usize]) -> TensorView<'_> {
        let mut tensor = self.alias(0..self.n_rows());
        tensor.shape = Shape::new(dims);
        assert_eq!(tensor.shape.n_elements(), self.n_elements(), "{:?} as {dims:?}", self.shape);
        TensorView { tensor, of: PhantomData }
    }

    /// The same elements under another shape of equal size, to write.
    pub fn reshaped_mut(&mut self, dims: &[usize]) -> TensorViewMut<'_> {
        let mut tensor = self.alias(0..self.n_rows());
        tensor.shape = Shape::new(dims);
        assert_eq!(tensor.shape.n_elements(), self.n_elements(), "{:?} as {dims:?}", self.shape);
        TensorViewMut { tensor, of: PhantomData }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor{:?} {:?}", self.shape, self.dtype)
    }
}

/// A share of a tensor that may be read, on any thread, for as long as it is kept. Dereferences to [`Tensor`].
pub struct Lent {
    tensor: Tensor,
}

impl Deref for Lent {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.tensor.shared.n_lent.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Part of a tensor, to read. Dereferences to [`Tensor`].
pub struct TensorView<'a> {
    tensor: Tensor,
    of: PhantomData<&'a Tensor>,
}

impl Deref for TensorView<'_> {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

/// Part of a tensor, to write. Dereferences to [`Tensor`]. Never `mem::swap` what it dereferences to: the tensor behind it
/// would leave the borrow that guards it.
pub struct TensorViewMut<'a> {
    tensor: Tensor,
    of: PhantomData<&'a mut Tensor>,
}

impl Deref for TensorViewMut<'_> {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl DerefMut for TensorViewMut<'_> {
    fn deref_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows are offsets into the same memory, so a write through a view is seen in the whole.
    #[test]
    fn rows_are_views() {
        let mut x = Tensor::from_f32(&[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(x.rows(1..3).f32(), &[2.0, 3.0, 4.0, 5.0]);
        x.rows_mut(1..2).f32_mut()[1] = 9.0;
        assert_eq!(x.f32(), &[0.0, 1.0, 2.0, 9.0, 4.0, 5.0]);
        assert_eq!(x.reshaped(&[6]).rows(3..4).f32(), &[9.0]);
    }

    /// What is lent is not written, through no view and no part of it, until it is given back: a thread that saves it would read
    /// numbers of two moments.
    #[test]
    fn lent_tensors_are_not_written() {
        let mut x = Tensor::from_f32(&[4, 2], &[1.0; 8]);
        let lent = x.rows(2..4).lend();
        let seen = std::thread::spawn(move || {
            let values = lent.f32().to_vec();
            (lent, values)
        });
        let (lent, values) = seen.join().unwrap();
        assert_eq!((values, x.f32()[0]), (vec![1.0; 4], 1.0));
        let write = |x: &mut Tensor| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| x.rows_mut(0..1).f32_mut()[0] = 2.0));
        assert!(write(&mut x).is_err());
        drop(lent);
        assert!(write(&mut x).is_ok());
    }

    /// The drop callback hears exactly the bytes that were taken, once, after the last view is gone.
    #[test]
    fn freed_bytes_are_told() {
        let freed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let tell = Arc::clone(&freed);
        let on_drop = Arc::new(move |n| {
            tell.fetch_add(n, std::sync::atomic::Ordering::SeqCst);
        });
        let x = Tensor::host(&[100], DType::F32, Some(on_drop)).unwrap();
        assert_eq!(freed.load(std::sync::atomic::Ordering::SeqCst), 0);
        drop(x);
        assert_eq!(freed.load(std::sync::atomic::Ordering::SeqCst), 400);
    }
}
