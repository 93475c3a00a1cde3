//! How much memory a save takes, by counting what the allocator gives out: this program has an allocator of its own.

mod common;

use common::models::smallest_meta;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use trireme::checkpoint::snapshot::{self, Options, Started};
use trireme::checkpoint::{self, Piece};
use trireme::comm::solo::Solo;
use trireme::fault;
use trireme::parallel::slice::Slice;
use trireme::tensor::{DType, Tensor};

/// The system's allocator, counted.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator; the counters are plain numbers.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const MIB: usize = 1 << 20;
/// Of a piece; of the largest.
const PIECE: usize = 4 * MIB;
const LARGEST: usize = 12 * MIB;
/// What does not grow with the tensors: the file's buffer and a block of HDF5's own bytes, 1 MiB each, threads, names and tables.
const FIXED: usize = 3 * MIB;

/// A save takes at most one piece of a tensor above what is there anyway (and the buffers of `FIXED`), however many pieces there are:
/// when nothing changes meanwhile, none at all; when the optimizer comes by everything at once on a slow disk, the copy of a piece at a
/// time. With room for copies of everything, that and no more.
#[test]
fn a_save_takes_one_piece_at_most() {
    let mut tensors: Vec<Tensor> =
        (0..8).map(|i| Tensor::host(&[if i == 3 { LARGEST } else { PIECE } / 4], DType::F32, None).unwrap()).collect();
    let dir = tempfile::tempdir().unwrap();
    for (name, is_changed, copy_mib, allowed) in
        [("still", false, 0, 0), ("changed", true, 0, LARGEST), ("roomy", true, 64, 7 * PIECE + LARGEST)]
    {
        let planned = fault::plan("slow at=io.write");
        let before = LIVE.load(Ordering::SeqCst);
        PEAK.store(before, Ordering::SeqCst);
        let pieces: Vec<Piece> = tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| {
                let shape = tensor.dims().to_vec();
                Piece { name: format!("master/p{i}"), global_shape: shape.clone(), slice: Slice::whole(&shape), tensor }
            })
            .collect();
        let options = Options { copy_bytes: copy_mib << 20, ..Options::default() };
        let out = dir.path().join(name);
        let Started::Saving(saving) = snapshot::start(&out, &smallest_meta(), &pieces, options, &Solo::new()).unwrap() else {
            panic!("new")
        };
        drop(pieces);
        if is_changed {
            for (i, tensor) in tensors.iter_mut().enumerate() {
                saving.gate().release(&format!("p{i}"));
                tensor.f32_mut().fill(1.0);
            }
        }
        let waited = saving.gate().waited();
        saving.wait(&Solo::new()).unwrap();
        let extra = PEAK.load(Ordering::SeqCst) - before;
        assert!(planned.is_over());
        println!("{name}: {:.1} MiB above the live set, {waited:?} waited", extra as f64 / MIB as f64);
        assert!(extra <= allowed + FIXED, "{name}: {extra} bytes above the live set");
        assert!(allowed == 0 || extra >= PIECE, "{name}: nothing was copied, so nothing was shown");
        assert!(waited > Duration::ZERO || name != "changed", "the disk was not slow enough to show anything");
        drop(planned);
        assert!(checkpoint::open(&out).is_ok());
    }
}
