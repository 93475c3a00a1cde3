//! Contents that are lists of parts.

use super::{is_python_space, of_json};
use serde_json::Value;

/// The parts of a message's content.
pub(super) struct Parts {
    /// Which message's.
    pub message: usize,
    /// Their texts, in their order.
    pub texts: Vec<String>,
    /// The list as a template writes it that takes it for a text.
    pub shown_by_python: String,
}

impl Parts {
    /// None: it is no list.
    pub fn of(message: usize, content: &Value) -> Option<Parts> {
        let texts = content.as_array()?.iter().filter_map(|part| part["text"].as_str().map(String::from)).collect();
        let shown_by_python = super::python::text_of(&of_json(content)).expect("values of JSON can be shown");
        Some(Parts { message, texts, shown_by_python })
    }

    /// Whether one of them is not in a text, as it is or without white space around it.
    pub fn left_out_of(&self, text: &str) -> bool {
        self.texts.iter().any(|part| !text.contains(part.trim_matches(is_python_space)))
    }
}
