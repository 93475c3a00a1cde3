//! safetensors files, read and written front to back without holding a tensor: one file, or several under
//! `model.safetensors.index.json`. Headers are checked before anything is believed (size, offsets, extents, the end of the
//! file). It knows nothing of what the names mean. Format: huggingface/safetensors README.

use crate::artifact::{FileEntry, HashingFile};
use crate::error::{Error, IoContext, Result};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Name of the file when there is one.
pub const SINGLE: &str = "model.safetensors";
/// Name of the table when there are several.
pub const TABLE: &str = "model.safetensors.index.json";
/// A larger header is refused: 50 000 tensors, fifty times what the largest model here has, need no more. (The reference implementation
/// allows 100 MB, which can be made to take twenty times that in memory.)
const MOST_HEADER_BYTES: u64 = 8_000_000;
/// Bytes handed on at a time.
const PORTION_BYTES: usize = 1 << 20;
const AGAIN: &str = "download or convert it again";
/// How a file begins that stands for one that git has not fetched.
const GIT_LFS: &[u8; 8] = b"version ";

/// Element types that are understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Element {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// As headers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "F32",
            Element::Bf16 => "BF16",
            Element::F16 => "F16",
        }
    }
}

/// A tensor of a set of files.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its shape.
    pub shape: Vec<usize>,
    /// As the header spells it.
    dtype: Dtype,
    file: usize,
    at: u64,
}

/// All tensors of a directory.
pub struct Weights {
    files: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, Entry>,
}

impl Weights {
    /// Opens `model.safetensors`, or every file that `model.safetensors.index.json` names, and checks their headers.
    pub fn open(dir: &Path) -> Result<Weights> {
        if dir.join(SINGLE).is_file() {
            return Weights::open_file(&dir.join(SINGLE));
        }
        let mut weights = Weights { files: Vec::new(), entries: BTreeMap::new() };
        let table = dir.join(TABLE);
        if !table.is_file() {
            let wrong = format!("has neither {SINGLE} nor {TABLE}");
            return Err(Error::file(dir, wrong).remedy("give a directory with safetensors weights (not pytorch_model.bin)"));
        }
        let map = read_table(&table)?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort();
        names.dedup();
        for name in names {
            weights.add_file(&dir.join(name))?;
        }
        for (tensor, file) in &map {
            let found = weights.entries.get(tensor).map(|entry| &weights.files[entry.file].0);
            if found != Some(&dir.join(file)) {
                return Err(Error::file(&table, format!("{tensor} is not in {file}")).remedy(AGAIN));
            }
        }
        Ok(weights)
    }

    /// Opens one file and checks its header.
    pub fn open_file(path: &Path) -> Result<Weights> {
        let mut weights = Weights { files: Vec::new(), entries: BTreeMap::new() };
        weights.add_file(path)?;
        Ok(weights)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        // Anything else may wait for ever when it is opened (a pipe), or has no size. Links to files are followed, as the caches of
        // Hugging Face need it.
        if !fs::metadata(path).at(path)?.is_file() {
            return Err(Error::file(path, "is no regular file").remedy(AGAIN));
        }
        let file = File::open(path).at(path)?;
        let (metadata, data_at) = read_header(path, &file)?;
        for (name, info) in metadata.tensors() {
            let at = data_at + info.data_offsets.0 as u64;
            let entry = Entry { shape: info.shape.clone(), dtype: info.dtype, file: self.files.len(), at };
            if let Some(first) = self.entries.insert(name.clone(), entry) {
                let wrong = format!("holds {name}, which is also in {}", self.files[first.file].0.display());
                return Err(Error::file(path, wrong).remedy(AGAIN));
            }
        }
        self.files.push((path.into(), file));
        Ok(())
    }

    /// Every tensor by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// The tensor of this name and shape, and its element type; or why not.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<Element> {
        let Some(entry) = self.entries.get(name) else {
            let place = self.files[0].0.parent().unwrap_or(Path::new("."));
            let nearest = self.entries.keys().min_by_key(|known| strsim::damerau_levenshtein(known, name));
            let wrong = format!("no tensor {name} (nearest: {})", nearest.map_or("none", String::as_str));
            return Err(Error::file(place, wrong).remedy("see that all files are there and config.json belongs to them"));
        };
        let path = &self.files[entry.file].0;
        if entry.shape != shape {
            let wrong = format!("{name} is {:?}, config.json asks for {shape:?}", entry.shape);
            return Err(Error::file(path, wrong).remedy("use the config.json that belongs to these weights"));
        }
        match entry.dtype {
            Dtype::F32 => Ok(Element::F32),
            Dtype::BF16 => Ok(Element::Bf16),
            Dtype::F16 => Ok(Element::F16),
            other => Err(Error::file(path, format!("{name} is {other}, expected F32, BF16 or F16")).remedy("convert it to BF16 first")),
        }
    }

    /// Hands on rows of a tensor that [`Weights::expect`] has approved, in portions of whole elements. A single number of shape [] is
    /// one row.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let entry = &self.entries[name];
        let (path, file) = &self.files[entry.file];
        let row_bytes = entry.shape.iter().skip(1).product::<usize>() * entry.dtype.bitsize() / 8;
        let (mut at, end) = (entry.at + (rows.start * row_bytes) as u64, entry.at + (rows.end * row_bytes) as u64);
        let mut portion = Vec::new();
        while at < end {
            portion.resize((end - at).min(PORTION_BYTES as u64) as usize, 0);
            file.read_exact_at(&mut portion, at).at(path)?;
            take(&portion)?;
            at += portion.len() as u64;
        }
        Ok(())
    }
}

fn read_table(table: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Table {
        weight_map: UniqueKeys<String>,
    }
    let text = fs::read(table).at(table)?;
    let parsed: Table = serde_json::from_slice(&text)
        .map_err(|error| Error::file(table, format!("not a table of safetensors files: {error}")).remedy(AGAIN))?;
    for file in parsed.weight_map.0.values() {
        if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
            return Err(Error::file(table, format!("names the file {file:?} outside of its directory")).remedy(AGAIN));
        }
    }
    Ok(parsed.weight_map.0)
}

/// An object of JSON in which no key stands twice: readers differ in which of two values they take.
struct UniqueKeys<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueKeys<V> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = BTreeMap<String, V>;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut all = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if all.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("{key} stands in it twice")));
                    }
                    all.insert(key, map.next_value()?);
                }
                Ok(all)
            }
        }
        from.deserialize_map(Collect(PhantomData)).map(UniqueKeys)
    }
}

/// The header, checked against the size of the file, and where the data starts.
fn read_header(path: &Path, file: &File) -> Result<(Metadata, u64)> {
    let size = file.metadata().at(path)?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(Error::file(path, format!("{size} bytes are no safetensors file")).remedy(AGAIN));
    }
    file.read_exact_at(&mut length, 0).at(path)?;
    if &length == GIT_LFS {
        return Err(Error::file(path, format!("{size} bytes of text that stand for the weights (git-lfs)")).remedy("run git lfs pull"));
    }
    let length = u64::from_le_bytes(length);
    if length > MOST_HEADER_BYTES || length > size - 8 {
        let wrong = format!("says that its header has {length} bytes, in a file of {size} (at most {MOST_HEADER_BYTES})");
        return Err(Error::file(path, wrong).remedy(AGAIN));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8).at(path)?;
    let bad = |error: serde_json::Error| Error::file(path, format!("bad header: {error}")).remedy(AGAIN);
    serde_json::from_slice::<UniqueKeys<IgnoredAny>>(&header).map_err(bad)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(bad)?;
    let expected = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
    if 8 + length + expected != size {
        let wrong = format!("{size} bytes, its header describes {}", 8 + length + expected);
        return Err(Error::file(path, wrong).remedy(AGAIN));
    }
    Ok((metadata, 8 + length))
}

/// A tensor to be written.
#[derive(Clone, PartialEq, Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type.
    pub element: Element,
}

impl Planned {
    /// Bytes of its values.
    pub fn n_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.element.bytes()) as u64
    }
}

/// Writes one file: the header first, then whatever bytes come.
pub struct Writer {
    file: HashingFile,
    left: u64,
}

impl Writer {
    /// Starts `dir/name` with these tensors, whose bytes must follow in this order.
    pub fn create(dir: &Path, name: &str, tensors: &[Planned]) -> Result<Writer> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        let mut at = 0;
        for tensor in tensors {
            let end = at + tensor.n_bytes();
            let entry = serde_json::json!({"dtype": tensor.element.name(), "shape": tensor.shape, "data_offsets": [at, end]});
            header.insert(tensor.name.clone(), entry);
            at = end;
        }
        let mut text = serde_json::to_vec(&header).expect("plain data");
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = HashingFile::create(dir, name)?;
        file.append(&(text.len() as u64).to_le_bytes())?;
        file.append(&text)?;
        Ok(Writer { file, left: at })
    }

    /// Appends values.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).expect("no more bytes than the header says");
        self.file.append(bytes)
    }

    /// Flushes to the disk.
    pub fn close(self) -> Result<FileEntry> {
        assert_eq!(self.left, 0, "fewer bytes than the header says");
        self.file.close()
    }
}
