//! Tokens drawn on the CUDA device over the emulator.

use crate::decode_cases::sample;
use crate::emulator::emulator;
use trireme::device::cuda::Cuda;

/// The device takes the token that the host takes, for the same logits and noise: a wrong digit, tie or side of a boundary shows.
#[test]
fn the_device_draws_what_the_host_draws() {
    let Some(emulator) = emulator() else { return };
    sample::check(&Cuda::with_backend(emulator));
}
