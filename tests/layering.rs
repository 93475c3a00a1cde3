//! The architecture, held by reading the source: who may name whom, which files may name MPI and HDF5, and where `unsafe`
//! may stand. The layers, lowest first; a module uses its own layer and those below:
//! L0 error, exact, fault, rng, metrics, artifact, progress, machine - L1 tensor, recipe, parallel, flight - L2 device, comm - L3 model, data, text,
//! checkpoint - L4 train, infer, eval - L5 runtime, cli, prove - L6 the binaries.

use std::path::{Path, PathBuf};

/// Top-level modules of each layer.
const LAYERS: [&[&str]; 6] = [
    &["error", "exact", "fault", "rng", "metrics", "artifact", "progress", "machine"],
    &["tensor", "recipe", "parallel", "flight"],
    &["device", "comm"],
    &["model", "data", "text", "checkpoint"],
    &["train", "infer", "eval"],
    &["runtime", "cli", "prove"],
];

/// Uses upwards that are allowed, (file or folder, full path): plain data that stands with what it describes.
const EXCEPTIONS: &[(&str, &str)] = &[("recipe", "model::config")];

/// (external crate, the only files or folders that may name it).
const CRATES: &[(&str, &[&str])] = &[
    ("mpi", &["comm/mpi", "runtime"]),
    ("hdf5", &["checkpoint/h5", "data/h5"]),
    ("hdf5_sys", &["checkpoint/h5", "data/h5"]),
    ("tokenizers", &["text/json"]),
    ("minijinja", &["text/chat"]),
    ("minijinja_contrib", &["text/chat"]),
    ("fancy_regex", &["eval/extract"]),
    ("csv", &["eval/read"]),
    ("memmap2", &["data", "flight/ring"]),
    ("gemm", &["device"]),
    ("rustix", &["fault", "artifact/file"]),
    ("cudarc", CUDA),
];

/// What calls the CUDA libraries: driver, matrix products, run-time compiler, matrices of the copy engine, collectives.
const CUDA: &[&str] = &["device/cuda/driver", "device/cuda/blas", "device/cuda/compile", "device/cuda/tensor_map", "comm/nccl"];

/// The only files or folders with `unsafe`: raw memory of tensors, SIMD kernels, the mmap reader, the mapped ring of the flight
/// ledger, communication that owns its tensors, calls into C libraries, and signals with MPI_Abort.
const UNSAFE: &[&[&str]] =
    &[&["tensor", "device/cpu", "data/index", "flight/ring", "comm/mpi", "comm/in_flight", "checkpoint/h5", "runtime"], CUDA];

/// A source file by its path without `src/` and `.rs`; a folder's own file goes by the folder: `comm/mpi`, `comm`.
struct Source {
    name: String,
    text: String,
}

/// Whether `name` is `place`, in the folder `place`, or a sibling that continues its name (`h5_types` of `h5`).
fn is_in(name: &str, place: &str) -> bool {
    name.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '_']))
}

/// Every violation of a file, one a line.
fn violations(source: &Source) -> Vec<String> {
    let code = without_tests(&without_comments_and_strings(&source.text));
    let tokens = tokens(&code);
    let mut found = Vec::new();
    for path in crate_paths(&source.name, &tokens) {
        found.extend(layer_violation(&source.name, &path));
    }
    for (name, places) in CRATES {
        if !places.iter().any(|place| is_in(&source.name, place)) && names_crate(&tokens, name) {
            found.push(format!("{} names the crate {name}, only {} may", source.name, places.join(", ")));
        }
    }
    if tokens.iter().any(|token| token == "unsafe") && !UNSAFE.concat().iter().any(|place| is_in(&source.name, place)) {
        found.push(format!("{} has unsafe, only {} may", source.name, UNSAFE.concat().join(", ")));
    }
    found
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

fn layer_violation(file: &str, path: &str) -> Option<String> {
    let own = file.split('/').next().expect("split gives one");
    let other = path.split("::").next().expect("split gives one");
    let (Some(mine), Some(theirs)) = (layer_of(own), layer_of(other)) else {
        return Some(format!("{file} uses {path}: {own} or {other} is in no layer"));
    };
    let excepted =
        EXCEPTIONS.iter().any(|(place, allowed)| is_in(file, place) && (path == *allowed || path.starts_with(&format!("{allowed}::"))));
    (theirs > mine && !excepted).then(|| format!("{file} (L{mine}) uses {path} (L{theirs})"))
}

/// Comments, string and character literals as spaces, so that words in them do not count. Lifetimes stay.
fn without_comments_and_strings(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut i) = (String::new(), 0);
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    while i < chars.len() {
        let end = if at(i) == '/' && at(i + 1) == '/' {
            (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len())
        } else if at(i) == '/' && at(i + 1) == '*' {
            (i + 2..chars.len()).find(|&j| at(j) == '*' && at(j + 1) == '/').map_or(chars.len(), |j| j + 2)
        } else if at(i) == 'r' && (at(i + 1) == '"' || at(i + 1) == '#') && !is_word(at(i.wrapping_sub(1))) {
            let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
            match at(i + 1 + hashes) {
                '"' => {
                    let closes = |j: usize| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
                    (i + 2 + hashes..chars.len()).find(|&j| closes(j)).map_or(chars.len(), |j| j + 1 + hashes)
                }
                _ => i, // a raw identifier
            }
        } else if at(i) == '"' {
            let mut j = i + 1;
            while j < chars.len() && at(j) != '"' {
                j += if at(j) == '\\' { 2 } else { 1 };
            }
            j + 1
        } else if at(i) == '\'' && at(i + 1) == '\\' {
            (i + 3..chars.len()).find(|&j| at(j) == '\'').map_or(chars.len(), |j| j + 1)
        } else if at(i) == '\'' && at(i + 2) == '\'' {
            i + 3
        } else {
            i
        };
        if end == i {
            out.push(at(i));
            i += 1;
        } else {
            out.push(' ');
            i = end;
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The text without the bodies of `#[cfg(test)] mod ..`: tests may use any layer.
fn without_tests(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(start) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..start]);
        let after = &rest[start..];
        let (open, semicolon) = (after.find('{').unwrap_or(after.len()), after.find(';').unwrap_or(after.len()));
        let end = if semicolon < open {
            semicolon + 1
        } else {
            let mut depth = 0;
            let closes = |(i, c): (usize, char)| {
                depth += i64::from(c == '{') - i64::from(c == '}');
                (depth == 0 && i >= open).then_some(i + 1)
            };
            after.char_indices().find_map(closes).unwrap_or(after.len())
        };
        rest = &after[end..];
    }
    out + rest
}

/// Words, `::`, and every other visible character by itself.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut in_word = false;
    for c in code.chars() {
        match tokens.last_mut() {
            Some(last) if is_word(c) && in_word => last.push(c),
            Some(last) if c == ':' && last == ":" && !in_word => last.push(c),
            _ if !c.is_whitespace() => tokens.push(c.to_string()),
            _ => {}
        }
        in_word = is_word(c);
    }
    tokens
}

/// Every path that begins at the crate's root, `crate::` and brace groups unfolded, `super::` resolved; without `crate::`.
fn crate_paths(file: &str, tokens: &[String]) -> Vec<String> {
    let mut paths = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let starts = i == 0 || tokens[i - 1] != "::";
        if starts && tokens[i] == "crate" && tokens.get(i + 1).is_some_and(|t| t == "::") {
            unfold(&tokens[i + 2..], "", &mut paths);
        }
        if starts && tokens[i] == "super" {
            let mut depth = file.split('/').count();
            let mut j = i;
            while tokens.get(j).is_some_and(|t| t == "super") && tokens.get(j + 1).is_some_and(|t| t == "::") {
                depth = depth.saturating_sub(1);
                j += 2;
            }
            // Inside the module's own tree nothing crosses a layer.
            if depth == 0 && j > i {
                unfold(&tokens[j..], "", &mut paths);
            }
            i = i.max(j.saturating_sub(1));
        }
        i += 1;
    }
    paths
}

/// `a::b`, `a::{b, c::d}` and `{a, b}` as full paths; returns how many tokens were read.
fn unfold(tokens: &[String], prefix: &str, paths: &mut Vec<String>) -> usize {
    if tokens.first().is_some_and(|t| t == "{") {
        let mut i = 1;
        while i < tokens.len() && tokens[i] != "}" {
            i += if tokens[i] == "," { 1 } else { unfold(&tokens[i..], prefix, paths).max(1) };
        }
        return i + 1;
    }
    let Some(word) = tokens.first() else { return 0 };
    let path = if prefix.is_empty() { word.clone() } else { format!("{prefix}::{word}") };
    if tokens.get(1).is_some_and(|t| t == "::") {
        return 2 + unfold(&tokens[2..], &path, paths);
    }
    paths.push(path);
    // `as name` belongs to the path.
    if tokens.get(1).is_some_and(|t| t == "as") { 3 } else { 1 }
}

/// Whether the tokens name this external crate: `name::..` or `use name` that no `mod name` of this file stands for.
fn names_crate(tokens: &[String], name: &str) -> bool {
    let declares = tokens.windows(2).any(|pair| pair[0] == "mod" && pair[1] == name);
    let names = |i: usize| {
        let before = i.checked_sub(1).map_or("", |i| tokens[i].as_str());
        let after = tokens.get(i + 1).map_or("", String::as_str);
        let rooted = before == "::" && i.checked_sub(2).is_none_or(|i| !tokens[i].chars().all(is_word) || tokens[i] == "use");
        let free = before != "::" && before != "." && before != "mod";
        (free || rooted) && (after == "::" || before == "use" || before == "crate")
    };
    !declares && (0..tokens.len()).any(|i| tokens[i] == name && names(i))
}

/// All sources under `src/` but the binaries and `lib.rs`.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let source = |path: &PathBuf| {
        let name = path.strip_prefix(&root).expect("under src").with_extension("").display().to_string();
        let name = name.strip_suffix("/mod").unwrap_or(&name).to_string();
        Source { name, text: std::fs::read_to_string(path).expect("readable") }
    };
    files.iter().map(source).filter(|source| source.name != "lib" && !source.name.starts_with("bin/")).collect()
}

/// No file uses a layer above its own, names MPI or HDF5 outside of their places, or has `unsafe` where it may not. This is
/// what keeps the model testable without MPI and the recipe readable without a device.
#[test]
fn the_source_keeps_its_layers() {
    let sources = sources();
    assert!(sources.len() > 30, "only {} files were found", sources.len());
    let found: Vec<String> = sources.iter().flat_map(violations).collect();
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

/// Each top-level module that lib.rs declares is in exactly one layer, and each layer's module exists.
#[test]
fn the_layer_table_is_the_crate() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("readable");
    let mut declared: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let mut layered: Vec<&str> = LAYERS.concat();
    declared.sort_unstable();
    layered.sort_unstable();
    assert_eq!(declared, layered);
}

/// Each `unsafe` block or impl is explained by a SAFETY comment just above it (or at the head of the group it stands in).
#[test]
fn unsafe_is_explained() {
    let mut missing = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = without_comments_and_strings(line);
            let blocks = code.contains("unsafe {") || code.contains("unsafe impl");
            let explained = lines[i.saturating_sub(6)..=i].iter().any(|line| line.contains("SAFETY"));
            if blocks && !explained {
                missing.push(format!("src/{}.rs:{}: {}", source.name, i + 1, line.trim()));
            }
        }
    }
    assert!(missing.is_empty(), "{} without a SAFETY line:\n{}", missing.len(), missing.join("\n"));
}

/// The checker sees violations in every form they can be written in: without this, an empty list proves nothing.
#[test]
fn the_checker_finds_violations() {
    let found = |name: &str, text: &str| violations(&Source { name: name.into(), text: text.into() });
    let bad: &[(&str, &str, &str)] = &[
        ("model/linear", "use crate::train::pretrain::Job;", "model/linear (L3) uses train::pretrain::Job (L4)"),
        ("error", "use crate::tensor::Tensor;", "error (L0) uses tensor::Tensor (L1)"),
        ("device/cpu", "fn f() { let x = crate::runtime::Runtime::start(); }", "(L2) uses runtime::Runtime::start (L5)"),
        ("comm/threads", "use crate::{error::Result, model::chunk::{Chunk, Output}};", "uses model::chunk::Output (L3)"),
        ("comm/threads", "use crate::{\n    error::Result,\n    data as d,\n};", "uses data (L3)"),
        ("comm/threads", "use super::super::train::state;", "uses train::state (L4)"),
        ("tensor", "use super::device::Device;", "uses device::Device (L2)"),
        ("recipe/check", "use crate::model::chunk::Chunk;", "uses model::chunk::Chunk (L3)"),
        ("parallel/layout", "use crate::model::config::ModelConfig;", "uses model::config::ModelConfig (L3)"),
        ("model/linear", "use crate::nowhere::X;", "is in no layer"),
        ("train/state", "use mpi::topology::Communicator;", "names the crate mpi"),
        ("train/state", "pub(crate) use ::mpi::traits::*;", "names the crate mpi"),
        ("train/state", "fn f() { unsafe_free(); mpi::initialize(); }", "names the crate mpi"),
        ("train/state", "use mpi as message_passing;", "names the crate mpi"),
        ("comm/mpi_like/x", "use hdf5::File;", "names the crate hdf5"),
        ("text/decode", "use hdf5_sys::h5f::H5Fopen;", "names the crate hdf5_sys"),
        ("text/decode", "fn f() { unsafe { g() } }", "text/decode has unsafe"),
        ("tensor_view/x", "let c = '\"'; use crate::cli; let d = \"\";", "tensor_view"),
        ("model/x", "// it's\nuse crate::infer::generate;", "uses infer::generate (L4)"),
        ("model/x", "let s = r#\"quote \" inside\"#; use crate::infer;", "uses infer (L4)"),
        ("model/x", "#[cfg(test)]\nmod tests { use crate::train::a; }\nuse crate::train::b;", "uses train::b (L4)"),
    ];
    for (name, text, expected) in bad {
        let found = found(name, text);
        assert!(found.iter().any(|line| line.contains(expected)), "{name}: {text}\nexpected {expected}, found {found:?}");
    }
    let good: &[(&str, &str)] = &[
        ("train/state", "use crate::model::chunk::Chunk; use crate::{error::{Error, Result}, train::batch};"),
        ("model/x", "//! see crate::train::pretrain\n/* use crate::runtime; */ const A: &str = \"use mpi::x; unsafe\";"),
        ("model/x", "use crate::device::Device;\n#[cfg(test)]\nmod tests {\n    use crate::runtime::Runtime;\n    fn f() { {} }\n}\n"),
        ("comm", "pub mod mpi; fn f() { mpi::world(); }"),
        ("comm/mpi", "use mpi::traits::*; fn f() { unsafe { g() } }"),
        ("runtime", "use crate::comm::mpi::World; fn f() { mpi::ffi::abort(); }"),
        ("train/state", "use crate::comm::mpi::World; fn f(x: X) { x.mpi(); }"),
        ("checkpoint/h5", "use hdf5::File; fn f<'a>(c: char) -> bool { c == '\\'' || c == '\"' }"),
        ("checkpoint/h5/types", "use hdf5_sys::h5t;"),
        ("recipe/check", "use crate::model::config::{ModelConfig, HeadKind};"),
        ("parallel/schedule/check", "use super::{Action, Schedule}; use super::super::layout::Coords;"),
    ];
    for (name, text) in good {
        assert_eq!(found(name, text), Vec::<String>::new(), "{name}: {text}");
    }
    let made_up = [("model/x", "mod tests;\nfn f<'a>(x: &'a str) {}\nuse crate::cli;")];
    assert_eq!(made_up.iter().flat_map(|(name, text)| found(name, text)).collect::<Vec<_>>(), ["model/x (L3) uses cli (L5)"]);
}
