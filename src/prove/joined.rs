//! Parts of logical tensors as ranks hold them, and the way back: a part says by its slice what it covers, so that joining them needs
//! nothing of the layout that made them.

use crate::comm::Communicator;
use crate::model::config::ParamSpec;
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use std::collections::BTreeMap;

/// Elements that are joined at a time: what bounds the memory for the parts of all ranks.
const PORTION: usize = 1 << 20;

/// A rank's part of a logical tensor.
pub struct Part {
    /// What it covers.
    pub slice: Slice,
    /// Its elements, widened to f32.
    pub values: Vec<f32>,
}

/// Parts by the name of the parameter; a tied embedding has two on a rank that holds both uses.
pub type Parts = BTreeMap<String, Vec<Part>>;

impl Part {
    /// The first rows of `tensor`, f32 or bf16, those of the slice, copied from wherever they lie.
    pub fn of(tensor: &Tensor, slice: &Slice) -> Part {
        let rows = tensor.rows(0..slice.shape[0]);
        let bytes = rows.host_bytes();
        let bf16 = |b: &[u8]| half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
        let values = match tensor.dtype() {
            DType::BF16 => bytes.chunks_exact(2).map(bf16).collect(),
            DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            other => panic!("a part of {other:?}"),
        };
        Part { slice: slice.clone(), values }
    }

    /// The elements within `region`, row by row.
    fn within(&self, region: &Slice) -> Option<(Slice, Vec<f32>)> {
        let common = self.slice.intersect(region)?;
        let local = common.relative_to(&self.slice);
        let (width, columns) = (row_len(&self.slice), first_column(&local)..first_column(&local) + row_len(&local));
        let rows = local.offset[0]..local.offset[0] + local.shape[0];
        let values = rows.flat_map(|row| self.values[row * width..][columns.clone()].iter().copied()).collect();
        Some((common, values))
    }
}

fn row_len(slice: &Slice) -> usize {
    slice.shape.get(1).copied().unwrap_or(1)
}

fn first_column(slice: &Slice) -> usize {
    slice.offset.get(1).copied().unwrap_or(0)
}

/// Rows of a logical tensor put together.
pub struct Joined {
    /// All elements of these rows.
    pub values: Vec<f32>,
    /// (index, value) of what other ranks hold of them with other bits.
    pub conflicts: Vec<(usize, f32)>,
}

/// Joins the parts of a parameter and hands its rows on, in order, on every rank; `take` may do nothing on most. Panics when some
/// elements are on no rank. Collective.
pub fn join(world: &dyn Communicator, spec: &ParamSpec, mine: &Parts, take: &mut dyn FnMut(Joined)) {
    let whole = Slice::whole(&spec.shape);
    let none = Vec::new();
    let mine = mine.get(&spec.name).unwrap_or(&none);
    let step = (PORTION / row_len(&whole)).max(1);
    for first in (0..spec.shape[0]).step_by(step) {
        let region = whole.rows(first..first + step);
        let message: Vec<u8> = mine.iter().filter_map(|part| part.within(&region)).flat_map(|part| to_bytes(&part)).collect();
        take(put_together(&spec.name, &region, &world.gather_variable(&message)));
    }
}

/// First row, rows, first column, columns, then the values.
fn to_bytes((slice, values): &(Slice, Vec<f32>)) -> Vec<u8> {
    let head = [slice.offset[0], slice.shape[0], first_column(slice), row_len(slice)];
    let head = head.into_iter().flat_map(|n| (n as u64).to_le_bytes());
    head.chain(values.iter().flat_map(|value| value.to_le_bytes())).collect()
}

fn put_together(name: &str, region: &Slice, messages: &[Vec<u8>]) -> Joined {
    let columns = row_len(region);
    let mut values: Vec<Option<f32>> = vec![None; region.n_elements()];
    let mut conflicts = Vec::new();
    for mut message in messages.iter().map(Vec::as_slice) {
        while !message.is_empty() {
            let (head, rest) = message.split_at(32);
            let number = |i: usize| u64::from_le_bytes(head[8 * i..8 * i + 8].try_into().expect("eight bytes")) as usize;
            let (first_row, n_rows, first_column, width) = (number(0), number(1), number(2), number(3));
            let (body, rest) = rest.split_at(4 * n_rows * width);
            message = rest;
            for (i, bytes) in body.chunks_exact(4).enumerate() {
                let value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                let at = (first_row - region.offset[0] + i / width) * columns + first_column + i % width;
                if values[at].get_or_insert(value).to_bits() != value.to_bits() {
                    conflicts.push((at, value));
                }
            }
        }
    }
    let value = |held: Option<f32>| held.unwrap_or_else(|| panic!("{name}: some elements are on no rank"));
    Joined { values: values.into_iter().map(value).collect(), conflicts }
}
