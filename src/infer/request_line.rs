//! One line of a request file, strictly: an unknown key, a key twice, a value of another type or outside its range is refused, with
//! the value and what it may be.

use super::choices;
use super::request::{Limits, Request};
use super::sampler::Sampling;
use crate::error::wrong_json;
use crate::recipe::nearest_key;
use crate::text::chat::{Beside, Conversation, shown};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// The keys of a request.
const KEYS: [&str; 19] = [
    "id",
    "prompt",
    "messages",
    "tokens",
    "continue_final_message",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "n",
    "logprobs",
];
/// What stands beside messages alone.
const BESIDE_MESSAGES: [&str; 5] = ["tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message"];
/// Keys of requests elsewhere (OpenAI's batch files, vLLM, transformers), and what to write here.
const ELSEWHERE: [(&[&str], &str); 24] = [
    (&["custom_id", "request_id"], "it is called id here"),
    (&["body"], "its keys stand in the request itself here, beside id"),
    (&["method", "url"], "there are no endpoints here: messages make a chat, prompt goes on with a text"),
    (&["model"], "the model is --checkpoint"),
    (&["max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "max_gen_toks"], "it is called max_new_tokens here"),
    (&["max_length"], "the prompt is not counted here: max_new_tokens is the longest response"),
    (&["input", "inputs", "text", "query"], "it is called prompt here"),
    (&["input_ids", "prompt_token_ids", "token_ids"], "it is called tokens here"),
    (&["conversation", "conversations"], "it is called messages here: a list of {\"role\": .., \"content\": ..}"),
    (&["functions"], "it is called tools here: a list of {\"type\": \"function\", \"function\": ..}"),
    (&["enable_thinking", "thinking", "reasoning_effort"], "it belongs into chat_template_kwargs here, for templates that read it"),
    (&["add_generation_prompt"], "it is always so here, but for continue_final_message"),
    (&["stop_sequences", "stop_strings", "stop_words", "until"], "it is called stop here"),
    (&["stop_token_ids", "eos_token_id"], "the model's own tokens end a response here, and the texts of stop"),
    (&["num_return_sequences", "num_samples"], "it is called n here"),
    (&["best_of"], "it is not chosen here: make n samples and take the one with the greatest logprob"),
    (&["top_logprobs", "num_logprobs"], "it is called logprobs here: a number"),
    (&["prompt_logprobs", "echo"], "trireme-score logprobs scores texts"),
    (&["do_sample"], "temperature 0 takes the most likely token here, any other draws"),
    (&["frequency_penalty", "presence_penalty"], "it is not computed here, and repetition_penalty is another formula"),
    (&["num_beams", "length_penalty", "early_stopping", "use_beam_search"], "there is no beam search here"),
    (&["logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "ignore_eos", "typical_p"], "it is not computed here"),
    (&["response_format", "guided_json", "guided_regex", "guided_choice", "structured_outputs", "tool_choice"], "answers are free here"),
    (&["stream", "stream_options", "user", "store", "metadata", "skip_special_tokens", "priority"], "it has no meaning here: leave it out"),
];
/// What seeds and lengths may be.
const WHOLE: &str = "a whole number from 0 up, below 2^64";
/// Most samples of one request.
const MOST_SAMPLES: u64 = 100_000;
/// Most tokens whose log-probabilities stand beside a token.
const MOST_LOGPROBS: u64 = 1024;

/// A line that is no request.
pub(super) struct Wrong {
    /// The request's id, if it was read.
    pub id: Option<String>,
    /// What is wrong, with both values.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Parses and checks a line.
pub(super) fn check(line: &[u8], limits: Limits) -> Result<Request, Wrong> {
    let whole: Entries = serde_json::from_slice(line).map_err(|error| Wrong {
        id: None,
        what: wrong_json(&error),
        remedy: "a request is {\"id\", \"prompt\", \"messages\" or \"tokens\", \"max_new_tokens\", ..}, in UTF-8, on one line".into(),
    })?;
    let id = whole.0.iter().find(|(key, _)| key == "id").and_then(|(_, value)| value.as_str()).map(String::from);
    let wrong = |what: String, remedy: String| Wrong { id: id.clone(), what, remedy };
    for (i, (key, _)) in whole.0.iter().enumerate() {
        if !KEYS.contains(&key.as_str()) {
            if let Some((_, instead)) = ELSEWHERE.iter().find(|(names, _)| names.contains(&key.as_str())) {
                return Err(wrong(format!("{key} is no key of a request here: {instead}"), format!("the keys are {}", KEYS.join(", "))));
            }
            let name = nearest_key(key, &KEYS).expect("there are keys");
            return Err(wrong(format!("{key} is an unknown key"), format!("did you mean {name}? the keys are {}", KEYS.join(", "))));
        }
        if whole.0[..i].iter().any(|(before, _)| before == key) {
            return Err(wrong(format!("{key} stands twice"), "leave one of them out".into()));
        }
    }
    request(Fields(whole.0), limits).map_err(|what| wrong(what, "correct the request".into()))
}

fn request(mut fields: Fields, limits: Limits) -> Result<Request, String> {
    let id = match fields.take("id") {
        Some(Value::String(id)) if !id.is_empty() => id,
        other => return Err(unfit("id", other, "a text in quotes that is not empty")),
    };
    let max_new_tokens = match fields.take("max_new_tokens") {
        // More than the model can make is as good as no limit, and sums of lengths stay small.
        Some(value) if value.is_u64() => value.as_u64().expect("seen").min(limits.max_tokens as u64) as usize,
        other => return Err(unfit("max_new_tokens", other, WHOLE)),
    };
    let sampling = Sampling {
        temperature: fields.number("temperature", 1.0, "a number from 0 up", |x| x >= 0.0)?,
        top_p: fields.number("top_p", 1.0, "a number above 0, up to 1", |x| x > 0.0 && x <= 1.0)?,
        top_k: fields.count("top_k", 0, &format!("{WHOLE} (0: all)"), |_| true)? as usize,
        min_p: fields.number("min_p", 0.0, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
        repetition_penalty: fields.number("repetition_penalty", 1.0, "a number above 0", |x| x > 0.0)?,
    };
    let seed = fields.count("seed", 0, WHOLE, |_| true)?;
    let n = fields.count("n", 1, &format!("a whole number from 1 to {MOST_SAMPLES}"), |n| (1..=MOST_SAMPLES).contains(&n))? as usize;
    let logprobs = fields.logprobs(limits.vocab_size as u64)?;
    let stop = fields.stop(limits)?;
    let tokens = prompt(&mut fields, limits)?;
    Ok(Request { id, tokens, max_new_tokens, sampling, seed, stop, n, logprobs })
}

/// The prompt's tokens, however it is given.
fn prompt(fields: &mut Fields, limits: Limits) -> Result<Vec<u32>, String> {
    let tokenizer = || limits.tokenizer.ok_or("has text, but the checkpoint has no tokenizer: give its prompt as \"tokens\"");
    if let Some(key) = BESIDE_MESSAGES.into_iter().find(|key| fields.has(key) && !fields.has("messages")) {
        return Err(format!("has {key}, but no messages, beside which it belongs"));
    }
    let beside = Beside {
        tools: fields.take("tools"),
        documents: fields.take("documents"),
        chat_template: fields.take("chat_template"),
        chat_template_kwargs: fields.take("chat_template_kwargs"),
        continues: fields.truth("continue_final_message")?.unwrap_or(false),
    };
    let mut may_begin = None;
    let tokens = match (fields.take("prompt"), fields.take("messages"), fields.take("tokens")) {
        (None, None, Some(tokens)) => ids(tokens)?,
        (Some(Value::String(prompt)), None, None) => {
            may_begin = limits.start.empty;
            choices::encode(tokenizer()?, &prompt, limits.start)
        }
        (Some(other), None, None) => return Err(unfit("prompt", Some(other), "a text in quotes")),
        (None, Some(messages), None) => {
            let conversation = Conversation::read(messages, beside)?;
            let missing = "has messages, but the checkpoint has no chat template: write them as a \"prompt\"";
            let text = limits.template.ok_or(missing)?.prompt(&conversation)?;
            tokenizer()?.encode_named(&text)
        }
        _ => return Err("needs exactly one of \"prompt\", \"messages\" and \"tokens\"".into()),
    };
    let tokens = if tokens.is_empty() { Vec::from_iter(may_begin) } else { tokens };
    if tokens.is_empty() {
        return Err("the prompt is empty, the model needs at least one token to continue".into());
    }
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= limits.vocab_size) {
        return Err(format!("token {token} is not below the vocabulary size {}", limits.vocab_size));
    }
    if tokens.len() >= limits.max_tokens {
        return Err(format!("the prompt has {} tokens, the model's longest sequence is {}", tokens.len(), limits.max_tokens));
    }
    Ok(tokens)
}

fn ids(tokens: Value) -> Result<Vec<u32>, String> {
    let expected = "a list of token ids";
    let Value::Array(items) = tokens else { return Err(unfit("tokens", Some(tokens), expected)) };
    let id = |item: Value| {
        item.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format!("tokens has {}, expected {expected}", shown(&item)))
    };
    items.into_iter().map(id).collect()
}

/// What is left of a line.
struct Fields(Vec<(String, Value)>);

impl Fields {
    /// The value of a key; null is nothing.
    fn take(&mut self, key: &str) -> Option<Value> {
        let at = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.swap_remove(at).1).filter(|value| !value.is_null())
    }

    fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(name, value)| name == key && !value.is_null())
    }

    fn truth(&mut self, key: &str) -> Result<Option<bool>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| unfit(key, Some(value), "true or false"))
    }

    fn number(&mut self, key: &str, left_out: f64, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
        let Some(value) = self.take(key) else { return Ok(left_out) };
        value.as_f64().filter(|&x| x.is_finite() && fits(x)).ok_or_else(|| unfit(key, Some(value), expected))
    }

    fn count(&mut self, key: &str, left_out: u64, expected: &str, fits: impl Fn(u64) -> bool) -> Result<u64, String> {
        let Some(value) = self.take(key) else { return Ok(left_out) };
        value.as_u64().filter(|&n| fits(n)).ok_or_else(|| unfit(key, Some(value), expected))
    }

    fn logprobs(&mut self, vocab_size: u64) -> Result<Option<usize>, String> {
        let most = MOST_LOGPROBS.min(vocab_size);
        let Some(value) = self.take("logprobs") else { return Ok(None) };
        let fits = value.as_u64().filter(|&k| k <= most);
        fits.map(|k| Some(k as usize)).ok_or_else(|| unfit("logprobs", Some(value), &format!("a whole number from 0 to {most}")))
    }

    fn stop(&mut self, limits: Limits) -> Result<Vec<String>, String> {
        let Some(value) = self.take("stop") else { return Ok(Vec::new()) };
        let stop = match &value {
            Value::String(text) => vec![text.clone()],
            list => {
                Vec::<String>::deserialize(list).map_err(|_| unfit("stop", Some(value.clone()), "a text in quotes or a list of them"))?
            }
        };
        if stop.iter().any(String::is_empty) {
            return Err("stop has an empty text, which every response begins with".into());
        }
        if stop.iter().any(|text| text.contains('\u{FFFD}')) {
            return Err("stop has U+FFFD, which stands for bytes that are no character".into());
        }
        if !stop.is_empty() && limits.tokenizer.is_none() {
            return Err("has stop strings, but the checkpoint has no tokenizer".into());
        }
        Ok(stop)
    }
}

fn unfit(key: &str, found: Option<Value>, expected: &str) -> String {
    match found {
        None => format!("misses the key {key}, expected {expected}"),
        Some(value) => format!("{key} is {}, expected {expected}", shown(&value)),
    }
}

/// A JSON object as it stands, keys that stand twice included.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Entries, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a request in braces")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(Collect)
    }
}
