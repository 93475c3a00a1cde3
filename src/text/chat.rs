//! Conversations as the text a model was trained on: the template that came with a model (Jinja, as transformers renders it), or
//! Nemotron's own. The engine is the crate minijinja; this file and those below it alone name it.

use super::is_python_space;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, Template, Value};
use std::collections::BTreeMap;

mod conversation;
mod date;
mod parts;
mod python;
mod to_json;

pub use conversation::{Beside, Conversation, shown};
pub use date::Date;

/// Name of the default template in directories of Hugging Face.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Folder there of the others, each in a file `NAME.jinja`.
pub const TEMPLATE_DIR: &str = "additional_chat_templates";

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

/// The texts of special tokens, by the names under which a template may ask for them; what has none is undefined there.
pub type SpecialTokens = BTreeMap<&'static str, String>;

/// Their names, as transformers has them.
pub const SPECIAL_TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The template of models that have several for conversations that name none.
pub const DEFAULT: &str = "default";
/// And for those of them that have tools.
const WITH_TOOLS: &str = "tool_use";

/// A model's templates, compiled: most have one, some others for conversations with tools or documents.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    /// Their names; one that cannot be read is in nobody's way who asks for another. Err: what is wrong with it.
    names: BTreeMap<String, std::result::Result<(), String>>,
}

/// What stands behind a message that is continued while its template is rendered.
const END_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// How a template's call for a day that nobody named is known.
const NO_DAY: &str = "no day was given";

impl ChatTemplate {
    /// Of one text, the default.
    pub fn new(text: &str, special: SpecialTokens) -> ChatTemplate {
        ChatTemplate::several([(DEFAULT, text)], special)
    }

    /// Of several texts by name.
    pub fn several<'t>(texts: impl IntoIterator<Item = (&'t str, &'t str)>, special: SpecialTokens) -> ChatTemplate {
        let mut environment = Environment::new();
        // As transformers sets jinja2 up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the usual delimiters"));
        // Templates call methods of Python's strings and dictionaries.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> std::result::Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        // As jinja2 answers: texts, maps and what is undefined can be counted and gone through too, none cannot.
        let is_iterable = |value: &Value| {
            let kinds = [ValueKind::Seq, ValueKind::Iterable, ValueKind::String, ValueKind::Map, ValueKind::Undefined];
            kinds.contains(&value.kind())
        };
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", is_iterable);
        environment.add_filter("tojson", to_json::to_json);
        environment.add_filter("string", python::text_of);
        environment.add_filter("safe", |value: &Value| python::text_of(value).map(|text| Value::from_object(python::Safe(text))));
        environment.add_filter("escape", python::escape);
        environment.add_filter("e", python::escape);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_formatter(|out, state, value| match state.auto_escape() {
            AutoEscape::None => Ok(out.write_str(&python::text_of(value)?)?),
            _ => Err(minijinja::Error::new(ErrorKind::InvalidOperation, "it escapes what it shows, which is not done here")),
        });
        let mut template = ChatTemplate { environment, special, names: BTreeMap::new() };
        template.set_today(None);
        for (name, text) in texts {
            // jinja2 knows one kind of line end.
            let text = without_marks_of_training(&text.replace("\r\n", "\n").replace('\r', "\n"));
            let added = template.environment.add_template_owned(name.to_string(), text).map_err(|error| one_line(&error));
            template.names.insert(name.into(), added);
        }
        template
    }

    /// The day that it is for templates that ask: the same request makes the same prompt tomorrow, so nobody looks at a clock.
    pub fn set_today(&mut self, today: Option<Date>) {
        self.environment.add_function("strftime_now", move |format: String| -> std::result::Result<String, minijinja::Error> {
            let wrong = |text: String| minijinja::Error::new(ErrorKind::InvalidOperation, text);
            let today = today.ok_or_else(|| wrong(NO_DAY.into()))?;
            today.strftime(&format).map_err(|directive| wrong(format!("it asks for more than a day, by {directive} in {format:?}")))
        });
    }

    /// The one that a conversation names; else, as in transformers, the one for tools where it has any.
    fn template(&self, conversation: &Conversation) -> std::result::Result<Template<'_, '_>, String> {
        let of_tools = conversation.tools.is_some() && self.names.contains_key(WITH_TOOLS);
        let name = conversation.template.as_deref().unwrap_or(if of_tools { WITH_TOOLS } else { DEFAULT });
        match self.names.get(name) {
            Some(Ok(())) => Ok(self.environment.get_template(name).expect("added when it was made")),
            Some(Err(wrong)) => Err(format!("the model came with a chat template that cannot be read, {name}: {wrong}")),
            None => {
                let names: Vec<&str> = self.names.keys().map(String::as_str).collect();
                Err(format!("the model has no chat template {name:?}: say with \"chat_template\" which of {}", names.join(", ")))
            }
        }
    }

    /// Nemotron-4's.
    pub fn nemotron() -> ChatTemplate {
        ChatTemplate::new(NEMOTRON, SpecialTokens::new())
    }

    /// The text of a conversation up to where the assistant's answer begins, or where its last message goes on. Err: what is wrong with it,
    /// by the template itself too.
    pub fn prompt(&self, conversation: &Conversation) -> std::result::Result<String, String> {
        let template = &self.template(conversation)?;
        conversation.all_read_by(template.source())?;
        let listed = self.said(template, conversation);
        let parts = conversation.parts();
        let Some(first) = parts.first() else { return listed };
        // Some templates read texts alone: of a list they show nothing, or what Python does, which no model was trained on, or they fail.
        let left_out = |text: &str| parts.iter().find(|parts| parts.left_out_of(text)).map(|parts| parts.message);
        let unread = listed.as_ref().map_or(Some(first.message), |text| left_out(text));
        let Some(unread) = unread else { return listed };
        match (&listed, self.said(template, &conversation.with_texts())) {
            // It is left out as a text too: what was said long ago, say.
            (Ok(_), Ok(plain)) if left_out(&plain) == Some(unread) => listed,
            (_, Ok(plain)) if parts.iter().all(|parts| parts.texts.len() == 1) => Ok(plain),
            (Err(_), Err(wrong)) => Err(wrong),
            _ => Err(unread_list(unread)),
        }
    }

    fn said(&self, template: &Template, conversation: &Conversation) -> std::result::Result<String, String> {
        match conversation.continues {
            true => self.continued(template, conversation.clone()),
            false => self.render(template, conversation),
        }
    }

    fn render(&self, template: &Template, conversation: &Conversation) -> std::result::Result<String, String> {
        let all = |items: &[serde_json::Value]| items.iter().map(of_json).collect::<Value>();
        let mut context: BTreeMap<&str, Value> = self.special.iter().map(|(name, text)| (*name, text.as_str().into())).collect();
        context.extend(conversation.variables.iter().map(|(name, value)| (name.as_str(), of_json(value))));
        context.extend([
            ("messages", conversation.named().iter().map(object).collect()),
            ("add_generation_prompt", (!conversation.continues).into()),
            // As transformers leaves them when nobody names any: templates ask whether they are none.
            ("tools", conversation.tools.as_deref().map(all).into()),
            ("documents", conversation.documents.as_deref().map(all).into()),
        ]);
        let text = template.render(Value::from_pairs(context)).map_err(|error| match error.detail() {
            Some(NO_DAY) => "the chat template asks for today's date: say which day it is with --today YYYY-MM-DD".into(),
            _ => format!("the chat template refuses the messages: {}", one_line(&error)),
        })?;
        if let Some(parts) = conversation.parts().iter().find(|parts| text.contains(&parts.shown_by_python)) {
            return Err(unread_list(parts.message));
        }
        // Joined with texts, very small and very large numbers are not written in Python's way.
        let mut numbers = Vec::new();
        conversation.messages.iter().flat_map(|message| message.values()).for_each(|value| floats(value, &mut numbers));
        conversation.tools.iter().flatten().for_each(|tool| floats(tool, &mut numbers));
        let other = numbers.into_iter().find(|&x| {
            let ways = [Value::from(x).to_string(), format!("{x:?}")];
            python::float(x) != ways[1] && ways.iter().any(|way| text.contains(way))
        });
        match other {
            Some(x) => {
                Err(format!("the chat template writes the number {}, which cannot be done its way: give it as a text", python::float(x)))
            }
            None => Ok(text),
        }
    }

    /// As transformers finds the end of the last message: by a mark behind it, which is cut off with what the template adds. A template
    /// that trims the message takes the mark's own space.
    fn continued(&self, template: &Template, mut conversation: Conversation) -> std::result::Result<String, String> {
        let text = conversation.final_text();
        let wanted = text.trim_matches(is_python_space).to_string();
        text.push_str(END_MARK);
        let rendered = self.render(template, &conversation)?;
        match rendered.rfind(END_MARK.trim_end()) {
            Some(end) if rendered.contains(&wanted) => {
                let cut = &rendered[..end];
                Ok(if rendered[end..].starts_with(END_MARK) { cut } else { cut.trim_end_matches(is_python_space) }.to_string())
            }
            _ => Err("the chat template leaves out the last message, or parts of it, so continue_final_message cannot be done".into()),
        }
    }
}

fn unread_list(message: usize) -> String {
    format!("messages[{message}].content is a list of parts, which the chat template does not read: give it as one text")
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
/// is, and what is set there is known there alone.
fn without_marks_of_training(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(open) = rest.find("{%") {
        let (before, statement) = rest.split_at(open + 2);
        let Some(end) = statement.find("%}") else { break };
        let (statement, after) = statement.split_at(end);
        let renamed = match statement.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => statement.replace("generation", " with "),
            "endgeneration" => statement.replace("endgeneration", " endwith "),
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
        let template = ChatTemplate::new(text, SpecialTokens::from([("eos_token", "</s>".into())]));
        let odd = "{%- if tools is not none -%}T{%- endif -%}{% generation %}\n{% for m in messages %}{% if m.content == 'b' %}{% continue %}{% endif %}\
                   {{ m.content|tojson }}{{ m|tojson }}{% break %}{% endfor %}{%- endgeneration -%} {{ pad_token }}.";
        let odd = ChatTemplate::new(odd, SpecialTokens::from([("pad_token", "<p>".into())]));
        let said = odd.prompt(&Conversation::of(&[("user", "b"), ("user", "\u{e9} \"<\n"), ("user", "c")])).unwrap();
        // As jinja2 with transformers' extensions renders it.
        let quoted = r#""é \"<\n""#;
        assert_eq!(said, format!(r#"{quoted}{{"role": "user", "content": {quoted}}}<p>."#));
        // By hand from jinja2's rules for trim_blocks and lstrip_blocks.
        assert_eq!(template.prompt(&Conversation::of(&[("user", "  hi "), ("user", "b")])).unwrap(), "U:hi</s>\nU:b</s>\nA:");
        let broken = ChatTemplate::new("{% for %}", SpecialTokens::new()).prompt(&Conversation::of(&[("user", "a")])).unwrap_err();
        assert!(broken.starts_with("the model came with a chat template that cannot be read, default: "), "{broken}");
    }

    /// By templates of every kind, conversations with parts, tools, calls, documents, variables and messages to continue are what
    /// transformers makes of them (tests/goldens/chat.py), of one part too where a template reads texts alone. We refuse more: what a
    /// template would leave out, several parts where it reads texts alone, and what it escapes.
    #[test]
    fn conversations_as_transformers_renders_them() {
        let whole: serde_json::Value = serde_json::from_str(include_str!("../../tests/goldens/chat.json")).unwrap();
        let special = [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")];
        let special: SpecialTokens = special.map(|(name, text)| (name, text.to_string())).into();
        let (mut n_same, mut n_as_texts, mut n_refused) = (0, 0, 0);
        for found in whole["found"].as_array().unwrap() {
            let text = whole["templates"][found["template"].as_str().unwrap()].as_str().unwrap();
            let case = whole["cases"].as_array().unwrap().iter().find(|case| case["case"] == found["case"]).unwrap();
            let given = |key: &str| Some(case[key].clone()).filter(|given| !given.is_null());
            let beside = Beside {
                tools: given("tools"),
                documents: given("documents"),
                chat_template: None,
                chat_template_kwargs: given("chat_template_kwargs"),
                continues: case["continue_final_message"] == true,
            };
            let mut template = ChatTemplate::new(text, special.clone());
            template.set_today(Some(Date::read(whole["today"].as_str().unwrap()).unwrap()));
            let ours = template.prompt(&Conversation::read(case["messages"].clone(), beside).unwrap());
            let context = format!("{} {}: {ours:?}", found["template"], found["case"]);
            match (&ours, found["said"].as_str()) {
                (Ok(ours), Some(theirs)) if ours == theirs => n_same += 1,
                // A list that the template shows as Python does, drops, or cannot add to a text.
                (Ok(ours), said) => {
                    assert_eq!(Some(ours.as_str()), found["of texts"].as_str(), "{context}");
                    assert!(said.is_none_or(|said| said.contains("[{'type': 'text'") || !said.contains("why")), "{context}");
                    n_as_texts += 1;
                }
                (Err(wrong), Some(theirs)) => {
                    let read = ["tools", "tool_calls", "reasoning", "thinking", "documents", "enable_thinking", "level"];
                    let unread = read.into_iter().any(|key| wrong.contains(&format!("has {key}")) && !text.contains(key));
                    let is_list = (theirs.contains("[{'type': 'text'") || found["template"] == "texts or nothing")
                        && wrong.contains("a list of parts, which the chat template does not read");
                    let escapes = found["template"] == "escapes" || theirs.contains("&lt;") && wrong.contains("operator");
                    assert!(unread && wrong.contains("which the chat template does not read") || is_list || escapes, "{context}");
                    n_refused += 1;
                }
                (Err(_), None) => {}
            }
        }
        assert!(n_same > 140 && n_as_texts > 10 && n_refused > 20, "{n_same} {n_as_texts} {n_refused}");
    }

    /// No clock is looked at.
    #[test]
    fn a_day_that_nobody_named_is_refused() {
        let conversation = Conversation::of(&[("user", "a")]);
        let mut template = ChatTemplate::new("{{ messages[0].content }}{{ strftime_now('%d %b %Y') }}", SpecialTokens::new());
        let wrong = template.prompt(&conversation).unwrap_err();
        assert!(wrong.contains("today") && wrong.contains("--today YYYY-MM-DD"), "{wrong}");
        template.set_today(Some(Date::read("2024-07-06").unwrap()));
        assert_eq!(template.prompt(&conversation).unwrap(), "a06 Jul 2024");
        let mut of_hours = ChatTemplate::new("{{ messages[0].content }}{{ strftime_now('%H:%M') }}", SpecialTokens::new());
        of_hours.set_today(Some(Date::read("2024-07-06").unwrap()));
        let wrong = of_hours.prompt(&conversation).unwrap_err();
        assert!(wrong.contains("more than a day") && wrong.contains("%H"), "{wrong}");
    }

    /// Very small and very large numbers are written as Python does; where a template joins them with texts, they are refused.
    #[test]
    fn numbers_that_are_written_otherwise_are_refused() {
        let asked = |text: &str, number: f64| {
            let messages = serde_json::json!([{"role": "user", "content": "a"}]);
            let tools = Some(serde_json::json!([{"least": [number]}]));
            let read = Conversation::read(messages, Beside { tools, ..Beside::default() }).unwrap();
            ChatTemplate::new(text, SpecialTokens::new()).prompt(&read)
        };
        assert_eq!(asked("{{ tools[0].least[0] }}{{ tools[0].least }}", 0.5).unwrap(), "0.5[0.5]");
        assert_eq!(asked("{{ tools | tojson }}", 1e-7).unwrap(), r#"[{"least": [1e-07]}]"#);
        assert_eq!(
            asked("{{ tools[0].least[0] }} {{ tools[0].least }} {{ tools }}", -1e16).unwrap(),
            "-1e+16 [-1e+16] [{'least': [-1e+16]}]"
        );
        for (text, number) in [("{{ 'a' ~ tools[0].least[0] }}", 1e-7), ("{{ tools[0].least ~ 'a' }}", 1e-7), ("{{ tools ~ 'a' }}", -1e16)]
        {
            let wrong = asked(text, number).unwrap_err();
            assert!(wrong.contains("number") && wrong.contains("as a text"), "{wrong}");
        }
    }
}
