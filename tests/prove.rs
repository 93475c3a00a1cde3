//! trireme-prove: what it calls right is right (equal bits under mpirun in reproducible mode, PyTorch's gradients from tests/goldens),
//! what is wrong it finds (another seed, one bit, a rank that disagrees, a gradient off by a thousandth), and bad input has its line and
//! exit code.

mod common;

use common::tiny_recipe;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trireme::checkpoint::hf;
use trireme::comm::{Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::prove::layouts::{self, ProofSize, STEPS};
use trireme::prove::steps::{self, Trace};
use trireme::prove::table::{Differences, Judge, Table};
use trireme::recipe::{Mode, Precision, Pretrain, Recompute, RecomputePlan, RecomputeRange, ScheduleKind};
use trireme::tensor::DType;

const BINARY: &str = env!("CARGO_BIN_EXE_trireme-prove");

/// The binary on so many ranks.
fn prove(n_ranks: usize, args: &[&str]) -> Output {
    let mut command = Command::new(if n_ranks > 1 { "mpirun" } else { BINARY });
    if n_ranks > 1 {
        let n = n_ranks.to_string();
        command.args(["-n", &n, "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", BINARY]);
    }
    command.args(args).env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.output().expect("mpirun and the binary start")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn assert_refused(output: &Output, code: i32, fragments: &[&str]) {
    let all = text(output);
    assert_eq!(output.status.code(), Some(code), "{all}");
    let errors: Vec<&str> = all.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "one line, not:\n{all}");
    for fragment in fragments {
        assert!(errors[0].contains(fragment), "{:?} does not say {fragment:?}", errors[0]);
    }
}

/// The whole of a user's proof, on 2 and 4 ranks: reproducible numerics are equal in every bit under tp, pp, vp and dp in f32 and
/// bf16, and exit with 0. Were one gradient, weight, loss or norm of one rank another, the row would say so and the exit be 4.
#[test]
fn reproducible_layouts_are_equal() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("recipe.toml");
    // Phases, ramp and warm-up of billions do not matter, shards need not be there.
    let mut recipe = tiny_recipe(Path::new("/no/such/shards"));
    recipe.numerics.mode = Mode::Reproducible;
    recipe.optimizer.warmup_samples = 16;
    std::fs::write(&path, recipe.to_toml()).unwrap();
    let path = path.to_str().unwrap();
    let cases: &[(usize, &[&str], usize)] = &[
        (2, &["parallel.tp=2"], 1),
        (2, &["parallel.pp=2", "parallel.sequence_parallel=false"], 2),
        (4, &["parallel.pp=2", "parallel.vp=2", "parallel.schedule=interleaved", "train.precision=bf16"], 4),
        (4, &["parallel.tp=2", "model.tied_embeddings=true", "train.precision=bf16", "batch.micro=2"], 1),
    ];
    for (n_ranks, sets, n_layers) in cases {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let output = prove(*n_ranks, &["--recipe", path].into_iter().chain(sets).collect::<Vec<_>>());
        let all = text(&output);
        assert_eq!(output.status.code(), Some(0), "{all}");
        assert!(all.contains(&format!("{n_layers} layers, 3 steps")), "{all}");
        let n_equal = all.lines().filter(|line| line.ends_with(" equal")).count();
        let tied = usize::from(all.lines().all(|line| !line.starts_with("gradient head.weight")));
        // 8 parameters a layer, final norm (2), embedding and head; gradients and weights; loss and norm of three steps.
        assert_eq!(n_equal, 2 * (8 * n_layers + 4 - tied) + 6, "{all}");
    }
}

/// Fast numerics, whose sums have other orders: bits differ (else the proof compared nothing with nothing), and stay within the
/// derived tolerance, f32 and bf16.
#[test]
fn fast_layouts_stay_within_tolerance() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("recipe.toml");
    std::fs::write(&path, tiny_recipe(Path::new("/no/such/shards")).to_toml()).unwrap();
    for (n_ranks, precision) in [(2, "f32"), (4, "f32"), (4, "bf16")] {
        let precision = format!("train.precision={precision}");
        let args = ["--recipe", path.to_str().unwrap(), "--set", "parallel.tp=2", "--set", &precision, "--layers", "2"];
        let output = prove(n_ranks, &args);
        let all = text(&output);
        assert_eq!(output.status.code(), Some(0), "{all}");
        assert!(all.lines().filter(|line| line.ends_with(" within")).count() > 10, "{all}");
    }
}

fn reproducible() -> Pretrain {
    let mut recipe = tiny_recipe(Path::new("unused"));
    recipe.numerics.mode = Mode::Reproducible;
    recipe.parallel.tp = 2;
    layouts::plan(&recipe, ProofSize::default(), 2).unwrap().0
}

/// Two ranks' trace of `recipe`, changed by `spoil`, against rank 0's own with `alone`.
fn table_of(recipe: &Pretrain, alone: &Pretrain, spoil: &(dyn Fn(usize, &mut Trace) + Sync)) -> Table {
    let tables = threads::run(2, |world| {
        let rank = world.rank();
        let groups = Groups::new(world, recipe.check(2).unwrap());
        let device = Cpu::new();
        let mut divided = steps::run(recipe, &device, &groups, STEPS).unwrap();
        spoil(rank, &mut divided);
        let alone = (rank == 0).then(|| layouts::run_alone(alone, &device).unwrap());
        layouts::compare(recipe, &groups, &divided, alone.as_ref())
    });
    tables.into_iter().next().unwrap().expect("on rank 0")
}

fn failed(table: &Table) -> Vec<&str> {
    table.rows.iter().filter(|row| !row.holds(table.judge)).map(|row| row.name.as_str()).collect()
}

/// What is wrong is found: a run of another seed in (nearly) every row, by bits and by norms; one bit of one gradient on one rank in
/// its row alone, one ulp; a norm's gradient that was not summed over the ranks of a tensor-parallel group, the classic silent bug;
/// a rank that holds another weight than its replica. Untouched, the same table holds.
#[test]
fn wrong_results_are_found() {
    let recipe = reproducible();
    let right = table_of(&recipe, &recipe, &|_, _| {});
    assert_eq!(failed(&right), Vec::<&str>::new());
    assert!(right.verdict().is_ok() && right.rows.iter().all(|row| row.max_ulp == 0 && row.norm_relative == 0.0));

    let mut other = recipe.clone();
    other.train.seed += 1;
    for judge in [Judge::Bits, Judge::Norms] {
        let table = Table { judge, ..table_of(&recipe, &other, &|_, _| {}) };
        let n_gradients = failed(&table).iter().filter(|name| name.starts_with("gradient layers.")).count();
        assert_eq!(n_gradients, 8, "{table}");
        assert_eq!(table.verdict().unwrap_err().exit_code(), 4);
    }

    let one_bit = |rank: usize, trace: &mut Trace| {
        let values = &mut trace.gradients.get_mut("layers.0.mlp.up.weight").unwrap()[0].values;
        if rank == 1 {
            values[7] = f32::from_bits(values[7].to_bits() ^ 1);
        }
    };
    let table = table_of(&recipe, &recipe, &one_bit);
    assert_eq!(failed(&table), ["gradient layers.0.mlp.up.weight"], "{table}");
    let row = table.rows.iter().find(|row| row.n_unequal > 0).unwrap();
    assert_eq!((row.n_unequal, row.max_ulp), (1, 1));
    let error = table.verdict().unwrap_err();
    assert!(error.exit_code() == 4 && error.to_string().contains("layers.0.mlp.up.weight"), "{error}");

    let not_summed = |_: usize, trace: &mut Trace| {
        trace.gradients.get_mut("layers.0.mlp_norm.weight").unwrap()[0].values.iter_mut().for_each(|value| *value *= 0.5);
    };
    let table = Table { judge: Judge::Norms, ..table_of(&recipe, &recipe, &not_summed) };
    assert_eq!(failed(&table), ["gradient layers.0.mlp_norm.weight"], "{table}");

    // Rank 1's copy comes last where parts are joined, rank 0's first: either is seen.
    for wrong_rank in [0, 1] {
        let disagrees = |rank: usize, trace: &mut Trace| {
            if rank == wrong_rank {
                trace.weights.get_mut("final_norm.bias").unwrap()[0].values[3] += 1.0;
            }
        };
        let table = table_of(&recipe, &recipe, &disagrees);
        assert_eq!(failed(&table), ["weight final_norm.bias"], "{table}");
        let by_norms = Table { judge: Judge::Norms, ..table };
        assert_eq!(failed(&by_norms), ["weight final_norm.bias"], "{by_norms}");
    }
}

/// Ulps are steps of the type: next to each other 1, across zero the sum, -0 and 0 none (but other bits); a NaN is never within.
#[test]
fn differences_are_counted_in_steps_of_the_type() {
    let row = |dtype, a: f32, b: f32| {
        let mut differences = Differences::new(dtype);
        differences.add(&[1.0, a], &[1.0, b]);
        differences.row("x", 1e-3)
    };
    let (tiny, bf16_step) = (f32::from_bits(1), f32::from_bits(0x3f81_0000));
    let cases = [
        (DType::F32, 1.0, f32::from_bits(0x3f80_0001), 1),
        (DType::F32, tiny, -tiny, 2),
        (DType::F32, 0.0, -0.0, 0),
        (DType::BF16, 1.0, bf16_step, 1),
        (DType::BF16, 1.0, -1.0, 2 * 0x3f80),
    ];
    for (dtype, a, b, ulps) in cases {
        let row = row(dtype, a, b);
        assert_eq!((row.max_ulp, row.n_unequal), (ulps, 1), "{dtype:?} {a} {b}");
    }
    for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::INFINITY, 1.0), (1.0, f32::INFINITY)] {
        assert!(!row(DType::F32, a, b).holds(Judge::Norms), "{a} {b}");
    }
    assert!(row(DType::F32, 1.0001, 1.0).holds(Judge::Norms) && !row(DType::F32, 1.01, 1.0).holds(Judge::Norms));
}

/// A small recipe keeps what rounding depends on, and each layer what the layer at its place makes again; lists of layers and batch
/// ramps of the whole run do not get in the way.
#[test]
fn recipes_are_scaled_down() {
    let mut recipe = tiny_recipe(Path::new("unused"));
    recipe.model.n_layers = 12;
    (recipe.parallel.pp, recipe.parallel.vp, recipe.parallel.schedule) = (2, 2, ScheduleKind::Interleaved);
    recipe.parallel.layers = Some(trireme::recipe::Layers::List(vec![2, 4, 4, 2]));
    let full = RecomputeRange { layers: "0..6".into(), kind: Recompute::Full };
    recipe.train.recompute = RecomputePlan::Ranges(vec![full]);
    recipe.train.precision = Precision::Bf16;
    let (small, layout) = layouts::plan(&recipe, ProofSize::default(), 4).unwrap();
    assert_eq!((small.model.n_layers, small.batch.global, layout.dp), (4, 8, 2));
    assert_eq!(small.train.recompute.of_layers(4).unwrap(), [Recompute::Full, Recompute::Full, Recompute::None, Recompute::None]);
    assert_eq!((small.model.hidden, small.batch.micro, small.train.precision), (24, 1, Precision::Bf16));
    for size in [ProofSize { layers: Some(0), samples: None }, ProofSize { layers: None, samples: Some(3) }] {
        assert_eq!(layouts::plan(&recipe, size, 4).unwrap_err().exit_code(), 2);
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The f32 tensors of a file, and i32 ones as f32.
fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let value = |dtype, b: &[u8]| match dtype {
        safetensors::Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
        safetensors::Dtype::I32 => i32::from_le_bytes(b.try_into().unwrap()) as f32,
        other => panic!("{other:?}"),
    };
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.shape().to_vec(), view.data().chunks(4).map(|b| value(view.dtype(), b)).collect()))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())).collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// |a - b| / |b|
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// A variant of tests/goldens: its checkpoint, its batch, and PyTorch's loss and gradients as a user would save them.
struct Golden {
    tmp: tempfile::TempDir,
    torch: Tensors,
}

impl Golden {
    fn new(variant: &str) -> Golden {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(variant);
        hf::import(&dir, &tmp.path().join("checkpoint")).unwrap();
        let golden = read(&dir.join("golden.safetensors"));
        let (shape, tokens) = &golden["tokens"];
        let lines = tokens.chunks(shape[1]).enumerate().map(|(i, row)| {
            let tokens: Vec<u32> = row.iter().map(|&token| token as u32).collect();
            format!("{{\"id\": \"{i}\", \"tokens\": {tokens:?}}}\n")
        });
        std::fs::write(tmp.path().join("tokens.jsonl"), lines.collect::<String>()).unwrap();
        let grads = golden.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("grad.")?.to_string(), tensor.clone())));
        let mut torch: Tensors = grads.collect();
        torch.insert("loss".into(), (vec![], golden["losses"].1[..1].to_vec()));
        write(&tmp.path().join("torch.safetensors"), &torch);
        Golden { tmp, torch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    /// The binary on its checkpoint and batch, comparing with the file `reference`.
    fn prove(&self, n_ranks: usize, reference: &str, more: &[&str]) -> Output {
        let paths = ["checkpoint", "tokens.jsonl", reference].map(|name| self.path(name).to_str().unwrap().to_string());
        let args = ["--checkpoint", &paths[0], "--tokens", &paths[1], "--reference", &paths[2]];
        prove(n_ranks, &[&args, more].concat())
    }
}

/// Loss and gradients of every variant are PyTorch's in float64, by the binary's own table and by what it wrote, read here: f32
/// within 1e-5 (loss 5e-7, and its rounding to f32), bf16 within 6e-2 (loss 1.5e-2), the tolerances of tests/golden_runs; on one
/// rank and divided by tp, pp and dp, also where a replica has no sequence of its own. A wrong name, a q head in the place of a k head,
/// or a tied gradient counted once would be far outside.
#[test]
fn gradients_are_those_of_pytorch() {
    let cases: &[(&str, usize, &[&str])] = &[
        ("nemotron-gqa", 1, &[]),
        ("nemotron-gqa", 2, &["--tp", "2"]),
        ("nemotron-gqa", 2, &["--pp", "2"]),
        ("nemotron-gqa", 3, &[]),
        ("nemotron-head-dim", 1, &[]),
        ("nemotron-rotary-full", 4, &["--tp", "2"]),
        ("nemotron-tied", 1, &[]),
        ("nemotron-tied", 2, &["--pp", "2"]),
        ("llama", 1, &[]),
        ("llama", 2, &["--tp", "2", "--dtype", "bf16"]),
        ("nemotron-gqa", 1, &["--dtype", "bf16"]),
    ];
    for (variant, n_ranks, args) in cases {
        let golden = Golden::new(variant);
        let out = golden.path("ours.safetensors");
        let output = golden.prove(*n_ranks, "torch.safetensors", &[args, &["--gradients", out.to_str().unwrap()][..]].concat());
        assert_eq!(output.status.code(), Some(0), "{variant} {args:?}: {}", text(&output));
        let (loss, gradient) = if args.contains(&"bf16") { (1.5e-2, 6e-2) } else { (5e-7 + 6e-8, 1e-5) };
        let ours = read(&out);
        assert!(ours.keys().eq(golden.torch.keys()), "{variant}: {:?}", ours.keys());
        for (name, (shape, values)) in &ours {
            let (expected_shape, expected) = &golden.torch[name];
            assert!(name == "loss" || shape == expected_shape, "{name}");
            let (error, allowed) = (relative(values, expected), if name == "loss" { loss } else { gradient });
            assert!(error <= allowed, "{variant} {args:?}: {name} differs by {error:.2e}, allowed {allowed:.2e}");
        }
    }
}

/// A reference that is wrong by a thousandth in one tensor: exit 4, and the line names it. Nothing but that tensor fails.
#[test]
fn another_gradient_is_found() {
    let golden = Golden::new("nemotron-gqa");
    let mut wrong = golden.torch.clone();
    let name = "model.layers.1.self_attn.k_proj.weight";
    wrong.get_mut(name).unwrap().1.iter_mut().for_each(|x| *x *= 1.001);
    write(&golden.path("wrong.safetensors"), &wrong);
    for n_ranks in [1, 2] {
        assert_refused(&golden.prove(n_ranks, "wrong.safetensors", &[]), 4, &["1 of ", name]);
    }
}

/// Bad command lines and recipes exit with 2, bad files with 3: one line that names what is wrong; no output is left behind.
#[test]
fn bad_input() {
    let golden = Golden::new("nemotron-gqa");
    let name = "model.norm.weight";
    let edited = |file: &str, edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = golden.torch.clone();
        edit(&mut tensors);
        write(&golden.path(file), &tensors);
    };
    edited("missing", &|tensors| drop(tensors.remove(name)));
    edited("shape", &|tensors| drop(tensors.insert(name.into(), (vec![3], vec![0.0; 3]))));
    edited("unknown", &|tensors| drop(tensors.insert("model.norm.gain".into(), (vec![1], vec![0.0]))));
    std::fs::write(golden.path("garbage"), "no safetensors").unwrap();
    let references: [(&str, &[&str]); 5] = [
        ("missing", &["missing", "no gradient of model.norm.weight"]),
        ("shape", &["[3]", "[16]", name]),
        ("unknown", &["model.norm.gain", "no parameter"]),
        ("garbage", &["garbage"]),
        ("absent", &["absent"]),
    ];
    let out = golden.path("out.safetensors");
    for (file, fragments) in references {
        assert_refused(&golden.prove(1, file, &["--gradients", out.to_str().unwrap()]), 3, fragments);
    }
    let lines: [(&str, &[&str]); 5] = [
        ("{\"id\": \"a\", \"tokens\": [1, 99]}", &["line 1", "99", "37"]),
        ("{\"id\": \"a\", \"tokens\": [1]}", &["\"a\"", "1 token"]),
        ("{\"id\": \"a\", \"token\": [1, 2]}", &["line 1", "token"]),
        ("{\"id\": \"a\", \"text\": \"b\"}", &["line 1", "tokenizer"]),
        ("", &["nothing"]),
    ];
    let checkpoint = golden.path("checkpoint");
    let (checkpoint, bad) = (checkpoint.to_str().unwrap(), golden.path("bad.jsonl"));
    let with = |more: &[&str]| prove(1, &[&["--checkpoint", checkpoint, "--tokens", bad.to_str().unwrap()], more].concat());
    for (line, fragments) in lines {
        std::fs::write(&bad, format!("{line}\n")).unwrap();
        assert_refused(&with(&["--gradients", out.to_str().unwrap()]), 3, fragments);
    }
    assert!(!out.exists());
    std::fs::write(&bad, "{\"id\": \"a\", \"tokens\": [1, 2]}\n").unwrap();
    assert_refused(&with(&["--gradients", bad.to_str().unwrap()]), 3, &["bad.jsonl", "exists"]);
    assert_refused(&with(&["--gradients", golden.path("no/out").to_str().unwrap()]), 3, &["no such directory"]);
    assert_refused(&with(&["--gradients", out.to_str().unwrap(), "--tp", "3"]), 2, &["--tp 3"]);
    let leftovers = std::fs::read_dir(golden.tmp.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains(".tmp-"));
    assert_eq!(leftovers.count(), 0);

    let recipe = golden.path("recipe.toml");
    std::fs::write(&recipe, tiny_recipe(Path::new("unused")).to_toml()).unwrap();
    let recipe = recipe.to_str().unwrap();
    assert_refused(&prove(1, &["--recipe", recipe, "--set", "parallel.tp=2"]), 2, &["1 ranks", "parallel.tp"]);
    assert_refused(&prove(1, &["--recipe", recipe, "--set", "model.n_layer=2"]), 2, &["n_layer", "n_layers"]);
    assert_refused(&prove(1, &["--recipe", recipe, "--layers", "0"]), 2, &["--layers 0"]);
    assert_refused(&prove(1, &["--recipe", "/no/such.toml"]), 3, &["/no/such.toml"]);
    // The command line itself, refused before anything is read; clap writes more than one line.
    let usage: [&[&str]; 4] = [
        &[],
        &["--recipe", recipe, "--checkpoint", checkpoint],
        &["--checkpoint", checkpoint, "--tokens", recipe],
        &["--checkpoint", checkpoint, "--reference", recipe],
    ];
    for args in usage {
        assert_eq!(prove(1, args).status.code(), Some(2), "{args:?}");
    }
}
