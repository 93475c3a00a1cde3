//! Saving while training goes on.
//!
//! A save begins with a snapshot, which copies nothing: the tensors of a rank are lent to a thread of its own, which writes them
//! piece by piece, in the order in which the optimizer will come by. Forward and backward only read weights. Before the
//! optimizer changes a parameter it asks the gate: a piece that is on its way to the disk already is waited for, one that is not
//! is copied first, as long as there is room for copies ([`Options::copy_bytes`], at least the largest piece of this rank). So a
//! save takes at most that much memory above what is there anyway, besides a block of a MiB and the table of pieces.
//!
//! ```text
//! start    collective: who writes what, room on the disk, rank 0 makes the directory; then `lend` and a thread    "snapshot"
//! poll     collective, at step boundaries: all shards are on the disk -> rank 0 writes index and manifest in a thread -> "durable"
//! ```
//!
//! The threads never speak to other ranks. All ranks agree on success after each stage, so a full disk on one of them is the
//! same error on all, and nothing that looks finished is left behind.

use super::commit::{Written, finish};
use super::plan::{plan, spec_of};
use super::retention::{self, Retention};
use super::save::{Meta, Piece, begin, set_damaged_aside, shard_name};
use super::shard::{PieceSpec, ShardWriter};
use crate::artifact::{ArtifactWriter, Begin, Manifest, sync_dir};
use crate::comm::{Communicator, agree};
use crate::error::{Context, Result};
use crate::fault;
use crate::tensor::Lent;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How to save.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Options {
    /// Most bytes of pieces that are copied so that the optimizer need not wait for the disk; at least the largest piece.
    pub copy_bytes: u64,
    /// Which older checkpoints beside this one are removed, once it is durable or before when there is no room for it.
    pub retention: Retention,
}

/// What [`start`] finds.
pub enum Started {
    /// Under way.
    Saving(Box<Saving>),
    /// The same checkpoint was there before.
    Finished(Box<Manifest>),
}

/// Bytes read at a time from memory that is not the host's.
const FOREIGN_BLOCK_BYTES: usize = 8 << 20;

/// The pieces of one rank between the snapshot and the disk.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Slots of each parameter: of its weights, master weights and moments.
    slots_of: HashMap<String, Vec<usize>>,
}

struct State {
    slots: Vec<Slot>,
    /// Bytes that may still be copied.
    room_bytes: u64,
    /// How long the optimizer was kept waiting.
    waited: Duration,
}

enum Slot {
    /// Where the optimizer will change it.
    Lent(Lent),
    /// Being written, or being copied.
    Busy,
    /// A copy of its own.
    Copied(Vec<u8>),
    /// On the disk, or given up.
    Gone,
}

impl Gate {
    fn new(pieces: Vec<(String, Lent)>, copy_bytes: u64) -> Gate {
        let mut slots_of: HashMap<String, Vec<usize>> = HashMap::new();
        for (idx, (name, _)) in pieces.iter().enumerate() {
            slots_of.entry(parameter_of(name).into()).or_default().push(idx);
        }
        let largest = pieces.iter().map(|(_, lent)| lent.n_bytes() as u64).max().unwrap_or(0);
        let slots = pieces.into_iter().map(|(_, lent)| Slot::Lent(lent)).collect();
        let state = State { slots, room_bytes: copy_bytes.max(largest), waited: Duration::ZERO };
        Gate { state: Mutex::new(state), changed: Condvar::new(), slots_of }
    }

    /// Returns when every tensor of this parameter (by its name in the table of parameters) may be changed.
    pub fn release(&self, parameter: &str) {
        for &idx in self.slots_of.get(parameter).into_iter().flatten() {
            self.release_slot(idx);
        }
    }

    fn release_slot(&self, idx: usize) {
        let mut state = self.lock();
        loop {
            let fits = match &state.slots[idx] {
                Slot::Copied(_) | Slot::Gone => return,
                Slot::Busy => false,
                Slot::Lent(lent) => lent.n_bytes() as u64 <= state.room_bytes,
            };
            if !fits {
                let since = Instant::now();
                state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
                state.waited += since.elapsed();
                continue;
            }
            let Slot::Lent(lent) = std::mem::replace(&mut state.slots[idx], Slot::Busy) else { unreachable!("looked at above") };
            state.room_bytes -= lent.n_bytes() as u64;
            drop(state);
            let mut copy = vec![0; lent.n_bytes()];
            lent.read_bytes(0, &mut copy);
            drop(lent);
            let slot = &mut self.lock().slots[idx];
            if !matches!(slot, Slot::Gone) {
                *slot = Slot::Copied(copy); // unless the writer has given up meanwhile
            }
            self.changed.notify_all();
            return;
        }
    }

    /// What the writer is to write now; not before a copy of it is complete.
    fn take(&self, idx: usize) -> Slot {
        let mut state = self.lock();
        while matches!(state.slots[idx], Slot::Busy) {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        std::mem::replace(&mut state.slots[idx], Slot::Busy)
    }

    /// The writer has written it, and dropped what it took.
    fn written(&self, idx: usize, copied_bytes: u64) {
        let mut state = self.lock();
        state.slots[idx] = Slot::Gone;
        state.room_bytes += copied_bytes;
        self.changed.notify_all();
    }

    /// Gives everything back, written or not.
    fn open(&self) {
        // Under the lock, so that nobody is let by before it is given back.
        self.lock().slots.iter_mut().for_each(|slot| *slot = Slot::Gone);
        self.changed.notify_all();
    }

    /// How long the optimizer has waited so far.
    pub fn waited(&self) -> Duration {
        self.lock().waited
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// `layers.0.mlp.up.weight` of `adam_m/layers.0.mlp.up.weight`
fn parameter_of(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, parameter)| parameter)
}

/// Opens the gate however the writer ends.
struct OpenAtEnd<'a>(&'a Gate);

impl Drop for OpenAtEnd<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// A save under way.
pub struct Saving {
    out: PathBuf,
    meta: Meta,
    retention: Retention,
    gate: Arc<Gate>,
    /// On rank 0, until it is committed.
    artifact: Option<ArtifactWriter>,
    stage: Stage,
}

enum Stage {
    /// Every rank writes its shard.
    Writing(JoinHandle<Result<Option<Written>>>),
    /// Rank 0 writes the rest; nothing on the others.
    Committing(Option<JoinHandle<Result<Manifest>>>),
}

/// Takes a snapshot and begins to write it. Collective; see [`super::save()`] for what must hold of the pieces and what comes of
/// errors. The tensors behind the pieces must not be changed before [`Gate::release`] of [`Saving::gate`] allows it.
pub fn start(out: &Path, meta: &Meta, pieces: &[Piece], options: Options, world: &dyn Communicator) -> Result<Started> {
    let doing = || format!("saving the checkpoint {}", out.display());
    fault::at("save.begin");
    let plan = plan(pieces, world);
    let begun = begin_on_root(out, meta, (plan.total_bytes, plan.n_pieces), options.retention, world.rank());
    let (artifact, finished) = match agree(world, begun).doing(doing)? {
        Some(Begin::Write(writer)) => (Some(writer), None),
        Some(Begin::Finished(manifest)) => (None, Some(manifest)),
        None => (None, None),
    };
    let Some(dir) = announce(world, artifact.as_ref().map(ArtifactWriter::dir)) else {
        return Ok(Started::Finished(Box::new(broadcast_manifest(world, finished.as_ref()))));
    };
    let specs: Vec<PieceSpec> = plan.mine.iter().map(|piece| spec_of(piece)).collect();
    let lent = plan.mine.iter().map(|piece| (piece.name.clone(), piece.tensor.lend())).collect();
    let gate = Arc::new(Gate::new(lent, options.copy_bytes));
    let (of_thread, rank) = (Arc::clone(&gate), world.rank());
    let write = move || write_shard(&dir, rank, specs, &of_thread);
    let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write).expect("a thread for the checkpoint");
    fault::at("save.snapshot");
    let (out, meta, retention) = (out.to_path_buf(), meta.clone(), options.retention);
    Ok(Started::Saving(Box::new(Saving { out, meta, retention, gate, artifact, stage: Stage::Writing(thread) })))
}

impl Saving {
    /// What the optimizer asks before it changes a parameter.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Goes on as far as it can without waiting: the manifest once the checkpoint is durable. Collective; after an error or a
    /// manifest there is nothing more to call.
    pub fn poll(&mut self, world: &dyn Communicator) -> Result<Option<Manifest>> {
        let is_busy = match &self.stage {
            Stage::Writing(thread) => !thread.is_finished(),
            Stage::Committing(thread) => thread.as_ref().is_some_and(|thread| !thread.is_finished()),
        };
        if world.sum_f64(f64::from(u8::from(is_busy))) > 0.0 { Ok(None) } else { self.advance(world) }
    }

    /// Returns when the checkpoint is durable. Collective.
    pub fn wait(mut self, world: &dyn Communicator) -> Result<Manifest> {
        loop {
            if let Some(manifest) = self.advance(world)? {
                return Ok(manifest);
            }
        }
    }

    /// Waits for the threads of this stage, all ranks', and begins the next. Collective; as [`Saving::poll`] otherwise.
    pub fn advance(&mut self, world: &dyn Communicator) -> Result<Option<Manifest>> {
        let doing = || format!("saving the checkpoint {}", self.out.display());
        match std::mem::replace(&mut self.stage, Stage::Committing(None)) {
            Stage::Writing(thread) => {
                let written = agree(world, join(thread)).doing(doing)?;
                fault::at("save.report");
                let reports = world.gather_variable(&serde_json::to_vec(&written).expect("plain data"));
                let (meta, retention, out) = (self.meta.clone(), self.retention, self.out.clone());
                let commit = |artifact: ArtifactWriter| {
                    let commit = move || commit(artifact, &meta, decode_reports(&reports), &out, retention);
                    std::thread::Builder::new().name("checkpoint".into()).spawn(commit).expect("a thread for the checkpoint")
                };
                self.stage = Stage::Committing(self.artifact.take().map(commit));
                Ok(None)
            }
            Stage::Committing(thread) => {
                let manifest = agree(world, thread.map(join).transpose()).doing(doing)?;
                Ok(Some(broadcast_manifest(world, manifest.as_ref())))
            }
        }
    }
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// What rank 0 does at the end; the checkpoint is durable when the others hear of it.
fn commit(artifact: ArtifactWriter, meta: &Meta, written: Vec<Written>, out: &Path, retention: Retention) -> Result<Manifest> {
    let manifest = finish(artifact, meta, written)?;
    fault::at("save.durable");
    if let Some(folder) = out.parent()
        && let Err(error) = retention::apply(folder, retention)
    {
        log::warn!("removing older checkpoints: {error}");
    }
    Ok(manifest)
}

/// The directory, when there is room for `(bytes, pieces)`.
fn begin_on_root(out: &Path, meta: &Meta, size: (u64, usize), retention: Retention, rank: usize) -> Result<Option<Begin>> {
    if rank > 0 {
        return Ok(None);
    }
    set_damaged_aside(out)?;
    let begun = begin(out, meta, Vec::new())?;
    if let Begin::Write(writer) = &begun {
        retention::make_room(writer.dir(), size, retention)?;
    }
    Ok(Some(begun))
}

/// Rank 0 tells the others where to write; None when there is nothing to write.
fn announce(world: &dyn Communicator, dir: Option<&Path>) -> Option<PathBuf> {
    let mut word = world.gather_variable(dir.map_or(&[], |dir| dir.as_os_str().as_bytes()));
    let path = std::mem::take(&mut word[0]);
    (!path.is_empty()).then(|| PathBuf::from(OsString::from_vec(path)))
}

fn broadcast_manifest(world: &dyn Communicator, manifest: Option<&Manifest>) -> Manifest {
    let mine = manifest.map(|manifest| serde_json::to_vec(manifest).expect("plain data")).unwrap_or_default();
    serde_json::from_slice(&world.gather_variable(&mine)[0]).expect("rank 0 sent a manifest")
}

fn decode_reports(reports: &[Vec<u8>]) -> Vec<Written> {
    let decode = |text: &Vec<u8>| serde_json::from_slice::<Option<Written>>(text).expect("plain data of a rank");
    reports.iter().filter_map(decode).collect()
}

/// The writer's thread: this rank's shard, synced, and its name in the directory.
fn write_shard(dir: &Path, rank: usize, specs: Vec<PieceSpec>, gate: &Gate) -> Result<Option<Written>> {
    let _open_at_end = OpenAtEnd(gate);
    if specs.is_empty() {
        return Ok(None);
    }
    let key = |spec: &PieceSpec| (spec.name.clone(), spec.slice.offset.clone(), spec.slice.shape.clone());
    let slot_of: BTreeMap<_, usize> = specs.iter().enumerate().map(|(idx, spec)| (key(spec), idx)).collect();
    let mut writer = ShardWriter::create(dir, &shard_name(rank), specs)?;
    let order: Vec<usize> = writer.pieces().map(|spec| slot_of[&key(spec)]).collect();
    for idx in order {
        fault::at("save.write");
        let copied_bytes = match gate.take(idx) {
            Slot::Lent(lent) => {
                append(&mut writer, &lent)?;
                0
            }
            Slot::Copied(bytes) => {
                writer.append(&bytes)?;
                bytes.len() as u64
            }
            Slot::Busy | Slot::Gone => unreachable!("a piece is written once"),
        };
        gate.written(idx, copied_bytes);
    }
    let written = writer.close()?;
    sync_dir(dir)?;
    Ok(Some(written))
}

/// Host memory as it lies there; other memory by blocks.
fn append(writer: &mut ShardWriter, lent: &Lent) -> Result<()> {
    if lent.is_host() {
        return writer.append(lent.bytes());
    }
    let mut block = vec![0; FOREIGN_BLOCK_BYTES.min(lent.n_bytes())];
    let mut at = 0;
    while at < lent.n_bytes() {
        let n = FOREIGN_BLOCK_BYTES.min(lent.n_bytes() - at);
        lent.read_bytes(at, &mut block[..n]);
        writer.append(&block[..n])?;
        at += n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn gate_of(tensors: &[Tensor], copy_bytes: u64) -> Gate {
        Gate::new(tensors.iter().enumerate().map(|(i, tensor)| (format!("master/p{i}"), tensor.lend())).collect(), copy_bytes)
    }

    /// The optimizer gets a piece ahead of the writer, by a copy of the old values, and waits for the next until the writer has
    /// come so far: more room would be more memory than a save may take, less would be a wait at every piece.
    #[test]
    fn the_optimizer_runs_one_piece_ahead() {
        let mut tensors: Vec<Tensor> = (0..4).map(|i| Tensor::from_f32(&[8], &[i as f32; 8])).collect();
        let gate = gate_of(&tensors, 0);
        std::thread::scope(|scope| {
            let gate = &gate;
            gate.release("p0");
            tensors[0].f32_mut().fill(9.0);
            let optimizer = scope.spawn(move || {
                gate.release("p1");
                tensors[1].f32_mut().fill(9.0);
                gate.waited()
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(!optimizer.is_finished(), "there is no room for a second copy");
            let Slot::Copied(old) = gate.take(0) else { panic!("copied before it was changed") };
            assert_eq!(old, [0; 32]);
            gate.written(0, old.len() as u64);
            assert!(optimizer.join().unwrap() >= Duration::from_millis(40));
        });
    }

    /// A writer that gives up lets the optimizer go: else a full disk would be a job that hangs.
    #[test]
    fn a_failed_writer_opens_the_gate() {
        let mut tensors: Vec<Tensor> = (0..3).map(|_| Tensor::from_f32(&[8], &[1.0; 8])).collect();
        let gate = gate_of(&tensors, 0);
        std::thread::scope(|scope| {
            let gate = &gate;
            scope.spawn(move || {
                let _open_at_end = OpenAtEnd(gate);
                let _taken = gate.take(1);
                std::thread::sleep(Duration::from_millis(20));
            });
            ["p0", "p1", "p2", "no such parameter"].iter().for_each(|name| gate.release(name));
        });
        tensors.iter_mut().for_each(|tensor| tensor.f32_mut().fill(2.0));
    }
}
