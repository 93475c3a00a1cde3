//! The pages of a KV cache: who uses which, and which full ones are kept for prompts that begin with the same tokens (paged attention:
//! Kwon et al. 2023). A page belongs to one sequence until it is full; what is full is never written again, so that it is shared
//! without copies. Full pages form chains: what a page holds is named by its tokens and by the page before it, compared token by
//! token, not by a hash of them. Pages that nobody uses any more stay findable until their room is needed, least recently used first.
//! Bookkeeping only: knows nothing of tensors.

use std::collections::{BTreeMap, HashMap};

/// The pages of a pool.
pub struct PagePool {
    page_tokens: usize,
    pages: Vec<Page>,
    /// Neither used nor kept; the last given back is the first taken, while it is still in the processor's caches.
    free: Vec<u32>,
    /// Full pages that can be found.
    filled: HashMap<Contents, u32>,
    /// Those of them that nobody uses, by when they were last used.
    kept: BTreeMap<u64, u32>,
    /// Counts releases of findable pages, and contents: both only need to grow.
    clock: u64,
    most_used: usize,
}

/// A page.
#[derive(Default)]
struct Page {
    /// Sequences that use it.
    n_users: usize,
    /// What it holds, if it can be found.
    filled: Option<Filled>,
}

/// A findable page.
struct Filled {
    contents: Contents,
    /// Names these contents in `Contents::before` of the pages behind; never given twice.
    number: u64,
    /// Key in `PagePool::kept`, when nobody uses it.
    kept_at: Option<u64>,
}

/// What a full page holds.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Contents {
    /// Number of the contents before it; 0 at the beginning of a sequence.
    before: u64,
    tokens: Box<[u32]>,
}

impl PagePool {
    /// `n_pages` free pages of `page_tokens` tokens each.
    pub fn new(n_pages: usize, page_tokens: usize) -> PagePool {
        assert!(page_tokens > 0 && u32::try_from(n_pages).is_ok(), "{n_pages} pages of {page_tokens} tokens");
        let pages = (0..n_pages).map(|_| Page::default()).collect();
        let free = (0..n_pages as u32).rev().collect();
        PagePool { page_tokens, pages, free, filled: HashMap::new(), kept: BTreeMap::new(), clock: 0, most_used: 0 }
    }

    /// Tokens of a page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages that nobody uses.
    pub fn n_available(&self) -> usize {
        self.free.len() + self.kept.len()
    }

    /// Most pages that were in use at one time.
    pub fn most_used(&self) -> usize {
        self.most_used
    }

    /// A page for one sequence alone, with unspecified contents. `None` when all are in use.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop().or_else(|| self.forget_oldest())?;
        self.pages[page as usize].n_users = 1;
        self.note_use();
        Some(page)
    }

    /// The pages that hold the beginning of `tokens`, as far as whole pages of it are to be found: for [`PagePool::share`].
    pub fn find(&self, tokens: &[u32]) -> Vec<u32> {
        let (mut found, mut before) = (Vec::new(), 0);
        for tokens in tokens.chunks_exact(self.page_tokens) {
            let Some(&page) = self.filled.get(&Contents { before, tokens: tokens.into() }) else { break };
            found.push(page);
            before = self.number_of(page);
        }
        found
    }

    /// How many of these pages, which were just found, nobody uses yet: so many fewer are available once they are shared.
    pub fn n_unused_of(&self, found: &[u32]) -> usize {
        found.iter().filter(|&&page| self.pages[page as usize].n_users == 0).count()
    }

    /// One more sequence uses pages that were just found.
    pub fn share(&mut self, found: &[u32]) {
        for &page in found {
            let page = &mut self.pages[page as usize];
            page.n_users += 1;
            let filled = page.filled.as_mut().expect("found pages are full");
            if let Some(kept_at) = filled.kept_at.take() {
                self.kept.remove(&kept_at);
            }
        }
        self.note_use();
    }

    /// A sequence's page is full: it holds `tokens`, after what the sequence's page `before` holds (`None`: its first page). From now on
    /// it is found. When another page was found with the same contents before, the sequence goes on with that one, and its own is free.
    /// -> the page to go on with.
    pub fn fill(&mut self, before: Option<u32>, page: u32, tokens: &[u32]) -> u32 {
        assert_eq!(tokens.len(), self.page_tokens, "a full page");
        let before = before.map_or(0, |before| self.number_of(before));
        let contents = Contents { before, tokens: tokens.into() };
        if let Some(&same) = self.filled.get(&contents) {
            self.share(&[same]);
            self.release(&[page]);
            return same;
        }
        self.clock += 1;
        self.filled.insert(contents.clone(), page);
        let filled = &mut self.pages[page as usize].filled;
        assert!(filled.is_none(), "page {page} is full already");
        *filled = Some(Filled { contents, number: self.clock, kept_at: None });
        page
    }

    /// A sequence no longer uses these pages, given in its order. The last count as used least recently, so that no page is kept
    /// longer than the one before it, without which it cannot be found.
    pub fn release(&mut self, pages: &[u32]) {
        for &page in pages.iter().rev() {
            let one = &mut self.pages[page as usize];
            assert!(one.n_users > 0, "page {page} is released by more than used it");
            one.n_users -= 1;
            if one.n_users > 0 {
                continue;
            }
            match &mut one.filled {
                None => self.free.push(page),
                Some(filled) => {
                    self.clock += 1;
                    filled.kept_at = Some(self.clock);
                    self.kept.insert(self.clock, page);
                }
            }
        }
    }

    fn number_of(&self, page: u32) -> u64 {
        self.pages[page as usize].filled.as_ref().expect("pages before a full one are full").number
    }

    /// Makes the page that was used least recently one of no contents.
    fn forget_oldest(&mut self) -> Option<u32> {
        let (_, page) = self.kept.pop_first()?;
        let filled = self.pages[page as usize].filled.take().expect("kept pages are full");
        self.filled.remove(&filled.contents);
        Some(page)
    }

    fn note_use(&mut self) {
        self.most_used = self.most_used.max(self.pages.len() - self.n_available());
    }

    /// Panics when a page is lost, or counted wrongly: `users` has each use of each page by a sequence once, in any order. For tests.
    #[cfg(test)]
    pub fn check(&self, users: &[u32]) {
        let mut n_users = vec![0; self.pages.len()];
        users.iter().for_each(|&page| n_users[page as usize] += 1);
        let mut seen = vec![0; self.pages.len()];
        self.free.iter().chain(self.kept.values()).for_each(|&page| seen[page as usize] += 1);
        for (idx, page) in self.pages.iter().enumerate() {
            assert_eq!(page.n_users, n_users[idx], "users of page {idx}");
            assert_eq!(seen[idx], usize::from(page.n_users == 0), "page {idx} of {} users is available {} times", page.n_users, seen[idx]);
            let Some(filled) = &page.filled else { continue };
            assert_eq!(self.filled.get(&filled.contents), Some(&(idx as u32)), "full page {idx} is found");
            let before = self.pages.iter().find(|page| page.filled.as_ref().is_some_and(|one| one.number == filled.contents.before));
            assert!(filled.contents.before == 0 || before.is_some(), "page {idx} stands behind one that is gone");
            assert!(page.n_users == 0 || before.is_none_or(|page| page.n_users > 0), "page {idx} is used without the one before it");
        }
        assert_eq!(self.filled.len(), self.pages.iter().filter(|page| page.filled.is_some()).count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills pages with these tokens, as a sequence would; -> its pages.
    fn sequence(pool: &mut PagePool, tokens: &[u32]) -> Vec<u32> {
        let mut pages = pool.find(tokens);
        pool.share(&pages);
        for full in tokens.chunks_exact(pool.page_tokens()).skip(pages.len()) {
            let page = pool.take().unwrap();
            pages.push(pool.fill(pages.last().copied(), page, full));
        }
        pages
    }

    /// Sequences that begin alike use the same pages as far as whole pages agree, and not where the same tokens follow others.
    #[test]
    fn the_same_beginning_is_the_same_pages() {
        let mut pool = PagePool::new(10, 2);
        let a = sequence(&mut pool, &[1, 2, 3, 4, 5, 6]);
        let b = sequence(&mut pool, &[1, 2, 3, 4, 6, 5]);
        let c = sequence(&mut pool, &[3, 4, 5, 6]);
        assert_eq!(a[..2], b[..2]);
        assert!(a[2] != b[2] && !a.contains(&c[0]) && !b.contains(&c[0]));
        assert_eq!(pool.n_available(), 10 - 3 - 1 - 2);
        pool.check(&[&a[..], &b, &c].concat());
        // What is not full is not found.
        assert_eq!(pool.find(&[1, 2, 3]), a[..1]);
        assert!(pool.find(&[2, 3]).is_empty());
    }

    /// Two sequences that compute the same page at the same time end up on one; the other is free again.
    #[test]
    fn a_page_computed_twice_is_kept_once() {
        let mut pool = PagePool::new(4, 2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(pool.fill(None, a, &[1, 2]), a);
        assert_eq!(pool.fill(None, b, &[1, 2]), a);
        pool.check(&[a, a]);
        assert_eq!(pool.n_available(), 3);
    }

    /// Pages of ended sequences are found until their room is needed: ends of chains first, the longest unused first. A chain that lost
    /// its beginning first would fill the pool with pages that nobody can find.
    #[test]
    fn room_is_made_from_the_ends_of_what_was_used_long_ago() {
        let mut pool = PagePool::new(4, 1);
        let a = sequence(&mut pool, &[1, 2]);
        let b = sequence(&mut pool, &[7, 8]);
        pool.release(&a);
        pool.release(&b);
        pool.check(&[]);
        assert_eq!((pool.n_available(), pool.find(&[1, 2]).len(), pool.find(&[7, 8]).len()), (4, 2, 2));
        assert_eq!(pool.take(), Some(a[1]));
        assert_eq!((pool.find(&[1, 2]).len(), pool.find(&[7, 8]).len()), (1, 2));
        // Used again, it is no longer the oldest.
        let again = sequence(&mut pool, &[1]);
        pool.release(&again);
        assert_eq!(pool.take(), Some(b[1]));
        assert_eq!(pool.take(), Some(b[0]));
        assert_eq!(pool.take(), Some(a[0]));
        assert_eq!((pool.take(), pool.find(&[1, 2]).len(), pool.most_used()), (None, 0, 4));
        pool.check(&[0, 1, 2, 3]);
    }
}
