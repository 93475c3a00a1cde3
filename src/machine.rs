//! A machine that has failed, and how its job hears of it.
//!
//! A GPU whose memory has lost bits fails again whoever uses it, and the exit code of a job of several ranks does not tell (those that
//! were ended count too): so a rank whose machine has failed adds a line to the file that the job's script names in
//! `TRIREME_MACHINE_FAULTS`, `NODE what was wrong`, and the script goes on without that node (`slurm/env.sh`).

use crate::artifact::host_name;
use crate::error::{Error, Kind};
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};

/// Names the file.
const FAULTS: &str = "TRIREME_MACHINE_FAULTS";

/// The error of this machine's own failure, once told to the job: to be made by the rank that met it, and by no other.
pub fn failed(wrong: impl Into<String>) -> Error {
    let wrong = wrong.into();
    // SLURM's name of it, which need not be the machine's own.
    let node = std::env::var("SLURMD_NODENAME").unwrap_or_else(|_| host_name());
    if let Some(path) = std::env::var_os(FAULTS).filter(|path| !path.is_empty())
        && let Err(error) = tell(&path, &node, &wrong)
    {
        log::warn!("{}: {error}: the job's script is not told that {node} has failed", path.display());
    }
    Error::new(Kind::Machine, wrong).remedy(format!("run the same command on other machines, and have {node} looked at"))
}

/// One write at the end, so that lines of several ranks stay whole.
fn tell(path: &OsStr, node: &str, wrong: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{node} {}\n", wrong.replace('\n', "; ")).as_bytes())?;
    file.sync_all()
}
