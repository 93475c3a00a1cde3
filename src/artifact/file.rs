//! Files of artifacts: written with their checksum, read to compare it. Everything that changes the disk goes through here, a
//! step at a time (create, write, sync, rename, remove), and each step may be planned to fail (see `fault`).

use crate::error::{Error, IoContext, Result};
use crate::fault::{self, Fate};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// A file of an artifact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path relative to the artifact.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3-64 of its bytes, 16 hex digits.
    pub xxh3: String,
}

/// Reads one file of an artifact and compares its checksum.
pub fn verify_file(artifact: &Path, file: &FileEntry) -> Result<()> {
    let path = artifact.join(&file.name);
    let found = checksum(&path)?;
    if found.xxh3 != file.xxh3 || found.bytes != file.bytes {
        let wrong = format!("checksum {} of {} bytes, the manifest says {} of {}", found.xxh3, found.bytes, file.xxh3, file.bytes);
        return Err(Error::file(&path, wrong).remedy("the file was damaged: write the artifact again, or take an older one"));
    }
    Ok(())
}

/// Opens a file that is read more than once: for its checksum and for what is in it. A pipe gives its bytes once, and waits for them, so
/// it is refused, as is whatever else is no plain file.
pub fn open_plain(path: &Path) -> Result<File> {
    let kind = fs::metadata(path).at(path)?.file_type();
    if kind.is_dir() {
        return Err(Error::file(path, "is a folder, expected a file").remedy("name the file"));
    }
    if !kind.is_file() {
        return Err(Error::file(path, "is a pipe or a device, expected a file").remedy("write what comes out of it to a file first"));
    }
    File::open(path).at(path)
}

/// Size and checksum of a file on disk; `name` is its path as given.
pub fn checksum(path: &Path) -> Result<FileEntry> {
    let mut file = File::open(path).at(path)?;
    let (mut hash, mut bytes, mut block) = (Xxh3::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        let n = match io::Read::read(&mut file, &mut block) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io(path, &error)),
        };
        hash.update(&block[..n]);
        bytes += n as u64;
    }
    Ok(FileEntry { name: path.display().to_string(), bytes, xxh3: format!("{:016x}", hash.digest()) })
}

/// Size and checksum of `dir/name`, as an entry of an artifact in `dir`.
pub fn checksum_as(dir: &Path, name: &str) -> Result<FileEntry> {
    Ok(FileEntry { name: name.into(), ..checksum(&dir.join(name))? })
}

/// A file that hashes what is written to it.
pub struct HashingFile {
    name: String,
    path: PathBuf,
    file: io::BufWriter<StepFile>,
    hash: Xxh3,
    bytes: u64,
}

impl HashingFile {
    /// Creates `dir/name`, which must not exist; the folder that a name may begin with is made where there is none.
    pub fn create(dir: &Path, name: &str) -> Result<HashingFile> {
        let path = dir.join(name);
        let open = || -> io::Result<StepFile> {
            if let Some((folder, _)) = name.rsplit_once('/') {
                fault::io("io.create").and_then(|_| fs::create_dir_all(dir.join(folder)))?;
            }
            fault::io("io.create")?;
            Ok(StepFile(File::options().write(true).create_new(true).open(&path)?))
        };
        let file = io::BufWriter::with_capacity(1 << 20, open().at(&path)?);
        Ok(HashingFile { name: name.into(), path, file, hash: Xxh3::new(), bytes: 0 })
    }

    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).at(&self.path)
    }

    /// Ends a file that is removed before the artifact is committed: what it holds need not survive a crash.
    pub fn close_unsynced(mut self) -> Result<()> {
        self.file.flush().at(&self.path)
    }

    /// Flushes to the disk and returns its entry.
    pub fn close(mut self) -> Result<FileEntry> {
        self.file.flush().at(&self.path)?;
        // A failed fsync may have dropped the data it failed for: it is never tried again.
        fault::io("io.sync").and_then(|_| self.file.get_ref().0.sync_all()).at(&self.path)?;
        if let (true, Some(folder)) = (self.name.contains('/'), self.path.parent()) {
            sync_dir(folder)?;
        }
        Ok(FileEntry { name: self.name, bytes: self.bytes, xxh3: format!("{:016x}", self.hash.digest()) })
    }
}

impl Write for HashingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file whose writes are counted.
struct StepFile(File);

impl Write for StepFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match fault::io("io.write")? {
            Fate::Whole => self.0.write(bytes),
            Fate::Short => self.0.write(&bytes[..bytes.len().div_ceil(2)]),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Writes a whole small file `dir/name` so that it appears at once or not at all: beside it, synced, renamed.
pub fn write_atomically(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (path, tmp) = (dir.join(name), dir.join(format!(".{name}.tmp")));
    let write = || -> io::Result<()> {
        fault::io("io.create")?;
        let mut file = StepFile(File::create(&tmp)?);
        file.write_all(bytes)?;
        fault::io("io.sync")?;
        file.0.sync_all()
    };
    let remove = || fault::io("io.remove").and_then(|_| fs::remove_file(&tmp));
    write().at(&path).and_then(|()| rename(&tmp, &path)).inspect_err(|_| drop(remove()))?;
    sync_dir(dir)
}

/// Gives a file or directory its name.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fault::io("io.rename").and_then(|_| fs::rename(from, to)).at(to)
}

/// Makes directory entries durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    fault::io("io.sync").and_then(|_| File::open(dir)?.sync_all()).at(dir)
}

/// Makes a directory that must not exist.
pub fn create_dir(dir: &Path) -> Result<()> {
    fault::io("io.create").and_then(|_| fs::create_dir(dir)).at(dir)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> Result<()> {
    fault::io("io.remove").and_then(|_| fs::remove_file(path)).at(path)
}

/// Removes a directory and everything in it.
pub fn remove_dir_all(dir: &Path) -> Result<()> {
    fault::io("io.remove").and_then(|_| fs::remove_dir_all(dir)).at(dir)
}

/// Bytes that this user may still write on the file system of `path`.
pub fn available_bytes(path: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(path).map_err(|code| io::Error::from_raw_os_error(code.raw_os_error())).at(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
