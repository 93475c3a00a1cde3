//! The order of work on several streams, on the stand-ins of CUDA's libraries (stand_in.c), which do each stream's work as late or as
//! early as the events allow.

use crate::driver::{inside, is_inside, stand_ins};
use std::ffi::{c_int, c_void};
use trireme::device::Device;
use trireme::device::cuda::Cuda;
use trireme::device::cuda::streams::CommunicationStream;
use trireme::tensor::{DType, Tensor};

/// Streams that do their work at once; bits as in stand_in.c.
const EAGER: [&str; 5] = ["0", "1", "2", "4", "7"];

fn tensor(cuda: &Cuda, values: &[f32]) -> Tensor {
    let mut x = cuda.alloc(&[values.len()], DType::F32).unwrap();
    cuda.upload(bytemuck::cast_slice(values), &mut x);
    x
}

fn values(x: &Tensor) -> Vec<f32> {
    bytemuck::cast_slice(&x.host_bytes()).to_vec()
}

/// A copy on a stream, as a library asks for it: in the place of a collective.
fn copy_on(cuda: &Cuda, stream: u64, to: &Tensor, from: &Tensor) {
    type CopyAsync = unsafe extern "C" fn(u64, u64, usize, *mut c_void) -> c_int;
    // SAFETY: the stand-in is loaded already and defines the function with this type; both tensors are memory of the device.
    unsafe {
        let library = libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW);
        let symbol = libc::dlsym(library, c"cuMemcpyDtoDAsync_v2".as_ptr());
        assert!(!symbol.is_null());
        let copy = std::mem::transmute::<*mut c_void, CopyAsync>(symbol);
        let address = |x| cuda.address_of(x).unwrap();
        assert_eq!(copy(address(to), address(from), from.n_bytes(), stream as *mut c_void), 0);
    }
}

fn communicate() {
    let cuda = Cuda::open(0).unwrap();
    let stream = CommunicationStream::of(&cuda).unwrap();
    let mut x = tensor(&cuda, &[1.0, 2.0, 3.0]);
    let mut y = tensor(&cuda, &[9.0; 3]);
    cuda.scale(&mut x, 2.0);
    let under_way = stream.start(|handle| copy_on(&cuda, handle, &y, &x));
    let mut other = tensor(&cuda, &[5.0; 3]);
    cuda.scale(&mut other, 7.0); // beside it
    let _ = under_way.is_done();
    under_way.join();
    cuda.scale(&mut y, 3.0);
    cuda.scale(&mut x, 10.0);
    // Dropped, it joins as well.
    let mut z = tensor(&cuda, &[9.0; 3]);
    drop(stream.start(|handle| copy_on(&cuda, handle, &z, &x)));
    cuda.scale(&mut z, 0.5);
    assert_eq!(values(&y), [6.0, 12.0, 18.0]);
    assert_eq!((values(&x), values(&z)), (vec![20.0, 40.0, 60.0], vec![10.0, 20.0, 30.0]));
    assert_eq!(values(&other), [35.0; 3]);
    cuda.finish();
    let nothing = stream.start(|_| {});
    let _ = nothing.is_done(); // the stand-in gets to it when it is asked
    assert!(nothing.is_done());
}

/// What is asked of the communication stream reads what compute wrote before, compute reads what it wrote once it was joined, and
/// neither overwrites what the other still reads; whichever stream is late.
#[test]
fn communication_is_in_order_with_compute() {
    if is_inside() {
        return communicate();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    for eager in EAGER {
        inside(folder.path(), "streams::communication_is_in_order_with_compute", &[("STAND_IN_EAGER", eager)]);
    }
}

/// Elements of more than three chunks, not a whole number of them.
const MANY: usize = (3 << 21) + 12_345;

fn copy_much() {
    let cuda = Cuda::open(0).unwrap();
    let pattern = |seed: usize| (0..MANY).map(|i| ((i * 31 + seed) % 8191) as f32).collect::<Vec<f32>>();
    let mut x = tensor(&cuda, &pattern(1));
    let mut y = cuda.alloc(&[MANY], DType::F32).unwrap();
    // y is read by compute, then overwritten by a large copy, then read again.
    Device::copy(&cuda, &mut y, &x);
    cuda.scale(&mut y, 2.0);
    let mut doubled = cuda.alloc(&[MANY], DType::F32).unwrap();
    Device::copy(&cuda, &mut doubled, &y);
    cuda.upload(bytemuck::cast_slice(&pattern(5)), &mut y);
    cuda.scale(&mut y, 3.0);
    // A thread that saves reads beside the one that computes.
    let saved = std::thread::scope(|scope| {
        let saving = scope.spawn(|| values(&x));
        saving.join().unwrap()
    });
    cuda.scale(&mut x, 4.0);
    assert!(saved == pattern(1));
    assert!(values(&doubled).iter().zip(pattern(1)).all(|(found, was)| *found == 2.0 * was));
    assert!(values(&y).iter().zip(pattern(5)).all(|(found, was)| *found == 3.0 * was));
    assert!(values(&x).iter().zip(pattern(1)).all(|(found, was)| *found == 4.0 * was));
    // Small uploads, many more than there is room for.
    let mut small = cuda.alloc(&[100, 50_000], DType::F32).unwrap();
    for i in 0..100 {
        cuda.upload(bytemuck::cast_slice(&vec![i as f32; 50_000]), &mut small.rows_mut(i..i + 1));
    }
    assert!(values(&small).chunks(50_000).enumerate().all(|(i, row)| row.iter().all(|value| *value == i as f32)));
}

/// Large copies arrive whole, chunk by chunk through page-locked memory, in order with the kernels before and after them, whichever
/// stream is late; small uploads leave from memory that is not reused before they have left. Page-locked memory is taken once: four
/// segments, and two chunks for the copies there are at one time.
#[test]
fn copies_are_in_order_with_compute() {
    if is_inside() {
        return copy_much();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = stand_ins(folder.path()) else { return };
    for eager in EAGER {
        let log = inside(folder.path(), "streams::copies_are_in_order_with_compute", &[("STAND_IN_EAGER", eager)]);
        assert_eq!(log.iter().filter(|line| line.ends_with("page-locked")).count(), 6, "{log:?}");
    }
}
