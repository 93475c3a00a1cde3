//! Kernels of a source file as functions of the host: compiled by g++ below wrapper.h, once for all test programs, and loaded.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Threads of a block that sm_90 accepts: those of a kernel that names no bound.
const MOST_THREADS: u32 = 1024;

/// `Launch` and `Argument` of wrapper.h.
#[repr(C)]
pub struct Launch {
    pub blocks: [i32; 3],
    pub threads: i32,
    pub shared_bytes: i64,
    pub args: *const Argument,
    pub n_args: i64,
}
#[repr(C)]
pub struct Argument {
    pub kind: i64,
    pub bits: u64,
}
pub type Wrapper = unsafe extern "C" fn(*const Launch) -> *const c_char;
/// The first part of a launch alone, which is given out; the other part.
pub type Begin = unsafe extern "C" fn(*const Launch, *mut *mut c_void) -> *const c_char;
pub type Finish = unsafe extern "C" fn(*mut c_void);

/// A kernel's wrappers and the threads of `__launch_bounds__`.
#[derive(Clone, Copy)]
pub struct Wrapped {
    pub whole: Wrapper,
    pub begin: Begin,
    pub most_threads: u32,
}

/// The kernels of one file, by name.
pub struct Library {
    pub kernels: HashMap<String, Wrapped>,
    pub finish: Finish,
}

fn kernels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Runs g++ and returns what it prints.
fn gcc(what: &str, args: &[&std::ffi::OsStr]) -> String {
    let output = Command::new("g++").args(args).output().expect("g++ started before");
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("sources are ASCII")
}

/// Name and most threads of every kernel in preprocessed source, where `__global__` is no macro and stands as it was written.
fn kernels_of(source: &str) -> Vec<(String, u32)> {
    let declarations = source.split("__global__").skip(1);
    declarations
        .map(|rest| {
            // Before or after the bounds: `void __launch_bounds__(128, 2) name(`.
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let words = || rest.split(|c| !is_word(c)).filter(|word| !word.is_empty());
            let is_name = |word: &&str| *word != "void" && *word != "__launch_bounds__" && word.parse::<u32>().is_err();
            let name = words().find(is_name).expect("a kernel has a name");
            let bound = words().take_while(|word| *word != name).find_map(|word| word.parse().ok()).unwrap_or(MOST_THREADS);
            (name.to_string(), bound)
        })
        .collect()
}

/// The library of a file of kernels, compiled when it is not there yet, and its kernels.
pub fn library_of(file: &str) -> (PathBuf, Vec<(String, u32)>) {
    let source = kernels_folder().join(format!("{file}.cu"));
    // The device's branch of common.cuh shows the kernels, the emulated one is hashed and compiled.
    let seen = gcc(file, &["-E".as_ref(), "-P".as_ref(), "-x".as_ref(), "c++".as_ref(), "-std=c++17".as_ref(), source.as_ref()]);
    let kernels = kernels_of(&seen);
    let mut text = format!("#include {source:?}\n#include \"wrapper.h\"\n");
    kernels.iter().for_each(|(name, _)| text.push_str(&format!("WRAPPED({name})\n")));
    let wrapper = include_str!("wrapper.h");
    let read = |name: &&str| std::fs::read_to_string(kernels_folder().join(name)).unwrap_or_else(|error| panic!("kernels/{name}: {error}"));
    let headers = ["emulate.h", "common.cuh", "emulate_hopper.h", "hopper.cuh", "attention_hopper.cuh"]
        .iter()
        .map(read)
        .collect::<Vec<_>>()
        .join("\0");
    let hash = xxhash_rust::xxh3::xxh3_64([&*text, &*seen, wrapper, &headers].join("\0").as_bytes());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated-{file}-{hash:016x}.so"));
    // Tests beside each other may want the same one.
    static COMPILING: Mutex<()> = Mutex::new(());
    let _one = COMPILING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !path.is_file() {
        compile(file, &text, &path);
    }
    (path, kernels)
}

impl Library {
    pub fn open(file: &str) -> Library {
        let (path, kernels) = library_of(file);
        // SAFETY: wrapper.h defines them with these types.
        let wrapped = |name: &str, most_threads: u32| unsafe {
            Wrapped {
                whole: std::mem::transmute::<*mut c_void, Wrapper>(open_symbol(&path, &format!("launch_{name}"))),
                begin: std::mem::transmute::<*mut c_void, Begin>(open_symbol(&path, &format!("begin_{name}"))),
                most_threads,
            }
        };
        // SAFETY: as above.
        let finish = unsafe { std::mem::transmute::<*mut c_void, Finish>(open_symbol(&path, "finish")) };
        let kernels = kernels.into_iter().map(|(name, bound)| (name.clone(), wrapped(&name, bound))).collect();
        Library { kernels, finish }
    }
}

/// Written under another name first: several test programs may want the same library.
fn compile(file: &str, text: &str, path: &Path) {
    let unfinished = path.with_extension(format!("{}.so", std::process::id()));
    let wrapper = path.with_extension(format!("{}.cpp", std::process::id()));
    std::fs::write(&wrapper, text).expect("a place for the wrapper");
    let include = format!("-I{}/tests/kernels", env!("CARGO_MANIFEST_DIR"));
    let options = ["-O2", "-std=c++17", "-w", "-DTRIREME_EMULATE", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", &include];
    let mut args: Vec<&std::ffi::OsStr> = options.iter().map(AsRef::as_ref).collect();
    args.extend::<[&std::ffi::OsStr; 5]>(["-x".as_ref(), "c++".as_ref(), wrapper.as_ref(), "-o".as_ref(), unfinished.as_ref()]);
    gcc(file, &args);
    std::fs::rename(&unfinished, path).expect("the library in its place");
    let _ = std::fs::remove_file(wrapper);
}

fn open_symbol(path: &Path, name: &str) -> *mut c_void {
    let c_path = CString::new(path.to_str().expect("a path in UTF-8")).expect("a path without NUL");
    let c_name = CString::new(name).expect("a name without NUL");
    // SAFETY: both are C strings; the library is never closed, so its functions stay.
    let symbol: *mut c_void = unsafe {
        let library = libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "{}: {}", path.display(), CStr::from_ptr(libc::dlerror()).to_string_lossy());
        libc::dlsym(library, c_name.as_ptr())
    };
    assert!(!symbol.is_null(), "{} has no {name}", path.display());
    symbol
}
