//! Schedules in samples: learning rates and plans of steps against closed forms and counting (`closed_forms`); whole jobs with
//! ramps and phases, resumed at every step (`runs`); what a resumed job refuses (`refusals`); steps whose numbers are not to be
//! trusted (`health`); and what the ledger says of it all (`ledger`).

#[path = "../common/mod.rs"]
mod common;

mod closed_forms;
mod health;
mod ledger;
mod refusals;
mod runs;
mod tools;
