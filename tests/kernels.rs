//! The CUDA kernels without a GPU: their source runs on the CPU (kernels/emulate.h) and is compared with formulas.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/compile.rs"]
mod compile;
