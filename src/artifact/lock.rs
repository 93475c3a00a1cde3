//! Lock files that name their owner.
//!
//! Two things guard a directory: `flock` on the lock file, which the kernel gives back when its owner dies, however it dies;
//! and the owner's name inside, for people, and for file systems where `flock` does not reach from node to node.

use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The SLURM job id, or this process' id.
pub fn job_id() -> String {
    std::env::var("SLURM_JOB_ID").unwrap_or_else(|_| std::process::id().to_string())
}

/// The name of this machine.
pub fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |name| name.trim().to_string())
}

/// A lock file that names its owner, removed when dropped. A lock is taken over when its owner was a process of this machine
/// that no longer runs, or an earlier life of this very SLURM job (before a requeue).
pub struct RunLock {
    path: PathBuf,
    /// Holds the `flock` until the file is removed.
    _file: File,
}

#[derive(Serialize, Deserialize)]
struct Owner {
    host: String,
    pid: u32,
    job: String,
    /// SLURM_RESTART_COUNT: which life of the job.
    #[serde(default)]
    restarts: u32,
    since_unix_s: u64,
}

/// How often an acquisition starts over because another process removed the file meanwhile.
const ATTEMPTS: usize = 100;

impl RunLock {
    /// Takes `path` for the work on `what`, or says who holds it.
    pub fn acquire(path: &Path, what: &Path) -> Result<RunLock> {
        for _ in 0..ATTEMPTS {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path).at(path)?;
            let flocked = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return Err(held(path, what, read_owner(&mut file))),
                Err(TryLockError::Error(_)) => false, // a file system without flock: the name inside decides alone
            };
            // The last owner removes the file while it holds the lock: what was locked may be a file without a name.
            if !is_at(&file, path) {
                continue;
            }
            let me = Owner::me();
            if let Some(owner) = read_owner(&mut file)
                && !is_stale(&owner, &me, flocked)
            {
                return Err(held(path, what, Some(owner)));
            }
            let text = serde_json::to_vec(&me).expect("plain data");
            let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
            let lock = RunLock { path: path.into(), _file: file }; // removed again when its text does not fit on the disk
            written.at(path)?;
            return Ok(lock);
        }
        Err(held(path, what, None))
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // best effort: a left lock of a dead process is taken over
    }
}

impl Owner {
    fn me() -> Owner {
        Owner {
            host: host_name(),
            pid: std::process::id(),
            job: job_id(),
            restarts: std::env::var("SLURM_RESTART_COUNT").ok().and_then(|count| count.parse().ok()).unwrap_or(0),
            since_unix_s: super::unix_s(),
        }
    }
}

/// Whether the name belongs to nobody who still writes. Whoever holds the flock knows that no live process of this machine does.
fn is_stale(owner: &Owner, me: &Owner, flocked: bool) -> bool {
    if owner.host == me.host {
        return flocked || is_dead(owner.pid);
    }
    std::env::var("SLURM_JOB_ID").is_ok() && owner.job == me.job && owner.restarts < me.restarts
}

fn is_dead(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    status.map_or(true, |status| status.lines().any(|line| line.starts_with("State:") && line.contains('Z')))
}

/// None for an empty or torn file, which nobody finished taking.
fn read_owner(file: &mut File) -> Option<Owner> {
    let mut text = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut text)).ok()?;
    serde_json::from_slice(&text).ok()
}

fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(mine), Ok(named)) => identity(mine) == identity(named),
        _ => false,
    }
}

fn held(path: &Path, what: &Path, owner: Option<Owner>) -> Error {
    let who = owner.map_or("another job".into(), |o| format!("job {} (process {} on {})", o.job, o.pid, o.host));
    let remedy = format!("wait for it, choose another --out, or remove {} if that job is gone", path.display());
    Error::file(what, format!("is being written by {who}")).remedy(remedy)
}
