//! Training: the pipeline executor, the sharded optimizer, the batch, the run directory and the pretraining loop. Nothing
//! here knows the planner, and nothing here names a device or a communicator's kind.

pub mod batch;
pub mod executor;
pub mod optimizer;
pub mod pretrain;
pub mod run_dir;
pub mod state;
