//! A strict reader of TOML values: serde's own list of a struct's fields names the known keys, so an unknown key, a missing
//! key and a wrong type are reported with their full path, and no second list of keys is kept anywhere.

use serde::de::value::StringDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor};
use std::fmt;
use toml::Value;

/// What was wrong, and where. `path` is dotted, list items by number: `data.train.0.weight`.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Fault {
    /// Where; empty for the whole recipe.
    pub path: String,
    /// What, without the path.
    pub wrong: String,
    /// What to do, if it is known.
    pub remedy: Option<String>,
}

impl Fault {
    fn new(wrong: impl Into<String>) -> Fault {
        Fault { path: String::new(), wrong: wrong.into(), remedy: None }
    }

    /// Where it happened, unless a deeper place is known.
    fn at(mut self, path: &str) -> Fault {
        if self.path.is_empty() {
            self.path = path.into();
        }
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.wrong)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Fault {
        Fault::new(format!("is wrong: {message}"))
    }
    fn invalid_type(found: de::Unexpected, expected: &dyn de::Expected) -> Fault {
        Fault::new(format!("is {}, expected {}", describe(found), plain(&expected.to_string())))
    }
    fn invalid_value(found: de::Unexpected, expected: &dyn de::Expected) -> Fault {
        Fault::invalid_type(found, expected)
    }
    fn unknown_variant(found: &str, known: &'static [&'static str]) -> Fault {
        let list = known.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let mut fault = Fault::new(format!("is \"{found}\", expected one of {list}"));
        fault.remedy = nearest(found, known).map(|name| format!("did you mean \"{name}\"?"));
        fault
    }
    fn missing_field(name: &'static str) -> Fault {
        let mut fault = Fault::new(format!("misses the key {name}"));
        fault.remedy = Some("add it: scientific numbers have no defaults".into());
        fault
    }
}

fn describe(found: de::Unexpected) -> String {
    match found {
        de::Unexpected::Str(text) => format!("the text \"{text}\""),
        de::Unexpected::Signed(n) => format!("the whole number {n}"),
        de::Unexpected::Unsigned(n) => format!("the whole number {n}"),
        de::Unexpected::Float(x) => format!("the number {x:?}"),
        de::Unexpected::Bool(x) => format!("{x}"),
        de::Unexpected::Map => "a table".into(),
        de::Unexpected::Seq => "a list".into(),
        other => other.to_string(),
    }
}

/// serde's names of types in words.
fn plain(expected: &str) -> String {
    match expected {
        "usize" | "u64" | "u32" => "a whole number that is not negative".into(),
        "f64" | "f32" => "a number".into(),
        "a boolean" => "true or false".into(),
        "path string" | "a string" | "a path string" => "a text in quotes".into(),
        "a sequence" => "a list".into(),
        other => other.strip_prefix("struct ").map_or(other.into(), |name| format!("a table ({name})")),
    }
}

/// The known name with the fewest edits (insert, delete, replace, swap neighbours) from `found`; of equals the first.
pub(crate) fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    known.iter().copied().min_by_key(|name| strsim::damerau_levenshtein(&found.to_lowercase(), name))
}

/// Lengths that other trainers count in steps.
const IN_SAMPLES: [(&str, &str); 2] = [("steps", "samples"), ("warmup_steps", "warmup_samples")];

/// The fault of a key that is not among `fields`.
fn unknown_key(table: &str, key: &str, fields: &'static [&'static str]) -> Fault {
    let path = Node::child(table, key);
    if let Some((_, name)) = IN_SAMPLES.iter().find(|(steps, samples)| *steps == key && fields.contains(samples)) {
        let mut fault = Fault::new("is an unknown key").at(&path);
        fault.remedy = Some(format!("did you mean {}, which is steps x batch.global?", Node::child(table, name)));
        return fault;
    }
    let name = nearest(key, fields).expect("a table has keys");
    let offer = Node::child(table, name);
    let mut fault = Fault::new("is an unknown key").at(&path);
    fault.remedy = Some(if strsim::damerau_levenshtein(key, name) <= key.len().max(3) / 2 {
        format!("did you mean {offer}?")
    } else {
        format!("the nearest is {offer}; known here: {}", fields.join(", "))
    });
    fault
}

/// A value and its place.
pub(super) struct Node {
    path: String,
    value: Value,
}

impl Node {
    /// The whole recipe.
    pub fn root(table: toml::Table) -> Node {
        Node { path: String::new(), value: Value::Table(table) }
    }

    fn child(path: &str, key: &str) -> String {
        if path.is_empty() { key.into() } else { format!("{path}.{key}") }
    }
}

impl<'de> IntoDeserializer<'de, Fault> for Node {
    type Deserializer = Node;
    fn into_deserializer(self) -> Node {
        self
    }
}

impl<'de> Deserializer<'de> for Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let path = self.path;
        let result = match self.value {
            Value::String(text) => visitor.visit_string(text),
            Value::Integer(n) => visitor.visit_i64(n),
            Value::Float(x) => visitor.visit_f64(x),
            Value::Boolean(x) => visitor.visit_bool(x),
            Value::Datetime(date) => visitor.visit_string(date.to_string()),
            Value::Array(items) => visitor.visit_seq(Items { path: path.clone(), items: items.into_iter(), next: 0 }),
            Value::Table(table) => visitor.visit_map(Entries { path: path.clone(), entries: table.into_iter(), value: None }),
        };
        result.map_err(|fault| fault.at(&path))
    }

    fn deserialize_struct<V: Visitor<'de>>(self, _: &'static str, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Fault> {
        let unknown = self.value.as_table().and_then(|table| table.keys().find(|key| !fields.contains(&key.as_str())));
        match unknown {
            Some(key) => Err(unknown_key(&self.path, key, fields)),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(self, _: &'static str, known: &'static [&'static str], visitor: V) -> Result<V::Value, Fault> {
        let path = self.path;
        let result = match self.value {
            Value::String(name) => visitor.visit_enum(Variant { path: path.clone(), name, value: None }),
            Value::Table(table) if table.len() == 1 => {
                let (name, value) = table.into_iter().next().expect("one entry");
                visitor.visit_enum(Variant { path: path.clone(), name, value: Some(value) })
            }
            other => Err(Fault::new(format!("is {}, expected one of {}", other.type_str(), known.join(", ")))),
        };
        result.map_err(|fault| fault.at(&path))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items {
    path: String,
    items: std::vec::IntoIter<Value>,
    next: usize,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Fault;
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(value) = self.items.next() else { return Ok(None) };
        let path = Node::child(&self.path, &self.next.to_string());
        self.next += 1;
        seed.deserialize(Node { path, value }).map(Some)
    }
}

struct Entries {
    path: String,
    entries: toml::map::IntoIter<String, Value>,
    value: Option<Node>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Fault;
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        self.value = Some(Node { path: Node::child(&self.path, &key), value });
        let key: StringDeserializer<Fault> = key.into_deserializer();
        seed.deserialize(key).map(Some)
    }
    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        seed.deserialize(self.value.take().expect("serde asks for the key first"))
    }
}

struct Variant {
    path: String,
    name: String,
    value: Option<Value>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = Fault;
    type Variant = Variant;
    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Variant), Fault> {
        let name: StringDeserializer<Fault> = self.name.clone().into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant {
    type Error = Fault;
    fn unit_variant(self) -> Result<(), Fault> {
        match self.value {
            None => Ok(()),
            Some(_) => Err(Fault::new(format!("gives \"{0}\" a value, expected \"{0}\" alone", self.name))),
        }
    }
    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        match self.value {
            Some(value) => seed.deserialize(Node { path: Node::child(&self.path, &self.name), value }),
            None => Err(Fault::new(format!("is \"{0}\" alone, expected a value for it: {{ {0} = .. }}", self.name))),
        }
    }
    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Fault> {
        Err(Fault::new(format!("is \"{}\", which a recipe cannot hold", self.name)))
    }
    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Fault> {
        Err(Fault::new(format!("is \"{}\", which a recipe cannot hold", self.name)))
    }
}
