//! What trireme-inspect ledger answers, against counting samples one by one.

use crate::common::{counting_documents, train};
use crate::tools::{inspect, killed_after, ramp_and_phases, with_layout};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use trireme::data::order::DataOrder;
use trireme::data::shards::{Split, TokenShards};
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::Pretrain;

/// Where each document of a corpus of `shards(.., seed)` begins and ends.
fn document_ranges(seed: u64) -> Vec<Range<u64>> {
    let mut start = 0;
    let range = |document: Vec<u32>| {
        let range = start..start + document.len() as u64;
        start = range.end;
        range
    };
    counting_documents(60, 61, seed).into_iter().map(range).collect()
}

fn orders(recipe: &Pretrain) -> Vec<DataOrder> {
    let open = |source: &trireme::recipe::Source| (TokenShards::open(&source.shards, Split::Train).unwrap(), source.weight);
    let order =
        |data: &trireme::recipe::Data| DataOrder::new(data.train.iter().map(open).collect(), recipe.batch.seq_len, data.seed).unwrap();
    std::iter::once(&recipe.data).chain(recipe.phase.iter().map(|phase| &phase.data)).map(order).collect()
}

/// Two passes in the main phase, then the blend of the second; killed twice and resumed on other numbers of ranks. For every document
/// of either source: when it was trained on, and how often, is what walking over all samples finds.
#[test]
fn documents_are_found_where_they_were_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = ramp_and_phases(dir.path());
    recipe.train.samples = 400; // 60 documents of 50 tokens: about 185 samples a pass
    recipe.phase[0].samples = 120;
    recipe.checkpoint.every_steps = 7;
    let (first, second, run) = (dir.path().join("first"), dir.path().join("second"), dir.path().join("run"));
    train(&recipe, &first, Some(20)).unwrap();
    killed_after(&first, 14, &second);
    let wide = with_layout(&recipe, ParallelLayout { tp: 1, pp: 1, dp: 2, vp: 1 });
    train(&wide, &second, Some(38)).unwrap();
    killed_after(&second, 35, &run);
    train(&wide, &run, None).unwrap();

    let plan = recipe.plan();
    let orders = orders(&recipe);
    let names = [["a", ""], ["b", "a"]];
    for (name, seed) in [("a", 1), ("b", 2)] {
        let documents = document_ranges(seed);
        for number in [0usize, 1, 17, 30, 58, 59] {
            let document = &documents[number];
            let (mut n_samples, mut hits, mut steps) = (0u64, 0u64, BTreeSet::new());
            for step in 0..plan.n_steps() {
                let planned = plan.step(step);
                for index in planned.first_in_phase..planned.first_in_phase + planned.global as u64 {
                    let (source, sample) = orders[planned.phase].locate(index);
                    let tokens = sample * 16..=sample * 16 + 16;
                    if names[planned.phase][source] == name && tokens.clone().any(|token| document.contains(&token)) {
                        n_samples += 1;
                        steps.insert(step + 1);
                        hits += tokens.skip(1).filter(|token| document.contains(token)).count() as u64;
                    }
                }
            }
            let text = inspect(&["ledger", run.to_str().unwrap(), "--source", name, "--document", &number.to_string()]);
            if n_samples == 0 {
                assert!(text.contains("never trained on"), "{name} {number}: {text}");
                continue;
            }
            let targets = document.end - document.start.max(1);
            let expected =
                format!("trained on {:.2} times, in {n_samples} samples of {} steps:", hits as f64 / targets as f64, steps.len());
            assert!(text.contains(&expected), "{name} {number}: {expected:?} is not in\n{text}");
            let listed: BTreeSet<u64> = text
                .lines()
                .take_while(|line| !line.contains("without effect"))
                .filter_map(|line| line.trim().strip_prefix("step ")?.split(',').next()?.parse().ok())
                .collect();
            assert!(listed == steps || text.contains(" more"), "{name} {number}: {listed:?}, expected {steps:?}");
        }
    }
    // What the killed jobs did beyond their last checkpoint is told apart.
    let text = inspect(&["ledger", run.to_str().unwrap()]);
    for expected in ["from step 0 on 1 ranks: 20 steps, the last 6 superseded", "from step 14 on 2 ranks: 24 steps, the last 3 superseded"]
    {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
    let text = inspect(&["ledger", run.to_str().unwrap(), "--step", "18"]);
    assert_eq!(text.matches("step 18  ").count(), 2, "{text}");
    assert_eq!(text.matches("superseded (job 1)").count(), 1, "{text}");
    wrong_questions(&run);
}

/// What cannot be answered is one line, with exit code 2 or 3.
fn wrong_questions(run: &Path) {
    let at = run.to_str().unwrap();
    let cases: [(&[&str], i32, &str); 6] = [
        (&[at, "--document", "3"], 2, "of which shards"),
        (&[at, "--source", "a", "--document", "60"], 2, "has 60 documents"),
        (&[at, "--source", "c"], 2, "the recipe has"),
        (&[at, "--step", "999"], 2, "the ledger has steps 1.."),
        (&[at, "--source", "a", "--document", "3", "--text"], 3, "was not written by trireme-tokenize"),
        (&["/nowhere"], 3, "ledger.jsonl"),
    ];
    for (arguments, code, fragment) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_trireme-inspect")).arg("ledger").args(arguments).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(fragment), "{arguments:?}: {text}");
    }
}

/// Documents go by the place of their text too: the line of a JSONL file by its first byte, through tokenizer and split; text
/// that has changed since is refused.
#[test]
fn documents_go_by_their_text() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let lines: Vec<String> =
        (0..80).map(|i| format!("{{\"text\": \"number {i} of the lines, {}\"}}\n", "word ".repeat(i % 7 + 3))).collect();
    std::fs::write(at("text.jsonl"), lines.concat()).unwrap();
    let run_tool = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run_tool(env!("CARGO_BIN_EXE_trireme-train-tokenizer"), &["--input", "text.jsonl", "--vocab-size", "300", "--out", "tokenizer"]);
    let text = at("text.jsonl");
    let arguments = ["--input", text.to_str().unwrap(), "--tokenizer", "tokenizer", "--out", "tokens", "--validation-share", "0.3"];
    run_tool(env!("CARGO_BIN_EXE_trireme-tokenize"), &arguments);
    let shards = TokenShards::open(&at("tokens"), Split::Train).unwrap();
    let mut recipe = crate::common::tiny_recipe(&at("tokens"));
    recipe.model.vocab_size = shards.vocab_size().unwrap();
    train(&recipe, &at("run"), None).unwrap();
    let tokenizer = trireme::text::Tokenizer::open(&at("tokenizer")).unwrap();
    // Which lines were kept for training is read from the tokens themselves.
    let mut found = 0;
    for (i, line) in lines.iter().enumerate() {
        let offset: usize = lines[..i].iter().map(String::len).sum();
        let content: serde_json::Value = serde_json::from_str(line).unwrap();
        let ids = tokenizer.encode(content["text"].as_str().unwrap());
        let number = (0..shards.n_documents() as usize).find(|&number| {
            let tokens = shards.index().document_tokens(number);
            let mut stored = vec![0; (tokens.end - tokens.start) as usize];
            shards.read(tokens.start, &mut stored).unwrap();
            stored[..stored.len() - 1] == ids[..]
        });
        let Some(number) = number.filter(|_| i % 10 == 0) else { continue };
        let place = format!("text.jsonl@{offset}");
        let by_place = inspect(&["ledger", at("run").to_str().unwrap(), "--document", &place]);
        let by_number = inspect(&["ledger", at("run").to_str().unwrap(), "--document", &number.to_string(), "--text"]);
        assert_eq!(by_place, by_number);
        assert!(by_place.starts_with(&format!("document {number} of ")) && by_place.contains(&place), "{by_place}");
        found += 1;
    }
    assert!(found > 2, "{found} lines were looked for");
    std::fs::write(&text, lines.concat() + "{\"text\": \"more\"}\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_trireme-inspect"))
        .args(["ledger", at("run").to_str().unwrap(), "--document", "text.jsonl@0"])
        .output()
        .unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(3) && line.contains("has changed since it was tokenized"), "{line}");
}
