//! What goes into each pass over the model: continuous batching (Yu et al. 2022) over pages (`pages`), with prompts in chunks beside
//! running sequences (Agrawal et al. 2023), shared beginnings, and guesses (`draft`).
//!
//! A pass takes one new token of every decoding sequence, then guesses, then as much of prompts as its budget of tokens has room
//! for; when room is left, sequences are admitted, in order. With several groups (pipeline stages that are to be kept busy) a pass takes
//! the sequences of one group, while those of the others are under way.
//!
//! Memory never deadlocks. A prompt is admitted when its pages are there; further pages are taken as they are needed. A sequence that
//! finds none takes back those of the youngest sequence that is not under way, which waits again and is computed again (its full pages
//! are found again, unless they were needed). When all younger ones are under way the sequence is left out of the pass, and none is
//! admitted until it has its page: those under way end, or are found at rest when it is asked for again. The oldest sequence therefore
//! always goes on in the end, and one that could not be served by the whole pool is refused before.
//!
//! Pure: knows nothing of devices, ranks, sampling or text. Decisions are functions of what was added and accepted, so that all ranks of
//! a replica decide alike. What a sequence's tokens are never depends on any of it.

use super::draft::Guesser;
use super::pages::PagePool;
use std::collections::BTreeMap;
use std::fmt;

/// Whether prompts that begin alike share pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Whole pages of equal beginnings are computed once and kept while there is room.
    Shared,
    /// Every sequence computes its own.
    Separate,
}

/// What passes are made within.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Pages of the pool.
    pub n_pages: usize,
    /// Sequences that run at one time.
    pub n_sequences: usize,
    /// Tokens of one pass; one of each running sequence is taken in any case.
    pub pass_tokens: usize,
    /// Groups whose passes are under way at the same time.
    pub n_groups: usize,
    /// Whether beginnings are shared.
    pub sharing: Sharing,
    /// Most tokens that are guessed for a sequence in one pass; 0 for none.
    pub draft_tokens: usize,
    /// Most tokens of a pass whose prompts are done that may be guesses or the tokens they follow.
    pub draft_rows: usize,
}

/// One sequence's part of a pass.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// As added.
    pub sequence: usize,
    /// Tokens of it in the cache.
    pub past: usize,
    /// The next ones; guesses are the last.
    pub tokens: Vec<u32>,
    /// Its pages, in order: room for all those tokens.
    pub pages: Vec<u32>,
    /// Of how many of the last tokens the next one is to be chosen: 0 inside of a prompt, else 1 and the guesses.
    pub n_wanted: usize,
}

/// Whether a sequence goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// It does.
    GoesOn,
    /// It has ended.
    Ended,
}

/// What was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Passes.
    pub passes: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// Tokens of prompts that were computed, again ones included.
    pub prompt_computed: usize,
    /// Tokens of prompts whose pages were there.
    pub prompt_shared: usize,
    /// Guessed tokens.
    pub guessed: usize,
    /// Those that were right.
    pub guessed_right: usize,
    /// Times that a sequence had to give its pages back.
    pub preempted: usize,
    /// Most pages in use at one time.
    pub pages_used: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { passes, tokens, prompt_computed, prompt_shared, guessed, guessed_right, preempted, pages_used } = self;
        write!(f, "{tokens} tokens in {passes} passes; of prompts {prompt_computed} computed, {prompt_shared} shared; ")?;
        if *guessed > 0 {
            write!(f, "{guessed_right} of {guessed} guesses right ({:.0} %); ", 100.0 * *guessed_right as f64 / *guessed as f64)?;
        }
        if *preempted > 0 {
            write!(f, "{preempted} responses put back for want of pages; ")?;
        }
        write!(f, "at most {pages_used} pages of the KV cache in use")
    }
}

/// A sequence that waits.
struct Waiting<'a> {
    prompt: &'a [u32],
    most_tokens: usize,
    /// What was chosen before it had to give its pages back.
    chosen: Vec<u32>,
}

/// A sequence with pages.
struct Running<'a> {
    prompt: &'a [u32],
    most_tokens: usize,
    /// Prompt, then what was chosen.
    tokens: Vec<u32>,
    /// Of these in the cache: at least one fewer.
    n_cached: usize,
    /// Room for all tokens but the last, at least.
    pages: Vec<u32>,
    /// Of these full and findable.
    n_filled: usize,
    group: usize,
    is_under_way: bool,
    /// It found no page, and those of younger ones were under way.
    is_stalled: bool,
    guesser: Guesser,
}

impl Running<'_> {
    /// Tokens that are not in the cache; 1 when it decodes.
    fn n_left(&self) -> usize {
        self.tokens.len() - self.n_cached
    }
}

/// Waiting and running sequences.
pub struct Scheduler<'a> {
    limits: Limits,
    pool: PagePool,
    waiting: BTreeMap<usize, Waiting<'a>>,
    /// The oldest first.
    running: BTreeMap<usize, Running<'a>>,
    n_added: usize,
    counts: Counts,
}

/// Pages for so many tokens.
pub fn pages_for(n_tokens: usize, page_tokens: usize) -> usize {
    n_tokens.div_ceil(page_tokens)
}

/// Pages that a sequence of at most `most_tokens` tokens needs: the last token is never put into the cache.
pub fn most_pages(most_tokens: usize, page_tokens: usize) -> usize {
    pages_for(most_tokens - 1, page_tokens)
}

impl<'a> Scheduler<'a> {
    /// Without sequences.
    pub fn new(limits: Limits) -> Scheduler<'a> {
        assert!(limits.n_sequences > 0 && limits.n_groups > 0, "{limits:?}");
        let pool = PagePool::new(limits.n_pages, limits.page_tokens);
        let (waiting, running) = (BTreeMap::new(), BTreeMap::new());
        Scheduler { limits, pool, waiting, running, n_added: 0, counts: Counts::default() }
    }

    /// A sequence that begins with `prompt` (at least one token) and ends with `most_tokens` tokens at the latest (at least one more). ->
    /// its number: 0, 1, .. Panics when the pool has too few pages for it alone.
    pub fn add(&mut self, prompt: &'a [u32], most_tokens: usize) -> usize {
        assert!(!prompt.is_empty() && most_tokens > prompt.len(), "a prompt of {} tokens, {most_tokens} at most", prompt.len());
        let needed = most_pages(most_tokens, self.limits.page_tokens);
        assert!(needed <= self.limits.n_pages, "a sequence of {needed} pages in a pool of {}", self.limits.n_pages);
        self.waiting.insert(self.n_added, Waiting { prompt, most_tokens, chosen: Vec::new() });
        self.n_added += 1;
        self.n_added - 1
    }

    /// Whether every sequence has ended.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        Counts { pages_used: self.pool.most_used(), ..self.counts }
    }

    /// The next pass of a group none of whose sequences is under way; the parts are under way until they are accepted. Empty when there
    /// is nothing for this group to do now; not for all groups in turn, unless all is done.
    pub fn next_pass(&mut self, group: usize) -> Vec<Part> {
        let mine: Vec<usize> = self.of_group(group).collect();
        assert!(mine.iter().all(|id| !self.running[id].is_under_way), "group {group} is under way");
        let mut parts = self.decode(&mine);
        let mut room =
            self.limits.pass_tokens.max(self.limits.n_sequences).saturating_sub(parts.iter().map(|part| part.tokens.len()).sum());
        for id in mine {
            if self.running.get(&id).is_some_and(|one| one.n_left() > 1 && !one.is_under_way) {
                self.prompt_chunk(id, &mut room, &mut parts);
            }
        }
        while let Some(id) = self.admit(group, room) {
            self.prompt_chunk(id, &mut room, &mut parts);
        }
        self.count(&parts);
        parts
    }

    /// What came of a part: the tokens chosen at the wanted ones of its tokens in turn, as many as follow from right guesses (each but
    /// the last is the guess that stands there), at most `n_wanted`; none inside of a prompt.
    pub fn accept(&mut self, part: &Part, chosen: &[u32], next: Next) {
        let one = self.running.get_mut(&part.sequence).expect("a part is of a running sequence");
        assert!(one.is_under_way && part.past == one.n_cached, "{part:?} is not under way");
        let guesses = &part.tokens[part.tokens.len() - part.n_wanted.saturating_sub(1)..];
        let n_right = chosen.len().saturating_sub(1);
        assert!(chosen.is_empty() == (part.n_wanted == 0) && guesses.get(..n_right) == Some(&chosen[..n_right]), "{part:?}: {chosen:?}");
        one.is_under_way = false;
        // What stands in the cache behind a wrong guess is written again.
        one.n_cached += part.tokens.len() - part.n_wanted + chosen.len();
        one.tokens.extend_from_slice(chosen);
        one.guesser.learn(guesses.len(), n_right);
        self.counts.guessed += guesses.len();
        self.counts.guessed_right += n_right;
        if self.limits.sharing == Sharing::Shared {
            let size = self.limits.page_tokens;
            while (one.n_filled + 1) * size <= one.n_cached {
                let idx = one.n_filled;
                let before = idx.checked_sub(1).map(|before| one.pages[before]);
                one.pages[idx] = self.pool.fill(before, one.pages[idx], &one.tokens[idx * size..][..size]);
                one.n_filled += 1;
            }
        }
        if next == Next::Ended {
            let one = self.running.remove(&part.sequence).expect("it was there");
            self.pool.release(&one.pages);
        }
    }

    fn count(&mut self, parts: &[Part]) {
        self.counts.passes += usize::from(!parts.is_empty());
        for part in parts {
            let n_prompt = self.running[&part.sequence].prompt.len();
            self.counts.tokens += part.tokens.len();
            self.counts.prompt_computed += n_prompt.saturating_sub(part.past).min(part.tokens.len());
        }
    }

    fn of_group(&self, group: usize) -> impl Iterator<Item = usize> {
        self.running.iter().filter(move |(_, one)| one.group == group).map(|(&id, _)| id)
    }

    /// The youngest sequence that is not under way, if it is younger than `id`, gives its pages back. -> Whether there was one.
    fn preempt_younger_than(&mut self, id: usize) -> bool {
        let younger = self.running.range(id + 1..).rev().find(|(_, one)| !one.is_under_way);
        let Some(&id) = younger.map(|(id, _)| id) else { return false };
        let Running { prompt, most_tokens, tokens, pages, .. } = self.running.remove(&id).expect("just found");
        self.pool.release(&pages);
        self.waiting.insert(id, Waiting { prompt, most_tokens, chosen: tokens[prompt.len()..].to_vec() });
        self.counts.preempted += 1;
        true
    }

    /// The decoding ones of these sequences, the oldest first, with guesses as far as there is room for them.
    fn decode(&mut self, mine: &[usize]) -> Vec<Part> {
        let mut ready = Vec::new();
        for &id in mine {
            // An older one may have taken back its pages.
            if self.running.get(&id).is_some_and(|one| one.n_left() == 1) && self.make_room(id) {
                ready.push(id);
                self.running.get_mut(&id).expect("it has room").is_under_way = true;
            }
        }
        let most_rows = self.limits.draft_rows.min(self.limits.pass_tokens);
        let mut room = most_rows.saturating_sub(ready.len());
        let part = |id: usize| {
            let guesses = self.guess(id, room);
            room -= guesses.len();
            let one = &self.running[&id];
            let tokens: Vec<u32> = [one.tokens[one.n_cached]].into_iter().chain(guesses).collect();
            Part { sequence: id, past: one.n_cached, n_wanted: tokens.len(), tokens, pages: one.pages.clone() }
        };
        ready.into_iter().map(part).collect()
    }

    /// Room in a decoding sequence's pages for its next token. -> false: it must be left out of the pass.
    fn make_room(&mut self, id: usize) -> bool {
        let one = &self.running[&id];
        if one.n_cached < one.pages.len() * self.limits.page_tokens {
            return true;
        }
        let mut page = self.pool.take();
        while page.is_none() && self.preempt_younger_than(id) {
            page = self.pool.take();
        }
        let one = self.running.get_mut(&id).expect("it is older than what was preempted");
        one.is_stalled = page.is_none();
        one.pages.extend(page);
        page.is_some()
    }

    /// Guesses for a sequence that is about to decode, at most `room`, with pages for them: no other sequence gives any up for a guess.
    fn guess(&mut self, id: usize, room: usize) -> Vec<u32> {
        let one = self.running.get_mut(&id).expect("it decodes");
        // With the token that is chosen at the last guess, no more than the sequence may have.
        let room = room.min(one.most_tokens - one.tokens.len() - 1);
        let mut guesses = one.guesser.guess(&one.tokens, room);
        let size = self.limits.page_tokens;
        while one.pages.len() * size < one.tokens.len() + guesses.len() {
            match self.pool.take() {
                Some(page) => one.pages.push(page),
                None => guesses.truncate(one.pages.len() * size - one.tokens.len()),
            }
        }
        guesses
    }

    /// As much of a prompt as there is room for.
    fn prompt_chunk(&mut self, id: usize, room: &mut usize, parts: &mut Vec<Part>) {
        let one = self.running.get_mut(&id).expect("it has a prompt");
        let n = one.n_left().min(*room);
        if n == 0 {
            return;
        }
        *room -= n;
        one.is_under_way = true;
        let tokens = one.tokens[one.n_cached..][..n].to_vec();
        let n_wanted = usize::from(n == one.n_left());
        parts.push(Part { sequence: id, past: one.n_cached, tokens, pages: one.pages.clone(), n_wanted });
    }

    /// The next waiting sequence gets pages and runs, if there is room for it.
    fn admit(&mut self, group: usize, room: usize) -> Option<usize> {
        let n_running = self.running.len();
        let n_wanted = self.limits.n_sequences.min(n_running + self.waiting.len());
        // Groups of equal size keep stages equally busy.
        let is_full = n_running >= n_wanted || self.of_group(group).count() >= n_wanted.div_ceil(self.limits.n_groups);
        if room == 0 || is_full || self.running.values().any(|one| one.is_stalled) {
            return None;
        }
        let (id, found) = self.next_to_admit()?;
        let waiting = &self.waiting[&id];
        let n_pages = pages_for(waiting.prompt.len() + waiting.chosen.len(), self.limits.page_tokens);
        // One page for each running sequence is left, so that the new one is not the first to give its own back.
        let available = self.pool.n_available() - self.pool.n_unused_of(&found);
        if n_running > 0 && n_pages - found.len() + n_running > available {
            return None;
        }
        let Waiting { prompt, most_tokens, chosen } = self.waiting.remove(&id).expect("just found");
        self.pool.share(&found);
        let n_cached = found.len() * self.limits.page_tokens;
        self.counts.prompt_shared += n_cached.min(prompt.len());
        let (n_filled, mut pages) = (found.len(), found);
        pages.extend((n_filled..n_pages).map(|_| self.pool.take().expect("so many are available")));
        let tokens = [prompt, &chosen].concat();
        let guesser = Guesser::new(self.limits.draft_tokens);
        let (is_under_way, is_stalled) = (false, false);
        let one = Running { prompt, most_tokens, tokens, n_cached, pages, n_filled, group, is_under_way, is_stalled, guesser };
        self.running.insert(id, one);
        Some(id)
    }

    /// The first waiting sequence, with the pages of its beginning that are there. One whose next page is just being computed for another
    /// is passed over: as soon as that is done it need not be computed again.
    fn next_to_admit(&self) -> Option<(usize, Vec<u32>)> {
        let size = self.limits.page_tokens;
        for (&id, one) in self.waiting.iter().take(self.limits.n_sequences) {
            if self.limits.sharing == Sharing::Separate {
                return Some((id, Vec::new()));
            }
            let tokens = [one.prompt, &one.chosen].concat();
            // The last token is computed in any case: the next one is chosen at it.
            let sharable = &tokens[..tokens.len() - 1];
            let found = self.pool.find(sharable);
            let is_made_for = |other: &Running| {
                let n_common = sharable.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
                let n_full = n_common / size * size;
                n_full > found.len() * size && n_full > other.n_cached
            };
            if !self.running.values().any(|other| other.n_left() > 1 && is_made_for(other)) {
                return Some((id, found));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Random;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const ENDS: u32 = 4;

    /// A "model": the next token is a function of the last two and, now and then, of all of them, so that guesses are right often but
    /// not always.
    fn next_token(tokens: &[u32], seed: u64) -> u32 {
        let hash = |tokens: &[u32]| Random::new(seed, "model").bits(tokens.iter().fold(7, |hash, &token| hash * 31 + u64::from(token) + 1));
        let all = hash(tokens);
        if all % 4 > 0 { (hash(&tokens[tokens.len().saturating_sub(2)..]) % 3) as u32 } else { (all / 4 % 5) as u32 }
    }

    /// What the cache must hold at the last of these tokens: a function of all of them.
    fn entry(tokens: &[u32]) -> u64 {
        tokens.iter().fold(1, |hash, &token| Random::new(hash, "entry").bits(u64::from(token)))
    }

    #[derive(Clone, Debug)]
    struct Job {
        prompt: Vec<u32>,
        most_tokens: usize,
    }

    /// What the sequence must be, made one token at a time without any of this.
    fn truth(job: &Job, seed: u64) -> Vec<u32> {
        let mut tokens = job.prompt.clone();
        loop {
            tokens.push(next_token(&tokens, seed));
            if tokens.len() == job.most_tokens || tokens.last() == Some(&ENDS) {
                return tokens;
            }
        }
    }

    /// Runs all jobs over a simulated cache in which an entry is only right for one beginning; -> the sequences and the counts.
    fn simulate(limits: Limits, jobs: &[Job], seed: u64) -> (Vec<Vec<u32>>, Counts) {
        let mut scheduler = Scheduler::new(limits);
        for job in jobs {
            scheduler.add(&job.prompt, job.most_tokens);
        }
        let mut cache = vec![vec![0u64; limits.page_tokens]; limits.n_pages];
        let mut sequences: Vec<Vec<u32>> = jobs.iter().map(|job| job.prompt.clone()).collect();
        let mut under_way: VecDeque<Vec<(Part, Vec<u32>, Next)>> = (0..limits.n_groups).map(|_| Vec::new()).collect();
        let mut n_idle = 0;
        for pass in 0.. {
            for (part, chosen, next) in under_way.pop_front().unwrap() {
                sequences[part.sequence].extend(&chosen);
                scheduler.accept(&part, &chosen, next);
            }
            let parts = scheduler.next_pass(pass % limits.n_groups);
            let in_use: Vec<u32> = scheduler.running.values().flat_map(|one| one.pages.clone()).collect();
            scheduler.pool.check(&in_use);
            let fits = |part: &Part| part.past + part.tokens.len() < jobs[part.sequence].most_tokens;
            assert!(parts.iter().all(fits), "tokens that no sequence can have are computed: {parts:?}");
            let n_tokens: usize = parts.iter().map(|part| part.tokens.len()).sum();
            assert!(n_tokens <= limits.pass_tokens.max(limits.n_sequences), "{n_tokens} tokens in a pass");
            n_idle = if parts.is_empty() && under_way.iter().all(Vec::is_empty) { n_idle + 1 } else { 0 };
            if scheduler.is_done() {
                scheduler.pool.check(&[]);
                return (sequences, scheduler.counts());
            }
            assert!(n_idle < 2 * limits.n_groups, "nothing goes on, {} wait", scheduler.waiting.len());
            for part in &parts {
                let writes = &part.pages[part.past / limits.page_tokens..(part.past + part.tokens.len()).div_ceil(limits.page_tokens)];
                assert!(writes.iter().all(|page| in_use.iter().filter(|&used| used == page).count() == 1), "two use what {part:?} writes");
            }
            under_way.push_back(parts.into_iter().map(|part| run(part, &sequences, jobs, &mut cache, seed)).collect());
        }
        unreachable!("the loop returns")
    }

    /// One part of a pass: what it reads must be of its own beginning.
    fn run(part: Part, sequences: &[Vec<u32>], jobs: &[Job], cache: &mut [Vec<u64>], seed: u64) -> (Part, Vec<u32>, Next) {
        let mut tokens = sequences[part.sequence][..part.past].to_vec();
        let size = cache[0].len();
        for idx in 0..part.past {
            assert_eq!(cache[part.pages[idx / size] as usize][idx % size], entry(&tokens[..=idx]), "entry {idx} of {part:?}");
        }
        for &token in &part.tokens {
            tokens.push(token);
            cache[part.pages[(tokens.len() - 1) / size] as usize][(tokens.len() - 1) % size] = entry(&tokens);
        }
        let n_known = tokens.len() + 1 - part.n_wanted.max(1);
        assert_eq!(tokens[..n_known], sequences[part.sequence][..n_known], "{part:?}");
        let (mut chosen, mut next) = (Vec::new(), Next::GoesOn);
        for n in tokens.len() + 1 - part.n_wanted..=tokens.len() {
            let token = next_token(&tokens[..n], seed);
            chosen.push(token);
            if n + 1 == jobs[part.sequence].most_tokens || token == ENDS {
                next = Next::Ended;
                break;
            }
            if tokens.get(n) != Some(&token) {
                break;
            }
        }
        (part, chosen, next)
    }

    fn jobs() -> impl Strategy<Value = Vec<Job>> {
        let beginnings = prop::collection::vec(prop::collection::vec(0..3u32, 1..20), 1..4);
        let of_each = prop::collection::vec((0..4usize, 0..20usize, prop::collection::vec(0..3u32, 1..6), 1..25usize), 1..12);
        (beginnings, of_each).prop_map(|(beginnings, of_each)| {
            let job = |(which, n, own, n_new): (usize, usize, Vec<u32>, usize)| {
                let beginning = &beginnings[which % beginnings.len()];
                let prompt = [&beginning[..n.min(beginning.len())], &own].concat();
                Job { most_tokens: prompt.len() + n_new, prompt }
            };
            of_each.into_iter().map(job).collect()
        })
    }

    prop_compose! {
        fn limits()(page_tokens in 1..6usize, spare in 0..12usize, n_sequences in 1..7usize, pass_tokens in 1..30usize, n_groups in 1..4usize,
            is_shared in any::<bool>(), draft_tokens in 0..5usize, draft_rows in 0..20usize) -> Limits {
            let sharing = if is_shared { Sharing::Shared } else { Sharing::Separate };
            Limits { page_tokens, n_pages: spare, n_sequences, pass_tokens, n_groups, sharing, draft_tokens, draft_rows }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Every sequence ends, with the tokens it has when it is alone, over pools that barely hold one of them and over large ones, in
        /// any number of groups under way: no entry of the cache is read that another sequence, a wrong guess or an earlier user
        /// of the page left there, no page has two writers or is lost, and passes keep to their budget. It breaks with any wrong
        /// reference count, page table or order of taking pages back.
        #[test]
        fn sequences_are_what_they_are_alone(jobs in jobs(), mut limits in limits(), seed in 0..1000u64) {
            let needed = jobs.iter().map(|job| most_pages(job.most_tokens, limits.page_tokens)).max().unwrap();
            limits.n_pages += needed;
            let (sequences, counts) = simulate(limits, &jobs, seed);
            for (job, sequence) in jobs.iter().zip(&sequences) {
                prop_assert_eq!(sequence, &truth(job, seed));
            }
            prop_assert!(counts.pages_used <= limits.n_pages && counts.guessed_right <= counts.guessed);
        }
    }

    fn wide() -> Limits {
        let sharing = Sharing::Shared;
        Limits { page_tokens: 4, n_pages: 1000, n_sequences: 8, pass_tokens: 64, n_groups: 1, sharing, draft_tokens: 0, draft_rows: 0 }
    }

    /// Samples of one prompt compute its full pages once; each computes the rest of it. Requests that come later find them still there.
    #[test]
    fn samples_of_a_prompt_compute_it_once() {
        let prompt: Vec<u32> = (0..18).map(|i| i % 3).collect();
        let jobs = vec![Job { prompt: prompt.clone(), most_tokens: 24 }; 20];
        let (_, counts) = simulate(wide(), &jobs, 3);
        assert_eq!((counts.prompt_computed, counts.prompt_shared), (18 + 19 * 2, 19 * 16));
        let (_, counts) = simulate(Limits { sharing: Sharing::Separate, ..wide() }, &jobs, 3);
        assert_eq!((counts.prompt_computed, counts.prompt_shared), (20 * 18, 0));
    }

    /// A long prompt is fed beside decoding sequences, which get a token in every pass; without chunks they would wait for it.
    #[test]
    fn decoding_goes_on_beside_long_prompts() {
        let (short, long) = ([1, 2, 0], (0..300).map(|i| i % 3).collect::<Vec<u32>>());
        let mut scheduler = Scheduler::new(wide());
        scheduler.add(&short, 100);
        scheduler.add(&long, 400);
        for pass in 0..6 {
            let parts = scheduler.next_pass(0);
            let shape: Vec<(usize, usize, usize)> = parts.iter().map(|part| (part.sequence, part.tokens.len(), part.n_wanted)).collect();
            let expected = match pass {
                0 => vec![(0, 3, 1), (1, 61, 0)],
                1..=3 => vec![(0, 1, 1), (1, 63, 0)],
                4 => vec![(0, 1, 1), (1, 300 - 61 - 3 * 63, 1)],
                _ => vec![(0, 1, 1), (1, 1, 1)],
            };
            assert_eq!(shape, expected, "pass {pass}");
            let chosen: &[u32] = &[1];
            parts.iter().for_each(|part| scheduler.accept(part, &chosen[..part.n_wanted], Next::GoesOn));
        }
    }

    /// Stages are kept busy: with as many groups as stages, sequences are divided evenly, and none is in two groups.
    #[test]
    fn groups_are_of_equal_size() {
        let mut scheduler = Scheduler::new(Limits { n_groups: 3, n_sequences: 7, ..wide() });
        let prompts: Vec<[u32; 2]> = (0..9).map(|i| [i, i]).collect();
        for prompt in &prompts {
            scheduler.add(prompt, 9);
        }
        let passes: Vec<Vec<usize>> = (0..3).map(|group| scheduler.next_pass(group).iter().map(|part| part.sequence).collect()).collect();
        assert_eq!(passes, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
}
