//! What a run was trained on: the token ledger (`train::ledger`) together with the order of the samples (`data::order`), which is
//! computed again from the recipe and the shards.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use trireme::checkpoint;
use trireme::data::order::DataOrder;
use trireme::data::origin::each_origin;
use trireme::data::shards::{Split, TokenShards};
use trireme::error::{Error, Result};
use trireme::recipe::Pretrain;
use trireme::train::ledger::{Entry, Ledger};
use trireme::train::run_dir;

/// What is asked.
#[derive(clap::Args)]
pub struct Question {
    /// A run directory
    run: PathBuf,
    /// Only this source: its shards as the recipe names them, or the end of that path
    #[arg(long, value_name = "SHARDS")]
    source: Option<PathBuf>,
    /// When and how often this document was trained on: its number in the shards, or FILE@BYTE of its text
    #[arg(long, value_name = "NUMBER")]
    document: Option<String>,
    /// Which documents this step consumed
    #[arg(long, conflicts_with_all = ["source", "document", "text"])]
    step: Option<u64>,
    /// Also look for the text that documents came from (reads the corpus again)
    #[arg(long)]
    text: bool,
}

/// Lines of a long list that are shown.
const SHOWN: usize = 40;

/// A run, its ledger, and the data of its phases.
struct Consumption {
    run: PathBuf,
    recipe: Pretrain,
    ledger: Ledger,
    orders: Vec<DataOrder>,
}

/// The answer, as lines.
pub fn answer(question: &Question) -> Result<String> {
    let consumption = Consumption::open(&question.run)?;
    match (&question.document, question.step) {
        (Some(document), _) => consumption.document(question, document),
        (None, Some(step)) => consumption.step(step),
        (None, None) => consumption.summary(question.source.as_deref()),
    }
}

impl Consumption {
    fn open(run: &Path) -> Result<Consumption> {
        let path = run_dir::ledger_path(run);
        if !path.is_file() {
            return Err(Error::file(&path, "no such file").remedy("name a run directory of trireme-pretrain"));
        }
        let ledger = Ledger::read(&path)?;
        let recipe = Pretrain::load(&run.join("recipe.toml"), &[])?;
        let mut orders = Vec::new();
        for phase in recipe.phases() {
            let open = |source: &trireme::recipe::Source| Ok((TokenShards::open(&source.shards, Split::Train)?, source.weight));
            let sources = phase.data.train.iter().map(open).collect::<Result<_>>()?;
            orders.push(DataOrder::new(sources, recipe.batch.seq_len, phase.data.seed)?);
        }
        let consumption = Consumption { run: run.into(), recipe, ledger, orders };
        consumption.check_orders()?;
        Ok(consumption)
    }

    /// The newest job read the data that lie there now.
    fn check_orders(&self) -> Result<()> {
        let Some(job) = self.ledger.jobs.last() else { return Ok(()) };
        for (phase, order) in job.phases.iter().zip(&self.orders) {
            let now = order.fingerprint();
            if phase.order != now {
                let wrong = format!("phase {} consumed data {}, its shards now give {now}", phase.name, phase.order);
                return Err(Error::file(&self.run, wrong).remedy("put the shards back that the run was trained on"));
            }
        }
        Ok(())
    }

    /// Whether an entry's samples are those of today's order of its phase. They are not when the data were changed on purpose.
    fn is_known(&self, entry: &Entry) -> bool {
        let of = |job: usize| self.ledger.jobs[job].phases.get(entry.step.phase).map(|phase| &phase.order);
        of(entry.job) == of(self.ledger.jobs.len() - 1)
    }

    /// What can no longer be resolved, as a line.
    fn unknown_steps(&self) -> String {
        let n = self.ledger.entries.iter().filter(|entry| !self.is_known(entry)).count();
        if n == 0 {
            return String::new();
        }
        format!(
            "not searched: {n} steps of jobs that read other data (changed on purpose since, see trireme-inspect {})\n",
            self.run.display()
        )
    }

    fn phase_name(&self, phase: usize) -> &str {
        self.recipe.phases().get(phase).map_or("?", |phase| phase.name)
    }

    /// (phase, source) of every source asked for.
    fn sources(&self, asked: Option<&Path>) -> Result<Vec<(usize, usize)>> {
        let phases = self.recipe.phases();
        let all = phases.iter().enumerate().flat_map(|(p, phase)| (0..phase.data.train.len()).map(move |s| (p, s)));
        let path = |&(phase, source): &(usize, usize)| &phases[phase].data.train[source].shards;
        let found: Vec<(usize, usize)> = all.clone().filter(|at| asked.is_none_or(|asked| path(at).ends_with(asked))).collect();
        if found.is_empty() {
            let known: BTreeSet<String> = all.map(|at| path(&at).display().to_string()).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let wrong = format!("--source {}: the recipe has {known}", asked.unwrap_or(Path::new("")).display());
            return Err(Error::recipe(wrong).remedy("name one of them"));
        }
        Ok(found)
    }

    fn shards_path(&self, at: (usize, usize)) -> &Path {
        let data = if at.0 == 0 { &self.recipe.data } else { &self.recipe.phase[at.0 - 1].data };
        &data.train[at.1].shards
    }

    fn summary(&self, asked: Option<&Path>) -> Result<String> {
        let mut out = format!("{}: token ledger\n\nJobs\n", self.run.display());
        for (i, job) in self.ledger.jobs.iter().enumerate() {
            let steps = self.ledger.entries.iter().filter(|entry| entry.job == i);
            let (n, n_superseded) = steps.fold((0, 0), |(n, superseded), entry| (n + 1, superseded + usize::from(entry.superseded)));
            let lost = if n_superseded > 0 { format!(", the last {n_superseded} superseded by the next job") } else { String::new() };
            line(&mut out, &format!("{:>3}  from step {} on {} ranks: {n} steps{lost}", i + 1, job.from_step, job.ranks));
        }
        let durable = checkpoint::list(&self.run)?.last().map_or(0, |&(step, _)| step);
        let pending = self.ledger.standing().filter(|entry| entry.step.step > durable).count();
        if pending > 0 {
            line(&mut out, &format!("the last {pending} steps are in no checkpoint yet"));
        }
        out.push_str("\nSources\n");
        for at in self.sources(asked)? {
            self.source_line(at, &mut out);
        }
        let skipped: Vec<&Entry> = self.ledger.standing().filter(|entry| entry.step.skipped.is_some()).collect();
        if !skipped.is_empty() {
            out.push_str("\nSkipped steps\n");
            list(&mut out, skipped.iter().map(|entry| self.entry_line(entry)));
        }
        out.push_str(&self.unknown_steps());
        Ok(out)
    }

    /// Samples of a source in one phase that were trained on.
    fn source_line(&self, at: (usize, usize), out: &mut String) {
        let order = &self.orders[at.0];
        let of_phase = |entry: &&Entry| entry.step.phase == at.0 && self.is_known(entry);
        let (mut trained, mut skipped, mut steps) = (0, 0, None);
        for entry in self.ledger.standing().filter(of_phase) {
            let (first, end) = (entry.step.first, entry.step.first + entry.step.n);
            let n = order.consumed(end)[at.1].samples - order.consumed(first)[at.1].samples;
            if entry.step.skipped.is_some() {
                skipped += n;
            } else if n > 0 {
                trained += n;
                let (from, _) = steps.unwrap_or((entry.step.step, 0));
                steps = Some((from, entry.step.step));
            }
        }
        let shards = order.shards(at.1);
        let passes = trained as f64 * self.recipe.batch.seq_len as f64 / shards.n_tokens() as f64;
        let when = steps.map_or("no step".into(), |(from, to)| format!("steps {from}..{to}"));
        let skipped = if skipped > 0 { format!(", {skipped} more in skipped steps") } else { String::new() };
        let (name, path) = (self.phase_name(at.0), self.shards_path(at).display());
        line(out, &format!("{path} in phase {name}: {trained} samples trained on in {when} ({passes:.3} passes){skipped}"));
    }

    fn entry_line(&self, entry: &Entry) -> String {
        let step = &entry.step;
        let samples = format!("samples {}..{} of phase {}", step.first, step.first + step.n, self.phase_name(step.phase));
        let skipped = step.skipped.as_ref().map_or(String::new(), |reason| format!(", skipped: {reason}"));
        let superseded = if entry.superseded { format!(", superseded (job {})", entry.job + 1) } else { String::new() };
        format!("step {}  {samples}{skipped}{superseded}", step.step)
    }

    /// The documents of one step.
    fn step(&self, step: u64) -> Result<String> {
        let entries: Vec<&Entry> = self.ledger.entries.iter().filter(|entry| entry.step.step == step).collect();
        if entries.is_empty() {
            let last = self.ledger.entries.iter().map(|entry| entry.step.step).max().unwrap_or(0);
            return Err(Error::recipe(format!("--step {step}: the ledger has steps 1..{last}")).remedy("name one of them"));
        }
        let mut out = String::new();
        for entry in entries {
            line(&mut out, &self.entry_line(entry));
            if !self.is_known(entry) {
                continue;
            }
            let order = &self.orders[entry.step.phase];
            let samples = (entry.step.first..entry.step.first + entry.step.n).map(|index| {
                let (source, sample) = order.locate(index);
                let tokens = order.tokens_of(sample);
                let documents = documents_of(order.shards(source), &tokens);
                let path = self.shards_path((entry.step.phase, source)).display();
                format!("  sample {index}: tokens {}..{} of {path}, documents {documents}", tokens.start, tokens.end)
            });
            list(&mut out, samples);
        }
        out.push_str(&self.unknown_steps());
        Ok(out)
    }

    /// When a document was trained on, and how often.
    fn document(&self, question: &Question, document: &str) -> Result<String> {
        let sources = self.sources(question.source.as_deref())?;
        let shards = self.shards_path(sources[0]).to_path_buf();
        if let Some(&other) = sources.iter().find(|&&at| self.shards_path(at) != shards) {
            let (first, other) = (shards.display(), self.shards_path(other).display());
            let wrong = format!("--document {document}: of which shards, {first} or {other}?");
            return Err(Error::recipe(wrong).remedy(format!("add --source {first}")));
        }
        let (number, origin) = find_document(&shards, document, question.text)?;
        let of = self.orders[sources[0].0].shards(sources[0].1);
        if number >= of.n_documents() {
            let wrong = format!("--document {number}: {} has {} documents, counted from 0", shards.display(), of.n_documents());
            return Err(Error::recipe(wrong).remedy("name one of them"));
        }
        let tokens = of.index().document_tokens(number as usize);
        let origin = origin.map_or(String::new(), |origin| format!(", text {origin}"));
        let mut out = format!("document {number} of {} (tokens {}..{}{origin})\n", shards.display(), tokens.start, tokens.end);
        let mut uses: Vec<(&Entry, u64, u64)> = Vec::new();
        for &(phase, source) in &sources {
            self.uses_in(phase, source, &tokens, &mut uses);
        }
        uses.sort_by_key(|(entry, index, _)| (entry.job, entry.step.step, *index));
        self.describe_uses(&tokens, &uses, &mut out);
        out.push_str(&self.unknown_steps());
        Ok(out)
    }

    /// Every step, lost and skipped ones too, that consumed a sample with one of these tokens: (entry, index, sample).
    fn uses_in<'a>(&'a self, phase: usize, source: usize, tokens: &Range<u64>, uses: &mut Vec<(&'a Entry, u64, u64)>) {
        let mut entries: Vec<&Entry> =
            self.ledger.entries.iter().filter(|entry| entry.step.phase == phase && self.is_known(entry)).collect();
        entries.sort_by_key(|entry| entry.step.first);
        let longest = entries.iter().map(|entry| entry.step.n).max().unwrap_or(0);
        let end = entries.iter().map(|entry| entry.step.first + entry.step.n).max().unwrap_or(0);
        let order = &self.orders[phase];
        for (index, sample) in order.occurrences(source, order.samples_with(source, tokens.clone()), end) {
            // Repeated steps overlap: all that begin less than the longest before are looked at.
            let after = entries.partition_point(|entry| entry.step.first <= index);
            let near = entries[..after].iter().rev().take_while(|entry| entry.step.first + longest > index);
            uses.extend(near.filter(|entry| index < entry.step.first + entry.step.n).map(|entry| (*entry, index, sample)));
        }
    }

    fn describe_uses(&self, tokens: &Range<u64>, uses: &[(&Entry, u64, u64)], out: &mut String) {
        let trained: Vec<&(&Entry, u64, u64)> =
            uses.iter().filter(|(entry, ..)| !entry.superseded && entry.step.skipped.is_none()).collect();
        if trained.is_empty() {
            line(out, "never trained on");
        } else {
            // A token is trained on where it is a target; the first of all tokens never is.
            let targets = tokens.start.max(1)..tokens.end;
            let hits: u64 = trained.iter().map(|(.., sample)| overlap(&self.orders[0].targets_of(*sample), &targets)).sum();
            let times = hits as f64 / (targets.end - targets.start).max(1) as f64;
            let steps: BTreeSet<u64> = trained.iter().map(|(entry, ..)| entry.step.step).collect();
            line(out, &format!("trained on {times:.2} times, in {} samples of {} steps:", trained.len(), steps.len()));
            list(out, trained.iter().map(|(entry, index, _)| self.use_line(entry, *index)));
        }
        let others: Vec<&(&Entry, u64, u64)> = uses.iter().filter(|(entry, ..)| entry.superseded || entry.step.skipped.is_some()).collect();
        if !others.is_empty() {
            line(out, "consumed without effect on the weights:");
            list(out, others.iter().map(|(entry, index, _)| self.use_line(entry, *index)));
        }
    }

    fn use_line(&self, entry: &Entry, index: u64) -> String {
        let skipped = entry.step.skipped.as_ref().map_or(String::new(), |reason| format!(", skipped: {reason}"));
        let superseded = if entry.superseded { format!(", superseded (job {})", entry.job + 1) } else { String::new() };
        format!("  step {}, sample {index} of phase {}{skipped}{superseded}", entry.step.step, self.phase_name(entry.step.phase))
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> u64 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// `12..14`, first and last.
fn documents_of(shards: &TokenShards, tokens: &Range<u64>) -> String {
    let at = |token| shards.index().document_at(token).map_or("?".into(), |document| document.to_string());
    let (first, last) = (at(tokens.start), at(tokens.end - 1));
    if first == last { first } else { format!("{first}..={last}") }
}

/// The number of a document that was named by number or by the place of its text, and that place when it is wanted.
fn find_document(shards: &Path, document: &str, text: bool) -> Result<(u64, Option<String>)> {
    let number: Option<u64> = document.parse().ok();
    if number.is_some() && !text {
        return Ok((number.unwrap_or(0), None));
    }
    let mut found = None;
    each_origin(shards, Split::Train, |at, origin| {
        let is_it = number.map_or_else(|| Path::new(origin).ends_with(document), |number| number == at);
        if is_it {
            found = Some((at, Some(origin.to_string())));
        }
        !is_it
    })?;
    found.ok_or_else(|| {
        let wrong = format!("--document {document}: no document of {} has its text there", shards.display());
        Error::recipe(wrong).remedy("give its number, or FILE@BYTE where its line of JSON starts (FILE alone for a plain file)")
    })
}

/// At most [`SHOWN`] lines, and how many more there are.
fn list(out: &mut String, lines: impl Iterator<Item = String>) {
    let mut n = 0;
    for text in lines {
        if n < SHOWN {
            line(out, &text);
        }
        n += 1;
    }
    if n > SHOWN {
        line(out, &format!("  and {} more", n - SHOWN));
    }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "  {text}").expect("writing to a string cannot fail");
}
