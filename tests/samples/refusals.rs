//! What a job refuses to go on from, and what it does when the change is meant.

use crate::common::{counting_documents, tiny_recipe, train, train_accepting, write_megatron};
use crate::tools::{inspect, shards, step_dir};
use std::path::{Path, PathBuf};
use trireme::artifact::{ArtifactWriter, Begin, HashingFile};
use trireme::checkpoint;
use trireme::data::order::DataOrder;
use trireme::data::shards::{Split, TokenShards};
use trireme::device::{LinearScaling, RopeScaling};
use trireme::recipe::{Moments, Pretrain, RampStage, Start};
use trireme::train::identity::Changed;
use trireme::train::pretrain::Ended;

/// Shards with a manifest and a tokenizer, as trireme-tokenize leaves them.
fn artifact(dir: &Path, name: &str, seed: u64, tokenizer: &[u8]) -> PathBuf {
    let (out, raw) = (dir.join(name), dir.join(format!("{name}-raw")));
    let documents = counting_documents(60, 61, seed);
    write_megatron(&raw, "train", &documents);
    let Begin::Write(mut writer) = ArtifactWriter::begin(&out, "token-shards", serde_json::json!({}), vec![]).unwrap() else {
        panic!("{name} was there")
    };
    for (file, bytes) in [
        ("train.bin", std::fs::read(raw.join("train.bin")).unwrap()),
        ("train.idx", std::fs::read(raw.join("train.idx")).unwrap()),
        ("tokenizer.model", tokenizer.to_vec()),
    ] {
        let mut written = HashingFile::create(writer.dir(), file).unwrap();
        written.append(&bytes).unwrap();
        writer.add(written.close().unwrap());
    }
    let n_tokens: usize = documents.iter().map(Vec::len).sum();
    writer.count("train_tokens", n_tokens);
    writer.count("train_documents", documents.len());
    writer.count("vocab_size", 61);
    writer.commit().unwrap();
    out
}

/// Hexadecimal words of at least 16 digits.
fn fingerprints(line: &str) -> Vec<&str> {
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| word.len() >= 16 && word.bytes().all(|b| b.is_ascii_hexdigit()))
        .collect()
}

/// A run of two steps on shards with a tokenizer.
fn begun(dir: &Path) -> (Pretrain, PathBuf) {
    let recipe = tiny_recipe(&artifact(dir, "shards", 1, b"tokenizer one"));
    let run = dir.join("run");
    assert_eq!(train(&recipe, &run, Some(2)).unwrap(), Ended::StoppedAsPlanned);
    (recipe, run)
}

/// Other data, another tokenizer, another model and another recipe are each refused by one line with both fingerprints (or both
/// values) and the flag that accepts it; the run stays as it is. Silently going on would train on what nobody asked for.
#[test]
fn what_changed_is_refused_with_both_values() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, run) = begun(dir.path());
    let others = [artifact(dir.path(), "other-data", 2, b"tokenizer one"), artifact(dir.path(), "other-tokenizer", 1, b"tokenizer two")];
    let change = |change: &dyn Fn(&mut Pretrain)| {
        let mut changed = recipe.clone();
        change(&mut changed);
        changed
    };
    type Case<'a> = (&'a str, Pretrain, &'a [&'a str], usize);
    let scaling = RopeScaling::Linear(LinearScaling { factor: 2.5 });
    let cases: [Case; 7] = [
        ("data", change(&|r| r.data.train[0].shards = others[0].clone()), &[], 2),
        ("data", change(&|r| r.data.seed = 10), &[], 2),
        ("tokenizer", change(&|r| r.data.train[0].shards = others[1].clone()), &[], 2),
        ("model", change(&|r| r.model.rope_base = 5e5), &["model.rope_base = 10000 there, 500000 here"], 2),
        (
            "model",
            change(&|r| r.model.rope_scaling = Some(scaling)),
            &["model.rope_scaling = none there, {\"linear\":{\"factor\":2.5}} here"],
            2,
        ),
        ("recipe", change(&|r| r.optimizer.lr = 2e-2), &["`optimizer.lr = 0.01`", "`optimizer.lr = 0.02`"], 0),
        ("recipe", change(&|r| r.phase = crate::tools::ramp_and_phases(dir.path()).phase), &["`phase.0.name = nothing`"], 0),
    ];
    let before = std::fs::read(run.join("ledger.jsonl")).unwrap();
    for (what, changed, fragments, n_fingerprints) in &cases {
        let error = train(changed, &run, None).unwrap_err();
        let line = error.to_string();
        assert_eq!(error.exit_code(), 3, "{line}");
        assert!(line.contains(&format!("--accept-changed {what}")) && line.contains("step-00000002") && !line.contains('\n'), "{line}");
        assert!(fragments.iter().all(|fragment| line.contains(fragment)), "{line}");
        let found = fingerprints(&line);
        assert!(found.len() == *n_fingerprints && (found.is_empty() || found[0] != found[1]), "{found:?} in {line}");
        // Accepting something else is not accepting this.
        let all = [Changed::Data, Changed::Tokenizer, Changed::Model, Changed::Recipe];
        let rest: Vec<Changed> = all.into_iter().filter(|other| other.name() != *what).collect();
        assert_eq!(train_accepting(changed, &run, None, &rest).unwrap_err().to_string(), line);
    }
    assert_eq!(std::fs::read(run.join("ledger.jsonl")).unwrap(), before, "a refused job writes nothing");
    // The same shards in another place are the same data.
    std::fs::rename(dir.path().join("shards"), dir.path().join("moved")).unwrap();
    let moved = change(&|r| r.data.train[0].shards = dir.path().join("moved"));
    assert_eq!(train(&moved, &run, None).unwrap(), Ended::Finished);
    // A finished run is the same work or it is refused: by recipe and by data.
    assert_eq!(train(&moved, &run, None).unwrap(), Ended::WasFinished);
    let all = [Changed::Data, Changed::Recipe];
    let reseeded = change(&|r| (r.data.train[0].shards, r.data.seed) = (dir.path().join("moved"), 10));
    let line = train_accepting(&reseeded, &run, None, &all).unwrap_err().to_string();
    assert!(line.contains("finished with `data.seed = 9`, this job has `data.seed = 10`"), "{line}");
    let line = train(&Pretrain { data: cases[0].1.data.clone(), ..moved }, &run, None).unwrap_err().to_string();
    assert!(line.contains("was finished with data") && fingerprints(&line).len() == 2, "{line}");
}

/// A change that is meant goes on, and every later checkpoint, the run's manifest and trireme-inspect say what changed, when, and
/// from what to what; also when the next job does not give the flag again.
#[test]
fn an_accepted_change_is_part_of_the_lineage() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, run) = begun(dir.path());
    recipe.train.samples = 40;
    recipe.data.train[0].shards = artifact(dir.path(), "other", 2, b"tokenizer one");
    let both = [Changed::Data, Changed::Recipe];
    train_accepting(&recipe, &run, Some(3), &both).unwrap();
    assert_eq!(train(&recipe, &run, Some(4)).unwrap(), Ended::StoppedAsPlanned, "the newest checkpoint has the new data");
    assert_eq!(train(&recipe, &run, None).unwrap(), Ended::Finished);
    let (two, five) = (checkpoint::open(&step_dir(&run, 2)).unwrap(), checkpoint::open(&step_dir(&run, 5)).unwrap());
    let changes = &five.meta().trainer["accepted_changes"];
    assert_eq!(changes.as_array().map(Vec::len), Some(2), "{changes}");
    assert_eq!((&changes[0]["what"], &changes[0]["at_step"]), (&"data".into(), &2.into()));
    assert_eq!(changes[0]["was"], two.meta().data_fingerprint);
    assert_eq!(changes[0]["is"], five.meta().data_fingerprint);
    assert_eq!(changes[1]["was"], "`train.samples = 24`");
    let (was, is) = (&two.meta().data_fingerprint, &five.meta().data_fingerprint);
    for path in [step_dir(&run, 5), run.clone()] {
        let page = inspect(&[path.to_str().unwrap()]);
        assert!(page.contains("Accepted changes"), "{page}");
        assert!(page.contains(&format!("data changed after step 2 from {was} to {is}")), "{page}");
    }
    let tree = inspect(&[step_dir(&run, 5).to_str().unwrap(), "--lineage"]);
    assert!(tree.contains("data changed after step 2"), "{tree}");
    // What earlier jobs consumed of other data cannot be resolved any more, and the ledger says so.
    let page = inspect(&["ledger", run.to_str().unwrap()]);
    assert!(page.contains("not searched: 2 steps"), "{page}");
}

/// A ramp under which no step ends where the checkpoint stands is refused even when the recipe may change: step and samples would
/// no longer say the same.
#[test]
fn a_checkpoint_must_be_a_step_of_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, run) = begun(dir.path());
    recipe.batch.ramp = vec![RampStage { until_sample: 12, global: 4 }];
    let error = train_accepting(&recipe, &run, None, &[Changed::Recipe]).unwrap_err();
    let line = error.to_string();
    assert!(error.exit_code() == 3 && line.contains("stands at step 2, 16 samples; no step of this recipe ends there"), "{line}");
}

/// A job that goes on does not read its data through, which would take hours of a large corpus at every restart: a token that was
/// damaged meanwhile, outside of what is trained on, does not stop it. A job that begins, or whose data change, does read it.
#[test]
fn going_on_reads_no_more_than_it_trains_on() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, run) = begun(dir.path());
    let (bin, seq_len) = (dir.path().join("shards/train.bin"), recipe.batch.seq_len);
    let order =
        DataOrder::new(vec![(TokenShards::open(&dir.path().join("shards"), Split::Train).unwrap(), 1.0)], seq_len, recipe.data.seed);
    let order = order.unwrap();
    let used: Vec<u64> = (0..24).map(|index| order.locate(index).1).collect();
    let unused = (1..).find(|sample| !used.contains(sample) && !used.contains(&(sample - 1))).unwrap();
    let mut bytes = std::fs::read(&bin).unwrap();
    bytes[4 * seq_len * unused as usize] ^= 1;
    std::fs::write(&bin, bytes).unwrap();
    for (out, accepted) in [("fresh", &[][..]), ("run", &[Changed::Data][..])] {
        let line = train_accepting(&recipe, &dir.path().join(out), None, accepted).unwrap_err().to_string();
        assert!(line.contains("train.bin: checksum"), "{line}");
    }
    assert_eq!(train(&recipe, &run, None).unwrap(), Ended::Finished);
}

/// Sources of two tokenizers in one run are refused with both fingerprints: ids would mean two things.
#[test]
fn sources_must_share_their_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = tiny_recipe(&artifact(dir.path(), "one", 1, b"tokenizer one"));
    let mut second = recipe.data.train[0].clone();
    second.shards = artifact(dir.path(), "two", 2, b"tokenizer two");
    recipe.data.train.push(second);
    let line = train(&recipe, &dir.path().join("run"), None).unwrap_err().to_string();
    let found = fingerprints(&line);
    assert!(found.len() == 2 && found[0] != found[1] && line.contains("one") && line.contains("two"), "{line}");
}

/// A start from another run's checkpoint refuses another model and weights without moments, each with what to do.
#[test]
fn a_start_must_fit() {
    let dir = tempfile::tempdir().unwrap();
    let (mut recipe, run) = begun(dir.path());
    recipe.start = Some(Start { checkpoint: run.clone(), moments: Moments::Keep });
    let out = dir.path().join("continued");
    let mut changed = recipe.clone();
    changed.model.norm_eps = 1e-6;
    let line = train(&changed, &out, None).unwrap_err().to_string();
    assert!(
        fingerprints(&line).len() == 2
            && line.contains("model.norm_eps = 0.00001 there, 0.000001 here")
            && line.contains("--accept-changed model"),
        "{line}"
    );
    assert_eq!(train_accepting(&changed, &out, None, &[Changed::Model]).unwrap(), Ended::Finished);
    assert!(inspect(&[out.to_str().unwrap()]).contains("model changed after step 0"));
    recipe.start.as_mut().unwrap().checkpoint = shards(dir.path(), "no-run", 1);
    let line = train(&recipe, &dir.path().join("other"), None).unwrap_err().to_string();
    assert!(line.starts_with("opening start.checkpoint: "), "{line}");
}
