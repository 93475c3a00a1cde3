//! Which benchmarks there are, and where their files stand. A task is one leaf, or a group of leaves with a score of its own.

use super::item::Leaf;
use super::{arc, bbh, gsm8k, hellaswag, mmlu, winogrande};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// A benchmark.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Benchmark {
    ArcChallenge,
    Winogrande,
    HellaSwag,
    Mmlu,
    Gsm8k,
    Bbh,
}

use Benchmark::*;

/// Every benchmark with its name and the examples that it shows if nothing else is asked for.
const BENCHMARKS: [(Benchmark, &str, usize); 6] = [
    (ArcChallenge, "arc_challenge", 0),
    (Winogrande, "winogrande", 0),
    (HellaSwag, "hellaswag", 0),
    (Mmlu, "mmlu", 5),
    (Gsm8k, "gsm8k", 5),
    (Bbh, "bbh", bbh::N_SHOTS),
];

/// A task as asked for: `NAME` or `NAME=PATH`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// `arc_challenge`, `mmlu`, `mmlu_stem`, `mmlu_anatomy`, `bbh_cot_fewshot_snarks`, ..
    pub name: String,
    /// Its file, or its folder.
    pub path: Option<PathBuf>,
}

impl std::str::FromStr for Asked {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Asked, String> {
        let (name, path) = text.split_once('=').map_or((text, None), |(name, path)| (name, Some(PathBuf::from(path))));
        found(name)?;
        if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(format!("{text:?} has no path after the =: give one, or leave out the ="));
        }
        Ok(Asked { name: name.into(), path })
    }
}

/// How many examples a benchmark shows: `NAME=N`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shots {
    benchmark: Benchmark,
    n: usize,
}

impl std::str::FromStr for Shots {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Shots, String> {
        let (name, n) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=N"))?;
        let n = n.parse().map_err(|_| format!("{n:?} is not a number of examples"))?;
        match BENCHMARKS.iter().find(|(_, known, _)| *known == name) {
            Some((Bbh, ..)) => Err(format!("bbh shows the {} examples of its published prompts", bbh::N_SHOTS)),
            Some((benchmark, ..)) => Ok(Shots { benchmark: *benchmark, n }),
            None => Err(format!("{name:?} is no benchmark; there are {}", names())),
        }
    }
}

/// Leaves whose items have a score together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group {
    /// As in lm-evaluation-harness.
    pub name: String,
    /// Names of its leaves, in the order in which the harness joins them.
    pub leaves: Vec<String>,
}

/// A task with its items.
#[derive(Clone, Debug)]
pub struct Task {
    /// As asked for; also the name of its evidence.
    pub name: String,
    /// At least one.
    pub leaves: Vec<Leaf>,
    /// Every group with all of its leaves here, the largest first.
    pub groups: Vec<Group>,
}

fn names() -> String {
    BENCHMARKS.map(|(_, name, _)| name).join(", ")
}

/// Which parts of which benchmark a name stands for: subjects or subtasks where it has such.
fn found(name: &str) -> std::result::Result<(Benchmark, Vec<&'static str>), String> {
    if let Some(subject) = name.strip_prefix("mmlu_") {
        let group = mmlu::GROUPS.iter().find(|(group, _)| *group == name).map(|(_, subjects)| subjects.to_vec());
        let one = || mmlu::GROUPS.iter().flat_map(|(_, subjects)| subjects.iter()).find(|known| **known == subject).map(|one| vec![*one]);
        if let Some(subjects) = group.or_else(one) {
            return Ok((Mmlu, subjects));
        }
    }
    if let Some(subtask) = name.strip_prefix("bbh_cot_fewshot_")
        && let Some(known) = bbh::SUBTASKS.iter().find(|known| **known == subtask)
    {
        return Ok((Bbh, vec![*known]));
    }
    match BENCHMARKS.iter().find(|(_, known, _)| *known == name) {
        Some((Mmlu, ..)) => Ok((Mmlu, mmlu::GROUPS.iter().flat_map(|(_, subjects)| subjects.iter().copied()).collect())),
        Some((Bbh, ..)) => Ok((Bbh, bbh::SUBTASKS.to_vec())),
        Some((benchmark, ..)) => Ok((*benchmark, Vec::new())),
        None => Err(format!("{name:?} is no task; there are {}, mmlu_SUBJECT and bbh_cot_fewshot_SUBTASK", names())),
    }
}

/// Err: examples for a benchmark that no task asks for, which would change nothing.
pub fn check_shots(asked: &[Asked], shots: &[Shots]) -> Result<()> {
    let is_asked = |shots: &Shots| asked.iter().any(|asked| found(&asked.name).is_ok_and(|(benchmark, _)| benchmark == shots.benchmark));
    let Some(unused) = shots.iter().find(|shots| !is_asked(shots)) else { return Ok(()) };
    let (_, name, _) = BENCHMARKS.iter().find(|(known, ..)| *known == unused.benchmark).expect("all are in the table");
    let wrong = format!("--shots {name}={}: no task of {name} is asked for", unused.n);
    Err(Error::recipe(wrong).remedy(format!("leave it out, or add --task {name}")))
}

/// Reads the files of a task, from its own path or `data`/BENCHMARK. With `limit` only the first items of each leaf are kept.
pub fn load(asked: &Asked, data: Option<&Path>, shots: &[Shots], limit: Option<usize>) -> Result<Task> {
    let (benchmark, parts) = found(&asked.name).map_err(Error::recipe)?;
    let (_, folder, default) = *BENCHMARKS.iter().find(|(known, ..)| *known == benchmark).expect("all are in the table");
    let n_shots = shots.iter().rev().find(|shots| shots.benchmark == benchmark).map_or(default, |shots| shots.n);
    let path = match (&asked.path, data) {
        (Some(path), _) => path.clone(),
        (None, Some(data)) => data.join(folder),
        (None, None) => {
            let wrong = format!("--task {0}: neither --data DIR nor --task {0}=PATH says where its files are", asked.name);
            return Err(Error::recipe(wrong).remedy("give one of them"));
        }
    };
    // The file itself, or the folder with the published names.
    let files = |test: &str, train: &str| match path.is_dir() || asked.path.is_none() {
        true => (path.join(test), path.join(train)),
        false => (path.clone(), path.with_file_name(train)),
    };
    let one = |load: fn(&Path, &Path, usize) -> Result<Leaf>, (test, train): (PathBuf, PathBuf)| Ok(vec![load(&test, &train, n_shots)?]);
    let mut leaves = match benchmark {
        ArcChallenge => one(arc::load, files("ARC-Challenge-Test.jsonl", "ARC-Challenge-Train.jsonl")),
        Winogrande => one(winogrande::load, files("dev.jsonl", "train_xl.jsonl")),
        HellaSwag => one(hellaswag::load, files("hellaswag_val.jsonl", "hellaswag_train.jsonl")),
        Gsm8k => one(gsm8k::load, files("test.jsonl", "train.jsonl")),
        Mmlu => parts.iter().map(|subject| mmlu::load(&path, subject, n_shots)).collect(),
        Bbh => parts.iter().map(|subtask| bbh::load(&path, subtask)).collect(),
    }?;
    leaves.iter_mut().for_each(|leaf| leaf.items.truncate(limit.unwrap_or(usize::MAX)));
    let groups = groups(benchmark, &leaves);
    Ok(Task { name: asked.name.clone(), leaves, groups })
}

/// The groups whose leaves are all there.
fn groups(benchmark: Benchmark, leaves: &[Leaf]) -> Vec<Group> {
    let group = |name: &str, leaves: Vec<String>| Group { name: name.into(), leaves };
    let of_subjects = |subjects: &[&str]| subjects.iter().map(|subject| format!("mmlu_{subject}")).collect::<Vec<String>>();
    let known = match benchmark {
        Mmlu => {
            let all = mmlu::GROUPS.iter().flat_map(|(_, subjects)| of_subjects(subjects)).collect();
            let parts = mmlu::GROUPS.iter().map(|(name, subjects)| group(name, of_subjects(subjects)));
            std::iter::once(group("mmlu", all)).chain(parts).collect()
        }
        Bbh => vec![group("bbh", bbh::SUBTASKS.iter().map(|subtask| format!("bbh_cot_fewshot_{subtask}")).collect())],
        ArcChallenge | Winogrande | HellaSwag | Gsm8k => Vec::new(),
    };
    let is_here = |name: &String| leaves.iter().any(|leaf| leaf.name == *name);
    known.into_iter().filter(|group| group.leaves.iter().all(is_here)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names mean what they mean in the harness; an unknown one says what there is.
    #[test]
    fn names_are_found() {
        let parts = |name: &str| found(name).unwrap().1.len();
        assert_eq!(
            [parts("mmlu"), parts("mmlu_stem"), parts("mmlu_anatomy"), parts("bbh"), parts("bbh_cot_fewshot_snarks")],
            [57, 19, 1, 27, 1]
        );
        assert_eq!(parts("arc_challenge"), 0);
        for wrong in ["mmlu_alchemy", "bbh_cot_fewshot_x", "arc"] {
            assert!(wrong.parse::<Asked>().unwrap_err().contains("winogrande"), "{wrong}");
        }
        let asked: Asked = "gsm8k=a/b=c.jsonl".parse().unwrap();
        assert_eq!(asked, Asked { name: "gsm8k".into(), path: Some("a/b=c.jsonl".into()) });
        assert!("bbh=2".parse::<Shots>().unwrap_err().contains("published prompts"));
        let (mmlu, arc) = (vec!["mmlu_stem".parse::<Asked>().unwrap()], "arc_challenge=5".parse::<Shots>().unwrap());
        check_shots(&mmlu, &["mmlu=1".parse().unwrap()]).unwrap();
        let error = check_shots(&mmlu, &["mmlu=1".parse().unwrap(), arc]).unwrap_err().to_string();
        assert_eq!(error, "--shots arc_challenge=5: no task of arc_challenge is asked for; leave it out, or add --task arc_challenge");
        assert_eq!("mmlu=0".parse::<Shots>().unwrap(), Shots { benchmark: Mmlu, n: 0 });
    }
}
