//! Two checkpoints compared and several averaged, against the bits they were made of.

use crate::parts::*;
use std::path::Path;
use std::process::Command;
use trireme::checkpoint::compare::{self, Verdict};
use trireme::checkpoint::{self, Wanted};
use trireme::comm::solo::Solo;
use trireme::comm::threads;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::slice::Slice;
use trireme::tensor::{DType, Tensor};

fn save_whole(out: &Path, seed: u64) {
    save_parts(out, &meta(model(false), ParallelLayout::SINGLE, seed), &all_parts(), seed, &Solo::new()).unwrap();
}

/// Saved under A, loaded and saved under B, loaded and saved under A again: every tensor, moments too, has the bits of the first, and
/// the comparison says so. It would break with a lost row, and a comparison that never reads would not.
#[test]
fn resharding_there_and_back_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (a, b) = (ParallelLayout { tp: 2, pp: 2, dp: 1, vp: 1 }, ParallelLayout { tp: 1, pp: 1, dp: 3, vp: 1 });
    let pass_on = |from: Option<&str>, to: &str, layout: ParallelLayout| {
        threads::run(layout.world(), |world| {
            let parts = held(&model(false), &layout, world.rank());
            let values = from.map(|from| load_parts(&path(from), &parts).unwrap());
            let meta = meta(model(false), layout, 1);
            match values {
                Some(values) => save_values(&path(to), &meta, &parts, &values, &*world).unwrap(),
                None => save_parts(&path(to), &meta, &parts, 6, &*world).unwrap(),
            }
        });
    };
    pass_on(None, "a", a);
    pass_on(Some("a"), "b", b);
    pass_on(Some("b"), "again", a);
    let open = |name: &str| checkpoint::open(&path(name)).unwrap();
    for other in ["b", "again"] {
        let all = compare::diff(&open("a"), &open(other)).unwrap();
        assert_eq!(all.len(), all_parts().len());
        assert!(all.iter().all(|difference| difference.verdict == Verdict::Equal), "{all:?}");
    }
    let shards = |name: &str| ["shard-00000.h5", "shard-00003.h5"].map(|shard| std::fs::read(path(name).join(shard)).unwrap());
    assert!(shards("a") == shards("again"), "the same pieces are the same bytes");
}

/// Every difference is found where it is and as large as it is: one element by one ulp among equal ones, whole tensors, shapes, and
/// tensors that one of them lacks. The binary says the same and leaves with 1, or with 0 when all are equal.
#[test]
fn differences_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let shape = vec![700, 13_000]; // more than a block of the comparison
    let bits: Vec<u32> = (0..700 * 13_000u32).map(|i| (1.0 + f64::from(i % 1000) / 1000.0) as f32).map(f32::to_bits).collect();
    let part = |name: &str, shape: &[usize]| Part { name: name.into(), shape: shape.into(), slice: Slice::whole(shape), dtype: DType::F32 };
    let parts = [part("weights/big", &shape), part("weights/other", &[4]), part("weights/extra", &[2])];
    let mut values = vec![bits.clone(), vec![1, 2, 3, 4], vec![0, 0]];
    let meta = meta(model(false), ParallelLayout::SINGLE, 1);
    save_values(&path("a"), &meta, &parts, &values, &Solo::new()).unwrap();
    values[0][5_000_003] += 1;
    values[0][9_000_001] -= 3;
    values[1][2] |= 1 << 31;
    let without = [part("weights/big", &shape), part("weights/other", &[4])];
    save_values(&path("b"), &meta, &without, &values[..2], &Solo::new()).unwrap();
    let open = |name: &str| checkpoint::open(&path(name)).unwrap();
    let found: Vec<(String, Verdict)> =
        compare::diff(&open("a"), &open("b")).unwrap().into_iter().map(|difference| (difference.name, difference.verdict)).collect();
    let expected = [
        ("weights/big".to_string(), Verdict::Differs { n_elements: 2, max_ulp: 3, at: 9_000_001 }),
        ("weights/extra".to_string(), Verdict::OnlyInFirst),
        // From the third number above zero to the third below.
        ("weights/other".to_string(), Verdict::Differs { n_elements: 1, max_ulp: 6, at: 2 }),
    ];
    assert_eq!(found, expected);
    let run = |first: &str, second: &str| {
        Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint")).arg("diff").arg(path(first)).arg(path(second)).output().unwrap()
    };
    let (same, other) = (run("a", "a"), run("a", "b"));
    assert_eq!((same.status.code(), other.status.code()), (Some(0), Some(1)));
    assert!(String::from_utf8_lossy(&same.stdout).contains("3 tensors, all equal"), "{same:?}");
    let said = String::from_utf8_lossy(&other.stdout).into_owned();
    assert!(said.contains("weights/big    2 elements differ, by up to 3 ulp (element 9000001)"), "{said}");
    let error = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(error.contains("3 of 3 tensors differ, most of all weights/extra: only in the first"), "{error}");
    assert_eq!(run("a", "nothing").status.code(), Some(3));
}

/// The mean of three checkpoints is that of their master weights, in f64, rounded once to the type of the weights; moments stay
/// behind. Models or tokenizers that differ are refused.
#[test]
fn the_mean_of_several() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for seed in [3, 4, 5] {
        save_whole(&path(&seed.to_string()), seed);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint"))
        .arg("average")
        .args([path("3"), path("4"), path("5")])
        .arg("--out")
        .arg(path("mean"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let mean = checkpoint::open(&path("mean")).unwrap();
    assert!(!mean.has_optimizer_state() && mean.meta().step == 5 && mean.meta().tokenizer.is_some());
    let weights: Vec<Part> = all_parts().into_iter().filter(|part| part.name.starts_with("weights/")).collect();
    assert_eq!(mean.tensors().len(), weights.len());
    for part in weights {
        let mut tensor = Tensor::host(&part.shape, DType::BF16, None).unwrap();
        mean.read(&mut [Wanted { name: part.name.clone(), slice: Slice::whole(&part.shape), tensor: &mut tensor }]).unwrap();
        let master = part.name.replace("weights/", "master/");
        for (i, found) in tensor.bf16().iter().enumerate() {
            let exact: f64 = [3, 4, 5].map(|seed| f64::from(f32::from_bits(truth(seed, &master, i, DType::F32)))).iter().sum::<f64>() / 3.0;
            // The nearest bf16: no neighbour is nearer.
            let error = (found.to_f64() - exact).abs();
            for neighbour in [found.to_bits().wrapping_add(1), found.to_bits().wrapping_sub(1)].map(half::bf16::from_bits) {
                assert!(!(neighbour.to_f64() - exact).abs().lt(&error), "{} [{i}]: {found} for {exact}", part.name);
            }
        }
    }
    let mut other = model(true);
    save_parts(&path("tied"), &meta(other.clone(), ParallelLayout::SINGLE, 1), &held(&other, &ParallelLayout::SINGLE, 0), 1, &Solo::new())
        .unwrap();
    let open = |name: &str| checkpoint::open(&path(name)).unwrap();
    let error = compare::average(&[open("3"), open("tied")], &path("mixed")).unwrap_err();
    assert!(error.to_string().contains("has another model"), "{error}");
    assert!(!path("mixed").exists());
    other = model(false);
    let mut meta = meta(other, ParallelLayout::SINGLE, 1);
    meta.tokenizer = Some(b"another".to_vec());
    save_parts(&path("foreign"), &meta, &all_parts(), 1, &Solo::new()).unwrap();
    let error = compare::average(&[open("3"), open("foreign")], &path("mixed")).unwrap_err();
    assert!(error.to_string().contains("has another tokenizer"), "{error}");
}
