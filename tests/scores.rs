//! What trireme-score writes: token log-probabilities that are training's own to the bit, likelihoods of choices, both forms of files.

mod common;
mod golden_evaluations;
mod oracles;

use common::{counting_documents, models, tiny_recipe, train, write_megatron};
use golden_evaluations::{Place, assert_refused, checkpoint, json, lines};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trireme::checkpoint as stored_checkpoint;
use trireme::checkpoint::Wanted;
use trireme::comm::{Groups, threads};
use trireme::device::cpu::Cpu;
use trireme::device::{Device, Fp8Scales, Scratch};
use trireme::infer::load::{layout_for, load_as, load_chunk};
use trireme::infer::score::{self, Sequence};
use trireme::infer::scorer::{self, Scorer};
use trireme::model::chunk::{Chunk, MicroBatch, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::parallel::schedule::{self, Messages, PipelineShape};
use trireme::recipe::{self, Mode, ScheduleKind};
use trireme::rng::Random;
use trireme::tensor::DType;
use trireme::train::executor::{self, Keep, Nothing};

const SEQ_LEN: usize = 16;
const N_SAMPLES: usize = 4;

/// Samples of one length, each with the token after its last; two and two begin with the same ten tokens, as answers to a question do.
fn samples() -> Vec<Sequence> {
    let noise = Random::new(5, "samples");
    let token = |sample: usize, t: usize| noise.bits((if t < 10 { sample / 2 } else { sample } * 100 + t) as u64) % 61;
    let tokens = |sample: usize| (0..=SEQ_LEN).map(|t| token(sample, t) as u32).collect();
    (0..N_SAMPLES).map(|sample| Sequence { id: format!("sample {sample}"), tokens: tokens(sample) }).collect()
}

/// Weights of the run in a chunk that is to be trained.
fn training_chunk(device: &dyn Device, run: &Path, groups: &Groups, dtype: DType) -> Chunk {
    let stored = stored_checkpoint::open(run).unwrap();
    let mut chunk = Chunk::new(device, &stored.meta().model, &groups.layout, groups.at, 0, dtype, Purpose::Training).unwrap();
    for param in chunk.params_mut() {
        let (name, slice, rows) = (format!("weights/{}", param.spec.name), param.slice.clone(), 0..param.slice.shape[0]);
        stored.read(&mut [Wanted { name, slice, tensor: &mut param.value.rows_mut(rows) }]).unwrap();
    }
    chunk
}

/// The same model with heads and a vocabulary that 3, 6 and 12 divide too.
fn divided_by_three(model: ModelConfig) -> ModelConfig {
    ModelConfig { n_heads: 24, n_kv_heads: 12, vocab_divisor: 24, ..model }
}

/// The token losses of a training step in reproducible mode, with its backward: tp 2 with sequence parallelism, two stages, two
/// micro-batches of two samples. Of each sample, from the rank that has them.
fn training_losses(run: &Path, dtype: DType) -> Vec<Vec<f32>> {
    let all = threads::run(4, |world| {
        let groups = Groups::new(world, layout_for(4, 2, 2).unwrap());
        let (device, scratch) = (Cpu::new(), Scratch::new());
        let asked = recipe::Numerics { mode: Mode::Reproducible, ..recipe::Numerics::default() };
        let numerics = Numerics::of(&asked, &device, N_SAMPLES, 1).unwrap();
        let mut chunks = [training_chunk(&device, run, &groups, dtype)];
        chunks[0].reserve_sums(&device, asked.blocks(N_SAMPLES)).unwrap();
        let batch = |micro: usize| {
            let samples = &samples()[2 * micro..2 * micro + 2];
            let part = |from: usize| samples.iter().flat_map(|one| one.tokens[from..from + SEQ_LEN].to_vec()).collect::<Vec<u32>>();
            let positions: Vec<u32> = (0..2 * SEQ_LEN).map(|t| (t % SEQ_LEN) as u32).collect();
            let batch = MicroBatch::new(&device, [&part(0), &part(1), &positions], &[0.01; 2 * SEQ_LEN], vec![0, SEQ_LEN, 2 * SEQ_LEN]);
            MicroBatch { first_sample: 2 * micro, ..batch.unwrap() }
        };
        let schedule = schedule::training(ScheduleKind::OneFOneB, PipelineShape { pp: 2, vp: 1, n_micro: 2 }, Messages::Ahead).unwrap();
        let ctx = Ctx { device: &device, tp: &*groups.tp, scratch: &scratch, sequence: SequenceMode::Sharded, numerics };
        let passed = executor::run(&schedule, &mut chunks, &ctx, &groups, (&[batch(0), batch(1)], Keep::Saved), &mut Nothing);
        passed.token_losses
    });
    let last = all.into_iter().find(|losses| !losses[0].is_empty()).expect("the last stage has losses");
    last.iter().flat_map(|losses| losses.chunks(SEQ_LEN).map(<[f32]>::to_vec)).collect()
}

fn scored_on(run: &Path, dtype: DType, asked: Option<Mode>, shape: (usize, usize, usize), batch_tokens: usize) -> Vec<Vec<f32>> {
    scored_with(run, (dtype, None), asked, shape, batch_tokens)
}

/// The same with weights in a format.
fn scored_with(
    run: &Path,
    (dtype, weights): (DType, Option<WeightFormat>),
    asked: Option<Mode>,
    shape: (usize, usize, usize),
    batch_tokens: usize,
) -> Vec<Vec<f32>> {
    let (tp, pp, dp) = shape;
    let all = threads::run(tp * pp * dp, |world| {
        let layout = layout_for(tp * pp * dp, tp, pp).unwrap();
        let (device, stored, groups) = (Cpu::new(), stored_checkpoint::open(run).unwrap(), Groups::new(world, layout));
        let numerics = scorer::numerics(asked, &device, weights).unwrap();
        let mut chunks = [load_as(&device, &stored, &groups, dtype, weights).unwrap()];
        let scorer = Scorer { device: &device, groups: &groups, batch_tokens, numerics, stop: &|| false };
        score::logprobs(&scorer, &mut chunks, &samples()).unwrap()
    });
    all[0].iter().map(|one| one.logprobs.iter().flatten().copied().collect()).collect()
}

fn score(what: &str, model: &Path, input: &Path, out: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trireme-score"));
    command.arg(what).arg("--checkpoint").arg(model).arg("--input").arg(input).arg("--out").arg(out).args(args).output().unwrap()
}

fn write_lines(path: &Path, values: &[Value]) {
    std::fs::write(path, values.iter().map(|value| format!("{value}\n")).collect::<String>()).unwrap();
}

/// Memory is that of the longest pass, not of all the numbers of rows that passes have: sequences of every length up to 200 take at most
/// four times what the longest takes alone (powers of two up to twice its rows, all of them kept). With a temporary kept
/// for every length it is a hundred times.
#[test]
fn memory_does_not_grow_with_the_input() {
    let place = Place::new();
    let model = checkpoint(&place);
    let peak_of = |lengths: std::ops::RangeInclusive<usize>| {
        let (device, stored) = (Cpu::new(), stored_checkpoint::open(&model).unwrap());
        let groups = Groups::new(Box::new(trireme::comm::solo::Solo::new()), ParallelLayout::SINGLE);
        let mut chunks = [load_as(&device, &stored, &groups, DType::F32, None).unwrap()];
        let before = device.memory().live_bytes;
        let numerics = scorer::numerics(None, &device, None).unwrap();
        let scorer = Scorer { device: &device, groups: &groups, batch_tokens: 1, numerics, stop: &|| false };
        let sequence = |n: usize| Sequence { id: n.to_string(), tokens: (0..n as u32).collect() };
        let scored = score::logprobs(&scorer, &mut chunks, &lengths.map(sequence).collect::<Vec<_>>()).unwrap();
        assert!(scored.iter().all(|one| one.sum.is_finite()));
        device.memory().peak_bytes - before
    };
    let (alone, all) = (peak_of(200..=200), peak_of(2..=200));
    println!("the longest alone {alone} bytes, all {all}");
    assert!(alone > 200 * 384 * 4 && all < 4 * alone, "{all} bytes for all, {alone} for the longest");
}

/// A policy scored against itself: the log-ratio of every token, between the forward of a training step and what trireme-score
/// writes, is exactly 0, whatever the batch, the layouts and the storage. DPO and RPO begin with a loss of exactly ln 2 because of it.
/// In fast numerics some token differs, so the test can fail.
#[test]
fn a_policy_scored_against_itself_has_a_log_ratio_of_zero() {
    let dir = tempfile::tempdir().unwrap();
    let shards = dir.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let (run, mut recipe) = (dir.path().join("run"), tiny_recipe(&shards));
    recipe.model = divided_by_three(recipe.model);
    train(&recipe, &run, None).unwrap();
    let input = dir.path().join("input.jsonl");
    write_lines(&input, &samples().iter().map(|one| json!({"id": one.id, "tokens": one.tokens})).collect::<Vec<_>>());
    for dtype in [DType::F32, DType::BF16] {
        let losses = training_losses(&run, dtype);
        let is_zero = |scores: &[Vec<f32>]| {
            let pairs = || scores.iter().flatten().zip(losses.iter().flatten());
            assert_eq!(pairs().count(), N_SAMPLES * SEQ_LEN);
            pairs().all(|(logprob, loss)| logprob.to_bits() == (-loss).to_bits() && logprob - -loss == 0.0)
        };
        for (shape, batch_tokens) in [
            ((1, 1, 1), 1),
            ((1, 1, 1), 1000),
            ((4, 1, 1), 20),
            ((1, 4, 1), 40),
            ((2, 1, 2), 16),
            ((1, 2, 3), 33),
            ((3, 1, 1), 1000),
            ((3, 2, 1), 20),
            ((6, 1, 1), 1),
            ((12, 1, 1), 1000),
        ] {
            assert!(is_zero(&scored_on(&run, dtype, None, shape, batch_tokens)), "{dtype:?} {shape:?} {batch_tokens}");
        }
        let out = dir.path().join(dtype.name());
        let output =
            score("logprobs", &run, &input, &out, &["--dtype", dtype.name(), "--batch-tokens", "50", "--numerics", "reproducible"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let of_line = |line: &Value| line["logprobs"].as_array().unwrap()[1..].iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert!(is_zero(&lines(&out.join("logprobs.jsonl")).iter().map(of_line).collect::<Vec<_>>()), "{dtype:?} through the file");
        assert!(!is_zero(&scored_on(&run, dtype, Some(Mode::Fast), (4, 1, 1), 1000)), "{dtype:?}: fast numerics have the same bits");
    }
}

/// Sequences that begin alike and go through the model together have the bits that each has alone: choices of one token, which are all
/// read off one row, and of several, questions that share solved examples, a sequence that is the beginning of another, the same one
/// twice; under every layout, in 8 bits too, and when the attention takes them in several calls. Breaks when a row sees a row that is not
/// its sequence's, has another's position, or is asked another's token.
#[test]
fn shared_rows_have_the_bits_of_sequences_alone() {
    let model = ModelConfig { init_std: 0.1, ..models::nemotron([2, 64, 6, 3, 16, 192, 384], 1536) };
    let noise = Random::new(6, "shared");
    let tokens = |key: usize, n: usize| -> Vec<u32> { (0..n).map(|t| (noise.bits((key * 10_000 + t) as u64) % 384) as u32).collect() };
    let shots = tokens(0, 1100);
    let mut sequences: Vec<(Vec<u32>, usize)> = Vec::new();
    for question in 1..4 {
        let context = [&shots[..], &tokens(question, 3 + 7 * question)].concat();
        for choice in 0..4 {
            let length = if question == 2 { 1 + 3 * choice } else { 1 };
            sequences.push(([&context[..], &tokens(10 + choice, length)].concat(), context.len()));
        }
    }
    sequences.push((shots[..700].to_vec(), 1));
    sequences.push((shots[..700].to_vec(), 690));
    sequences.push((tokens(20, 9), 1));
    sequences.push((shots[..5].to_vec(), 5)); // nothing is wanted of it
    let scores = |dtype: DType, weights: Option<WeightFormat>, shape: (usize, usize, usize), batch_tokens: usize, alone: bool| {
        let (tp, pp, dp) = shape;
        let all = threads::run(tp * pp * dp, |world| {
            let layout = layout_for(tp * pp * dp, tp, pp).unwrap();
            let (device, groups) = (Cpu::new(), Groups::new(world, layout));
            let numerics = scorer::numerics(Some(Mode::Reproducible), &device, weights).unwrap();
            let mut chunks = [Chunk::new(&device, &model, &layout, groups.at, 0, dtype, Purpose::Inference).unwrap()];
            chunks[0].initialise(&device, 3);
            weights.map_or(Ok(()), |format| chunks[0].pack(&device, &*groups.tp, format)).unwrap();
            let scorer = Scorer { device: &device, groups: &groups, batch_tokens, numerics, stop: &|| false };
            let wanted: Vec<scorer::Wanted> = sequences.iter().map(|(tokens, first)| scorer::Wanted { tokens, first: *first }).collect();
            match alone {
                true => wanted.iter().flat_map(|one| scorer.tokens(&mut chunks, &[*one]).unwrap()).collect(),
                false => scorer.tokens(&mut chunks, &wanted).unwrap(),
            }
        });
        assert!(all.iter().all(|scores| *scores == all[0]), "ranks disagree");
        all.into_iter().next().unwrap()
    };
    for (dtype, weights) in [(DType::F32, None), (DType::BF16, None), (DType::BF16, Some(WeightFormat::Int8))] {
        let expected = scores(dtype, weights, (1, 1, 1), 1, true);
        let lengths: Vec<usize> = expected.iter().map(|one| one.logprobs.len()).collect();
        assert_eq!(lengths, sequences.iter().map(|(tokens, first)| tokens.len() - first).collect::<Vec<_>>());
        for (shape, batch_tokens) in
            [((1, 1, 1), 1), ((1, 1, 1), 1200), ((1, 1, 1), 9000), ((3, 1, 1), 1200), ((3, 2, 1), 9000), ((1, 2, 2), 1300)]
        {
            let found = scores(dtype, weights, shape, batch_tokens, false);
            for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found, expected, "sequence {number} in {dtype:?} {weights:?} on {shape:?} with {batch_tokens}");
            }
        }
    }
}

/// With weights in FP8 and a scale for each token and output channel, log-probabilities have the same bits whatever is batched together
/// and under every layout, and others than without; with one scale for what runs together that is not promised.
#[test]
fn fp8_scores_do_not_depend_on_batch_or_layout() {
    let dir = tempfile::tempdir().unwrap();
    let shards = dir.path().join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    let (run, mut recipe) = (dir.path().join("run"), tiny_recipe(&shards));
    recipe.model = ModelConfig { hidden: 32, ffn_hidden: 192, ..divided_by_three(recipe.model) };
    train(&recipe, &run, None).unwrap();
    let rows = Some(WeightFormat::Fp8(Fp8Scales::Rows));
    for dtype in [DType::F32, DType::BF16] {
        let expected = scored_with(&run, (dtype, rows), None, (1, 1, 1), 1);
        assert_ne!(expected, scored_on(&run, dtype, None, (1, 1, 1), 1), "FP8 changes nothing");
        for (shape, batch_tokens) in [((1, 1, 1), 1000), ((4, 1, 1), 20), ((2, 2, 1), 40), ((1, 2, 2), 16), ((3, 1, 1), 30), ((6, 1, 1), 7)]
        {
            assert_eq!(expected, scored_with(&run, (dtype, rows), None, shape, batch_tokens), "{dtype:?} {shape:?} {batch_tokens}");
        }
    }
    let (device, tensor) = (Cpu::new(), Some(WeightFormat::Fp8(Fp8Scales::Tensor)));
    let error = scorer::numerics(Some(Mode::Reproducible), &device, tensor).err().unwrap();
    assert!(error.exit_code() == 2 && error.to_string().contains("one FP8 scale is for all that runs together"), "{error}");
    assert!(matches!(scorer::numerics(None, &device, tensor), Ok(Numerics::Fast)));
}

/// A signal reaches one rank some passes before the others: all ranks leave together, asked to be started again. A rank that left alone
/// would be waited for in the next exchange for ever; each layout must end within the test. Later signals do not spoil what is done.
#[test]
fn ranks_stop_scoring_together() {
    let place = Place::new();
    let model = checkpoint(&place);
    for (tp, pp, dp, asked) in [(1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 0), (1, 1, 2, 1), (1, 1, 3, 2), (2, 2, 1, 3)] {
        for (n_polls, expected) in [(2, Some(75)), (100, None)] {
            let codes = threads::run(tp * pp * dp, |world| {
                let (rank, layout) = (world.rank(), layout_for(tp * pp * dp, tp, pp).unwrap());
                let (device, stored, groups) = (Cpu::new(), stored_checkpoint::open(&model).unwrap(), Groups::new(world, layout));
                let mut chunks = [load_chunk(&device, &stored, &groups, DType::F32).unwrap()];
                let polls = std::sync::atomic::AtomicUsize::new(0);
                let stop = || rank == asked && polls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= n_polls;
                let scorer = Scorer { device: &device, groups: &groups, batch_tokens: 1, numerics: Numerics::Fast, stop: &stop };
                let many = [samples(), samples(), samples()].concat();
                score::logprobs(&scorer, &mut chunks, &many).err().map(|error| error.exit_code())
            });
            assert!(codes.iter().all(|&code| code == expected), "tp {tp} pp {pp} dp {dp}, rank {asked} asked: {codes:?}");
        }
    }
}

/// The questions of the tests, and what is asked in tokens.
fn questions() -> Vec<Value> {
    let long = "the oars go in, the oars go out. ".repeat(120);
    vec![
        json!({"id": "spaces", "context": "Question: what is 3 + 4?\nAnswer: ", "choices": ["7", "seven, which is more", "\u{fc}"]}),
        json!({"id": "empty", "context": "", "choices": [" oar", "Sail"]}),
        json!({"id": "long", "context": long, "choices": [" in", " out of the water"]}),
        json!({"id": "letters", "context": "Which letter comes after the first one?\nAnswer:", "choices": [" A", " B", " C", " D"]}),
        json!({"id": "tokens", "context": [5, 6, 7], "choices": [[8], [9, 10, 11]]}),
    ]
}

/// Likelihoods of choices: tokens as lm-evaluation-harness cuts them (white space before a choice belongs to it), sums of the
/// log-probabilities that `logprobs` has of the same tokens, to the bit, the largest of them, lengths of the text as given, and a context
/// that is too long loses its left. The model's own greedy answer is greedy, another is not.
#[test]
fn choices_have_the_likelihoods_of_their_tokens() {
    let place = Place::new();
    let model = checkpoint(&place);
    let (input, out) = (place.path("questions.jsonl"), place.path("choices"));
    write_lines(&input, &questions());
    let output = score("choices", &model, &input, &out, &["--batch-tokens", "100"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scored = lines(&out.join("choices.jsonl"));
    assert_eq!(
        scored.iter().map(|line| line["id"].as_str().unwrap()).collect::<Vec<_>>(),
        ["spaces", "empty", "long", "letters", "tokens"]
    );
    let tokenizer = stored_checkpoint::open(&model).unwrap().tokenizer().unwrap().unwrap();
    let mut whole = Vec::new();
    let mut expected = Vec::new();
    for (question, line) in questions().iter().zip(&scored) {
        for (choice, found) in question["choices"].as_array().unwrap().iter().zip(line["choices"].as_array().unwrap()) {
            let (mut context, ids) = match (question["context"].as_str(), choice.as_str()) {
                (Some(""), Some(choice)) => (vec![0], tokenizer.encode(choice)),
                (Some(context), Some(choice)) => {
                    let all = tokenizer.encode(&format!("{context}{choice}"));
                    let n = tokenizer.encode(context.trim_end()).len();
                    (all[..n].to_vec(), all[n..].to_vec())
                }
                _ => (ids_of(&question["context"]), ids_of(choice)),
            };
            let n_cut = (context.len() + ids.len()).saturating_sub(1537);
            context.drain(..n_cut);
            assert_eq!((ids_of(&found["tokens"]), found["n_cut"].as_u64().unwrap() as usize), (ids.clone(), n_cut), "{found}");
            let length = |n: fn(&str) -> usize| choice.as_str().map(|text| n(text) as u64);
            assert_eq!((found["chars"].as_u64(), found["bytes"].as_u64()), (length(|text| text.chars().count()), length(str::len)));
            expected.push((found["sum"].as_f64().unwrap(), found["logprobs"].clone(), ids.len()));
            let joined = [context, ids].concat();
            // What stands between keeps them from sharing rows.
            whole.extend([json!({"id": "x", "tokens": joined}), json!({"id": "between", "tokens": [383, 382]})]);
        }
        let sums: Vec<f64> = line["choices"].as_array().unwrap().iter().map(|choice| choice["sum"].as_f64().unwrap()).collect();
        let best = line["argmax"].as_u64().unwrap() as usize;
        assert!(sums.iter().all(|&sum| sum <= sums[best]), "{line}");
        let per_byte = line["argmax_per_byte"].as_u64().map(|best| best as usize);
        assert_eq!(per_byte.is_some(), question["context"].is_string());
        if let Some(best) = per_byte {
            let by_bytes = |i: usize| sums[i] / line["choices"][i]["bytes"].as_f64().unwrap();
            assert!((0..sums.len()).all(|i| by_bytes(i) <= by_bytes(best)), "{line}");
        }
    }
    assert!(scored[2]["choices"][0]["n_cut"].as_u64().unwrap() > 0 && expected.iter().any(|(_, _, n)| *n > 1));
    let (joined, logprobs) = (place.path("joined.jsonl"), place.path("logprobs"));
    whole.push(json!({"id": "alone", "tokens": [383]}));
    write_lines(&joined, &whole);
    assert!(score("logprobs", &model, &joined, &logprobs, &["--format", "jsonl"]).status.success());
    for (line, (sum, of_choice, n)) in lines(&logprobs.join("logprobs.jsonl")).iter().step_by(2).zip(&expected) {
        let all = line["logprobs"].as_array().unwrap();
        assert_eq!(Value::from(all[all.len() - n..].to_vec()), *of_choice);
        let total: f64 = all[all.len() - n..].iter().map(|x| f64::from(x.as_f64().unwrap() as f32)).sum();
        assert_eq!(total, *sum);
    }
    // A token alone has nothing before it: a sum of no terms is 0.0, not the -0.0 that adding up floats begins with.
    let alone = lines(&logprobs.join("logprobs.jsonl")).pop().unwrap();
    assert_eq!((alone["logprobs"].to_string(), alone["sum"].to_string()), ("[null]".into(), "0.0".into()), "{alone}");
    check_greedy(&place, &model);
    check_files(&place, &model, &input, &out);
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// What the model answers greedily, and the same with its last token replaced.
fn check_greedy(place: &Place, model: &Path) {
    let (requests, responses) = (place.path("requests.jsonl"), place.path("responses"));
    write_lines(&requests, &[json!({"id": "a", "tokens": [40, 41, 42], "max_new_tokens": 4, "temperature": 0})]);
    let mut generate = Command::new(env!("CARGO_BIN_EXE_trireme-generate"));
    generate.arg("--checkpoint").arg(model).arg("--requests").arg(&requests).arg("--out").arg(&responses);
    assert!(generate.output().unwrap().status.success());
    let greedy = ids_of(&lines(&responses.join("responses.jsonl"))[0]["tokens"]);
    let mut other = greedy.clone();
    *other.last_mut().expect("four tokens") ^= 1;
    let (input, out) = (place.path("greedy.jsonl"), place.path("greedy"));
    write_lines(&input, &[json!({"id": "a", "context": [40, 41, 42], "choices": [greedy, other]})]);
    assert!(score("choices", model, &input, &out, &[]).status.success());
    let choices = lines(&out.join("choices.jsonl"))[0]["choices"].clone();
    assert_eq!((&choices[0]["is_greedy"], &choices[1]["is_greedy"]), (&Value::Bool(true), &Value::Bool(false)), "{choices}");
}

/// HDF5 through h5py holds what the lines hold; each format alone writes its file only, and both are in the manifest.
fn check_files(place: &Place, model: &Path, input: &Path, both: &Path) {
    let files = |dir: &Path| -> Vec<String> {
        let manifest = json(&dir.join("manifest.json"));
        manifest["files"].as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(files(both), ["choices.h5", "choices.jsonl"]);
    for (format, name) in [("jsonl", "choices.jsonl"), ("hdf5", "choices.h5")] {
        let out = place.path(format);
        assert!(score("choices", model, input, &out, &["--format", format]).status.success());
        assert_eq!(files(&out), [name]);
        assert!(!out.join(if format == "jsonl" { "choices.h5" } else { "choices.jsonl" }).exists());
    }
    let Some(python) = oracles::python("h5py, numpy") else { return };
    let script = r#"
import h5py, json, sys
import numpy as np
h = h5py.File(sys.argv[1])
for q, line in enumerate(map(json.loads, open(sys.argv[2]))):
    assert h["ids"].asstr()[q] == line["id"] and h["argmax"][q] == line["argmax"], line
    first, end = h["starts"][q:q + 2]
    assert end - first == len(line["choices"])
    for c, choice in zip(range(first, end), line["choices"]):
        part = slice(*h["token_starts"][c:c + 2])
        assert h["tokens"][part].tolist() == choice["tokens"] and h["sums"][c] == choice["sum"], choice
        assert (h["logprobs"][part] == np.array(choice["logprobs"], dtype=np.float32)).all(), choice
        assert (h["chars"][c], h["bytes"][c], h["n_cut"][c]) == (choice["chars"] or 0, choice["bytes"] or 0, choice["n_cut"]), choice
        assert bool(h["is_greedy"][c]) == choice["is_greedy"], choice
print(len(h["starts"]) - 1, len(h["sums"]), len(h["tokens"]) == h["token_starts"][-1])
"#;
    let output = Command::new(python).args(["-c", script]).args([both.join("choices.h5"), both.join("choices.jsonl")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.trim(), "5 13 True");
}

/// A wrong line of questions is named, with both values where there are two; nothing is written.
#[test]
fn wrong_questions_are_named() {
    let place = Place::new();
    let (model, input, out): (PathBuf, _, _) = (checkpoint(&place), place.path("questions.jsonl"), place.path("out"));
    let long = "sail ".repeat(4000);
    let cases: [(Value, &str); 9] = [
        (json!({"id": "a", "context": "x", "choices": []}), "no choices"),
        (json!({"id": "a", "context": "x", "choices": ["y", ""]}), "choice 1: \"\" adds no token"),
        (json!({"id": "a", "context": "  ", "choices": ["y"]}), "the context \"  \" has no tokens"),
        (json!({"id": "a", "context": "x", "choices": [[1]]}), "both be texts"),
        (json!({"id": "a", "context": [1], "choices": [[]]}), "at least one token"),
        (json!({"id": "a", "context": [1], "choices": [[384]]}), "token 384 is not below the vocabulary size 384"),
        (json!({"id": "a", "context": "x", "choices": [long]}), "longest sequence is 1536"),
        (json!({"id": "a", "context": "x", "choices": ["y"], "gold": 0}), "gold"),
        (json!({"id": "a", "context": 7, "choices": ["y"]}), "did not match"),
    ];
    for (line, expected) in cases {
        write_lines(&input, &[json!({"id": "first", "context": "x", "choices": ["y"]}), line]);
        assert_refused(&score("choices", &model, &input, &out, &[]), 3, &["questions.jsonl: line 2: ", expected]);
        assert!(!out.exists());
    }
}
