//! Guesses at the next tokens of a sequence, to be verified in one pass (speculative decoding; here by prompt lookup: Saxena 2023): what
//! followed when the last few tokens stood there before. A pass over a guess costs little more than one over a single token as long as
//! weights are read from memory, and gives as many tokens as the guess is right, plus one. How much is guessed follows how right the
//! guesses were. Pure functions of the tokens: all ranks guess the same.

/// Longest run of last tokens that is looked for; then shorter ones, down to one token.
const LONGEST_MATCH: usize = 3;

/// Most passes without a guess after wrong ones.
const LONGEST_REST: usize = 32;

/// How much of one sequence is guessed.
#[derive(Clone, Debug)]
pub struct Guesser {
    most: usize,
    /// Tokens of the next guess.
    length: usize,
    /// Passes to go before it.
    resting: usize,
    /// Passes to rest for after the next wrong guess.
    rest: usize,
}

impl Guesser {
    /// Guesses of at most `most` tokens; 0 for none.
    pub fn new(most: usize) -> Guesser {
        Guesser { most, length: most.min(2), resting: 0, rest: 1 }
    }

    /// What may follow `tokens` in the next pass: at most `room` tokens, often none.
    pub fn guess(&mut self, tokens: &[u32], room: usize) -> Vec<u32> {
        if self.resting > 0 {
            self.resting -= 1;
            return Vec::new();
        }
        continuation(tokens, self.length.min(room))
    }

    /// So many tokens were guessed, of which the first `n_right` were right.
    pub fn learn(&mut self, n_guessed: usize, n_right: usize) {
        if n_guessed == 0 {
            return;
        }
        if n_right == 0 {
            (self.length, self.resting) = (1, self.rest);
            self.rest = LONGEST_REST.min(2 * self.rest);
        } else {
            let grown = if n_right == n_guessed { 2 * n_right } else { n_right + 1 };
            (self.length, self.rest) = (self.most.min(grown), 1);
        }
    }
}

/// `n` tokens that followed the last place before where the last 3 (else 2, else 1) tokens stood; none if there is no such place. What
/// followed may run into the end of the tokens: then it goes on from its own beginning, as a repetition would.
fn continuation(tokens: &[u32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    for length in (1..=LONGEST_MATCH).rev().filter(|&length| length < tokens.len()) {
        let (before, last) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - length..]);
        if let Some(at) = before.windows(length).rposition(|window| window == last) {
            return tokens[at + length..].iter().copied().cycle().take(n).collect();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest match counts, of equally long ones the last; repetitions go on; what never stood there before has no continuation.
    #[test]
    fn continuations_follow_the_last_longest_match() {
        assert_eq!(continuation(&[1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 2), [9, 8], "three tokens beat two that are nearer");
        assert_eq!(continuation(&[2, 3, 9, 2, 3, 7, 5, 2, 3], 3), [7, 5, 2], "the nearer of two");
        assert_eq!(continuation(&[4, 1, 2, 1], 5), [2, 1, 2, 1, 2], "goes on in turn");
        assert_eq!(continuation(&[5, 5], 3), [5, 5, 5]);
        assert!(continuation(&[5, 5, 5, 5], 0).is_empty());
        assert!(continuation(&[1, 2, 3], 4).is_empty());
        assert!(continuation(&[1], 4).is_empty());
    }

    /// Right guesses make the next ones longer up to the limit, wrong ones rarer: text that does not repeat costs one row in 33.
    #[test]
    fn guesses_follow_their_success() {
        let mut guesser = Guesser::new(8);
        let tokens = [5; 20];
        for expected in [2, 4, 8, 8] {
            let n = guesser.guess(&tokens, 100).len();
            assert_eq!(n, expected);
            guesser.learn(n, n);
        }
        assert_eq!(guesser.guess(&tokens, 3).len(), 3, "room");
        guesser.learn(3, 2);
        assert_eq!(guesser.guess(&tokens, 100).len(), 3);
        guesser.learn(3, 0);
        let n_passes = |guesser: &mut Guesser| (1..).find(|_| !guesser.guess(&tokens, 100).is_empty()).unwrap();
        let mut gaps = Vec::new();
        for _ in 0..8 {
            gaps.push(n_passes(&mut guesser));
            guesser.learn(1, 0);
        }
        assert_eq!(gaps, [2, 3, 5, 9, 17, 33, 33, 33]);
        assert!(Guesser::new(0).guess(&tokens, 100).is_empty());
    }
}
