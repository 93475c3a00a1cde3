//! Rows of benchmark files: JSON lines and CSV. A wrong row is an error that names the file and the line.

use crate::error::{Error, IoContext, Result, without_mark, wrong_json};
use serde::de::DeserializeOwned;
use std::path::Path;

/// A row of a file and the line on which it begins, from 1.
pub struct Row<T> {
    /// Its line.
    pub line: usize,
    /// What stands there.
    pub value: T,
}

/// Turns every row into something else; a row for which that fails is an error that names it. `shape` says what a row should be.
pub fn each<T, U>(path: &Path, rows: Vec<Row<T>>, shape: &str, make: impl Fn(T) -> std::result::Result<U, String>) -> Result<Vec<U>> {
    let one = |row: Row<T>| make(row.value).map_err(|what| wrong_line(path, row.line, what, shape));
    rows.into_iter().map(one).collect()
}

/// The rows of a file of JSON lines; blank lines are skipped. Err: a line that is no such object, or no rows at all.
pub fn json_lines<T: DeserializeOwned>(path: &Path, shape: &str) -> Result<Vec<Row<T>>> {
    let text = text_of(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let row = |(i, line): (usize, &str)| {
        let value = serde_json::from_str(line).map_err(|error| wrong_line(path, i + 1, wrong_json(&error), shape))?;
        Ok(Row { line: i + 1, value })
    };
    not_empty(path, lines.map(row).collect::<Result<_>>()?, shape)
}

/// The records of a CSV file without a header, `N` fields each.
pub fn csv<const N: usize>(path: &Path, shape: &str) -> Result<Vec<Row<[String; N]>>> {
    let text = text_of(path)?;
    let mut reader = ::csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| Error::file(path, error).remedy(remedy(shape)))?;
        let line = record.position().map_or(0, ::csv::Position::line) as usize;
        let fields: Vec<String> = record.iter().map(str::to_string).collect();
        let n = fields.len();
        let value = fields.try_into().map_err(|_| wrong_line(path, line, format!("{n} fields, expected {N}"), shape))?;
        rows.push(Row { line, value });
    }
    not_empty(path, rows, shape)
}

/// A whole file as text. Err: it is not there, or not UTF-8.
pub fn text_of(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).at(path)?;
    String::from_utf8(without_mark(&bytes).to_vec()).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        Error::file(path, format!("line {line}: not UTF-8")).remedy("write it in UTF-8")
    })
}

fn not_empty<T>(path: &Path, rows: Vec<T>, shape: &str) -> Result<Vec<T>> {
    if rows.is_empty() {
        return Err(Error::file(path, "no rows in it").remedy(remedy(shape)));
    }
    Ok(rows)
}

fn wrong_line(path: &Path, line: usize, what: impl std::fmt::Display, shape: &str) -> Error {
    Error::file(path, format!("line {line}: {what}")).remedy(remedy(shape))
}

fn remedy(shape: &str) -> String {
    format!("take the published file; a row is {shape}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mark of UTF-8 at the beginning and the line ends of Windows are nobody's fault; what is wrong is told with line and column.
    #[test]
    fn marks_and_line_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        std::fs::write(&path, "\u{feff}[1]\r\n\r\n[2]\r\n").unwrap();
        let rows = json_lines::<Vec<u32>>(&path, "a list").unwrap();
        assert_eq!(rows.iter().map(|row| (row.line, row.value[0])).collect::<Vec<_>>(), [(1, 1), (3, 2)]);
        std::fs::write(&path, "\u{feff}a,b\r\n").unwrap();
        assert_eq!(csv::<2>(&path, "two").unwrap()[0].value, ["a", "b"]);
        std::fs::write(&path, "[1]\n[\"\\udc00\"]\n").unwrap();
        let error = json_lines::<Vec<String>>(&path, "a list").err().unwrap().to_string();
        assert!(error.contains("line 1: column 2: invalid type"), "{error}");
    }
}
