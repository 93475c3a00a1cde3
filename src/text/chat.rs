//! Conversations as the text a model was trained on: the template that came with a model (Jinja, as transformers renders it), or
//! Nemotron's own. The engine is the crate minijinja; this is the only file that names it.

use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Name of the template in directories of Hugging Face.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";

/// Nemotron-4's format (NeMo-Aligner, NeMo-Curator's NemotronFormatter): the first turn is the system's, empty or not, every turn ends
/// with a line break, and the mark of the next turn ends an answer.
const NEMOTRON: &str = r#"{{ "<extra_id_0>System\n" }}
{%- for message in messages -%}
{%- if message.role == "system" and loop.first -%}{{ message.content }}{%- endif -%}
{%- endfor -%}
{{ "\n" }}
{%- for message in messages -%}
{%- if message.role == "user" -%}{{ "<extra_id_1>User\n" ~ message.content ~ "\n" }}
{%- elif message.role == "assistant" -%}{{ "<extra_id_1>Assistant\n" ~ message.content ~ "\n" }}
{%- elif not (message.role == "system" and loop.first) -%}{{ raise_exception("roles are user and assistant, and system for the first message") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<extra_id_1>Assistant\n" }}{%- endif -%}"#;

/// The piece that begins a turn in Nemotron's format, and therefore ends an answer.
pub const NEMOTRON_TURN: &str = "<extra_id_1>";

/// One turn of a conversation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// "system", "user", "assistant", or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// What a template may ask for besides the messages: the texts of special tokens, empty where there is none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SpecialTokens {
    /// `bos_token`
    pub bos: String,
    /// `eos_token`
    pub eos: String,
    /// `pad_token`
    pub pad: String,
    /// `unk_token`
    pub unk: String,
}

/// A template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

/// The name it has inside its environment.
const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template; `origin` is named in errors.
    pub fn new(text: &str, special: SpecialTokens, origin: &Path) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        // As transformers sets jinja2 up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the usual delimiters"));
        // Templates call methods of Python's strings and dictionaries.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> std::result::Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        // There is no `strftime_now`: a prompt with today's date would not be the same bytes tomorrow. Templates that ask whether there is
        // one have a date of their own.
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, without_marks_of_training(text)).map_err(|error| {
            Error::file(origin, format!("a chat template that cannot be read: {}", one_line(&error))).remedy("correct it")
        })?;
        Ok(ChatTemplate { environment, special })
    }

    /// Nemotron-4's.
    pub fn nemotron() -> ChatTemplate {
        ChatTemplate::new(NEMOTRON, SpecialTokens::default(), Path::new("Nemotron's chat template")).expect("a template of ours compiles")
    }

    /// The text of a conversation up to where the assistant's answer begins. Err: what the template says is wrong with it.
    pub fn prompt(&self, messages: &[Message]) -> std::result::Result<String, String> {
        let template = self.environment.get_template(NAME).expect("added when it was made");
        let turn = |message: &Message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]);
        let context = minijinja::context! {
            messages => messages.iter().map(turn).collect::<Value>(),
            add_generation_prompt => true,
            bos_token => self.special.bos.as_str(),
            eos_token => self.special.eos.as_str(),
            pad_token => self.special.pad.as_str(),
            unk_token => self.special.unk.as_str(),
            // As transformers leaves them when nobody names any: templates ask whether they are none.
            tools => (),
            documents => (),
        };
        template.render(context).map_err(|error| format!("the chat template refuses the messages: {}", one_line(&error)))
    }
}

/// `{% generation %}` .. `{% endgeneration %}` tell transformers which part of a text is trained on; what they enclose is rendered as it
/// is.
fn without_marks_of_training(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(open) = rest.find("{%") {
        let (before, statement) = rest.split_at(open + 2);
        let Some(end) = statement.find("%}") else { break };
        let (statement, after) = statement.split_at(end);
        let renamed = match statement.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => statement.replace("generation", " if true "),
            "endgeneration" => statement.replace("endgeneration", " endif "),
            _ => statement.to_string(),
        };
        out.push_str(before);
        out.push_str(&renamed);
        rest = after;
    }
    out + rest
}

/// As Python's `json.dumps` with `ensure_ascii=False`.
fn to_json(value: &Value) -> std::result::Result<String, minijinja::Error> {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let items = || value.try_iter().map(|items| items.collect::<Vec<Value>>());
    Ok(match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            format!("[{}]", items()?.iter().map(to_json).collect::<std::result::Result<Vec<_>, _>>()?.join(", "))
        }
        ValueKind::Map => {
            let entry = |key: &Value| Ok(format!("{}: {}", quoted(&key.to_string()), to_json(&value.get_item(key)?)?));
            format!("{{{}}}", items()?.iter().map(entry).collect::<std::result::Result<Vec<_>, minijinja::Error>>()?.join(", "))
        }
        ValueKind::None | ValueKind::Undefined => "null".into(),
        _ => value.to_string(),
    })
}

/// What went wrong, without the template's source below it.
fn one_line(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(what.clone(), |line| format!("{what} (line {line} of the template)")).replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, content)| Message { role: role.to_string(), content: content.to_string() }).collect()
    }

    /// The published form, character by character, with and without a system turn: a model answers badly to any other.
    #[test]
    fn nemotron_turns() {
        let template = ChatTemplate::nemotron();
        let one = template.prompt(&messages(&[("user", "Hi\n {{ x }}")])).unwrap();
        assert_eq!(one, "<extra_id_0>System\n\n<extra_id_1>User\nHi\n {{ x }}\n<extra_id_1>Assistant\n");
        let turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")];
        let several = template.prompt(&messages(&turns)).unwrap();
        let expected = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\na\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc\n\
                        <extra_id_1>Assistant\n";
        assert_eq!(several, expected);
        let error = template.prompt(&messages(&[("user", "a"), ("system", "b")])).unwrap_err();
        assert!(error.contains("roles are user and assistant") && !error.contains('\n'), "{error}");
    }

    /// Templates in the wild: line breaks after blocks vanish, Python's methods work, the generation prompt is asked for.
    #[test]
    fn templates_as_transformers_renders_them() {
        let text = "{% for m in messages %}\n  {% if m['role'] == 'user' %}\nU:{{ m.content.strip() }}{{ eos_token }}\n  {% endif %}\n\
                    {% endfor %}\n{% if add_generation_prompt %}A:{% endif %}";
        let special = SpecialTokens { eos: "</s>".into(), ..SpecialTokens::default() };
        let template = ChatTemplate::new(text, special, Path::new("x")).unwrap();
        let odd = "{%- if tools is not none -%}T{%- endif -%}{% generation %}\n{% for m in messages %}{% if m.content == 'b' %}{% continue %}{% endif %}\
                   {{ m.content|tojson }}{{ m|tojson }}{% break %}{% endfor %}{%- endgeneration -%} {{ pad_token }}.";
        let odd = ChatTemplate::new(odd, SpecialTokens { pad: "<p>".into(), ..SpecialTokens::default() }, Path::new("x")).unwrap();
        let said = odd.prompt(&messages(&[("user", "b"), ("user", "\u{e9} \"<\n"), ("user", "c")])).unwrap();
        // As jinja2 with transformers' extensions renders it.
        let quoted = r#""é \"<\n""#;
        assert_eq!(said, format!(r#"{quoted}{{"role": "user", "content": {quoted}}}<p>."#));
        // By hand from jinja2's rules for trim_blocks and lstrip_blocks.
        assert_eq!(template.prompt(&messages(&[("user", "  hi "), ("user", "b")])).unwrap(), "U:hi</s>\nU:b</s>\nA:");
        let broken = ChatTemplate::new("{% for %}", SpecialTokens::default(), Path::new("dir/chat_template.jinja")).err().unwrap();
        assert!(broken.to_string().starts_with("dir/chat_template.jinja: a chat template that cannot be read"), "{broken}");
    }
}
