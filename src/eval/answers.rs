//! From items to evidence: the tokens of every item, the passes of the model, and what is made of its answers.

use super::evidence::{Answer, Choice, Context, Evidence};
use super::extract::{Extraction, cut_at_stops};
use super::item::{Ask, Choices, Item, Leaf, Metrics, Prompt};
use crate::error::{Error, Result};
use crate::infer::choices::{Likelihood, Pair, Start, argmax, encode};
use crate::infer::request::{Request, Response};
use crate::infer::sampler::Sampling;
use crate::text::Tokenizer;
use std::collections::BTreeMap;

/// What items must fit, and how they become tokens.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// The model's longest sequence.
    pub max_tokens: usize,
    /// What begins a sequence.
    pub start: Start,
}

/// Everything that the model is asked, as tokens.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Questions {
    /// Continuations whose likelihoods are wanted; those of an item follow each other.
    pub pairs: Vec<Pair>,
    /// Of each pair: tokens that its context lost.
    cut_of_pairs: Vec<usize>,
    /// Of each pair: tokens of its whole context.
    contexts: Vec<Vec<u32>>,
    /// Prompts to go on with, greedily.
    pub requests: Vec<Request>,
    /// Of each request: tokens that its prompt lost.
    cut_of_requests: Vec<usize>,
}

/// The tokens of all items, in order. Err: an item that has none, or cannot fit the model; it is named.
pub fn questions<'l>(leaves: impl IntoIterator<Item = &'l Leaf>, limits: Limits) -> Result<Questions> {
    let mut questions = Questions::default();
    for leaf in leaves {
        for item in &leaf.items {
            questions.push(leaf, item, limits).map_err(|what| {
                let error = Error::new(crate::error::Kind::File, format!("{}, item {:?}: {what}", leaf.name, item.id));
                error.remedy("correct the row in its file, or use a model that it fits")
            })?;
        }
    }
    Ok(questions)
}

impl Questions {
    fn push(&mut self, leaf: &Leaf, item: &Item, limits: Limits) -> std::result::Result<(), String> {
        match &item.ask {
            Ask::Choices(choices) => choices
                .continuations
                .iter()
                .enumerate()
                .try_for_each(|(idx, continuation)| self.push_pair(context_of(choices, idx), continuation, limits)),
            Ask::Text(prompt) => self.push_request(format!("{} {}", leaf.name, item.id), prompt, limits),
        }
    }

    fn push_pair(&mut self, context: &str, continuation: &str, limits: Limits) -> std::result::Result<(), String> {
        let mut pair = Pair::encode(limits.tokenizer, context, continuation, limits.start)?;
        check_vocabulary(pair.context.iter().chain(&pair.continuation), limits)?;
        self.contexts.push(pair.context.clone());
        self.cut_of_pairs.push(pair.cut(limits.max_tokens)?);
        self.pairs.push(pair);
        Ok(())
    }

    fn push_request(&mut self, id: String, prompt: &Prompt, limits: Limits) -> std::result::Result<(), String> {
        let mut tokens = encode(limits.tokenizer, &prompt.text, limits.start);
        check_vocabulary(&tokens, limits)?;
        // The answer has its full length, whatever the prompt loses for it.
        let room = limits.max_tokens.checked_sub(prompt.max_new_tokens).filter(|&room| room > 0);
        let room = room.ok_or_else(|| {
            format!("an answer may have {} tokens, the model's longest sequence is {}", prompt.max_new_tokens, limits.max_tokens)
        })?;
        let n_cut = tokens.len().saturating_sub(room);
        tokens.drain(..n_cut);
        if tokens.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        let (sampling, stop) =
            (Sampling { temperature: 0.0, ..Sampling::PLAIN }, prompt.until.iter().map(|text| text.to_string()).collect());
        self.requests.push(Request { sampling, stop, ..Request::new(id, tokens, prompt.max_new_tokens) });
        self.cut_of_requests.push(n_cut);
        Ok(())
    }

    /// What is known of all items once the model has answered: `likelihoods` of the pairs and `responses` to the requests, in order.
    pub fn evidence<'l>(
        &self,
        leaves: impl IntoIterator<Item = &'l Leaf>,
        likelihoods: &[Likelihood],
        responses: &[Response],
        tokenizer: &Tokenizer,
    ) -> Vec<Evidence> {
        assert_eq!((likelihoods.len(), responses.len()), (self.pairs.len(), self.requests.len()), "an answer to every question");
        let (mut pair, mut request) = (0, 0);
        let mut all = Vec::new();
        for leaf in leaves {
            for (idx, item) in leaf.items.iter().enumerate() {
                let (answer, metrics) = match &item.ask {
                    Ask::Choices(choices) => {
                        let first = pair;
                        pair += choices.continuations.len();
                        self.judge_choices(leaf.metrics, choices, first, &likelihoods[first..pair])
                    }
                    Ask::Text(prompt) => {
                        request += 1;
                        self.judge_text(leaf.metrics, prompt, request - 1, &responses[request - 1], tokenizer)
                    }
                };
                all.push(Evidence { task: leaf.name.clone(), item: idx, id: item.id.clone(), answer, metrics });
            }
        }
        all
    }

    fn judge_choices(
        &self,
        metrics: Metrics,
        asked: &Choices,
        first: usize,
        likelihoods: &[Likelihood],
    ) -> (Answer, BTreeMap<String, f64>) {
        let choice = |(idx, likelihood): (usize, &Likelihood)| Choice {
            text: asked.continuations[idx].clone(),
            n_chars: asked.choices[idx].chars().count(),
            tokens: self.pairs[first + idx].continuation.clone(),
            n_cut: self.cut_of_pairs[first + idx],
            likelihood: likelihood.clone(),
        };
        let choices: Vec<Choice> = likelihoods.iter().enumerate().map(choice).collect();
        let context = |(idx, text): (usize, &String)| Context { text: text.clone(), tokens: self.contexts[first + idx].clone() };
        let chosen = argmax(choices.iter().map(|choice| choice.likelihood.sum));
        let chosen_per_char = argmax(choices.iter().map(|choice| choice.likelihood.sum / choice.n_chars as f64));
        let right = |chosen: usize| f64::from(u8::from(chosen == asked.gold));
        let mut values = BTreeMap::from([("acc,none".to_string(), right(chosen))]);
        if metrics == Metrics::AccAndAccNorm {
            values.insert("acc_norm,none".into(), right(chosen_per_char));
        }
        let contexts = asked.contexts.iter().enumerate().map(context).collect();
        (Answer::Choices { contexts, choices, chosen, chosen_per_char, gold: asked.gold }, values)
    }

    fn judge_text(
        &self,
        metrics: Metrics,
        asked: &Prompt,
        idx: usize,
        response: &Response,
        tokenizer: &Tokenizer,
    ) -> (Answer, BTreeMap<String, f64>) {
        let Metrics::ExactMatch(filters) = metrics else { panic!("{metrics:?} of a text") };
        let whole = tokenizer.decode(&response.tokens);
        let text = cut_at_stops(&whole, asked.until).to_string();
        let extracted = |filter: &Extraction| (filter.name().to_string(), filter.extract(&text));
        let extracted: BTreeMap<String, String> = filters.iter().map(extracted).collect();
        let value = |filter: &Extraction| {
            let is_match = filter.is_match(&extracted[filter.name()], &asked.target);
            (format!("exact_match,{}", filter.name()), f64::from(u8::from(is_match)))
        };
        let values = filters.iter().map(value).collect();
        let answer = Answer::Text {
            prompt: asked.text.clone(),
            prompt_tokens: self.requests[idx].tokens.clone(),
            n_cut: self.cut_of_requests[idx],
            tokens: response.tokens.clone(),
            text,
            finish_reason: response.finish_reason,
            extracted,
            target: asked.target.clone(),
        };
        (answer, values)
    }
}

fn context_of(choices: &Choices, idx: usize) -> &str {
    choices.contexts.get(idx).unwrap_or(&choices.contexts[0])
}

fn check_vocabulary<'t>(tokens: impl IntoIterator<Item = &'t u32>, limits: Limits) -> std::result::Result<(), String> {
    match tokens.into_iter().find(|&&token| token as usize >= limits.vocab_size) {
        None => Ok(()),
        Some(token) => Err(format!("token {token} is not below the vocabulary size {}", limits.vocab_size)),
    }
}
