//! The error of the whole crate: what was being done, what was wrong, what to do, and the exit code that follows.
//!
//! World wrong (a recipe, a file, memory, a signal) is an [`Error`]; we wrong is `assert!`; a failed computation or
//! collective panics, and the hook in `runtime` ends the job. This file knows nothing of what the crate does.

use std::fmt;
use std::path::Path;

/// The result type of everything that the world can make fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong; decides the exit code (sysexits has no better match than these six).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Command line or recipe: exit code 2.
    Recipe,
    /// A file, directory or artifact, as input or as output: exit code 3.
    File,
    /// The numbers went wrong (non-finite loss past the limit): exit code 4.
    Numeric,
    /// Checkpointed on a signal or before the walltime; requeue me: exit code 75 (EX_TEMPFAIL).
    Requeue,
    /// The machine has failed, not the program: run me elsewhere: exit code 71 (EX_OSERR). Made by `machine::failed`.
    Machine,
    /// Anything else (out of memory, missing library): exit code 1.
    Other,
}

/// One line for a person: `doing: doing: what was wrong; what to do`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    kind: Kind,
    /// Outermost last; printed outermost first.
    doing: Vec<String>,
    wrong: String,
    remedy: Option<String>,
}

impl Error {
    /// A new error of this kind. `wrong` names both values ("found 3, expected 4"), lower case, no final stop.
    pub fn new(kind: Kind, wrong: impl Into<String>) -> Self {
        Error { kind, doing: Vec::new(), wrong: wrong.into(), remedy: None }
    }

    /// A wrong command line or recipe.
    pub fn recipe(wrong: impl Into<String>) -> Self {
        Error::new(Kind::Recipe, wrong)
    }

    /// A wrong file; the path becomes part of the message.
    pub fn file(path: impl AsRef<Path>, wrong: impl fmt::Display) -> Self {
        Error::new(Kind::File, format!("{}: {wrong}", path.as_ref().display()))
    }

    /// An operating-system error on this path, with the remedy for the well-known ones.
    pub fn io(path: impl AsRef<Path>, source: &std::io::Error) -> Self {
        let error = Error::file(path, source);
        match source.raw_os_error() {
            Some(libc::ENOSPC) | Some(libc::EDQUOT) => error.remedy("free some space or choose another --out, then run again"),
            Some(libc::ENOENT) => error.remedy("check the path"),
            Some(libc::EACCES) | Some(libc::EPERM) | Some(libc::EROFS) => error.remedy("check the permissions"),
            Some(libc::EMFILE) | Some(libc::ENFILE) => error.remedy("raise the limit of open files (ulimit -n)"),
            _ => error,
        }
    }

    /// An error of HDF5 on this path, from its text: the operating system's where it names one.
    pub fn hdf5(path: impl AsRef<Path>, text: &str) -> Self {
        match errno_in_hdf5(text) {
            Some(errno) => Error::io(path, &std::io::Error::from_raw_os_error(errno)),
            None => Error::file(path, wrong_hdf5(text)).remedy("check the space and the permissions"),
        }
    }

    /// Adds what to do about it; an imperative, lower case, no final stop.
    #[must_use]
    pub fn remedy(mut self, what_to_do: impl Into<String>) -> Self {
        self.remedy = Some(what_to_do.into());
        self
    }

    /// Adds what was being done when it happened (outermost last).
    #[must_use]
    pub fn doing(mut self, what: impl Into<String>) -> Self {
        self.doing.push(what.into());
        self
    }

    /// The kind this error was made with.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The process exit code: 2 recipe, 3 file, 4 numeric, 71 machine, 75 requeue, 1 other.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Recipe => 2,
            Kind::File => 3,
            Kind::Numeric => 4,
            Kind::Requeue => 75,
            Kind::Machine => 71,
            Kind::Other => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for doing in self.doing.iter().rev() {
            write!(f, "{doing}: ")?;
        }
        write!(f, "{}", self.wrong)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// What is wrong with a text of JSON on one line: `column C: cause`.
pub fn wrong_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cause = text.rsplit_once(" at line ").map_or(text.as_str(), |(cause, _)| cause);
    let cause = match cause {
        "unexpected end of hex escape" => "a lone surrogate (\\ud800 to \\udbff without its second half)",
        "lone leading surrogate in hex escape" => "a lone surrogate (\\udc00 to \\udfff without its first half)",
        cause => cause,
    };
    format!("column {}: {cause}", error.column())
}

/// What is wrong by a text of HDF5, on one line: the operating system's error where it names one, else what stands before the time of
/// day, the addresses and sizes that HDF5 adds on several lines.
pub fn wrong_hdf5(text: &str) -> String {
    match errno_in_hdf5(text) {
        Some(errno) => std::io::Error::from_raw_os_error(errno).to_string(),
        None => text.lines().next().unwrap_or_default().split(": time = ").next().unwrap_or_default().to_string(),
    }
}

/// HDF5 writes `errno = 28, error message = '..'` into its text.
fn errno_in_hdf5(text: &str) -> Option<i32> {
    text.split("errno = ").nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A text without the mark of UTF-8 (the byte order mark) at its beginning, which some programs write.
pub fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// Adds what was being done to the error of a result.
pub trait Context<T> {
    /// `load(path).doing(|| format!("loading layer {layer}"))?`
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.doing(what()))
    }
}

/// Attaches the path to an `std::io::Result`.
pub trait IoContext<T> {
    /// `File::open(path).at(path)?`
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::io(path, &source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HDF5's own texts, which go over several lines with addresses in them: one line each.
    #[test]
    fn texts_of_hdf5_are_one_line() {
        let full = "H5F__close_cb(): can't close file: file write failed: time = Thu Nov 26 13:32:28 2026\n, filename = 'a.h5', file \
                    descriptor = 4, errno = 28, error message = 'No space left on device', buf = 0x5557a803d710, total write size = 6848";
        assert_eq!(wrong_hdf5(full), "No space left on device (os error 28)");
        assert_eq!(wrong_hdf5("H5D_open(): not found: time = noon\n, errno = none"), "H5D_open(): not found");
        assert_eq!(
            Error::hdf5("a.h5", "H5D_open(): not found").to_string(),
            "a.h5: H5D_open(): not found; check the space and the permissions"
        );
    }
}
