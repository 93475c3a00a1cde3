//! Two models on the same items: the difference of each score with a paired bootstrap (Efron and Tibshirani 1993, chapters 13 and 15;
//! Koehn 2004). Items are drawn with replacement, within each leaf of a group, and both models answer the same draws, so what makes an
//! item hard for both does not blur the difference.

use super::evidence::{self, Evidence};
use super::scores::{Score, Scores, TaskScores};
use crate::artifact::Manifest;
use crate::error::{Error, Result};
use crate::rng::Random;
use rayon::prelude::*;
use std::path::Path;

/// Kind of an evaluation's artifact.
pub const ARTIFACT_KIND: &str = "benchmark-evaluation";

/// How a bootstrap is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bootstrap {
    /// Draws of all items.
    pub n_resamples: usize,
    /// Key of the draws.
    pub seed: u64,
}

/// What the draws say of a difference.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Resampled {
    /// The interval that holds 95 % of the resampled differences.
    pub interval: [f64; 2],
    /// Two-sided: twice the share of resampled differences on the other side of 0 (or on it), at most 1.
    pub p: f64,
}

/// The difference of a score, B - A.
#[derive(Clone, PartialEq, Debug)]
pub struct Difference {
    /// The leaf or the group.
    pub task: String,
    /// `metric,filter`.
    pub metric: String,
    /// The score of A, and of B.
    pub scores: [f64; 2],
    /// None where a leaf has a single item, which says nothing of what others would have shown.
    pub resampled: Option<Resampled>,
    /// Items.
    pub n: usize,
}

/// All differences between two evaluations. Err: either is not finished, or they were not asked the same.
pub fn compare(a: &Path, b: &Path, bootstrap: Bootstrap) -> Result<Vec<Difference>> {
    [a, b].iter().try_for_each(|dir| Manifest::open(dir, ARTIFACT_KIND)?.verify(dir))?;
    let (of_a, of_b) = (Scores::read(a)?, Scores::read(b)?);
    let names = |scores: &Scores| scores.tasks.iter().map(|task| task.name.clone()).collect::<Vec<_>>().join(", ");
    if names(&of_a) != names(&of_b) {
        let wrong = format!("has the tasks {}, {} has {}", names(&of_a), b.display(), names(&of_b));
        return Err(Error::file(a, wrong).remedy("evaluate both models on the same tasks, in the same order"));
    }
    let mut all = Vec::new();
    for (task_a, task_b) in of_a.tasks.iter().zip(&of_b.tasks) {
        let file = format!("{}.jsonl", task_a.name);
        let items = [evidence::read(&a.join(&file))?, evidence::read(&b.join(&file))?];
        let [print_a, print_b] = [0, 1].map(|i| evidence::fingerprint(&items[i]));
        if print_a != print_b {
            let wrong = format!("{}: {} items of fingerprint {print_a}", task_a.name, items[0].len());
            let theirs = format!("{} has {} of fingerprint {print_b}", b.display(), items[1].len());
            return Err(Error::file(a, format!("{wrong}, {theirs}")).remedy("evaluate both models on the same files, --shots and --limit"));
        }
        all.extend(task_a.scores.iter().zip(&task_b.scores).map(|(score_a, score_b)| {
            assert_eq!((&score_a.task, &score_a.metric), (&score_b.task, &score_b.metric), "the same items have the same scores");
            difference(task_a, [score_a, score_b], &items, bootstrap)
        }));
    }
    Ok(all)
}

/// What a reader of the table must know: that not all items of the benchmarks were asked.
pub fn partial(a: &Path, b: &Path) -> Result<Option<String>> {
    let said = |(name, dir): (&str, &Path)| {
        let limit = Scores::read(dir)?.limit;
        Ok(limit.map(|limit| format!("{name} ({}) is of at most {limit} items of each task", dir.display())))
    };
    let said: Vec<String> = [("A", a), ("B", b)].into_iter().filter_map(|one| said(one).transpose()).collect::<Result<_>>()?;
    Ok((!said.is_empty()).then(|| format!("partial: {}: no comparison of benchmark scores; leave out --limit", said.join(", "))))
}

fn difference(task: &TaskScores, [a, b]: [&Score; 2], items: &[Vec<Evidence>; 2], bootstrap: Bootstrap) -> Difference {
    let own = [a.task.clone()];
    let leaves: &[String] = task.groups.get(&a.task).map_or(&own, |leaves| leaves);
    let of_leaf = |leaf: &String| -> Vec<f64> {
        let pairs = items[0].iter().zip(&items[1]).filter(|(item, _)| item.task == *leaf);
        pairs.map(|(of_a, of_b)| of_b.metrics[&a.metric] - of_a.metrics[&a.metric]).collect()
    };
    let strata: Vec<Vec<f64>> = leaves.iter().map(of_leaf).collect();
    let noise = Random::new(bootstrap.seed, &format!("compare {} {}", a.task, a.metric));
    let resampled = resample(&strata, noise, bootstrap.n_resamples);
    Difference { task: a.task.clone(), metric: a.metric.clone(), scores: [a.value, b.value], resampled, n: a.n }
}

/// The 95 % interval of the mean of the differences, each stratum drawn by itself, and the two-sided p; none for a stratum of one item,
/// which every draw repeats.
fn resample(strata: &[Vec<f64>], noise: Random, n_resamples: usize) -> Option<Resampled> {
    if strata.iter().any(|stratum| stratum.len() == 1) {
        return None;
    }
    let n: usize = strata.iter().map(Vec::len).sum();
    let mean = |resample: usize| {
        let mut counter = (resample * n) as u64;
        let mut sum = 0.0;
        for stratum in strata {
            for _ in 0..stratum.len() {
                sum += stratum[(noise.bits(counter) % stratum.len() as u64) as usize];
                counter += 1;
            }
        }
        sum / n as f64
    };
    let mut means: Vec<f64> = (0..n_resamples).into_par_iter().map(mean).collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((share * n_resamples as f64) as usize).min(n_resamples - 1)];
    let beyond = [means.iter().filter(|&&x| x <= 0.0).count(), means.iter().filter(|&&x| x >= 0.0).count()];
    // One more in both, so that no number of draws makes it 0.
    let p = 2.0 * (beyond[0].min(beyond[1]) + 1) as f64 / (n_resamples + 1) as f64;
    Some(Resampled { interval: [at(0.025), at(0.975)], p: p.min(1.0) })
}

/// As a table for people.
pub fn table(differences: &[Difference]) -> String {
    let line = |one: &Difference| {
        let [a, b] = one.scores;
        let (interval, p) = match one.resampled {
            Some(Resampled { interval: [low, high], p }) => (format!("[{low:+.4}, {high:+.4}]"), format!("{p:.4}")),
            None => ("-".into(), "-".into()),
        };
        let named = format!("{} {}", one.task, one.metric);
        format!("{named:48} {a:7.4} {b:7.4} {:+8.4} {interval:18} {p:>7} {:6}", b - a, one.n)
    };
    let head = format!("{:48} {:>7} {:>7} {:>8} {:18} {:>7} {:>6}", "task metric,filter", "A", "B", "B - A", "95 % interval", "p", "n");
    std::iter::once(head).chain(differences.iter().map(line)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against what can be counted: of two items that differ by 1 and 0, a quarter of the draws takes the second twice, so p is 1/2 and the
    /// interval 0 to 1; and against the normal approximation for many. Each share has a standard error of at most 0.5 / sqrt(draws).
    #[test]
    fn intervals_and_p_are_those_of_the_draws() {
        let n_resamples = 20_000;
        let Resampled { interval, p } = resample(&[vec![1.0, 0.0]], Random::new(1, "test"), n_resamples).unwrap();
        let tolerance = 2.0 * 5.0 * 0.5 / (n_resamples as f64).sqrt();
        assert!(interval == [0.0, 1.0] && (p - 0.5).abs() < tolerance, "{interval:?} {p}");
        let same = Resampled { interval: [0.0, 0.0], p: 1.0 };
        assert_eq!(resample(&[vec![0.0; 9]], Random::new(1, "test"), 100), Some(same));
        // 400 pairs: 60 better, 20 worse. The sum has mean 40 and variance 80 - 4: in items, 0.1 +- 0.0218.
        let many: Vec<f64> = (0..400)
            .map(|i| {
                if i < 60 {
                    1.0
                } else if i < 80 {
                    -1.0
                } else {
                    0.0
                }
            })
            .collect();
        let Resampled { interval: [low, high], p } = resample(&[many], Random::new(2, "test"), n_resamples).unwrap();
        let sd = 76f64.sqrt() / 400.0;
        // A quantile's error is that of its share over the density there, 0.0584 / sd, and a step of the sum.
        let error = 5.0 * (0.025f64 * 0.975 / n_resamples as f64).sqrt() / (0.0584 / sd) + 1.0 / 400.0;
        assert!((low - (0.1 - 1.96 * sd)).abs() < error && (high - (0.1 + 1.96 * sd)).abs() < error, "{low} {high} {error}");
        assert!(p < 0.001, "{p}");
    }

    /// A stratum is drawn by itself: where the leaves differ and nothing differs within them, no draw differs. A single item has neither
    /// interval nor p, however large its difference, and neither has a group with it, as they have no standard error.
    #[test]
    fn leaves_are_drawn_by_themselves() {
        let of = |strata: &[Vec<f64>]| resample(strata, Random::new(3, "test"), 1000);
        assert_eq!(of(&[vec![1.0; 3], vec![0.0; 5]]).unwrap().interval, [0.375, 0.375]);
        assert_eq!((of(&[vec![1.0]]), of(&[vec![1.0; 3], vec![0.0]])), (None, None));
        let resampled = |resampled| Difference { task: "arc".into(), metric: "acc,none".into(), scores: [0.0, 1.0], resampled, n: 1 };
        let all = table(&[resampled(of(&[vec![1.0]])), resampled(of(&[vec![1.0; 2]]))]);
        let lines: Vec<Vec<&str>> = all.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["arc", "acc,none", "0.0000", "1.0000", "+1.0000", "-", "-", "1"]);
        assert_eq!(lines[1][5..], ["[+1.0000,", "+1.0000]", "0.0020", "1"]);
    }
}
