//! Parallel layout, the division of layers, slices of tensors, canonical pieces of sums, pipeline schedules and their simulation:
//! pure values. No I/O, no MPI, no device.

pub mod layout;
pub mod pieces;
pub mod schedule;
pub mod simulate;
pub mod slice;
pub mod stages;
