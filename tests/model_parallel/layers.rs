//! Each layer on 1, 2 and 4 ranks in both sequence modes. Gradients start from a value, so that one which is assigned instead
//! of accumulated shows.

use super::ranks::{DIVISIONS, Matrix, Rank, central_differences, gradient, join_gradients, join_tokens, norm_rows, on_ranks};
use trireme::device::{Activation, Direction, Heads, Norm as How, NormKind, Rope};
use trireme::model::attention::Attention;
use trireme::model::block::Block;
use trireme::model::chunk::MicroBatch;
use trireme::model::config::Split;
use trireme::model::ctx::SequenceMode;
use trireme::model::embedding::VocabParallelEmbedding;
use trireme::model::head::OutputHead;
use trireme::model::linear::{ColumnParallelLinear, RowParallelLinear};
use trireme::model::mlp::Mlp;
use trireme::model::norm::{Norm, Residual};
use trireme::model::param::Param;
use trireme::rng::Random;
use trireme::tensor::Tensor;

/// Tokens: two sequences, of 5 and 7, so that no division of the rows falls between them.
const T: usize = 12;
const STARTS: [usize; 3] = [0, 5, 12];

fn positions() -> Vec<u32> {
    (0..5).chain(0..7).collect()
}

fn batch(tokens: &[u32], targets: &[u32], positions: &[u32], weights: &[f32]) -> MicroBatch {
    MicroBatch {
        tokens: Tensor::from_u32(&[T], tokens),
        targets: Tensor::from_u32(&[T], targets),
        positions: Tensor::from_u32(&[T], positions),
        weights: Tensor::from_f32(&[T], weights),
        sequence_starts: STARTS.to_vec(),
        ratings: None,
        shared: None,
        asked: None,
        first_sample: 0,
    }
}

fn random_ids(name: &str, below: u64) -> Vec<u32> {
    let noise = Random::new(3, name);
    (0..T as u64).map(|t| (noise.bits(t) % below) as u32).collect()
}

/// The i-th results of all ranks.
fn each<const N: usize>(parts: &[[Matrix; N]], i: usize) -> Vec<Matrix> {
    parts.iter().map(|part| part[i].clone()).collect()
}

/// y = x W^T, dx = dy W, dW += dy^T x with the outputs divided. A missing sum over tp in dx, or rows gathered in the wrong order,
/// would train on wrong gradients without a sign.
#[test]
fn column_parallel_linear() {
    let (x, w) = (Matrix::random("x", T, 7, 1.0), Matrix::random("w", 20, 7, 1.0));
    let dy = Matrix::random("dy", T, 20, 1.0);
    for division in DIVISIONS {
        let parts = on_ranks(division, |rank| {
            let mut linear = ColumnParallelLinear { weight: rank.param("w", &w, Split::Rows) };
            let x = rank.local(&x);
            let y = linear.forward(&rank.ctx, &x);
            let dx = linear.backward(&rank.ctx, &x, &rank.columns(&dy));
            [Matrix::of(&y), Matrix::of(&dx), gradient(&linear.weight)]
        });
        let what = format!("{division:?}");
        Matrix::beside(&each(&parts, 0)).assert_close(&x.times(&w.transposed()), 7, 1, &format!("{what} y"));
        join_tokens(division, &each(&parts, 1)).assert_close(&dy.times(&w), 20, 1, &format!("{what} dx"));
        let dw = join_gradients(division, Split::Rows, &each(&parts, 2));
        dw.assert_close(&dy.transposed().times(&x), T, 1, &format!("{what} dW"));
    }
}

/// y = sum over ranks of x W^T, dx = dy W, dW += dy^T x with the inputs divided.
#[test]
fn row_parallel_linear() {
    let (x, w) = (Matrix::random("x", T, 20, 1.0), Matrix::random("w", 7, 20, 1.0));
    let dy = Matrix::random("dy", T, 7, 1.0);
    for division in DIVISIONS {
        let parts = on_ranks(division, |rank| {
            let mut linear = RowParallelLinear { weight: rank.param("w", &w, Split::Columns) };
            let x = rank.columns(&x);
            let y = linear.forward(&rank.ctx, &x);
            let dx = linear.backward(&rank.ctx, &x, &rank.local(&dy));
            [Matrix::of(&y), Matrix::of(&dx), gradient(&linear.weight)]
        });
        let what = format!("{division:?}");
        join_tokens(division, &each(&parts, 0)).assert_close(&x.times(&w.transposed()), 20, 1, &format!("{what} y"));
        Matrix::beside(&each(&parts, 1)).assert_close(&dy.times(&w), 7, 1, &format!("{what} dx"));
        let dw = join_gradients(division, Split::Columns, &each(&parts, 2));
        dw.assert_close(&dy.transposed().times(&x), T, 1, &format!("{what} dW"));
    }
}

/// Each token's row, exactly (the other ranks add zeros), and the gradient of a row is the sum over the tokens that used it. A
/// token looked up on two ranks, or on none, would double or drop its row.
#[test]
fn vocab_parallel_embedding() {
    let (vocab, h) = (16, 5);
    let (table, dx) = (Matrix::random("table", vocab, h, 1.0), Matrix::random("dx", T, h, 1.0));
    let mut tokens = random_ids("tokens", vocab as u64);
    (tokens[3], tokens[7], tokens[8]) = (15, 0, 0);
    let looked_up = Matrix::from_fn(T, h, |t, column| table.at(tokens[t] as usize, column));
    let dtable =
        Matrix::from_fn(vocab, h, |row, column| (0..T).filter(|&t| tokens[t] as usize == row).map(|t| dx.at(t, column)).sum::<f64>());
    for division in DIVISIONS {
        let parts = on_ranks(division, |rank| {
            let mut embedding = VocabParallelEmbedding { weight: rank.param("table", &table, Split::Rows) };
            let tokens = Tensor::from_u32(&[T], &tokens);
            let x = embedding.forward(&rank.ctx, &tokens);
            embedding.backward(&rank.ctx, &tokens, &rank.local(&dx));
            [Matrix::of(&x), gradient(&embedding.weight)]
        });
        assert_eq!(join_tokens(division, &each(&parts, 0)), looked_up, "{division:?}");
        join_gradients(division, Split::Rows, &each(&parts, 1)).assert_close(&dtable, T, 1, &format!("{division:?} dtable"));
    }
}

fn make_norm(rank: &Rank, kind: NormKind, name: &str, gain: &Matrix, bias: &Matrix) -> Norm {
    let bias = (kind == NormKind::LayerNorm1P).then(|| rank.param(&format!("{name}.bias"), bias, Split::None));
    Norm { gain: rank.param(&format!("{name}.weight"), gain, Split::None), bias, how: How { kind, eps: 1e-5 } }
}

/// norm(x + delta) and its gradients by central differences of the formula; dx adds to the gradient that bypasses the norm. Under
/// sequence parallelism the ranks' gain and bias gradients are partial sums whose sum is the gradient.
#[test]
fn norm_with_fused_addition() {
    let h = 10;
    let (x, delta) = (Matrix::random("x", T, h, 1.0), Matrix::random("delta", T, h, 1.0));
    let sum = x.zip(&delta, |a, b| f64::from(a as f32 + b as f32));
    let (gain, bias) = (Matrix::random("gain", 1, h, 0.5).map(|g| f64::from(1.0 + g as f32)), Matrix::random("bias", 1, h, 0.5));
    let (dy, bypass) = (Matrix::random("dy", T, h, 1.0), Matrix::random("bypass", T, h, 1.0));
    let eps = f64::from(1e-5f32);
    for kind in [NormKind::LayerNorm1P, NormKind::RmsNorm] {
        let loss = |y: Matrix| y.zip(&dy, |y, dy| y * dy).values.iter().sum::<f64>();
        let dx = central_differences(&sum, |x| loss(norm_rows(x, &gain, &bias, kind, eps)));
        let dgain = central_differences(&gain, |gain| loss(norm_rows(&sum, gain, &bias, kind, eps)));
        let dbias = central_differences(&bias, |bias| loss(norm_rows(&sum, &gain, bias, kind, eps)));
        for division in DIVISIONS {
            let parts = on_ranks(division, |rank| {
                let mut norm = make_norm(rank, kind, "norm", &gain, &bias);
                let (y, saved) = norm.forward(&rank.ctx, Residual::Sum { x: &rank.local(&x), delta: rank.local(&delta) });
                let mut dx = rank.local(&bypass);
                norm.backward(&rank.ctx, &saved, &rank.local(&dy), &mut dx);
                let dbias = norm.bias.as_ref().map_or_else(|| gradient(&norm.gain), gradient);
                [Matrix::of(&y), Matrix::of(&saved.x), Matrix::of(&dx), gradient(&norm.gain), dbias]
            });
            let what = format!("{kind:?} {division:?}");
            assert_eq!(join_tokens(division, &each(&parts, 1)), sum, "{what} x + delta");
            let y = join_tokens(division, &each(&parts, 0));
            y.assert_close(&norm_rows(&sum, &gain, &bias, kind, eps), h, 4, &format!("{what} y"));
            join_tokens(division, &each(&parts, 2)).assert_close(&dx.plus(&bypass), h, 4, &format!("{what} dx"));
            join_gradients(division, Split::None, &each(&parts, 3)).assert_close(&dgain, T, 4, &format!("{what} dgain"));
            if kind == NormKind::LayerNorm1P {
                join_gradients(division, Split::None, &each(&parts, 4)).assert_close(&dbias, T, 4, &format!("{what} dbias"));
            }
        }
    }
}

/// Final norm, output layer and cross entropy by their formulas.
#[derive(Clone)]
struct NaiveHead {
    gain: Matrix,
    bias: Matrix,
    w: Matrix,
    vocab_size: usize,
    targets: Vec<u32>,
}

impl NaiveHead {
    /// -ln softmax over the first vocab_size columns, of each token.
    fn losses(&self, x: &Matrix) -> Vec<f64> {
        let logits = norm_rows(x, &self.gain, &self.bias, NormKind::LayerNorm1P, f64::from(1e-5f32)).times(&self.w.transposed());
        let loss = |t: usize| {
            let row = &logits.row(t)[..self.vocab_size];
            row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[self.targets[t] as usize]
        };
        (0..x.rows).map(loss).collect()
    }
}

/// Loss of each token and the gradients of the weighted sum, by the formula and its central differences. 13 of 32 rows are pieces:
/// with four ranks two have only padding. Rows of padding hold numbers that would win any softmax. A token of weight 0 gives
/// nothing.
#[test]
fn vocab_parallel_cross_entropy_never_sees_padding() {
    let (h, vocab, vocab_size) = (6, 32, 13);
    let mut w = Matrix::random("w", vocab, h, 1.0);
    w.values[vocab_size * h..].iter_mut().for_each(|x| *x *= 1000.0);
    let mut targets = random_ids("targets", vocab_size as u64);
    (targets[0], targets[1]) = (12, 0);
    let head = NaiveHead { gain: Matrix::random("gain", 1, h, 0.3), bias: Matrix::random("bias", 1, h, 0.3), w, vocab_size, targets };
    let x = Matrix::random("x", T, h, 1.0);
    let weights: Vec<f32> = (0..T).map(|t| if t % 5 == 2 { 0.0 } else { 0.1 + t as f32 / 16.0 }).collect();
    let loss = |head: &NaiveHead, x: &Matrix| head.losses(x).iter().zip(&weights).map(|(l, &w)| l * f64::from(w)).sum::<f64>();
    let dx = central_differences(&x, |x| loss(&head, x));
    let dgain = central_differences(&head.gain, |gain| loss(&NaiveHead { gain: gain.clone(), ..head.clone() }, &x));
    let dw = central_differences(&head.w, |w| loss(&NaiveHead { w: w.clone(), ..head.clone() }, &x));
    for division in DIVISIONS {
        let parts = on_ranks(division, |rank| {
            let norm = make_norm(rank, NormKind::LayerNorm1P, "norm", &head.gain, &head.bias);
            let mut output = OutputHead { norm, weight: Some(rank.param("w", &head.w, Split::Rows)), vocab_size };
            let batch = batch(&[0; T], &head.targets, &positions(), &weights);
            let (losses, saved) = output.forward(&rank.ctx, Residual::Whole(rank.local(&x)), &batch, None);
            let dx = output.backward(&rank.ctx, &batch, saved, None);
            let losses = Matrix::from_fn(1, T, |_, t| f64::from(losses.losses[t]));
            [losses, Matrix::of(&dx), gradient(output.weight.as_ref().unwrap()), gradient(&output.norm.gain)]
        });
        let what = format!("{division:?}");
        let losses = each(&parts, 0);
        assert!(losses.iter().all(|rank| *rank == losses[0]), "{what}: all ranks know all losses");
        losses[0].assert_close(&Matrix { rows: 1, columns: T, values: head.losses(&x) }, vocab, 4, &format!("{what} losses"));
        join_tokens(division, &each(&parts, 1)).assert_close(&dx, vocab, 8, &format!("{what} dx"));
        let found = join_gradients(division, Split::Rows, &each(&parts, 2));
        found.assert_close(&dw, vocab, 8, &format!("{what} dW"));
        assert!(found.values[vocab_size * h..].iter().all(|&x| x == 0.0), "{what}: padding rows have gradients");
        join_gradients(division, Split::None, &each(&parts, 3)).assert_close(&dgain, vocab, 8, &format!("{what} dgain"));
    }
}

const H: usize = 10;
const HEADS: Heads = Heads { query: 8, kv: 4, dim: 6 };
const F: usize = 16;
const ROTARY: usize = 4;
const ROPE_BASE: f64 = 100.0;

/// A layer's output, input gradient and weight gradients, whole.
struct Passed {
    y: Matrix,
    dx: Matrix,
    gradients: Vec<(String, Matrix)>,
}

impl Passed {
    fn assert_close(&self, expected: &Passed, depth: usize, what: &str) {
        let n_terms = HEADS.query * HEADS.dim; // the longest inner sum
        self.y.assert_close(&expected.y, n_terms, depth, &format!("{what} y"));
        self.dx.assert_close(&expected.dx, n_terms, depth, &format!("{what} dx"));
        for ((name, found), (_, expected)) in self.gradients.iter().zip(&expected.gradients) {
            found.assert_close(expected, n_terms, depth, &format!("{what} d{name}"));
        }
    }
}

/// What one rank has of `Passed`: y, dx, and (name, split, gradient).
type Part = (Matrix, Matrix, Vec<(String, Split, Matrix)>);

fn join(division: (usize, SequenceMode), parts: &[Part]) -> Passed {
    let gradients = (0..parts[0].2.len()).map(|i| {
        let (name, split, _) = &parts[0].2[i];
        let pieces: Vec<Matrix> = parts.iter().map(|part| part.2[i].2.clone()).collect();
        (name.clone(), join_gradients(division, *split, &pieces))
    });
    Passed {
        y: join_tokens(division, &parts.iter().map(|part| part.0.clone()).collect::<Vec<_>>()),
        dx: join_tokens(division, &parts.iter().map(|part| part.1.clone()).collect::<Vec<_>>()),
        gradients: gradients.collect(),
    }
}

fn gradients_of(params: &[&Param]) -> Vec<(String, Split, Matrix)> {
    params.iter().map(|param| (param.spec.name.clone(), param.spec.split, gradient(param))).collect()
}

/// qkv and output projection.
fn attention_weights() -> (Matrix, Matrix) {
    let qkv = Matrix::random("qkv", (HEADS.query + 2 * HEADS.kv) * HEADS.dim, H, 0.5);
    (qkv, Matrix::random("out", H, HEADS.query * HEADS.dim, 0.3))
}

fn make_attention(rank: &Rank) -> Attention {
    let ((qkv, out), tp) = (attention_weights(), rank.layout.tp);
    Attention {
        qkv: ColumnParallelLinear { weight: rank.param("qkv", &qkv, Split::Rows) },
        out: RowParallelLinear { weight: rank.param("out", &out, Split::Columns) },
        heads: Heads { query: HEADS.query / tp, kv: HEADS.kv / tp, dim: HEADS.dim },
        rope: Rope { rotary_dims: ROTARY, base: ROPE_BASE, scaling: None, direction: Direction::Forward },
    }
}

fn attention_on(division: (usize, SequenceMode), positions: &[u32]) -> Passed {
    let (x, dy) = (Matrix::random("x", T, H, 1.0), Matrix::random("dy", T, H, 1.0));
    let parts = on_ranks(division, |rank| {
        let mut attention = make_attention(rank);
        let batch = batch(&[0; T], &[0; T], positions, &[0.0; T]);
        let (x, dy) = (rank.local(&x), rank.local(&dy));
        let (y, saved) = attention.forward(&rank.ctx, &x, &batch);
        let dx = attention.backward(&rank.ctx, &x, &batch, &saved, &dy);
        (Matrix::of(&y), Matrix::of(&dx), gradients_of(&[&attention.qkv.weight, &attention.out.weight]))
    });
    join(division, &parts)
}

/// Attention by its formula: packed rows of G groups (A/G queries, key, value), the first dims of queries and keys rotated in pairs
/// (i, i + 2), softmax over the tokens of the same sequence so far.
fn naive_attention(x: &Matrix, qkv: &Matrix, out: &Matrix) -> Matrix {
    let (packed, positions, d) = (x.times(&qkv.transposed()), positions(), HEADS.dim);
    let rotated = |t: usize, first: usize| -> Vec<f64> {
        let mut head = packed.row(t)[first..first + d].to_vec();
        for i in 0..ROTARY / 2 {
            let angle = f64::from(positions[t]) * ROPE_BASE.powf(-2.0 * i as f64 / ROTARY as f64);
            let (a, b) = (head[i], head[i + ROTARY / 2]);
            (head[i], head[i + ROTARY / 2]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        }
        head
    };
    let per_group = HEADS.query / HEADS.kv;
    let mixed: Vec<Vec<f64>> = (0..T)
        .map(|t| {
            let first_token = STARTS.iter().copied().rfind(|&start| start <= t).unwrap();
            let head = |a: usize| -> Vec<f64> {
                let group = a / per_group * (per_group + 2) * d;
                let query = rotated(t, group + a % per_group * d);
                let score = |s: usize| -> f64 {
                    let key = rotated(s, group + per_group * d);
                    (query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (first_token..=t).map(score).collect();
                let value = |s: usize, i: usize| packed.at(s, group + (per_group + 1) * d + i);
                let sum = |i: usize| scores.iter().enumerate().map(|(s, score)| score * value(first_token + s, i)).sum::<f64>();
                (0..d).map(|i| sum(i) / scores.iter().sum::<f64>()).collect()
            };
            (0..HEADS.query).flat_map(head).collect()
        })
        .collect();
    Matrix { rows: T, columns: HEADS.query * d, values: mixed.concat() }.times(&out.transposed())
}

/// Heads over ranks: output, input gradient and weight gradients are those of the formula. A head that meets another group's keys, a
/// rotation not undone in the backward, or a rank whose part of the output is not summed, differs.
#[test]
fn attention_equals_its_formula() {
    let (x, dy) = (Matrix::random("x", T, H, 1.0), Matrix::random("dy", T, H, 1.0));
    let (qkv, out) = attention_weights();
    let loss = |y: Matrix| y.zip(&dy, |y, dy| y * dy).values.iter().sum::<f64>();
    let expected = Passed {
        y: naive_attention(&x, &qkv, &out),
        dx: central_differences(&x, |x| loss(naive_attention(x, &qkv, &out))),
        gradients: vec![
            ("qkv".into(), central_differences(&qkv, |qkv| loss(naive_attention(&x, qkv, &out)))),
            ("out".into(), central_differences(&out, |out| loss(naive_attention(&x, &qkv, out)))),
        ],
    };
    for division in DIVISIONS {
        attention_on(division, &positions()).assert_close(&expected, 8, &format!("{division:?}"));
    }
}

/// Rotation angles come from a token's position in its sequence, not from its row among the T/tp rows of a rank: the classic
/// silent bug of sequence parallelism. Rows counted from each rank's first would give another function, far outside tolerance.
#[test]
fn rope_positions_are_global_under_sequence_sharding() {
    let whole = attention_on(DIVISIONS[0], &positions());
    for tp in [2, 4] {
        let counted_from_the_first_row_of_a_rank: Vec<u32> = (0..T).map(|t| (t % (T / tp)) as u32).collect();
        let wrong = attention_on(DIVISIONS[0], &counted_from_the_first_row_of_a_rank);
        assert!(wrong.y.distance(&whole.y) > 1e-2, "the test cannot see positions");
        let divided = attention_on((tp, SequenceMode::Sharded), &positions());
        divided.assert_close(&whole, 8, &format!("tp {tp}"));
    }
}

fn make_block(rank: &Rank, kind: NormKind, activation: Activation) -> Block {
    let rows = F * activation.inputs_per_output();
    let norm = |name: &str| {
        let (gain, bias) = (Matrix::random(&format!("{name} gain"), 1, H, 0.3), Matrix::random(&format!("{name} bias"), 1, H, 0.3));
        make_norm(rank, kind, name, &gain.map(|g| if kind == NormKind::RmsNorm { 1.0 + g } else { g }), &bias)
    };
    Block {
        attention_norm: norm("attention_norm"),
        attention: make_attention(rank),
        mlp_norm: norm("mlp_norm"),
        mlp: Mlp {
            up: ColumnParallelLinear { weight: rank.param("up", &Matrix::random("up", rows, H, 0.5), Split::Rows) },
            down: RowParallelLinear { weight: rank.param("down", &Matrix::random("down", H, F, 0.5), Split::Columns) },
            activation,
        },
    }
}

fn block_on(division: (usize, SequenceMode), kind: NormKind, activation: Activation) -> Passed {
    let (x, dy) = (Matrix::random("x", T, H, 1.0), Matrix::random("dy", T, H, 1.0));
    let parts = on_ranks(division, |rank| {
        let mut block = make_block(rank, kind, activation);
        let batch = batch(&[0; T], &[0; T], &positions(), &[0.0; T]);
        let (delta, saved) = block.forward(&rank.ctx, Residual::Whole(rank.local(&x)), &batch);
        let mut y = rank.ctx.take(delta.dims(), delta.dtype());
        rank.ctx.device.copy(&mut y, &delta);
        rank.ctx.device.add(&mut y, saved.stream());
        let mut dx = rank.local(&dy);
        block.backward(&rank.ctx, &batch, &saved, &mut dx);
        let mut params = vec![&block.attention_norm.gain, &block.attention.qkv.weight, &block.attention.out.weight];
        params.extend([&block.mlp_norm.gain, &block.mlp.up.weight, &block.mlp.down.weight]);
        params.extend(block.attention_norm.bias.iter().chain(&block.mlp_norm.bias));
        (Matrix::of(&y), Matrix::of(&dx), gradients_of(&params))
    });
    join(division, &parts)
}

/// A whole block, both families of norm and activation: output, input gradient and all weight gradients of one rank.
#[test]
fn block_divided_equals_whole() {
    for (kind, activation) in [(NormKind::LayerNorm1P, Activation::SquaredRelu), (NormKind::RmsNorm, Activation::Swiglu)] {
        let whole = block_on(DIVISIONS[0], kind, activation);
        for division in &DIVISIONS[1..] {
            block_on(*division, kind, activation).assert_close(&whole, 16, &format!("{kind:?} {division:?}"));
        }
    }
}

/// The feed-forward layer alone against its formula: y = act(x U^T) D^T, gradients by central differences. With SwiGLU gate and up
/// rows alternate, so that a rank's block holds pairs.
#[test]
fn mlp_equals_its_formula() {
    let (x, dy) = (Matrix::random("x", T, H, 1.0), Matrix::random("dy", T, H, 1.0));
    for activation in [Activation::SquaredRelu, Activation::Swiglu] {
        let (up, down) = (Matrix::random("up", F * activation.inputs_per_output(), H, 0.5), Matrix::random("down", H, F, 0.5));
        let naive = |x: &Matrix, up: &Matrix, down: &Matrix| {
            let raised = x.times(&up.transposed());
            let activated = Matrix::from_fn(T, F, |t, f| match activation {
                Activation::SquaredRelu => raised.at(t, f).max(0.0).powi(2),
                Activation::Swiglu => raised.at(t, 2 * f) / (1.0 + (-raised.at(t, 2 * f)).exp()) * raised.at(t, 2 * f + 1),
            });
            activated.times(&down.transposed())
        };
        let loss = |y: Matrix| y.zip(&dy, |y, dy| y * dy).values.iter().sum::<f64>();
        let expected = Passed {
            y: naive(&x, &up, &down),
            dx: central_differences(&x, |x| loss(naive(x, &up, &down))),
            gradients: vec![
                ("up".into(), central_differences(&up, |up| loss(naive(&x, up, &down)))),
                ("down".into(), central_differences(&down, |down| loss(naive(&x, &up, down)))),
            ],
        };
        for division in DIVISIONS {
            let parts = on_ranks(division, |rank| {
                let mut mlp = Mlp {
                    up: ColumnParallelLinear { weight: rank.param("up", &up, Split::Rows) },
                    down: RowParallelLinear { weight: rank.param("down", &down, Split::Columns) },
                    activation,
                };
                let x = rank.local(&x);
                let (y, saved) = mlp.forward(&rank.ctx, &x);
                let dx = mlp.backward(&rank.ctx, &x, &saved, &rank.local(&dy));
                (Matrix::of(&y), Matrix::of(&dx), gradients_of(&[&mlp.up.weight, &mlp.down.weight]))
            });
            join(division, &parts).assert_close(&expected, 4, &format!("{activation:?} {division:?}"));
        }
    }
}
