//! Requests and responses of batch generation: what they hold, and the file of requests, checked line by line before anything starts.

use super::choices::Start;
use super::request_line::{self, Wrong};
use super::sampler::{Drawing, Sampling};
use crate::artifact::open_plain;
use crate::error::{Error, IoContext, Result, without_mark};
use crate::rng::Random;
use crate::text::Tokenizer;
use crate::text::chat::ChatTemplate;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io::BufRead;
use std::path::Path;

/// Lines that are parsed and tokenized together, several at a time.
const LINES_TOGETHER: usize = 4096;

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
    /// Each of them ends a response before it; none is empty.
    pub stop: Vec<String>,
    /// Samples to make, each with noise of its own; at least 1.
    pub n: usize,
    /// Log-probabilities of each token of the response: of the token, and of so many of the most likely ones.
    pub logprobs: Option<usize>,
}

impl Request {
    /// One sample of the model's own distribution, with seed 0: what a line of the file means that says no more.
    pub fn new(id: impl Into<String>, tokens: Vec<u32>, max_new_tokens: usize) -> Request {
        let (id, stop) = (id.into(), Vec::new());
        Request { id, tokens, max_new_tokens, sampling: Sampling::PLAIN, seed: 0, stop, n: 1, logprobs: None }
    }

    /// The noise of all its samples.
    pub fn noise(&self) -> Random {
        Random::new(self.seed, &format!("generate {}", self.id))
    }

    /// How the token after `response` of the sample `index` is drawn; `noise` is [`Request::noise`].
    pub fn drawing<'a>(&'a self, noise: &Random, index: usize, response: &'a [u32]) -> Drawing<'a> {
        // Of 64 bits of a counter, the lower half counts tokens: sample 0 has the noise that it has alone.
        let uniform = noise.uniform((index as u64) << 32 | response.len() as u64);
        let n_top = self.logprobs.unwrap_or(0);
        Drawing { sampling: self.sampling, uniform, prompt: &self.tokens, response, n_top }
    }
}

/// Why a response ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model gave the end-of-sequence token (not part of the response), or its text came to a stop string.
    Stop,
    /// max_new_tokens were made.
    Length,
    /// The model's longest sequence was reached.
    Context,
    /// The request was wrong; there is no response.
    Error,
}

/// A token and its log-probability under the model's own distribution: temperature 1, no penalty, nothing cut off.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// ln p(token | all before).
    pub logprob: f64,
}

/// Log-probabilities at one token of a response.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ChosenLogprob {
    /// The token that was taken.
    pub token: u32,
    /// Its log-probability, as in [`TokenLogprob`].
    pub logprob: f64,
    /// The most likely tokens, most likely first, equal ones by id; the token that was taken need not be among them.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A line of the response file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Response {
    /// The request's id; empty where a wrong request's could not be read.
    pub id: String,
    /// Which sample of the request, from 0.
    pub index: usize,
    /// The new tokens as text, up to where the stop string begins; null when the checkpoint has no tokenizer.
    pub text: Option<String>,
    /// The new tokens, with those of the stop string.
    pub tokens: Vec<u32>,
    /// Sum of their log-probabilities under the model (temperature 1), the end-of-sequence token's included.
    pub logprob: f64,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// When asked for: of each token, and of the end-of-sequence token if that ended the response; they add up to `logprob`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<ChosenLogprob>>,
    /// What was wrong with the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What requests must fit.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Prompts are shorter than this.
    pub max_tokens: usize,
    /// Needed for text prompts and stop strings.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Needed for messages.
    pub template: Option<&'a ChatTemplate>,
    /// What begins the prompts that are texts; templates write it themselves.
    pub start: Start,
}

/// What becomes of a wrong request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnBad {
    /// The file is refused.
    Refuse,
    /// Its response says what was wrong; all others are made.
    Record,
}

/// The requests of a file, in its order.
#[derive(Clone, PartialEq, Debug)]
pub struct RequestFile {
    /// Those that can be answered.
    pub requests: Vec<Request>,
    /// Those that cannot.
    pub refused: Vec<Refused>,
}

/// A wrong request of which that is recorded.
#[derive(Clone, PartialEq, Debug)]
pub struct Refused {
    /// How many good requests stand before it in the file.
    pub before: usize,
    /// Its line of the response file.
    pub response: Response,
}

impl Refused {
    fn new(before: usize, id: Option<String>, error: String) -> Refused {
        let (id, finish_reason) = (id.unwrap_or_default(), FinishReason::Error);
        let response =
            Response { id, index: 0, text: None, tokens: Vec::new(), logprob: 0.0, finish_reason, logprobs: None, error: Some(error) };
        Refused { before, response }
    }
}

/// Reads and checks a request file; blank lines are skipped. With [`OnBad::Refuse`] the first wrong line is an error that names it.
pub fn read_requests(path: &Path, limits: Limits, on_bad: OnBad) -> Result<RequestFile> {
    let mut lines = std::io::BufReader::with_capacity(1 << 20, open_plain(path)?).split(b'\n').enumerate();
    let mut found = RequestFile { requests: Vec::new(), refused: Vec::new() };
    let mut ids = HashSet::new();
    loop {
        let together: Vec<(usize, Vec<u8>)> =
            lines.by_ref().take(LINES_TOGETHER).map(|(i, line)| Ok((i + 1, line.at(path)?))).collect::<Result<_>>()?;
        if together.is_empty() {
            break;
        }
        let filled = together.par_iter().filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace));
        let checked: Vec<(usize, std::result::Result<Request, Wrong>)> = filled
            .map(|(number, line)| (*number, request_line::check(if *number == 1 { without_mark(line) } else { line }, limits)))
            .collect();
        for (number, request) in checked {
            match request.and_then(|request| once(request, &mut ids)) {
                Ok(request) => found.requests.push(request),
                Err(wrong) => {
                    let error = Error::file(path, format!("line {number}: {}", wrong.what)).remedy(wrong.remedy);
                    if on_bad == OnBad::Refuse {
                        return Err(error);
                    }
                    found.refused.push(Refused::new(found.requests.len(), wrong.id, format!("line {number}: {}", wrong.what)));
                }
            }
        }
    }
    if found.requests.is_empty() && found.refused.is_empty() {
        return Err(Error::file(path, "no requests in it").remedy("write one JSON object a line"));
    }
    Ok(found)
}

fn once(request: Request, ids: &mut HashSet<String>) -> std::result::Result<Request, Wrong> {
    if ids.insert(request.id.clone()) {
        return Ok(request);
    }
    let what = format!("id {:?} stands twice", request.id);
    Err(Wrong { id: Some(request.id), what, remedy: "give every request an id of its own".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 100, max_tokens: 8, tokenizer: None, template: None, start: Start::NOTHING };

    fn read(text: &str, on_bad: OnBad) -> Result<RequestFile> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        std::fs::write(&path, text).unwrap();
        read_requests(&path, LIMITS, on_bad)
    }

    /// Each wrong request is refused with its line, the key, what it is and what it may be, and exit code 3.
    #[test]
    fn wrong_requests_are_named() {
        let with = |more: &str| format!(r#"{{"id":"a","tokens":[1],"max_new_tokens":1,{more}}}"#);
        let chat = |more: &str| format!(r#"{{"id":"a","messages":[{{"role":"user","content":"x"}}],"max_new_tokens":1,{more}}}"#);
        let cases: &[(String, &[&str])] = &[
            (with(r#""temprature":1"#), &["temprature", "did you mean temperature?"]),
            (with(r#""Top_K":1"#), &["Top_K", "did you mean top_k?"]),
            (with(r#""seed":1,"seed":2"#), &["seed", "twice"]),
            (r#"{"tokens":[1],"max_new_tokens":1}"#.into(), &["id", "misses"]),
            (r#"{"id":7,"tokens":[1],"max_new_tokens":1}"#.into(), &["id is 7", "text"]),
            (r#"{"id":"","tokens":[1],"max_new_tokens":1}"#.into(), &[r#"id is """#, "not empty"]),
            (r#"{"id":"a","tokens":[1]}"#.into(), &["max_new_tokens", "misses"]),
            (r#"{"id":"a","tokens":[1],"max_new_tokens":-1}"#.into(), &["max_new_tokens is -1", "from 0 up"]),
            (r#"{"id":"a","tokens":[],"max_new_tokens":1}"#.into(), &["empty"]),
            (r#"{"id":"a","tokens":[100],"max_new_tokens":1}"#.into(), &["100", "vocabulary"]),
            (r#"{"id":"a","tokens":[-2],"max_new_tokens":1}"#.into(), &["tokens", "-2"]),
            (r#"{"id":"a","tokens":[1,1,1,1,1,1,1,1],"max_new_tokens":1}"#.into(), &["8 tokens", "is 8"]),
            (with(r#""temperature":-1"#), &["temperature is -1", "from 0 up"]),
            (with(r#""temperature":"warm""#), &[r#"temperature is "warm""#, "number"]),
            (with(r#""seed":18446744073709551616"#), &["seed is 1.8446744073709552e+19", "below 2^64"]),
            (with(r#""top_p":0"#), &["top_p is 0", "above 0"]),
            (with(r#""top_p":1.5"#), &["top_p is 1.5", "to 1"]),
            (with(r#""top_k":-1"#), &["top_k is -1", "from 0 up"]),
            (with(r#""top_k":2.5"#), &["top_k is 2.5", "whole"]),
            (with(r#""min_p":1.1"#), &["min_p is 1.1", "from 0 to 1"]),
            (with(r#""repetition_penalty":0"#), &["repetition_penalty is 0", "above 0"]),
            (with(r#""seed":-3"#), &["seed is -3", "from 0 up"]),
            (with(r#""n":0"#), &["n is 0", "from 1"]),
            (with(r#""logprobs":101"#), &["logprobs is 101", "to 100"]),
            (with(r#""stop":7"#), &["stop is 7", "a text in quotes or a list"]),
            (with(r#""stop":["x",7]"#), &[r#"stop is ["x",7]"#, "a text in quotes or a list"]),
            (with(r#""stop":"x""#), &["stop", "no tokenizer"]),
            (with(r#""stop":"""#), &["stop", "empty"]),
            (with(r#""stop":["x"]"#), &["stop", "no tokenizer"]),
            (with(r#""stop":["x",""]"#), &["stop", "empty"]),
            (with(r#""stop":["\ufffd"]"#), &["stop", "U+FFFD"]),
            (r#"{"id":"a","prompt":"x","max_new_tokens":1}"#.into(), &["no tokenizer"]),
            (r#"{"id":"a","messages":[{"role":"user","content":"x"}],"max_new_tokens":1}"#.into(), &["no chat template"]),
            (r#"{"id":"a","messages":[{"role":"user"}],"max_new_tokens":1}"#.into(), &["messages", "content"]),
            (r#"{"id":"a","prompt":"x","tokens":[1],"max_new_tokens":1}"#.into(), &["needs exactly one of"]),
            (r#"{"id":"a","max_new_tokens":1}"#.into(), &["needs exactly one of"]),
            (r#"{"id":"a","messages":[],"max_new_tokens":1}"#.into(), &["messages is an empty list"]),
            (r#"{"id":"a","tokens":[1],"max_new_tokens":1"#.into(), &["column"]),
            ("[1]".into(), &["request"]),
            (r#"{"id":"a","prompt":"\ud800","max_new_tokens":1}"#.into(), &["column 27: a lone surrogate"]),
            (r#"{"id":"a","messages":"x","max_new_tokens":1}"#.into(), &[r#"messages is "x""#, "list"]),
            (r#"{"id":"a","messages":["x"],"max_new_tokens":1}"#.into(), &[r#"messages[0] is "x""#]),
            (r#"{"id":"a","messages":[{"content":"x"}],"max_new_tokens":1}"#.into(), &["messages[0] misses the key role"]),
            (r#"{"id":"a","messages":[{"role":1,"content":"x"}],"max_new_tokens":1}"#.into(), &["messages[0].role is 1", "text"]),
            (
                r#"{"id":"a","messages":[{"role":"user","content":null}],"max_new_tokens":1}"#.into(),
                &["messages[0] misses the key content"],
            ),
            (r#"{"id":"a","messages":[{"role":"user","content":1}],"max_new_tokens":1}"#.into(), &["messages[0].content is 1", "list"]),
            (r#"{"id":"a","messages":[{"role":"user","content":[]}],"max_new_tokens":1}"#.into(), &["messages[0].content is []"]),
            (r#"{"id":"a","messages":[{"role":"user","content":["x"]}],"max_new_tokens":1}"#.into(), &[r#"messages[0].content[0] is "x""#]),
            (
                r#"{"id":"a","messages":[{"role":"user","content":[{"type":"text"}]}],"max_new_tokens":1}"#.into(),
                &["messages[0].content[0] is", "text"],
            ),
            (
                r#"{"id":"a","messages":[{"role":"user","content":[{"type":"image_url"}]}],"max_new_tokens":1}"#.into(),
                &["image_url", "text alone"],
            ),
            (
                r#"{"id":"a","messages":[{"role":"assistant","tool_calls":[]}],"max_new_tokens":1,"continue_final_message":true}"#.into(),
                &["messages[0] has no content", "continue_final_message"],
            ),
            (
                r#"{"id":"a","messages":[{"role":"user","content":"x"}],"max_new_tokens":1,"continue_final_message":"yes"}"#.into(),
                &[r#"continue_final_message is "yes""#, "true or false"],
            ),
            (
                r#"{"id":"a","messages":[{"role":"user","content":"x"}],"max_new_tokens":1,"tools":{"name":"f"}}"#.into(),
                &["tools is", "list"],
            ),
            (r#"{"id":"a","tokens":[1],"max_new_tokens":1,"tools":[]}"#.into(), &["has tools, but no messages"]),
            (with(r#""documents":[{"text":"x"}]"#), &["has documents, but no messages"]),
            (with(r#""chat_template":"rag""#), &["has chat_template, but no messages"]),
            (with(r#""chat_template_kwargs":{"a":1}"#), &["has chat_template_kwargs, but no messages"]),
            (chat(r#""documents":["x"]"#), &[r#"documents is ["x"]"#, "list of"]),
            (chat(r#""chat_template":7"#), &["chat_template is 7", "name"]),
            (chat(r#""chat_template_kwargs":[1]"#), &["chat_template_kwargs is [1]", "braces"]),
            (chat(r#""chat_template_kwargs":{"tools":[]}"#), &["chat_template_kwargs has tools", "beside messages"]),
            // Keys of requests elsewhere.
            (r#"{"custom_id":"a","tokens":[1],"max_new_tokens":1}"#.into(), &["custom_id", "called id here"]),
            (r#"{"id":"a","tokens":[1],"max_tokens":1}"#.into(), &["max_tokens", "called max_new_tokens here"]),
            (with(r#""frequency_penalty":0.1"#), &["frequency_penalty", "not computed here"]),
            (with(r#""best_of":3"#), &["best_of", "greatest logprob"]),
            (with(r#""enable_thinking":false"#), &["enable_thinking", "chat_template_kwargs"]),
            (with(r#""stop_sequences":["x"]"#), &["stop_sequences", "called stop here"]),
            (
                r#"{"id":"a","tokens":[1],"max_new_tokens":1,"continue_final_message":false}"#.into(),
                &["has continue_final_message, but no messages"],
            ),
        ];
        for (line, expected) in cases {
            let error = read(&format!("\n{{\"id\":\"first\",\"tokens\":[1],\"max_new_tokens\":1}}\n{line}\n"), OnBad::Refuse).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("line 3: "), "{line}: {text}");
            assert!(expected.iter().all(|part| text.contains(part)), "{line}: {text}");
            assert_eq!(error.exit_code(), 3);
            let recorded = read(&format!("{line}\n{{\"id\":\"last\",\"tokens\":[1],\"max_new_tokens\":1}}"), OnBad::Record).unwrap();
            assert_eq!((recorded.requests.len(), recorded.refused.len(), recorded.refused[0].before), (1, 1, 0), "{line}");
            let message = recorded.refused[0].response.error.clone().unwrap();
            assert!(message.starts_with("line 1: ") && expected.iter().any(|part| message.contains(part)), "{line}: {message}");
        }
        let twice = format!("{}\n{}", with(r#""seed":1"#), with(r#""seed":2"#));
        assert!(read(&twice, OnBad::Refuse).unwrap_err().to_string().contains("line 2: id \"a\" stands twice"));
        assert_eq!(read(&twice, OnBad::Record).unwrap().refused[0].response.id, "a");
        assert!(read(" \n\n", OnBad::Record).unwrap_err().to_string().contains("no requests"));
    }

    /// What a line leaves out has the documented value, null counts as left out, and what it says arrives unchanged.
    #[test]
    fn left_out_and_given_values_arrive() {
        let plain = read(r#"{"id":"a","tokens":[1,2],"max_new_tokens":3,"top_p":null,"stop":null}"#, OnBad::Refuse).unwrap();
        assert_eq!(plain.requests, [Request::new("a", vec![1, 2], 3)]);
        let text = r#"{"id":"b","tokens":[5],"max_new_tokens":0,"temperature":0,"top_p":0.5,"top_k":7,"min_p":0.25,
            "repetition_penalty":1.5,"seed":18446744073709551615,"n":4,"logprobs":2}"#
            .replace('\n', " ");
        let sampling = Sampling { temperature: 0.0, top_p: 0.5, top_k: 7, min_p: 0.25, repetition_penalty: 1.5 };
        let expected = Request { sampling, seed: u64::MAX, n: 4, logprobs: Some(2), ..Request::new("b", vec![5], 0) };
        assert_eq!(read(&text, OnBad::Refuse).unwrap().requests, [expected]);
        // The mark of UTF-8 at the beginning, line ends of Windows, blank lines; and a response that may be of any length.
        let text = "\u{feff}{\"id\":\"c\",\"tokens\":[1],\"max_new_tokens\":18446744073709551615}\r\n \r\n";
        assert_eq!(read(text, OnBad::Refuse).unwrap().requests, [Request::new("c", vec![1], 8)]);
    }
}
