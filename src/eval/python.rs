//! What lm-evaluation-harness inherits from Python and its numbers depend on: `str.strip`, `str.capitalize`, and `random.Random` with
//! its `sample` (MT19937, Matsumoto and Nishimura 1998; seeding and rejection as in CPython).

use crate::text::is_python_space;

/// `text.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

/// `text.capitalize()`: the first character in title case, all others in lower case.
pub fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    // Lower case depends on neighbours (final sigma), so the whole text is turned, and its first character replaced.
    let lower = text.to_lowercase();
    let n_first: usize = first.to_lowercase().map(char::len_utf8).sum();
    title(first) + &lower[n_first..]
}

/// A character in title case.
fn title(c: char) -> String {
    match c {
        // The only letters whose title case is neither they nor their upper case.
        '\u{1c4}'..='\u{1c6}' => "\u{1c5}".into(),
        '\u{1c7}'..='\u{1c9}' => "\u{1c8}".into(),
        '\u{1ca}'..='\u{1cc}' => "\u{1cb}".into(),
        '\u{1f1}'..='\u{1f3}' => "\u{1f2}".into(),
        _ => {
            let mut upper = c.to_uppercase();
            let head = upper.next().into_iter();
            head.chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

const N: usize = 624;
const M: usize = 397;

/// `random.Random(seed)`.
#[derive(Clone)]
pub struct Random {
    state: [u32; N],
    next: usize,
}

impl Random {
    /// Seeded with a number of 32 bits.
    pub fn new(seed: u32) -> Random {
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        for i in 1..N {
            state[i] = 1_812_433_253u32.wrapping_mul(state[i - 1] ^ (state[i - 1] >> 30)).wrapping_add(i as u32);
        }
        // init_by_array of one word.
        let mut i = 1;
        let turn = |state: &mut [u32; N], i: &mut usize, factor: u32, add: &dyn Fn(u32, usize) -> u32| {
            let before = state[*i - 1] ^ (state[*i - 1] >> 30);
            state[*i] = add(state[*i] ^ before.wrapping_mul(factor), *i);
            *i += 1;
            if *i >= N {
                state[0] = state[N - 1];
                *i = 1;
            }
        };
        (0..N).for_each(|_| turn(&mut state, &mut i, 1_664_525, &|x, _| x.wrapping_add(seed)));
        (0..N - 1).for_each(|_| turn(&mut state, &mut i, 1_566_083_941, &|x, i| x.wrapping_sub(i as u32)));
        state[0] = 0x8000_0000;
        Random { state, next: N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number below `n`, 0 < n < 2^32.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.next_u32() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// Indices of `sample(range(n), k)`, k <= n.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} of {n}");
        let mut set_size = 21;
        if k > 5 {
            // 4 ** ceil(log(3 k, 4))
            set_size += 4usize.pow(((3 * k) as f64).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let (j, last) = (self.below(n - i), pool[n - i - 1]);
                    std::mem::replace(&mut pool[j], last)
                })
                .collect();
        }
        let mut taken = Vec::with_capacity(k);
        while taken.len() < k {
            let j = self.below(n);
            if !taken.contains(&j) {
                taken.push(j);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3.11 answers to `r = random.Random(1234)` and these calls in turn. One wrong constant, and every few-shot prompt is
    /// another.
    #[test]
    fn samples_are_those_of_python() {
        let mut random = Random::new(1234);
        let expected: [(usize, &[usize]); 8] = [
            (7473, &[6374, 3610, 957, 61, 742]),
            (7473, &[7462, 6610, 4769, 286, 5501]),
            (20, &[2, 3, 11, 7, 0]),
            (21, &[0, 20, 11, 15, 14]),
            (22, &[4, 2, 5, 3, 0]),
            (300, &[257, 249, 127, 33, 277, 238, 35, 45, 263, 296, 23, 138, 284, 32, 154, 246, 181, 136, 102, 232, 271, 9, 260, 36, 2]),
            (10, &[5, 2, 7, 9, 3, 1]),
            (3, &[0, 2, 1]),
        ];
        for (n, sample) in expected {
            assert_eq!(random.sample(n, sample.len()), sample, "{} of {n}", sample.len());
        }
    }

    /// What CPython 3.11 answers.
    #[test]
    fn strings_are_those_of_python() {
        for (text, capitalized) in [
            ("hello WORLD", "Hello world"),
            ("", ""),
            ("\u{df}X", "Ssx"),
            ("\u{1c6}A", "\u{1c5}a"),
            ("\u{3a3}A\u{3a3}", "\u{3a3}a\u{3c2}"),
            ("\u{fb01}N", "Fin"),
        ] {
            assert_eq!(capitalize(text), capitalized, "{text:?}");
        }
        assert_eq!(strip("\u{1f}\u{a0} a b\u{85}\u{2003}\n"), "a b");
        assert_eq!(strip("\u{200b}a"), "\u{200b}a");
    }
}
