//! The bytes of a response file depend on the requests, the model and its storage alone: not on how many responses are under way, how
//! prompts are cut, what is shared, guessed or put back, on threads, ranks, or the order of the requests.

mod common;

use common::tiny_model;
use prost::Message;
use std::collections::HashMap;
use std::path::Path;
use trireme::comm::{Groups, threads};
use trireme::device::Fp8Scales;
use trireme::device::cpu::Cpu;
use trireme::infer::generate::{Batching, Generator};
use trireme::infer::kv_memory::{Room, page_bytes};
use trireme::infer::load::layout_for;
use trireme::infer::request::{Request, Response};
use trireme::infer::sampler::Sampling;
use trireme::infer::samples::Done;
use trireme::infer::schedule::{Counts, Sharing};
use trireme::model::chunk::{Chunk, Purpose};
use trireme::model::config::ModelConfig;
use trireme::model::packed::WeightFormat;
use trireme::parallel::layout::ParallelLayout;
use trireme::recipe::Mode;
use trireme::rng::Random;
use trireme::tensor::DType;
use trireme::text::Tokenizer;
use trireme::text::model_file::{ModelProto, NormalizerSpec, PieceKind, PieceProto, TrainerSpec};

const MAX_TOKENS: usize = 400;
const EOS: u32 = 13;
/// Of the random model's vocabulary: unknown, end, letters, pairs of letters.
const N_PIECES: usize = 2 + 26 + 20;

fn model() -> ModelConfig {
    // Weights this large make a model with an opinion out of random ones: it repeats itself where the most likely token is taken.
    let (n_heads, n_kv_heads) = (16, 8);
    let sizes = ModelConfig { n_layers: 4, hidden: 32, n_heads, n_kv_heads, ffn_hidden: 64, ..tiny_model() };
    ModelConfig { vocab_size: N_PIECES, max_tokens: MAX_TOKENS, init_std: 0.3, ..sizes }
}

/// The same with heads, feed-forward columns and a vocabulary that 3, 5 and 6 divide, and a width that 5 and 6 do not.
fn model_of_thirties() -> ModelConfig {
    let sizes = ModelConfig { n_layers: 2, hidden: 48, n_heads: 60, n_kv_heads: 30, head_dim: 4, ffn_hidden: 480, ..model() };
    ModelConfig { vocab_divisor: 60, ..sizes }
}

fn tokenizer() -> Tokenizer {
    let piece = |text: String, kind: PieceKind| PieceProto { piece: Some(text), score: Some(0.0), r#type: Some(kind as i32) };
    let letter = |i: usize| (b'a' + (i % 26) as u8) as char;
    let mut pieces = vec![piece("<unk>".into(), PieceKind::Unknown), piece("</s>".into(), PieceKind::Control)];
    pieces.extend((0..26).map(|i| piece(letter(i).into(), PieceKind::Normal)));
    pieces.extend((0..20).map(|i| piece(format!("{}{}", letter(i), letter(3 * i + 1)), PieceKind::Normal)));
    let trainer = TrainerSpec { model_type: Some(2), ..TrainerSpec::default() };
    let normalizer = NormalizerSpec { add_dummy_prefix: Some(false), remove_extra_whitespaces: Some(false), ..NormalizerSpec::default() };
    let (trainer_spec, normalizer_spec) = (Some(trainer.encode_to_vec()), Some(normalizer.encode_to_vec()));
    let proto = ModelProto { pieces, trainer_spec, normalizer_spec, ..ModelProto::default() };
    Tokenizer::from_bytes(proto.encode_to_vec(), Path::new("test.model")).unwrap()
}

fn random_tokens(n: usize, seed: u64) -> Vec<u32> {
    let noise = Random::new(seed, "prompt");
    (0..n as u64).map(|i| 2 + (noise.bits(i) % (N_PIECES as u64 - 2)) as u32).collect()
}

/// Beginnings of two pages and a part of one that several requests share; greedy and drawn; samples, stop strings, everything a
/// request can ask for, ends of every kind.
fn requests() -> Vec<Request> {
    let (beginning, drawn) = (random_tokens(150, 1), Sampling { temperature: 1.0, ..Sampling::PLAIN });
    let prompt = |n: usize, tail: usize| [&beginning[..n], &random_tokens(tail, 100 + tail as u64)].concat();
    let request = |id: &str, prompt: Vec<u32>, n_new: usize, sampling: Sampling| {
        let plain = Request::new(id, prompt, n_new);
        Request { sampling, seed: 11, ..plain }
    };
    vec![
        request("greedy", prompt(150, 3), 60, Sampling::GREEDY),
        Request { n: 3, ..request("samples", prompt(150, 40), 20, drawn) },
        request("whole pages", prompt(128, 0), 40, Sampling::GREEDY),
        Request { stop: vec!["ab".into(), "qq".into()], ..request("stops", prompt(100, 1), 40, drawn) },
        request("nothing", prompt(5, 0), 0, drawn),
        Request { logprobs: Some(3), ..request("logprobs", prompt(130, 1), 9, drawn) },
        request("long", prompt(0, 301), 12, Sampling { top_p: 0.9, temperature: 0.8, ..drawn }),
        request("to the end", prompt(150, 230), 100, Sampling { top_k: 5, ..drawn }),
        request("penalty", prompt(0, 1), 30, Sampling { repetition_penalty: 1.3, ..Sampling::GREEDY }),
        request("greedy again", prompt(150, 3), 33, Sampling::GREEDY),
    ]
}

/// What may not change a response.
#[derive(Clone, Copy, Debug)]
struct How {
    shape: (usize, usize, usize),
    n_threads: usize,
    batching: Batching,
}

/// What may.
#[derive(Clone, Copy, Debug)]
struct Storage {
    model: fn() -> ModelConfig,
    dtype: DType,
    weights: WeightFormat,
}

const F32: Storage = Storage { model, dtype: DType::F32, weights: WeightFormat::Stored };
const BF16: Storage = Storage { model, dtype: DType::BF16, weights: WeightFormat::Stored };
const INT8: Storage = Storage { model, dtype: DType::F32, weights: WeightFormat::Int8 };

/// The response file, and what the first replica did.
fn generate(requests: &[Request], how: How, storage: Storage) -> (String, Counts) {
    generate_until(&[EOS], requests, how, storage)
}

/// The same with these end-of-sequence tokens.
fn generate_until(eos_ids: &[u32], requests: &[Request], how: How, storage: Storage) -> (String, Counts) {
    let (tp, pp, dp) = how.shape;
    let all = threads::run(tp * pp * dp, |world| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(how.n_threads).build().unwrap();
        pool.install(|| {
            let groups = Groups::new(world, layout_for(tp * pp * dp, tp, pp).unwrap());
            let (device, tokenizer) = (Cpu::new(), tokenizer());
            let mut chunk =
                Chunk::new(&device, &(storage.model)(), &groups.layout, groups.at, 0, storage.dtype, Purpose::Inference).unwrap();
            chunk.initialise(&device, 5);
            chunk.pack(&device, &*groups.tp, storage.weights).unwrap();
            let (device, groups, chunk, eos_ids, batching) = (&device, &groups, &chunk, eos_ids.to_vec(), how.batching);
            let generator = Generator {
                device,
                groups,
                chunk,
                eos_ids,
                tokenizer: Some(&tokenizer),
                batching,
                order: Mode::Reproducible,
                stop: &|| false,
            };
            let (done, mut mine) = (Done::nothing(requests), Vec::<(usize, Response)>::new());
            let ran = generator.run(requests, &done, &mut |sample, response| {
                mine.push((done.number(sample).unwrap(), response));
                Ok(())
            });
            (ran.unwrap(), mine)
        })
    });
    let counts = all[0].0;
    let mut responses: Vec<(usize, Response)> = all.into_iter().flat_map(|(_, mine)| mine).collect();
    responses.sort_by_key(|(number, _)| *number);
    assert!(responses.iter().map(|(number, _)| *number).eq(0..requests.iter().map(|one| one.n).sum()), "each sample once");
    (responses.iter().map(|(_, response)| serde_json::to_string(response).unwrap() + "\n").collect(), counts)
}

/// One sequence at a time, each prompt in one pass, nothing shared or guessed, one thread, one rank.
fn alone() -> How {
    let batching =
        Batching { n_sequences: 1, pass_tokens: MAX_TOKENS, sharing: Sharing::Separate, draft_tokens: 0, kv_memory: Room::Unknown };
    How { shape: (1, 1, 1), n_threads: 1, batching }
}

/// A cache for the longest request and a page more.
fn tight(layout: (usize, usize, usize), dtype: DType) -> Room {
    let layout = ParallelLayout { tp: layout.0, pp: layout.1, dp: layout.2, vp: 1 };
    Room::Asked(8 * page_bytes(&model(), &layout, dtype))
}

fn assert_same(expected: &str, found: &str, how: How, storage: Storage) {
    for (a, b) in expected.lines().zip(found.lines()) {
        assert_eq!(a, b, "{how:?} {storage:?}");
    }
    assert_eq!(expected, found, "{how:?} {storage:?}");
}

/// On one rank, over the whole product of batch sizes, passes (one page, an odd number, whole prompts), guesses and sharing, in f32, bf16
/// and int8, with threads and tight memory in turn. It breaks with any operation whose bits depend on the other rows of a pass, with
/// any wrong entry of the cache, and with any guess that is taken though it is wrong; that prompts were shared and guesses were right is
/// seen in the counts.
#[test]
fn batching_changes_no_byte() {
    let requests = requests();
    for storage in [F32, BF16, INT8] {
        let expected = generate(&requests, alone(), storage).0;
        let mut n = 0;
        for n_sequences in [1, 3, 16] {
            for pass_tokens in [64, 37, 10_000] {
                for draft_tokens in [0, 4] {
                    for sharing in [Sharing::Shared, Sharing::Separate] {
                        n += 1;
                        let is_tight = n % 5 == 0;
                        let kv_memory = if is_tight { tight((1, 1, 1), storage.dtype) } else { Room::Unknown };
                        let batching = Batching { n_sequences, pass_tokens, sharing, draft_tokens, kv_memory };
                        let how = How { batching, n_threads: 1 + n % 2, ..alone() };
                        let (found, counts) = generate(&requests, how, storage);
                        assert_same(&expected, &found, how, storage);
                        assert_eq!(counts.prompt_shared > 0, sharing == Sharing::Shared, "{how:?}: {counts:?}");
                        assert_eq!(counts.guessed_right > 0, draft_tokens > 0, "{how:?}: {counts:?}");
                        assert!(!is_tight || counts.pages_used <= 8, "{counts:?}");
                    }
                }
            }
        }
    }
}

/// Short prompts with long responses need more pages together than there are: sequences give theirs back and are computed again, also
/// those that have guesses, or whose passes are under way on another stage.
#[test]
fn giving_pages_back_changes_no_byte() {
    let request = |i: usize| Request { n: 1 + i % 2, seed: 3, ..Request::new(i.to_string(), random_tokens(10 + 9 * i, i as u64), 150) };
    let requests: Vec<Request> = (0..6).map(request).collect();
    let expected = generate_until(&[], &requests, alone(), BF16).0;
    for (shape, draft_tokens, sharing) in [
        ((1, 1, 1), 4, Sharing::Shared),
        ((1, 1, 1), 0, Sharing::Separate),
        ((1, 2, 1), 4, Sharing::Shared),
        ((1, 4, 1), 0, Sharing::Shared),
    ] {
        let batching = Batching { n_sequences: 8, sharing, draft_tokens, kv_memory: tight(shape, DType::BF16), ..Batching::default() };
        let how = How { shape, batching, ..alone() };
        let (found, counts) = generate_until(&[], &requests, how, BF16);
        assert_same(&expected, &found, how, BF16);
        assert!(counts.preempted > 0 && counts.pages_used == 8, "{how:?}: {counts:?}");
    }
}

/// The same over tensor-parallel ranks, stages with several passes under way, replicas, and products of them.
#[test]
fn layouts_change_no_byte() {
    let requests = requests();
    for storage in [F32, BF16, INT8] {
        let expected = generate(&requests, alone(), storage).0;
        for (n, shape) in [(2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 3), (1, 4, 2)].into_iter().enumerate() {
            for (n_sequences, pass_tokens, draft_tokens, sharing) in
                [(16, 512, 4, Sharing::Shared), (3, 64, 0, Sharing::Separate), (5, 37, 4, Sharing::Shared)]
            {
                let kv_memory = if n_sequences == 5 { tight(shape, storage.dtype) } else { Room::Unknown };
                let batching = Batching { n_sequences, pass_tokens, sharing, draft_tokens, kv_memory };
                let how = How { shape, batching, n_threads: 1 + n % 2 };
                assert_same(&expected, &generate(&requests, how, storage).0, how, storage);
            }
        }
    }
}

/// And over 3, 5 and 6 ranks, which have no whole pieces of a sum that is cut in 8: they divide outputs instead, here blocks that overlap
/// and that do not, with stages and replicas, and in every form of weights. It breaks when a rank sums in an order of its own.
#[test]
fn any_number_of_ranks_changes_no_byte() {
    let requests = requests();
    let of_thirties = |storage: Storage| Storage { model: model_of_thirties, ..storage };
    let fp8 = |dtype: DType| of_thirties(Storage { model, dtype, weights: WeightFormat::Fp8(Fp8Scales::Rows) });
    for storage in [of_thirties(F32), of_thirties(BF16), of_thirties(INT8), fp8(DType::F32), fp8(DType::BF16)] {
        let expected = generate(&requests, alone(), storage).0;
        for (shape, n_sequences, pass_tokens, draft_tokens) in
            [((3, 1, 1), 16, 512, 4), ((3, 2, 1), 5, 37, 4), ((3, 1, 2), 3, 64, 0), ((5, 1, 1), 16, 100, 0), ((6, 1, 1), 4, 512, 4)]
        {
            let how = How { shape, batching: Batching { n_sequences, pass_tokens, draft_tokens, ..Batching::default() }, n_threads: 1 };
            assert_same(&expected, &generate(&requests, how, storage).0, how, storage);
        }
    }
}

/// With E4M3 and a scale for each token and output channel, too: the ranks agree on the scale of what they have parts of, and a row's
/// bits do not depend on the others of a pass. With one scale for a whole pass the ranks still change nothing; what runs together does.
#[test]
fn layouts_change_no_byte_in_fp8() {
    let requests = requests();
    let batching = Batching { n_sequences: 5, pass_tokens: 37, draft_tokens: 4, ..Batching::default() };
    for dtype in [DType::F32, DType::BF16] {
        let rows = Storage { model, dtype, weights: WeightFormat::Fp8(Fp8Scales::Rows) };
        let expected = generate(&requests, alone(), rows).0;
        let of_stored = generate(&requests, alone(), Storage { model, dtype, weights: WeightFormat::Stored }).0;
        assert_ne!(expected, of_stored, "FP8 changes nothing");
        for shape in [(2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2)] {
            let how = How { shape, batching, n_threads: 1 };
            assert_same(&expected, &generate(&requests, how, rows).0, how, rows);
        }
        let tensor = Storage { model, dtype, weights: WeightFormat::Fp8(Fp8Scales::Tensor) };
        let how = How { shape: (2, 1, 1), ..alone() };
        assert_same(&generate(&requests, alone(), tensor).0, &generate(&requests, how, tensor).0, how, tensor);
    }
}

/// Requests in another order have the same responses: what runs together and what is shared is another then.
#[test]
fn the_order_of_requests_changes_no_byte() {
    let requests = requests();
    let by_id = |text: &str| -> HashMap<String, Vec<String>> {
        let mut lines = HashMap::<String, Vec<String>>::new();
        for line in text.lines() {
            lines.entry(serde_json::from_str::<Response>(line).unwrap().id).or_default().push(line.into());
        }
        lines
    };
    let expected = by_id(&generate(&requests, alone(), BF16).0);
    let batching = Batching { n_sequences: 4, ..Batching::default() };
    for turn in 1..requests.len() {
        let mut turned = requests.clone();
        turned.rotate_left(turn);
        turned.swap(0, 5);
        let found = generate(&turned, How { batching, ..alone() }, BF16).0;
        assert_eq!(by_id(&found), expected, "turned by {turn}");
    }
}

/// The check sees a dependence on the other rows of a pass: with one scale of E4M3 for all of a pass's activations, as
/// `--weights fp8-tensor` has, the bytes change with the batch.
#[test]
fn a_dependence_between_rows_is_found() {
    let storage = Storage { model, dtype: DType::F32, weights: WeightFormat::Fp8(Fp8Scales::Tensor) };
    let together = How { batching: Batching { n_sequences: 16, ..alone().batching }, ..alone() };
    assert_ne!(generate(&requests(), alone(), storage).0, generate(&requests(), together, storage).0);
}
