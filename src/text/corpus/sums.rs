//! Checksums of files while they are read, so that what was read is what was checked, at one reading.

use super::walk::Source;
use crate::artifact;
use crate::error::{IoContext, Result};
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use xxhash_rust::xxh3::Xxh3;

/// The checksums of consecutive files, of which the last may be open.
#[derive(Default)]
pub struct Sums {
    /// xxh3-64 of each file that was left, 16 hex digits.
    done: Vec<String>,
    open: Option<Open>,
}

/// A file that somebody reads through [`Summed`], at the same place.
struct Open {
    path: PathBuf,
    rest: File,
    hash: Arc<Mutex<Xxh3>>,
}

/// A file whose bytes are hashed as they are read.
struct Summed {
    file: File,
    hash: Arc<Mutex<Xxh3>>,
}

impl Read for Summed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hash.lock().expect("hashing does not panic").update(&buffer[..n]);
        Ok(n)
    }
}

impl Sums {
    /// `file` to be read from its start; the file before is left.
    pub fn enter(&mut self, source: &Source, file: File) -> Result<Box<dyn Read>> {
        self.leave()?;
        let rest = file.try_clone().at(&source.path)?; // shares the place in the file
        let hash = Arc::new(Mutex::new(Xxh3::new()));
        self.open = Some(Open { path: source.path.clone(), rest, hash: Arc::clone(&hash) });
        Ok(Box::new(Summed { file, hash }))
    }

    /// Hashes what nobody has read of the open file.
    fn leave(&mut self) -> Result<()> {
        let Some(Open { path, rest, hash }) = self.open.take() else { return Ok(()) };
        let mut rest = Summed { file: rest, hash };
        io::copy(&mut rest, &mut io::sink()).at(&path)?;
        self.done.push(format!("{:016x}", rest.hash.lock().expect("hashing does not panic").digest()));
        Ok(())
    }

    /// The checksums of all `sources`, of which the first have been entered.
    pub fn of_all(mut self, sources: &[Source]) -> Result<Vec<String>> {
        use rayon::prelude::*;
        self.leave()?;
        let later = sources[self.done.len()..].par_iter().map(|source| artifact::checksum(&source.path).map(|sum| sum.xxh3));
        self.done.extend(later.collect::<Result<Vec<String>>>()?);
        Ok(self.done)
    }
}
