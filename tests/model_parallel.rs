//! Layers divided over tensor-parallel ranks against formulas in float64; the divided model against one rank (whose own oracle
//! is tests/model_goldens.rs); and by name the bugs that divided training hides: it goes on, and the loss is only a little worse.

mod common;
#[path = "model_parallel/kept.rs"]
mod kept;
#[path = "model_parallel/layers.rs"]
mod layers;
#[path = "model_parallel/ranks.rs"]
mod ranks;
#[path = "model_parallel/whole.rs"]
mod whole;
