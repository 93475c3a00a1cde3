//! Conversations as the text a model was trained on: the template that came with a model (Jinja, as transformers renders it), or
//! Nemotron's own. The engine is the crate minijinja; this file and those below it alone name it.

use super::is_python_space;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, ErrorKind, Template, Value};
use std::path::Path;

mod conversation;
mod to_json;

pub use conversation::{Conversation, shown};

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

/// A template, compiled; some models have another one for conversations with tools.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

/// The names they have inside their environment.
const NAME: &str = "chat";
const WITH_TOOLS: &str = "chat with tools";

/// What stands behind a message that is continued while its template is rendered.
const END_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

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
        // As jinja2 answers: texts, maps and what is undefined can be counted and gone through too, none cannot.
        let is_iterable = |value: &Value| {
            let kinds = [ValueKind::Seq, ValueKind::Iterable, ValueKind::String, ValueKind::Map, ValueKind::Undefined];
            kinds.contains(&value.kind())
        };
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", is_iterable);
        environment.add_filter("tojson", to_json::to_json);
        let mut template = ChatTemplate { environment, special };
        template.add(NAME, text, origin)?;
        Ok(template)
    }

    /// With another text for conversations that name tools.
    pub fn with_tools(mut self, text: &str, origin: &Path) -> Result<ChatTemplate> {
        self.add(WITH_TOOLS, text, origin)?;
        Ok(self)
    }

    fn add(&mut self, name: &'static str, text: &str, origin: &Path) -> Result<()> {
        self.environment
            .add_template_owned(name, without_marks_of_training(text))
            .map_err(|error| Error::file(origin, format!("a chat template that cannot be read: {}", one_line(&error))).remedy("correct it"))
    }

    fn template(&self, conversation: &Conversation) -> Template<'_, '_> {
        let of_tools = conversation.tools.as_ref().and_then(|_| self.environment.get_template(WITH_TOOLS).ok());
        of_tools.unwrap_or_else(|| self.environment.get_template(NAME).expect("added when it was made"))
    }

    /// Nemotron-4's.
    pub fn nemotron() -> ChatTemplate {
        ChatTemplate::new(NEMOTRON, SpecialTokens::default(), Path::new("Nemotron's chat template")).expect("a template of ours compiles")
    }

    /// The text of a conversation up to where the assistant's answer begins, or where its last message goes on. Err: what is wrong with it,
    /// by the template itself too.
    pub fn prompt(&self, conversation: &Conversation) -> std::result::Result<String, String> {
        conversation.all_read_by(self.template(conversation).source())?;
        if conversation.continues {
            return self.continued(conversation.clone());
        }
        self.render(conversation)
    }

    fn render(&self, conversation: &Conversation) -> std::result::Result<String, String> {
        let context = minijinja::context! {
            messages => conversation.named().iter().map(object).collect::<Value>(),
            add_generation_prompt => !conversation.continues,
            bos_token => self.special.bos.as_str(),
            eos_token => self.special.eos.as_str(),
            pad_token => self.special.pad.as_str(),
            unk_token => self.special.unk.as_str(),
            // As transformers leaves them when nobody names any: templates ask whether they are none.
            tools => conversation.tools.as_ref().map(|tools| tools.iter().map(of_json).collect::<Value>()),
            documents => (),
        };
        let text = self
            .template(conversation)
            .render(context)
            .map_err(|error| format!("the chat template refuses the messages: {}", one_line(&error)))?;
        // A template that knows no parts writes a list as Python shows it, which no model was trained on.
        let contents = conversation.messages.iter().map(|message| message.get("content"));
        for (i, parts) in contents.enumerate().filter_map(|(i, content)| Some((i, content.filter(|content| content.is_array())?))) {
            if text.contains(&of_json(parts).to_string()) {
                return Err(format!(
                    "messages[{i}].content is a list of parts, which the chat template does not read: give it as one text"
                ));
            }
        }
        // Nor has the engine Python's way of writing very small and very large numbers.
        let mut numbers = Vec::new();
        conversation.messages.iter().flat_map(|message| message.values()).for_each(|value| floats(value, &mut numbers));
        conversation.tools.iter().flatten().for_each(|tool| floats(tool, &mut numbers));
        let other = numbers.into_iter().find(|&x| {
            let ways = [Value::from(x).to_string(), format!("{x:?}")];
            to_json::python_float(x) != ways[1] && ways.iter().any(|way| text.contains(way))
        });
        match other {
            Some(x) => Err(format!(
                "the chat template writes the number {}, which cannot be done its way: give it as a text",
                to_json::python_float(x)
            )),
            None => Ok(text),
        }
    }

    /// As transformers finds the end of the last message: by a mark behind it, which is cut off with what the template adds. A template
    /// that trims the message takes the mark's own space.
    fn continued(&self, mut conversation: Conversation) -> std::result::Result<String, String> {
        let text = conversation.final_text();
        let wanted = text.trim_matches(is_python_space).to_string();
        text.push_str(END_MARK);
        let rendered = self.render(&conversation)?;
        match rendered.rfind(END_MARK.trim_end()) {
            Some(end) if rendered.contains(&wanted) => {
                let cut = &rendered[..end];
                Ok(if rendered[end..].starts_with(END_MARK) { cut } else { cut.trim_end_matches(is_python_space) }.to_string())
            }
            _ => Err("the chat template leaves out the last message, or parts of it, so continue_final_message cannot be done".into()),
        }
    }
}

/// JSON as templates see it.
fn of_json(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(is) => Value::from(*is),
        serde_json::Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(count), _) => Value::from(count),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64()),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(of_json).collect(),
        serde_json::Value::Object(entries) => object(entries),
    }
}

/// All numbers in it that are not whole.
fn floats(json: &serde_json::Value, found: &mut Vec<f64>) {
    match json {
        serde_json::Value::Number(number) => found.extend(number.as_f64().filter(|_| number.is_f64())),
        serde_json::Value::Array(items) => items.iter().for_each(|item| floats(item, found)),
        serde_json::Value::Object(entries) => entries.values().for_each(|value| floats(value, found)),
        _ => {}
    }
}

fn object(entries: &serde_json::Map<String, serde_json::Value>) -> Value {
    Value::from_pairs(entries.iter().map(|(key, value)| (key.as_str(), of_json(value))))
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

/// What went wrong, without the template's source below it.
fn one_line(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(what.clone(), |line| format!("{what} (line {line} of the template)")).replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published form, character by character, with and without a system turn: a model answers badly to any other.
    #[test]
    fn nemotron_turns() {
        let template = ChatTemplate::nemotron();
        let one = template.prompt(&Conversation::of(&[("user", "Hi\n {{ x }}")])).unwrap();
        assert_eq!(one, "<extra_id_0>System\n\n<extra_id_1>User\nHi\n {{ x }}\n<extra_id_1>Assistant\n");
        let turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")];
        let several = template.prompt(&Conversation::of(&turns)).unwrap();
        let expected = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\na\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc\n\
                        <extra_id_1>Assistant\n";
        assert_eq!(several, expected);
        let error = template.prompt(&Conversation::of(&[("user", "a"), ("system", "b")])).unwrap_err();
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
        let said = odd.prompt(&Conversation::of(&[("user", "b"), ("user", "\u{e9} \"<\n"), ("user", "c")])).unwrap();
        // As jinja2 with transformers' extensions renders it.
        let quoted = r#""é \"<\n""#;
        assert_eq!(said, format!(r#"{quoted}{{"role": "user", "content": {quoted}}}<p>."#));
        // By hand from jinja2's rules for trim_blocks and lstrip_blocks.
        assert_eq!(template.prompt(&Conversation::of(&[("user", "  hi "), ("user", "b")])).unwrap(), "U:hi</s>\nU:b</s>\nA:");
        let broken = ChatTemplate::new("{% for %}", SpecialTokens::default(), Path::new("dir/chat_template.jinja")).err().unwrap();
        assert!(broken.to_string().starts_with("dir/chat_template.jinja: a chat template that cannot be read"), "{broken}");
    }

    /// By templates of every kind, conversations with parts, tools, calls and messages to continue are what transformers makes of them
    /// (tests/goldens/chat.py). We refuse more: what a template would leave out, or write as Python shows a list.
    #[test]
    fn conversations_as_transformers_renders_them() {
        let whole: serde_json::Value = serde_json::from_str(include_str!("../../tests/goldens/chat.json")).unwrap();
        let [bos, eos, pad, unk] = ["<s>", "</s>", "<pad>", "<unk>"].map(String::from);
        let special = SpecialTokens { bos, eos, pad, unk };
        let (mut n_same, mut n_refused) = (0, 0);
        for found in whole["found"].as_array().unwrap() {
            let text = whole["templates"][found["template"].as_str().unwrap()].as_str().unwrap();
            let case = whole["cases"].as_array().unwrap().iter().find(|case| case["case"] == found["case"]).unwrap();
            let tools = Some(case["tools"].clone()).filter(|tools| !tools.is_null());
            let read = Conversation::read(case["messages"].clone(), tools, case["continue_final_message"] == true).unwrap();
            let ours = ChatTemplate::new(text, special.clone(), Path::new("x")).unwrap().prompt(&read);
            let context = format!("{} {}: {ours:?}", found["template"], found["case"]);
            match (&ours, found["said"].as_str()) {
                (Ok(ours), Some(theirs)) => {
                    assert_eq!(ours, theirs, "{context}");
                    n_same += 1;
                }
                (Err(wrong), Some(theirs)) => {
                    let unread = ["tools", "tool_calls", "reasoning", "thinking"].into_iter().any(|key| {
                        let has = wrong.contains(&format!("has {key}, which the chat template does not read"));
                        has && !text.contains(key)
                    });
                    assert!(unread || theirs.contains("[{'type': 'text'") && wrong.contains("a list of parts"), "{context}");
                    n_refused += 1;
                }
                (Ok(_), None) => panic!("{context}"),
                (Err(_), None) => {}
            }
        }
        assert!(n_same > 50 && n_refused > 0, "{n_same} {n_refused}");
    }

    /// Where a template writes a number in its own way, Python's way of writing very small and very large ones is not ours.
    #[test]
    fn numbers_that_are_written_otherwise_are_refused() {
        let asked = |text: &str, number: f64| {
            let messages = serde_json::json!([{"role": "user", "content": "a"}]);
            let read = Conversation::read(messages, Some(vec![serde_json::json!({"least": [number]})].into()), false).unwrap();
            ChatTemplate::new(text, SpecialTokens::default(), Path::new("x")).unwrap().prompt(&read)
        };
        assert_eq!(asked("{{ tools[0].least[0] }}{{ tools[0].least }}", 0.5).unwrap(), "0.5[0.5]");
        assert_eq!(asked("{{ tools | tojson }}", 1e-7).unwrap(), r#"[{"least": [1e-07]}]"#);
        for (text, number) in [("{{ tools[0].least[0] }}", 1e-7), ("{{ tools[0].least }}", 1e-7), ("{{ tools }}", -1e16)] {
            let wrong = asked(text, number).unwrap_err();
            assert!(wrong.contains("number") && wrong.contains("as a text"), "{wrong}");
        }
    }
}
