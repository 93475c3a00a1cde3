//! What a run tells: the resolved plan before step 0, phases and batch sizes as they begin, a line and a row of metrics a step.

use super::profile;
use super::trainer::{HeldOutLoss, StepResult, Trainer, dtype_of};
use crate::comm::agree;
use crate::device::peak;
use crate::error::Result;
use crate::metrics::{self, Row};
use crate::recipe::{Linear, Mode};

impl Trainer<'_> {
    /// The resolved plan as a table, before step 0.
    pub fn print_plan(&self) {
        let (recipe, layout) = (self.job.recipe, self.job.groups.layout);
        let (embeddings, body) = recipe.model.n_params();
        let memory = self.job.device.memory();
        log::info!("device      {}", self.job.device.name());
        log::info!(
            "model       {:.1} M parameters ({:.1} M in embeddings), {} layers x {} wide, {}",
            (embeddings + body) as f64 / 1e6,
            embeddings as f64 / 1e6,
            recipe.model.n_layers,
            recipe.model.hidden,
            dtype_of(recipe).name()
        );
        log::info!(
            "layout      {} ranks = tp {} x pp {} (vp {}) x dp {}; sequence parallel {}",
            layout.world(),
            layout.tp,
            layout.pp,
            layout.vp,
            layout.dp,
            if recipe.parallel.sequence_parallel { "on" } else { "off" }
        );
        let (parallel, layers) = (&recipe.parallel, recipe.stages().expect("a checked recipe").counts().to_vec());
        let overlap = if parallel.overlap { "overlap with computation" } else { "are waited for at once" };
        log::info!("pipeline    {}, layers of each chunk {layers:?}; exchanges {overlap}", parallel.schedule.name());
        log::info!("recompute   {}", recipe.train.recompute);
        for stretch in self.plan.stretches() {
            let batch = self.batch(stretch.global);
            log::info!(
                "steps       {}..{} of phase {}: {} samples x {} tokens, {} micro-batches of {} on each replica",
                stretch.first_step + 1,
                stretch.first_step + stretch.n_steps,
                self.data.phases[stretch.phase].name,
                batch.global,
                batch.seq_len,
                batch.n_micro(),
                batch.micro
            );
        }
        if recipe.numerics.mode == Mode::Reproducible {
            let dp = self.job.groups.layout.dp;
            let n_blocks = self.plan.stretches().iter().map(|stretch| recipe.numerics.blocks(stretch.global)).max().unwrap_or(1);
            let more = (n_blocks / dp).max(1).ilog2();
            log::info!("numerics    reproducible: the samples of a step in {n_blocks} blocks, {more} more gradients on each rank");
        }
        let scales = match recipe.numerics.linear {
            Linear::Stored => None,
            Linear::Fp8 => Some("a scale for each token and channel"),
            Linear::Fp8Tensor => Some("one scale for each tensor"),
        };
        if let Some(scales) = scales {
            log::info!("linear      in E4M3, {scales}: outputs and gradients of inputs of the blocks' four linear layers");
        }
        for phase in &self.data.phases {
            log::info!("data        phase {}: {} tokens a pass, order {}", phase.name, phase.order.n_tokens(), phase.order.fingerprint());
        }
        log::info!(
            "memory      {:.1} MiB of weights, gradients and optimizer state on this rank",
            memory.live_bytes as f64 / (1 << 20) as f64
        );
        log::info!("ceiling     {:.0} GFLOP/s of matrix product over all ranks, measured now", self.ceiling.gemm_flops_per_s / 1e9);
        self.print_flops();
    }

    /// By which formula and which peak utilization is meant.
    fn print_flops(&self) {
        let (recipe, seq_len) = (self.job.recipe, self.job.recipe.batch.seq_len);
        log::info!(
            "flops       {:.4} GFLOP a token = 6 x (weights of products + 2 x layers x heads x head_dim x seq_len): forward and backward, \
             attention counted in full (not causal), recompute not counted",
            recipe.model.train_flops(seq_len, seq_len) / seq_len as f64 / 1e9
        );
        match self.stated_flops_per_s() {
            Some(all) => log::info!(
                "peak        {:.0} TFLOP/s of {} stated for {}: mfu is over this; share_of_gemm_ceiling over the ceiling",
                all / 1e12,
                dtype_of(recipe).name(),
                self.job.device.name()
            ),
            None => log::info!("peak        none stated for this device: utilization is over the ceiling"),
        }
    }

    /// The stated rate of all ranks' devices.
    fn stated_flops_per_s(&self) -> Option<f64> {
        let of_one = peak::stated_flops_per_s(&self.job.device.name(), dtype_of(self.job.recipe))?;
        Some(of_one * self.job.groups.world.size() as f64)
    }

    /// Says when the next step is the first of another phase or batch size.
    pub fn announce(&self) {
        let stretches = self.plan.stretches();
        let next = self.state.step;
        let Some(at) = stretches.iter().position(|stretch| stretch.first_step == next).filter(|&at| at > 0) else { return };
        let (before, now) = (&stretches[at - 1], &stretches[at]);
        if before.phase != now.phase {
            let phase = &self.job.recipe.phases()[now.phase];
            let from = &self.data.phases[before.phase].name;
            let rate = phase.lr.at(now.global as u64);
            log::info!(
                "step {}: phase {} follows phase {from}: {} samples, learning rate from {rate:.2e} to {:.2e}, order {}",
                next + 1,
                phase.name,
                phase.lr.samples,
                phase.lr.at(phase.lr.samples),
                self.data.phases[now.phase].order.fingerprint()
            );
        }
        if before.global != now.global {
            log::info!("step {}: {} samples a step from here, {} before", next + 1, now.global, before.global);
        }
    }

    /// Held-out loss in bits a byte of the text, when its shards know how long it is.
    fn bits_per_byte(&self, loss: f64) -> Option<f64> {
        let bytes_per_token = self.data.validation.as_ref().and_then(|held_out| held_out.bytes_per_token);
        bytes_per_token.map(|bytes| loss / std::f64::consts::LN_2 / bytes)
    }

    /// Measures what the job before was asked to stop in the middle of, and writes the row of that step again with it. Collective.
    pub fn make_up_held_out_loss(&mut self) -> Result<()> {
        let Some(row) = self.owed.clone() else { return Ok(()) };
        let HeldOutLoss::Measured(loss) = self.held_out_loss()? else { return Ok(()) };
        log::info!("step {:>6}/{} held-out loss {loss:.4}, which the job before left open", row.step, self.plan.n_steps());
        self.owed = None;
        let row = Row { validation_loss: Some(loss), validation_bits_per_byte: self.bits_per_byte(loss), ..row };
        agree(&*self.job.groups.world, self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.append(&row)))
    }

    /// A line and a row. Collective.
    pub fn report(&mut self, result: &StepResult, held_out: HeldOutLoss) -> Result<()> {
        let world = &*self.job.groups.world;
        let recipe = self.job.recipe;
        let after = self.job.groups.flight.take_times();
        let profile = profile::of_all_ranks(self.job.groups, result, &after, self.job.device.memory().peak_bytes);
        let step_s = profile.step_s;
        let flops_per_s = recipe.model.train_flops(result.n_tokens, recipe.batch.seq_len) / step_s;
        let held_out_loss = if let HeldOutLoss::Measured(loss) = held_out { Some(loss) } else { None };
        let row = Row {
            step: self.state.step,
            consumed_tokens: self.state.consumed_samples * recipe.batch.seq_len as u64,
            loss: result.loss,
            grad_norm: result.grad_norm,
            lr: result.lr,
            step_s,
            tokens_per_s: result.n_tokens as f64 / step_s,
            tflops: flops_per_s / 1e12,
            share_of_gemm_ceiling: flops_per_s / self.ceiling.gemm_flops_per_s,
            mfu: self.stated_flops_per_s().map(|peak| flops_per_s / peak),
            memory_peak_bytes: profile.memory_peak_bytes,
            validation_loss: held_out_loss,
            validation_bits_per_byte: held_out_loss.and_then(|loss| self.bits_per_byte(loss)),
            time: Some(profile.time),
            unix_s: metrics::now_unix_s(),
        };
        self.owed = (held_out == HeldOutLoss::Interrupted).then(|| row.clone());
        let held_out = match held_out {
            HeldOutLoss::NotDue => String::new(),
            HeldOutLoss::Measured(loss) => format!(", held-out loss {loss:.4}"),
            HeldOutLoss::Interrupted => ", held-out loss left to the next job".into(),
        };
        let mfu = row.mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
        log::info!(
            "step {:>6}/{} loss {:.4} grad norm {:.3} lr {:.2e} {:.0} tokens/s, {:.0} % of GEMM ceiling{mfu}{held_out}",
            row.step,
            self.plan.n_steps(),
            row.loss,
            row.grad_norm,
            row.lr,
            row.tokens_per_s,
            100.0 * row.share_of_gemm_ceiling
        );
        if let Some(reason) = result.skipped.as_ref().filter(|_| world.rank() == 0) {
            let taken = self.plan.step(self.state.step - 1);
            let (first, name) = (taken.first_in_phase, &self.data.phases[taken.phase].name);
            let end = first + taken.global as u64;
            log::warn!("step {} skipped, weights are as before it: {reason}; samples {first}..{end} of phase {name}", row.step);
        }
        let written = self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.append(&row));
        agree(world, written)
    }
}
