//! A parameter on this rank: its tensor-parallel part, its gradient, and its initial values.

use super::config::{Init, ParamSpec, Split};
use super::fp8::Rounded;
use super::numerics::SampleSum;
use super::streamed::WeightRows;
use crate::device::packed::PackedWeight;
use crate::device::{Device, Store};
use crate::error::Result;
use crate::parallel::layout::{Coords, ParallelLayout};
use crate::parallel::slice::Slice;
use crate::rng::Random;
use crate::tensor::{DType, Tensor, TensorView, TensorViewMut};
use rayon::prelude::*;
use std::sync::Arc;

/// Whether gradients are needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Weights and gradients.
    Training,
    /// Weights only.
    Inference,
    /// The same, each to be given memory when it is read.
    Loading,
}

/// Which layers of a chunk use a parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uses {
    /// One layer.
    Once,
    /// The embedding and the output layer, tied.
    InputAndOutput,
}

/// What becomes of a gradient when its step is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum BetweenSteps {
    /// Zeros: the next step adds to them.
    Zeroed,
    /// Nothing, for the first product of the next step assigns it.
    Left,
    /// Nothing was done, and it is not yet of the step that runs.
    Stale,
}

/// One parameter's tensor-parallel part. `value` and `grad` have ceil(rows / dp) * dp rows, so that the collectives of the
/// sharded optimizer move equal blocks; layers see the first `rows` only, the rest is zero.
pub struct Param {
    /// Its row of the parameter table.
    pub spec: ParamSpec,
    /// What it covers of the global tensor.
    pub slice: Slice,
    /// The weights the layers compute with, float.
    pub value: Tensor,
    /// The scales of `value` when it is E4M3: see `fp8`.
    pub scale: Option<Tensor>,
    /// The weights in the device's own form: see `packed`. `value` has no rows then.
    pub packed: Option<PackedWeight>,
    /// In training in FP8: what the products of both directions take in the place of `value`.
    pub rounded: Option<Rounded>,
    /// Where the weights are when they have no memory here, of a weight with its rows or columns divided over tp: see `streamed`.
    pub streamed: Option<Arc<dyn WeightRows>>,
    /// f32 gradient, accumulated over micro-batches; None for inference.
    pub grad: Option<Tensor>,
    /// What becomes of `grad` between steps.
    between_steps: BetweenSteps,
    /// With canonical sums: what stands beside `grad` while a step's samples come in.
    sum: Option<SampleSum>,
    /// With canonical sums, of a tied embedding whose two uses are in one chunk: the gradient of its use as output layer.
    second: Option<(Tensor, SampleSum)>,
}

impl Param {
    /// Zeroed memory for this rank's part, or none yet.
    pub fn new(device: &dyn Device, spec: ParamSpec, at: (&ParallelLayout, Coords), dtype: DType, purpose: Purpose) -> Result<Param> {
        let (layout, coords) = at;
        let slice = spec.tp_slice(coords.tp, layout.tp);
        let mut shape = slice.shape.clone();
        if purpose == Purpose::Training {
            shape[0] = shape[0].next_multiple_of(layout.dp);
        }
        let grad = if purpose == Purpose::Training { Some(device.alloc(&shape, DType::F32)?) } else { None };
        let value = if purpose == Purpose::Loading { Tensor::nothing(&shape, dtype) } else { device.alloc(&shape, dtype)? };
        Ok(Param {
            value,
            scale: None,
            packed: None,
            rounded: None,
            streamed: None,
            grad,
            between_steps: BetweenSteps::Zeroed,
            sum: None,
            second: None,
            spec,
            slice,
        })
    }

    /// The same, of which all gradients are products that [`Ctx::add_weight_gradient`](super::ctx::Ctx) makes.
    pub fn of_products(self) -> Param {
        Param { between_steps: BetweenSteps::Left, ..self }
    }

    /// After a step: what the gradient holds is not wanted any more.
    pub fn end_gradient(&mut self, device: &dyn Device) {
        match self.between_steps {
            BetweenSteps::Zeroed => device.fill_zero(self.grad_mut()),
            BetweenSteps::Left | BetweenSteps::Stale => self.between_steps = BetweenSteps::Stale,
        }
    }

    /// How the next product goes into the gradient.
    pub fn next_product(&mut self) -> Store {
        if self.between_steps != BetweenSteps::Stale {
            return Store::Accumulate;
        }
        self.between_steps = BetweenSteps::Left;
        Store::Assign
    }

    /// Takes the memory of canonical sums, for at most this many blocks of samples a replica.
    /// Err: out of memory.
    pub fn reserve_sums(&mut self, device: &dyn Device, most_blocks: usize, uses: Uses) -> Result<()> {
        let shape = self.grad().dims().to_vec();
        self.sum = Some(SampleSum::new(device, &shape, most_blocks)?);
        if uses == Uses::InputAndOutput {
            self.second = Some((device.alloc(&shape, DType::F32)?, SampleSum::new(device, &shape, most_blocks)?));
        }
        Ok(())
    }

    /// The gradient with padding rows, and the sum beside it. Panics unless `reserve_sums` was called.
    pub fn grad_and_sum_mut(&mut self) -> (&mut Tensor, &mut SampleSum) {
        let sum = self.sum.as_mut().expect("canonical sums have memory reserved before the first step");
        (self.grad.as_mut().expect("a parameter in training has a gradient"), sum)
    }

    /// Makes `grad` that of the other use of a tied embedding whose uses are summed apart; nothing for other parameters.
    pub fn swap_gradients(&mut self) {
        if let (Some(grad), Some(sum), Some(second)) = (&mut self.grad, &mut self.sum, &mut self.second) {
            std::mem::swap(grad, &mut second.0);
            std::mem::swap(sum, &mut second.1);
        }
    }

    /// The gradients of both uses of a tied embedding that are summed apart.
    pub fn both_gradients_mut(&mut self) -> Option<(&mut Tensor, &mut Tensor)> {
        self.grad.as_mut().zip(self.second.as_mut().map(|second| &mut second.0))
    }

    /// Whether every tensor-parallel rank holds all of it (norms): its gradient is then a partial sum under sequence parallelism
    /// until `Chunk::finish_gradients`, and a whole that must be counted once in the global norm after it.
    pub fn is_replicated_over_tp(&self) -> bool {
        self.spec.split == Split::None
    }

    /// The weight without padding rows, to compute with.
    pub fn weight(&self) -> TensorView<'_> {
        self.value.rows(0..self.slice.shape[0])
    }

    /// The gradient with padding rows. Panics for inference.
    pub fn grad(&self) -> &Tensor {
        self.grad.as_ref().expect("a parameter in training has a gradient")
    }

    /// The gradient with padding rows, to write.
    pub fn grad_mut(&mut self) -> &mut Tensor {
        self.grad.as_mut().expect("a parameter in training has a gradient")
    }

    /// The gradient without padding rows, to accumulate into.
    pub fn dweight(&mut self) -> TensorViewMut<'_> {
        let rows = 0..self.slice.shape[0];
        self.grad_mut().rows_mut(rows)
    }

    /// Both, with padding rows.
    pub fn value_and_grad_mut(&mut self) -> (&mut Tensor, &mut Tensor) {
        (&mut self.value, self.grad.as_mut().expect("a parameter in training has a gradient"))
    }
}

/// Initial values of a slice of a parameter, a pure function of seed, name and global index: the same numbers under every
/// layout.
pub fn init_values(spec: &ParamSpec, slice: &Slice, seed: u64) -> Vec<f32> {
    let std = match spec.init {
        Init::Constant(value) => return vec![value; slice.n_elements()],
        Init::Normal { std } => std,
    };
    let noise = Random::new(seed, &format!("init {}", spec.name));
    let n_columns: usize = spec.shape[1..].iter().product();
    let (first_column, columns) = if slice.shape.len() > 1 { (slice.offset[1], slice.shape[1]) } else { (0, 1) };
    let mut values = vec![0f32; slice.n_elements()];
    values.par_chunks_mut(columns.max(1)).enumerate().for_each(|(row, values)| {
        let start = (slice.offset[0] + row) * n_columns + first_column;
        values.iter_mut().enumerate().for_each(|(column, value)| *value = (std * noise.normal((start + column) as u64)) as f32);
    });
    values
}
