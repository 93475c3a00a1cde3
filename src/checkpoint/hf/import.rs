//! Hugging Face to checkpoint: a directory opened and checked, and its tensors streamed into ours.

use super::companions::Found;
use super::names::{Mapped, Rows, SCORE_BIAS, mapping};
use super::{config, f16, weights_name};
use crate::artifact::{self, Manifest};
use crate::checkpoint::safetensors::{Element, Weights};
use crate::checkpoint::save::{Meta, Planned, Streamed};
use crate::error::{Context, Error, Result};
use crate::model::config::{HeadKind, ModelConfig};
use crate::parallel::layout::ParallelLayout;
use crate::tensor::{DType, Tensor};
use serde_json::json;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";
/// Where the cache of Hugging Face has the revisions of a model.
const SNAPSHOTS: &str = "snapshots";

/// A Hugging Face directory, opened: what its config.json describes is there, with the right shapes, and nothing else.
pub struct Source {
    dir: PathBuf,
    model: ModelConfig,
    weights: Weights,
    table: Vec<Mapped>,
}

type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

impl Source {
    /// Opens a directory; headers are read, values are not (but those of a second copy of a tied embedding).
    pub fn open(dir: &Path) -> Result<Source> {
        if !dir.is_dir() {
            return Err(Error::file(dir, "no such directory").remedy("check the path; a model of a hub is downloaded first"));
        }
        if !dir.join(config::FILE).exists() && dir.join(SNAPSHOTS).is_dir() {
            let wrong = format!("has no {} but a folder {SNAPSHOTS}, as a model in the cache of Hugging Face", config::FILE);
            return Err(Error::file(dir, wrong).remedy(format!("give a folder inside {SNAPSHOTS}")));
        }
        let model = config::read(dir)?;
        let weights = Weights::open(dir)?;
        let is_here = |mapped: &Mapped| mapped.sources[0].0 != SCORE_BIAS || weights.entries().contains_key(SCORE_BIAS);
        let table = mapping(&model).into_iter().map(|mapped| if is_here(&mapped) { mapped } else { mapped.absent() }).collect();
        let source = Source { dir: dir.into(), model, weights, table };
        source.table.iter().try_for_each(|mapped| source.dtype_of(mapped).map(drop))?;
        source.refuse_unknown_tensors()?;
        Ok(source)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The function.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// Fills `into` [n, row], f32 host memory, with the rows of the parameter of this name from `first_row` on.
    pub fn read_rows(&self, name: &str, first_row: usize, into: &mut Tensor) -> Result<()> {
        let mapped = self.table.iter().find(|mapped| mapped.name == name).expect("a parameter of the model");
        let rows = first_row..first_row + into.n_rows();
        assert!(into.dims()[1..] == mapped.shape[1..] && rows.end <= mapped.shape[0], "room for rows {rows:?} of {name}: {into:?}");
        let (bytes, mut at) = (into.bytes_mut(), 0);
        self.stream((mapped, rows), DType::F32, &mut |_, _| {}, &mut |portion| {
            bytes[at..at + portion.len()].copy_from_slice(portion);
            at += portion.len();
            Ok(())
        })
    }

    /// bf16 when all its sources are, else f32.
    fn dtype_of(&self, mapped: &Mapped) -> Result<DType> {
        let mut dtype = DType::BF16;
        for (name, shape) in &mapped.sources {
            if self.weights.expect(name, shape)? != Element::Bf16 {
                dtype = DType::F32;
            }
        }
        Ok(dtype)
    }

    /// A tensor that would be dropped might belong to the function (a bias, an adapter).
    fn refuse_unknown_tensors(&self) -> Result<()> {
        let known: BTreeSet<&str> = self.table.iter().flat_map(|mapped| &mapped.sources).map(|(name, _)| name.as_str()).collect();
        for name in self.weights.entries().keys().filter(|name| !known.contains(name.as_str())) {
            match name.as_str() {
                LM_HEAD if self.model.head == HeadKind::Vocabulary => self.refuse_an_untied_head()?,
                LM_HEAD => {} // of the language model that a reward model was made from
                name if name.ends_with("rotary_emb.inv_freq") => {}
                name => {
                    let wrong = format!("has a tensor {name}, which the model of its config.json has no place for");
                    return Err(
                        Error::file(&self.dir, wrong).remedy("use the config.json that belongs to these weights, or merge adapters first")
                    );
                }
            }
        }
        Ok(())
    }

    /// The output layer of a model with tied embeddings, written twice: the copies must be one.
    fn refuse_an_untied_head(&self) -> Result<()> {
        let shape = [self.model.vocab_size, self.model.hidden];
        let same_type = self.weights.expect(LM_HEAD, &shape)? == self.weights.expect(EMBEDDING, &shape)?;
        let row_of = |name: &str, row: usize| -> Result<Vec<u8>> {
            let mut values = Vec::new();
            self.weights.read_rows(name, row..row + 1, &mut |bytes| {
                values.extend_from_slice(bytes);
                Ok(())
            })?;
            Ok(values)
        };
        for row in 0..shape[0] {
            if !same_type || row_of(LM_HEAD, row)? != row_of(EMBEDDING, row)? {
                let wrong = format!("{LM_HEAD} is not {EMBEDDING} (row {row}), but its config.json says tie_word_embeddings = true");
                let error = Error::file(&self.dir, wrong);
                return Err(error.remedy("set tie_word_embeddings = false, or use the config.json that belongs to these weights"));
            }
        }
        Ok(())
    }

    /// Hands on rows of a parameter, first to last, as `dtype`; `seen` gets their values as they are stored.
    fn stream(
        &self,
        (mapped, wanted): (&Mapped, Range<usize>),
        dtype: DType,
        seen: &mut dyn FnMut(Element, &[u8]),
        sink: Sink,
    ) -> Result<()> {
        let row_bytes = mapped.shape[1..].iter().product::<usize>() * dtype.bytes();
        let mut at = 0;
        for rows in mapped.rows(&self.model) {
            // Which of these are wanted.
            let [from, to] = [wanted.start, wanted.end].map(|end| end.clamp(at, at + rows.n_rows()) - at);
            at += rows.n_rows();
            match rows {
                Rows::Zero(_) => {
                    let row = vec![0; row_bytes];
                    (from..to).try_for_each(|_| sink(&row))?;
                }
                Rows::Of(source, rows) => {
                    let (name, shape) = &mapped.sources[source];
                    let element = self.weights.expect(name, shape)?;
                    self.weights.read_rows(name, rows.start + from..rows.start + to, &mut |bytes| {
                        seen(element, bytes);
                        match (element, dtype) {
                            (Element::F16, _) => sink(&widen(bytes, f16::widen)),
                            (Element::Bf16, DType::F32) => sink(&widen(bytes, |bits| half::bf16::from_bits(bits).to_f32())),
                            _ => sink(bytes),
                        }
                    })?;
                }
            }
        }
        Ok(())
    }
}

fn widen(bytes: &[u8], value: impl Fn(u16) -> f32) -> Vec<u8> {
    bytes.chunks_exact(2).flat_map(|b| value(u16::from_le_bytes([b[0], b[1]])).to_le_bytes()).collect()
}

/// Turns a Hugging Face directory into a checkpoint of weights at step 0. f16 is widened to f32, f32 and bf16 stay what
/// they are. The tokenizer and its companions come along. Values that are NaN or infinite are taken as they are, with a warning.
pub fn import(hf_dir: &Path, out: &Path) -> Result<Manifest> {
    import_weights(hf_dir, out).doing(|| format!("importing {}", hf_dir.display()))
}

fn import_weights(hf_dir: &Path, out: &Path) -> Result<Manifest> {
    let source = Source::open(hf_dir)?;
    let mut inputs = vec![artifact::input("hf-config", &hf_dir.join(config::FILE))?];
    for path in source.weights.paths() {
        inputs.push(artifact::input("hf-weights", path)?);
    }
    let found = Found::read(hf_dir)?;
    found.tell_unreadable(hf_dir);
    found.tell_ends_that_are_no_tokens(hf_dir, source.model.vocab_size);
    let Found { tokenizer, companions } = found;
    for name in companions.keys().filter(|name| *name != config::FILE) {
        inputs.push(artifact::input("hf-companion", &hf_dir.join(name))?);
    }
    let meta = Meta {
        step: 0,
        consumed_samples: 0,
        model: source.model.clone(),
        layout: ParallelLayout::SINGLE,
        recipe: json!({}),
        data_fingerprint: String::new(),
        tokenizer,
        companions,
        trainer: serde_json::Value::Null,
    };
    let plan =
        |mapped: &Mapped| Ok(Planned { name: weights_name(&mapped.name), shape: mapped.shape.clone(), dtype: source.dtype_of(mapped)? });
    let planned = source.table.iter().map(plan).collect::<Result<Vec<Planned>>>()?;
    let dtypes: Vec<DType> = planned.iter().map(|planned| planned.dtype).collect();
    let streamed = match Streamed::begin(out, meta, inputs, planned)? {
        Err(finished) => return Ok(finished),
        Ok(streamed) => streamed,
    };
    let mut wild = Wild::default();
    let manifest = streamed.write(|name, sink| {
        let idx = source.table.iter().position(|mapped| weights_name(&mapped.name) == name).expect("planned from the table");
        let mapped = &source.table[idx];
        wild.begin(&mapped.name);
        source.stream((mapped, 0..mapped.shape[0]), dtypes[idx], &mut |element, bytes| wild.look(element, bytes), sink)
    })?;
    wild.tell(hf_dir);
    Ok(manifest)
}

/// Values that no computation recovers from.
#[derive(Default)]
struct Wild {
    n_nan: u64,
    n_infinite: u64,
    /// Parameters that hold some, in the order of the files.
    names: Vec<String>,
    current: String,
}

impl Wild {
    /// From here on values of this parameter are looked at.
    fn begin(&mut self, name: &str) {
        self.current = name.into();
    }

    fn look(&mut self, element: Element, bytes: &[u8]) {
        let (nan, infinite) = match element {
            Element::Bf16 => count(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))), 0x7f80, 0x007f),
            Element::F16 => count(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))), 0x7c00, 0x03ff),
            Element::F32 => count(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])), 0x7f80_0000, 0x007f_ffff),
        };
        if nan + infinite > 0 && self.names.last() != Some(&self.current) {
            self.names.push(self.current.clone());
        }
        self.n_nan += nan;
        self.n_infinite += infinite;
    }

    fn tell(&self, hf_dir: &Path) {
        if let Some(first) = self.names.first() {
            let (nan, infinite, n) = (self.n_nan, self.n_infinite, self.names.len());
            log::warn!("{}: {nan} values are NaN and {infinite} infinite, in {n} tensors, the first {first}", hf_dir.display());
        }
    }
}

/// How many bit patterns are NaN and how many infinite, by the masks of exponent and fraction.
fn count(bits: impl Iterator<Item = u32>, exponent: u32, fraction: u32) -> (u64, u64) {
    bits.filter(|bits| bits & exponent == exponent).fold((0, 0), |(nan, infinite), bits| {
        let is_nan = bits & fraction != 0;
        (nan + u64::from(is_nan), infinite + u64::from(!is_nan))
    })
}
