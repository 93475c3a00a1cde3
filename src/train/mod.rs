//! Training: the pipeline executor, the sharded optimizer, what replicas exchange, the batch, the run directory and the
//! pretraining loop, with the judgement of each step's numbers and the ledger of what it consumed. Nothing here knows the
//! planner, and nothing here names a device or a communicator's kind.

pub mod batch;
pub mod exchanges;
pub mod executor;
mod health;
pub mod identity;
pub mod ledger;
pub mod optimizer;
pub mod pretrain;
mod profile;
pub mod replicas;
mod report;
mod resume;
mod run_data;
pub mod run_dir;
pub mod saving;
mod spans;
pub mod state;
mod trainer;

pub(crate) use trainer::{dtype_of, mean_loss, new_state};
