//! The CUDA device without a GPU: the kernels' source runs on the CPU (kernels/emulate.h), alone and below the code that launches it.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/canonical.rs"]
mod canonical;
mod canonical_cases;
#[allow(dead_code)] // the bench reads more of it
#[path = "operations/cases.rs"]
mod cases;
#[allow(dead_code)] // the CPU's table is longer
#[path = "operations/check.rs"]
mod check;
mod common;
#[path = "kernels/compile.rs"]
mod compile;
#[path = "kernels/decode.rs"]
mod decode;
mod decode_cases;
#[path = "kernels/dependent.rs"]
mod dependent;
#[path = "kernels/driver.rs"]
mod driver;
#[path = "kernels/emulator.rs"]
mod emulator;
#[path = "kernels/faults.rs"]
mod faults;
#[path = "kernels/fp8.rs"]
mod fp8;
#[path = "kernels/generation.rs"]
mod generation;
#[path = "golden_runs/mod.rs"]
mod golden_runs;
#[path = "kernels/model.rs"]
mod model;
#[path = "kernels/numerics.rs"]
mod numerics;
mod numerics_runs;
#[path = "kernels/operations.rs"]
mod operations;
#[path = "operations/oracle.rs"]
mod oracle;
#[path = "kernels/ordered.rs"]
mod ordered;
#[path = "kernels/pooled.rs"]
mod pooled;
#[path = "kernels/products.rs"]
mod products;
#[path = "kernels/profile.rs"]
mod profile;
#[path = "golden_runs/reward.rs"]
mod reward;
#[path = "kernels/run.rs"]
mod run;
#[path = "kernels/sample.rs"]
mod sample;
#[path = "kernels/streams.rs"]
mod streams;
