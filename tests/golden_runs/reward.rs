//! The reward model of tests/goldens/nemotron-reward run on any device under any layout, against transformers in float64.

use crate::golden_runs::{Devices, How, read_safetensors, relative, save};
use std::collections::BTreeMap;
use std::path::Path;
use trireme::checkpoint::hf::{self, ExportType};
use trireme::checkpoint::{self, Wanted};
use trireme::comm::{Communicator, Groups, threads};
use trireme::device::{Device, Scratch};
use trireme::model::chunk::{MicroBatch, Ratings};
use trireme::model::ctx::{Ctx, SequenceMode};
use trireme::model::numerics::Numerics;
use trireme::parallel::schedule::{self, Messages, PipelineShape};
use trireme::parallel::slice::Slice;
use trireme::recipe::ScheduleKind;
use trireme::tensor::{DType, Tensor};
use trireme::train::executor::{self, Keep, Nothing};
use trireme::train::state::TrainState;

const N_ATTRIBUTES: usize = 5;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Sequences with their labels, NaN where there is none.
fn sequences(golden: &Tensors) -> Vec<(Vec<u32>, Vec<f32>)> {
    let (shape, tokens) = &golden["tokens"];
    let one = |(i, length): (usize, &f64)| {
        let tokens = tokens[i * shape[1]..][..*length as usize].iter().map(|&token| token as u32).collect();
        let labels = golden["labels"].1[i * N_ATTRIBUTES..][..N_ATTRIBUTES].iter().map(|&label| label as f32).collect();
        (tokens, labels)
    };
    golden["lengths"].1.iter().enumerate().map(one).collect()
}

/// `weight` of every squared error.
fn micro_batch(device: &dyn Device, sequences: &[(Vec<u32>, Vec<f32>)], weight: f32) -> MicroBatch {
    let tokens: Vec<u32> = sequences.iter().flat_map(|(tokens, _)| tokens.clone()).collect();
    let positions: Vec<u32> = sequences.iter().flat_map(|(tokens, _)| 0..tokens.len() as u32).collect();
    let mut starts = vec![0];
    sequences.iter().for_each(|(tokens, _)| starts.push(starts[starts.len() - 1] + tokens.len()));
    let weights = vec![f32::NAN; tokens.len()]; // not looked at
    let mut batch = MicroBatch::new(device, [&tokens, &tokens, &positions], &weights, starts).unwrap();
    batch.ratings = Some(Ratings { labels: sequences.iter().flat_map(|(_, labels)| labels.clone()).collect(), weight });
    batch
}

/// One rank: attributes (on the last stage) and gradients (saved as a checkpoint and, without the bias, which transformers has no place
/// for, once more for export).
fn one_pass(golden: &Tensors, from: &Path, device: &dyn Device, how: (How, usize), out: &Path, world: Box<dyn Communicator>) -> Vec<f32> {
    let (How { layout, dtype }, n_micro) = how;
    let (groups, scratch) = (Groups::new(world, layout), Scratch::new());
    let stored = checkpoint::open(from).unwrap();
    let mut state = TrainState::new(device, &stored.meta().model, &groups, dtype).unwrap();
    for (param, shard) in
        state.chunks.iter().zip(&mut state.optimizer.shards).flat_map(|(chunk, shards)| chunk.params().into_iter().zip(shards))
    {
        let name = format!("weights/{}", param.spec.name);
        stored.read(&mut [Wanted { name, slice: shard.slice.clone(), tensor: &mut shard.master }]).unwrap();
    }
    state.optimizer.publish_weights(device, &scratch, &mut state.chunks, &groups);
    let all = sequences(golden);
    let n_labels = all.iter().flat_map(|(_, labels)| labels).filter(|label| !label.is_nan()).count();
    let batches: Vec<MicroBatch> = all.chunks(all.len() / n_micro).map(|part| micro_batch(device, part, 1.0 / n_labels as f32)).collect();
    let shape = PipelineShape { pp: layout.pp, vp: 1, n_micro };
    let schedule = schedule::training(ScheduleKind::OneFOneB, shape, Messages::Ahead).unwrap();
    // 26 tokens in one micro-batch divide by two; single sequences do not.
    let sequence = if n_micro == 1 { SequenceMode::Sharded } else { SequenceMode::Replicated };
    let ctx = Ctx { device, tp: &*groups.tp, scratch: &scratch, sequence, numerics: Numerics::Fast };
    let work = (&batches[..], Keep::Saved);
    let passed = executor::run(&schedule, &mut state.chunks, &ctx, &groups, work, &mut Nothing);
    state.chunks.iter_mut().for_each(|chunk| chunk.finish_gradients(&ctx));
    save(&state.chunks, &groups, &out.join("gradients"), stored.meta(), |param| param.grad());
    let params = state.chunks.iter_mut().flat_map(|chunk| chunk.params_mut());
    params.filter(|param| param.spec.name == "reward.bias").for_each(|param| device.fill_zero(param.grad_mut()));
    save(&state.chunks, &groups, &out.join("exportable"), stored.meta(), |param| param.grad());
    passed.attributes.concat()
}

/// Compares with the golden numbers: relative differences of attributes and loss, and of each gradient, at most `allowed`.
pub fn check(devices: Devices, how: How, allowed: (f64, f64), tmp: &Path) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/nemotron-reward");
    let golden = read_safetensors(&dir.join("golden.safetensors"));
    for n_micro in [1, 3] {
        let out = tmp.join(format!("reward-{how:?}-{n_micro}"));
        hf::import(&dir, &out.join("imported")).unwrap();
        let from = out.join("imported");
        let ranks = threads::run(how.layout.world(), |world| one_pass(&golden, &from, &*devices(), (how, n_micro), &out, world));
        let last = how.layout.world() - 1; // of the last stage
        assert!(how.layout.pp == 1 || ranks[0].is_empty(), "the first stage has attributes");
        assert!(ranks[last - (how.layout.tp - 1)..].iter().all(|attributes| *attributes == ranks[last]), "ranks disagree");
        let found: Vec<f64> = ranks[last].iter().map(|&x| f64::from(x)).collect();
        let what = format!("{how:?}, {n_micro} micro-batches");
        let error = relative(&found, &golden["attributes"].1);
        assert!(error <= allowed.0, "{what}: attributes differ by {error:.2e}");
        let squares = found.iter().zip(&golden["labels"].1).filter(|(_, label)| !label.is_nan()).map(|(x, label)| (x - label).powi(2));
        let squares: Vec<f64> = squares.collect();
        let (loss, expected) = (squares.iter().sum::<f64>() / squares.len() as f64, golden["loss"].1[0]);
        // d loss = 2 (x - label) dx, and |x - label| is about the root of the loss: at most twice the relative error of x, which is
        // smaller.
        assert!((loss - expected).abs() / expected <= 2.0 * allowed.0, "{what}: loss {loss}, expected {expected}");
        hf::export(&out.join("exportable"), &out.join("exported"), ExportType::F32).unwrap();
        let mut gradients = read_safetensors(&out.join("exported/model.safetensors"));
        let mut bias = Tensor::host(&[N_ATTRIBUTES], DType::F32, None).unwrap();
        let wanted = Wanted { name: "weights/reward.bias".into(), slice: Slice::whole(&[N_ATTRIBUTES]), tensor: &mut bias };
        checkpoint::open(&out.join("gradients")).unwrap().read(&mut [wanted]).unwrap();
        gradients.insert("score.bias".into(), (vec![N_ATTRIBUTES], bias.f32().iter().map(|&x| f64::from(x)).collect()));
        let expected: Vec<_> = golden.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("grad.")?, tensor))).collect();
        assert_eq!(expected.len(), gradients.len());
        for (name, (shape, expected)) in expected {
            let (found_shape, found) = &gradients[name];
            assert_eq!(shape, found_shape, "{what}: {name}");
            let error = relative(found, expected);
            assert!(error <= allowed.1, "{what}: gradient of {name} differs by {error:.2e}");
        }
    }
}
