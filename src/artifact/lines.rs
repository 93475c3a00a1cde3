//! Append-only files of lines that survive a kill at any byte: each line is one write, so a killed process leaves whole lines and
//! at most one cut-off line at the end, which readers leave out and the next writer removes. It knows nothing of what the lines say.

use crate::error::{IoContext, Result};
use crate::fault;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Appends lines; one process of a job has it.
pub struct LineWriter {
    path: PathBuf,
    file: File,
}

impl LineWriter {
    /// Opens or creates the file. A line that was cut off by a kill is removed.
    pub fn open(path: &Path) -> Result<LineWriter> {
        let mut file = File::options().read(true).append(true).create(true).open(path).at(path)?;
        let whole_bytes = whole_lines_bytes(&mut file).at(path)?;
        if whole_bytes < file.metadata().at(path)?.len() {
            file.set_len(whole_bytes).at(path)?;
        }
        Ok(LineWriter { path: path.into(), file })
    }

    /// Appends a line with one write.
    pub fn append(&mut self, line: &str) -> Result<()> {
        fault::io("io.write").and_then(|_| self.file.write_all(format!("{line}\n").as_bytes())).at(&self.path)
    }

    /// Returns when all lines are on the disk.
    pub fn sync(&self) -> Result<()> {
        fault::io("io.sync").and_then(|_| self.file.sync_data()).at(&self.path)
    }
}

/// Bytes up to and with the last newline. Reads backwards, so that a long file opens at once.
fn whole_lines_bytes(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = vec![0; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let here = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(here)?;
        if let Some(i) = here.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + i as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The whole lines of such a file with their numbers from 1, empty ones left out.
pub fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |i| i + 1);
    bytes[..whole].split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()).map(|(i, line)| (i + 1, line))
}
