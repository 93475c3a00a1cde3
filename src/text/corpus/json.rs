//! The text of one JSONL line: a string field of an object, everything else in the object passed over unread. This file
//! knows nothing of files.

use crate::error::wrong_json;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// What is wrong with a line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Byte of the line, from 1.
    pub column: usize,
    /// In words.
    pub cause: String,
}

/// The string field `field` of the JSON object in `line`. The field twice is a problem, as is anything after the object.
pub fn text_of(line: &str, field: &str) -> Result<String, Problem> {
    let mut json = serde_json::Deserializer::from_str(line);
    let text = Field(field).deserialize(&mut json).and_then(|text| json.end().map(|()| text));
    text.map_err(|error| {
        let wrong = wrong_json(&error);
        let cause = wrong.split_once(": ").map_or(wrong.as_str(), |(_, cause)| cause);
        Problem { column: error.column(), cause: cause.into() }
    })
}

#[derive(Clone, Copy)]
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<String, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with a string {:?}", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        let mut text = None;
        while let Some(key) = map.next_key_seed(Key)? {
            if key != self.0 {
                map.next_value::<IgnoredAny>()?;
            } else if text.replace(map.next_value::<String>()?).is_some() {
                return Err(A::Error::custom(format!("the field {:?} is there twice", self.0)));
            }
        }
        text.ok_or_else(|| A::Error::custom(format!("the field {:?} is missing", self.0)))
    }
}

/// A key, borrowed where it has no escapes.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Cow<'de, str>, D::Error> {
        json.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key {
    type Value = Cow<'de, str>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a key")
    }
    fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(key))
    }
    fn visit_str<E>(self, key: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(key.into()))
    }
}
