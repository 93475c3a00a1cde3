//! The artifact contract: a directory written as `NAME.tmp-<job>/`, every file fsynced, a manifest written last, then
//! renamed. No manifest, no artifact. The manifest names every file with size and checksum (taken from memory while
//! writing) and the fingerprints of the inputs. This file knows nothing of tensors.

use crate::error::{Error, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// File name of the manifest in every artifact.
pub const MANIFEST: &str = "manifest.json";
/// Version of the manifest's own form.
pub const FORMAT: u32 = 1;

/// What an artifact says about itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// "tokenizer", "token-shards", "checkpoint", "responses", "scores", "run".
    pub kind: String,
    /// Version of the manifest's form.
    pub format: u32,
    /// Program and version that wrote it.
    pub producer: String,
    /// The settings it was made with, resolved.
    pub recipe: serde_json::Value,
    /// What it was made from.
    pub inputs: Vec<Input>,
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
    /// Numbers that make sense for the kind: tokens, documents, step.
    pub counts: BTreeMap<String, serde_json::Value>,
    /// xxh3-128 over kind, recipe, inputs' fingerprints, files and counts: equal content, equal fingerprint.
    pub fingerprint: String,
    /// Seconds since 1970 when it was committed; not part of the fingerprint.
    pub written_unix_s: u64,
}

/// An input of an artifact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Input {
    /// What it was used as: "tokenizer", "corpus", "checkpoint".
    pub role: String,
    /// Where it was.
    pub path: PathBuf,
    /// Its manifest's fingerprint, or a checksum of the raw file.
    pub fingerprint: String,
}

/// A file of an artifact.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path relative to the artifact.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3-64 of its bytes, 16 hex digits.
    pub xxh3: String,
}

impl Manifest {
    /// A manifest without files and counts, dated now.
    pub fn new(kind: &str, recipe: serde_json::Value, inputs: Vec<Input>) -> Manifest {
        Manifest {
            kind: kind.into(),
            format: FORMAT,
            producer: concat!("trireme ", env!("CARGO_PKG_VERSION")).into(),
            recipe,
            inputs,
            files: Vec::new(),
            counts: BTreeMap::new(),
            fingerprint: String::new(),
            written_unix_s: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }

    /// Reads the manifest of an artifact and checks its kind, its form and that every file is there with its size.
    /// Contents are checked by [`Manifest::verify`] or by the reader of each file.
    pub fn open(artifact: &Path, kind: &str) -> Result<Manifest> {
        let path = artifact.join(MANIFEST);
        if !artifact.is_dir() {
            return Err(Error::file(artifact, format!("no such {kind}")).remedy("check the path"));
        }
        if !path.is_file() {
            let wrong = format!("not a finished {kind}: it has no {MANIFEST}");
            return Err(Error::file(artifact, wrong).remedy("run the stage that writes it again, or check the path"));
        }
        let text = fs::read(&path).at(&path)?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&path, format!("not a manifest: {error}")).remedy("write the artifact again"))?;
        if manifest.format != FORMAT {
            let wrong = format!("manifest format {}, this program reads {FORMAT}", manifest.format);
            return Err(Error::file(&path, wrong).remedy("use the program that wrote it, or write it again"));
        }
        if manifest.kind != kind {
            let wrong = format!("is a {}, expected a {kind}", manifest.kind);
            return Err(Error::file(artifact, wrong).remedy("check the path"));
        }
        if manifest.fingerprint != manifest.compute_fingerprint() {
            let wrong = format!("fingerprint {} does not match its contents {}", manifest.fingerprint, manifest.compute_fingerprint());
            return Err(Error::file(&path, wrong).remedy("the manifest was edited or damaged: write the artifact again"));
        }
        for file in &manifest.files {
            let path = artifact.join(&file.name);
            let found = fs::metadata(&path).at(&path)?.len();
            if found != file.bytes {
                let wrong = format!("{found} bytes, the manifest says {}", file.bytes);
                return Err(Error::file(&path, wrong).remedy("the file was truncated or changed: write the artifact again"));
            }
        }
        Ok(manifest)
    }

    /// Reads every file and compares its checksum.
    pub fn verify(&self, artifact: &Path) -> Result<()> {
        for file in &self.files {
            verify_file(artifact, file)?;
        }
        Ok(())
    }

    /// The entry of a file by name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// A count as u64.
    pub fn count(&self, name: &str) -> Option<u64> {
        self.counts.get(name).and_then(serde_json::Value::as_u64)
    }

    fn compute_fingerprint(&self) -> String {
        let inputs: Vec<&String> = self.inputs.iter().map(|input| &input.fingerprint).collect();
        let content = serde_json::json!([self.kind, self.format, self.recipe, inputs, self.files, self.counts]);
        format!("{:032x}", xxhash_rust::xxh3::xxh3_128(content.to_string().as_bytes()))
    }
}

/// Reads one file of an artifact and compares its checksum.
pub fn verify_file(artifact: &Path, file: &FileEntry) -> Result<()> {
    let path = artifact.join(&file.name);
    let found = checksum(&path)?;
    if found.xxh3 != file.xxh3 || found.bytes != file.bytes {
        let wrong = format!("checksum {} of {} bytes, the manifest says {} of {}", found.xxh3, found.bytes, file.xxh3, file.bytes);
        return Err(Error::file(&path, wrong).remedy("the file was damaged: write the artifact again, or take an older one"));
    }
    Ok(())
}

/// Size and checksum of a file on disk; `name` is its path as given.
pub fn checksum(path: &Path) -> Result<FileEntry> {
    let mut file = File::open(path).at(path)?;
    let (mut hash, mut bytes, mut block) = (Xxh3::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        let n = match io::Read::read(&mut file, &mut block) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io(path, &error)),
        };
        hash.update(&block[..n]);
        bytes += n as u64;
    }
    Ok(FileEntry { name: path.display().to_string(), bytes, xxh3: format!("{:016x}", hash.digest()) })
}

/// Size and checksum of `dir/name`, as an entry of the artifact `dir`.
pub fn checksum_as(dir: &Path, name: &str) -> Result<FileEntry> {
    Ok(FileEntry { name: name.into(), ..checksum(&dir.join(name))? })
}

/// Turns a directory that grew in place (a run) into an artifact: writes its manifest, atomically, as the last thing.
pub fn seal(dir: &Path, mut manifest: Manifest) -> Result<()> {
    manifest.fingerprint = manifest.compute_fingerprint();
    let (tmp, path) = (dir.join(format!("{MANIFEST}.tmp")), dir.join(MANIFEST));
    write_synced(&tmp, &serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data"))?;
    fs::rename(&tmp, &path).at(&path)?;
    sync_dir(dir)
}

/// Writes a small file and makes it durable; removes it when that fails.
fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().inspect_err(|_| drop(fs::remove_file(path))).at(path)
}

/// An input by its path: an artifact's fingerprint, or the checksum of a plain file.
pub fn input(role: &str, path: &Path) -> Result<Input> {
    let manifest = path.join(MANIFEST);
    let fingerprint = if manifest.is_file() {
        let text = fs::read(&manifest).at(&manifest)?;
        let manifest_value: Manifest =
            serde_json::from_slice(&text).map_err(|error| Error::file(&manifest, format!("not a manifest: {error}")))?;
        manifest_value.fingerprint
    } else {
        checksum(path)?.xxh3
    };
    Ok(Input { role: role.into(), path: path.to_path_buf(), fingerprint })
}

/// A file that hashes what is written to it.
pub struct HashingFile {
    name: String,
    path: PathBuf,
    file: io::BufWriter<File>,
    hash: Xxh3,
    bytes: u64,
}

impl HashingFile {
    /// Creates `dir/name`, which must not exist.
    pub fn create(dir: &Path, name: &str) -> Result<HashingFile> {
        let path = dir.join(name);
        let file = File::options().write(true).create_new(true).open(&path).at(&path)?;
        Ok(HashingFile { name: name.into(), path, file: io::BufWriter::with_capacity(1 << 20, file), hash: Xxh3::new(), bytes: 0 })
    }

    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).at(&self.path)
    }

    /// Flushes to the disk and returns its entry.
    pub fn close(mut self) -> Result<FileEntry> {
        self.file.flush().at(&self.path)?;
        self.file.get_ref().sync_all().at(&self.path)?;
        Ok(FileEntry { name: self.name, bytes: self.bytes, xxh3: format!("{:016x}", self.hash.digest()) })
    }
}

impl Write for HashingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// What a stage finds where it is about to write.
pub enum Begin {
    /// The same work was finished before: nothing to do.
    Finished(Manifest),
    /// Write here.
    Write(ArtifactWriter),
}

/// An artifact under construction. Dropped without [`ArtifactWriter::commit`], it removes what it wrote.
pub struct ArtifactWriter {
    out: PathBuf,
    tmp: PathBuf,
    kind: &'static str,
    recipe: serde_json::Value,
    inputs: Vec<Input>,
    files: Vec<FileEntry>,
    counts: BTreeMap<String, serde_json::Value>,
    committed: bool,
    _lock: RunLock,
}

impl ArtifactWriter {
    /// Starts `out`. Finished before with the same recipe and inputs: `Begin::Finished`. Finished with others, being written
    /// by another job, or something that is no artifact: an error that says which. One process of a job calls this.
    pub fn begin(out: &Path, kind: &'static str, recipe: serde_json::Value, inputs: Vec<Input>) -> Result<Begin> {
        if out.exists() {
            if let Ok(old) = Manifest::open(out, kind) {
                let same_inputs = old.inputs.iter().map(|i| (&i.role, &i.fingerprint)).eq(inputs.iter().map(|i| (&i.role, &i.fingerprint)));
                if old.recipe == recipe && same_inputs {
                    return Ok(Begin::Finished(old));
                }
                let wrong = format!("holds a {kind} made with other settings or from other inputs");
                return Err(Error::file(out, wrong).remedy("choose another --out, or remove it first"));
            }
            let is_empty_dir = fs::read_dir(out).map(|mut entries| entries.next().is_none()).unwrap_or(false);
            if !is_empty_dir {
                let wrong = format!("exists and is not a finished {kind}");
                return Err(Error::file(out, wrong).remedy("choose another --out, or remove it first"));
            }
        }
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).at(parent)?;
        let name = out.file_name().ok_or_else(|| Error::file(out, "has no file name").remedy("choose another --out"))?;
        let lock = RunLock::acquire(&parent.join(format!(".{}.lock", name.to_string_lossy())), out)?;
        let tmp = parent.join(format!("{}.tmp-{}", name.to_string_lossy(), job_id()));
        if tmp.exists() {
            fs::remove_dir_all(&tmp).at(&tmp)?;
        }
        fs::create_dir(&tmp).at(&tmp)?;
        let writer = ArtifactWriter {
            out: out.into(),
            tmp,
            kind,
            recipe,
            inputs,
            files: Vec::new(),
            counts: BTreeMap::new(),
            committed: false,
            _lock: lock,
        };
        Ok(Begin::Write(writer))
    }

    /// The directory to write files into (also by other ranks of the job).
    pub fn dir(&self) -> &Path {
        &self.tmp
    }

    /// Registers a closed file.
    pub fn add(&mut self, file: FileEntry) {
        self.files.push(file);
    }

    /// Sets a count.
    pub fn count(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        self.counts.insert(name.into(), value.into());
    }

    /// Writes the manifest, syncs, renames. After this the artifact exists.
    pub fn commit(mut self) -> Result<Manifest> {
        self.files.sort_by(|a, b| a.name.cmp(&b.name));
        let mut manifest = Manifest::new(self.kind, self.recipe.clone(), self.inputs.clone());
        manifest.files = std::mem::take(&mut self.files);
        manifest.counts = std::mem::take(&mut self.counts);
        manifest.fingerprint = manifest.compute_fingerprint();
        write_synced(&self.tmp.join(MANIFEST), &serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data"))?;
        sync_dir(&self.tmp)?;
        if self.out.is_dir() {
            fs::remove_dir(&self.out).at(&self.out)?; // empty, as begin() saw
        }
        fs::rename(&self.tmp, &self.out).at(&self.out)?;
        self.committed = true;
        sync_dir(self.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        Ok(manifest)
    }
}

impl Drop for ArtifactWriter {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.tmp); // best effort: the next run removes it by name
        }
    }
}

/// Makes directory entries durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).at(dir)
}

/// The SLURM job id, or this process' id.
pub fn job_id() -> String {
    std::env::var("SLURM_JOB_ID").unwrap_or_else(|_| std::process::id().to_string())
}

/// The name of this machine.
pub fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |name| name.trim().to_string())
}

/// A lock file that names its owner, removed when dropped. A lock of a process of this machine that no longer runs, or of
/// an earlier life of this very SLURM job, is taken over.
pub struct RunLock {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Owner {
    host: String,
    pid: u32,
    job: String,
    since_unix_s: u64,
}

impl RunLock {
    /// Takes `path` for the work on `what`, or says who holds it.
    pub fn acquire(path: &Path, what: &Path) -> Result<RunLock> {
        let since_unix_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let me = Owner { host: host_name(), pid: std::process::id(), job: job_id(), since_unix_s };
        let text = serde_json::to_vec(&me).expect("plain data");
        for _ in 0..2 {
            match File::options().write(true).create_new(true).open(path) {
                Ok(mut file) => {
                    let lock = RunLock { path: path.into() }; // removed again when its text does not fit on the disk
                    file.write_all(&text).at(path)?;
                    return Ok(lock);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let owner: Option<Owner> = fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
                    if owner.as_ref().is_some_and(|owner| is_stale(owner, &me)) {
                        fs::remove_file(path).at(path)?;
                        continue;
                    }
                    let who = owner.map_or("another job".into(), |o| format!("job {} (process {} on {})", o.job, o.pid, o.host));
                    let remedy = format!("wait for it, choose another --out, or remove {} if that job is gone", path.display());
                    return Err(Error::file(what, format!("is being written by {who}")).remedy(remedy));
                }
                Err(error) => return Err(Error::io(path, &error)),
            }
        }
        Err(Error::file(what, "is being written by another job").remedy("wait for it, or choose another --out"))
    }
}

fn is_stale(owner: &Owner, me: &Owner) -> bool {
    let same_job = std::env::var("SLURM_JOB_ID").is_ok() && owner.job == me.job;
    let status = fs::read_to_string(format!("/proc/{}/status", owner.pid));
    let dead = status.map_or(true, |status| status.lines().any(|line| line.starts_with("State:") && line.contains('Z')));
    (owner.host == me.host && dead) || (same_job && owner.pid != me.pid)
}

impl Drop for RunLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // best effort: a left lock of a dead process is taken over
    }
}
