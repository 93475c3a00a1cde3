//! Recipes: what is read is what was written, every mistake is one line that says where, what, and what to write instead.

mod common;
#[path = "recipes/mismatches.rs"]
mod mismatches;

use common::models;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use toml::{Table, Value};
use trireme::device::{Activation, Llama3Scaling, NormKind, RopeScaling};
use trireme::model::config::HeadKind;
use trireme::recipe::{
    Batch, Checkpoint, Data, DecayShape, EndWeights, Health, Layers, Linear, LrDecay, Mode, Moments, Numerics, Observe, Optimizer,
    Parallel, Phase, Precision, Pretrain, RampStage, Recompute, RecomputePlan, RecomputeRange, ScheduleKind, Source, Start, Train,
    Validation, Wsd,
};

/// A recipe that fits 8 ranks: tp 2, pp 2, dp 2.
fn sound() -> Pretrain {
    Pretrain {
        model: models::nemotron([4, 64, 8, 4, 8, 128, 500], 64),
        parallel: Parallel {
            tp: 2,
            pp: 2,
            dp: None,
            vp: 1,
            schedule: ScheduleKind::OneFOneB,
            sequence_parallel: true,
            overlap: true,
            layers: None,
        },
        batch: Batch { seq_len: 32, micro: 2, global: 16, ramp: vec![] },
        train: Train { samples: 1600, seed: 1, precision: Precision::F32, clip_grad_norm: 1.0, recompute: RecomputePlan::default() },
        numerics: Numerics::default(),
        optimizer: Optimizer {
            lr: 1e-3,
            min_lr: 1e-4,
            warmup_samples: 160,
            decay: LrDecay::Cosine,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        },
        data: Data {
            train: vec![Source { shards: "data/a".into(), weight: 2.0 }, Source { shards: "data/b".into(), weight: 1.0 }],
            seed: 7,
        },
        validation: Some(Validation { shards: "data/a".into(), every_steps: 10, samples: 32 }),
        checkpoint: Checkpoint { every_steps: 50, ..Checkpoint::default() },
        health: Health::default(),
        observe: Observe::default(),
        start: None,
        phase: vec![],
    }
}

/// Full recompute of these ranges of layers.
fn full(ranges: &[&str]) -> RecomputePlan {
    let range = |&layers: &&str| RecomputeRange { layers: layers.into(), kind: Recompute::Full };
    RecomputePlan::Ranges(ranges.iter().map(range).collect())
}

/// Stages of a ramp: (until_sample, global).
fn ramp(stages: &[(u64, usize)]) -> Vec<RampStage> {
    stages.iter().map(|&(until_sample, global)| RampStage { until_sample, global }).collect()
}

/// A phase after the main one.
fn added_phase(lr: f64) -> Phase {
    let data = Data { train: vec![Source { shards: "data/c".into(), weight: 1.0 }], seed: 8 };
    Phase { name: "final".into(), samples: 320, lr, min_lr: 0.0, warmup_samples: 0, decay: LrDecay::Linear, data }
}

fn parse(text: &str, sets: &[&str]) -> Result<Pretrain, String> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Pretrain::parse(text, "r.toml", &sets).map_err(|error| {
        assert_eq!(error.exit_code(), 2, "{error}");
        let line = error.to_string();
        assert!(!line.contains('\n'), "more than one line: {line}");
        line
    })
}

/// The dotted path of every key of a recipe, tables and lists included.
fn paths(value: &Value, at: &str) -> Vec<String> {
    let join = |key: &str| if at.is_empty() { key.to_string() } else { format!("{at}.{key}") };
    let children: Vec<(String, &Value)> = match value {
        Value::Table(table) => table.iter().map(|(key, value)| (join(key), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (join(&i.to_string()), value)).collect(),
        _ => return vec![],
    };
    children.into_iter().flat_map(|(path, value)| std::iter::once(path.clone()).chain(paths(value, &path))).collect()
}

fn table_of(recipe: &Pretrain) -> Value {
    Value::Table(recipe.to_toml().parse::<Table>().expect("to_toml writes TOML"))
}

fn any_recipe() -> impl Strategy<Value = Pretrain> {
    let model = (1..200usize, 1..20000usize, 1..100usize, 1e-9..1f32, any::<bool>(), 0..3u8, 0.0..1.0f64, proptest::option::of(1..9usize));
    let optimizer = (1e-12..1f64, 1e-12..1f64, any::<u32>(), 0..5u8, 0.0..1f64, 0.0..1f64);
    let data = proptest::collection::vec(("[a-z0-9_./ \"'\\\\\u{e9}-]{1,20}", 1e-6..1e6f64), 0..4);
    (model, optimizer, data, proptest::option::of(1..64usize), proptest::option::of(("[a-z/]{1,9}", 1..1000u64)), 0..u64::MAX / 2).prop_map(
        |(model, optimizer, data, dp, validation, seed)| {
            let mut recipe = sound();
            recipe.model.n_layers = model.0;
            recipe.model.hidden = model.1;
            recipe.model.n_heads = model.2;
            recipe.model.norm_eps = model.3;
            recipe.model.tied_embeddings = model.4;
            recipe.model.norm = if model.5 == 0 { NormKind::RmsNorm } else { NormKind::LayerNorm1P };
            recipe.model.activation = if model.5 == 1 { Activation::Swiglu } else { Activation::SquaredRelu };
            recipe.model.rotary_fraction = model.6;
            recipe.model.head = model.7.map_or(HeadKind::Vocabulary, HeadKind::Reward);
            recipe.parallel.schedule = [ScheduleKind::GPipe, ScheduleKind::OneFOneB, ScheduleKind::Interleaved][model.5 as usize];
            recipe.parallel.dp = dp;
            recipe.numerics.mode = if model.4 { Mode::Reproducible } else { Mode::Fast };
            recipe.optimizer.lr = optimizer.0;
            recipe.optimizer.min_lr = optimizer.1;
            recipe.optimizer.warmup_samples = optimizer.2.into();
            let wsd = LrDecay::Wsd(Wsd { samples: optimizer.2.into(), shape: DecayShape::MinusSqrt });
            recipe.optimizer.decay = [LrDecay::Constant, LrDecay::Linear, LrDecay::Cosine, LrDecay::InverseSqrt, wsd][optimizer.3 as usize];
            if optimizer.3 > 2 {
                recipe.batch.ramp = vec![RampStage { until_sample: optimizer.2.into(), global: 8 }];
                recipe.phase = vec![added_phase(optimizer.0)];
                recipe.start = Some(Start { checkpoint: "runs/a".into(), moments: Moments::Reset });
                recipe.health.max_grad_norm = Some(optimizer.1);
            }
            recipe.optimizer.beta1 = optimizer.4;
            recipe.optimizer.beta2 = optimizer.5;
            recipe.data.train = data.into_iter().map(|(shards, weight)| Source { shards: shards.into(), weight }).collect();
            recipe.data.seed = seed;
            recipe.train.precision = if model.4 { Precision::Bf16 } else { Precision::F32 };
            recipe.validation = validation.map(|(shards, every_steps)| Validation { shards: shards.into(), every_steps, samples: 3 });
            recipe
        },
    )
}

/// Whether one insertion, deletion, replacement or swap of neighbours makes `b` of `a`, by trying all of them.
fn is_one_edit(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let without = |s: &[char], i: usize| [&s[..i], &s[i + 1..]].concat();
    a == b
        || (0..a.len()).any(|i| without(&a, i) == b)
        || (0..b.len()).any(|i| without(&b, i) == a)
        || (a.len() == b.len() && (0..a.len()).any(|i| without(&a, i) == without(&b, i)))
        || (1..a.len()).any(|i| {
            let mut swapped = a.clone();
            swapped.swap(i - 1, i);
            swapped == b
        })
}

proptest! {
    /// Printing a recipe and reading it gives the recipe: RUN/recipe.toml is what ran, to the last bit of every number.
    #[test]
    fn printed_recipes_read_back_equal(recipe in any_recipe()) {
        let text = recipe.to_toml();
        let read = parse(&text, &[]);
        prop_assert_eq!(read.as_ref(), Ok(&recipe), "{}", text);
        prop_assert_eq!(read.expect("just compared").to_toml(), text);
    }

    /// One slip in any key, anywhere, is refused, and the key offered instead is one slip away: a misspelt key must never be
    /// read as absent.
    #[test]
    fn misspelt_keys_are_refused_with_the_nearest(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), edit in 0..4u8, letter in "[a-z_]") {
        let whole = table_of(&sound());
        let keys: Vec<String> = paths(&whole, "").into_iter().filter(|path| !path.ends_with(|c: char| c.is_ascii_digit()) || path.contains("beta")).collect();
        let path = which.get(&keys);
        let (parent, key) = path.rsplit_once('.').unwrap_or(("", path));
        let mut chars: Vec<char> = key.chars().collect();
        let i = at.index(chars.len());
        match edit {
            0 => chars.insert(i, letter.chars().next().expect("one letter")),
            1 => drop(chars.remove(i)),
            2 => chars[i] = letter.chars().next().expect("one letter"),
            _ => chars.swap(i, (i + 1) % key.chars().count()),
        }
        let typo: String = chars.into_iter().collect();
        let siblings: Vec<&str> = keys.iter().filter_map(|other| {
            let (other_parent, other_key) = other.rsplit_once('.').unwrap_or(("", other));
            (other_parent == parent).then_some(other_key)
        }).collect();
        // `dp` is a key too, absent from this recipe. A swap of the ends of a word may be more than one edit.
        prop_assume!(!typo.is_empty() && typo != "dp" && !siblings.contains(&typo.as_str()) && is_one_edit(key, &typo));
        let text = rename(&whole, path, &typo);
        let line = parse(&text, &[]).expect_err("a misspelt key");
        let wrong = if parent.is_empty() { typo.clone() } else { format!("{parent}.{typo}") };
        prop_assert!(line.contains(&format!("{wrong} is an unknown key")), "{}", line);
        let offered = line.rsplit_once("; ").and_then(|(_, remedy)| {
            let remedy = remedy.strip_prefix("did you mean ").or(remedy.strip_prefix("the nearest is "))?;
            Some(remedy.split(['?', ';']).next().expect("a part").rsplit('.').next().expect("a part").to_string())
        });
        let offered = offered.unwrap_or_else(|| panic!("no offer in: {line}"));
        prop_assert!(is_one_edit(&offered, &typo), "{} -> {}: {}", typo, offered, line);
        let n: usize = line.strip_prefix("r.toml:").and_then(|rest| rest.split(':').next()?.parse().ok()).expect("a line number");
        prop_assert!(text.lines().nth(n - 1).expect("that line").contains(&typo), "line {} of\n{}", n, text);
    }

    /// No text at all makes the reader panic.
    #[test]
    fn any_text_is_an_error_or_a_recipe(text in "\\PC{0,200}", set in "\\PC{0,40}") {
        let _ = parse(&text, &[]);
        let _ = parse(&sound().to_toml(), &[&set]);
    }
}

/// The TOML of `whole` with the key at `path` called `name`.
fn rename(whole: &Value, path: &str, name: &str) -> String {
    let mut whole = whole.clone();
    let mut keys: Vec<&str> = path.split('.').collect();
    let last = keys.pop().expect("not empty");
    let mut here = &mut whole;
    for key in keys {
        here = match here {
            Value::Array(items) => &mut items[key.parse::<usize>().expect("an index")],
            other => &mut other[key],
        };
    }
    let table = here.as_table_mut().expect("a table");
    let value = table.remove(last).expect("the key");
    table.insert(name.into(), value);
    toml::to_string(&whole).expect("plain data")
}

/// Every key without a default, when it is missing, is named with its table; those with defaults may be absent.
#[test]
fn missing_keys_are_named() {
    let whole = table_of(&sound());
    let mut optional = vec![];
    for path in paths(&whole, "").into_iter().filter(|path| !path.ends_with(".0") && !path.ends_with(".1")) {
        let text = rename(&whole, &path, "zzz").lines().filter(|line| !line.starts_with("zzz =")).collect::<Vec<_>>().join("\n");
        if text.contains("zzz") {
            continue; // a whole table: covered below
        }
        let (parent, key) = path.rsplit_once('.').unwrap_or(("the recipe", &path));
        match parse(&text, &[]) {
            Ok(_) => optional.push(path),
            Err(line) => assert!(line.contains(&format!("{parent} misses the key {key};")), "{path}: {line}"),
        }
    }
    let defaults = ["window", "loss_z", "max_skips_in_a_row", "max_skips_in_window"].map(|key| format!("health.{key}"));
    let observed = ["hang_after_s", "hang_in_files_after_s", "flight_records", "compare_every_steps"].map(|key| format!("observe.{key}"));
    let mechanics = ["parallel.overlap", "train.recompute", "numerics.mode", "numerics.batch_blocks"].map(String::from);
    let saving = ["every_steps", "copy_mib", "margin_s"].map(|key| format!("checkpoint.{key}"));
    assert_eq!(optional, [&mechanics[..], &saving[..], &defaults[..], &observed[..]].concat());
    let line = parse("[model]\nn_layers = 1\n", &[]).expect_err("nearly everything is missing");
    assert!(line.starts_with("r.toml:1: model misses the key hidden"), "{line}");
    let line = parse("", &[]).expect_err("empty");
    assert!(line.starts_with("r.toml: the recipe misses the key model"), "{line}");
    let without_validation = Pretrain { validation: None, ..sound() };
    assert_eq!(parse(&without_validation.to_toml(), &[]), Ok(without_validation));
    // A recipe without FP8 is written as it was before there was any: runs of then go on.
    assert!(!sound().to_toml().contains("linear"));
    let with_fp8 = parse(&sound().to_toml(), &["numerics.linear=fp8"]).unwrap();
    assert_eq!((with_fp8.numerics.linear, parse(&with_fp8.to_toml(), &[])), (Linear::Fp8, Ok(with_fp8)));
    let of_tensors = parse(&sound().to_toml(), &["numerics.linear=fp8-tensor"]).unwrap();
    assert_eq!((of_tensors.numerics.linear, parse(&of_tensors.to_toml(), &[])), (Linear::Fp8Tensor, Ok(of_tensors)));
}

/// Scaled rotary frequencies are a table of the model, whole numbers or not, and come back from the text that a run keeps; a recipe
/// without them says nothing of them, so that old texts and new ones are the same.
#[test]
fn rotary_frequencies_may_be_scaled() {
    let text = sound().to_toml();
    assert!(!text.contains("rope_scaling"), "{text}");
    let scaling = "factor = 8, low_freq_factor = 1, high_freq_factor = 4.0, original_max_position_embeddings = 16";
    let recipe = parse(&text, &[&format!("model.rope_scaling={{ llama3 = {{ {scaling} }} }}")]).unwrap();
    let expected = Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 16 };
    assert_eq!(recipe.model.rope_scaling, Some(RopeScaling::Llama3(expected)));
    assert_eq!(parse(&recipe.to_toml(), &[]).unwrap(), recipe);
    let yarn = "factor = 4, original_max_position_embeddings = 16, beta_fast = 32, beta_slow = 1, truncate = true";
    let recipe = parse(&text, &[&format!("model.rope_scaling={{ yarn = {{ {yarn} }} }}")]).unwrap();
    assert_eq!(parse(&recipe.to_toml(), &[]).unwrap(), recipe);
    assert_eq!(recipe.model.rope().attention_factor(), 0.1 * 4f64.ln() + 1.0);
    let line = parse(&text, &["model.rope_scaling={ linear = { factor = 0.5 } }"]).unwrap().check(8).unwrap_err().to_string();
    assert!(line.contains("model.rope_scaling.linear.factor = 0.5; give the new length over the old, at least 1"), "{line}");
}

/// A value of a wrong type is named with its place, what it is, and what it should be.
#[test]
fn wrong_types_name_both() {
    let text = sound().to_toml();
    let cases = [
        ("train.samples=many", "--set train.samples: train.samples is the text \"many\", expected a whole number"),
        ("train.samples=1.5", "train.samples is the number 1.5, expected a whole number"),
        ("batch.micro=-1", "batch.micro is the whole number -1, expected a whole number that is not negative"),
        ("optimizer.lr=\"x\"", "optimizer.lr is the text \"x\", expected a number"),
        ("model.tied_embeddings=1", "model.tied_embeddings is the whole number 1, expected true or false"),
        ("train.precision=fp8", "train.precision is \"fp8\", expected one of \"f32\", \"bf16\""),
        ("parallel.schedule=1f1", "did you mean \"1f1b\"?"),
        ("data.train=3", "data.train is the whole number 3, expected a list"),
        ("data.train.0.weight=[1]", "data.train.0.weight is a list, expected a number"),
        ("data.train.0.wieght=1", "--set data.train.0.wieght: data.train.0.wieght is an unknown key; did you mean data.train.0.weight?"),
        ("model=1", "model is the whole number 1, expected a table"),
        ("train.samples.x=1", "samples is a single value (1600)"),
        ("train.steps=1", "train.steps is an unknown key; did you mean train.samples, which is steps x batch.global?"),
        ("optimizer.warmup_steps=1", "did you mean optimizer.warmup_samples, which is steps x batch.global?"),
        ("optimizer.decay=wds", "did you mean \"wsd\"?"),
        (
            "optimizer.decay={ wsd = { sample = 1 } }",
            "optimizer.decay.wsd.sample is an unknown key; did you mean optimizer.decay.wsd.samples?",
        ),
        ("optimizer.decay=wsd", "is \"wsd\" alone, expected a value for it"),
        ("health.loss_zz=1", "did you mean health.loss_z?"),
        ("data.train.5.weight=1", "item 5 of a list of 2"),
        ("data.train.first.weight=1", "first is not a number"),
        ("steps", "has no ="),
        (".a=1", "has an empty key"),
        ("trian.samples=1", "--set trian.samples: trian is an unknown key; did you mean train?"),
        ("model.rope_scaling=linear", "is \"linear\" alone, expected a value for it"),
        ("model.rope_scaling={ ntk = { factor = 2 } }", "is \"ntk\", expected one of \"linear\", \"llama3\", \"yarn\""),
        ("model.rope_scaling={ llama3 = { factor = 8 } }", "model.rope_scaling.llama3 misses the key low_freq_factor"),
        (
            "model.rope_scaling={ linear = { facter = 8 } }",
            "model.rope_scaling.linear.facter is an unknown key; did you mean model.rope_scaling.linear.factor?",
        ),
    ];
    for (set, expected) in cases {
        let line = parse(&text, &[set]).expect_err(set);
        assert!(line.contains(expected), "{set}: {line}");
    }
    let line = parse(&text.replacen("samples = 1600", "samples = \"many\"", 1), &[]).expect_err("a text");
    let n = 1 + text.lines().position(|line| line == "samples = 1600").expect("the line");
    assert_eq!(
        line,
        format!("r.toml:{n}: train.samples is the text \"many\", expected a whole number that is not negative; correct the value")
    );
    let line = parse("[model]\nn_layers = = 3\n", &[]).expect_err("no TOML");
    assert!(line.starts_with("r.toml:2: not TOML: "), "{line}");
}

/// Overrides change exactly what they name, in order, with TOML values or bare words, in lists by number.
#[test]
fn overrides_apply() {
    let text = sound().to_toml();
    let sets = [
        "train.samples=7",
        "train.samples = 8",
        "train.precision=bf16",
        "parallel.schedule=1f1b",
        "data.train.0.weight=0.25",
        "parallel.dp=3",
    ];
    let lists = ["batch.ramp.0.until_sample=64", "batch.ramp.0.global=8"];
    let more = ["data.train.2.shards=/x/y=z", "data.train.2.weight=3", "validation.shards=runs/1", "model.head={ reward = 5 }"];
    let read = parse(&text, &[&sets[..], &more[..], &lists[..]].concat()).expect("known keys");
    let mut expected = sound();
    expected.train.samples = 8;
    expected.train.precision = Precision::Bf16;
    expected.data.train[0].weight = 0.25;
    expected.batch.ramp = ramp(&[(64, 8)]);
    expected.parallel.dp = Some(3);
    expected.data.train.push(Source { shards: "/x/y=z".into(), weight: 3.0 });
    expected.validation.as_mut().expect("has one").shards = "runs/1".into();
    expected.model.head = HeadKind::Reward(5);
    assert_eq!(read, expected);
}

/// A recipe that fits gives the layout of its ranks.
#[test]
fn a_sound_recipe_has_its_layout() {
    let layout = sound().check(8).expect("it fits");
    assert_eq!((layout.tp, layout.pp, layout.dp, layout.vp), (2, 2, 2, 1));
    let mut interleaved = sound();
    interleaved.parallel.vp = 2;
    interleaved.parallel.schedule = ScheduleKind::Interleaved;
    assert_eq!(interleaved.check(4).expect("it fits").vp, 2);
}

/// Every recipe that ships reads and fits the ranks it is for; the 340B one has the report's numbers.
#[test]
fn shipped_recipes_are_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm/recipes");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).expect("slurm/recipes").map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    assert!(files.len() >= 4, "{files:?}");
    for path in &files {
        let recipe = Pretrain::load(path, &[]).unwrap_or_else(|error| panic!("{error}"));
        let world = recipe.parallel.tp * recipe.parallel.pp * recipe.parallel.dp.unwrap_or(1);
        recipe.check(world).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let recipe = Pretrain::load(&folder.join("nemotron4_340b_6144xh100.toml"), &[]).expect("just read");
    let layout = recipe.check(6144).expect("6144 GPUs");
    assert_eq!((layout.tp, layout.pp, layout.dp), (8, 12, 64));
    assert_eq!(recipe.model.n_params(), (9_437_184_000, 331_592_011_776));
    // Table 2: steps and tokens of each batch size, to the step that crosses the border.
    let found: Vec<(usize, u64)> = recipe.plan().stretches().iter().map(|stretch| (stretch.global, stretch.n_steps)).collect();
    assert_eq!(found, [(768, 63_579), (1536, 31_789), (2304, 805_325)]);
    assert_eq!(recipe.train.samples * 4096, 8_000_000_000_000);
    for (dp, world) in [(16, 1536), (32, 3072), (64, 6144)] {
        let at_size = Pretrain::load(&folder.join("nemotron4_340b_6144xh100.toml"), &[format!("parallel.dp={dp}")]).expect("just read");
        at_size.check(world).expect("Table 2's layouts");
        [768, 1536, 2304].iter().for_each(|&global| at_size.check_batch_size(dp, global).expect("every batch at every layout"));
    }
    let continued = Pretrain::load(&folder.join("nemotron4_340b_continued_6144xh100.toml"), &[]).expect("just read");
    assert_eq!(continued.model, recipe.model);
    let lengths: Vec<f64> = continued.phases().iter().map(|phase| phase.lr.samples as f64 * 4096.0 / 1e12).collect();
    assert!(lengths.len() == 2 && (lengths[0] - 0.9).abs() < 1e-6 && (lengths[1] - 0.1).abs() < 1e-6, "{lengths:?}");
    let body = |name: &str| Pretrain::load(&folder.join(name), &[]).expect("just read").model.n_params().1;
    assert_eq!(body("nemotron4_15b_2304xh100.toml"), 12_483_047_424);
    assert_eq!(body("minitron_8b_64xh100.toml"), 6_174_547_968);
    assert_eq!(body("minitron_4b_64xh100.toml"), 2_617_645_056);
}

/// A recipe that is not there, or not a file, is a file error that names it.
#[test]
fn unreadable_files_are_named() {
    let error = Pretrain::load(Path::new("/nonexistent/r.toml"), &[]).expect_err("not there");
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("/nonexistent/r.toml"), "{error}");
}
