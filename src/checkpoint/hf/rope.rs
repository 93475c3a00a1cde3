//! The rotary embedding of a config.json, both ways: `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5), which say the
//! same with other names around it. What a type does not take, and types that are not computed here, are errors with the value. Source:
//! modeling_rope_utils.py of transformers 4.43 to 5, and configuration_llama.py before it.

use crate::device::{LinearScaling, Llama3Scaling, RopeScaling, YarnScaling};
use crate::model::config::ModelConfig;
use serde_json::{Map, Value, json};

/// The tables, in the order in which they are asked.
const TABLES: [&str; 2] = ["rope_parameters", "rope_scaling"];
/// May stand outside of them too, and says the same there; transformers takes this before what is inside.
pub(super) const ORIGINAL: &str = "original_max_position_embeddings";
/// The keys that name the type.
const TYPE: [&str; 2] = ["rope_type", "type"];
/// Read with the rest of config.json, and a note of trainers that no program reads.
const ELSEWHERE: [&str; 3] = ["rope_theta", "partial_rotary_factor", "finetuned"];

/// How a config.json scales rotary frequencies, or what in it cannot be computed: `key = value, ..`. `max_tokens` is its
/// max_position_embeddings.
pub(super) fn read(config: &Value, max_tokens: usize) -> Result<Option<RopeScaling>, String> {
    let mut found: Option<(&str, Option<RopeScaling>)> = None;
    for name in TABLES {
        let table = match &config[name] {
            Value::Null => continue,
            Value::Object(table) if table.is_empty() => continue,
            Value::Object(table) => table,
            other => return Err(format!("{name} = {other}, expected an object")),
        };
        let scaling = Table { name, table, outside: &config[ORIGINAL], max_tokens }.read()?;
        match found {
            Some((first, other)) if other != scaling => {
                return Err(format!("{first} = {}, but {name} = {}", config[first], config[name]));
            }
            _ => found = Some((name, scaling)),
        }
    }
    Ok(found.and_then(|(_, scaling)| scaling))
}

struct Table<'a> {
    name: &'a str,
    table: &'a Map<String, Value>,
    /// `original_max_position_embeddings` of the whole config.
    outside: &'a Value,
    max_tokens: usize,
}

impl Table<'_> {
    fn read(&self) -> Result<Option<RopeScaling>, String> {
        let (key, kind) = self.kind()?;
        match kind {
            "default" => {
                // These say in so many words that nothing is scaled.
                self.refuse_others(kind, &[ORIGINAL])?;
                Ok(None)
            }
            "linear" => {
                self.refuse_others(kind, &["factor", ORIGINAL])?;
                Ok(Some(RopeScaling::Linear(LinearScaling { factor: self.needed(kind, "factor")? })))
            }
            "llama3" => {
                self.refuse_others(kind, &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL])?;
                Ok(Some(RopeScaling::Llama3(Llama3Scaling {
                    factor: self.needed(kind, "factor")?,
                    low_freq_factor: self.needed(kind, "low_freq_factor")?,
                    high_freq_factor: self.needed(kind, "high_freq_factor")?,
                    original_max_position_embeddings: self.original()?,
                })))
            }
            "yarn" => self.yarn().map(|yarn| Some(RopeScaling::Yarn(yarn))),
            other => Err(format!("{}.{key} = \"{other}\", expected default, linear, llama3 or yarn", self.name)),
        }
    }

    fn yarn(&self) -> Result<YarnScaling, String> {
        let known = ["factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"];
        self.refuse_others("yarn", &known)?;
        let original = self.original()?;
        // 0 is none here too: transformers writes `x or 32`.
        let or = |key: &str, default: f64| Ok::<f64, String>(self.number(key)?.filter(|x| *x != 0.0).unwrap_or(default));
        Ok(YarnScaling {
            factor: self.number("factor")?.unwrap_or(self.max_tokens as f64 / original as f64),
            original_max_position_embeddings: original,
            beta_fast: or("beta_fast", 32.0)?,
            beta_slow: or("beta_slow", 1.0)?,
            truncate: match self.value("truncate") {
                None => true,
                Some(value) => value.as_bool().ok_or_else(|| self.is("truncate", value, "true or false"))?,
            },
            attention_factor: self.number("attention_factor")?,
            mscale: self.number("mscale")?,
            mscale_all_dim: self.number("mscale_all_dim")?,
        })
    }

    /// The type and the key that says it. Both keys must say the same.
    fn kind(&self) -> Result<(&'static str, &str), String> {
        let mut kind = None;
        for key in TYPE {
            let Some(value) = self.value(key) else { continue };
            let said = value.as_str().ok_or_else(|| self.is(key, value, "the name of a type"))?;
            match kind {
                Some((first, other)) if other != said => {
                    return Err(format!("{0}.{first} = \"{other}\", but {0}.{key} = \"{said}\"", self.name));
                }
                Some(_) => {}
                None => kind = Some((key, said)),
            }
        }
        Ok(kind.unwrap_or((TYPE[0], "default")))
    }

    /// What a type of rotary embedding does not take might change the function for those who do.
    fn refuse_others(&self, kind: &str, known: &[&str]) -> Result<(), String> {
        for (key, value) in self.table {
            let is_known = [&TYPE[..], &ELSEWHERE, known].concat().contains(&key.as_str());
            let changes_nothing =
                value.is_null() || (["factor", "attention_factor"].contains(&key.as_str()) && value.as_f64() == Some(1.0));
            if !is_known && !changes_nothing {
                return Err(format!("{}.{key} = {value}, which rotary embeddings of type {kind} do not have", self.name));
            }
        }
        Ok(())
    }

    /// null is absent.
    fn value(&self, key: &str) -> Option<&Value> {
        self.table.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let value = |value: &Value| value.as_f64().ok_or_else(|| self.is(key, value, "a number"));
        self.value(key).map(value).transpose()
    }

    fn needed(&self, kind: &str, key: &str) -> Result<f64, String> {
        self.number(key)?.ok_or_else(|| format!("{} of type {kind} has no {key}", self.name))
    }

    /// Length of the first training, inside or outside; else the longest sequence.
    fn original(&self) -> Result<usize, String> {
        let size = |name: String, value: &Value| {
            let size = value.as_u64().filter(|size| (1..=i32::MAX as u64).contains(size));
            size.map(|size| size as usize).ok_or_else(|| format!("{name} = {value}, expected a positive count"))
        };
        let inside = self.value(ORIGINAL).map(|value| size(format!("{}.{ORIGINAL}", self.name), value)).transpose()?;
        let outside = Some(self.outside).filter(|value| !value.is_null()).map(|value| size(ORIGINAL.into(), value)).transpose()?;
        match (inside, outside) {
            (Some(inside), Some(outside)) if inside != outside => {
                Err(format!("{ORIGINAL} = {outside}, but {}.{ORIGINAL} = {inside}", self.name))
            }
            _ => Ok(inside.or(outside).unwrap_or(self.max_tokens)),
        }
    }

    fn is(&self, key: &str, value: &Value, expected: &str) -> String {
        format!("{}.{key} = {value}, expected {expected}", self.name)
    }
}

/// What a model's config.json says of its rotary embedding: `rope_theta` and `rope_parameters`, and `rope_scaling` where frequencies are
/// scaled. transformers 5 takes `rope_scaling` before `rope_parameters`, transformers 4 knows it alone; both find one content. What no
/// spelling mends: transformers 4.46 takes max_position_embeddings for the length of yarn's ramp (4.55 does not), and transformers 4 does
/// not scale Nemotron's frequencies.
pub(super) fn write(config: &mut Value, model: &ModelConfig, partial: Option<f64>) {
    let (kind, scaling) = match model.rope_scaling {
        None => ("default", json!({})),
        Some(RopeScaling::Linear(LinearScaling { factor })) => ("linear", json!({"factor": factor})),
        Some(RopeScaling::Llama3(how)) => ("llama3", json!(how)),
        Some(RopeScaling::Yarn(how)) => {
            let mut said = json!(how);
            if how.truncate {
                // Older versions do not know the key, and all of them truncate when nothing is said.
                said.as_object_mut().expect("a struct").remove("truncate");
            }
            ("yarn", said)
        }
    };
    let with = |named: Value| {
        let mut table = named.as_object().expect("written as one").clone();
        table.extend(scaling.as_object().expect("a struct").clone());
        Value::Object(table)
    };
    let mut parameters = with(json!({"rope_type": kind, "rope_theta": model.rope_base}));
    if let Some(partial) = partial {
        config["partial_rotary_factor"] = json!(partial);
        parameters["partial_rotary_factor"] = json!(partial);
    }
    config["rope_theta"] = json!(model.rope_base);
    config["rope_parameters"] = parameters;
    if model.rope_scaling.is_some() {
        // Before 4.43 linear was all there was, under this name, and two keys had to be all.
        config["rope_scaling"] = with(json!({(if kind == "linear" { "type" } else { "rope_type" }): kind}));
    }
}
