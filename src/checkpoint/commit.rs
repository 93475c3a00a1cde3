//! The end of a save, by one process: the index of virtual datasets, the table of pieces, the tokenizer and its
//! companions, and the manifest, last.

use super::save::Meta;
use super::shard::StoredShard;
use super::{INDEX, PIECES, h5};
use crate::artifact::{ArtifactWriter, FileEntry, HashingFile, Manifest};
use crate::error::{IoContext, Result};
use crate::fault;
use crate::text;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A finished shard: as the manifest names it, and as the table of pieces describes it.
pub(super) type Written = (FileEntry, StoredShard);

/// Index, table, tokenizer and what else came with the weights, then the commit: after it the checkpoint exists.
pub(super) fn finish(mut writer: ArtifactWriter, meta: &Meta, written: Vec<Written>) -> Result<Manifest> {
    fault::at("save.commit");
    let (entries, shards): (Vec<FileEntry>, Vec<StoredShard>) = written.into_iter().unzip();
    entries.into_iter().for_each(|entry| writer.add(entry));
    let dir = writer.dir().to_path_buf();
    let index = write_index(&dir, meta, &shards)?;
    writer.add(index);
    writer.add(write_file(&dir, PIECES, &serde_json::to_vec(&shards).expect("plain data"))?);
    if let Some(tokenizer) = &meta.tokenizer {
        writer.add(write_file(&dir, text::file_name(tokenizer), tokenizer)?);
    }
    for (name, bytes) in &meta.companions {
        writer.add(write_file(&dir, name, bytes)?);
    }
    writer.count("step", meta.step);
    writer.count("consumed_samples", meta.consumed_samples);
    writer.count("tensor_bytes", shards.iter().flat_map(|shard| &shard.pieces).map(|piece| piece.spec.n_bytes()).sum::<u64>());
    writer.commit()
}

fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry> {
    let mut file = HashingFile::create(dir, name)?;
    file.append(bytes)?;
    file.close()
}

fn write_index(dir: &Path, meta: &Meta, shards: &[StoredShard]) -> Result<FileEntry> {
    let mut tensors: BTreeMap<&str, h5::Virtual> = BTreeMap::new();
    for shard in shards {
        for piece in &shard.pieces {
            let spec = &piece.spec;
            let tensor = tensors.entry(&spec.name).or_insert_with(|| h5::Virtual {
                path: spec.name.clone(),
                dtype: spec.dtype.dtype(),
                shape: spec.global_shape.clone(),
                sources: Vec::new(),
            });
            let (file, path) = (shard.file.clone(), piece.dataset.clone());
            tensor.sources.push(h5::Source { file, path, slice: spec.slice.clone() });
        }
    }
    let json = |value: serde_json::Result<String>| h5::Attribute::Text(value.expect("plain data"));
    let attributes = [
        ("step", h5::Attribute::Number(meta.step)),
        ("consumed_samples", h5::Attribute::Number(meta.consumed_samples)),
        ("model", json(serde_json::to_string(&meta.model))),
        ("layout", json(serde_json::to_string(&meta.layout))),
    ];
    let memory = h5::index(&tensors.into_values().collect::<Vec<_>>(), &attributes)?;
    copy_file(&memory, dir, INDEX)
}

fn copy_file(memory: &File, dir: &Path, name: &str) -> Result<FileEntry> {
    let mut file = HashingFile::create(dir, name)?;
    let (mut block, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let n = memory.read_at(&mut block, at).at(dir.join(name))?;
        if n == 0 {
            return file.close();
        }
        file.append(&block[..n])?;
        at += n as u64;
    }
}
