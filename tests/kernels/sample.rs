//! Tokens drawn on the CUDA device over the emulator, in memory that was used before.

use crate::decode_cases::sample;
use crate::pooled::Pooled;
use trireme::device::cuda::Cuda;

/// The device takes the token that the host takes, for the same logits and noise: a wrong digit, tie or side of a boundary shows.
#[test]
fn the_device_draws_what_the_host_draws() {
    let Some(backend) = Pooled::new() else { return };
    sample::check(&Cuda::with_backend(backend));
}
