//! What a run tells of itself besides its loss: where the time went, goodput over several jobs, TensorBoard's events, and
//! replicas that differ.

mod common;
mod oracles;

use common::{counting_documents, tiny_recipe, train, write_megatron};
use std::path::{Path, PathBuf};
use trireme::artifact::sealed_line;
use trireme::comm::{Groups, threads};
use trireme::device::Scratch;
use trireme::device::cpu::Cpu;
use trireme::error::Kind;
use trireme::metrics;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::{Pretrain, Validation};
use trireme::tensor::DType;
use trireme::train::replicas;
use trireme::train::state::TrainState;

fn shards(dir: &Path) -> PathBuf {
    let shards = dir.join("shards");
    write_megatron(&shards, "train", &counting_documents(60, 61, 1));
    write_megatron(&shards, "validation", &counting_documents(10, 61, 2));
    shards
}

/// A run of three steps on eight ranks, with held-out loss, compared and saved after each step.
fn recipe(dir: &Path) -> Pretrain {
    let shards = shards(dir);
    let mut recipe = tiny_recipe(&shards);
    (recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.dp) = (2, 2, Some(2));
    recipe.validation = Some(Validation { shards, every_steps: 2, samples: 4 });
    recipe.checkpoint.every_steps = 1;
    recipe.observe.compare_every_steps = 1;
    recipe.observe.prometheus = Some(dir.join("run.prom"));
    recipe
}

/// Each row says where the time of its step went: the parts add up to the mean duration, which is at most the slowest rank's,
/// nothing that was done is missing, and what was not done is zero.
#[test]
fn the_time_of_a_step_is_accounted_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = dir.path().join("run");
    train(&recipe(dir.path()), &run, None).expect("it trains");
    let metrics = metrics::read_all(&run.join("metrics.jsonl")).expect("readable");
    assert_eq!(metrics.rows.len(), 3);
    for row in &metrics.rows {
        let time = row.time.expect("every row has its times");
        let sum: f64 = time.of_step().iter().map(|(_, seconds)| seconds).sum();
        // Rounding of 16 sums; the mean of the ranks' durations is not above the longest.
        assert!(sum <= row.step_s * (1.0 + 1e-9) && sum >= 0.5 * row.step_s, "{sum} of {}: {time:?}", row.step_s);
        let done = [time.data, time.forward, time.backward, time.optimizer, time.exposed.tp, time.exposed.dp, time.exposed.pp];
        assert!(done.iter().all(|&seconds| seconds > 0.0), "{time:?}");
        assert_eq!(time.held_out > 0.0, row.validation_loss.is_some(), "{time:?}");
        assert_eq!((time.save > 0.0, time.compare > 0.0), (row.step > 1, row.step > 1), "{time:?}");
        let bubble = time.bubble_share.expect("two stages");
        assert!((0.0..1.0).contains(&bubble), "{bubble}");
        assert_eq!(row.mfu, None, "no rate is stated for a CPU");
    }
    assert!(metrics.rows.windows(2).all(|pair| pair[0].unix_s < pair[1].unix_s));
    let exposed = std::fs::read_to_string(dir.path().join("run.prom")).expect("written at each step");
    assert!(exposed.contains("\ntrireme_step{run=\"") && exposed.contains("/run\"} 3.0\n"), "{exposed}");
    let job = metrics.last_job.expect("a job");
    assert_eq!((job.from_step, job.ranks), (0, 8));
    assert!(job.unix_s < metrics.rows[0].unix_s);
}

/// Goodput over jobs: steps that a later job did again do not count, and the parts add up to the wall time. The lines are
/// written here, so that the numbers are known.
#[test]
fn goodput_counts_what_counts() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("metrics.jsonl");
    let line = |object: String| sealed_line(&object) + "\n";
    let job = |from: u64, unix_s: f64| line(format!("{{\"job\":{{\"from_step\":{from},\"ranks\":2,\"unix_s\":{unix_s}}}}}"));
    let row = |step: u64, step_s: f64, held_out: f64, unix_s: f64| {
        let zero = "\"data\":0,\"forward\":0,\"backward\":0,\"reduce\":0,\"optimizer\":0,\"other\":0,\"save\":0,\"compare\":0";
        let exposed = "\"exposed\":{\"world\":0,\"tp\":0,\"dp\":0,\"pp\":0}";
        line(format!(
            "{{\"step\":{step},\"consumed_tokens\":1,\"loss\":1,\"grad_norm\":1,\"lr\":1,\"step_s\":{step_s},\"tokens_per_s\":1,\
             \"tflops\":1,\"share_of_gemm_ceiling\":1,\"memory_peak_bytes\":1,\"time\":{{{zero},\"held_out\":{held_out},{exposed}}},\
             \"unix_s\":{unix_s}}}"
        ))
    };
    // Job 1: 10 s to start, steps of 4 s, 1 s of held-out loss after the first, 2 s of a save between; lost after step 3.
    let mut text = job(0, 100.0) + &row(1, 4.0, 1.0, 115.0) + &row(2, 4.0, 0.0, 121.0) + &row(3, 4.0, 0.0, 125.0);
    std::fs::write(&path, &text).expect("writable");
    let one = metrics::read_all(&path).expect("readable").goodput.expect("rows");
    assert_eq!((one.n_jobs, one.wall_s, one.steps_s, one.repeated_s), (1, 25.0, 12.0, 0.0));
    assert_eq!((one.starting_s, one.between_steps_s, one.between_jobs_s), (10.0, 3.0, 0.0));
    // Job 2 begins 30 s later from step 2, does step 3 again and step 4.
    text += &(job(2, 155.0) + &row(3, 5.0, 0.0, 165.0) + &row(4, 5.0, 0.0, 170.0));
    std::fs::write(&path, &text).expect("writable");
    let both = metrics::read_all(&path).expect("readable").goodput.expect("rows");
    assert_eq!((both.n_jobs, both.wall_s, both.steps_s, both.repeated_s), (2, 70.0, 18.0, 4.0));
    assert_eq!((both.starting_s, both.between_steps_s, both.between_jobs_s), (15.0, 3.0, 30.0));
    assert_eq!(both.parts().iter().map(|(_, seconds)| seconds).sum::<f64>(), both.wall_s);
    assert_eq!(both.share(), 18.0 / 70.0);
}

/// TensorBoard's file, read by a program that shares no code with ours: every record's two checksums, the version, the values of
/// every step under their tags, and where a job that went on superseded earlier ones.
#[test]
fn events_are_what_tensorboard_reads() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = dir.path().join("run");
    let recipe = recipe(dir.path());
    train(&recipe, &run, Some(2)).expect("it trains");
    // Torn by a kill: the next job removes what is left of the record.
    let path = run.join(metrics::EVENTS_FILE);
    let whole = std::fs::read(&path).expect("readable");
    std::fs::write(&path, &whole[..whole.len() - 7]).expect("writable");
    train(&recipe, &run, None).expect("it goes on");
    let Some(python) = oracles::python("struct") else { return };
    let lines = oracles::run(&python, "tensorboard_events.py", &[&path]);
    assert_eq!(lines[0], ["version", "brain.Event:2"]);
    let value = |step: u64, tag: &str| -> Vec<f32> {
        let same = |line: &&Vec<String>| line[0] == "value" && line[1] == step.to_string() && line[2] == tag;
        lines.iter().filter(same).map(|line| line[3].parse().expect("a number")).collect()
    };
    let rows = metrics::read(&run.join("metrics.jsonl")).expect("readable");
    for row in rows.iter().filter(|row| row.step != 2) {
        assert_eq!(value(row.step, "loss/training"), [row.loss as f32]);
        assert_eq!(value(row.step, "optimizer/learning_rate"), [row.lr as f32]);
        assert_eq!(value(row.step, "time/forward_s"), [row.time.expect("times").forward as f32]);
        assert_eq!(value(row.step, "loss/held_out").len(), usize::from(row.validation_loss.is_some()));
    }
    assert!(value(2, "loss/training").is_empty(), "the record that was torn");
    let starts: Vec<&str> = lines.iter().filter(|line| line[0] == "start").map(|line| line[1].as_str()).collect();
    assert_eq!(starts, ["1", "3"]);
}

/// A run that goes on says when it ends, when it saves next, and how far the time of its job reaches.
#[test]
fn prospects_are_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = dir.path().join("run");
    let mut recipe = recipe(dir.path());
    recipe.checkpoint.every_steps = 4;
    train(&recipe, &run, Some(2)).expect("it trains");
    // The same lines as of a job of 100 steps that takes 10 s a step and has 200 s left, and whose rank 0 lives.
    let toml = std::fs::read_to_string(run.join("recipe.toml")).expect("readable");
    std::fs::write(run.join("recipe.toml"), toml.replace("samples = 24", "samples = 800")).expect("writable");
    let now_s = metrics::now_unix_s();
    let metrics = metrics::read_all(&run.join("metrics.jsonl")).expect("readable");
    let job = metrics::Job { from_step: 0, ranks: 8, unix_s: now_s - 40.0, deadline_unix_s: Some(now_s + 200.0) };
    let mut text = sealed_line(&format!("{{\"job\":{}}}", serde_json::to_string(&job).expect("plain data"))) + "\n";
    for (row, age_s) in metrics.rows.iter().zip([10.0, 0.0]) {
        let row = metrics::Row { unix_s: now_s - age_s, step_s: 9.0, ..row.clone() };
        text += &(sealed_line(&serde_json::to_string(&row).expect("plain data")) + "\n");
    }
    std::fs::write(run.join("metrics.jsonl"), text).expect("writable");
    let rank_0 = trireme::flight::Recorder::new();
    rank_0.open(&run.join("flight"), 64, ParallelLayout { tp: 2, pp: 2, dp: 2, vp: 1 }, 0).expect("a ring");
    let (code, text) = inspect(&["watch", run.to_str().expect("UTF-8"), "--once"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("running on 8 ranks   step 2 of 100 (2 %)"), "{text}");
    // 98 steps of 10 s, saves at every fourth; 200 s are 20 steps. A second may pass until it is drawn.
    assert!(text.contains("ends in 16 min   next save in 20.0 s (step 4)") || text.contains("next save in 19."), "{text}");
    assert!(text.contains("time is up in 3 min, enough for step 22") || text.contains("enough for step 21"), "{text}");
}

/// One flipped bit in one weight of one rank is found, and named by rank, step and tensor, on every rank alike, with exit code 4:
/// in a weight that tensor-parallel ranks share out, over the replicas; in a norm, over the tensor-parallel ranks too.
#[test]
fn a_flipped_bit_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = tiny_recipe(dir.path()).model;
    let layout = ParallelLayout { tp: 1, pp: 2, dp: 3, vp: 1 };
    let compare = |layout: ParallelLayout, dtype: DType, flip: Option<(usize, &str)>| {
        let results = threads::run(layout.world(), |world| {
            let groups = Groups::new(world, layout);
            let device = Cpu::new();
            let mut state = TrainState::new(&device, &model, &groups, dtype).expect("memory");
            state.initialise(&device, &Scratch::new(), &groups, 1);
            if let Some((rank, name)) = flip
                && groups.world.rank() == rank
            {
                let params = state.chunks.iter_mut().flat_map(|chunk| chunk.params_mut());
                let param = params.into_iter().find(|param| param.spec.name == name).expect("on this stage");
                param.value.bytes_mut()[1] ^= 0x40;
            }
            replicas::compare(&state.chunks, &groups, 100)
        });
        assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
        results[0].clone()
    };
    for dtype in [DType::F32, DType::BF16] {
        assert_eq!(compare(layout, dtype, None), Ok(()));
        let rank = layout.rank(trireme::parallel::layout::Coords { tp: 0, pp: 1, dp: 1 });
        let error = compare(layout, dtype, Some((rank, "layers.3.mlp.up.weight"))).expect_err("a flipped bit");
        assert_eq!((error.kind(), error.exit_code()), (Kind::Numeric, 4));
        let expected = "step 100: rank 4 (tp0 pp1 dp1) does not hold what the majority of 3 replicas holds: layers.3.mlp.up.weight;";
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let pair = ParallelLayout { tp: 2, pp: 1, dp: 1, vp: 1 };
    assert_eq!(compare(pair, DType::F32, None), Ok(()));
    let error = compare(pair, DType::F32, Some((1, "layers.0.mlp_norm.weight"))).expect_err("a flipped bit");
    let expected = "step 100: rank 0 (tp0 pp0 dp0) and rank 1 (tp1 pp0 dp0) hold different weights, which of them are wrong cannot be \
                    told: layers.0.mlp_norm.weight;";
    assert!(error.to_string().starts_with(expected), "{error}");
}

fn inspect(args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_trireme-inspect")).args(args).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().expect("an exit code"), text)
}

/// The programs that people call on a run: `watch` fits 80 columns and has curve, rate, next save and the time of a step; `flight`
/// and `trace` read the rings; what is not there is an error in one line with exit code 3.
#[test]
fn a_run_is_shown() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = dir.path().join("run");
    let mut recipe = recipe(dir.path());
    recipe.train.samples = 8 * 12;
    recipe.checkpoint.every_steps = 8;
    train(&recipe, &run, Some(10)).expect("it trains");
    let path = run.to_str().expect("UTF-8");
    let (code, text) = inspect(&["watch", path, "--once"]);
    assert!(code == 0 && text.lines().all(|line| line.chars().count() <= 80) && text.lines().count() <= 34, "{text}");
    for expected in
        ["no job works on it", "step 10 of 12 (83 %)", "held-out ", " tokens/s", "goodput ", "Loss", "forward ", "bubble ", "wait pp"]
    {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
    let (code, text) = inspect(&["flight", path]);
    assert!(code == 0 && text.contains("none: all ranks ended in good order") && text.contains("Exposed communication"), "{text}");
    let out = dir.path().join("trace.json");
    let (code, text) = inspect(&["trace", path, "--rank", "5", "--steps", "2..3", "--out", out.to_str().expect("UTF-8")]);
    assert!(code == 0 && text.contains(" events"), "{text}");
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).expect("written")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("a list");
    assert!(events.iter().all(|event| event["pid"] == 5) && events.iter().any(|event| event["args"]["step"] == 3));
    let (code, text) = inspect(&["trace", path, "--rank", "8", "--out", "x.json"]);
    assert!(code == 3 && text.contains("no ring of rank 8; there are ranks 0-7 (8)"), "{text}");
    for command in ["watch", "flight"] {
        let (code, text) = inspect(&[command, dir.path().to_str().expect("UTF-8")]);
        assert!(code == 3 && text.lines().count() == 1, "{command}: {text}");
    }
    let (code, text) = inspect(&[path]);
    assert!(code == 0 && text.contains("\nGoodput: ") && text.contains("steps that count"), "{text}");
    train(&recipe, &run, None).expect("it goes on");
    let (code, text) = inspect(&["watch", path, "--once"]);
    assert!(code == 0 && text.contains("finished   step 12 of 12 (100 %)") && text.contains(" in 2 jobs"), "{text}");
}
