//! Checkpoints: saved under one layout and loaded under another, seen by h5py, damaged, interrupted. Truth is a formula
//! of the global index of an element, so no slice arithmetic of the library takes part in it.

#[path = "../oracles/mod.rs"]
mod oracles;

#[path = "../common/mod.rs"]
mod common;
mod compare;
mod damage;
mod faults;
mod foreign;
mod layouts;
mod parts;
mod refusals;
mod retention;
