//! Reading a recipe: the file, then the `--set` overrides, then the strict reader. Errors name file and line, or the override.

use super::Pretrain;
use super::strict::{Fault, Node};
use crate::error::{Error, IoContext, Result};
use serde::Deserialize;
use std::path::Path;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

impl Pretrain {
    /// Reads a TOML recipe and applies overrides `a.b=value` in order. A value is read as TOML; what is no TOML is taken as a
    /// text (`train.precision=bf16`). Items of lists go by number: `data.train.0.weight=0.5`; the number after the last
    /// appends one.
    ///
    /// Errors: the file cannot be read (exit code 3); it is no TOML, a key is unknown (with the nearest known one), missing, or
    /// of a wrong type (exit code 2), with file and line.
    pub fn load(path: &Path, sets: &[String]) -> Result<Pretrain> {
        let text = std::fs::read_to_string(path).at(path).map_err(|error| error.doing("reading the recipe"))?;
        Pretrain::parse(&text, &path.display().to_string(), sets)
    }

    /// The same from a text; `name` is what errors call it.
    pub fn parse(text: &str, name: &str, sets: &[String]) -> Result<Pretrain> {
        let mut table: Table = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(String::new(), |span| format!(":{}", line_of(text, span.start)));
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            Error::recipe(format!("{name}{at}: not TOML: {message}")).remedy("correct that line")
        })?;
        let mut overridden = Vec::new();
        for set in sets {
            overridden.push(apply(&mut table, set)?);
        }
        Pretrain::deserialize(Node::root(table)).map_err(|fault| explain(fault, text, name, &overridden))
    }

    /// The recipe as TOML; reading it gives the same recipe.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe is plain data")
    }
}

/// Adds where the fault stands: in an override, or at a line of the file.
fn explain(fault: Fault, text: &str, name: &str, overridden: &[String]) -> Error {
    let covers =
        |set: &&String| fault.path == **set || fault.path.starts_with(&format!("{set}.")) || set.starts_with(&format!("{}.", fault.path));
    let is_missing = fault.wrong.starts_with("misses");
    let place = match overridden.iter().rev().find(covers).filter(|_| !is_missing) {
        Some(set) => format!("--set {set}"),
        None => match line_of_path(text, &fault.path) {
            Some(line) => format!("{name}:{line}"),
            None => name.to_string(),
        },
    };
    let subject = if fault.path.is_empty() { "the recipe" } else { &fault.path };
    let error = Error::recipe(format!("{place}: {subject} {}", fault.wrong));
    match fault.remedy {
        Some(remedy) => error.remedy(remedy),
        None => error.remedy("correct the value"),
    }
}

/// Applies one `a.b=value`; returns its path.
fn apply(table: &mut Table, set: &str) -> Result<String> {
    let fail = |wrong: String| {
        Error::recipe(format!("--set {set}: {wrong}")).remedy("write --set section.key=value, e.g. --set train.samples=1000")
    };
    let Some((path, text)) = set.split_once('=') else { return Err(fail("has no =".into())) };
    let path = path.trim();
    let keys: Vec<&str> = path.split('.').map(str::trim).collect();
    if keys.iter().any(|key| key.is_empty()) {
        return Err(fail("has an empty key".into()));
    }
    let (last, parents) = keys.split_last().expect("split gives at least one");
    let mut here = Place::Table(table);
    for (i, key) in parents.iter().enumerate() {
        here = here.enter(key, keys[i + 1]).map_err(&fail)?;
    }
    here.set(last, parse_value(text)).map_err(&fail)?;
    Ok(keys.join("."))
}

/// A value as TOML, or else as a text.
fn parse_value(text: &str) -> Value {
    let text = text.trim();
    let parsed = if text.contains('\n') { None } else { format!("x = {text}").parse::<Table>().ok() };
    parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("x")).unwrap_or_else(|| Value::String(text.into()))
}

/// Where an override walks.
enum Place<'a> {
    Table(&'a mut Table),
    List(&'a mut Vec<Value>),
}

impl<'a> Place<'a> {
    /// What is at `key`; what is not there yet becomes a list when its item 0 comes next, else a table.
    fn enter(self, key: &str, next: &str) -> std::result::Result<Place<'a>, String> {
        let new = || if next == "0" { Value::Array(Vec::new()) } else { Value::Table(Table::new()) };
        let value = match self {
            Place::Table(table) => table.entry(key).or_insert_with(new),
            Place::List(items) => {
                let index = index_in(items, key)?;
                if index == items.len() {
                    items.push(Value::Table(Table::new()));
                }
                &mut items[index]
            }
        };
        match value {
            Value::Table(table) => Ok(Place::Table(table)),
            Value::Array(items) => Ok(Place::List(items)),
            other => Err(format!("{key} is a single value ({other}), it has no keys")),
        }
    }

    fn set(self, key: &str, value: Value) -> std::result::Result<(), String> {
        match self {
            Place::Table(table) => drop(table.insert(key.into(), value)),
            Place::List(items) => match index_in(items, key)? {
                index if index == items.len() => items.push(value),
                index => items[index] = value,
            },
        }
        Ok(())
    }
}

fn index_in(items: &[Value], key: &str) -> std::result::Result<usize, String> {
    let index: usize = key.parse().map_err(|_| format!("{key} is not a number, but the key before it is a list of {}", items.len()))?;
    if index > items.len() {
        return Err(format!("item {index} of a list of {}", items.len()));
    }
    Ok(index)
}

/// The line on which the key at this path stands, or the nearest table around it.
fn line_of_path(text: &str, path: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut value: Option<&DeValue> = None;
    let mut offset = None;
    for key in path.split('.').filter(|key| !key.is_empty()) {
        let table = match value {
            None => Some(root.get_ref()),
            Some(DeValue::Table(table)) => Some(table),
            Some(_) => None,
        };
        let found: Option<(usize, &Spanned<DeValue>)> = match (table, value) {
            (Some(table), _) => table.iter().find(|(name, _)| name.get_ref() == key).map(|(name, value)| (name.span().start, value)),
            (None, Some(DeValue::Array(items))) => key.parse().ok().and_then(|i: usize| items.get(i)).map(|item| (item.span().start, item)),
            _ => None,
        };
        let Some((start, inner)) = found else { break };
        offset = Some(start);
        value = Some(inner.get_ref());
    }
    offset.map(|offset| line_of(text, offset))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count() + 1
}
