//! Trireme: an MPI-style batch toolkit for everything in the Nemotron-4 340B report.
//!
//! Layers, lowest first; a module may use its own layer and those below (tests/layering.rs holds this):
//! L0 `error`, `exact`, `fault`, `rng`, `metrics`, `artifact`, `progress` - L1 `tensor`, `recipe`, `parallel`, `flight` - L2 `device`,
//! `comm` - L3 `model`, `data`, `text`, `checkpoint` - L4 `train`, `infer`, `eval` - L5 `runtime`, `cli`, `prove` - L6 the binaries.
//!
//! Letters: `T` tokens in a micro-batch, `H` hidden, `F` feed-forward, `V` vocabulary, `A` query heads, `G` kv heads, `D`
//! head dim, `L` layers, `M` micro-batches; tp pp dp vp: tensor, pipeline, data, virtual-pipeline parallel; lse:
//! log-sum-exp.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![allow(clippy::manual_is_multiple_of, clippy::neg_cmp_op_on_partial_ord)]

pub mod artifact;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod exact;
pub mod fault;
pub mod flight;
pub mod infer;
pub mod machine;
pub mod metrics;
pub mod model;
pub mod parallel;
pub mod progress;
pub mod prove;
pub mod recipe;
pub mod rng;
pub mod runtime;
pub mod tensor;
pub mod text;
pub mod train;
