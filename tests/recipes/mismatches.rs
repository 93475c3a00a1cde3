//! Numbers of a recipe that do not fit each other or the ranks: both values, and one that works.

use super::*;

/// Every mismatch of numbers is refused with both values, and the value offered instead works.
#[test]
fn mismatches_offer_values_that_work() {
    type Change = fn(&mut Pretrain);
    let cases: &[(Change, usize, &str)] = &[
        (|r| r.parallel.tp = 3, 12, "parallel.tp = 3 does not divide model.n_heads = 8; set parallel.tp = 2 or 4"),
        (|r| r.parallel.tp = 8, 16, "parallel.tp = 8 does not divide model.n_kv_heads = 4; set parallel.tp = 4"),
        (
            |r| (r.model.ffn_hidden, r.parallel.tp) = (130, 4),
            16,
            "parallel.tp = 4 does not divide model.ffn_hidden = 130; set parallel.tp = 2",
        ),
        (
            |r| (r.model.vocab_size, r.model.vocab_divisor, r.parallel.tp) = (501, 1, 2),
            8,
            "parallel.tp = 2 does not divide the padded vocabulary = 501; set parallel.tp = 1",
        ),
        (|r| (r.batch.seq_len, r.batch.micro) = (31, 1), 8, "parallel.tp = 2 does not divide batch.micro x batch.seq_len"),
        (|r| r.parallel.pp = 3, 12, "parallel.pp x parallel.vp = 3 x 1 = 3 does not divide model.n_layers = 4; set parallel.pp = 2 or 4"),
        (|r| r.parallel.vp = 2, 8, "parallel.vp = 2 with parallel.schedule = \"1f1b\""),
        (
            |r| (r.parallel.vp, r.parallel.schedule) = (2, ScheduleKind::ZeroBubbleH1),
            8,
            "parallel.vp = 2 with parallel.schedule = \"zb-h1\", which has one chunk a stage; set parallel.vp = 1",
        ),
        (
            |r| r.parallel.layers = Some(Layers::List(vec![1, 2])),
            8,
            "parallel.layers = [1, 2] adds up to 3, model.n_layers is 4; set parallel.layers = [2, 2]",
        ),
        (
            |r| r.parallel.layers = Some(Layers::List(vec![4])),
            8,
            "parallel.layers has 1 numbers for parallel.pp x parallel.vp = 2 x 1 chunks; set parallel.layers = [2, 2]",
        ),
        (
            |r| (r.parallel.pp, r.parallel.layers) = (3, Some(Layers::List(vec![2, 0, 2]))),
            12,
            "parallel.layers = [2, 0, 2] leaves chunk 1 empty",
        ),
        (
            |r| (r.parallel.pp, r.parallel.layers) = (7, Some(Layers::Auto)),
            28,
            "model.n_layers = 4 leave some of the 5 inner chunks of parallel.pp x parallel.vp = 7 x 1 empty; set parallel.pp to at most 6",
        ),
        (|r| r.parallel.layers = Some(Layers::Weighed(EndWeights { embedding: -1.0, head: 0.0 })), 8, "parallel.layers.embedding = -1"),
        (
            |r| r.train.recompute = full(&["0-4"]),
            8,
            "train.recompute.0.layers = \"0-4\" is no range; write first..end, e.g. \"0..4\" for the first four",
        ),
        (
            |r| r.train.recompute = full(&["2..5"]),
            8,
            "train.recompute.0.layers = \"2..5\" is empty or outside of the layers 0..4 of the model; set it to \"2..4\"",
        ),
        (|r| r.train.recompute = full(&["3..3"]), 8, "set it to \"0..4\""),
        (
            |r| r.train.recompute = full(&["0..2", "1..4"]),
            8,
            "train.recompute.1.layers = \"1..4\" has layer 1, which is in train.recompute.0 as well",
        ),
        (|r| r.parallel.schedule = ScheduleKind::Interleaved, 8, "parallel.vp = 1 with parallel.schedule = \"interleaved\""),
        (
            |r| (r.parallel.schedule, r.parallel.vp, r.batch.global) = (ScheduleKind::Interleaved, 2, 12),
            8,
            "batch.global = 12 is 3 micro-batches on each of 2 replicas, not a multiple of parallel.pp = 2, which the interleaved \
             schedule needs; set batch.global = 8 or 16",
        ),
        (|r| r.batch.global = 18, 8, "batch.global = 18 is not a multiple of dp x batch.micro = 2 x 2 = 4; set batch.global = 16 or 20"),
        (|r| r.batch.global = 3, 8, "set batch.global = 4"),
        (|_| {}, 6, "6 ranks are not a multiple of parallel.tp x pp = 2 x 2 = 4; start 4 or 8 ranks"),
        (|r| r.parallel.dp = Some(3), 8, "8 ranks, but parallel.tp x pp x dp = 2 x 2 x 3 = 12; start 12 ranks, or set parallel.dp = 2"),
        (|r| r.batch.seq_len = 128, 8, "batch.seq_len = 128 is more than model.max_tokens = 64; set batch.seq_len to at most 64"),
        (|r| r.batch.micro = 0, 8, "batch.micro is 0"),
        (|r| r.parallel.tp = 0, 8, "parallel.tp is 0"),
        (|r| r.train.samples = 0, 8, "train.samples is 0"),
        (|r| r.checkpoint.every_steps = 0, 8, "checkpoint.every_steps is 0"),
        (|r| r.optimizer.lr = -1e-3, 8, "optimizer.lr = -0.001"),
        (|r| r.optimizer.lr = f64::NAN, 8, "optimizer.lr = NaN"),
        (|r| r.optimizer.min_lr = 1.0, 8, "optimizer.min_lr = 1 is above optimizer.lr = 0.001"),
        (|r| r.optimizer.beta2 = 1.0, 8, "optimizer.beta2 = 1 is outside of 0 <= beta < 1"),
        (|r| r.optimizer.warmup_samples = 1601, 8, "optimizer.warmup_samples = 1601 is more than train.samples = 1600"),
        (
            |r| (r.optimizer.decay, r.optimizer.warmup_samples) = (LrDecay::InverseSqrt, 0),
            8,
            "optimizer.decay = \"inverse_sqrt\" with optimizer.warmup_samples = 0",
        ),
        (
            |r| r.optimizer.decay = LrDecay::Wsd(Wsd { samples: 1441, shape: DecayShape::Linear }),
            8,
            "optimizer.decay.wsd.samples = 1441, warm-up leaves 1440 of train.samples = 1600; give at least 1 and at most 1440",
        ),
        (|r| r.batch.ramp = ramp(&[(100, 8), (100, 12)]), 8, "batch.ramp.1.until_sample = 100 is not above 100"),
        (|r| r.batch.ramp = ramp(&[(0, 8)]), 8, "batch.ramp.0.until_sample = 0 is not above 0"),
        (|r| r.batch.ramp = ramp(&[(100, 0)]), 8, "batch.ramp.0.global is 0"),
        (|r| (r.batch.ramp, r.batch.global) = (ramp(&[(100, 6)]), 18), 8, "batch.global = 18 is not a multiple of dp x batch.micro"),
        (|r| r.phase = vec![Phase { samples: 0, ..added_phase(1.0) }], 8, "phase.0.samples is 0"),
        (|r| r.phase = vec![Phase { min_lr: 2.0, ..added_phase(1.0) }], 8, "phase.0.min_lr = 2 is above phase.0.lr = 1"),
        (
            |r| r.phase = vec![added_phase(1.0), added_phase(1.0)],
            8,
            "phase.1.name = \"final\", which is empty or the name of another phase",
        ),
        (|r| r.phase = vec![Phase { name: "main".into(), ..added_phase(1.0) }], 8, "phase.0.name = \"main\""),
        (
            |r| {
                r.phase = vec![added_phase(1.0)];
                r.phase[0].data.train[0].weight = -1.0;
            },
            8,
            "phase.0.data.train.0.weight = -1",
        ),
        (|r| r.health.window = 0, 8, "health.window is 0"),
        (|r| r.health.loss_z = f64::INFINITY, 8, "health.loss_z = inf"),
        (|r| r.health.max_grad_norm = Some(0.0), 8, "health.max_grad_norm = 0"),
        (|r| r.start = Some(Start { checkpoint: "".into(), moments: Moments::Keep }), 8, "start.checkpoint is empty"),
        (|r| r.data.train[1].weight = 0.0, 8, "data.train.1.weight = 0"),
        (|r| r.data.train.clear(), 8, "data.train is empty"),
        (|r| r.validation.as_mut().expect("has one").samples = 0, 8, "validation.samples is 0"),
        (
            |r| r.model.head = HeadKind::Reward(5),
            8,
            "pretraining predicts tokens, a reward head reads 5 attributes; set model.head = \"vocabulary\"",
        ),
        (|r| r.model.n_layers = 2_000_000_000, 8, "model.n_layers = 2000000000, at most 10000 are possible"),
        (|r| r.model.head = HeadKind::Reward(0), 8, "model.head has 0 reward attributes"),
        (
            |r| (r.numerics.mode, r.parallel.schedule) = (Mode::Reproducible, ScheduleKind::GPipe),
            8,
            "numerics.mode = \"reproducible\": parallel.schedule = \"gpipe\" runs the backwards from the last micro-batch to the first; \
             set parallel.schedule = \"1f1b\", or numerics.mode = \"fast\"",
        ),
        (
            |r| (r.numerics.mode, r.batch.micro) = (Mode::Reproducible, 1),
            64,
            "16 replicas do not divide the 8 blocks of 16 samples; set numerics.batch_blocks = 16",
        ),
        (
            |r| (r.numerics.mode, r.batch.global) = (Mode::Reproducible, 24),
            12,
            "3 replicas do not divide the 8 blocks of 24 samples; take 2 or 4 replicas",
        ),
        (|r| r.numerics.batch_blocks = 6, 8, "numerics.batch_blocks = 6 is not a power of two; set numerics.batch_blocks = 8"),
        (
            |r| {
                r.numerics.mode = Mode::Reproducible;
                (r.model.n_heads, r.model.n_kv_heads, r.model.ffn_hidden, r.model.vocab_divisor) = (6, 6, 120, 96);
                (r.parallel.tp, r.batch.seq_len) = (3, 33);
            },
            12,
            "parallel.tp = 3 does not divide the 8 pieces of each sum; set parallel.tp to 1, 2, 4 or 8",
        ),
        (|r| r.model.n_kv_heads = 3, 8, "model.n_kv_heads = 3 does not divide model.n_heads = 8"),
    ];
    for (change, world, expected) in cases {
        let mut recipe = sound();
        change(&mut recipe);
        let error = recipe.check(*world).expect_err(expected);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "expected: {expected}\n   found: {error}");
    }
}

/// The offered tp, pp and batch really pass, over many wrong ones (the world is adjusted to them).
#[test]
fn offered_values_pass() {
    for wrong_tp in 1..=9 {
        for wrong_pp in 1..=5 {
            for wrong_global in [1, 6, 7, 16, 50] {
                let mut recipe = sound();
                (recipe.parallel.tp, recipe.parallel.pp, recipe.batch.global) = (wrong_tp, wrong_pp, wrong_global);
                for _ in 0..4 {
                    let world = recipe.parallel.tp * recipe.parallel.pp * 2;
                    let Err(error) = recipe.check(world) else { break };
                    let line = error.to_string();
                    let (_, offer) = line.rsplit_once("; set ").expect("an offer");
                    let (key, values) = offer.split_once(" = ").expect("key = value");
                    let value: usize = values.split([' ', ',']).next().expect("a part").parse().expect("a number");
                    match key {
                        "parallel.tp" => recipe.parallel.tp = value,
                        "parallel.pp" => recipe.parallel.pp = value,
                        "batch.global" => recipe.batch.global = value,
                        other => panic!("{other}: {line}"),
                    }
                }
                recipe.check(recipe.parallel.tp * recipe.parallel.pp * 2).expect("after following the offers");
            }
        }
    }
}
