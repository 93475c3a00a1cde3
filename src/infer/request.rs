//! Requests and responses of batch generation, one JSON object a line.

use super::sampler::Sampling;
use crate::error::{Error, IoContext, Result};
use crate::text::Tokenizer;
use crate::text::chat::{ChatTemplate, Message};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io::BufRead;
use std::path::Path;

/// A line of the request file as typed.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: String,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    tokens: Option<Vec<u32>>,
    max_new_tokens: usize,
    #[serde(default = "one")]
    temperature: f64,
    #[serde(default = "one")]
    top_p: f64,
    #[serde(default)]
    top_k: usize,
    #[serde(default)]
    seed: u64,
}

fn one() -> f64 {
    1.0
}

/// A checked request.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Unique in its file; part of the key of the noise.
    pub id: String,
    /// The prompt's tokens; at least one.
    pub tokens: Vec<u32>,
    /// Longest response.
    pub max_new_tokens: usize,
    /// How to sample.
    pub sampling: Sampling,
    /// Key of the noise.
    pub seed: u64,
}

/// Why a response ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model gave the end-of-sequence token (not part of the response).
    Stop,
    /// max_new_tokens were made.
    Length,
    /// The model's longest sequence was reached.
    Context,
}

/// A line of the response file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The request's id.
    pub id: String,
    /// The new tokens as text; null when the checkpoint has no tokenizer.
    pub text: Option<String>,
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Sum of their log-probabilities under the model (temperature 1), the end-of-sequence token's included.
    pub logprob: f64,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// What requests must fit.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Prompts are shorter than this.
    pub max_tokens: usize,
    /// Needed for text prompts.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Needed for messages.
    pub template: Option<&'a ChatTemplate>,
}

/// Reads and checks a request file. The first wrong line is an error that names it; blank lines are skipped.
pub fn read_requests(path: &Path, limits: Limits) -> Result<Vec<Request>> {
    let file = std::fs::File::open(path).at(path)?;
    let (mut requests, mut ids) = (Vec::new(), HashSet::new());
    for (number, line) in std::io::BufReader::new(file).lines().enumerate() {
        let wrong = |what: String| Error::file(path, format!("line {}: {what}", number + 1));
        let line = line.map_err(|error| wrong(error.to_string()).remedy("write UTF-8, one JSON object a line"))?;
        if line.trim().is_empty() {
            continue;
        }
        let parsed: Line = serde_json::from_str(&line).map_err(|error| {
            wrong(error.to_string()).remedy("a request is {\"id\", \"prompt\", \"messages\" or \"tokens\", \"max_new_tokens\", ..}")
        })?;
        let request = check(parsed, limits).map_err(|what| wrong(what).remedy("correct the request"))?;
        if !ids.insert(request.id.clone()) {
            return Err(wrong(format!("id {:?} stands twice", request.id)).remedy("give every request an id of its own"));
        }
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(Error::file(path, "no requests in it").remedy("write one JSON object a line"));
    }
    Ok(requests)
}

fn check(line: Line, limits: Limits) -> std::result::Result<Request, String> {
    let encode = |prompt: &str| match limits.tokenizer {
        Some(tokenizer) => Ok(tokenizer.encode(prompt)),
        None => Err("has text, but the checkpoint has no tokenizer".to_string()),
    };
    let tokens = match (line.prompt, line.messages, line.tokens) {
        (None, None, Some(tokens)) => tokens,
        (Some(prompt), None, None) => encode(&prompt)?,
        (None, Some(messages), None) => match limits.template {
            Some(template) => encode(&template.prompt(&messages)?)?,
            None => return Err("has messages, but the checkpoint has no chat template; write them as a \"prompt\"".into()),
        },
        _ => return Err("needs one of \"prompt\", \"messages\" and \"tokens\"".into()),
    };
    if tokens.is_empty() {
        return Err("the prompt is empty, the model needs at least one token to continue".into());
    }
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= limits.vocab_size) {
        return Err(format!("token {token} is not below the vocabulary size {}", limits.vocab_size));
    }
    if tokens.len() >= limits.max_tokens {
        return Err(format!("the prompt has {} tokens, the model's longest sequence is {}", tokens.len(), limits.max_tokens));
    }
    if !(line.temperature >= 0.0 && line.temperature.is_finite()) {
        return Err(format!("temperature {} is not a number from 0 up", line.temperature));
    }
    if !(line.top_p > 0.0 && line.top_p <= 1.0) {
        return Err(format!("top_p {} is not in (0, 1]", line.top_p));
    }
    let sampling = Sampling { temperature: line.temperature, top_p: line.top_p, top_k: line.top_k };
    Ok(Request { id: line.id, tokens, max_new_tokens: line.max_new_tokens, sampling, seed: line.seed })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each wrong request is refused with its line, both values where there are two, and exit code 3.
    #[test]
    fn wrong_requests_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        let limits = Limits { vocab_size: 100, max_tokens: 8, tokenizer: None, template: None };
        let cases = [
            (r#"{"id":"a","tokens":[1],"max_new_tokens":1,"temprature":1}"#, "temprature"),
            (r#"{"id":"a","tokens":[],"max_new_tokens":1}"#, "empty"),
            (r#"{"id":"a","tokens":[100],"max_new_tokens":1}"#, "100"),
            (r#"{"id":"a","tokens":[1,1,1,1,1,1,1,1],"max_new_tokens":1}"#, "8 tokens"),
            (r#"{"id":"a","tokens":[1],"max_new_tokens":1,"temperature":-1}"#, "-1"),
            (r#"{"id":"a","tokens":[1],"max_new_tokens":1,"top_p":0}"#, "top_p 0"),
            (r#"{"id":"a","prompt":"x","max_new_tokens":1}"#, "no tokenizer"),
            (r#"{"id":"a","messages":[{"role":"user","content":"x"}],"max_new_tokens":1}"#, "no chat template"),
            (r#"{"id":"a","messages":[{"role":"user"}],"max_new_tokens":1}"#, "content"),
            (r#"{"id":"a","prompt":"x","tokens":[1],"max_new_tokens":1}"#, "needs one of"),
            (r#"{"id":"a","max_new_tokens":1}"#, "needs one of"),
            ("{\"id\":\"a\",\"tokens\":[1],\"max_new_tokens\":1}\n{\"id\":\"a\",\"tokens\":[1],\"max_new_tokens\":1}", "twice"),
            ("", "no requests"),
        ];
        for (text, expected) in cases {
            std::fs::write(&path, text).unwrap();
            let error = read_requests(&path, limits).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert_eq!(error.exit_code(), 3);
        }
    }
}
