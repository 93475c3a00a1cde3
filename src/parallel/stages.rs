//! How a model's layers are divided over its chunks, evenly or not: the first chunk has the embedding to carry as well, and the last
//! the head.

use super::layout::ParallelLayout;
use std::ops::Range;

/// Layers of each chunk of the model, by its number in the model: chunk * pp + stage.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stages {
    counts: Vec<usize>,
}

impl Stages {
    /// These numbers of layers, in model order.
    pub fn of(counts: Vec<usize>) -> Stages {
        Stages { counts }
    }

    /// The same number of layers in each chunk of the layout. Panics when they do not divide: the recipe checks it.
    pub fn even(layout: &ParallelLayout, n_layers: usize) -> Stages {
        Stages::of((0..layout.n_chunks()).map(|i| layout.layers(i % layout.pp, i / layout.pp, n_layers).len()).collect())
    }

    /// As few layers as possible on the heaviest chunk of pp * vp, where the embedding weighs as `embedding` layers and the head as
    /// `head`. Of equal choices, stages with less in all, and then later ones, which keep fewer micro-batches, get more.
    pub fn balanced(pp: usize, vp: usize, n_layers: usize, embedding: f64, head: f64) -> Stages {
        let mut counts = vec![0; pp * vp];
        let mut weights = vec![0.0; pp * vp];
        weights[0] += embedding;
        weights[pp * vp - 1] += head;
        for _ in 0..n_layers {
            let of_stage = |i: usize| weights.iter().skip(i % pp).step_by(pp).sum::<f64>();
            // Weights are far from infinite, so that all compare.
            let lighter =
                |&i: &usize, &j: &usize| weights[i].total_cmp(&weights[j]).then(of_stage(i).total_cmp(&of_stage(j))).then(j.cmp(&i));
            let lightest = (0..pp * vp).min_by(lighter).expect("at least one chunk");
            counts[lightest] += 1;
            weights[lightest] += 1.0;
        }
        Stages { counts }
    }

    /// The numbers of layers, in model order.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Layers of chunk `chunk` (0..vp) on stage `stage`.
    pub fn layers(&self, layout: &ParallelLayout, stage: usize, chunk: usize) -> Range<usize> {
        assert_eq!(self.counts.len(), layout.n_chunks(), "the division is for another layout");
        let number = chunk * layout.pp + stage;
        let first = self.counts[..number].iter().sum();
        first..first + self.counts[number]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No division has a lighter heaviest chunk than the balanced one: found by trying all of them, for small models. Breaks when
    /// the head's weight is forgotten or put on the wrong chunk.
    #[test]
    fn balanced_is_the_best_of_all() {
        fn all(n_chunks: usize, n_layers: usize) -> Vec<Vec<usize>> {
            if n_chunks == 1 {
                return vec![vec![n_layers]];
            }
            let rest = |first: usize| all(n_chunks - 1, n_layers - first).into_iter().map(move |rest| [vec![first], rest].concat());
            (0..=n_layers).flat_map(rest).collect()
        }
        for (pp, vp) in [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)] {
            for n_layers in 1..=9 {
                for (embedding, head) in [(0.0, 0.0), (1.0, 1.0), (0.3, 2.6), (0.0, 5.5), (3.0, 0.5)] {
                    let heaviest = |counts: &[usize]| {
                        let extra = |i: usize| if i == 0 { embedding } else { 0.0 } + if i + 1 == pp * vp { head } else { 0.0 };
                        counts.iter().enumerate().map(|(i, &n)| n as f64 + extra(i)).fold(0.0, f64::max)
                    };
                    let best = all(pp * vp, n_layers).iter().map(|counts| heaviest(counts)).fold(f64::INFINITY, f64::min);
                    let found = Stages::balanced(pp, vp, n_layers, embedding, head);
                    assert_eq!(found.counts().iter().sum::<usize>(), n_layers);
                    assert!(heaviest(found.counts()) <= best + 1e-12, "pp {pp} vp {vp}, {embedding} {n_layers} {head}: {found:?}");
                }
            }
        }
        assert_eq!(Stages::balanced(4, 1, 10, 0.0, 0.0).counts(), [2, 2, 3, 3]);
    }

    /// Ranges follow each other through the chunks in model order, and equal counts are the layout's own division.
    #[test]
    fn layers_follow_each_other() {
        let layout = ParallelLayout { pp: 2, vp: 2, ..ParallelLayout::SINGLE };
        let stages = Stages::of(vec![1, 3, 0, 4]);
        let ranges = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(stage, chunk)| stages.layers(&layout, stage, chunk));
        assert_eq!(ranges, [0..1, 1..4, 4..4, 4..8]);
        let even = Stages::even(&layout, 8);
        for (stage, chunk) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            assert_eq!(even.layers(&layout, stage, chunk), layout.layers(stage, chunk, 8));
        }
    }
}
