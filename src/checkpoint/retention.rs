//! Which checkpoints of a run stay, and whether there is room for another.
//!
//! ```text
//! checkpoints/step-00000100/          a checkpoint
//! checkpoints/removed-step-00000050/  on its way out; whoever comes next removes the rest of it
//! ```

use super::stored::{self, Stored};
use crate::artifact;
use crate::error::{Error, IoContext, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Which checkpoints stay; the newest whole one always does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Retention {
    /// So many of the newest; None: all.
    pub keep_last: Option<usize>,
    /// And every one whose step is a multiple of this.
    pub keep_every: Option<u64>,
    /// And those of these steps, whatever their age.
    pub keep_steps: [Option<u64>; 2],
}

/// What a name has in front while its directory is removed.
const REMOVED: &str = "removed-";
/// Bytes beside the values, for each piece, at most about: HDF5's structures, its lines in the table and in the index.
const BYTES_A_PIECE: u64 = 4096;
/// The table of pieces has a checksum of 16 digits for each MiB of values: a byte for each 64 KiB. Reckoned four times over.
const VALUES_A_BYTE_OF_TABLE: u64 = 16 << 10;
/// Manifest and tokenizer.
const OTHER_BYTES: u64 = 64 << 10;

/// Removes what need not stay in the folder of a run's checkpoints.
pub fn apply(folder: &Path, retention: Retention) -> Result<()> {
    remove_leftovers(folder)?;
    for (_, path) in surplus(folder, retention, 0)? {
        remove(&path)?;
    }
    Ok(())
}

/// Makes sure that `(bytes of values, pieces)` have room in `dir`, which stands in the folder of a run's checkpoints. Where they do
/// not, removes, oldest first, what would be removed once they are written. The error says how much is missing.
pub fn make_room(dir: &Path, (bytes, n_pieces): (u64, usize), retention: Retention) -> Result<()> {
    let needed = bytes + bytes / VALUES_A_BYTE_OF_TABLE + n_pieces as u64 * BYTES_A_PIECE + OTHER_BYTES;
    if artifact::available_bytes(dir)? >= needed {
        return Ok(());
    }
    let folder = dir.parent().unwrap_or(dir);
    remove_leftovers(folder)?;
    for (step, path) in surplus(folder, retention, 1)? {
        if artifact::available_bytes(dir)? >= needed {
            break;
        }
        log::warn!("no room for the next checkpoint: removing that of step {step} before instead of after");
        remove(&path)?;
    }
    let available = artifact::available_bytes(dir)?;
    if available >= needed {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let wrong = format!("needs {} MiB, the file system has {} MiB left", mib(needed), available >> 20);
    Err(Error::file(dir.parent().unwrap_or(dir), wrong).remedy("free some space, or lower checkpoint.keep_last, then run again"))
}

/// What need not stay, oldest first, when `coming` more are about to be written. Damaged ones are not counted, and left to people.
fn surplus(folder: &Path, retention: Retention, coming: usize) -> Result<Vec<(u64, PathBuf)>> {
    let Some(keep_last) = retention.keep_last else { return Ok(Vec::new()) };
    let mut whole: Vec<(u64, PathBuf)> = stored::list_folder(folder)?;
    whole.retain(|(_, path)| Stored::open_dir(path).is_ok());
    let n_newest = keep_last.saturating_sub(coming).max(1);
    whole.truncate(whole.len().saturating_sub(n_newest));
    whole.retain(|(step, _)| retention.keep_every.is_none_or(|every| step % every != 0) && !retention.keep_steps.contains(&Some(*step)));
    Ok(whole)
}

/// Removes what dead jobs left in the folder of a run's checkpoints: unfinished ones, and what they were removing. Only for the job
/// that holds the lock of the run, before its first save.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    remove_named(folder, |name| name.starts_with(REMOVED) || (name.starts_with("step-") && name.contains(".tmp-")))
}

/// The name goes first, at once: a checkpoint that is half removed is none.
fn remove(checkpoint: &Path) -> Result<()> {
    let name = checkpoint.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let away = checkpoint.with_file_name(format!("{REMOVED}{name}"));
    if away.exists() {
        artifact::remove_dir_all(&away)?;
    }
    artifact::rename(checkpoint, &away)?;
    artifact::remove_dir_all(&away)
}

fn remove_leftovers(folder: &Path) -> Result<()> {
    remove_named(folder, |name| name.starts_with(REMOVED))
}

fn remove_named(folder: &Path, is_left: impl Fn(&str) -> bool) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        if entry.file_name().to_str().is_some_and(&is_left) && entry.path().is_dir() {
            artifact::remove_dir_all(&entry.path())?;
        }
    }
    Ok(())
}
