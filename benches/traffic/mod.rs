//! What an operation must read and write once, of which its bandwidth is reckoned.

use crate::cases::{Case, Role};
use trireme::tensor::Tensor;

/// Bytes that must be read and written; a KV cache is full of tokens.
pub fn bytes(case: &Case, tensors: &[Tensor]) -> f64 {
    let all = |tensor: &Tensor| tensor.n_bytes() as f64;
    let rows = |n: usize, tensor: &Tensor| (n * tensor.row_len() * tensor.dtype().bytes()) as f64;
    let each = case.args.iter().zip(tensors).map(|(arg, tensor)| match (case.operation, arg.role) {
        // Only the rows of the tokens are touched.
        ("embed", Role::Input) if tensor.dims().len() == 2 => rows(tensors[0].n_rows(), tensor),
        ("embed_backward", Role::Updated) => 2.0 * rows(tensors[1].n_rows(), tensor),
        ("attention_cached" | "rope_attention_cached", Role::Updated) if tensor.dims().len() == 3 => all(tensor),
        ("scale", Role::Input) | (_, Role::Room) => 0.0,
        (_, Role::Updated) => 2.0 * all(tensor),
        _ => all(tensor),
    });
    each.sum()
}
