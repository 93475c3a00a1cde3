//! TensorBoard event files, written natively: records in TensorFlow's TFRecord framing (length, masked CRC-32C of the length,
//! data, masked CRC-32C of the data), each an `Event` protobuf (tensorflow/core/util/event.proto, summary.proto), of which
//! only the fields that scalars need are written. This file knows nothing of what is measured.
//!
//! A record is one write, so a kill leaves whole records and at most one torn record at the end, which the next writer removes.

use crate::error::{Context, Error, IoContext, Result};
use prost::Message;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file in a run directory: TensorBoard takes every file with `tfevents` in its name.
pub const FILE_NAME: &str = "events.out.tfevents.trireme";

/// `tensorflow.Event`
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

/// `tensorflow.Summary`
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `tensorflow.SessionLog.START`: what was written of this and later steps is superseded.
const START: i32 = 1;
/// The first record of every file.
const FILE_VERSION: &str = "brain.Event:2";
/// Bytes around the data of a record.
const HEAD_BYTES: usize = 12;
const TAIL_BYTES: usize = 4;

/// Appends events; one process of a job has it.
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Opens or creates the file. A record that was torn by a kill is removed; from a damaged one on, everything, which is told. Errors:
    /// the file is something else.
    pub fn open(path: &Path, wall_time: f64) -> Result<EventWriter> {
        let file = File::options().read(true).append(true).create(true).open(path).at(path)?;
        let n_bytes = file.metadata().at(path)?.len();
        let (whole_bytes, rest) = whole_records_bytes(&file).at(path)?;
        if whole_bytes == 0 && n_bytes > 64 {
            return Err(Error::file(path, "not a TensorBoard event file").remedy("move it away, then start again"));
        }
        if whole_bytes < n_bytes {
            if rest == Rest::Damaged {
                let lost = n_bytes - whole_bytes;
                log::warn!(
                    "{}: damaged at byte {whole_bytes}; from there on {lost} bytes that TensorBoard could not read are removed \
                    (metrics.jsonl has the same numbers)",
                    path.display()
                );
            }
            file.set_len(whole_bytes).at(path)?;
        }
        let mut writer = EventWriter { path: path.into(), file };
        if whole_bytes == 0 {
            writer.write(Event { wall_time, file_version: Some(FILE_VERSION.into()), ..Event::default() })?;
        }
        Ok(writer)
    }

    /// Says that the run goes on with this step: earlier events of it and of later ones are superseded.
    pub fn begins_at(&mut self, step: u64, wall_time: f64) -> Result<()> {
        self.write(Event { wall_time, step: step as i64, session_log: Some(SessionLog { status: START }), ..Event::default() })
    }

    /// Appends the values of a step with one write.
    pub fn append(&mut self, step: u64, wall_time: f64, values: &[(&str, f64)]) -> Result<()> {
        let value = values.iter().map(|&(tag, value)| Value { tag: tag.into(), simple_value: Some(value as f32) }).collect();
        self.write(Event { wall_time, step: step as i64, summary: Some(Summary { value }), ..Event::default() })
    }

    fn write(&mut self, event: Event) -> Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(HEAD_BYTES + data.len() + TAIL_BYTES);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&data);
        record.extend(masked_crc(&data).to_le_bytes());
        self.file.write_all(&record).at(&self.path).doing(|| "writing TensorBoard events".into())
    }
}

/// What follows the whole records of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rest {
    /// Nothing, or a record that was cut off.
    Torn,
    /// A record whose checksum is another.
    Damaged,
}

/// Bytes of the whole, undamaged records at the beginning, and what follows them.
fn whole_records_bytes(file: &File) -> std::io::Result<(u64, Rest)> {
    let (mut reader, mut whole, mut data) = (BufReader::new(file), 0u64, Vec::new());
    let mut head = [0u8; HEAD_BYTES];
    loop {
        match reader.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok((whole, Rest::Torn)),
            read => read?,
        }
        let (length, crc) = head.split_at(8);
        if crc != masked_crc(length).to_le_bytes() {
            return Ok((whole, Rest::Damaged));
        }
        let n_bytes = u64::from_le_bytes(length.try_into().expect("8 bytes"));
        data.clear();
        // Bounded by the file, whatever the length says.
        (&mut reader).take(n_bytes.saturating_add(TAIL_BYTES as u64)).read_to_end(&mut data)?;
        let Some((body, crc)) = data.split_last_chunk::<TAIL_BYTES>() else { return Ok((whole, Rest::Torn)) };
        if body.len() as u64 != n_bytes {
            return Ok((whole, Rest::Torn));
        }
        if *crc != masked_crc(body).to_le_bytes() {
            return Ok((whole, Rest::Damaged));
        }
        whole += (HEAD_BYTES + data.len()) as u64;
    }
}

/// TensorFlow's mask: a CRC of data that contain CRCs is weak.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4), reflected polynomial 0x82f63b78, four bits at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 16] = {
        let mut table = [0u32; 16];
        let mut i = 0;
        while i < 16 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 4 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let step = |crc: u32, nibble: u32| crc >> 4 ^ TABLE[((crc ^ nibble) & 15) as usize];
    !bytes.iter().fold(!0u32, |crc, &byte| step(step(crc, u32::from(byte)), u32::from(byte >> 4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check values of RFC 3720 (B.4) and of the CRC catalogue; a reader drops every record whose CRC is wrong.
    #[test]
    fn crcs_are_those_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    /// Cut off at every byte, the file keeps its whole records, and the next writer goes on cleanly behind them.
    #[test]
    fn a_kill_at_any_byte_costs_at_most_the_last_record() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE_NAME);
        let mut writer = EventWriter::open(&path, 1.0).expect("new");
        let mut ends = vec![std::fs::metadata(&path).expect("there").len()];
        for step in 1..=3 {
            writer.append(step, 2.0, &[("loss/train", 0.5)]).expect("writable");
            ends.push(std::fs::metadata(&path).expect("there").len());
        }
        let whole = std::fs::read(&path).expect("readable");
        for cut in 0..=whole.len() as u64 {
            std::fs::write(&path, &whole[..cut as usize]).expect("writable");
            drop(EventWriter::open(&path, 1.0).expect("old"));
            let kept = ends.iter().copied().filter(|&end| end <= cut).max().unwrap_or(ends[0]);
            assert_eq!(std::fs::read(&path).expect("readable"), &whole[..kept as usize], "cut at {cut}");
        }
        std::fs::write(&path, vec![b'x'; 1000]).expect("writable");
        let error = EventWriter::open(&path, 1.0).err().expect("no event file");
        assert!(error.to_string().contains("not a TensorBoard event file"), "{error}");
    }
}
