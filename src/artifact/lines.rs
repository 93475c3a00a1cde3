//! Append-only files of lines that survive a kill at any byte: each line is one write, so a killed process leaves whole lines and
//! at most one cut-off line at the end, which readers leave out and the next writer removes. Lines that are objects of JSON have a
//! checksum of all before it as their last key, "crc", so that a changed digit is not read as another number. It knows nothing of what
//! the lines say.

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

    /// Appends an object of JSON and its checksum, for [`whole_lines`], with one write.
    pub fn append_object(&mut self, object: &str) -> Result<()> {
        self.append(&sealed_line(object))
    }

    /// Appends a line as it is with one write.
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

/// Bytes of `,"crc":"01234567"}`.
const SEAL_BYTES: usize = 18;

/// An object of JSON as a line of such a file has it: with its checksum, without the end of the line.
pub fn sealed_line(object: &str) -> String {
    let open = object.strip_suffix('}').expect("a line is an object of JSON");
    format!("{open},\"crc\":\"{:08x}\"}}", checksum_of(open.as_bytes()))
}

fn checksum_of(open: &[u8]) -> u32 {
    xxhash_rust::xxh3::xxh3_64(open) as u32
}

/// The object of a line without its checksum, or why there is none.
fn unsealed(line: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let (open, seal) = line.split_at(line.len().saturating_sub(SEAL_BYTES));
    let found = format!(",\"crc\":\"{:08x}\"}}", checksum_of(open));
    if seal != found.as_bytes() {
        return Err(format!("ends in {:?}, its bytes have {found:?}", String::from_utf8_lossy(seal)));
    }
    Ok([open, b"}"].concat())
}

/// The whole lines of a file of objects with their numbers from 1, without their checksums; or what is wrong with a line. Empty ones are
/// left out.
pub fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = (usize, std::result::Result<Vec<u8>, String>)> + '_ {
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |i| i + 1);
    let lines = bytes[..whole].split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    lines.map(|(i, line)| (i + 1, unsealed(line)))
}
