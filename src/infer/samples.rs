//! Which responses a file of requests asks for, and which of them are made already: pure bookkeeping.

use super::request::Request;

/// One response: the `index`-th sample of a request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Sample {
    /// Which request of the file.
    pub request_idx: usize,
    /// Which of its samples.
    pub index: usize,
}

/// All samples of a list of requests in order, each made or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Done {
    /// The number of the first sample of each request, and that of all.
    firsts: Vec<usize>,
    /// A bit a sample: whether it is made.
    bits: Vec<u8>,
}

impl Done {
    /// Nothing is made yet.
    pub fn nothing(requests: &[Request]) -> Done {
        let mut firsts = Vec::with_capacity(requests.len() + 1);
        let mut n = 0;
        for request in requests {
            firsts.push(n);
            n += request.n;
        }
        firsts.push(n);
        Done { firsts, bits: vec![0; n.div_ceil(8)] }
    }

    /// How many samples there are in all.
    pub fn n_samples(&self) -> usize {
        self.firsts[self.firsts.len() - 1]
    }

    /// How many are made.
    pub fn n_made(&self) -> usize {
        self.bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Its number among all samples; None for one that the requests do not ask for.
    pub fn number(&self, sample: Sample) -> Option<usize> {
        let first = *self.firsts.get(sample.request_idx)?;
        let n = first.checked_add(sample.index)?;
        (n < *self.firsts.get(sample.request_idx + 1)?).then_some(n)
    }

    /// Notes that a sample is made.
    ///
    /// # Panics
    /// When the requests do not ask for it.
    pub fn set(&mut self, sample: Sample) {
        let n = self.number(sample).expect("a sample of these requests");
        self.bits[n / 8] |= 1 << (n % 8);
    }

    /// Those that are not made, in order.
    pub fn missing(&self) -> impl Iterator<Item = Sample> + '_ {
        let of_request = |request_idx: usize| {
            let (first, end) = (self.firsts[request_idx], self.firsts[request_idx + 1]);
            (first..end).filter(|&n| self.bits[n / 8] >> (n % 8) & 1 == 0).map(move |n| Sample { request_idx, index: n - first })
        };
        (0..self.firsts.len() - 1).flat_map(of_request)
    }

    /// The bits, for other ranks that have the same requests.
    pub fn bits_mut(&mut self) -> &mut [u8] {
        &mut self.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbering goes through all samples once, in order, and what is set is no longer missing.
    #[test]
    fn samples_are_counted_once() {
        let request = |id: &str, n| Request { n, ..Request::new(id, vec![1], 1) };
        let mut done = Done::nothing(&[request("a", 3), request("b", 1), request("c", 9)]);
        let all: Vec<Sample> = done.missing().collect();
        assert_eq!((all.len(), done.n_samples(), done.n_made()), (13, 13, 0));
        assert!(all.is_sorted());
        let numbers: Vec<usize> = all.iter().map(|&sample| done.number(sample).unwrap()).collect();
        assert_eq!(numbers, (0..13).collect::<Vec<_>>());
        for outside in [(0, 3), (1, 1), (3, 0), (0, usize::MAX)] {
            assert_eq!(done.number(Sample { request_idx: outside.0, index: outside.1 }), None, "{outside:?}");
        }
        for made in [all[2], all[3], all[12]] {
            done.set(made);
        }
        let missing: Vec<Sample> = done.missing().collect();
        assert_eq!(missing, all.iter().copied().filter(|sample| ![all[2], all[3], all[12]].contains(sample)).collect::<Vec<_>>());
        assert_eq!(done.n_made(), 3);
    }
}
