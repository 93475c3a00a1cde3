//! The filter `tojson` as transformers gives it to templates: Python's `json.dumps` with `ensure_ascii`, `indent`, `separators` and
//! `sort_keys`.

use super::python;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How a value is written.
struct Style {
    ascii: bool,
    /// What a level is indented by; none: all on one line.
    indent: Option<String>,
    between_items: String,
    after_key: String,
    sorted: bool,
}

/// The filter.
pub(super) fn to_json(value: &Value, named: Kwargs) -> Result<String, Error> {
    let ascii = named.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = named.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = match named.get::<Option<Value>>("indent")? {
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        Some(count) if !count.is_none() => Some(" ".repeat(usize::try_from(count)?)),
        _ => None,
    };
    let (between_items, after_key) = match named.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([between, after]) => (between.clone(), after.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators")),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    named.assert_all_used()?;
    let mut out = String::new();
    Style { ascii, indent, between_items, after_key, sorted }.write(value, 0, &mut out)?;
    Ok(out)
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), out),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&python::float(f64::try_from(value.clone())?)),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.enclose('[', ']', depth, &items, out, |item, out| self.write(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort_by_key(Value::to_string);
                }
                self.enclose('{', '}', depth, &keys, out, |key, out| {
                    self.write_text(&key.to_string(), out);
                    out.push_str(&self.after_key);
                    self.write(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            ValueKind::None => out.push_str("null"),
            other => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson cannot write what is {other}"))),
        }
        Ok(())
    }

    fn enclose(
        &self,
        open: char,
        close: char,
        depth: usize,
        items: &[Value],
        out: &mut String,
        mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.as_ref().filter(|_| !items.is_empty()) {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.between_items);
            }
            new_line(depth + 1, out);
            write(item, out)?;
        }
        new_line(depth, out);
        out.push(close);
        Ok(())
    }

    fn write_text(&self, text: &str, out: &mut String) {
        for c in serde_json::Value::from(text).to_string().chars() {
            if self.ascii && !c.is_ascii() {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            } else {
                out.push(c);
            }
        }
    }
}
