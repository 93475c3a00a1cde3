//! A conversation as a request gives it: messages with whatever a template may ask for of them, tools, and whose turn it is.

use super::parts::Parts;
use serde_json::{Map, Value};

/// The names under which a message holds what was thought before its content, as transformers takes them: the first is the one that
/// templates read, the second that of some.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Names of a template's variables that stand in keys of their own.
const GIVEN: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// Keys that many programs write and few templates need.
const NEEDS_NO_READER: [&str; 4] = ["role", "content", "name", "tool_call_id"];

/// What a model is asked to go on with.
#[derive(Clone, PartialEq, Debug)]
pub struct Conversation {
    /// Each has a `role` that is a text, and a `content` that is a text or a list of `{"type": "text", "text": ..}`, or `tool_calls`.
    pub(super) messages: Vec<Map<String, Value>>,
    /// Descriptions of what the model may call; none when nobody named any.
    pub(super) tools: Option<Vec<Value>>,
    /// What an answer is to rest on, where a template reads them; none when nobody named any.
    pub(super) documents: Option<Vec<Value>>,
    /// The name of the template, where a model has several.
    pub(super) template: Option<String>,
    /// What else a template may ask for by name.
    pub(super) variables: Map<String, Value>,
    /// Whether the last message is to be continued, not answered.
    pub(super) continues: bool,
}

/// What may stand beside messages, as JSON that is not checked yet.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Beside {
    /// Descriptions of what the model may call.
    pub tools: Option<Value>,
    /// Texts with titles, say.
    pub documents: Option<Value>,
    /// Name of a template.
    pub chat_template: Option<Value>,
    /// Variables of the template.
    pub chat_template_kwargs: Option<Value>,
    /// Whether the last message goes on.
    pub continues: bool,
}

impl Conversation {
    /// Of `messages` and what stands beside them. Err: what is wrong, with its place and value.
    pub fn read(messages: Value, beside: Beside) -> Result<Conversation, String> {
        let Value::Array(items) = messages else {
            return Err(format!("messages is {}, expected a list of {{\"role\": a text, \"content\": a text}}", shown(&messages)));
        };
        if items.is_empty() {
            return Err("messages is an empty list, it needs at least one message".into());
        }
        let messages: Vec<_> = items.into_iter().enumerate().map(|(i, item)| message(i, item)).collect::<Result<_, _>>()?;
        let last = messages.len() - 1;
        if beside.continues && !messages[last].contains_key("content") {
            return Err(format!("messages[{last}] has no content, which continue_final_message asks to continue"));
        }
        let template = match beside.chat_template {
            None => None,
            Some(Value::String(name)) => Some(name),
            Some(other) => return Err(format!("chat_template is {}, expected the name of one of the model's", shown(&other))),
        };
        let variables = match beside.chat_template_kwargs {
            None => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(other) => return Err(format!("chat_template_kwargs is {}, expected names with values in braces", shown(&other))),
        };
        if let Some(name) = variables.keys().find(|name| GIVEN.contains(&name.as_str())) {
            return Err(format!("chat_template_kwargs has {name}, which is no value of its own: give it beside messages, or leave it out"));
        }
        Ok(Conversation {
            messages,
            tools: objects("tools", "JSON schemas", beside.tools)?,
            documents: objects("documents", "{\"title\": a text, \"text\": a text}", beside.documents)?,
            template,
            variables,
            continues: beside.continues,
        })
    }

    /// Of turns that are texts, to be answered.
    #[cfg(test)]
    pub(super) fn of(turns: &[(&str, &str)]) -> Conversation {
        let turns = turns.iter().map(|(role, content)| serde_json::json!({"role": role, "content": content}));
        Conversation::read(turns.collect(), Beside::default()).expect("messages")
    }

    /// What a template with this text would leave out without a word. Err: its name.
    pub(super) fn all_read_by(&self, template: &str) -> Result<(), String> {
        let names = |key: &str| match REASONING.contains(&key) {
            true => REASONING.iter().any(|name| template.contains(name)),
            false => NEEDS_NO_READER.contains(&key) || template.contains(key),
        };
        for (i, message) in self.messages.iter().enumerate() {
            if let Some((key, _)) = message.iter().find(|(key, value)| !names(key) && !is_empty(value)) {
                return Err(format!("messages[{i}] has {key}, which the chat template does not read: leave it out"));
            }
        }
        for (key, given) in [("tools", &self.tools), ("documents", &self.documents)] {
            if given.as_ref().is_some_and(|given| !given.is_empty()) && !template.contains(key) {
                return Err(format!("has {key}, which the chat template does not read: leave them out"));
            }
        }
        if let Some(name) = self.variables.keys().find(|name| !template.contains(name.as_str())) {
            return Err(format!("chat_template_kwargs has {name}, which the chat template does not read: leave it out"));
        }
        Ok(())
    }

    /// The contents that are lists, in their order.
    pub(super) fn parts(&self) -> Vec<Parts> {
        let contents = self.messages.iter().enumerate();
        contents.filter_map(|(i, message)| Parts::of(i, message.get("content")?)).collect()
    }

    /// The same with each list as one text.
    pub(super) fn with_texts(&self) -> Conversation {
        let mut whole = self.clone();
        for parts in self.parts() {
            whole.messages[parts.message].insert("content".into(), parts.texts.concat().into());
        }
        whole
    }

    /// The messages as transformers hands them to templates: what was thought stands under the names that they read.
    pub(super) fn named(&self) -> Vec<Map<String, Value>> {
        let named = |message: &Map<String, Value>| {
            let Some(reasoning) = REASONING.iter().find_map(|name| message.get(*name)) else { return message.clone() };
            let mut named = Map::from_iter([(REASONING[1].to_string(), reasoning.clone())]);
            named.extend(message.clone());
            named.insert(REASONING[0].into(), reasoning.clone());
            named
        };
        self.messages.iter().map(named).collect()
    }

    /// The last text of the last message's content, which is what is continued.
    pub(super) fn final_text(&mut self) -> &mut String {
        let content = self.messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(Value::Array(parts)) => parts.last_mut().and_then(|part| part.get_mut("text")),
            other => other,
        };
        match text {
            Some(Value::String(text)) => text,
            _ => unreachable!("read() leaves a text or a list of parts with one"),
        }
    }
}

/// Nothing is lost with it.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// A list of objects.
fn objects(key: &str, of: &str, given: Option<Value>) -> Result<Option<Vec<Value>>, String> {
    match given {
        None => Ok(None),
        Some(Value::Array(items)) if items.iter().all(Value::is_object) => Ok(Some(items)),
        Some(other) => Err(format!("{key} is {}, expected a list of {of}", shown(&other))),
    }
}

/// A message, checked; keys whose value is null are as good as left out.
fn message(i: usize, item: Value) -> Result<Map<String, Value>, String> {
    let Value::Object(item) = item else {
        return Err(format!("messages[{i}] is {}, expected {{\"role\": a text, \"content\": a text}}", shown(&item)));
    };
    let given: Map<String, Value> = item.into_iter().filter(|(_, value)| !value.is_null()).collect();
    match given.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(format!("messages[{i}].role is {}, expected a text", shown(other))),
        None => return Err(format!("messages[{i}] misses the key role, expected a text: \"system\", \"user\" or \"assistant\"")),
    }
    match given.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) if !parts.is_empty() => {
            parts.iter().enumerate().try_for_each(|(j, part)| text_part(&format!("messages[{i}].content[{j}]"), part))?;
        }
        None if given.contains_key("tool_calls") => {}
        None => return Err(format!("messages[{i}] misses the key content, expected a text")),
        Some(other) => {
            return Err(format!(
                "messages[{i}].content is {}, expected a text or a list of {{\"type\": \"text\", \"text\": ..}}",
                shown(other)
            ));
        }
    }
    Ok(given)
}

/// That a part of a content is a text.
fn text_part(place: &str, part: &Value) -> Result<(), String> {
    match (part.get("type"), part.get("text")) {
        (Some(Value::String(kind)), _) if kind != "text" => Err(format!("{place} has the type {kind:?}, the models here read text alone")),
        (Some(Value::String(_)), Some(Value::String(_))) => Ok(()),
        _ => Err(format!("{place} is {}, expected {{\"type\": \"text\", \"text\": a text}}", shown(part))),
    }
}

/// Most characters of a value that an error shows.
const SHOWN: usize = 60;

/// A value as JSON, cut when it is long.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}..", &text[..at]),
        None => text,
    }
}
