//! Benchmarks against lm-evaluation-harness itself: what it makes of the files of tests/goldens/evaluate on a tiny model stands in
//! golden.json.gz (see make.py there); and what is refused.

mod golden_evaluations;

use golden_evaluations::{Golden, Place, checkpoint, evaluate};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use trireme::checkpoint as stored_checkpoint;
use trireme::comm::{Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::eval::answers::{self, Limits};
use trireme::eval::evidence::Evidence;
use trireme::eval::task;
use trireme::infer::choices::{self, BeginOfSequence, Start};
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::load::layout_for;
use trireme::infer::scorer::{self, Scorer};
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::recipe::Mode;
use trireme::tensor::DType;

/// Log-likelihoods of two implementations may differ by this much, as the harness itself states it between its back ends.
fn is_close(ours: f64, theirs: f64) -> bool {
    (ours - theirs).abs() < 1e-3 + 1e-5 * theirs.abs()
}

/// Evidence of one item against the harness's: texts, tokens and metrics equal, log-likelihoods close.
fn check_item(ours: &Value, theirs: &Value, worst: &mut f64) {
    let name = format!("{} item {}", ours["task"], ours["item"]);
    assert_eq!(ours["metrics"], theirs["metrics"], "{name}: {ours}");
    let Some(pairs) = theirs["pairs"].as_array() else {
        for key in ["prompt", "text", "extracted"] {
            assert_eq!(ours[key], theirs[key], "{name} {key}");
        }
        assert_eq!(ours["prompt_tokens"], theirs["prompt_ids"], "{name}");
        return;
    };
    let (contexts, choices) = (ours["contexts"].as_array().unwrap(), ours["choices"].as_array().unwrap());
    assert_eq!(choices.len(), pairs.len(), "{name}");
    for (i, (choice, pair)) in choices.iter().zip(pairs).enumerate() {
        let context = contexts.get(i).unwrap_or(&contexts[0]);
        assert_eq!((&context["text"], &choice["text"]), (&pair["context"], &pair["continuation"]), "{name}");
        assert_eq!((&context["tokens"], &choice["tokens"]), (&pair["context_ids"], &pair["ids"]), "{name}");
        let (sum, expected) = (choice["sum"].as_f64().unwrap(), pair["sum"].as_f64().unwrap());
        assert!(is_close(sum, expected), "{name} choice {i}: {sum}, expected {expected}");
        *worst = worst.max((sum - expected).abs());
        assert_eq!(choice["is_greedy"], pair["is_greedy"], "{name} choice {i}");
    }
}

/// The scores of a run against the harness's: the same tasks, groups and metrics, value by value. They are means of at most 200 numbers
/// that are 0 or 1 in f64 on both sides, added in other orders.
fn check_scores(ours: &Value, theirs: &Value) -> usize {
    let mut expected: BTreeMap<(String, String), f64> = BTreeMap::new();
    for (task, values) in theirs.as_object().unwrap() {
        for (metric, value) in values.as_object().unwrap() {
            expected.insert((task.clone(), metric.clone()), value.as_f64().unwrap_or_else(|| panic!("{task} {metric} {value}")));
        }
    }
    let n = expected.len();
    for score in ours["tasks"].as_array().unwrap().iter().flat_map(|task| task["scores"].as_array().unwrap()) {
        let (task, metric) = (score["task"].as_str().unwrap(), score["metric"].as_str().unwrap());
        let (name, filter) = metric.split_once(',').unwrap();
        for (key, value) in [(metric.to_string(), &score["value"]), (format!("{name}_stderr,{filter}"), &score["stderr"])] {
            let theirs = expected.remove(&(task.into(), key.clone())).unwrap_or_else(|| panic!("{task} {key} is not the harness's"));
            let ours = value.as_f64().unwrap_or_else(|| panic!("{task} {key}: {value}"));
            assert!((ours - theirs).abs() < 1e-12, "{task} {key}: {ours}, expected {theirs}");
        }
    }
    assert!(expected.is_empty(), "the harness also has {expected:?}");
    n
}

/// Every run of the harness through the binary: contexts, continuations, tokens, few-shot draws, log-likelihoods, generated texts, what
/// the filters find, metrics of each item, with and without a beginning of sequence before every text, scores of leaves and groups and
/// their standard errors. Breaks with any change of a prompt, of how text is cut into tokens, of a metric, or of the order in which
/// examples are drawn.
#[test]
fn every_item_has_the_harness_s_numbers() {
    let (golden, place) = (Golden::read(), Place::new());
    golden.write_files(&place.path("data"));
    let (plain, beginning) = (checkpoint(&place), golden.beginning_checkpoint(&place));
    let (mut worst, mut n_items, mut n_cut, mut n_right, mut n_scores) = (0f64, 0, 0, 0, 0);
    for (i, run) in golden.runs().iter().enumerate() {
        let tasks: Vec<&str> = run["tasks"].as_array().unwrap().iter().map(|task| task.as_str().unwrap()).collect();
        let mut args: Vec<String> = tasks.iter().flat_map(|task| ["--task".to_string(), task.to_string()]).collect();
        if let Some(n) = run["n_shots"].as_u64() {
            let benchmark = |task: &str| if task.starts_with("mmlu") { "mmlu" } else { task }.to_string();
            args.extend(tasks.iter().flat_map(|task| ["--shots".to_string(), format!("{}={n}", benchmark(task))]));
        }
        let model = run["bos"].as_str().map_or(&plain, |bos| {
            args.extend(["--bos".to_string(), bos.to_string()]);
            &beginning
        });
        let out = place.path(&format!("run-{i}"));
        let output = evaluate(model, &place.path("data"), &out, &args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let evidence: Vec<Value> = tasks.iter().flat_map(|task| golden_evaluations::lines(&out.join(format!("{task}.jsonl")))).collect();
        for (leaf, theirs) in run["samples"].as_object().unwrap() {
            let ours: Vec<&Value> = evidence.iter().filter(|item| item["task"] == *leaf).collect();
            let theirs = theirs.as_array().unwrap();
            assert_eq!(ours.len(), theirs.len(), "{leaf}");
            ours.iter().zip(theirs).for_each(|(ours, theirs)| check_item(ours, theirs, &mut worst));
        }
        n_items += evidence.len();
        let cut = |item: &&Value| item["n_cut"].as_u64().or(item["choices"][0]["n_cut"].as_u64()).unwrap() > 0;
        n_cut += evidence.iter().filter(cut).count();
        n_right += evidence.iter().filter(|item| item["metrics"].as_object().unwrap().values().any(|value| value == 1.0)).count();
        n_scores += check_scores(&golden_evaluations::json(&out.join("scores.json")), &run["scores"]);
    }
    println!("{n_items} items ({n_cut} cut, {n_right} right), {n_scores} scores and errors; log-likelihoods within {worst:.1e}");
    assert!(n_cut >= 2 && n_right >= 40 && n_right + 40 <= n_items, "the golden runs reach too little");
}

/// The evidence of some tasks by the library, on threads, with weights by a seed.
fn evidence_on(model: &Path, data: &Path, shape: (usize, usize, usize), batch_tokens: usize) -> Vec<Evidence> {
    let (tp, pp, dp) = shape;
    let asked = ["arc_challenge", "winogrande", "mmlu_anatomy", "bbh_cot_fewshot_snarks"];
    let all = threads::run(tp * pp * dp, |world| {
        let layout = layout_for(tp * pp * dp, tp, pp).unwrap();
        let (device, stored, groups) = (Cpu::new(), stored_checkpoint::open(model).unwrap(), Groups::new(world, layout));
        let (tokenizer, config) = (stored.tokenizer().unwrap().unwrap(), &stored.meta().model);
        let start = Start::of(&stored, BeginOfSequence::WhenEmpty).unwrap();
        let limits = Limits { tokenizer: &tokenizer, vocab_size: config.vocab_size, max_tokens: config.max_tokens, start };
        let load = |name: &str| task::load(&name.parse().unwrap(), Some(data), &[], Some(2)).unwrap();
        let tasks = asked.map(load);
        let leaves = || tasks.iter().flat_map(|task| &task.leaves);
        let questions = answers::questions(leaves(), limits).unwrap();
        let numerics = scorer::numerics(None, &device, None).unwrap();
        // The golden model with heads and columns that 2 and 3 divide.
        let model = ModelConfig { n_heads: 12, n_kv_heads: 6, ffn_hidden: 192, init_std: 0.1, ..config.clone() };
        let mut chunks = [Chunk::new(&device, &model, &layout, groups.at, 0, DType::BF16, Purpose::Inference).unwrap()];
        chunks[0].initialise(&device, 3);
        let scorer = Scorer { device: &device, groups: &groups, batch_tokens, numerics, stop: &|| false };
        let likelihoods = choices::likelihoods(&scorer, &mut chunks, &questions.pairs).unwrap();
        let tokenizer_of = Some(&tokenizer);
        let generator = Generator {
            device: &device,
            groups: &groups,
            chunk: &chunks[0],
            eos_ids: vec![0],
            tokenizer: tokenizer_of,
            batching: Batching { n_sequences: 3, ..Batching::default() },
            order: Mode::Reproducible,
            stop: &|| false,
        };
        let responses = generator.responses(&questions.requests).unwrap();
        questions.evidence(leaves(), &likelihoods, &responses, &tokenizer)
    });
    assert!(all.iter().all(|evidence| *evidence == all[0]), "ranks disagree");
    all.into_iter().next().unwrap()
}

/// Evidence is the same to the bit under every layout and batch size, in bf16 too: log-probabilities of choices in reproducible numerics.
/// Breaks when a row of a pass depends on its neighbours, or a sum on the number of ranks.
#[test]
fn evidence_does_not_depend_on_the_layout() {
    let (golden, place) = (Golden::read(), Place::new());
    golden.write_files(&place.path("data"));
    let model = checkpoint(&place);
    let expected = evidence_on(&model, &place.path("data"), (1, 1, 1), 1);
    assert_eq!(expected.len(), 2 + 2 + 2 + 2);
    for (shape, batch_tokens) in
        [((1, 1, 1), 3000), ((2, 1, 1), 500), ((1, 2, 1), 100), ((1, 1, 3), 800), ((2, 2, 2), 300), ((3, 1, 1), 700), ((6, 1, 1), 200)]
    {
        let found = evidence_on(&model, &place.path("data"), shape, batch_tokens);
        for (ours, theirs) in found.iter().zip(&expected) {
            assert_eq!(ours, theirs, "{shape:?}");
        }
    }
}

/// Two evaluations on the same items: the scores of both, a difference that an interval holds, and 1 for a model against itself. Other
/// items are refused with both fingerprints; so are other tasks.
#[test]
fn evaluations_are_compared_item_by_item() {
    let (golden, place) = (Golden::read(), Place::new());
    golden.write_files(&place.path("data"));
    let model = checkpoint(&place);
    let run = |name: &str, args: &[&str]| {
        let out = place.path(name);
        let args: Vec<String> = args.iter().map(|arg| arg.to_string()).collect();
        assert!(evaluate(&model, &place.path("data"), &out, &args).status.success());
        out
    };
    let a = run("a", &["--task", "hellaswag"]);
    let b = run("b", &["--task", "hellaswag", "--shots", "hellaswag=2"]);
    let c = run("c", &["--task", "winogrande"]);
    // B's answers with A's questions: another model on the same items.
    let text = std::fs::read_to_string(b.join("hellaswag.jsonl")).unwrap();
    let same = golden_evaluations::compare(&a, &a);
    let table = String::from_utf8(same.stdout).unwrap();
    assert!(same.status.success() && table.lines().count() == 3, "{table}");
    assert!(table.lines().skip(1).all(|line| line.contains("+0.0000 [+0.0000, +0.0000]  1.0000")), "{table}");
    let scores = |dir: &Path| golden_evaluations::json(&dir.join("scores.json"))["tasks"][0]["fingerprint"].as_str().unwrap().to_string();
    golden_evaluations::assert_refused(&golden_evaluations::compare(&a, &b), 3, &[&scores(&a), &scores(&b), "hellaswag"]);
    golden_evaluations::assert_refused(&golden_evaluations::compare(&a, &c), 3, &["hellaswag", "winogrande"]);
    // Of the first items alone there are differences, and a line that says so of both.
    let d = place.path("d");
    let limited = ["--task", "hellaswag", "--limit", "2"].map(String::from);
    assert_eq!(evaluate(&model, &place.path("data"), &d, &limited).status.code(), Some(1));
    let partial = golden_evaluations::compare(&d, &d);
    let table = String::from_utf8(partial.stdout).unwrap();
    let last = table.lines().last().unwrap();
    let named = last.matches(&*d.display().to_string()).count();
    assert!(partial.status.success() && last.starts_with("partial: ") && named == 2 && last.contains("2 items"), "{table}");
    std::fs::write(b.join("hellaswag.jsonl"), text.replacen("\"gold\":0", "\"gold\":1", 1)).unwrap();
    golden_evaluations::assert_refused(&golden_evaluations::compare(&b, &b), 3, &["hellaswag.jsonl", "checksum"]);
}

/// With --limit there is no score: another file name, exit code 1, also when it was done before; without it the same directory is refused.
#[test]
fn a_limit_makes_no_score() {
    let (golden, place) = (Golden::read(), Place::new());
    golden.write_files(&place.path("data"));
    let (model, out) = (checkpoint(&place), place.path("out"));
    let run = |args: &[&str]| evaluate(&model, &place.path("data"), &out, &args.iter().map(|arg| arg.to_string()).collect::<Vec<_>>());
    for _ in 0..2 {
        golden_evaluations::assert_refused(
            &run(&["--task", "winogrande", "--limit", "2"]),
            1,
            &["scores.partial.json", "2 items", "--limit"],
        );
        assert!(out.join("scores.partial.json").exists() && !out.join("scores.json").exists());
    }
    assert_eq!(golden_evaluations::lines(&out.join("winogrande.jsonl")).len(), 2);
    golden_evaluations::assert_refused(&run(&["--task", "winogrande"]), 3, &["asked.winogrande", "--out"]);
}

/// Every reader: a malformed row, a label that is none, an empty choice, a missing file or example, a row that is too long for the model.
/// One line with file and line, exit code 3, and nothing written.
#[test]
fn wrong_files_are_named() {
    let (golden, place) = (Golden::read(), Place::new());
    let (model, out) = (checkpoint(&place), place.path("out"));
    let long = "sail ".repeat(4000);
    let arc = "arc_challenge/ARC-Challenge-Test.jsonl";
    let cases: Vec<(&str, &str, Change, &[&str])> = vec![
        ("arc_challenge", arc, Change::Line(2, "{\"id\": 1"), &["ARC-Challenge-Test.jsonl: line 2: ", "answerKey"]),
        (
            "arc_challenge",
            arc,
            Change::Replace("\"answerKey\": \"B\"", "\"answerKey\": \"E\""),
            &["line 1: answerKey \"E\" is not among", "\"D\""],
        ),
        ("arc_challenge", arc, Change::Replace("a mirror", ""), &["line 1: choice C is empty"]),
        ("arc_challenge", arc, Change::Whole(""), &["no rows"]),
        ("arc_challenge", arc, Change::Remove, &["ARC-Challenge-Test.jsonl", "No such file"]),
        ("arc_challenge", arc, Change::Replace("a candle flame", &long), &["arc_challenge, item \"Test_0\"", "longest sequence is 1536"]),
        ("winogrande", "winogrande/dev.jsonl", Change::Replace("the _ was too wide", "it was too wide"), &["dev.jsonl: line 1: no _"]),
        (
            "winogrande",
            "winogrande/dev.jsonl",
            Change::Replace("\"answer\": \"1\"", "\"answer\": \"\""),
            &["line 1: answer \"\" is neither"],
        ),
        (
            "winogrande",
            "winogrande/dev.jsonl",
            Change::Replace("\"option1\": \"jug\"", "\"option1\": \"\""),
            &["line 1: an option is empty"],
        ),
        (
            "hellaswag",
            "hellaswag/hellaswag_val.jsonl",
            Change::Replace("\"label\": 0", "\"label\": 4"),
            &["line 1: label 4 is not among the 4"],
        ),
        ("hellaswag", "hellaswag/hellaswag_val.jsonl", Change::Replace("bakes a cake.", "[step]"), &["line 1: ending 1 is empty"]),
        ("hellaswag", "hellaswag/hellaswag_val.jsonl", Change::Replace("\"ctx_b\"", "\"ctx_c\""), &["line 1: ", "missing field `ctx_b`"]),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", Change::Line(1, "a,b,c,d,A"), &["anatomy_test.csv: line 1: 5 fields, expected 6"]),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", Change::Line(1, "q,a,b,c,d,E"), &["line 1: letter \"E\" is none"]),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", Change::Line(1, "q,a,b,,d,A"), &["line 1: choice C is empty"]),
        ("mmlu_anatomy", "mmlu/dev/anatomy_dev.csv", Change::Remove, &["anatomy_dev.csv", "No such file"]),
        ("mmlu", "mmlu/dev/virology_dev.csv", Change::Remove, &["virology_dev.csv", "No such file"]),
        ("mmlu_anatomy", "mmlu/dev/anatomy_dev.csv", Change::Whole("q,a,b,c,d,A\n"), &["anatomy_dev.csv", "5 examples", "here are 1"]),
        ("gsm8k", "gsm8k/test.jsonl", Change::Replace("#### ", "### "), &["test.jsonl: line 1: no \"#### \""]),
        ("gsm8k", "gsm8k/train.jsonl", Change::Line(3, "[]"), &["train.jsonl: line 3: "]),
        ("bbh_cot_fewshot_snarks", "bbh/bbh/snarks.json", Change::Whole("{\"examples\": []}"), &["snarks.json", "no examples"]),
        ("bbh_cot_fewshot_snarks", "bbh/bbh/snarks.json", Change::Replace("\"target\"", "\"goal\""), &["snarks.json", "target", "line 1"]),
        ("bbh_cot_fewshot_snarks", "bbh/cot-prompts/snarks.txt", Change::Replace("-----", "--"), &["snarks.txt", "dashes"]),
        ("bbh_cot_fewshot_snarks", "bbh/cot-prompts/snarks.txt", Change::Replace("\n\nQ: ", "\n\nX: "), &["snarks.txt", "2 questions"]),
    ];
    golden.write_files(&place.path("data"));
    for (task, file, change, expected) in cases {
        let path = place.path("data").join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        change.apply(&path, &text);
        let output = evaluate(&model, &place.path("data"), &out, &["--task".into(), task.into()]);
        golden_evaluations::assert_refused(&output, 3, expected);
        assert!(!out.exists(), "{task} {file}");
        std::fs::write(&path, text).unwrap();
    }
    let usage: [(&[&str], &[&str]); 5] = [
        (&["--task", "alchemy"], &["alchemy", "arc_challenge"]),
        (&["--task", "gsm8k="], &["gsm8k=", "has no path after the ="]),
        (&["--task", "mmlu", "--task", "mmlu"], &["mmlu stands twice"]),
        (&["--task", "bbh", "--shots", "bbh=1"], &["published prompts"]),
        (&["--task", "gsm8k", "--tp", "3"], &["--tp 3"]),
    ];
    for (args, expected) in usage {
        let output = evaluate(&model, &place.path("data"), &out, &args.iter().map(|arg| arg.to_string()).collect::<Vec<_>>());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && expected.iter().all(|part| stderr.contains(part)), "{stderr}");
    }
}

/// What is wrong with a file.
enum Change<'a> {
    Whole(&'a str),
    /// This line, counted from 1, is another.
    Line(usize, &'a str),
    /// The first of these texts is another.
    Replace(&'a str, &'a str),
    Remove,
}

impl Change<'_> {
    fn apply(&self, path: &Path, text: &str) {
        let changed = match self {
            Change::Whole(text) => text.to_string(),
            Change::Line(number, line) => {
                let other = |(i, old): (usize, &str)| format!("{}\n", if i + 1 == *number { line } else { old });
                text.lines().enumerate().map(other).collect()
            }
            Change::Replace(from, to) => text.replacen(from, to, 1),
            Change::Remove => return std::fs::remove_file(path).unwrap(),
        };
        assert_ne!(changed, text, "{}: nothing was changed", path.display());
        std::fs::write(path, changed).unwrap();
    }
}
