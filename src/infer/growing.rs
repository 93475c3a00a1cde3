//! A response while it grows, token by token: its text so far, and why it ends. Pure: it knows nothing of models, batches or ranks.
//!
//! A response ends at the first of: an end-of-sequence token, which is not part of it; a token with which its text (the decoding of
//! all its tokens) contains a stop string; `max_new_tokens`; the model's longest sequence. Of the stop strings that the last token
//! completed, the one that begins first counts, and the text ends before it; the tokens stay, those of the stop string included.

use super::request::{ChosenLogprob, FinishReason, Request, Response, TokenLogprob};
use super::sampler::Choice;
use crate::text::{GrowingText, Tokenizer};

/// What ends responses beside their requests.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Each of them ends a response; without any, all go to their full length.
    pub eos_ids: &'a [u32],
    /// The model's longest sequence, prompt and response.
    pub max_tokens: usize,
    /// For the text of responses, and for stop strings.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// A response to `request` that is not complete yet.
pub struct Growing<'a> {
    request: &'a Request,
    rules: Rules<'a>,
    tokens: Vec<u32>,
    logprob: f64,
    logprobs: Vec<ChosenLogprob>,
    /// Where there are stop strings to look for.
    text: Option<GrowingText<'a>>,
    /// Where in the text a stop string begins.
    cut: Option<usize>,
}

impl<'a> Growing<'a> {
    /// Nothing yet.
    ///
    /// # Panics
    /// When the request has stop strings and there is no tokenizer.
    pub fn new(request: &'a Request, rules: Rules<'a>) -> Growing<'a> {
        let text = (!request.stop.is_empty()).then(|| GrowingText::new(rules.tokenizer.expect("checked with the request")));
        Growing { request, rules, tokens: Vec::new(), logprob: 0.0, logprobs: Vec::new(), text, cut: None }
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Why it is complete before any token was drawn, if it is.
    pub fn ended_at_once(&self) -> Option<FinishReason> {
        (self.request.max_new_tokens == 0).then_some(FinishReason::Length)
    }

    /// Takes the next token; why the response is complete with it, if it is. Nothing may be pushed after that.
    pub fn push(&mut self, choice: Choice) -> Option<FinishReason> {
        let Choice { token, logprob, top } = choice;
        self.logprob += logprob;
        if self.request.logprobs.is_some() {
            let top_logprobs = top.into_iter().map(|(token, logprob)| TokenLogprob { token, logprob }).collect();
            self.logprobs.push(ChosenLogprob { token, logprob, top_logprobs });
        }
        if self.rules.eos_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        self.tokens.push(token);
        if let Some(text) = &mut self.text {
            let new = text.push(token);
            let stops = self.request.stop.iter();
            self.cut = stops.filter_map(|stop| find_from(text.as_str(), new, stop)).min();
        }
        if self.cut.is_some() {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.request.max_new_tokens {
            Some(FinishReason::Length)
        } else if self.request.tokens.len() + self.tokens.len() >= self.rules.max_tokens {
            Some(FinishReason::Context)
        } else {
            None
        }
    }

    /// The response as sample `index` of its request.
    pub fn into_response(self, index: usize, finish_reason: FinishReason) -> Response {
        let mut text = self.rules.tokenizer.map(|tokenizer| tokenizer.decode(&self.tokens));
        if let (Some(text), Some(cut)) = (&mut text, self.cut) {
            text.truncate(cut);
        }
        let logprobs = self.request.logprobs.is_some().then_some(self.logprobs);
        let (id, tokens, logprob) = (self.request.id.clone(), self.tokens, self.logprob);
        Response { id, index, text, tokens, logprob, finish_reason, logprobs, error: None }
    }
}

/// Where `wanted` first begins in a text of which all before the byte `new` was searched already.
fn find_from(text: &str, new: usize, wanted: &str) -> Option<usize> {
    let mut start = new.saturating_sub(wanted.len() - 1);
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    text[start..].find(wanted).map(|at| start + at)
}
