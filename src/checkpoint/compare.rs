//! Two checkpoints tensor by tensor, and the mean of several. Both read a few rows at a time and hold no whole tensor.

use super::KIND;
use super::save::{Meta, Planned, Streamed};
use super::shard::StoredType;
use super::stored::{Stored, StoredTensor, Wanted};
use crate::artifact::{Input, Manifest};
use crate::error::{Error, Result};
use crate::parallel::layout::ParallelLayout;
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use rayon::prelude::*;
use std::fmt;
use std::path::Path;

/// Bytes of a tensor in memory at a time, unless a row alone has more.
const BLOCK_BYTES: usize = 16 << 20;

/// What became of one tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct Difference {
    /// Its full name.
    pub name: String,
    /// How the two compare.
    pub verdict: Verdict,
}

/// How a tensor of one checkpoint compares with that of the same name in the other.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    /// The same bits.
    Equal,
    /// Elements differ.
    Differs {
        /// So many of them, by their bits.
        n_elements: u64,
        /// Largest distance, in representable numbers between the two (0 for -0 and 0). Of f32 and bf16 in f32.
        max_ulp: u64,
        /// Row-major index of the first element that differs most.
        at: u64,
    },
    /// Only the first checkpoint has it.
    OnlyInFirst,
    /// Only the second checkpoint has it.
    OnlyInSecond,
    /// The shapes differ.
    Shapes(Vec<usize>, Vec<usize>),
}

impl Verdict {
    /// Larger is worse.
    pub fn severity(&self) -> u64 {
        match self {
            Verdict::Equal => 0,
            Verdict::Differs { max_ulp, .. } => *max_ulp,
            _ => u64::MAX,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Equal => write!(f, "equal"),
            Verdict::Differs { n_elements, max_ulp, at } => {
                write!(f, "{n_elements} elements differ, by up to {max_ulp} ulp (element {at})")
            }
            Verdict::OnlyInFirst => write!(f, "only in the first"),
            Verdict::OnlyInSecond => write!(f, "only in the second"),
            Verdict::Shapes(a, b) => write!(f, "shapes {a:?} and {b:?}"),
        }
    }
}

/// Compares every tensor of two checkpoints, in the order of their names. Errors: one of them cannot be read.
pub fn diff(a: &Stored, b: &Stored) -> Result<Vec<Difference>> {
    let names: std::collections::BTreeSet<&String> = a.tensors().keys().chain(b.tensors().keys()).collect();
    let verdict = |name: &String| match (a.tensors().get(name), b.tensors().get(name)) {
        (Some(x), Some(y)) if x.shape != y.shape => Ok(Verdict::Shapes(x.shape.clone(), y.shape.clone())),
        (Some(x), Some(y)) => compare(name, (a, x), (b, y)),
        (Some(_), None) => Ok(Verdict::OnlyInFirst),
        _ => Ok(Verdict::OnlyInSecond),
    };
    names.into_iter().map(|name| Ok(Difference { name: name.clone(), verdict: verdict(name)? })).collect()
}

fn compare(name: &str, (a, x): (&Stored, &StoredTensor), (b, y): (&Stored, &StoredTensor)) -> Result<Verdict> {
    let dtype = if x.dtype == y.dtype { x.dtype.dtype() } else { DType::F32 };
    let (mut n_elements, mut max_ulp, mut at) = (0, 0, 0);
    let mut first = 0;
    for rows in blocks(&x.shape, dtype) {
        let (left, right) = (read(a, name, &rows, dtype)?, read(b, name, &rows, dtype)?);
        let size = dtype.bytes();
        let pairs = left.bytes().par_chunks_exact(size).zip(right.bytes().par_chunks_exact(size)).enumerate();
        let differing = pairs.filter(|(_, (p, q))| p != q).map(|(idx, (p, q))| (1, distance(p, q, dtype), idx as u64));
        // The first of those that differ most: the order of the reduction does not matter.
        let block = differing
            .reduce(|| (0, 0, u64::MAX), |p, q| (p.0 + q.0, p.1.max(q.1), if p.1 > q.1 || (p.1 == q.1 && p.2 < q.2) { p.2 } else { q.2 }));
        if block.0 > 0 && (n_elements == 0 || block.1 > max_ulp) {
            (max_ulp, at) = (block.1, first + block.2);
        }
        n_elements += block.0;
        first += left.n_elements() as u64;
    }
    Ok(if n_elements == 0 { Verdict::Equal } else { Verdict::Differs { n_elements, max_ulp, at } })
}

/// Representable numbers between two values, by the order of their bits; for whole numbers the difference.
fn distance(a: &[u8], b: &[u8], dtype: DType) -> u64 {
    let key = |bytes: &[u8]| -> i64 {
        let (bits, sign) = match dtype {
            DType::BF16 => (i64::from(u16::from_le_bytes([bytes[0], bytes[1]])), 1 << 15),
            DType::F32 | DType::U32 => (i64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])), 1 << 31),
            DType::F8E4M3 => unreachable!("checkpoints keep weights as they were before they were quantised"),
        };
        if dtype != DType::U32 && bits & sign != 0 { -(bits ^ sign) } else { bits }
    };
    key(a).abs_diff(key(b))
}

/// A tensor in blocks of rows.
fn blocks(shape: &[usize], dtype: DType) -> impl Iterator<Item = Slice> + use<> {
    let row_bytes = shape[1..].iter().product::<usize>() * dtype.bytes();
    let n_rows = (BLOCK_BYTES / row_bytes.max(1)).max(1);
    let shape = shape.to_vec();
    (0..shape[0]).step_by(n_rows).map(move |first| {
        let mut rows = Slice::whole(&shape);
        rows.offset[0] = first;
        rows.shape[0] = n_rows.min(shape[0] - first);
        rows
    })
}

fn read(from: &Stored, name: &str, rows: &Slice, dtype: DType) -> Result<Tensor> {
    let room = || Error::new(crate::error::Kind::Other, format!("no memory for {:?} of {name}", rows.shape));
    let mut tensor = Tensor::host(&rows.shape, dtype, None).ok_or_else(room)?;
    from.read(&mut [Wanted { name: name.into(), slice: rows.clone(), tensor: &mut tensor }])?;
    Ok(tensor)
}

/// The mean of the weights of several checkpoints of one model as a checkpoint of weights, at the step of the last. Means are taken in
/// f64 of the f32 master weights, where they are kept, and rounded once to the type of the weights.
///
/// Errors: the models or tokenizers differ, with both names; a checkpoint cannot be read; `out` is taken.
pub fn average(of: &[Stored], out: &Path) -> Result<Manifest> {
    let (first, last) = match of {
        [first, .., last] => (first, last),
        _ => return Err(Error::recipe(format!("{} checkpoints", of.len())).remedy("name at least two to average")),
    };
    for other in &of[1..] {
        let differs = |what: &str| {
            let wrong = format!("has another {what} than {}", first.dir().display());
            Err(Error::file(other.dir(), wrong).remedy("average checkpoints of one run, or of runs of one model"))
        };
        if other.meta().model != first.meta().model {
            return differs("model");
        }
        if other.meta().tokenizer != first.meta().tokenizer {
            return differs("tokenizer");
        }
    }
    let weights: Vec<(&String, &StoredTensor)> = first.tensors().iter().filter(|(name, _)| name.starts_with("weights/")).collect();
    let planned =
        weights.iter().map(|(name, tensor)| Planned { name: (*name).clone(), shape: tensor.shape.clone(), dtype: tensor.dtype.dtype() });
    let fingerprint = |stored: &Stored| stored.manifest().fingerprint.clone();
    let inputs = of.iter().map(|stored| Input { role: KIND.into(), path: stored.dir().into(), fingerprint: fingerprint(stored) }).collect();
    let meta = Meta {
        layout: ParallelLayout::SINGLE,
        recipe: serde_json::json!({ "average_of": of.iter().map(fingerprint).collect::<Vec<_>>() }),
        data_fingerprint: String::new(),
        ..last.meta().clone()
    };
    match Streamed::begin(out, meta, inputs, planned.collect())? {
        Err(finished) => Ok(finished),
        Ok(streamed) => streamed.write(|name, sink| {
            let tensor = &first.tensors()[name];
            blocks(&tensor.shape, DType::F32).try_for_each(|rows| sink(&mean(of, name, &rows, tensor.dtype)?))
        }),
    }
}

/// Rows of the mean, little-endian.
fn mean(of: &[Stored], name: &str, rows: &Slice, dtype: StoredType) -> Result<Vec<u8>> {
    let mut sum = vec![0.0f64; rows.n_elements()];
    for stored in of {
        let master = name.replacen("weights/", "master/", 1);
        let source = if stored.tensors().contains_key(&master) { &master } else { name };
        let values = read(stored, source, rows, DType::F32)?;
        sum.par_iter_mut().zip(values.f32()).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    let n = of.len() as f64;
    Ok(match dtype {
        StoredType::Bf16 => sum.iter().flat_map(|sum| nearest_bf16(sum / n).to_le_bytes()).collect(),
        _ => sum.iter().flat_map(|sum| ((sum / n) as f32).to_le_bytes()).collect(),
    })
}

/// One rounding, to nearest even. By way of an f32 whose last bit is odd where the f32 is not exact (Boldo and Melquiond 2008), so
/// that no tie appears that is none; `half` looks at the upper half of the f64 only.
fn nearest_bf16(x: f64) -> half::bf16 {
    let near = x as f32;
    let is_exact = f64::from(near) == x || !near.is_finite();
    let bits = match (is_exact || near.to_bits() & 1 == 1, f64::from(near).abs() > x.abs()) {
        (true, _) => near.to_bits(),
        (false, true) => near.to_bits() - 1,
        (false, false) => near.to_bits() + 1,
    };
    half::bf16::from_f32(f32::from_bits(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Neighbours are 1 apart on both sides of zero, and zeros of both signs are the same place.
    #[test]
    fn distances_count_representable_numbers() {
        let f32s = |a: f32, b: f32| distance(&a.to_le_bytes(), &b.to_le_bytes(), DType::F32);
        assert_eq!(f32s(1.0, 1.0f32.next_up()), 1);
        assert_eq!(f32s(-1.0, (-1.0f32).next_up()), 1);
        assert_eq!((f32s(0.0, -0.0), f32s(f32::from_bits(1), -f32::from_bits(1))), (0, 2));
        assert_eq!(f32s(1.0, 2.0), 1 << 23);
        let bf16s = |a: f32, b: f32| distance(&a.to_le_bytes()[2..], &b.to_le_bytes()[2..], DType::BF16);
        assert_eq!((bf16s(1.0, 2.0), bf16s(-0.0, 0.0), bf16s(-1.0, 1.0)), (1 << 7, 0, (2 * 127) << 7));
        assert_eq!(distance(&5u32.to_le_bytes(), &u32::MAX.to_le_bytes(), DType::U32), u64::from(u32::MAX) - 5);
    }
}
