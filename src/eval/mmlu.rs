//! MMLU (Hendrycks et al. 2021): 57 subjects of four-way choices, five examples from the subject's `dev` file before each.

use super::fewshot::Sampler;
use super::item::{Item, Leaf, Metrics, choices_after, solved};
use super::python::strip;
use super::read::{csv, each};
use crate::error::{Error, Result};
use std::path::Path;

const SHAPE: &str = "question,A,B,C,D,letter";

/// The letters that stand for the choices.
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// Groups of subjects, in the order in which lm-evaluation-harness joins them.
pub const GROUPS: [(&str, &[&str]); 4] = [
    (
        "mmlu_stem",
        &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    ),
    (
        "mmlu_other",
        &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    ),
    (
        "mmlu_social_sciences",
        &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    ),
    (
        "mmlu_humanities",
        &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    ),
];

#[derive(PartialEq)]
struct Doc {
    text: String,
    gold: usize,
}

fn doc([question, a, b, c, d, letter]: [String; 6]) -> std::result::Result<Doc, String> {
    let gold = LETTERS.iter().position(|&one| one == letter).ok_or_else(|| format!("letter {letter:?} is none of A, B, C, D"))?;
    if let Some(empty) = [&a, &b, &c, &d].iter().position(|choice| choice.is_empty()) {
        return Err(format!("choice {} is empty", LETTERS[empty]));
    }
    Ok(Doc { text: format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", strip(&question)), gold })
}

fn docs(path: &Path) -> Result<Vec<Doc>> {
    each(path, csv(path, SHAPE)?, SHAPE, doc)
}

/// One subject from `dir/test/SUBJECT_test.csv` and `dir/dev/SUBJECT_dev.csv`.
pub fn load(dir: &Path, subject: &str, n_shots: usize) -> Result<Leaf> {
    let dev = dir.join(format!("dev/{subject}_dev.csv"));
    let docs_of_test = docs(&dir.join(format!("test/{subject}_test.csv")))?;
    let pool = if n_shots > 0 { docs(&dev)? } else { Vec::new() };
    let examples = Sampler::FirstN.draw(&pool, n_shots, None).map_err(|what| Error::file(&dev, what).remedy("ask for fewer --shots"))?;
    let topic = subject.replace('_', " ");
    let before = format!("The following are multiple choice questions (with answers) about {topic}.\n\n")
        + &solved(examples.iter().map(|one| (one.text.clone(), LETTERS[one.gold])), " ");
    let item = |(idx, doc): (usize, Doc)| -> Item {
        choices_after((idx + 1).to_string(), before.clone() + &doc.text, LETTERS.map(String::from).to_vec(), doc.gold)
    };
    let items = docs_of_test.into_iter().enumerate().map(item).collect();
    Ok(Leaf { name: format!("mmlu_{subject}"), n_shots, metrics: Metrics::Acc, items })
}
