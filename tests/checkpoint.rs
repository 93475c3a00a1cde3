//! Checkpoints: saved under one layout and loaded under another, seen by h5py, damaged, interrupted. Truth is a formula
//! of the global index of an element, so no slice arithmetic of the library takes part in it.

mod oracles;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use trireme::artifact::Manifest;
use trireme::checkpoint::{self, Meta, Piece, Wanted};
use trireme::comm::solo::Solo;
use trireme::comm::{Communicator, threads};
use trireme::device::{Activation, NormKind};
use trireme::error::{Kind, Result};
use trireme::model::config::{HeadKind, ModelConfig};
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::rng::Random;
use trireme::tensor::{DType, Tensor};

fn model(tied_embeddings: bool) -> ModelConfig {
    ModelConfig {
        n_layers: 4,
        hidden: 24,
        n_heads: 8,
        n_kv_heads: 4,
        head_dim: 6,
        ffn_hidden: 20,
        vocab_size: 99,
        vocab_divisor: 8,
        max_tokens: 32,
        norm: NormKind::LayerNorm1P,
        norm_eps: 1e-5,
        activation: Activation::SquaredRelu,
        rotary_fraction: 0.5,
        rope_base: 10000.0,
        tied_embeddings,
        head: HeadKind::Vocabulary,
        init_std: 0.02,
    }
}

fn meta(model: ModelConfig, layout: ParallelLayout, step: u64) -> Meta {
    Meta {
        step,
        consumed_samples: 8 * step,
        model,
        layout,
        recipe: serde_json::json!({"train": {"seed": 7}}),
        data_fingerprint: "0123456789abcdef".into(),
        tokenizer: Some(b"not really a tokenizer".to_vec()),
        trainer: serde_json::json!({"updates": step}),
    }
}

/// The bits of element `index` (row-major in the whole tensor) of the tensor `name`; bf16 bits stand in the upper half.
fn truth(seed: u64, name: &str, index: usize, dtype: DType) -> u32 {
    let value = (Random::new(seed, name).normal(index as u64) as f32).to_bits();
    match dtype {
        DType::BF16 => round_to_bf16(value),
        _ => value,
    }
}

/// To nearest even, by integers alone: no code shared with the library's conversion. Finite values.
fn round_to_bf16(bits: u32) -> u32 {
    let half_way = 0x7fff + ((bits >> 16) & 1);
    (bits + half_way) & 0xffff_0000
}

/// Row-major global indices of a slice, by counting.
fn global_indices(shape: &[usize], slice: &Slice) -> Vec<usize> {
    let n: usize = slice.shape.iter().product();
    let at = |flat: usize| {
        let (mut rest, mut stride, mut index) = (flat, 1, 0);
        for d in (0..shape.len()).rev() {
            index += (slice.offset[d] + rest % slice.shape[d]) * stride;
            rest /= slice.shape[d];
            stride *= shape[d];
        }
        index
    };
    (0..n).map(at).collect()
}

fn tensor_of(bits: &[u32], dtype: DType) -> Tensor {
    let mut tensor = Tensor::host(&[bits.len().max(1)], dtype, None).unwrap();
    for (i, &bits) in bits.iter().enumerate() {
        match dtype {
            DType::BF16 => tensor.bf16_mut()[i] = half::bf16::from_bits((bits >> 16) as u16),
            DType::F32 => tensor.f32_mut()[i] = f32::from_bits(bits),
            DType::U32 => tensor.u32_mut()[i] = bits,
        }
    }
    tensor
}

fn bits_of(tensor: &Tensor) -> Vec<u32> {
    match tensor.dtype() {
        DType::BF16 => tensor.bf16().iter().map(|x| u32::from(x.to_bits()) << 16).collect(),
        DType::F32 => tensor.f32().iter().map(|x| x.to_bits()).collect(),
        DType::U32 => tensor.u32().to_vec(),
    }
}

struct Part {
    name: String,
    shape: Vec<usize>,
    slice: Slice,
    dtype: DType,
}

/// What a rank of a training job holds: weights of its tp slice (replicated over dp, norms over tp too), and the rows of
/// the optimizer state that it owns.
fn held(model: &ModelConfig, layout: &ParallelLayout, rank: usize) -> Vec<Part> {
    let at = layout.coords(rank);
    let mut parts: Vec<Part> = Vec::new();
    for spec in (0..layout.vp).flat_map(|chunk| model.chunk_specs(layout, at.pp, chunk)) {
        let mut add = |group: &str, slice: Slice, dtype| {
            let name = format!("{group}/{}", spec.name);
            if !parts.iter().any(|part: &Part| part.name == name) {
                parts.push(Part { name, shape: spec.shape.clone(), slice, dtype });
            }
        };
        add("weights", spec.tp_slice(at.tp, layout.tp), DType::BF16);
        for group in ["master", "adam_m", "adam_v"] {
            add(group, spec.dp_slice(layout, at), DType::F32);
        }
    }
    parts
}

fn save_parts(out: &Path, meta: &Meta, parts: &[Part], seed: u64, world: &dyn Communicator) -> Result<Manifest> {
    let value = |part: &Part| {
        let bits: Vec<u32> = global_indices(&part.shape, &part.slice).into_iter().map(|i| truth(seed, &part.name, i, part.dtype)).collect();
        tensor_of(&bits, part.dtype)
    };
    let tensors: Vec<Tensor> = parts.iter().map(value).collect();
    // An empty part still needs a tensor object, of which it takes no row.
    let views: Vec<_> = parts.iter().zip(&tensors).map(|(part, tensor)| tensor.rows(0..part.slice.n_elements())).collect();
    let pieces: Vec<Piece> = parts
        .iter()
        .zip(&views)
        .map(|(part, tensor)| Piece { name: part.name.clone(), global_shape: part.shape.clone(), slice: part.slice.clone(), tensor })
        .collect();
    checkpoint::save(out, meta, &pieces, world)
}

fn load_parts(from: &Path, parts: &[Part]) -> Result<Vec<Vec<u32>>> {
    let stored = checkpoint::open(from)?;
    let mut tensors: Vec<Tensor> = parts.iter().map(|part| tensor_of(&vec![0x7fc0_0000; part.slice.n_elements()], part.dtype)).collect();
    let mut views: Vec<_> = tensors.iter_mut().zip(parts).map(|(tensor, part)| tensor.rows_mut(0..part.slice.n_elements())).collect();
    let mut wanted: Vec<Wanted> =
        parts.iter().zip(&mut views).map(|(part, tensor)| Wanted { name: part.name.clone(), slice: part.slice.clone(), tensor }).collect();
    stored.read(&mut wanted)?;
    Ok(views.iter().map(|view| bits_of(view)).collect())
}

fn assert_true(parts: &[Part], values: &[Vec<u32>], seed: u64) {
    for (part, found) in parts.iter().zip(values) {
        let expected: Vec<u32> =
            global_indices(&part.shape, &part.slice).into_iter().map(|i| truth(seed, &part.name, i, part.dtype)).collect();
        assert!(*found == expected, "{} {:?}", part.name, part.slice);
    }
}

/// A checkpoint of `step` from two ranks, each with half of everything.
fn save_small(out: &Path, step: u64, seed: u64) {
    let layout = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    threads::run(2, |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(out, &meta(model(false), layout, step), &parts, seed, &*world).unwrap();
    });
}

fn all_parts() -> Vec<Part> {
    held(&model(false), &ParallelLayout::SINGLE, 0)
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What is saved under one layout loads bit for bit under another, weights and optimizer state alike, and back again: a
/// checkpoint is a set of hyper-rectangles and belongs to no layout. Breaks when a piece lands at a wrong offset, is
/// written by no rank or comes from a stale replica.
#[test]
fn any_layout_loads_what_any_other_saved() {
    let random = Random::new(20, "layout pairs");
    let layout = |i: u64| {
        let pick = |from: &[usize], k: u64| from[(random.bits(8 * i + k) % from.len() as u64) as usize];
        ParallelLayout { tp: pick(&[1, 2, 4], 0), pp: pick(&[1, 2], 1), dp: pick(&[1, 2, 3], 2), vp: pick(&[1, 2], 3) }
    };
    for case in 0..14 {
        let (a, b, model) = (layout(2 * case), layout(2 * case + 1), model(case % 2 == 1));
        let dir = tempfile::tempdir().unwrap();
        let path = |step: u64| dir.path().join(format!("step-{step:08}"));
        let save = |step: u64, layout: ParallelLayout| {
            threads::run(layout.world(), |world| {
                let parts = held(&model, &layout, world.rank());
                save_parts(&path(step), &meta(model.clone(), layout, step), &parts, case, &*world).unwrap()
            })
        };
        let load = |step: u64, layout: ParallelLayout| {
            threads::run(layout.world(), |world| {
                let parts = held(&model, &layout, world.rank());
                assert_true(&parts, &load_parts(&path(step), &parts).unwrap(), case);
            });
        };
        let manifests = save(1, a);
        assert!(manifests.windows(2).all(|pair| pair[0] == pair[1]), "ranks disagree about the manifest");
        load(1, b);
        save(2, b);
        load(2, a);
        let reread = checkpoint::open(&path(2)).unwrap();
        assert_eq!(*reread.meta(), meta(model.clone(), b, 2));
        assert!(reread.has_optimizer_state());
    }
}

/// Any sub-rectangle of a tensor of 1 to 4 dims, cut into random tiles, is assembled right, also across the blocks that
/// carry the checksums and with conversion in both directions.
#[test]
fn any_rectangle_of_any_tiling() {
    let random = Random::new(21, "rectangles");
    let mut counter = 0;
    let mut draw = |n: usize| {
        counter += 1;
        (random.bits(counter) % n as u64) as usize
    };
    for case in 0..30 {
        let n_dims = 1 + draw(4);
        let most = [1_500_000, 1300, 110, 34][n_dims - 1];
        let shape: Vec<usize> = (0..n_dims).map(|_| 1 + draw(most)).collect();
        let cuts: Vec<Vec<usize>> = shape
            .iter()
            .map(|&extent| {
                let mut cuts: Vec<usize> = (0..draw(3)).map(|_| draw(extent)).chain([0, extent]).collect();
                cuts.sort();
                cuts.dedup();
                cuts
            })
            .collect();
        let mut slices = vec![Slice { offset: vec![], shape: vec![] }];
        for cuts in &cuts {
            let extend = |slice: &Slice| {
                let with = |pair: &[usize]| {
                    let mut longer = slice.clone();
                    longer.offset.push(pair[0]);
                    longer.shape.push(pair[1] - pair[0]);
                    longer
                };
                cuts.windows(2).map(with).collect::<Vec<Slice>>()
            };
            slices = slices.iter().flat_map(extend).collect();
        }
        let stored_type = if draw(2) == 0 { DType::BF16 } else { DType::F32 };
        let name = "weights/some.tensor".to_string();
        let part = |slice: Slice, dtype| Part { name: name.clone(), shape: shape.clone(), slice, dtype };
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("c");
        let parts: Vec<Part> = slices.into_iter().map(|slice| part(slice, stored_type)).collect();
        save_parts(&out, &meta(model(false), ParallelLayout::SINGLE, 1), &parts, case, &Solo::new()).unwrap();
        for _ in 0..6 {
            let offset: Vec<usize> = shape.iter().map(|&extent| draw(extent)).collect();
            let extent = shape.iter().zip(&offset).map(|(&extent, &offset)| 1 + draw(extent - offset)).collect();
            let asked = if draw(2) == 0 { DType::BF16 } else { DType::F32 };
            let wanted = part(Slice { offset, shape: extent }, asked);
            let found = load_parts(&out, std::slice::from_ref(&wanted)).unwrap().remove(0);
            let convert = |bits| if asked == DType::BF16 { round_to_bf16(bits) } else { bits };
            let expected = global_indices(&shape, &wanted.slice).into_iter().map(|i| convert(truth(case, &name, i, stored_type)));
            assert!(found.into_iter().eq(expected), "{:?} of {shape:?}, {stored_type:?} as {asked:?}", wanted.slice);
        }
    }
}

/// h5py, which knows nothing of us, sees every tensor whole under its name with the right numbers: the point of the virtual
/// datasets. bf16 is a 2-byte float that it reads as float32. The working directory does not matter.
#[test]
fn h5py_sees_whole_tensors() {
    let Some(python) = oracles::python("h5py, numpy") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (out, dump) = (dir.path().join("step-00000003"), dir.path().join("dump"));
    std::fs::create_dir(&dump).unwrap();
    let layout = ParallelLayout { tp: 2, pp: 2, dp: 3, vp: 1 };
    threads::run(layout.world(), |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(&out, &meta(model(false), layout, 3), &parts, 5, &*world).unwrap();
    });
    let lines = oracles::run(&python, "h5py_dump.py", &[&out.join("index.h5"), &dump]);
    let attributes: BTreeMap<&str, &str> =
        lines.iter().filter(|line| line[0] == "attribute").map(|line| (line[1].as_str(), line[2].as_str())).collect();
    assert_eq!((attributes["step"], attributes["consumed_samples"]), ("3", "24"));
    assert_eq!(serde_json::from_str::<ModelConfig>(attributes["model"]).unwrap(), model(false));
    assert_eq!(serde_json::from_str::<ParallelLayout>(attributes["layout"]).unwrap(), layout);
    let seen: Vec<&Vec<String>> = lines.iter().filter(|line| line[0] == "dataset").collect();
    let parts: BTreeMap<String, Part> = all_parts().into_iter().map(|part| (part.name.clone(), part)).collect();
    assert_eq!(seen.len(), parts.len());
    for (n, line) in seen.into_iter().enumerate() {
        let part = &parts[&line[1]];
        let shape: Vec<String> = part.shape.iter().map(usize::to_string).collect();
        let bytes = part.dtype.bytes().to_string();
        assert_eq!(line[2..], [shape.join(","), "float32".into(), bytes, "True".into()], "{}", part.name);
        let found: Vec<u32> = oracles::read_f32(&dump.join(format!("{n}.bin"))).into_iter().map(f32::to_bits).collect();
        let expected: Vec<u32> = (0..found.len()).map(|i| truth(5, &part.name, i, part.dtype)).collect();
        assert!(found == expected, "{}", part.name);
    }
}

/// A missing or shortened shard is an error that names it. HDF5 alone would read zeros from a virtual dataset.
#[test]
fn missing_and_truncated_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 1);
    let shard = out.join("shard-00001.h5");
    let whole = std::fs::read(&shard).unwrap();
    for n in [0, 1, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&shard, &whole[..n]).unwrap();
        let error = load_parts(&out, &all_parts()).unwrap_err();
        assert!(error.to_string().contains("shard-00001.h5") && error.exit_code() == 3, "{error}");
    }
    std::fs::remove_file(&shard).unwrap();
    let error = load_parts(&out, &all_parts()).unwrap_err();
    assert!(error.to_string().contains("shard-00001.h5") && error.exit_code() == 3, "{error}");
    std::fs::write(&shard, &whole).unwrap();
    assert_true(&all_parts(), &load_parts(&out, &all_parts()).unwrap(), 1);
}

/// A flipped bit anywhere in any file of a checkpoint is found before a number reaches a tensor, by loading as by
/// verifying, and the file is named. In the manifest a flip may hit what means nothing (blanks, the time of writing, the
/// producer): then what is loaded must still be the truth.
#[test]
fn a_flipped_bit_is_never_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 2);
    let random = Random::new(22, "flips");
    let files = entries(&out);
    assert_eq!(files, ["index.h5", "manifest.json", "pieces.json", "shard-00000.h5", "shard-00001.h5", "tokenizer.model"]);
    for (n, name) in files.iter().enumerate() {
        let path = out.join(name);
        let whole = std::fs::read(&path).unwrap();
        for case in 0..40 {
            let draw = random.bits((n * 100 + case) as u64);
            let (byte, bit) = (draw as usize % whole.len(), draw >> 61);
            let mut damaged = whole.clone();
            damaged[byte] ^= 1 << bit;
            std::fs::write(&path, &damaged).unwrap();
            let loaded = load_parts(&out, &all_parts());
            match (name.as_str(), loaded) {
                ("manifest.json", Ok(values)) => {
                    assert_true(&all_parts(), &values, 2);
                    let found = checkpoint::open(&out).unwrap();
                    assert_eq!(*found.meta(), meta(model(false), ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 }, 1));
                }
                (_, Ok(_)) => panic!("bit {bit} of byte {byte} of {name} was not noticed"),
                ("manifest.json", Err(error)) => assert_eq!(error.kind(), Kind::File, "{error}"),
                (_, Err(error)) => {
                    assert!(error.to_string().contains(name) && error.exit_code() == 3, "{error}");
                    let report = checkpoint::verify(&out).unwrap();
                    let bad: Vec<&str> = report.iter().filter(|(_, state)| state.is_err()).map(|(file, _)| file.name.as_str()).collect();
                    assert_eq!(bad, [name.as_str()]);
                }
            }
        }
        std::fs::write(&path, &whole).unwrap();
    }
    assert!(checkpoint::verify(&out).unwrap().iter().all(|(_, state)| state.is_ok()));
}

/// A part of a tensor is loaded though another part of it, which was not asked for, is damaged: only what is needed is
/// read. The damaged part is refused.
#[test]
fn only_the_needed_bytes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    let shape = vec![3 << 20, 1];
    let part = |rows: std::ops::Range<usize>| Part {
        name: "weights/long".into(),
        shape: shape.clone(),
        slice: Slice { offset: vec![rows.start, 0], shape: vec![rows.len(), 1] },
        dtype: DType::F32,
    };
    save_parts(&out, &meta(model(false), ParallelLayout::SINGLE, 1), &[part(0..3 << 20)], 3, &Solo::new()).unwrap();
    let shard = out.join("shard-00000.h5");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 5000;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let first = part(1000..2 << 20);
    let values = load_parts(&out, std::slice::from_ref(&first)).unwrap();
    assert_true(&[first], &values, 3);
    assert!(load_parts(&out, &[part(2 << 20..3 << 20)]).unwrap_err().to_string().contains("shard-00000.h5"));
}

/// Of a run, the newest checkpoint that is whole is opened: damage and unfinished directories are passed over.
#[test]
fn a_run_falls_back_to_an_older_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    assert_eq!(checkpoint::latest(run).unwrap(), None);
    let folder = run.join("checkpoints");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(checkpoint::latest(run).unwrap(), None);
    let error = checkpoint::open(run).map(drop).unwrap_err();
    assert!(error.to_string().contains("has no checkpoint yet"), "{error}");
    for step in [90, 100, 1000] {
        save_small(&folder.join(format!("step-{step:08}")), step, step);
    }
    std::fs::create_dir(folder.join("step-00002000.tmp-77")).unwrap();
    std::fs::create_dir(folder.join("step-00003000")).unwrap(); // a crash of something else
    assert_eq!(checkpoint::open(run).unwrap().meta().step, 1000);
    let newest = folder.join("step-00001000");
    std::fs::remove_file(newest.join("shard-00000.h5")).unwrap();
    assert_eq!(checkpoint::latest(run).unwrap(), Some(folder.join("step-00000100")));
    assert_true(&all_parts(), &load_parts(run, &all_parts()).unwrap(), 100);
    // The resumed run comes by the damaged one again: it is moved away, not trusted and not in the way.
    save_small(&newest, 1000, 1000);
    assert_true(&all_parts(), &load_parts(run, &all_parts()).unwrap(), 1000);
    assert!(entries(&folder).contains(&"damaged-0-step-00001000".to_string()), "{:?}", entries(&folder));
    for step in [90, 100, 1000] {
        std::fs::remove_file(folder.join(format!("step-{step:08}/manifest.json"))).unwrap();
    }
    assert_eq!(checkpoint::open(run).map(drop).unwrap_err().exit_code(), 3);
}

/// Questions that a checkpoint cannot answer are refused with both sides named.
#[test]
fn unanswerable_questions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (full, bare) = (dir.path().join("full"), dir.path().join("bare"));
    save_small(&full, 1, 4);
    let weights: Vec<Part> = all_parts().into_iter().filter(|part| part.name.starts_with("weights/")).collect();
    save_parts(&bare, &meta(model(false), ParallelLayout::SINGLE, 0), &weights, 4, &Solo::new()).unwrap();
    let ask = |from: &Path, name: &str, slice: Slice| {
        let part = Part { name: name.into(), shape: slice.shape.clone(), slice, dtype: DType::F32 };
        load_parts(from, &[part]).unwrap_err().to_string()
    };
    let error = ask(&full, "weights/layers.0.attention.qvk.weight", Slice::whole(&[96, 24]));
    assert!(error.contains("nearest is weights/layers.0.attention.qkv.weight"), "{error}");
    let error = ask(&full, "weights/final_norm.bias", Slice::whole(&[25]));
    assert!(error.contains("is [24], asked for [25]"), "{error}");
    let error = ask(&bare, "adam_m/final_norm.bias", Slice::whole(&[24]));
    assert!(error.contains("holds weights only"), "{error}");
    assert!(!checkpoint::open(&bare).unwrap().has_optimizer_state());
    let error = checkpoint::open(&dir.path().join("nothing")).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 3);
}

/// The same checkpoint saved again is left as it is; other contents under the same name are refused.
#[test]
fn finished_checkpoints_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    save_small(&out, 1, 1);
    let before = std::fs::metadata(out.join("shard-00000.h5")).unwrap().modified().unwrap();
    save_small(&out, 1, 1);
    assert_eq!(std::fs::metadata(out.join("shard-00000.h5")).unwrap().modified().unwrap(), before);
    let mut other = meta(model(false), ParallelLayout::SINGLE, 1);
    other.recipe = serde_json::json!({"train": {"seed": 8}});
    let error = save_parts(&out, &other, &all_parts(), 1, &Solo::new()).unwrap_err();
    assert!(error.to_string().contains("other settings"), "{error}");
    assert_eq!(entries(dir.path()), ["c"]);
}

/// Equal contents are equal bytes, whenever they are written: fingerprints name contents. Breaks when HDF5 stores times.
#[test]
fn equal_contents_have_equal_fingerprints() {
    let dir = tempfile::tempdir().unwrap();
    save_small(&dir.path().join("a"), 1, 1);
    std::thread::sleep(std::time::Duration::from_millis(1100)); // HDF5 counts seconds
    save_small(&dir.path().join("b"), 1, 1);
    let fingerprint = |name: &str| Manifest::open(&dir.path().join(name), checkpoint::KIND).unwrap().fingerprint;
    assert_eq!(fingerprint("a"), fingerprint("b"));
}

/// A child process of this test, told by the environment what to do; its standard output.
fn child(test: &str, shell_prefix: &str, dir: &Path) -> std::process::Child {
    let me = std::env::current_exe().unwrap();
    let line = format!("{shell_prefix} exec '{}' --exact {test} --nocapture", me.display());
    std::process::Command::new("bash")
        .args(["-c", &line])
        .env("TRIREME_TEST_CHILD", dir)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

fn as_child() -> Option<PathBuf> {
    std::env::var_os("TRIREME_TEST_CHILD").map(PathBuf::from)
}

/// Saves step 2 on two ranks and prints what each of them got.
fn save_and_tell(folder: &Path) {
    let layout = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    let results = threads::run(2, |world| {
        let parts = held(&model(false), &layout, world.rank());
        save_parts(&folder.join("step-00000002"), &meta(model(false), layout, 2), &parts, 2, &*world)
    });
    for result in results {
        println!("rank got: {}", result.map_or_else(|error| format!("{} {error}", error.exit_code()), |_| "saved".into()));
    }
}

fn assert_unharmed(run: &Path, results: &[String], limit: &str) {
    let folder = run.join("checkpoints");
    assert_eq!(results.len(), 2, "{limit}: {results:?}");
    assert_eq!(results[0], results[1], "{limit}: the ranks left by different doors");
    if results[0] == "saved" {
        assert_eq!(entries(&folder), ["step-00000001", "step-00000002"], "{limit}");
        assert_true(&all_parts(), &load_parts(&folder.join("step-00000002"), &all_parts()).unwrap(), 2);
    } else {
        assert_eq!(entries(&folder), ["step-00000001"], "{limit}: {results:?}");
    }
    assert_true(&all_parts(), &load_parts(&folder.join("step-00000001"), &all_parts()).unwrap(), 1);
}

fn results_of(child: std::process::Child) -> Vec<String> {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let results: Vec<String> = text.lines().filter_map(|line| line.split_once("rank got: ")).map(|(_, result)| result.into()).collect();
    assert!(!results.is_empty(), "the child said {text} {}", String::from_utf8_lossy(&output.stderr));
    results
}

/// A save that fails at the n-th kilobyte of a file (the limit on file sizes stands in for every write error) gives all
/// ranks the same error, leaves the previous checkpoint loadable, and nothing under the name of the new one.
#[test]
fn a_failing_write_leaves_nothing_behind() {
    if let Some(folder) = as_child() {
        return save_and_tell(&folder);
    }
    let mut failures = 0;
    for kilobytes in [0, 1, 3, 20, 60, 100, 140, 100_000] {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join("checkpoints");
        save_small(&folder.join("step-00000001"), 1, 1);
        let results = results_of(child("a_failing_write_leaves_nothing_behind", &format!("trap '' XFSZ; ulimit -f {kilobytes};"), &folder));
        println!("{kilobytes} KB: {}", results[0]);
        failures += usize::from(results[0] != "saved");
        assert_unharmed(run.path(), &results, &format!("{kilobytes} KB"));
    }
    assert!((4..8).contains(&failures), "{failures} of 8 limits bit");
}

/// A disk that fills up at any point of a save: error with the remedy, exit code 3, on all ranks; nothing left behind.
#[test]
fn a_full_disk_is_an_error_with_a_remedy() {
    if let Some(folder) = as_child() {
        save_small(&folder.join("step-00000001"), 1, 1);
        // The small file system is filled until so many percent of what a checkpoint needs are left.
        let percent: u64 = std::env::var("TRIREME_TEST_REST").unwrap().parse().unwrap();
        let pages = |name: &String| std::fs::metadata(folder.join("step-00000001").join(name)).unwrap().len().div_ceil(4096);
        let rest = entries(&folder.join("step-00000001")).iter().map(pages).sum::<u64>() * percent / 100;
        let ballast = std::fs::File::create(folder.join("../ballast")).unwrap();
        let block = [0u8; 4096];
        while std::io::Write::write_all(&mut &ballast, &block).is_ok() {}
        let filled = ballast.metadata().unwrap().len();
        ballast.set_len(filled.saturating_sub(rest * 4096)).unwrap();
        save_and_tell(&folder);
        assert_true(&all_parts(), &load_parts(&folder.join("step-00000001"), &all_parts()).unwrap(), 1);
        return println!("left: {}", entries(&folder).join(" "));
    }
    let possible = std::process::Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return println!("skipped: no permission to mount a small tmpfs in a namespace of its own");
    }
    for rest in [0, 1, 10, 40, 60, 75, 85, 92, 97] {
        let dir = tempfile::tempdir().unwrap();
        let me = std::env::current_exe().unwrap();
        let (place, test) = (dir.path().display(), "a_full_disk_is_an_error_with_a_remedy");
        let line = format!(
            "mount -t tmpfs -o size=1m tmpfs '{place}' && TRIREME_TEST_CHILD='{place}/checkpoints' TRIREME_TEST_REST={rest} \
             exec '{}' --exact {test} --nocapture",
            me.display()
        );
        let output = std::process::Command::new("unshare").args(["-m", "bash", "-c", &line]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let results: Vec<&str> = text.lines().filter_map(|line| line.split_once("rank got: ")).map(|(_, result)| result).collect();
        assert!(text.contains("left: step-00000001\n"), "{text} {}", String::from_utf8_lossy(&output.stderr));
        println!("{rest} %: {}", results[0]);
        assert_eq!(results.len(), 2);
        assert_eq!(results[0], results[1]);
        assert!(results[0].starts_with("3 ") && results[0].contains("free some space"), "{rest}: {}", results[0]);
    }
}

/// SIGKILL at any moment leaves a run whose newest checkpoint is whole and holds the truth: a directory has its final
/// name only after everything in it is on the disk.
#[test]
fn a_killed_save_leaves_whole_checkpoints() {
    if let Some(folder) = as_child() {
        for step in 1.. {
            save_small(&folder.join(format!("step-{step:08}")), step, step);
            println!("saved {step}");
        }
    }
    let random = Random::new(23, "kill times");
    let run = tempfile::tempdir().unwrap();
    let folder = run.path().join("checkpoints");
    std::fs::create_dir(&folder).unwrap();
    for case in 0..6 {
        let mut process = child("a_killed_save_leaves_whole_checkpoints", "", &folder);
        // Killed at some moment after the first save of this life; how many more there are does not matter.
        let mut told = String::new();
        let mut lines = std::io::BufReader::new(process.stdout.take().unwrap());
        while !told.contains("saved") {
            assert!(std::io::BufRead::read_line(&mut lines, &mut told).unwrap() > 0, "the child ended: {told}");
        }
        std::thread::sleep(std::time::Duration::from_micros(random.bits(case) % 30_000));
        process.kill().unwrap();
        process.wait().unwrap();
        let newest = checkpoint::open(run.path()).unwrap();
        let step = newest.meta().step;
        assert_true(&all_parts(), &load_parts(run.path(), &all_parts()).unwrap(), step);
        for name in entries(&folder).iter().filter(|name| name.starts_with("step-") && !name.contains(".tmp-")) {
            assert!(Manifest::open(&folder.join(name), checkpoint::KIND).is_ok(), "{name} is not whole");
        }
    }
    // Whoever writes a checkpoint next removes what a killed job left of it.
    for name in entries(&folder).iter().filter_map(|name| name.split_once(".tmp-")).map(|(name, _)| name) {
        let step = name["step-".len()..].parse().unwrap();
        save_small(&folder.join(name), step, step);
    }
    assert!(!entries(&folder).iter().any(|name| name.contains(".tmp-")), "{:?}", entries(&folder));
}
