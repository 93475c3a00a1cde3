//! The door to Hugging Face: safetensors directories of NemotronForCausalLM and LlamaForCausalLM in and out, and of reward models
//! (their ForSequenceClassification). Both ways go tensor by tensor; q, k and v become one packed tensor and the vocabulary gets its zero padding on the way in, and come
//! apart again on the way out. It knows nothing of how tensors are stored on either side.

pub mod config;
pub mod names;

use super::KIND;
use super::safetensors::{self, Element, Weights};
use super::save::{Meta, Planned, Streamed};
use super::shard::StoredType;
use super::stored::{self, Stored, Wanted};
use crate::artifact::{self, ArtifactWriter, Begin, HashingFile, Manifest};
use crate::error::{Context, Error, IoContext, Result};
use crate::model::config::ModelConfig;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use crate::text::chat::{self, ChatTemplate, SpecialTokens};
use crate::text::{self, Tokenizer};
use config::TokenIds;
use names::{Mapped, Rows, SCORE_BIAS, mapping};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Kind of the artifact that [`export`] writes: a directory that transformers loads, with our manifest in it.
pub const EXPORT_KIND: &str = "hf-model";
/// Most bytes of an exported file, unless one tensor alone is larger (Hugging Face's own default).
const EXPORT_FILE_BYTES: u64 = 5_000_000_000;
/// Where transformers 4 kept the chat template.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Under this key the recipe of an imported checkpoint keeps the config.json that it came with.
const HF_CONFIG: &str = "hf_config";
/// And under this one its chat template.
const CHAT_TEMPLATE: &str = "chat_template";

/// Element type of an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExportType {
    /// Each tensor as it is stored.
    AsStored,
    /// Everything widened to f32.
    F32,
    /// Everything rounded to bf16.
    Bf16,
}

/// Turns a Hugging Face directory into a checkpoint of weights at step 0. f16 is widened to f32, f32 and bf16 stay what
/// they are. A `tokenizer.model`, or else a `tokenizer.json`, beside the weights comes along.
pub fn import(hf_dir: &Path, out: &Path) -> Result<Manifest> {
    import_weights(hf_dir, out).doing(|| format!("importing {}", hf_dir.display()))
}

fn import_weights(hf_dir: &Path, out: &Path) -> Result<Manifest> {
    if !hf_dir.is_dir() {
        return Err(Error::file(hf_dir, "no such directory").remedy("check the path"));
    }
    let (model, hf_config) = config::read(hf_dir)?;
    let weights = Weights::open(hf_dir)?;
    let is_here = |mapped: &Mapped| mapped.sources[0].0 != SCORE_BIAS || weights.entries().contains_key(SCORE_BIAS);
    let table: Vec<Mapped> = mapping(&model).into_iter().map(|mapped| if is_here(&mapped) { mapped } else { mapped.absent() }).collect();
    let planned = table.iter().map(|mapped| plan(mapped, &weights)).collect::<Result<Vec<Planned>>>()?;
    refuse_unknown_tensors(hf_dir, &table, &weights)?;
    let mut inputs = vec![artifact::input("hf-config", &hf_dir.join(config::FILE))?];
    for path in weights.paths() {
        inputs.push(artifact::input("hf-weights", path)?);
    }
    let tokenizer_path = text::TOKENIZER_FILES.iter().map(|name| hf_dir.join(name)).find(|path| path.is_file());
    let tokenizer = tokenizer_path.map(|path| fs::read(&path).at(&path)).transpose()?;
    let meta = Meta {
        step: 0,
        consumed_samples: 0,
        model: model.clone(),
        layout: ParallelLayout::SINGLE,
        recipe: json!({ HF_CONFIG: hf_config, CHAT_TEMPLATE: read_template(hf_dir)? }),
        data_fingerprint: String::new(),
        tokenizer,
        trainer: serde_json::Value::Null,
    };
    let dtypes: Vec<DType> = planned.iter().map(|planned| planned.dtype).collect();
    match Streamed::begin(out, meta, inputs, planned)? {
        Err(finished) => Ok(finished),
        Ok(streamed) => streamed.write(|name, sink| {
            let idx = table.iter().position(|mapped| weights_name(&mapped.name) == name).expect("planned from the table");
            stream_in(&table[idx], &model, &weights, (dtypes[idx], sink))
        }),
    }
}

/// The template as a file of its own, as transformers 5 writes it, or in tokenizer_config.json as earlier ones did.
fn read_template(hf_dir: &Path) -> Result<Option<String>> {
    let (own, older) = (hf_dir.join(chat::TEMPLATE_FILE), hf_dir.join(TOKENIZER_CONFIG));
    if own.is_file() {
        return fs::read_to_string(&own).at(&own).map(Some);
    }
    if !older.is_file() {
        return Ok(None);
    }
    let config: Value = serde_json::from_slice(&fs::read(&older).at(&older)?)
        .map_err(|error| Error::file(&older, format!("not JSON: {error}")).remedy("download it again"))?;
    Ok(config[CHAT_TEMPLATE].as_str().map(String::from))
}

/// The tokens that end what the model says, by the config it came with, else by its tokenizer; none when nobody knows.
pub fn eos_ids(stored: &Stored) -> Result<Vec<u32>> {
    let eos = token_ids(stored)?.eos;
    let ids = eos.as_array().cloned().unwrap_or_else(|| vec![eos]);
    Ok(ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect())
}

/// How conversations become text: the template that came with the model, or Nemotron's where the tokenizer has its pieces; else
/// none. Err: a template that cannot be read.
pub fn chat_template(stored: &Stored, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let Some(text) = stored.meta().recipe[CHAT_TEMPLATE].as_str() else {
        return Ok(tokenizer.id_of(chat::NEMOTRON_TURN).map(|_| ChatTemplate::nemotron()));
    };
    let ids = token_ids(stored)?;
    let token = |id: &Value| id.as_u64().and_then(|id| tokenizer.piece_text(id as u32)).unwrap_or_default();
    let special = SpecialTokens { bos: token(&ids.bos), eos: token(&ids.eos) };
    ChatTemplate::new(text, special, stored.dir()).map(Some)
}

fn weights_name(name: &str) -> String {
    format!("weights/{name}")
}

/// bf16 when all its sources are, else f32.
fn plan(mapped: &Mapped, weights: &Weights) -> Result<Planned> {
    let mut dtype = DType::BF16;
    for (name, shape) in &mapped.sources {
        if weights.expect(name, shape)? != Element::Bf16 {
            dtype = DType::F32;
        }
    }
    Ok(Planned { name: weights_name(&mapped.name), shape: mapped.shape.clone(), dtype })
}

/// A tensor that would be dropped might belong to the function (a bias, an adapter).
fn refuse_unknown_tensors(hf_dir: &Path, table: &[Mapped], weights: &Weights) -> Result<()> {
    let known: std::collections::BTreeSet<&str> = table.iter().flat_map(|mapped| &mapped.sources).map(|(name, _)| name.as_str()).collect();
    let ignored = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
    match weights.entries().keys().find(|name| !known.contains(name.as_str()) && !ignored(name)) {
        Some(name) => {
            let wrong = format!("has a tensor {name}, which the model of its config.json has no place for");
            Err(Error::file(hf_dir, wrong).remedy("use the config.json that belongs to these weights, or merge adapters first"))
        }
        None => Ok(()),
    }
}

type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

fn stream_in(mapped: &Mapped, model: &ModelConfig, weights: &Weights, (dtype, sink): (DType, Sink)) -> Result<()> {
    let row_bytes = mapped.shape[1..].iter().product::<usize>() * dtype.bytes();
    for rows in mapped.rows(model) {
        match rows {
            Rows::Zero(n) => {
                let row = vec![0; row_bytes];
                (0..n).try_for_each(|_| sink(&row))?;
            }
            Rows::Of(source, rows) => {
                let (name, shape) = &mapped.sources[source];
                let element = weights.expect(name, shape)?;
                weights.read_rows(name, rows, &mut |bytes| match (element, dtype) {
                    (Element::F16, _) => sink(&widen(bytes, |bits| half::f16::from_bits(bits).to_f32())),
                    (Element::Bf16, DType::F32) => sink(&widen(bytes, |bits| half::bf16::from_bits(bits).to_f32())),
                    _ => sink(bytes),
                })?;
            }
        }
    }
    Ok(())
}

fn widen(bytes: &[u8], value: impl Fn(u16) -> f32) -> Vec<u8> {
    bytes.chunks_exact(2).flat_map(|b| value(u16::from_le_bytes([b[0], b[1]])).to_le_bytes()).collect()
}

/// Writes a checkpoint's weights as a directory that `transformers` loads: config.json, generation_config.json,
/// safetensors (several files past 5 GB), the tokenizer. `checkpoint` may be a run.
pub fn export(checkpoint: &Path, out: &Path, dtype: ExportType) -> Result<Manifest> {
    let stored = stored::open(checkpoint)?;
    export_weights(&stored, out, dtype).doing(|| format!("exporting {}", stored.dir().display()))
}

fn export_weights(stored: &Stored, out: &Path, dtype: ExportType) -> Result<Manifest> {
    let model = &stored.meta().model;
    let ids = token_ids(stored)?;
    let main_type = element_of(stored, "embedding.weight", dtype)?;
    let torch_name = if main_type == Element::Bf16 { "bfloat16" } else { "float32" };
    let config = config::write(stored.dir(), model, &ids, torch_name)?;
    let files = plan_files(stored, dtype)?;
    let recipe = json!({"config": config, "dtype": format!("{dtype:?}")});
    let mut writer = match ArtifactWriter::begin(out, EXPORT_KIND, recipe, vec![artifact::input(KIND, stored.dir())?])? {
        Begin::Finished(manifest) => return Ok(manifest),
        Begin::Write(writer) => writer,
    };
    let dir = writer.dir().to_path_buf();
    for (name, tensors) in &files {
        let mut file = safetensors::Writer::create(&dir, name, &tensors.iter().map(|t| t.planned.clone()).collect::<Vec<_>>())?;
        let mut whole = None;
        for tensor in tensors {
            stream_out(stored, tensor, &mut whole, &mut file)?;
        }
        writer.add(file.close()?);
    }
    let mut texts = vec![(config::FILE, config), ("generation_config.json", generation_config(&ids))];
    if files.len() > 1 {
        texts.push((safetensors::TABLE, weight_map(&files)));
    }
    for (name, value) in texts {
        writer.add(write_bytes(&dir, name, &serde_json::to_vec_pretty(&value).expect("plain data"))?);
    }
    if let Some(template) = stored.meta().recipe[CHAT_TEMPLATE].as_str() {
        writer.add(write_bytes(&dir, chat::TEMPLATE_FILE, template.as_bytes())?);
    }
    if let Some(tokenizer) = &stored.meta().tokenizer {
        writer.add(write_bytes(&dir, text::file_name(tokenizer), tokenizer)?);
    }
    writer.count("tensors", files.iter().map(|(_, tensors)| tensors.len()).sum::<usize>());
    writer.count("step", stored.meta().step);
    writer.commit()
}

fn write_bytes(dir: &Path, name: &str, bytes: &[u8]) -> Result<artifact::FileEntry> {
    let mut file = HashingFile::create(dir, name)?;
    file.append(bytes)?;
    file.close()
}

/// The ids that the model came with; else those of its tokenizer; else none.
fn token_ids(stored: &Stored) -> Result<TokenIds> {
    let came_with = &stored.meta().recipe[HF_CONFIG];
    if came_with.is_object() {
        let id = |key: &str| came_with[key].clone();
        return Ok(TokenIds { bos: id("bos_token_id"), eos: id("eos_token_id"), pad: id("pad_token_id") });
    }
    let Some(tokenizer) = stored.tokenizer()? else { return Ok(TokenIds::default()) };
    Ok(TokenIds { bos: json!(tokenizer.bos_id()), eos: json!(tokenizer.eos_id()), pad: json!(tokenizer.pad_id()) })
}

fn generation_config(ids: &TokenIds) -> Value {
    json!({"_from_model_config": true, "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad})
}

/// One Hugging Face tensor and where it comes from.
struct Exported {
    planned: safetensors::Planned,
    mapped: Mapped,
    source: usize,
}

fn element_of(stored: &Stored, name: &str, dtype: ExportType) -> Result<Element> {
    let missing = || Error::file(stored.dir(), format!("has no {}", weights_name(name))).remedy("use a checkpoint that holds weights");
    let tensor = stored.tensors().get(&weights_name(name)).ok_or_else(missing)?;
    match (dtype, tensor.dtype) {
        (ExportType::F32, _) | (ExportType::AsStored, StoredType::F32) => Ok(Element::F32),
        (ExportType::Bf16, _) | (ExportType::AsStored, StoredType::Bf16) => Ok(Element::Bf16),
        (ExportType::AsStored, StoredType::U32) => {
            Err(Error::file(stored.dir(), format!("{name} is u32, expected f32 or bf16")).remedy("use a checkpoint of this program"))
        }
    }
}

fn plan_files(stored: &Stored, dtype: ExportType) -> Result<Vec<(String, Vec<Exported>)>> {
    let (mut files, mut bytes): (Vec<Vec<Exported>>, u64) = (vec![Vec::new()], 0);
    for mapped in mapping(&stored.meta().model) {
        if mapped.sources[0].0 == SCORE_BIAS {
            refuse_a_bias(stored, &mapped)?;
            continue;
        }
        let element = element_of(stored, &mapped.name, dtype)?;
        for (source, (name, shape)) in mapped.sources.iter().enumerate() {
            let planned = safetensors::Planned { name: name.clone(), shape: shape.clone(), element };
            if bytes > 0 && bytes + planned.n_bytes() > EXPORT_FILE_BYTES {
                files.push(Vec::new());
                bytes = 0;
            }
            bytes += planned.n_bytes();
            files.last_mut().expect("never empty").push(Exported { planned, mapped: mapped.clone(), source });
        }
    }
    let n = files.len();
    let name = |i: usize| if n == 1 { safetensors::SINGLE.into() } else { format!("model-{:05}-of-{n:05}.safetensors", i + 1) };
    Ok(files.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect())
}

/// transformers would drop it and compute something else.
fn refuse_a_bias(stored: &Stored, mapped: &Mapped) -> Result<()> {
    let mut bias = Tensor::host(&mapped.shape, DType::F32, None).expect("memory for a few numbers");
    stored.read(&mut [Wanted { name: weights_name(&mapped.name), slice: Slice::whole(&mapped.shape), tensor: &mut bias }])?;
    match bias.f32().iter().find(|value| **value != 0.0) {
        None => Ok(()),
        Some(value) => {
            let wrong = format!("{} is not zero ({value}), and transformers' score layer has no bias", mapped.name);
            Err(Error::file(stored.dir(), wrong).remedy("keep it as it is; trireme-score rewards reads it"))
        }
    }
}

fn weight_map(files: &[(String, Vec<Exported>)]) -> Value {
    let all = || files.iter().flat_map(|(file, tensors)| tensors.iter().map(move |tensor| (file, &tensor.planned)));
    let map: serde_json::Map<String, Value> = all().map(|(file, planned)| (planned.name.clone(), json!(file))).collect();
    json!({"metadata": {"total_size": all().map(|(_, planned)| planned.n_bytes()).sum::<u64>()}, "weight_map": map})
}

/// `whole` keeps the last parameter, since q, k and v come from the same one.
fn stream_out(stored: &Stored, tensor: &Exported, whole: &mut Option<(String, Tensor)>, file: &mut safetensors::Writer) -> Result<()> {
    let mapped = &tensor.mapped;
    if whole.as_ref().is_none_or(|(name, _)| *name != mapped.name) {
        *whole = None; // the old one goes before the new one comes
        let dtype = if tensor.planned.element == Element::Bf16 { DType::BF16 } else { DType::F32 };
        let memory = Tensor::host(&mapped.shape, dtype, None);
        let mut value = memory.ok_or_else(|| {
            let wrong = format!("no memory for {} {:?}", mapped.name, mapped.shape);
            Error::new(crate::error::Kind::Other, wrong).remedy("use a machine with more memory")
        })?;
        let slice = Slice::whole(&mapped.shape);
        stored.read(&mut [Wanted { name: weights_name(&mapped.name), slice, tensor: &mut value }])?;
        *whole = Some((mapped.name.clone(), value));
    }
    let (_, value) = whole.as_ref().expect("read above");
    for rows in mapped.rows_of_source(&stored.meta().model, tensor.source) {
        file.append(value.rows(rows).bytes())?;
    }
    Ok(())
}
