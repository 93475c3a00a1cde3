//! Benchmarks: questions from local files in their published shapes, as prompts, tokens, metrics and aggregates of
//! lm-evaluation-harness (0.4.13), so that on the same model every item has the same numbers. Everything but `answers` is a pure
//! function of files and of what the model said: it knows nothing of devices or ranks.
//!
//! ```text
//! task       which benchmarks there are, and their files -> leaf tasks
//! item       a leaf task: items, each with its contexts and continuations, or its prompt
//! arc winogrande hellaswag mmlu gsm8k bbh      rows of files -> items
//! read fewshot python                          what these have in common
//! answers    items -> tokens -> the model -> evidence
//! evidence   what was asked and answered, item by item; extract: what counts as the answer in a text
//! scores     evidence -> metrics, groups, standard errors; compare: two models on the same items
//! ```

pub mod answers;
mod arc;
mod bbh;
pub mod compare;
pub mod evidence;
mod extract;
mod fewshot;
mod gsm8k;
mod hellaswag;
pub mod item;
mod mmlu;
mod python;
mod read;
pub mod scores;
pub mod task;
mod winogrande;
