//! Lines of a byte stream, each at most a limit long, in memory bounded by that limit. This file knows nothing of JSON.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// UTF-8's byte-order mark.
pub const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";
const BLOCK_BYTES: usize = 1 << 18;

/// What [`Lines::next_line`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line {
    /// A line, its end left out.
    Whole,
    /// A line longer than the limit; the stream is not at a line any more.
    TooLong,
    /// Nothing.
    End,
}

/// A reader of lines that knows where it is.
pub struct Lines<R> {
    input: R,
    block: Vec<u8>,
    at: usize,
    end: usize,
    offset: u64,
    lines_read: u64,
    limit: usize,
}

impl<R: Read> Lines<R> {
    /// Lines of `input`, whose first byte is byte `offset` of its file.
    pub fn new(input: R, offset: u64, limit: usize) -> Lines<R> {
        Lines { input, block: vec![0; BLOCK_BYTES], at: 0, end: 0, offset, lines_read: 0, limit }
    }

    /// Where the next line starts.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Lines read or skipped so far.
    pub fn lines_read(&self) -> u64 {
        self.lines_read
    }

    /// Reads the next line into `line`, without its end.
    pub fn next_line(&mut self, line: &mut Vec<u8>) -> io::Result<Line> {
        line.clear();
        let limit = self.limit;
        let found = self.consume(|part| {
            let fits = line.len() + part.len() <= limit;
            if fits {
                line.extend_from_slice(part);
            }
            fits
        })?;
        Ok(match found {
            Some(true) => Line::Whole,
            Some(false) => Line::TooLong,
            None => Line::End,
        })
    }

    /// Skips to the end of the line; false at the end of the stream.
    pub fn skip(&mut self) -> io::Result<bool> {
        Ok(self.consume(|_| true)?.is_some())
    }

    /// Gives the line to `take` in parts until it says no. None at the end of the stream, else whether all was taken.
    fn consume(&mut self, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<Option<bool>> {
        let mut any = false;
        loop {
            if self.at == self.end && !self.fill()? {
                return Ok(any.then_some(true));
            }
            if !any {
                self.lines_read += 1;
                any = true;
            }
            let rest = &self.block[self.at..self.end];
            let newline = rest.iter().position(|&byte| byte == b'\n');
            let part = &rest[..newline.unwrap_or(rest.len())];
            let taken = part.len() + usize::from(newline.is_some());
            let fits = take(part);
            self.at += taken;
            self.offset += taken as u64;
            if !fits || newline.is_some() {
                return Ok(Some(fits));
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        loop {
            match self.input.read(&mut self.block) {
                Ok(n) => {
                    (self.at, self.end) = (0, n);
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Number of lines that end before byte `offset` of a file.
pub fn count_before(path: &Path, offset: u64) -> io::Result<u64> {
    let mut lines = Lines::new(File::open(path)?.take(offset), 0, usize::MAX);
    while lines.skip()? {}
    Ok(lines.lines_read())
}
