//! Kernels compiled on the machine they run on: NVRTC, and a cache of its results on disk. The sources travel in the program.
//!
//! The cache is `$TRIREME_KERNEL_CACHE`, else `trireme` in `$XDG_CACHE_HOME` or `~/.cache`; a file is named by the hash of all
//! that went into it, so it is never out of date. Without a writable cache every process compiles for itself.

use crate::error::{Error, Kind, Result};
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

/// Every file of kernels: name without the ending, source.
pub const SOURCES: &[(&str, &str)] = &[
    ("activation", include_str!("../../../kernels/activation.cu")),
    ("adamw", include_str!("../../../kernels/adamw.cu")),
    ("attention_backward", include_str!("../../../kernels/attention_backward.cu")),
    ("attention_cached", include_str!("../../../kernels/attention_cached.cu")),
    ("attention_forward", include_str!("../../../kernels/attention_forward.cu")),
    ("attention_hopper_backward", include_str!("../../../kernels/attention_hopper_backward.cu")),
    ("attention_hopper_forward", include_str!("../../../kernels/attention_hopper_forward.cu")),
    ("canonical", include_str!("../../../kernels/canonical.cu")),
    ("cross_entropy", include_str!("../../../kernels/cross_entropy.cu")),
    ("elementwise", include_str!("../../../kernels/elementwise.cu")),
    ("embedding", include_str!("../../../kernels/embedding.cu")),
    ("fp8", include_str!("../../../kernels/fp8.cu")),
    ("gemv", include_str!("../../../kernels/gemv.cu")),
    ("matmul", include_str!("../../../kernels/matmul.cu")),
    ("matmul_hopper", include_str!("../../../kernels/matmul_hopper.cu")),
    ("norm", include_str!("../../../kernels/norm.cu")),
    ("ordered", include_str!("../../../kernels/ordered.cu")),
    ("rope", include_str!("../../../kernels/rope.cu")),
    ("sample", include_str!("../../../kernels/sample.cu")),
];

/// What they include.
const HEADERS: &[(&str, &str)] = &[
    ("activation.cuh", include_str!("../../../kernels/activation.cuh")),
    ("norm.cuh", include_str!("../../../kernels/norm.cuh")),
    ("rows.cuh", include_str!("../../../kernels/rows.cuh")),
    ("common.cuh", include_str!("../../../kernels/common.cuh")),
    ("attention_tile.cuh", include_str!("../../../kernels/attention_tile.cuh")),
    ("attention_hopper.cuh", include_str!("../../../kernels/attention_hopper.cuh")),
    ("matmul.cuh", include_str!("../../../kernels/matmul.cuh")),
    ("rope.cuh", include_str!("../../../kernels/rope.cuh")),
    ("hopper.cuh", include_str!("../../../kernels/hopper.cuh")),
];

/// Bytes before a cached result: the hash of what follows, so that a torn file is not loaded.
const SEAL_BYTES: usize = 8;

/// Err when there is no NVRTC on this machine, or one older than 13.0. Every call of this file's other functions needs it.
pub fn check_present() -> Result<()> {
    let refused =
        |wrong: String| Err(Error::recipe(wrong).remedy("install CUDA 13 or add its lib64 to LD_LIBRARY_PATH, or run with --device cpu"));
    // SAFETY: only opens a library.
    if !unsafe { sys::is_culib_present() } {
        return refused("no CUDA run-time compiler: libnvrtc.so.13 was not found on this machine".into());
    }
    let (major, minor) = version();
    if major < 13 {
        return refused(format!("libnvrtc is {major}.{minor} on this machine, 13.0 is needed"));
    }
    Ok(())
}

/// Major and minor; 0 when the library does not say.
fn version() -> (c_int, c_int) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// Machine code of a file of kernels for an architecture ("sm_90a"), from the cache or compiled now.
pub fn machine_code(file: &str, architecture: &str) -> Result<Vec<u8>> {
    let source = SOURCES.iter().find(|(name, _)| *name == file).map(|(_, source)| *source);
    let source = source.unwrap_or_else(|| panic!("there is no kernels/{file}.cu"));
    let path = cache_folder().map(|folder| folder.join(format!("{file}-{architecture}-{:016x}.cubin", hash_of(source, architecture))));
    if let Some(kept) = path.as_deref().and_then(read_sealed) {
        return Ok(kept);
    }
    let code = compile(file, source, architecture)?;
    if let Some(path) = path
        && let Err(error) = write_sealed(&path, &code)
    {
        log::debug!("{}: not kept for the next start: {error}", path.display());
    }
    Ok(code)
}

fn options(architecture: &str) -> [String; 2] {
    [format!("--gpu-architecture={architecture}"), "--std=c++17".into()]
}

/// Of everything that decides the result.
fn hash_of(source: &str, architecture: &str) -> u64 {
    let mut all = format!("{source}\0{:?}\0", options(architecture));
    HEADERS.iter().for_each(|(name, text)| all.push_str(&format!("{name}\0{text}\0")));
    let (major, minor) = version();
    xxh3_64(format!("{all}{major}.{minor}").as_bytes())
}

/// Of the text of all kernels.
pub fn hash_of_all() -> u64 {
    let mut all = String::new();
    SOURCES.iter().chain(HEADERS).for_each(|(name, text)| all.push_str(&format!("{name}\0{text}\0")));
    xxh3_64(all.as_bytes())
}

/// Where results are kept from one start to the next; `None` where there is no place.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").map(|home| home.join(".cache"));
    set("TRIREME_KERNEL_CACHE").or_else(|| set("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("trireme")))
}

/// What `write_sealed` wrote; `None` when there is none, or it is torn or altered.
pub(super) fn read_sealed(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (seal, code) = bytes.split_at_checked(SEAL_BYTES)?;
    (seal == xxh3_64(code).to_le_bytes()).then(|| code.to_vec())
}

/// Under another name first: several ranks compile the same at their first start.
pub(super) fn write_sealed(path: &Path, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(path.parent().expect("a file in the cache's folder"))?;
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    let written = std::fs::write(&unfinished, [&xxh3_64(code).to_le_bytes(), code].concat());
    written.and_then(|()| std::fs::rename(&unfinished, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&unfinished);
    })
}

/// An NVRTC program, destroyed with its owner.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram and destroyed once; nothing can be done about a failure.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// A failure of the compiler at a file of kernels.
fn failed(what: &str, file: &str, detail: &str) -> Error {
    Error::new(Kind::Other, format!("{what} of kernels/{file}.cu failed: {detail}"))
        .remedy("use a CUDA version that knows this GPU (13.0 or newer), or run with --device cpu")
}

/// The program, compiled down to machine code.
fn build(file: &str, source: &str, options: &[String]) -> Result<Program> {
    let text = |text: &str| CString::new(text).expect("sources and names hold no NUL");
    let (c_source, c_name) = (text(source), text(&format!("{file}.cu")));
    let (names, headers): (Vec<CString>, Vec<CString>) = HEADERS.iter().map(|(name, header)| (text(name), text(header))).unzip();
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
    let (name_pointers, header_pointers) = (pointers(&names), pointers(&headers));
    let mut program: sys::nvrtcProgram = std::ptr::null_mut();
    // SAFETY: C strings and arrays of HEADERS.len() of them, alive until the end of this function, after which nothing is compiled.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            c_source.as_ptr(),
            c_name.as_ptr(),
            HEADERS.len() as c_int,
            header_pointers.as_ptr(),
            name_pointers.as_ptr(),
        )
    };
    created.result().map_err(|error| failed("reading", file, &error.to_string()))?;
    let program = Program(program);
    // SAFETY: a live program.
    if let Err(error) = unsafe { result::compile_program(program.0, options) } {
        let detail = format!("{error} with {}: {}", options.join(" "), in_one_line(&log_of(&program)));
        return Err(failed("compilation", file, &detail));
    }
    Ok(program)
}

fn compile(file: &str, source: &str, architecture: &str) -> Result<Vec<u8>> {
    let program = build(file, source, &options(architecture))?;
    let failed = |error: result::NvrtcError| failed("assembly", file, &error.to_string());
    let mut size = 0;
    // SAFETY: a live, compiled program; writes one integer.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(failed)?;
    let mut code = vec![0u8; size];
    // SAFETY: the buffer has the size that was asked for.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }.result().map_err(failed)?;
    Ok(code)
}

/// What the compiler said.
fn log_of(program: &Program) -> String {
    // SAFETY: a live program.
    let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The first lines of a text.
fn in_one_line(text: &str) -> String {
    text.lines().filter(|line| !line.trim().is_empty()).take(6).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program carries every file of kernels/ and every header of theirs: a file left out would be missed only on a GPU.
    #[test]
    fn every_source_is_in_the_program() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let (name, stem) = (path.file_name().unwrap().to_str().unwrap(), path.file_stem().unwrap().to_str().unwrap());
            match path.extension().and_then(|ending| ending.to_str()) {
                Some("cu") => assert!(SOURCES.iter().any(|(known, _)| *known == stem), "SOURCES lacks {stem}"),
                Some("cuh") => assert!(HEADERS.iter().any(|(known, _)| *known == name), "HEADERS lacks {name}"),
                _ => {}
            }
        }
    }

    /// A kept result comes back as it was; a torn, altered or short file does not come back at all.
    #[test]
    fn damaged_results_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/a.cubin");
        assert_eq!(read_sealed(&path), None);
        write_sealed(&path, b"machine code").unwrap();
        assert_eq!(read_sealed(&path).as_deref(), Some(&b"machine code"[..]));
        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..5], &[&whole[..9], &[!whole[9]], &whole[10..]].concat()] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read_sealed(&path), None);
        }
    }

    /// NVRTC where it is at hand: in the library path, or as its package in .venv. Opened by its path it is found by its name, and
    /// so is the library that it opens in turn.
    fn nvrtc_is_here() -> bool {
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/lib");
        for python in std::fs::read_dir(lib).into_iter().flatten().flatten() {
            for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"] {
                let path = python.path().join("site-packages/nvidia/cu13/lib").join(name);
                let path = CString::new(path.to_str().unwrap()).unwrap();
                // SAFETY: a C string; the library stays open.
                unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            }
        }
        check_present().is_ok()
    }

    /// NVRTC, which knows no system headers and reads ours from memory, makes machine code with every kernel of every file, all of
    /// whose values stay in registers (NVRTC and nvcc choose them differently: kernels that do not spill in one have in the other);
    /// and what it cannot compile is an error that names the place.
    #[test]
    fn every_source_compiles_without_spills() {
        if !nvrtc_is_here() {
            println!("skipped: no libnvrtc.so.13 (tests/run.sh installs it into .venv)");
            return;
        }
        let options: Vec<String> = options("sm_90a").into_iter().chain(["--ptxas-options=-v".into()]).collect();
        for (file, source) in SOURCES {
            let report = log_of(&build(file, source, &options).unwrap());
            // ptxas says of each kernel: its name, then its spills.
            let mut name = "";
            let mut n_kernels = 0;
            for line in report.lines() {
                if let Some((_, rest)) = line.split_once("Function properties for ") {
                    name = rest.trim();
                } else if line.contains("spill stores") {
                    n_kernels += 1;
                    assert!(line.contains(" 0 bytes spill stores, 0 bytes spill loads"), "{file}: {name} spills: {line}");
                }
                let is_slow = ["serialized", "Performance Loss", "ignored", "warning"].iter().any(|word| line.contains(word));
                assert!(!is_slow, "{file}: {line}");
            }
            assert!(n_kernels > 0, "{file}: {report}");
        }
        let code = compile("adamw", SOURCES.iter().find(|(file, _)| *file == "adamw").unwrap().1, "sm_90a").unwrap();
        assert!(code.starts_with(b"\x7fELF"));
        let error = compile("wrong", "extern \"C\" __global__ void f() { g(); }", "sm_90a").unwrap_err().to_string();
        assert!(error.contains("kernels/wrong.cu") && error.contains('g') && !error.contains('\n'), "{error}");
        let other = hash_of("a", "sm_90a");
        assert!(other != hash_of("b", "sm_90a") && other != hash_of("a", "sm_100"));
    }
}
