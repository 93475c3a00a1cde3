//! The generators: orders of forwards and backwards, without messages. Each places `ReduceGrads` right after the last
//! backward of its chunk.

use super::{Action, PipelineShape, Schedule};
use crate::error::{Error, Result};

/// GPipe: all forwards, then all backwards in reverse order (so that the newest activations die first). Needs vp = 1.
pub fn gpipe(shape: PipelineShape) -> Result<Schedule> {
    require_one_chunk("gpipe", shape)?;
    let stage = |_stage: usize| {
        let forwards = (0..shape.n_micro).map(|micro| Action::Forward { chunk: 0, micro });
        let backwards = (0..shape.n_micro).rev().map(|micro| Action::Backward { chunk: 0, micro });
        forwards.chain(backwards).chain([Action::ReduceGrads { chunk: 0 }]).collect()
    };
    Ok(Schedule { shape, stages: (0..shape.pp).map(stage).collect() })
}

/// One forward, one backward: stage s runs pp - 1 - s forwards ahead, then alternates, then drains, so at most pp - s
/// micro-batches are alive on it. Needs vp = 1.
pub fn one_f_one_b(shape: PipelineShape) -> Result<Schedule> {
    require_one_chunk("1f1b", shape)?;
    let order: Vec<(usize, usize)> = (0..shape.n_micro).map(|micro| (0, micro)).collect();
    let stage = |stage: usize| alternate(&order, &order, shape.pp - 1 - stage);
    Ok(Schedule { shape, stages: (0..shape.pp).map(stage).collect() })
}

/// Interleaved 1F1B in Megatron-LM's order: micro-batches go in groups of pp; a group passes through chunk 0, then chunk 1,
/// ..; stage s runs 2 (pp - 1 - s) + (vp - 1) pp forwards ahead. Needs n_micro a multiple of pp.
pub fn interleaved(shape: PipelineShape) -> Result<Schedule> {
    let PipelineShape { pp, vp, n_micro } = shape;
    if n_micro % pp != 0 {
        let wrong =
            format!("{n_micro} micro-batches a step are not a multiple of {pp} pipeline stages, which the interleaved schedule needs");
        let (below, above) = (n_micro / pp * pp, n_micro.next_multiple_of(pp));
        let counts = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
        return Err(Error::recipe(wrong).remedy(format!("change batch.global so that a replica has {counts} micro-batches, or use 1f1b")));
    }
    let forwards = grouped(shape, |chunk| chunk);
    let backwards = grouped(shape, |chunk| vp - 1 - chunk);
    let stage = |stage: usize| alternate(&forwards, &backwards, 2 * (pp - 1 - stage) + (vp - 1) * pp);
    Ok(Schedule { shape, stages: (0..pp).map(stage).collect() })
}

/// ZB-H1 (Qi et al. 2023, section 2): 1F1B with backwards in halves. Stage s runs pp - 1 - s forwards ahead, as in 1F1B, and its
/// weight gradients lag s micro-batches behind its input gradients: so the last stage, which 1F1B keeps from sending gradients
/// up, sends them at once, and the weight gradients that are left fill the end of the step. At most pp micro-batches are between
/// forward and weight gradients on any stage: 1F1B's peak on its first stage. Needs vp = 1.
pub fn zero_bubble_h1(shape: PipelineShape) -> Result<Schedule> {
    require_one_chunk("zb-h1", shape)?;
    let order: Vec<(usize, usize)> = (0..shape.n_micro).map(|micro| (0, micro)).collect();
    let stage = |stage: usize| {
        let mut actions = Vec::with_capacity(3 * shape.n_micro + 1);
        for action in alternate(&order, &order, shape.pp - 1 - stage) {
            match action {
                Action::Backward { chunk, micro } => {
                    actions.push(Action::BackwardInput { chunk, micro });
                    actions.extend(micro.checked_sub(stage).map(|micro| Action::BackwardWeights { chunk, micro }));
                }
                Action::ReduceGrads { chunk } => {
                    let left = shape.n_micro.saturating_sub(stage)..shape.n_micro;
                    actions.extend(left.map(|micro| Action::BackwardWeights { chunk, micro }));
                    actions.push(Action::ReduceGrads { chunk });
                }
                other => actions.push(other),
            }
        }
        actions
    };
    Ok(Schedule { shape, stages: (0..shape.pp).map(stage).collect() })
}

/// Forwards alone, any shape: micro-batches in groups of pp through all chunks, so few activations wait between chunks.
pub fn forward_only(shape: PipelineShape) -> Schedule {
    let order = grouped(shape, |chunk| chunk);
    let stage: Vec<Action> = order.iter().map(|&(chunk, micro)| Action::Forward { chunk, micro }).collect();
    Schedule { shape, stages: vec![stage; shape.pp] }
}

/// (chunk, micro) for groups of pp micro-batches (the last may be short) through all chunks.
fn grouped(shape: PipelineShape, chunk_of: impl Fn(usize) -> usize) -> Vec<(usize, usize)> {
    let mut order = Vec::with_capacity(shape.vp * shape.n_micro);
    for first in (0..shape.n_micro).step_by(shape.pp) {
        for position in 0..shape.vp {
            for micro in first..shape.n_micro.min(first + shape.pp) {
                order.push((chunk_of(position), micro));
            }
        }
    }
    order
}

/// `ahead` forwards, then forward and backward in turn, then the backwards that are left.
fn alternate(forwards: &[(usize, usize)], backwards: &[(usize, usize)], ahead: usize) -> Vec<Action> {
    let ahead = ahead.min(forwards.len());
    let mut actions = Vec::with_capacity(2 * forwards.len() + 1);
    let mut left: std::collections::BTreeMap<usize, usize> = std::collections::BTreeMap::new();
    backwards.iter().for_each(|&(chunk, _)| *left.entry(chunk).or_insert(0) += 1);
    actions.extend(forwards[..ahead].iter().map(|&(chunk, micro)| Action::Forward { chunk, micro }));
    for (i, &(chunk, micro)) in backwards.iter().enumerate() {
        if let Some(&(chunk, micro)) = forwards.get(ahead + i) {
            actions.push(Action::Forward { chunk, micro });
        }
        actions.push(Action::Backward { chunk, micro });
        let n = left.get_mut(&chunk).expect("counted above");
        *n -= 1;
        if *n == 0 {
            actions.push(Action::ReduceGrads { chunk });
        }
    }
    actions
}

fn require_one_chunk(name: &str, shape: PipelineShape) -> Result<()> {
    if shape.vp != 1 {
        let wrong = format!("parallel.vp = {} with parallel.schedule = \"{name}\", which has one chunk a stage", shape.vp);
        return Err(Error::recipe(wrong).remedy("set parallel.vp = 1, or parallel.schedule = \"interleaved\""));
    }
    Ok(())
}
