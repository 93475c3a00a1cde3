//! The machine below the CUDA device for tests: memory is the host's, a launch runs the kernel's source on the CPU.
//!
//! Each `kernels/*.cu` becomes a shared library on first use (g++ with TRIREME_EMULATE, kernels/emulate.h) and is kept under the
//! hash of its text. Harder on the caller than a device: new memory is NaN, memory ends in guard bytes that are looked at after
//! every launch, arguments must have the types the kernel declares, and sizes must be what a device accepts. In recorded work each
//! kernel that follows a kernel does what it does before its wait (kernels/common.cuh) while some of those before it have not begun.

#[path = "library.rs"]
pub mod library;

use library::{Argument, Launch, Library, Wrapped};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::ThreadId;
use trireme::device::cuda::backend::{Arg, Backend, Event, Graph, Grid, Kernel, Matrix, ScalesAt, Stream, TensorMap};
use trireme::device::{Fp8Scales, Gemm, Store};
use trireme::tensor::DType;

/// Bytes before and after every piece of memory.
const GUARD: usize = 256;
/// What new memory and guards hold: NaN as f32 and bf16, an absurd index as u32.
const POISON: u8 = 0xff;
/// What sm_90 accepts: dynamic shared memory of a block, blocks along y or z.
const MOST_SHARED_BYTES: u32 = 227 * 1024;
const MOST_BLOCKS: u32 = 65_535;

/// `emulate::Map` of kernels/emulate_hopper.h in the 128 bytes of a `TensorMap`.
#[repr(C, align(128))]
struct Map {
    address: u64,
    sizes: [u64; 3],
    strides: [u64; 2],
    boxes: [u32; 3],
}
/// Kernels that have begun while one before them has not.
const BEGUN_AHEAD: usize = 3;

/// Memory by its first address: bytes asked for.
type Memory = BTreeMap<u64, usize>;

/// The backend. One for all devices of a test program, so that a file is compiled once.
#[derive(Default)]
pub struct Emulator {
    memory: Mutex<Memory>,
    hopper: bool,
    /// What threads are recording, and what was recorded.
    tapes: Mutex<HashMap<ThreadId, Vec<Call>>>,
    graphs: Mutex<HashMap<u64, Vec<Call>>>,
    n_graphs: AtomicU64,
    n_begun: AtomicU64,
}

/// A call that is recorded.
#[derive(Clone)]
enum Call {
    Launch(Kernel, Grid, Vec<Arg>),
    Gemm(Matrix, Matrix, Matrix, Gemm),
    GemmFp8(Matrix, Matrix, Matrix, ScalesAt),
    Zero(u64, usize),
}

/// What their clock counts from.
static BEGUN: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);

/// Of all emulators: a launch holds its library's lock, for the state of kernels/emulate.h is one a library.
static LIBRARIES: LazyLock<Mutex<Libraries>> = LazyLock::new(Mutex::default);

/// By the name of their source.
type Libraries = HashMap<&'static str, Arc<Mutex<Library>>>;

/// The one, or None (with the reason printed) where g++ does not start.
pub fn emulator() -> Option<Arc<Emulator>> {
    static ONE: LazyLock<Option<Arc<Emulator>>> = LazyLock::new(|| Emulator::new(false));
    ONE.clone()
}

/// The one of a Hopper GPU, or None as above.
pub fn hopper() -> Option<Arc<Emulator>> {
    static ONE: LazyLock<Option<Arc<Emulator>>> = LazyLock::new(|| Emulator::new(true));
    ONE.clone()
}

impl Emulator {
    fn new(hopper: bool) -> Option<Arc<Emulator>> {
        match Command::new("g++").arg("--version").output() {
            Ok(_) => Some(Arc::new(Emulator { hopper, ..Emulator::default() })),
            Err(error) => {
                println!("skipped: g++ does not start ({error})");
                None
            }
        }
    }

    fn library(file: &'static str) -> Arc<Mutex<Library>> {
        let mut libraries = LIBRARIES.lock().expect("no kernel file failed to compile");
        Arc::clone(libraries.entry(file).or_insert_with(|| Arc::new(Mutex::new(Library::open(file)))))
    }

    /// Panics unless the address is 0 or inside a piece of memory whose guards are as they were.
    fn check(&self, address: u64, who: &dyn Fn() -> String) {
        let memory = self.memory.lock().expect("no panic while holding the memory");
        let found = memory.range(..=address).next_back().map(|(start, bytes)| (*start, *bytes));
        drop(memory);
        let inside = found.filter(|(start, bytes)| address <= start + *bytes as u64);
        let Some((start, bytes)) = inside else {
            assert!(address == 0, "{}: {address:#x} is in no memory of the device", who());
            return;
        };
        for (at, name) in [(start as usize - GUARD, "before"), (start as usize + bytes, "after")] {
            // SAFETY: the guard bytes belong to this piece of memory, which its owner holds during the call.
            let guard = unsafe { std::slice::from_raw_parts(at as *const u8, GUARD) };
            let hit = guard.iter().position(|byte| *byte != POISON);
            assert!(hit.is_none(), "{}: wrote {name} memory of {bytes} bytes, byte {hit:?} of the guard", who());
        }
    }

    /// Calls `run` with a launch that a device would accept; panics with its complaint, if it has one.
    fn launch_part(&self, kernel: &Kernel, grid: Grid, args: &[Arg], run: impl FnOnce(Wrapped, &Launch) -> *const c_char) {
        let library = Emulator::library(kernel.file);
        let who = || format!("kernels/{}.cu, {}", kernel.file, kernel.name);
        let blocks = [grid.blocks.0, grid.blocks.1, grid.blocks.2];
        let library = library.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let wrapped = *library.kernels.get(&kernel.name).unwrap_or_else(|| panic!("{}: there is no such kernel", who()));
        let accepted = blocks.iter().all(|n| *n > 0) && blocks[0] < 1 << 31 && blocks[1].max(blocks[2]) <= MOST_BLOCKS;
        let bound = wrapped.most_threads;
        let fits = (1..=bound).contains(&grid.threads) && grid.shared_bytes <= MOST_SHARED_BYTES;
        assert!(accepted && fits, "{}: {grid:?} with at most {bound} threads", who());
        let maps: Vec<Option<Map>> = args.iter().map(|arg| self.map(arg)).collect();
        let arguments: Vec<Argument> = args.iter().zip(&maps).map(argument).collect();
        let launch = Launch {
            blocks: blocks.map(|n| n as i32),
            threads: grid.threads as i32,
            shared_bytes: i64::from(grid.shared_bytes),
            args: arguments.as_ptr(),
            n_args: arguments.len() as i64,
        };
        self.check_all(args, &who);
        let complaint = run(wrapped, &launch);
        if !complaint.is_null() {
            // SAFETY: a complaint is a C string in static memory of the library.
            panic!("{}: {}", who(), unsafe { CStr::from_ptr(complaint) }.to_string_lossy());
        }
        self.check_all(args, &who);
    }

    /// The first part of a launch.
    fn begin(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> *mut c_void {
        self.n_begun.fetch_add(1, Ordering::Relaxed);
        let mut begun = std::ptr::null_mut();
        self.launch_part(kernel, grid, args, |wrapped, launch| {
            // SAFETY: as of a whole launch; it copies the arguments and gives out what `finish` takes.
            unsafe { (wrapped.begin)(launch, &mut begun) }
        });
        begun
    }

    /// Kernels of recorded work that began before their turn, so far.
    pub fn n_begun(&self) -> u64 {
        self.n_begun.load(Ordering::Relaxed)
    }

    /// The other part.
    fn finish_launch(&self, kernel: &Kernel, args: &[Arg], begun: *mut c_void) {
        let library = Emulator::library(kernel.file);
        let library = library.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: of `begin` of the same library, once.
        unsafe { (library.finish)(begun) };
        self.check_all(args, &|| format!("kernels/{}.cu, {}", kernel.file, kernel.name));
    }

    /// `check` of all addresses.
    fn check_all(&self, args: &[Arg], who: &dyn Fn() -> String) {
        args.iter().for_each(|arg| {
            if let Arg::Address(address) = arg {
                self.check(*address, who)
            }
        });
    }

    /// Whether this thread records; then the call is kept.
    fn is_kept(&self, call: impl FnOnce() -> Call) -> bool {
        let mut tapes = self.tapes.lock().expect("no panic while holding the tapes");
        tapes.get_mut(&std::thread::current().id()).map(|tape| tape.push(call())).is_some()
    }

    /// Panics when this thread records: what is asked for would not be.
    fn refuse(&self, what: &str) {
        let tapes = self.tapes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        assert!(!tapes.contains_key(&std::thread::current().id()), "{what} while work is recorded");
    }

    /// The matrix of an argument that is one; panics unless it is memory of the device that the copy engine takes.
    fn map(&self, arg: &Arg) -> Option<Map> {
        let Arg::Map(map @ TensorMap { address, dim, heads, tokens, box_tokens }) = *arg else { return None };
        self.check_range(address, 2 * dim * heads * tokens, "a matrix");
        assert!(address % 16 == 0 && dim % 8 == 0 && (1..=256).contains(&box_tokens), "{map:?}");
        let sizes = [dim, heads, tokens].map(|n| n as u64);
        Some(Map { address, sizes, strides: map.strides(), boxes: [TensorMap::BOX_DIMS as u32, 1, box_tokens] })
    }

    /// Panics unless `bytes` bytes from the address are memory of the device.
    fn check_range(&self, address: u64, bytes: usize, what: &str) {
        let memory = self.memory.lock().expect("no panic while holding the memory");
        let inside = |(start, size): (&u64, &usize)| address + bytes as u64 <= start + *size as u64;
        let whole = bytes == 0 || memory.range(..=address).next_back().is_some_and(inside);
        drop(memory);
        assert!(whole, "{what}: {bytes} bytes at {address:#x} are not memory of the device");
    }
}

fn layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes + 2 * GUARD, 256).expect("a size")
}

impl Backend for Emulator {
    fn name(&self) -> String {
        "emulated on the CPU".into()
    }

    fn processors(&self) -> usize {
        // Few, so that small tests have several blocks of work for each.
        3
    }

    fn is_hopper(&self) -> bool {
        self.hopper
    }

    fn capability(&self) -> (i32, i32) {
        if self.hopper { (9, 0) } else { (8, 9) }
    }

    fn gemm_fp8(&self, out: Matrix, a: Matrix, b: Matrix, scales: ScalesAt) {
        if self.is_kept(|| Call::GemmFp8(out, a, b, scales)) {
            return;
        }
        for matrix in [&out, &a, &b] {
            self.check_range(matrix.address, matrix.rows * matrix.columns * matrix.dtype.bytes(), "gemm_fp8");
        }
        let by_rows = scales.of == Fp8Scales::Rows;
        for (address, rows) in [(scales.a, a.rows), (scales.b, b.rows)] {
            self.check_range(address, if by_rows { 4 * rows } else { 4 }, "scales of gemm_fp8");
        }
        let k = a.columns;
        for (i, j) in (0..a.rows).flat_map(|i| (0..b.rows).map(move |j| (i, j))) {
            let sum: f32 = (0..k).map(|l| element(&a, i * k + l) * element(&b, j * k + l)).sum();
            // SAFETY: so many scales are memory of the device (checked).
            let scale = |address: u64, row: usize| unsafe { *(address as *const f32).add(if by_rows { row } else { 0 }) };
            put(&out, i * b.rows + j, sum * scale(scales.a, i) * scale(scales.b, j));
        }
    }

    fn alloc(&self, bytes: usize) -> Option<u64> {
        // SAFETY: the size is not zero.
        let whole = unsafe { std::alloc::alloc(layout(bytes)) };
        if whole.is_null() {
            return None;
        }
        // SAFETY: these bytes were just allocated.
        unsafe { whole.write_bytes(POISON, layout(bytes).size()) };
        let address = whole as u64 + GUARD as u64;
        self.memory.lock().expect("no panic while holding the memory").insert(address, bytes);
        Some(address)
    }

    fn free(&self, address: u64, bytes: usize) {
        if !std::thread::panicking() {
            self.check(address, &|| "freed memory".into());
        }
        let known = self.memory.lock().expect("no panic while holding the memory").remove(&address);
        assert_eq!(known, Some(bytes), "freed {bytes} bytes at {address:#x}");
        // SAFETY: allocated by `alloc` with this layout, and known until now.
        unsafe { std::alloc::dealloc((address - GUARD as u64) as *mut u8, layout(bytes)) };
    }

    fn upload(&self, host: &[u8], to: u64) {
        self.refuse("an upload");
        self.check_range(to, host.len(), "upload");
        // SAFETY: in memory of the device (checked), which is host memory apart from `host`.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), to as *mut u8, host.len()) };
    }

    fn download(&self, from: u64, host: &mut [u8]) {
        self.refuse("a download");
        self.check_range(from, host.len(), "download");
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, host.as_mut_ptr(), host.len()) };
    }

    fn zero(&self, at: u64, bytes: usize) {
        if self.is_kept(|| Call::Zero(at, bytes)) {
            return;
        }
        self.check_range(at, bytes, "zero");
        // SAFETY: in memory of the device (checked).
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
    }

    fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        if self.is_kept(|| Call::Launch(kernel.clone(), grid, args.to_vec())) {
            return;
        }
        self.launch_part(kernel, grid, args, |wrapped, launch| {
            // SAFETY: the wrapper takes exactly this struct; it reads the arguments only during the call.
            unsafe { (wrapped.whole)(launch) }
        });
    }

    fn gemm(&self, out: Matrix, a: Matrix, b: Matrix, how: Gemm) {
        if self.is_kept(|| Call::Gemm(out, a, b, how)) {
            return;
        }
        for matrix in [&out, &a, &b] {
            self.check_range(matrix.address, matrix.rows * matrix.columns * matrix.dtype.bytes(), "gemm");
        }
        let (m, k) = if how.trans_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
        let n = if how.trans_b { b.rows } else { b.columns };
        assert!(out.rows == m && out.columns == n && (if how.trans_b { b.columns } else { b.rows }) == k);
        assert!(a.dtype == b.dtype && (out.dtype == DType::F32 || a.dtype == DType::BF16));
        let (a, b) = (transposed_if(how.trans_a, &a), transposed_if(how.trans_b, &b));
        let mut row = vec![0.0f32; n];
        for i in 0..m {
            row.fill(0.0);
            for (x, b) in a[i * k..][..k].iter().zip(b.chunks_exact(n.max(1))) {
                row.iter_mut().zip(b).for_each(|(sum, y)| *sum += x * y);
            }
            for (j, sum) in row.iter().enumerate() {
                let at = i * n + j;
                let old = if how.out == Store::Accumulate { element(&out, at) } else { 0.0 };
                put(&out, at, old + sum);
            }
        }
    }

    // Everything is done when it was asked for, whatever the stream.
    fn finish(&self) {
        self.refuse("waiting");
    }

    fn record(&self, _stream: Stream) -> Event {
        Event(0)
    }

    fn wait(&self, _stream: Stream, _event: Event) {}

    fn is_complete(&self, _event: Event) -> bool {
        true
    }

    fn release(&self, _event: Event) {}

    fn mark(&self) -> Event {
        Event(BEGUN.elapsed().as_nanos() as u64)
    }

    fn seconds_between(&self, from: Event, to: Event) -> f64 {
        (to.0 - from.0) as f64 * 1e-9
    }

    fn forget_mark(&self, _mark: Event) {}

    fn handle(&self, _stream: Stream) -> Option<u64> {
        None
    }

    fn begin_recording(&self) -> bool {
        self.refuse("recording");
        self.tapes.lock().expect("no panic while holding the tapes").insert(std::thread::current().id(), Vec::new());
        true
    }

    fn end_recording(&self) -> Option<Graph> {
        let tape = self.tapes.lock().expect("no panic while holding the tapes").remove(&std::thread::current().id());
        let number = self.n_graphs.fetch_add(1, Ordering::Relaxed);
        self.graphs.lock().expect("no panic while holding the graphs").insert(number, tape.expect("begun on this thread"));
        Some(Graph(number))
    }

    fn replay(&self, graph: Graph) {
        let calls = self.graphs.lock().expect("no panic while holding the graphs")[&graph.0].clone();
        let is_launch = |i: usize| matches!(calls.get(i), Some(Call::Launch(..)));
        let mut begun = HashMap::new();
        for (i, call) in calls.iter().enumerate() {
            for ahead in (i + 1..=i + BEGUN_AHEAD).take_while(|ahead| is_launch(ahead - 1) && is_launch(*ahead)) {
                let Call::Launch(kernel, grid, args) = &calls[ahead] else { unreachable!("a launch") };
                begun.entry(ahead).or_insert_with(|| self.begin(kernel, *grid, args));
            }
            match call {
                Call::Launch(kernel, grid, args) => match begun.remove(&i) {
                    Some(begun) => self.finish_launch(kernel, args, begun),
                    None => self.launch(kernel, *grid, args),
                },
                Call::Gemm(out, a, b, how) => self.gemm(*out, *a, *b, *how),
                Call::GemmFp8(out, a, b, scales) => self.gemm_fp8(*out, *a, *b, *scales),
                Call::Zero(at, bytes) => self.zero(*at, *bytes),
            }
        }
    }

    fn forget(&self, graph: Graph) {
        assert!(self.graphs.lock().expect("no panic while holding the graphs").remove(&graph.0).is_some());
    }

    fn identity(&self) -> [u8; 16] {
        u128::from(std::process::id()).to_le_bytes()
    }
}

fn argument((arg, map): (&Arg, &Option<Map>)) -> Argument {
    let (kind, bits) = match *arg {
        Arg::Address(address) => (0, address),
        Arg::Int(value) => (1, u64::from(value as u32)),
        Arg::Long(value) => (2, value as u64),
        Arg::Float(value) => (3, u64::from(value.to_bits())),
        Arg::Double(value) => (4, value.to_bits()),
        Arg::Map(_) => (5, std::ptr::from_ref(map.as_ref().expect("made of this argument")) as u64),
    };
    Argument { kind, bits }
}

/// Element `at` of a matrix that was checked to be memory of the device.
fn element(matrix: &Matrix, at: usize) -> f32 {
    // SAFETY: inside the matrix, whose bytes the caller checked.
    unsafe {
        match matrix.dtype {
            DType::F32 => *(matrix.address as *const f32).add(at),
            DType::F8E4M3 => crate::oracle::e4m3(*(matrix.address as *const u8).add(at)) as f32,
            _ => (*(matrix.address as *const half::bf16).add(at)).to_f32(),
        }
    }
}

fn put(matrix: &Matrix, at: usize, value: f32) {
    // SAFETY: as in `element`.
    unsafe {
        match matrix.dtype {
            DType::F32 => *(matrix.address as *mut f32).add(at) = value,
            _ => *(matrix.address as *mut half::bf16).add(at) = half::bf16::from_f32(value),
        }
    }
}

/// The elements row by row, of the transpose if asked for.
fn transposed_if(transpose: bool, matrix: &Matrix) -> Vec<f32> {
    let (rows, columns) = if transpose { (matrix.columns, matrix.rows) } else { (matrix.rows, matrix.columns) };
    let at = |i: usize| if transpose { i % columns * matrix.columns + i / columns } else { i };
    (0..rows * columns).map(|i| element(matrix, at(i))).collect()
}

/// What the panic of a launch says; None when it runs.
fn complaint_of(emulator: &Emulator, kernel: &str, grid: Grid, args: &[Arg]) -> Option<String> {
    let kernel = Kernel { file: "elementwise", name: kernel.into() };
    let launched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| emulator.launch(&kernel, grid, args)));
    launched.err().map(|payload| payload.downcast_ref::<String>().expect("a formatted message").clone())
}

/// The emulator refuses what a device would do silently: else every test above it proves less than it says.
#[test]
fn mistakes_of_a_launch_are_seen() {
    let Some(emulator) = emulator() else { return };
    // Never freed: one of them is damaged below.
    let [x, y] = [(); 2].map(|()| Arg::Address(emulator.alloc(4 * 100).unwrap()));
    let grid = Grid::line(1, 128);
    let seen = |kernel: &str, grid: Grid, args: &[Arg], part: &str| {
        let complaint = complaint_of(&emulator, kernel, grid, args).unwrap_or_else(|| panic!("{kernel} with {args:?} ran"));
        assert!(complaint.contains(part), "{complaint}");
    };
    assert_eq!(complaint_of(&emulator, "scale_f32", grid, &[x, Arg::Long(100), Arg::Float(2.0)]), None);
    seen("scale_f64", grid, &[x, Arg::Long(100), Arg::Float(2.0)], "no such kernel");
    seen("scale_f32", grid, &[x, Arg::Int(100), Arg::Float(2.0)], "argument 1 is long long, the launch passes int");
    seen("scale_f32", grid, &[x, Arg::Long(100)], "it has 3 arguments, the launch passes 2");
    seen("scale_f32", grid, &[Arg::Address(64), Arg::Long(0), Arg::Float(2.0)], "is in no memory of the device");
    seen("scale_f32", Grid { threads: 2048, ..grid }, &[x, Arg::Long(100), Arg::Float(2.0)], "threads");
    seen("scale_f32", Grid { blocks: (1, 0, 1), ..grid }, &[x, Arg::Long(100), Arg::Float(2.0)], "blocks");
    // More elements than there is room for.
    let zeros = emulator.alloc(4 * 200).unwrap();
    emulator.zero(zeros, 4 * 200);
    let too_many = [y, Arg::Address(zeros), Arg::Long(101)];
    seen("copy_f32_f32", grid, &too_many, "wrote after memory of 400 bytes");
}
