//! Checkpoint to Hugging Face: a directory that transformers loads, with our manifest in it. What each type of an export means stands
//! at [`ExportType`].

use super::companions;
use super::names::{Mapped, SCORE_BIAS, mapping};
use super::{config, f16, weights_name};
use crate::artifact::{self, ArtifactWriter, Begin, HashingFile, Manifest};
use crate::checkpoint::KIND;
use crate::checkpoint::safetensors::{self, Element};
use crate::checkpoint::shard::StoredType;
use crate::checkpoint::stored::{self, Stored, StoredTensor, Wanted};
use crate::error::{Context, Error, Kind, Result};
use crate::parallel::slice::Slice;
use crate::tensor::{DType, Tensor};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;

/// Kind of the artifact that [`export`] writes.
pub const EXPORT_KIND: &str = "hf-model";
/// Most bytes of an exported file, unless one tensor alone is larger (Hugging Face's own default).
pub const EXPORT_FILE_BYTES: u64 = 5_000_000_000;

/// Element type of an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExportType {
    /// The weights that the model computes with, each tensor as it is stored.
    AsStored,
    /// f32: the master weights where training in bf16 kept them, which have more digits than what it computed with; else the weights,
    /// widened exactly.
    F32,
    /// bf16: the weights, those stored as f32 rounded to nearest even.
    Bf16,
    /// f16: the weights, rounded to nearest even; one that would become infinite is an error. What was imported from F16 comes out as it
    /// was, bit by bit.
    F16,
}

/// The values that an export of a checkpoint has, by the names of our parameters.
pub struct Exported<'a> {
    stored: &'a Stored,
    dtype: ExportType,
}

impl<'a> Exported<'a> {
    /// Of this checkpoint, in this type.
    pub fn new(stored: &'a Stored, dtype: ExportType) -> Exported<'a> {
        Exported { stored, dtype }
    }

    /// Where they come from: the tensor's full name, and the tensor.
    fn source(&self, name: &str) -> Result<(String, &'a StoredTensor)> {
        let weights = weights_name(name);
        let missing = || Error::file(self.stored.dir(), format!("has no {weights}")).remedy("use a checkpoint that holds weights");
        let tensor = self.stored.tensors().get(&weights).ok_or_else(missing)?;
        let master = format!("master/{name}");
        match self.stored.tensors().get(&master) {
            Some(kept) if self.dtype == ExportType::F32 => Ok((master, kept)),
            _ => Ok((weights, tensor)),
        }
    }

    fn element(&self, name: &str) -> Result<Element> {
        let (full_name, tensor) = self.source(name)?;
        match (self.dtype, tensor.dtype) {
            (ExportType::F32, _) | (ExportType::AsStored, StoredType::F32) => Ok(Element::F32),
            (ExportType::Bf16, _) | (ExportType::AsStored, StoredType::Bf16) => Ok(Element::Bf16),
            (ExportType::F16, _) => Ok(Element::F16),
            (ExportType::AsStored, StoredType::U32) => {
                let wrong = format!("{full_name} is u32, expected f32 or bf16");
                Err(Error::file(self.stored.dir(), wrong).remedy("use a checkpoint of this program"))
            }
        }
    }

    /// A whole parameter, in the type of the export; values of f16 stand in f32.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let n_rows = self.source(name)?.1.shape[0];
        self.read_rows(name, 0..n_rows)
    }

    /// These rows of it.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let dtype = if self.element(name)? == Element::Bf16 { DType::BF16 } else { DType::F32 };
        let (full_name, tensor) = self.source(name)?;
        let (first_row, slice) = (rows.start, Slice::whole(&tensor.shape).rows(rows));
        let mut value = Tensor::host(&slice.shape, dtype, None).ok_or_else(|| {
            let wrong = format!("no memory for {name} {:?}", slice.shape);
            Error::new(Kind::Other, wrong).remedy("use a machine with more memory")
        })?;
        self.stored.read(&mut [Wanted { name: full_name, slice, tensor: &mut value }])?;
        if self.dtype == ExportType::F16 {
            self.round_to_f16((name, first_row), &mut value)?;
        }
        Ok(value)
    }

    fn round_to_f16(&self, (name, first_row): (&str, usize), values: &mut Tensor) -> Result<()> {
        let n_columns = values.row_len();
        for (i, value) in values.f32_mut().iter_mut().enumerate() {
            *value = f16::widen(f16::narrow(*value).ok_or_else(|| {
                let wrong = format!("{name}[{}, {}] is {value}, and f16 ends at 65504", first_row + i / n_columns, i % n_columns);
                Error::file(self.stored.dir(), wrong).remedy("export it as bf16 or f32")
            })?);
        }
        Ok(())
    }
}

/// Writes a checkpoint's weights as a directory that `transformers` loads: config.json, safetensors (several files past
/// [`EXPORT_FILE_BYTES`]), the tokenizer and what came with it, generation_config.json. `checkpoint` may be a run.
pub fn export(checkpoint: &Path, out: &Path, dtype: ExportType) -> Result<Manifest> {
    export_in_files(checkpoint, out, dtype, EXPORT_FILE_BYTES)
}

/// The same in files of at most so many bytes of tensors, unless one alone is larger.
pub fn export_in_files(checkpoint: &Path, out: &Path, dtype: ExportType, most_file_bytes: u64) -> Result<Manifest> {
    let stored = stored::open(checkpoint)?;
    export_weights(&stored, out, dtype, most_file_bytes).doing(|| format!("exporting {}", stored.dir().display()))
}

fn export_weights(stored: &Stored, out: &Path, dtype: ExportType, most_file_bytes: u64) -> Result<Manifest> {
    let exported = Exported::new(stored, dtype);
    let ids = companions::token_ids(stored)?;
    let torch_name = match exported.element("embedding.weight")? {
        Element::F32 => "float32",
        Element::Bf16 => "bfloat16",
        Element::F16 => "float16",
    };
    let config = config::write(stored.dir(), &stored.meta().model, &ids, torch_name)?;
    let files = plan_files(stored, &exported, most_file_bytes)?;
    let recipe = json!({"config": config, "dtype": format!("{dtype:?}"), "file_bytes": most_file_bytes});
    let mut writer = match ArtifactWriter::begin(out, EXPORT_KIND, recipe, vec![artifact::input(KIND, stored.dir())?])? {
        Begin::Finished(manifest) => return Ok(manifest),
        Begin::Write(writer) => writer,
    };
    let dir = writer.dir().to_path_buf();
    for (name, tensors) in &files {
        let mut file = safetensors::Writer::create(&dir, name, &tensors.iter().map(|t| t.planned.clone()).collect::<Vec<_>>())?;
        let mut whole = None;
        for tensor in tensors {
            stream_out(&exported, tensor, &mut whole, &mut file)?;
        }
        writer.add(file.close()?);
    }
    let text = |value: &Value| serde_json::to_vec_pretty(value).expect("plain data");
    let mut texts = companions::of_export(stored, &ids);
    texts.insert(config::FILE.into(), text(&config));
    if files.len() > 1 {
        texts.insert(safetensors::TABLE.into(), text(&weight_map(&files)));
    }
    for (name, bytes) in &texts {
        let mut file = HashingFile::create(&dir, name)?;
        file.append(bytes)?;
        writer.add(file.close()?);
    }
    writer.count("tensors", files.iter().map(|(_, tensors)| tensors.len()).sum::<usize>());
    writer.count("step", stored.meta().step);
    writer.commit()
}

/// One Hugging Face tensor and where it comes from.
struct Part {
    planned: safetensors::Planned,
    mapped: Mapped,
    source: usize,
}

fn plan_files(stored: &Stored, exported: &Exported, most_file_bytes: u64) -> Result<Vec<(String, Vec<Part>)>> {
    let (mut files, mut bytes): (Vec<Vec<Part>>, u64) = (vec![Vec::new()], 0);
    for mapped in mapping(&stored.meta().model) {
        if mapped.sources[0].0 == SCORE_BIAS {
            refuse_a_bias(stored, &mapped)?;
            continue;
        }
        let element = exported.element(&mapped.name)?;
        for (source, (name, shape)) in mapped.sources.iter().enumerate() {
            let planned = safetensors::Planned { name: name.clone(), shape: shape.clone(), element };
            if bytes > 0 && bytes + planned.n_bytes() > most_file_bytes {
                files.push(Vec::new());
                bytes = 0;
            }
            bytes += planned.n_bytes();
            files.last_mut().expect("never empty").push(Part { planned, mapped: mapped.clone(), source });
        }
    }
    let n = files.len();
    let name = |i: usize| if n == 1 { safetensors::SINGLE.into() } else { format!("model-{:05}-of-{n:05}.safetensors", i + 1) };
    Ok(files.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect())
}

/// transformers would drop it and compute something else.
fn refuse_a_bias(stored: &Stored, mapped: &Mapped) -> Result<()> {
    let bias = Exported::new(stored, ExportType::F32).read(&mapped.name)?;
    match bias.f32().iter().find(|value| **value != 0.0) {
        None => Ok(()),
        Some(value) => {
            let wrong = format!("{} is not zero ({value}), and transformers' score layer has no bias", mapped.name);
            Err(Error::file(stored.dir(), wrong).remedy("keep it as it is; trireme-score rewards reads it"))
        }
    }
}

fn weight_map(files: &[(String, Vec<Part>)]) -> Value {
    let all = || files.iter().flat_map(|(file, tensors)| tensors.iter().map(move |tensor| (file, &tensor.planned)));
    let map: serde_json::Map<String, Value> = all().map(|(file, planned)| (planned.name.clone(), json!(file))).collect();
    json!({"metadata": {"total_size": all().map(|(_, planned)| planned.n_bytes()).sum::<u64>()}, "weight_map": map})
}

/// `whole` keeps the last parameter, since q, k and v come from the same one.
fn stream_out(exported: &Exported, part: &Part, whole: &mut Option<(String, Tensor)>, file: &mut safetensors::Writer) -> Result<()> {
    let name = &part.mapped.name;
    if whole.as_ref().is_none_or(|(last, _)| last != name) {
        *whole = None; // the old one goes before the new one comes
        *whole = Some((name.clone(), exported.read(name)?));
    }
    let (_, value) = whole.as_ref().expect("read above");
    for rows in part.mapped.rows_of_source(&exported.stored.meta().model, part.source) {
        let rows = value.rows(rows);
        match part.planned.element {
            Element::F16 => file.append(&halves(rows.f32()))?,
            Element::F32 | Element::Bf16 => file.append(rows.bytes())?,
        }
    }
    Ok(())
}

/// Of values that f16 holds.
fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| f16::narrow(*value).expect("rounded when it was read").to_le_bytes()).collect()
}
