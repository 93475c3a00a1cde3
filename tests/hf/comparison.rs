//! `--verify`: what it takes for the same, and that it sees every difference.

use crate::parts::{LLAMA, NEMOTRON, all_of, checkpoint_program, mixed, write_hf};
use serde_json::{Value, json};
use std::path::Path;
use trireme::checkpoint;
use trireme::checkpoint::hf::{self, ExportType, Source};
use trireme::device::cpu::Cpu;
use trireme::error::{Kind, Result};
use trireme::infer::verify::{self, Compared};

/// The two sides, opened.
pub fn compare(hf_dir: &Path, checkpoint: &Path, dtype: ExportType) -> Result<Compared> {
    verify::compare(&Cpu::new(), Source::open(hf_dir).unwrap(), checkpoint::open(checkpoint).unwrap(), dtype)
}

/// Import and export of every type, in one file and in several, of either family, tied or not, and of a reward model are found the same
/// through both sides, and all weights and outputs were looked at.
#[test]
fn what_was_written_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut tied = NEMOTRON();
    tied["tie_word_embeddings"] = json!(true);
    type DtypeOf = fn(&str) -> &'static str;
    let cases: [(&str, Value, DtypeOf, usize, [usize; 2]); 3] = [
        ("nemotron", NEMOTRON(), mixed, 1, [2 * (2 * 10 + 40 * 10 + 10 * 24 + 2 * 10 + 2 * 14 * 10) + 2 * 10 + 2 * 37 * 10, 20 * 37]),
        ("tied", tied, |_| "F16", 3, [2 * (2 * 10 + 40 * 10 + 10 * 24 + 2 * 10 + 2 * 14 * 10) + 2 * 10 + 2 * 37 * 10, 20 * 37]),
        ("llama", LLAMA(), |_| "BF16", 2, [4 * 8 * 8 + 3 * 11 * 8 + 3 * 8 + 128 * 8, 20 * 128]),
    ];
    for (name, config, dtype_of, n_files, [n_weights, n_outputs]) in cases {
        let (source, imported) = (at(name), at(&format!("{name}-c")));
        write_hf(&source, &config, dtype_of, n_files);
        hf::import(&source, &imported).unwrap();
        let expected = Compared { n_sequences: 3, n_outputs, n_weights };
        // A tied embedding is read in both layers where it ends the last and begins the first, and so counted twice.
        assert_eq!(compare(&source, &imported, ExportType::AsStored), Ok(expected), "{name}");
        for dtype in [ExportType::AsStored, ExportType::F32, ExportType::Bf16, ExportType::F16] {
            let out = at(&format!("{name}-{dtype:?}"));
            hf::export_in_files(&imported, &out, dtype, 1000).unwrap();
            assert!(out.join("model.safetensors.index.json").exists());
            assert_eq!(compare(&out, &imported, dtype), Ok(expected), "{name} {dtype:?}");
        }
    }
    let reward = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/nemotron-reward");
    hf::import(&reward, &at("reward-c")).unwrap();
    assert_eq!(compare(&reward, &at("reward-c"), ExportType::AsStored).unwrap().n_outputs, 3 * 5);
}

/// One bit of one weight, one number of the config, or an export of another type: an error of kind Numeric (exit code 4) that names
/// the weight and both values. Values that rounding makes equal are equal: a bf16 export is compared with the rounded checkpoint.
#[test]
fn every_difference_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_hf(&at("hf"), &NEMOTRON(), all_of("F32"), 1);
    hf::import(&at("hf"), &at("c")).unwrap();
    let path = at("hf").join("model.safetensors");
    let sound = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(sound[8..header].to_vec()).unwrap();
    let offsets: Value = serde_json::from_str(&text).unwrap();
    let cases = [
        ("model.embed_tokens.weight", 36 * 10 + 9, "embedding.weight[36, 9]"),
        ("lm_head.weight", 0, "head.weight[0, 0]"),
        ("model.norm.bias", 3, "final_norm.bias[3, 0]"),
        // Row 2 of key head 1: after two groups of queries, a key and a value head, and two more groups.
        ("model.layers.1.self_attn.k_proj.weight", (4 + 2) * 10 + 7, "layers.1.attention.qkv.weight[34, 7]"),
    ];
    for (name, index, said) in cases {
        let mut bytes = sound.clone();
        bytes[header + offsets[name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = compare(&at("hf"), &at("c"), ExportType::AsStored).unwrap_err();
        assert!(error.kind() == Kind::Numeric && error.to_string().contains(said), "{name}: {error}");
    }
    std::fs::write(&path, &sound).unwrap();
    let mut other = NEMOTRON();
    other["rope_theta"] = json!(5000.0);
    std::fs::write(at("hf").join("config.json"), other.to_string()).unwrap();
    let error = compare(&at("hf"), &at("c"), ExportType::AsStored).unwrap_err();
    assert!(error.kind() == Kind::Numeric && error.to_string().contains("rope_base: 5000.0"), "{error}");
    // The values of these tests are exact in bf16; a third is not.
    let mut third = sound.clone();
    third[header..header + 4].copy_from_slice(&(1.0f32 / 3.0).to_le_bytes());
    std::fs::write(&path, &third).unwrap();
    std::fs::write(at("hf").join("config.json"), NEMOTRON().to_string()).unwrap();
    hf::import(&at("hf"), &at("third")).unwrap();
    hf::export(&at("third"), &at("rounded"), ExportType::Bf16).unwrap();
    assert!(compare(&at("rounded"), &at("third"), ExportType::Bf16).is_ok());
    let error = compare(&at("rounded"), &at("third"), ExportType::AsStored).unwrap_err();
    assert!(error.to_string().contains("embedding.weight[0, 0] is 0.33333334 here and 0.33398438 there, as are 1 of 370"), "{error}");
}

/// The programs: the same is exit code 0 and said; another bit in what was exported before is exit code 4 and one line, also when there
/// is nothing left to export.
#[test]
fn exit_codes_of_comparisons() {
    let dir = tempfile::tempdir().unwrap();
    write_hf(&dir.path().join("hf"), &LLAMA(), all_of("BF16"), 1);
    let run = |line: &str| {
        let output = checkpoint_program(dir.path(), line);
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, out, err) = run("import hf --out c --verify");
    assert!(code == Some(0) && out.contains("outputs of 3 token sequences, all the same bits"), "{out}{err}");
    let (code, out, err) = run("export c --out e --dtype f32 --verify");
    assert!(code == Some(0) && out.contains("all the same bits"), "{out}{err}");
    let path = dir.path().join("e/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    std::fs::write(&path, bytes).unwrap();
    let (code, _, err) = run("export c --out e --dtype f32 --verify");
    assert!(code == Some(4) && err.lines().count() == 1, "{err}");
    assert!(err.contains("comparing c with e: ") && err.contains("final_norm.weight[7, 0] is "), "{err}");
}
