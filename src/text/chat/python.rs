//! Values as Python shows them: what jinja2 puts into a text for what is no text.

use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Error, Value};
use std::fmt;
use std::sync::Arc;

/// `str(value)`, and nothing for what is undefined.
pub(super) fn text_of(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => write(value, &mut out)?,
        ValueKind::Number if !value.is_integer() => out = float(f64::try_from(value.clone())?),
        _ => out = value.to_string(),
    }
    Ok(out)
}

/// `repr(value)`
fn write(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => write_text(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            // Pairs of a dictionary are tuples.
            let (open, close) = if value.to_string().starts_with('(') { ('(', ")") } else { ('[', "]") };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write(&item, out)?;
            }
            out.push_str(if open == '(' && value.len() == Some(1) { ",)" } else { close });
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write(&key, out)?;
                out.push_str(": ");
                write(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => out.push_str(&text_of(value)?),
    }
    Ok(())
}

/// In the quotes that stand for fewer escapes; what cannot be printed by its number.
fn write_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => out.push_str(&match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x1_0000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// Rust's and Python's tables are of the same categories. Behind another letter, marks that join with it are printed too.
fn is_printable(c: char) -> bool {
    matches!(c, '\'' | '"') || format!("a{c}").escape_debug().nth(1) == Some(c)
}

/// `repr` of a float: the fewest digits, with an exponent of two digits below 1e-4 and from 1e16 up.
pub(super) fn float(x: f64) -> String {
    let text = format!("{x:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// The filter `escape`: a text for HTML, as the library markupsafe writes it.
pub(super) fn escape(value: &Value) -> Result<Value, Error> {
    let text = text_of(value)?;
    if value.downcast_object_ref::<Safe>().is_some() {
        return Ok(value.clone());
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    Ok(Value::from_object(Safe(out)))
}

/// A text that a template marks as safe. jinja2 escapes for HTML what is added to it by `+`, which is refused here; all else shows it as
/// it is.
#[derive(Debug)]
pub(super) struct Safe(pub String);

impl Object for Safe {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
