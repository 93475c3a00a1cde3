//! The numbers of a recipe against each other and against the number of ranks. Each error has both values and names the
//! nearest value that works.

use super::{Pretrain, ScheduleKind};
use crate::error::{Error, Result};
use crate::parallel::layout::ParallelLayout;
use crate::parallel::schedule::MAX_CHUNKS;

impl Pretrain {
    /// The layout on `world` ranks, when everything fits together.
    pub fn check(&self, world: usize) -> Result<ParallelLayout> {
        self.model.check()?;
        self.check_numbers()?;
        self.check_data()?;
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
            ("train.steps", train.steps),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
        ];
        for (key, value) in counts {
            require(value > 0, || (format!("{key} is 0"), "give a positive number".into()))?;
        }
        let positive = [("train.clip_grad_norm", train.clip_grad_norm), ("optimizer.lr", optimizer.lr), ("optimizer.eps", optimizer.eps)];
        for (key, value) in positive {
            require(value > 0.0 && value.is_finite(), || (format!("{key} = {value}"), "give a positive number".into()))?;
        }
        for (key, value) in [("optimizer.min_lr", optimizer.min_lr), ("optimizer.weight_decay", optimizer.weight_decay)] {
            require(value >= 0.0 && value.is_finite(), || (format!("{key} = {value}"), "give 0 or a positive number".into()))?;
        }
        for (key, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            require((0.0..1.0).contains(&value), || {
                (format!("{key} = {value} is outside of 0 <= beta < 1"), "the usual are 0.9 and 0.95".into())
            })?;
        }
        let (lr, min_lr) = (optimizer.lr, optimizer.min_lr);
        require(min_lr <= lr, || {
            (format!("optimizer.min_lr = {min_lr} is above optimizer.lr = {lr}"), format!("set optimizer.min_lr to at most {lr}"))
        })?;
        let (warmup, steps) = (optimizer.warmup_steps, train.steps);
        require(warmup <= steps, || {
            let wrong = format!("optimizer.warmup_steps = {warmup} is more than train.steps = {steps}");
            (wrong, format!("set optimizer.warmup_steps to at most {steps}"))
        })?;
        let (seq_len, max_tokens) = (batch.seq_len, self.model.max_tokens);
        require(seq_len <= max_tokens, || {
            let wrong = format!("batch.seq_len = {seq_len} is more than model.max_tokens = {max_tokens}");
            (wrong, format!("set batch.seq_len to at most {max_tokens}, or raise model.max_tokens"))
        })
    }

    fn check_data(&self) -> Result<()> {
        require(!self.data.train.is_empty(), || ("data.train is empty".into(), "name at least one set of token shards".into()))?;
        for (i, source) in self.data.train.iter().enumerate() {
            let weight = source.weight;
            require(weight > 0.0 && weight.is_finite(), || {
                (format!("data.train.{i}.weight = {weight}"), "give a positive number, or leave the source out".into())
            })?;
            require(!source.shards.as_os_str().is_empty(), || (format!("data.train.{i}.shards is empty"), "name a directory".into()))?;
        }
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
            let name = if kind == ScheduleKind::GPipe { "gpipe" } else { "1f1b" };
            let wrong = format!("parallel.vp = {vp} with parallel.schedule = \"{name}\", which has one chunk a stage");
            (wrong, "set parallel.vp = 1, or parallel.schedule = \"interleaved\"".into())
        })?;
        require(!interleaves || vp >= 2, || {
            let wrong = format!("parallel.vp = {vp} with parallel.schedule = \"interleaved\", which needs at least 2 chunks a stage");
            (wrong, "set parallel.vp = 2, or parallel.schedule = \"1f1b\"".into())
        })?;
        require(vp <= MAX_CHUNKS, || (format!("parallel.vp = {vp}"), format!("set parallel.vp to at most {MAX_CHUNKS}")))?;
        let n_layers = self.model.n_layers;
        require(n_layers % (pp * vp) == 0, || {
            let wrong = format!("parallel.pp x parallel.vp = {pp} x {vp} = {} does not divide model.n_layers = {n_layers}", pp * vp);
            let works_pp = nearest(pp, n_layers, |pp| n_layers % (pp * vp) == 0);
            let works_vp = nearest(vp, n_layers, |vp| n_layers % (pp * vp) == 0 && (!interleaves || vp >= 2));
            let ways = [("pp", works_pp), ("vp", works_vp)];
            let ways: Vec<String> =
                ways.iter().filter(|(_, v)| !v.is_empty()).map(|(key, values)| format!("parallel.{key} = {values}")).collect();
            let remedy = if ways.is_empty() { "change model.n_layers".into() } else { format!("set {}", ways.join(", or ")) };
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

    fn check_batch(&self, dp: usize) -> Result<()> {
        let (micro, global, pp) = (self.batch.micro, self.batch.global, self.parallel.pp);
        let round = dp * micro;
        require(global % round == 0, || {
            let wrong = format!("batch.global = {global} is not a multiple of dp x batch.micro = {dp} x {micro} = {round}");
            (wrong, format!("set batch.global = {}", multiples(global, round)))
        })?;
        let n_micro = global / round;
        let interleaves = self.parallel.schedule == ScheduleKind::Interleaved;
        require(!interleaves || n_micro % pp == 0, || {
            let wrong = format!(
                "batch.global = {global} is {n_micro} micro-batches on each of {dp} replicas, not a multiple of parallel.pp = {pp}, which the \
                 interleaved schedule needs"
            );
            (wrong, format!("set batch.global = {}, or parallel.schedule = \"1f1b\" and parallel.vp = 1", multiples(global, round * pp)))
        })
    }
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
