//! Whole jobs that are killed and started again: ranks under mpirun and single processes, at planned places (`trireme::fault`), by
//! signals, and by the end of their time. Each job is the binary; what counts is that the run ends with the bits of one that nobody
//! disturbed.

mod common;

use common::{counting_documents, tiny_recipe, write_megatron};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use trireme::artifact::Manifest;
use trireme::checkpoint;
use trireme::rng::Random;

const STEPS: u64 = 8;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A recipe of eight steps that saves after each, and measures held-out loss after every third.
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let shards = place.path("shards");
        write_megatron(&shards, "train", &counting_documents(60, 61, 1));
        write_megatron(&shards, "validation", &counting_documents(20, 61, 2));
        let mut recipe = tiny_recipe(&shards);
        recipe.model.n_layers = 2;
        recipe.train.samples = STEPS * 8;
        recipe.checkpoint.every_steps = 1;
        recipe.checkpoint.keep_last = Some(3);
        recipe.checkpoint.margin_s = 0.0;
        recipe.validation = Some(trireme::recipe::Validation { shards, every_steps: 3, samples: 40 });
        std::fs::write(place.path("recipe.toml"), recipe.to_toml()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A job on so many ranks, under mpirun when there are several.
    fn job(&self, out: &str, n_ranks: usize, fault: &str, more: &[&str]) -> Command {
        // A program under nohup ignores SIGHUP, and so would those that it starts: here it counts.
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP");
        if n_ranks > 1 {
            command.args(["mpirun", "-n", &n_ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
        }
        command.arg(env!("CARGO_BIN_EXE_trireme-pretrain"));
        command.arg("--recipe").arg(self.path("recipe.toml")).arg("--out").arg(self.path(out)).args(more);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1").env("RAYON_NUM_THREADS", "1");
        command.env("TRIREME_FAULT", fault).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command
    }

    fn run(&self, out: &str, n_ranks: usize, fault: &str) -> Output {
        self.job(out, n_ranks, fault, &[]).output().unwrap()
    }

    /// The weights and moments at the end, as checksums of the files that hold them.
    fn end_of(&self, out: &str) -> Vec<(String, String)> {
        let last = self.path(out).join(format!("checkpoints/step-{STEPS:08}"));
        let manifest = Manifest::open(&last, checkpoint::KIND).unwrap();
        manifest.files.into_iter().filter(|file| file.name.starts_with("shard-")).map(|file| (file.name, file.xxh3)).collect()
    }

    /// Step and held-out loss, where it was measured.
    fn held_out(&self, out: &str) -> Vec<(u64, f64)> {
        let rows = trireme::metrics::read(&self.path(out).join("metrics.jsonl")).unwrap();
        let measured: Vec<(u64, f64)> = rows.iter().filter_map(|row| Some((row.step, row.validation_loss?))).collect();
        assert_eq!(measured.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 8]);
        measured
    }

    fn newest_step(&self, out: &str) -> Option<u64> {
        checkpoint::open(&self.path(out)).ok().map(|stored| stored.meta().step)
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn exists(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok()
}

/// SIGKILL of one rank of two at every kind of moment: at the start, forward, backward, in the middle of a collective, in the
/// optimizer, while measuring, and in each phase of a save. The job ends with an error, soon, and the next job of the same command
/// goes on; after all of them the run has the bits of an undisturbed one.
#[test]
fn killed_at_every_kind_of_moment() {
    assert!(exists("mpirun"), "no mpirun: install OpenMPI (apt-get install openmpi-bin)");
    let place = Place::new();
    let undisturbed = place.run("undisturbed", 2, "");
    assert!(undisturbed.status.success(), "{}", text(&undisturbed));
    let places = [
        "rank=1 at=init",
        "rank=0 at=forward n=11",
        "rank=1 at=backward n=3",
        "rank=1 at=collective n=60",
        "rank=0 at=update n=7",
        "rank=1 at=validation",
        "rank=0 at=save.begin n=2",
        "rank=1 at=save.snapshot",
        "rank=1 at=save.write n=9",
        "rank=1 at=io.sync n=2",
        "rank=0 at=save.report",
        "rank=0 at=save.commit n=2",
        "rank=0 at=io.rename n=3",
        "rank=0 at=save.durable",
    ];
    let mut n_resumed = 0;
    for at in places {
        let began = Instant::now();
        let output = place.run("killed", 2, &format!("kill {at}"));
        assert!(!output.status.success() && began.elapsed() < Duration::from_secs(60), "{at}: {}", text(&output));
        // Long before its end the run is where some place is not passed any more: then it begins anew.
        n_resumed += usize::from(text(&output).contains("resumed from"));
        if place.newest_step("killed") >= Some(STEPS - 2) {
            let end = place.run("killed", 2, "");
            assert!(end.status.success(), "after {at}: {}", text(&end));
            assert_eq!(place.end_of("killed"), place.end_of("undisturbed"), "after {at}");
            std::fs::remove_dir_all(place.path("killed")).unwrap();
        }
    }
    assert!(n_resumed >= 8, "only {n_resumed} of {} lives went on from a checkpoint", places.len());
    if place.path("killed").exists() {
        let end = place.run("killed", 2, "");
        assert!(end.status.success(), "{}", text(&end));
        assert_eq!(place.end_of("killed"), place.end_of("undisturbed"));
    }
}

/// Ranks and the layouts they start in.
const LAYOUTS: [(usize, &[&str]); 4] = [
    (1, &[]),
    (2, &[]), // two replicas
    (2, &["--set", "parallel.tp=2"]),
    (2, &["--set", "parallel.pp=2", "--set", "parallel.sequence_parallel=false"]),
];

/// Thirty kills at random places of random ranks, each life under another number of ranks or another layout than the one before may have
/// had: each goes on where the last was durable, and with reproducible numerics the run ends with the bits of one that nobody disturbed,
/// weights and moments.
#[test]
fn thirty_random_kills() {
    let place = Place::new();
    let run = |out: &str, (n_ranks, layout): (usize, &[&str]), fault: &str| {
        let more = [&["--set", "numerics.mode=reproducible"], layout].concat();
        place.job(out, n_ranks, fault, &more).output().unwrap()
    };
    let assert_undisturbed = |what: &str| {
        let end = |out: &str| place.path(out).join(format!("checkpoints/step-{STEPS:08}"));
        let compared =
            Command::new(env!("CARGO_BIN_EXE_trireme-checkpoint")).arg("diff").args([end("undisturbed"), end("killed")]).output();
        let compared = compared.unwrap();
        assert!(compared.status.success(), "{what}: {}", text(&compared));
    };
    assert!(run("undisturbed", LAYOUTS[0], "").status.success());
    let random = Random::new(31, "kills");
    let places = ["forward", "backward", "collective", "update", "save.write", "save.commit", "io.write", "io.sync", "io"];
    let (mut n_kills, mut draw, mut killed_in) = (0, 0, [0; LAYOUTS.len()]);
    let mut next = |n: usize| {
        draw += 1;
        (random.bits(draw) % n as u64) as usize
    };
    let mut n_runs = 0;
    while n_kills < 30 {
        let layout = next(LAYOUTS.len());
        let (at, n, rank) = (places[next(places.len())], 1 + next(60), next(LAYOUTS[layout].0));
        let output = run("killed", LAYOUTS[layout], &format!("kill at={at} n={n} rank={rank}"));
        if !output.status.success() {
            n_kills += 1;
            killed_in[layout] += 1;
            continue;
        }
        // It came to its end before the place was passed so often.
        assert_undisturbed(&format!("after {n_kills} kills"));
        std::fs::remove_dir_all(place.path("killed")).unwrap();
        n_runs += 1;
    }
    assert!(killed_in.iter().all(|&n| n > 0), "kills by layout: {killed_in:?}");
    let end = run("killed", LAYOUTS[1], "");
    assert!(end.status.success(), "{}", text(&end));
    assert_undisturbed(&format!("after {n_kills} kills, {n_runs} runs before"));
}

/// SIGTERM, SIGUSR1 and SIGHUP in any loop, twice too, and while a save is under way: the job ends what it is at, saves what there is to
/// save, and leaves with 75; the next goes on from that step to the bits of an undisturbed run, and measures what was left open. Nothing is
/// saved twice or torn.
#[test]
fn asked_to_stop_at_any_point() {
    let place = Place::new();
    assert!(place.run("undisturbed", 1, "").status.success());
    // A measurement has three rounds; there is one after steps 3, 6 and 8.
    let asks = [
        ("term at=verify", Err("train.bin: asked to stop while it was read through: nothing to save yet")),
        ("hup at=verify n=2", Err("validation.bin: asked to stop while it was read through: nothing to save yet")),
        ("usr1 at=init", Err("asked to stop before the first step: nothing to save yet")),
        ("term at=forward", Ok(1)),
        ("hup at=forward n=9", Ok(2)),
        ("usr1 at=update n=30", Ok(2)),
        ("term at=validation", Ok(3)),
        ("hup at=validation n=5", Ok(6)),
        ("usr1 at=validation n=8", Ok(8)),
        // The fifth write is one of the first save's, which goes on beside the second step or is over before it.
        ("usr1 at=save.write n=5; term at=save.begin n=2", Ok(1)),
        ("usr1 at=save.write; term at=save.commit; term at=io.rename n=2", Ok(1)),
        ("term at=save.durable n=3", Ok(3)),
    ];
    for (ask, expected) in asks {
        let output = place.run("stopped", 1, ask);
        assert_eq!(output.status.code(), Some(75), "{ask}: {}", text(&output));
        match expected {
            Err(said) => {
                assert_eq!(place.newest_step("stopped"), None, "{ask}");
                assert!(text(&output).contains(said), "{ask}: {}", text(&output));
            }
            Ok(soonest) => {
                let step = place.newest_step("stopped").unwrap();
                assert!((soonest..=soonest + 2).contains(&step), "{ask}: saved at {step}");
                assert!(text(&output).contains(&format!("asked to stop: saved at step {step} of {STEPS}")), "{ask}: {}", text(&output));
                assert!(!ask.contains("at=validation") || text(&output).contains("held-out loss left to the next job"), "{ask}");
            }
        }
        let folder = std::fs::read_dir(place.path("stopped/checkpoints")).into_iter().flatten();
        let left: Vec<String> = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(left.iter().all(|name| name.starts_with("step-") && !name.contains('.')), "{ask}: {left:?}");
        let end = place.run("stopped", 1, "");
        assert!(end.status.success(), "after {ask}: {}", text(&end));
        assert_eq!(place.end_of("stopped"), place.end_of("undisturbed"), "after {ask}");
        assert_eq!(place.held_out("stopped"), place.held_out("undisturbed"), "after {ask}");
        std::fs::remove_dir_all(place.path("stopped")).unwrap();
    }
}

/// Whoever looked on is gone (a terminal that was closed: SIGHUP, and nowhere to write to): the run saves and leaves with 75 all the same.
#[test]
fn nobody_listens_any_more() {
    let place = Place::new();
    for n_ranks in [1, 2] {
        let (out, pipe) = (format!("alone-{n_ranks}"), || std::io::pipe().unwrap().1);
        let mut job = place.job(&out, n_ranks, "hup at=forward n=9", &[]);
        let status = job.stdout(pipe()).stderr(pipe()).status().unwrap();
        // mpirun itself ends in other ways where it cannot write; what counts is what its ranks left.
        assert!(n_ranks > 1 || status.code() == Some(75), "{status:?}");
        // The ninth forward of a rank is in step 2 when it has all eight samples of a step, in step 3 when it has half of them.
        assert_eq!(place.newest_step(&out), Some(1 + n_ranks as u64));
    }
}

/// A run leaves before its time is over, by itself, with everything saved: by --walltime, by what SLURM puts into the environment, and by
/// what squeue says where it puts nothing there. Whoever watches the run can see until when it has time.
#[test]
fn leaves_before_its_time_is_over() {
    let place = Place::new();
    let endless = ["--set", "train.samples=800000000", "--set", "checkpoint.every_steps=50", "--set", "checkpoint.margin_s=12"];
    let mut command = place.job("flag", 1, "", &endless);
    command.args(["--walltime", "0:20"]);
    let of = |name: &str| place.job(name, 1, "", &endless);
    for (name, mut command) in [("flag", command), ("slurm", of("slurm")), ("squeue", of("squeue"))] {
        let (began, now) = (Instant::now(), std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64());
        match name {
            "slurm" => drop(command.env("SLURM_JOB_END_TIME", (now as u64 + 20).to_string())),
            "squeue" => {
                let program = place.path("bin/squeue");
                std::fs::create_dir(place.path("bin")).unwrap();
                // In SLURM's own words: time left, of this job, and nothing else.
                let script = "#!/bin/sh\n[ \"$*\" = '--noheader --jobs 4711 --format=%L' ] && echo '      0:20'\n";
                std::fs::write(&program, script).unwrap();
                std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
                let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
                command.env("PATH", path).env("SLURM_JOB_ID", "4711").env_remove("SLURM_JOB_END_TIME");
            }
            _ => {}
        }
        let output = command.output().unwrap();
        let (took, text) = (began.elapsed(), text(&output));
        assert_eq!(output.status.code(), Some(75), "{text}");
        // Eight seconds to start and to work, and twelve for a machine that is slow to end it.
        assert!(took < Duration::from_secs(20), "{name} took {took:?}");
        let step = place.newest_step(name).unwrap_or_else(|| panic!("{name}, nothing saved: {text}"));
        assert!(step > 0 && text.contains(&format!("saved at step {step} of")) && text.contains("the time is nearly up"), "{text}");
        let job = trireme::metrics::read_all(&place.path(name).join("metrics.jsonl")).unwrap().last_job.unwrap();
        let deadline = job.deadline_unix_s.unwrap();
        assert!((now + 18.9..now + 24.0).contains(&deadline), "{name}: {} s", deadline - now);
        assert!(text.contains("lost work if killed now") && text.contains("snapshot ") && text.contains("durable "), "{text}");
    }
}

/// A job that is killed while it makes its run directory leaves nothing that the next one stumbles over.
#[test]
fn killed_at_every_step_of_the_start() {
    let place = Place::new();
    let out = Path::new("started");
    for n in 1..=5 {
        let output = place.run("started", 1, &format!("kill at=io n={n}"));
        assert!(!output.status.success(), "{n}: {}", text(&output));
        let next = place.job("started", 1, "", &["--stop-after", "1"]).output().unwrap();
        assert!(next.status.success(), "{n}: {}", text(&next));
        std::fs::remove_dir_all(place.path(out.to_str().unwrap())).unwrap();
    }
}
