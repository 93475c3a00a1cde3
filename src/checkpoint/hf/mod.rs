//! The door to Hugging Face: safetensors directories of NemotronForCausalLM and LlamaForCausalLM in and out, and of reward models
//! (their ForSequenceClassification). Both ways go tensor by tensor; q, k and v become one packed tensor and the vocabulary gets its
//! zero padding on the way in, and come apart again on the way out. Tokenizer, chat templates and settings of generation come along
//! both ways, byte for byte. It knows nothing of how tensors are stored on either side.

mod companions;
pub mod config;
mod export;
mod f16;
mod import;
pub mod names;
mod rope;
mod unsupported;

pub use companions::{adds_first, bos_id, chat_template, eos_ids, is_companion, tokenizer};
pub use export::{EXPORT_FILE_BYTES, EXPORT_KIND, ExportType, Exported, export, export_in_files};
pub use import::{Source, import};

fn weights_name(name: &str) -> String {
    format!("weights/{name}")
}
