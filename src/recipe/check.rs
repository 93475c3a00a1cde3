//! The numbers of a recipe against each other and against the number of ranks. Each error has both values and names the
//! nearest value that works.

use super::{Data, LrDecay, LrSchedule, Pretrain, ScheduleKind};
use crate::error::{Error, Result};
use crate::model::config::HeadKind;
use crate::parallel::layout::ParallelLayout;
use crate::parallel::schedule::MAX_CHUNKS;

impl Pretrain {
    /// The layout on `world` ranks, when everything fits together.
    pub fn check(&self, world: usize) -> Result<ParallelLayout> {
        self.model.check()?;
        if let HeadKind::Reward(n) = self.model.head {
            let wrong = format!("model.head = {{ reward = {n} }}: pretraining predicts tokens, a reward head reads {n} attributes");
            return Err(Error::recipe(wrong).remedy("set model.head = \"vocabulary\""));
        }
        self.check_numbers()?;
        self.check_ramp()?;
        self.check_phases()?;
        self.check_health()?;
        self.observe.check()?;
        self.check_validation()?;
        self.check_checkpoint()?;
        let tokens = self.batch.micro * self.batch.seq_len;
        let tp = self.parallel.tp;
        self.check_tensor_parallel(tokens)?;
        self.check_pipeline()?;
        let dp = self.replicas(world)?;
        self.check_batch(dp)?;
        Ok(ParallelLayout { tp, pp: self.parallel.pp, dp, vp: self.parallel.vp })
    }

    fn check_numbers(&self) -> Result<()> {
        let (parallel, batch, train, optimizer) = (&self.parallel, &self.batch, &self.train, &self.optimizer);
        let counts = [
            ("parallel.tp", parallel.tp as u64),
            ("parallel.pp", parallel.pp as u64),
            ("parallel.dp", parallel.dp.unwrap_or(1) as u64),
            ("parallel.vp", parallel.vp as u64),
            ("batch.seq_len", batch.seq_len as u64),
            ("batch.micro", batch.micro as u64),
            ("batch.global", batch.global as u64),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
            ("checkpoint.keep_last", self.checkpoint.keep_last.unwrap_or(1) as u64),
            ("checkpoint.keep_every", self.checkpoint.keep_every.unwrap_or(1)),
        ];
        for (key, value) in counts {
            require(value > 0, || (format!("{key} is 0"), "give a positive number".into()))?;
        }
        let positive = [("train.clip_grad_norm", train.clip_grad_norm), ("optimizer.eps", optimizer.eps)];
        for (key, value) in positive {
            require(value > 0.0 && value.is_finite(), || (format!("{key} = {value}"), "give a positive number".into()))?;
        }
        let decay = optimizer.weight_decay;
        require(decay >= 0.0 && decay.is_finite(), || (format!("optimizer.weight_decay = {decay}"), "give 0 or a positive number".into()))?;
        for (key, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            require((0.0..1.0).contains(&value), || {
                (format!("{key} = {value} is outside of 0 <= beta < 1"), "the usual are 0.9 and 0.95".into())
            })?;
        }
        let (seq_len, max_tokens) = (batch.seq_len, self.model.max_tokens);
        require(seq_len <= max_tokens, || {
            let wrong = format!("batch.seq_len = {seq_len} is more than model.max_tokens = {max_tokens}");
            (wrong, format!("set batch.seq_len to at most {max_tokens}, or raise model.max_tokens"))
        })
    }

    fn check_ramp(&self) -> Result<()> {
        let mut before = 0;
        for (i, stage) in self.batch.ramp.iter().enumerate() {
            require(stage.global > 0, || (format!("batch.ramp.{i}.global is 0"), "give a positive number".into()))?;
            require(stage.until_sample > before, || {
                let wrong = format!("batch.ramp.{i}.until_sample = {} is not above {before}, where it begins", stage.until_sample);
                (wrong, format!("set batch.ramp.{i}.until_sample above {before}, or leave that stage out"))
            })?;
            before = stage.until_sample;
        }
        Ok(())
    }

    /// Each phase: the main one goes by [train], [optimizer] and [data], the others by `phase.N`.
    fn check_phases(&self) -> Result<()> {
        let mut names: Vec<&str> = Vec::new();
        for (i, phase) in self.phases().iter().enumerate() {
            let (length, rate, data) = match i.checked_sub(1) {
                None => ("train".into(), "optimizer".into(), "data".into()),
                Some(i) => (format!("phase.{i}"), format!("phase.{i}"), format!("phase.{i}.data")),
            };
            require(phase.lr.samples > 0, || (format!("{length}.samples is 0"), "give a positive number".into()))?;
            require(!phase.name.is_empty() && !names.contains(&phase.name), || {
                let wrong = format!("{length}.name = \"{}\", which is empty or the name of another phase", phase.name);
                (wrong, format!("give it a name of its own, other than \"{}\"", names.join("\", \"")))
            })?;
            names.push(phase.name);
            check_rate(&phase.lr, &length, &rate)?;
            check_data(phase.data, &data)?;
        }
        if let Some(start) = &self.start {
            require(!start.checkpoint.as_os_str().is_empty(), || {
                ("start.checkpoint is empty".into(), "name a checkpoint or a run".into())
            })?;
        }
        Ok(())
    }

    fn check_health(&self) -> Result<()> {
        let health = &self.health;
        for (key, value) in [("window", health.window), ("max_skips_in_window", health.max_skips_in_window)] {
            require(value > 0, || (format!("health.{key} is 0"), "give a positive number".into()))?;
        }
        let z = health.loss_z;
        require(z >= 0.0 && z.is_finite(), || (format!("health.loss_z = {z}"), "give a positive number, or 0 for never".into()))?;
        let norm = health.max_grad_norm.unwrap_or(1.0);
        require(norm > 0.0 && norm.is_finite(), || {
            (format!("health.max_grad_norm = {norm}"), "give a positive number, or leave it out for never".into())
        })
    }

    fn check_checkpoint(&self) -> Result<()> {
        let checkpoint = &self.checkpoint;
        require(checkpoint.keep_every.is_none() || checkpoint.keep_last.is_some(), || {
            let wrong = "checkpoint.keep_every without checkpoint.keep_last: all checkpoints stay";
            (wrong.into(), "set checkpoint.keep_last too, or leave keep_every out".into())
        })?;
        let margin_s = checkpoint.margin_s;
        require((0.0..=1e9).contains(&margin_s), || (format!("checkpoint.margin_s = {margin_s}"), "give 0 or a positive number".into()))
    }

    fn check_validation(&self) -> Result<()> {
        if let Some(validation) = &self.validation {
            require(validation.every_steps > 0, || {
                ("validation.every_steps is 0".into(), "give a positive number, or leave [validation] out".into())
            })?;
            require(validation.samples > 0, || {
                ("validation.samples is 0".into(), "give a positive number, or leave [validation] out".into())
            })?;
            require(!validation.shards.as_os_str().is_empty(), || ("validation.shards is empty".into(), "name a directory".into()))?;
        }
        Ok(())
    }

    fn check_tensor_parallel(&self, tokens: usize) -> Result<()> {
        let (model, tp) = (&self.model, self.parallel.tp);
        let mut divided = vec![
            ("model.n_heads", model.n_heads),
            ("model.n_kv_heads", model.n_kv_heads),
            ("model.ffn_hidden", model.ffn_hidden),
            ("the padded vocabulary", model.padded_vocab()),
        ];
        if self.parallel.sequence_parallel {
            divided.push(("batch.micro x batch.seq_len (with sequence_parallel)", tokens));
        }
        let works = |tp: usize| divided.iter().all(|&(_, n)| n % tp == 0);
        for &(what, n) in &divided {
            require(n % tp == 0, || {
                (
                    format!("parallel.tp = {tp} does not divide {what} = {n}"),
                    format!("set parallel.tp = {}", nearest(tp, model.n_heads, works)),
                )
            })?;
        }
        Ok(())
    }

    fn check_pipeline(&self) -> Result<()> {
        let (pp, vp, kind) = (self.parallel.pp, self.parallel.vp, self.parallel.schedule);
        let interleaves = kind == ScheduleKind::Interleaved;
        require(interleaves || vp == 1, || {
            let wrong = format!("parallel.vp = {vp} with parallel.schedule = \"{}\", which has one chunk a stage", kind.name());
            (wrong, "set parallel.vp = 1, or parallel.schedule = \"interleaved\"".into())
        })?;
        require(!interleaves || vp >= 2, || {
            let wrong = format!("parallel.vp = {vp} with parallel.schedule = \"interleaved\", which needs at least 2 chunks a stage");
            (wrong, "set parallel.vp = 2, or parallel.schedule = \"1f1b\"".into())
        })?;
        require(vp <= MAX_CHUNKS, || (format!("parallel.vp = {vp}"), format!("set parallel.vp to at most {MAX_CHUNKS}")))?;
        let n_layers = self.model.n_layers;
        self.train.recompute.of_layers(n_layers)?;
        self.stages()?;
        let is_even = self.parallel.layers.is_none();
        require(!is_even || n_layers % (pp * vp) == 0, || {
            let wrong = format!("parallel.pp x parallel.vp = {pp} x {vp} = {} does not divide model.n_layers = {n_layers}", pp * vp);
            let works_pp = nearest(pp, n_layers, |pp| n_layers % (pp * vp) == 0);
            let works_vp = nearest(vp, n_layers, |vp| n_layers % (pp * vp) == 0 && (!interleaves || vp >= 2));
            let ways = [("pp", works_pp), ("vp", works_vp)];
            let ways: Vec<String> =
                ways.iter().filter(|(_, v)| !v.is_empty()).map(|(key, values)| format!("parallel.{key} = {values}")).collect();
            let auto = "parallel.layers = \"auto\"";
            let remedy = if ways.is_empty() { format!("set {auto}") } else { format!("set {}, or {auto}", ways.join(", or ")) };
            (wrong, remedy)
        })
    }

    /// Replicas on `world` ranks.
    fn replicas(&self, world: usize) -> Result<usize> {
        let (tp, pp) = (self.parallel.tp, self.parallel.pp);
        let one = tp * pp;
        if let Some(dp) = self.parallel.dp {
            require(one * dp == world, || {
                let wrong = format!("{world} ranks, but parallel.tp x pp x dp = {tp} x {pp} x {dp} = {}", one * dp);
                let start = format!("start {} ranks", one * dp);
                (wrong, if world % one == 0 { format!("{start}, or set parallel.dp = {}", world / one) } else { start })
            })?;
            return Ok(dp);
        }
        require(world % one == 0, || {
            let wrong = format!("{world} ranks are not a multiple of parallel.tp x pp = {tp} x {pp} = {one}");
            (wrong, format!("start {} ranks, or change tp and pp", multiples(world, one)))
        })?;
        Ok(world / one)
    }

    /// A ramp may have batches that another number of replicas is for: one that fits is enough here. Those that a job meets are
    /// checked when it is known where it begins, by [`Pretrain::check_batch_size`].
    fn check_batch(&self, dp: usize) -> Result<()> {
        let fits = self.batch.ramp.iter().any(|stage| self.check_batch_size(dp, stage.global).is_ok());
        if fits { Ok(()) } else { self.check_batch_size(dp, self.batch.global) }
    }

    /// Whether a batch of the recipe divides over `dp` replicas and their pipelines.
    pub fn check_batch_size(&self, dp: usize, global: usize) -> Result<()> {
        let stage = self.batch.ramp.iter().position(|stage| stage.global == global);
        let key = stage.map_or("batch.global".into(), |i| format!("batch.ramp.{i}.global"));
        let (micro, pp) = (self.batch.micro, self.parallel.pp);
        let round = dp * micro;
        require(global % round == 0, || {
            let wrong = format!("{key} = {global} is not a multiple of dp x batch.micro = {dp} x {micro} = {round}");
            (wrong, format!("set {key} = {}", multiples(global, round)))
        })?;
        let n_micro = global / round;
        let interleaves = self.parallel.schedule == ScheduleKind::Interleaved;
        require(!interleaves || n_micro % pp == 0, || {
            let wrong = format!(
                "{key} = {global} is {n_micro} micro-batches on each of {dp} replicas, not a multiple of parallel.pp = {pp}, which the \
                 interleaved schedule needs"
            );
            (wrong, format!("set {key} = {}, or parallel.schedule = \"1f1b\" and parallel.vp = 1", multiples(global, round * pp)))
        })?;
        self.check_numerics(dp, global)
    }
}

/// The learning rate of a phase. `length` is the table of its samples, `rate` that of the other keys.
fn check_rate(schedule: &LrSchedule, length: &str, rate: &str) -> Result<()> {
    let &LrSchedule { lr, min_lr, warmup_samples: warmup, decay, samples } = schedule;
    require(lr > 0.0 && lr.is_finite(), || (format!("{rate}.lr = {lr}"), "give a positive number".into()))?;
    require(min_lr >= 0.0 && min_lr.is_finite(), || (format!("{rate}.min_lr = {min_lr}"), "give 0 or a positive number".into()))?;
    require(min_lr <= lr, || {
        (format!("{rate}.min_lr = {min_lr} is above {rate}.lr = {lr}"), format!("set {rate}.min_lr to at most {lr}"))
    })?;
    require(warmup <= samples, || {
        let wrong = format!("{rate}.warmup_samples = {warmup} is more than {length}.samples = {samples}");
        (wrong, format!("set {rate}.warmup_samples to at most {samples}"))
    })?;
    match decay {
        LrDecay::InverseSqrt => require(warmup > 0, || {
            let wrong = format!("{rate}.decay = \"inverse_sqrt\" with {rate}.warmup_samples = 0, from which it is measured");
            (wrong, format!("set {rate}.warmup_samples to at least 1"))
        }),
        LrDecay::Wsd(wsd) => require((1..=samples - warmup).contains(&wsd.samples), || {
            let room = samples - warmup;
            let wrong = format!("{rate}.decay.wsd.samples = {}, warm-up leaves {room} of {length}.samples = {samples}", wsd.samples);
            (wrong, format!("give at least 1 and at most {room}"))
        }),
        LrDecay::Constant | LrDecay::Linear | LrDecay::Cosine => Ok(()),
    }
}

/// The blend at the table `at`.
fn check_data(data: &Data, at: &str) -> Result<()> {
    require(!data.train.is_empty(), || (format!("{at}.train is empty"), "name at least one set of token shards".into()))?;
    for (i, source) in data.train.iter().enumerate() {
        let weight = source.weight;
        require(weight > 0.0 && weight.is_finite(), || {
            (format!("{at}.train.{i}.weight = {weight}"), "give a positive number, or leave the source out".into())
        })?;
        require(!source.shards.as_os_str().is_empty(), || (format!("{at}.train.{i}.shards is empty"), "name a directory".into()))?;
    }
    Ok(())
}

fn require(holds: bool, complaint: impl FnOnce() -> (String, String)) -> Result<()> {
    if holds {
        return Ok(());
    }
    let (wrong, remedy) = complaint();
    Err(Error::recipe(wrong).remedy(remedy))
}

/// The nearest positive multiples of `unit` below and above `n`: "8 or 16".
fn multiples(n: usize, unit: usize) -> String {
    let (below, above) = (n / unit * unit, n.next_multiple_of(unit));
    if below == 0 { format!("{above}") } else { format!("{below} or {above}") }
}

/// The nearest values below and above `n`, up to `most`, that work: "2 or 4"; empty when none does.
fn nearest(n: usize, most: usize, works: impl Fn(usize) -> bool) -> String {
    let below = (1..n).rev().find(|&candidate| works(candidate));
    let above = (n + 1..=most).find(|&candidate| works(candidate));
    below.into_iter().chain(above).map(|value| value.to_string()).collect::<Vec<_>>().join(" or ")
}
